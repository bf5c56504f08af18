"""Exact-match scores: an answer for every example, by the default sampler."""

from collections.abc import Iterator, Sequence

from ..generation import engine
from ..generation.events import CanvasRow, Committed
from ..generation.noise import SeededNoise
from ..generation.settings import GenerationConfig
from ..model.network import Network
from .data import Example


def answers(
    network: Network, examples: Sequence[Example], settings: GenerationConfig, *, seed: int, batch_size: int = 16
) -> Iterator[tuple[Example, tuple[int, ...], list[CanvasRow]]]:
    """Generate for every example: the example, the ids of the answer, and its canvases. For exact-match scores."""
    config = network.config
    length = settings.canvas_length or config.canvas_length
    for first in range(0, len(examples), batch_size):
        group = examples[first : first + batch_size]
        seeds = range(seed * 1_000_003 + first, seed * 1_000_003 + first + len(group))
        noise = SeededNoise(seeds, length=length, vocabulary=config.vocab_size)
        rows: list[list[CanvasRow]] = [[] for _ in group]
        for event in engine.generate(network, [list(e.prompt) for e in group], settings, noise):
            if isinstance(event, Committed):
                for canvases, row in zip(rows, event.rows, strict=True):
                    canvases += [row] if row.steps else []
        for example, canvases in zip(group, rows, strict=True):
            yield example, tuple(i for row in canvases for i in row.ids), canvases
