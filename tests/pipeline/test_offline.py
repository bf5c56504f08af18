"""A file of prompts: killed and continued, no line lost and none twice; failed lines marked; batches as one by one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_diffgemma import load
from mlx_diffgemma.cli import main
from mlx_diffgemma.errors import ConfigError, MemoryLimitError
from mlx_diffgemma.pipeline import offline
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.requests import Request
from tests import small

OPTIONS = ["--seed", "7", "--batch-size", "3", "--max-tokens", "20"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def loaded(model: str) -> DiffusionGemma:
    return load(model)


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def prompts(folder: Path, count: int = 14) -> Path:
    rows = [{"id": f"q{i}", "prompt": "word " * (1 + i * 5 % 11)} for i in range(count)]
    return write(folder / "prompts.jsonl", *rows)


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, args)])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def job(loaded: DiffusionGemma, file: Path, target: Path, **changes: Any) -> offline.Offline:
    settings: dict[str, Any] = {"batch_size": 3, "seed": 7, "options": {"max_tokens": 20}, "about": {}} | changes
    return offline.Offline(loaded, offline.read_lines(file), target, **settings)


def test_a_run_that_is_cut_anywhere_ends_as_one_in_one_go(loaded: DiffusionGemma, tmp_path: Path) -> None:
    file, whole, parts = prompts(tmp_path), tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    for _ in job(loaded, file, whole).run():
        pass
    chance, journal = random.Random(3), tmp_path / "parts.jsonl.journal"
    cuts = 0
    while not parts.exists():
        part = job(loaded, file, parts)
        for number, _ in enumerate(part.run()):
            if number == 1 and cuts < 4:  # one batch is done: the process dies while it writes the next
                break
        if journal.exists():
            cuts += 1
            text = journal.read_bytes()
            last = text.rstrip(b"\n").rfind(b"\n") + 1
            journal.write_bytes(text[: chance.randrange(last, len(text))] if cuts % 2 else text + text[last:-9])
    assert cuts == 4
    assert parts.read_bytes() == whole.read_bytes()
    assert [line["id"] for line in lines(parts)] == [f"q{i}" for i in range(14)]
    assert not journal.exists()


def test_a_killed_process_is_continued(model: str, tmp_path: Path) -> None:
    file, target = prompts(tmp_path, 40), tmp_path / "replies.jsonl"
    asked = ["--model", model, "--input", file, "--output", target, *OPTIONS, "--quiet"]
    process = subprocess.Popen([sys.executable, "-m", "mlx_diffgemma.generate", *map(str, asked)])
    journal = tmp_path / "replies.jsonl.journal"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        assert process.poll() is None and not target.exists()
        time.sleep(0.01)
    busy = run(*asked)
    assert busy.exit_code == 1 and "another process is writing" in busy.stderr
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not target.exists()
    done = journal.read_bytes()
    result = run(*asked)
    assert result.exit_code == 0 and not result.output, result.output
    assert [line["id"] for line in lines(target)] == [f"q{i}" for i in range(40)]
    for record in done.splitlines()[1:4]:  # what was done before it was killed has not been done again
        for number, reply in json.loads(record)["lines"]:
            assert lines(target)[number - 1] == reply
    again = run(*asked)
    assert again.exit_code == 1 and "is there already" in again.stderr


def test_batches_give_the_ids_that_prompts_give_alone(model: str, loaded: DiffusionGemma, tmp_path: Path) -> None:
    """Also a prompt so near the end of the context that it gets fewer canvases than the others."""
    long = {"id": "long", "prompt": "x" * 470}
    file = write(tmp_path / "prompts.jsonl", *prompts(tmp_path, 8).read_text().splitlines(), long, {"prompt": "hi"})
    target = tmp_path / "replies.jsonl"
    assert run("--model", model, "--input", file, "--output", target, *OPTIONS).exit_code == 0
    for number, line in enumerate(lines(target), 1):
        prompt = offline.read_lines(file)[number - 1].prompt
        alone = loaded.generate(prompt, seed=7 + number - 1, max_tokens=20)
        assert line["ids"] == list(alone.tokens) and line["text"] == alone.text, line["id"]
        assert line["seed"] == 7 + number - 1 and line["finish_reason"] == alone.finish_reason
    assert len(lines(target)[8]["ids"]) <= 16 and lines(target)[9]["id"] == 10


def test_failed_lines_are_marked_reported_and_the_status_says_so(model: str, tmp_path: Path) -> None:
    file = write(
        tmp_path / "prompts.jsonl",
        {"id": "good", "prompt": "hi", "answer": 42},
        {"id": "long", "prompt": "x" * 600},
        "{broken",
        "",
        {"messages": [{"role": "user", "content": "hi"}], "seed": 7},
        {"prompt": "hi", "messages": []},
        {"prompt": " "},
        {"id": "taken", "prompt": "hi", "text": "mine"},
        {"id": [1], "prompt": "hi"},
        '"just text"',
        "[1]",
    )
    target = tmp_path / "replies.jsonl"
    result = run("--model", model, "--input", file, "--output", target, *OPTIONS)
    assert result.exit_code == 1
    assert "7 of 10 failed" in result.stderr and "Failed: long: the prompt is 6" in result.stderr
    found = {line["id"]: line for line in lines(target)}
    assert list(found) == ["good", "long", 3, 5, 6, 7, "taken", 9, 10, 11]
    assert found["good"]["answer"] == 42 and "error" not in found["good"]
    assert found[5]["ids"] == found["good"]["ids"]  # the same prompt and seed
    errors = {name: line["error"] for name, line in found.items() if "error" in line}
    assert errors.keys() == {"long", 3, 6, 7, "taken", 9, 11}
    assert "line 3 is not JSON" in errors[3] and "either prompt or messages" in errors[6] and "empty" in errors[7]
    assert "'text' is a key of the reply" in errors["taken"] and "expected text or a whole number" in errors[9]


REFUSED = [
    ("--input {file}", 2, "--input needs --output"),
    ("-p hi --output {out}", 2, "--output goes with --input"),
    ("-p hi --batch-size 2", 2, "--batch-size goes with --input"),
    ("-p hi --input {file} --output {out}", 2, "--prompt is for a single prompt"),
    ("--json --input {file} --output {out}", 2, "--json is for a single prompt"),
    ("--pace 1 --input {file} --output {out}", 2, "--pace is for a single prompt"),
    ("--input {file}x --output {out}", 1, "there is no such file"),
    ("--input {twice} --output {out}", 1, "lines 1 and 2 have the same id, 'a'"),
    ("--input {none} --output {out}", 1, "holds no prompts"),
    ("--input {file} --output {out}/no/replies.jsonl", 1, "there is no folder"),
    ("--input {file} --output {out} --canvas-length 99", 1, "canvas_length is 99"),
]


@pytest.mark.parametrize(("line", "status", "message"), REFUSED, ids=[line for line, *_ in REFUSED])
def test_what_cannot_work_is_refused_at_once(line: str, status: int, message: str, model: str, tmp_path: Path) -> None:
    file, out = prompts(tmp_path), tmp_path / "replies.jsonl"
    twice = write(tmp_path / "twice.jsonl", *[{"id": "a", "prompt": "hi"}] * 2)
    none = write(tmp_path / "none.jsonl", "")
    filled = line.format(file=file, out=out, twice=twice, none=none)
    result = run("--model", model, *filled.split())
    assert result.exit_code == status and message in result.stderr, result.output
    assert not list(tmp_path.glob("replies*"))


def test_a_journal_is_continued_only_by_the_same_run(loaded: DiffusionGemma, tmp_path: Path) -> None:
    file, target = prompts(tmp_path), tmp_path / "replies.jsonl"
    begun = job(loaded, file, target, about={"options": {"greedy": True}})
    run = begun.run()
    assert [next(run).done, next(run).done] == [0, 3]
    run.close()
    for changes, word in (
        ({"seed": 8}, "seed"),
        ({"batch_size": 2}, "batch_size"),
        ({"about": {"options": {}}}, "options"),
    ):
        with pytest.raises(ConfigError, match=f"begun with another {word}"):
            job(loaded, file, target, **({"about": {"options": {"greedy": True}}} | changes))
    job(loaded, file, target, seed=None, about={"options": {"greedy": True}}).journal.close()
    (tmp_path / "replies.jsonl.journal").write_text("no journal\n")
    with pytest.raises(ConfigError, match="is no journal"):
        job(loaded, file, target)


def test_a_batch_that_does_not_fit_is_halved(
    loaded: DiffusionGemma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def check(request: Request, *, forks: int = 0) -> None:
        if len(request.prompts) > 2:
            raise MemoryLimitError("too much")

    def run(request: Request) -> Any:
        sizes.append(len(request.prompts))
        return whole(request)

    whole = Request.run
    monkeypatch.setattr(Request, "check_memory", check)
    monkeypatch.setattr(Request, "run", run)
    for _ in job(loaded, prompts(tmp_path, 7), tmp_path / "replies.jsonl").run():
        pass
    assert sizes == [1, 2, 1, 2, 1]
    assert len(lines(tmp_path / "replies.jsonl")) == 7
