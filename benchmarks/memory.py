"""What packed weights save: resident memory, the peak of a whole process, and what that costs in time.

    python benchmarks/memory.py            # both EDSRs at 90 % zeros: some minutes
    python benchmarks/memory.py --quick    # the small one alone

Resident memory is the bytes of all parameters and buffers of a model. The peak is the largest resident set (VmHWM) of a
fresh process that builds EDSR on the device "meta", loads weights and enlarges one image, read from outside before the
process ends (Linux only). Its dense counterpart never imports the plug-in and loads its weights as torch does best:
`torch.load(mmap=True)` into `load_state_dict(assign=True)`. Kinds of processes take turns; medians count.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from edsr import EDSR, SIZES, laplace_state, masks_for, table
from torch import Tensor, nn
from tqdm import tqdm

VALUE_DTYPES = ("float32", "float16", "bfloat16", "int8")
RESIDENT_TARGETS = {"float32": 0.20, "float16": 0.10}
"""Of dense float32 weights, at 90 % zeros."""
SAVED_TARGET = 0.80
"""Share of the dense weights' size by which the peak is to be lower."""
IMAGES = {"48x48": (48, 48), "320x180": (180, 320)}

KINDS = {
    "torch alone": ("none", None),
    "dense, torch.load": ("dense", "dense.pth"),
    "dense, from a compact file": ("loaded", "float32.iks"),
    "packed, float32 values": ("packed", "float32.iks"),
    "packed, float16 values": ("packed", "float16.iks"),
    "packed, float32 values, Numba": ("streamed", "float32.iks"),
}
"""What processes there are: how they load, and which file. The first imports torch and enlarges nothing."""


def build(size: str, how: str, file: Path) -> nn.Module:
    with torch.device("meta"):
        model = EDSR(*SIZES[size])
    if how == "dense":
        model.load_state_dict(torch.load(file, mmap=True, weights_only=True), assign=True)
    else:
        import iks_plugin
        import iks_plugin.fast

        iks_plugin.load(file, model, packed=how in ("packed", "streamed"))
        if how == "packed":  # as without Numba, which takes memory itself
            iks_plugin.fast.slow_down(model)
    return model.eval()


@torch.inference_mode()
def enlarge(model: nn.Module, image: str) -> Tensor:
    result: Tensor = model(torch.rand(1, 3, *IMAGES[image], generator=torch.Generator().manual_seed(0)))
    return result


def write_files(folder: Path, size: str, zeros: float) -> int:
    """The same weights in every form; returns the bytes that they take in memory."""
    import iks_plugin

    state = laplace_state(SIZES[size], masks_for(SIZES[size], zeros, evenly=True))
    torch.save(state, folder / "dense.pth")
    for value_dtype in VALUE_DTYPES:
        iks_plugin.save(state, folder / f"{value_dtype}.iks", value_dtype)
    return sum(tensor.nbytes for tensor in state.values())


def measure_resident(folder: Path, size: str, dense: int) -> list[dict[str, Any]]:
    rows = []
    for value_dtype in VALUE_DTYPES:
        model = build(size, "packed", folder / f"{value_dtype}.iks")
        resident = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        target = RESIDENT_TARGETS.get(value_dtype)
        row = {"network": f"EDSR {size}", "value_dtype": value_dtype, "bytes": resident, "of_dense": resident / dense}
        rows.append({**row, "target": target, "passed": target is None or resident <= target * dense})
    return rows


def peak_of_process(size: str, how: str, file: Path, image: str) -> int:
    """Bytes at the peak of a process that loads and enlarges."""
    command = [sys.executable, __file__, "--process", size, how, str(file), image]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "done\n":
        process.communicate()
        sys.exit(f"the process failed: {' '.join(command)}")
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    process.communicate()  # closes its stdin, for which it waits
    assert peak is not None
    return int(peak[1]) * 1024


def act_as_process(size: str, how: str, file: str, image: str) -> None:
    if how != "none":
        enlarge(build(size, how, Path(file)), image)
    print("done", flush=True)
    sys.stdin.read()


def measure_peaks(folder: Path, size: str, dense: int, rounds: dict[str, int]) -> list[dict[str, Any]]:
    rows = []
    with tqdm(total=sum(rounds.values()) * len(KINDS), desc=f"peaks, {size}", disable=None) as bar:
        for image in IMAGES:
            peaks: dict[str, list[int]] = {kind: [] for kind in KINDS}
            for _ in range(rounds[image]):
                for kind, (how, file) in KINDS.items():
                    peaks[kind].append(peak_of_process(size, how, folder / (file or ""), image))
                    bar.update()
            plain = statistics.median(peaks["dense, torch.load"])
            for kind, measured in peaks.items():
                saved = (plain - statistics.median(measured)) / dense
                row = {"network": f"EDSR {size}", "image": image, "kind": kind, "peaks": measured, "saved": saved}
                rows.append({**row, **({"passed": saved >= SAVED_TARGET} if judged(size, kind) else {})})
    return rows


def judged(size: str, kind: str) -> bool:
    """Whether the target holds: not for small networks and with Numba, whose own memory drowns the difference."""
    return size == "32x256" and kind.startswith("packed") and "Numba" not in kind


def measure_times(folder: Path, size: str, rounds: dict[str, int]) -> list[dict[str, Any]]:
    """Seconds of inference, dense and packed in turn."""
    models = {kind: build(size, how, folder / file) for kind, (how, file) in KINDS.items() if file}
    del models["dense, from a compact file"]
    rows = []
    with tqdm(total=(sum(rounds.values()) + 1) * len(models), desc=f"times, {size}", disable=None) as bar:
        for image in IMAGES:
            times: dict[str, list[float]] = {kind: [] for kind in models}
            for number in range(rounds[image] + (image == "48x48")):  # and one to warm up
                for kind, model in models.items():
                    start = time.perf_counter()
                    enlarge(model, image)
                    times[kind].append(time.perf_counter() - start)
                    bar.update()
                if number == 0 and image == "48x48":
                    times = {kind: [] for kind in models}
            dense = times["dense, torch.load"]
            for kind, measured in times.items():
                ratio = statistics.median(own / plain for own, plain in zip(measured, dense, strict=True))
                row = {"network": f"EDSR {size}", "image": image, "kind": kind}
                rows.append({**row, "seconds": statistics.median(measured), "ratio": ratio})
    return rows


def resident_table(rows: list[dict[str, Any]], markdown: bool) -> str:
    cells = [
        (
            row["network"],
            row["value_dtype"],
            f"{row['bytes']:,}",
            f"{row['of_dense']:.4f}",
            f"{row['target']:.2f}" if row["target"] else "-",
            verdict(row),
        )
        for row in rows
    ]
    return table(("network", "values", "bytes", "of dense", "target", ""), cells, markdown)


def peak_table(rows: list[dict[str, Any]], markdown: bool) -> str:
    cells = [
        (
            row["network"],
            row["image"],
            row["kind"],
            f"{statistics.median(row['peaks']) / 1e6:.1f}",
            f"{min(row['peaks']) / 1e6:.1f} to {max(row['peaks']) / 1e6:.1f}",
            f"{row['saved']:.1%}" if "passed" in row else "-",
            verdict(row),
        )
        for row in rows
    ]
    return table(("network", "image", "process", "peak in MB", "range", "saved of weights", ""), cells, markdown)


def time_table(rows: list[dict[str, Any]], markdown: bool) -> str:
    cells = [
        (row["network"], row["image"], row["kind"], f"{1e3 * row['seconds']:.1f}", f"{row['ratio']:.3f}")
        for row in rows
    ]
    return table(("network", "image", "weights", "ms", "of dense"), cells, markdown)


def verdict(row: dict[str, Any]) -> str:
    return {True: "pass", False: "FAIL", None: ""}[row.get("passed")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="EDSR 16x64 alone")
    parser.add_argument("--zeros", type=float, default=0.9, help="share of zeros (the targets are for %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="for the image of 48 x 48; the median counts (%(default)s)"
    )
    parser.add_argument("--large-rounds", type=int, default=1, help="for the image of 320 x 180 (%(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--process", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        act_as_process(*options.process)
        return
    rounds = {"48x48": options.rounds, "320x180": options.large_rounds}
    resident: list[dict[str, Any]] = []
    peaks: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    for size in ["16x64"] if options.quick else SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            dense = write_files(folder, size, options.zeros)
            resident += measure_resident(folder, size, dense)
            peaks += measure_peaks(folder, size, dense, rounds)
            times += measure_times(folder, size, rounds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.zeros:.0%} zeros")

    def tell(title: str, rows: list[dict[str, Any]], show: Callable[..., str]) -> None:
        print(f"\n{title}\n\n{show(rows, options.markdown)}", flush=True)

    tell("Resident weight memory, packed", resident, resident_table)
    tell(f"Peak of a process that loads and enlarges (target: saves {SAVED_TARGET:.0%})", peaks, peak_table)
    tell("Inference", times, time_table)
    if options.json:
        options.json.write_text(json.dumps({"resident": resident, "peaks": peaks, "times": times}, indent=2) + "\n")


if __name__ == "__main__":
    main()
