"""What the tests share: figures worth reading after a run."""

import gc
import os
import tempfile
from collections.abc import Callable

import hypothesis
import pytest

# The tests' bounds are float32's; an M5 would multiply in TF32. MLX reads this at its first product.
os.environ["MLX_ENABLE_TF32"] = "0"
# What somebody tuned on this machine is not what the tests are about.
os.environ["MLX_DIFFGEMMA_CACHE"] = os.path.join(tempfile.gettempdir(), f"mlx_diffgemma-tests-{os.getpid()}")

# The same examples on every run, and no test that depends on how busy the machine is.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

_SUMMARY: list[str] = []


def pytest_collection_finish() -> None:
    """What was imported (torch, transformers) is never garbage: unfrozen, each look for some would walk all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def record_summary() -> Callable[[str], None]:
    """Print a line at the end of the run, passed or not."""
    return _SUMMARY.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _SUMMARY:
        terminalreporter.write_line(line)
