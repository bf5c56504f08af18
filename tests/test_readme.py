"""The README's code blocks do what they say, and its generated tables are what the code computes.

What needs the 26B download runs on a small checkpoint with the released layout in its place: same commands, same
options. `python -m tests.test_readme` writes the generated tables anew.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_diffgemma import checkpoint, quantize
from mlx_diffgemma.cli import main
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.convert import load_recipe
from tests import small
from tests.synthetic import published

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line.split("    #")[0] for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
RECIPES = ("q8", "q6", "q4-bf16", "q4", "mxfp4", "q3", "q2")


def table(name: str) -> tuple[int, int]:
    """Where the generated section `name` begins and ends in README."""
    begin = re.search(rf"<!-- {name}: begin.*?-->\n", README)
    end = README.find(f"<!-- {name}: end -->")
    assert begin and end >= begin.end()
    return begin.end(), end


def recipes() -> str:
    """What each recipe makes of the released shapes, and the smallest Mac for 4K and 128K tokens of prefix."""
    config = ModelConfig.from_dict(published("released/config.json"))
    rows = [
        "| recipe | experts | the rest | GB | bits a weight | Mac, 4K prefix | Mac, 128K prefix |",
        "|---" * 7 + "|",
    ]
    for name in RECIPES:
        sizes = quantize.sizes(recipe := load_recipe(name), quantize.plan(recipe, checkpoint.sources(config)))
        whole = quantize.Size.sum(sizes.values())
        text = whole.nbytes - sizes["vision"].nbytes
        macs = [_macs(quantize.memory_needed(config, text, prefix)) for prefix in (4096, 131_072)]
        label = f"`{name}`" + " (default)" * (name == "q4") + " (experimental)" * recipe.experimental
        packing = (sizes["experts"].packing, sizes["attention"].packing)
        rows.append(f"| {' | '.join((label, *packing))} | {whole.nbytes / 1e9:.1f} | {whole.bits_per_weight:.1f} |"
                    f" {' | '.join(macs)} |")  # fmt: skip
    return "\n".join(rows) + "\n"


def _macs(needed: int) -> str:
    normal, raised = quantize.smallest_macs(needed)
    return f"{normal} GB" + (f" ({raised} GB)" if raised and raised != normal else "")


def test_the_table_of_recipes_is_up_to_date() -> None:
    begin, end = table("recipes")
    assert README[begin:end] == recipes(), "run: python -m tests.test_readme"


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


if __name__ == "__main__":
    begin, end = table("recipes")
    (ROOT / "README.md").write_text(README[:begin] + recipes() + README[end:], encoding="utf-8")
