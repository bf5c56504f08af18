"""Both decodings, the causal pass as a judge, other seeds and earlier ends, on the built-in model's tasks.

    python -m benchmarks.decodings [--count 60] [--seeds 0,1] [--kinds easy,long,sudoku,search,doubles,structured,
                                   noised,noised more,long noised] [--settings diffusion;…] [--out FILE.json]

easy: the held-out tasks, answers within one canvas · long: those that need two or more · sudoku: 12–18 of 36 cells
given, solved by singles · search: 12–15 given, one solution, not by singles · doubles: lists with repeated names ·
structured: templates never seen, and JSON of two records with four fields · noised: the easy questions, every weight
matrix + 0.25 × its RMS × N(0, 1), and "more": 0.35 · long noised: 0.25.

Right means letter by letter. Intervals are 95 %, by bootstrap over questions: answers to one question are no
independent samples. AUROC: how often a right answer is ranked above a wrong one.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from benchmarks import common, train_demo
from mlx_diffgemma import load
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.results import Result

BATCH = 20
CANVAS = 48  # the built-in model's; a stop id belongs to it, too
SETTINGS: dict[str, dict[str, Any]] = {
    "diffusion": {"logprobs": True},
    "autoregressive, greedy": {"decoding": "autoregressive", "greedy": True},
    "autoregressive": {"decoding": "autoregressive"},
    "retries=2": {"retries": 2},
    "best_of=4": {"best_of": 4},
    "stable_answer=8": {"stable_answer": 8},
    "stable_answer=4": {"stable_answer": 4},
    "stable_answer=1": {"stable_answer": 1},
}
NEW_TEMPLATES = (
    "On {day} {name} will bring the {fruit} to room {room} in {city}.",
    "The {pet} of {name} likes the {color} {item} from {city}.",
    "Hello {name}, the {job} has one {fruit} and the {item}.",
)


# --- The questions ---------------------------------------------------------------------------------------------------


def easy(seed: int, count: int) -> Iterator[train_demo.Example]:
    """As many of each of the five tasks."""
    each = count // 5
    for task in ("json", "table", "sort names", "template"):
        yield from islice(_held_out(seed, {task}, long=False), each)
    yield from train_demo.sudoku(seed, count - 4 * each)


def long(seed: int, count: int) -> Iterator[train_demo.Example]:
    """JSON of several records, and templates for several names."""
    return islice(_held_out(seed, {"json", "template"}, long=True), count)


def _held_out(seed: int, tasks: set[str], *, long: bool) -> Iterator[train_demo.Example]:
    """Questions of these tasks, without end, whose answers fill more than a canvas or do not."""
    tokenizer = load(BUILT_IN).tokenizer
    for example in train_demo.structured(seed, 1 << 30):
        if example.task in tasks and (len(tokenizer.encode(example.answer)) >= CANVAS) == long:
            yield example


def sudoku(seed: int, count: int) -> Iterator[train_demo.Example]:
    return train_demo.sudoku(seed, count, (12, 18))


def search(seed: int, count: int) -> Iterator[train_demo.Example]:
    """Puzzles that need a guess somewhere, and have one solution: cells are hidden while it is the only one."""
    rng, asks = np.random.default_rng(seed), random.Random(seed)
    while count:
        for grid in train_demo.random_grids(rng, 64):
            puzzle, wanted = grid.copy(), int(rng.integers(12, 16))
            for cell in rng.permutation(36):
                if (puzzle > 0).sum() == wanted:
                    break
                digit, puzzle[cell] = puzzle[cell], 0
                if solutions([int(d) for d in puzzle], 2) > 1:
                    puzzle[cell] = digit
            hard = (puzzle > 0).sum() <= 15 and not train_demo.solvable_by_singles(puzzle[None])[0]
            if count and hard:
                prompt = f"{asks.choice(train_demo.SUDOKU_ASKS)}\n{train_demo.grid_text(puzzle)}"
                yield train_demo.Example("search", prompt, train_demo.grid_text(grid))
                count -= 1


PEERS = [[int(other) for other in np.flatnonzero(row)] for row in train_demo.PEERS]


def solutions(puzzle: list[int], most: int) -> int:
    """How many solutions a puzzle of 36 cells has, counted up to `most`: the cell with the fewest choices first."""
    choices = [({1, 2, 3, 4, 5, 6} - {puzzle[other] for other in PEERS[c]}, c) for c in range(36) if not puzzle[c]]
    if not choices:
        return 1
    digits, cell = min(choices, key=lambda choice: len(choice[0]))
    found = 0
    for digit in digits:
        puzzle[cell] = digit
        found += solutions(puzzle, most - found)
        if found >= most:
            break
    puzzle[cell] = 0
    return found


def doubles(seed: int, count: int) -> Iterator[train_demo.Example]:
    rng = random.Random(seed)
    for _ in range(count):
        names = rng.sample(train_demo.WORDS["name"], rng.randint(3, 5))
        names += rng.choices(names, k=rng.randint(1, 3))
        rng.shuffle(names)
        prompt = f"{rng.choice(('Sort these names:', 'Put these names in order:'))}\n" + ", ".join(names)
        yield train_demo.Example("doubles", prompt, "\n".join(f"- {name}" for name in sorted(names)))


def structured(seed: int, count: int) -> Iterator[train_demo.Example]:
    rng = random.Random(seed)
    for number in range(count):
        yield train_demo.Example("structured", *(_template(rng) if number % 2 else _records(rng)))


def _template(rng: random.Random) -> tuple[str, str]:
    template = rng.choice(NEW_TEMPLATES)
    values = {field: _value(rng, field) for field in train_demo.FIELDS if f"{{{field}}}" in template}
    given = [f"{field}: {value}" for field, value in values.items()]
    rng.shuffle(given)
    return "Fill in the template:\n" + "\n".join([template, *given]), template.format(**values)


def _records(rng: random.Random) -> tuple[str, str]:
    fields = rng.sample(train_demo.FIELDS, 4)
    records = [{field: _value(rng, field) for field in fields} for _ in range(2)]
    lines = "\n\n".join("\n".join(f"{k}: {v}" for k, v in record.items()) for record in records)
    return f"Write this as JSON:\n{lines}", "[\n" + ",\n".join(map(train_demo.json.dumps, records)) + "\n]"


def _value(rng: random.Random, field: str) -> str | int:
    return rng.choice(train_demo.WORDS[field]) if field in train_demo.WORDS else rng.randint(10, 99)


Questions = Callable[[int, int], Iterator[train_demo.Example]]  # a seed and how many
KINDS: dict[str, tuple[Questions, float, int]] = {  # and of the noise on the weights the scale and the seed
    "easy": (easy, 0.0, 0),
    "long": (long, 0.0, 0),
    "sudoku": (sudoku, 0.0, 0),
    "search": (search, 0.0, 0),
    "doubles": (doubles, 0.0, 0),
    "structured": (structured, 0.0, 0),
    "noised": (easy, 0.25, 0),
    "noised more": (easy, 0.35, 1),
    "long noised": (long, 0.25, 1),
}


def noised(model: DiffusionGemma, scale: float, seed: int) -> DiffusionGemma:
    """Every matrix, embedding and router too, + scale × its RMS × N(0, 1)."""
    if not scale:
        return model
    changed = []
    parameters: Any = tree_flatten(model.network.parameters())
    for number, (name, value) in enumerate(parameters):
        if value.ndim >= 2:
            noise = mx.random.normal(value.shape, key=mx.random.key(1_000_003 * seed + number))
            value = value + scale * mx.sqrt((value * value).mean()) * noise
        changed.append((name, value))
    model.network.update(tree_unflatten(changed))
    return model


# --- What is measured -----------------------------------------------------------------------------------------------


def measure(
    model: DiffusionGemma, examples: Sequence[train_demo.Example], seeds: Sequence[int], options: dict[str, Any]
) -> dict[str, Any]:
    """One setting on one kind of questions: arrays over questions × seeds become shares with intervals."""
    answers = [_answers(model, examples, seed, options) for seed in seeds]
    right = np.array([[r.text == e.answer for r, e in zip(row, examples, strict=True)] for row in answers]).T
    figures: dict[str, Any] = {"right": share(right), "answers": right.size}
    results = [result for row in answers for result in row]
    if options.get("decoding") != "autoregressive":
        figures["steps"] = float(np.mean([canvas.steps for result in results for canvas in result.canvases]))
    figures["canvases"] = float(np.mean([len(result.canvases) for result in results]))
    figures["attempts"] = float(np.mean([result.statistics.attempts for result in results]))
    if options.get("logprobs"):
        judged = {
            "avg_logprob": [result.avg_logprob for result in results],
            "entropy": [-np.mean([c.mean_entropy for c in result.canvases]) for result in results],
            "settled": [float(all(c.settled for c in result.canvases)) for result in results],
        }
        figures["auroc"] = {name: auroc(np.array(values), right.T.flatten()) for name, values in judged.items()}
        figures["avg_logprob"] = float(np.mean(judged["avg_logprob"]))
    return figures


def _answers(
    model: DiffusionGemma, examples: Sequence[train_demo.Example], seed: int, options: dict[str, Any]
) -> list[Result]:
    found: list[Result] = []
    for start in range(0, len(examples), BATCH):
        prompts: Any = [example.prompt for example in examples[start : start + BATCH]]
        seeds = [seed * 100_000 + start + row for row in range(len(prompts))]
        told = model.generate(prompts, seeds=seeds, max_tokens=4 * model.config.canvas_length, **options)
        assert isinstance(told, list)
        found += told
    return found


def share(right: np.ndarray) -> tuple[float, float, float]:
    """The mean over questions × seeds, and its interval by questions."""
    by_question = right.mean(1)
    rng = np.random.default_rng(0)
    means = by_question[rng.integers(0, len(by_question), (2000, len(by_question)))].mean(1)
    return (float(by_question.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975))))


def auroc(values: np.ndarray, right: np.ndarray) -> float | None:
    """How often a right answer's value lies above a wrong one's, ties half; None without both."""
    good, bad = values[right], values[~right]
    if not len(good) or not len(bad):
        return None
    difference = good[:, None] - bad[None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


@click.command()
@click.option("--count", default=60, show_default=True, help="Questions of each kind.")
@click.option("--seeds", default="0,1", show_default=True, help="Answers to each question.")
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option("--settings", "names", default=";".join(SETTINGS), show_default=True, help="Separated by semicolons.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result here, too.")
def main(count: int, seeds: str, kinds: str, names: str, out: Path | None) -> None:
    found: dict[str, Any] = {}
    for kind in kinds.split(","):
        questions, scale, noise_seed = KINDS[kind]
        model = noised(load(BUILT_IN), scale, noise_seed)
        examples = list(questions(train_demo.HELD_OUT_SEED + 1, count))
        for name in names.split(";"):
            chosen = [int(seed) for seed in seeds.split(",")]
            found.setdefault(kind, {})[name] = measure(model, examples, chosen, SETTINGS[name])
            print(kind, name, found[kind][name], flush=True)
    print(table(found))
    common.finish(common.provenance() | {"count": count, "seeds": seeds, "found": found}, out)


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One row a kind and setting."""
    header = ["questions", "setting", "right", "steps a canvas", "answers drawn", "AUROC log p / entropy / settled"]
    rows = []
    for kind, settings in found.items():
        for name, row in settings.items():
            mean, low, high = (f"{100 * value:.1f}" for value in row["right"])
            judged = [("–" if v is None else f"{v:.2f}") for v in row.get("auroc", {}).values()]
            steps = f"{row['steps']:.1f}" if "steps" in row else "–"
            rows.append([kind, name, f"{mean} [{low} {high}]", steps, f"{row['attempts']:.1f}", " / ".join(judged)])
    return common.table(rows, header)


if __name__ == "__main__":
    main()
