"""The main module of processes that a training spawns, such as the workers of its data loaders.

They unpickle BasicSR's classes, and may unpickle some of the training script: so BasicSR has to be importable, which
importing this package has seen to by now, and the script's names have to be there.
"""

import runpy
import sys

from iks_basicsr.__main__ import __file__ as launcher

if sys.argv[0] != launcher:
    globals().update(runpy.run_path(sys.argv[0], run_name="__mp_main__"))
