"""Our logits against transformers', in units of transformers' own float32 error. The matrix: every scenario of
reference_models (models, prefix lengths about the window, one row and a padded batch) × pieces of the prompt ×
committed canvases × signal."""

from statistics import median

import pytest

from tests.reference_models import CHUNKS, MEDIAN, MODELS, SCENARIOS, WORST, Scenario, measured


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: f"{s.model}-{s.length}x{s.batch}")
def test_every_case_is_as_close_as_the_reference(scenario: Scenario, chunk: int) -> None:
    for case in measured(scenario, chunk):
        assert case.ratio <= WORST
        assert case.same_argmax


def test_the_matrix_as_a_whole(record_summary) -> None:
    ratios = [case.ratio for scenario in SCENARIOS for chunk in CHUNKS for case in measured(scenario, chunk)]
    record_summary(
        f"parity with transformers in float64, in units of its float32 error: {len(ratios)} cases,"
        f" median {median(ratios):.2f} (at most {MEDIAN}), worst {max(ratios):.2f} (at most {WORST})"
    )
    assert len(ratios) == len(MODELS) * 5 * 2 * 3 * 6
    assert median(ratios) <= MEDIAN
