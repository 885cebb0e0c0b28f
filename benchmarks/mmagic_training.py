"""What an entry `iks` changes in a real MMagic training: the PSNR, the checkpoints, and the time per iteration.

    python benchmarks/mmagic_training.py --train DIR --test-hr DIR --test-lr DIR --test-name '{}x2'
    python benchmarks/mmagic_training.py             # on photographs that come with scikit-image

MMagic's own EDSR config is inherited, made small (6 blocks of 32 channels), and trained with and without the entry,
each in a process of its own. The sparse checkpoint is then tested by MMagic in a process that has never imported the
plug-in. For the cost, EDSR with 16 blocks of 64 channels (batches of 16 crops of 48 x 48) is trained both ways in turn
for some iterations, and the times in MMEngine's log are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

MAKE_DATA = Path(__file__).parent.parent / "examples" / "basicsr" / "make_data.py"
LINES = 5
"""Iterations between two lines of the log in the measurement of the cost."""

CONFIG = """
_base_ = ["mmagic::edsr/edsr_x2c64b16_1xb16-300k_div2k.py"]
{entry}
experiment_name = "{name}"
work_dir = r"{folder}/{name}"
save_dir = r"{folder}/{name}"
model = dict(generator=dict(mid_channels={channels}, num_blocks={blocks}))
load = [dict(type="LoadImageFromFile", key=key, channel_order="rgb", imdecode_backend="cv2") for key in ("img", "gt")]
flips = [dict(type="Flip", keys=["img", "gt"], flip_ratio=0.5, direction=way) for way in ("horizontal", "vertical")]
train_dataloader = dict(
    num_workers=1,
    batch_size={batch},
    dataset=dict(
        ann_file="",
        data_root=r"{folder}/data/train",
        data_prefix=dict(img="LRx2", gt="HR"),
        pipeline=[
            *load,
            dict(type="SetValues", dictionary=dict(scale=2)),
            dict(type="PairedRandomCrop", gt_patch_size={crop}),
            *flips,
            dict(type="PackInputs"),
        ],
    ),
)
test_dataloader = val_dataloader = dict(
    _delete_=True,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BasicImageDataset",
        metainfo=dict(dataset_type="set5", task_name="sisr"),
        data_root=r"{test_root}",
        data_prefix=dict(img=r"{test_lr}", gt=r"{test_hr}"),
        filename_tmpl=dict(img="{test_name}", gt="{{}}"),
        pipeline=[*load, dict(type="PackInputs")],
    ),
)
test_evaluator = val_evaluator = dict(
    _delete_=True, type="Evaluator", metrics=[dict(type="PSNR", crop_border=2, convert_to="Y")]
)
train_cfg = dict(max_iters={iterations}, val_interval={iterations})
default_hooks = dict(
    checkpoint=dict(interval={iterations}, out_dir=None, save_best=None), logger=dict(interval={lines})
)
log_processor = dict(window_size={lines})
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = dict(_delete_=True, type="CosineAnnealingLR", by_epoch=False, T_max={iterations}, eta_min=1e-6)
randomness = dict(seed=0)
custom_hooks = {hooks}
visualizer = dict(type="ConcatImageVisualizer", vis_backends=[dict(type="LocalVisBackend")], img_keys=["gt_img"])
"""

RUN = """
import importlib.util, sys, types
if importlib.util.find_spec("mmcv._ext") is None:  # mmcv-lite has no compiled operations; MMagic imports their names
    class StandIn(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *args, **kwargs: 1 / 0
    sys.modules["mmcv._ext"] = StandIn("mmcv._ext")
    sys.modules["mmcv._ext"].__spec__ = importlib.util.spec_from_loader("mmcv._ext", None)
from mmengine.config import Config
from mmengine.runner import Runner
config = Config.fromfile(sys.argv[1])
config.load_from = sys.argv[3] if len(sys.argv) > 3 else None
getattr(Runner.from_cfg(config), sys.argv[2])()
print("untouched", not any(name.startswith("iks") for name in sys.modules))
"""

ENTRY = 'custom_imports = dict(imports=["iks_mmagic"])\niks = dict(target_sparsity=0.9{more})'
EMA = '[dict(type="EMAHook", momentum=0.01)]'


class Workplace:
    """A folder in which configs are written and MMagic runs."""

    def __init__(self, folder: Path, **data: str) -> None:
        self._folder = folder
        self._data = data
        (folder / "run.py").write_text(RUN)

    def run(
        self,
        name: str,
        what: str = "train",
        checkpoint: Path | None = None,
        *,
        sparse: bool,
        more: str = "",
        **sizes: object,
    ) -> str:
        """Train or test, and return the output; `more` options go into the entry."""
        config = self._folder / f"{name}.py"
        entry = ENTRY.format(more=more) if sparse else ""
        config.write_text(
            CONFIG.format(name=name, entry=entry, folder=self._folder, lines=LINES, **self._data, **sizes)
        )
        print(f"{name}: {what}ing ...", file=sys.stderr, flush=True)
        command = [sys.executable, "run.py", str(config), what, *([str(checkpoint)] if checkpoint else [])]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True)
        output = done.stdout + done.stderr
        if done.returncode or f"untouched {not sparse}" not in output:
            sys.exit(output[-6000:])
        return output

    def checkpoint(self, name: str, iterations: int) -> Path:
        return self._folder / name / f"iter_{iterations}.pth"

    def seconds_per_iteration(self, name: str) -> float:
        """The median of the log's lines, without the first ones, in which memory and caches settle."""
        log = next((self._folder / name).rglob("scalars.json")).read_text().splitlines()
        times = [line["time"] for line in map(json.loads, log) if "loss" in line]
        return statistics.median(times[2:])


def psnr_in(output: str) -> float:
    return float(re.findall(r"PSNR: ([0-9.]+)", output)[-1])


def compare_quality(place: Workplace, iterations: int) -> list[str]:
    sizes = {"channels": 32, "blocks": 6, "batch": 8, "crop": 64, "iterations": iterations, "hooks": EMA}
    rows = ["| | PSNR in MMagic's log | tested by an untouched MMagic | zeros in the rewritten layers |"]
    rows += ["|---|---|---|---|"]
    logs = {name: place.run(name, sparse=name == "sparse", **sizes) for name in ("dense", "sparse")}
    gated = re.findall(r"^(\S+) +Sparse\w+ ", logs["sparse"], re.MULTILINE)
    for name, log in logs.items():
        path = place.checkpoint(name, iterations)
        saved = torch.load(path, map_location="cpu")
        tested = psnr_in(place.run(f"{name}_tested", "test", path, sparse=False, **sizes))
        counts = []
        for part, lead in (("state_dict", "generator."), ("ema_state_dict", "module.generator.")):
            kernels = [saved[part][f"{lead}{layer}.weight"] for layer in gated]
            zeros = sum(int((kernel == 0).sum()) for kernel in kernels)
            counts.append(f"{part}: {zeros:,} of {sum(kernel.numel() for kernel in kernels):,}")
        rows.append(f"| {name} | {psnr_in(log):.4f} | {tested:.4f} | {'; '.join(counts)} |")
    return rows


def compare_cost(place: Workplace, iterations: int, rounds: int) -> str:
    sizes = {"channels": 64, "blocks": 16, "batch": 16, "crop": 96, "iterations": iterations, "hooks": "[]"}
    ratios, seconds = [], {}
    for number in range(rounds):
        for kind in ("dense", "sparse"):
            name = f"cost_{kind}_{number}"
            # The law's actions, as many in every training, are in training_cost.py.
            place.run(name, sparse=kind == "sparse", more=", interval=10**6", **sizes)
            seconds[kind] = place.seconds_per_iteration(name)
        ratios.append(seconds["sparse"] / seconds["dense"])
    listed = ", ".join(f"{ratio:.3f}" for ratio in sorted(ratios))
    return (
        f"time per iteration with the entry, against without: {statistics.median(ratios):.3f} (median of {rounds} "
        f"rounds of {iterations} iterations: {listed}; in the last, {seconds['dense']:.3f} s without and "
        f"{seconds['sparse']:.3f} s with it)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, metavar="DIR", help="images to train on (HR)")
    parser.add_argument("--test-hr", type=Path, metavar="DIR", help="images to validate on (HR)")
    parser.add_argument("--test-lr", type=Path, metavar="DIR", help="the same images at half the size")
    parser.add_argument("--test-name", default="{}", metavar="TEMPLATE", help="of names in --test-lr (%(default)s)")
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

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = ["--source", str(options.train.resolve())] if options.train else []
        make = [sys.executable, str(MAKE_DATA), "--out", str(folder / "data"), *source]
        subprocess.run(make, check=True, stdout=sys.stderr)
        own = folder / "data" / "val"
        place = Workplace(
            folder,
            test_root="",
            test_hr=str((options.test_hr or own / "HR").resolve()),
            test_lr=str((options.test_lr or own / "LRx2").resolve()),
            test_name=options.test_name,
        )
        print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads\n")
        if options.iterations:
            print("\n".join(compare_quality(place, options.iterations)), flush=True)
        if options.rounds:
            print("\n" + compare_cost(place, options.cost_iterations, options.rounds))


if __name__ == "__main__":
    main()
