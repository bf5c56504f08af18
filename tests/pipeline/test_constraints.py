"""Answers that obey: schemas, patterns, choices, thoughts, calls, texts with holes, edited lines."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import pytest

from benchmarks import obey, obey_answers
from mlx_diffgemma import Hole, Language, choices, literal, load, regex
from mlx_diffgemma.errors import ConfigError, PromptError, TokenizerError
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.generation.events import Committed, Denoised, Finished
from mlx_diffgemma.generation.noise import RecordedNoise
from mlx_diffgemma.generation.settings import LED_STEPS
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.obeying.constraints import THINK, thought
from mlx_diffgemma.pipeline.obeying.drafts import at_cursor, of_lines
from mlx_diffgemma.pipeline.results import Result, result_json
from mlx_diffgemma.terminal.sinks import summary
from mlx_diffgemma.text.tokenizer import Tokenizer
from tests import small

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"name": "weather", "parameters": {"properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}}
QUICK: Any = {"max_denoising_steps": 4}  # what is asked for has no sense, and would hardly settle
PUZZLE = "63. ...\n.15 63.\n.56 2..\n.21 ..5\n... 5..\n... 34."


@pytest.fixture(scope="module")
def demo() -> DiffusionGemma:
    return load(BUILT_IN)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionGemma:
    return small.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def caller(demo: DiffusionGemma) -> DiffusionGemma:
    """The built-in model with a template that shows tools."""
    source, name = demo.tokenizer.template()
    beside = dataclasses.replace(demo.tokenizer.beside, templates={"default": (source + "{{ tools }}", name)})
    return DiffusionGemma(demo.network, Tokenizer(demo.tokenizer.vocabulary, beside), demo.generation_config)


def one(result: Any) -> Result:
    assert isinstance(result, Result)
    return result


# ----------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize("seed", [1, 2])
def test_a_schema_is_obeyed_and_the_result_says_how(demo: DiffusionGemma, seed: int) -> None:
    result = one(demo.generate("Write this as JSON:\nname: Ada\nage: 36", json_schema=SCHEMA, seed=seed))
    assert json.loads(result.text) == {"name": "Ada", "age": 36}
    assert result.finish_reason == "stop" and result.constraint is not None
    told = result.constraint
    assert told.log_probability == sum(canvas.log_probability or 0 for canvas in result.canvases) <= 1e-6
    assert told.states > 20 and told.classes > 5 and told.pairs >= told.states and told.compile_seconds > 0
    assert result_json(result)["constraint"]["states"] == told.states
    assert "constraint" not in result_json(one(demo.generate("Hi", seed=1, **QUICK)))


def test_an_unfit_model_obeys_too(model: DiffusionGemma) -> None:
    for seed in range(3):
        result = one(model.generate("Hi", json_schema=SCHEMA, seed=seed))
        jsonschema.validate(json.loads(result.text), SCHEMA)
        assert result.finish_reason == "stop"


def test_a_schema_comes_as_dict_as_text_or_as_a_model_class(demo: DiffusionGemma) -> None:
    class Record:
        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return SCHEMA

    made = [demo.prepare("Hi", json_schema=schema).constraints for schema in (SCHEMA, json.dumps(SCHEMA), Record)]
    assert made[0][0] and all(one and one.constraint is made[0][0].constraint for [one] in made), "kept by content"


def test_a_pattern_holds_from_end_to_end(demo: DiffusionGemma) -> None:
    assert one(demo.generate("Hi", regex="[1-6]{3} [1-6]{3}", seed=1, **QUICK)).text.replace(" ", "").isdecimal()


def test_choices_are_spelled_as_the_tokenizer_spells_them(demo: DiffusionGemma) -> None:
    result = one(demo.generate("Hi", choices=["Monday", "Mondays"], seed=1, **QUICK))
    assert result.tokens == tuple(demo.tokenizer.encode(result.text)) and result.text in ("Monday", "Mondays")


def test_languages_can_be_joined(demo: DiffusionGemma) -> None:
    language = literal("Answer: ") + regex("[0-9]{2}") + choices([" red", " blue"])
    text = one(demo.generate("Hi", constraint=language, seed=1, **QUICK)).text
    assert text[:8] == "Answer: " and text[8:10].isdecimal() and text[10:] in (" red", " blue")


def test_each_row_has_a_constraint_of_its_own_or_none(model: DiffusionGemma) -> None:
    languages = [regex("[0-9]{4}"), None, choices(["yes", "no"])]
    results = model.generate(["Hi", "Hi", "Hi"], constraint=languages, seeds=[1, 2, 3])
    assert isinstance(results, list)
    assert len(results[0].text) == 4 and results[0].text.isdecimal() and results[2].text in ("yes", "no")
    assert results[1].tokens == one(model.generate("Hi", seed=2)).tokens and results[1].constraint is None


def test_a_saved_run_is_repeated_from_its_noise(model: DiffusionGemma, tmp_path: Path) -> None:
    request = model.prepare("Hi", regex="[a-z]{5}", seed=3)
    recorder = request.record()
    [first] = request.run()
    recorder.save(tmp_path / "noise.npz")
    noise = RecordedNoise.load(tmp_path / "noise.npz")
    assert one(model.generate("Hi", regex="[a-z]{5}", noise=noise)).tokens == first.tokens


def test_chat_turns_obey(model: DiffusionGemma) -> None:
    chat = model.chat(regex="[0-9]{3}", seed=1)
    assert [len(chat.send(text).text) for text in ("Hi", "Again")] == [3, 3]


def test_a_constraint_goes_with_token_by_token_and_with_several_answers(model: DiffusionGemma) -> None:
    chosen: list[dict[str, Any]] = [{"best_of": 3}, {"retries": 2}, {"decoding": "autoregressive"}]
    chosen += [{"decoding": "autoregressive", "best_of": 2, "top_p": 0.9}]
    for options in chosen:
        result = one(model.generate("Hi", regex="[a-f]{5}(, [0-9]+)?", seed=1, **options))
        assert re.fullmatch("[a-f]{5}(, [0-9]+)?", result.text) and result.constraint is not None
        assert (result.constraint.log_probability is None) == ("decoding" in options)
        assert "obeyed" in summary(result) and ("log Z" in summary(result)) == ("decoding" not in options)
    text = model.fill("ab<fill>c", seed=1, decoding="autoregressive").text
    assert text.startswith("ab") and text.endswith("c") and len(text) > 3
    with pytest.raises(ConfigError, match="has no canvas"):
        model.edit("a\nb\n", lines=(1, 1), instruction="Shout", start="text", decoding="autoregressive")


def test_what_the_signal_keeps_counts_as_memory(model: DiffusionGemma) -> None:
    bare = model.prepare("Hi", seed=1)._kept_bytes()
    kept = model.prepare(["Hi", "Ho"], regex="[a-z]+", seed=1)._kept_bytes()
    assert bare == 0 and kept == 2 * small.CANVAS * (2 * 26 + 2 + 1) * 4, "letters in two spellings, stops, padding"
    assert model.prepare("Hi", regex="[a-z]+", decoding="autoregressive")._kept_bytes() == 0


def test_what_is_around_a_hole_leads_from_the_first_step(model: DiffusionGemma) -> None:
    """It says what the prompt may not; nobody need be told that."""
    assert model.prepare("Hi", regex="[a-z]+").settings.led_steps == LED_STEPS
    assert model.prepare_fill("a<fill>b").settings.led_steps == 0
    assert model.prepare_fill("a<fill>b", free_steps=3).settings.led_steps == 3
    assert model.fill("a<fill>b", seed=1).statistics.departures == {}
    assert model.fill("a<fill>b", seed=1, decoding="autoregressive").text.startswith("a")


# ------------------------------------------------------------------------------------------------- thoughts and calls


@pytest.mark.parametrize("max_tokens", [6, 16, 40])
def test_a_thought_is_free_and_closed_in_time(model: DiffusionGemma, max_tokens: int) -> None:
    result = one(model.generate("Hi", choices=["yes", "no"], enable_thinking=True, max_tokens=max_tokens, seed=1))
    assert result.text in ("yes", "no") and small.END_CHANNEL in result.tokens
    assert len(result.tokens) <= max_tokens


def test_a_prompt_that_asks_for_thinking_allows_a_thought(demo: DiffusionGemma) -> None:
    tokenizer = demo.tokenizer
    plain, asked = tokenizer.encode("Hi"), tokenizer.encode(f"{THINK}\nHi")
    assert not thought(tokenizer, plain).parts
    made = demo.compiler.compiled(choices(["red"]), asked, demo.generation_config).constraint
    red = tokenizer.encode("red")
    spoken = tokenizer.encode("<|channel>thought\nblue, or 7?<channel|>")
    for ids, ends in ((red, True), (spoken + red, True), (spoken, False), (spoken[:-1] + red, False)):
        state = made.walk(made.start, ids)
        assert state >= 0 and (made.distance[state] == 0) == ends
    assert made.walk(made.start, spoken + spoken) < 0


def test_a_forced_call_obeys_the_function(caller: DiffusionGemma) -> None:
    tools = [{"type": "function", "function": TOOL}, {"type": "function", "function": {"name": "other"}}]
    for choice in ("weather", "required"):
        result = one(caller.generate("Hi", tools=tools, tool_choice=choice, seed=2, **QUICK))
        [call] = result.tool_calls
        assert call["name"] == "other" or call["arguments"]["city"] in ("Paris", "Rome")
        assert choice == "required" or call["name"] == "weather"
    assert caller.prepare("Hi", tools=tools, tool_choice="auto").constraints == [None]
    chat = caller.chat(tools=tools, tool_choice="weather", seed=2, **QUICK)
    assert chat.send("Hi").tool_calls[0]["name"] == chat.messages[-1]["tool_calls"][0]["function"]["name"] == "weather"
    with pytest.raises(ConfigError, match="names 'wether'; there are weather, other, and auto"):
        caller.prepare("Hi", tools=tools, tool_choice="wether")


# ------------------------------------------------------------------------------------------------------ fill and edit


def test_a_sudoku_keeps_its_givens(demo: DiffusionGemma) -> None:
    cell = Hole(pattern="[1-6]")
    empty = PUZZLE.count(".")
    result = demo.fill(PUZZLE, mark=".", holes=[cell] * empty, prompt=f"Solve this Sudoku:\n{PUZZLE}", seed=1)
    assert all(given in (".", found) for given, found in zip(PUZZLE, result.text, strict=True))
    assert result.holes == tuple(found for given, found in zip(PUZZLE, result.text, strict=True) if given == ".")
    assert result.finish_reason == "stop" and len(result.canvases) == 1


@pytest.mark.parametrize("seed", range(3))
def test_pins_hold_byte_for_byte(model: DiffusionGemma, seed: int) -> None:
    """Blanks at the ends, two kinds of line ends, and characters of several bytes; free holes hold something."""
    runs = (" é\t", "\r\n🙂", " ")
    result = model.fill("*".join(runs), mark="*", seed=seed)
    assert result.holes is not None and all(result.holes)
    assert result.text == runs[0] + result.holes[0] + runs[1] + result.holes[1] + runs[2]


def test_holes_are_bounded_matched_or_chosen(model: DiffusionGemma) -> None:
    holes = [Hole(least=2, most=3), Hole(pattern="[0-9]+"), Hole(choices=("b", "bc"))]
    found = model.fill("<fill>-<fill>-<fill>", holes=holes, seed=1).holes
    assert found is not None
    assert 2 <= len(found[0]) <= 3 and found[1].isdecimal() and found[2] in ("b", "bc")


def test_pinned_positions_are_marked_in_the_events(model: DiffusionGemma) -> None:
    events = list(model.prepare_fill("ab<fill>", holes=[Hole(choices=("xyz", "uvw"))], seed=1).events())
    [last] = [event for event in events if isinstance(event, Denoised)][-1:]
    assert last.pinned is not None and last.pinned[0, :5].tolist() == [True, True, False, True, True]


def test_a_cursor_has_its_lines_on_the_canvas_and_the_file_in_the_prompt(model: DiffusionGemma) -> None:
    prefix, suffix = "far away\nabove\nx = ", "+ 1\nbelow\nthe end\n"
    request = model.prepare_fill(prefix=prefix, suffix=suffix, seed=1)
    assert prefix + "<fill>" + suffix in model.tokenizer.decode(request.prompts[0])
    events = list(request.events())
    [finished] = [event for event in events if isinstance(event, Finished)]
    result = finished.result
    assert result.text == prefix + result.holes[0] + suffix and result.holes[0]
    assert "".join(event.text for event in events if isinstance(event, Committed)) == result.text
    assert model.tokenizer.decode(result.tokens) == "x = " + result.holes[0] + "+ 1\n"


def test_of_a_file_as_much_is_pinned_as_fits() -> None:
    above, below = "".join(f"a{n}\n" for n in range(9)), "".join(f"b{n}\n" for n in range(9))
    draft = at_cursor(above + "in", "side\n" + below, 40, len)
    assert draft.runs == ("a7\na8\nin", "side\nb0\nb1\n"), "half of the canvas, from both sides"
    assert draft.whole("|".join(draft.runs)) == above + "in|side\n" + below
    draft = of_lines(above + below, (10, 11), 40, len)
    assert (draft.runs, draft.holes[0].pattern) == (("a6\na7\na8\n", "b2\nb3\nb4\n"), r"([^\n]*\n)*")
    assert draft.whole("".join(draft.runs)) == above + "".join(below.splitlines(keepends=True)[2:])


@pytest.mark.parametrize(
    "text", ["one\ntwo\nthree\nfour\n", "one\r\ntwo\r\nthree\r\nfour", "one\n\nthree\x0cx\nfour\n"]
)
@pytest.mark.parametrize("start", ["noise", "text"])
def test_edited_lines_alone_change(model: DiffusionGemma, text: str, start: Any) -> None:
    for lines in ((2, 2), (2, 3), (4, 4)):
        result = model.edit(text, lines=lines, instruction="Shout", start=start, seed=1)
        every = text.split("\n")
        before, after = "".join(line + "\n" for line in every[: lines[0] - 1]), "\n".join(every[lines[1] :])
        assert result.text.startswith(before) and result.text.endswith(after)
        assert lines[1] == 4 or result.text[: len(result.text) - len(after)].endswith("\n")
        assert result.statistics.departures == ({"start": "text"} if start == "text" else {})


def test_a_canvas_can_begin_as_the_text_was(model: DiffusionGemma) -> None:
    request = model.prepare_edit("a\nb\nc\n", lines=(2, 2), instruction="Shout", start="text", seed=1)
    canvas = request.noise.canvas(0)[0].tolist()
    assert model.tokenizer.decode(canvas) == "a\nb\nc\n" and canvas[6] in (small.EOS, small.TURN_END)
    assert mx.array_equal(request.noise.ids(0, 0), model.prepare("Hi", seed=1).noise.ids(0, 0))


# ---------------------------------------------------------------------------------------------------------- bad input


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"regex": "a", "choices": ["b"]}, ConfigError, "regex and choices would both"),
    ({"constraint": "a"}, ConfigError, "constraint is a Language"),
    ({"constraint": [None, None]}, ConfigError, "2 constraints for 1 prompts"),
    ({"constraint": [3]}, ConfigError, "constraint holds 3"),
    ({"regex": "(a"}, ConfigError, "at position 0"),
    ({"regex": r"a\bc"}, ConfigError, "a word boundary"),
    ({"regex": "[^\\x00-\\U0010ffff]"}, ConfigError, "matches no text"),
    ({"json_schema": "{"}, ConfigError, "line 1, column 2"),
    ({"json_schema": {"properties": {"a": {"if": {}}}}}, ConfigError, "#/properties/a: the keyword 'if'"),
    ({"json_schema": {"enum": {3}}}, ConfigError, "schema at #/enum"),
    ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, ConfigError, "minimum is 2"),
    ({"choices": ["a", "a"]}, ConfigError, "choices 1 and 2 are equal"),
    ({"choices": ["a", ""]}, ConfigError, "a choice is empty"),
    ({"choices": []}, ConfigError, "one text or more"),
    ({"choices": ["a<turn|>"]}, TokenizerError, "'<turn|>' in it is a special token"),
    ({"regex": "a{41}"}, ConfigError, "the shortest has 41 tokens, max_tokens is 40"),
    ({"regex": "(a{1,200}b{1,200}){99}"}, ConfigError, "needs more than 25,000 states"),
    ({"regex": "a", "avoid_empty": True}, ConfigError, "avoid_empty"),
    ({"free_steps": 3}, ConfigError, "free_steps would do nothing"),
    ({"tool_choice": "weather"}, ConfigError, "there are no tools"),
]


@pytest.mark.parametrize(("asked", "kind", "words"), REFUSED)
def test_what_cannot_be_met_is_refused_before_any_work(
    model: DiffusionGemma, asked: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as caught:
        model.prepare("Hi", **asked)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


UNFILLABLE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"text": "nothing"}, ConfigError, "'<fill>' is not in it"),
    ({"text": "a.b", "mark": ""}, ConfigError, "may not be empty"),
    ({"text": "<fill>", "holes": [Hole(), Hole()]}, ConfigError, "1 marks '<fill>', but 2 holes"),
    ({"text": "x" * 17 + "<fill>"}, PromptError, "17 tokens and must be on one canvas, which holds 16"),
    ({"text": "x" * 16 + "<fill>"}, ConfigError, "the shortest has 17 tokens"),
    ({"text": "<fill>", "max_tokens": 17}, ConfigError, "one canvas of 16"),
    ({"text": "<fill>", "prefix": "a"}, ConfigError, "one of these"),
    ({}, ConfigError, "one of these"),
    ({"prefix": "", "suffix": ""}, ConfigError, "prefix and suffix are empty"),
    ({"prefix": "x" * 20}, PromptError, "the line at the cursor has 20 tokens; a canvas has 16"),
]


@pytest.mark.parametrize(("asked", "kind", "words"), UNFILLABLE)
def test_what_cannot_be_filled_in_is_refused(
    model: DiffusionGemma, asked: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as caught:
        model.prepare_fill(**asked)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


UNEDITABLE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lines": (3, 3)}, PromptError, "no lines 3–3: the text has 2 lines"),
    ({"lines": (0, 1)}, PromptError, "no lines 0–1"),
    ({"lines": (2, 1)}, PromptError, "no lines 2–1"),
    ({"lines": (2, 2)}, PromptError, "lines 2–2 have 31 tokens; a canvas has 16"),
    ({"lines": (1, 1), "instruction": " "}, ConfigError, "the instruction is empty"),
    ({"lines": (1, 1), "start": "there"}, ConfigError, "start is 'there', expected 'noise' or 'text'"),
]


@pytest.mark.parametrize(("asked", "kind", "words"), UNEDITABLE)
def test_what_cannot_be_edited_is_refused(
    model: DiffusionGemma, asked: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        model.prepare_edit("one\n" + "x" * 30 + "\n", **{"instruction": "Shout", **asked})


def test_an_empty_language_part_is_no_constraint_of_its_own(model: DiffusionGemma) -> None:
    [made] = model.prepare("Hi", constraint=Language(parts=())).constraints
    assert made is not None and made.constraint.fewest == 0


@pytest.mark.parametrize("kind", ["noised", "random"])
def test_random_schemas_and_texts_are_obeyed(kind: str, tmp_path: Path) -> None:
    """A dozen of what `python -m benchmarks.obey schemas` runs by the hundred; it raises where one is broken."""
    noised = kind == "noised"
    spoilt = (
        obey_answers.noised(load(BUILT_IN), obey.NOISE, 1)
        if noised
        else small.model(tmp_path, branches=1.0, sharpness=1.0)
    )
    assert obey.held(spoilt, 6, 3, steps=2).startswith("6 of 6 schemas valid and ended")
