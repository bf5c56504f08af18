"""The exact ideas: with and without each the recorded runs are walked, and the plain way is really taken."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_diffgemma.bench import WITHOUT, plain_tuning
from mlx_diffgemma.files import shipped
from mlx_diffgemma.generation import vocabulary
from mlx_diffgemma.model import cache, layers
from mlx_diffgemma.model.tuning import Tuning
from mlx_diffgemma.proof.recordings import Recording
from mlx_diffgemma.proof.replay import replay_trajectory

RUNS = (
    "settling-behind-window",
    "settling-early-batch",
    "demo-sudoku",
)  # the last is sure of most positions at its end
EVERYTHING = Tuning(tile=64, scores=2048, sort_from=1)  # sizes at which a small model meets every idea


def replay(run: str, without: tuple[str, ...]) -> list[str]:
    recording = Recording.load(shipped.references() / f"trajectory-{run}.npz")
    network = recording.network()
    network.tuning = plain_tuning(EVERYTHING, without)
    return replay_trajectory(recording, network, sparse_signal="sparse-signal" not in without)


@pytest.mark.parametrize("without", [(), *((name,) for name in WITHOUT), tuple(WITHOUT)], ids="+".join)
def test_recorded_runs_are_walked(without: tuple[str, ...]) -> None:
    for run in RUNS:
        assert not replay(run, without)


def called(owner: Any, name: str, patch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of all calls of a function from now on."""
    calls: list[tuple[Any, ...]] = []
    original: Callable[..., Any] = getattr(owner, name)

    def noted(*given: Any, **named: Any) -> Any:
        calls.append(given)
        return original(*given, **named)

    patch.setattr(owner, name, noted)
    return calls


@pytest.mark.parametrize(
    ("idea", "owner", "function", "count"),
    [
        ("tiles", vocabulary, "scores", lambda calls: len(calls)),
        ("streams", mx, "stream", lambda calls: len({str(given[0]) for given in calls})),
        ("sparse-signal", vocabulary, "sparse_signal", lambda calls: len(calls)),
        ("in-place", cache, "_written", lambda calls: len(calls)),
        ("pieces", layers, "_piece", lambda calls: len(calls)),
        ("sorted-experts", mx, "argsort", lambda calls: len(calls)),
    ],
)
def test_the_plain_way_is_taken(
    idea: str, owner: Any, function: str, count: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an idea does, it does less often without it."""
    calls = called(owner, function, monkeypatch)
    assert not any(replay(run, ()) for run in RUNS)
    with_it = count(calls)
    calls.clear()
    assert not any(replay(run, (idea,)) for run in RUNS)
    assert count(calls) < with_it
