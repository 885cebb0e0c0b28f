"""Real trainings of real BasicSR with an `iks:` block: every kind of model, resumed, validated, saved."""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.models import build_model
from basicsr.utils.registry import MODEL_REGISTRY
from torch.optim.optimizer import register_optimizer_step_post_hook

import basicsr_toys as toys
from iks_plugin import IksError, IksWarning, OptionError
from iks_plugin.gate import soft_threshold
from pretended_gpu import pretended_gpu

EMA = {"train": {"ema_decay": 0.5}}


def video(folder: Path) -> dict[str, Any]:
    """Changes of `options` for a recurrent video model: two clips of two frames for training, one for validation."""
    for clip in ("001", "002", "011"):
        toys.write_images(folder / "frames", 2, size=256, scale=4)
        for kind in ("HR", "LR"):
            split = "val" if clip == "011" else "train"
            shutil.move(folder / "frames" / kind, folder / split / kind / clip)
    (folder / "meta.txt").write_text("001 1 (256,256,3)\n002 1 (256,256,3)\n")
    roots = {
        split: {"dataroot_gt": str(folder / split / "HR"), "dataroot_lq": str(folder / split / "LR")}
        for split in ("train", "val")
    }
    return {
        "model_type": "VideoRecurrentModel",
        "scale": 4,
        "network_g": toys.BASICVSR,
        "datasets": {
            "train": {
                **roots["train"],
                "name": "REDS4",
                "type": "REDSRecurrentDataset",
                "meta_info_file": str(folder / "meta.txt"),
                "val_partition": "REDS4",
                "test_mode": False,
                "io_backend": toys.DISK,
                "num_frame": 2,
                "gt_size": 256,
                "interval_list": [1],
                "random_reverse": False,
                "use_hflip": False,
                "use_rot": False,
                "num_worker_per_gpu": 0,
                "batch_size_per_gpu": 1,
                "dataset_enlarge_ratio": 1,
            },
            "val": {
                **roots["val"],
                "name": "REDS4",
                "type": "VideoRecurrentTestDataset",
                "cache_data": True,
                "io_backend": toys.DISK,
                "num_frame": -1,
            },
        },
        "train": {"fix_flow": 2, "flow_lr_mul": 0.5, "total_iter": 4},
        "val": {"val_freq": 4},
        "logger": {"save_checkpoint_freq": 2},
    }


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SRModel": (lambda folder: EMA, {}),
    "SRModel, no EMA": (lambda folder: {}, {"law": "paper", "interval": 3}),
    "weight decay": (lambda folder: {"train": {"optim_g": {**toys.ADAM, "weight_decay": 0.1}, "ema_decay": 0.5}}, {}),
    "warm-up": (lambda folder: {"train": {"warmup_iter": 8}}, {}),
    "warm-up and weight decay": (
        lambda folder: {"train": {"warmup_iter": 8, "optim_g": {**toys.ADAM, "weight_decay": 0.1}}},
        {"granularity": "filter"},
    ),
    "cosine": (
        lambda folder: {
            "train": {
                "scheduler": {
                    "type": "CosineAnnealingRestartLR",
                    "periods": [8, 12],
                    "restart_weights": [1, 1],
                    "eta_min": 1e-7,
                }
            }
        },
        {"granularity": "kernel"},
    ),
    "SRGANModel": (lambda folder: toys.adversarial("SRGANModel", ema_decay=0.5), {}),
    "ESRGANModel": (
        lambda folder: toys.adversarial("ESRGANModel", toys.RRDBNET, net_d_iters=2, net_d_init_iters=4, ema_decay=0.5),
        {},
    ),
    "SwinIRModel": (lambda folder: {"model_type": "SwinIRModel", "network_g": toys.SWINIR, **EMA}, {}),
    "VideoRecurrentModel": (video, {}),
}


def prepared(folder: Path, case: str) -> dict[str, Any]:
    changes, block = CASES[case]
    toys.write_images(folder)
    return toys.options(folder, iks={"target_sparsity": 0.9, **block}, **{"network_g": toys.EDSR, **changes(folder)})


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_is_the_straight_one_to_the_bit(case, tmp_path):
    opt = prepared(tmp_path, case)
    end = opt["train"]["total_iter"]
    middle = end // 2
    toys.train(opt, tmp_path)
    straight = {
        name: toys.saved(tmp_path, name) for name in (f"net_g_{middle}.pth", f"net_g_{end}.pth", "net_g_latest.pth")
    }
    state = toys.saved(tmp_path, f"{end}.state", "training_states")
    experiment = tmp_path / "experiments" / "run"
    for path in [*experiment.glob(f"*/*{end}.*"), experiment / "models" / "net_g_latest.pth"]:
        path.unlink()

    log = toys.train(opt, tmp_path, "--auto_resume")
    assert f"iter: {middle}." in re.search("Resuming training from .*", log)[0]
    toys.assert_same({name: toys.saved(tmp_path, name) for name in straight}, straight)
    toys.assert_same(toys.saved(tmp_path, f"{end}.state", "training_states")["iks"], state["iks"])
    toys.assert_same(toys.saved(tmp_path, f"{end}.state", "training_states")["optimizers"], state["optimizers"])

    gated = toys.convolutions_within(build_network(opt["network_g"]))
    for name, content in straight.items():
        assert sorted(content) == (["params", "params_ema"] if opt["train"].get("ema_decay") else ["params"])
        for key, params in content.items():
            build_network(opt["network_g"]).load_state_dict(params, strict=True)
            zeros, weights = toys.zeros_and_weights(params, gated)
            assert zeros == round(0.9 * weights), (name, key)


@contextmanager
def devices_of_steps():
    """The types of the devices whose parameters optimizers have changed meanwhile."""
    devices = set()

    def note(optimizer, args, kwargs):
        devices.update(parameter.device.type for group in optimizer.param_groups for parameter in group["params"])

    handle = register_optimizer_step_post_hook(note)
    try:
        yield devices
    finally:
        handle.remove()


@pytest.mark.slow
def test_a_training_on_a_gpu_and_its_resume_are_those_on_the_cpu(tmp_path):
    saved = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        opt = {**prepared(folder, "SRModel"), "num_gpu": int(device == "cuda")}
        with pretended_gpu(), devices_of_steps() as devices:
            toys.train(opt, folder)
            saved.append(toys.saved(folder, "net_g_20.pth"))
            for path in (folder / "experiments" / "run").glob("*/*20.*"):
                path.unlink()
            toys.train(opt, folder, "--auto_resume")
            saved.append(toys.saved(folder, "net_g_20.pth"))
        assert devices == {device}
    straight, *others = saved
    for other in others:
        toys.assert_same(other, straight)


@pytest.mark.parametrize("case", ["SRModel", "SRGANModel", "SwinIRModel", "VideoRecurrentModel"])
def test_validation_is_of_what_is_saved(case, tmp_path):
    opt = prepared(tmp_path, case)
    training = toys.train(opt, tmp_path)
    path = tmp_path / "experiments" / "run" / "models" / "net_g_latest.pth"
    plain = copy.deepcopy(opt)
    plain["datasets"] = {"test_1": {**opt["datasets"]["val"]}}
    plain["path"] = {"pretrain_network_g": str(path), "strict_load_g": True, "param_key_g": "params_ema"}
    if case == "VideoRecurrentModel":  # it validates the network itself, not its EMA copy
        plain["path"]["param_key_g"] = "params"
    plain["val"]["suffix"] = None
    for block in (opt["iks"], None):
        tested = {**plain, "iks": block} if block else {key: value for key, value in plain.items() if key != "iks"}
        assert psnr_in(toys.test(tested, tmp_path)) == psnr_in(training)


def psnr_in(log: str) -> float:
    return float(re.findall(r"# psnr: ([0-9.]+)", log)[-1])


def test_the_log_tells_the_sparsity_everywhere(tmp_path):
    opt = prepared(tmp_path, "SRModel")
    opt["train"].update(total_iter=100)
    opt["iks"]["ramp_start"] = 0
    opt["logger"].update(print_freq=10, use_tb_logger=True)
    opt["val"].update(val_freq=20)
    log = toys.train(opt, tmp_path)
    reached = [float(value) for value in re.findall(r"l_pix: \S+ sparsity: (\S+)", log)]
    assert len(reached) == 10 and reached == sorted(reached)
    assert 0.3 < reached[0] < reached[1] < 0.9 and reached[-1] == pytest.approx(0.9, abs=1e-3)
    assert "iks: network_g: 4 of 6 layers are rewritten; of their 4,032 weights 90.00% become zero." in log
    assert "iks: 4,032 of these parameters are thresholds, which no file has: 4,531 without" in log
    validations = re.findall(r"# sparsity: 0.9000\t3,629 of 4,032 weights of network_g are zero, .*", log)
    assert len(validations) == 6
    assert "; training itself is at 6" in validations[0] and validations[-1].endswith("as in what is saved")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb_logger" / "run")).Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["sparsity"] == pytest.approx(reached, abs=1e-4)
    assert scalars["metrics/images/sparsity"] == pytest.approx([3629 / 4032] * 6)
    assert {"iks/sparsity", "iks/target_sparsity", "iks_layers/body.0.conv1"} <= scalars.keys()


def test_option_files_without_the_block_train_as_ever(tmp_path):
    """Against BasicSR in a process that has never seen the plug-in."""
    toys.write_images(tmp_path)
    opt = toys.options(tmp_path, iks=None, train={"ema_decay": 0.5, "optim_g": {**toys.ADAM, "weight_decay": 0.1}})
    toys.train(opt, tmp_path)
    ours = [toys.saved(tmp_path, "net_g_20.pth"), toys.saved(tmp_path, "20.state", "training_states")]
    shutil.rmtree(tmp_path / "experiments")
    toys.run_python(*untouched_basicsr(tmp_path, "train", opt), cwd=tmp_path)
    toys.assert_same(ours, [toys.saved(tmp_path, "net_g_20.pth"), toys.saved(tmp_path, "20.state", "training_states")])


ALIAS = """
import importlib.util, sys
if importlib.util.find_spec("torchvision.transforms.functional_tensor") is None:
    import torchvision.transforms._functional_tensor as module
    sys.modules["torchvision.transforms.functional_tensor"] = module
"""


def untouched_basicsr(folder: Path, what: str, opt: dict[str, Any]) -> list[str | Path]:
    """Arguments of Python that run BasicSR's own pipeline without the plug-in."""
    script = folder / "untouched.py"
    script.write_text(
        f"{ALIAS}\nfrom basicsr.{what} import {what}_pipeline\n{what}_pipeline({str(folder)!r})\n"
        "assert not any(name.startswith('iks') for name in sys.modules)\n"
    )
    return [script, "-opt", toys.write_options(opt, folder)]


def test_files_give_the_logged_psnr_in_an_untouched_basicsr(tmp_path):
    opt = prepared(tmp_path, "SRModel")
    training = toys.train(opt, tmp_path)
    for name in ("net_g_10.pth", "net_g_20.pth"):
        opt["datasets"] = {"test_1": {**toys.options(tmp_path)["datasets"]["val"]}}
        opt["path"] = {"pretrain_network_g": str(tmp_path / "experiments" / "run" / "models" / name)}
        opt["path"].update(strict_load_g=True, param_key_g="params_ema")
        opt["val"]["suffix"] = None
        toys.run_python(*untouched_basicsr(tmp_path, "test", opt), cwd=tmp_path)
        logged = re.findall(r"# psnr: ([0-9.]+)", training)[0 if name == "net_g_10.pth" else 1]
        assert psnr_in(toys.newest_log(tmp_path / "results" / "run")) == float(logged)
        shutil.rmtree(tmp_path / "results")


def test_dense_pretrained_weights_load_strictly_and_without_warnings(tmp_path):
    toys.write_images(tmp_path)
    dense = toys.options(tmp_path, iks=None, train={"ema_decay": 0.5})
    toys.train(dense, tmp_path)
    path = tmp_path / "experiments" / "run" / "models" / "net_g_latest.pth"
    opt = toys.options(tmp_path, path={"pretrain_network_g": str(path)}, name="sparse", train={"ema_decay": 0.5})
    log = toys.train(opt, tmp_path)
    assert f"from {path}, with param key: [params]" in log
    assert "Current net - loaded net" not in log and "WARNING" not in log


def test_weight_decay_leaves_thresholds_alone(tmp_path):
    opt = prepared(tmp_path, "weight decay")
    opt["train"]["optim_g"]["weight_decay"] = 1e3
    with warnings.catch_warnings():
        warnings.simplefilter("error", IksWarning)  # the core would warn if the groups were not apart
        toys.train(opt, tmp_path)
    groups = toys.saved(tmp_path, "20.state", "training_states")["optimizers"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1e3, 0.0]
    assert [len(group["params"]) for group in groups] == [12, 4]


def test_groups_that_a_model_makes_itself_keep_their_options_and_layers_that_it_freezes_are_warned_of(tmp_path):
    opt = prepared(tmp_path, "VideoRecurrentModel")
    opt["train"]["optim_g"] = {**toys.ADAM, "weight_decay": 0.1}
    with pytest.warns(IksWarning, match="24 rewritten layers do not require a gradient .*spynet.basic_module.0"):
        toys.train(opt, tmp_path)
    groups = toys.saved(tmp_path, "4.state", "training_states")["optimizers"][0]["param_groups"]
    rates = [group["initial_lr"] for group in groups]
    assert rates == [1e-3, 1e-3, 5e-4, 5e-4] and [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]


def test_the_generator_alone_becomes_sparse_unless_told_otherwise(tmp_path):
    opt = prepared(tmp_path, "SRGANModel")
    log = toys.train(opt, tmp_path)
    assert "sparsity: " in log and "sparsity_g" not in log
    assert not any((value == 0).any() for value in toys.saved(tmp_path, "net_d_latest.pth")["params"].values())

    opt = two_sparse_networks(tmp_path)
    log = toys.train(opt, tmp_path)
    assert re.search(r"sparsity_g: \S+ sparsity_d: \S+", log)
    for key, name in (("network_g", "net_g_latest.pth"), ("network_d", "net_d_latest.pth")):
        params = toys.saved(tmp_path, name)["params"]
        zeros, weights = toys.zeros_and_weights(params, toys.convolutions_within(build_network(opt[key])))
        assert zeros == round(0.5 * weights)


def two_sparse_networks(folder: Path, **block: Any) -> dict[str, Any]:
    """The options of a short training of a GAN that makes generator and discriminator sparse."""
    opt = prepared(folder, "SRGANModel")
    opt["iks"] = {"target_sparsity": 0.5, "network": ["network_g", "network_d"], **block}
    opt["network_d"] = {"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 8, "input_size": 128}
    toys.write_images(folder, size=128)
    opt["datasets"]["train"]["gt_size"] = 128
    opt["train"]["total_iter"] = 4
    opt["val"]["val_freq"] = 2
    opt["logger"]["print_freq"] = 2
    return opt


def test_several_networks_have_patterns_and_tags_of_their_own(tmp_path):
    opt = two_sparse_networks(tmp_path, exclude=["upconv*", "conv[34]_*"])
    opt["logger"]["use_tb_logger"] = True
    toys.train(opt, tmp_path)
    left_alone = {"net_g_latest.pth": ["upconv1"], "net_d_latest.pth": ["conv3_0", "conv4_1"]}
    for name, layers in left_alone.items():
        assert toys.zeros_and_weights(toys.saved(tmp_path, name)["params"], layers)[0] == 0, name

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb_logger" / "run")).Reload()
    ours = {tag for tag in events.Tags()["scalars"] if tag.startswith("iks")}
    assert {"iks/network_g/sparsity", "iks/network_d/sparsity", "iks_layers/network_g/body.0.conv1"} <= ours
    assert {"iks_layers/network_d/conv0_1"} <= ours and all("/network_" in tag for tag in ours)
    for tag in ours:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps and len(set(steps)) == len(steps), tag


def test_a_pattern_that_matches_in_no_network_is_refused(tmp_path):
    opt = two_sparse_networks(tmp_path, exclude=["upconv*", "conv9_*"])
    with pytest.raises(OptionError, match=r"exclude pattern 'conv9_\*' matches none of network_g's and network_d's"):
        toys.train(opt, tmp_path)
    assert not list((tmp_path / "experiments" / "run" / "models").iterdir())


@pytest.mark.parametrize(("every", "idle"), [(1, 0), (2, 0), (2, 5), (1, 12), (3, 7)])
def test_skipped_generator_steps_are_taken_out_of_the_schedule(every, idle, tmp_path):
    toys.write_images(tmp_path)
    changes = toys.adversarial("SRGANModel", net_d_iters=every, net_d_init_iters=idle)
    toys.train(toys.options(tmp_path, **changes), tmp_path)
    controller = toys.saved(tmp_path, "20.state", "training_states")["iks"]["networks"]["net_g"]["controller"]
    steps = sum(1 for step in range(1, 21) if step % every == 0 and step > idle)
    assert controller["steps"] == controller["total_steps"] == steps


def ema_of_gated_weights(folder: Path, opt: dict[str, Any]) -> dict[str, torch.Tensor]:
    """By hand: the mean of the networks after every iteration, weighted as BasicSR weighs them."""
    decay, mean = opt["train"]["ema_decay"], None
    for iteration in range(1, opt["train"]["total_iter"] + 1):
        gated = gated_weights_after(iteration, folder)
        mean = gated if mean is None else {n: decay * mean[n] + (1 - decay) * gated[n] for n in gated}
    return mean


def gated_weights_after(iteration: int, folder: Path) -> dict[str, torch.Tensor]:
    net = toys.saved(folder, f"{iteration}.state", "training_states")["iks"]["networks"]["net_g"]["network"]
    gated = {}
    for name, value in net.items():
        threshold = net.get(name.replace("weight", "threshold")) if name.endswith("weight") else None
        gated[name] = value if threshold is None else soft_threshold(value, threshold)
    return gated


def test_the_ema_copy_averages_what_the_network_is(tmp_path):
    """And not weights and thresholds apart, which makes another network while thresholds move."""
    opt = prepared(tmp_path, "SRModel")
    opt["train"].update(ema_decay=0.9, total_iter=30)
    opt["logger"]["save_checkpoint_freq"] = 1
    start = build_start(opt)
    toys.train(opt, tmp_path)
    expected = ema_of_gated_weights(tmp_path, opt)
    weight_of_start = 0.9**30
    got = toys.saved(tmp_path, "30.state", "training_states")["iks"]["networks"]["net_g_ema"]["network"]
    kept = toys.saved(tmp_path, "net_g_30.pth")["params_ema"]
    first = gated_weights_after(1, tmp_path)
    for name in ("body.0.conv1.weight", "upsample.0.weight", "conv_first.weight", "conv_last.bias"):
        # `expected` counts the first network fully, BasicSR's copy starts as the one before it
        mean = expected[name] + weight_of_start * (start[name] - first[name])
        torch.testing.assert_close(got[name], mean, rtol=1e-3, atol=2e-5)
        survivors = kept[name] != 0
        torch.testing.assert_close(kept[name][survivors], got[name][survivors])


def build_start(opt: dict[str, Any]) -> dict[str, torch.Tensor]:
    from basicsr.utils import set_random_seed

    set_random_seed(opt["manual_seed"])
    return {name: value.clone() for name, value in build_network(opt["network_g"]).state_dict().items()}


def test_options_of_a_network_stay_what_they_are(tmp_path):
    """Some model classes compare the type with a name (StyleGAN2Model), and look it up in tables."""
    toys.write_images(tmp_path)
    opt = {**toys.options(tmp_path), "is_train": True, "dist": False, "rank": 0}
    opt["path"].update(models=str(tmp_path), training_states=str(tmp_path))
    model = build_model(opt)
    assert model.opt["network_g"] == opt["network_g"] and model.opt["network_g"]["type"] in {"EDSR": 1}
    assert type(opt["network_g"]["type"]) is str


def test_a_new_target_in_the_option_file_replaces_that_of_the_state(tmp_path):
    opt = prepared(tmp_path, "SRModel")
    toys.train(opt, tmp_path)
    opt["iks"]["target_sparsity"] = 0.5
    opt["train"]["total_iter"] = 30
    log = toys.train(opt, tmp_path, "--auto_resume")
    assert "iks: net_g: by the option file, target_sparsity is 0.5 from now on, and no longer 0.9" in log
    gated = toys.convolutions_within(build_network(opt["network_g"]))
    for params in toys.saved(tmp_path, "net_g_latest.pth").values():
        zeros, weights = toys.zeros_and_weights(params, gated)
        assert zeros == round(0.5 * weights)


@pytest.mark.parametrize("goal", [{"target_sparsity": 0.5}, {"max_bytes": 12000}], ids=lambda goal: next(iter(goal)))
def test_a_new_goal_after_the_ramp_is_taken_up_once_it_is_measured(goal, tmp_path):
    schedule = {"ramp_steps": 10, "interval": 1000}
    opt = prepared(tmp_path, "SRModel")
    opt["iks"] = {"target_sparsity": 0.9, **schedule}
    toys.train(opt, tmp_path)
    opt["iks"] = {**goal, **schedule}
    opt["train"]["total_iter"] = 40
    log = toys.train(opt, tmp_path, "--auto_resume")
    start = log.index("resumed after 20 steps, at a sparsity of 0.9")
    reached = {int(i): float(s) for i, s in re.findall(r"iter: *(\d+).* sparsity: (\S+)", log[start:])}
    assert all(abs(reached[i] - 0.9) < 0.001 for i in range(21, 32) if i in reached)
    assert all(0.1 < reached[i] < 0.8 for i in range(32, 41) if i in reached) and max(reached) >= 32 > min(reached)
    assert "training ended at" not in log


def test_the_command_line_changes_the_block_as_any_other(tmp_path):
    opt = prepared(tmp_path, "SRModel")
    toys.train(opt, tmp_path, "--force_yml", "iks:target_sparsity=0.25", "train:total_iter=12")
    zeros, weights = toys.zeros_and_weights(
        toys.saved(tmp_path, "net_g_latest.pth")["params"], toys.convolutions_within(build_network(opt["network_g"]))
    )
    assert zeros == round(0.25 * weights)


def test_a_network_that_a_resume_is_to_ignore_keeps_its_own_weights(tmp_path):
    opt = prepared(tmp_path, "SRModel, no EMA")
    opt["iks"] = 0.5
    toys.train(opt, tmp_path)
    torch.manual_seed(1)
    other = build_network(opt["network_g"]).state_dict()
    torch.save({"params": other}, tmp_path / "other.pth")
    opt["path"].update(
        ignore_resume_networks=["network_g"],
        pretrain_network_g=str(tmp_path / "other.pth"),
        resume_state=str(tmp_path / "experiments" / "run" / "training_states" / "20.state"),
    )
    opt["train"]["total_iter"] = 21
    toys.train(opt, tmp_path)
    assert torch.allclose(
        toys.saved(tmp_path, "net_g_latest.pth")["params"]["conv_first.weight"], other["conv_first.weight"], atol=0.01
    )


def test_an_ema_copy_that_is_new_starts_as_the_network(tmp_path):
    opt = prepared(tmp_path, "SRModel, no EMA")
    opt["iks"] = 0.9
    toys.train(opt, tmp_path)
    opt["train"].update(ema_decay=0.5, total_iter=21)
    opt["logger"]["save_checkpoint_freq"] = 1
    toys.train(opt, tmp_path, "--auto_resume")
    average = toys.saved(tmp_path, "21.state", "training_states")["iks"]["networks"]["net_g_ema"]["network"]
    before, after = (gated_weights_after(iteration, tmp_path) for iteration in (20, 21))
    for name in ("conv_first.weight", "body.0.conv1.weight"):
        torch.testing.assert_close(average[name], 0.5 * before[name] + 0.5 * after[name])
    assert average["body.0.conv1.threshold"].max() < -50  # it takes nothing off the mean


def test_a_network_with_weights_becomes_sparse_at_once(tmp_path):
    opt = prepared(tmp_path, "SRModel, no EMA")
    del opt["iks"]
    toys.train(opt, tmp_path)
    dense = tmp_path / "dense.pth"
    shutil.move(tmp_path / "experiments" / "run" / "models" / "net_g_latest.pth", dense)
    for block, path, ramp in (
        ({}, None, (4, 10)),
        ({"ramp_start": 0}, None, (0, 12)),
        ({}, dense, (0, 12)),
        ({"ramp_start": 5, "ramp_steps": 6}, dense, (5, 6)),
    ):
        shutil.rmtree(tmp_path / "experiments")  # BasicSR would rename the folder, to one name within a second
        opt["iks"] = {"target_sparsity": 0.9, **block}
        opt["path"]["pretrain_network_g"] = path and str(path)
        log = toys.train(opt, tmp_path)
        state = toys.saved(tmp_path, "20.state", "training_states")["iks"]["networks"]["net_g"]["controller"]
        assert (state["ramp_start"], state["ramp_steps"]) == ramp
        assert f"iks: network_g: the sparsity rises from step {ramp[0]} of the optimizer to step {sum(ramp)}" in log
        assert ("it trains from scratch, without path: pretrain_network_g" in log) == (block == {} and path is None)


def test_a_resume_that_ends_before_the_ramp_is_warned_of(tmp_path):
    opt = prepared(tmp_path, "SRModel")
    opt["train"]["total_iter"] = 40
    opt["logger"]["save_checkpoint_freq"] = 10
    toys.train(opt, tmp_path)
    for path in (tmp_path / "experiments" / "run" / "training_states").glob("[234]0.state"):
        path.unlink()
    opt["train"]["total_iter"] = 15
    log = toys.train(opt, tmp_path, "--auto_resume")
    assert "raise the sparsity until step 27, and train: total_iter ends it at step 15" in log
    assert "WARNING: iks: network_g: training ended at" in log and "the files have the target's 90.0%" in log


def test_a_training_from_a_pruned_network_tells_what_it_comes_to(tmp_path):
    opt = prepared(tmp_path, "SRModel")
    toys.train(opt, tmp_path)
    pruned = tmp_path / "pruned.pth"
    shutil.copy(tmp_path / "experiments" / "run" / "models" / "net_g_latest.pth", pruned)
    opt.update(name="again", iks={"target_sparsity": 0.5})
    opt["path"] = {"pretrain_network_g": str(pruned), "strict_load_g": True}
    with pytest.warns(IksWarning, match="were zero before the training and stay zero, more than the target of 50.00%"):
        log = toys.train(opt, tmp_path)
    assert "training ended at 90.0% zeros, and not at the target's 50.0%: the others were zero before it" in log


def test_a_compact_file_is_no_pretrained_network(tmp_path):
    opt = prepared(tmp_path, "SRModel")
    opt["path"]["pretrain_network_g"] = str(tmp_path / "sr.iks")
    with pytest.raises(IksError, match=r"sr.iks is a compact file.*: make one with iks restore .*sr.iks .*sr.pth"):
        toys.train(opt, tmp_path)


def test_a_model_that_makes_fewer_steps_is_warned_of_with_the_remedy(tmp_path):
    @MODEL_REGISTRY.register()
    class AccumulatingModel(MODEL_REGISTRY.get("SRModel")):
        def optimize_parameters(self, current_iter):
            step = self.optimizer_g.step
            if current_iter % 2:
                self.optimizer_g.step = lambda: None
            try:
                super().optimize_parameters(current_iter)
            finally:
                self.optimizer_g.step = step

    opt = prepared(tmp_path, "SRModel, no EMA")
    opt.update(model_type="AccumulatingModel", iks=0.9)
    opt["train"]["total_iter"] = 300
    opt["logger"]["save_checkpoint_freq"] = 1000
    log = toys.train(opt, tmp_path)
    assert "100 steps of the optimizer in 200 iterations, and 200 were expected" in log
    assert "Add to the block iks, and resume: total_steps: 150" in log


def test_a_model_that_builds_its_network_elsewhere_is_refused(tmp_path, monkeypatch):
    import basicsr.models.sr_model as sr_model

    toys.write_images(tmp_path)
    build = sr_model.build_network
    monkeypatch.setattr(sr_model, "build_network", lambda opt: build({**opt, "type": "".join(opt["type"])}))
    with pytest.raises(IksError, match="SRModel does not train the network_g that BasicSR's"):
        toys.train(toys.options(tmp_path), tmp_path)
    assert not list((tmp_path / "experiments" / "run" / "models").iterdir())


# Model classes as other codebases write them


def model_class(name: str, **members: Any) -> dict[str, Any]:
    """Register a subclass of SRModel; returns the change of `options` that trains it."""
    if name not in MODEL_REGISTRY:
        MODEL_REGISTRY.register(type(name, (MODEL_REGISTRY.get("SRModel"),), members))
    return {"model_type": name}


def saves_the_best(self, *args, **kwargs):
    super(type(self), self).nondist_validation(*args, **kwargs)
    self.save_network([self.net_g, self.net_g_ema], "net_g", "best", param_key=["params", "params_ema"])
    self.save_training_state(0, 10)


def test_a_class_may_save_within_its_validation(tmp_path):
    changes = model_class("SavesTheBestModel", nondist_validation=saves_the_best)
    toys.write_images(tmp_path)
    opt = toys.options(tmp_path, train={"ema_decay": 0.5}, **changes)
    log = toys.train(opt, tmp_path)
    check_exact(tmp_path, opt, "net_g_best.pth")
    toys.assert_same(toys.saved(tmp_path, "net_g_best.pth"), toys.saved(tmp_path, "net_g_latest.pth"))
    networks = toys.saved(tmp_path, "10.state", "training_states")["iks"]["networks"]  # overwritten by the last one
    assert "body.0.conv1.threshold" in networks["net_g"]["network"]
    assert networks["net_g"]["controller"]["steps"] == 20
    assert psnr_in(log) > 0


def check_exact(folder: Path, opt: dict[str, Any], name: str) -> None:
    for params in toys.saved(folder, name).values():
        build_network(opt["network_g"]).load_state_dict(params, strict=True)
        zeros, weights = toys.zeros_and_weights(params, toys.convolutions_within(build_network(opt["network_g"])))
        assert zeros == round(0.9 * weights)


def copies_its_ema(self):
    self.net_g_ema = copy.deepcopy(self.net_g)
    self.ema_decay = 0
    decay, self.opt["train"]["ema_decay"] = self.opt["train"]["ema_decay"], 0
    ema, self.net_g_ema = self.net_g_ema, None
    super(type(self), self).init_training_settings()
    self.net_g_ema, self.ema_decay = ema, decay


def test_an_ema_copy_that_a_class_makes_itself_is_delivered_as_well(tmp_path):
    changes = model_class("CopiesItsEmaModel", init_training_settings=copies_its_ema)
    toys.write_images(tmp_path)
    opt = toys.options(tmp_path, train={"ema_decay": 0.5}, **changes)
    toys.train(opt, tmp_path)
    check_exact(tmp_path, opt, "net_g_latest.pth")
    straight = toys.saved(tmp_path, "net_g_20.pth")
    (tmp_path / "experiments" / "run" / "training_states" / "20.state").unlink()
    toys.train(opt, tmp_path, "--auto_resume")
    toys.assert_same(toys.saved(tmp_path, "net_g_20.pth"), straight)


def test_a_wrapper_of_one_s_own_is_seen_through(tmp_path):
    class Wrapper(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

    def model_to_device(self, net):
        return Wrapper(net.to(self.device))

    toys.write_images(tmp_path)
    opt = toys.options(tmp_path, **model_class("WrapsItModel", model_to_device=model_to_device))
    toys.train(opt, tmp_path)
    params = toys.saved(tmp_path, "net_g_latest.pth")["params"]
    build_network(opt["network_g"]).load_state_dict({k.removeprefix("net."): v for k, v in params.items()}, strict=True)
    gated = [f"net.{name}" for name in toys.convolutions_within(build_network(opt["network_g"]))]
    zeros, weights = toys.zeros_and_weights(params, gated)
    assert zeros == round(0.9 * weights)


def test_a_part_of_a_network_is_not_saved_as_if_it_were_whole(tmp_path):
    def save(self, epoch, current_iter):
        self.save_network(self.net_g.body, "body", current_iter)

    toys.write_images(tmp_path)
    with pytest.raises(IksError, match="only a part of a rewritten model"):
        toys.train(toys.options(tmp_path, **model_class("SavesAPartModel", save=save)), tmp_path)


def test_a_network_that_is_built_anew_while_training_is_the_one_that_is_resumed(tmp_path):
    def optimize_parameters(self, current_iter):
        if current_iter == 5:
            self.net_g = self.model_to_device(build_network(self.opt["network_g"]))
            self.optimizer_g = self.get_optimizer("Adam", self.net_g.parameters(), lr=1e-3)
            self.optimizers[0] = self.optimizer_g
        super(type(self), self).optimize_parameters(current_iter)

    toys.write_images(tmp_path)
    opt = toys.options(tmp_path, **model_class("GrowsModel", optimize_parameters=optimize_parameters))
    opt["train"]["scheduler"]["milestones"] = [100]
    toys.train(opt, tmp_path)
    straight = toys.saved(tmp_path, "net_g_20.pth")
    assert toys.saved(tmp_path, "20.state", "training_states")["iks"]["networks"]["net_g"]["controller"]["steps"] == 16
    (tmp_path / "experiments" / "run" / "training_states" / "20.state").unlink()
    toys.train(opt, tmp_path, "--auto_resume")
    toys.assert_same(toys.saved(tmp_path, "net_g_20.pth"), straight)


def test_a_class_that_trains_a_copy_is_refused(tmp_path):
    def init_training_settings(self):
        self.net_g = copy.deepcopy(self.net_g)
        super(type(self), self).init_training_settings()

    toys.write_images(tmp_path)
    changes = model_class("TrainsACopyModel", init_training_settings=init_training_settings)
    with pytest.raises(IksError, match="TrainsACopyModel does not train the network_g that BasicSR's build_network"):
        toys.train(toys.options(tmp_path, **changes), tmp_path)


def test_a_class_whose_optimizer_never_steps_is_warned_of(tmp_path):
    def optimize_parameters(self, current_iter):
        self.log_dict = {}

    toys.write_images(tmp_path)
    changes = model_class("NeverStepsModel", optimize_parameters=optimize_parameters)
    opt = toys.options(tmp_path, train={"total_iter": 210}, logger={"save_checkpoint_freq": 1000}, **changes)
    assert "iks: network_g: no optimizer has made a step with it in 200 iterations" in toys.train(opt, tmp_path)


def test_a_class_of_its_own_is_refused(tmp_path):
    if "OwnBaseModel" not in MODEL_REGISTRY:
        MODEL_REGISTRY.register(type("OwnBaseModel", (), {"__init__": lambda self, opt: None}))
    toys.write_images(tmp_path)
    with pytest.raises(IksError, match="OwnBaseModel is not derived from BasicSR's BaseModel"):
        toys.train(toys.options(tmp_path, model_type="OwnBaseModel"), tmp_path)


def test_methods_take_their_arguments_by_name(tmp_path):
    toys.write_images(tmp_path)
    opt = {**toys.options(tmp_path, train={"ema_decay": 0.5}), "is_train": True, "dist": False, "rank": 0}
    opt["path"].update(models=str(tmp_path), training_states=str(tmp_path))
    model = build_model(opt)
    model.save_network(net=model.net_g, net_label="net_g", current_iter=1)
    model.save_training_state(epoch=0, current_iter=1)
    model.print_network(net=model.net_g)
    model.load_network(net=model.net_g, load_path=str(tmp_path / "net_g_1.pth"))
    model.resume_training(resume_state=torch.load(tmp_path / "1.state", weights_only=False))
    model.update_learning_rate(current_iter=1)


def test_options_of_a_model_are_plain_where_they_are_saved(tmp_path):
    toys.write_images(tmp_path)
    opt = {**toys.options(tmp_path), "is_train": True, "dist": False, "rank": 0}
    opt["network_t"] = opt["network_g"]  # as a YAML anchor gives it
    model = build_model(opt)
    torch.save(model.opt, tmp_path / "options.pth")
    assert type(torch.load(tmp_path / "options.pth", weights_only=False)["network_g"]["type"]) is str
    assert type(model.opt["network_t"]["type"]) is str


def test_a_schedule_that_is_given_anew_replaces_that_of_the_state(tmp_path):
    opt = prepared(tmp_path, "SRModel, no EMA")
    opt["iks"] = {"target_sparsity": 0.9}
    toys.train(opt, tmp_path)
    opt["iks"]["ramp_steps"] = 25
    opt["train"]["total_iter"] = 30
    log = toys.train(opt, tmp_path, "--auto_resume")
    assert "iks: net_g: by the option file, ramp_steps is 25 from now on, and no longer 10" in log
    assert "iks: network_g: resumed after 20 steps, at a sparsity of 0.9" in log
    controller = toys.saved(tmp_path, "30.state", "training_states")["iks"]["networks"]["net_g"]["controller"]
    assert controller["ramp_steps"] == 25 and controller["total_steps"] == 30
