"""Prompts that are echoed with their log-probabilities: what lm-eval's local-completions scores texts by."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.openai_completions import LocalCompletionsAPI

from mlx_diffgemma.generation.settings import GenerationOptions
from mlx_diffgemma.pipeline.model import DiffusionGemma
from tests import small
from tests.server.serving import COMPLETIONS, Running, serving, small_model

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionGemma:
    return small.model(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving(small_model(folder)) as running:
        yield running


def asked(server: Running, prompt: Any, **more: Any) -> list[dict[str, Any]]:
    made = server.post({"prompt": prompt, "echo": True, "logprobs": 2, "seed": 5, **more}, COMPLETIONS)
    assert made.status_code == 200, made.text
    for choice in made.json()["choices"]:
        lists = choice["logprobs"]
        assert len({len(lists[name]) for name in LISTS}) == 1
    return made.json()["choices"]


def test_a_text_s_tokens_are_scored_as_score_has_it(server: Running, model: DiffusionGemma) -> None:
    text = "a text longer than the window of twelve"
    [choice] = asked(server, text, max_tokens=0)
    found = choice["logprobs"]
    assert choice["text"] == text == "".join(found["tokens"]) and choice["finish_reason"] == "length"
    assert found["token_logprobs"] == pytest.approx(list(model.score(text).logprobs), abs=1e-6)
    assert found["text_offset"] == list(range(len(text)))
    for token, own, top, best in zip(*(found[name] for name in LISTS[:3]), model.score(text).best, strict=True):
        assert top[token] == own and len(top) <= 3
        assert (max(top.values()) == own) == (model.tokenizer.piece(best) == token)


def test_the_first_of_some_ids_follows_from_nothing(server: Running, model: DiffusionGemma) -> None:
    ids = model.text_ids("some ids")[1:]
    [choice] = asked(server, ids, max_tokens=0)
    told = choice["logprobs"]["token_logprobs"]
    assert told[0] is None and choice["logprobs"]["top_logprobs"][0] is None
    assert told[1:] == pytest.approx(list(model.score(ids).logprobs), abs=1e-6)
    [one] = asked(server, ids[:1], max_tokens=0)
    assert one["logprobs"]["token_logprobs"] == [None]


@pytest.mark.parametrize("own", [{}, {"decoding": "autoregressive"}], ids=["canvas", "autoregressive"])
def test_what_is_echoed_stands_in_front_of_what_is_answered(
    own: GenerationOptions, server: Running, model: DiffusionGemma
) -> None:
    for prompt, n in ((["ab", "c"], 1), (["ab"], 2)):
        choices = asked(server, prompt, max_tokens=20, diffusion=own, n=n)
        assert [choice["index"] for choice in choices] == [0, 1]
        rows = [text for text in prompt for _ in range(n)]
        expected: Any = model.generate(
            [model.text_ids(text) for text in rows], seed=5, max_tokens=20, logprobs=2, **own
        )
        for choice, text, result in zip(choices, rows, expected, strict=True):
            assert choice["text"] == text + result.text
            scores = [*model.score(text).logprobs, *result.logprobs]
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-5)
        body = {"prompt": prompt, "echo": True, "logprobs": 2, "seed": 5, "max_tokens": 20, "diffusion": own, "n": n}
        chunks = [choice for chunk in server.chunks(body, COMPLETIONS) for choice in chunk["choices"]]
        for choice in choices:
            mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
            assert "".join(chunk["text"] for chunk in mine) == choice["text"]
            told = [chunk["logprobs"] for chunk in mine if chunk["logprobs"]]
            assert {name: [one for part in told for one in part[name]] for name in LISTS} == choice["logprobs"]


def test_lm_eval_reads_it(server: Running, model: DiffusionGemma) -> None:
    """Its own reader, of the requests that it sends: what a continuation is worth, and whether it is the likeliest."""
    context = model.text_ids("The capital")
    likeliest = list(context)
    for _ in range(3):
        likeliest.append(model.score_from([*likeliest, 0], len(likeliest)).best[0])
    for ids, greedy in (([*context, *model.tokenizer.encode(" of")], False), (likeliest, True)):
        body = {"model": "x", "prompt": ids, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1, "echo": True}
        answer = server.post(body, COMPLETIONS).json()
        scores = model.score_from(ids, len(context))
        [(total, is_greedy)] = LocalCompletionsAPI.parse_logprobs(answer, [ids], [len(context)])
        assert total == pytest.approx(scores.total, abs=1e-5) and is_greedy is greedy
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(ids) + 1  # it leaves the last one out


def test_an_answer_that_ends_at_once_has_its_end_among_the_tokens(folder: Path) -> None:
    """Without it lm-eval would leave out a token of the continuation."""

    def load() -> DiffusionGemma:
        model = small.model(folder)
        model.generation_config = model.generation_config.replace(stop_ids=tuple(range(small.VOCABULARY)))
        return model

    with serving(load) as server:
        for own in ({}, {"decoding": "autoregressive"}):
            [choice] = asked(server, "ab", max_tokens=1, diffusion=own)
            assert choice["finish_reason"] == "stop" and choice["text"] == "ab"
            assert choice["logprobs"]["tokens"][:2] == ["a", "b"] and len(choice["logprobs"]["token_logprobs"]) == 3


def test_the_best_of_some_answers(server: Running, model: DiffusionGemma) -> None:
    body = {"prompt": "ab", "seed": 5, "max_tokens": 20, "best_of": 3}
    best: Any = model.generate(model.text_ids("ab"), seed=5, max_tokens=20, best_of=3)
    assert server.post(body, COMPLETIONS).json()["choices"][0]["text"] == best.text
    [choice] = asked(server, "ab", max_tokens=20, best_of=3)
    assert choice["text"] == "ab" + best.text and len(choice["logprobs"]["tokens"]) >= len(best.tokens) + 2


def test_what_would_do_nothing_is_refused(server: Running) -> None:
    for body, param in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"best_of": 2, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
    ):
        refused = server.post({"prompt": "a", **body}, COMPLETIONS)
        assert refused.status_code == 400 and json.loads(refused.text)["error"]["param"] == param
