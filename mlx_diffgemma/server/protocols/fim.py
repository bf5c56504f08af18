"""Fill in the middle, as Mistral and Inception ask for it: a completion with a suffix.

Mistral's clients read the answer as a message, Inception's as text: both stand there.
"""

from typing import Any

from ...values import Field, Table, text
from ..exchange import Served
from . import openai
from .openai import Completion, Json

FIM = Table(*openai.FIELDS, Field("prompt", text()), Field("suffix", text(), None), open=True)


def read_fim(body: Any, served: Served) -> "Fim":
    """What stands between `prompt` and `suffix`. Errors: Refused."""
    openai.read(FIM, body)
    if (seed := body.get("random_seed")) is not None:
        body = body | {"seed": seed}
    return Fim(*openai.completion(body), served)


class Fim(Completion):
    """One request and its answer."""

    def _text(self, row: int, said: str, reason: str | None = None, scores: Json | None = None) -> Json:
        name = "delta" if self.streams else "message"
        return super()._text(row, said, reason, scores) | {name: {"role": "assistant", "content": said}}
