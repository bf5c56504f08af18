"""Whether constraints hold, and what they cost or bring in answers.

    python -m benchmarks.obey schemas [--count 200]     random schemas and texts with holes: valid, ended, pins kept
    python -m benchmarks.obey answers [--count 40]      right answers and steps, free and conditioned
    python -m benchmarks.obey decide [--count 60]       accuracy and calibration of decisions, beside written answers

`schemas` runs the built-in model with noised weights (0.35 of each matrix's RMS) and a small random network that never
settles: what they write on their own is noise. `answers` asks questions that the model finds hard (Sudokus of few
givens) and, with noised weights, ones that it would find easy; JSON is asked in any layout, in the model's own, and in
those that it does not write. Intervals are 95 %: Wilson's for shares, bootstrap over questions for differences.
"""

import argparse
import json
import math
import random
import string
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from benchmarks import train_demo
from mlx_diffgemma import Hole, Language, json_schema, load
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.pipeline.drafts import Draft
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.results import Result
from mlx_diffgemma.text.language.syntax import Layout

NOISE = 0.35  # of a matrix's RMS
BATCH = 12
Validator = jsonschema.Draft202012Validator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["schemas", "answers", "decide"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    if asked.what == "schemas":
        schemas(asked.count or 200, asked.seed)
    elif asked.what == "answers":
        answers(asked.count or 40, asked.seed)
    else:
        decisions(asked.count or 60, asked.seed)


def noised(model: DiffusionGemma, amount: float, seed: int) -> DiffusionGemma:
    """The same model with noise on every matrix, in place."""
    weights = []
    for number, (name, value) in enumerate(tree_flatten(model.network.parameters())):
        if value.ndim > 1:
            random_ = mx.random.normal(value.shape, key=mx.random.key(1000 * seed + number))
            weights.append((name, value + amount * mx.sqrt((value * value).mean()) * random_))
    model.network.load_weights(weights, strict=False)
    mx.eval(model.network.parameters())
    return model


# ------------------------------------------------------------------------------------------------------- do they hold


def schemas(count: int, seed: int) -> None:
    from tests import small

    with tempfile.TemporaryDirectory() as folder:
        models = {
            f"built-in model, noise {NOISE}": noised(load(BUILT_IN), NOISE, seed),
            "random network": small.model(Path(folder), seed=seed, branches=1.0, sharpness=1.0),
        }
        for name, model in models.items():
            print(f"{name}: {held(model, count, seed)}")


def held(model: DiffusionGemma, count: int, seed: int, *, steps: int = 3) -> str:
    """Run `count` random schemas and as many texts with holes; what came of it, in words. Errors: AssertionError for an
    answer that breaks its constraint."""
    rng = random.Random(seed)
    room = 2 * model.config.canvas_length
    done = settled = refused = 0
    while done < count:
        schema = random_schema(rng, depth=2)
        try:
            request = model.prepare(
                "JSON, please",
                json_schema=schema,
                max_tokens=room,
                max_denoising_steps=steps,
                seed=rng.randrange(2**32),
            )
        except ConfigError as error:
            assert "shortest has" in str(error) or "too large" in str(error), error
            refused += 1
            continue
        [result] = request.run()
        ended(result, room)
        jsonschema.validate(json.loads(result.text), schema, cls=Validator, format_checker=Validator.FORMAT_CHECKER)
        settled += all(canvas.settled for canvas in result.canvases)
        done += 1
    for _ in range(count):
        text, holes = random_draft(rng, model.config.canvas_length // 2)
        result = model.fill(text, holes=holes, max_denoising_steps=steps, seed=rng.randrange(2**32))
        ended(result, model.config.canvas_length)
        assert result.holes is not None and len(result.holes) == len(holes)
        rebuilt = iter(result.holes)
        assert "".join(run + next(rebuilt, "") for run in text.split("<fill>")) == result.text
        for hole, found in zip(holes, result.holes, strict=True):
            assert hole.most is None or hole.least <= len(found) <= hole.most
            assert hole.choices is None or found in hole.choices
    return (
        f"{done} of {done} schemas valid and ended ({settled} settled, {refused} had no text that fits {room} tokens);"
        f" {count} of {count} texts with holes kept every pin"
    )


def ended(result: Result, room: int) -> None:
    """That the text is complete: by a stop id, or with the last token there was room for."""
    assert result.finish_reason == "stop" or len(result.tokens) == room, (result.finish_reason, len(result.tokens))


def random_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema of the kinds that people write."""
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"type": "integer", **_bounds(rng)},
        lambda: {"type": "number"},
        lambda: {"type": "string", "maxLength": rng.randint(1, 9)},
        lambda: {"type": "string", "pattern": rng.choice(["^[A-Z][a-z]+$", "^\\d{3}-\\d{2}$", "^(a|bc)*d$", "[!?]$"])},
        lambda: {"type": "string", "format": rng.choice(["date", "time", "ipv4", "email"])},
        lambda: {"enum": rng.sample(["red", "green", "blue", 1, 2.5, None, True, "é🙂", '"\\'], rng.randint(1, 4))},
        lambda: {"const": rng.choice(["x y", 0, False, [1, "a"], {"k": None}])},
        lambda: {"type": ["string", "null"], "minLength": 1, "maxLength": 4},
    ]
    if depth:
        inner = lambda: random_schema(rng, depth - 1)  # noqa: E731
        kinds += 2 * [
            lambda: _object(rng, inner),
            lambda: {"type": "array", "items": inner(), "minItems": rng.randint(0, 1), "maxItems": rng.randint(1, 3)},
            lambda: {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": 2},
            lambda: {"anyOf": [inner(), inner()]},
        ]
    return rng.choice(kinds)()


def _bounds(rng: random.Random) -> dict[str, int]:
    low = rng.randint(-50, 50)
    return rng.choice([{}, {"minimum": low}, {"maximum": low}, {"minimum": low, "maximum": low + rng.randint(0, 200)}])


def _object(rng: random.Random, inner: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    names = rng.sample(["name", "age", "a b", "city", "ok", "x"], rng.randint(1, 3))
    required = [name for name in names if rng.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: inner() for name in names},
        "required": required,
        "additionalProperties": False,
    }


def random_draft(rng: random.Random, room: int) -> tuple[str, list[Hole]]:
    """A text of about so many characters with one to three holes."""
    letters = string.ascii_letters + string.digits + " \n\t.,{}<é"
    holes = [
        rng.choice([Hole(least=1), Hole(least=1, most=4), Hole(pattern="[0-9]+"), Hole(choices=("yes", "no", "maybe"))])
        for _ in range(rng.randint(1, 3))
    ]
    runs = ["".join(rng.choices(letters, k=rng.randint(0, room // 6))) for _ in range(len(holes) + 1)]
    return "<fill>".join(runs), holes


# -------------------------------------------------------------------------------------------------------- right answers


def answers(count: int, seed: int) -> None:
    hard = list(train_demo.sudoku(train_demo.HELD_OUT_SEED + seed, count, (14, 18)))
    easy = list(train_demo.sudoku(train_demo.HELD_OUT_SEED + seed, count))
    every = train_demo.structured(train_demo.HELD_OUT_SEED + seed, 6 * count)
    records = [example for example in every if example.task == "json"]
    clean, spoilt = load(BUILT_IN), noised(load(BUILT_IN), NOISE, seed)
    print(f"{'':44s} {'free':>22s} {'conditioned':>22s}   difference, points      steps")
    compared("Sudoku of 14–18 givens, givens pinned", clean, hard, pinned_givens)
    compared(f"Sudoku, noise {NOISE}, givens pinned", spoilt, easy, pinned_givens)
    only, other = Layout(indents=(0,)), Layout(indents=(2, 4))
    compared(f"JSON, noise {NOISE}, all layouts", spoilt, records, lambda e: record_language(e, Layout()))
    compared(f"JSON, noise {NOISE}, the model's alone", spoilt, records, lambda e: record_language(e, only))
    compared(f"JSON, noise {NOISE}, all but the model's", spoilt, records, lambda e: record_language(e, other))


def pinned_givens(example: train_demo.Example) -> Language:
    puzzle = example.prompt.partition("\n")[2]
    return Draft.marked(puzzle, ".", [Hole(pattern="[1-6]")] * puzzle.count(".")).language()


def record_language(example: train_demo.Example, layout: Layout) -> Language:
    """Records with these names; of their values, only whether they are texts or numbers."""
    right = json.loads(example.answer)
    first = right[0] if isinstance(right, list) else right
    kinds = {name: {"type": "integer" if isinstance(value, int) else "string"} for name, value in first.items()}
    record = {"type": "object", "properties": kinds, "required": list(kinds), "additionalProperties": False}
    many = {"type": "array", "items": record, "minItems": 1, "maxItems": 4}
    return json_schema(many if isinstance(right, list) else record, layout=layout)


def compared(
    name: str,
    model: DiffusionGemma,
    examples: Sequence[train_demo.Example],
    language: Callable[[train_demo.Example], Language],
) -> None:
    free = [judged(result, e) for result, e in zip(written(model, examples, None), examples, strict=True)]
    under = [judged(result, e) for result, e in zip(written(model, examples, language), examples, strict=True)]
    right = [np.array([float(r) for r, _ in rows]) for rows in (free, under)]
    steps = [float(np.mean([s for _, s in rows])) for rows in (free, under)]
    low, high = bootstrapped(right[1] - right[0])
    shares = "  ".join(f"{share(int(r.sum()), len(r)):>22s}" for r in right)
    print(f"{name:44s} {shares}   {100 * float(np.mean(right[1] - right[0])):+5.1f} [{low:+.0f}, {high:+.0f}]", end="")
    print(f"   {steps[0]:5.2f} → {steps[1]:5.2f}", flush=True)


def written(
    model: DiffusionGemma,
    examples: Sequence[train_demo.Example],
    language: Callable[[train_demo.Example], Language] | None,
) -> Iterator[Result]:
    for first in range(0, len(examples), BATCH):
        some = examples[first : first + BATCH]
        made = None if language is None else [language(example) for example in some]
        found = model.generate([e.prompt for e in some], seeds=[first + i for i in range(len(some))], constraint=made)
        assert isinstance(found, list)
        yield from found


def judged(result: Result, example: train_demo.Example) -> tuple[bool, int]:
    """Whether the answer is right (of JSON: the values, however they are laid out), and the steps it took."""
    right = result.text == example.answer
    if example.task == "json":
        try:
            right = json.loads(result.text) == json.loads(example.answer)
        except ValueError:
            right = False
    return right, sum(canvas.steps for canvas in result.canvases)


def share(hits: int, count: int) -> str:
    """A share with Wilson's interval, in percent."""
    p, z = hits / count, 1.96
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = ((middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return f"{100 * p:.1f} [{100 * low:.0f}, {100 * high:.0f}] n {count}"


def bootstrapped(differences: np.ndarray) -> tuple[float, float]:
    """The mean's interval, in percent."""
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (2000, len(differences))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return 100 * float(low), 100 * float(high)


# ----------------------------------------------------------------------------------------------------------- decisions


def decisions(count: int, seed: int) -> None:
    """The label of a puzzle is the digit in its first cell, which is empty; the other way to know it is to write the
    whole answer."""
    model = load(BUILT_IN)
    puzzles = (e for e in train_demo.sudoku(train_demo.HELD_OUT_SEED + seed, 20 * count) if _is_open(e))
    examples = [example for example, _ in zip(puzzles, range(count), strict=False)]
    right = [example.answer[0] for example in examples]
    results = list(written(model, examples, None))
    print("written in full:", share(sum(r.text[:1] == label for r, label in zip(results, right, strict=True)), count))
    question = [{"type": "choice", "question": "-", "choices": list("123456")}]
    for name, options in {
        "canvas of the label": {},
        "canvas of the label, calibrated": {"calibrate": True},
        "whole canvas": {"canvas_length": model.config.canvas_length},
        "whole canvas, calibrated": {"canvas_length": model.config.canvas_length, "calibrate": True},
    }.items():
        found = []
        for example in examples:
            state = example.prompt.partition("\n")[2]
            options |= {"template": "Solve this Sudoku:\n{state}", "orders": False}
            found += model.decide(state, question, **options)
        hits = [d.answer == label for d, label in zip(found, right, strict=True)]
        sure = [max(d.probabilities.values()) for d in found]
        given = np.mean([[d.probabilities[label] for label in "123456"] for d in found], axis=0)
        often = np.array([right.count(label) for label in "123456"]) / count
        print(
            f"{name}: {share(sum(hits), count)}, ECE {calibration_error(sure, hits):.3f},"
            f" bias {0.5 * float(np.abs(given - often).sum()):.3f}",
            flush=True,
        )


def _is_open(example: train_demo.Example) -> bool:
    return example.prompt.partition("\n")[2].startswith(".")


def calibration_error(sure: Sequence[float], right: Sequence[bool], bins: int = 5) -> float:
    """Expected calibration error over bins of equal size."""
    order = np.argsort(sure)
    parts = np.array_split(order, bins)
    gaps = [len(p) * abs(np.mean(np.array(sure)[p]) - np.mean(np.array(right)[p])) for p in parts if len(p)]
    return float(sum(gaps) / len(sure))


if __name__ == "__main__":
    main()
