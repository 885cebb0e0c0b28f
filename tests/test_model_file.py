"""Models to compact files and back: what survives, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import iks_plugin
import toys
from iks_plugin import IksError, OptionError, container
from iks_plugin.entries import DTYPES
from iks_plugin.layers import output_axis

GOLDEN = Path(__file__).parent / "golden"


def pruned_sr(sparsity: float = 0.9, channels: int = 16) -> nn.Module:
    """Trained by another tool: a mask times a weight, which leaves zeros of both signs."""
    model = toys.plain_sr(channels)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and min(layer.in_channels, layer.out_channels) > 4:
                layer.weight.mul_(torch.rand_like(layer.weight) >= sparsity)
    return model


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    assert torch.equal(*raw)


def bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same bits, but that a zero may have lost its sign."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def test_a_pruned_model_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = pruned_sr()
    iks_plugin.save(model, tmp_path / "m.iks")
    other = toys.plain_sr()
    assert iks_plugin.load(tmp_path / "m.iks", other) is other
    for name, tensor in model.state_dict().items():
        assert bits_equal(other.state_dict()[name], tensor), name
    assert list(iks_plugin.load(tmp_path / "m.iks")) == list(model.state_dict())


def test_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    model = pruned_sr()
    iks_plugin.save(model, tmp_path / "m.iks")
    before = list(model.parameters())
    iks_plugin.load(tmp_path / "m.iks", model)
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("value_dtype", ["float32", "float16", "bfloat16"])
def test_lossless_for_the_chosen_value_type(tmp_path: Path, value_dtype: str) -> None:
    model = pruned_sr()
    iks_plugin.save(model, tmp_path / "m.iks", value_dtype)
    loaded = iks_plugin.load(tmp_path / "m.iks")
    for name, tensor in model.state_dict().items():
        is_sparse = name.endswith("weight") and bool((tensor == 0).any())
        expected = tensor.to(getattr(torch, value_dtype)).float() if is_sparse else tensor
        assert bits_equal(loaded[name], expected), name


def test_int8_values_are_near(tmp_path: Path) -> None:
    model = pruned_sr()
    iks_plugin.save(model, tmp_path / "m.iks", "int8")
    loaded = iks_plugin.load(tmp_path / "m.iks")
    for name, tensor in model.state_dict().items():
        if name.endswith("weight") and bool((tensor == 0).any()):
            assert float((loaded[name] - tensor).norm() / tensor.norm()) < 0.01
            assert not loaded[name][tensor == 0].any()
        else:
            assert bits_equal(loaded[name], tensor)
    iks_plugin.save(loaded, tmp_path / "again.iks", "int8")
    for name, tensor in iks_plugin.load(tmp_path / "again.iks").items():
        assert torch.allclose(tensor, loaded[name], rtol=0.02, atol=1e-4), name


def test_int8_scales_belong_to_output_channels() -> None:
    assert output_axis(nn.Conv2d(4, 8, 3)) == output_axis(nn.Linear(4, 8)) == 0
    assert output_axis(nn.ConvTranspose2d(4, 8, 3)) == 1


def test_int8_of_a_transposed_convolution(tmp_path: Path) -> None:
    layer = nn.ConvTranspose2d(6, 5, 3)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) >= 0.5)
        layer.weight[:, 2] *= 1000  # one output channel far larger than the others
    iks_plugin.save(layer, tmp_path / "t.iks", "int8")
    loaded = iks_plugin.load(tmp_path / "t.iks")["weight"]
    error = (loaded - layer.weight).square().sum((0, 2, 3)) / layer.weight.square().sum((0, 2, 3))
    assert float(error.max().sqrt()) < 0.01


def test_a_rewritten_model_is_finalized_on_the_way_out_and_stays_as_it_is(tmp_path: Path) -> None:
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.9, ramp_steps=20)
    toys.train(model, torch.optim.Adam(controller.param_groups(), 1e-3), steps=30)
    before = copy.deepcopy(model.state_dict())
    iks_plugin.save(model, tmp_path / "m.iks")
    assert iks_plugin.is_sparsified(model)
    assert toys.states_equal(before, model.state_dict())
    iks_plugin.finalize(model)
    assert toys.states_equal(dict(model.state_dict()), iks_plugin.load(tmp_path / "m.iks"))
    with container.opened(tmp_path / "m.iks") as file:
        assert file.info.target_sparsity == 0.9
        assert file.info.model_class == "torch.nn.modules.container.Sequential"
        assert file.info.plugin_version == iks_plugin.__version__
    iks_plugin.save(model, tmp_path / "f.iks")
    assert (tmp_path / "m.iks").read_bytes() == (tmp_path / "f.iks").read_bytes()


def test_into_a_rewritten_model_the_weights_go_and_the_thresholds_start_anew(tmp_path: Path) -> None:
    model = pruned_sr()
    iks_plugin.save(model, tmp_path / "m.iks")
    other = toys.plain_sr()
    iks_plugin.sparsify(other, 0.9)
    toys.spread_thresholds(other)
    iks_plugin.load(tmp_path / "m.iks", other)
    assert bits_equal(other[2].raw_weight, model[2].weight)
    assert bool((other[2].threshold == -12).all())


def test_onto_the_meta_device(tmp_path: Path) -> None:
    model = pruned_sr()
    iks_plugin.save(model, tmp_path / "m.iks")
    with torch.device("meta"):
        other = toys.plain_sr()
    iks_plugin.load(tmp_path / "m.iks", other)
    assert toys.states_equal(dict(other.state_dict()), dict(model.state_dict()))
    assert all(isinstance(parameter, nn.Parameter) for parameter in other.parameters())


class TiedInTwoPlaces(toys.TiedConvs):
    """As some networks are: a weight and a bias shared, one layer frozen, an average that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.second.bias = self.first.bias
        self.alone = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(8))
        self.register_buffer("also_seen", self.seen)


@pytest.mark.parametrize("packed", [False, True])
def test_tied_parameters_stay_tied_from_the_meta_device(tmp_path: Path, packed: bool) -> None:
    model = TiedInTwoPlaces()
    model.first.weight.data *= torch.rand_like(model.first.weight) > 0.9
    iks_plugin.save(model, tmp_path / "m.iks")
    with torch.device("meta"):
        other = TiedInTwoPlaces()
    iks_plugin.load(tmp_path / "m.iks", other, packed=packed)
    assert toys.states_equal(dict(other.state_dict()), dict(model.state_dict()))
    assert other.first.bias is other.second.bias and other.seen is other.also_seen
    assert packed or other.first.weight is other.second.weight
    for name, parameter in other.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad == (not name.startswith("alone.")), name


def test_what_only_the_file_ties_is_parted_from_the_meta_device(tmp_path: Path) -> None:
    iks_plugin.save(TiedInTwoPlaces(), tmp_path / "m.iks")

    class Parted(TiedInTwoPlaces):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(8, 8, 3, padding=1)
            self.also_seen = torch.ones(8)

    with torch.device("meta"):
        other = Parted()
    iks_plugin.load(tmp_path / "m.iks", other)
    for one, two in (("first.weight", "second.weight"), ("first.bias", "second.bias"), ("seen", "also_seen")):
        state = other.state_dict()
        assert torch.equal(state[one], state[two]) and state[one].data_ptr() != state[two].data_ptr()


@pytest.mark.parametrize("packed", [False, True])
def test_a_buffer_that_no_file_holds(saved: Path, packed: bool) -> None:
    def build(device: str) -> nn.Module:
        with torch.device("meta"):
            model = toys.plain_sr()
        model.register_buffer("mean", torch.ones(3, device=device), persistent=False)
        return model

    model = build("meta")
    with pytest.raises(IksError, match=r'mean: on the device "meta", and no file holds it .*: make it on the CPU'):
        iks_plugin.load(saved, model, packed=packed)
    assert all(parameter.is_meta for parameter in model.parameters())
    whole = iks_plugin.load(saved, build("cpu"), packed=packed)
    assert not any(tensor.is_meta for tensor in (*whole.parameters(), *whole.buffers()))


WRAPPERS = {
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled and averaged": lambda model: AveragedModel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_leaves_no_trace(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = pruned_sr()
    iks_plugin.save(wrap(model), tmp_path / "m.iks")
    assert list(iks_plugin.load(tmp_path / "m.iks")) == list(model.state_dict())
    wrapped = wrap(toys.plain_sr())
    assert iks_plugin.load(tmp_path / "m.iks", wrapped) is wrapped
    x = torch.randn(1, 3, 8, 8)
    assert bits_equal(wrapped(x), model(x))


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits, but for bool, which has only two values."""
    count = int(np.prod(shape))
    if dtype == torch.bool:
        return (torch.rand(count) < 0.5).view(shape)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 3, 5, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_of_every_dtype_survive(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    tensor = tensor_of(DTYPES[dtype], shape)
    iks_plugin.save({"a buffer": tensor}, tmp_path / "t.iks")
    assert_same(iks_plugin.load(tmp_path / "t.iks")["a buffer"], tensor)


WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=5).map(tuple),
    dtype=st.sampled_from(WEIGHT_DTYPES),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_weights_of_any_shape_and_sparsity_come_back(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], dtype: str, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(getattr(torch, dtype))  # float64 ones fit float32 so
    weight[torch.rand(shape, generator=generator) < share] = 0
    path = tmp_path_factory.mktemp("any") / "w.iks"
    iks_plugin.save({"weight": weight}, path)
    assert bits_equal(iks_plugin.load(path)["weight"], weight)


ORDERS = {
    "channels_last": lambda: torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(4, 3, 2, 5, 6).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(4, 7).t(),
    "sliced": lambda: torch.randn(8, 7)[::2, 1:5],
    "expanded": lambda: torch.randn(4, 1).expand(4, 6),
    "conjugated": lambda: torch.randn(4, 3, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("make", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_memory_formats_survive(tmp_path: Path, make, sparse: bool) -> None:
    tensor = make()
    if sparse and not tensor.is_complex() and tensor.stride()[-1]:
        tensor = tensor.clone(memory_format=torch.preserve_format)
        tensor[torch.rand(tensor.shape) < 0.7] = 0
    iks_plugin.save({"weight": tensor}, tmp_path / "t.iks")
    loaded = iks_plugin.load(tmp_path / "t.iks")["weight"]
    assert torch.equal(loaded, tensor)
    if tensor.stride() == torch.empty_like(tensor).stride():  # it fills its memory without gaps
        assert loaded.stride() == tensor.stride()


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    tied = toys.TiedConvs()
    iks_plugin.save(tied, tmp_path / "tied.iks")
    with container.opened(tmp_path / "tied.iks") as file:
        aliases = [entry for entry in file.entries if entry.kind == "alias"]
        assert len(aliases) >= 1
        assert sum(entry.nbytes for entry in aliases) == 0
    loaded = iks_plugin.load(tmp_path / "tied.iks")
    for entry in aliases:
        assert loaded[entry.name] is loaded[entry.alias_of]
    for name, tensor in tied.state_dict().items():
        assert torch.equal(loaded[name], tensor)
    other = toys.TiedConvs()
    iks_plugin.load(tmp_path / "tied.iks", other)
    assert toys.states_equal(dict(other.state_dict()), dict(tied.state_dict()))


@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
def test_a_state_dict_with_nothing_in_it(tmp_path: Path, value_dtype: str) -> None:
    iks_plugin.save({}, tmp_path / "empty.iks", value_dtype)
    assert iks_plugin.load(tmp_path / "empty.iks") == {}
    iks_plugin.load(tmp_path / "empty.iks", nn.ReLU())


def test_files_of_the_first_version_are_read_for_ever() -> None:
    """Written by the first release; not to be written anew: it shows that the coder still decodes what it coded."""
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        loaded = iks_plugin.load(GOLDEN / f"version-1-{dtype}.iks")
        expected = golden_state()
        assert list(loaded) == list(expected)
        for name, tensor in expected.items():
            if dtype == "int8" and name == "conv.weight":
                assert not loaded[name][tensor == 0].any()
                assert torch.allclose(loaded[name], tensor, atol=0.01)
            elif name == "conv.weight":
                assert torch.equal(loaded[name], tensor.to(getattr(torch, dtype)).float())
            else:
                assert torch.equal(loaded[name], tensor), name


def golden_state() -> dict[str, torch.Tensor]:
    """Made by arithmetic alone, so that it is the same on every machine and with every version of torch."""
    places = torch.arange(32 * 16 * 9)
    weight = ((places * 7919 % 1009).float() - 504) / 1024
    weight[places * 104729 % 97 > 12] = 0
    return {
        "conv.weight": weight.view(32, 16, 3, 3),
        "conv.bias": torch.arange(32).float() / 8,
        "steps": torch.tensor(12345),
        "table": (places * 31 % 17).view(-1, 9),
        "flags": places[:100] % 3 == 0,
    }


# What is refused


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"a": 3}, r"1 entries of the state dict are not tensors with a name: 'a' \(int\)"),
        ({3: torch.ones(2)}, r"not tensors with a name: 3 \(Tensor\)"),
        ("a path", "save expects a torch.nn.Module or a state dict, got str"),
        ({"a": torch.eye(3).to_sparse()}, "a: expected a dense tensor, got one of layout torch.sparse_coo"),
        ({"a": torch.empty(2, device="meta")}, "a: expected a tensor with values, got one on the device 'meta'"),
        (
            {"a\x1b[2J": torch.ones(2)},
            r"a tensor's name: expected text that can be printed, got 'a\\x1b\[2J': rename it",
        ),
        ({"\ud800": torch.ones(2)}, r"expected text that can be printed, got '\\ud800'"),
        (
            {"q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
            "q: expected a dtype that the format knows, got torch.qint8",
        ),
    ],
    ids=["an int", "a nameless tensor", "a string", "sparse layout", "meta", "cursor", "half a character", "quantized"],
)
def test_what_cannot_be_saved(tmp_path: Path, what: object, message: str) -> None:
    path = tmp_path / "m.iks"
    path.write_bytes(b"before")
    with pytest.raises(IksError, match=message):
        iks_plugin.save(what, path)  # type: ignore[arg-type]
    assert path.read_bytes() == b"before"


def test_a_class_and_a_key_that_cannot_be_printed(tmp_path: Path) -> None:
    with pytest.raises(IksError, match=r"checkpoint_key: expected text that can be printed, got 'par\\nams'"):
        iks_plugin.save({}, tmp_path / "m.iks", checkpoint_key="par\nams")
    with pytest.raises(IksError, match=r"model_class: expected text that can be printed, got '.*Net\\x07'"):
        iks_plugin.save(type("Net\x07", (nn.ReLU,), {})(), tmp_path / "m.iks")
    assert os.listdir(tmp_path) == []


def test_a_weight_that_the_value_type_cannot_hold_is_named(tmp_path: Path) -> None:
    model = pruned_sr()
    model[2].weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(OptionError, match=r"2\.weight: expected weights that float16 can hold"):
        iks_plugin.save(model, tmp_path / "m.iks", "float16")
    model[2].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(OptionError, match=r"2\.weight: expected finite weights"):
        iks_plugin.save(model, tmp_path / "m.iks", "int8")
    with pytest.raises(OptionError, match="value_dtype must be one of"):
        iks_plugin.save(model, tmp_path / "m.iks", "float64")
    assert os.listdir(tmp_path) == []
    iks_plugin.save(model, tmp_path / "m.iks")  # float32 keeps what is not finite
    assert torch.isnan(iks_plugin.load(tmp_path / "m.iks")["2.weight"][0, 0, 0, 0])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    iks_plugin.save(pruned_sr(), tmp_path / "m.iks")
    return tmp_path / "m.iks"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (lambda: toys.plain_sr(8), [r"0\.weight: shape \(8, 3, 3, 3\) in the model, \(16, 3, 3, 3\) in the file"]),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 16, 3)),
            [r"2\.weight: not in the model", "Build the model with the options"],
        ),
        (lambda: nn.Sequential(*toys.plain_sr(), nn.Conv2d(3, 3, 1)), [r"\d\.weight: not in the file"]),
        (lambda: nn.ModuleDict({"net": toys.plain_sr()}), ["... and [0-9]+ more", r"net\.0\.weight: not in the file"]),
        (lambda: nn.Sequential(nn.LazyConv2d(16, 3)), [r"0\.weight: the model has no tensor there yet"]),
    ],
    ids=["other shapes", "less", "more", "other names", "lazy"],
)
def test_files_of_other_models(saved: Path, make, messages: list[str], packed: bool) -> None:
    model = make()
    before = {} if any(isinstance(m, nn.LazyConv2d) for m in model.modules()) else copy.deepcopy(model.state_dict())
    with pytest.raises(IksError) as raised:
        iks_plugin.load(saved, model, packed=packed)
    assert str(saved) in str(raised.value)
    for message in messages:
        assert raised.match(message)
    if before:
        assert toys.states_equal(before, model.state_dict())


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_entry_leaves_the_model_as_it_was(saved: Path, packed: bool) -> None:
    content = bytearray(saved.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 20] ^= 1  # past the container's header
    saved.write_bytes(content)
    model = toys.plain_sr()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        IksError, match=r"m\.iks: entry '\d\.\w+': expected the checksum \w{8}, got \w{8}\. The file is dam"
    ):
        iks_plugin.load(saved, model, packed=packed)
    assert toys.states_equal(before, model.state_dict())
    assert not any("Packed" in type(module).__name__ for module in model.modules())


def test_a_model_that_refuses_what_fits(saved: Path) -> None:
    class Refuses(nn.Sequential):
        def load_state_dict(self, *_: object, **__: object) -> None:
            raise RuntimeError("not today")

    with pytest.raises(IksError, match="the model does not take what the file holds: not today"):
        iks_plugin.load(saved, Refuses(*toys.plain_sr()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(packed=True), "packed=True needs the model"),
        (dict(model="edsr"), "load expects a torch.nn.Module to load into, got str"),
    ],
)
def test_wrong_arguments_of_load(saved: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(IksError, match=message):
        iks_plugin.load(saved, **arguments)


def test_loading_into_a_packed_model(saved: Path) -> None:
    model = iks_plugin.load(saved, toys.plain_sr(), packed=True)
    with pytest.raises(IksError, match="the model is packed already: call iks_plugin.unpack"):
        iks_plugin.load(saved, model)


def test_packed_into_a_rewritten_model(saved: Path) -> None:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5)
    with pytest.raises(IksError, match="the model has gates .*finalize"):
        iks_plugin.load(saved, model, packed=True)


# What a failure to write leaves behind


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(IksError, match=r"nowhere/m\.iks: cannot be written \(there is no folder .*nowhere\)"):
        iks_plugin.save(pruned_sr(), tmp_path / "nowhere" / "m.iks")


def test_folders_devices_and_links(tmp_path: Path) -> None:
    state = {"weight": torch.ones(3, 3)}
    for path in ("", ".", tmp_path):
        with pytest.raises(IksError, match="cannot be written .Is a directory."):
            iks_plugin.save(state, path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IksError, match="cannot be written .it is there and no ordinary file."):
        iks_plugin.save(state, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "real.iks").write_bytes(b"before")
    (tmp_path / "real.iks").chmod(0o640)
    (tmp_path / "link.iks").symlink_to("real.iks")
    iks_plugin.save(state, tmp_path / "link.iks")
    assert (tmp_path / "link.iks").is_symlink()
    assert torch.equal(iks_plugin.load(tmp_path / "real.iks")["weight"], state["weight"])
    assert (tmp_path / "real.iks").stat().st_mode & 0o777 == 0o640


DISK_FULL = """
import resource, signal, sys, torch, iks_plugin
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the system refuses to write more, as on a full disk
try:
    iks_plugin.save({"weight": torch.randn(64, 64)}, sys.argv[1])
except iks_plugin.IksError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.iks"
    iks_plugin.save({"weight": torch.ones(3, 3)}, path)
    root = str(Path(iks_plugin.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert "cannot be written (File too large). What was there before is unchanged" in ran.stdout
    assert torch.equal(iks_plugin.load(path)["weight"], torch.ones(3, 3))
    assert os.listdir(tmp_path) == ["m.iks"]


def test_no_permission_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a system call that refuses: the tests may run as root, to whom every folder is open."""
    path = tmp_path / "m.iks"
    iks_plugin.save({"weight": torch.ones(3, 3)}, path)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(IksError, match=r"cannot be written \(Permission denied\)"):
        iks_plugin.save({"weight": torch.zeros(3, 3)}, path)
    assert torch.equal(iks_plugin.load(path)["weight"], torch.ones(3, 3))
    assert os.listdir(tmp_path) == ["m.iks"]
