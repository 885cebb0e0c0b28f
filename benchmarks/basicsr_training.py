"""What an `iks:` block changes in a real BasicSR training: the PSNR, the files, and the iterations per second.

    python benchmarks/basicsr_training.py --train DIR --test-hr DIR --test-lr DIR --test-name '{}x2'
    python benchmarks/basicsr_training.py             # on photographs that come with scikit-image

One option file (examples/basicsr/EDSR_x2.yml, validated on the test images) is trained by BasicSR alone and, with its
block, by `python -m iks_basicsr`. The files of the sparse training are then tested in a process that has never imported
the plug-in. For the cost, EDSR with 16 blocks of 64 channels (batches of 16 crops of 48 x 48) is trained both ways in
turn for some iterations, and the time between the lines of BasicSR's log is compared.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

EXAMPLES = Path(__file__).parent.parent / "examples" / "basicsr"
LINES = 5
"""Iterations between two lines of the log in the measurement of the cost."""

UNTOUCHED = """
import importlib.util, os, sys
if importlib.util.find_spec("torchvision.transforms.functional_tensor") is None:  # as BasicSR needs it by itself
    import torchvision.transforms._functional_tensor as module
    sys.modules["torchvision.transforms.functional_tensor"] = module
from basicsr.{what} import {what}_pipeline
{what}_pipeline(os.getcwd())
assert not any(name.startswith("iks") for name in sys.modules)
"""


class Workplace:
    """A folder in which option files are written and BasicSR runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, opt: dict[str, Any], what: str = "train", untouched: bool = False) -> str:
        """Train or test, and return BasicSR's log."""
        path = self.folder / f"{opt['name']}.yml"
        path.write_text(yaml.safe_dump(opt))
        if untouched:
            script = self.folder / f"{what}.py"
            script.write_text(UNTOUCHED.format(what=what))
            command = [script]
        else:
            command = ["-m", "iks_basicsr", *(["--test"] if what == "test" else [])]
        print(f"{opt['name']}: {what}ing ...", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, *map(str, command), "-opt", str(path)], cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
        results = self.folder / ("experiments" if what == "train" else "results") / opt["name"]
        return next(results.glob("*.log")).read_text()

    def file(self, opt: dict[str, Any]) -> Path:
        return self.folder / "experiments" / opt["name"] / "models" / "net_g_latest.pth"


def psnr_in(log: str) -> float:
    return float(re.findall(r"# psnr: ([0-9.]+)", log)[-1])


def compare_quality(place: Workplace, opt: dict[str, Any]) -> list[str]:
    """Rows of a Markdown table: both trainings, and what an untouched BasicSR makes of the sparse one's files."""
    dense, sparse = copy.deepcopy(opt), copy.deepcopy(opt)
    dense["name"], sparse["name"] = "dense", "sparse"
    del dense["iks"]
    logs = {
        "dense": place.run(dense, untouched=True),
        "sparse": place.run(sparse),
    }
    rows = ["| | PSNR in BasicSR's log | tested by an untouched BasicSR | zeros in the rewritten layers |"]
    rows += ["|---|---|---|---|"]
    for name, of in (("dense", dense), ("sparse", sparse)):
        state = torch.load(place.file(of), map_location="cpu", weights_only=True)
        gated = gated_layers(logs["sparse"])
        counts = [count_zeros(params, gated) for params in state.values()]
        test = {
            **of,
            "name": f"{name}_tested",
            "datasets": {"test_1": of["datasets"]["val"]},
            "path": {"pretrain_network_g": str(place.file(of)), "param_key_g": "params_ema", "strict_load_g": True},
            "val": {**of["val"], "suffix": None},
        }
        test.pop("iks", None)
        tested = psnr_in(place.run(test, "test", untouched=True))
        zeros = "; ".join(f"{key}: {z:,} of {w:,}" for key, (z, w) in zip(state, counts, strict=True))
        rows.append(f"| {name} | {psnr_in(logs[name]):.4f} | {tested:.4f} | {zeros} |")
    return rows


def gated_layers(log: str) -> list[str]:
    """The names of the rewritten layers, out of the table in the log."""
    return re.findall(r"^(\S+) +Sparse\w+ ", log, re.MULTILINE)


def count_zeros(params: dict[str, torch.Tensor], layers: list[str]) -> tuple[int, int]:
    kernels = [params[f"{name}.weight"] for name in layers]
    return sum(int((kernel == 0).sum()) for kernel in kernels), sum(kernel.numel() for kernel in kernels)


def compare_cost(place: Workplace, opt: dict[str, Any], iterations: int, rounds: int) -> str:
    opt = copy.deepcopy(opt)
    opt["network_g"].update(num_feat=64, num_block=16)
    opt["datasets"]["train"].update(batch_size_per_gpu=16, gt_size=96)
    opt["train"].update(total_iter=iterations)
    opt["iks"].update(interval=10**6)  # the law's actions, as many in every training, are in training_cost.py
    opt["logger"].update(print_freq=LINES, save_checkpoint_freq=10**6)
    opt["val"] = None
    ratios, seconds = [], {"dense": 0.0, "sparse": 0.0}
    for number in range(rounds):
        times = {}
        for name in ("dense", "sparse"):
            one = {**opt, "name": f"cost_{name}_{number}"}
            if name == "dense":
                one.pop("iks")
            times[name] = seconds[name] = seconds_per_iteration(place.run(one, untouched=name == "dense"))
        ratios.append(times["dense"] / times["sparse"])
    listed = ", ".join(f"{ratio:.3f}" for ratio in sorted(ratios))
    return (
        f"iterations per second with the block, against without: {statistics.median(ratios):.3f} (median of {rounds} "
        f"rounds of {iterations} iterations: {listed}; in the last, {seconds['dense']:.3f} s per iteration without and "
        f"{seconds['sparse']:.3f} s with it)"
    )


def seconds_per_iteration(log: str) -> float:
    """The median, without the first lines, in which memory and caches settle."""
    stamps = re.findall(r"^(\S+ \S+),(\d+) INFO: \[.*iter: +[\d,]+, lr", log, re.MULTILINE)
    times = [
        datetime.datetime.strptime(second, "%Y-%m-%d %H:%M:%S").timestamp() + int(thousandths) / 1000
        for second, thousandths in stamps
    ]
    steps = [after - before for before, after in itertools.pairwise(times[1:])]
    return statistics.median(steps) / LINES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, metavar="DIR", help="images to train on (HR)")
    parser.add_argument("--test-hr", type=Path, metavar="DIR", help="images to validate on (HR)")
    parser.add_argument("--test-lr", type=Path, metavar="DIR", help="the same images at half the size")
    parser.add_argument(
        "--test-name", default="{}", metavar="TEMPLATE", help="names in --test-lr (default: %(default)s)"
    )
    parser.add_argument("--iterations", type=int, default=1200, help="of the two trainings, 0 for none (%(default)s)")
    parser.add_argument("--cost-iterations", type=int, default=60, help="of each training for the cost (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=4, help="trainings of each kind for the cost, 0 for none (%(default)s)"
    )
    options = parser.parse_args()
    if (options.test_hr is None) != (options.test_lr is None):
        parser.error("give --test-hr and --test-lr together")
    if options.rounds and options.cost_iterations < 4 * LINES:
        parser.error(
            f"--cost-iterations must be at least {4 * LINES}, got {options.cost_iterations}; --rounds 0 is without"
        )

    opt = yaml.safe_load((EXAMPLES / "EDSR_x2.yml").read_text().replace("!!float ", "").replace("!!int ", ""))
    opt["train"]["optim_g"]["lr"] = float(opt["train"]["optim_g"]["lr"])
    opt["train"]["scheduler"].update(periods=[max(options.iterations, options.cost_iterations)], eta_min=1e-6)
    opt["train"]["total_iter"] = options.iterations
    if options.test_hr is not None:
        opt["datasets"]["val"].update(
            dataroot_gt=str(options.test_hr.resolve()),
            dataroot_lq=str(options.test_lr.resolve()),
            filename_tmpl=options.test_name,
        )
    with tempfile.TemporaryDirectory() as folder:
        source = ["--source", str(options.train.resolve())] if options.train else []
        make = [sys.executable, str(EXAMPLES / "make_data.py"), "--out", str(Path(folder, "data")), *source]
        subprocess.run(make, check=True, stdout=sys.stderr)
        place = Workplace(Path(folder))
        print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads\n")
        if options.iterations:
            print("\n".join(compare_quality(place, opt)), flush=True)
        if options.rounds:
            print("\n" + compare_cost(place, opt, options.cost_iterations, options.rounds))


if __name__ == "__main__":
    main()
