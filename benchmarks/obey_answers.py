"""The questions of benchmarks/obey.py: what a constraint costs or brings in right answers and steps.

Hard by nature, with clean weights: the kinds of benchmarks/decodings.py (Sudokus of 12–18 givens, ones that need a
guess, lists with repeated names, templates never seen, JSON of two records with four fields). With noised weights
(0.35 of each matrix's RMS): the easy ones. A language holds what the prompt says about the *form* of its answer: the
givens, the names, the template, the fields and their types. JSON comes in all layouts, in the model's own, and in those
that it does not write.

A row is one kind of question, free and under one language; seeds are equal. Intervals are 95 %: Wilson's for shares,
bootstrap over questions for differences.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Unpack

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from benchmarks import decodings, train_demo
from benchmarks.train_demo import HELD_OUT_SEED, Example
from mlx_diffgemma import Hole, Language, json_schema, load, regex
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.generation.settings import LED_STEPS, GenerationOptions
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.obeying.drafts import LINES, Draft
from mlx_diffgemma.pipeline.results import Result
from mlx_diffgemma.text.language.syntax import Layout

NOISE = 0.35  # of a matrix's RMS
BATCH = 12
LAYOUTS = {"all layouts": Layout(), "its layout alone": Layout(indents=(0,)), "all but its own": Layout(indents=(2, 4))}

Languages = dict[str, Callable[[Example], Language]]


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


# ------------------------------------------------------------------------------------------------------ free or not


def answers(count: int, seed: int) -> list[dict[str, Any]]:
    first = HELD_OUT_SEED + seed
    structured = list(decodings.structured(first, 2 * count))
    easy = train_demo.structured(first, 6 * count)
    layouts: Languages = {name: lambda e, of=layout: record_language(e, of) for name, layout in LAYOUTS.items()}
    clean, spoilt = load(BUILT_IN), noised(load(BUILT_IN), NOISE, seed)
    rows = [
        *compared(f"JSON, noise {NOISE}", spoilt, [e for e in easy if e.task == "json"], layouts, throughout=True),
        *compared("Sudoku", clean, list(decodings.sudoku(first, count)), {"givens pinned": pinned_givens}),
        *compared("names, repeated", clean, list(decodings.doubles(first, count)), {"its names, a line each": listed}),
        *compared("JSON, 2 × 4", clean, structured[::2], layouts, throughout=True),
        *compared("new templates", clean, structured[1::2], {"the template": templated}),
        *compared(f"Sudoku, noise {NOISE}", spoilt, list(train_demo.sudoku(first, count)), {"givens": pinned_givens}),
        *compared("Sudoku, a guess", clean, list(decodings.search(first, count)), {"givens pinned": pinned_givens}),
    ]
    return rows


def pinned_givens(example: Example) -> Language:
    puzzle = example.prompt.partition("\n")[2]
    return Draft.marked(puzzle, ".", [Hole(pattern="[1-6]")] * puzzle.count(".")).language()


def listed(example: Example) -> Language:
    """As many lines as names, each one of them."""
    names = example.prompt.partition("\n")[2].split(", ")
    line = f"- ({'|'.join(sorted(set(names)))})"
    return regex("\n".join([line] * len(names)))


def templated(example: Example) -> Language:
    """The template, with a word in every hole."""
    template = example.prompt.split("\n")[1]
    marks = re.findall(r"\{\w+\}", template)
    return Draft.marked(re.sub(r"\{\w+\}", "*", template), "*", [Hole(pattern="[A-Za-z0-9]+")] * len(marks)).language()


def record_language(example: Example, layout: Layout) -> Language:
    """Records with these names; of their values, only whether they are texts or numbers."""
    right = json.loads(example.answer)
    first = right[0] if isinstance(right, list) else right
    kinds = {name: {"type": "integer" if isinstance(value, int) else "string"} for name, value in first.items()}
    record = {"type": "object", "properties": kinds, "required": list(kinds), "additionalProperties": False}
    many = {"type": "array", "items": record, "minItems": 1, "maxItems": 4}
    return json_schema(many if isinstance(right, list) else record, layout=layout)


def compared(
    kind: str,
    model: DiffusionGemma,
    examples: Sequence[Example],
    languages: Languages,
    *,
    throughout: bool = False,
) -> Iterator[dict[str, Any]]:
    """A row a language, and perhaps one for the first of them with the constraint leading from the first step on."""
    free = [judged(result, e) for result, e in zip(written(model, examples, None), examples, strict=True)]
    [first, *_] = languages
    ways: list[Any] = [(name, language, {}) for name, language in languages.items()]
    if throughout:
        ways.append((f"{first}, led by the constraint", languages[first], {"free_steps": 0}))
    for name, language, options in ways:
        results = written(model, examples, language, options)
        under = [judged(result, e) for result, e in zip(results, examples, strict=True)]
        yield row(kind, name, free, under)


Judged = tuple[bool, int]  # whether an answer is right, and the steps it took


def row(kind: str, name: str, one: list[Judged], other: list[Judged]) -> dict[str, Any]:
    """Both, side by side; printed as well."""
    (right, steps), (right_, steps_) = (
        [np.array(values, float) for values in zip(*rows, strict=True)] for rows in (one, other)
    )
    made = {
        "questions": kind,
        "language": name,
        "count": len(one),
        "right": [share(int(right.sum()), len(one)), share(int(right_.sum()), len(one))],
        "points": mean(100 * (right_ - right)),
        "steps": [round(float(each.mean()), 1) for each in (steps, steps_)],
        "more steps": mean(steps_ - steps),
    }
    print(*made.values(), sep="  ", flush=True)
    return made


def written(
    model: DiffusionGemma,
    examples: Sequence[Example],
    language: Callable[[Example], Language] | None,
    options: dict[str, Any] | None = None,
) -> Iterator[Result]:
    for first in range(0, len(examples), BATCH):
        some = examples[first : first + BATCH]
        made = None if language is None else [language(example) for example in some]
        seeds = [first + i for i in range(len(some))]
        found = model.generate([e.prompt for e in some], seeds=seeds, constraint=made, **(options or {}))
        assert isinstance(found, list)
        yield from found


def judged(result: Result, example: Example) -> Judged:
    """Right: letter by letter, or of JSON the values, however they are laid out."""
    right = result.text == example.answer
    if example.answer[0] in "[{":
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
    return f"{100 * p:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def mean(differences: np.ndarray) -> str:
    """A mean with its interval."""
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (2000, len(differences))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{differences.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


# ------------------------------------------------------------------------------------------- gaps, and lines anew


@dataclass(frozen=True, kw_only=True)
class Gap:
    """An answer of which a part is missing or wrong."""

    example: Example
    draft: Draft
    old: str  # what the whole text said before; only of lines that are written anew


def gaps(count: int, seed: int) -> list[dict[str, Any]]:
    """Free: the whole answer is written. Else a part of it alone: its rest is given."""
    first, rng = HELD_OUT_SEED + seed, Random(seed)
    structured = list(decodings.structured(first, 2 * count))
    hard = {
        "Sudoku": list(decodings.sudoku(first, count)),
        "names, repeated": list(decodings.doubles(first, count)),
        "new templates": structured[1::2],
        "JSON, 2 × 4": structured[::2],
    }
    easy = {f"easy, noise {NOISE}": list(decodings.easy(first, count))}
    rows = []
    for model, kinds in ((load(BUILT_IN), hard), (noised(load(BUILT_IN), NOISE, seed), easy)):
        for kind, examples in kinds.items():
            free = [judged(result, e) for result, e in zip(written(model, examples, None), examples, strict=True)]
            holes = [middle(e, rng) for e in examples]
            rows.append(row(kind, "a gap", free, [filled(model, gap, n) for n, gap in enumerate(holes)]))
            led = [filled(model, gap, n, free_steps=LED_STEPS) for n, gap in enumerate(holes)]
            rows.append(row(kind, f"a gap, {LED_STEPS} steps led by the model", free, led))
            lines = [
                gap
                for n, e in enumerate(examples)
                if "\n" in e.answer and (gap := spoilt_lines(e, examples[n - 1], rng))
            ]
            if len(lines) == len(examples):
                ways = {
                    start: [filled(model, gap, n, start) for n, gap in enumerate(lines)] for start in ("noise", "text")
                }
                rows.append(row(kind, "lines, from noise", free, ways["noise"]))
                rows.append(row(kind, "lines, from noise → from the old text", ways["noise"], ways["text"]))
    return rows


def middle(example: Example, rng: Random) -> Gap:
    """A gap of a third of the answer at least, somewhere in it."""
    answer = example.answer
    start = rng.randrange(1, len(answer) // 2)
    end = rng.randrange(start + len(answer) // 3, len(answer))
    return Gap(example=example, draft=Draft(runs=(answer[:start], answer[end:]), holes=(Hole(least=1),)), old="")


def spoilt_lines(example: Example, other: Example, rng: Random) -> Gap:
    """One to three lines of the answer to another question stand where lines of this one should; those are free."""
    lines, wrong = (e.answer.splitlines(keepends=True) for e in (example, other))
    many = rng.randint(1, min(3, len(lines) - 1))
    start = rng.randrange(len(lines) - many)
    runs = "".join(lines[:start]), "".join(lines[start + many :])
    old = "".join(line.rstrip("\n") + "\n" for line in wrong[:many])
    return Gap(example=example, draft=Draft(runs=runs, holes=(LINES,)), old=runs[0] + old + runs[1])


def filled(
    model: DiffusionGemma, gap: Gap, seed: int, start: str = "noise", **options: Unpack[GenerationOptions]
) -> Judged:
    """The question is asked as ever; of the answer all but the gap stands on the canvas."""
    runs = gap.draft.runs
    request = model.prepare_fill(
        "\0".join(runs), mark="\0", holes=gap.draft.holes, prompt=gap.example.prompt, seed=seed, **options
    )
    if start == "text":
        request.start_from(model.tokenizer.encode(gap.old))
    [result] = request.run()
    assert result.text.startswith(runs[0]) and result.text.endswith(runs[1]), "a pin is broken"
    return judged(result, gap.example)


# ----------------------------------------------------------------------------------------------------------- decisions


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A question with labels; what is written in full begins with the right one."""

    example: Example
    labels: tuple[str, ...]
    right: str


def decisions(count: int, seed: int) -> list[dict[str, Any]]:
    """Both tasks, by clean and by noised weights; the labels alone on canvases of several lengths."""
    first = HELD_OUT_SEED + seed
    puzzles = (e for e in train_demo.sudoku(first, 20 * count) if e.prompt.partition("\n")[2].startswith("."))
    tasks = {
        "the first digit of a Sudoku": [
            Labelled(example=e, labels=tuple("123456"), right=e.answer[0])
            for e, _ in zip(puzzles, range(count), strict=False)
        ],
        "the first of some names": [
            _first_name(e) for e in train_demo.structured(first, 6 * count) if e.task == "sort names"
        ],
    }
    rows = []
    for name, model in {
        "": load(BUILT_IN),
        f", noise {NOISE / 2:.2f}": noised(load(BUILT_IN), NOISE / 2, seed),
    }.items():
        for task, questions in tasks.items():
            free = list(written(model, [q.example for q in questions], None))
            hits = sum(result.text.startswith(q.right) for result, q in zip(free, questions, strict=True))
            rows.append(_told(task + name, "written in full", share(hits, len(questions))))
            rows += [_told(task + name, *made) for made in _decided(model, questions)]
    return rows


def _first_name(example: Example) -> Labelled:
    names = [f"- {name}" for name in example.prompt.partition("\n")[2].split(", ")]
    return Labelled(example=example, labels=tuple(names), right=example.answer.split("\n")[0])


def _decided(model: DiffusionGemma, questions: Sequence[Labelled]) -> Iterator[tuple[Any, ...]]:
    for length in (None, 8, 16, 32, model.config.canvas_length):
        for calibrate in (False, True):
            found = [
                model.decide(
                    q.example.prompt.partition("\n")[2],
                    [{"type": "choice", "question": "-", "choices": q.labels}],
                    template=q.example.prompt.partition("\n")[0].replace("{", "{{") + "\n{state}",
                    orders=False,
                    calibrate=calibrate,
                    canvas_length=length,
                )[0]
                for q in questions
            ]
            hits = [d.answer == q.right for d, q in zip(found, questions, strict=True)]
            sure = [max(d.probabilities.values()) for d in found]
            name = f"canvas of {length or 'the label'}" + ", calibrated" * calibrate
            error, bias = calibration_error(sure, hits), _bias(found, questions)
            yield name, share(sum(hits), len(hits)), error, bias, float(np.mean([d.outside for d in found]))


def _bias(found: Sequence[Any], questions: Sequence[Labelled]) -> float:
    """Total variation between how often each place among the labels is given, and how often it is right."""
    most = max(len(q.labels) for q in questions)
    given, right = np.zeros(most), np.zeros(most)
    for decision, question in zip(found, questions, strict=True):
        given[: len(question.labels)] += [decision.probabilities[label] for label in question.labels]
        right[question.labels.index(question.right)] += 1
    return 0.5 * float(np.abs(given - right).sum()) / len(questions)


def _told(task: str, way: str, right: str, *numbers: float) -> dict[str, Any]:
    made = {"task": task, "way": way, "right": right}
    made |= dict(zip(("calibration error", "bias", "outside"), (round(n, 3) for n in numbers), strict=False))
    print(*made.values(), sep="  ", flush=True)
    return made


def calibration_error(sure: Sequence[float], right: Sequence[bool], bins: int = 5) -> float:
    """Expected calibration error over bins of equal size."""
    order = np.argsort(sure)
    parts = np.array_split(order, bins)
    gaps = [len(p) * abs(np.mean(np.array(sure)[p]) - np.mean(np.array(right)[p])) for p in parts if len(p)]
    return float(sum(gaps) / len(sure))
