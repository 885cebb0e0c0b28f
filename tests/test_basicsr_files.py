"""A training that is killed at any moment loses no more than the steps since its last save."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import basicsr_toys as toys
from iks_basicsr.files import whole_files
from iks_plugin.files import remove_unfinished


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "net.pth"
    with whole_files():
        torch.save({"a": 1}, path)
        with pytest.raises(Exception, match="pickle"):
            torch.save({"a": lambda: None}, path)
        assert torch.load(path) == {"a": 1}
        torch.save({"a": 2}, str(path))
    assert torch.load(path) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["net.pth"]


def test_entries_are_added_and_torch_is_given_back(tmp_path):
    save = torch.save
    with whole_files({"more": 3}), open(tmp_path / "stream", "wb") as stream:
        torch.save({"a": 1}, tmp_path / "with")
        torch.save({"a": 1}, stream)
    assert torch.save is save
    assert torch.load(tmp_path / "with") == {"a": 1, "more": 3} and torch.load(tmp_path / "stream") == {"a": 1}
    with pytest.raises(ZeroDivisionError), whole_files():
        raise ZeroDivisionError
    assert torch.save is save


def test_what_a_killed_process_left_is_removed(tmp_path):
    with whole_files():
        torch.save({}, tmp_path / "20.state")
    (tmp_path / ".40.state.iks-unfinished").write_text("half")
    remove_unfinished([tmp_path, tmp_path / "missing"])
    assert [path.name for path in tmp_path.iterdir()] == ["20.state"]


@pytest.mark.slow
def test_a_training_that_is_killed_at_random_moments_always_resumes(tmp_path):
    """`python tests/test_basicsr_files.py 20` does so 20 times."""
    kill_and_resume(tmp_path, kills=3)


def kill_and_resume(folder: Path, kills: int, seed: int = 0) -> None:
    """Kill a training `kills` times, each time resuming with --auto_resume; compare its end with a straight run's."""
    toys.write_images(folder)
    opt = toys.options(folder, train={"total_iter": 200 * kills, "ema_decay": 0.9})
    opt["logger"].update(save_checkpoint_freq=5, print_freq=1)
    opt["val"]["val_freq"] = 10**6
    chance = random.Random(seed)
    for _ in range(kills):
        before = newest_state(folder)
        process, log = start(opt, folder)
        anywhere = chance.random() < 0.3  # from the start of the process on, or while it trains and saves
        if not anywhere:
            wait_for_a_newer_state(folder, before, process)
        time.sleep(chance.uniform(0, 4 if anywhere else 0.3))
        assert process.poll() is None, log.read_text()[-3000:]
        process.kill()
        process.wait()
        check_resumed_from(before, log)
        for path in (folder / "experiments" / "run").glob("*/*.*"):
            if path.suffix in (".pth", ".state"):
                torch.load(path, weights_only=False)  # it is whole
        print(f"killed at {'any moment' if anywhere else 'work'}: {before} -> {newest_state(folder)}")
    before = newest_state(folder)
    process, log = start(opt, folder)
    assert process.wait() == 0, log.read_text()[-3000:]
    check_resumed_from(before, log)
    assert not list(folder.glob("experiments/run/*/.*"))

    resumed = toys.saved(folder, "net_g_latest.pth")
    shutil.rmtree(folder / "experiments")
    toys.train(opt, folder)
    toys.assert_same(resumed, toys.saved(folder, "net_g_latest.pth"))


def start(opt: dict[str, Any], folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    log = folder / "output.txt"
    command = [sys.executable, "-m", "iks_basicsr", "-opt", str(toys.write_options(opt, folder)), "--auto_resume"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=stream, stderr=subprocess.STDOUT
        )
    return process, log


def newest_state(folder: Path) -> int:
    states = (folder / "experiments" / "run" / "training_states").glob("*.state")
    return max((int(path.stem) for path in states), default=0)


def wait_for_a_newer_state(folder: Path, before: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while newest_state(folder) <= before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def check_resumed_from(iteration: int, log: Path) -> None:
    text = log.read_text()
    started = re.search(r"Start training from epoch: \d+, iter: (\d+)", text)
    assert started is None or int(started[1]) == iteration, text[-3000:]  # None: killed before that
    assert "Traceback" not in text, text[-3000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        kill_and_resume(Path(scratch), kills=int(sys.argv[1]))
