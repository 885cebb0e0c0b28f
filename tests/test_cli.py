"""The `iks` command: in this process where that shows as much, and in one of its own where signals matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import iks_plugin
import toys
from iks_plugin.__main__ import INTERRUPTED, WRONG_USE, main

ROOT = Path(iks_plugin.__file__).parents[1]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "iks_plugin", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen[str], line_start: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(line_start):
            return
    pytest.fail(f"{line_start!r} was never printed")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"iks-plugin {iks_plugin.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["demo", "inspect", "export", "restore", "upscale", "bench", "--version"]),
        (["inspect", "--help"], ["FILE", "checksums", "--json"]),
        (
            ["export", "--help"],
            ["BasicSR", "MMagic", "--value-dtype", "(default: float32)", "--key", "--prefix", "--keep-thresholds"],
        ),
        (["restore", "--help"], ["without iks-plugin", "'params' for BasicSR"]),
        (["demo", "--help"], ["--data", "--quick", "(default: iks-demo)", "(default: 0.9)", "(default: 0)", "Ctrl-C"]),
    ],
)
def test_help_tells_commands_and_defaults(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [part for part in expected if part not in text] == []


def test_the_steps_that_help_tells_are_the_real_ones(capsys: pytest.CaptureFixture[str]) -> None:
    from iks_plugin.demo.recipe import QUICK_STEPS, STEPS

    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert f"(default: {STEPS}; {QUICK_STEPS} with --quick)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [[], ["dmeo"], ["demo", "--target", "most"], ["demo", "--no-such-option"]])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == WRONG_USE
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "90"], "did you mean 0.9?"),
        (["--target", "1"], "target_sparsity must be a number in [0, 1), got 1.0"),
        (["--steps", "3"], "steps must be a whole number of at least 20, got 3"),
        (["--seed", "-3"], "seed must be a whole number"),
        (["--threads", "0"], "threads must be a whole number of at least 1, got 0"),
        (["--data", "no-such-folder"], "--data no-such-folder does not exist"),
    ],
)
def test_errors_are_one_line_and_a_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["demo", "--quick", "--out", str(tmp_path / "out"), *arguments]) == WRONG_USE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("iks: error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_importing_the_package_imports_neither_the_demo_nor_what_it_needs() -> None:
    code = (
        "import sys, iks_plugin, iks_plugin.__main__\n"
        "loaded = {name.split('.')[0] for name in sys.modules} & {'PIL', 'skimage', 'matplotlib'}\n"
        "assert not loaded, loaded\n"
        "assert 'iks_plugin.demo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_quick_demo_in_its_own_process(tmp_path: Path) -> None:
    process = start("demo", "--quick", "--target", "0.75", "--out", str(tmp_path / "out"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""  # no progress bar in a pipe, no warning
    assert "astronaut  chelsea  coffee" in out
    assert "75.00% (target 75.00%)" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["sparse"]["rewritten"]["sparsity"] == 0.75
    assert results["photos"]["held_out"] == ["astronaut", "chelsea", "coffee"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "line", "candidates"),
    [
        (100_000, "training: steps 1 ", {"bicubic", "dense"}),
        (1000, "training: steps 201 ", {"bicubic", "dense", "sparse"}),
    ],
)
def test_ctrl_c_stops_the_training_and_writes_what_there_is(
    tmp_path: Path, steps: int, line: str, candidates: set[str]
) -> None:
    process = start("demo", "--quick", "--steps", str(steps), "--out", str(tmp_path / "out"))
    wait_for(process, line)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED
    assert err == ""
    assert "interrupted at step " in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["interrupted"] is True
    assert set(results["psnr_y"]) == candidates
    assert 0 < results["psnr_y"]["dense"]["steps"] < steps


@pytest.mark.slow
def test_a_second_ctrl_c_aborts(tmp_path: Path) -> None:
    process = start("demo", "--quick", "--steps", "100000", "--out", str(tmp_path / "out"))
    wait_for(process, "training: steps 1 ")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    wait_for(process, "interrupted: comparing")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED
    assert err == "iks: aborted\n"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.9)
    with pytest.warns(iks_plugin.IksWarning):  # it was not trained
        iks_plugin.finalize(model)
    torch.save({"params": toys.plain_sr().state_dict(), "params_ema": model.state_dict()}, tmp_path / "net_g.pth")
    return tmp_path / "net_g.pth"


def test_export_inspect_restore(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compact, restored = checkpoint.with_suffix(".iks"), checkpoint.with_name("restored.pth")
    assert main(["export", str(checkpoint), str(compact)]) == 0
    before, after = checkpoint.stat().st_size, compact.stat().st_size
    assert after < 0.3 * before
    assert (
        f"(params_ema): {before:,} bytes -> {compact}: {after:,} bytes, {after / before:.1%}" in capsys.readouterr().out
    )

    assert main(["inspect", str(compact)]) == 0
    out = capsys.readouterr().out
    assert "sparse weights (2): 4,147 of 4,608 are zero, 90.00%" in out
    assert out.rstrip().endswith("checksums: 7 of 7 are right")
    assert main(["inspect", str(compact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint_key"] == "params"

    assert main(["restore", str(compact), str(restored)]) == 0
    assert f"{compact} -> {restored}: 7 tensors under 'params', dense" in capsys.readouterr().out
    expected = torch.load(checkpoint, weights_only=True)["params_ema"]
    assert toys.states_equal(dict(torch.load(restored, weights_only=True)["params"]), dict(expected))
    assert main(["restore", str(compact), str(restored), "--key", "state_dict", "--prefix", "generator."]) == 0
    state = torch.load(restored, weights_only=True)["state_dict"]
    assert toys.states_equal(dict(state), {f"generator.{name}": tensor for name, tensor in expected.items()})
    assert main(["restore", str(compact), str(restored), "--key", ""]) == 0
    assert toys.states_equal(dict(torch.load(restored, weights_only=True)), dict(expected))


def test_restore_to_safetensors(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compact, restored = str(checkpoint.with_suffix(".iks")), str(checkpoint.with_name("net.safetensors"))
    assert main(["export", str(checkpoint), compact]) == 0
    assert main(["restore", compact, restored, "--key", "params"]) == WRONG_USE
    assert "--key params: a safetensors file has no keys: leave it out, or write a .pth" in capsys.readouterr().err
    assert not Path(restored).exists()
    assert main(["restore", compact, restored]) == 0
    assert f"{compact} -> {restored}: 7 tensors, dense" in capsys.readouterr().out
    assert toys.states_equal(load_file(restored), iks_plugin.load(compact))


def test_export_of_narrower_values_and_of_another_key(checkpoint: Path) -> None:
    sizes = {}
    for value_dtype in ("float32", "float16", "int8"):
        out = checkpoint.with_suffix(".iks")
        assert main(["export", str(checkpoint), str(out), "--value-dtype", value_dtype]) == 0
        sizes[value_dtype] = out.stat().st_size
    assert sizes["float16"] < sizes["float32"] and sizes["int8"] < sizes["float32"]
    assert main(["export", str(checkpoint), str(checkpoint.with_suffix(".iks")), "--key", "params"]) == 0
    assert checkpoint.with_suffix(".iks").stat().st_size > 2 * sizes["float32"]


@pytest.mark.parametrize("command", ["export", "restore"])
def test_nothing_is_written_over_what_is_read(
    command: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkpoint.read_bytes()
    link = checkpoint.with_name("link.pth")
    link.symlink_to(checkpoint)
    assert main([command, str(checkpoint), str(link)]) == WRONG_USE
    assert "expected another file to write than the one to read" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_thresholds_are_spoken_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5)
    torch.save(model.state_dict(), tmp_path / "gated.pth")
    assert main(["export", str(tmp_path / "gated.pth"), str(tmp_path / "gated.iks")]) == 0
    assert "the thresholds beside 2 weights, of a training with gates, are applied" in capsys.readouterr().out


def test_thresholds_of_the_networks_own_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"act.weight": torch.ones(1, 4, 1, 1), "act.threshold": torch.full((1, 4, 1, 1), 0.1)}
    torch.save(state, tmp_path / "own.pth")
    assert main(["export", str(tmp_path / "own.pth"), str(tmp_path / "own.iks"), "--keep-thresholds"]) == 0
    assert "thresholds beside" not in capsys.readouterr().out
    assert toys.states_equal(iks_plugin.load(tmp_path / "own.iks"), state)
    assert main(["export", str(tmp_path / "own.pth"), str(tmp_path / "own.iks")]) == 0
    assert "if they are the network's own: --keep-thresholds" in capsys.readouterr().out


def test_a_reader_that_has_had_enough(checkpoint: Path) -> None:
    compact = checkpoint.with_suffix(".iks")
    assert main(["export", str(checkpoint), str(compact)]) == 0
    command = f"{sys.executable} -m iks_plugin inspect --json {compact} | head -c 1"
    ran = subprocess.run(
        command, shell=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (ran.stdout, ran.stderr) == ("{", "")


def test_inspecting_a_damaged_file_is_an_error(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compact = checkpoint.with_suffix(".iks")
    main(["export", str(checkpoint), str(compact)])
    content = bytearray(compact.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 20] ^= 1  # past the container's header
    compact.write_bytes(content)
    assert main(["inspect", str(compact)]) == WRONG_USE
    captured = capsys.readouterr()
    assert "WRONG" in captured.out
    assert f"iks: error: {compact}: 1 tensors are damaged (0.weight): copy the file again" in captured.err
    assert main(["restore", str(compact), str(checkpoint.with_name("r.pth"))]) == WRONG_USE
    assert "The file is damaged" in capsys.readouterr().err
    assert not checkpoint.with_name("r.pth").exists()


LONG = "a" * 300


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", LONG],
        ["export", LONG, "o.iks"],
        ["export", "{checkpoint}", LONG],
        ["restore", LONG, "o.pth"],
        ["upscale", LONG, "o.png", "--model", "m.iks"],
        ["bench", LONG, "--arch", "toys:plain_sr"],
        ["demo", "--quick", "--data", LONG],
        ["demo", "--quick", "--out", LONG],
    ],
    ids=lambda command: " ".join(command).replace(LONG, "LONG"),
)
def test_names_that_are_too_long(command: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if command[0] == "upscale":
        pytest.importorskip("PIL")
    assert main([part.format(checkpoint=checkpoint) for part in command]) == WRONG_USE
    message = capsys.readouterr().err
    assert message.startswith("iks: error: ") and message.count("\n") == 1 and LONG in message


@pytest.mark.parametrize(
    "command", [["inspect", "no.iks"], ["export", "no.pth", "o.iks"], ["restore", "no.iks", "o.pth"]]
)
def test_files_that_are_not_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == WRONG_USE
    assert "found nothing: check the path" in capsys.readouterr().err
