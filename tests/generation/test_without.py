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
SEEN = {  # the function in which an idea is seen at work; "streams": on how many it runs
    "tiles": (vocabulary, "scores"),
    "streams": (mx, "stream"),
    "sparse-signal": (vocabulary, "sparse_signal"),
    "in-place": (cache, "_written"),
    "pieces": (layers, "_piece"),
    "sorted-experts": (mx, "argsort"),
}


def replay(run: str, without: tuple[str, ...]) -> list[str]:
    recording = Recording.load(shipped.references() / f"trajectory-{run}.npz")
    network = recording.network()
    network.tuning = plain_tuning(EVERYTHING, without)
    return replay_trajectory(recording, network, sparse_signal="sparse-signal" not in without)


def counted(without: tuple[str, ...]) -> dict[str, int]:
    """The recorded runs are walked; how often each idea was seen."""
    seen: dict[str, set[Any]] = {idea: set() for idea in SEEN}
    with pytest.MonkeyPatch.context() as patch:
        for idea, (owner, name) in SEEN.items():
            patch.setattr(owner, name, noted(idea, getattr(owner, name), seen[idea]))
        for run in RUNS:
            assert not replay(run, without), run
    return {idea: len(what) for idea, what in seen.items()}


def noted(idea: str, original: Callable[..., Any], seen: set[Any]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        seen.add(str(given[0]) if idea == "streams" else len(seen))
        return original(*given, **named)

    return call


@pytest.fixture(scope="module")
def with_all() -> dict[str, int]:
    return counted(())


@pytest.mark.parametrize("without", [*((name,) for name in WITHOUT), tuple(WITHOUT)], ids="+".join)
def test_the_plain_way_is_taken(without: tuple[str, ...], with_all: dict[str, int]) -> None:
    """The recorded runs are walked with all ideas and without some, and what those do is then done less often."""
    found = counted(without)
    assert all(found[idea] < with_all[idea] for idea in without), (found, with_all)
