"""The wheel: what is in it, and that its commands work from a folder that is not the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mlx_diffgemma import __version__
from mlx_diffgemma.cli import COMMANDS

ROOT = Path(__file__).parent.parent
LARGEST = 12_000_000  # bytes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The wheel installed by itself; what it depends on is this environment's."""
    folder = wheel.parent / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder


def test_the_wheel_holds_what_the_commands_need(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    wanted = ["py.typed", "demo/config.json", "demo/tokenizer.model", "_convert/diffusiongemma-26b-a4b.toml"]
    wanted += ["_convert/recipes/q4.toml", *(f"server/page/{name}" for name in ("index.html", "page.css", "page.js"))]
    missing = [name for name in wanted if f"mlx_diffgemma/{name}" not in names]
    assert not missing
    assert any(name.startswith("mlx_diffgemma/_reference/") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "convert/")) for name in names)
    assert wheel.stat().st_size < LARGEST
    assert wheel.name == f"mlx_diffgemma-{__version__}-py3-none-any.whl"


def run(installed: Path, elsewhere: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run with the installed package and without the repository: -P keeps the current folder off the path."""
    settings = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(elsewhere)}
    return subprocess.run(
        [sys.executable, "-P", *command], cwd=elsewhere, env=settings, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_script_and_module_works_elsewhere(name: str, installed: Path, tmp_path: Path) -> None:
    dotted = f"mlx_diffgemma.{name}".rstrip(".")
    ways = [[str(installed / "bin" / dotted)], ["-m", dotted], ["-m", "mlx_diffgemma", *([name] if name else [])]]
    for way in ways:
        result = run(installed, tmp_path, *way, "--help")
        assert result.returncode == 0 and "Usage:" in result.stdout, result.stderr
        assert not result.stderr


def test_the_built_in_model_and_the_recipes_come_along(installed: Path, tmp_path: Path) -> None:
    result = run(installed, tmp_path, "-m", "mlx_diffgemma.generate", "--seed", "1", "-m", "4")
    assert result.returncode == 0 and result.stdout.strip(), result.stderr
    where = "from mlx_diffgemma.files import shipped; print(shipped.__file__, shipped.knowledge())"
    result = run(installed, tmp_path, "-c", where)
    assert len(result.stdout.split()) == 2
    assert all(path.startswith(str(installed)) for path in result.stdout.split())
