"""What happens in a run, as one stream of events, and the totals at its end.

Whatever decodes yields these; whoever watches (pipeline, terminal, server, benchmarks) reads these and nothing else.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from .drawing import Decode, canvas_html, text_html


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """`tokens` of the `total` prompt tokens are in the prefix; once per chunk."""

    tokens: int
    total: int

    def _repr_html_(self) -> str:
        return text_html("", f"reading the prompt {self.tokens}/{self.total}")


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """One step is done. The arrays are computed already; reading them is what costs. Tuples have one entry per row."""

    index: int  # which canvas, from 0
    step: int  # 0 … steps − 1
    steps: int  # the most steps a canvas may take
    temperature: float
    best: mx.array  # [B, L] int32
    guess: mx.array  # [B, L] int32
    accepted: mx.array  # [B, L] bool
    entropy: mx.array  # [B, L] float32, nats
    next_canvas: mx.array  # [B, L] int32: what the next step looks at
    accepted_count: tuple[int, ...]
    mean_entropy: tuple[float, ...]  # nats
    settled: tuple[bool, ...]  # the row is over
    early: tuple[bool, ...] = ()  # it is over only because its answer stayed the same; empty without stable_answer
    pinned: mx.array | None = None  # [B, L] bool: no choice was left there; None without a constraint
    decode: Decode = field(default=str, repr=False, compare=False)  # the run's reader's, for drawing

    def _repr_html_(self) -> str:
        """The canvas of every row, in a notebook."""
        arrays: list[Any] = [self.best.tolist(), self.accepted.tolist(), self.entropy.tolist()]
        drawn = []
        for row, (best, accepted, entropy) in enumerate(zip(*arrays, strict=True)):
            counts = f"accepted {self.accepted_count[row]}/{len(best)} · entropy {self.mean_entropy[row]:.3f}"
            note = f"step {self.step + 1}/{self.steps} · {counts}" + " · settled" * self.settled[row]
            drawn.append(canvas_html(best, accepted, entropy, self.decode, note))
        return "".join(drawn)


@dataclass(frozen=True, kw_only=True)
class CanvasRow:
    """What one row got from one canvas. A row that had already finished has no steps and no ids.

    Autoregressive decoding gives one a token, of one step; a Result has one for all of them. The last three fields come
    with `logprobs`, one entry a token, a stop id included. `logprobs` are of the tokens given their left, and add
    up to the text's; `canvas_logprobs`, which the canvas had for each place beside the others, do not.
    """

    ids: tuple[int, ...]  # up to, not including, the first stop id; cut at max_tokens
    steps: int
    settled: bool
    mean_entropy: float  # nats, of the last step
    accepted_per_step: tuple[int, ...]
    log_probability: float | None = None  # of going on with a text of the constraint, by the last step's distributions
    reason: str = ""  # "stop" or "length" when the row finished with this canvas
    stop_id: int | None = None  # the one behind the ids that ended the row
    text: str = ""  # what became visible, by the run's reader
    thinking: str = ""  # likewise, of the thoughts
    early: bool = False  # not settled: its answer stayed the same for so long as settings.stable_answer says
    logprobs: tuple[float, ...] | None = None  # nats
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None  # (id, nats) of the likeliest, if asked for
    canvas_logprobs: tuple[float, ...] | None = None  # nats, at the last step's temperature


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A canvas, or a token, became part of the text. It is encoded into the prefix after this event; a canvas with
    scores (settings.scored) before it."""

    index: int  # which canvas, from 0
    rows: tuple[CanvasRow, ...]

    @property
    def text(self) -> str:
        """What became visible of the only row."""
        return self.rows[0].text

    @property
    def thinking(self) -> str:
        """Likewise, of its thoughts."""
        return self.rows[0].thinking

    def _repr_html_(self) -> str:
        return "".join(text_html(row.text, f"{row.steps} steps" + " · settled" * row.settled) for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Totals of one run; for a batch, of all its rows together."""

    decoding: str = "diffusion"  # or "autoregressive"
    prompt_tokens: int
    reused_tokens: int  # prompt tokens that were in the cache already
    generated_tokens: int
    steps: int  # decoder passes; autoregressive: tokens in turn
    prefill_seconds: float
    denoise_seconds: float
    commit_seconds: float  # of causal passes behind the prompt, the scores included
    tokens_per_forward: float  # as transformers counts: stop id included, padding and settled rows' steps not
    peak_memory_bytes: int  # MLX's, since the process began or since mx.reset_peak_memory()
    tuning: str  # the fingerprint of the tuning: a seed repeats where it is the same
    attempts: float = 1  # answers that were made for each one given (best_of, retries); mean over a batch
    read_bytes: int = 0  # of experts that are streamed
    waited_seconds: float = 0.0  # for those
    early_canvases: int = 0  # of the rows' canvases, how many ended by settings.stable_answer alone
    departures: dict[str, Any] = field(default_factory=dict)  # options that differ from the reference algorithm

    @property
    def seconds_per_step(self) -> float:
        seconds = self.commit_seconds if self.decoding == "autoregressive" else self.denoise_seconds
        return seconds / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens by the time they took, prefill not counted."""
        seconds = self.denoise_seconds + self.commit_seconds
        return self.generated_tokens / seconds if seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The run is over: per row "stop" (a stop id) or "length" (max_tokens, or the context limit)."""

    reasons: tuple[str, ...]
    statistics: Statistics
    results: tuple[Any, ...] = ()  # one a row, by the run's reader

    @property
    def result(self) -> Any:
        """The only row's result."""
        return self.results[0]

    def _repr_html_(self) -> str:
        drawn = (result._repr_html_() for result in self.results if hasattr(result, "_repr_html_"))
        return "".join(drawn) or text_html("", ", ".join(self.reasons))


Event = Prefilled | Denoised | Committed | Finished


class Reader(Protocol):
    """Whoever turns ids into what people read: decoding itself knows no tokenizer."""

    def read(self, row: int, ids: tuple[int, ...], *, last: bool) -> tuple[str, str]:
        """Text and thoughts that became visible with these ids; `last`: the row finishes with them."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Ids → text, for drawing."""
        ...

    def conclude(self, row: int, reason: str, canvases: tuple[CanvasRow, ...], statistics: Statistics) -> Any:
        """What a finished row amounts to."""
        ...


class NoReader:
    """For those who want ids alone."""

    def read(self, row: int, ids: tuple[int, ...], *, last: bool) -> tuple[str, str]:
        return "", ""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def conclude(self, row: int, reason: str, canvases: tuple[CanvasRow, ...], statistics: Statistics) -> None:
        return None
