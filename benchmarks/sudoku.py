"""The published story at small scale: a model that never saw a Sudoku, fine-tuned with LoRA by the command.

    python benchmarks/sudoku.py build/sudoku [--steps 400] [--count 50]

First a base is trained on the structured tasks alone (or given by --base), then an adapter on 6×6 Sudoku. Printed:
puzzles solved and steps per canvas, before and after, on held-out puzzles with 20 … 28 of 36 cells given.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))

import demo_score
import train_demo

from mlx_diffgemma import load

BASE = {**train_demo.RECIPE, "warmup": 50, "final_rate": 0.1, "seed": 7}
LORA = {
    "rank": 32,
    "targets": "attention,dense,experts",
    "optimizer": "muon",
    "learning_rate": 1e-3,
    "batch_size": 32,
    "warmup": 20,
    "betas": [0.9, 0.98],
    "weight_decay": 0.0,
    "max_length": 160,
    "seed": 8,
}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path, exists=True), help="A model that never saw a Sudoku.")
@click.option("--base-steps", default=240)
@click.option("--steps", default=400, help="Of the LoRA fine-tuning.")
@click.option("--count", default=50, help="Held-out puzzles.")
def main(folder: Path, base: Path | None, base_steps: int, steps: int, count: int) -> None:
    if base is None:
        train_demo.write_model(folder / "start")
        held_out = train_demo.structured(train_demo.HELD_OUT_SEED, 24)
        train_demo.write_data(folder / "base-data", train_demo.structured(7, 32 * base_steps + 1000), held_out)
        options = {**BASE, "steps": base_steps}
        train(folder / "base", folder / "base-data", options, ["--from-scratch", str(folder / "start")])
        base = folder / "base" / "model"
    puzzles = train_demo.sudoku(8, 32 * steps + 1000, (20, 32))
    held_out = train_demo.sudoku(train_demo.HELD_OUT_SEED, 24)
    train_demo.write_data(folder / "data", puzzles, held_out)
    before = measure(base, None, count)
    train(folder / "adapter", folder / "data", {**LORA, "steps": steps}, ["--model", str(base)])
    after = measure(base, folder / "adapter", count)
    print(demo_score.table({"before": before, f"after {steps} steps of LoRA": after}))
    (folder / "sudoku.json").write_text(json.dumps({"before": before, "after": after}, indent=2) + "\n")


def train(output: Path, data: Path, options: dict[str, Any], start: list[str]) -> None:
    """The command, as a user would give it."""
    output.mkdir(parents=True, exist_ok=True)
    config = output / "options.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items()))
    command = [sys.executable, "-m", "mlx_diffgemma.train", "--config", str(config), *start]
    subprocess.run([*command, "--data", str(data), "--output", str(output)], check=True)


def measure(model: Path, adapter: Path | None, count: int) -> dict[str, Any]:
    loaded = load(model, adapter=adapter)
    return demo_score.score(loaded, demo_score.held_out("sudoku", count), [0])


if __name__ == "__main__":
    main()
