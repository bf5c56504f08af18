"""README and docs/: code blocks do what they say, links lead somewhere, what is generated is what the code says.

What needs the 26B download runs on a small checkpoint with the released layout in its place: same commands, same
options. `python -m benchmarks.readme` writes the tables anew, `python -m docs.write` the reference pages.
"""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from benchmarks import readme
from docs import write
from mlx_diffgemma.cli import main
from mlx_diffgemma.files.shipped import EYES
from tests import seeing, small

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "LOG.md"))]
LINKED += [ROOT / "benchmarks" / "README.md", ROOT / "convert" / "README.md"]
# Its commands need files of their own, and tests/test_docs.py runs its blocks: here only the options are looked at.
# Those of evaluate.md fetch published questions; tests/commands/test_evaluate.py has questions of its own.
NOT_RUN = [ROOT / "docs" / "constraints.md", ROOT / "docs" / "evaluate.md"]
OTHERS = ROOT / "docs" / "compared.md"  # names files of other programs


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """The code blocks of a page: kind, text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [line.split("    #")[0] for kind, block in blocks(page) if kind == "sh" for line in block.splitlines()]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


def test_the_generated_tables_are_up_to_date() -> None:
    """Also that a table of measurements stands there if, and only if, its results file does."""
    tables = readme.blocks()
    assert sorted(tables) == sorted(name for names in readme.PLACES.values() for name in names)
    for file, names in readme.PLACES.items():
        text = file.read_text(encoding="utf-8")
        for name in names:
            begin, end = readme.place(text, name)
            assert text[begin:end] == tables[name], f"{name}: run python -m benchmarks.readme"


def test_the_reference_pages_are_what_the_code_says() -> None:
    for file, parts in write.pages().items():
        text = file.read_text(encoding="utf-8")
        assert readme.written(text, parts) == text, f"{file.name}: run python -m docs.write"


def test_the_reference_pages_miss_nothing() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name in write.cli.COMMANDS:
        command = main.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        shown = [option for option in command.params if not getattr(option, "hidden", False)]
        spellings = [spelling for option in shown for spelling in option.opts if spelling.startswith("-")]
        assert f"## {name}\n" in text and all(spelling in text for spelling in spellings)
    api = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    unions = {"Event", "__version__"}
    assert [name for name in write.mlx_diffgemma.__all__ if f"\n## {name}\n" not in api and name not in unions] == []


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
    first = [line.split()[:2] for line in commands(README)[:2]]
    ci = [line.split() for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make ")]
    assert first == ci == [["make", "demo"], ["make", "test"]]


INSTALLING = (  # what only a machine with a network can run; `pip install .`: tests/test_packaging.py
    "git clone ADDRESS mlx_diffgemma && cd mlx_diffgemma",
    "uv tool install .",
    "python3 -m venv ~/diffgemma",
    "source ~/diffgemma/bin/activate",
    "pip install .",
    'mlx.launch --hostfile hosts.json -- mlx_diffgemma.generate --model /Users/me/pack --prompt "Why is the sky blue?"',
)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)$", text, re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page)), "a block without a kind"
    kinds = {kind for kind, _ in blocks(page)}
    assert kinds <= {"sh", "python", "text", "toml", "jsonl"}
    assert page.name in WRITTEN or not kinds & {"toml", "jsonl"}
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        word = line.split()[0]
        known = (
            word.startswith("mlx_diffgemma.") or line in INSTALLING or (word == "make" and line.split()[1] in targets)
        )
        assert known, line


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_what_a_page_names_in_passing_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"`python -m ([\w.]+)", text):
        assert module.endswith(".NAME") or importlib.util.find_spec(module), module
    for target in re.findall(r"`make (\w+)", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target
    for name, options in re.findall(r"`mlx_diffgemma[. ](\w+)([^`]*)`", text):
        if name == "NAME":
            continue
        command = main.get_command(None, name)  # type: ignore[arg-type]
        assert command, name
        spellings = [spelling for option in command.params for spelling in option.opts] + ["--help", "-h"]
        assert all(option in spellings for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", options)), options


WRITTEN = {"conversion.md": "mine.toml", "offline.md": "prompts.jsonl", "fine-tuning.md": "my-data/train.jsonl"}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader would have: the download, a picture, data for training, another Mac's figures."""
    home = tmp_path_factory.mktemp("reader")
    small.write_checkpoint(home / "released")
    seeing.write_checkpoint(home / "seeing")
    for name in ("cat", "page", "screen"):
        seeing.picture().save(home / f"{name}.png")
    shutil.copy(EYES / "puzzle.png", home)
    (home / "frames").mkdir()
    for number in range(12):
        seeing.picture(number).save(home / "frames" / f"{number}.png")
    (home / "letter.txt").write_text("Dear Ada, the ship is late.")
    (home / "my-data").mkdir()
    rows = [{"prompt": f"{i}", "completion": f"{i}!"} for i in range(4)]
    for name in ("train", "valid"):
        (home / "my-data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture
def home(request: pytest.FixtureRequest, reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder for one page: also what the page says is in files, and a pack that it does not make itself."""
    page, home = request.param, tmp_path / "home"
    shutil.copytree(reader, home)
    for kind, block in blocks(page):
        if kind in ("toml", "jsonl"):
            (home / WRITTEN[page.name]).write_text(block)
    if not any("convert" in line and "--mlx-path diffusiongemma-q4" in line for line in commands(page)):
        (home / "diffusiongemma-q4").symlink_to(home / ("seeing" if page.name == "pictures.md" else "released"))
    monkeypatch.chdir(home)
    return home


# What stands in for the 26B model, its download and its hours.
SMALLER = {
    "convert": "--hf-path released",
    "train": "--steps 1 --batch-size 1 --max-length 64",
    "bench": "--repeat 1 --only fact",
    "tune": "--show",  # minutes; tests/commands/test_tune.py runs it
    "serve": "--help",  # it would go on for ever; tests/server runs it
    "check": "--help",  # most of a minute; test_check.py runs all of it, part by part
}
MADE = ("--mlx-path", "--record", "--output", "--save-noise", "--save-path")
RUN = [
    page for page in PAGES if page not in NOT_RUN and any(line.startswith("mlx_diffgemma.") for line in commands(page))
]


@pytest.mark.parametrize("home", RUN, ids=named, indirect=True)
def test_the_commands_run_in_their_order(home: Path, request: pytest.FixtureRequest) -> None:
    for line in commands(request.node.callspec.params["home"]):
        if not line.startswith("mlx_diffgemma."):
            continue
        name, *options = shlex.split(line.removeprefix("mlx_diffgemma."))
        if "--compare" in options:
            (home / "that-mac.json").write_text((home / "this-mac.json").read_text())
        elif "--report" not in options:
            options += shlex.split(SMALLER.get(name, "")) + ["--pause", "0"] * ("--steps" in options)
        if name == "train":  # compiled, its hundred kernels would take a CPU's compiler a minute
            mx.disable_compile()
        result = CliRunner().invoke(main, [name, *options], input="Hello\n/exit\n")
        mx.enable_compile()
        assert result.exit_code == 0, f"{line}\n{result.output}"
        made = [options[i + 1] for i, o in enumerate(options) if o in MADE and "--dry-run" not in options]
        assert all((home / path).exists() for path in made), line


@pytest.mark.parametrize("page", NOT_RUN, ids=named)
def test_the_options_of_commands_that_are_not_run_exist(page: Path) -> None:
    for line in commands(page):
        name, *args = shlex.split(line, comments=True)
        command = main.get_command(None, name.removeprefix("mlx_diffgemma."))  # type: ignore[arg-type]
        assert command, name
        known = [spelling for option in command.params for spelling in option.opts]
        assert all(arg in known for arg in args if arg.startswith("-")), line


PYTHON = [page for page in PAGES if page not in NOT_RUN and any(kind == "python" for kind, _ in blocks(page))]


@pytest.mark.parametrize("home", PYTHON, ids=named, indirect=True)
def test_the_python_blocks_run(home: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    page = request.node.callspec.params["home"]
    (home / "diffusiongemma-q4").exists() or (home / "diffusiongemma-q4").symlink_to(home / "released")
    for kind, block in blocks(page):
        if kind == "python":
            exec(compile(block, page.name, "exec"), {})
            assert capsys.readouterr().out.strip()
            assert page != README or len([line for line in block.splitlines() if line]) <= 5


def anchors(page: Path) -> set[str]:
    """What can stand behind # in a link to a page, as GitHub makes it of the headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page != OTHERS], ids=named)
def test_every_file_that_is_named_exists(page: Path) -> None:
    found = re.findall(r"`((?:\.\./)?[\w./]+(?:\.py|/))`", page.read_text(encoding="utf-8"))
    roots = (ROOT / "mlx_diffgemma", ROOT)
    made = {"my-adapter/"}
    missing = [name for name in found if not any((root / name).exists() for root in roots) and name not in made]
    assert not missing
