"""`export` in an `iks:` block: compact files beside the networks that real trainings of real BasicSR save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.models import build_model
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor

import basicsr_toys as toys
import iks_plugin
from iks_basicsr.export import preferred

EMA = {"ema_decay": 0.5}


def trained(folder: Path, export: Any = True, **changes: Any) -> tuple[dict[str, Any], str]:
    """The options of a training with compact files, and its log."""
    toys.write_images(folder)
    opt = toys.options(folder, **changes)
    opt["iks"] = {"target_sparsity": 0.9, "export": export, **(opt["iks"] if isinstance(opt["iks"], dict) else {})}
    return opt, toys.train(opt, folder)


def models(folder: Path) -> Path:
    return folder / "experiments" / "run" / "models"


def loaded(path: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a plain network that has read the compact file."""
    return iks_plugin.load(path, build_network(options)).state_dict()


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "EMA": ({"train": EMA}, "params_ema"),
    "no EMA": ({}, "params"),
    "GAN": (toys.adversarial("ESRGANModel", toys.RRDBNET, **EMA), "params_ema"),
    "linear layers": (
        {"model_type": "SwinIRModel", "network_g": toys.SWINIR, "iks": {"layer_types": ["Linear", "Conv2d"]}},
        "params",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_beside_each_network_lies_a_compact_file_with_the_preferred_weights(case, tmp_path):
    changes, key = CASES[case]
    opt, log = trained(tmp_path, **changes)
    checkpoints = sorted(models(tmp_path).glob("net_g_*.pth"))
    assert [path.stem for path in checkpoints] == ["net_g_10", "net_g_20", "net_g_latest"]
    assert [path.stem for path in sorted(models(tmp_path).glob("*.iks"))] == [path.stem for path in checkpoints]
    for path in checkpoints:
        compact, content = path.with_suffix(".iks"), toys.saved(tmp_path, path.name)
        assert key == list(content)[-1]
        toys.assert_same(loaded(compact, opt["network_g"]), content[key])
        toys.assert_same(dict(iks_plugin.load(compact)), dict(content[key]))
        if opt["network_g"]["type"] != "SwinIR":  # of which other layers too become sparse
            gated = toys.convolutions_within(build_network(opt["network_g"]))
            zeros, weights = toys.zeros_and_weights(iks_plugin.load(compact), gated)
            assert zeros == round(0.9 * weights)
        assert compact.stat().st_size < path.stat().st_size / (2 * len(content))
        assert f"INFO: iks: {compact.name} has {compact.stat().st_size:,} bytes, {path.name} " in log
    assert "WARNING" not in log and not list(models(tmp_path).glob(".*"))


@pytest.mark.parametrize("export", ["float32", "float16", "bfloat16", "int8"])
def test_values_have_the_type_that_is_asked_for(export, tmp_path):
    opt, _ = trained(tmp_path, export)
    content = toys.saved(tmp_path, "net_g_20.pth")["params"]
    compact = loaded(models(tmp_path) / "net_g_20.iks", opt["network_g"])
    for name in toys.convolutions_within(build_network(opt["network_g"])):
        weight, rounded = content[f"{name}.weight"], compact[f"{name}.weight"]
        if export == "int8":
            assert (weight - rounded).abs().max() <= weight.abs().max() / 100
        else:
            assert torch.equal(rounded, weight.to(getattr(torch, export)).float())
        assert (rounded[weight == 0] == 0).all()
    assert torch.equal(compact["conv_last.bias"], content["conv_last.bias"])
    from iks_plugin.container import opened

    with opened(models(tmp_path) / "net_g_20.iks") as file:
        assert (file.info.value_dtype, file.info.target_sparsity) == (export, 0.9)
        assert file.info.model_class == "basicsr.archs.edsr_arch.EDSR"


@pytest.mark.parametrize("export", [True, "int8"])
def test_a_size_that_is_asked_for_is_kept_by_every_file(export, tmp_path):
    toys.write_images(tmp_path)
    limit = 6000 if export is True else 4500
    opt = toys.options(tmp_path, train=EMA, iks={"max_bytes": limit, "export": export})
    toys.train(opt, tmp_path)
    sizes = [path.stat().st_size for path in models(tmp_path).glob("*.iks")]
    assert len(sizes) == 3 and all(0.97 * limit <= size <= limit for size in sizes)


@pytest.mark.parametrize("export", [False, None])
def test_without_it_there_are_none(export, tmp_path):
    trained(tmp_path, export)
    assert not list(tmp_path.rglob("*.iks")) and (models(tmp_path) / "net_g_20.pth").exists()


def test_a_file_is_restored_for_an_untouched_basicsr(tmp_path):
    from iks_plugin.__main__ import main

    opt, _ = trained(tmp_path, train=EMA)
    assert main(["restore", str(models(tmp_path) / "net_g_20.iks"), str(tmp_path / "restored.pth")]) == 0
    content = torch.load(tmp_path / "restored.pth")
    assert list(content) == ["params"]
    build_network(opt["network_g"]).load_state_dict(content["params"], strict=True)
    toys.assert_same(content["params"], toys.saved(tmp_path, "net_g_20.pth")["params_ema"])


def test_networks_without_the_block_have_none(tmp_path):
    trained(tmp_path, **toys.adversarial("SRGANModel"))
    assert not list(models(tmp_path).glob("net_d_*.iks")) and list(models(tmp_path).glob("net_d_*.pth"))


def test_each_network_of_the_block_has_its_own(tmp_path):
    toys.write_images(tmp_path, size=128)
    opt = toys.options(tmp_path, **toys.adversarial("SRGANModel", total_iter=2))
    opt["network_d"] = {"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 8, "input_size": 128}
    opt["iks"] = {"target_sparsity": 0.5, "network": ["network_g", "network_d"], "export": True}
    opt["datasets"]["train"]["gt_size"] = 128
    toys.train(opt, tmp_path)
    for label in ("g", "d"):
        compact, content = models(tmp_path) / f"net_{label}_latest.iks", toys.saved(tmp_path, f"net_{label}_latest.pth")
        toys.assert_same(loaded(compact, opt[f"network_{label}"]), content["params"])


def in_the_way(folder: Path, name: str) -> Path:
    """A folder with something in it, which no file can take the place of."""
    path = models(folder) / name / "precious"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_file_that_cannot_be_written_is_warned_of_and_training_goes_on(tmp_path):
    toys.write_images(tmp_path)
    opt = toys.options(tmp_path, iks={"target_sparsity": 0.9, "export": True})
    opt["train"]["total_iter"] = 10
    toys.train(opt, tmp_path)
    kept = in_the_way(tmp_path, "net_g_20.iks")
    opt["train"]["total_iter"] = 30
    log = toys.train(opt, tmp_path, "--auto_resume")
    assert "WARNING: iks: net_g_20.iks is not written, and training goes on: IksError: " in log
    assert (
        f"To make it later: iks export {models(tmp_path) / 'net_g_20.pth'} {models(tmp_path) / 'net_g_20.iks'}\n" in log
    )
    assert log.count("WARNING") == 1
    assert kept.exists() and "Save the latest model." in log
    for name in ("net_g_30", "net_g_latest"):
        compact, content = models(tmp_path) / f"{name}.iks", toys.saved(tmp_path, f"{name}.pth")
        toys.assert_same(loaded(compact, opt["network_g"]), content["params"])


def test_no_file_is_left_that_belongs_to_an_older_network(tmp_path):
    toys.write_images(tmp_path)
    opt = toys.options(tmp_path, iks={"target_sparsity": 0.9, "export": "float16"})
    opt.update(is_train=True, dist=False, rank=0)
    opt["path"].update(models=str(tmp_path), training_states=str(tmp_path))
    model = build_model(opt)
    model.save_network(model.net_g, "net_g", -1)
    assert (tmp_path / "net_g_latest.iks").exists()
    with torch.no_grad():
        model.net_g.conv_after_body.raw_weight.mul_(1e6)  # more than a float16 can hold
    model.save_network(model.net_g, "net_g", -1)
    assert toys.zeros_and_weights(torch.load(tmp_path / "net_g_latest.pth")["params"], ["conv_after_body"])[1] == 576
    assert [path.name for path in tmp_path.glob("net_g_*")] == ["net_g_latest.pth"]


def test_a_resumed_training_writes_them_as_the_straight_one(tmp_path):
    opt, _ = trained(tmp_path, train=EMA)
    straight = iks_plugin.load(models(tmp_path) / "net_g_20.iks")
    for name in ("models/net_g_20.iks", "models/net_g_latest.iks", "training_states/20.state"):
        (tmp_path / "experiments" / "run" / name).unlink()
    toys.train(opt, tmp_path, "--auto_resume")
    toys.assert_same(iks_plugin.load(models(tmp_path) / "net_g_20.iks"), straight)


def test_the_option_can_come_from_the_command_line(tmp_path):
    toys.write_images(tmp_path)
    opt = toys.options(tmp_path, iks={"target_sparsity": 0.9})
    toys.train(opt, tmp_path, "--force_yml", "iks:export=true")
    assert (models(tmp_path) / "net_g_latest.iks").exists()


def saves_the_best(self, *args, **kwargs):
    super(type(self), self).nondist_validation(*args, **kwargs)
    self.save_network([self.net_g, self.net_g_ema], "net_g", "best", param_key=["params", "params_ema"])
    self.save_network(self.net_g_ema, "ema", "best", param_key="params_ema")


def test_a_class_that_saves_within_its_validation_gets_them_too(tmp_path):
    members = {"nondist_validation": saves_the_best}
    if "ExportsTheBestModel" not in MODEL_REGISTRY:
        MODEL_REGISTRY.register(type("ExportsTheBestModel", (MODEL_REGISTRY.get("SRModel"),), members))
    opt, log = trained(tmp_path, model_type="ExportsTheBestModel", train=EMA)
    assert "WARNING" not in log
    for name in ("net_g_best", "ema_best"):
        content = toys.saved(tmp_path, f"{name}.pth")["params_ema"]
        toys.assert_same(loaded(models(tmp_path) / f"{name}.iks", opt["network_g"]), content)


def test_which_network_of_a_file_is_preferred():
    net, ema = torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 3)
    assert preferred({"params": {}, "params_ema": {}}, [net, ema]) is ema
    assert preferred({"params_ema": {}, "params": {}}, [ema, net]) is ema
    assert preferred({"params": {}}, [net]) is net
    assert preferred({"params_d": {}}, [net]) is net
    state = net.state_dict()
    assert preferred({"params": state, "epoch": 3}, [net]) is state  # a class with a file of its own
    assert preferred({}, [net]) == {} and preferred([1], [net]) == [1]
