"""iks_basicsr: an `iks:` block in a BasicSR option file makes its network sparse while it trains.

    iks:
      target_sparsity: 0.9

Start a training with `python -m iks_basicsr -opt x.yml`, or any script of a codebase built on BasicSR with
`python -m iks_basicsr path/to/train.py -opt x.yml`; or write `import iks_basicsr` at the top of the script, before
anything of BasicSR. Importing is all: there is nothing to call. Option files without the block train as ever.
"""

from . import compat

compat.require_basicsr()
compat.restore_functional_tensor()  # before BasicSR is imported, which needs it

from . import hooks  # noqa: E402

hooks.install()

__all__: list[str] = []
