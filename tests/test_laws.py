"""The formulas: ramps, ratios, shifts and projections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iks_plugin import laws
from iks_plugin.gate import soft_threshold


def exact(**given_options: int | None) -> laws.ExactLaw:
    options = dict(total_steps=None, ramp_start=0, ramp_steps=None, epoch_steps=None, interval=None)
    law = laws.make_law("exact", **{**options, **given_options})
    assert isinstance(law, laws.ExactLaw)
    return law


@pytest.mark.parametrize(
    ("options", "ramp"),
    [
        ({}, 1000),
        ({"total_steps": 500}, 300),
        ({"total_steps": 500, "ramp_steps": 20}, 20),
        ({"total_steps": 500, "ramp_start": 100}, 240),
        ({"ramp_start": 100}, 1000),
        ({"total_steps": 1}, 1),
        ({"total_steps": 9, "ramp_start": 8}, 1),
    ],
)
def test_length_of_the_ramp(options, ramp):
    assert exact(**options).ramp_steps == ramp


def test_the_ramp_is_cubic_and_then_holds():
    law = exact(ramp_steps=100)
    assert law.wanted(0, 0.1, 0.9) == pytest.approx(0.1)
    assert law.wanted(50, 0.1, 0.9) == pytest.approx(0.9 - 0.8 / 8)
    assert law.wanted(100, 0.1, 0.9) == law.wanted(10_000, 0.1, 0.9) == 0.9
    assert law.wanted(1, 0.95, 0.9) == 0.9


def test_a_ramp_that_starts_late_is_the_same_later():
    law, late = exact(ramp_steps=100, interval=7), exact(ramp_steps=100, interval=7, ramp_start=30)
    for step in range(1, 200):
        assert late.wanted(step + 30, 0.1, 0.9) == law.wanted(step, 0.1, 0.9)
        assert late.acts_at(step + 30) == law.acts_at(step)
        assert late.has_arrived(step + 30) == law.has_arrived(step)
    assert [late.wanted(step, 0.1, 0.9) for step in (0, 15, 30)] == pytest.approx([0.1] * 3)
    assert not any(late.acts_at(step) for step in range(31))


def test_the_law_obs_measures_before_the_actions_of_its_ramp_alone():
    law = laws.make_law("obs", total_steps=200, ramp_start=50, ramp_steps=60, epoch_steps=None, interval=30)
    measured = [step for step in range(200) if law.measures_at(step)]
    assert measured == [*range(80 - laws.MEASURED_STEPS, 80), *range(110 - laws.MEASURED_STEPS, 110)]


def test_when_the_exact_law_acts():
    law = exact(ramp_steps=25, interval=10, total_steps=47)
    assert [step for step in range(1, 60) if law.acts_at(step)] == [10, 20, 25, 30, 40, 47, 50]


def test_when_the_paper_law_acts():
    law = laws.make_law("paper", total_steps=100, ramp_start=0, ramp_steps=None, epoch_steps=2, interval=None)
    assert [step for step in range(1, 101) if law.acts_at(step)] == [20, 40, 60, 80]


@pytest.mark.parametrize(
    ("sparsity", "target", "ratio"),
    [(0, 0.9, 0.55), (0.8, 0.9, 0.95), (0.9, 0.9, 1), (0.905, 0.9, 1), (0.95, 0.9, 1.025)],
)
def test_ratio_of_the_paper(sparsity, target, ratio):
    law = laws.PaperLaw(1, None)
    assert law.ratio(sparsity, target) == pytest.approx(ratio)


def test_extreme_weights_have_finite_and_ordered_shifts():
    weight = torch.tensor([0.0, 1e-40, 1e-20, 0.5, 1 - 2.0**-24, 1.0, 1.5, 30.0])
    for sign in (1, -1):
        shifts = laws.critical_shifts(sign * weight, torch.full((8,), -12.0))
        assert torch.isfinite(shifts).all() and (shifts.diff() >= 0).all()
    assert torch.isnan(laws.critical_shifts(torch.tensor([float("nan")]), torch.tensor([-12.0]))).all()


weights_and_thresholds = st.integers(0, 2**32 - 1).map(
    lambda seed: (
        torch.randn(400, generator=torch.Generator().manual_seed(seed)) * 0.3,
        torch.randn(400, generator=torch.Generator().manual_seed(seed + 1)) * 2 - 4,
    )
)


@settings(deadline=None, max_examples=100)
@given(weights_and_thresholds, st.floats(0, 0.98))
def test_a_shift_gives_the_wanted_zeros(pair, sparsity):
    weight, threshold = pair
    shifts = laws.critical_shifts(weight, threshold)
    wanted = laws.count_for(sparsity, weight.numel())
    zeros = int((soft_threshold(weight, threshold) == 0).sum())
    shift = laws.shift_for(shifts, zeros, wanted)
    assert abs(int((soft_threshold(weight, threshold + shift) == 0).sum()) - wanted) <= 1
    if zeros == wanted:
        assert shift == 0


@settings(deadline=None, max_examples=100)
@given(weights_and_thresholds, st.floats(0, 1))
def test_a_projection_is_exact_and_changes_as_little_as_possible(pair, sparsity):
    weight, threshold = pair
    gated = soft_threshold(weight, threshold)
    wanted = laws.count_for(sparsity, weight.numel())
    halves = [(150, 250), (150, 250)]
    parts = [tensor.split(halves[0]) for tensor in (gated, weight)]
    shifts = laws.critical_shifts(weight, threshold)
    projected = torch.cat(laws.project(*parts, shifts, wanted))
    changed = projected != gated
    assert (projected == 0).sum() == wanted
    assert changed.sum() == abs(wanted - int((gated == 0).sum()))
    assert (projected[changed & (projected != 0)].sign() == weight[changed & (projected != 0)].sign()).all()
    assert (projected.abs() <= weight.abs()).all()
    fallen = changed & (projected == 0)
    if fallen.any() and (projected != 0).any():
        assert shifts[fallen].max() <= shifts[projected != 0].min()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_projection_is_exact_in_every_dtype(dtype):
    weight = (torch.randn(1000) * 0.1).to(dtype)
    threshold = torch.full((1000,), -1.0)
    gated = soft_threshold(weight, threshold)
    shifts = laws.critical_shifts(weight, threshold)
    for wanted in (0, 1, 500, 999, 1000):
        (projected,) = laws.project([gated], [weight], shifts, wanted)
        assert projected.dtype == dtype and (projected == 0).sum() == wanted


def test_ties_that_cannot_be_met_are_left_where_they_are_nearest():
    weight = torch.tensor([0.1] * 10 + [0.2] * 10 + [0.3] * 10)
    threshold = torch.full((30,), -12.0)
    shifts = laws.critical_shifts(weight, threshold)
    for wanted, reached in ((3, 0), (7, 10), (12, 10), (17, 20), (30, 30)):
        shift = laws.shift_for(shifts, 0, wanted)
        assert int((soft_threshold(weight, threshold + shift) == 0).sum()) == reached
    held = threshold + laws.shift_for(shifts, 0, 10)
    assert laws.shift_for(laws.critical_shifts(weight, held), 10, 12) == 0
    assert laws.shift_for(laws.critical_shifts(weight, held), 10, 8) == 0


@pytest.mark.parametrize("k", [1, 7, 20])
def test_order_statistics_also_where_only_sorting_is_deterministic(k):
    values = torch.randn(20)
    expected = laws.kth_smallest(values, k)
    torch.use_deterministic_algorithms(True)
    try:
        assert laws.kth_smallest(values, k) == expected == values.sort().values[k - 1]
    finally:
        torch.use_deterministic_algorithms(False)


def test_ties_are_broken_so_that_the_count_is_exact():
    weight = torch.full((100,), 0.25)
    threshold = torch.full((100,), -12.0)
    (projected,) = laws.project([weight], [weight], laws.critical_shifts(weight, threshold), 37)
    assert (projected == 0).sum() == 37


def test_raw_zeros_cannot_come_back():
    weight = torch.cat([torch.zeros(60), torch.linspace(0.1, 0.2, 40)])
    threshold = torch.full((100,), 0.0)
    gated = soft_threshold(weight, threshold)
    (projected,) = laws.project([gated], [weight], laws.critical_shifts(weight, threshold), 50)
    assert (projected == 0).sum() == 60
