"""Browsers and clients that are no Python packages: `make clients`, apart from `make test`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium, without a window. Its driver is a program of Node, which takes no BLAS in its place."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise FileNotFoundError(f"none of {', '.join(BROWSERS)} is installed; CHROMIUM may name one.")
    preloaded = os.environ.pop("LD_PRELOAD", None)
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
            yield browser
            browser.close()
    finally:
        if preloaded is not None:
            os.environ["LD_PRELOAD"] = preloaded


@contextmanager
def served(*options: str) -> Iterator[str]:
    """`mlx_diffgemma.serve` with the built-in model, as people start it. → its address."""
    command = [sys.executable, "-m", "mlx_diffgemma.serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        yield next(line.strip() for line in process.stderr if line.startswith("http://"))
    finally:
        process.terminate()
        process.stderr.close()
        assert process.wait(20) == 0


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    with served("--log-level", "error") as url:
        yield url
