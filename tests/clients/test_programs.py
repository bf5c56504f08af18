"""Libraries of Node and agents against a running server, whose scripted model stands in for good answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.capture import round_trip
from tests.clients.programs import AGENTS, LIBRARIES
from tests.server.serving import Running
from tests.server.stage import GREETING, Stage, staged

CALL = {"name": "weather", "arguments": {"city": "Rome", "days": 3}}
SAYS = "The tool says plover-3."


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Stage]]:
    with staged(tmp_path_factory.mktemp("staged")) as pair:
        yield pair


def expected(case: str, told: dict[str, Any]) -> bool:
    """Whether what a library understood is what was said."""
    match case.removeprefix("responses_"):
        case "chat":
            return (told["text"], told["reason"], told["tokens"]) == (GREETING, "stop", len(GREETING))
        case "stream":
            return told["text"] == GREETING == told.get("again", GREETING) and told["reason"] == ["stop"]
        case "tools" | "streamed_tools" | "responses":
            return told["text"] == SAYS and told["calls"] == [CALL] and told.get("thoughts", "hm, yes") == "hm, yes"
        case "structured":
            return told["a"] in ("one", "two")
        case "errors":
            return told["status"] == 400 and "temperature" in told["message"]
        case "models":
            return told["found"] == ["small"] and told["one"] == "small"
        case _:
            return False


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in LIBRARIES for case in LIBRARIES[name].cases])
def test_libraries(name: str, case: str, stage: tuple[Running, Stage]) -> None:
    told = LIBRARIES[name].understood(case, stage[0].url)
    assert expected(case, told), told


@pytest.mark.parametrize("name", AGENTS)
def test_agents_make_a_round_trip(name: str, stage: tuple[Running, Stage], tmp_path: Path) -> None:
    """Each is asked what a note says, is told to read it, and prints what the model makes of what it read."""
    server, script = stage
    assert "The tool says plover-42." in round_trip(name, script, server.url, tmp_path)
