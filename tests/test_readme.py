"""The README's code blocks do what they say, and its generated tables are what the code computes.

What needs the 26B download runs on a small checkpoint with the released layout in its place: same commands, same
options. `python -m benchmarks.readme` writes the generated tables anew.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import readme
from mlx_diffgemma.cli import main
from tests import small

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line.split("    #")[0] for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]


def test_the_generated_tables_are_up_to_date() -> None:
    """Also that a table of measurements stands there if, and only if, its results file does."""
    tables = readme.blocks()
    assert sorted(tables) == sorted(name for names in readme.PLACES.values() for name in names)
    for file, names in readme.PLACES.items():
        text = file.read_text(encoding="utf-8")
        for name in names:
            begin, end = readme.place(text, name)
            assert text[begin:end] == tables[name], f"{name}: run python -m benchmarks.readme"


def test_a_table_of_measurements_comes_and_goes_with_its_file(tmp_path: Path) -> None:
    text = written = "before\n<!-- step: begin -->\n<!-- step: end -->\nafter\n"
    assert readme.blocks(tmp_path)["step"] == ""
    (tmp_path / "step.json").write_text(json.dumps(measured()))
    for _ in range(2):
        written = readme.written(written, {"step": readme.blocks(tmp_path)["step"]})
    assert [line.split() for line in written.splitlines()[2:8]] == [
        "| part | prefix 64 | prefix 2,048 |".split(),
        ["|", "-----------------------------", "|", "-----------", "|", "------------", "|"],
        "| forward | 0.90 / 1.00 | 0.90 / 1.00 |".split(),
        "| forward, against transformers | 0.90 / – | 0.90 / – |".split(),
        "| vocabulary | 0.40 / 0.10 | 0.40 / 0.10 |".split(),
        [],
    ]
    assert "80% to 90% of a step, so the whole would take 0.80 to 0.85 of mlx-vlm's time" in written
    (tmp_path / "step.json").unlink()
    assert readme.written(written, {"step": readme.blocks(tmp_path)["step"]}) == text


def measured() -> dict[str, Any]:
    """As much of a document of benchmarks/step.py as the table is made of."""
    forward, vocabulary = {"seconds": 0.9, "memory": 1.0}, {"seconds": 0.4, "memory": 0.1}
    parts = {
        "forward": {"ratio": {"mlx-vlm": forward, "transformers": {"seconds": 0.9, "memory": None}}},
        "vocabulary": {"ratio": {"mlx-vlm": vocabulary}},
    }
    results = [
        {"prefix": prefix, "hidden_difference": {"mlx-vlm": 0, "transformers": 0}, "parts": parts}
        for prefix in (64, 2048)
    ]
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"processor": "a chip", "cores": 2},
        "versions": {"mlx": "1", "mlx-vlm": "2"},
        "config": {"text_config": {"hidden_size": 64, "num_hidden_layers": 2}},
        "runs": 3,
        "results": results,
        "projection": [{"forward_share": share, "ratio": share * 0.9 + (1 - share) * 0.4} for share in (0.8, 0.9)],
    }


def test_a_readme_without_a_place_is_left_alone() -> None:
    with pytest.raises(SystemExit, match="no place for the table"):
        readme.written("no place\n", {"step": "a table\n"})


def test_the_first_block_is_what_ci_runs() -> None:
    first = [line.split()[:2] for line in COMMANDS[:2]]
    ci = [line.split() for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make ")]
    assert first == ci == [["make", "demo"], ["make", "test"]]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    known = ("make", "pip", "mlx_diffgemma")
    assert all(kind in ("sh", "python") for kind, _ in BLOCKS)
    assert all(line.startswith(known) for line in COMMANDS)
    assert sum(line.startswith("pip") for line in COMMANDS) == 1  # `pip install .`: tests/test_packaging.py


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader would have: the download, a letter, data for training, another Mac's figures."""
    home = tmp_path_factory.mktemp("home")
    small.write_checkpoint(home / "released")
    (home / "letter.txt").write_text("Dear Ada,")
    (home / "my-data").mkdir()
    rows = [{"prompt": f"{i}", "completion": f"{i}!"} for i in range(4)]
    for name in ("train", "valid"):
        (home / "my-data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


# What stands in for the 26B model, its download and its hours.
SMALLER = {
    "convert": "--hf-path released",
    "train": "--steps 1 --batch-size 1 --max-length 64",
    "bench": "--repeat 1 --only fact",
    "check": "--help",  # most of a minute; test_check.py runs all of it, part by part
}


def test_the_commands_run_in_their_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for line in COMMANDS:
        if not line.startswith("mlx_diffgemma."):
            continue
        name, *options = shlex.split(line.removeprefix("mlx_diffgemma."))
        if "--compare" in options:
            (home / "that-mac.json").write_text((home / "this-mac.json").read_text())
        else:
            options += shlex.split(SMALLER.get(name, ""))
        result = CliRunner().invoke(main, [name, *options], input="Hello\n/exit\n")
        assert result.exit_code == 0, f"{line}\n{result.output}"
        made = [options[i + 1] for i, o in enumerate(options) if o in ("--mlx-path", "--record", "--output")]
        assert all((home / path).exists() for path in made), line


def test_the_python_block_runs(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(home)
    if not (home / "diffusiongemma-q4").exists():
        (home / "diffusiongemma-q4").symlink_to(home / "released")
    (block,) = [block for kind, block in BLOCKS if kind == "python"]
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert len([line for line in block.splitlines() if line]) <= 5


def test_every_file_and_link_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    files = [ROOT / "mlx_diffgemma" / name for name in re.findall(r"`([\w./]+(?:\.py|/))`", README)]
    missing = [str(path) for path in [*(ROOT / link for link in links), *files] if not path.exists()]
    assert not missing
