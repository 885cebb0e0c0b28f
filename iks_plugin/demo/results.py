"""What a run of the demo leaves behind: files in a folder, and lines on the screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import IksError
from ..model_file import save
from .outcome import Outcome
from .pictures import draw_side_by_side
from .training import Learner

Say = Callable[[str], None]

RESULTS = "results.json"
SIDE_BY_SIDE = "side-by-side.png"
LAYERS = "layers.png"
STATE_DICTS = {"dense": "dense.pth", "sparse": "sparse.pth"}
COMPACT = "sparse.iks"


def say_aloud(text: str) -> None:
    """Print `text` at once, also into a pipe."""
    print(text, flush=True)


def make_folder(out: Path) -> Path:
    """Make the folder `out` where it does not exist, and make sure that files can be written to it.

    Raises:
        IksError: they cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / RESULTS
        existed = probe.exists()
        probe.open("a").close()
        if not existed:
            probe.unlink()
    except OSError as error:
        raise IksError(f"cannot write to --out {out} ({error}): name a folder that can be written to") from error
    return out


def write(outcome: Outcome, learners: dict[str, Learner], folder: Path) -> dict[str, str]:
    """Write everything, what took longest to make first. Returns each file's name with what it holds."""
    written = {}
    for name, learner in learners.items():
        file = STATE_DICTS[name]
        torch.save(learner.network.state_dict(), folder / file)
        written[file] = f"state dict of the {name} network, {_size(folder / file):,} bytes"
    if "sparse" in learners:
        save(learners["sparse"].network, folder / COMPACT)
        smaller = _size(folder / STATE_DICTS["dense"]) / _size(folder / COMPACT)
        written[COMPACT] = f"the same in a compact file, {_size(folder / COMPACT):,} bytes, {smaller:.1f} times smaller"
    (folder / RESULTS).write_text(json.dumps(outcome.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    written[RESULTS] = "all figures"
    draw_side_by_side(outcome, folder / SIDE_BY_SIDE)
    written[SIDE_BY_SIDE] = "the held-out photographs, enlarged by each"
    if outcome.report is not None:
        outcome.report.plot(folder / LAYERS)
        written[LAYERS] = "zeros per layer"
    return written


def tell(outcome: Outcome, folder: Path, written: dict[str, str], seconds: float, say: Say) -> None:
    """Say what came out, what `write` has written, and what an interrupt has cut short."""
    say(f"\n{outcome.table()}")
    if outcome.report is not None:
        say(f"\n{outcome.summary()}")
    for note in outcome.notes:
        say(f"note: {note}")
    say(f"\nwritten to {folder} in {seconds:.0f} s:")
    for name, what in written.items():
        say(f"  {name:<18}{what}")
    older = [
        name for name in (*STATE_DICTS.values(), COMPACT, LAYERS) if name not in written and (folder / name).exists()
    ]
    if older:
        say(f"  {', '.join(older)}: left there by an earlier run, not by this one")
    if outcome.interrupted:
        say(_interruption(outcome))


def _size(path: Path) -> int:
    return path.stat().st_size


def _interruption(outcome: Outcome) -> str:
    done = {candidate.name: candidate.steps for candidate in outcome.candidates if candidate.steps is not None}
    total = outcome.recipe.steps
    if "sparse" not in done:
        return (
            f"interrupted at step {done['dense']:,} of {total:,}, before a sparse network was begun: "
            "the figures are those of a half-trained dense network alone"
        )
    if min(done.values()) < total:
        reached = outcome.report.sparsity if outcome.report else 0.0
        return (
            f"interrupted at step {min(done.values()):,} of {total:,}: the figures are those of half-trained networks, "
            f"and the sparse one had {reached:.2%} zeros by then"
        )
    return "interrupted after the last training step: nothing is missing"
