"""Every way to start: BasicSR's own training, scripts, several processes, and `import iks_basicsr` in a script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import basicsr_toys as toys
import iks_plugin

SCRIPT = """
import os, sys
import helper_beside_the_script
from basicsr.train import train_pipeline
from basicsr.utils.registry import ARCH_REGISTRY

@ARCH_REGISTRY.register()
def OwnEDSR(**options):
    return ARCH_REGISTRY.get("EDSR")(**options)

if __name__ == "__main__":
    print("arguments", sys.argv)
    train_pipeline(os.getcwd())
"""


def prepared(folder: Path, **changes: Any) -> dict[str, Any]:
    toys.write_images(folder, 4)
    return toys.options(folder, **changes)


def write_script(folder: Path, first_line: str = "") -> Path:
    script = folder / "codebase" / "train.py"
    script.parent.mkdir()
    script.write_text(first_line + SCRIPT)
    (script.parent / "helper_beside_the_script.py").touch()
    return script


def check_sparse(folder: Path, name: str = "net_g_latest.pth") -> None:
    zeros, weights = toys.zeros_and_weights(
        toys.saved(folder, name)["params"], ["body.0.conv1", "body.0.conv2", "conv_after_body", "upsample.0"]
    )
    assert zeros == round(0.9 * weights) and weights == 4032


def test_basicsr_s_own_training_and_testing(tmp_path):
    opt = prepared(tmp_path)
    started = ["-m", "iks_basicsr", "-opt", toys.write_options(opt, tmp_path)]
    toys.run_python(*started, cwd=tmp_path)
    check_sparse(tmp_path)
    opt["datasets"] = {"test_1": opt["datasets"]["val"]}
    opt["path"]["pretrain_network_g"] = str(tmp_path / "experiments/run/models/net_g_latest.pth")
    opt["val"]["suffix"] = None
    done = toys.run_python("-m", "iks_basicsr", "--test", "-opt", toys.write_options(opt, tmp_path), cwd=tmp_path)
    assert "# psnr: " in done.stderr + done.stdout


def test_a_script_runs_unchanged_and_resumes(tmp_path):
    opt = prepared(tmp_path, network_g={**toys.EDSR, "type": "OwnEDSR"})
    script = write_script(tmp_path)
    arguments = [script, "-opt", toys.write_options(opt, tmp_path), "--auto_resume"]
    done = toys.run_python("-m", "iks_basicsr", *arguments, cwd=tmp_path)
    assert f"arguments {[str(argument) for argument in arguments]}" in done.stdout
    check_sparse(tmp_path)
    opt["train"]["total_iter"] = 25
    arguments = [script, "-opt", toys.write_options(opt, tmp_path), "--auto_resume"]
    done = toys.run_python("-m", "iks_basicsr", *arguments, cwd=tmp_path)
    assert "iter: 20." in done.stderr + done.stdout
    check_sparse(tmp_path)


def test_the_script_of_basicsr_itself_runs_and_resumes(tmp_path):
    """It brings its own copies of the functions that BasicSR's package has, and puts experiments beside the package."""
    import basicsr.train

    import iks_basicsr  # noqa: F401

    opt = prepared(tmp_path)
    script = tmp_path / "basicsr_clone" / "basicsr" / "train.py"
    script.parent.mkdir(parents=True)
    script.write_text(Path(basicsr.train.__file__).read_text())
    for end in (20, 25):
        opt["train"]["total_iter"] = end
        path = toys.write_options(opt, tmp_path)
        done = toys.run_python(
            "-m", "iks_basicsr", script, "-opt", path, "--auto_resume", cwd=tmp_path / "basicsr_clone"
        )
    assert "iter: 20." in done.stderr + done.stdout
    check_sparse(tmp_path / "basicsr_clone")


def test_importing_is_enough_in_one_s_own_script(tmp_path):
    opt = prepared(tmp_path, network_g={**toys.EDSR, "type": "OwnEDSR"})
    script = write_script(tmp_path, "import iks_basicsr\n")
    toys.run_python(script, "-opt", toys.write_options(opt, tmp_path), cwd=tmp_path)
    check_sparse(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("with_script", [False, True], ids=["basicsr's own", "script"])
def test_several_processes(with_script, tmp_path):
    """Two of them over gloo: with workers for the data, which BasicSR spawns, or resumed."""
    opt = prepared(tmp_path, train={"ema_decay": 0.5, "optim_g": {**toys.ADAM, "weight_decay": 0.1}})
    opt["iks"] = {"target_sparsity": 0.9, "export": True}
    if with_script:
        opt["network_g"]["type"] = "OwnEDSR"
        opt["datasets"]["train"].update(num_worker_per_gpu=1, dataset_enlarge_ratio=50)  # they start once per epoch
    script = [write_script(tmp_path)] if with_script else []
    for end in [20] if with_script else [20, 30]:
        opt["train"]["total_iter"] = end
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        arguments = ["-opt", toys.write_options(opt, tmp_path), "--launcher", "pytorch", "--auto_resume"]
        done = toys.run_python(*start, "-m", "iks_basicsr", *script, *arguments, cwd=tmp_path)
        assert "World size (gpu number): 2" in done.stdout + done.stderr
        assert (done.stdout + done.stderr).count(f"iks: net_g_{end}.iks has ") == 1
        check_sparse(tmp_path)
    assert with_script or "iter: 20." in done.stdout + done.stderr
    saved = toys.saved(tmp_path, f"{end}.state", "training_states")["iks"]["networks"]["net_g"]
    assert saved["controller"]["steps"] == end
    exported = iks_plugin.load(tmp_path / "experiments/run/models" / f"net_g_{end}.iks")
    toys.assert_same(dict(exported), dict(toys.saved(tmp_path, f"net_g_{end}.pth")["params_ema"]))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "usage: python -m iks_basicsr"),
        (["--help"], 0, "usage: python -m iks_basicsr"),
        (["missing.py", "-opt", "x.yml"], 2, "cannot read the script 'missing.py': No such file"),
        (["run.yml"], 2, "error: run.yml is an option file: write -opt run.yml"),
    ],
)
def test_wrong_use_is_told_in_a_line(arguments, code, said, monkeypatch, capsys):
    from iks_basicsr.__main__ import main

    monkeypatch.setattr(sys, "argv", ["iks_basicsr", *arguments])
    assert main() == code
    assert said in "".join(capsys.readouterr())


def test_a_wrong_block_is_told_in_a_line(tmp_path):
    toys.write_options(toys.options(tmp_path, iks=90), tmp_path)
    done = toys.run_python("-m", "iks_basicsr", "-opt", "run.yml", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: run.yml, block iks: target_sparsity must be a number in [0, 1), got 90" in done.stdout + done.stderr


def test_without_basicsr_the_import_says_what_to_do(tmp_path):
    said = toys.said_without("basicsr", "iks_basicsr", tmp_path)
    assert "ImportError: iks_basicsr needs BasicSR" in said and "pip install" in said


def test_the_core_does_not_load_the_adapter():
    code = "import sys, iks_plugin; assert not {'iks_basicsr', 'basicsr'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_where_there_is_a_gpu_states_go_to_it(monkeypatch):
    from iks_basicsr import compat

    load = torch.load
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with compat.loading_without_cuda():
        assert torch.load is load
