"""Values by table, and the files they come from: every wrong one is named with its place."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_diffgemma import readers
from mlx_diffgemma.errors import CheckpointError, ConfigError
from mlx_diffgemma.values import (
    Field,
    Kind,
    Table,
    anything,
    either,
    flag,
    integer,
    many,
    mapping,
    number,
    one_of,
    optional,
    shown,
    text,
)

INNER = Table(Field("theta", number(above=0)), Field("kind", one_of("a", "b"), "a"))
TABLE = Table(
    Field("size", integer(least=1, most=100)),
    Field("eps", number(least=0), 1e-6),
    Field("on", flag, False),
    Field("ids", many(integer(least=0)), ()),
    Field("inner", INNER.kind, None),
    Field("each", mapping(INNER.kind), {}),
    Field("name", optional(text(empty=False)), None),
    Field("either", either(text(), many(INNER.kind)), None),
    Field("free", anything, None),
)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "c.json is [], expected an object"),
        ({}, "c.json: size is null, expected a positive integer"),
        ({"size": None}, "c.json: size is null"),
        ({"size": 0}, "c.json: size is 0, expected a positive integer"),
        ({"size": 101}, "c.json: size is 101, expected an integer of at most 100"),
        ({"size": 10**30}, "c.json: size is 1000000000000000000000000000000"),
        ({"size": 16.0}, "c.json: size is 16.0"),
        ({"size": "16"}, "c.json: size is '16'"),
        ({"size": True}, "c.json: size is true"),
        ({"size": [1]}, "c.json: size is [1]"),
        ({"size": 1, "sise": 2}, "c.json has the unknown key sise = 2. Did you mean 'size'?"),
        ({"size": 1, "eps": -1}, "c.json: eps is -1, expected a number of at least 0"),
        ({"size": 1, "eps": math.nan}, "c.json: eps is nan"),
        ({"size": 1, "eps": math.inf}, "c.json: eps is inf"),
        ({"size": 1, "eps": 10**400}, "c.json: eps is 1000"),
        ({"size": 1, "eps": "1e-6"}, "c.json: eps is '1e-6'"),
        ({"size": 1, "on": 1}, "c.json: on is 1, expected true or false"),
        ({"size": 1, "ids": 3}, "c.json: ids is 3, expected a list"),
        ({"size": 1, "ids": "123"}, "c.json: ids is '123', expected a list"),
        ({"size": 1, "ids": [1, -1]}, "c.json: ids[1] is -1, expected an integer of at least 0"),
        ({"size": 1, "inner": {}}, "c.json: inner.theta is null, expected a number above 0"),
        ({"size": 1, "inner": {"theta": 0}}, "c.json: inner.theta is 0"),
        ({"size": 1, "inner": {"theta": 1, "kind": "c"}}, "c.json: inner.kind is 'c', expected 'a' or 'b'"),
        ({"size": 1, "inner": {"theta": 1, "teta": 1}}, "c.json has the unknown key inner.teta = 1."),
        ({"size": 1, "inner": []}, "c.json: inner is [], expected an object"),
        ({"size": 1, "each": {"x": {"theta": "y"}}}, "c.json: each.x.theta is 'y'"),
        ({"size": 1, "name": ""}, "c.json: name is '', expected text that is not empty or null"),
        ({"size": 1, "either": 5}, "c.json: either is 5, expected text or a list"),
        ({"size": 1, "either": [{"theta": 0}]}, "c.json: either[0].theta is 0"),
        ({"size": list(range(50))}, "c.json: size is a list of 50 entries"),
        ({"size": "x" * 500}, "c.json: size is 'xxx"),
        ({"size": "\x1b[2J"}, "c.json: size is '\\x1b[2J'"),
    ],
)
def test_a_wrong_value_is_named(values: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TABLE.read(values, "c.json")
    message = str(caught.value)
    assert words in message and len(message) < 250 and message.isprintable()


def test_right_values_come_back_with_their_defaults() -> None:
    found = TABLE.read({"size": 3, "ids": [1, 2], "inner": {"theta": 2}, "eps": None}, "c.json")
    assert found["ids"] == (1, 2) and found["inner"] == {"theta": 2, "kind": "a"} and found["eps"] == 1e-6
    assert TABLE.given({"size": 3, "on": None}, "c.json") == {"size": 3}
    assert Table(Field("a", flag), open=True).read({"a": True, "b": 1}, "c") == {"a": True}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from([f.name for f in TABLE.fields]) | st.text(max_size=6), json_values, max_size=6))
def test_any_table_is_read_or_refused_in_a_line(values: dict[str, Any]) -> None:
    try:
        found = TABLE.read(values, "c.json")
    except ConfigError as error:
        assert str(error).startswith("c.json") and len(str(error).splitlines()) == 1
    else:
        assert 1 <= found["size"] <= 100


@given(json_values)
def test_anything_can_be_shown(value: Any) -> None:
    assert shown(value).isprintable() and len(shown(value)) <= 60


@pytest.mark.parametrize("kind", [integer(), number(), text(), flag, many(flag), mapping(flag), one_of(1)])
def test_every_kind_refuses_something(kind: Kind) -> None:
    with pytest.raises(ConfigError, match=r"^c: k is .*, expected "):
        kind.read(object(), "c", "k")


# ----------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "c.json is not JSON: Expecting value in line 1, column 1"),
        (b"{", "is not JSON"),
        (b'{"a": 1,}', "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b"{}{}", "is not JSON: Extra data"),
        (b'{"a": 1, "a": 2}', "has the key 'a' twice in one object"),
        (b'{"x": [{"a": 1, "a": 1}]}', "has the key 'a' twice"),
        (b'{"a": NaN}', "c.json: a is nan, expected a finite number"),
        (b'{"a": [1, {"b": -Infinity}]}', "c.json: a[1].b is -inf"),
        (b"[[NaN]]", "c.json[0][0] is nan"),
        (b'{"a": {"b c": 1e999}}', "c.json: a.b c is inf, expected a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds a number of thousands of digits"),
        (b"[" * 100_000, "is nested more than 64 levels deep"),
        (b"[" * 70 + b"]" * 70, "is nested more than 64 levels deep"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "is nested more than 64 levels deep"),
        (b'{"a": ["x", "\\ud83d"]}', "c.json: a[1] holds half a character (U+D83D)"),
        (b'{"\\udc00": 1}', "holds half a character (U+DC00)"),
        (b'{"a": "\xe9"}', "is not UTF-8 text: byte 0xe9 in line 1"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
        (b"[1]", "holds [1], expected an object"),
        (b'"text"', "holds 'text', expected an object"),
        (b"null", "holds null, expected an object"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "c.json").write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        readers.read_json(tmp_path / "c.json")
    assert words in str(caught.value) and str(tmp_path / "c.json") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"c\.json is missing in"):
        readers.read_json(tmp_path / "c.json")
    with pytest.raises(CheckpointError, match="cannot be read: it is a folder"):
        readers.read_json(tmp_path)
    monkeypatch.setattr(readers, "MAX_BYTES", 10)
    (tmp_path / "c.json").write_text('{"a": "0123456789"}')
    with pytest.raises(CheckpointError, match="is larger than"):
        readers.read_bytes(tmp_path / "c.json", limit=10)


@given(json_values.filter(lambda v: "NaN" not in (t := json.dumps(v)) and "Infinity" not in t))
def test_json_of_python_comes_back(value: Any) -> None:
    try:
        assert readers.parse_json(json.dumps(value), "c") == value
    except CheckpointError as error:  # surrogates
        assert "half a character" in str(error)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        readers.parse_json(raw, "c.json")
    except CheckpointError as error:
        assert str(error).startswith("c.json ") and len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"a = ", "is not TOML"),
        (b"a = nan", "c.toml: a is nan, expected a finite number"),
        (b"a = [inf]", "a[0] is inf"),
        (b"a = 1\na = 2", "is not TOML: Cannot overwrite a value"),
        (b"\xff", "is not UTF-8 text"),
        (b"a = " + b"[" * 3000, "nested more than 64"),
    ],
)
def test_toml_that_is_refused(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "c.toml").write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        readers.read_toml(tmp_path / "c.toml")
    assert words in str(caught.value) and str(tmp_path / "c.toml") in str(caught.value)


def test_a_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b'\xef\xbb\xbfa = "x"\r\nb = 1\r\n')
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"a":\r\n1}')
    assert readers.read_toml(tmp_path / "c.toml") == {"a": "x", "b": 1}
    assert readers.read_json(tmp_path / "c.json") == {"a": 1}


def test_json_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    lines = [
        '{"a": "x\u2028y\u2029z\u0085\x0b\x0c\x1c"}'.replace("\x0b", "\\u000b")
        .replace("\x0c", "\\f")
        .replace("\x1c", "\\u001c")
    ]
    file.write_bytes(b"\xef\xbb\xbf" + lines[0].encode() + b"\r\n\n  \n[2]\n3")
    found = list(readers.json_lines(file))
    assert found == [(f"{file}:1", {"a": "x\u2028y\u2029z\u0085\x0b\x0c\x1c"}), (f"{file}:4", [2]), (f"{file}:5", 3)]


@pytest.mark.parametrize("bad", [b"{", b'{"a": NaN}', b'{"a": "\\ud800"}', b"\xff", b'{"a":1,"a":1}'])
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"{}\n\n" + bad + b"\n")
    with pytest.raises(ConfigError) as caught:
        list(readers.json_lines(file))
    assert f"{file}:3" in str(caught.value)
