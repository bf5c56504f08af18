"""Makefile, workflows and metadata say the same: targets and files exist, and the versions of Python are one list."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
YAML = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"]


def steps(file: Path) -> list[str]:
    """Every command of a workflow."""
    jobs: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")).get("jobs", {})
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("file", YAML, ids=lambda file: file.name)
def test_what_a_workflow_runs_exists(file: Path) -> None:
    for command in steps(file):
        for target in re.findall(r"\bmake ([\w./]+)", command):
            assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), target
        for path in re.findall(r"(?<!\S)(?:tests|mlx_diffgemma|\.ci)/[\w./]+", command):
            assert (ROOT / path).exists(), path


def test_every_test_that_the_makefile_picks_exists() -> None:
    paths = re.findall(r"tests/[\w./]+", MAKEFILE)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_target_that_is_no_file_says_so() -> None:
    (phony,) = re.findall(r"^\.PHONY: ([a-z].*)$", MAKEFILE, re.MULTILINE)
    assert sorted(phony.split()) == sorted(re.findall(r"^([a-z]\w*):", MAKEFILE, re.MULTILINE))


def test_the_versions_of_python_are_one_list() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/linux.yml").read_text(encoding="utf-8"))
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d", line)]
    assert tested == named and PROJECT["requires-python"] == f">={tested[0]}"


def test_every_dependency_has_a_floor() -> None:
    """Which `make floors` installs."""
    assert [line for line in PROJECT["dependencies"] if ">=" not in line] == []


def test_the_version_of_a_tag_is_read_where_the_version_stands() -> None:
    (command,) = [step for step in steps(ROOT / ".github/workflows/release.yml") if "GITHUB_REF_NAME" in step]
    (pattern,) = re.findall(r"s/\^(.*?)\\\(", command)
    assert re.search(rf"^{pattern}[\d.]+", (ROOT / "mlx_diffgemma/_version.py").read_text(), re.MULTILINE)
