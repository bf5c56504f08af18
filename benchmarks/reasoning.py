"""Procedural questions of reasoning-gym as tasks for `mlx_diffgemma.evaluate`: never seen, and as many as one likes.

    pip install reasoning-gym
    python -m benchmarks.reasoning tasks --datasets mini_sudoku,word_sorting,letter_counting --count 50
    mlx_diffgemma.evaluate --tasks tasks --model PACK

A task is a file of questions, one of lm-eval's YAML, and reasoning-gym's own scoring of an answer, 0 … 1.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import click

SCORING = '''"""reasoning-gym's own scoring, as lm-eval calls it."""

import json

import reasoning_gym


def process_results(doc, results):
    score = reasoning_gym.get_score_answer_fn(doc["dataset"])
    return {"score": score(results[0].strip(), json.loads(doc["entry"]))}
'''


def write(folder: Path, name: str, entries: list[dict[str, Any]]) -> None:
    """One task's files."""
    questions = folder / f"{name}.jsonl"
    rows = [{"dataset": name, "question": entry["question"], "entry": json.dumps(entry)} for entry in entries]
    questions.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (folder / "scoring.py").write_text(SCORING, encoding="utf-8")
    (folder / f"{name}.yaml").write_text(
        f"""task: reasoning_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(questions.resolve()))}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: ""
process_results: !function scoring.process_results
generation_kwargs:
  until: []
  max_gen_toks: 512
  do_sample: false
metric_list:
  - metric: score
    aggregation: mean
    higher_is_better: true
""",
        encoding="utf-8",
    )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--datasets", default="mini_sudoku,word_sorting,letter_counting,basic_arithmetic", show_default=True)
@click.option("--count", default=50, show_default=True, help="Questions of each.")
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, datasets: str, count: int, seed: int) -> None:
    """Write questions of reasoning-gym as tasks of lm-eval into FOLDER."""
    gym = import_module("reasoning_gym")
    folder.mkdir(parents=True, exist_ok=True)
    for name in datasets.split(","):
        write(folder, name, list(gym.create_dataset(name, size=count, seed=seed)))
    click.echo(f"mlx_diffgemma.evaluate --tasks {folder}")


if __name__ == "__main__":
    main()
