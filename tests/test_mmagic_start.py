"""MMagic in several processes, and killed at any moment."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mmagic")

import torch

import mmagic_toys as toys
from basicsr_toys import assert_same, said_without, write_images
from test_mmagic_export import EXPORT, loaded, within
from test_mmagic_training import EMA, GAN, zeros_and_weights

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SEPARATE = 'model_wrapper_cfg = dict(type="MMSeparateDistributedDataParallel")'


def test_without_mmengine_the_import_says_what_to_do(tmp_path):
    said = said_without("mmengine", "iks_mmagic", tmp_path)
    assert "ImportError: iks_mmagic needs MMagic and MMEngine" in said and "pip install" in said


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_batches_together(tmp_path):
    write_images(tmp_path, 4)
    plain = "train_dataloader = dict(num_workers=0, batch_size={}, sampler=dict(shuffle=False), " + (
        "dataset=dict(pipeline=train_pipeline, **images))"
    )
    config = toys.write_config(tmp_path, EXPORT, more=f"{plain.format(1)}\n{EMA}")
    toys.run_tool("train", config, "--launcher", "pytorch", folder=tmp_path, launcher=LAUNCHER)
    one = tmp_path / "one"
    one.mkdir()
    write_images(one, 4)
    toys.run(toys.write_config(one, more=f"{plain.format(2)}\n{EMA}"))
    together, alone = toys.saved(tmp_path, "iter_20.pth"), toys.saved(one, "iter_20.pth")
    for key, value in alone["state_dict"].items():
        torch.testing.assert_close(together["state_dict"][key], value, rtol=1e-3, atol=1e-4)
    assert together["iks"]["controllers"] == alone["iks"]["controllers"]
    zeros, weights = zeros_and_weights(together["state_dict"])
    assert zeros == round(0.9 * weights)
    assert_same(loaded(tmp_path, "iter_20.iks", config), within(together["state_dict"], "generator"))


@pytest.mark.slow
def test_a_gan_in_two_processes_that_wrap_its_networks_apart_resumes(tmp_path):
    write_images(tmp_path, 4)
    more = GAN.format(
        model="SRGAN",
        generator="MSRResNet",
        more="upscale_factor=2",
        disc_steps=1,
        disc_init_steps=0,
        hooks=SEPARATE,
    )
    config = toys.write_config(tmp_path, EXPORT, more)
    toys.run_tool("train", config, "--launcher", "pytorch", folder=tmp_path, launcher=LAUNCHER)
    straight = toys.saved(tmp_path, "iter_20.pth")
    assert not any("threshold" in key for key in straight["state_dict"])
    zeros, weights = zeros_and_weights(straight["state_dict"])
    assert zeros == round(0.9 * weights) > 0
    assert_same(loaded(tmp_path, "iter_20.iks", config), within(straight["state_dict"], "generator"))
    (tmp_path / "work" / "last_checkpoint").write_text(str(tmp_path / "work" / "iter_10.pth"))
    arguments = [config, "--launcher", "pytorch", "--resume"]
    done = toys.run_tool("train", *arguments, folder=tmp_path, launcher=LAUNCHER)
    assert "resumed epoch: 0, iter: 10" in done.stdout + done.stderr
    for key in ("state_dict", "optimizer", "iks"):
        assert_same(toys.saved(tmp_path, "iter_20.pth")[key], straight[key], key)


@pytest.mark.parametrize("left", ["", "missing", "whole"])
def test_the_record_of_the_last_checkpoint_is_mended(left, tmp_path):
    write_images(tmp_path, 4)
    config = toys.write_config(tmp_path)
    toys.run(config)
    record = tmp_path / "work" / "last_checkpoint"
    names = {"": "", "missing": str(tmp_path / "work" / "iter_30.pth"), "whole": str(tmp_path / "work" / "iter_10.pth")}
    record.write_text(names[left])
    (tmp_path / "work" / ".iter_20.pth.iks-unfinished").write_text("half")
    (tmp_path / "work" / "best_PSNR_iter_99.pth").touch()
    toys.run(config, resume=True, train_cfg__max_iters=25)
    assert f"resumed epoch: 0, iter: {10 if left == 'whole' else 20}" in toys.log_of(tmp_path)
    assert not list((tmp_path / "work").glob(".*"))


def test_a_record_without_any_checkpoint_starts_from_the_beginning(tmp_path):
    write_images(tmp_path, 4)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "last_checkpoint").touch()
    toys.run(toys.write_config(tmp_path), resume=True)
    assert (tmp_path / "work" / "iter_20.pth").exists()


@pytest.mark.slow
def test_a_training_that_is_killed_at_random_moments_always_resumes(tmp_path):
    """`python tests/test_mmagic_start.py 10` does so 10 times."""
    kill_and_resume(tmp_path, kills=3)


def kill_and_resume(folder: Path, kills: int, seed: int = 0) -> None:
    """Kill a training `kills` times, each time resuming; compare its end with a straight run's."""
    write_images(folder, 4)
    iterations = 20 * kills
    length = f"train_cfg = dict(max_iters={iterations}, val_interval=100000)"
    often = "default_hooks = dict(checkpoint=dict(interval=2, out_dir=None, save_best=None, max_keep_ckpts=3))"
    config = toys.write_config(folder, more=f"{length}\n{often}\n{EMA}")
    chance = random.Random(seed)
    for _ in range(kills):
        before = newest(folder)
        process, log = start(config, folder)
        deadline = time.monotonic() + 120
        while newest(folder) <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.4))
        assert process.poll() is None, log.read_text()[-3000:]
        process.kill()
        process.wait()
        check_resumed_from(before, log)
        for path in (folder / "work").glob("*.pth"):
            torch.load(path)  # it is whole
        print(f"killed: {before} -> {newest(folder)}")
    before = newest(folder)
    process, log = start(config, folder)
    assert process.wait() == 0, log.read_text()[-3000:]
    check_resumed_from(before, log)
    resumed = toys.saved(folder, f"iter_{iterations}.pth")
    straight = folder / "straight"
    straight.mkdir()
    write_images(straight, 4)
    toys.run(toys.write_config(straight, more=f"{length}\n{often}\n{EMA}"))
    expected = toys.saved(straight, f"iter_{iterations}.pth")
    for key in ("state_dict", "ema_state_dict", "optimizer", "iks"):
        assert_same(resumed[key], expected[key], key)


def start(config: Path, folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    log = folder / "output.txt"
    script = folder / "train.py"
    script.write_text(
        f"{toys.PRELUDE}\nfrom mmengine.config import Config\nfrom mmengine.runner import Runner\n"
        f"cfg = Config.fromfile({str(config)!r})\ncfg.resume = True\nRunner.from_cfg(cfg).train()\n"
    )
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    return process, log


def newest(folder: Path) -> int:
    return max((int(path.stem.split("_")[1]) for path in (folder / "work").glob("iter_*.pth")), default=0)


def check_resumed_from(iteration: int, log: Path) -> None:
    text = log.read_text()
    assert "Traceback" not in text, text[-3000:]
    found = re.search(r"resumed epoch: \d+, iter: (\d+)", text)
    if iteration and found:
        # The newest checkpoint, or the one before it where the process was killed before it was recorded.
        assert iteration - 2 <= int(found[1]) <= iteration, text[-3000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        kill_and_resume(Path(scratch), kills=int(sys.argv[1]))
