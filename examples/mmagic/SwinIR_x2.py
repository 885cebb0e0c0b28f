"""SwinIR x2, small, 60 % sparse in its convolutions and linear layers.

python $TOOLS/train.py SwinIR_x2.py   # TOOLS and the data: README.md
"""

_base_ = ["mmagic::swinir/swinir_x2s48w8d6e180_8xb4-lr2e-4-500k_div2k.py", "./_small.py"]

custom_imports = {"imports": ["iks_mmagic"]}
# Convolutions hold a fifth of the weights of the published SwinIR, and half of this small one's. Without layer_types
# only they become sparse.
iks = {"target_sparsity": 0.6, "layer_types": ["Conv2d", "Linear"]}

model = {
    "generator": {"depths": [2, 2], "embed_dim": 32, "num_heads": [4, 4], "upsampler": "pixelshuffledirect"},
}

experiment_name = "SwinIR_x2"
work_dir = "work_dirs/SwinIR_x2"
train_dataloader = dict(batch_size=2, **_base_.x2.train)
val_dataloader = test_dataloader = _base_.x2.val
val_evaluator = test_evaluator = _base_.x2.evaluator
train_cfg = _base_.small.train_cfg
optim_wrapper = _base_.small.optim_wrapper
param_scheduler = _base_.small.param_scheduler
default_hooks = _base_.small.default_hooks
custom_hooks = _base_.small.custom_hooks
randomness = _base_.small.randomness
