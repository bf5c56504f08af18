"""The sampler against the published definitions in numpy, on random and adversarial entropies."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers.models.diffusion_gemma.generation_diffusion_gemma import LinearTemperatureScheduleLogitsProcessor

from mlx_diffgemma.generation import sampler

ENTROPIES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.one_of(
        st.sampled_from([0.0, 0.05, 0.1, 0.2, 5.5]),  # ties, and sums that hit a bound exactly
        st.floats(0, 12, width=32, allow_subnormal=False),
    ),
)


def accepted_by_definition(entropy: np.ndarray, bound: float) -> np.ndarray:
    """Position by position, lowest entropy first: accept while what was accepted before sums to at most the bound."""
    accepted = np.zeros(entropy.shape, bool)
    for row, values in enumerate(entropy):
        before = np.float32(0)
        for position in np.argsort(values, kind="stable"):
            total = np.float32(before + values[position])
            accepted[row, position] = total - values[position] <= bound
            before = total
    return accepted


@given(entropy=ENTROPIES, bound=st.sampled_from([0.0, 0.1, 0.5, 3.0]))
def test_accept_is_the_definition(entropy: np.ndarray, bound: float) -> None:
    accepted = np.array(sampler.accept(mx.array(entropy), bound))
    expected = accepted_by_definition(entropy, bound)
    # Equal entropies may be told apart either way: compare how many of each value were accepted.
    for row in range(len(entropy)):
        assert sorted(entropy[row][accepted[row]]) == sorted(entropy[row][expected[row]])


@given(entropy=ENTROPIES)
def test_the_most_certain_position_is_always_accepted(entropy: np.ndarray) -> None:
    accepted = np.array(sampler.accept(mx.array(entropy), 0.0))
    assert all(accepted[row][entropy[row] == entropy[row].min()].any() for row in range(len(entropy)))


def test_the_bound_is_inclusive_and_leaves_the_largest_term_out() -> None:
    entropy = mx.array([[0.25, 0.25, 0.25, 4.0, 9.0]])
    assert sampler.accept(entropy, 0.75).tolist() == [[True, True, True, True, False]]
    assert sampler.accept(entropy, 0.74).tolist() == [[True, True, True, False, False]]


def test_all_equal_and_one_hot_rows() -> None:
    assert sampler.accept(mx.zeros((1, 5)), 0.0).tolist() == [[True] * 5]
    assert sampler.accept(mx.full((1, 5), 2.0), 0.1).sum().item() == 1


def test_an_entropy_that_is_no_number_is_never_accepted() -> None:
    entropy = mx.array([[mx.nan, 0.01, mx.nan, 0.02], [mx.nan] * 4])
    assert sampler.accept(entropy, 1.0).tolist() == [[False, True, False, True], [False] * 4]


@pytest.mark.parametrize("steps", [1, 2, 48])
def test_temperature_starts_at_t_max_and_never_reaches_t_min(steps: int) -> None:
    values = [sampler.temperature(step, steps, t_min=0.4, t_max=0.8) for step in range(steps)]
    assert values[0] == pytest.approx(0.8)
    assert values[-1] == pytest.approx(0.4 + 0.4 / steps)
    assert values == sorted(values, reverse=True)


def test_temperature_of_the_model_card() -> None:
    assert sampler.temperature(47, 48, t_min=0.4, t_max=0.8) == pytest.approx(0.408333, abs=1e-6)


@pytest.mark.parametrize(("t_min", "t_max"), [(0.4, 0.8), (0.1, 1.3), (0.7, 0.7)])
def test_temperature_is_the_reference_to_the_last_bit(t_min: float, t_max: float) -> None:
    """The reference's loop hands its schedule the steps that remain as a 32-bit array."""
    for steps in range(1, 65):
        schedule = LinearTemperatureScheduleLogitsProcessor(t_min, t_max, steps)
        for step in range(steps):
            remaining = torch.tensor(steps - step, dtype=torch.int32)
            theirs = 1 / schedule(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.float64), remaining)
            ours = sampler.temperature(step, steps, t_min=t_min, t_max=t_max)
            assert ours == pytest.approx(theirs.item(), abs=1e-9) and np.float32(ours) == ours


def test_renoise_replaces_what_is_not_accepted() -> None:
    accepted = mx.array([[True, False]])
    assert sampler.renoise(accepted, mx.array([[1, 2]]), mx.array([[8, 9]])).tolist() == [[1, 9]]


@given(
    history=arrays.arrays(np.int32, st.tuples(st.integers(1, 5), st.just(2), st.just(3)), elements=st.integers(0, 1)),
    entropy=arrays.arrays(np.float32, (2, 3), elements=st.sampled_from([0.0, 0.004, 0.006])),
    stability=st.integers(0, 3),
)
def test_settled_is_the_definition(history: np.ndarray, entropy: np.ndarray, stability: int) -> None:
    *earlier, best = history
    recent = earlier[len(earlier) - stability :] if stability else []
    stable = len(earlier) >= stability and np.all([other == best for other in recent] or [True], axis=0)
    expected = np.broadcast_to(stable, best.shape).all(-1) & (entropy.mean(-1) < 0.005)
    got = sampler.settled(
        mx.array(best), [mx.array(e) for e in earlier], mx.array(entropy), stability=stability, confidence=0.005
    )
    assert np.array(got).tolist() == expected.tolist()


def test_the_first_step_cannot_be_stable() -> None:
    """A history that held the canvas itself would make every canvas stable."""
    best = mx.array([[1, 2]])
    quiet = mx.zeros((1, 2))
    assert not sampler.settled(best, [], quiet, stability=1, confidence=0.005).item()
    assert sampler.settled(best, [best], quiet, stability=1, confidence=0.005).item()
