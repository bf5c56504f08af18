"""Score a model on the built-in model's held-out tasks: exact answers, settled canvases, steps.

    python -m benchmarks.demo_score [--model FOLDER] [--adapter FOLDER] [--count 60] [--seeds 0,1,2] [--json FILE]

An answer counts when it is the one right answer, letter by letter. Default sampler; every seed draws other noise.
"""

import json
from pathlib import Path
from typing import Any

import click

from benchmarks import train_demo
from mlx_diffgemma import load
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.training.data import Example
from mlx_diffgemma.training.scoring import answers


@click.command()
@click.option("--model", default=BUILT_IN, help="[default: the built-in model]")
@click.option("--adapter")
@click.option("--count", default=60, help="Held-out examples of each task.")
@click.option("--seeds", default="0,1,2")
@click.option("--tasks", default=",".join((*train_demo.TASKS, "sudoku")))
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the scores here, too.")
def main(model: str, adapter: str | None, count: int, seeds: str, tasks: str, file: Path | None) -> None:
    loaded = load(model, adapter=adapter)
    chosen = [int(seed) for seed in seeds.split(",")]
    scores = {task: score(loaded, held_out(task, count), chosen) for task in tasks.split(",")}
    print(table(scores))
    if file is not None:
        file.write_text(json.dumps(scores, indent=2) + "\n")


def held_out(task: str, count: int) -> list[train_demo.Example]:
    """The first `count` held-out examples of a task; no training data has them."""
    if task == "sudoku":
        return list(train_demo.sudoku(train_demo.HELD_OUT_SEED, count))
    every = train_demo.structured(train_demo.HELD_OUT_SEED, count * len(train_demo.STRUCTURED))
    return [example for example in every if example.task == task]


def score(model: DiffusionGemma, examples: list[train_demo.Example], seeds: list[int]) -> dict[str, Any]:
    """Over all examples and seeds: exact answers, canvases that settled before the step limit, steps per canvas."""
    tokenizer = model.tokenizer
    encoded = [
        Example(
            prompt=tuple(tokenizer.apply_chat_template([{"role": "user", "content": example.prompt}])),
            response=tuple(tokenizer.encode(example.answer)),
        )
        for example in examples
    ]
    exact, canvases = [], []
    for seed in seeds:
        given = answers(model.network, encoded, model.generation_config, seed=seed)
        for example, (_, ids, rows) in zip(examples, given, strict=True):
            exact.append(tokenizer.decode(ids) == example.answer)
            canvases += rows
    return {
        "answers": len(exact),
        "exact": sum(exact) / len(exact),
        "settled": sum(row.settled for row in canvases) / len(canvases),
        "steps": sum(row.steps for row in canvases) / len(canvases),
        "canvases": len(canvases) / len(exact),
    }


def table(scores: dict[str, dict[str, Any]]) -> str:
    """A Markdown table."""
    rows = ["| task | exact | canvases settled | steps per canvas | canvases per answer |", "|---|---|---|---|---|"]
    for task, s in scores.items():
        rows.append(f"| {task} | {s['exact']:.1%} | {s['settled']:.1%} | {s['steps']:.1f} | {s['canvases']:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
