"""The `iks` command, also `python -m iks_plugin`: it reads options and calls the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import IksError, __version__, load, save
from .quantize import VALUE_DTYPES

WRONG_USE = 2
INTERRUPTED = 130
"""The exit code of a program that was ended by Ctrl-C: 128 + SIGINT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`, without the program's name. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our output has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except (IksError, OSError) as error:  # the system's own, wherever a path is looked at
        print(f"iks: error: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("iks: aborted", file=sys.stderr)
        return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iks",
        description="Make super-resolution networks sparse in the training code that exists already.",
    )
    parser.add_argument("--version", action="version", version=f"iks-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_inspect(commands)
    _add_export(commands)
    _add_restore(commands)
    _add_upscale(commands)
    _add_bench(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="train a small EDSR x2 on photographs, dense and sparse, and compare the two",
        description="Train a small EDSR x2 on photographs, dense and sparse for equally many steps, and compare both "
        "with bicubic interpolation on photographs that were held out. Takes 2 to 4 minutes on two cores. "
        "Ctrl-C stops the training; what exists by then is compared and written. A second Ctrl-C aborts.",
    )
    parser.set_defaults(command=_demo)
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="train on the images in this folder, the last few by name held out (default: photographs that come with "
        "scikit-image)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="iks-demo",
        help="write pictures, figures and state dicts to this folder (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        metavar="FRACTION",
        type=float,
        default=0.9,
        help="the fraction of the rewritten layers' weights that become zero, at least 0 and below 1 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=int,
        help="optimizer steps of each network (default: 3000; 60 with --quick)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="seed of weights and batches: the same one gives the same result on the same machine with the same number "
        "of threads (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        default=1,
        help="CPU threads for each of the two networks, which train at the same time: 1 keeps two cores busy "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="train a tiny network for seconds: shows that everything works, not how well",
    )


def _demo(options: argparse.Namespace) -> int:
    from .demo import run

    outcome = run(
        out=options.out,
        data=options.data,
        target_sparsity=options.target,
        steps=options.steps,
        seed=options.seed,
        quick=options.quick,
        threads=options.threads,
    )
    return INTERRUPTED if outcome is None or outcome.interrupted else 0


def _add_inspect(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show what is in a compact file, and whether it is intact",
        description="Show the tensors in a compact file, their sizes and zeros, and check their checksums.",
    )
    parser.set_defaults(command=_inspect)
    parser.add_argument("file", metavar="FILE", help="a compact file (.iks)")
    parser.add_argument("--json", action="store_true", help="print it as JSON, for other programs")


def _inspect(options: argparse.Namespace) -> int:
    from .contents import inspect

    contents = inspect(options.file)
    print(json.dumps(contents.to_dict(), indent=1) if options.json else contents)
    if contents.damaged:
        raise IksError(
            f"{options.file}: {len(contents.damaged)} tensors are damaged ({', '.join(contents.damaged[:3])}): copy "
            "the file again, or export it anew"
        )
    return 0


def _add_export(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="make a compact file of a checkpoint",
        description="Make a compact file of a checkpoint of BasicSR, MMagic or Lightning, of "
        "torch.save(model.state_dict()), or of safetensors. "
        "Nothing in the checkpoint is executed. Thresholds that a training has left beside the weights are applied.",
    )
    parser.set_defaults(command=_export)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a file that torch.save has written (.pth, .ckpt, ...), or .safetensors",
    )
    parser.add_argument("out", metavar="OUT", help="the compact file to write (.iks)")
    parser.add_argument(
        "--value-dtype",
        choices=list(VALUE_DTYPES),
        default="float32",
        help="the type of the non-zero values of sparse weights; float32 is lossless for float32 weights and narrower "
        "ones (default: %(default)s)",
    )
    parser.add_argument(
        "--key",
        help="which state dict of the checkpoint to take (default: params_ema, else params, else state_dict, ...)",
    )
    parser.add_argument(
        "--prefix",
        default="",
        help="take only entries whose names begin with this, and take it off, such as 'generator.' for the network "
        "alone of an MMagic checkpoint",
    )
    parser.add_argument(
        "--keep-thresholds",
        action="store_true",
        help="parameters called 'threshold' beside a 'weight' are the network's own, not those that a training with "
        "gates has left: write them as they are",
    )


def _export(options: argparse.Namespace) -> int:
    from .checkpoint import read_checkpoint

    _check_apart(options.checkpoint, options.out)
    checkpoint = read_checkpoint(options.checkpoint, options.key, options.prefix, lambda _: not options.keep_thresholds)
    save(checkpoint.state, options.out, options.value_dtype, checkpoint_key=checkpoint.restored_key)
    before, after = os.path.getsize(options.checkpoint), os.path.getsize(options.out)
    taken = f" ({checkpoint.key})" if checkpoint.key else ""
    if checkpoint.gated:
        print(
            f"the thresholds beside {checkpoint.gated} weights, of a training with gates, are applied to them (if they "
            "are the network's own: --keep-thresholds)"
        )
    print(f"{options.checkpoint}{taken}: {before:,} bytes -> {options.out}: {after:,} bytes, {after / before:.1%}")
    return 0


def _check_apart(source: str, out: str) -> None:
    if os.path.realpath(source) == os.path.realpath(out):
        raise IksError(f"{out}: expected another file to write than the one to read: give it another name")


def _add_restore(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "restore",
        help="make a plain checkpoint of a compact file",
        description="Make a plain checkpoint of a compact file: dense tensors, written by torch.save, under the key "
        "where the checkpoint that was exported had them, or a safetensors file, if that is its name. BasicSR, MMagic "
        "or plain torch load it without iks-plugin.",
    )
    parser.set_defaults(command=_restore)
    parser.add_argument("file", metavar="FILE", help="a compact file (.iks)")
    parser.add_argument("out", metavar="OUT", help="the checkpoint to write: .pth, or .safetensors, which has no keys")
    parser.add_argument(
        "--key",
        help="put the state dict under this key: 'params' for BasicSR, 'state_dict' for MMagic, '' for none (default: "
        "as in the checkpoint that was exported)",
    )
    parser.add_argument(
        "--prefix",
        default="",
        help="put this before every name, such as 'generator.' for a network that is a part of an MMagic model",
    )


def _restore(options: argparse.Namespace) -> int:
    from .checkpoint import is_safetensors, write_checkpoint
    from .contents import inspect

    _check_apart(options.file, options.out)
    state = {f"{options.prefix}{name}": tensor for name, tensor in load(options.file).items()}
    key = inspect(options.file).info.checkpoint_key if options.key is None else options.key or None
    if is_safetensors(options.out):
        if options.key:
            raise IksError(f"--key {options.key}: a safetensors file has no keys: leave it out, or write a .pth")
        key = None
    write_checkpoint(options.out, state, key)
    print(f"{options.file} -> {options.out}: {len(state)} tensors{f' under {key!r}' if key else ''}, dense")
    return 0


def _add_upscale(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "upscale",
        help="upscale a picture, or a folder of them, with a network",
        description="Upscale a picture with a super-resolution network, or each picture of a folder. With --tile the "
        "memory that it takes is bounded, and no seams show: a tile sees as much around it as the network looks.",
    )
    parser.set_defaults(command=_upscale)
    parser.add_argument("source", metavar="IN", help="a picture (.png, .jpg, ...) of 8 bits a channel, or a folder")
    parser.add_argument("out", metavar="OUT", help="the picture to write, or the folder")
    parser.add_argument(
        "--model",
        metavar="FILE",
        required=True,
        help="the weights: a compact file (.iks) or a checkpoint (.pth, .safetensors)",
    )
    parser.add_argument(
        "--arch",
        metavar="ARCH",
        help="the network: package.module:Class, the name of one of BasicSR's architectures, or 'auto', to let "
        "spandrel find it by the weights (default: auto, where spandrel is installed). A class is imported, so that "
        "its code runs",
    )
    parser.add_argument(
        "--arch-args",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="arguments of the class, such as num_feat=64 upscale=2, or a JSON object",
    )
    parser.add_argument("--key", help="which state dict of a checkpoint to take (default: as `iks export`)")
    parser.add_argument("--tile", metavar="N", type=int, help="upscale in tiles of N x N pixels of the picture")
    parser.add_argument(
        "--overlap",
        metavar="N",
        type=int,
        help="let tiles see N pixels around them (default: as far as the network looks, which makes them exact)",
    )
    parser.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep sparse weights packed in memory (default: those of a compact file)",
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")


def _upscale(options: argparse.Namespace) -> int:
    from .architecture import load_network, parsed_arguments
    from .images import check_paths, upscale_files
    from .upscale import Upscaler

    check_paths(options.source, options.out)
    arguments = parsed_arguments(options.arch_args)
    model, name = load_network(options.model, options.arch, arguments, options.packed, options.device, options.key)
    upscaler = Upscaler(model, options.tile, overlap=options.overlap)
    print(f"{options.model}: {name}", flush=True)
    print(upscale_files(upscaler, options.source, options.out))
    return 0


def _add_bench(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure how fast a network is packed, and dense",
        description="Run a network packed and dense in turn on random numbers, and print times, memory, and how each "
        "packed layer runs.",
    )
    parser.set_defaults(command=_bench)
    parser.add_argument(
        "model", metavar="MODEL", help="the weights: a compact file (.iks) or a checkpoint (.pth, .safetensors)"
    )
    parser.add_argument("--arch", metavar="ARCH", help="the network, as for `iks upscale`")
    parser.add_argument("--arch-args", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="as there")
    parser.add_argument("--key", help="which state dict of a checkpoint to take, as there")
    parser.add_argument(
        "--size", metavar="WxH", default="320x180", help="width and height of the image (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=5, help="how often each runs; medians count (default: %(default)s)"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: those of torch)")


def _bench(options: argparse.Namespace) -> int:
    import torch

    from .architecture import load_network, parsed_arguments
    from .bench import bench, parse_size

    size = parse_size(options.size)
    for name in ("rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise IksError(f"--{name} must be at least 1, got {value}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    arguments = parsed_arguments(options.arch_args)
    model, name = load_network(options.model, options.arch, arguments, key=options.key)
    print(f"{options.model}: {name}", flush=True)
    print(bench(model, size, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
