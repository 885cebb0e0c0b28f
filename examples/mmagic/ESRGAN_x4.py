"""ESRGAN x4, small, its generator 80 % sparse: two networks and two optimizers.

python $TOOLS/train.py ESRGAN_x4.py   # TOOLS and the data: README.md
"""

_base_ = ["mmagic::esrgan/esrgan_x4c64b23g32_1xb16-400k_div2k.py", "./_small.py"]

custom_imports = {"imports": ["iks_mmagic"]}
iks = {
    "target_sparsity": 0.8,
    "network": "generator",  # the default; a list makes more than one network sparse
}

# Without the perceptual loss and the trained generator to start from, which MMagic would download.
model = {
    "generator": {"mid_channels": 24, "num_blocks": 2, "growth_channels": 16, "init_cfg": None},
    "discriminator": {"mid_channels": 8},
    "perceptual_loss": None,
    "pixel_loss": {"loss_weight": 1.0},
    "gan_loss": {"loss_weight": 1e-4},
}

experiment_name = "ESRGAN_x4"
work_dir = "work_dirs/ESRGAN_x4"
train_dataloader = dict(batch_size=2, **_base_.x4.train)
val_dataloader = test_dataloader = _base_.x4.val
val_evaluator = test_evaluator = _base_.x4.evaluator
train_cfg = _base_.small.train_cfg
optim_wrapper = {"generator": _base_.small.optim_wrapper}  # the discriminator keeps its 1e-4
param_scheduler = _base_.small.param_scheduler
default_hooks = _base_.small.default_hooks
custom_hooks = _base_.small.custom_hooks
randomness = _base_.small.randomness
