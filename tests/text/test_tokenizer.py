"""Text and ids, the template's switches, and taking an answer apart."""

from pathlib import Path

import pytest

from mlx_diffgemma.errors import TokenizerError
from mlx_diffgemma.text.tokenizer import Tokenizer
from tests import small


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    small.write_tokenizer(tmp_path)
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "plain", "naïve 東京 🙂", "a\nb\t c"])
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_special_tokens_are_left_out_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<bos>hi<turn|>")
    assert ids[0] == small.BOS and ids[-1] == small.TURN_END and len(ids) == 4
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "<bos>hi<turn|>"


def test_the_template_opens_the_models_turn(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render(messages) == "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"
    assert tokenizer.render(messages, enable_thinking=True).endswith("<|channel>thought\n")
    assert tokenizer.apply_chat_template(messages) == tokenizer.encode(tokenizer.render(messages))


def test_thinking_is_split_from_the_answer(tokenizer: Tokenizer) -> None:
    parts = tokenizer.split(tokenizer.encode("<|channel>thought\nhm, blue\n<channel|>It is blue."))
    assert (parts.text, parts.thinking) == ("It is blue.", "hm, blue")


@pytest.mark.parametrize(
    ("answer", "text", "thinking"),
    [
        ("<|channel>thought\n<channel|>Yes.", "Yes.", None),  # the empty thought of a model that does not think
        ("<|channel>thought\nnever closed", "", "never closed"),
        ("<|channel>thought", "", None),
        ("<|channel>final\nYes.<channel|>", "Yes.", None),
        ("No channel.", "No channel.", None),
        ("One<|channel>thought\na<channel|> two<|channel>thought\nb<channel|>.", "One two.", "ab"),
        ("<channel|>Stray.", "Stray.", None),
    ],
)
def test_channels(tokenizer: Tokenizer, answer: str, text: str, thinking: str | None) -> None:
    parts = tokenizer.split(tokenizer.encode(answer))
    assert (parts.text, parts.thinking) == (text, thinking)


def test_a_prompt_may_end_inside_a_thought(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("<|turn>model\n<|channel>thought\n")
    assert tokenizer.opens_channel(prompt)
    assert not tokenizer.opens_channel(tokenizer.encode("<|channel>thought\n<channel|>"))
    assert not tokenizer.opens_channel(tokenizer.encode("plain"))
    parts = tokenizer.split(tokenizer.encode("two lines\nof it<channel|>Yes."), open_channel=True)
    assert (parts.text, parts.thinking) == ("Yes.", "two lines\nof it")


def test_tool_calls_come_out_parsed(tokenizer: Tokenizer) -> None:
    answer = 'Let me see.<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
    parts = tokenizer.split(tokenizer.encode(answer))
    assert parts.text == "Let me see."
    assert parts.tool_calls == [{"name": "weather", "arguments": {"city": "Paris", "days": 3}}]


def test_a_tool_call_that_does_not_parse_is_given_as_it_is(tokenizer: Tokenizer) -> None:
    parts = tokenizer.split(tokenizer.encode("<|tool_call>gibberish<tool_call|>"))
    assert parts.tool_calls == [{"name": None, "arguments": None, "text": "gibberish"}]


def test_the_tokenizers_own_stop_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_ids == (small.EOS,)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json and no tokenizer\.model"):
        Tokenizer.load(tmp_path)
    small.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TokenizerError, match="roles must alternate"):
        Tokenizer.load(tmp_path).render([{"role": "user", "content": "Hi"}])
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer.load(tmp_path).render([{"role": "user", "content": "Hi"}])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)
