"""iks_mmagic: an `iks` entry in an MMagic config makes its generator sparse while it trains.

    _base_ = ["mmagic::edsr/edsr_x2c64b16_1xb16-300k_div2k.py"]
    custom_imports = dict(imports=["iks_mmagic"])
    iks = dict(target_sparsity=0.9)

Train and test with MMagic's own `tools/train.py` and `tools/test.py`, or with `Runner.from_cfg`. Importing is all:
there is nothing to call. Configs without the entry train as ever.
"""

from . import compat

compat.require_mmengine()
compat.install()

from . import install  # noqa: E402

install.install()

__all__: list[str] = []
