"""The laws that drive thresholds to a sparsity: formulas over numbers and tensors, without any state.

The law "obs" (`surgeon.py`) decides for each weight by its magnitude and by what its loss costs; the other two by its
magnitude alone.

A weight w with threshold t is zero iff |w| <= sigmoid(t). The law "paper" multiplies all thresholds by a ratio, as
published. The law "exact" adds one shift d to them: w is then zero iff d >= logit(|w|) - t, its critical shift, so the
shift that gives any wanted number of zeros is an order statistic of the critical shifts. Where all thresholds are
equal, adding and multiplying lead to the same gates. Adding keeps the differences that training has put between the
thresholds, and goes on working once a threshold is positive, where multiplying reverses its direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RAMP_SHARE = 0.6
"""Share of the steps from `ramp_start` on that the ramp of the exact law takes where its length is not given."""
DENSE_SHARE = 0.2
"""Share of its training after which a network from scratch had better begin to become sparse."""
RAMP_STEPS = 1000
"""Length of that ramp where the length of the training is not given either."""
EXACT_INTERVAL = 10
"""Steps between two actions of the exact law: at most 1 % of a training step is spent on them."""
SURGEON_ACTIONS = 25
"""Actions of the law "obs" within its ramp."""
MEASURED_STEPS = 12
"""Training steps before each of them in which the curvature is measured."""
UPDATE_POWER = 0.5
"""The law "obs" makes a layer's steps longer by its density to the power of -UPDATE_POWER, as fewer weights that
make up an output of the same variance are larger (He et al. 2015), ..."""
LONGEST_UPDATE = 20.0
"""... but by this factor at most."""
CLOSED = 8.0
"""Its threshold of a weight that has gone: sigmoid(8) = 0.9997 keeps it away whatever its optimizer's momentum does."""
PAPER_EPOCHS = 10
"""D of the paper: epochs between two actions, and at the end of the training without any."""
PAPER_RATE = 0.005
"""Change of the paper's ratio per percent of sparsity that is missing."""
PAPER_BAND = 1.0
"""The paper's law rests while the sparsity lies at most this many percent above the target."""

_SMALLEST = 1e-30
_LARGEST = 1 - 2.0**-24
_ROUNDING = 2e-6
"""More than float32 errs by when it adds a shift to a threshold near -12 and takes the sigmoid."""


@dataclass(frozen=True)
class ExactLaw:
    """Raise the sparsity along a cubic ramp, then hold the target; act every `interval` steps from the ramp's start on.

    The ramp begins after `ramp_start` steps and is `ramp_steps` long.
    """

    ramp_steps: int
    interval: int
    total_steps: int | None
    ramp_start: int = 0

    @property
    def ramp_end(self) -> int:
        """The step at which the target is met."""
        return self.ramp_start + self.ramp_steps

    def acts_at(self, step: int) -> bool:
        since = step - self.ramp_start
        return since > 0 and (since % self.interval == 0 or step in (self.ramp_end, self.total_steps))

    def has_arrived(self, step: int) -> bool:
        """Whether the ramp is over at `step`, so that a new target may be taken up at once."""
        return step >= self.ramp_end

    def wanted(self, step: int, start: float, target: float) -> float:
        """The sparsity at `step`: target + (start - target) * (1 - n / ramp_steps)^3 (Zhu & Gupta 2017, eq. 1).

        n are the steps since `ramp_start`, at which it is `start`.
        """
        left = min(1.0, max(0.0, 1 - (step - self.ramp_start) / self.ramp_steps))
        return target + (min(start, target) - target) * left**3


@dataclass(frozen=True)
class SurgeonLaw(ExactLaw):
    """The ramp of the exact law; which weights go, and what becomes of the others, follows from the curvature."""

    def measures_at(self, step: int) -> bool:
        """Whether the curvature is to be measured in the step after `step`: shortly before each action of the ramp."""
        ahead = range(step + 1, step + 1 + MEASURED_STEPS)
        return any(self.acts_at(later) and later <= self.ramp_end for later in ahead)

    def score(self, magnitude: Tensor, sensitivity: Tensor) -> Tensor:
        """|w| * sqrt(s), the geometric mean of |w| and |w| * s. (|w| * s)^2 is what the loss grows by without w.

        What the loss grows by says what the network of this moment can spare; by that alone whole channels go whose
        gradients happen to be small, and a network that goes on training misses them. Magnitude knows nothing of what
        the layers do. Each alone fails somewhere; docs/quality.md has what that costs.
        """
        return magnitude * sensitivity.sqrt()

    def update_factor(self, density: float) -> float:
        """By how much the steps of a layer become longer of whose weights so many are left, in (0, 1]."""
        return float(min(LONGEST_UPDATE, max(density, 1e-9) ** -UPDATE_POWER))


@dataclass(frozen=True)
class PaperLaw:
    """The published law: every D epochs (`interval` steps) multiply the thresholds, but not in the last D epochs."""

    interval: int
    total_steps: int | None

    def acts_at(self, step: int) -> bool:
        return step % self.interval == 0 and (self.total_steps is None or step <= self.total_steps - self.interval)

    def has_arrived(self, step: int) -> bool:
        return self.total_steps is not None and step > self.total_steps - self.interval

    def ratio(self, sparsity: float, target: float) -> float:
        """q = 1 + 0.005 * (S_now - S_target) in percent; 1 within the band [S_target, S_target + 1]."""
        excess = 100 * (sparsity - target)
        return 1.0 if 0 <= excess <= PAPER_BAND else 1 + PAPER_RATE * excess


LAWS = ("exact", "obs", "paper")
SCHEDULE = ("total_steps", "ramp_start", "ramp_steps", "interval")
"""What a law holds; not every law has all of it."""


def make_law(
    name: str,
    *,
    total_steps: int | None,
    ramp_start: int,
    ramp_steps: int | None,
    epoch_steps: int | None,
    interval: int | None,
) -> ExactLaw | PaperLaw:
    """The law called `name` with the defaults filled in; all lengths are optimizer steps."""
    if name == "paper":
        if interval is None:
            assert epoch_steps is not None
            interval = PAPER_EPOCHS * epoch_steps
        return PaperLaw(interval, total_steps)
    if ramp_steps is None:
        ramp_steps = RAMP_STEPS if total_steps is None else max(1, round(RAMP_SHARE * (total_steps - ramp_start)))
    if name == "obs":
        return SurgeonLaw(ramp_steps, interval or max(1, ramp_steps // SURGEON_ACTIONS), total_steps, ramp_start)
    return ExactLaw(ramp_steps, interval or EXACT_INTERVAL, total_steps, ramp_start)


def schedule_of(law: ExactLaw | PaperLaw) -> dict[str, int | None]:
    """The lengths that make up `law`, in optimizer steps; None for those it does not know of."""
    return {name: getattr(law, name, None) for name in SCHEDULE}


def critical_shifts(weight: Tensor, threshold: Tensor) -> Tensor:
    """logit(|w|) - t for every weight, flat, float32 at least: the weight is zero iff the shift is at least that.

    Beyond the reach of a sigmoid the order by magnitude goes on: |w| >= 1 counts as a little more than any smaller
    one, and w = 0 as less than any other, both finite.
    """
    magnitude = weight.detach().abs()
    if magnitude.dtype in (torch.float16, torch.bfloat16):
        magnitude = magnitude.float()
    beyond = (magnitude - 1).clamp_(min=0)
    shifts = torch.logit(magnitude.clamp_(_SMALLEST, _LARGEST)).add_(beyond)
    return (shifts - threshold.detach()).flatten()


def shift_for(shifts: Tensor, zeros: int, wanted: int) -> float:
    """The shift nearest to 0 after which `wanted` weights are zero.

    Args:
        shifts: the critical shifts of all weights, flat and finite.
        zeros: how many weights are zero now.
        wanted: how many are to be; between 0 and the number of weights.

    Returns:
        0 where no shift comes nearer to the wanted number, because of ties.
    """
    if zeros == wanted:
        return 0.0
    nearest = kth_smallest(shifts, wanted if zeros < wanted else wanted + 1)
    # Weights of equal shift fall together (many do in half precision): take the side of them that is nearer.
    below, up_to = int((shifts < nearest).sum()), int((shifts <= nearest).sum())
    reached, shift = min(
        (below, nearest - _ROUNDING), (up_to, nearest + _ROUNDING), key=lambda side: abs(side[0] - wanted)
    )
    return shift if abs(reached - wanted) < abs(zeros - wanted) else 0.0


def kth_smallest(values: Tensor, k: int) -> float:
    """The k-th smallest entry of a flat tensor, k counted from 1."""
    if values.device.type == "mps" or torch.are_deterministic_algorithms_enabled():  # kthvalue cannot do these
        return float(values.sort().values[k - 1])
    return float(torch.kthvalue(values, k).values)


def count_for(sparsity: float, weights: int) -> int:
    """How many of `weights` are zero at `sparsity`: round(sparsity * weights)."""
    return round(sparsity * weights)


def project(gated: Sequence[Tensor], raw: Sequence[Tensor], shifts: Tensor, zeros: int) -> list[Tensor]:
    """The gated weights with exactly `zeros` zeros over all of them, changed in as few entries as possible.

    The weights that must fall are those with the smallest critical shifts among the living; they become zero and no
    other weight changes. The weights that must come back are those with the largest critical shifts among the zero
    ones; they get their sign and what of their magnitude exceeds the threshold shifted down to the last of them. Those
    whose gates the law "obs" has closed come back as good as zero, as others have taken over their work.
    Raw weights that are zero themselves cannot come back.

    Args:
        gated: the gated weights, one tensor per layer.
        raw: the weights before the gate, shaped as `gated`.
        shifts: the critical shifts of all of them in one flat tensor.
        zeros: the wanted number of zeros, between 0 and the number of all weights.
    """
    values = torch.cat([g.flatten().to(shifts.device) for g in gated])
    dead = values == 0
    missing = zeros - int(dead.sum())
    if missing > 0:
        living = torch.nonzero(~dead).flatten()
        values[living[torch.argsort(shifts[living], stable=True)[:missing]]] = 0
    elif missing < 0:
        source = torch.cat([r.flatten().to(shifts.device) for r in raw])
        asleep = torch.nonzero(dead & (source != 0)).flatten()
        woken = asleep[torch.argsort(shifts[asleep], descending=True, stable=True)[:-missing]]
        if woken.numel():
            smallest = max(torch.finfo(g.dtype).tiny for g in gated)
            values[woken] = _woken(source[woken], shifts[woken], smallest)
    parts = torch.split(values, [g.numel() for g in gated])
    return [part.view_as(g).to(g) for part, g in zip(parts, gated, strict=True)]


def _woken(raw: Tensor, shifts: Tensor, smallest: float) -> Tensor:
    """Weights above the gate again, by `smallest` at least: it is shifted down to the last that wakes."""
    precise, shifts = raw.cpu().double(), shifts.cpu().double()
    threshold = torch.logit(precise.abs().clamp(_SMALLEST, _LARGEST)) - shifts
    cut = torch.sigmoid(threshold + shifts.min())
    magnitude = (precise.abs() - cut).clamp(min=smallest)
    magnitude[threshold > CLOSED - 1] = smallest
    return (torch.sign(precise) * magnitude).to(raw)
