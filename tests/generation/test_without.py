"""The exact ideas: with and without each the recorded runs are walked, and the plain way is really taken."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_diffgemma.bench import WITHOUT, plain
from mlx_diffgemma.files import shipped
from mlx_diffgemma.generation import vocabulary
from mlx_diffgemma.model import cache, layers, masks
from mlx_diffgemma.proof.recordings import Recording
from mlx_diffgemma.proof.replay import replay_trajectory

RUNS = ("settling-behind-window", "demo-table")


@pytest.fixture(autouse=True)
def everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a small model meets every idea."""
    monkeypatch.setattr(vocabulary, "TILE", 64)
    monkeypatch.setattr(vocabulary, "BLOCK", 16)
    monkeypatch.setattr(layers, "SCORES", 2048)
    monkeypatch.setattr(layers, "SORT_FROM", 1)


@pytest.mark.parametrize("without", [(), *((name,) for name in WITHOUT), tuple(WITHOUT)], ids="+".join)
def test_recorded_runs_are_walked(without: tuple[str, ...]) -> None:
    with plain(*without):
        for run in RUNS:
            recording = Recording.load(shipped.references() / f"trajectory-{run}.npz")
            assert not replay_trajectory(recording, recording.network())


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
        ("tiles", vocabulary, "_scores", lambda calls: len(calls)),
        ("streams", mx, "stream", lambda calls: len({str(given[0]) for given in calls})),
        ("sparse-signal", vocabulary, "soft_rows", lambda calls: len(calls)),
        ("in-place", cache.LayerCache, "_write", lambda calls: len(calls)),
        ("pieces", layers, "_piece", lambda calls: len(calls)),
        ("sorted-experts", mx, "argsort", lambda calls: len(calls)),
    ],
)
def test_the_plain_way_is_taken(
    idea: str, owner: Any, function: str, count: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an idea does, it does less often without it."""
    recording = Recording.load(shipped.references() / f"trajectory-{RUNS[1]}.npz")
    calls = called(owner, function, monkeypatch)
    assert not replay_trajectory(recording, recording.network())
    with_it = count(calls)
    calls.clear()
    with plain(idea):
        assert not replay_trajectory(recording, recording.network())
    assert count(calls) < with_it


def test_everything_is_put_back() -> None:
    before = (vocabulary.TILE, vocabulary.soft_rows, cache.LayerCache.look, masks.Window.pieces)
    with pytest.raises(RuntimeError), plain(*WITHOUT):
        raise RuntimeError
    assert before == (vocabulary.TILE, vocabulary.soft_rows, cache.LayerCache.look, masks.Window.pieces)
