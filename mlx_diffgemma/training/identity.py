"""Which run a folder belongs to: base, data, settings, adapter. A run is continued by itself alone.

`run.json` in the folder says it, and is held by the process that trains.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ..disk import lock, reason, visible
from ..errors import TrainingError
from ..readers import parse_json
from ..values import shown
from .data import Example
from .settings import Settings

FILE = "run.json"
FREE = frozenset(("steps", "evaluate_every", "save_every", "keep", "checkpoint_layers"))  # what may change on the way


def identity(settings: Settings, examples: Sequence[Example], processes: int, origin: dict[str, Any]) -> dict[str, Any]:
    """Everything the result depends on, by name; `origin` is what only the caller knows: base and adapter."""
    kept = {name: value for name, value in asdict(settings).items() if name not in FREE}
    data = hashlib.sha256()
    for example in examples:
        data.update(repr((example.prompt, example.response)).encode())
    made = {**origin, **kept, "training data": data.hexdigest()[:16], "processes": processes}
    return parse_json(json.dumps(made), FILE)  # as it comes back from the file


@contextmanager
def claimed(folder: Path, mine: dict[str, Any]) -> Iterator[bool]:
    """Hold a folder for this run; yields whether two runs can be kept apart there (False: its disk has no locks).

    Errors: TrainingError when another process trains there, or another run's checkpoints lie there: what differs.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{folder} cannot be written: {reason(error)}.") from None
    with stream:
        busy = TrainingError(f"another process is training into {folder}. Wait for it, or choose another --output.")
        locked = lock(stream, busy)
        _compare(folder, stream, mine)
        yield locked


def _compare(folder: Path, stream: IO[str], mine: dict[str, Any]) -> None:
    stream.seek(0)
    text = stream.read()
    if not checkpoints(folder):  # nothing that could be continued
        stream.seek(0)
        stream.truncate()
        stream.write(json.dumps(mine, indent=1) + "\n")
        stream.flush()
        return
    if not text:
        (folder / FILE).unlink()
        raise TrainingError(
            f"{folder} has checkpoints and no {FILE} that says of which run.\nChoose another --output, or delete them."
        )
    theirs = parse_json(text, str(folder / FILE), fault=TrainingError)
    if not isinstance(theirs, dict):
        raise TrainingError(f"{folder / FILE} holds {shown(theirs)}, expected what a run wrote there.")
    differ = [key for key in dict.fromkeys((*mine, *theirs)) if mine.get(key) != theirs.get(key)]
    if differ:
        more = f" ({len(differ) - 1} more differ)" if len(differ) > 1 else ""
        raise TrainingError(
            f"{folder} holds another run: its {differ[0]} is {shown(theirs.get(differ[0]))}, yours"
            f" {shown(mine.get(differ[0]))}{more}.\nChoose another --output, or delete it to start anew."
        )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    found = (path for path in visible(folder, "step-*") if path.is_dir())
    numbered = [path for path in found if path.name.removeprefix("step-").isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("step-")))
