"""Hundreds of damaged and hostile compact files: an error that names the file, or the right tensors.

`benchmarks/fuzz_files.py` makes thousands of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from fuzz_files import make_case, make_samples, violations

FILES = 600


@pytest.mark.slow
@pytest.mark.parametrize("seed", [100, 101, 102, 103])
def test_damaged_and_hostile_files(tmp_path: Path, seed: int) -> None:
    samples = make_samples(tmp_path)
    assert len({sample.name for sample in samples}) >= 5
    refused = 0
    for case in range(FILES // 4):
        sample, content, is_hostile = make_case(samples, seed, case)
        found = violations(sample, content, tmp_path / "mutant.iks", is_hostile)
        found = [fault for fault in found if ": takes " not in fault]  # a busy machine is no fault
        assert found == [], f"seed {seed}, case {case} ({sample.name})"
        refused += content != sample.content
    assert refused > FILES // 8


def test_the_files_that_are_damaged_are_right_before(tmp_path: Path) -> None:
    for sample in make_samples(tmp_path):
        assert violations(sample, sample.content, tmp_path / "valid.iks", is_hostile=True) == []
