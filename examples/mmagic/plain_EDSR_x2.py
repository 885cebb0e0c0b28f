"""Test what EDSR_x2.py has trained. The network is a plain one, so the plug-in is not here.

python $TOOLS/test.py plain_EDSR_x2.py work_dirs/EDSR_x2/iter_600.pth
"""

_base_ = ["mmagic::edsr/edsr_x2c64b16_1xb16-300k_div2k.py", "./_small.py"]

model = {"generator": {"mid_channels": 32, "num_blocks": 6}}

experiment_name = "plain_EDSR_x2"
work_dir = "work_dirs/plain_EDSR_x2"
val_dataloader = test_dataloader = _base_.x2.val
val_evaluator = test_evaluator = _base_.x2.evaluator
train_cfg = train_dataloader = optim_wrapper = param_scheduler = None  # nor is the training: MMagic would load its data
