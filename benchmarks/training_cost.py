"""What a rewritten network costs in training: time and memory per step, beside the same network left dense.

    python benchmarks/training_cost.py                       # a CPU, two threads
    python benchmarks/training_cost.py --device cuda         # a GPU: float32, bfloat16 autocast, and torch.compile

EDSR with 16 residual blocks of 64 channels (x2), batches of 16 crops of 48 x 48, Adam, one process. The dense and the
rewritten network take their steps in turn, so that a busy machine slows both alike; the figure is the median of the
ratios of neighbouring steps. The law acts in every tenth step, which a median does not see: the ratio of the sums does.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import iks_plugin
from iks_plugin.demo.edsr import EDSR

BATCH, CROP, SCALE = 16, 48, 2


def network() -> nn.Module:
    torch.manual_seed(0)
    return EDSR(scale=SCALE, blocks=16, channels=64)


def trainer(model: nn.Module, device: str, bfloat16: bool, compiled: bool, batch: int) -> Callable[[], None]:
    """One training step of `model` as a function."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    small = torch.rand(batch, 3, CROP, CROP, device=device)
    large = torch.rand(batch, 3, SCALE * CROP, SCALE * CROP, device=device)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bfloat16):
            loss = F.l1_loss(forward(small).float(), large)
        loss.backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    """Wall time of one step, with the device's work done."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def build(kind: str, device: str) -> nn.Module:
    model = network()
    if kind == "rewritten":
        iks_plugin.sparsify(model, 0.9)
    return model.to(device)


def compare(device: str, steps: int, bfloat16: bool, compiled: bool, batch: int) -> dict[str, object]:
    """Times of dense and rewritten steps taken in turn."""
    kinds = ("dense", "rewritten")
    trainers = {kind: trainer(build(kind, device), device, bfloat16, compiled, batch) for kind in kinds}
    for step in trainers.values():
        for _ in range(2 if device == "cpu" else 20):
            seconds(step, device)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in tqdm(range(steps), desc=f"{device}, bfloat16={bfloat16}, compiled={compiled}", disable=None):
        for kind in kinds if index % 2 else kinds[::-1]:
            times[kind].append(seconds(trainers[kind], device))
    ratios = [rewritten / dense for dense, rewritten in zip(times["dense"], times["rewritten"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "device": device_name(device),
        "bfloat16": bfloat16,
        "compiled": compiled,
        "batch": batch,
        "steps": steps,
        "dense_ms": 1e3 * statistics.median(times["dense"]),
        "rewritten_ms": 1e3 * statistics.median(times["rewritten"]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "ratio_of_sums": sum(times["rewritten"]) / sum(times["dense"]),
    }


def peak_memory(kind: str, device: str, batch: int) -> float:
    """Peak MiB of a process that trains three steps: of the GPU's allocator, or resident on a CPU."""
    step = trainer(build(kind, device), device, False, False, batch)
    for _ in range(3):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def peak_memory_of_a_fresh_process(kind: str, device: str, batch: int, threads: int) -> float:
    command = [sys.executable, __file__, "--device", device, "--batch", str(batch), "--threads", str(threads)]
    done = subprocess.run([*command, "--memory-of", kind], capture_output=True, text=True, check=True)
    return float(done.stdout)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, help="steps of each network (default: 30 on a CPU, 300 on a GPU)")
    parser.add_argument("--batch", type=int, default=BATCH, help="crops per step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--memory-of", choices=("dense", "rewritten"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_memory(options.memory_of, options.device, options.batch))
        return
    steps = options.steps or (30 if options.device == "cpu" else 300)
    forms = (
        [(False, False)] if options.device == "cpu" else [(False, False), (True, False), (False, True), (True, True)]
    )
    memory = {  # first: a child's peak resident size starts at what its parent holds
        kind: peak_memory_of_a_fresh_process(kind, options.device, options.batch, options.threads)
        for kind in ("dense", "rewritten")
    }
    rows = [compare(options.device, steps, *form, options.batch) for form in forms]
    print(f"EDSR 16 x 64 x2, batch {options.batch} of {CROP} x {CROP}, torch {torch.__version__}, {rows[0]['device']}")
    for row in rows:
        low, high = row["ratio_quartiles"]  # type: ignore[misc]
        print(
            f"bfloat16={row['bfloat16']!s:5} compiled={row['compiled']!s:5} "
            f"dense {row['dense_ms']:8.1f} ms  rewritten {row['rewritten_ms']:8.1f} ms  "
            f"ratio {row['ratio']:.3f} (quartiles {low:.3f} to {high:.3f}), of the sums {row['ratio_of_sums']:.3f}"
        )
    print(f"peak memory: dense {memory['dense']:.0f} MiB, rewritten {memory['rewritten']:.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "peak_memory_mib": memory}, indent=2) + "\n")


if __name__ == "__main__":
    main()
