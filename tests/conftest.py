"""What the tests share: figures worth reading after a run."""

from collections.abc import Callable

import pytest

_SUMMARY: list[str] = []


@pytest.fixture
def record_summary() -> Callable[[str], None]:
    """Print a line at the end of the run, passed or not."""
    return _SUMMARY.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _SUMMARY:
        terminalreporter.write_line(line)
