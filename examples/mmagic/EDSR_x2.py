"""EDSR x2, small, 90 % sparse: the plain case.

python $TOOLS/train.py EDSR_x2.py   # TOOLS and the data: README.md
"""

_base_ = ["mmagic::edsr/edsr_x2c64b16_1xb16-300k_div2k.py", "./_small.py"]

custom_imports = {"imports": ["iks_mmagic"]}
# 90 % of the weights of all convolutions but those that face the image; beside every checkpoint a compact iter_*.iks
iks = {"target_sparsity": 0.9, "export": True}

model = {"generator": {"mid_channels": 32, "num_blocks": 6}}

experiment_name = "EDSR_x2"
work_dir = "work_dirs/EDSR_x2"
train_dataloader = dict(batch_size=4, **_base_.x2.train)
val_dataloader = test_dataloader = _base_.x2.val
val_evaluator = test_evaluator = _base_.x2.evaluator
train_cfg = _base_.small.train_cfg
optim_wrapper = _base_.small.optim_wrapper
param_scheduler = _base_.small.param_scheduler
default_hooks = _base_.small.default_hooks
custom_hooks = _base_.small.custom_hooks
randomness = _base_.small.randomness
