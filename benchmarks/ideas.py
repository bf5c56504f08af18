"""What each exact idea brings: alone beside none of them, and left out beside all of them.

    python -m benchmarks.ideas [--prefix 4096] [--runs 3] [--out benchmarks/results/ideas.json]

The ideas are those of `mlx_diffgemma.bench --without`, on the model of step.py (real vocabulary, canvas, window and
heads; random weights, float32). Three works, each with the ideas that can matter to it:

    step     a denoising step with every position unsure
    late     the vocabulary pass when nine positions of ten are sure of one token
    prefill  encoding 512 more tokens behind the prefix

Variants alternate; figures are medians. "alone" is the idea ÷ none, "together" is all ÷ all but the idea: below 1 the
idea is faster, or smaller.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import common, models, step
from mlx_diffgemma.bench import WITHOUT, plain_tuning
from mlx_diffgemma.generation import vocabulary
from mlx_diffgemma.model.tuning import DEFAULT

WORKS = {
    "step": ("tiles", "streams", "in-place", "sorted-experts"),
    "late": ("tiles", "streams", "sparse-signal"),
    "prefill": ("pieces", "sorted-experts"),
}
TOKENS = 512  # of the prompt
SURE = 60.0  # times its own row of the table: a position that is sure of one token


class Late:
    """The vocabulary pass as the engine does it, late in a canvas."""

    def __init__(self, ours: step.Ours):
        self.ours, self.table = ours, ours.network.decoder.embed_tokens
        length = ours.canvas.shape[1]
        sharpness = mx.where(mx.arange(length) % 10 == 0, 1.0, SURE)
        self.hidden = self.table(ours.canvas) * sharpness[:, None]
        mx.eval(self.hidden)

    def __call__(self, *, sparse_signal: bool) -> None:
        shaping, tuning = self.ours.shaping, self.ours.network.tuning
        before = vocabulary.walk(self.hidden[:, :10], self.table, shaping, tuning=tuning).read(None)
        sure = vocabulary.soft_rows(before, self.table).mean().item() <= 0.5  # the step before was mostly sure
        dense = not (sparse_signal and sure)
        sums = vocabulary.walk(self.hidden, self.table, shaping, with_signal=dense, tuning=tuning)
        reading = sums.read(self.ours.noise.draws(0, step.STEP))
        signal = reading.signal
        if signal is None:
            rows = np.flatnonzero(np.array(vocabulary.soft_rows(reading, self.table)))
            signal = vocabulary.sparse_signal(sums, reading.best, mx.array(rows), tuning=tuning)
        mx.eval(signal, reading.best, reading.guess, reading.entropy)


Work = Callable[[tuple[str, ...]], None]  # given the ideas that are left out


def works(ours: step.Ours) -> dict[str, Work]:
    ids = mx.random.randint(0, ours.network.config.vocab_size, (1, TOKENS), key=mx.random.key(3))
    late = Late(ours)

    def prefill() -> None:
        cache = ours.cache.fork()
        ours.network.encode(ids, cache)
        mx.eval(cache.state)

    def without(work: Callable[..., None], **options: bool) -> Work:
        def run(ideas: tuple[str, ...]) -> None:
            ours.network.tuning = plain_tuning(DEFAULT, ideas)
            for layer in ours.cache.layers:
                layer.write_in_place = ours.network.tuning.write_in_place
            work(**dict.fromkeys(options, "sparse-signal" not in ideas))

        return run

    return {"step": without(ours.step), "late": without(late, sparse_signal=True), "prefill": without(prefill)}


def variants(ideas: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """What is left out, by name: all ideas, none, all but one, one."""
    alone = {f"only {idea}": tuple(other for other in WITHOUT if other != idea) for idea in ideas}
    return {"none": tuple(WITHOUT), "all": ()} | alone | {f"without {idea}": (idea,) for idea in ideas}


def measure(work: Work, ideas: tuple[str, ...], runs: int) -> dict[str, dict[str, float]]:
    """Median seconds and peak bytes of every variant."""

    def varied(without: tuple[str, ...]) -> Callable[[], None]:
        return lambda: work(without)

    functions = {name: varied(without) for name, without in variants(ideas).items()}
    seconds = common.alternate(functions, runs)
    return {
        name: {"seconds": float(np.median(seconds[name])), "memory": step.memory(run)}
        for name, run in functions.items()
    }


def rows(name: str, found: dict[str, dict[str, float]], ideas: tuple[str, ...]) -> list[list[str]]:
    def ratios(a: str, b: str) -> list[str]:
        return [f"{found[a][key] / found[b][key]:.2f}" for key in ("seconds", "memory")]

    made = [[name, f"`{idea}`", *ratios(f"only {idea}", "none"), *ratios("all", f"without {idea}")] for idea in ideas]
    return [*made, [name, "all", *ratios("all", "none"), "", ""]]


def table(document: dict[str, Any]) -> str:
    header = ["work", "idea", "alone: time", "memory", "together: time", "memory"]
    found = document["works"]
    return common.table([row for name in found for row in rows(name, found[name], WORKS[name])], header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    raw = models.config(arguments.hidden, arguments.layers, arguments.experts, arguments.vocabulary)
    network = models.our_network(raw)
    prefix, new = (models.keys_and_values(network, n) for n in (arguments.prefix, network.config.canvas_length))
    ours = step.Ours(network, prefix, new, commits=8)
    found = {name: measure(work, WORKS[name], arguments.runs) for name, work in works(ours).items()}
    document = common.provenance() | {"config": raw, "prefix": arguments.prefix, "runs": arguments.runs, "works": found}
    print(table(document))
    common.finish(document, arguments.out)


if __name__ == "__main__":
    main()
