"""Prompts with pictures, from parts to answers: looked at once, kept over turns by what they show, and refused where
they cannot be seen."""

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.errors import ConfigError, PromptError, TokenizerError
from mlx_diffgemma.generation import engine
from mlx_diffgemma.generation.events import Finished
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.model.blocks import Block
from mlx_diffgemma.pipeline.loading import load
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.prompts import PromptIds
from mlx_diffgemma.pipeline.results import Result, result_json
from mlx_diffgemma.pipeline.sight import Looks, Sight, own_sight
from mlx_diffgemma.text.pictures.images import open_picture
from tests import seeing, small
from tests.seeing import asked, picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionGemma:
    return seeing.model(tmp_path_factory.mktemp("seeing"))


def one(result: Any) -> Result:
    assert isinstance(result, Result)
    return result


def entropies(result: Result) -> list[float]:
    """What an answer's steps felt like: these feel every change of the prefix."""
    return [canvas.mean_entropy for canvas in result.canvases]


def test_parts_are_what_the_engine_is_given(model: DiffusionGemma) -> None:
    prompt = model.read(asked("What?", picture(1), picture(2, 9, 60)))
    config, blocks = model.seeing.pictures, []
    for placed, source in zip(prompt.pictures, (picture(1), picture(2, 9, 60)), strict=True):
        seen = open_picture(source, config)
        assert placed.stop - placed.start == seen.tokens
        tokens = model.seeing.read().see(mx.array(seen.patches()), seen.columns)
        blocks.append(Block(start=placed.start, stop=placed.stop, features=lambda tokens=tokens: tokens))
    settings = model.generation_config
    noise = SeededNoise([3], length=small.CANVAS, vocabulary=model.config.vocab_size)
    *_, last = engine.generate(model.network, [prompt.ids], settings, noise, pictures=[blocks])
    result = one(model.generate(asked("What?", picture(1), picture(2, 9, 60)), seed=3))
    assert isinstance(last, Finished) and last.statistics.steps == result.statistics.steps
    assert last.statistics.generated_tokens == len(result.tokens)
    assert one(model.generate(prompt, seed=3)).tokens == result.tokens


BRIEF: dict[str, Any] = {"max_tokens": 16, "max_denoising_steps": 2}  # more would make rounding grow
NEAR = 1e-4  # nats: rounding of a batch or of another chunk stays below, another picture does not


def test_what_is_seen_matters(model: DiffusionGemma) -> None:
    felt = [entropies(one(model.generate(asked("What?", picture(seed)), seed=1, **BRIEF))) for seed in (1, 2, 1)]
    assert felt[0] == felt[2] and abs(felt[0][0] - felt[1][0]) > 10 * NEAR


def test_a_result_says_to_what_a_picture_was_scaled(model: DiffusionGemma) -> None:
    result = one(model.generate(asked("What?", picture(1, 40, 10)), seed=1, max_tokens=4))
    [seen] = result.pictures
    assert (seen.original, seen.tokens, seen.budget) == ((40, 10), seen.size[0] * seen.size[1] // 144, 70)
    assert (
        str(seen) == f"PIL picture of mode RGB: 40 × 10 → {seen.size[0]} × {seen.size[1]}, {seen.tokens} tokens of 70"
    )
    assert result_json(result)["pictures"][0]["tokens"] == seen.tokens
    assert "pictures" not in result_json(one(model.generate("Hi", seed=1, max_tokens=4)))


def test_text_alone_keeps_its_bits(model: DiffusionGemma, tmp_path: Path) -> None:
    """The tower is not even read, and nothing of the text changes."""
    fresh = load(model.folder)
    first = one(fresh.generate("Hi", seed=5))
    assert "seeing" not in vars(fresh)
    fresh.generate(asked("Hi", picture()), seed=5, max_tokens=4)
    second = one(fresh.generate("Hi", seed=5))
    assert (first.tokens, entropies(first)) == (second.tokens, entropies(second))


def test_rows_with_different_numbers_of_pictures(model: DiffusionGemma) -> None:
    prompts: list[Any] = [asked("One?", picture(1)), "None?", asked("Two?", picture(2, 50, 8), picture(1))]
    together = model.generate(prompts, seeds=[1, 2, 3], **BRIEF)
    assert isinstance(together, list) and [len(result.pictures) for result in together] == [1, 0, 2]
    for prompt, seed, result in zip(prompts, (1, 2, 3), together, strict=True):
        alone = one(model.generate(prompt, seed=seed, **BRIEF))
        assert alone.tokens == result.tokens
        assert np.allclose(entropies(alone), entropies(result), atol=NEAR)


@pytest.mark.parametrize(
    "options", [{"best_of": 2}, {"retries": 1}, {"decoding": "autoregressive"}, {"logprobs": True}]
)
def test_other_ways_of_answering(options: dict[str, Any], model: DiffusionGemma) -> None:
    results = model.generate([asked("One?", picture(1)), "None?"], seed=1, max_tokens=8, **options)
    assert isinstance(results, list) and [len(result.pictures) for result in results] == [1, 0]
    if "logprobs" in options:
        assert results[0].logprobs is not None


def test_a_form_is_filled_in_from_a_picture(model: DiffusionGemma) -> None:
    result = model.fill("a <fill>", prompt=asked("What?", picture(1)), seed=1)
    assert result.text.startswith("a ") and len(result.pictures) == 1


def test_the_mask_is_reported_and_makes_a_difference(model: DiffusionGemma) -> None:
    prompt = asked("What?", picture(1))
    plain, other = (one(model.generate(prompt, seed=1, **mask)) for mask in ({}, {"picture_mask": "gemma4"}))
    assert plain.statistics.departures == {} and other.statistics.departures == {"picture_mask": "gemma4"}
    assert entropies(plain) != entropies(other)


# ------------------------------------------------------------------------------------------------------- looking once


def test_pictures_are_looked_at_once_and_remembered_within_bounds(model: DiffusionGemma) -> None:
    seen = [open_picture(picture(seed), model.seeing.pictures) for seed in (1, 2, 3)]
    size = model.seeing.looks.at(seen[0]).nbytes
    looks = Looks(model.seeing.read, most_bytes=2 * size)
    for number, taken in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        looks.at(seen[number])
        assert looks.taken == taken and looks.nbytes <= 2 * size
    small_ = Looks(model.seeing.read, most_bytes=0)
    assert small_.at(seen[0]).shape == (seen[0].tokens, 32) and small_.nbytes == 0


def test_threads_take_turns(model: DiffusionGemma) -> None:
    """Who opens the eyes, who looks first and who looks again may be three, two of which have ended."""
    fresh, told = load(model.folder), list[Any]()
    prompt = asked("What?", picture(1))
    works: list[Callable[[], Any]] = [lambda: fresh.read(prompt)]
    works += [lambda: told.append(one(fresh.generate(prompt, seed=1, **BRIEF)).tokens)] * 2
    for work in works:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert told == [one(model.generate(prompt, seed=1, **BRIEF)).tokens] * 2


TURNS: list[Any] = [
    [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What is this?"}],
    "And what else?",
    [{"type": "text", "text": "And here?"}, {"type": "image", "image": picture(2)}],
    "Which is larger?",
]


def test_a_conversation_encodes_what_is_new(model: DiffusionGemma, record_summary: Callable[[str], None]) -> None:
    """Four turns with two pictures: each is looked at once, only what is new is encoded, and the answers are those of
    a run from nothing."""
    model = load(model.folder)
    chat, told = model.chat(seed=4, **BRIEF), []
    for turn in TURNS:
        before = list(chat.messages)
        result = chat.send(turn)
        fresh = one(model.generate([*before, {"role": "user", "content": turn}], seed=4, **BRIEF))
        assert result.tokens == fresh.tokens
        assert np.allclose(entropies(result), entropies(fresh), atol=NEAR)
        told.append((result.statistics.prompt_tokens, result.statistics.reused_tokens))
    record_summary(
        "chat with two pictures: tokens encoded in each turn "
        + ", ".join(f"{total - reused} of {total}" for total, reused in told)
    )
    assert told[0][1] == 0
    for (before_, _), (total, reused) in pairwise(told):
        assert before_ - 20 <= reused < total  # all but the end, where the model's turn is opened
    assert model.seeing.looks.taken == 2


def test_a_prefix_is_known_by_what_its_pictures_show(model: DiffusionGemma) -> None:
    """Another picture of the same size has the same ids."""
    chat = model.chat(max_tokens=4, seed=4)
    chat.send(TURNS[0])
    [first, answer] = chat.messages
    other = model.opened(asked("What is this?", picture(9)))[0]
    for changed, reused in ((first, True), (other, False)):
        chat.messages = [changed, answer]
        known, keys = chat._kept, [model.read([m, answer]).ids for m in (first, other)]
        assert keys[0] == keys[1]
        events = [e for e in chat.stream("And?") if isinstance(e, Finished)]
        assert (events[0].statistics.reused_tokens > 60) == reused
        chat._kept = known


def test_the_budget_and_the_mask_tell_prefixes_apart(model: DiffusionGemma) -> None:
    one_, same = (model.read(asked("a", picture(1))) for _ in range(2))
    wide = model.read(asked("a", picture(1), budget=140))
    assert one_.key("transformers") == same.key("transformers") != one_.key("gemma4")
    assert one_.key("transformers")[:40] != wide.key("transformers")[:40]
    assert PromptIds(ids=[1, 2]).key("gemma4") == (1, 2) == PromptIds(ids=[1, 2]).key("transformers")


def test_no_prefix_ends_inside_of_a_picture(model: DiffusionGemma) -> None:
    """Whatever two prompts share, a pause there cuts no block."""
    seen = [{"type": "image", "image": picture(seed), "budget": size} for seed in (1, 2) for size in (70, 140)]
    chosen = [seen[:1], seen[:2], seen[1:], seen[::-1], seen[2:], [seen[0], seen[0]], [seen[0], seen[2]]]
    prompts = [model.read([{"role": "user", "content": parts}]) for parts in chosen]
    for one_ in prompts:
        for other in prompts:
            pairs = enumerate(zip(one_.key("gemma4"), other.key("gemma4"), strict=False))
            shared = next((i for i, (a, b) in pairs if a != b), min(len(one_.ids), len(other.ids)))
            assert not any(placed.start < shared < placed.stop for placed in one_.pictures)


def test_a_mask_may_be_chosen_before_there_is_a_picture(model: DiffusionGemma) -> None:
    chat = model.chat(max_tokens=4, seed=4, picture_mask="gemma4")
    assert chat.send("Hi").statistics.departures == {}
    assert chat.send(TURNS[0]).statistics.departures == {"picture_mask": "gemma4"}


# -------------------------------------------------------------------------------------------- eyes with other weights


@pytest.fixture(scope="module")
def other(model: DiffusionGemma) -> DiffusionGemma:
    """Its eyes come with a network of their own."""
    second = small.small_network(config=seeing.CONFIG, weights={"seed": 1, "branches": 0.4, "sharpness": 10.0})

    def see(owner: DiffusionGemma) -> Sight:
        return replace(own_sight(owner), network=second)

    return DiffusionGemma(model.network, model.tokenizer, model.generation_config, folder=model.folder, see=see)


def test_each_network_answers_its_own(model: DiffusionGemma, other: DiffusionGemma) -> None:
    text, seen = "Hi", asked("Hi", picture(1))
    assert entropies(one(other.generate(text, seed=1))) == entropies(one(model.generate(text, seed=1)))
    assert entropies(one(other.generate(seen, seed=1))) != entropies(one(model.generate(seen, seed=1)))
    with pytest.raises(PromptError, match="by other weights than those without"):
        other.generate([text, seen])


def test_no_prefix_passes_from_one_network_to_the_other(other: DiffusionGemma) -> None:
    chat = other.chat("Be brief, and say no more than you are asked.", max_tokens=4, seed=1)
    assert [chat.send(said).statistics.reused_tokens > 0 for said in ("Hi", "You?", TURNS[0], "So?")] == [
        False,
        True,
        False,
        True,
    ]


# -------------------------------------------------------------------------------------------------------- bad prompts


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        (asked("a <|image|>", picture()), {}, PromptError, "messages[0].content[1].text holds <|image|>, which stands"),
        ("a <|image|>", {}, PromptError, "messages[0].content holds <|image|>, which stands for a picture"),
        (asked("a", *[picture(i) for i in range(40)]), {}, PromptError, "40 pictures of 60, 60"),
        (
            asked("a", picture(0, 5000, 4), budget=1120),
            {},
            PromptError,
            "3360 patches to a side; this model's eyes know",
        ),
        (asked("a", picture(), budget=71), {}, PromptError, "a picture's budget is 71; expected 70, 140"),
        (asked("a", "nothing.png"), {}, PromptError, "nothing.png: this path does not exist"),
        (asked("a", np.zeros((2, 2, 3))), {}, PromptError, "a picture's array is float64 [2, 2, 3]"),
        (asked("a", None), {}, PromptError, "is an image, and has no picture with it"),
        ("a", {"picture_mask": "gemma4"}, ConfigError, "picture_mask would do nothing: the prompt has no picture"),
        (asked("a", picture()), {"tools": [{"x": 1}]}, TokenizerError, "tools would do nothing"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], {}, PromptError, "is a sound"),
    ],
)
def test_what_cannot_be_done_is_refused(
    model: DiffusionGemma, prompt: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        model.generate(prompt, **options)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_pictures_that_do_not_fit_are_counted(model: DiffusionGemma) -> None:
    with pytest.raises(PromptError) as caught:
        model.generate(asked("a", *[picture(i, 20, 20) for i in range(40)]))
    assert "does not fit the model's context of 2048" in str(caught.value)
    assert "40 pictures of 64, 64, 64, 64, 64, 64, 64, 64, … take 2560 of them, where there is room for" in str(
        caught.value
    )


def test_where_only_text_is_read(model: DiffusionGemma) -> None:
    for call in (lambda: model.score(asked("a", picture()), "b"), lambda: model.ids(asked("a", picture()))):
        with pytest.raises(PromptError, match="this prompt has pictures, and only text is read here"):
            call()


def test_sanitized_placeholders_are_text(model: DiffusionGemma) -> None:
    prompt = model.read(asked("a <|image|>", picture()), sanitize_control_tokens=True)
    assert len(prompt.pictures) == 1
    assert model.ids("a <|image|>", sanitize_control_tokens=True).count(seeing.IMAGE) == 0


def test_models_without_eyes_say_so(tmp_path: Path) -> None:
    blind = load(small.write_checkpoint(tmp_path / "text"))
    with pytest.raises(ConfigError, match="has no vision tower, so it cannot see pictures"):
        blind.generate(asked("a", picture()))
    bare = DiffusionGemma(blind.network, blind.tokenizer, blind.generation_config)
    with pytest.raises(ConfigError, match="made without a folder, so it has no eyes"):
        bare.generate(asked("a", picture()))


def test_a_config_that_does_not_say_where_pictures_stand(tmp_path: Path) -> None:
    import json

    folder = seeing.write_checkpoint(tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    del values["eoi_token_id"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="lacks one of boi_token_id, image_token_id, eoi_token_id"):
        load(folder).generate(asked("a", picture()))
