"""OpenAI's protocol as clients meet it: a real server on a small random model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from mlx_diffgemma.generation.events import Committed
from tests import small
from tests.server.serving import COMPLETIONS, Running, content, said, serving, small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving(small_model(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.mark.parametrize("options", [{}, {"decoding": "autoregressive"}, {"canvas": 8, "steps": 3}], ids=str)
def test_stream_whole_and_generate_say_the_same(server: Running, folder: Path, options: dict[str, Any]) -> None:
    model = small.model(folder)
    names = {"canvas": "canvas_length", "steps": "max_denoising_steps"}
    own: Any = {names.get(name, name): value for name, value in options.items()}
    spoken = 0
    for seed in range(4):
        body = {"messages": said("hello"), "seed": seed, "max_tokens": 40, "diffusion": options}
        whole = server.post(body).json()
        *events, last = model.stream(said("hello"), seed=seed, max_tokens=40, **own)
        result, text = last.result, "".join(e.text for e in events if isinstance(e, Committed))
        message = whole["choices"][0]["message"]
        chunks = server.chunks(body)
        assert message["content"] == text == content(chunks)
        assert message.get("reasoning_content", "") == (result.thinking or "") == content(chunks, "reasoning_content")
        assert whole["choices"][0]["finish_reason"] == result.finish_reason
        assert whole["usage"]["completion_tokens"] == len(result.tokens)
        assert whole["diffusion"]["seed"] == seed and whole["diffusion"]["steps"] == result.statistics.steps
        spoken += bool(result.text)
    assert spoken > 2


def test_an_answer_finishes_once_and_usage_comes_alone(server: Running) -> None:
    asked = {"messages": said("hi"), "seed": 3, "max_tokens": 40}
    plain = server.chunks(asked)
    assert [c["finish_reason"] for chunk in plain for c in chunk["choices"] if c["finish_reason"]] == ["length"]
    assert not any("usage" in chunk for chunk in plain) and "diffusion" in plain[-1]
    told = server.chunks(asked | {"stream_options": {"include_usage": True}})
    assert told[-1]["choices"] == [] and told[-1]["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in told[:-1])


def test_drafts_come_only_when_asked_for_and_replace_one_another(server: Running) -> None:
    asked = {"messages": said("hi"), "seed": 3, "max_tokens": 40}
    assert not any("type" in chunk for chunk in server.chunks(asked))
    told = server.chunks(asked | {"diffusion": {"drafts": "tokens"}})
    frames = [chunk for chunk in told if chunk.get("type") == "diffusion_frame"]
    assert content(told) == content(server.chunks(asked))
    assert all(frame["choices"] == [{"index": 0, "delta": {}, "finish_reason": None}] for frame in frames)
    assert {frame["block"] for frame in frames} == {0, 1, 2}
    last: dict[str, Any] = {}
    for frame in frames:
        assert frame["total"] == 12 and len(frame["diffusion"]["tokens"]) == small.CANVAS
        for token, piece, entropy, accepted in frame["diffusion"]["tokens"]:
            assert isinstance(token, int) and isinstance(piece, str) and entropy >= 0 and isinstance(accepted, bool)
            assert piece not in small.MARKERS
        last[frame["block"]] = frame
    words = server.chunks(asked | {"diffusion": {"drafts": "text"}})
    assert not any("tokens" in chunk["diffusion"] for chunk in words if chunk.get("type"))
    for arguments, param in (
        ({"stream": False}, "diffusion.drafts"),
        ({"stream": True, "diffusion": {"drafts": "text", "decoding": "autoregressive"}}, "diffusion.drafts"),
    ):
        refused = server.post({"diffusion": {"drafts": "text"}} | asked | arguments)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param


def test_mercurys_drafts_are_the_whole_answer_so_far(server: Running) -> None:
    asked = {"messages": said("hi"), "seed": 3, "max_tokens": 40}
    told = server.chunks(asked | {"diffusing": True})
    contents = [c["delta"]["content"] for chunk in told for c in chunk["choices"] if "content" in c["delta"]]
    assert len(contents) > 4 and contents[-1] == content(server.chunks(asked))


def test_openai_python(client: openai.OpenAI) -> None:
    messages: Any = said("hello")
    whole = client.chat.completions.create(model="x", messages=messages, seed=2, max_completion_tokens=32)
    drafted = {"diffusion": {"drafts": "tokens"}}
    plain = client.chat.completions.create(
        model="x", messages=messages, seed=2, max_completion_tokens=32, stream=True, extra_body=drafted
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in plain)
    with client.chat.completions.stream(
        model="x", messages=messages, seed=2, max_completion_tokens=32, extra_body=drafted
    ) as stream:
        final = stream.get_final_completion()
    assert whole.choices[0].message.content == text == final.choices[0].message.content
    assert [model.id for model in client.models.list()] == ["small"] and client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="There is no model 'other' here"):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="x", messages=messages, temperature=-1)
    assert caught.value.param == "temperature"


def test_completions_take_texts_ids_and_lists(server: Running, folder: Path) -> None:
    model = small.model(folder)
    expected = [model.generate(model.text_ids("ab"), seed=5, max_tokens=16).text]
    ids = model.text_ids("ab")
    for prompt in ("ab", ids, ["ab"], [ids]):
        made = server.post({"prompt": prompt, "seed": 5, "max_tokens": 16}, COMPLETIONS).json()
        assert [choice["text"] for choice in made["choices"]] == expected
    both = server.post({"prompt": ["ab", "c"], "seed": 5, "max_tokens": 16, "n": 1}, COMPLETIONS).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["usage"]["prompt_tokens"] == len(ids) + len(ids) - 1
    echoed = server.post({"prompt": "ab", "seed": 5, "max_tokens": 16, "echo": True}, COMPLETIONS).json()
    assert echoed["choices"][0]["text"] == "ab" + expected[0]
    streamed = server.chunks({"prompt": "ab", "seed": 5, "max_tokens": 16}, COMPLETIONS)
    assert "".join(choice["text"] for chunk in streamed for choice in chunk["choices"]) == expected[0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": said("a"), "n": 0}, "n"),
        ({"messages": said("a"), "max_tokens": "9"}, "max_tokens"),
        ({"messages": said("a"), "stop": [""]}, "stop[0]"),
        ({"messages": said("a"), "stream": 1}, "stream"),
        ({"messages": said("a"), "diffusion": {"step": 3}}, "diffusion.step"),
        ({"messages": said("a"), "diffusion": {"retries": 1}, "stream": True}, "diffusion.retries"),
        ({"messages": said("a"), "functions": [{"name": "f"}]}, "functions"),
        ({"messages": said("a"), "function_call": "auto"}, "function_call"),
        ({"messages": said("a"), "modalities": ["text", "audio"]}, "modalities[1]"),
        ({"messages": said("a"), "response_format": {"type": "yaml"}}, "response_format.type"),
        ({"messages": said("a"), "tool_choice": "required"}, "tool_choice"),
        ({"messages": said("a"), "top_logprobs": 3}, "top_logprobs"),
        ({"messages": said("a" * 600)}, "messages"),
    ],
    ids=str,
)
def test_a_refusal_names_the_field(server: Running, body: dict[str, Any], param: str) -> None:
    refused = server.post(body)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == param and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"].splitlines()) <= 3


def test_a_prompt_that_is_too_long_is_told_both_counts(server: Running) -> None:
    error = server.post({"messages": said("a" * 600)}).json()["error"]
    assert error["code"] == "context_length_exceeded" and "512" in error["message"] and "61" in error["message"]


def test_every_error_has_openais_shape(server: Running) -> None:
    with server.client() as client:
        answers = {
            404: client.get("/v1/nothing"),
            405: client.get("/v1/chat/completions"),
            400: client.post("/v1/chat/completions", content=b"{"),
        }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_sampling_fields_without_a_meaning_are_listed_and_unknown_ones_ignored(server: Running) -> None:
    meaningless = {
        "frequency_penalty": 2,
        "presence_penalty": "x",
        "top_p": 0.3,
        "top_k": -7,
        "logit_bias": {"1": -100},
    }
    body = {"messages": said("hi"), "seed": 1, "max_tokens": 16}
    plain, told = server.post(body), server.post(body | meaningless | {"prompt_cache_key": "x", "store": False})
    assert sorted(told.json()["diffusion"]["ignored"]) == sorted(meaningless)
    assert told.json()["choices"] == plain.json()["choices"]
    drawn = server.post(body | {"top_k": 1, "diffusion": {"decoding": "autoregressive"}}).json()
    greedy = server.post(body | {"temperature": 0, "diffusion": {"decoding": "autoregressive"}}).json()
    assert drawn["choices"] == greedy["choices"] and drawn["diffusion"]["ignored"] == []


def test_n_answers_are_a_batch_with_seeds_in_a_row(server: Running, folder: Path) -> None:
    body = {"messages": said("hi"), "seed": 4, "n": 3, "max_tokens": 32}
    choices = server.post(body).json()["choices"]
    model = small.model(folder)
    assert [c["message"]["content"] for c in choices] == [
        result.text for result in model.generate([said("hi")] * 3, seed=4, max_tokens=32)
    ]
    chunks = server.chunks(body)
    assert [content(chunks, row=row) for row in range(3)] == [c["message"]["content"] for c in choices]


def test_a_stop_cuts_across_canvases_and_is_not_said(server: Running) -> None:
    body = {"messages": said("hello"), "seed": 3, "max_tokens": 200}
    whole = server.post(body).json()
    text = whole["choices"][0]["message"]["content"]
    assert len(text) > 3 * small.CANVAS
    place = 2 * small.CANVAS + 5
    stop = text[place - 8 : place + 8]
    assert text.index(stop) == place - 8
    made = server.post(body | {"stop": ["never said", stop]}).json()
    assert made["choices"][0]["message"]["content"] == text[: place - 8]
    assert made["choices"][0]["finish_reason"] == "stop"
    assert made["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
    assert content(server.chunks(body | {"stop": stop})) == text[: place - 8]


def test_json_is_what_was_asked_for(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    body = {"messages": said("hi"), "seed": 4, "max_tokens": 48, "response_format": form}
    made = server.post(body).json()["choices"][0]
    assert isinstance(json.loads(made["message"]["content"])["a"], int) and made["finish_reason"] == "stop"
    refused = server.post(body | {"response_format": {"type": "json_schema", "json_schema": {"schema": False}}})
    assert refused.status_code == 400


def test_pins_stay(server: Running) -> None:
    pins = {"text": "a<fill>b<fill>", "holes": [{"choices": ["x", "yy"]}, {"pattern": "[0-9]"}]}
    body = {"messages": said("hi"), "seed": 4, "max_tokens": 16, "diffusion": {"pins": pins}}
    text = server.post(body).json()["choices"][0]["message"]["content"]
    assert text[0] == "a" and text.rstrip("0123456789") in ("axb", "ayyb")


def test_logprobs(server: Running, folder: Path) -> None:
    body = {"messages": said("hello"), "seed": 3, "max_tokens": 32, "logprobs": True, "top_logprobs": 2}
    whole = server.post(body).json()["choices"][0]
    result = small.model(folder).generate(said("hello"), seed=3, max_tokens=32, logprobs=2)
    told = whole["logprobs"]["content"]
    assert [entry["logprob"] for entry in told] == pytest.approx(list(result.logprobs or ()), abs=1e-5)
    assert all(len(entry["top_logprobs"]) == 2 and entry["canvas_logprob"] <= 0 for entry in told)
    known = small.model(folder).tokenizer.token_bytes
    spelled = [known[i] and list(known[i] or b"") for i in result.tokens]
    assert [entry["bytes"] for entry in told] == spelled
    streamed = [
        entry
        for chunk in server.chunks(body)
        for choice in chunk["choices"]
        for entry in (choice.get("logprobs") or {"content": ()})["content"]
    ]
    assert streamed == told
    numbers = {"prompt": "ab", "seed": 5, "max_tokens": 16, "logprobs": 1}
    lists = server.post(numbers, COMPLETIONS).json()["choices"][0]["logprobs"]
    assert len({len(lists[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1


def test_a_suffix_is_filled_in(server: Running) -> None:
    body = {"prompt": "ab", "suffix": "yz", "seed": 3, "max_tokens": 14}
    text = server.post(body, COMPLETIONS).json()["choices"][0]["text"]
    assert text and content_of(server.chunks(body, COMPLETIONS)) == text


def content_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
