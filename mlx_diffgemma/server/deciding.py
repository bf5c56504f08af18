"""From an order of decisions to News: one turn, in the thread that holds the model."""

import time
from collections.abc import Iterator

from ..generation.engine import count_canvases
from ..pipeline import deciding
from ..pipeline.model import DiffusionGemma
from .answering import Beat, held
from .exchange import Accepted, Choice, Decisions, Ended
from .prefixes import Prefixes


class Deciding:
    """One order, checked. Errors: DiffGemmaError."""

    def __init__(self, model: DiffusionGemma, order: Decisions):
        self.model, self.order = model, order
        asked = deciding.questions_of(order.questions) if order.questions else []
        orders = [question.orders() for question in asked]
        prompts = [
            model.ids(
                deciding.TEMPLATE.format(state=order.state, question=question.text, labels=question.asked(ways[0]))
            )
            for question, ways in zip(asked, orders, strict=True)
        ]
        canvas = model.config.canvas_length
        if prompts:
            count_canvases(model.network, prompts, model.generation_config, canvas)
        rows = min(sum(map(len, orders)), deciding.ROWS)
        self.needed = rows * held(model, max(map(len, prompts), default=0) + canvas)
        self.tokens = sum(map(len, prompts))  # each question counts once, however its labels are turned

    @property
    def accepted(self) -> Accepted:
        return Accepted(prompt_tokens=self.tokens, seeds=())

    def run(self, prefixes: Prefixes) -> Iterator[Beat]:
        """Nobody else has a turn before it ends. Errors: whatever a decision may raise."""
        began = time.perf_counter()
        found = deciding.decide(self.model, self.order.state, self.order.questions) if self.order.questions else []
        choices = (
            Choice(name=one.name, probabilities=one.probabilities, outside=one.outside, mean=one.mean) for one in found
        )
        ended = Ended(
            answers=(),
            prompt_tokens=self.tokens,
            reused_tokens=0,
            departures={},
            tuning=self.model.network.tuning.fingerprint,
            seconds={"queue": 0.0, "prefill": 0.0, "denoise": time.perf_counter() - began},
            choices=tuple(choices),
        )
        yield Beat(news=(ended,), turn_is_over=True)
