"""Rows that leave their batch when they settle, beside rows that stay until the last one of their canvas has settled.

    python -m benchmarks.leaving [--batches 48] [--size 4] [--out benchmarks/results/leaving.json]

Batches of mixed held-out questions for the built-in model, with answers of one and of several canvases; each batch is
written both ways, by turns. Rows with other ids are listed with the largest difference of entropies in their batch.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import common, decodings
from mlx_diffgemma import DiffusionGemma, load
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.generation import engine
from mlx_diffgemma.generation.events import Denoised, Finished

SEED = 71


@contextmanager
def staying() -> Iterator[None]:
    canvas = engine._Canvas  # pyright: ignore[reportPrivateUsage]
    part, canvas._part = canvas._part, lambda self, settled: None  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        canvas._part = part  # pyright: ignore[reportPrivateUsage]


def written(model: DiffusionGemma, prompts: list[str], seed: int) -> dict[str, Any]:
    """One batch: seconds, rows of all passes, the last event, and entropies by canvas and step."""
    denoise, rows = model.network.denoise, []

    def counted(canvas: Any, *rest: Any) -> Any:
        rows.append(len(canvas))
        return denoise(canvas, *rest)

    model.network.denoise = counted  # pyright: ignore[reportAttributeAccessIssue]
    begun = time.perf_counter()
    try:
        events = list(model.prepare(prompts, seed=seed).events())
    finally:
        model.network.denoise = denoise  # pyright: ignore[reportAttributeAccessIssue]
    seconds = time.perf_counter() - begun
    entropies = {(e.index, e.step): np.array(e.entropy) for e in events if isinstance(e, Denoised)}
    return {"seconds": seconds, "rows": sum(rows), "last": events[-1], "entropies": entropies}


def compared(leaving: dict[str, Any], staying: dict[str, Any]) -> dict[str, Any]:
    last, other = leaving["last"], staying["last"]
    assert isinstance(last, Finished) and isinstance(other, Finished)
    pairs = enumerate(zip(last.results, other.results, strict=True))
    both = leaving["entropies"].keys() & staying["entropies"].keys()
    return {
        "parted": [row for row, (ours, theirs) in pairs if ours.tokens != theirs.tokens],
        "furthest": max(float(np.abs(leaving["entropies"][at] - staying["entropies"][at]).max()) for at in both),
        "seconds": (leaving["seconds"], staying["seconds"]),
        "rows": (leaving["rows"], staying["rows"]),
    }


@click.command()
@click.option("--batches", default=48)
@click.option("--size", default=4, help="Rows of a batch.")
@click.option("--out", type=click.Path(path_type=Path))
def main(batches: int, size: int, out: Path | None) -> None:
    model = load(BUILT_IN)
    each = -(-batches * size // 3)
    kinds = (decodings.easy, decodings.long, decodings.sudoku)
    prompts = [example.prompt for kind in kinds for example in kind(SEED, each)]
    random.Random(SEED).shuffle(prompts)
    written(model, prompts[:size], 0)  # warms up
    found = []
    for number in range(batches):
        some = prompts[number * size : (number + 1) * size]
        ways: dict[str, dict[str, Any]] = {}
        for way in ("leaving", "staying") if number % 2 else ("staying", "leaving"):
            if way == "leaving":
                ways[way] = written(model, some, number)
            else:
                with staying():
                    ways[way] = written(model, some, number)
        found.append(compared(ways["leaving"], ways["staying"]))
    parted = [(number, row, batch["furthest"]) for number, batch in enumerate(found) for row in batch["parted"]]
    rows, seconds = (np.array([batch[name] for batch in found]).sum(axis=0) for name in ("rows", "seconds"))
    fewer = sum(batch["rows"][0] < batch["rows"][1] for batch in found)
    common.report(
        [
            ["batches", batches],
            ["of these with rows that left inside of a canvas", fewer],
            ["rows with other ids", len(parted)],
            ["largest difference of entropies (nats)", f"{max(batch['furthest'] for batch in found):.1e}"],
            ["rows in all passes, ratio", f"{rows[0] / rows[1]:.2f}"],
            ["seconds, ratio", f"{seconds[0] / seconds[1]:.2f}"],
        ],
        ["rows leave ÷ rows stay", f"batches of {size}"],
    )
    for number, row, furthest in parted:
        print(f"batch {number}, row {row} parted; entropies differed by {furthest:.1e}")
    common.finish({"size": size, "batches": found}, out)


if __name__ == "__main__":
    main()
