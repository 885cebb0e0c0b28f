"""Wrong `iks:` blocks and files that do not fit are refused before anything is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import basicsr_toys as toys
import iks_plugin
from iks_basicsr.block import optimizer_steps, read_block
from iks_plugin import IksError, OptionError

WRONG: dict[str, tuple[Any, str]] = {
    "empty": (None, r"block iks: it is empty: name the sparsity that you want, such as\s+iks:\s+target_sparsity: 0.9"),
    "no goal": ({}, "block iks: sparsify needs a goal, got none: give target_sparsity"),
    "percent": (
        {"target_sparsity": 90},
        r"block iks: target_sparsity must be a number in \[0, 1\), got 90: did you mean 0.9",
    ),
    "bare percent": (90, r"block iks: target_sparsity must be a number in \[0, 1\), got 90: did you mean 0.9"),
    "text": ("9e-1", r"block iks: target_sparsity must be .* got the text '9e-1': write 0.9, as a number"),
    "list": ([0.9], r"block iks: expected options, got \[0.9\]: write"),
    "switch": (True, "block iks: expected options, got True: write"),
    "quoted": ({"target_sparsity": "0.9"}, "got the text '0.9': write 0.9, as a number"),
    "no name": ({0.9: None}, r"block iks: expected names of options, got 0.9: write\s+iks:"),
    "unknown": ({"target_sparsity": 0.9, "granularty": "kernel"}, "'granularty': did you mean 'granularity'"),
    "unknown, unlike any": ({"target_sparsity": 0.9, "zzz": 1}, "'zzz': expected one of .*'export', .*'network', "),
    "unknown, ours": ({"target_sparsity": 0.9, "netwrok": "network_g"}, "no option 'netwrok': did you mean 'network'"),
    "granularity": ({"target_sparsity": 0.9, "granularity": "kernels"}, "got 'kernels': did you mean 'kernel'"),
    "budget": ({"max_bytes": "500 pages"}, "block iks: max_bytes must be a number of bytes, .* got '500 pages'"),
    "two types": (
        {"max_bytes": "500KB", "value_dtype": "int8", "export": "float16"},
        "export is 'float16', and max_bytes counts for .* value_dtype='int8': write export: true",
    ),
    "export": (
        {"target_sparsity": 0.9, "export": "float8"},
        "export must be true, false or the type .* 'int8'\\), got 'float8': did you mean 'float",
    ),
    "export, quoted": ({"target_sparsity": 0.9, "export": "True"}, "got 'True': write true, without quotation marks"),
    "export, a path": (
        {"target_sparsity": 0.9, "export": "out/edsr.iks"},
        "got 'out/edsr.iks': write true for float32",
    ),
    "export, a number": ({"target_sparsity": 0.9, "export": 16}, "export must be true, .* got 16: write true"),
    "export, misspelt": ({"target_sparsity": 0.9, "exprot": True}, "no option 'exprot': did you mean 'export'"),
    "network": (
        {"target_sparsity": 0.9, "network": "network_q"},
        r"network: the option file has no 'network_q' \(it has network_g\): did you mean 'network_g'",
    ),
    "network type": (
        {"target_sparsity": 0.9, "network": 3},
        "network must be the name of a network or a list of them, such as 'network_g', got 3",
    ),
    "network, empty": (
        {"target_sparsity": 0.9, "network": ""},
        "network must be the name of a network or a list of them, such as 'network_g', got ''",
    ),
    "network, one empty": (
        {"target_sparsity": 0.9, "network": ["network_g", " "]},
        r"network must be the name of a network .*, got \['network_g', ' '\]",
    ),
    "no network": ({"target_sparsity": 0.9, "network": []}, r"network must be the name of a network.*got \[\]"),
    "long ramp": ({"target_sparsity": 0.9, "ramp_steps": 21}, r"ramp_steps must be at most total_steps \(20\), got 21"),
    "long total": (
        {"target_sparsity": 0.9, "total_steps": 21},
        "total_steps is 21, and the training has 20 steps: leave it out, and it follows from train: total_iter",
    ),
    "law without epochs": (
        {"target_sparsity": 0.9, "law": "paper"},
        "give epoch_steps, the optimizer steps of one epoch",
    ),
}


def experiment_of_another_day(folder: Path) -> Path:
    kept = folder / "experiments" / "run" / "models" / "net_g_latest.pth"
    kept.parent.mkdir(parents=True)
    kept.write_text("precious")
    return kept


@pytest.mark.parametrize(("block", "message"), WRONG.values(), ids=WRONG)
def test_wrong_blocks_are_refused_before_a_folder_is_touched(block, message, tmp_path):
    kept = experiment_of_another_day(tmp_path)
    opt = toys.options(tmp_path)
    opt["iks"] = block
    with pytest.raises(OptionError, match=message) as caught:
        toys.train(opt, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'run.yml'}, block iks: ")
    assert kept.read_text() == "precious" and sorted(path.name for path in (tmp_path / "experiments").iterdir()) == [
        "run"
    ]


@pytest.mark.parametrize("content", [0.9, {"target_sparsity": 0.9}, {"target_sparsity": 0.9, "export": True}, None])
@pytest.mark.parametrize("name", ["IKS", "isk", "ikss", "ik", "iks_", "iks-plugin", "Iks_Basicsr", "target_sparsity"])
def test_a_misspelt_block_is_refused(name, content, tmp_path):
    opt = toys.options(tmp_path, iks=None)
    opt[name] = content
    with pytest.raises(OptionError, match=f"run.yml: there is no block '{name}': did you mean 'iks'"):
        toys.train(opt, tmp_path)
    assert not (tmp_path / "experiments").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("sparsity", 0.5), ("ski", "a text"), ("isp", {"gain": 2}), ("sparse_loss", {"weight": 0.1})]
)
def test_blocks_of_other_codebases_are_none_of_ours(name, content, tmp_path):
    opt = {**toys.options(tmp_path, iks=None), "is_train": True, name: content}
    assert read_block(opt) is None


@pytest.mark.parametrize("total", [None, "5e5", [1]])
def test_a_training_of_unknown_length_is_refused(total, tmp_path):
    opt = {**toys.options(tmp_path, train={"total_iter": total}), "is_train": True}
    with pytest.raises(OptionError, match="train: total_iter must be the number of iterations, got"):
        read_block(opt)


def test_options_without_a_value_are_left_to_their_defaults(tmp_path):
    block = read_block({**toys.options(tmp_path, iks={"target_sparsity": 0.9, "total_steps": None}), "is_train": True})
    assert block is not None and block.options == {"target_sparsity": 0.9}


def test_testing_does_not_mind_networks_that_it_has_not(tmp_path):
    opt = toys.options(tmp_path, iks={"target_sparsity": 0.9, "network": ["network_g", "network_d"]})
    assert read_block({**opt, "is_train": False}) is not None


@pytest.mark.parametrize("place", [("train",), ("network_g",), ("path",), ("datasets", "train")], ids=" ".join)
@pytest.mark.parametrize("name", ["iks", "target_sparsity"])
def test_a_block_in_the_wrong_place_is_refused(name, place, tmp_path):
    opt = toys.options(tmp_path, iks=None)
    inner = opt
    for key in place:
        inner = inner[key]
    inner[name] = {"target_sparsity": 0.9} if name == "iks" else 0.9
    message = f"{name}.* lies within '{': '.join(place)}': move it to the top level"
    with pytest.raises(OptionError, match=message):
        toys.train(opt, tmp_path)
    assert not (tmp_path / "experiments").exists()


def test_an_option_of_a_network_may_have_the_name_of_ours(tmp_path):
    opt = {**toys.options(tmp_path), "is_train": True}
    opt["network_g"]["target_sparsity"] = 0.5
    assert read_block(opt) is not None


@pytest.mark.parametrize("block", [0.9, {"target_sparsity": 0.9}, {"target_sparsity": 0.9, "network": "network_g"}])
def test_a_bare_number_is_the_target(block, tmp_path):
    found = read_block({**toys.options(tmp_path, iks=block), "is_train": True})
    assert found is not None
    assert found.networks == ("network_g",) and found.options == {"target_sparsity": 0.9}


@pytest.mark.parametrize(
    ("export", "value_dtype"),
    [
        *[(None, None), (False, None), (True, "float32"), (torch.float16, "float16")],
        *[(name, name) for name in ("float32", "float16", "bfloat16", "int8")],
    ],
)
def test_compact_files_are_asked_for_by_a_switch_or_by_the_type_of_their_values(export, value_dtype, tmp_path):
    block = read_block(toys.options(tmp_path, iks={"target_sparsity": 0.9, "export": export}))
    assert block is not None and block.export == value_dtype and block.options == {"target_sparsity": 0.9}


@pytest.mark.parametrize(
    "content",
    [
        {"max_bytes": "9KB", "export": "int8"},
        {"max_bytes": "9KB", "value_dtype": "int8", "export": True},
        {"max_bytes": "9KB", "value_dtype": torch.int8, "export": "int8"},
    ],
)
def test_a_size_is_that_of_the_files_that_are_written(content, tmp_path):
    block = read_block(toys.options(tmp_path, iks=content))
    assert block is not None and block.export == "int8"
    assert block.options["max_bytes"] == "9KB" and block.options["value_dtype"] in ("int8", torch.int8)


def test_without_a_block_there_is_nothing_to_read(tmp_path):
    assert read_block(toys.options(tmp_path, iks=None)) is None


@pytest.mark.parametrize(
    ("network", "train", "steps"),
    [
        ("network_g", {"total_iter": 100}, 100),
        ("network_g", {"total_iter": 5e4}, 50000),
        ("network_g", {"total_iter": 100, "net_d_iters": 2}, 50),
        ("network_g", {"total_iter": 100, "net_d_iters": 3, "net_d_init_iters": 10}, 30),
        ("network_g", {"total_iter": 100, "net_d_iters": None, "net_d_init_iters": None}, 100),
        ("network_d", {"total_iter": 100, "net_d_iters": 2, "net_d_init_iters": 10}, 100),
    ],
)
def test_steps_of_an_optimizer_of_a_gan(network, train, steps):
    counted = sum(
        1
        for step in range(1, int(train["total_iter"]) + 1)
        if network == "network_d"
        or (step % (train.get("net_d_iters") or 1) == 0 and step > (train.get("net_d_init_iters") or 0))
    )
    assert optimizer_steps(network, {"train": train, "network_d": toys.UNET_DISCRIMINATOR}) == steps == counted


@pytest.mark.parametrize("rest", [{}, {"network_d": None}])
def test_what_is_left_of_a_gan_in_the_options_of_another_model_skips_no_steps(rest):
    train = {"total_iter": 100, "net_d_iters": 2, "net_d_init_iters": 100}
    assert optimizer_steps("network_g", {"train": train, **rest}) == 100


def test_a_generator_that_is_never_trained_is_refused(tmp_path):
    opt = toys.options(tmp_path, **toys.adversarial("SRGANModel", net_d_init_iters=20))
    with pytest.raises(OptionError, match="network_g is never trained: of 20 iterations .* the first 20"):
        toys.train(opt, tmp_path)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"target_sparsity": 0.9, "include": "bodyy.*"}, r"block iks, network_g \(EDSR\): .*'bodyy\.\*'"),
        ({"target_sparsity": 0.9, "include": "body.0.relu"}, r"block iks, network_g \(EDSR\): "),
        ({"target_sparsity": 0.9999}, r"block iks, network_g \(EDSR\): .*none would be left"),
    ],
)
def test_what_only_the_network_can_tell_is_refused_when_it_is_built(block, message, tmp_path):
    toys.write_images(tmp_path)
    with pytest.raises(OptionError, match=message):
        toys.train(toys.options(tmp_path, iks=block), tmp_path)
    assert not list((tmp_path / "experiments" / "run" / "models").iterdir())


def trained(folder: Path, **changes: Any) -> dict[str, Any]:
    toys.write_images(folder)
    opt = toys.options(folder, **changes)
    toys.train(opt, folder)
    return opt


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


RESUMES: dict[str, tuple[Any, Any, str]] = {
    "of a dense training": (None, 0.9, r"20.state is of a training without the block iks.*pretrain_network_g"),
    "of a sparse training": (0.9, None, "20.state is of a sparse training, and the option file has no block iks"),
    "other granularity": (
        {"target_sparsity": 0.9, "granularity": "kernel"},
        {"target_sparsity": 0.9, "granularity": "filter"},
        "20.state: expected granularity 'filter' as in the block iks, got 'kernel': write granularity: kernel",
    ),
    "other law": (
        {"target_sparsity": 0.9, "law": "paper", "interval": 2},
        0.9,
        "20.state: expected law 'obs' as in the block iks, got 'paper': write law: paper",
    ),
}


@pytest.mark.parametrize(("before", "after", "message"), RESUMES.values(), ids=RESUMES)
def test_states_that_do_not_fit_are_refused_and_nothing_is_overwritten(before, after, message, tmp_path):
    opt = trained(tmp_path, iks=before)
    kept = contents(tmp_path / "experiments")
    opt.pop("iks", None)
    opt["train"]["total_iter"] = 30
    if after is not None:
        opt["iks"] = after
    with pytest.raises(IksError, match=message):
        toys.train(opt, tmp_path, "--auto_resume")
    assert contents(tmp_path / "experiments") == kept


def test_a_state_of_other_networks_is_refused(tmp_path):
    opt = trained(tmp_path, **toys.adversarial("SRGANModel"), iks={"target_sparsity": 0.9})
    opt["iks"]["network"] = ["network_g", "network_d"]
    with pytest.raises(IksError, match="that made network_g sparse, and the block iks names network_g, network_d"):
        toys.train(opt, tmp_path, "--auto_resume")


def test_a_state_of_another_version_is_refused(tmp_path):
    opt = trained(tmp_path)
    path = tmp_path / "experiments" / "run" / "training_states" / "20.state"
    state = torch.load(path, weights_only=False)
    state["iks"]["version"] = 99
    torch.save(state, path)
    with pytest.raises(IksError, match="20.state: expected version 1 of its entry iks, got 99"):
        toys.train(opt, tmp_path, "--auto_resume")
    for damage in ({"version": 1}, [], {**state["iks"], "version": 1, "networks": {"net_g": {}}}):
        torch.save({**state, "iks": damage}, path)
        with pytest.raises(IksError, match="20.state: its entry iks is damaged .*: resume from another state"):
            toys.train(opt, tmp_path, "--auto_resume")


@pytest.mark.parametrize("change", [{"include": "body.*"}, {"exclude": "upsample.*"}])
def test_a_state_of_other_layers_is_refused(change, tmp_path):
    opt = trained(tmp_path)
    opt["iks"] = {"target_sparsity": 0.9, **change}
    with pytest.raises(IksError, match="the training state does not fit net_g as the option file describes it"):
        toys.train(opt, tmp_path, "--auto_resume")


def test_a_checkpoint_whose_thresholds_do_not_fit_is_refused(tmp_path):
    from basicsr.archs import build_network

    net = build_network(toys.EDSR)
    iks_plugin.sparsify(net, 0.9, granularity="filter")
    path = tmp_path / "published.pth"
    torch.save({"params": net.state_dict()}, path)
    toys.write_images(tmp_path)
    opt = toys.options(tmp_path, path={"pretrain_network_g": str(path)})
    message = (
        r"does not fit the block iks .*: body.0.conv1.threshold expected \(8, 8, 3, 3\), got \(8, 1, 1, 1\): give the"
    )
    with pytest.raises(IksError, match=message):
        toys.train(opt, tmp_path)
    opt["path"]["strict_load_g"] = False
    opt["name"] = "relaxed"
    with pytest.raises(
        IksError, match="does not fit the block iks .*: give the granularity of the training that made it"
    ):
        toys.train(opt, tmp_path)
    opt["iks"] = {"target_sparsity": 0.9, "granularity": "filter"}
    opt["name"] = "fitting"
    assert "Save the latest model." in toys.train(opt, tmp_path)


@pytest.mark.parametrize(
    ("change", "prefix", "message"),
    [
        ({"num_feat": 12}, "", "size mismatch for conv_first.weight"),
        ({"num_block": 0}, "", 'Missing .*"body.0.conv1.weight", .*"body.0.conv1.threshold"'),
        ({"num_block": 2}, "", 'Unexpected .*"body.1.conv1.weight"'),
        ({}, "net.", 'Missing .*"conv_first.weight"'),
    ],
    ids=["wider", "fewer blocks", "more blocks", "other names"],
)
def test_dense_weights_that_do_not_fit_fail_as_in_basicsr(change, prefix, message, tmp_path):
    from basicsr.archs import build_network

    state = build_network({**toys.EDSR, **change}).state_dict()
    torch.save({"params": {f"{prefix}{key}": value for key, value in state.items()}}, tmp_path / "other.pth")
    toys.write_images(tmp_path)
    with pytest.raises(RuntimeError, match=message):
        toys.train(toys.options(tmp_path, path={"pretrain_network_g": str(tmp_path / "other.pth")}), tmp_path)


def test_thresholds_of_layers_that_the_block_leaves_alone_are_its_fault(tmp_path):
    from basicsr.archs import build_network

    net = build_network(toys.EDSR)
    iks_plugin.sparsify(net, 0.9)
    torch.save({"params": net.state_dict()}, tmp_path / "published.pth")
    toys.write_images(tmp_path)
    opt = toys.options(tmp_path, iks={"target_sparsity": 0.9, "exclude": "upsample.*"})
    opt["path"]["pretrain_network_g"] = str(tmp_path / "published.pth")
    with pytest.raises(
        IksError, match=r'(?s)published.pth does not fit the block iks .*Unexpected .*"upsample.0.threshold"'
    ):
        toys.train(opt, tmp_path)
