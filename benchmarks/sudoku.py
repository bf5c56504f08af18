"""The published story at small scale: a model that never saw a Sudoku, fine-tuned with LoRA by the training command.

    python -m benchmarks.sudoku build/sudoku

First a base is trained that writes JSON, tables and templates, and fills the gaps of 6×6 grids with any digits: it
knows what a grid looks like, as a large model does, and nothing of Sudoku's rules. Then an adapter is trained on
Sudoku. Printed: puzzles solved and steps per canvas, before and after, on held-out puzzles with 20 … 28 of 36 cells
given. Within an hour on two cores. Given again, it goes on where it was interrupted.
"""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import common, demo_score, train_demo
from mlx_diffgemma import load

BASE = {**train_demo.RECIPE, "warmup": 50, "final_rate": 0.05, "seed": 7}
LORA = {
    "rank": 32,
    "targets": "attention,dense,experts",
    "optimizer": "muon",
    "learning_rate": 1e-3,
    "final_rate": 0.01,
    "batch_size": 32,
    "warmup": 20,
    "betas": [0.9, 0.98],
    "weight_decay": 0.0,
    "fill": "turn",
    "max_length": 160,
    "evaluate_every": 200,
    "exact_match": 24,
    "seed": 8,
}
BASE_TASKS = ("json", "table", "template")
GIVENS = (20, 32)  # of the training puzzles: easier ones are learned first
GRID_ASKS = ("Fill in these numbers:", "Please fill in this table:", "Can you fill in these numbers?")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--base-steps", default=450, show_default=True)
@click.option("--steps", default=1000, show_default=True, help="Of the LoRA fine-tuning.")
@click.option("--count", default=60, show_default=True, help="Held-out puzzles, each under three seeds.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the result here, too.")
def main(folder: Path, base_steps: int, steps: int, count: int, file: Path | None) -> None:
    examples = chain(base_examples(7, 16 * base_steps), grids(7, 16 * base_steps))
    held_out = chain(base_examples(train_demo.HELD_OUT_SEED, 24), grids(train_demo.HELD_OUT_SEED, 8))
    train_demo.write_model(folder / "start")
    train_demo.write_data(folder / "base-data", examples, held_out)
    base = folder / "base" / "model"
    train(folder / "base", folder / "base-data", BASE | {"steps": base_steps}, "--from-scratch", folder / "start")

    puzzles = train_demo.sudoku(8, 32 * steps, GIVENS)
    held_out = train_demo.sudoku(train_demo.HELD_OUT_SEED, 24)
    train_demo.write_data(folder / "data", puzzles, held_out)
    train(folder / "adapter", folder / "data", LORA | {"steps": steps}, "--model", base)

    scores = {"before": measure(base, None, count), "after": measure(base, folder / "adapter", count)}
    print(demo_score.table(scores))
    common.finish({**common.provenance(), "base_steps": base_steps, "steps": steps, **scores}, file)


def base_examples(seed: int, count: int) -> Iterator[train_demo.Example]:
    """What the base learns besides grids: the tasks in turn."""
    rng = random.Random(seed)
    for i in range(count):
        task = BASE_TASKS[i % len(BASE_TASKS)]
        yield train_demo.Example(task, *train_demo.STRUCTURED[task](rng))


def grids(seed: int, count: int) -> Iterator[train_demo.Example]:
    """Grids of random digits, some of them hidden; any digits will do there, and these are as good as any."""
    rng, asks = np.random.default_rng(seed), random.Random(seed)
    for _ in range(count):
        grid = rng.integers(1, 7, 36)
        shown = rng.permutation(36) < rng.integers(GIVENS[0], GIVENS[1] + 1)
        prompt = f"{asks.choice(GRID_ASKS)}\n{train_demo.grid_text(np.where(shown, grid, 0))}"
        yield train_demo.Example("grid", prompt, train_demo.grid_text(grid))


def train(output: Path, data: Path, options: dict[str, Any], *start: Any) -> None:
    """The command, as a user would give it."""
    output.mkdir(parents=True, exist_ok=True)
    config = output / "options.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items()))
    command = [sys.executable, "-m", "mlx_diffgemma.train", "--config", config, *start]
    subprocess.run([str(part) for part in [*command, "--data", data, "--output", output]], check=True)


def measure(model: Path, adapter: Path | None, count: int) -> dict[str, Any]:
    loaded = load(model, adapter=adapter)
    return demo_score.score(loaded, demo_score.held_out("sudoku", count), [0, 1, 2])


if __name__ == "__main__":
    main()
