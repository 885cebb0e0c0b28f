"""How fast packed networks run on a CPU, against PyTorch and other engines on the same network.

    python benchmarks/inference.py                     # EDSR 16 x 64 x2 on an image of 320 x 180: some minutes
    python benchmarks/inference.py --only layers sweep memory

- networks: EDSR with 90 % zeros in its body alone, and in the upsampler too, against PyTorch in both layouts of memory,
  with and without torch.compile, and against ONNX Runtime, OpenVINO and DeepSparse where they are installed.
- layers: 64 -> 64 convolutions with 3 x 3 kernels at 192 x 320, alone, and each of a chain of 16 with ReLU.
- sweep: chains of four convolutions at many sparsities, widths, sizes and threads: packed is never to be slower.
- memory: the peak of a whole process that upscales to 1920 x 1080 (Linux only).

All that are compared run in turn in one process; medians count, and ratios more than times.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edsr import EDSR, SIZES, table
from torch import Tensor, nn
from tqdm import tqdm

import iks_plugin
from iks_plugin import fast

SIZE = "16x64"
IMAGE = (180, 320)
LARGE = (540, 960)


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


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median of the seconds that each takes; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def torch_ways(model: nn.Module, image: Tensor, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    image_last = image.to(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], Tensor]] = {
        "PyTorch, NCHW": lambda: model(image),
        "PyTorch, channels_last": lambda: last(image_last),
    }
    if compiled:
        fused, fused_last = torch.compile(model), torch.compile(last)
        ways["PyTorch compiled, NCHW"] = lambda: fused(image)
        ways["PyTorch compiled, channels_last"] = lambda: fused_last(image_last)
    return ways


def engine_ways(model: nn.Module, image: Tensor, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Other engines, each if it is installed."""
    path, numbers = str(folder / "network.onnx"), image.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (image,), path, input_names=["image"], opset_version=11, dynamo=False)
    threads = torch.get_num_threads()
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        yield f"ONNX Runtime {onnxruntime.__version__}", lambda: session.run(None, {"image": numbers})
    except ImportError:
        print("ONNX Runtime is not installed", file=sys.stderr)
    try:
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        network = core.compile_model(path, "CPU", settings)
        yield f"OpenVINO {openvino.__version__.split('-')[0]}", lambda: network([numbers])
    except ImportError:
        print("OpenVINO is not installed", file=sys.stderr)
    try:
        import deepsparse

        engine = deepsparse.compile_model(path, batch_size=1, num_cores=threads)
        yield f"DeepSparse {deepsparse.__version__}", lambda: engine([np.ascontiguousarray(numbers)])
    except ImportError:
        print("DeepSparse is not installed", file=sys.stderr)


@torch.no_grad()
def measure_networks(rounds: int, compiled: bool) -> list[dict[str, Any]]:
    rows = []
    for scope, upsampler in (("body", False), ("body and upsampler", True)):
        for zeros in (0.8, 0.9, 0.95):
            model, image = edsr(zeros, upsampler), torch.rand(1, 3, *IMAGE)
            packed = iks_plugin.pack(copy.deepcopy(model))
            expected = model(image)
            error = float((packed(image) - expected).abs().max() / expected.abs().max())
            ways: dict[str, Callable[[], Any]] = {"iks-plugin": lambda packed=packed, image=image: packed(image)}
            ways |= torch_ways(model, image, compiled and zeros == 0.9)
            with tempfile.TemporaryDirectory() as folder:
                if zeros == 0.9:
                    ways |= dict(engine_ways(model, image, Path(folder)))
                seconds = in_turn(ways, rounds)
            for name, value in seconds.items():
                ratio = value / seconds["iks-plugin"]
                rows.append({"scope": scope, "zeros": zeros, "engine": name, "ms": 1000 * value, "ratio": ratio})
            rows[-len(seconds)]["error"] = error
    return rows


@torch.no_grad()
def measure_layers(rounds: int) -> list[dict[str, Any]]:
    rows = []
    image = torch.rand(1, 64, 192, 320)
    for count in (1, 16):
        for zeros in (0.5, 0.6, 0.8, 0.9, 0.95):
            layers = [layer for _ in range(count) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
            model = prune(nn.Sequential(*layers), zeros, ("",))
            packed = iks_plugin.pack(copy.deepcopy(model))
            ways: dict[str, Callable[[], Any]] = {"packed": lambda packed=packed: packed(image)}
            ways |= torch_ways(model, image, compiled=False)
            seconds = in_turn(ways, rounds)
            dense = min(value for name, value in seconds.items() if name != "packed")
            path = set(fast.paths(packed).values())
            rows.append(
                {
                    "layers": count,
                    "zeros": zeros,
                    "dense ms": 1000 * dense / count,
                    "packed ms": 1000 * seconds["packed"] / count,
                    "ratio": dense / seconds["packed"],
                    "path": "/".join(sorted(path)),
                }
            )
    return rows


@torch.no_grad()
def measure_sweep(rounds: int) -> list[dict[str, Any]]:
    rows = []
    cases = [
        (threads, channels, size, zeros)
        for threads in (1, torch.get_num_threads())
        for channels in (16, 64, 256)
        for size in ((17, 23), (90, 160), (360, 640))
        for zeros in (0.1, 0.5, 0.7, 0.9, 0.99)
        if channels * size[0] * size[1] < 1.5e7
    ]
    most = torch.get_num_threads()
    for threads, channels, size, zeros in tqdm(cases, desc="sweep", disable=None):
        torch.set_num_threads(threads)
        layers = [layer for _ in range(4) for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
        model, image = prune(nn.Sequential(*layers), zeros, ("",)), torch.rand(1, channels, *size)
        packed = iks_plugin.pack(copy.deepcopy(model))
        seconds = in_turn({"packed": lambda: packed(image), **torch_ways(model, image, compiled=False)}, rounds)  # noqa: B023
        dense = min(value for name, value in seconds.items() if name != "packed")
        ratio = dense / seconds["packed"]
        rows.append({"threads": threads, "channels": channels, "size": size, "zeros": zeros, "ratio": ratio})
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
    rows = []
    for name, packed in (("dense PyTorch", False), ("packed", True)):
        code = ACT.format(here=str(Path(__file__).parent), size=LARGE, packed=packed)
        runs = [int(subprocess.check_output([sys.executable, "-c", code]).split()[-1]) for _ in range(rounds)]
        rows.append({"process": name, "bytes": statistics.median(runs)})
    for row in rows:
        row["of dense"] = row["bytes"] / rows[0]["bytes"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("networks", "layers", "sweep", "memory")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    if "networks" in options.only:
        rows = figures["networks"] = measure_networks(options.rounds, not options.no_compile)
        cells = [
            (row["scope"], f"{row['zeros']:.0%}", row["engine"], f"{row['ms']:.0f}", f"{row['ratio']:.2f}")
            for row in rows
        ]
        print(table(("zeros in", "zeros", "engine", "ms", "times iks-plugin's"), cells, options.markdown), "\n")
        print("largest difference, of the largest output:", f"{max(row.get('error', 0) for row in rows):.0e}\n")
    if "layers" in options.only:
        rows = figures["layers"] = measure_layers(options.rounds)
        cells = [
            (row["layers"], f"{row['zeros']:.0%}", f"{row['dense ms']:.2f}", f"{row['packed ms']:.2f}",
             f"{row['ratio']:.2f}", row["path"])
            for row in rows
        ]  # fmt: skip
        heads = ("layers", "zeros", "dense ms a layer", "packed ms a layer", "times as fast", "runs as")
        print(table(heads, cells, options.markdown), "\n")
    if "sweep" in options.only:
        rows = figures["sweep"] = measure_sweep(max(3, options.rounds // 2))
        worst = sorted(rows, key=lambda row: row["ratio"])[:8]
        print(f"{len(rows)} cases; the eight in which packed gains least:")
        cells = [
            (row["threads"], row["channels"], "x".join(map(str, row["size"])), f"{row['zeros']:.0%}",
             f"{row['ratio']:.2f}")
            for row in worst
        ]  # fmt: skip
        print(table(("threads", "channels", "size", "zeros", "times as fast"), cells, options.markdown), "\n")
    if "memory" in options.only:
        rows = figures["memory"] = measure_memory(3)
        cells = [(row["process"], f"{row['bytes'] / 1e6:.0f}", f"{row['of dense']:.3f}") for row in rows]
        print(table(("process", "MB beyond the output", "of dense"), cells, options.markdown))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
