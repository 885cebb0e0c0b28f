"""Tiles give what the whole image gives, for networks of many kinds; what cannot be exact is refused."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import iks_plugin
from iks_plugin import IksError, IksWarning, OptionError
from iks_plugin.demo.edsr import EDSR
from iks_plugin.receptive import COLUMNS, ROWS, Reach
from iks_plugin.tiles import cuts
from iks_plugin.upscale import Upscaler, upscale
from pages import block_after

# Tiles of tests are so small that they see the image many times over.
pytestmark = pytest.mark.filterwarnings("ignore:the tiles see:iks_plugin.IksWarning")


class Calls(nn.Module):
    """Computes what it is told to."""

    def __init__(self, compute: Callable[[Tensor], object], *layers: nn.Module) -> None:
        super().__init__()
        self.compute, self.layers = compute, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> object:
        return self.compute(x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    options = {"padding": kernel // 2, **options}
    return nn.Conv2d(inputs, outputs, kernel, **options)  # type: ignore[arg-type]


class UNet(nn.Module):
    """Halves the image twice; by itself it takes only sides that are multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.down1, self.down2 = conv(3, 8), conv(8, 8, stride=2), conv(8, 8, stride=2)
        self.up2, self.up1 = nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.tail = nn.Sequential(conv(8, 12), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        high = self.head(x)
        middle = F.relu(self.down1(high))
        return self.tail(high + self.up1(F.relu(middle + self.up2(F.relu(self.down2(middle))))))


class Windows(nn.Module):
    """Attention of each pixel to those in its window of 4 x 4, and then to those in a window shifted by 2."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = conv(3, 8), nn.Sequential(conv(8, 12), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(self.head(x))
        x = F.pad(self.attend(F.pad(x, (2, 2, 2, 2))), (-2, -2, -2, -2))
        return self.tail(x)

    def attend(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        mixed = (tokens @ tokens.transpose(1, 2)).softmax(dim=-1) @ tokens
        return mixed.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


class PadsItself(nn.Module):
    """Rearranges blocks of 3 x 3 pixels, and mirrors the image to sides that allow it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.PixelUnshuffle(3), conv(27, 27), nn.ReLU(), conv(27, 108), nn.PixelShuffle(6))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        return self.body(F.pad(x, (0, -w % 3, 0, -h % 3), mode="replicate"))[..., : 2 * h, : 2 * w]


def bicubic_branch() -> nn.Module:
    layer = conv(3, 12)
    shuffle = nn.PixelShuffle(2)
    return Calls(lambda x: shuffle(layer(x)) + F.interpolate(x, scale_factor=2, mode="bicubic"), layer)


def looks_to_one_side() -> nn.Module:
    return nn.Sequential(
        nn.ZeroPad2d((4, 0, 0, 2)), conv(3, 8, 3, padding=0), nn.ZeroPad2d((0, -2, 0, 0)), conv(8, 3, 1)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, Reach]] = {
    "EDSR": (lambda: EDSR(8, 2), 2, Reach(8, 1)),
    "EDSR x3": (lambda: EDSR(8, 1, 3), 3, Reach(6, 1)),
    "point by point": (lambda: conv(3, 3, 1), 1, Reach(0, 1)),
    "dilated": (lambda: nn.Sequential(conv(3, 8, dilation=3, padding=3), nn.PReLU(), conv(8, 3)), 1, Reach(4, 1)),
    "large kernel": (lambda: nn.Sequential(conv(3, 12, 17, groups=3), nn.PixelShuffle(2)), 2, Reach(8, 1)),
    "mirrored padding": (lambda: nn.Sequential(conv(3, 8, 5, padding_mode="reflect"), conv(8, 3)), 1, Reach(3, 1)),
    "transposed": (lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 3, 9, 3, 3)), 3, Reach(2, 1)),
    "even kernel": (lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(3, 3, 2, padding=0)), 1, Reach(1, 1)),
    "maximum": (lambda: nn.Sequential(conv(3, 8), nn.MaxPool2d(3, 1, 1), conv(8, 3)), 1, Reach(3, 1)),
    "bicubic branch": (bicubic_branch, 2, Reach(2, 1)),
    "unshuffle": (
        lambda: nn.Sequential(nn.PixelUnshuffle(2), conv(12, 16), nn.GELU(), conv(16, 48), nn.PixelShuffle(4)),
        2,
        Reach(5, 2),
    ),
    "unshuffle, padded": (PadsItself, 2, Reach(8, 3)),
    "U-Net": (UNet, 2, Reach(10, 4)),
    "windows": (Windows, 2, Reach(10, 4)),
    "shifted by its padding": (looks_to_one_side, 1, Reach(4, 1)),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, int, Reach]:
    build, scale, reach = NETWORKS[request.param]
    return build(), scale, reach


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("tile", [1000, 24, (1000, 13), (31, 7)], ids=str)
def test_tiles_are_exact(network: tuple[nn.Module, int, Reach], tile: int | tuple[int, int]) -> None:
    model, scale, _ = network
    image = torch.rand(1, 3, 48, 60)
    with torch.inference_mode():
        expected = model(image)
    got = upscale(model, image, tile)
    assert got.shape[2:] == (48 * scale, 60 * scale)
    assert_close(got, expected)


@pytest.mark.parametrize("size", [(33, 25), (50, 64), (5, 90)], ids=str)
def test_tiles_are_exact_for_any_size(network: tuple[nn.Module, int, Reach], size: tuple[int, int]) -> None:
    model, scale, _ = network
    image = torch.rand(3, *size)
    expected = upscale(model, image)
    assert expected.shape == (3, size[0] * scale, size[1] * scale)
    assert_close(upscale(model, image, (12, 32)), expected)  # 33 is 32 and a pixel


def test_the_reach_is_the_smallest(network: tuple[nn.Module, int, Reach]) -> None:
    model, _, reach = network
    upscaler = Upscaler(model, 10)
    upscaler(torch.rand(3, 40, 40))
    found = [upscaler.network.reach(3, dim) for dim in (ROWS, COLUMNS)]
    assert max(got.pixels for got in found) == reach.pixels
    assert {got.period for got in found} == {reach.period}


UPSCALERS = {
    name: (NETWORKS[name][0]().eval(), {})
    for name in ("EDSR", "unshuffle", "unshuffle, padded", "U-Net", "bicubic branch")
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(UPSCALERS)),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    tile=st.tuples(st.integers(4, 80), st.integers(4, 80)),
)
def test_any_image_in_any_tiles(name: str, height: int, width: int, tile: tuple[int, int]) -> None:
    model, kept = UPSCALERS[name]
    upscaler = Upscaler(model, tile)
    upscaler.network._reaches = kept  # type: ignore[assignment]
    image = torch.rand(3, height, width)
    assert_close(upscaler(image), upscale(model, image, scale=2))


@given(
    length=st.integers(1, 300),
    tile=st.integers(1, 300),
    pixels=st.integers(0, 100),
    period=st.integers(1, 16),
    multiple=st.integers(1, 8),
)
def test_cuts_cover_everything_once_and_see_enough(
    length: int, tile: int, pixels: int, period: int, multiple: int
) -> None:
    period *= multiple
    padded = length + -length % multiple
    found = cuts(length, padded, tile, Reach(pixels, period))
    assert [place for cut in found for place in range(cut.start, cut.stop)] == list(range(length))
    for cut in found:
        assert 0 <= cut.first <= max(0, cut.start - pixels) and min(padded, cut.stop + pixels) <= cut.last <= padded
        assert cut.first % period == 0 and (cut.last % period == 0 or cut.last == padded)
        assert cut.stop - cut.start <= tile or (cut.first, cut.last) == (0, padded)


@pytest.mark.slow
def test_a_reach_of_hundreds_of_pixels_and_the_warning_of_its_cost() -> None:
    layers = [conv(2, 2, 9, dilation=8, padding=32) for _ in range(6)]
    model = nn.Sequential(conv(3, 2, 1), *layers, conv(2, 3, 1))
    image = torch.rand(3, 8, 1000)
    upscaler = Upscaler(model, (8, 100))
    with pytest.warns(IksWarning, match="the tiles see . times as many pixels"):
        got = upscaler(image)
    assert upscaler.network.reach(3, COLUMNS) == Reach(192, 1)
    assert_close(got, upscale(model, image))


def position(x: Tensor) -> Tensor:
    return x + torch.linspace(0, 1, x.shape[3], device=x.device)


EVERYWHERE = "its output depends on pixels 512 and more away, or on the whole image"
NOT_EXACT: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "global pooling": (lambda x: x * x.mean((2, 3), keepdim=True), EVERYWHERE),
    "normalised": (lambda x: F.instance_norm(x), EVERYWHERE),
    "position": (position, "Its output depends on where in the image a pixel is"),
    "corners aligned": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), "parts of an"),
    "chance": (lambda x: x + torch.rand_like(x), "on chance"),
    "around the edge": (lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, 1), "parts of an image"),
    "comparison": (lambda x: (F.avg_pool2d(x, 3, 1, 1) > 0.5).float(), "leaves no trace in its output"),
    "NaN taken out": (lambda x: F.avg_pool2d(x.nan_to_num(), 3, 1, 1), "leaves no trace in its output"),
    "hidden": (lambda x: x + F.avg_pool2d(x.nan_to_num(), 9, 1, 4), "seemed enough, but parts of an image came out"),
}


@pytest.mark.parametrize("case", NOT_EXACT)
def test_what_cannot_be_exact_is_refused(case: str) -> None:
    compute, message = NOT_EXACT[case]
    model, image = Calls(compute), torch.rand(3, 40, 40)
    with pytest.raises(IksError, match=message) as raised:
        upscale(model, image, 16)
    assert "overlap N, such as 32" in str(raised.value)
    assert upscale(model, image, 16, overlap=8).shape == upscale(model, image).shape


def test_an_overlap_makes_tiles_approximate() -> None:
    pooling = Calls(lambda x: x + 0.01 * F.avg_pool2d(x, 1).mean((2, 3), keepdim=True))
    image = torch.rand(3, 64, 64)
    got, expected = upscale(pooling, image, 24, overlap=16), upscale(pooling, image)
    assert 0 < float((got - expected).abs().max()) < 1e-2
    model = EDSR(8, 2)
    assert_close(upscale(model, image, 24, overlap=8), upscale(model, image))  # it looks no further


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("tile", [None, 16])
def test_training_flags_are_restored(tile: int | None, progress: bool) -> None:
    class Strange(nn.Module):
        """Counts its changes of mode, as a network does that merges its layers."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.modes = conv(3, 3), nn.Dropout(0.5), []

        def train(self, mode: bool = True) -> Strange:
            self.modes.append(mode)
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training and not self.b.training and not torch.is_grad_enabled()
            return self.b(self.a(x))

    model = Strange()
    model.a.eval()
    upscale(model, torch.rand(3, 20, 20), tile, progress=progress)
    assert (model.training, model.a.training, model.b.training) == (True, False, True)
    assert model.modes == [False, True]
    model.eval()
    result = upscale(model, torch.rand(3, 20, 20, requires_grad=True), tile, progress=progress)
    assert model.modes == [False, True, False]
    assert not result.is_inference() and not result.requires_grad
    model.train()
    with pytest.raises(IksError):
        upscale(model, torch.rand(4, 20, 20), tile)
    assert model.training


def test_batches_and_channels() -> None:
    model = EDSR(8, 1)
    images = torch.rand(3, 3, 30, 20)
    got = upscale(model, images, 12)
    assert_close(got, torch.stack([upscale(model, image) for image in images]))
    assert upscale(model, images[:0], 12).shape == (0, 3, 60, 40)
    four = nn.Sequential(conv(4, 8), conv(8, 20), nn.PixelShuffle(2))
    assert upscale(four, torch.rand(4, 30, 20), 12).shape == (5, 60, 40)


@pytest.mark.parametrize("tile", [None, 12])
@pytest.mark.parametrize(
    ("shape", "channels", "message"),
    [
        ((20, 14, 3), 3, None),
        ((20, 14, 3), 1, "of an image in colour the network must make 3 channels, got 1: take another network"),
        ((20, 14, 3), 4, "of an image in colour the network must make 3 channels, got 4: .* a floating tensor"),
        ((20, 14), 1, None),
        ((20, 14), 3, None),
        ((20, 14), 2, "of an image in grey the network must make 1 or 3 channels, got 2"),
        ((20, 14), 4, "of an image in grey the network must make 1 or 3 channels, got 4"),
    ],
)
def test_channels_of_arrays(shape: tuple[int, ...], channels: int, message: str | None, tile: int | None) -> None:
    model = nn.Sequential(conv(3, 4 * channels), nn.PixelShuffle(2))
    array = np.zeros(shape, np.uint8)
    if message is None:
        assert upscale(model, array, tile).shape == (40, 28, *shape[2:])
    else:
        with pytest.raises(IksError, match=message):
            upscale(model, array, tile)
        assert upscale(model, torch.rand(3, 20, 14), tile).shape == (channels, 40, 28)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = NETWORKS["unshuffle"][0]().to(dtype)
    image = torch.rand(3, 41, 30)
    expected = upscale(model, image)
    assert expected.dtype == torch.float32
    got = upscale(model, image.to(dtype), 12)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, atol=torch.finfo(dtype).eps * 4, rtol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("value_dtype", ["float32", "float16", "int8"])
def test_packed_models(value_dtype: str, bias: bool) -> None:
    model = nn.Sequential(conv(3, 16, bias=bias), conv(16, 16, bias=bias), conv(16, 12, bias=bias), nn.PixelShuffle(2))
    for parameter in model.parameters():
        parameter.data *= torch.rand_like(parameter) > 0.9
    iks_plugin.pack(model, value_dtype)
    assert not any(name.endswith("weight") for name, _ in model.named_parameters())
    image = torch.rand(3, 40, 30)
    assert_close(upscale(model, image, 16), upscale(model, image))
    with torch.inference_mode():
        assert_close(upscale(model, image), model(image[None])[0])


def test_models_with_gates() -> None:
    model = EDSR(8, 1)
    controller = iks_plugin.sparsify(model, 0.5, total_steps=10)
    image = torch.rand(3, 40, 30)
    assert_close(upscale(model, image, 16), upscale(model, image))
    assert model.training and controller.sparsity >= 0


@pytest.mark.parametrize("tile", [None, 20])
def test_arrays(tile: int | None) -> None:
    array = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
    blur = Calls(lambda x: F.interpolate(F.avg_pool2d(x, 3, 1, 1), scale_factor=2) * 1.5 - 0.2)
    got = upscale(blur, array, tile)
    floats = upscale(blur, torch.from_numpy(array).permute(2, 0, 1) / 255)
    assert got.dtype == np.uint8 and got.shape == (60, 82, 3) and got.flags.c_contiguous
    assert (got == (floats.permute(1, 2, 0) * 255).round().clamp(0, 255).numpy()).all()
    assert (got == 0).any() and (got == 255).any()
    array.setflags(write=False)
    flipped = upscale(blur, array[::-1], tile)[::-1]
    assert np.abs(flipped.astype(int) - got).max() <= 1  # it adds in another order


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("tile", [None, 20])
def test_grey_arrays(tile: int | None, channels: int) -> None:
    model = nn.Sequential(conv(channels, 8), conv(8, 4 * channels), nn.PixelShuffle(2))
    array = np.random.default_rng(0).integers(0, 256, (30, 41), np.uint8)
    got = upscale(model, array, tile)
    assert got.dtype == np.uint8 and got.shape == (60, 82)
    floats = upscale(model, torch.from_numpy(array).expand(channels, -1, -1) / 255).mean(dim=0)
    assert np.abs(got - (floats * 255).clamp(0, 255).numpy()).max() <= 0.51


def test_memory_is_for_one_tile() -> None:
    sizes = []
    layer = conv(3, 3)
    model = Calls(lambda x: sizes.append(x.shape) or layer(x), layer)
    upscale(model, torch.rand(3, 400, 500), 100)
    assert max(size[2] * size[3] for size in sizes) == 102 * 102
    assert sum(size[2] * size[3] for size in sizes if 102 in size[2:]) < 1.1 * 400 * 500


def test_what_was_found_out_is_kept() -> None:
    calls: list[torch.Size] = []
    layer = conv(3, 3)
    upscaler = Upscaler(Calls(lambda x: calls.append(x.shape) or layer(x), layer), 32)
    upscaler(torch.rand(3, 64, 64))
    first = len(calls)
    upscaler(torch.rand(3, 64, 64))
    assert len(calls) - first == 4


def test_an_image_of_one_tile_asks_nothing_else() -> None:
    calls: list[torch.Size] = []
    pooled = Calls(lambda x: calls.append(x.shape) or x * x.mean())
    upscale(pooled, torch.rand(3, 70, 80), (70, 80))
    assert calls == [(1, 3, 70, 80)]


def test_random_numbers_go_on_as_if_nothing_had_happened() -> None:
    model, image = EDSR(8, 1), torch.rand(3, 40, 40)
    before = torch.get_rng_state()
    upscale(model, image, 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_progress_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = conv(3, 3), torch.rand(3, 40, 40)
    upscale(model, image, 20)
    assert capsys.readouterr().err == ""
    upscale(model, image, 20, progress=True)
    assert "4/4" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    upscale(model, image, 20)
    assert "upscaling" in capsys.readouterr().err
    upscale(model, image, 20, progress=False)
    assert capsys.readouterr().err == ""
    with mock.patch.dict(sys.modules, {"tqdm": None}):
        upscale(model, image, 20)
        with pytest.raises(IksError, match="a progress bar needs tqdm .*pip install tqdm"):
            upscale(model, image, 20, progress=True)
    assert capsys.readouterr().err == ""


IMAGE = torch.rand(3, 20, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tile=0), "tile must be a whole number of pixels of at least 1, two of them .* got 0"),
        (dict(tile=True), "got True"),
        (dict(tile=(8, 8, 8)), "got \\(8, 8, 8\\)"),
        (dict(tile=(8, 0)), "got \\(8, 0\\)"),
        (dict(tile="8"), "got '8'"),
        (dict(scale=0), "scale must be a whole number of at least 1 or None, got 0"),
        (dict(scale=2), "scale is 2, but the network upscales by 1"),
        (dict(scale=2, tile=8), "scale is 2, but the network upscales by 1"),
        (dict(overlap=-1, tile=8), "overlap must be a whole number of pixels, 0 or more, or None, got -1"),
        (dict(overlap=8), "overlap says how far tiles see, but there are none"),
        (dict(progress=1), "progress must be True, False or None, got 1"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        upscale(conv(3, 3), IMAGE, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (IMAGE[0], "a tensor must be floating, of shape .* got torch.float32 of shape \\(20, 20\\)"),
        ((IMAGE * 255).to(torch.uint8), "got torch.uint8"),
        (IMAGE[:, :0], "an image must have channels and pixels, got shape \\(3, 0, 20\\)"),
        (IMAGE.numpy(), "an array must be uint8 of shape .* got float32"),
        (np.zeros((20, 20, 4), np.uint8), "got uint8 of shape \\(20, 20, 4\\)"),
        (np.zeros((0, 20), np.uint8), "an image must have channels and pixels"),
        ("a.png", "an image must be a floating tensor or a uint8 array, got str"),
    ],
)
def test_wrong_images(image: object, message: str) -> None:
    with pytest.raises(IksError, match=message):
        upscale(conv(3, 3), image)  # type: ignore[call-overload]


@pytest.mark.parametrize("tile", [None, 8])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (conv(4, 4), r"the network fails on an image of shape \(1, 3, \d+, \d+\): .*expected input.* 4 channels"),
        (Calls(lambda x: (x, x)), "must make images .* of images, got tuple for one of shape"),
        (Calls(lambda x: x.mean((2, 3))), r"got a tensor of shape \(1, 3\)"),
        (Calls(lambda x: x[..., ::2]), "a whole number of times as high and as wide, got 10 x 20 pixels for 20 x 20"),
        (Calls(lambda x: F.interpolate(x, scale_factor=1.5)), "got 30 x 30 pixels for 20 x 20"),
        (conv(3, 3).to("meta"), 'is on the device "meta", without weights'),
        (lambda x: x, "upscale expects a torch.nn.Module that maps images to images, got function"),
    ],
)
def test_wrong_networks(model: nn.Module, message: str, tile: int | None) -> None:
    if tile is not None:
        message = message.replace("10 x 20", "16 x 32").replace("30 x 30", "48 x 48").replace("20 x 20", "32 x 32")
    with pytest.raises(IksError, match=message):
        upscale(model, IMAGE, tile)


def test_grey_for_a_network_of_neither() -> None:
    with pytest.raises(IksError, match="the network fails"):
        upscale(conv(4, 4), np.zeros((20, 20), np.uint8))


def out_of_memory(x: Tensor) -> Tensor:
    if x.shape[2] > 200:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
    return x


def test_too_little_memory_says_what_helps() -> None:
    with pytest.raises(IksError, match="not enough memory for an image of 300 x 300 pixels .*: take tiles, or smaller"):
        upscale(Calls(out_of_memory), torch.rand(3, 300, 300))
    image = torch.rand(3, 300, 300)
    assert torch.equal(upscale(Calls(out_of_memory), image, 100), image)


def test_errors_of_the_package_come_through() -> None:
    def fails(_: Tensor) -> Tensor:
        raise IksError("from within")

    with pytest.raises(IksError, match="^from within$"):
        upscale(Calls(fails), IMAGE)


def test_nothing_is_warned_of_sensible_tiles() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upscale(EDSR(8, 1), torch.rand(3, 100, 100), 50)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SwinIR-light", "RRDBNet-x2", "ECBSR"])
def test_networks_of_basicsr(kind: str) -> None:
    pytest.importorskip("basicsr")
    from networks_basicsr import BASICSR

    (network,) = (case for case in BASICSR if case.name == kind)
    model, image = network.build(0), torch.rand(3, 85, 101)
    assert_close(upscale(model, image, 40), upscale(model, image))


def test_the_snippet_of_the_documentation() -> None:
    with mock.patch.object(iks_plugin, "upscale", upscale):
        exec(block_after("docs/upscale.md", "test"), {})
