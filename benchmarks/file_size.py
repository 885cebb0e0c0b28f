"""How small compact files are: beside what information theory asks for, beside other formats, and how fast.

    python benchmarks/file_size.py                              # both EDSRs, all sparsities: some minutes
    python benchmarks/file_size.py --quick                      # the small one alone
    python benchmarks/file_size.py --trained iks-demo/sparse.pth --quality iks-demo    # after `iks demo`

EDSR x2 with zeros in the body and the upsampler, spread over the layers evenly or not. B, the measure of size, is the
sum over sparse weights of (n * H(density) + non-zeros * bits of a value) / 8, plus the bytes of everything else: what a
format takes that codes masks perfectly and values not at all. (int8 values have scales beside them: 16 bits for each
output channel.) Values are either random bits, which nothing can make smaller, or drawn from a Laplace distribution,
as trained weights are, or of a trained network. Every file is read back and compared to the bit.

Beside it, the same weights in other formats. `zstandard` and `compressed-tensors` (0.12 or older: later ones have no
sparse formats) are optional; what is not installed is left out with a note.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from edsr import SIZES, laplace_state, masks_for, shapes_of, table
from torch import Tensor
from tqdm import tqdm

import iks_plugin
import iks_plugin.demo.edsr
from iks_plugin.demo.photos import load_photos
from iks_plugin.demo.quality import enlarge, psnr_y
from iks_plugin.quantize import to_int8

State = dict[str, Tensor]

ZEROS = (0.5, 0.8, 0.9, 0.95, 0.99)
BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8}
SCALE_BITS = 16
"""Scales of int8 values are rounded to bfloat16."""
OVERHEAD, ROOM = 1.005, 8 << 10
TRAINED_TARGETS = {"float32": 0.92, "float16": 0.93}
"""Files of trained weights take at most so much of B; those of random bits, and all others, OVERHEAD * B + ROOM."""
SPEED_TARGET, SPEED_ZEROS = 100, (0.5, 0.9, 0.99)
PSNR_TARGET = 0.02


def is_sparse(tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and bool((tensor == 0).any())


def bound(state: State, value_dtype: str) -> float:
    """B in bytes."""
    total = 0.0
    for tensor in state.values():
        if is_sparse(tensor):
            n, nonzeros = tensor.numel(), int(torch.count_nonzero(tensor))
            shares = [share for share in (nonzeros / n, 1 - nonzeros / n) if share]
            entropy = -sum(share * math.log2(share) for share in shares)
            scales = SCALE_BITS * len(tensor) if value_dtype == "int8" else 0
            total += (n * entropy + nonzeros * BITS[value_dtype] + scales) / 8
        else:
            total += tensor.nbytes
    return total


def dense_bytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def random_bits(shape: torch.Size, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Floats of random bits as float32: any sign, exponent and fraction, but finite and not zero."""
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    half = 2 ** (8 * dtype.itemsize - 1)
    values = torch.zeros(shape, dtype=dtype)
    while (bad := ~torch.isfinite(values) | (values == 0)).any():
        drawn = torch.randint(-half, half, (int(bad.sum()),), generator=random)
        values[bad] = drawn.to(integer).view(dtype)
    return values.float()


def random_codes(mask: Tensor, random: torch.Generator) -> Tensor:
    """Multiples -127 to 127 of a random scale in each output channel, none of them zero, one of them the largest."""
    codes = torch.randint(1, 128, mask.shape, generator=random)
    codes *= torch.randint(0, 2, mask.shape, generator=random).mul_(2).sub_(1)
    channels, first = codes.view(len(mask), -1), mask.reshape(len(mask), -1).to(torch.uint8).argmax(dim=1)
    channels[torch.arange(len(mask)), first] = 127
    scales = torch.empty(len(mask)).uniform_(0.001, 0.01, generator=random).bfloat16().float()
    return codes * scales.view(-1, *[1] * (mask.ndim - 1))


def random_state(size: str, masks: State, value_dtype: str, seed: int = 0) -> State:
    """Weights that `value_dtype` can hold exactly, in as many bits as it has."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes_of(SIZES[size]).items():
        if name not in masks:
            state[name] = random_bits(shape, torch.float32, random)
            continue
        if value_dtype == "int8":
            values = random_codes(masks[name], random)
        else:
            values = random_bits(shape, getattr(torch, value_dtype), random)
        state[name] = values.masked_fill_(~masks[name], 0.0)
    return state


def expected(tensor: Tensor, value_dtype: str) -> Tensor:
    """What a file with such values is to give back for `tensor`."""
    if not is_sparse(tensor):
        return tensor
    if value_dtype == "int8":
        codes, scales = to_int8(tensor, 0)
        result = codes * scales.view(-1, *[1] * (tensor.ndim - 1))
    else:
        result = tensor.to(getattr(torch, value_dtype)).to(tensor.dtype)
    return torch.where(result == 0, 0.0, result)


def same_bits(one: Tensor, other: Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def measure(state: State, value_dtype: str, values: str, path: Path) -> dict[str, Any]:
    """Write and read one file."""
    iks_plugin.save(state, path, value_dtype)
    loaded = iks_plugin.load(path)
    limit = bound(state, value_dtype)
    target = None if values == "random bits" else TRAINED_TARGETS.get(value_dtype)
    allowed = OVERHEAD * limit + ROOM if target is None else target * limit
    lossless = loaded.keys() == state.keys() and all(
        same_bits(loaded[name], expected(tensor, value_dtype)) for name, tensor in state.items()
    )
    size = path.stat().st_size
    return {
        "values": values,
        "value_dtype": value_dtype,
        "bytes": size,
        "of_b": size / limit,
        "allowed_of_b": allowed / limit,
        "of_dense": size / dense_bytes(state),
        "lossless": lossless,
        "passed": size <= allowed and lossless,
    }


def measure_all(sizes: list[str], trained: list[Path], path: Path) -> Iterator[dict[str, Any]]:
    settings = [(size, zeros, evenly) for size in sizes for zeros in ZEROS for evenly in (True, False)]
    steps = 2 * len(BITS) * sum(SIZES[size][0] * SIZES[size][1] ** 2 for size, _, _ in settings)
    with tqdm(total=steps, desc="sizes", unit_scale=True, disable=None) as bar:
        for size, zeros, evenly in settings:
            masks = masks_for(SIZES[size], zeros, evenly)
            laplace = laplace_state(SIZES[size], masks)
            about = {"network": f"EDSR {size}", "zeros": zeros, "spread": "even" if evenly else "uneven"}
            for value_dtype in BITS:
                random = random_state(size, masks, value_dtype)
                for values, state in (("random bits", random), ("Laplace", laplace)):
                    yield {**about, **measure(state, value_dtype, values, path)}
                    bar.update(SIZES[size][0] * SIZES[size][1] ** 2)
    for file in trained:
        state = read_trained(file)
        counts = [(int((tensor == 0).sum()), tensor.numel()) for tensor in state.values() if is_sparse(tensor)]
        share = sum(zeros for zeros, _ in counts) / max(1, sum(numel for _, numel in counts))
        for value_dtype in BITS:
            row = measure(state, value_dtype, "trained", path)
            yield {"network": str(file.name), "zeros": share, "spread": "as trained", **row}


def read_trained(file: Path) -> State:
    """A state dict, also where BasicSR has wrapped it."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state.get("params_ema") or state.get("params") or state


def size_table(rows: list[dict[str, Any]], markdown: bool) -> str:
    heads = ("network", "zeros", "spread", "values", "type", "bytes", "of B", "allowed", "of dense", "to the bit", "")
    cells = [
        (
            row["network"],
            f"{row['zeros']:.2%}".replace(".00", ""),
            row["spread"],
            row["values"],
            row["value_dtype"],
            f"{row['bytes']:,}",
            f"{row['of_b']:.4f}",
            f"{row['allowed_of_b']:.4f}",
            f"{row['of_dense']:.4f}",
            "yes" if row["lossless"] else "NO",
            verdict(row["passed"]),
        )
        for row in rows
    ]
    return table(heads, cells, markdown)


def verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def measure_speed(sizes: list[str], rounds: int, path: Path) -> Iterator[dict[str, Any]]:
    """Save and load, the value types in turn, so that a busy machine slows all alike."""
    with tqdm(total=len(sizes) * len(SPEED_ZEROS) * rounds * len(BITS), desc="speed", disable=None) as bar:
        for size in sizes:
            for zeros in SPEED_ZEROS:
                state = laplace_state(SIZES[size], masks_for(SIZES[size], zeros, evenly=True))
                megabytes = dense_bytes(state) / 1e6
                speeds: dict[str, list[tuple[float, float]]] = {value_dtype: [] for value_dtype in BITS}
                for _ in range(rounds):
                    for value_dtype, measured in speeds.items():
                        saving = seconds(iks_plugin.save, state, path, value_dtype)
                        loading = seconds(iks_plugin.load, path)
                        measured.append((megabytes / saving, megabytes / loading))
                        bar.update()
                for value_dtype, measured in speeds.items():
                    save, load = map(statistics.median, zip(*measured, strict=True))
                    about = {"network": f"EDSR {size}", "zeros": zeros, "value_dtype": value_dtype}
                    yield {**about, "save": save, "load": load, "passed": min(save, load) >= SPEED_TARGET}


def seconds(act: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    act(*arguments)
    return time.perf_counter() - start


def speed_table(rows: list[dict[str, Any]], markdown: bool) -> str:
    cells = [
        (
            row["network"],
            f"{row['zeros']:.0%}",
            row["value_dtype"],
            f"{row['save']:.0f}",
            f"{row['load']:.0f}",
            verdict(row["passed"]),
        )
        for row in rows
    ]
    return table(("network", "zeros", "type", "save", "load", ""), cells, markdown)


def formats(state: State, path: Path) -> Iterator[tuple[str, int]]:
    """The bytes that `state` takes in one format after another; a note on stderr for what is not installed."""

    def saved(values: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(values, buffer)
        return buffer.getvalue()

    def each(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        # Rows of output channels: as sparse tensors know no more than two dimensions of CSR, and COO is smallest so.
        return {name: change(tensor.flatten(1)) if is_sparse(tensor) else tensor for name, tensor in state.items()}

    def narrow(matrix: Tensor) -> Tensor:
        rows = matrix.to_sparse_csr()
        ends, columns = rows.crow_indices().int(), rows.col_indices().int()
        return torch.sparse_csr_tensor(ends, columns, rows.values(), rows.shape)

    compress = zstd()
    for name, content in (("torch.save", saved(state)), ("safetensors", safetensors.torch.save(state))):
        yield name, len(content)
        yield f"{name}, deflate -9", len(deflated(content))
        if compress:
            yield f"{name}, zstd -19", len(compress(content))
    yield "torch.save of sparse COO", len(saved(each(Tensor.to_sparse_coo)))
    yield "torch.save of sparse CSR", len(saved(each(Tensor.to_sparse_csr)))
    yield "torch.save of sparse CSR, int32 indices", len(saved(each(narrow)))
    masked = bitmask(state)
    if masked is not None:
        yield "compressed-tensors, bitmask", len(safetensors.torch.save(masked))
    for value_dtype in BITS:
        iks_plugin.save(state, path, value_dtype)
        yield f"compact file, {value_dtype}", path.stat().st_size


def deflated(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("weights", content)
    return buffer.getvalue()


def zstd() -> Callable[[bytes], bytes] | None:
    try:
        import zstandard
    except ImportError:
        print("zstd left out: pip install zstandard", file=sys.stderr)
        return None
    compress: Callable[[bytes], bytes] = zstandard.ZstdCompressor(level=19).compress
    return compress


def bitmask(state: State) -> State | None:
    """What compressed-tensors would write."""
    try:
        from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor
    except ImportError as error:
        print(f"compressed-tensors left out ({error}): pip install 'compressed-tensors<0.13'", file=sys.stderr)
        return None
    written: State = {}
    for name, tensor in state.items():
        # Its masks are padded to bytes in the last dimension, so kernels of 3 x 3 are best given to it as rows.
        written |= BitmaskTensor.from_dense(tensor.flatten(1)).dict(name) if is_sparse(tensor) else {name: tensor}
    return {name: tensor.contiguous() for name, tensor in written.items()}


def measure_formats(network: str, state: State, path: Path) -> list[dict[str, Any]]:
    dense, limit = dense_bytes(state), bound(state, "float32")
    return [
        {"network": network, "format": name, "bytes": size, "of_dense": size / dense, "of_b": size / limit}
        for name, size in tqdm(formats(state, path), desc=f"formats, {network}", disable=None)
    ]


def format_table(rows: list[dict[str, Any]], markdown: bool) -> str:
    cells = [
        (row["format"], row["network"], f"{row['bytes']:,}", f"{row['of_dense']:.4f}", f"{row['of_b']:.3f}")
        for row in rows
    ]
    return table(("format", "weights", "bytes", "of dense", "of B"), cells, markdown)


def measure_quality(demo: Path, images: Path | None, path: Path) -> list[dict[str, Any]]:
    """PSNR on the photographs that the demo has held out, with the values of its sparse network in each type."""
    recipe = json.loads((demo / "results.json").read_text(encoding="utf-8"))["recipe"]
    network = iks_plugin.demo.edsr.EDSR(recipe["channels"], recipe["blocks"])
    state = torch.load(demo / "sparse.pth", weights_only=True)
    held_out = load_photos(images).held_out
    rows: list[dict[str, Any]] = []
    for value_dtype in tqdm(BITS, desc="quality", disable=None):
        iks_plugin.save(state, path, value_dtype)
        iks_plugin.load(path, network)
        psnr = statistics.fmean(psnr_y(enlarge(network, photo), photo.large) for photo in held_out)
        loss = rows[0]["psnr"] - psnr if rows else 0.0
        row = {"value_dtype": value_dtype, "bytes": path.stat().st_size, "psnr": psnr, "loss": loss}
        rows.append({**row, "passed": loss <= PSNR_TARGET})
    return rows


def quality_table(rows: list[dict[str, Any]], markdown: bool) -> str:
    cells = [
        (row["value_dtype"], f"{row['bytes']:,}", f"{row['psnr']:.4f}", f"{row['loss']:+.4f}", verdict(row["passed"]))
        for row in rows
    ]
    return table(("type", "bytes", "PSNR in dB", "loss in dB", ""), cells, markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("sizes", "speed", "formats", "quality")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="what to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="EDSR 16x64 alone")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed; the median counts (%(default)s)")
    parser.add_argument("--trained", type=Path, nargs="+", default=[], metavar="FILE", help="state dicts with zeros")
    parser.add_argument("--formats-size", choices=SIZES, default="16x64", help="EDSR for other formats (%(default)s)")
    parser.add_argument("--formats-zeros", type=float, default=0.9, help="its share of zeros (%(default)s)")
    parser.add_argument("--quality", type=Path, metavar="DIR", help="a folder that `iks demo` has written")
    parser.add_argument("--images", type=Path, metavar="DIR", help="what that demo was given as --data, if anything")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    sizes = ["16x64"] if options.quick else list(SIZES)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    figures: dict[str, list[dict[str, Any]]] = {}

    def tell(part: str, title: str, rows: list[dict[str, Any]], show: Callable[..., str]) -> None:
        figures[part] = rows
        print(f"\n{title}\n\n{show(rows, options.markdown)}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.iks")
        if "sizes" in options.only:
            tell("sizes", "File sizes", list(measure_all(sizes, options.trained, path)), size_table)
        if "speed" in options.only:
            title = f"MB/s of dense float32 weights, median of {options.rounds} (target {SPEED_TARGET})"
            tell("speed", title, list(measure_speed(sizes, options.rounds, path)), speed_table)
        if "formats" in options.only:
            warnings.filterwarnings("ignore", "(?i)sparse")  # torch's, that its CSR tensors are young
            size = SIZES[options.formats_size]
            laplace = laplace_state(size, masks_for(size, options.formats_zeros, evenly=True))
            rows = measure_formats(f"EDSR {options.formats_size}, {options.formats_zeros:.0%}", laplace, path)
            for file in options.trained:
                rows += measure_formats(file.name, read_trained(file), path)
            tell("formats", "Formats", rows, format_table)
        if "quality" in options.only and options.quality:
            title = f"PSNR on the demo's held-out photographs (target: a loss of at most {PSNR_TARGET} dB)"
            tell("quality", title, measure_quality(options.quality, options.images, path), quality_table)
    failed = sum(not row.get("passed", True) for rows in figures.values() for row in rows)
    print(f"\n{failed} of {sum('passed' in row for rows in figures.values() for row in rows)} targets missed")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
