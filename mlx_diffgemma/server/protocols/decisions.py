"""Inception's decisions: how probable each answer to some questions about a state is."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

from ...values import Field, Table, anything, either, many, mapping, one_of, optional, text
from ..exchange import Accepted, Choice, Decisions, Ended, News, Refused, Served
from . import openai
from .openai import Json

_said = either(text(empty=False), mapping(anything), many(anything))
_CRITERIA = {
    "noul": optional(mapping(optional(_said), one_of("true", "false"))),
    "choice": mapping(optional(_said), text(empty=False)),
    "score": many(_said, least=2, most=101),
}
_QUESTION = Table(
    Field("type", one_of(*_CRITERIA)),
    Field("instructions", _said, None),
    Field("criteria", anything, None),
)
DECISIONS = Table(
    Field("model", text(), None),
    Field("state", _said),
    Field("questions", mapping(_QUESTION.kind, text(empty=False))),
    open=True,
)


def read_decisions(body: Any, served: Served) -> "Decided":
    """Errors: Refused."""
    asked = openai.read(DECISIONS, body)
    if not asked["questions"]:
        raise Refused("there is no question.", param="questions")
    made = {name: _question(name, question) for name, question in asked["questions"].items()}
    order = Decisions(state=_text(asked["state"]), questions={name: one for name, one in made.items() if one})
    return Decided(asked["questions"], order, served)


def _question(name: str, asked: Json) -> Json | None:
    """In the words of `model.decide`; None where there is one label alone, and nothing to ask."""
    kind, where = asked["type"], f"questions.{name}.criteria"
    criteria = openai.read_as(_CRITERIA[kind], asked["criteria"], where)
    said = [_text(asked["instructions"])] if asked["instructions"] else []
    if kind == "noul":
        said += [f"{'yes' if key == 'true' else 'no'}: {_text(one)}" for key, one in (criteria or {}).items() if one]
        return {"type": "bool", "question": "\n".join(said) or "Is it true?"}
    if kind == "choice":
        if not criteria:
            raise Refused(f"{where} is empty: it names the labels.", param=where)
        said += [f"{label}: {_text(one)}" for label, one in criteria.items() if one]
        choices = list(criteria)
        if len(choices) < 2:
            return None
        return {"type": "choice", "question": "\n".join(said) or "Which one is it?", "choices": choices}
    said += [f"{number}: {_text(one)}" for number, one in enumerate(criteria, 1)]
    return {"type": "score", "question": "\n".join(said), "scale": [1, len(criteria)]}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class Decided:
    """One request and its answer."""

    streams, media_type = False, ""

    def __init__(self, questions: Json, order: Decisions, served: Served):
        self.questions, self.order = questions, order
        self.head = {"id": "decision-" + uuid.uuid4().hex, "object": "decision", "model": served.name}

    def accept(self, accepted: Accepted) -> None:
        """Nothing of an order is left out."""

    def alive(self) -> str:
        return ""

    def frames(self, news: News) -> Iterator[str]:
        return iter(())

    def whole(self, ended: Ended) -> Json:
        found = {choice.name: choice for choice in ended.choices}
        answers = {name: _answer(asked, found.get(name)) for name, asked in self.questions.items()}
        outside = {name: choice.outside for name, choice in found.items()}
        usage = {"input_tokens": ended.prompt_tokens, "output_tokens": 0}
        return self.head | {"answers": answers, "usage": usage, "diffusion": {"outside": outside}}


def _answer(asked: Json, choice: Choice | None) -> Json:
    kind = asked["type"]
    if choice is None:
        only = next(iter(asked["criteria"]))
        return {"type": kind, "choice": only, "confidence": 1.0, "probabilities": {only: 1.0}}
    shares = choice.probabilities
    if kind == "noul":
        return {"type": kind, "noul": shares["yes"]}
    sure = {"confidence": max(shares.values()), "probabilities": shares}
    if kind == "choice":
        return {"type": kind, "choice": max(shares, key=lambda label: shares[label])} | sure
    legend = {str(number): one for number, one in enumerate(asked["criteria"], 1)}
    return {"type": kind, "score": choice.mean, "legend": legend} | sure
