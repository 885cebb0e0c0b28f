"""The `iks` command, also `python -m iks_plugin`: it reads options and calls the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from . import IksError, __version__

WRONG_USE = 2
INTERRUPTED = 130
"""The exit code of a program that was ended by Ctrl-C: 128 + SIGINT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`, without the program's name. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except IksError as error:
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


if __name__ == "__main__":
    sys.exit(main())
