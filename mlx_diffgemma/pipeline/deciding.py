"""Decisions: how probable each label of a question is, in one pass and without writing an answer.

A model likes a label for its place in the list, too: all cyclic orders of the labels are asked as one batch, and
averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, PromptError
from ..generation import engine, labels
from ..generation.noise import SeededNoise
from ..model.memory import weight_bytes
from ..text.gate import check_text
from ..values import flag, integer, nearest, optional
from .machine.fitting import check_memory

if TYPE_CHECKING:
    from .model import DiffusionGemma

TYPES = ("choice", "bool", "score")
TEMPLATE = "{state}\n\n{question}\n{labels}"
CONTENT_FREE = "N/A"  # stands for the state when the bias is asked for
ROWS, POSITIONS = 32, 2048  # prompts encoded at once, and positions of their canvases, at most
SCALE = 101  # numbers on a scale, at most
KEYS = {"choice": ("choices",), "bool": (), "score": ("scale",)}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and its labels: what the model writes, and what each means."""

    name: str
    text: str
    type: str  # one of TYPES
    labels: tuple[str, ...]

    @classmethod
    def read(cls, value: Any, name: str) -> "Question":
        """From {"type": "choice", "question": …, "choices": […]}, {"type": "bool", "question": …} or {"type": "score",
        "question": …, "scale": [1, 5]}. Errors: ConfigError, which names the question and the key."""
        where = f"question {name!r}"
        if not isinstance(value, Mapping):
            raise ConfigError(f'{where} is {value!r:.60}, expected {{"type": …, "question": …}}.')
        kind, text = value.get("type", "choice" if "choices" in value else "bool"), value.get("question")
        if kind not in TYPES:
            raise ConfigError(f"{where}: type is {kind!r}, expected {', '.join(TYPES)}.")
        known = ["type", "question", *KEYS[kind]]
        if unknown := [key for key in value if key not in known]:
            raise ConfigError(f"{where}: a {kind} has no {unknown[0]!r}.{nearest(str(unknown[0]), known)}")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where}: question is {text!r:.60}, expected a text.")
        found = {"choice": _choices, "bool": lambda *_: ("yes", "no"), "score": _scale}[kind](value, where)
        return cls(name=name, text=text.strip(), type=kind, labels=found)

    @property
    def values(self) -> tuple[Any, ...]:
        """What the labels mean."""
        if self.type == "bool":
            return (True, False)
        return tuple(map(int, self.labels)) if self.type == "score" else self.labels

    def orders(self) -> list[tuple[int, ...]]:
        """In which orders the labels are listed: all cyclic ones; a scale has one."""
        every = range(len(self.labels))
        return [tuple(every)] if self.type == "score" else [(*every[n:], *every[:n]) for n in every]

    def asked(self, order: Sequence[int]) -> str:
        """How the labels are listed."""
        if self.type == "score":
            return f"Answer with a whole number from {self.labels[0]} to {self.labels[-1]}."
        listed = [self.labels[n] for n in order]
        plain = not any(mark in label for label in listed for mark in ",\n")
        return (
            "Answer with one of: " + ", ".join(listed) + "." if plain else "\n- ".join(["Answer with one of:", *listed])
        )


def _choices(value: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = value.get("choices")
    if not isinstance(found, list | tuple) or len(found) < 2 or not all(isinstance(label, str) for label in found):
        raise ConfigError(f"{where}: choices is {found!r:.60}, expected a list of two texts or more.")
    for number, label in enumerate(found):
        if not label or label in found[:number]:
            raise ConfigError(f"{where}: choice {number + 1} is {f'{label!r} again' if label else 'empty'}.")
    return tuple(found)


def _scale(value: Mapping[str, Any], where: str) -> tuple[str, ...]:
    scale = value.get("scale")
    whole = isinstance(scale, list | tuple) and len(scale) == 2 and all(type(end) is int for end in scale)
    if not whole or not scale[0] < scale[1] or scale[1] - scale[0] >= SCALE:  # pyright: ignore
        raise ConfigError(
            f"{where}: scale is {scale!r:.60}, expected two whole numbers such as [1, 5], at most {SCALE} numbers."
        )
    return tuple(map(str, range(scale[0], scale[1] + 1)))  # pyright: ignore


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The answer to one question."""

    name: str
    answer: str | bool | int  # the most probable label's meaning
    probabilities: dict[str, float]  # of each label, given that it is one of them
    outside: float  # the probability of every answer that is no label
    mean: float | None  # of a score
    orders: int  # of the labels, averaged over
    calibrated: bool


def questions_of(questions: Any) -> list[Question]:
    """Questions from a list, or from a mapping by name. Errors: ConfigError."""
    if isinstance(questions, Mapping):
        named = {str(name): value for name, value in questions.items()}
    elif isinstance(questions, Sequence) and not isinstance(questions, str):
        named = {str(number): value for number, value in enumerate(questions, 1)}
    else:
        raise ConfigError(f"questions are a list or an object by name, got {questions!r:.60}.")
    if not named:
        raise ConfigError("there is no question.")
    return [value if isinstance(value, Question) else Question.read(value, name) for name, value in named.items()]


def decide(
    model: "DiffusionGemma",
    state: str,
    questions: Any,
    *,
    template: str = TEMPLATE,
    orders: bool = True,
    calibrate: bool = False,
    canvas_length: int | None = None,
    seed: int = 0,
) -> list[Decision]:
    """As DiffusionGemma.decide, for who holds the model."""
    for name, flag_ in (("orders", orders), ("calibrate", calibrate)):
        flag.read(flag_, name)
    integer().read(seed, "seed")
    optional(integer(least=1)).read(canvas_length, "canvas_length")
    check_text(template, "template")
    if not check_text(state, "the state").strip():
        raise PromptError("the state is empty: there is nothing to decide about.")
    asked = questions_of(questions)
    rows = [
        _Row(question=question, order=order, state=said)
        for said in ([state, CONTENT_FREE] if calibrate else [state])
        for question in asked
        for order in (question.orders() if orders else question.orders()[:1])
    ]
    run = _Run(model, template, canvas_length, seed)
    some = min(ROWS, max(1, POSITIONS // run.length))
    logs = [part for first in range(0, len(rows), some) for part in run(rows[first : first + some])]
    plain = len(rows) // (1 + calibrate)
    decisions = []
    for question in asked:
        mine = [n for n in range(plain) if rows[n].question is question]
        bias = [logs[n + plain] for n in mine] if calibrate else None
        decisions.append(_decision(question, [logs[n] for n in mine], bias))
    return decisions


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One question about one state, with its labels listed in one order."""

    question: Question
    order: tuple[int, ...]
    state: str


class _Run:
    """What the rows of one call have in common."""

    def __init__(self, model: "DiffusionGemma", template: str, canvas_length: int | None, seed: int):
        self.model, self.template, self.seed = model, template, seed
        self.settings = model.generation_config
        self.length = canvas_length or self.settings.canvas_length or model.config.canvas_length

    def __call__(self, rows: Sequence[_Row]) -> list[np.ndarray]:
        """Per row the log-probability of each label."""
        model = self.model
        prompts = [model.ids(self._prompt(row)) for row in rows]
        ids = [[model.compiler.spell(label) for label in row.question.labels] for row in rows]
        needed = max(len(label) for some in ids for label in some) + 1
        length = self.length
        if length < needed:
            raise ConfigError(f"the longest label takes {needed} tokens with its end; the canvas has {length}.")
        engine.count_canvases(model.network, prompts, self.settings, length)
        prefix = max(map(len, prompts))
        check_memory(model.network.own, weight_bytes(model.network), model.memory_limit, prefix, rows=len(rows))
        noise = SeededNoise([self.seed] * len(rows), length=length, vocabulary=model.config.vocab_size)
        return labels.log_probabilities(model.network, prompts, ids, self.settings, noise, length)

    def _prompt(self, row: _Row) -> str:
        listed = row.question.asked(row.order)
        try:
            return self.template.format(state=row.state, question=row.question.text, labels=listed)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"the template may name {{state}}, {{question}} and {{labels}}; it has {error}."
            ) from error


def _decision(question: Question, logs: list[np.ndarray], bias: list[np.ndarray] | None) -> Decision:
    """The orders averaged: each one's labels weigh 1 together, less what a state without content makes of them."""
    shares = [_normal(row if bias is None else row - bias[n]) for n, row in enumerate(logs)]
    mean = np.mean(shares, axis=0)
    inside = float(np.mean([np.exp(row).sum() for row in logs]))
    values = question.values
    return Decision(
        name=question.name,
        answer=values[int(mean.argmax())],
        probabilities=dict(zip(question.labels, mean.tolist(), strict=True)),
        outside=max(0.0, 1 - inside),
        mean=float(mean @ np.array(values, float)) if question.type == "score" else None,
        orders=len(logs),
        calibrated=bias is not None,
    )


def _normal(logs: np.ndarray) -> np.ndarray:
    shares = np.exp(logs - logs.max())
    return shares / shares.sum()
