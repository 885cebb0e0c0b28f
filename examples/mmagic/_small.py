"""What makes MMagic's own configs small enough for one CPU thread and the data of make_data.py: no config by itself.

MMEngine lets no two bases define the same key, so what stands here has names of its own (`small`, `x2`, `x4`), and the
configs beside this file take it by them, as in `train_cfg = _base_.small.train_cfg`.
"""


def data(scale):
    """Both folders of images, and PSNR on the Y channel of those that were held out."""
    prefix = {"img": f"LRx{scale}", "gt": "HR"}
    load = [
        {"type": "LoadImageFromFile", "key": key, "channel_order": "rgb", "imdecode_backend": "cv2"} for key in prefix
    ]
    held_out = {
        "type": "BasicImageDataset",
        "metainfo": {"dataset_type": "held-out", "task_name": "sisr"},
        "data_root": "data/val",
        "data_prefix": prefix,
        "pipeline": [*load, {"type": "PackInputs"}],
    }
    return {
        "train": {"num_workers": 0, "dataset": {"ann_file": "", "data_root": "data/train", "data_prefix": prefix}},
        "val": {
            "_delete_": True,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": held_out,
        },
        "evaluator": {
            "_delete_": True,
            "type": "Evaluator",
            "metrics": [{"type": "PSNR", "crop_border": scale, "convert_to": "Y"}],
        },
    }


x2 = data(2)
x4 = data(4)
small = {
    "train_cfg": {"max_iters": 600, "val_interval": 200},
    "optim_wrapper": {"optimizer": {"lr": 1e-3}},
    "param_scheduler": {
        "_delete_": True,
        "type": "CosineAnnealingLR",
        "by_epoch": False,
        "T_max": 600,
        "eta_min": 1e-6,
    },
    "default_hooks": {
        # Into work_dir, and without the best_PSNR_*.pth that MMagic's own configs save besides.
        "checkpoint": {"interval": 200, "out_dir": None, "save_best": None},
        "logger": {"interval": 50},
    },
    # In the checkpoint, state_dict is the average then. 0.001 in trainings that are a hundred times as long.
    "custom_hooks": [{"type": "EMAHook", "momentum": 0.01}],
    "randomness": {"seed": 0},
}
