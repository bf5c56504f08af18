"""The command: what it refuses, the line it prints, and how it ends."""

import json
import os
import re
import signal
import urllib.request

import httpx
import pytest
from click.testing import CliRunner

from benchmarks.serve_soak import served
from mlx_diffgemma import serve
from mlx_diffgemma.cli import main
from tests import small
from tests.server.serving import CHAT, said


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_in_mid_stream_ends_it_cleanly(model: str, number: signal.Signals) -> None:
    with served(0, "--model", model) as (process, url):
        body = {
            "messages": said("hello"),
            "seed": 3,
            "max_tokens": 400,
            "stream": True,
            "diffusion": {"drafts": "text"},
        }
        with httpx.stream("POST", url + CHAT, json=body | {"diffusion": {"drafts": "text"}}, timeout=60) as response:
            lines = response.iter_lines()
            assert "assistant" in next(lines)
            os.kill(process.pid, number)
            rest = [line for line in lines if line]
        assert "The server has stopped." in rest[-1] or rest[-1] == "data: [DONE]"
        assert process.wait(30) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


def test_it_starts_again_after_it_was_killed(model: str) -> None:
    with served(0, "--model", model) as (process, url):
        port = re.findall(r":(\d+)", url)[-1]
        process.kill()
        process.wait()
    with served(0, "--model", model, "--port", port) as (_, url):
        assert url.endswith(port)
        with urllib.request.urlopen(url + "/v1/models") as answer:
            assert [entry["id"] for entry in json.load(answer)["data"]] == ["tiny"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: give an --api-key"),
        (["--allowed-origins", "example.org"], "expected a scheme and a name"),
        (["--host", "192.0.2.1", "--api-key", "x"], "cannot be listened on"),
        (["--model", "/nowhere"], "there is no folder /nowhere"),
    ],
    ids=str,
)
def test_refusals(args: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["serve", "--port", "0", *args])
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 1 and "pip install 'mlx-diffgemma[server]'" in result.stderr
