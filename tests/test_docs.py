"""The examples of docs/constraints.md run, in one go, on the built-in model, and give what they promise."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mlx_diffgemma.cli import COMMANDS, main
from mlx_diffgemma.files.shipped import BUILT_IN

TEXT = (Path(__file__).parent.parent / "docs" / "constraints.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    results = []
    for block in (block for kind, block in BLOCKS if kind == "python"):
        code = block.replace('load("diffusiongemma-q4")', f"load({str(BUILT_IN)!r})")
        code = code.replace("seed=1)", "seed=1, max_denoising_steps=3)")  # most of it the built-in model cannot settle
        exec(compile(code, "docs/constraints.md", "exec"), names)
        results.append(names["result"])
    sudoku, graph, peptide, verdict = results[:4]
    assert all(given in (".", found) for given, found in zip(names["puzzle"], sudoku.text, strict=True))
    edges = json.loads(graph.text)
    assert 4 <= len(edges) <= 10 and all(len(edge) == 2 and set(edge) <= set("ABCDE") for edge in edges)
    assert re.fullmatch(names["motif"], peptide.text)
    assert re.fullmatch(r"Verdict: (not )?guilty \(\d{1,2} years\)", verdict.text)
    said = capsys.readouterr().out
    assert sudoku.text in said and all(name in said for name in names["questions"])


def test_the_commands_have_these_options() -> None:
    for line in (line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()):
        name, *args = shlex.split(line)
        command = main.get_command(None, name.removeprefix("mlx_diffgemma."))  # type: ignore[arg-type]
        assert command is not None and name.removeprefix("mlx_diffgemma.") in COMMANDS
        known = {option for parameter in command.params for option in parameter.opts}
        assert {arg for arg in args if arg.startswith("-")} <= known, line
