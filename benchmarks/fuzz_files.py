"""Damaged and hostile compact files, and what `iks_plugin.load` makes of them.

    python benchmarks/fuzz_files.py                          # 20,000 files: some minutes
    python benchmarks/fuzz_files.py --seed 3 --case 1234 --keep bad.iks    # one of them again, and its file

Half of the files are valid ones that were damaged anywhere. Of the others the index was rewritten to lie, with all the
checksums right. Each is loaded without a model, into one, and packed into one. What may come of it: an `IksError` that
names the file and leaves the model as it was, or the right tensors. Those of a damaged file are the undamaged ones;
those of a hostile one are what it describes, as a second and simpler reader here understands it. Anything else is a
violation: another exception, a crash, more than a few seconds, or memory that files of some kilobytes do not explain.

The files are made and loaded in a process of its own, which is watched from outside; Linux only.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import multiprocessing.connection
import re
import resource
import sys
import tempfile
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damage import damaged
from lies import close_container, hostile, open_container
from torch import Tensor, nn
from tqdm import tqdm

import iks_plugin
from iks_plugin.codec import decode_mask, decode_words

SLOWEST = 3.0
"""Seconds that loading a file may take."""
HANGS = 60.0
"""Seconds after which it is given up."""
GROWTH = 256 << 20
"""Bytes that the process may grow by while it loads one of them."""
ADDRESS_SPACE = 4 << 30
"""Bytes of address space beyond those at the start: more is a MemoryError, and so a violation."""

State = dict[str, Tensor]


class Toy(nn.Module):
    """A little of everything that entries are made of: zeros, statistics, whole numbers, tied and turned weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.transposed = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.last = nn.Conv2d(6, 16, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.linear.weight
        self.register_buffer("flags", torch.arange(40) % 3 == 0)
        self.register_buffer("empty", torch.zeros(0, 4))


@dataclass(frozen=True)
class Sample:
    """A valid file, the model that it is of, and what it holds."""

    name: str
    content: bytes
    model: nn.Module
    state: State


def make_samples(folder: Path) -> list[Sample]:
    """Small files with each type of values, with and without zeros."""
    samples = []
    for name, value_dtype, zeros, dtype in (
        ("float32", "float32", 0.8, torch.float32),
        ("float16", "float16", 0.9, torch.float32),
        ("int8", "int8", 0.7, torch.float32),
        ("all zeros", "float32", 1.0, torch.float32),
        ("plain", "float32", 0.0, torch.float32),
        ("bfloat16 model", "bfloat16", 0.8, torch.bfloat16),
    ):
        torch.manual_seed(0)
        model = Toy().to(dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data *= torch.rand_like(parameter) >= zeros
        path = folder / "sample.iks"
        iks_plugin.save(model, path, value_dtype)
        sample = Sample(name, path.read_bytes(), model, iks_plugin.load(path))
        header, document, data = open_container(sample.content)
        path.write_bytes(close_container(header, zlib.compress(json.dumps(document).encode()), bytes(data)))
        iks_plugin.load(path)  # rewritten without a lie it is still valid, so that hostile files fail by their lies
        samples.append(sample)
    return samples


def described(content: bytes) -> State:
    """What a hostile file describes, read without any check, for the case that `load` takes it."""
    _, document, data = open_container(content)
    state: State = {}
    start = 0
    for entry in document["entries"]:
        blobs = []
        for size in entry["sizes"]:
            blobs.append(bytes(data[start : start + size]))
            start += size
        if entry["kind"] == "alias":
            state[entry["name"]] = state[entry["alias_of"]]
            continue
        dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
        numel = int(np.prod(shape, dtype=object))
        if entry["kind"] == "plain":
            flat = _numbers(blobs[0], dtype, numel)
        else:
            mask = torch.from_numpy(decode_mask(blobs[0], numel, entry["nonzeros"]))
            values = _numbers(blobs[1], getattr(torch, entry["stored"]), entry["nonzeros"])
            if entry["stored"] == "int8":
                scales = _numbers(blobs[2], torch.float32, shape[entry["axis"]])
                channels = np.unravel_index(mask.nonzero().view(-1).numpy(), shape)[entry["axis"]]
                values = values.float() * scales[torch.from_numpy(channels)]
            flat = torch.zeros(numel, dtype=dtype)
            flat[mask] = values.to(dtype)
        state[entry["name"]] = flat.view(shape)
    return state


def _numbers(blob: bytes, dtype: torch.dtype, size: int) -> Tensor:
    parts = 2 if dtype.is_complex else 1
    words = decode_words(blob, np.dtype(f"u{dtype.itemsize // parts}"), size * parts)
    return torch.from_numpy(words.view(np.uint8)).view(dtype)


def violations(sample: Sample, content: bytes, path: Path, is_hostile: bool) -> list[str]:
    """What is wrong with how `load` takes `content`, in sentences; `path` is where to write it."""
    path.write_bytes(content)
    found: list[str] = []
    for form in ("no model", "model", "packed"):
        model = None if form == "no model" else copy.deepcopy(sample.model)
        before = None if model is None else {name: tensor.clone() for name, tensor in model.state_dict().items()}
        began = time.perf_counter()
        try:
            result = iks_plugin.load(path) if model is None else iks_plugin.load(path, model, packed=form == "packed")
        except iks_plugin.IksError as error:
            if str(path) not in str(error):
                found.append(f"{form}: the message does not name the file: {str(error)[:200]}")
            if model is not None and before is not None and (fault := _differs(model.state_dict(), before)):
                found.append(f"{form}: refused, but the model has changed: {fault}")
            continue
        except Exception as error:
            found.append(f"{form}: {type(error).__name__}: {str(error)[:300]} ({_origin(error)})")
            continue
        finally:
            if (taken := time.perf_counter() - began) > SLOWEST:
                found.append(f"{form}: takes {taken:.1f} s")
        try:
            right = described(content) if is_hostile else sample.state
            state = result if isinstance(result, dict) else result.state_dict()
            if before is not None:  # a model's tensors keep their own types
                right = {name: tensor.to(before[name].dtype) for name, tensor in right.items()}
            if fault := _differs(state, right):
                found.append(f"{form}: a wrong result: {fault}")
        except Exception as error:
            found.append(f"{form}: loads, though it cannot be read: {type(error).__name__}: {str(error)[:300]}")
    return found


def _differs(state: State, right: State) -> str:
    if state.keys() != right.keys():
        return f"names {sorted(state.keys() ^ right.keys())[:3]}"
    for name, tensor in state.items():
        other = right[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            return f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {other.dtype} {tuple(other.shape)}"
        bits, other_bits = (one.contiguous().view(-1).view(torch.uint8) for one in (tensor, other))
        # The bits of a NaN do not survive every conversion between types.
        if not torch.equal(bits, other_bits) and not torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True):
            return f"values of {name}"
    return ""


def _origin(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"


def make_case(samples: list[Sample], seed: int, case: int) -> tuple[Sample, bytes, bool]:
    """The file number `case` of a seed, the sample that it was made of, and whether it is a hostile one."""
    sample, is_hostile = samples[case // 2 % len(samples)], bool(case % 2)
    return sample, (hostile if is_hostile else damaged)(sample.content, f"{seed} {case}"), is_hostile


def memory(what: str) -> int:
    """Bytes of this process: "VmSize", "VmRSS", or "VmHWM", the peak of the latter."""
    return int(re.findall(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def serve(pipe: multiprocessing.connection.Connection, current: Any, seed: int, cases: range) -> None:
    """In a process of its own: go through `cases`, tell (case, violation) for each, and then the most bytes taken."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mutant.iks")
        samples = make_samples(Path(folder))
        for sample in samples:
            for fault in violations(sample, sample.content, path, is_hostile=True):
                pipe.send((-1, f"the valid file {sample.name!r}: {fault}"))
        most = 0
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ADDRESS_SPACE, resource.RLIM_INFINITY))
        for case in cases:
            current.value = case
            sample, content, is_hostile = make_case(samples, seed, case)
            forget_peak()  # what it took to make the file does not count
            before = memory("VmRSS")
            for fault in violations(sample, content, path, is_hostile):
                pipe.send((case, f"{sample.name}, {'hostile' if is_hostile else 'damaged'}: {fault}"))
            grown = memory("VmHWM") - before
            if grown > GROWTH:
                pipe.send((case, f"{sample.name}: a file of {len(content):,} bytes takes {grown / 1e6:.0f} MB"))
            most = max(most, grown)
        pipe.send((None, most))


def fuzz(seed: int, cases: range) -> tuple[list[tuple[int, str]], int]:
    """The violations among `cases`, and the most bytes that one took; a new process follows each that dies."""
    context = multiprocessing.get_context("spawn")
    found: list[tuple[int, str]] = []
    growth = 0
    with tqdm(total=len(cases), desc=f"seed {seed}", unit="file", disable=None) as bar:
        while cases:
            current = context.Value("q", cases.start, lock=False)
            pipe, theirs = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(theirs, current, seed, cases), daemon=True)
            process.start()
            theirs.close()
            last, since, ended = -1, time.monotonic(), False
            while not ended:
                try:
                    while pipe.poll(0.2):
                        case, fault = pipe.recv()
                        if case is None:
                            growth, cases, ended = max(growth, fault), range(0), True
                        else:
                            found.append((case, fault))
                except EOFError:
                    found.append((current.value, f"the process dies (exit code {_exit_code(process)})"))
                    cases, ended = range(current.value + 1, cases.stop), True
                if current.value != last:
                    last, since = current.value, time.monotonic()
                elif time.monotonic() - since > HANGS and not ended:
                    found.append((last, f"takes more than {HANGS:.0f} s"))
                    process.kill()
                    cases, ended = range(last + 1, cases.stop), True
                bar.update(max(0, last - bar.n))
            process.join()
        bar.update(bar.total - bar.n)
    return found, growth


def _exit_code(process: Any) -> int | None:
    process.join()
    code: int | None = process.exitcode
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000, help="how many, over all seeds (default: %(default)s)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3], help="(default: %(default)s)")
    parser.add_argument("--case", type=int, help="try this one of the first seed alone")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where to write the file of --case")
    parser.add_argument("--json", type=Path, help="write the violations here as well")
    options = parser.parse_args()
    if options.case is not None and options.keep:
        with tempfile.TemporaryDirectory() as folder:
            options.keep.write_bytes(make_case(make_samples(Path(folder)), options.seed[0], options.case)[1])
    found: list[tuple[int, int, str]] = []
    growth = 0
    tried = 0
    for number, seed in enumerate(options.seed):
        share = options.files // len(options.seed) + (number < options.files % len(options.seed))
        cases = range(share) if options.case is None else range(options.case, options.case + 1)
        faults, grown = fuzz(seed, cases)
        found += [(seed, case, fault) for case, fault in faults]
        growth, tried = max(growth, grown), tried + len(cases)
        if options.case is not None:
            break
    for seed, case, fault in found:
        print(f"--seed {seed} --case {case}: {fault}")
    print(f"{tried:,} files: {len(found)} violations; the most memory for one: {growth / 1e6:.0f} MB")
    if options.json:
        options.json.write_text(json.dumps({"files": tried, "violations": found, "growth": growth}, indent=2) + "\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
