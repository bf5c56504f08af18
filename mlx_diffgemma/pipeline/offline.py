"""Replies to a file of prompts: batches of like length, and a journal that survives kills.

The journal lies beside the replies, as `replies.jsonl.journal`: a first line that says what is being made, then a line
for each batch, written whole. A run that is killed loses the batch it was at, and nothing else; the next one does the
batches that are missing. When all are there, the replies are written in the order of the prompts, at once.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..disk import lock, replacing
from ..errors import ConfigError, DiffGemmaError, MemoryLimitError, PromptError, TokenizerError
from ..generation import engine
from ..readers import decoded, parse_json, read_bytes
from ..text.pictures.parts import with_budget
from ..values import Field, Table, anything, either, integer, many, mapping
from .model import DiffusionGemma
from .prompts import Prompt, PromptIds
from .requests import Request
from .results import Result, result_json

OF_A_LINE = (PromptError, TokenizerError, MemoryLimitError)  # what is wrong with one prompt alone
OWN = ("id", "prompt", "messages", "seed")  # keys of a line that mean something; others travel with the reply
TEMPLATE = ("enable_thinking", "template_options", "sanitize_control_tokens")  # options that prompts alone need
SAID = (*"text thinking tool_calls ids finish_reason canvases tuning departures error".split(),)  # keys of a reply


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the input."""

    number: int  # from 1
    id: str | int  # its own, else its number
    prompt: Prompt
    seed: int | None
    beside: dict[str, Any]  # other keys
    error: str = ""  # why it is no prompt


def read_lines(file: Path, system: str | None = None, *, budget: str | None = None) -> list[Line]:
    """The prompts of a JSON Lines file: {"prompt": …} or {"messages": […]}, with `id` and `seed` if they have them.

    `system` goes before every prompt; a picture that asks for no `budget` gets this one. A line that is no prompt has
    its `error`. Errors: PromptError for a file that cannot be read or holds nothing, or an id that is there twice.
    """
    text = decoded(read_bytes(file, fault=PromptError), str(file), fault=PromptError)
    lines = [_line(number, line, system, budget) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise PromptError(f'--input {file} holds no prompts, expected lines like {{"prompt": "…"}}.')
    first: dict[str | int, int] = {}
    for line in lines:
        if line.id in first:
            raise PromptError(f"{file}: lines {first[line.id]} and {line.number} have the same id, {line.id!r}.")
        first[line.id] = line.number
    return lines


def _line(number: int, text: str, system: str | None, budget: str | None) -> Line:
    try:
        found = parse_json(text, f"line {number}", fault=PromptError)
    except PromptError as error:
        return Line(number=number, id=number, prompt="", seed=None, beside={}, error=str(error))
    if isinstance(found, str):
        found = {"prompt": found}
    if not isinstance(found, dict):
        return Line(number=number, id=number, prompt="", seed=None, beside={}, error="neither an object nor text")
    beside = {key: value for key, value in found.items() if key not in OWN}
    name, seed = found.get("id", number), found.get("seed")
    prompt, error = _prompt(found, system)
    if budget is not None:
        prompt = with_budget(prompt, budget)
    if isinstance(name, bool) or not isinstance(name, str | int):
        name, error = number, f"id is {json.dumps(name)[:60]}, expected text or a whole number"
    if isinstance(seed, bool) or not isinstance(seed, int | None):
        seed, error = None, f"seed is {json.dumps(seed)[:60]}, expected a whole number"
    if taken := [key for key in beside if key in SAID]:
        beside, error = {}, f"{taken[0]!r} is a key of the reply: call it otherwise"
    return Line(number=number, id=name, prompt=prompt, seed=seed, beside=beside, error=error)


def _prompt(found: dict[str, Any], system: str | None) -> tuple[Prompt, str]:
    """The prompt of a line, or what is wrong with it."""
    prompt, messages = found.get("prompt"), found.get("messages")
    if (prompt is None) == (messages is None):
        return "", "expected either prompt or messages"
    if messages is not None:
        if system is not None:
            return "", "--system-prompt goes before prompts; messages hold their own"
        return (messages, "") if isinstance(messages, list) else ("", "messages: expected a list")
    if not isinstance(prompt, str) or not prompt.strip():
        return "", "prompt is empty" if isinstance(prompt, str) else "prompt: expected text"
    before = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": prompt}], ""


# ----------------------------------------------------------------------------------------------------------- the work


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, in lines; after every batch."""

    done: int  # failed ones included
    failed: int
    total: int
    tokens: int  # generated by this run


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A line, ready to run."""

    line: Line
    length: int  # ids
    prompt: PromptIds | None  # None: it has pictures, and is read once more when it is its turn
    seed: int
    canvases: int  # it may get, alone


class Offline:
    """Replies to `lines` into `target`. Errors when it is made: ConfigError for a target that is there already, or was
    begun in another way; PromptError, ConfigError as `DiffusionGemma.prepare` for what concerns all lines."""

    def __init__(
        self,
        model: DiffusionGemma,
        lines: Sequence[Line],
        target: Path,
        *,
        batch_size: int,
        seed: int | None,
        options: dict[str, Any],
        about: dict[str, Any],
    ):
        """`options` are `prepare`'s; `about` is what else the replies depend on, as plain data."""
        self.model, self.lines, self.options, self.batch_size = model, lines, options, batch_size
        self.journal = Journal(target, about | {"input": _fingerprint(lines), "batch_size": batch_size}, seed)

    def run(self) -> Iterator[Progress]:
        """Do what is missing, then write the replies. Closing the iterator keeps what is done."""
        with closing(self.journal):
            yield from self._run(self.journal, len(self.lines))

    def _run(self, journal: "Journal", total: int) -> Iterator[Progress]:
        ready, broken = self._ready()
        if broken:
            journal.add(broken)
        tokens = 0
        yield Progress(done=len(journal.done), failed=journal.failed, total=total, tokens=tokens)
        for batch in self._batches(ready):
            missing = [asked for asked in batch if asked.line.number not in journal.done]
            if not missing:
                continue
            results = self._request(missing).run()
            journal.add([_reply(asked.line, result) for asked, result in zip(missing, results, strict=True)])
            tokens += sum(len(result.tokens) for result in results)
            yield Progress(done=len(journal.done), failed=journal.failed, total=total, tokens=tokens)
        journal.finish([line.number for line in self.lines])

    def _ready(self) -> tuple[list[_Asked], list[tuple[int, dict[str, Any]]]]:
        """Every line as ids, and the replies of those that cannot run and are not marked yet."""
        ready, broken = [], []
        for line in self.lines:
            try:
                if line.error:
                    raise PromptError(line.error)
                ready.append(self._asked(line))
            except OF_A_LINE as error:
                if line.number not in self.journal.done:
                    broken.append((line.number, {"id": line.id, **line.beside, "error": str(error)}))
        return ready, broken

    def _asked(self, line: Line) -> _Asked:
        prompt = self._read(line)
        seed = self.journal.seed + line.number - 1 if line.seed is None else line.seed
        request = self.model.prepare(prompt, seed=seed, **self._run_options(seen=bool(prompt.pictures)))
        length = request.settings.canvas_length or self.model.config.canvas_length
        canvases = engine.count_canvases(request.network, [prompt.ids], request.settings, length)
        kept = None if prompt.pictures else prompt
        return _Asked(line=line, length=len(prompt.ids), prompt=kept, seed=seed, canvases=canvases)

    def _read(self, line: Line) -> PromptIds:
        template: Any = {key: value for key, value in self.options.items() if key in TEMPLATE}
        return self.model.read(line.prompt, **template)

    def _run_options(self, *, seen: bool) -> dict[str, Any]:
        """`seen`: there are pictures, and how they are masked means something."""
        own = {key: value for key, value in self.options.items() if key not in TEMPLATE}
        return {key: value for key, value in own.items() if seen or key != "picture_mask"}

    def _batches(self, ready: list[_Asked]) -> Iterator[list[_Asked]]:
        """The longest prompts first; the same batches in every run.

        In a batch, all get as many canvases as they would alone: near the end of the context a longer one gets fewer.
        Prompts with pictures come behind those without, in batches of their own.
        """
        batch: list[_Asked] = []
        for asked in sorted(ready, key=lambda asked: (asked.prompt is None, -asked.length, asked.line.number)):
            if batch and (len(batch) == self.batch_size or _kind(asked) != _kind(batch[0])):
                yield from self._fitting(batch)
                batch = []
            batch.append(asked)
        if batch:
            yield from self._fitting(batch)

    def _fitting(self, batch: list[_Asked]) -> Iterator[list[_Asked]]:
        """The batch, halved until it fits the memory: each prompt fits alone."""
        try:
            self._request(batch)
        except MemoryLimitError:
            half = len(batch) // 2
            yield from self._fitting(batch[:half])
            yield from self._fitting(batch[half:])
        else:
            yield batch

    def _request(self, batch: list[_Asked]) -> Request:
        prompts: list[Prompt] = [asked.prompt or self._read(asked.line) for asked in batch]
        seeds = [asked.seed for asked in batch]
        return self.model.prepare(prompts, seeds=seeds, **self._run_options(seen=batch[0].prompt is None))


def _kind(asked: _Asked) -> tuple[int, bool]:
    """What is the same for all of a batch."""
    return asked.canvases, asked.prompt is None


def _fingerprint(lines: Sequence[Line]) -> str:
    said = json.dumps([[line.number, line.id, line.prompt, line.seed, line.beside] for line in lines])
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def _reply(line: Line, result: Result) -> tuple[int, dict[str, Any]]:
    """A line's number, and its reply as plain data. The statistics are the batch's, so they stay out."""
    said = result_json(result)
    statistics = said.pop("statistics")
    how = {name: statistics[name] for name in ("tuning", "departures")}
    return line.number, {"id": line.id, **line.beside, **said, **how}


# -------------------------------------------------------------------------------------------------------- the journal


HEAD = Table(Field("about", mapping(anything)), Field("seed", integer()))
RECORD = Table(Field("lines", many(many(either(integer(), mapping(anything)), least=2, most=2))))


class Journal:
    """What is done, on disk. `done` holds the numbers of the lines, `seed` is the first line's.

    Errors when it is made: ConfigError for replies that are there already, a journal of another run, or one that
    another process is writing.
    """

    def __init__(self, target: Path, about: dict[str, Any], seed: int | None):
        self.target, self.path = target, target.with_name(target.name + ".journal")
        if target.exists() and not self.path.exists():
            raise ConfigError(f"{target} is there already.\nChoose another --output, or remove it.")
        self.done: set[int] = set()
        self.failed = 0
        self.head: dict[str, Any] | None = None  # not written yet
        self.file = open(self.path, "a+b")  # noqa: SIM115  open as long as the journal
        try:
            self._open(about, seed)
        except BaseException:
            self.close()
            raise

    def _open(self, about: dict[str, Any], seed: int | None) -> None:
        self.locked = lock(self.file, ConfigError(f"another process is writing {self.path}: wait for it, or stop it."))
        records = self._read()
        if records:
            self.seed = self._check(records[0], about, seed)
        else:
            self.seed = secrets.randbelow(2**32) if seed is None else seed
            self.head = {"about": about, "seed": self.seed}
        for record in records[1:]:
            self._count(record["lines"])

    def close(self) -> None:
        """Let another process have it; one that holds nothing yet disappears."""
        if self.head:  # nothing was written
            self.path.unlink(missing_ok=True)
        with suppress(OSError):  # what was written is on disk; what was not has been said
            self.file.close()

    def add(self, replies: list[tuple[int, dict[str, Any]]]) -> None:
        """Lines that are done, with their numbers: all of them or, if the process is killed, none."""
        if self.head:
            self._write(self.head)
            self.head = None
        self._write({"lines": replies})
        self._count(replies)

    def finish(self, order: list[int]) -> None:
        """Write the replies in this order, then remove the journal."""
        replies = {number: reply for record in self._read()[1:] for number, reply in record["lines"]}
        with replacing(self.target, "w") as file:
            for number in order:
                file.write(json.dumps(replies[number], ensure_ascii=False) + "\n")
        self.path.unlink()

    def _count(self, replies: list[tuple[int, dict[str, Any]]]) -> None:
        self.done.update(number for number, _ in replies)
        self.failed += sum("error" in reply for _, reply in replies)

    def _read(self) -> list[dict[str, Any]]:
        """All records; what follows the last whole one is cut off."""
        self.file.seek(0)
        text = self.file.read()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            self.file.truncate(len(whole))
        try:
            records = [
                parse_json(line, f"{self.path}:{number}") for number, line in enumerate(whole.split(b"\n")[:-1], 1)
            ]
            return [(RECORD if number else HEAD).read(record, "") for number, record in enumerate(records)]
        except DiffGemmaError:
            raise ConfigError(f"{self.path} is no journal of replies.\nRemove it to begin anew.") from None

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            error.filename = str(self.path)  # a write that fails names no file
            raise

    def _check(self, head: dict[str, Any], about: dict[str, Any], seed: int | None) -> int:
        """The seed it was begun with. Errors: ConfigError when something else has changed since."""
        before, now = head["about"], json.loads(json.dumps(about))
        if seed is not None and seed != head["seed"]:
            before, now = before | {"seed": head["seed"]}, now | {"seed": seed}
        changed = [key for key in now | before if now.get(key) != before.get(key)]
        if changed:
            raise ConfigError(
                f"{self.path} was begun with another {' and another '.join(changed)}.\n"
                "Give the same command to continue, or remove that file to begin anew."
            )
        return head["seed"]


def failures(target: Path) -> list[tuple[str | int, str]]:
    """Ids and errors of the failed lines of finished replies."""
    replies = map(json.loads, target.read_text(encoding="utf-8").splitlines())
    return [(reply["id"], reply["error"]) for reply in replies if "error" in reply]
