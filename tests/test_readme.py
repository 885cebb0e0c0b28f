"""What the README promises is run: its snippet, its report and its two commands as far as a test can."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import iks_plugin
from pages import ROOT, block_after

README = (ROOT / "README.md").read_text()


def test_the_snippet_runs_and_its_report_is_the_one_shown():
    names: dict[str, object] = {}
    exec(block_after("README.md", "test"), names)
    assert str(iks_plugin.report(names["model"])).splitlines() == block_after("README.md", "report").splitlines()


def test_the_resume_snippet_goes_on_where_the_training_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = block_after("README.md", "test")
    start, training = re.split(r"(?=for step)", whole.partition("iks_plugin.finalize")[0])
    first: dict[str, object] = {}
    exec(start + training, first)
    save, resume = block_after("README.md", "test: resume").split("# in the process that goes on")
    exec(save, first)
    second: dict[str, object] = {}
    exec(start, second)
    exec(resume.partition("\n")[2], second)
    assert second["controller"].steps == 200
    assert second["controller"].state_dict() == first["controller"].state_dict()
    assert all(map(torch.equal, first["model"].state_dict().values(), second["model"].state_dict().values()))


def commands() -> list[str]:
    return [
        line for line in re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL) if line.startswith("python3 -m venv")
    ]


def test_the_test_command_is_what_ci_runs():
    _, test_command = commands()
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_demo_command_starts_with_an_existing_extra_and_command():
    demo_command, _ = commands()
    extra = re.search(r'pip install "\.\[(\w+)\]"', demo_command)
    assert extra is not None and f"\n{extra[1]} =\n" in (ROOT / "setup.cfg").read_text()
    shown = subprocess.run([sys.executable, "-m", "iks_plugin", "demo", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--data" in shown.stdout


def test_the_file_map_names_every_file_of_the_package():
    file_map = (ROOT / "CONTRIBUTING.md").read_text()
    missing = [path.name for path in (ROOT / "iks_plugin").glob("*.py") if f"`{path.name}`" not in file_map]
    assert [name for name in missing if name != "__init__.py"] == []


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    """In a tenth of its steps."""
    text = (ROOT / "examples" / "custom_loop.py").read_text()
    assert len(text.splitlines()) < 60
    assert text.count("\nSTEPS, PATCH = 800, 48\n") == 1
    shortened = tmp_path / "custom_loop.py"
    shortened.write_text(text.replace("STEPS, PATCH = 800, 48", "STEPS, PATCH = 80, 48"))
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more of them wait for each other on a busy machine
    subprocess.run([sys.executable, str(shortened)], check=True, cwd=tmp_path, env=one_thread)
