"""MSRResNet x4 (the generator of SRGAN), small, 80 % sparse: the shortest form of the entry.

python $TOOLS/train.py MSRResNet_x4.py   # TOOLS and the data: README.md
"""

_base_ = ["mmagic::srgan_resnet/msrresnet_x4c64b16_1xb16-1000k_div2k.py", "./_small.py"]

custom_imports = {"imports": ["iks_mmagic"]}
iks = 0.8  # short for dict(target_sparsity=0.8)

model = {"generator": {"mid_channels": 32, "num_blocks": 6}}

experiment_name = "MSRResNet_x4"
work_dir = "work_dirs/MSRResNet_x4"
train_dataloader = dict(batch_size=2, **_base_.x4.train)
val_dataloader = test_dataloader = _base_.x4.val
val_evaluator = test_evaluator = _base_.x4.evaluator
train_cfg = _base_.small.train_cfg
optim_wrapper = _base_.small.optim_wrapper
param_scheduler = _base_.small.param_scheduler
default_hooks = _base_.small.default_hooks
custom_hooks = _base_.small.custom_hooks
randomness = _base_.small.randomness
