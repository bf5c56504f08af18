"""Our logits against transformers', in units of transformers' own float32 error. The matrix: every scenario of
reference_models (models, prefix lengths about the window, one row and a padded batch) × pieces of the prompt ×
committed canvases × signal."""

from statistics import median

import mlx.core as mx
import numpy as np
import pytest

from convert import record_reference as reference
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.files.weights import load_network
from tests.reference_models import CHUNKS, MEDIAN, MODELS, SCENARIOS, WORST, Scenario, compare, measured


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


@pytest.mark.parametrize("length", [1, 63, 64, 65, 192])
def test_the_built_in_model(length: int) -> None:
    """Trained weights, loaded by the strict loader: two steps, the second with the signal of the first."""
    net, rival = load_network(BUILT_IN), reference.built_in_model(BUILT_IN)
    truth = reference.built_in_model(BUILT_IN).double()
    random = np.random.default_rng(length)
    vocabulary, canvas_length = net.config.vocab_size, net.config.canvas_length
    prompt, canvas = (random.integers(0, vocabulary, (1, n)) for n in (length, canvas_length))
    cache = net.make_cache()
    net.encode(mx.array(prompt), cache)
    none = np.zeros(1, int), np.zeros((0, 1, canvas_length), int)  # padding and canvases
    prefixes = [reference.encode(model, prompt, *none) for model in (truth, rival)]
    signal = None
    for _ in range(2):
        told, other = (
            reference.decode(model, canvas, *prefix, signal)
            for model, prefix in zip((truth, rival), prefixes, strict=True)
        )
        ours = np.array(net.logits(mx.array(canvas), cache, None if signal is None else mx.array(signal)))
        assert compare(ours, told, other).passes
        signal = (told / 0.8).astype(np.float32)
