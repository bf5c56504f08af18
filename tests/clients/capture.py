"""What the clients of `make clients` send, kept for `make test`: `python -m tests.clients.capture [NAME …]`.

Every request of a client, in order: method, path, headers that say something, the body, the status of its answer.
Long texts are cut, and paths and identifiers of this machine are replaced by others.
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.clients.programs import AGENTS, LIBRARIES
from tests.server.stage import Heard, Stage, staged

FOLDER = Path(__file__).parent.parent / "server" / "captures"
HEADERS = re.compile(r"accept|authorization|content-type|content-encoding|openai-beta|user-agent|x-api-key")
LONGEST = 160  # characters of a text
SAME = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "0" * 8),
    (re.compile(r"\b((?:call|ses|resp|msg|fc|rs)_)[0-9A-Za-z]{12,}"), r"\g<1>0"),
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:8080"),
    (re.compile(r"\d{4}-\d\d-\d\d"), "2026-01-01"),
    (re.compile(r" \(\w+ [\d.]+; \w+\)"), ""),  # the system
)


def main(names: Sequence[str]) -> None:
    for name in names or (*LIBRARIES, *AGENTS):
        with tempfile.TemporaryDirectory() as where:
            heard = list(captured(name, Path(where)))
        (FOLDER / f"{name}.json").write_text(json.dumps(heard, indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: {len(heard)} requests")


def captured(name: str, where: Path) -> Iterator[dict[str, Any]]:
    """The requests of one client."""
    (where / "model").mkdir()
    with staged(where / "model") as (server, stage):
        if name in LIBRARIES:
            for case in LIBRARIES[name].cases:
                LIBRARIES[name].understood(case, server.url)
                yield from _told(stage, case, where)
        else:
            made = round_trip(name, stage, server.url, where)
            assert "plover-42" in made, made
            yield from _told(stage, "round trip", where)


def round_trip(name: str, stage: Stage, address: str, where: Path) -> str:
    """An agent is asked what a note says, and told to read it. → what it prints."""
    agent, home, folder = AGENTS[name], where / "home", where / "work"
    home.mkdir(), folder.mkdir()
    (folder / "note.txt").write_text("The word is plover-42.\n")
    with stage.calling(agent.call(address, home, folder)):
        return agent.said("What does note.txt say?", address, home, folder)


def _told(stage: Stage, case: str, where: Path) -> Iterator[dict[str, Any]]:
    for heard in stage.heard:
        yield {"case": case} | _scrubbed(_plain(heard), where)
    stage.heard.clear()


def _plain(heard: Heard) -> dict[str, Any]:
    headers = {name: value for name, value in sorted(heard.headers.items()) if HEADERS.fullmatch(name)}
    told = {"method": heard.method, "path": heard.path, "headers": headers, "status": heard.status}
    return told if heard.body is None else told | {"body": heard.body}


def _scrubbed(value: Any, where: Path) -> Any:
    if isinstance(value, dict):
        return {_scrubbed(key, where): _scrubbed(inner, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_scrubbed(inner, where) for inner in value]
    if not isinstance(value, str):
        return value
    value = value.replace(str(where), "/home/user")
    for pattern, other in SAME:
        value = pattern.sub(other, value)
    return value if len(value) <= LONGEST else value[:LONGEST] + " …"


if __name__ == "__main__":
    main(sys.argv[1:])
