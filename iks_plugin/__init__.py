"""iks-plugin: make super-resolution networks sparse in the training code that exists already.

    controller = iks_plugin.sparsify(model, 0.8)   # in place; 80 % of the rewritten layers' weights become zero
    ...                                            # any training loop, unchanged
    iks_plugin.finalize(model)                     # plain modules again, with exactly 80 % zeros
    print(iks_plugin.report(model))                # what each layer has kept
    iks_plugin.save(model, "edsr.iks")             # a small file
    iks_plugin.load("edsr.iks", model)             # dense weights with exact zeros, into a plain model
    iks_plugin.load("edsr.iks", model, packed=True)  # weights stay packed in memory, and the network runs faster
    iks_plugin.upscale(model, image, tile=256)     # an image of any size in bounded memory

The method is Individual Kernel Sparsity (ACM MM 2022, doi 10.1145/3503161.3547768).
"""

from .control import SparsityController
from .errors import IksError, IksWarning, OptionError
from .model_file import load, save
from .options import check_options
from .packing import pack, unpack
from .report import LayerReport, Report, report
from .rewrite import finalize, finalized, gates_applied, is_sparsified, sparsify
from .upscale import upscale

__version__ = "0.1.0.dev0"

__all__ = [
    "IksError",
    "IksWarning",
    "LayerReport",
    "OptionError",
    "Report",
    "SparsityController",
    "check_options",
    "finalize",
    "finalized",
    "gates_applied",
    "is_sparsified",
    "load",
    "pack",
    "report",
    "save",
    "sparsify",
    "unpack",
    "upscale",
]
