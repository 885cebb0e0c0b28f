"""`export` in an entry `iks`: compact files that come and go with the checkpoints of real trainings of real MMagic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmagic")

import torch
from torch import Tensor, nn

import iks_plugin
import mmagic_toys as toys
from basicsr_toys import assert_same, write_images
from test_mmagic_training import EMA, EMA_OF_MMAGIC, GAN, SHARPENED, zeros_and_weights

EXPORT = "dict(target_sparsity=0.9, export=True)"


def trained(folder: Path, iks: str = EXPORT, more: str = "", **changes: Any) -> Path:
    """The config of a training that has ended."""
    write_images(folder, 4)
    config = toys.write_config(folder, iks, more)
    toys.run(config, **changes)
    return config


def plain_model(config: Path) -> nn.Module:
    """As the untouched framework builds it."""
    from mmagic.registry import MODELS
    from mmengine.config import Config

    model: nn.Module = MODELS.build(Config.fromfile(str(config)).model)
    return model


def loaded(folder: Path, name: str, config: Path, network: str = "generator") -> dict[str, Tensor]:
    """The weights of a plain network that has read the compact file."""
    return iks_plugin.load(folder / "work" / name, plain_model(config).get_submodule(network)).state_dict()


def within(state: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    return {key[len(network) + 1 :]: value for key, value in state.items() if key.startswith(f"{network}.")}


def compact(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "work").rglob("*.iks"))


@pytest.mark.parametrize("more", ["", EMA], ids=["plain", "EMA"])
def test_beside_each_checkpoint_lies_the_network_that_it_tests(more, tmp_path):
    config = trained(tmp_path, more=more)
    checkpoints = sorted((tmp_path / "work").glob("*.pth"))
    assert [path.stem for path in checkpoints][1:] == ["iter_10", "iter_20"]  # and the best
    assert compact(tmp_path) == [f"{path.stem}.iks" for path in checkpoints]
    for path in checkpoints:
        state = toys.saved(tmp_path, path.name)["state_dict"]
        assert_same(loaded(tmp_path, f"{path.stem}.iks", config), within(state, "generator"))
        zeros, weights = zeros_and_weights(iks_plugin.load(path.with_suffix(".iks")), "")
        assert zeros == round(0.9 * weights) and weights == 4032
        assert path.with_suffix(".iks").stat().st_size < path.stat().st_size / 4
        assert f"iks: {path.stem}.iks has " in toys.log_of(tmp_path)
    if more:  # the average, and not what is trained
        trained_weights = toys.saved(tmp_path, "iter_20.pth")["ema_state_dict"]["module.generator.conv_first.weight"]
        assert not torch.equal(loaded(tmp_path, "iter_20.iks", config)["conv_first.weight"], trained_weights)


def test_a_model_of_the_untouched_framework_computes_the_same_with_it(tmp_path):
    from mmengine.runner import load_checkpoint

    config = trained(tmp_path, more=EMA)
    first, second = plain_model(config).eval(), plain_model(config).eval()
    load_checkpoint(first, str(tmp_path / "work" / "iter_20.pth"), strict=False)
    iks_plugin.load(tmp_path / "work" / "iter_20.iks", second.generator)
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(first(image, mode="tensor"), second(image, mode="tensor"))
        third = plain_model(config).eval()
        iks_plugin.load(tmp_path / "work" / "iter_20.iks", third.generator, packed=True)
        torch.testing.assert_close(third(image, mode="tensor"), first(image, mode="tensor"))


def test_an_untouched_config_tests_what_a_file_holds(tmp_path):
    """As docs/mmagic.md has it."""
    trained(tmp_path, more=EMA)
    path = tmp_path / "work" / "iter_20.iks"
    weights = {f"generator.{name}": tensor for name, tensor in iks_plugin.load(path).items()}
    torch.save({"state_dict": weights}, tmp_path / "plain.pth")
    untouched = toys.write_config(tmp_path, None, EMA, name="untouched.py")
    scores = [
        toys.run(untouched, "test", load_from=str(path)).message_hub.get_scalar("test/PSNR").current()
        for path in (tmp_path / "plain.pth", tmp_path / "work" / "iter_20.pth")
    ]
    assert scores[0] == scores[1] > 5


@pytest.mark.parametrize("export", ["float32", "float16", "bfloat16", "int8"])
def test_values_have_the_type_that_is_asked_for(export, tmp_path):
    from iks_plugin.container import opened

    config = trained(tmp_path, f"dict(target_sparsity=0.9, export='{export}')")
    state = within(toys.saved(tmp_path, "iter_20.pth")["state_dict"], "generator")
    rounded = loaded(tmp_path, "iter_20.iks", config)
    for name, weight in state.items():
        if name.endswith("weight") and weight.ndim == 4 and min(weight.shape[:2]) > 4:
            if export == "int8":
                assert (weight - rounded[name]).abs().max() <= weight.abs().max() / 100
            else:
                assert torch.equal(rounded[name], weight.to(getattr(torch, export)).float())
            assert (rounded[name][weight == 0] == 0).all()
    with opened(tmp_path / "work" / "iter_20.iks") as file:
        assert (file.info.value_dtype, file.info.target_sparsity) == (export, 0.9)
        assert file.info.model_class.endswith(".EDSRNet")


@pytest.mark.parametrize("iks", ["0.9", "dict(target_sparsity=0.9, export=False)"])
def test_without_it_there_are_none(iks, tmp_path):
    trained(tmp_path, iks)
    assert not compact(tmp_path) and (tmp_path / "work" / "iter_20.pth").exists()


def keeping(count: int, out_dir: str = "None", interval: int = 5) -> str:
    return (
        f'default_hooks = dict(checkpoint=dict(interval={interval}, out_dir={out_dir}, save_best="PSNR", '
        f"max_keep_ckpts={count}))\ntrain_cfg = dict(max_iters=20, val_interval=5)"
    )


@pytest.mark.parametrize("elsewhere", [False, True], ids=["work_dir", "out_dir"])
def test_they_go_with_checkpoints_that_are_deleted(elsewhere, tmp_path):
    """Old ones, and what was the best before; also one that a resumed training deletes before it saves any."""
    out_dir = repr(str(tmp_path / "elsewhere")) if elsewhere else "None"
    folder = tmp_path / "elsewhere" / "work" if elsewhere else tmp_path / "work"
    for keep, end in ((2, 20), (1, 21)):
        config = trained(tmp_path, more=keeping(keep, out_dir), train_cfg__max_iters=end, resume=end > 20)
        stems = [path.stem for path in folder.glob("*.pth")]
        assert sum(stem.startswith("iter_") for stem in stems) == keep and len(stems) == keep + 1
        assert {path.stem for path in folder.glob("*.iks")} - {"mine"} == set(stems)
        assert (folder / "mine.iks").exists() == (end == 21)
        (folder / "mine.iks").write_text("no checkpoint is called so")
        for stem in stems:
            state = torch.load(folder / f"{stem}.pth", map_location="cpu")["state_dict"]
            generator = iks_plugin.load(folder / f"{stem}.iks", plain_model(config).generator)
            assert_same(generator.state_dict(), within(state, "generator"))
        assert "WARNING - iks:" not in toys.log_of(tmp_path)


def test_a_better_checkpoint_replaces_the_best_with_its_file(tmp_path):
    trained(tmp_path, more="train_cfg = dict(max_iters=20, val_interval=2)")
    assert "The previous best checkpoint" in toys.log_of(tmp_path)
    best = list((tmp_path / "work").glob("best_*.pth"))
    assert len(best) == 1 and [name for name in compact(tmp_path) if name.startswith("best")] == [f"{best[0].stem}.iks"]


@pytest.mark.parametrize("model", ["ESRGAN", "RealESRGAN"])
def test_of_a_gan_the_average_of_the_generator_is_kept(model, tmp_path):
    """And neither the discriminator nor anything else that only training needs."""
    more = GAN.format(
        model=model,
        generator="RRDBNet",
        more="growth_channels=4, upscale_factor=2",
        disc_steps=1,
        disc_init_steps=0,
        hooks=EMA_OF_MMAGIC + (SHARPENED if model == "RealESRGAN" else ""),
    )
    config = trained(tmp_path, more=more)
    state = toys.saved(tmp_path, "iter_20.pth")["state_dict"]
    weights = loaded(tmp_path, "iter_20.iks", config)
    assert_same(weights, within(state, "generator_ema"))
    assert not torch.equal(weights["conv_first.weight"], state["generator.conv_first.weight"])


def test_several_networks_have_a_file_each(tmp_path):
    more = GAN.format(
        model="ESRGAN",
        generator="RRDBNet",
        more="growth_channels=4, upscale_factor=2",
        disc_steps=1,
        disc_init_steps=0,
        hooks=keeping(1),
    ).replace("UNetDiscriminatorWithSpectralNorm", "ModifiedVGG")
    write_images(tmp_path, 1, size=128)
    config = toys.write_config(
        tmp_path, "dict(target_sparsity=0.5, network=['generator', 'discriminator'], export=True)", more
    )
    config.write_text(config.read_text().replace("gt_patch_size=32", "gt_patch_size=128"))
    toys.run(config, train_cfg__max_iters=6)
    state = toys.saved(tmp_path, "iter_6.pth")["state_dict"]
    for network in ("generator", "discriminator"):
        assert_same(loaded(tmp_path, f"iter_6.{network}.iks", config, network), within(state, network))
    assert [name for name in compact(tmp_path) if name.startswith("iter")] == [
        "iter_6.discriminator.iks",
        "iter_6.generator.iks",
    ]


def test_a_file_that_cannot_be_written_is_warned_of_and_training_goes_on(tmp_path):
    kept = tmp_path / "work" / "iter_10.iks" / "precious"
    kept.parent.mkdir(parents=True)
    kept.touch()
    trained(tmp_path)
    log = toys.log_of(tmp_path)
    assert "WARNING - iks: iter_10.iks is not written, and training goes on: IksError: " in log
    assert f"iks export {kept.parent.with_suffix('.pth')} {kept.parent} --prefix generator.\n" in log
    assert kept.exists() and (tmp_path / "work" / "iter_10.pth").exists() and "iter_20.iks" in compact(tmp_path)


def test_a_resumed_training_writes_them_as_the_straight_one(tmp_path):
    config = trained(tmp_path, more=EMA)
    straight = iks_plugin.load(tmp_path / "work" / "iter_20.iks")
    for path in (tmp_path / "work").glob("*_20.*"):
        path.unlink()
    (tmp_path / "work" / "last_checkpoint").write_text(str(tmp_path / "work" / "iter_10.pth"))
    toys.run(config, resume=True)
    assert_same(iks_plugin.load(tmp_path / "work" / "iter_20.iks"), straight)


def test_the_option_can_come_from_the_command_line(tmp_path):
    trained(tmp_path, "dict(target_sparsity=0.9)", iks__export="int8")
    assert "iter_20.iks" in compact(tmp_path)
