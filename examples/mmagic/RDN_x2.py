"""RDN x2, small, 90 % sparse but for the 1 x 1 convolutions that fuse its dense blocks.

python $TOOLS/train.py RDN_x2.py   # TOOLS and the data: README.md
"""

_base_ = ["mmagic::rdn/rdn_x2c64b16_1xb16-1000k_div2k.py", "./_small.py"]

custom_imports = {"imports": ["iks_mmagic"]}
iks = {
    "target_sparsity": 0.9,
    "exclude": ["rdbs.*.lff", "gff.0"],  # shell patterns over module names; the log's table shows what they match
}

model = {"generator": {"mid_channels": 32, "num_blocks": 3, "num_layers": 4, "channel_growth": 16}}

experiment_name = "RDN_x2"
work_dir = "work_dirs/RDN_x2"
train_dataloader = dict(batch_size=4, **_base_.x2.train)
val_dataloader = test_dataloader = _base_.x2.val
val_evaluator = test_evaluator = _base_.x2.evaluator
train_cfg = _base_.small.train_cfg
optim_wrapper = _base_.small.optim_wrapper
param_scheduler = _base_.small.param_scheduler
default_hooks = _base_.small.default_hooks
custom_hooks = _base_.small.custom_hooks
randomness = _base_.small.randomness
