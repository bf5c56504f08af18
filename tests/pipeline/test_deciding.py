"""Decisions: probabilities against a dense head and enumeration, orders, calibration, refusals."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.errors import ConfigError, PromptError, TokenizerError
from mlx_diffgemma.generation.labels import log_probabilities
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.pipeline import deciding
from mlx_diffgemma.pipeline.deciding import Question, questions_of
from mlx_diffgemma.pipeline.model import DiffusionGemma
from tests import small

COLOR = {"type": "choice", "question": "Which color?", "choices": ["red", "green", "blue"]}
URGENT = {"type": "bool", "question": "Is it urgent?"}
STARS = {"type": "score", "question": "How good?", "scale": [1, 5]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionGemma:
    return small.model(tmp_path_factory.mktemp("model"))


def dense(model: DiffusionGemma, prompt: list[int], noise: SeededNoise, length: int) -> np.ndarray:
    """Log-probabilities [L, V] of one row, from the whole head at once."""
    cache = model.network.make_cache(1, None, length)
    model.network.encode(mx.array([prompt]), cache)
    hidden = model.network.denoise(noise.canvas(0), cache, None)[0]
    cap = model.config.final_logit_softcapping
    logits = np.array(hidden @ model.network.decoder.embed_tokens.weight.T, np.float64)
    logits = cap * np.tanh(logits / cap)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def test_a_label_is_as_probable_as_the_whole_head_says(model: DiffusionGemma) -> None:
    """Prompts of different lengths in one batch; a label, one that begins with it, and none at all."""
    prompts = [[small.BOS, 300, 301, 302], [small.BOS, 310]]
    labels = [[(300,), (300, 301), ()], [(320, 321)]]
    length, settings = 4, model.generation_config
    found = log_probabilities(
        model.network,
        prompts,
        labels,
        settings,
        SeededNoise([5, 6], length=length, vocabulary=small.VOCABULARY),
        length,
    )
    for row, (prompt, some) in enumerate(zip(prompts, labels, strict=True)):
        logs = dense(model, prompt, SeededNoise([5 + row], length=length, vocabulary=small.VOCABULARY), length)
        stop = np.logaddexp.reduce(logs[:, list(settings.stop_ids)], axis=1)
        fill = np.logaddexp(stop, logs[:, settings.pad_token_id])
        for label, value in zip(some, found[row], strict=True):
            expected = sum(logs[i, token] for i, token in enumerate(label)) + stop[len(label)]
            assert value == pytest.approx(expected + fill[len(label) + 1 :].sum(), abs=2e-5)


def test_kinds_of_questions_and_what_is_said_of_them(model: DiffusionGemma) -> None:
    decisions = model.decide("A fast red car", {"color": COLOR, "urgent": URGENT, "stars": STARS})
    color, urgent, stars = decisions
    assert [d.name for d in decisions] == ["color", "urgent", "stars"]
    assert [d.orders for d in decisions] == [3, 2, 1] and not any(d.calibrated for d in decisions)
    for decision in decisions:
        assert sum(decision.probabilities.values()) == pytest.approx(1)
        assert 0 <= decision.outside <= 1
    assert color.answer == max(color.probabilities, key=lambda label: color.probabilities[label])
    assert isinstance(urgent.answer, bool) and urgent.answer == (urgent.probabilities["yes"] >= 0.5)
    mean = sum(int(label) * share for label, share in stars.probabilities.items())
    assert stars.mean == pytest.approx(mean) and stars.answer in range(1, 6) and color.mean is None


def test_a_decision_repeats_and_does_not_depend_on_its_company(model: DiffusionGemma) -> None:
    [alone] = model.decide("A fast red car", [COLOR])
    _, beside = model.decide("A fast red car", [URGENT, COLOR])
    assert list(alone.probabilities.values()) == pytest.approx(list(beside.probabilities.values()), abs=1e-4)


def test_the_canvas_is_the_models_own(model: DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at once as have few positions together; however many, the figures are the same."""
    whole = model.decide("A fast red car", [COLOR, STARS])
    assert whole == model.decide("A fast red car", [COLOR, STARS], canvas_length=small.CANVAS)
    short = model.decide("A fast red car", [COLOR, STARS], canvas_length=8)
    assert short[0].probabilities != whole[0].probabilities
    monkeypatch.setattr(deciding, "POSITIONS", 2 * small.CANVAS)
    for one, other in zip(model.decide("A fast red car", [COLOR, STARS]), whole, strict=True):
        assert list(one.probabilities.values()) == pytest.approx(list(other.probabilities.values()), abs=1e-4)


def test_orders_are_averaged(model: DiffusionGemma) -> None:
    """Each order by itself, as a question of its own with one order."""
    labels = COLOR["choices"]
    [together] = model.decide("A fast red car", [COLOR])
    rotated = [[*labels[n:], *labels[:n]] for n in range(3)]
    single = [model.decide("A fast red car", [{**COLOR, "choices": some}], orders=False)[0] for some in rotated]
    for label in labels:
        mean = np.mean([decision.probabilities[label] for decision in single])
        assert together.probabilities[label] == pytest.approx(mean, abs=1e-4)
    assert len({tuple(sorted(decision.probabilities.items())) for decision in single}) == 3


def test_calibration_divides_by_what_an_empty_state_gets(model: DiffusionGemma) -> None:
    [plain] = model.decide("A fast red car", [STARS])
    [empty] = model.decide("N/A", [STARS])
    [calibrated] = model.decide("A fast red car", [STARS], calibrate=True)
    ratios = np.array([plain.probabilities[label] / empty.probabilities[label] for label in plain.probabilities])
    assert list(calibrated.probabilities.values()) == pytest.approx((ratios / ratios.sum()).tolist(), abs=1e-4)
    assert calibrated.calibrated
    [nothing] = model.decide("N/A", [COLOR], calibrate=True)
    assert list(nothing.probabilities.values()) == pytest.approx([1 / 3] * 3)


def test_how_labels_are_listed() -> None:
    color = Question.read(COLOR, "color")
    assert color.orders() == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    assert color.asked((1, 2, 0)) == "Answer with one of: green, blue, red."
    listed = Question.read({**COLOR, "choices": ["a, b", "c"]}, "x").asked((0, 1))
    assert listed == "Answer with one of:\n- a, b\n- c"
    assert Question.read(STARS, "x").asked((0,)) == "Answer with a whole number from 1 to 5."


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ([], "there is no question"),
        ("urgent?", "questions are a list or an object"),
        (["urgent?"], "question '1' is 'urgent?'"),
        ({"a": {"type": "yesno", "question": "x"}}, "question 'a': type is 'yesno', expected choice, bool, score"),
        ({"a": {"type": "bool"}}, "question 'a': question is None"),
        ({"a": {**URGENT, "choices": ["a", "b"]}}, "a bool has no 'choices'"),
        ({"a": {**STARS, "scales": [1, 2]}}, "a score has no 'scales'. Did you mean"),
        ({"a": {**COLOR, "choices": ["a"]}}, "a list of two texts or more"),
        ({"a": {**COLOR, "choices": ["a", "a"]}}, "choice 2 is 'a' again"),
        ({"a": {**COLOR, "choices": ["a", ""]}}, "choice 2 is empty"),
        ({"a": {**STARS, "scale": [5, 1]}}, "scale is [5, 1]"),
        ({"a": {**STARS, "scale": [0, 101]}}, "at most 101 numbers"),
        ({"a": {**STARS, "scale": [True, 2]}}, "scale is [True, 2]"),
    ],
)
def test_questions_that_are_none_are_refused(questions: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        questions_of(questions)
    assert words in str(caught.value)


def test_what_cannot_be_decided_is_refused(model: DiffusionGemma) -> None:
    with pytest.raises(PromptError, match="the state is empty"):
        model.decide(" ", [URGENT])
    with pytest.raises(ConfigError, match="the longest label takes 6 tokens with its end; the canvas has 2"):
        model.decide("x", [COLOR], canvas_length=2)
    with pytest.raises(ConfigError, match="canvas_length is 17, expected at most 16"):
        model.decide("x", [COLOR], canvas_length=17)
    with pytest.raises(ConfigError, match="canvas has 16"):
        model.decide("x", [{**COLOR, "choices": ["a", "b" * 16]}])
    with pytest.raises(TokenizerError, match="special token"):
        model.decide("x", [{**COLOR, "choices": ["a", "<eos>"]}])
    with pytest.raises(ConfigError, match="it has 'stat'"):
        model.decide("x", [URGENT], template="{stat}")
