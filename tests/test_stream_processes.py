"""Packed models that stream, in other processes and threads, with kernels from the disk, and given what is no image."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iks_plugin
from iks_plugin import fast

pytest.importorskip("numba")

PACKAGE = Path(iks_plugin.__file__).parent
SECONDS = 240
"""A process that takes longer hangs."""


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.two(self.one(x).relu())
        return out


class Network(nn.Module):
    """A small EDSR x2."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(Block(channels) for _ in range(3)), nn.Conv2d(channels, channels, 3, padding=1))
        self.up = nn.Sequential(nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2))
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(x - 0.5)
        out: Tensor = self.tail(self.up(features + self.body(features))) + 0.5
        return out


def plain_network(zeros: float = 0.9) -> nn.Module:
    torch.manual_seed(0)
    model = Network()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and name not in ("head", "tail"):
                module.weight *= torch.rand_like(module.weight) >= zeros
    return model.eval()


def image_of(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height * width))


IMAGE = image_of(40, 56)
OTHER_IMAGE = image_of(33, 70)


def prefer_streams() -> None:
    """Streams are taken whichever way is the faster one here. In a process that a test has to itself, for good."""
    times = iter(range(10**6))
    fast._seconds = lambda act: (act(), next(times))[1]


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fast, "_seconds", fast._seconds)  # puts it back
    prefer_streams()
    yield
    torch.set_num_threads(1)


@pytest.fixture
def plain() -> nn.Module:
    return plain_network()


@pytest.fixture
def model(plain: nn.Module) -> nn.Module:
    """Packed, and has run already, so that there are plans for an image of that size."""
    packed = iks_plugin.pack(copy.deepcopy(plain))
    run(packed, IMAGE)
    assert set(fast.paths(packed).values()) == {"stream"}
    return packed


def run(model: nn.Module, image: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(image)
    return result


def assert_close(result: Tensor, expected: Tensor) -> None:
    assert result.shape == expected.shape
    assert float((result - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


# Processes and threads


def run_in_child(model: nn.Module, pipe: Any, threads: int) -> None:
    prefer_streams()
    torch.set_num_threads(threads)
    results = [run(model, image).numpy() for image in (IMAGE, OTHER_IMAGE)]
    pipe.send((results, sorted(set(fast.paths(model).values()))))


def ask_child(method: str, model: nn.Module, threads: int) -> list[Tensor]:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=run_in_child, args=(model, theirs, threads))  # type: ignore[attr-defined]
    child.start()
    theirs.close()
    try:
        assert ours.poll(SECONDS), "the child does not answer"
        results, paths = ours.recv()
    finally:
        child.kill()
        child.join()
    assert paths == ["stream"]
    return [torch.from_numpy(result) for result in results]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_process_made_by_fork_computes_the_same(model: nn.Module, threads: int) -> None:
    torch.set_num_threads(2)
    expected = [run(model, image) for image in (IMAGE, OTHER_IMAGE)]  # the parent has threads, which fork leaves behind
    for result, known in zip(ask_child("fork", model, threads), expected, strict=True):
        assert torch.equal(result, known)
    assert torch.equal(run(model, IMAGE), expected[0])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_fork_while_other_threads_run_the_model(model: nn.Module) -> None:
    torch.set_num_threads(2)
    expected = [run(model, image) for image in (IMAGE, OTHER_IMAGE)]
    stop = False

    def work(_: int) -> None:
        while not stop:
            run(model, IMAGE)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work, number) for number in range(2)]
        try:
            for _ in range(3):
                for result, known in zip(ask_child("fork", model, 2), expected, strict=True):
                    assert torch.equal(result, known)
        finally:
            stop = True
        for future in futures:
            future.result()


def test_a_spawned_process_computes_the_same(model: nn.Module) -> None:
    torch.set_num_threads(2)
    expected = [run(model, image) for image in (IMAGE, OTHER_IMAGE)]
    for result, known in zip(ask_child("spawn", model, 2), expected, strict=True):
        assert torch.equal(result, known)


def test_several_threads_at_once(model: nn.Module, plain: nn.Module) -> None:
    """Also with sizes that have no plan yet, more of them than are kept."""
    torch.set_num_threads(2)
    images = [image_of(16 + 7 * number, 60 - 5 * number) for number in range(6)]
    expected = [run(plain, image) for image in images]

    def work(number: int) -> tuple[int, Tensor]:
        return number % len(images), run(model, images[number % len(images)])

    with ThreadPoolExecutor(6) as pool:
        for number, result in pool.map(work, range(48)):
            assert_close(result, expected[number])


def test_first_runs_by_several_threads_at_once(plain: nn.Module) -> None:
    """torch.fx traces with every module's call patched, those of other threads and models included."""
    expected = run(plain, IMAGE)
    for _ in range(20):
        models = [iks_plugin.pack(copy.deepcopy(plain)) for _ in range(3)]
        with ThreadPoolExecutor(6) as pool:
            for result in pool.map(run, [*models, plain, *models, plain], [IMAGE] * 8):
                assert_close(result, expected)


def test_the_number_of_threads_may_change(model: nn.Module, plain: nn.Module) -> None:
    expected = run(plain, IMAGE)
    for threads in (1, 2, 5, 1, 3, 64, 2):
        torch.set_num_threads(threads)
        assert_close(run(model, IMAGE), expected)
        assert torch.get_num_threads() == threads


def test_results_do_not_change_when_others_are_computed(model: nn.Module) -> None:
    """An output is memory of its own, and so is what a run works in."""
    first = run(model, IMAGE)
    known = first.clone()
    run(model, 1 - IMAGE)
    assert torch.equal(first, known)
    assert torch.equal(run(model, IMAGE), known)


# Kernels on the disk


SCRIPT = """
import json, sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import test_stream_processes as tests
tests.prefer_streams()
packed = tests.iks_plugin.pack(tests.plain_network())
result = tests.run(packed, tests.IMAGE)
from iks_plugin import _kernels
stats = [value.stats for value in vars(_kernels).values() if hasattr(value, "stats")]
print(json.dumps({
    "package": tests.iks_plugin.__file__,
    "hits": sum(sum(one.cache_hits.values()) for one in stats),
    "misses": sum(sum(one.cache_misses.values()) for one in stats),
    "paths": sorted(set(tests.fast.paths(packed).values())),
    "output": result.flatten().tolist(),
}))
"""


def fresh_process(package: Path, **variables: str) -> dict[str, Any]:
    """What a new process says that runs the network once, with the package in the folder `package`."""
    command = [sys.executable, "-c", SCRIPT, str(package), str(Path(__file__).parent)]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * SECONDS)
    assert not done.returncode, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(answer["package"]).parent.parent == package
    return answer


def assert_right(answer: dict[str, Any], plain: nn.Module) -> None:
    expected = run(plain, IMAGE)
    assert_close(torch.tensor(answer["output"]).view(expected.shape), expected)


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def copy_of_the_package(folder: Path) -> Path:
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.slow
def test_kernels_are_compiled_once_for_all_processes_of_a_version(tmp_path: Path, plain: nn.Module) -> None:
    package = copy_of_the_package(tmp_path / "package")
    cache = tmp_path / "cache"
    first = fresh_process(package, NUMBA_CACHE_DIR=str(cache))
    assert first["misses"] > 0 and first["paths"] == ["stream"]
    written = files_in(cache)
    assert any(name.endswith(".nbc") for name in written)
    second = fresh_process(package, NUMBA_CACHE_DIR=str(cache))
    assert second["hits"] > 0 and second["misses"] == 0
    assert files_in(cache) == written
    # Numba looks at the file of a cached function alone; what it calls may be in others.
    path = package / PACKAGE.name / "_vectors.py"
    path.write_text(path.read_text() + "\n# another version\n")
    third = fresh_process(package, NUMBA_CACHE_DIR=str(cache))
    assert third["misses"] > 0
    for answer in (first, second, third):
        assert_right(answer, plain)


@pytest.mark.slow
def test_where_nothing_can_be_written_kernels_are_compiled_for_the_process(tmp_path: Path, plain: nn.Module) -> None:
    package = copy_of_the_package(tmp_path / "package")
    (package / PACKAGE.name / "__pycache__").write_text("a file, so that not even root can make the folder")
    blocked = tmp_path / "file"
    blocked.write_text("")
    names = ("NUMBA_CACHE_DIR", "HOME", "XDG_CACHE_HOME", "LOCALAPPDATA")
    assert_right(fresh_process(package, **{name: str(blocked / "below") for name in names}), plain)


def test_importing_the_package_and_packing_load_no_compiler() -> None:
    """Numba takes a while to import: the first run does that."""
    code = f"""
import sys
sys.path[:0] = [{str(PACKAGE.parent)!r}, {str(Path(__file__).parent)!r}]
import torch, iks_plugin
before = set(sys.modules)
model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1))
model[0].weight.data *= torch.rand_like(model[0].weight) >= 0.9
iks_plugin.pack(model)
print(sorted({{"numba", "torch._dynamo"}} & set(sys.modules) - before))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_first_run_does_not_load_torchs_compiler() -> None:
    """`torch._dynamo` takes a second to import."""
    code = f"""
import sys
sys.path[:0] = [{str(PACKAGE.parent)!r}, {str(Path(__file__).parent)!r}]
import test_stream_processes as tests
before = "torch._dynamo" in sys.modules
tests.run(tests.iks_plugin.pack(tests.plain_network()), tests.IMAGE)
print(before, "torch._dynamo" in sys.modules)
"""
    before, after = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert before == after


# What is no image for the network


BAD: dict[str, Callable[[], Any]] = {
    "one channel": lambda: torch.rand(1, 1, 40, 56),
    "too many channels": lambda: torch.rand(1, 4, 40, 56),
    "no channels": lambda: torch.rand(1, 0, 40, 56),
    "two dimensions": lambda: torch.rand(40, 56),
    "five dimensions": lambda: torch.rand(1, 3, 1, 40, 56),
    "float64": lambda: torch.rand(1, 3, 40, 56, dtype=torch.float64),
    "float16": lambda: torch.rand(1, 3, 40, 56).half(),
    "bool": lambda: torch.rand(1, 3, 40, 56) > 0.5,
    "complex": lambda: torch.rand(1, 3, 40, 56).to(torch.complex64),
    "no height": lambda: torch.rand(1, 3, 0, 56),
    "no width": lambda: torch.rand(1, 3, 40, 0),
    "None": lambda: None,
}


@pytest.mark.parametrize("has_run", [True, False], ids=["after others", "at first"])
@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_the_errors_of_the_dense_network(
    model: nn.Module, plain: nn.Module, make: Callable[[], Any], has_run: bool
) -> None:
    """Also where an image of that height and width has run before."""
    image = make()
    if not has_run:
        model = iks_plugin.pack(copy.deepcopy(plain))
    with pytest.raises(Exception) as dense:
        run(plain, image)
    with pytest.raises(type(dense.value)) as packed:
        run(model, image)
    assert str(packed.value) == str(dense.value)
    assert_close(run(model, IMAGE), run(plain, IMAGE))


GOOD: dict[str, Callable[[], Any]] = {
    "no images": lambda: torch.rand(0, 3, 40, 56),
    "without a batch": lambda: torch.rand(3, 40, 56),
    "integers": lambda: torch.randint(0, 2, (1, 3, 40, 56)),
    "meta": lambda: torch.rand(1, 3, 40, 56, device="meta"),
}


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
def test_what_the_dense_network_takes(model: nn.Module, plain: nn.Module, make: Callable[[], Any]) -> None:
    image = make()
    result, expected = run(model, image), run(plain, image)
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
    if expected.numel() and not expected.is_meta:
        assert_close(result, expected)


# NaN and inf


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3e38], ids=str)
def test_numbers_that_are_not_finite_stay_within_what_the_dense_network_makes_of_them(
    model: nn.Module, plain: nn.Module, number: float
) -> None:
    """Products with pruned weights, which are left out, would have been NaN; nothing else is another number."""
    image = IMAGE.clone()
    image[0, 1, 17, 30] = number
    result, expected = run(model, image), run(plain, image)
    ours, theirs = result.isfinite(), expected.isfinite()
    assert not (theirs & ~ours).any()
    largest = expected[theirs].abs().max()
    assert (result - expected)[theirs].abs().max() <= 1e-5 * largest
    assert_close(run(model, IMAGE), run(plain, IMAGE))  # nothing of it is left in memory


def test_not_a_number_goes_wherever_weights_take_it(model: nn.Module, plain: nn.Module) -> None:
    """NaN at one pixel: in the output exactly where a path of weights that are not zero leads, as the dense network
    makes of a mark there."""
    image = IMAGE.clone()
    image[0, 1, 17, 30] = float("nan")
    paths = copy.deepcopy(plain)
    with torch.no_grad():
        for module in paths.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight != 0)
                module.bias = None
    mark = torch.full_like(IMAGE, 0.5)
    mark[0, 1, 17, 30] = 1.0
    reached = run(paths, mark) > 0.5
    nans = run(model, image).isnan()
    assert not (reached & ~nans).any()
    assert not (nans & run(plain, image).isfinite()).any()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU()], ids=["ReLU", "LeakyReLU", "PReLU"])
@pytest.mark.parametrize("zeros", [0.2, 0.9], ids=["full", "sparse"])
def test_activations_of_infinities(activation: nn.Module, zeros: float) -> None:
    """The network's own values may overflow: ReLU of minus infinity is zero, and no NaN."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 3, padding=1)
    plain = nn.Sequential(layer, activation).eval()
    with torch.no_grad():
        layer.weight[:, 1:] *= torch.rand(16, 15, 3, 3) >= zeros
        layer.weight[:, 0] = 1e4 * torch.randn(16, 1, 1)  # of one sign for each output, so that no inf meets another
    image = torch.rand(1, 16, 40, 56)
    image[:, 0] = 1e38
    expected = run(plain, image)
    assert expected.isinf().any() or isinstance(activation, nn.ReLU)
    model = iks_plugin.pack(plain)
    result = run(model, image)
    if isinstance(activation, nn.ReLU):
        assert (expected == 0).any()
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isinf(), expected.isinf())
    assert torch.equal(result == 0, expected == 0)
