"""Tiny real trainings of MMagic: images, configs, and starting them in this process or in one of their own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PRELUDE = """
import importlib.util, sys, types
if importlib.util.find_spec("mmcv") and importlib.util.find_spec("mmcv._ext") is None:
    def missing(name):
        if name.startswith("__"):
            raise AttributeError(name)
        def function(*args, **kwargs):
            raise NotImplementedError(f"mmcv._ext.{name}: mmcv-lite has no compiled operations")
        return function
    module = types.ModuleType("mmcv._ext")
    module.__spec__ = importlib.util.spec_from_loader("mmcv._ext", None)
    module.__getattr__ = missing
    sys.modules["mmcv._ext"] = module

from yapf.yapflib import yapf_api
format_code, formatted = yapf_api.FormatCode, {}
def format_once(text, **style):
    if text not in formatted:
        formatted[text] = format_code(text, **style)
    return formatted[text]
for module in (yapf_api, sys.modules.get("mmengine.config.config")):
    if module is not None:
        module.FormatCode = format_once
"""
"""What comes before MMagic in each process.

Where mmcv has no compiled operations (mmcv-lite): functions that raise when they are called, and none is; MMagic has
them all imported, also for networks that use none of them. And each text of a config is formatted once: yapf formats
the same one for each checkpoint of MMEngine and each start, which is most of the time of a tiny training.
"""

exec(PRELUDE)

RUNS = itertools.count()

PARENT = "mmagic::edsr/edsr_x2c64b16_1xb16-300k_div2k.py"
CONFIG = """
_base_ = ["{parent}"]
{imports}
experiment_name = "run"
work_dir = r"{folder}/work"
save_dir = r"{folder}/work"
model = dict(generator=dict(mid_channels=8, num_blocks=1))
crop = dict(type="PairedRandomCrop", gt_patch_size=32)
load = [dict(type="LoadImageFromFile", key=key, channel_order="rgb", imdecode_backend="cv2") for key in ("img", "gt")]
train_pipeline = [*load, dict(type="SetValues", dictionary=dict(scale=2)), crop, dict(type="PackInputs")]
images = dict(ann_file="", data_root=r"{folder}", data_prefix=dict(img="LR", gt="HR"))
train_dataloader = dict(num_workers=0, batch_size=2, dataset=dict(pipeline=train_pipeline, **images))
test_dataloader = val_dataloader = dict(
    _delete_=True,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BasicImageDataset",
        metainfo=dict(dataset_type="set5", task_name="sisr"),
        pipeline=[*load, dict(type="PackInputs")],
        **images,
    ),
)
val_evaluator = dict(_delete_=True, type="Evaluator", metrics=[dict(type="PSNR", crop_border=2)])
test_evaluator = val_evaluator
train_cfg = dict(max_iters=20, val_interval=10)
default_hooks = dict(
    checkpoint=dict(interval=10, out_dir=None, save_best="PSNR"), logger=dict(interval=5)
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = dict(milestones=[15])
randomness = dict(seed=0)
custom_hooks = []
visualizer = dict(type="ConcatImageVisualizer", vis_backends=[dict(type="LocalVisBackend")], img_keys=["gt_img"])
env_cfg = dict(dist_cfg=dict(backend="gloo"))
{more}
"""


def epochs(count: int, batch_size: int = 2, accumulated: int = 1, folder: str | None = None) -> str:
    """Text at the end of a config that makes its training one of `count` epochs, with a checkpoint after each.

    Args:
        folder: of the training images, in place of the config's.
    """
    images = "images" if folder is None else f"{{**images, 'data_root': {folder!r}}}"
    return f"""
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs={count})
train_dataloader = dict(num_workers=0, batch_size={batch_size}, sampler=dict(type="DefaultSampler"),
                        dataset=dict(pipeline=train_pipeline, **{images}))
optim_wrapper = dict(accumulative_counts={accumulated}, optimizer=dict(lr=1e-3))
default_hooks = dict(checkpoint=dict(interval=1, by_epoch=True, out_dir=None, save_best=None))
"""


def write_config(
    folder: Path, iks: Any = "dict(target_sparsity=0.9)", more: str = "", parent: str = PARENT, name: str = "config.py"
) -> Path:
    """A config that inherits MMagic's own and trains on the images in `folder`, without any randomness in its data.

    Args:
        iks: Python text of the entry `iks`; None leaves the plug-in out.
        more: Python text at its end.
    """
    imports = "" if iks is None else f'custom_imports = dict(imports=["iks_mmagic"])\niks = {iks}'
    path = folder / name
    path.write_text(CONFIG.format(parent=parent, imports=imports, folder=folder, more=more))
    return path


def run(config: Path, what: str = "train", **changes: Any) -> Any:
    """Train or test in this process; `changes` are as on the command line. Returns the runner."""
    runner = built(config, **changes)
    getattr(runner, what)()
    return runner


def built(config: Path, **changes: Any) -> Any:
    """A runner that has not run yet, under a name of its own.

    MMEngine adds the second to a name; of two runners with one name in one second, the later would get the logger (so
    write no log of its own), the message hub and the visualizer of the earlier.
    """
    from mmengine.config import Config
    from mmengine.runner import Runner

    torch.manual_seed(0)
    cfg = Config.fromfile(str(config))
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    cfg.experiment_name = f"run{next(RUNS)}"
    return Runner.from_cfg(cfg)


def run_tool(
    tool: str, *arguments: str | Path, folder: Path, check: bool = True, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run MMagic's own tools/train.py or tools/test.py in a process of its own, on one thread."""
    import mmagic

    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(PRELUDE)
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    script = Path(mmagic.__file__).parent / ".mim" / "tools" / f"{tool}.py"
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def saved(folder: Path, name: str) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "work" / name, map_location="cpu")
    return checkpoint


def log_of(folder: Path) -> str:
    return max((folder / "work").glob("*/*.log"), key=lambda path: path.stat().st_mtime_ns).read_text()
