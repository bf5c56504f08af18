"""What protocols and the thread that holds the model say to each other: an Order goes in, News come out.

Plain Python data: no arrays, nothing of any protocol. A protocol is a file that reads its requests as Orders and writes
News as its answers; it needs no MLX.
"""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import DiffGemmaError
from ..generation.settings import GenerationOptions
from ..text.language.texts import MARK, Hole
from ..text.pictures.images import PictureConfig, Seen


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served here."""

    name: str  # of the model
    context: int  # tokens
    tools: bool  # whether its chat template reads tools
    thinking: bool  # and whether it can be told to think
    pictures: PictureConfig | None = None  # how it wants pictures; None: it has no eyes
    created: int = field(default_factory=lambda: int(time.time()))


# --------------------------------------------------------------------------------------------------------- orders


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Chat messages to be answered; the pictures in them are opened before the order is given."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | None = None  # "required", or a tool's name
    thinking: bool | None = None  # left out where the chat template knows no thinking
    template_options: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """Bare texts (or ids) to be gone on with, each by itself."""

    prompts: tuple[str | list[int], ...]
    echo: bool = False  # the prompt stands in front of the answer, with its log-probabilities where those are wanted
    only_echo: bool = False  # and there is no answer


@dataclass(frozen=True, kw_only=True)
class Gap:
    """What is missing between two texts."""

    prefix: str
    suffix: str


@dataclass(frozen=True, kw_only=True)
class Pins:
    """A text that the answer must be, with a hole wherever `mark` stands; one Hole each, or none: all are free."""

    text: str
    mark: str = MARK
    holes: tuple[Hole, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is wanted, whichever protocol asked for it."""

    of: Conversation | Continuations | Gap
    options: GenerationOptions = field(
        default_factory=GenerationOptions
    )  # without max_tokens: so many as there is room
    copies: int = 1  # answers to each prompt, by seed, seed + 1, …
    seed: int | None = None
    stops: tuple[str, ...] = ()  # an answer ends before the first of them
    json_schema: Any = None  # what the answer must obey; {} is any JSON
    pins: Pins | None = None
    drafts: Literal["text", "tokens"] | None = None  # whether every step is told, and how closely


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """An order of another kind: questions about a state, by name, in the words of DiffusionGemma.decide."""

    state: str
    questions: dict[str, Any]


# ----------------------------------------------------------------------------------------------------------- news


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The order can be met, and waits for its turn. Comes first, unless it Failed."""

    prompt_tokens: int
    seeds: tuple[int, ...]  # one a row
    left_out: tuple[str, ...] = ()  # what of the order does nothing with this model


@dataclass(frozen=True, kw_only=True)
class Reading:
    """So many of the prompt's tokens are in the prefix."""

    tokens: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """What a canvas of one row says after a step. It replaces what the same block said before, and is not committed."""

    row: int
    block: int  # which canvas, from 0
    step: int  # from 0
    steps: int  # at most
    text: str  # of the channel, without markers
    channel: Literal["content", "reasoning", "tool"]
    temperature: float
    accepted: int  # positions
    mean_entropy: float  # nats
    settled: bool
    end: int  # positions before the first stop id
    tokens: tuple[tuple[int, str, float, bool], ...] | None = None  # id, what it adds to the text, nats, accepted


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """Of one token given its left, by the causal pass, in nats."""

    token: str
    bytes: tuple[int, ...] | None  # None: a special token, which is no text
    logprob: float | None  # None: nothing stands in front of it
    top: tuple[tuple[str, tuple[int, ...] | None, float], ...] = ()  # token, bytes and logprob of the likeliest
    canvas_logprob: float | None = None  # what the canvas had for it, beside all others: no part of a chain


@dataclass(frozen=True, kw_only=True)
class Said:
    """Text that became visible of one row; it stays. An echoed prompt comes first."""

    row: int
    block: int
    text: str
    thinking: str
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All of one row."""

    text: str  # an echoed prompt included
    thinking: str
    tool_calls: tuple[dict[str, Any], ...]  # {"name": …, "arguments": {…}}
    unread_calls: tuple[str, ...]  # calls that cannot be read, as they stand
    reason: Literal["stop", "length", "tool_calls"]
    tokens: int
    thinking_tokens: int
    canvases: int
    steps: int
    written_anew: int = 0  # calls that did not obey their function's schema
    logprobs: tuple[Logprob, ...] | None = None
    stop: str | None = None  # of the order's stops, the one that ended it


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How probable each answer to one question is."""

    name: str
    probabilities: dict[str, float]
    outside: float  # of every answer that is none of them
    mean: float | None  # of a score


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The order is met."""

    answers: tuple[Answer, ...]
    prompt_tokens: int
    reused_tokens: int  # of them: they were in the prefix already
    departures: dict[str, Any]  # from the reference algorithm
    tuning: str
    seconds: dict[str, float]  # queue, prefill, denoise, commit
    choices: tuple[Choice, ...] = ()  # of Decisions
    pictures: tuple[Seen, ...] = ()  # of the prompt


@dataclass(frozen=True, kw_only=True)
class Failed:
    """It is not met: "refused" is the order's fault, "stopped" is the server's end, "broken" is ours."""

    why: Literal["refused", "stopped", "broken"]
    message: str
    too_long: bool = False  # it does not fit the context


News = Accepted | Reading | Drafted | Said | Ended | Failed


class Refused(DiffGemmaError):
    """A request that is not accepted; `param` is its field at fault."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class Full(DiffGemmaError):
    """There are so many orders in the queue already; try again in so many `seconds`."""

    def __init__(self, message: str, *, seconds: int):
        super().__init__(message)
        self.seconds = seconds
