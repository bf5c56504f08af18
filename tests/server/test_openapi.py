"""Our own description of the protocol: it names what is read, and whatever it allows or forbids is answered."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode

from mlx_diffgemma.server import app
from mlx_diffgemma.server.protocols import anthropic, decisions, fim, ollama, openai, responses
from mlx_diffgemma.values import Table
from tests.server.serving import Running, serving, small_model

API: dict[str, Any] = json.loads((Path(app.__file__).parent / "openapi.json").read_text())
SCHEMA = schemathesis.openapi.from_dict(API)
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(small_model(tmp_path_factory.mktemp("served")), most_tokens=16) as running:
        yield running


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("Chat", openai.CHAT),
        ("Completion", openai.COMPLETIONS),
        ("Diffusion", openai.DIFFUSION),
        ("Response", responses.RESPONSES),
        ("Anthropic", anthropic.MESSAGES),
        ("Count", anthropic.COUNT),
        ("OllamaChat", ollama.CHAT),
        ("OllamaGenerate", ollama.GENERATE),
        ("Show", ollama.SHOW),
        ("Fim", fim.FIM),
        ("Decisions", decisions.DECISIONS),
    ],
)
def test_it_names_what_is_read(name: str, table: Table) -> None:
    assert set(API["components"]["schemas"][name]["properties"]) == table.names


def _message(path: str, error: Any) -> str:
    """What an error of the path's protocol says."""
    if path.startswith("/api/"):
        return error
    keys = {"type", "message"} if path.startswith("/v1/messages") else {"message", "type", "param", "code"}
    assert set(error) == keys
    return error["message"]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_whatever_is_asked_is_answered(operation: Any, mode: GenerationMode, server: Running) -> None:
    """No status of 500 or above, none that is not described, every error of OpenAI's shape, no hang."""
    described = operation.definition.raw["responses"]

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    def ask(case: Any) -> None:
        answer = case.call(base_url=server.url, timeout=30)
        assert answer.status_code < 500, answer.text
        if answer.status_code not in (404, 405):
            assert str(answer.status_code) in described, answer.text
        if answer.status_code >= 400 and answer.status_code not in (404, 405):
            assert len(_message(operation.path, answer.json()["error"]).splitlines()) <= 3

    if mode is GenerationMode.POSITIVE or operation.method.lower() == "post":
        ask()
    assert server.scheduler.health()["status"] == "ok"
