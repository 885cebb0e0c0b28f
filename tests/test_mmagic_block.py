"""Wrong entries `iks` and checkpoints that do not fit are refused, by the config key."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mmagic")

import torch

import mmagic_toys as toys
from basicsr_toys import write_images
from iks_plugin import IksError, IksWarning, OptionError

WRONG = {
    "percent": ("dict(target_sparsity=90)", r"config key iks: target_sparsity must be .* got 90: did you mean 0.9"),
    "bare percent": ("90", "config key iks: target_sparsity must be .* got 90: did you mean 0.9"),
    "empty": ("None", r"config key iks: it is empty: .*such as\s+iks = dict\(target_sparsity=0.9\)"),
    "no goal": ("dict(granularity='weight')", "config key iks: sparsify needs a goal"),
    "text": ("'0.9'", "config key iks: target_sparsity must be .* got the text '0.9': write 0.9, as a number"),
    "unknown": ("dict(target_sparsity=0.9, granularty='kernel')", "config key iks: .*did you mean 'granularity'"),
    "ours": ("dict(target_sparsity=0.9, netwrok='x')", "config key iks: .*'netwrok': did you mean 'network'"),
    "export": (
        "dict(target_sparsity=0.9, export='fp16')",
        "config key iks: export must be true, false or the type .* got 'fp16': did you mean 'float16'",
    ),
    "network": (
        "dict(target_sparsity=0.9, network='generater')",
        "config key iks.network: BaseEditModel has no network 'generater', it has generator",
    ),
    "part of a network": (
        "dict(target_sparsity=0.9, network='generator.body')",
        r"expected a whole network of BaseEditModel, got 'generator.body', .*: write network='generator' and "
        r"include=\['body\.\*'\]",
    ),
    "layer": (
        "dict(target_sparsity=0.9, network='generator.conv_last')",
        r"got 'generator.conv_last', .*: write network='generator' and include=\['conv_last'\]",
    ),
    "network, empty": (
        "dict(target_sparsity=0.9, network=['generator', ''])",
        r"config key iks: network must be the name of a network or a list .*, got \['generator', ''\]",
    ),
    "network type": ("dict(target_sparsity=0.9, network=3)", "config key iks: network must be the name of a network"),
    "long ramp": (
        "dict(target_sparsity=0.9, ramp_steps=21)",
        r"config key iks: ramp_steps must be at most total_steps \(20\), got 21",
    ),
    "long total": (
        "dict(target_sparsity=0.9, total_steps=21)",
        "config key iks: total_steps is 21, and the training has 20 steps: .* it follows from train_cfg",
    ),
    "pattern": (
        "dict(target_sparsity=0.9, include='bodyy.*')",
        r"config key iks, generator \(EDSRNet\): .*'bodyy\.\*'",
    ),
}


@pytest.mark.parametrize(("iks", "message"), WRONG.values(), ids=WRONG)
def test_wrong_entries_are_refused_when_the_runner_is_built(iks, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        toys.run(toys.write_config(tmp_path, iks))
    assert not list((tmp_path / "work").rglob("*.pth"))


@pytest.mark.parametrize("entry", ["isk = dict(target_sparsity=0.9)", "IKS = 0.9", "target_sparsity = 0.9"])
def test_a_misspelt_entry_is_refused(entry, tmp_path):
    name = entry.split()[0]
    with pytest.raises(OptionError, match=f"there is no config key '{name}': did you mean 'iks'"):
        toys.run(toys.write_config(tmp_path, None, entry))
    more = "my_options = dict(target_sparsity=0.5)\niks = my_options"
    assert toys.built(toys.write_config(tmp_path, more=more)).model is not None


def test_a_compact_file_is_no_checkpoint(tmp_path):
    write_images(tmp_path, 4)
    with pytest.raises(IksError, match=r"sr.iks is a compact file.*iks restore .*--prefix generator"):
        toys.run(toys.write_config(tmp_path), load_from=str(tmp_path / "sr.iks"))


def test_a_training_of_unknown_length_is_refused(tmp_path):
    more = 'train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", val_interval=10)'
    with pytest.raises(OptionError, match="config key train_cfg: expected max_iters or max_epochs"):
        toys.run(toys.write_config(tmp_path, more=more))


def test_a_generator_that_is_never_trained_is_refused(tmp_path):
    more = """
model = dict(
    type="SRGAN",
    discriminator=dict(type="UNetDiscriminatorWithSpectralNorm", in_channels=3, mid_channels=8),
    gan_loss=dict(type="GANLoss", gan_type="vanilla"),
    train_cfg=dict(disc_init_steps=20),
)
"""
    with pytest.raises(OptionError, match="generator is never trained: .* 20 iterations"):
        toys.run(toys.write_config(tmp_path, more=more))


@pytest.mark.parametrize(("max_epochs", "batch_size", "accumulated", "steps"), [(5, 2, 1, 10), (3, 1, 2, 6)])
def test_epochs_count_as_their_steps(max_epochs, batch_size, accumulated, steps, tmp_path):
    write_images(tmp_path, 4)
    toys.run(toys.write_config(tmp_path, more=toys.epochs(max_epochs, batch_size, accumulated)))
    controller = toys.saved(tmp_path, f"epoch_{max_epochs}.pth")["iks"]["controllers"]["generator"]
    assert controller["total_steps"] == controller["steps"] == steps
    dense = round(0.2 * steps)
    assert controller["ramp_start"] == dense and controller["ramp_steps"] == round(0.6 * (steps - dense))
    log = next((tmp_path / "work").glob("*/*.log")).read_text()
    rise = (
        f"rises from step {dense} of the optimizer to step {dense + controller['ramp_steps']} (it trains from scratch"
    )
    assert log.count(rise) == log.count("the sparsity rises") == 1


def test_a_network_with_weights_becomes_sparse_at_once(tmp_path):
    write_images(tmp_path, 4)
    toys.run(toys.write_config(tmp_path, None))
    dense = tmp_path / "dense.pth"
    shutil.copy(tmp_path / "work" / "iter_20.pth", dense)
    initialised = f'model = dict(init_cfg=dict(type="Pretrained", checkpoint=r"{dense}"))'
    for iks, more, ramp in (
        ("0.9", "", (4, 10)),
        ("dict(target_sparsity=0.9, ramp_start=0)", "", (0, 12)),
        ("0.9", f'load_from = r"{dense}"', (0, 12)),
        ("0.9", initialised, (0, 12)),
    ):
        toys.run(toys.write_config(tmp_path, iks, more))
        controller = toys.saved(tmp_path, "iter_20.pth")["iks"]["controllers"]["generator"]
        assert (controller["ramp_start"], controller["ramp_steps"]) == ramp
        log = toys.log_of(tmp_path)
        assert f"rises from step {ramp[0]} of the optimizer to step {sum(ramp)}" in log
        assert ("it trains from scratch, without load_from" in log) == (ramp[0] > 0)


def test_a_schedule_longer_than_the_epochs_is_refused(tmp_path):
    write_images(tmp_path, 4)
    config = toys.write_config(tmp_path, "dict(target_sparsity=0.9, total_steps=50)", toys.epochs(3))
    with pytest.raises(OptionError, match="config key iks: total_steps is 50, and the training has 6 steps"):
        toys.run(config)


def trained(folder: Path, iks: str | None) -> Path:
    write_images(folder, 4)
    toys.run(toys.write_config(folder, iks))
    return folder / "work" / "iter_20.pth"


RESUMES = {
    "of a dense training": (None, "0.9", "is of a training without the config key iks.*load_from = "),
    "other granularity": (
        "dict(target_sparsity=0.9, granularity='kernel')",
        "dict(target_sparsity=0.9, granularity='filter')",
        r"does not fit the config key iks: .*expected \(8, 1, 1, 1\), got \(8, 8, 1, 1\): give iks.granularity",
    ),
    "other law": (
        "dict(target_sparsity=0.9, law='paper', interval=2)",
        "0.9",
        "does not fit the config key iks, generator: .*law expected 'obs', got 'paper'",
    ),
    "other layers": (
        "0.9",
        "dict(target_sparsity=0.9, exclude='upsample.*')",
        "are of layers that only one of the two",
    ),
}


@pytest.mark.parametrize(("before", "after", "message"), RESUMES.values(), ids=RESUMES)
def test_checkpoints_that_do_not_fit_are_not_resumed_from(before, after, message, tmp_path):
    kept = trained(tmp_path, before).read_bytes()
    with pytest.raises(IksError, match=message):
        toys.run(toys.write_config(tmp_path, after), resume=True)
    assert (tmp_path / "work" / "iter_20.pth").read_bytes() == kept


def test_a_resume_from_the_dense_weights_of_the_start_is_refused_with_the_remedy(tmp_path):
    """MMEngine takes load_from for the checkpoint to resume from where a config has it."""
    path = trained(tmp_path, None)
    dense = str(path.rename(tmp_path / "dense.pth"))
    shutil.rmtree(path.parent)
    config = toys.write_config(tmp_path)
    resume = {"resume": True, "train_cfg__max_iters": 21}
    with pytest.raises(IksError, match="dense.pth is of a training without .*load_from = ..., resume = False"):
        toys.run(config, load_from=dense, **resume)
    toys.run(config, load_from=dense)
    with pytest.raises(IksError, match="To go on with the training in .*/work give load_from = None .*load_from=None"):
        toys.run(config, load_from=dense, **resume)
    toys.run(config, load_from=None, **resume)
    assert toys.saved(tmp_path, "iter_21.pth")["iks"]["controllers"]["generator"]["steps"] == 21


def test_a_sparse_training_is_not_resumed_without_the_entry(tmp_path):
    kept = trained(tmp_path, "0.9").read_bytes()
    dense = toys.write_config(tmp_path, None)
    with pytest.raises(IksError, match=r"iter_20.pth is of a sparse training, and the config has no key iks"):
        toys.run(dense, resume=True)
    assert (tmp_path / "work" / "iter_20.pth").read_bytes() == kept
    toys.run(dense, load_from=str(tmp_path / "work" / "iter_20.pth"))


def test_a_checkpoint_of_another_version_is_not_resumed_from(tmp_path):
    path = trained(tmp_path, "0.9")
    checkpoint = torch.load(path)
    checkpoint["iks"]["version"] = 99
    torch.save(checkpoint, path)
    with pytest.raises(IksError, match="expected version 1 of its entry iks, got 99"):
        toys.run(toys.write_config(tmp_path), resume=True)


def test_a_checkpoint_whose_thresholds_do_not_fit_is_not_loaded(tmp_path):
    path = trained(tmp_path, "dict(target_sparsity=0.9, granularity='kernel')")
    checkpoint = torch.load(path)
    checkpoint["state_dict"].update(checkpoint["iks"]["gated"]["state_dict"])  # as the published code saves it
    torch.save(checkpoint, tmp_path / "published.pth")
    config = toys.write_config(tmp_path)
    with pytest.raises(IksError, match=r"published.pth does not fit the config key iks: .*give iks.granularity"):
        toys.run(config, load_from=str(tmp_path / "published.pth"))


def test_a_new_target_in_the_config_replaces_that_of_the_checkpoint(tmp_path):
    trained(tmp_path, "0.9")
    toys.run(toys.write_config(tmp_path, "0.5"), resume=True, train_cfg__max_iters=40)
    assert "by the config, target_sparsity is 0.5 from now on, and no longer 0.9" in toys.log_of(tmp_path)
    state = toys.saved(tmp_path, "iter_40.pth")["state_dict"]
    kernels = [state[f"generator.{name}.weight"] for name in ("body.0.conv1", "body.0.conv2", "conv_after_body")]
    kernels.append(state["generator.upsample.0.upsample_conv.weight"])
    assert sum(int((kernel == 0).sum()) for kernel in kernels) == round(0.5 * sum(k.numel() for k in kernels))


def test_a_new_schedule_in_the_config_replaces_that_of_the_checkpoint(tmp_path):
    trained(tmp_path, "dict(target_sparsity=0.9, ramp_steps=20)")
    (tmp_path / "work" / "last_checkpoint").write_text(str(tmp_path / "work" / "iter_10.pth"))
    toys.run(toys.write_config(tmp_path, "dict(target_sparsity=0.9, ramp_start=0, ramp_steps=14)"), resume=True)
    log = toys.log_of(tmp_path)
    assert "by the config, ramp_steps is 14 from now on, and no longer 20" in log
    assert re.search(r"Iter\(train\) \[15/20\].*sparsity: 0.9000", log)


def test_a_training_from_a_pruned_network_tells_what_it_comes_to(tmp_path):
    pruned = str(trained(tmp_path, "0.9"))
    with pytest.warns(IksWarning, match="were zero before the training and stay zero, more than the target of 50.00%"):
        toys.run(toys.write_config(tmp_path, "0.5"), load_from=pruned)
    log = toys.log_of(tmp_path)
    assert "training ended at 90.0% zeros, and not at the target's 50.0%: the others were zero before it" in log


@pytest.mark.parametrize("goal", ["target_sparsity=0.5", "max_bytes=12000"])
def test_a_new_goal_after_the_ramp_is_taken_up_once_it_is_measured(goal, tmp_path):
    trained(tmp_path, "dict(target_sparsity=0.9, ramp_steps=10, interval=1000)")
    config = toys.write_config(tmp_path, f"dict({goal}, ramp_steps=10, interval=1000)")
    toys.run(config, resume=True, train_cfg__max_iters=40)
    log = toys.log_of(tmp_path)
    reached = {int(i): float(s) for i, s in re.findall(r"Iter\(train\) \[(\d+)/40\].*sparsity: (\S+)", log)}
    assert all(abs(reached[i] - 0.9) < 0.001 for i in (25, 30))
    assert all(0.1 < reached[i] < 0.6 for i in (35, 40)) and "training ended at" not in log


def test_a_training_that_misses_its_target_says_so(tmp_path):
    write_images(tmp_path, 4)
    toys.run(toys.write_config(tmp_path, "dict(target_sparsity=0.9, law='paper', interval=10)"))
    log = toys.log_of(tmp_path)
    assert re.search(
        r"training ended at \S+% zeros, and the checkpoints have the target's 90.0%: the rest was made", log
    )
