"""Constraints on the command line: what is printed, what is written, and what is refused before a model is loaded."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_diffgemma.cli import main
from tests import small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"type": "integer"}, "maxItems": 2}')
    (tmp_path / "code.py").write_bytes(b"x = 1\r\ny = 2\nz = 3")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "ask.json").write_text('{"urgent": {"type": "bool", "question": "Is it?"}}')
    (tmp_path / "bad.json").write_text('{"urgent": {"type": "maybe", "question": "Is it?"}}')
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def test_a_schema_comes_from_a_file_or_as_json(model: str, files: Path) -> None:
    schema = files / "schema.json"
    ways = (str(schema), f"@{schema}", schema.read_text())
    told = [run("generate", "--model", model, "-p", "hi", "--seed", "1", "--json-schema", way) for way in ways]
    assert len({result.stdout for result in told}) == 1
    assert all(isinstance(n, int) for n in json.loads(told[0].stdout))
    assert "obeyed, log Z -" in told[0].stderr and "compiled in" in told[0].stderr


def test_patterns_choices_and_texts_with_holes(model: str, files: Path) -> None:
    shared = ["generate", "--model", model, "--seed", "1", "-q"]
    assert len(run(*shared, "-p", "hi", "--regex", "[0-9]{4}").stdout.strip()) == 4
    assert run(*shared, "-p", "hi", "--choice", "yes", "--choice", "no").stdout.strip() in ("yes", "no")
    filled = run(*shared, "--fill", "a_b", "--hole", "_").stdout
    assert filled.startswith("a") and filled.endswith("b\n") and len(filled) > 3
    result = run(*shared, "--prefix", f"@{files}/code.py", "--suffix", ")\nend", "--json")
    told = json.loads(result.stdout)
    assert told["text"] == "x = 1\r\ny = 2\nz = 3" + told["holes"][0] + ")\nend"
    bare = run(*shared, "--prefix", f"@{files}/code.py", "--suffix", ")\nend").stdout_bytes
    assert bare.decode() == told["text"] + "\n"


def test_events_say_what_is_pinned(model: str) -> None:
    lines = run("generate", "--model", model, "--seed", "1", "--fill", "a<fill>", "--events").stdout.splitlines()
    steps = [told for line in lines if (told := json.loads(line))["event"] == "denoised"]
    assert steps and all(step["pinned"][0] for step in steps) and not steps[-1]["pinned"][1]


def test_an_edit_is_shown_and_written_only_when_asked(model: str, files: Path) -> None:
    file = files / "code.py"
    before = file.read_bytes()
    file.chmod(0o755)
    args = ["edit", str(file), "--model", model, "--lines", "2", "-p", "Shout", "--seed", "1", "-q"]
    shown = run(*args).stdout
    assert shown.startswith(f"--- a/{file}\n+++ b/{file}\n@@ ") and "-y = 2\n" in shown
    assert file.read_bytes() == before
    assert run(*args, "--write").stdout == shown
    after = file.read_bytes()
    assert after != before and after.startswith(b"x = 1\r\n") and after.endswith(b"\nz = 3")
    assert file.stat().st_mode & 0o777 == 0o755 and not list(files.glob("*.part"))


def test_decisions_are_printed_one_a_line_or_as_json(model: str, files: Path) -> None:
    shared = ["decide", "--model", model]
    result = run(*shared, "--state", "help", "--questions", f"{files}/ask.json", "--json")
    [told] = json.loads(result.stdout)
    assert told["name"] == "urgent" and isinstance(told["answer"], bool) and told["orders"] == 2
    line = run(*shared, "--state", "help", "--questions", f"{files}/ask.json").stdout
    assert line.startswith("urgent: yes   yes " if told["answer"] else "urgent: no   no ")
    assert "outside of the labels" in line
    short = run(*shared, "-p", "Red or blue?", "--choice", "red", "--choice", "blue", "--one-order").stdout
    assert short.startswith(("answer: red", "answer: blue"))


# (arguments, exit status, what the message says); without a model that could be loaded, unless it is {model}
REFUSED = [
    ("generate --model none -p hi --regex a --choice b", 2, "--regex and --choice would both constrain"),
    ("generate --model none --fill a --prefix b", 2, "--fill and --prefix would both constrain"),
    ("generate --model none -p hi --hole x", 2, "--hole is the mark of --fill"),
    ("generate --model none --fill ab", 1, "'<fill>' is not in it"),
    ("generate --model none --fill @{files}/latin.txt", 1, "latin.txt is not UTF-8 text: byte 0xe9 in line 1"),
    ("generate --model none --prefix @{files}/none.txt", 1, "--prefix {files}/none.txt: there is no such file"),
    (
        "generate --model none -p hi --json-schema {files}/none.json",
        1,
        "none.json: there is no such file",
    ),
    ("generate --model none -p hi --json-schema {files}/broken.json", 1, "not JSON: Expecting property name"),
    ('generate --model none -p hi --json-schema {{"if":1}}', 1, "schema at #: the keyword 'if' is not supported"),
    ("generate --model none -p hi --regex (a", 1, "missing ), unterminated subpattern"),
    ("generate --model none -p hi --regex (?=a)b", 1, "look-around (position 0) is not supported"),
    ("generate --model none -p hi --choice a --choice a", 1, "choices 1 and 2 are equal: 'a'"),
    ("generate --model {model} -p hi --regex a --avoid-empty", 1, "avoid_empty and a constraint exclude"),
    ("generate --model {model} -p hi --regex a{{9}} -m 8", 1, "the shortest has 9 tokens, max_tokens is 8"),
    ("generate --model {model} -p hi --choice <eos>", 1, "special token"),
    ("generate --model {model} --fill aaaaaaaaaaaaaaaaaaaa<fill>", 1, "on one canvas, which holds 16"),
    ("generate --model {model} --fill a<fill> --thinking", 2, "--thinking does not go with"),
    ("edit {files}/none.py --model none --lines 1 -p x", 1, "FILE {files}/none.py: there is no such file"),
    ("edit {files}/latin.txt --model none --lines 1 -p x", 1, "latin.txt is not UTF-8 text: byte 0xe9 in line 1"),
    ("edit {files}/code.py --model none --lines 4-5 -p x", 1, "no lines 4–5: the text has 3 lines"),
    ("edit {files}/code.py --model none --lines two -p x", 2, "'two' names no lines: expected 10-14, or 10"),
    ("edit {files}/code.py --model none --lines 1- -p x", 2, "'1-' names no lines"),
    ("edit {files}/code.py --model none -p x", 2, "Missing option '--lines'"),
    ("decide --model none --state x", 2, "give --state and --questions, or --prompt and a --choice"),
    ("decide --model none -p x", 2, "give --state and --questions"),
    ("decide --model none -p x --choice a", 1, "a list of two texts or more"),
    ("decide --model none --state x --questions {files}/broken.json", 1, "broken.json is not JSON"),
    ("decide --model none --state x --questions {files}/bad.json", 1, "question 'urgent': type is 'maybe'"),
    ("decide --model none --state @{files}/latin.txt --questions {files}/ask.json", 1, "is not UTF-8 text"),
]


@pytest.mark.parametrize(("args", "status", "message"), REFUSED)
def test_bad_input_is_one_to_three_lines(args: str, status: int, message: str, model: str, files: Path) -> None:
    result = run(*args.format(model=model, files=files).split())
    assert result.exit_code == status, result.output
    assert message.format(files=files) in result.stderr
    assert result.stderr.startswith("Error: ") and len(result.stderr.strip().splitlines()) <= 3
    assert not result.stdout
