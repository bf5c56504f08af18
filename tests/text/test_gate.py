"""The gate: texts and conversations of the right kind pass as they are, all others are refused in words."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import DiffGemmaError, PromptError
from mlx_diffgemma.text.gate import check_messages, check_text, check_tools
from mlx_diffgemma.text.tokenizer import Tokenizer

from .. import small

USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is [], expected a list of messages"),
        ("Hi", "messages is 'Hi', expected a list of messages"),
        ({"role": "user"}, "expected a list of messages"),
        (["Hi"], "messages[0] is 'Hi', expected a message"),
        ([USER, 5], "messages[1] is 5, expected a message"),
        ([{1: 2}], "messages[0] is {1: 2}, expected a message"),
        ([{"content": "Hi"}], "messages[0].role is null, expected text: user"),
        ([{"role": None, "content": "Hi"}], "messages[0].role is null"),
        ([{"role": 5, "content": "Hi"}], "messages[0].role is 5"),
        ([{"role": " ", "content": "Hi"}], "messages[0].role is ' '"),
        ([{"role": "user", "content": 5}], "messages[0].content is 5, expected text or a list of parts"),
        ([{"role": "user", "content": True}], "messages[0].content is true"),
        ([{"role": "user", "content": {"text": "Hi"}}], "messages[0].content is {'text': 'Hi'}"),
        ([{"role": "user", "content": ["Hi"]}], "messages[0].content[0] is 'Hi', expected a part"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "messages[0].content[0].type is null, expected 'text'"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "messages[0].content[0].type is 'smell', expected 'text'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text is null, expected text"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "messages[0].content[0].text is 3"),
        ([{"role": "user", "content": [{"type": "image", "url": "a.png"}]}], "messages[0].content[0] is an image"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0] is a sound"),
        ([{"role": "user", "content": [{"type": "video_url"}]}], "messages[0].content[0] is a video"),
        ([{"role": "user", "content": [{"type": "file"}]}], "messages[0].content[0] is a file"),
        ([{"role": "assistant", "tool_calls": "f()"}], "messages[0].tool_calls is 'f()', expected a list of calls"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "messages[0].tool_calls is ['f']"),
        ([{"role": "user", "content": "bad \ud83d end"}], "half a character (U+D83D)"),
        ([{"role": "user", "content": "x", "name": "\udc80"}], "half a character (U+DC80)"),
        ([{"role": "assistant", "tool_calls": [{"a": float("nan")}]}], "is nan, expected a finite number"),
    ],
)
def test_conversations_of_the_wrong_kind(messages: Any, words: str) -> None:
    with pytest.raises(PromptError) as caught:
        check_messages(messages)
    assert words in str(caught.value)


def test_depth_is_bounded() -> None:
    deep: Any = "x"
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(PromptError, match="nested more than 64 levels"):
        check_messages([{"role": "user", "content": "x", "extra": deep}])


def test_what_is_none_is_left_out() -> None:
    given_ = [{"role": "assistant", "content": None, "tool_calls": None, "name": None}, USER]
    assert check_messages(given_) == [{"role": "assistant"}, USER]
    assert "name" in given_[0]  # the caller's own stays


def test_good_ones_pass_unchanged() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "👩‍👩‍👧 e\u0301 \u2028\0"}]},
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    assert check_messages(messages) == messages
    assert check_messages([{"role": "user", "content": [{"type": "image"}]}], reads=frozenset(("text", "image")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\ud800b", "--prompt holds half a character (U+D800, a lone surrogate) at position 1"),
        ("\udcff", "at position 0"),
        (5, "--prompt is 5, expected text"),
        (None, "--prompt is null, expected text"),
        (b"x", "--prompt is b'x', expected text"),
    ],
)
def test_texts_of_the_wrong_kind(text: Any, words: str) -> None:
    with pytest.raises(PromptError) as caught:
        check_text(text, "--prompt")
    assert words in str(caught.value)


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, [5], [[{}]]])
def test_tools_of_the_wrong_kind(tools: Any) -> None:
    with pytest.raises(PromptError, match=r"tools is .*, expected a list of"):
        check_tools(tools)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
KEYS = ["role", "content", "tool_calls", "type", "text", "name"]
messages_like = st.lists(st.dictionaries(st.sampled_from(KEYS), json_like, max_size=4) | json_like, max_size=3)


@settings(max_examples=50)
@given(messages_like)
def test_any_structure_is_rendered_or_refused(tokenizer: Tokenizer, messages: Any) -> None:
    try:
        ids = tokenizer.apply_chat_template(messages)
    except DiffGemmaError as error:
        assert 1 <= len(str(error).splitlines()) <= 3
    else:
        assert tokenizer.decode(ids, skip_special=False).startswith("<bos>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    small.write_tokenizer(folder)
    return Tokenizer.load(folder)
