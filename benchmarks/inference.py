"""How fast packed networks run on a CPU, against PyTorch and other engines on the same network.

    python benchmarks/inference.py                     # EDSR 16 x 64 x2 on an image of 320 x 180: some minutes
    python benchmarks/inference.py --only layers sweep memory
    python benchmarks/inference.py --only networks --deepsparse ~/deepsparse/bin/python --openvino ~/openvino/bin/python
    python benchmarks/inference.py --only networks --trained iks-demo/sparse.iks --arch iks_plugin.demo.edsr:EDSR

- networks: EDSR with 90 % zeros in its body alone, and in the upsampler too, ESRGAN's RRDBNet (fewer blocks, 160 x 90)
  and trained networks, against PyTorch in both layouts of memory, with and without torch.compile, and against ONNX
  Runtime, OpenVINO and DeepSparse at float32. DeepSparse needs older packages than PyTorch does: an engine
  runs by the interpreter that its option names.
- layers: 64 -> 64 convolutions with 3 x 3 kernels at 192 x 320, alone, and each of a chain of 16 with ReLU.
- sweep: chains of convolutions of many sparsities, widths, sizes and threads: packed is never to be slower.
- memory: the peak of a whole process that upscales to 1920 x 1080 (Linux only).

All that are compared take turns within one run, with equally many threads. A turn begins with a run that does not
count; medians do, and ratios more than times. Outputs that differ from the dense network's end the benchmark.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edsr import EDSR, SIZES, table
from inference_worker import ENGINES
from rrdb import RRDBNet
from torch import Tensor, nn
from tqdm import tqdm

import iks_plugin
from iks_plugin import fast
from iks_plugin.architecture import load_network, parsed_arguments
from iks_plugin.runtime import Packed

SIZE = "16x64"
IMAGE = (180, 320)
RRDB_BLOCKS, RRDB_IMAGE = 4, (90, 160)
LARGE = (540, 960)
LARGEST_ERROR = 1e-4
"""By which an output may differ from the dense network's, relative to the largest value."""

Way = Callable[[int], "list[float]"]
"""Runs so many times and returns the seconds of each."""


def prune(model: nn.Module, zeros: float, names: tuple[str, ...]) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and name.startswith(names):
                module.weight *= torch.rand(module.weight.shape, generator=generator) >= zeros
    return model.eval()


def edsr(zeros: float, upsampler: bool) -> nn.Module:
    torch.manual_seed(0)
    names = ("body", "conv_after_body", *(("upsample",) if upsampler else ()))
    return prune(EDSR(*SIZES[SIZE]), zeros, names)


def rrdb(zeros: float) -> nn.Module:
    torch.manual_seed(0)
    return prune(RRDBNet(RRDB_BLOCKS), zeros, ("body", "conv_body", "conv_up", "conv_hr"))


def packed_copy(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", iks_plugin.IksWarning)  # without zeros nothing is packed
        return iks_plugin.pack(copy.deepcopy(model))


def zeros_in(packed: nn.Module) -> float:
    weights = [module.packed_weight for module in packed.modules() if isinstance(module, Packed)]
    return sum(weight.zeros for weight in weights) / max(1, sum(weight.shape.numel() for weight in weights))


def timed(act: Callable[[], object]) -> Way:
    def way(runs: int) -> list[float]:
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            act()
            seconds.append(time.perf_counter() - start)
        return seconds

    return way


def in_turn(ways: dict[str, Way], rounds: int, least: float = 0.0) -> dict[str, float]:
    """The median of the seconds that each takes, in turns of at least so many seconds.

    What takes seconds for a single run has three rounds only.
    """
    first = {name: way(2)[-1] for name, way in ways.items()}  # the first of all runs may compile and measure
    runs = {name: 1 + math.ceil(least / seconds) if least else 2 for name, seconds in first.items()}
    if max(first.values()) > 2:
        rounds = min(rounds, 3)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(statistics.median(way(runs[name])[1:]))
    return {name: statistics.median(values) for name, values in times.items()}


def torch_acts(model: nn.Module, image: Tensor, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    image_last = image.to(memory_format=torch.channels_last)
    acts: dict[str, Callable[[], Tensor]] = {
        "PyTorch, NCHW": lambda: model(image),
        "PyTorch, channels_last": lambda: last(image_last),
    }
    if compiled:
        torch._dynamo.reset()
        fused, fused_last = torch.compile(model), torch.compile(last)
        acts["PyTorch compiled, NCHW"] = lambda: fused(image)
        acts["PyTorch compiled, channels_last"] = lambda: fused_last(image_last)
    return acts


class Peer:
    """Another engine, in a process of its own, which stands still while it is not its turn."""

    def __init__(self, engine: str, python: str, folder: Path) -> None:
        output = folder / f"{engine}.npy"
        worker = Path(__file__).with_name("inference_worker.py")
        files = (folder / "network.onnx", folder / "image.npy", output)
        self._command = list(map(str, [python, "-I", worker, engine, *files, torch.get_num_threads()]))
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.name = str(self._answer())
        except BaseException:
            self.close()
            raise
        self.output = torch.from_numpy(np.load(output))
        self._signal("SIGSTOP")

    def __call__(self, runs: int) -> list[float]:
        assert self._process.stdin is not None
        self._signal("SIGCONT")
        self._process.stdin.write(f"run {runs}\n")
        self._process.stdin.flush()
        seconds: list[float] = self._answer()
        self._signal("SIGSTOP")  # its threads may look for work for a while, on cores that others need
        return seconds

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self._command)} has ended")
        return json.loads(line)

    def _signal(self, name: str) -> None:
        number = getattr(signal, name, None)  # not on Windows
        if number is not None:
            self._process.send_signal(number)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def peers(model: nn.Module, image: Tensor, pythons: dict[str, str], stack: ExitStack) -> Iterator[Peer]:
    """The engines that there are interpreters for, ready to run `model`; closed with the stack."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    np.save(folder / "image.npy", image.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(folder / "network.onnx")
        torch.onnx.export(model, (image,), path, input_names=["image"], opset_version=11, dynamo=False)
    for engine, python in pythons.items():
        peer = Peer(engine, python, folder)
        stack.callback(peer.close)
        yield peer


def error_of(output: Tensor, expected: Tensor, name: str) -> float:
    """The largest difference, of the largest output. One that is too large ends the benchmark."""
    if output.shape != expected.shape:
        raise SystemExit(f"{name}: the output has shape {tuple(output.shape)} instead of {tuple(expected.shape)}")
    error = float((output - expected).abs().max() / expected.abs().max())
    if not error <= LARGEST_ERROR:
        raise SystemExit(f"{name}: the output differs from the dense network's by {error:.1e} of the largest value")
    return error


@torch.no_grad()
def measure_network(
    model: nn.Module, rounds: int, compiled: bool, pythons: dict[str, str], size: tuple[int, int]
) -> list[dict[str, Any]]:
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    packed, expected = packed_copy(model), model(image)
    with ExitStack() as stack:
        acts = {"iks-plugin": lambda: packed(image), **torch_acts(model, image, compiled)}
        errors = {name: error_of(act(), expected, name) for name, act in acts.items()}
        ways: dict[str, Way] = {name: timed(act) for name, act in acts.items()}
        if pythons:
            for peer in peers(model, image, pythons, stack):
                errors[peer.name], ways[peer.name] = error_of(peer.output, expected, peer.name), peer
        seconds = in_turn(ways, rounds)
    ratios = {name: value / seconds["iks-plugin"] for name, value in seconds.items()}
    return [
        {"engine": name, "ms": 1000 * seconds[name], "ratio": ratios[name], "error": errors[name]} for name in seconds
    ]


def measure_networks(
    rounds: int, compiled: bool, pythons: dict[str, str], trained: dict[str, nn.Module], masks: bool
) -> list[dict[str, Any]]:
    """`trained` networks by name, and random masks, the other engines for 90 % only."""
    rows = []
    scopes = (("body", False), ("body and upsampler", True)) if masks else ()
    for scope, upsampler in scopes:
        for zeros in (0.8, 0.9, 0.95):
            whole = zeros == 0.9
            peers = pythons if whole else {}
            found = measure_network(edsr(zeros, upsampler), rounds, compiled and whole, peers, IMAGE)
            rows += [{"scope": scope, "zeros": zeros, **row} for row in found]
    if masks:
        able = {engine: python for engine, python in pythons.items() if engine != "deepsparse"}  # 1.8 fails at it
        found = measure_network(rrdb(0.9), rounds, compiled, able, RRDB_IMAGE)
        rows += [{"scope": f"RRDBNet x4, {RRDB_BLOCKS} blocks", "zeros": 0.9, **row} for row in found]
    for name, model in trained.items():
        zeros = zeros_in(packed_copy(model))
        rows += [
            {"scope": name, "zeros": zeros, **row} for row in measure_network(model, rounds, compiled, pythons, IMAGE)
        ]
    return rows


def chain(count: int, channels: int, zeros: float) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(count) for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
    return prune(nn.Sequential(*layers), zeros, ("",))


@torch.no_grad()
def measure_chain(model: nn.Module, image: Tensor, rounds: int) -> dict[str, Any]:
    """Packed against PyTorch, each with images in the layout that it is faster with: here they have many channels."""
    dense = torch_acts(model, image, compiled=False)
    packed = packed_copy(model)
    packed_last = packed_copy(copy.deepcopy(model).to(memory_format=torch.channels_last))
    image_last = image.to(memory_format=torch.channels_last)
    ours = {"packed, NCHW": lambda: packed(image), "packed, channels_last": lambda: packed_last(image_last)}
    error = max(error_of(act(), dense["PyTorch, NCHW"](), "iks-plugin") for act in ours.values())
    seconds = in_turn({name: timed(act) for name, act in (ours | dense).items()}, rounds, least=0.03)
    layout = min(dense, key=seconds.__getitem__)
    fastest = min(seconds[name] for name in ours)
    return {
        "dense ms": 1000 * seconds[layout],
        "packed ms": 1000 * fastest,
        "ratio": seconds[layout] / fastest,
        "layout": layout.removeprefix("PyTorch, "),
        "path": "/".join(sorted(set(fast.paths(packed).values()))) or "nothing packed",
        "error": error,
    }


def measure_layers(rounds: int) -> list[dict[str, Any]]:
    rows = []
    image = torch.rand(1, 64, 192, 320)
    for count in (1, 16):
        for zeros in (0.5, 0.6, 0.8, 0.9, 0.95):
            row = measure_chain(chain(count, 64, zeros), image, rounds)
            per_layer = {name: row[name] / count for name in ("dense ms", "packed ms")}
            rows.append({"layers": count, "zeros": zeros, **row, **per_layer})
    return rows


SWEEP = {
    "channels": (16, 64, 256),
    "sizes": ((17, 23), (90, 160), (360, 640)),
    "zeros": (0.0, 0.3, 0.5, 0.7, 0.9, 0.99),
    "layers": (4,),
}
FULL_SWEEP = {
    "channels": (16, 32, 64, 128, 256),
    "sizes": ((17, 23), (45, 80), (90, 160), (180, 320), (360, 640)),
    "zeros": (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99),
    "layers": (1, 4),
}


def measure_sweep(rounds: int, full: bool) -> list[dict[str, Any]]:
    rows = []
    most = torch.get_num_threads()
    grid: dict[str, Any] = FULL_SWEEP if full else SWEEP
    cases = [
        (threads, layers if channels * height * width < 1.5e7 else 1, channels, (height, width), zeros)
        for threads in sorted({1, most})
        for channels in grid["channels"]
        for height, width in grid["sizes"]
        for layers in grid["layers"]
        for zeros in grid["zeros"]
    ]
    for threads, layers, channels, size, zeros in tqdm(list(dict.fromkeys(cases)), desc="sweep", disable=None):
        torch.set_num_threads(threads)
        row = measure_chain(chain(layers, channels, zeros), torch.rand(1, channels, *size), rounds)
        rows.append(
            {"threads": threads, "layers": layers, "channels": channels, "size": size, "zeros": zeros} | row,
        )
    torch.set_num_threads(most)
    return rows


ACT = """
import sys, torch
sys.path.insert(0, {here!r})
import inference
from pathlib import Path
model = inference.edsr(0.9, upsampler=True)
image = torch.rand(1, 3, *{size})
if {packed}:
    inference.iks_plugin.pack(model)
    with torch.inference_mode():
        model(image[:, :, :32])
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
def now():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = now()
with torch.inference_mode():
    output = model(image)
print(peak() - before - output.nbytes)
"""


def measure_memory(rounds: int) -> list[dict[str, Any]]:
    """Bytes by which a process grows while it upscales to 1920 x 1080, beyond the output."""
    rows: list[dict[str, Any]] = []
    for name, packed in (("dense PyTorch", False), ("packed", True)):
        code = ACT.format(here=str(Path(__file__).parent), size=LARGE, packed=packed)
        runs = [int(subprocess.check_output([sys.executable, "-c", code]).split()[-1]) for _ in range(rounds)]
        rows.append({"process": name, "bytes": statistics.median(runs)})
    for row in rows:
        row["of dense"] = row["bytes"] / rows[0]["bytes"]
    return rows


def print_networks(rows: list[dict[str, Any]], markdown: bool) -> None:
    cells = [
        (row["scope"], f"{row['zeros']:.0%}", row["engine"], f"{row['ms']:.0f}", f"{row['ratio']:.2f}",
         f"{row['error']:.0e}")
        for row in rows
    ]  # fmt: skip
    heads = ("zeros in", "zeros", "engine", "ms", "times iks-plugin's", "differs by")
    print(table(heads, cells, markdown), "\n")


def print_layers(rows: list[dict[str, Any]], markdown: bool) -> None:
    cells = [
        (row["layers"], f"{row['zeros']:.0%}", f"{row['dense ms']:.2f}", f"{row['packed ms']:.2f}",
         f"{row['ratio']:.2f}", row["path"], row["layout"])
        for row in rows
    ]  # fmt: skip
    heads = ("layers", "zeros", "dense ms a layer", "packed ms a layer", "times as fast", "runs as", "dense as")
    print(table(heads, cells, markdown), "\n")


def print_sweep(rows: list[dict[str, Any]], markdown: bool) -> None:
    slower = sum(row["ratio"] < 1 for row in rows)
    clearly = sum(row["ratio"] < 0.95 for row in rows)
    print(f"{len(rows)} cases; packed is slower in {slower}, by more than 5 % in {clearly}. Times as fast, by zeros:")
    cells: list[tuple[object, ...]] = []
    for zeros in dict.fromkeys(row["zeros"] for row in rows):
        ratios = sorted(row["ratio"] for row in rows if row["zeros"] == zeros)
        numbers = (ratios[0], statistics.median(ratios), ratios[-1])
        cells.append((f"{zeros:.0%}", len(ratios), *(f"{number:.2f}" for number in numbers)))
    print(table(("zeros", "cases", "least", "median", "most"), cells, markdown), "\n")
    print("where packed gains least:")
    cells = [
        (row["threads"], row["layers"], row["channels"], "x".join(map(str, row["size"])), f"{row['zeros']:.0%}",
         f"{row['dense ms']:.2f}", f"{row['packed ms']:.2f}", f"{row['ratio']:.2f}", row["path"], row["layout"])
        for row in sorted(rows, key=lambda row: row["ratio"])[:12]
    ]  # fmt: skip
    heads = ("threads", "layers", "channels", "size", "zeros", "dense ms", "packed ms", "times as fast", "runs as",
             "dense as")  # fmt: skip
    print(table(heads, cells, markdown), "\n")


def print_memory(rows: list[dict[str, Any]], markdown: bool) -> None:
    cells = [(row["process"], f"{row['bytes'] / 1e6:.0f}", f"{row['of dense']:.3f}") for row in rows]
    print(table(("process", "MB beyond the output", "of dense"), cells, markdown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("networks", "layers", "sweep", "memory")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for all (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    for engine in ENGINES:
        help = f"interpreter that has {engine} (default: this one, if it has; '' for none)"
        parser.add_argument(f"--{engine}", metavar="PYTHON", default=None, help=help)
    help = "compact files or checkpoints to measure as well"
    parser.add_argument("--trained", metavar="FILE", type=Path, nargs="+", default=[], help=help)
    help = "their class (default: the demo's EDSR)"
    parser.add_argument("--arch", metavar="ARCH", default="iks_plugin.demo.edsr:EDSR", help=help)
    parser.add_argument("--arch-args", metavar="KEY=VALUE", nargs="+", default=[], help="as for `iks bench`")
    parser.add_argument("--no-masks", action="store_true", help="measure the trained networks alone")
    parser.add_argument("--full", action="store_true", help="a sweep of 900 cases instead of 108, which takes hours")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--json", type=Path, help="write the figures here as well, after each part")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pythons = {}
    for engine in ENGINES:
        given: str | None = getattr(options, engine)
        if given is None:
            given = sys.executable if importlib.util.find_spec(engine) is not None else ""
        if given:
            pythons[engine] = given
        elif "networks" in options.only:
            print(f"{engine} is left out: name an interpreter that has it with --{engine}", file=sys.stderr)
    arguments = parsed_arguments(options.arch_args)
    trained = {
        f"trained: {path}": load_network(path, options.arch, arguments, packed=False)[0] for path in options.trained
    }
    figures: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    measure: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "networks": lambda: measure_networks(
            options.rounds, not options.no_compile, pythons, trained, not options.no_masks
        ),
        "layers": lambda: measure_layers(options.rounds),
        "sweep": lambda: measure_sweep(max(3, options.rounds // 2), options.full),
        "memory": lambda: measure_memory(3),
    }
    show = {"networks": print_networks, "layers": print_layers, "sweep": print_sweep, "memory": print_memory}
    for part in parts:
        if part in options.only:
            figures[part] = measure[part]()
            show[part](figures[part], options.markdown)
            sys.stdout.flush()
            if options.json:
                options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
