"""`python -m benchmarks.quality`, or from anywhere `python benchmarks/quality`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a folder: nothing has told Python yet where the package lies
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.quality.cli import main

if __name__ == "__main__":
    sys.exit(main())
