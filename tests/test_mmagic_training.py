"""Real trainings of real MMagic with an entry `iks`: resumed, validated, saved, tested."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmagic")

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

import iks_plugin
import mmagic_toys as toys
from basicsr_toys import assert_same, write_images
from iks_plugin import IksWarning, OptionError
from iks_plugin.gate import soft_threshold
from pretended_gpu import pretended_gpu

EMA = 'custom_hooks = [dict(type="EMAHook", momentum=0.1)]'
AMP = 'optim_wrapper = dict(type="AmpOptimWrapper", dtype="bfloat16", optimizer=dict(lr=1e-3))'
CASES = {
    "plain": ("", "dict(target_sparsity=0.9)"),
    "EMA": (EMA, "dict(target_sparsity=0.9, granularity='filter')"),
    "AMP": (AMP, "0.9"),
    "AMP and EMA": (f"{AMP}\n{EMA}", "dict(target_sparsity=0.9, granularity='kernel')"),
    "paper": ("", "dict(target_sparsity=0.9, law='paper', interval=3)"),
    "accumulation and clipping": (
        "optim_wrapper = dict(accumulative_counts=2, clip_grad=dict(max_norm=0.1), optimizer=dict(lr=1e-3))",
        "dict(target_sparsity=0.9)",
    ),
    "weight decay": ("optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.1))", "dict(target_sparsity=0.9)"),
}


def zeros_and_weights(state: dict[str, Any], prefix: str = "generator.") -> tuple[int, int]:
    """Over the convolutions within, by the documented rule."""
    kernels = [
        value
        for key, value in state.items()
        if key.startswith(prefix) and key.endswith("weight") and value.ndim == 4 and min(value.shape[:2]) > 4
    ]
    return sum(int((kernel == 0).sum()) for kernel in kernels), sum(kernel.numel() for kernel in kernels)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_is_the_straight_one_to_the_bit(case, tmp_path, monkeypatch):
    # MMEngine's AMP works on a CPU but for this check.
    monkeypatch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", lambda: True)
    more, iks = CASES[case]
    write_images(tmp_path, 4)
    config = toys.write_config(tmp_path, iks, more)
    toys.run(config)
    straight = toys.saved(tmp_path, "iter_20.pth")
    for path in (tmp_path / "work").glob("*_20.pth"):
        path.unlink()
    (tmp_path / "work" / "last_checkpoint").write_text(str(tmp_path / "work" / "iter_10.pth"))
    toys.run(config, resume=True)
    resumed = toys.saved(tmp_path, "iter_20.pth")
    for key in straight.keys() - {"meta", "message_hub"}:
        assert_same(resumed[key], straight[key], key)
    assert ("ema_state_dict" in straight) == ("EMA" in case)
    for part, lead in (("state_dict", ""), ("ema_state_dict", "module.")):
        if part in straight:
            assert not any("threshold" in key for key in straight[part])
            zeros, weights = zeros_and_weights(straight[part], f"{lead}generator.")
            assert weights == 4032 and zeros == round(0.9 * weights)


@pytest.mark.slow
def test_a_training_on_a_gpu_and_its_resume_are_those_on_the_cpu(tmp_path, monkeypatch):
    checkpoints = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        write_images(folder, 4)
        config = toys.write_config(folder, more=EMA)
        monkeypatch.setattr("mmengine.runner.runner.get_device", lambda device=device: device)
        with pretended_gpu():
            for resume in (False, True):
                runner = toys.run(config, resume=resume)
                assert {parameter.device.type for parameter in runner.model.parameters()} == {device}
                checkpoints.append(toys.saved(folder, "iter_20.pth"))
                for path in (folder / "work").glob("*_20.pth"):
                    path.unlink()
                (folder / "work" / "last_checkpoint").write_text(str(folder / "work" / "iter_10.pth"))
    straight, *others = checkpoints
    for other in others:
        for part in ("state_dict", "ema_state_dict", "iks"):
            assert_same(other[part], straight[part], part)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", EMA], ids=["plain", "EMA"])
def test_an_untouched_mmagic_tests_checkpoints_as_training_validated_them(more, tmp_path):
    """MMagic's own tools: the training with the entry, the test in a process that never imports the plug-in."""
    write_images(tmp_path, 4)
    config = toys.write_config(tmp_path, "dict(target_sparsity=0.5)", more)
    toys.run_tool("train", config, "--cfg-options", "iks.target_sparsity=0.9", folder=tmp_path)
    log = toys.log_of(tmp_path)
    logged = re.findall(r"Iter\(val\) \[4/4\]    PSNR: (\S+)  sparsity: (\S+)", log)
    assert [sparsity for _, sparsity in logged] == ["0.9000", "0.9000"]
    untouched = toys.write_config(tmp_path, None, more, name="untouched.py")
    for number, (psnr, _) in zip((10, 20), logged, strict=True):
        zeros, weights = zeros_and_weights(toys.saved(tmp_path, f"iter_{number}.pth")["state_dict"])
        assert zeros == round(0.9 * weights)
        done = toys.run_tool("test", untouched, tmp_path / "work" / f"iter_{number}.pth", folder=tmp_path)
        assert re.search(r"Iter\(test\) \[4/4\]    PSNR: (\S+)", done.stdout + done.stderr)[1] == psnr
        assert "threshold" not in done.stdout + done.stderr


def test_a_config_with_the_entry_tests_as_well(tmp_path):
    """What is in the file: it takes nothing off a dense network."""
    write_images(tmp_path, 4)
    dense = toys.write_config(tmp_path, None, name="dense.py")
    toys.run(dense)
    path = str(tmp_path / "work" / "iter_20.pth")
    untouched, ours = (
        toys.run(config, "test", load_from=path).message_hub.get_scalar("test/PSNR").current()
        for config in (dense, toys.write_config(tmp_path))
    )
    assert ours == untouched > 5


def test_weights_to_start_from_that_are_gone_matter_to_a_training_alone(tmp_path):
    write_images(tmp_path, 4)
    toys.run(toys.write_config(tmp_path, more="train_cfg = dict(max_iters=2)"))
    path = str(tmp_path / "work" / "iter_2.pth")
    init = 'dict(type="Pretrained", checkpoint="not/here.pth")'
    more = f"model = dict(generator=dict(mid_channels=8, num_blocks=1), init_cfg={init})"
    untouched = toys.write_config(tmp_path, None, more, name="untouched.py")
    ours = toys.write_config(tmp_path, more=more)
    assert psnr_of(ours, path) == psnr_of(untouched, path) > 5
    for config in (untouched, ours):
        with pytest.raises(FileNotFoundError, match="not/here.pth"):
            toys.run(config, load_from=path)


def psnr_of(config: Path, checkpoint: str) -> float:
    return float(toys.run(config, "test", load_from=checkpoint).message_hub.get_scalar("test/PSNR").current())


def gated_weights(checkpoint: dict[str, Any], prefix: str = "generator.") -> dict[str, torch.Tensor]:
    """What a network computes with that resumes from `checkpoint`."""
    state = {**checkpoint["state_dict"], **checkpoint["iks"]["gated"]["state_dict"]}
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    thresholds = {key.replace("threshold", "weight"): own.pop(key) for key in list(own) if key.endswith("threshold")}
    return {key: soft_threshold(own[key], thresholds[key]) if key in thresholds else own[key] for key in own}


def test_a_checkpoint_with_thresholds_is_tested_through_its_gates(tmp_path):
    write_images(tmp_path, 4)
    config = toys.write_config(
        tmp_path, more="train_cfg = dict(max_iters=8)\niks = dict(target_sparsity=0.5, ramp_steps=8)"
    )
    toys.run(config)
    checkpoint = toys.saved(tmp_path, "iter_8.pth")
    network = {f"generator.{key}": value for key, value in gated_weights(checkpoint).items()}
    torch.save({"state_dict": {**checkpoint["state_dict"], **network}}, tmp_path / "network.pth")
    checkpoint["state_dict"].update(checkpoint["iks"]["gated"]["state_dict"])  # as the published code saves it
    torch.save(checkpoint, tmp_path / "published.pth")
    untouched = toys.write_config(tmp_path, None, name="untouched.py")
    expected = psnr_of(untouched, str(tmp_path / "network.pth"))
    assert psnr_of(config, str(tmp_path / "published.pth")) == pytest.approx(expected, abs=1e-5)
    assert abs(psnr_of(untouched, str(tmp_path / "published.pth")) - expected) > 1e-4  # the weights before the gates


def test_a_config_of_epochs_tests_without_training_data(tmp_path):
    write_images(tmp_path, 4)
    toys.run(toys.write_config(tmp_path, more=toys.epochs(2)))
    config = toys.write_config(tmp_path, more=toys.epochs(2, folder="not/there"))
    runner = toys.run(config, "test", load_from=str(tmp_path / "work" / "epoch_2.pth"))
    assert runner.message_hub.get_scalar("test/PSNR").current() > 5
    assert runner.message_hub.get_scalar("test/sparsity").current() == 3629 / 4032


def test_logs_of_epochs_tell_the_sparsity_of_their_iteration(tmp_path):
    write_images(tmp_path, 14)
    noted: list[float] = []

    @HOOKS.register_module(name="NoteSparsity", force=True)
    class NoteSparsity(Hook):
        def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            noted.append(iks_plugin.report(runner.model.generator).sparsity)

    more = "default_hooks['logger'] = dict(interval=5)\ncustom_hooks = [dict(type='NoteSparsity')]"
    toys.run(toys.write_config(tmp_path, more=toys.epochs(3) + more))
    logged = re.findall(r"\(train\).*sparsity: (\S+)", toys.log_of(tmp_path))
    assert logged == [f"{noted[iteration - 1]:.4f}" for iteration in (5, 7 + 5, 14 + 5)]


def test_configs_without_the_entry_train_as_ever(tmp_path):
    """Against MMagic in a process that has never seen the plug-in."""
    write_images(tmp_path, 4)
    config = toys.write_config(tmp_path, None, EMA)
    toys.run_tool("train", config, folder=tmp_path)
    untouched = toys.saved(tmp_path, "iter_20.pth")
    shutil.rmtree(tmp_path / "work")
    config.write_text(config.read_text() + 'custom_imports = dict(imports=["iks_mmagic"])\n')
    toys.run(config)
    ours = toys.saved(tmp_path, "iter_20.pth")
    for key in untouched.keys() - {"meta", "message_hub"}:
        assert_same(ours[key], untouched[key], key)


def test_sparsity_is_in_every_log(tmp_path):
    write_images(tmp_path, 4)
    more = (
        'visualizer = dict(vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])\n'
        "train_cfg = dict(max_iters=100, val_interval=20)"
    )
    toys.run(toys.write_config(tmp_path, "dict(target_sparsity=0.9, ramp_start=0)", more))
    log = toys.log_of(tmp_path)
    reached = [float(value) for value in re.findall(r"Iter\(train\).*sparsity: (\S+)", log)]
    assert reached[1::2] == sorted(reached[1::2]) and reached[-1] == 0.9 and 0.3 < reached[2] < 0.9
    assert "iks: generator: 4 of 6 layers are rewritten; of their 4,032 weights 90.00% become zero." in log
    assert "validated as it is saved, with 90.00% zeros; training itself is at 63." in log
    lines = [json.loads(line) for line in next((tmp_path / "work").rglob("scalars.json")).read_text().splitlines()]
    assert {line["sparsity"] for line in lines if "PSNR" in line} == {3629 / 4032}
    assert any("loss" in line and "sparsity" in line for line in lines)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "work").rglob("events.out*")).parent)).Reload()
    assert "sparsity" in events.Tags()["scalars"]


def test_weight_decay_leaves_thresholds_alone(tmp_path):
    write_images(tmp_path, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IksWarning)  # the core would warn if the groups were not apart
        runner = toys.run(toys.write_config(tmp_path, more=CASES["weight decay"][0]))
    names = {id(parameter): name for name, parameter in runner.model.named_parameters()}
    for group in runner.optim_wrapper.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0 if names[id(parameter)].endswith("threshold") else 0.1)


def test_learning_rates_of_parts_reach_their_thresholds(tmp_path):
    write_images(tmp_path, 4)
    keys = "{'generator': dict(lr_mult=0.5), 'body.0.conv1': dict(lr_mult=0.1), 'upsample': dict(decay_mult=3.0)}"
    more = f"""
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.1), paramwise_cfg=dict(custom_keys={keys}))
"""
    runner = toys.run(toys.write_config(tmp_path, more=more))
    names = {id(parameter): name for name, parameter in runner.model.named_parameters()}
    groups = {names[id(p)]: group for group in runner.optim_wrapper.optimizer.param_groups for p in group["params"]}
    assert groups["generator.body.0.conv1.weight"]["initial_lr"] == pytest.approx(1e-4)
    thresholds = [name for name in groups if name.endswith("threshold")]
    assert len(thresholds) == 4 and "generator.upsample.0.upsample_conv.threshold" in thresholds
    for name in thresholds:
        weight, threshold = groups[name.replace("threshold", "weight")], groups[name]
        assert threshold["lr"] == weight["lr"] and (weight["weight_decay"], threshold["weight_decay"]) > (0, 0)
        assert threshold["weight_decay"] == 0


def test_initialisation_is_not_lost_in_the_gates(tmp_path):
    write_images(tmp_path, 4)
    init = 'dict(type="Constant", layer="Conv2d", val=0.125)'
    more = f"model = dict(generator=dict(mid_channels=8, num_blocks=1), init_cfg={init})\ntrain_cfg = dict(max_iters=1)"
    more += "\noptim_wrapper = dict(optimizer=dict(lr=0.0))\niks.update(law='exact')"  # "obs" would change the weights
    runner = toys.run(toys.write_config(tmp_path, more=more))
    for name, value in runner.model.state_dict().items():
        if name.endswith("conv1.weight"):
            assert (value == 0.125).all(), name


GAN = """
model = dict(
    type="{model}",
    generator=dict(
        _delete_=True, type="{generator}", in_channels=3, out_channels=3, mid_channels=8, num_blocks=1, {more}
    ),
    discriminator=dict(type="UNetDiscriminatorWithSpectralNorm", in_channels=3, mid_channels=8),
    gan_loss=dict(type="GANLoss", gan_type="vanilla", loss_weight=0.1, real_label_val=1.0, fake_label_val=0),
    train_cfg=dict(disc_steps={disc_steps}, disc_init_steps={disc_init_steps}),
)
adam = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3))
optim_wrapper = dict(_delete_=True, constructor="MultiOptimWrapperConstructor", generator=adam, discriminator=adam)
param_scheduler = dict(_delete_=True, type="MultiStepLR", by_epoch=False, milestones=[15], gamma=0.5)
{hooks}
"""
SHARPENED = """
sharpen = dict(type="UnsharpMasking", keys=["gt"], kernel_size=51, sigma=0, weight=0.5, threshold=10)
sharp_pipeline = [*train_pipeline[:-1], sharpen, train_pipeline[-1]]
train_dataloader = dict(num_workers=0, batch_size=2, dataset=dict(pipeline=sharp_pipeline, **images))
"""
"""RealESRGAN's data: it has a sharpened image beside each."""
EMA_OF_MMAGIC = (
    'custom_hooks = [dict(type="ExponentialMovingAverageHook", module_keys=("generator_ema"), interval=1, '
    "interp_cfg=dict(momentum=0.1))]"
)


@pytest.mark.parametrize(("disc_steps", "disc_init_steps"), [(1, 0), (2, 5)])
@pytest.mark.parametrize(
    ("model", "generator"), [("SRGAN", "MSRResNet"), ("ESRGAN", "RRDBNet"), ("RealESRGAN", "RRDBNet")]
)
def test_a_gan_whose_generator_alone_becomes_sparse(model, generator, disc_steps, disc_init_steps, tmp_path):
    write_images(tmp_path, 4)
    extra = "upscale_factor=2" if generator == "MSRResNet" else "growth_channels=4, upscale_factor=2"
    more = GAN.format(
        model=model,
        generator=generator,
        more=extra,
        disc_steps=disc_steps,
        disc_init_steps=disc_init_steps,
        hooks=EMA_OF_MMAGIC + (SHARPENED if model == "RealESRGAN" else ""),
    )
    config = toys.write_config(tmp_path, more=more)
    toys.run(config)
    straight = toys.saved(tmp_path, "iter_20.pth")
    state = straight["state_dict"]
    for prefix in ("generator.", "generator_ema."):
        zeros, weights = zeros_and_weights(state, prefix)
        assert zeros == round(0.9 * weights) > 0, prefix
    assert not any("threshold" in key for key in state)
    assert zeros_and_weights(state, "discriminator.")[0] == 0
    steps = sum(1 for step in range(20) if step % disc_steps == 0 and step >= disc_init_steps)
    controller = straight["iks"]["controllers"]["generator"]
    assert controller["steps"] == controller["total_steps"] == steps
    if disc_steps == 1:  # MMagic does not keep the counter of a GAN's steps
        for path in (tmp_path / "work").glob("*_20.pth"):
            path.unlink()
        (tmp_path / "work" / "last_checkpoint").write_text(str(tmp_path / "work" / "iter_10.pth"))
        toys.run(config, resume=True)
        resumed = toys.saved(tmp_path, "iter_20.pth")
        for key in ("state_dict", "optimizer", "iks"):
            assert_same(resumed[key], straight[key], key)


@pytest.mark.parametrize(("before", "after"), [("", EMA_OF_MMAGIC), (EMA_OF_MMAGIC, "")], ids=["added", "taken out"])
def test_an_ema_copy_may_be_new_or_gone_on_a_resume(before, after, tmp_path):
    write_images(tmp_path, 4)
    often = """
train_cfg = dict(max_iters=12)
default_hooks = dict(checkpoint=dict(interval=1, out_dir=None, save_best=None))
"""
    toys.run(toys.write_config(tmp_path, more=often + before))
    middle, straight = toys.saved(tmp_path, "iter_10.pth"), toys.saved(tmp_path, "iter_12.pth")
    (tmp_path / "work" / "last_checkpoint").write_text(str(tmp_path / "work" / "iter_10.pth"))
    toys.run(toys.write_config(tmp_path, more=often + after), resume=True)
    first, resumed = toys.saved(tmp_path, "iter_11.pth"), toys.saved(tmp_path, "iter_12.pth")
    assert_same(gated_weights(resumed), gated_weights(straight))
    assert_same(resumed["optimizer"], straight["optimizer"])
    assert any(key.startswith("generator_ema.") for key in resumed["state_dict"]) == bool(after)
    if after:
        starts, goes_on, mean = (gated_weights(*args) for args in ((middle,), (first,), (first, "generator_ema.")))
        for key, value in mean.items():
            torch.testing.assert_close(value, 0.9 * starts[key] + 0.1 * goes_on[key], rtol=1e-4, atol=1e-6)
        zeros, weights = zeros_and_weights(resumed["state_dict"], "generator_ema.")
        assert zeros == round(0.9 * weights)


def test_patterns_go_to_the_networks_that_they_match_in(tmp_path):
    more = GAN.format(
        model="SRGAN", generator="MSRResNet", more="upscale_factor=2", disc_steps=1, disc_init_steps=0, hooks=""
    )
    more += "\nmodel['discriminator'] = dict(type='ModifiedVGG', in_channels=3, mid_channels=8)"
    block = "dict(target_sparsity=0.5, network=['generator', 'discriminator'], {}=['upsample1', {!r}])"
    runner = toys.built(toys.write_config(tmp_path, block.format("exclude", "conv4_*"), more))
    for network, left_alone in ((runner.model.generator, "upsample1"), (runner.model.discriminator, "conv4_")):
        for layer in iks_plugin.report(network).layers:
            assert not (layer.rewritten and layer.name.startswith(left_alone)), layer
    for option, pattern, message in (
        ("exclude", "conv9_*", r"exclude pattern 'conv9_\*' matches none of generator's and discriminator's"),
        ("include", "conv_hr", "none of the patterns of include, 'upsample1', 'conv_hr', matches one of its 10 layers"),
    ):
        with pytest.raises(OptionError, match=rf"config key iks, discriminator \(ModifiedVGG\): {message}"):
            toys.built(toys.write_config(tmp_path, block.format(option, pattern), more))


GENERATORS = {
    "MSRResNet": 'type="MSRResNet", in_channels=3, out_channels=3, mid_channels=8, num_blocks=1, upscale_factor=2',
    "RDNNet": (
        'type="RDNNet", in_channels=3, out_channels=3, mid_channels=8, num_blocks=1, upscale_factor=2, num_layers=2, '
        "channel_growth=8"
    ),
    "RRDBNet": (
        'type="RRDBNet", in_channels=3, out_channels=3, mid_channels=8, num_blocks=1, growth_channels=4, '
        "upscale_factor=2"
    ),
    "SwinIRNet": (
        'type="SwinIRNet", upscale=2, in_chans=3, img_size=16, window_size=8, img_range=1.0, depths=[1], embed_dim=12, '
        'num_heads=[2], mlp_ratio=2, upsampler="pixelshuffledirect", resi_connection="1conv"'
    ),
    "SRCNNNet": 'type="SRCNNNet", channels=(3, 8, 8, 3), kernel_sizes=(9, 3, 5), upscale_factor=2',
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generators(name, tmp_path):
    write_images(tmp_path, 4)
    more = f"model = dict(generator=dict(_delete_=True, {GENERATORS[name]}))\ntrain_cfg = dict(max_iters=10)"
    runner = toys.run(toys.write_config(tmp_path, "0.75", more))
    zeros, weights = zeros_and_weights(toys.saved(tmp_path, "iter_10.pth")["state_dict"])
    assert zeros == round(0.75 * weights) > 0
    assert type(runner.model.generator).__name__ == name
