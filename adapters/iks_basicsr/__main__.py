"""`python -m iks_basicsr`: BasicSR's own training, or any training script, with `iks:` blocks."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

USAGE = """\
usage: python -m iks_basicsr -opt OPTIONS.yml [BasicSR's options]         train with BasicSR's own training
       python -m iks_basicsr --test -opt OPTIONS.yml                      test with BasicSR's own testing
       python -m iks_basicsr SCRIPT.py -opt OPTIONS.yml [its options]     run a script that is built on BasicSR
       torchrun --nproc_per_node=2 -m iks_basicsr -opt OPTIONS.yml --launcher pytorch

Networks become sparse where the option file has such a block; without one nothing changes:

    iks:
      target_sparsity: 0.9     # the fraction of the rewritten layers' weights that become zero
      network: network_g       # or a list; every keyword of iks_plugin.sparsify besides

BasicSR's options: --auto_resume, --debug, --launcher {none,pytorch,slurm}, --force_yml KEY:KEY=VALUE ...
Experiments and results go to the present folder, as a script's do to where it puts them.
"""

WRONG_USE = 2


def main() -> int:
    """Run what `sys.argv` names. Returns the exit code."""
    from iks_plugin import IksError

    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else WRONG_USE
    try:
        if arguments[0].endswith((".yml", ".yaml")):
            raise IksError(f"{arguments[0]} is an option file: write -opt {arguments[0]}")
        if not arguments[0].startswith("-"):
            return _run_script(arguments[0], arguments[1:])
        return _run_basicsr(arguments)
    except IksError as error:
        print(f"iks_basicsr: error: {error}", file=sys.stderr)
        return WRONG_USE


def _run_basicsr(arguments: list[str]) -> int:
    from basicsr.test import test_pipeline
    from basicsr.train import train_pipeline

    from .spawned import SCRIPT

    os.environ.pop(SCRIPT, None)  # of a training that has started this one
    sys.modules["__main__"].__spec__ = _spec_of_spawned()
    if "--test" in arguments:
        sys.argv.remove("--test")
        test_pipeline(os.getcwd())
    else:
        train_pipeline(os.getcwd())
    return 0


def _run_script(path: str, arguments: list[str]) -> int:
    """As `python path arguments` does it: its own sys.argv, and its folder first in the search for modules."""
    from .compat import loading_without_cuda
    from .spawned import SCRIPT

    try:
        code = compile(Path(path).read_bytes(), os.path.abspath(path), "exec", dont_inherit=True)
    except OSError as error:
        print(f"iks_basicsr: error: cannot read the script {path!r}: {error.strerror}", file=sys.stderr)
        return WRONG_USE
    script = ModuleType("__main__")
    script.__file__ = os.path.abspath(path)
    script.__spec__ = _spec_of_spawned()
    sys.modules["__main__"] = script
    os.environ[SCRIPT] = str(Path(path).resolve())
    sys.argv = [path, *arguments]
    sys.path[0] = str(Path(path).resolve().parent)
    with loading_without_cuda():
        exec(code, script.__dict__)
    return 0


def _spec_of_spawned() -> ModuleSpec:
    """What multiprocessing makes the main module of the processes that it spawns."""
    return ModuleSpec("iks_basicsr.spawned", None)


if __name__ == "__main__":
    sys.exit(main())
