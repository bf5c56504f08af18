"""Regular expressions against `re`: the same texts, and by name what is refused."""

import re
import time
from collections.abc import Callable
from functools import cache
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.text.language.automaton import Automaton
from mlx_diffgemma.text.language.regex import regex, table
from tests.text.patterns import LETTERS, disagreements

PATTERNS = [
    r"\d{4}-(0[1-9]|1[0-2])-\d\d",
    "[^a-y]+|é{2,3}",
    "(?:ab|a)(?:bc|c)*?",
    "(?s:.)x.",
    "[α-ω😀-😂]{1,3}",
    "a|",
    r"[\w.+-]+@[\w-]+\.[\w.]{2,}",
    r"(?x) a \s+ b  # a comment",
    "(|a|ab)(c|bcd)",
    "[]a]|[^]a]{3}|[a-]",
    r"\x41\u00e9\U0001F600|\n\t\\",
    "(^a|b)c$|^$",
    r"\A(?:x|(?:y\Z|z))",
    "(a*)*(b|(c{0,2})+)?",
]


@cache
def automaton(pattern: str) -> Automaton:
    [part] = regex(pattern).parts
    assert isinstance(part, Automaton)
    return part


def test_random_patterns_match_what_re_matches(record_summary: Callable[[str], None]) -> None:
    patterns, strings, wrong = disagreements(Random(16), 24_000)
    record_summary(f"regex: {patterns} random patterns, {strings} strings, {len(wrong)} differences from re.fullmatch")
    assert not wrong and patterns > 200


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=st.one_of(st.text(LETTERS + "xyzbcd.+@αω😁", max_size=6), st.text(max_size=3)))
def test_patterns_match_what_re_matches(pattern: str, text: str) -> None:
    assert automaton(pattern).accepts(text) == bool(re.fullmatch(pattern, text, re.ASCII))


@pytest.mark.parametrize("pattern", PATTERNS)
@given(data=st.data())
def test_what_hypothesis_draws_from_a_pattern_is_accepted(pattern: str, data: st.DataObject) -> None:
    text = data.draw(st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True))
    assert automaton(pattern).accepts(text)


@pytest.mark.parametrize("pattern", ["^a|b$", "a", "(^a|b)c", "x$|^y", "^$", "", "^(?:a|b)+$", "a.*b", "(?:^a)|b"])
@given(text=st.text("abcxy", max_size=5))
def test_searching_means_what_re_search_means(pattern: str, text: str) -> None:
    assert table(pattern, search=True).accepts(map(ord, text)) == bool(re.search(pattern, text))


def test_classes_are_those_of_ascii_and_the_rest_is_unicode() -> None:
    assert not automaton(r"\d").accepts("٣") and automaton(r"\D").accepts("٣")
    assert not automaton(r"\w").accepts("é") and automaton(r"\W").accepts("é")
    for character in "a\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff":
        assert automaton(".").accepts(character) and not automaton(f"[^{re.escape(character)}]").accepts(character)


def test_no_bytes_but_utf8_are_read() -> None:
    for wrong in (
        b"\x80",
        b"\xc0\x80",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xf8\x88\x80\x80\x80",
        b"\xe0\x80\x80",
    ):
        assert not automaton("(?s:.)*").accepts(wrong)


@pytest.mark.parametrize(
    ("pattern", "name", "position"),
    [
        ("ab(?=c)", "look-around", 2),
        ("(?<!a)b", "look-around", 0),
        (r"[(?=](x)\1", "a back reference", 8),
        ("(?P<n>a)b(?P=n)", "a back reference", 9),
        ("(a)?(?(1)b|c)", "a conditional", 4),
        ("a(?>b)", "an atomic group", 1),
        (r"\*+a*+", "a possessive quantifier", 4),
        ("a{2}+", "a possessive quantifier", 1),
        (r"[\b]\bfoo", "a word boundary", 4),
        (r"a\B", "a word boundary", 1),
        ("a^b", "an anchor inside", 1),
        ("^a$b|c$", "an anchor inside", 2),
        (r"^[$](?:x\Zy)", "an anchor inside", 8),
        ("(?:^a)*", "an anchor inside", 3),
        ("(?i)a", "the flag i", 0),
        ("a(?i:b)", "the flag i", 1),
        ("(?sm)^a", "the flag m", 0),
        ("(?u:a)", "the flag u", 0),
    ],
)
def test_what_is_not_regular_is_refused_by_name_and_position(pattern: str, name: str, position: int) -> None:
    with pytest.raises(ConfigError) as raised:
        regex(pattern)
    first, *others = str(raised.value).split("\n")
    assert first == f"regex {pattern!r}: {name} (position {position}) is not supported." and len(others) == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a(b", "is no regular expression at position 1: missing )"),
        ("[b-a]", "at position 1: bad character range"),
        (r"\q", "at position 0: bad escape"),
        (r"[^\s\S]", "matches no text"),
        ("(a|b)*a(a|b){20}", "more than 25,000 states"),
        ("(?:a{1,900}b?){900}", "more than 25,000 states"),
        ("(" * 400 + ")*" * 400, "nests or repeats more"),
        ("a{99999999999999}", "nests or repeats more"),
    ],
)
def test_bad_patterns_are_explained_and_soon(pattern: str, message: str) -> None:
    begun = time.process_time()
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        regex(pattern)
    assert len(str(raised.value).split("\n")) <= 3
    assert time.process_time() - begun < 10
