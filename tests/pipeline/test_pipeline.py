"""The Python API: prompts of every kind, streaming, batches, chat, and what happens when two want the model at once."""

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_diffgemma.errors import BusyError, ConfigError, DiffGemmaError, NoiseError, PromptError, TokenizerError
from mlx_diffgemma.generation.events import Committed, Denoised, Finished, Prefilled
from mlx_diffgemma.generation.noise import NoiseRecorder, RecordedNoise, SeededNoise
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.results import Answers, Result
from mlx_diffgemma.text.tokenizer import Growing, Tokenizer
from tests import small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionGemma:
    return small.model(tmp_path_factory.mktemp("model"))


def one(result: Any) -> Result:
    assert isinstance(result, Result)
    return result


def test_text_messages_and_ids_are_the_same_prompt(model: DiffusionGemma) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    ids = model.tokenizer.apply_chat_template(messages)
    answers = [one(model.generate(prompt, seed=3)) for prompt in ("Hi", messages, ids)]
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens
    assert answers[0].seed == 3 and len(answers[0].tokens) > 0


def test_a_result_says_everything(model: DiffusionGemma) -> None:
    result = one(model.generate("Hi", seed=1))
    assert result.text == model.tokenizer.split(result.tokens).text
    assert result.tokens == tuple(i for c in result.canvases for i in c.ids)
    assert result.finish_reason in ("stop", "length")
    assert result.statistics.steps == sum(c.steps for c in result.canvases)


def test_without_a_seed_runs_differ_and_say_their_seed(model: DiffusionGemma) -> None:
    first, second = one(model.generate("Hi")), one(model.generate("Hi"))
    assert first.seed != second.seed
    assert one(model.generate("Hi", seed=first.seed)).tokens == first.tokens


def test_stream_gives_events_as_they_happen(model: DiffusionGemma) -> None:
    events = model.stream("Hi", seed=1)
    kinds = [type(next(events)) for _ in range(2)]
    assert kinds == [Prefilled, Denoised]
    rest = list(events)
    finished = rest[-1]
    assert isinstance(finished, Finished)
    assert finished.result == pytest.approx(finished.result)
    assert "".join(e.text for e in rest if isinstance(e, Committed)) == finished.result.text
    assert finished.result.tokens == one(model.generate("Hi", seed=1)).tokens


def test_batch_rows_equal_single_runs(model: DiffusionGemma) -> None:
    prompts = ["Hi", "What is a much longer question?", [{"role": "user", "content": "x"}]]
    together = model.generate(prompts, seeds=[1, 2, 3])
    assert isinstance(together, list) and len(together) == 3
    for prompt, seed, row in zip(prompts, (1, 2, 3), together, strict=True):
        alone = one(model.generate(prompt, seed=seed))
        assert (row.text, row.tokens, row.seed) == (alone.text, alone.tokens, seed)
        assert row.canvases == pytest.approx(row.canvases)
        assert [c.steps for c in row.canvases] == [c.steps for c in alone.canvases]


def test_a_batch_of_ids(model: DiffusionGemma) -> None:
    results = model.generate([[2, 40], [2, 41, 42]], seed=5)
    assert isinstance(results, list)
    assert [r.seed for r in results] == [5, 6]


def test_half_a_character_waits_for_its_rest(model: DiffusionGemma) -> None:
    ids = model.tokenizer.encode("aé")
    answers = Answers(model.tokenizer, [[2]], [None])
    assert answers.read(0, tuple(ids[:2]), last=False) == ("a", "")
    assert answers.read(0, tuple(ids[2:]), last=False) == ("é", "")
    half = (*model.tokenizer.encode("b"), small.FIRST_BYTE + 0xC3)
    assert answers.read(0, half, last=True) == ("b\ufffd", "")


def test_a_long_answer_is_not_read_again_at_every_token(model: DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token: what is decoded for one does not grow with the answer, and the parts are the whole."""
    tokenizer, counts, decode = model.tokenizer, [], Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, **of: counts.append(len(ids)) or decode(self, ids, **of))
    ids = tokenizer.encode("a é🙂\nword " * 200)
    answers = Answers(tokenizer, [[2]], [None])
    parts = [answers.read(0, (token,), last=i == len(ids))[0] for i, token in enumerate(ids, 1)]
    assert "".join(parts) == decode(tokenizer, ids)
    assert len(ids) > 2000 and sorted(counts)[-2] <= 2 * Growing.NEW  # the whole once, at the end


def test_a_stream_spells_the_text_where_half_a_character_spoils_what_is_shown(model: DiffusionGemma) -> None:
    """A run of byte tokens is characters or none: é and half an é are three errors until the other half comes."""
    first, second = model.tokenizer.encode("é")
    answers = Answers(model.tokenizer, [[2]], [None])
    canvases = [(first, second), (first,), (second,)]
    parts = [answers.read(0, ids, last=i == 2)[0] for i, ids in enumerate(canvases)]
    assert parts == ["é", "", "é"]


def test_chat_prefills_only_what_is_new_and_changes_nothing(model: DiffusionGemma) -> None:
    chat = model.chat(system="Be brief.", max_tokens=20)
    chat.send("Hi", seed=1)
    first_prompt = len(model.ids([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]))
    second = chat.send("And now?", seed=2)
    fresh = one(model.generate(chat.messages[:-1], seed=2, max_tokens=20))
    assert second.tokens == fresh.tokens
    assert second.statistics.reused_tokens == first_prompt
    assert fresh.statistics.reused_tokens == 0
    third = chat.send("Again?", seed=3)
    assert third.tokens == one(model.generate(chat.messages[:-1], seed=3, max_tokens=20)).tokens
    assert third.statistics.reused_tokens == second.statistics.prompt_tokens


def test_chat_reuses_what_lasts_when_the_template_opens_the_turn_in_its_own_way(model: DiffusionGemma) -> None:
    """The thought that this template opens is not in the history it writes: only what is before it lasts."""
    chat = model.chat(max_tokens=20, enable_thinking=True)
    first = chat.send("Hi", seed=1)
    second = chat.send("And now?", seed=2)
    opened = len(model.tokenizer.encode("<|channel>thought\n"))
    assert second.statistics.reused_tokens == first.statistics.prompt_tokens - opened
    fresh = one(model.generate(chat.messages[:-1], seed=2, max_tokens=20, enable_thinking=True))
    assert second.tokens == fresh.tokens


def test_chat_reset_and_an_abandoned_turn(model: DiffusionGemma) -> None:
    chat = model.chat(max_tokens=20)
    chat.send("Hi", seed=1)
    abandoned = chat.stream("This is given up", seed=2)
    next(event for event in abandoned if isinstance(event, Denoised))
    abandoned.close()  # type: ignore[attr-defined]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    again = chat.send("And now?", seed=4)
    assert again.statistics.reused_tokens > 0  # what was kept before the abandoned turn
    assert again.tokens == one(model.generate(chat.messages[:-1], seed=4, max_tokens=20)).tokens
    chat.reset()
    assert chat.messages == []
    assert chat.send("Hi", seed=1).statistics.reused_tokens == 0


def test_a_second_thread_is_told_to_wait(model: DiffusionGemma) -> None:
    events = model.stream("Hi", seed=1)
    next(events)
    errors: list[Exception] = []

    def other() -> None:
        try:
            model.generate("Hi", seed=2)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert [type(e) for e in errors] == [BusyError]
    with pytest.raises(BusyError, match="generating already"):
        model.generate("Hi")
    events.close()  # type: ignore[attr-defined]
    assert one(model.generate("Hi", seed=2)).tokens


def test_another_thread_may_use_the_model_afterwards(model: DiffusionGemma) -> None:
    here = one(model.generate("Hi", seed=2))
    there: list[Result] = []
    thread = threading.Thread(target=lambda: there.append(one(model.generate("Hi", seed=2))))
    thread.start()
    thread.join()
    assert there[0].tokens == here.tokens


def test_a_run_is_repeated_from_its_noise(model: DiffusionGemma, tmp_path: Path) -> None:
    recorder = NoiseRecorder(SeededNoise([9], length=small.CANVAS, vocabulary=small.VOCABULARY))
    recorded = one(model.generate("Hi", noise=recorder))
    recorder.save(tmp_path / "noise.npz")
    noise = RecordedNoise.load(tmp_path / "noise.npz")
    assert one(model.generate("Hi", noise=noise)).tokens == recorded.tokens
    with pytest.raises(NoiseError, match="for 1 prompts"):
        model.generate(["a", "b"], noise=noise)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([], {}, PromptError, "a prompt is text"),
        ([{"content": "no role"}], {}, PromptError, "a prompt is text"),
        ([0, small.VOCABULARY], {}, PromptError, f"has the id {small.VOCABULARY}; this model's ids are 0"),
        ([2, 40], {"enable_thinking": True}, PromptError, "a prompt of ids has none"),
        ("Hi", {"seed": 1, "seeds": [1]}, PromptError, "seed and seeds"),
        (["a", "b"], {"seeds": [1]}, PromptError, "1 seeds for 2 prompts"),
        ("Hi", {"max_new_tokens": 3}, ConfigError, "Did you mean 'max_tokens'"),
        ("Hi", {"top_p": 0.9}, ConfigError, "top_p would do nothing in diffusion"),
    ],
)
def test_what_cannot_be_done_is_refused(
    model: DiffusionGemma, prompt: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.generate(prompt, **options)


def test_an_empty_text_is_still_a_turn(model: DiffusionGemma) -> None:
    assert one(model.generate("", seed=1)).statistics.prompt_tokens > 0


def test_a_canvas_of_special_tokens_is_an_empty_text(model: DiffusionGemma) -> None:
    answers = Answers(model.tokenizer, [[2]], [None])
    assert answers.read(0, (small.BOS, 3, small.BOS), last=True) == ("", "")


def test_max_tokens_one(model: DiffusionGemma) -> None:
    result = one(model.generate("Hi", seed=1, max_tokens=1))
    assert len(result.tokens) == 1 and result.finish_reason == "length"


def test_without_a_tokenizer_ids_still_work(tmp_path: Path) -> None:
    bare = DiffusionGemma(small.network(), None, GenerationConfig(max_tokens=5), folder=tmp_path)
    result = one(bare.generate([2, 40], seed=1))
    assert len(result.tokens) == 5 and result.text == ""
    with pytest.raises(TokenizerError, match="no tokenizer"):
        bare.generate("Hi")


def test_generating_again_and_again_keeps_memory_flat(model: DiffusionGemma) -> None:
    def memory() -> int:
        model.generate("Hi", seed=1, max_tokens=20)
        return mx.get_active_memory() + mx.get_cache_memory()

    memory()
    assert len({memory() for _ in range(10)}) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.fill(5), "text is 5, expected text"),
        (lambda m: m.fill(prefix=[]), "prefix is [], expected text"),
        (lambda m: m.fill("a <fill>", holes=[5]), "holes is [5], expected a list of mlx_diffgemma.Hole"),
        (lambda m: m.fill("a <fill>", max_tokens="x"), "max_tokens is 'x', expected a positive integer"),
        (lambda m: m.fill("a <fill>", canvas_length=0), "canvas_length is 0"),
        (lambda m: m.edit("a", lines="x", instruction="y"), "lines is 'x', expected a list"),
        (lambda m: m.edit("a", lines=(1, 1.5), instruction="y"), "lines[1] is 1.5, expected an integer"),
        (lambda m: m.edit(5, lines=(1, 1), instruction="y"), "text is 5, expected text"),
        (lambda m: m.edit("a", lines=(1, 1), instruction=None), "instruction is null, expected text"),
        (lambda m: m.decide(5, {"a": {"question": "x"}}), "the state is 5, expected text"),
        (lambda m: m.decide("x", {"a": {"question": "x"}}, orders="no"), "orders is 'no', expected true or false"),
        (lambda m: m.decide("x", {"a": {"question": "x"}}, seed=1.5), "seed is 1.5, expected an integer"),
        (lambda m: m.decide("x", {"a": {"question": "x"}}, template=5), "template is 5, expected text"),
        (lambda m: m.generate("a", regex=5), "regex is 5, expected text"),
        (lambda m: m.generate("a", regex=""), "regex is empty"),
        (lambda m: m.generate("a", json_schema={"type": "string", "minLength": 10**8}), "the JSON schema: a string"),
        (lambda m: m.generate("a", template_options=5), "template_options is 5, expected an object"),
        (lambda m: m.score("a", answer=5), "answer is 5, expected text"),
        (lambda m: m.generate("a", stop_ids=(1, -1)), "stop_ids[1] is -1, expected an integer of at least 0"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(model: DiffusionGemma, call: Any, words: str) -> None:
    with pytest.raises(DiffGemmaError) as caught:
        call(model)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3
