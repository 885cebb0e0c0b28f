"""`iks upscale` on small pictures, with tiny networks: in this process, on real files."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import iks_plugin
from iks_plugin import IksError
from iks_plugin.__main__ import WRONG_USE, main
from iks_plugin.architecture import build_network, parsed_arguments
from iks_plugin.demo.edsr import EDSR
from iks_plugin.images import Picture, read_picture, write_picture
from iks_plugin.upscale import upscale

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:the tiles see:iks_plugin.IksWarning")

ARCH = "iks_plugin.demo.edsr:EDSR"
ARGS = ["--arch", ARCH, "--arch-args", "channels=8", "blocks=1"]


def edsr() -> EDSR:
    torch.manual_seed(0)
    model = EDSR(8, 1)
    model.body[0].conv1.weight.data *= torch.rand_like(model.body[0].conv1.weight) > 0.9
    return model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of each test, with weights and a picture."""
    monkeypatch.chdir(tmp_path)
    iks_plugin.save(edsr(), "edsr.iks")
    torch.save({"params": edsr().state_dict()}, "edsr.pth")
    picture("in.png")
    return tmp_path


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def picture(name: str, array: np.ndarray | None = None, mode: str | None = None, **saving: object) -> None:
    image = Image.fromarray(pixels(30, 41, 3) if array is None else array)
    (image if mode is None else image.convert(mode)).save(name, **saving)


def run(*arguments: str) -> int:
    return main(["upscale", *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run(*arguments) == WRONG_USE
    message = capsys.readouterr().err
    assert message.startswith("iks: error: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize("model", ["edsr.iks", "edsr.pth"])
@pytest.mark.parametrize("packed", [[], ["--packed"], ["--no-packed"]], ids=str)
def test_a_picture(model: str, packed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("in.png", "out.png", "--model", model, *packed, *ARGS) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{model}: {ARCH}\nin.png: 41 x 30 -> out.png: 82 x 60, ")
    assert printed.out.endswith(" s\n") and printed.err == ""
    got = np.asarray(Image.open("out.png"))
    assert np.abs(got.astype(int) - upscale(edsr(), pixels(30, 41, 3))).max() <= 1
    assert sorted(path.name for path in Path().iterdir()) == ["edsr.iks", "edsr.pth", "in.png", "out.png"]


@pytest.mark.parametrize("model", ["edsr.iks", "edsr.pth"])
@pytest.mark.parametrize(("packed", "expected"), [(None, None), (True, True), (False, False)])
def test_what_is_packed(model: str, packed: bool | None, expected: bool | None) -> None:
    from iks_plugin.architecture import load_network
    from iks_plugin.runtime import is_packed

    network, name = load_network(model, ARCH, {"channels": 8, "blocks": 1}, packed)
    assert is_packed(network) == (model == "edsr.iks" if expected is None else expected)
    assert name == ARCH and not network.training


class Shrinks(nn.Module):
    """A network of its own with a learned soft shrinkage: thresholds that are none of a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.threshold = nn.Parameter(torch.full((1, 3, 1, 1), 0.1))
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(self.weight * nn.functional.relu(x - self.threshold))
        return y


def test_thresholds_of_the_networks_own_and_those_of_gates() -> None:
    from iks_plugin.architecture import load_network

    model = Shrinks()
    iks_plugin.sparsify(model, 0.5, include=["conv"])
    model.conv.threshold.data.fill_(-2)
    torch.save({"epoch": 3, "net_g": model.state_dict()}, "own.pth")
    network, _ = load_network("own.pth", f"{__name__}:Shrinks", key="net_g")
    assert torch.equal(network.threshold, model.threshold) and torch.equal(network.weight, model.weight)
    assert torch.equal(network.conv.weight, model.conv.weight)


def test_a_state_dict_under_a_key_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"epoch": 3, "net_g": edsr().state_dict()}, "own.pth")
    message = refused(capsys, "in.png", "out.png", "--model", "own.pth", *ARGS)
    assert "choose one of ['net_g'] with --key" in message
    assert run("in.png", "out.png", "--model", "own.pth", "--key", "net_g", *ARGS) == 0
    assert run("in.png", "same.png", "--model", "edsr.pth", *ARGS) == 0
    assert Path("out.png").read_bytes() == Path("same.png").read_bytes()


@pytest.mark.parametrize("tiles", [["--tile", "16"], ["--tile", "16", "--overlap", "8"], ["--tile", "100"]], ids=str)
def test_tiles_give_the_same(tiles: list[str]) -> None:
    assert run("in.png", "whole.png", "--model", "edsr.iks", *ARGS) == 0
    assert run("in.png", "tiled.png", "--model", "edsr.iks", *tiles, *ARGS) == 0
    whole, tiled = (np.asarray(Image.open(name)).astype(int) for name in ("whole.png", "tiled.png"))
    assert np.abs(whole - tiled).max() <= 1


@pytest.mark.parametrize(
    ("mode", "name", "expected"),
    [
        ("RGB", "in.jpg", "RGB"),
        ("RGB", "in.bmp", "RGB"),
        ("RGB", "in.webp", "RGB"),
        ("RGB", "in.tif", "RGB"),
        ("L", "in.png", "L"),
        ("1", "in.png", "L"),
        ("P", "in.png", "RGB"),
        ("CMYK", "in.jpg", "RGB"),
        ("RGBA", "in.png", "RGBA"),
        ("LA", "in.png", "LA"),
    ],
)
def test_kinds_of_pictures(mode: str, name: str, expected: str) -> None:
    picture(name, mode=mode)
    assert run(name, "out.png", "--model", "edsr.iks", *ARGS) == 0
    result = Image.open("out.png")
    assert (result.mode, result.size) == (expected, (82, 60))


def test_alpha_is_enlarged_by_itself() -> None:
    array = pixels(30, 41, 4)
    picture("in.png", array)
    assert run("in.png", "out.png", "--model", "edsr.iks", *ARGS) == 0
    alpha = Image.fromarray(array[..., 3]).resize((82, 60), Image.Resampling.BICUBIC)
    got = np.asarray(Image.open("out.png"))
    assert (got[..., 3] == np.asarray(alpha)).all()
    assert np.abs(got[..., :3].astype(int) - upscale(edsr(), array[..., :3].copy())).max() <= 1


def test_alpha_without_a_use_is_no_obstacle() -> None:
    picture("in.png", mode="RGBA")
    assert run("in.png", "out.jpg", "--model", "edsr.iks", *ARGS) == 0
    assert Image.open("out.jpg").mode == "RGB"


def test_alpha_of_pictures_in_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """The same rule as for one picture. Pillow goes by what is in a file, not by its name."""
    Path("some").mkdir()
    picture("some/opaque.jpg", mode="RGBA", format="PNG")
    assert run("some", "large", "--model", "edsr.iks", *ARGS) == 0
    assert Image.open("large/opaque.jpg").mode == "RGB"
    picture("some/glass.jpg", pixels(8, 8, 4), format="PNG")
    message = refused(capsys, "some", "large", "--model", "edsr.iks", *ARGS)
    assert "some/glass.jpg has transparent pixels, which .jpg files cannot have: write a .png file" in message


def test_a_transparent_colour() -> None:
    picture("in.png", np.zeros((8, 8, 3), np.uint8), transparency=(0, 0, 0))
    assert run("in.png", "out.png", "--model", "edsr.iks", *ARGS) == 0
    assert (np.asarray(Image.open("out.png"))[..., 3] == 0).all()


def test_pictures_are_turned_upright_and_keep_their_profile() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture("in.jpg", exif=exif, icc_profile=b"a profile")
    assert run("in.jpg", "out.jpg", "--model", "edsr.iks", *ARGS) == 0
    result = Image.open("out.jpg")
    assert result.size == (60, 82) and result.info["icc_profile"] == b"a profile"
    assert result.getexif().get(0x0112) is None


@pytest.mark.parametrize(
    ("mode", "name", "kept"),
    [
        ("RGB", "in.png", True),
        ("L", "in.png", True),
        ("RGBA", "in.png", True),
        ("P", "in.png", True),
        ("P", "in.tif", True),
        ("CMYK", "in.tif", False),  # becomes RGB, which its profile says nothing of
    ],
)
def test_profiles(mode: str, name: str, kept: bool) -> None:
    picture(name, mode=mode, icc_profile=b"a profile")
    assert Image.open(name).mode == mode and Image.open(name).info["icc_profile"] == b"a profile"
    assert run(name, "out.png", "--model", "edsr.iks", *ARGS) == 0
    assert Image.open("out.png").info.get("icc_profile") == (b"a profile" if kept else None)


class LumaNetwork(nn.Sequential):
    """Of one channel, as many networks of the literature are."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3, padding=1), nn.PixelShuffle(2))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_networks_of_one_channel(mode: str) -> None:
    network = LumaNetwork()
    network[0].weight.data = torch.eye(9)[4].view(1, 1, 3, 3).repeat(4, 1, 1, 1)  # each pixel four times
    network[0].bias.data.zero_()
    torch.save(network.state_dict(), "luma.pth")
    array = np.asarray(Image.fromarray(pixels(6, 8, 3)).resize((41, 30), Image.Resampling.BICUBIC))
    picture("in.png", array, mode)
    assert run("in.png", "out.png", "--model", "luma.pth", "--arch", f"{__name__}:LumaNetwork") == 0
    result = Image.open("out.png")
    assert result.mode == mode
    expected = Image.open("in.png").resize((82, 60), Image.Resampling.NEAREST)
    assert np.abs(np.asarray(result).astype(int) - np.asarray(expected)).mean() < 6


class ManyChannels(nn.Sequential):
    """Of colours, it makes so many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(3, 4 * channels, 3, padding=1), nn.PixelShuffle(2))


@pytest.mark.parametrize("tiles", [[], ["--tile", "16"]], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_networks_that_make_no_colours(channels: int, tiles: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(ManyChannels(channels).state_dict(), "many.pth")
    network = ["--model", "many.pth", "--arch", f"{__name__}:ManyChannels", "--arch-args", f"channels={channels}"]
    message = refused(capsys, "in.png", "out.png", *network, *tiles)
    assert f"of an image in colour the network must make 3 channels, got {channels}: take another network" in message
    assert not Path("out.png").exists()


def test_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("some").mkdir()
    Path("some", "notes.txt").write_text("no picture")
    for name, shape in {"a.png": (20, 30, 3), "b.jpg": (30, 20, 3), "c.PNG": (9, 9)}.items():
        picture(f"some/{name}", pixels(*shape))
    assert run("some", "new/large", "--model", "edsr.iks", "--tile", "16", *ARGS) == 0
    printed = capsys.readouterr()
    assert "some -> new/large: 3 pictures, " in printed.out and printed.err == ""
    sizes = {path.name: Image.open(path).size for path in Path("new/large").iterdir()}
    assert sizes == {"a.png": (60, 40), "b.jpg": (40, 60), "c.PNG": (18, 18)}

    for name in ("d.png", "e.png", "f.png", "g.png"):
        Path("some", name).write_bytes(b"damaged")
    message = refused(capsys, "some", "again", "--model", "edsr.iks", *ARGS)
    assert "4 of 7 pictures were not upscaled: " in message and all(f"some/{name}.png" in message for name in "defg")
    for name in ("d.png", "e.png", "f.png", "g.png"):
        Path("some", name).unlink()
    Path("some", "b.jpg").write_bytes(b"damaged")
    Path("again", "b.jpg").unlink()
    message = refused(capsys, "some", "again", "--model", "edsr.iks", *ARGS)
    assert "1 of 3 pictures were not upscaled: some/b.jpg: unreadable: not a picture that Pillow can read" in message
    assert sorted(path.name for path in Path("again").iterdir()) == ["a.png", "c.PNG"]


def test_damage_that_pillow_is_not_prepared_for(capsys: pytest.CaptureFixture[str]) -> None:
    Path("some").mkdir()
    for name in ("a.png", "b.tif", "c.png"):
        picture(f"some/{name}")
    content = Path("some/b.tif").read_bytes()
    damaged = content.replace(struct.pack("<HH", 273, 4), struct.pack("<HH", 273, 2))  # places of strips become text
    assert damaged != content
    Path("some/b.tif").write_bytes(damaged)  # a TypeError of Pillow
    message = refused(capsys, "some", "large", "--model", "edsr.iks", *ARGS)
    assert "1 of 3 pictures were not upscaled: some/b.tif: unreadable: " in message
    assert sorted(path.name for path in Path("large").iterdir()) == ["a.png", "c.png"]
    with mock.patch("PIL.ImageOps.exif_transpose", side_effect=KeyError()):
        assert refused(capsys, "in.png", "out.png", "--model", "edsr.iks", *ARGS).endswith("unreadable: KeyError\n")


def test_a_file_that_is_there_is_replaced_whole_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.png").write_bytes(b"before")
    with mock.patch("PIL.Image.Image.save", side_effect=OSError("disk full")):
        message = refused(capsys, "in.png", "out.png", "--model", "edsr.iks", *ARGS)
    assert "out.png: cannot be written (disk full). What was there before is unchanged" in message
    assert Path("out.png").read_bytes() == b"before"
    assert run("in.png", "out.png", "--model", "edsr.iks", *ARGS) == 0
    assert Image.open("out.png").size == (82, 60)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("no.png", "out.png"), "no.png: expected a picture or a folder of them, found nothing: check the path"),
        (("in.png", "in.png"), "in.png is what to read: write to another place"),
        (("in.png", "empty"), "empty is a folder: name the file to write, as in.png is one too"),
        (("in.png", "no/out.png"), "there is no folder no to write to: make it first"),
        (("in.png", "out.xyz"), "expected a name that ends in .png, .jpg"),
        (("in.png", "out"), "got 'no ending'"),
        (("empty", "out"), "empty: expected pictures in the folder, found none"),
        (("full", "full"), "full is what to read"),
        (("full", "in.png"), "in.png is a file: name a folder to write to, as full is one too"),
        (("full", "in.png/out"), "in.png/out: the folder cannot be made"),
        (("edsr.pth", "out.png"), "edsr.pth: unreadable: not a picture that Pillow can read"),
        (("16.png", "out.png"), "16.png: expected 8 bits a channel, got more: convert it first"),
        (("frames.webp", "out.png"), "frames.webp: expected one picture, got 2 frames: take them apart first"),
        (("alpha.png", "out.jpg"), "alpha.png has transparent pixels, which .jpg files cannot have: write a .png file"),
        (("cut.png", "out.png"), "cut.png: unreadable: "),
    ],
)
def test_wrong_paths_and_pictures(paths: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("full").mkdir()
    picture("full/a.png")
    picture("16.png", pixels(8, 8).astype(np.uint16) * 256)
    picture("alpha.png", pixels(8, 8, 4))
    frames = [Image.fromarray(pixels(8, 8, 3)), Image.fromarray(255 - pixels(8, 8, 3))]
    frames[0].save("frames.webp", save_all=True, append_images=frames[1:])
    Path("cut.png").write_bytes(Path("in.png").read_bytes()[:600])
    assert message in refused(capsys, *paths, "--model", "edsr.iks", *ARGS)


def test_16_bit_colours_are_seen_though_pillow_makes_8_of_them(tmp_path: Path) -> None:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(2 * 6) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    Path("rgb16.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(IksError, match="expected 8 bits a channel, got more"):
        read_picture(Path("rgb16.png"))


class NoNetwork:
    def __init__(self) -> None: ...


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no.iks", "--arch", ARCH], "no.iks: expected a compact file, found nothing"),
        (["--model", "no.pth", "--arch", ARCH], "no.pth: expected a checkpoint, found nothing"),
        (["--model", "in.png", "--arch", ARCH], "in.png: expected a checkpoint that torch.save has written"),
        (["--arch", ARCH, "--arch-args", "chanels=8"], "EDSR(chanels=8) fails: "),
        (["--arch", ARCH, "--arch-args", "chanels=8"], "It takes (channels: "),
        (["--arch", ARCH, "--arch-args", "channels"], "--arch-args: expected key=value, such as num_feat=64"),
        (["--arch", ARCH, "--arch-args", "{]"], "--arch-args: expected a JSON object, got '{]'"),
        (["--arch", "no_such_module:Net"], "--arch no_such_module:Net cannot be imported: No module named"),
        (["--arch", "iks_plugin.demo.edsr.EDRS"], "--arch iks_plugin.demo.edsr.EDRS cannot be imported: "),
        (["--arch", "math:pi"], "--arch math:pi must name a class of networks, got a float"),
        (
            ["--arch", f"{__name__}:NoNetwork"],
            "must be a class of networks (torch.nn.Module), but it makes a NoNetwork",
        ),
        (["--arch", "auto", "--arch-args", "channels=8"], "arguments of a network need its class"),
        (["--key", "params", *ARGS], "--key is for checkpoints, and the compact file edsr.iks holds one network"),
        (["--device", "nowhere", *ARGS], "--device nowhere cannot be used: "),
        (["--tile", "0", *ARGS], "tile must be a whole number of pixels of at least 1"),
        (["--overlap", "4", *ARGS], "overlap says how far tiles see, but there are none"),
        (["--model", "edsr.pth", "--arch", ARCH, "--arch-args", "channels=16"], "edsr.pth does not fit the network: "),
        (["--model", "edsr.pth", "--arch", ARCH, "--arch-args", "channels=8"], "is not in it"),
    ],
)
def test_wrong_networks(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = [] if "--model" in arguments else ["--model", "edsr.iks"]
    assert message in refused(capsys, "in.png", "out.png", *model, *arguments)
    assert not Path("out.png").exists()


def test_a_compact_file_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "in.png", "out.png", "--model", "edsr.iks", "--arch", ARCH)
    assert "does not fit the model" in message and "--arch-args" in message


def test_the_network_within_a_model_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """As in checkpoints of MMagic, whose models hold a network and more."""
    inside = {f"generator.{name}": value for name, value in edsr().state_dict().items()}
    torch.save({"state_dict": {"step_counter": torch.zeros(1), **inside}}, "mmagic.pth")
    for model, out in (("edsr.pth", "plain.png"), ("mmagic.pth", "found.png")):
        assert run("in.png", out, "--model", model, *ARGS) == 0
    assert Path("found.png").read_bytes() == Path("plain.png").read_bytes()

    average = {name.replace("generator.", "generator_ema."): value for name, value in inside.items()}
    torch.save({"state_dict": {**inside, **average}}, "two.pth")
    message = refused(capsys, "in.png", "out.png", "--model", "two.pth", *ARGS)
    assert "behind each of generator., generator_ema.: " in message and "iks export --prefix generator." in message
    iks_plugin.save(inside, "inside.iks")
    message = refused(capsys, "in.png", "out.png", "--model", "inside.iks", *ARGS)
    assert "stand there behind generator.: " in message and "iks export --prefix generator." in message


def test_the_network_of_the_working_folder() -> None:
    Path("my_network.py").write_text("from iks_plugin.demo.edsr import EDSR as Net\n")
    with mock.patch.object(sys, "path", [path for path in sys.path if path]):
        assert run("in.png", "out.png", "--model", "edsr.iks", "--arch", "my_network.Net", *ARGS[2:]) == 0
    sys.modules.pop("my_network")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (
            ["a=1", "b=2.5", "c=true", "d=[1, 2]", "e=text", "f=1,2"],
            dict(a=1, b=2.5, c=True, d=[1, 2], e="text", f="1,2"),
        ),
        (["a=True", "b=None", "c=null", "d=", 'e="1"'], dict(a=True, b=None, c=None, d="", e="1")),
        (['{"a": 1, "b": {"c": 2}}', "a=3", "k=x=y"], dict(a=3, b={"c": 2}, k="x=y")),
        ([], {}),
    ],
)
def test_arguments(texts: list[str], expected: dict[str, object]) -> None:
    assert parsed_arguments(texts) == expected


class FromTheFile(EDSR):
    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        super().__init__(8, 1)


def test_no_class_is_imported_because_a_file_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    iks_plugin.save(FromTheFile(), "own.iks")
    FromTheFile.made = 0
    named = f"{__name__}.FromTheFile"
    hint = f"The file says it is of {named}: pass --arch {named} if you trust it"
    with mock.patch.dict(sys.modules, {"spandrel": None}):
        assert hint in refused(capsys, "in.png", "out.png", "--model", "own.iks", "--arch", "auto")
        with mock.patch("importlib.util.find_spec", return_value=None):
            message = refused(capsys, "in.png", "out.png", "--model", "own.iks")
    assert hint in message and "Name it with --arch, or install spandrel" in message
    assert FromTheFile.made == 0
    assert run("in.png", "out.png", "--model", "own.iks", "--arch", named) == 0
    assert FromTheFile.made == 1


@pytest.mark.parametrize("suffix", ["iks", "pth"])
@pytest.mark.parametrize("arch", [[], ["--arch", "auto"]], ids=str)
def test_spandrel_finds_the_architecture(suffix: str, arch: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("spandrel")
    from spandrel.architectures.Compact import Compact

    model = Compact(num_feat=16, num_conv=2, upscale=2)
    iks_plugin.save(model, "compact.iks")
    torch.save({"params_ema": model.state_dict()}, "compact.pth")
    assert run("in.png", "out.png", "--model", f"compact.{suffix}", *arch) == 0
    assert "RealESRGAN Compact, as spandrel finds" in capsys.readouterr().out
    got = np.asarray(Image.open("out.png")).astype(int)
    assert np.abs(got - upscale(model, pixels(30, 41, 3))).max() <= 1


def test_what_spandrel_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("spandrel")
    message = refused(capsys, "in.png", "out.png", "--model", "edsr.iks")
    assert "edsr.iks: spandrel " in message and "Name the network with --arch. The file says it is of" in message
    with mock.patch("spandrel.ModelLoader.load_from_state_dict", side_effect=KeyError("body")):
        assert "spandrel fails: 'body'" in refused(capsys, "in.png", "out.png", "--model", "edsr.pth")


def test_architectures_of_basicsr(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("basicsr")
    options = dict(num_in_ch=3, num_out_ch=3, num_feat=8, num_block=1, upscale=2)
    model = build_network("EDSR", options)
    assert type(build_network("basicsr.archs.edsr_arch.EDSR", options)) is type(model)
    iks_plugin.save(model, "basicsr.iks")
    arguments = ["--arch-args", *(f"{key}={value}" for key, value in options.items())]
    assert run("in.png", "out.png", "--model", "basicsr.iks", "--arch", "EDSR", *arguments) == 0
    assert Image.open("out.png").size == (82, 60)
    message = refused(capsys, "in.png", "out.png", "--model", "basicsr.iks", "--arch", "ESDR")
    assert "expected package.module:Class or one of BasicSR's architectures: " in message and "EDSR" in message


def test_architectures_of_basicsr_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(sys.modules, {"iks_basicsr": None}):
        message = refused(capsys, "in.png", "out.png", "--model", "edsr.iks", "--arch", "EDSR")
    assert "--arch EDSR needs BasicSR" in message and "A class of your own is named package.module:Class" in message


def test_without_pillow(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(sys.modules, {"PIL.Image": None}):
        message = refused(capsys, "in.png", "out.png", "--model", "edsr.iks", *ARGS)
    assert "reading pictures needs Pillow" in message and "pip install pillow" in message


def test_without_tqdm() -> None:
    Path("some").mkdir()
    picture("some/a.png")
    with mock.patch.dict(sys.modules, {"tqdm": None}):
        assert run("some", "large", "--model", "edsr.iks", *ARGS) == 0


def test_pictures_come_back_as_they_were_written(tmp_path: Path) -> None:
    for name in ("a.png", "a.webp", "a.tif", "a.bmp"):
        write_picture(tmp_path / name, Picture(pixels(9, 8, 3)))
        assert (read_picture(tmp_path / name).pixels == pixels(9, 8, 3)).all()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    text = " ".join(capsys.readouterr().out.split())
    expected = ["IN", "OUT", "--model FILE", "--arch ARCH", "--no-packed", "--tile N", "(default: cpu)"]
    assert [part for part in expected if part not in text] == []
