"""The demo: its parts on made-up images, and whole runs of the tiny network that --quick trains."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import iks_plugin
from iks_plugin import IksError, OptionError
from iks_plugin.demo import photos as photos_module
from iks_plugin.demo import run
from iks_plugin.demo import training as training_module
from iks_plugin.demo.edsr import EDSR
from iks_plugin.demo.interrupt import Interrupt
from iks_plugin.demo.outcome import Outcome, judge
from iks_plugin.demo.photos import Photo, PhotoSet, builtin_photos, folder_photos, make_photo, read_image, resize
from iks_plugin.demo.pictures import DETAIL, draw_side_by_side, most_telling
from iks_plugin.demo.quality import enlarge, enlarge_bicubic, luma, psnr_y
from iks_plugin.demo.recipe import FEWEST_STEPS, Recipe, make_recipe
from iks_plugin.demo.training import Batch, Learner, make_batch, train

FILES = {"dense.pth", "sparse.pth", "sparse.iks", "results.json", "side-by-side.png", "layers.png"}
SPARSE_FILES = {"sparse.pth", "sparse.iks", "layers.png"}


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random, but smooth enough for a network to learn something from."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return resize(noise, height, width)


def fill(folder: Path, count: int, height: int = 100, width: int = 120, suffix: str = ".png") -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(texture(height, width, index)).save(folder / f"photo{index:02}{suffix}")
    return folder


@pytest.fixture
def some_photos() -> PhotoSet:
    photos = tuple(make_photo(f"photo {index}", texture(100, 130, index)) for index in range(4))
    return PhotoSet("textures", photos[:2], photos[2:])


class TestPhotos:
    def test_the_builtin_ones_are_there_without_a_download(self) -> None:
        photos = builtin_photos()
        assert {photo.name for photo in photos.held_out} == {"astronaut", "chelsea", "coffee"}
        assert not {photo.name for photo in photos.training} & {photo.name for photo in photos.held_out}
        for photo in (*photos.training, *photos.held_out):
            assert photo.large.dtype == photo.small.dtype == np.uint8
            assert photo.large.shape == (2 * photo.small.shape[0], 2 * photo.small.shape[1], 3)

    @pytest.mark.parametrize("shape", [(101, 133, 3), (100, 132), (97, 96, 3)])
    def test_sides_become_even_and_grey_becomes_rgb(self, shape: tuple[int, ...]) -> None:
        photo = make_photo("x", np.zeros(shape, np.uint8))
        assert photo.large.shape == (shape[0] // 2 * 2, shape[1] // 2 * 2, 3)
        assert photo.small.shape == (shape[0] // 2, shape[1] // 2, 3)

    def test_shrinking_is_antialiased(self) -> None:
        stripes = np.zeros((96, 96, 3), np.uint8)
        stripes[:, ::2] = 255
        inside = make_photo("stripes", stripes).small[4:-4, 4:-4]
        assert abs(inside.astype(int) - 128).max() <= 1

    @pytest.mark.parametrize(("count", "held_out"), [(3, 2), (7, 2), (8, 3)])
    def test_the_last_of_a_folder_are_held_out(self, tmp_path: Path, count: int, held_out: int) -> None:
        folder = fill(tmp_path / "images", count)
        (folder / "notes.txt").write_text("no image")
        photos = folder_photos(folder)
        names = [f"photo{index:02}.png" for index in range(count)]
        assert [photo.name for photo in photos.training] == names[:-held_out]
        assert [photo.name for photo in photos.held_out] == names[-held_out:]

    @pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".JPEG", ".tif", ".webp"])
    def test_reads_every_common_format(self, tmp_path: Path, suffix: str) -> None:
        assert len(folder_photos(fill(tmp_path / "images", 3, suffix=suffix)).training) == 1

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
    def test_every_8_bit_mode_becomes_rgb(self, tmp_path: Path, mode: str) -> None:
        path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
        Image.fromarray(texture(100, 120)).convert(mode).save(path)
        assert read_image(path).shape == (100, 120, 3)

    def test_images_are_turned_upright_and_large_ones_shrunk(self, tmp_path: Path) -> None:
        turned = Image.Exif()
        turned[0x0112] = 6
        Image.fromarray(texture(1000, 2048)).save(tmp_path / "turned.jpg", exif=turned)
        assert read_image(tmp_path / "turned.jpg").shape == (1024, 500, 3)

    def test_only_so_many_are_trained_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(photos_module, "MOST_PHOTOS", 4)
        photos = folder_photos(fill(tmp_path / "images", 9))
        assert [photo.name for photo in photos.training] == [f"photo{index:02}.png" for index in range(4)]
        assert [photo.name for photo in photos.held_out] == [f"photo{index:02}.png" for index in range(6, 9)]

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(IksError, match="nowhere does not exist: expected a folder with at least 3 images"):
            folder_photos(tmp_path / "nowhere")

    def test_a_file_instead_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "photo.png").touch()
        with pytest.raises(IksError, match=r"photo\.png is a file: expected a folder"):
            folder_photos(tmp_path / "photo.png")

    def test_too_few_images(self, tmp_path: Path) -> None:
        with pytest.raises(IksError, match="too few images: expected at least 3, got 2"):
            folder_photos(fill(tmp_path / "images", 2))

    def test_all_unusable_images_are_named_at_once(self, tmp_path: Path) -> None:
        folder = fill(tmp_path / "images", 3)
        (folder / "broken.jpg").write_text("no image")
        whole = (folder / "photo00.png").read_bytes()
        (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
        Image.fromarray(texture(50, 120)).save(folder / "small.png")
        Image.fromarray(np.zeros((100, 100), np.uint16)).save(folder / "deep.png")
        with pytest.raises(IksError, match="4 of the 7 images in --data .* cannot be used") as caught:
            folder_photos(folder)
        message = str(caught.value)
        assert "broken.jpg: unreadable: not a picture that Pillow can read" in message
        assert "cut.png: unreadable: " in message
        assert "small.png: too small: expected at least 96 x 96 pixels, got 120 x 50" in message
        assert "deep.png: expected 8 bits per channel, got more" in message

    def test_damage_that_pillow_is_not_prepared_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: object) -> None:
            raise TypeError("'str' object cannot be interpreted as an integer\nand more")

        monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
        with pytest.raises(IksError, match="^unreadable: 'str' object cannot be interpreted as an integer$"):
            read_image(fill(tmp_path / "images", 1) / "photo00.png")

    def test_a_long_list_of_unusable_images_is_cut(self, tmp_path: Path) -> None:
        with pytest.raises(IksError, match=r"\.\.\. and 4 more"):
            folder_photos(fill(tmp_path / "images", 13, height=20))


class TestQuality:
    def test_psnr_of_a_known_error(self) -> None:
        original = np.full((20, 20, 3), 100, np.uint8)
        # 219 / 255 grey levels on the Y channel for each in RGB.
        expected = 20 * math.log10(255 / (10 * 219 / 255))
        assert psnr_y(original + 10, original) == pytest.approx(expected, abs=1e-4)

    def test_psnr_ignores_the_border_and_nothing_else(self) -> None:
        original = texture(20, 20)
        changed = original.copy()
        changed[:2], changed[-2:], changed[:, :2], changed[:, -2:] = 0, 0, 0, 0
        assert psnr_y(changed, original) == math.inf
        changed[2, 2] += 1
        assert psnr_y(changed, original) < math.inf

    def test_luma_of_black_and_white(self) -> None:
        np.testing.assert_allclose(luma(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)), [[16, 235]])

    def test_a_network_is_rounded_and_clamped_like_a_stored_image(self) -> None:
        class Overshoots(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return nn.functional.interpolate(x, scale_factor=2) * 3 - 1

        photo = make_photo("x", texture(96, 98))
        image = enlarge(Overshoots(), photo)
        assert image.dtype == np.uint8
        assert image.shape == photo.large.shape
        expected = (photo.small.repeat(2, axis=0).repeat(2, axis=1).astype(float) * 3 - 255).clip(0, 255)
        np.testing.assert_allclose(image, expected, atol=0.51)

    def test_bicubic_has_the_size_of_the_original(self) -> None:
        photo = make_photo("x", texture(97, 101))
        assert enlarge_bicubic(photo).shape == photo.large.shape


class TestTraining:
    def test_edsr_doubles_the_size(self) -> None:
        assert EDSR(8, 1)(torch.rand(2, 3, 5, 7)).shape == (2, 3, 10, 14)

    def test_sparsify_leaves_only_the_convolutions_that_face_the_image(self) -> None:
        network = EDSR(8, 1)
        iks_plugin.sparsify(network, 0.5)
        assert [layer.name for layer in iks_plugin.report(network).layers if not layer.rewritten] == ["head", "tail"]

    def test_batches_depend_on_seed_and_step_alone(self, some_photos: PhotoSet) -> None:
        recipe = make_recipe(40, 3, quick=True)
        first, again, other = (make_batch(some_photos.training, recipe, step) for step in (7, 7, 8))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])
        other_seed = make_batch(some_photos.training, make_recipe(40, 4, quick=True), 7)
        assert not torch.equal(first[0], other_seed[0])

    def test_small_and_large_patches_show_the_same(self, some_photos: PhotoSet) -> None:
        small, large = make_batch(some_photos.training, make_recipe(40, 0, quick=True), 0)
        assert small.dtype == large.dtype == torch.float32
        assert small.shape == (4, 3, 24, 24)
        assert large.shape == (4, 3, 48, 48)
        assert 0 <= float(large.min()) <= float(large.max()) <= 1
        assert float((nn.functional.avg_pool2d(large, 2) - small).abs().mean()) < 0.03

    def test_learners_side_by_side_learn_what_each_learns_alone(self, some_photos: PhotoSet) -> None:
        recipe = make_recipe(20, 0, quick=True)

        def learner(sparse: bool) -> Learner:
            torch.manual_seed(0)
            network = EDSR(recipe.channels, recipe.blocks)
            if sparse:
                iks_plugin.sparsify(network, 0.5, total_steps=20)
            return Learner(network, torch.optim.Adam(network.parameters()))

        together = {"dense": learner(False), "sparse": learner(True)}
        train(together, some_photos.training, recipe, 20, Interrupt(), "together")
        for name, companion in together.items():
            alone = learner(sparse=name == "sparse")
            train({name: alone}, some_photos.training, recipe, 20, Interrupt(), "alone")
            assert alone.steps_done == companion.steps_done == 20
            expected = alone.network.state_dict()
            assert all(torch.equal(value, expected[key]) for key, value in companion.network.state_dict().items())

    def test_the_learning_rate_rises_and_falls(self) -> None:
        recipe = make_recipe(1000, 0, quick=False)
        rates = [recipe.lr_at(step) for step in range(1000)]
        peak = rates.index(max(rates))
        assert max(rates) == pytest.approx(recipe.lr)
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert 0 < rates[0] < 0.1 * recipe.lr
        assert 0 < rates[-1] < 0.02 * recipe.lr

    @pytest.mark.parametrize("steps", [FEWEST_STEPS, 21, 100, 3000])
    @pytest.mark.parametrize("quick", [True, False])
    def test_both_networks_train_apart_for_a_while(self, steps: int, quick: bool) -> None:
        recipe = make_recipe(steps, 0, quick)
        assert 0 < recipe.branch < steps
        assert all(recipe.lr_at(step) > 0 for step in range(steps))


class TestPicture:
    def test_the_detail_is_where_the_network_repairs_most(self) -> None:
        original = np.full((200, 240, 3), 100, np.uint8)
        bicubic = original.copy()
        bicubic[120:160, 160:200] += 50
        top, left = most_telling(bicubic, original, original)
        assert top <= 120 <= 160 <= top + DETAIL
        assert left <= 160 <= 200 <= left + DETAIL

    def test_names_of_any_kind_can_be_drawn(self, tmp_path: Path) -> None:
        photo = make_photo("50$ \\frac{ a photograph from far away.png", texture(96, 96))
        photos = PhotoSet("one", (photo,), (photo,))
        bicubic = judge("bicubic", None, [enlarge_bicubic(photo)], photos)
        dense = judge("dense", 20, [photo.large], photos)
        outcome = Outcome(photos, make_recipe(20, 0, quick=True), 0.5, (bicubic, dense), None, interrupted=True)
        draw_side_by_side(outcome, tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as picture:
            assert picture.size == (16 + 4 * 336, 48 + 48 + 320 + 16)
        assert json.loads(json.dumps(outcome.to_dict(), allow_nan=False))["psnr_y"]["dense"]["mean"] is None
        assert "50$ \\frac{ a phot..." in outcome.table()


class TestRun:
    def test_writes_everything_and_meets_the_target(self, tmp_path: Path) -> None:
        lines: list[str] = []
        outcome = run(out=tmp_path / "new" / "folder", target_sparsity=0.8, steps=30, quick=True, say=lines.append)
        assert outcome is not None
        assert outcome.report is not None
        assert outcome.report.zeros == round(0.8 * outcome.report.weights)
        assert [candidate.steps for candidate in outcome.candidates] == [None, 30, 30]
        folder = tmp_path / "new" / "folder"
        assert {path.name for path in folder.iterdir()} == FILES

        results = json.loads((folder / "results.json").read_text())
        assert results["interrupted"] is False
        assert results["sparse"]["rewritten"]["zeros"] == outcome.report.zeros
        assert set(results["psnr_y"]) == {"bicubic", "dense", "sparse"}
        said = "\n".join(lines)
        compact, dense = (folder / name for name in ("sparse.iks", "dense.pth"))
        smaller = dense.stat().st_size / compact.stat().st_size
        assert f"{compact.stat().st_size:,} bytes, {smaller:.1f} times smaller" in said
        for candidate in outcome.candidates:
            assert f"{candidate.mean_psnr:.2f}" in said
        assert f"{outcome.report.zeros:,} of {outcome.report.weights:,} weights" in said
        assert "80.00% (target 80.00%)" in said

        for index, name in ((1, "dense"), (2, "sparse")):
            network = EDSR(outcome.recipe.channels, outcome.recipe.blocks)
            network.load_state_dict(torch.load(folder / f"{name}.pth", weights_only=True), strict=True)
            image = enlarge(network, outcome.photos.held_out[0])
            np.testing.assert_array_equal(image, outcome.candidates[index].images[0])

    def test_same_seed_same_result_and_the_folder_is_reused(self, tmp_path: Path) -> None:
        data = fill(tmp_path / "images", 3)

        def weights(seed: int) -> list[torch.Tensor]:
            outcome = run(out=tmp_path / "out", data=data, steps=20, seed=seed, quick=True, say=lambda line: None)
            assert outcome is not None
            return list(torch.load(tmp_path / "out" / "sparse.pth", weights_only=True).values())

        first, again, other = weights(5), weights(5), weights(6)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])

    def test_global_state_is_left_as_it_was(self, tmp_path: Path) -> None:
        data = fill(tmp_path / "images", 3)
        random, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
        run(out=tmp_path / "out", data=data, steps=20, quick=True, threads=2, say=lambda line: None)
        assert torch.equal(torch.get_rng_state(), random)
        assert signal.getsignal(signal.SIGINT) is handler
        assert torch.get_num_threads() == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target_sparsity": 90.0}, r"target_sparsity must be a number in \[0, 1\), got 90.0: did you mean 0.9"),
            ({"target_sparsity": math.nan}, "got nan"),
            ({"steps": 19}, "steps must be a whole number of at least 20, got 19"),
            ({"steps": 50.0}, "steps must be a whole number"),
            ({"seed": -1}, r"seed must be a whole number in \[0, 2\*\*63\), got -1"),
            ({"threads": 0}, "threads must be a whole number of at least 1, got 0"),
        ],
    )
    def test_wrong_options_fail_before_anything_is_made(
        self, tmp_path: Path, options: dict[str, float], message: str
    ) -> None:
        with pytest.raises(OptionError, match=message):
            run(out=tmp_path / "out", quick=True, say=pytest.fail, **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    def test_out_that_cannot_be_written_to(self, tmp_path: Path) -> None:
        (tmp_path / "out").touch()
        with pytest.raises(IksError, match="cannot write to --out .*: name a folder that can be written to"):
            run(out=tmp_path / "out", quick=True, say=pytest.fail)

    @pytest.mark.parametrize(
        ("module", "package"),
        [("skimage", "scikit-image"), ("matplotlib", "matplotlib"), ("tqdm", "tqdm"), ("PIL", "Pillow")],
    )
    def test_missing_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(IksError, match=f"needs {package} .*: run pip install pillow scikit-image tqdm"):
            run(out=tmp_path / "out", quick=True, steps=20, say=lambda line: None)


class TestInterrupt:
    def test_the_first_one_is_noted_and_the_second_one_raised(self) -> None:
        with Interrupt() as interrupt:
            assert not interrupt.requested
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    def test_other_threads_can_use_it_too(self) -> None:
        seen: list[bool] = []

        def work() -> None:
            with Interrupt() as interrupt:
                seen.append(interrupt.requested)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [False]

    @pytest.mark.parametrize(
        ("at_step", "steps", "files", "message"),
        [
            (3, {"dense": 4}, FILES - SPARSE_FILES, "interrupted at step 4 of 30, before a sparse"),
            (5, {"dense": 6}, FILES - SPARSE_FILES, "interrupted at step 6 of 30, before a sparse"),
            (6, {"dense": 7, "sparse": 7}, FILES, "interrupted at step 7 of 30: .* had [0-9.]+% zeros by then"),
            (29, {"dense": 30, "sparse": 30}, FILES, "interrupted after the last training step: nothing is missing"),
        ],
    )
    def test_what_exists_is_written(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        at_step: int,
        steps: dict[str, int],
        files: set[str],
        message: str,
    ) -> None:
        def make_batch_under_ctrl_c(photos: tuple[Photo, ...], recipe: Recipe, step: int) -> Batch:
            if step == at_step:
                os.kill(os.getpid(), signal.SIGINT)
            return make_batch(photos, recipe, step)

        monkeypatch.setattr(training_module, "make_batch", make_batch_under_ctrl_c)
        lines: list[str] = []
        data = fill(tmp_path / "images", 3)
        outcome = run(out=tmp_path / "out", data=data, steps=30, quick=True, say=lines.append)
        assert outcome is not None
        assert outcome.interrupted
        assert {candidate.name: candidate.steps for candidate in outcome.candidates[1:]} == steps
        if outcome.report is not None:
            assert outcome.notes == ()  # nothing was cut without training
            assert (outcome.report.sparsity < 0.899) == (steps["sparse"] < 30)
        assert {path.name for path in (tmp_path / "out").iterdir()} == files
        assert json.loads((tmp_path / "out" / "results.json").read_text())["interrupted"] is True
        assert re.search(message, lines[-1])

    def test_before_the_first_step_nothing_is_written(self, tmp_path: Path) -> None:
        lines: list[str] = []

        def say(line: str) -> None:
            if not lines:
                os.kill(os.getpid(), signal.SIGINT)
            lines.append(line)

        assert run(out=tmp_path / "out", data=fill(tmp_path / "images", 3), quick=True, say=say) is None
        assert lines[-1] == "interrupted before the first step: nothing has been trained or written"
        assert not list((tmp_path / "out").iterdir())

    def test_files_of_an_earlier_run_are_kept_and_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "sparse.pth").write_text("of an earlier run")

        def make_batch_under_ctrl_c(photos: tuple[Photo, ...], recipe: Recipe, step: int) -> Batch:
            os.kill(os.getpid(), signal.SIGINT)
            return make_batch(photos, recipe, step)

        monkeypatch.setattr(training_module, "make_batch", make_batch_under_ctrl_c)
        lines: list[str] = []
        run(out=tmp_path / "out", data=fill(tmp_path / "images", 3), quick=True, say=lines.append)
        assert "  sparse.pth: left there by an earlier run, not by this one" in lines
        assert (tmp_path / "out" / "sparse.pth").read_text() == "of an earlier run"
