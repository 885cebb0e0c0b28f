"""What a rewritten network costs in training: time and memory per step, beside the same network left dense.

    python benchmarks/training_cost.py                       # a CPU, two threads
    python benchmarks/training_cost.py --device cuda         # a GPU: float32, bfloat16 autocast, and torch.compile

EDSR with 16 residual blocks of 64 channels (x2), batches of 16 crops of 48 x 48, Adam. The dense and the rewritten
network each live in a process of their own and take their steps in turn, so that a busy machine slows both alike, and
neither meets the memory that the other has left behind. The figure is the median of the ratios of neighbouring steps.
The law acts 25 times in a training of any length, and measures in the 12 steps before each time: what that takes in all
is measured by itself, over a short ramp.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import iks_plugin
from iks_plugin.demo.edsr import EDSR
from iks_plugin.laws import MEASURED_STEPS, SURGEON_ACTIONS

KINDS = ("dense", "rewritten")
ACTIONS, PAUSE = 3, MEASURED_STEPS + 8
"""Of the short ramp: how often the law acts, and the steps from one time to the next."""
CROP, SCALE = 48, 2


def make_step(kind: str, device: str, bfloat16: bool, compiled: bool, batch: int) -> Callable[[], None]:
    """One training step of a new network as a function."""
    torch.manual_seed(0)
    model: nn.Module = EDSR(scale=SCALE, blocks=16, channels=64)
    if kind == "rewritten":
        iks_plugin.sparsify(model, 0.9, total_steps=100_000)
    elif kind == "acting":
        iks_plugin.sparsify(model, 0.9, ramp_steps=ACTIONS * PAUSE, interval=PAUSE)
    model.to(device)
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


def serve(pipe: Connection, kind: str, threads: int, device: str, *form: Any) -> None:
    """In a process of its own: take a step and tell its seconds for every message; at the last, tell peak MiB."""
    torch.set_num_threads(threads)
    step = make_step(kind, device, *form)
    while pipe.recv():
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_mib(device))


def cost_of_the_law(device: str, batch: int, threads: int) -> dict[str, float]:
    """Seconds that measuring and acting take in a whole training, beyond the steps themselves."""
    torch.set_num_threads(threads)
    step = make_step("acting", device, False, False, batch)
    plain, more = [], []
    for number in tqdm(range(ACTIONS * PAUSE), desc="the law", disable=None):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        measures = number % PAUSE >= PAUSE - MEASURED_STEPS
        (more if measures else plain).append(time.perf_counter() - start)
    usual = statistics.median(plain)
    return {"seconds": (sum(more) - len(more) * usual) * SURGEON_ACTIONS / ACTIONS, "seconds_of_a_step": usual}


def peak_mib(device: str) -> float:
    """Of the GPU's allocator, or resident on a CPU (Linux; NaN elsewhere)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 2**10 if found else float("nan")


def compare(steps: int, threads: int, device: str, bfloat16: bool, compiled: bool, batch: int) -> dict[str, Any]:
    """Times of dense and rewritten steps taken in turn, and the peak memory of each process."""
    context = torch.multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for kind in KINDS:
        pipes[kind], theirs = context.Pipe()
        arguments = (theirs, kind, threads, device, bfloat16, compiled, batch)
        context.Process(target=serve, args=arguments, daemon=True).start()

    def seconds(kind: str) -> float:
        pipes[kind].send(True)
        taken: float = pipes[kind].recv()
        return taken

    for kind in KINDS:
        for _ in range(2 if device == "cpu" else 20):
            seconds(kind)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for index in tqdm(range(steps), desc=f"{device}, bfloat16={bfloat16}, compiled={compiled}", disable=None):
        for kind in KINDS if index % 2 else KINDS[::-1]:
            times[kind].append(seconds(kind))
    for pipe in pipes.values():
        pipe.send(False)
    ratios = [rewritten / dense for dense, rewritten in zip(times["dense"], times["rewritten"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "bfloat16": bfloat16,
        "compiled": compiled,
        "steps": steps,
        "milliseconds": {kind: 1e3 * statistics.median(times[kind]) for kind in KINDS},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [low, high],
        "peak_mib": {kind: pipes[kind].recv() for kind in KINDS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, help="steps of each network (default: 30 on a CPU, 300 on a GPU)")
    parser.add_argument("--batch", type=int, default=16, help="crops per step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each process (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    steps = options.steps or (300 if on_gpu else 30)
    forms = [(False, False), (True, False), (False, True), (True, True)] if on_gpu else [(False, False)]
    rows = [compare(steps, options.threads, options.device, *form, options.batch) for form in forms]
    machine = torch.cuda.get_device_name() if on_gpu else f"{options.threads} CPU threads ({platform.machine()})"
    print(f"EDSR 16 x 64 x2, batch {options.batch} of {CROP} x {CROP}, torch {torch.__version__}, {machine}")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"bfloat16={row['bfloat16']!s:5} compiled={row['compiled']!s:5}  "
            f"ms per step: dense {row['milliseconds']['dense']:.1f}, rewritten {row['milliseconds']['rewritten']:.1f}; "
            f"ratio {row['ratio']:.3f} (quartiles {low:.3f} to {high:.3f}); "
            f"peak MiB: dense {row['peak_mib']['dense']:.0f}, rewritten {row['peak_mib']['rewritten']:.0f}"
        )
    law = cost_of_the_law(options.device, options.batch, options.threads)
    steps_worth = law["seconds"] / law["seconds_of_a_step"]
    print(f"the law in a whole training: {law['seconds']:.1f} s, as much as {steps_worth:.0f} steps")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows, "law": law}, indent=2) + "\n")


if __name__ == "__main__":
    main()
