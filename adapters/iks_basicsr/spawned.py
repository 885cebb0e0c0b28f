"""The main module of processes that a training spawns, such as the workers of its data loaders.

They unpickle BasicSR's classes, and maybe some of the training script: so BasicSR has to be importable, which importing
this package has seen to by now, and the script's names have to be there.
"""

import os
import runpy

SCRIPT = "IKS_BASICSR_SCRIPT"
"""Environment variable: the path of the script that the launcher runs; unset where it runs BasicSR's own training."""

if __name__ == "__mp_main__" and SCRIPT in os.environ:
    globals().update(runpy.run_path(os.environ[SCRIPT], run_name="__mp_main__"))
