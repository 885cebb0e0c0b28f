"""The package as a whole: what importing it loads."""

from __future__ import annotations

import subprocess
import sys

import iks_plugin

LIST_NEW_MODULES = """
import sys, torch, numpy, safetensors
before = set(sys.modules)
import iks_plugin
allowed = {*sys.stdlib_module_names, 'torch', 'numpy', 'safetensors'}
print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - allowed))
"""


def test_importing_the_package_loads_nothing_but_torch_numpy_and_safetensors():
    loaded = subprocess.run([sys.executable, "-c", LIST_NEW_MODULES], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "['iks_plugin']"


def test_importing_the_package_does_not_load_the_demo():
    code = "import sys, iks_plugin; assert not any('demo' in name for name in sys.modules if name.startswith('iks'))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists_and_is_documented():
    for name in iks_plugin.__all__:
        assert getattr(iks_plugin, name).__doc__
