"""Clients that are no Python packages, as programs: libraries of Node behind small scripts, and agents."""

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BIN = HERE / "node_modules" / ".bin"
KEPT = ("PATH", "LANG", "TMPDIR")  # of the environment; the rest is nobody's business here


@dataclass(frozen=True, kw_only=True)
class Library:
    """A script beside this file: `node SCRIPT ADDRESS CASE MORE…` prints what the library understood."""

    script: str
    cases: tuple[str, ...]
    more: tuple[str, ...] = ()

    def understood(self, case: str, address: str) -> Any:
        command = [BIN / "node", HERE / self.script, address, case, *self.more]
        return json.loads(run(command, cwd=HERE, environment={}))


@dataclass(frozen=True, kw_only=True)
class Agent:
    """A program that works in a folder, told in `files` of its home where the server is. Paths in these are below the
    home; `{home}`, `{address}` and `{note}` are filled in."""

    command: tuple[str, ...]
    files: Mapping[str, str]
    environment: Mapping[str, str]
    tool: str  # of its own, that reads a file
    arguments: Mapping[str, Any]

    def said(self, prompt: str, address: str, home: Path, folder: Path) -> str:
        """What it prints at the end."""
        filled = self.filler(address, home, folder)
        for name, content in self.files.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(filled(content))
        environment = {name: filled(value) for name, value in self.environment.items()} | {"HOME": str(home)}
        command = [BIN / self.command[0], *map(filled, self.command[1:]), prompt]
        return run(command, cwd=folder, environment=environment)

    def call(self, address: str, home: Path, folder: Path) -> dict[str, dict[str, Any]]:
        """The call of its tool that reads the note."""
        filled = self.filler(address, home, folder)
        return {self.tool: {k: filled(v) if isinstance(v, str) else v for k, v in self.arguments.items()}}

    @staticmethod
    def filler(address: str, home: Path, folder: Path) -> Callable[[str], str]:
        known = {"{home}": str(home), "{address}": address, "{note}": str(folder / "note.txt")}

        def filled(text: str) -> str:
            for name, value in known.items():
                text = text.replace(name, value)
            return text

        return filled


def run(command: list[Any], *, cwd: Path, environment: Mapping[str, str]) -> str:
    """What a program prints; its standard input is empty."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    kept["PATH"] = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"
    made = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert made.returncode == 0, f"{made.stdout}\n{made.stderr}"
    return made.stdout


COMMON = ("chat", "stream", "tools", "streamed_tools", "structured", "errors")
LIBRARIES = {
    "openai-node": Library(
        script="openai-node.mjs", cases=(*COMMON, "models", "responses", "responses_structured", "responses_errors")
    ),
    "ai-sdk": Library(script="ai-sdk.mjs", cases=COMMON, more=("compatible",)),
    "ai-sdk-responses": Library(script="ai-sdk.mjs", cases=COMMON, more=("openai",)),
}
CODEX = """
model = "small"
model_provider = "local"
approval_policy = "never"
sandbox_mode = "danger-full-access"
[model_providers.local]
name = "local"
base_url = "{address}/v1"
wire_api = "responses"
"""
OPENCODE = {
    "provider": {
        "local": {
            "npm": "@ai-sdk/openai-compatible",
            "name": "local",
            "options": {"baseURL": "{address}/v1", "apiKey": "any"},
            "models": {"small": {"name": "small", "tool_call": True, "limit": {"context": 262144, "output": 8192}}},
        }
    },
    "model": "local/small",
    "small_model": "local/small",
    "autoupdate": False,
    "share": "disabled",
}


def pi(api: str, address: str) -> Agent:
    """It speaks several protocols."""
    model = {"id": "small", "contextWindow": 262144, "maxTokens": 8192, "reasoning": True}
    local = {"baseUrl": address, "api": api, "apiKey": "any", "models": [model]}
    return Agent(
        command=("pi", "--provider", "local", "--model", "small", "--no-session", "-p"),
        files={".pi/agent/models.json": json.dumps({"providers": {"local": local}})},
        environment={"PI_OFFLINE": "1"},
        tool="read",
        arguments={"path": "{note}"},
    )


AGENTS = {
    "codex": Agent(
        command=("codex", "exec", "--skip-git-repo-check"),
        files={".codex/config.toml": CODEX},
        environment={"CODEX_HOME": "{home}/.codex"},
        tool="exec_command",
        arguments={"cmd": "cat {note}"},
    ),
    "opencode": Agent(
        command=("opencode", "run"),
        files={".config/opencode/opencode.json": json.dumps(OPENCODE)},
        environment={"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"},
        tool="read",
        arguments={"filePath": "{note}"},
    ),
    "pi": pi("openai-completions", "{address}/v1"),
    "pi-responses": pi("openai-responses", "{address}/v1"),
    "pi-anthropic": pi("anthropic-messages", "{address}"),
}
