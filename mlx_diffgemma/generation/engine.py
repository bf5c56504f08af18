"""Block-diffusion generation as one generator of events: prefill → denoise → commit. Token ids only: no text, no
files, no printing.

    1  prefix ← encode(prompt)                          in chunks
       for each canvas:
    2      canvas ← random ids;  signal ← 0
           for step in 0 … steps − 1:
    3          hidden  ← denoise(canvas, prefix, signal)
    4          reading ← best, guess, entropy, signal of hidden, at the step's temperature
    5          accepted ← the surest positions
    6          canvas  ← guess where accepted, fresh random ids elsewhere
    7          stop when settled
    8      commit best: it becomes text, and is encoded into the prefix before the next canvas

Source: transformers DiffusionGemmaGenerationMixin.generate.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, ConfigError, PromptError
from ..model.cache import PrefixCache
from ..model.network import Network
from . import sampler, vocabulary
from .constraint import conditioned
from .constraint.automaton import Constraint
from .constraint.conditioned import Guide, Guides, RowSums
from .events import CanvasRow, Committed, Denoised, Event, Finished, NoReader, Prefilled, Reader, Statistics
from .noise import Noise
from .settings import GenerationConfig


def generate(
    network: Network,
    prompts: list[list[int]],
    settings: GenerationConfig,
    noise: Noise,
    *,
    cache: PrefixCache | None = None,
    pause_at: int | None = None,
    reader: Reader | None = None,
    constraint: Constraint | Sequence[Constraint | None] | None = None,
) -> Iterator[Event]:
    """Generate for B prompts of ids at once; a shorter one is padded on its left, as transformers does.

    A `cache` that already holds the first tokens of the (single) prompt saves encoding those, and is written to; one
    of the Prefilled events comes when it holds exactly `pause_at` tokens, so that the caller can fork it there.
    `reader` fills in texts and results. Rows go on with texts of the `constraint` alone, one for all or one a row.
    Closing the iterator stops within a step.
    Errors, before any work: PromptError for an empty prompt or one that leaves no room for a canvas, ConfigError for
    a canvas longer than the model's, or a constraint that these settings cannot meet.
    """
    length = settings.canvas_length or network.config.canvas_length
    canvases = count_canvases(network, prompts, settings, length)
    guides = Guides(constraint, len(prompts))
    guides.check(settings, network.config.vocab_size, min(settings.max_tokens, canvases * length))
    run = _Run(network, prompts, settings, noise, reader or NoReader(), length, cache, guides)
    run.cache.reserve(run.padded.shape[1] + (canvases - 1) * length)
    return run.events(canvases, pause_at)


def count_canvases(network: Network, prompts: list[list[int]], settings: GenerationConfig, length: int) -> int:
    """How many canvases of `length` fit the request and the context; PromptError when not even one does, and for ids
    that the vocabulary does not have: nothing behind this looks at an id again."""
    limit, trained = network.config.max_position_embeddings, network.config.canvas_length
    _check_ids(network.config.vocab_size, prompts, settings)
    if length > trained:
        raise ConfigError(f"canvas_length is {length}, expected at most {trained}, the model's own.")
    if not prompts or not all(prompts):
        raise PromptError("the prompt has no tokens: give at least one (a chat template always does).")
    longest = max(map(len, prompts))
    if longest + length > limit:
        raise PromptError(
            f"the prompt is {longest} tokens; with one canvas of {length} it does not fit the model's context of"
            f" {limit}.\nShorten it by at least {longest + length - limit} tokens."
        )
    return min(-(-settings.max_tokens // length), (limit - longest) // length)


def _check_ids(size: int, prompts: list[list[int]], settings: GenerationConfig) -> None:
    """Errors: PromptError, ConfigError for an id outside 0 … size − 1."""
    for number, prompt in enumerate(prompts):
        if prompt and not (0 <= min(prompt) and max(prompt) < size):
            bad = next(i for i in prompt if not 0 <= i < size)
            which = f"prompt {number + 1}" if len(prompts) > 1 else "the prompt"
            raise PromptError(
                f"{which} has the id {bad}; this model's ids are 0 … {size - 1}.\n"
                "If it was made of text, tokenizer and weights do not belong together."
            )
    for name, ids in (("stop_ids", settings.stop_ids), ("pad_token_id", (settings.pad_token_id,))):
        if bad := [i for i in ids if i >= size]:
            raise ConfigError(f"{name} has the id {bad[0]}; this model's ids are 0 … {size - 1}.")


@dataclass(kw_only=True)
class _Row:
    """One prompt's progress."""

    left: int  # tokens it may still get
    reason: str = ""  # empty while it runs
    canvases: list[CanvasRow] = field(default_factory=list)
    counted: int = 0  # tokens, as tokens_per_forward counts them


class _Run:
    """One run: the prefix, the rows, and where the time went."""

    def __init__(
        self,
        network: Network,
        prompts: list[list[int]],
        settings: GenerationConfig,
        noise: Noise,
        reader: Reader,
        length: int,
        cache: PrefixCache | None,
        guides: Guides,
    ):
        self.network, self.settings, self.noise, self.reader, self.length = network, settings, noise, reader, length
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        padded = [[settings.pad_token_id] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
        self.padded = mx.array(padded, mx.int32)  # [B, P]
        self.prompt_tokens = sum(map(len, prompts))
        if cache is not None and not cache.length < longest:
            raise PromptError(
                f"the prefix that was handed over holds {cache.length} tokens, expected fewer than the prompt has,"
                f" {longest}."
            )
        self.cache = cache or network.make_cache(len(prompts), padding, length)
        self.reused = self.cache.length
        self.rows = [_Row(left=settings.max_tokens) for _ in prompts]
        self.guides = guides
        self.steps = 0
        self.seconds = {"prefill": 0.0, "denoise": 0.0, "commit": 0.0}

    def events(self, canvases: int, pause_at: int | None) -> Iterator[Event]:
        yield from self._timed("prefill", self._prefill(pause_at))  # 1
        for index in range(canvases):
            best = mx.zeros((len(self.rows), self.length), mx.int32)
            trace = _Trace([not row.reason for row in self.rows])
            budget = (canvases - index) * self.length
            guides = self.guides.of_canvas([0 if row.reason else min(row.left, budget) for row in self.rows])
            canvas = _Canvas(  # 2
                self.network, self.cache, self.settings, self.noise, index, trace.running, self.reader, guides
            )
            for event in self._timed("denoise", canvas.steps()):  # 3 – 7
                trace.add(event)
                best = event.best
                self.steps += 1
                yield event
            yield self._commit(index, best, trace, canvas.log_probabilities, last=index == canvases - 1)  # 8
            if all(row.reason for row in self.rows):
                break
            with self._clock("commit"):
                self.network.encode(best, self.cache)
                mx.eval(self.cache.state)
        yield self._finish()

    def _prefill(self, pause_at: int | None) -> Iterator[Prefilled]:
        """Encode what the cache does not hold yet, chunk by chunk, so that memory does not grow with the prompt."""
        total = self.padded.shape[1]
        while self.cache.length < total:
            end = min(self.cache.length + self.settings.prefill_step_size, total)
            if pause_at is not None and self.cache.length < pause_at < end:
                end = pause_at
            self.network.encode(self.padded[:, self.cache.length : end], self.cache)
            mx.eval(self.cache.state)
            yield Prefilled(tokens=end, total=total)

    def _commit(
        self, index: int, best: mx.array, trace: "_Trace", log_probabilities: list[float | None], *, last: bool
    ) -> Committed:
        """The best tokens [B, L] become each row's ids and text."""
        committed = []
        for number, (row, ids) in enumerate(zip(self.rows, np.array(best).tolist(), strict=True)):
            self.guides.advance(number, ids)
            kept, reason = self._kept(row, ids, last=last) if not row.reason else ((), "")
            text, thinking = self.reader.read(number, kept, last=bool(reason)) if trace.running[number] else ("", "")
            found = {"log_probability": log_probabilities[number], **trace.row(number)}
            made = CanvasRow(ids=kept, reason=reason, text=text, thinking=thinking, **found)
            row.canvases += [made] if made.steps else []
            committed.append(made)
        return Committed(index=index, rows=tuple(committed))

    def _kept(self, row: _Row, ids: list[int], *, last: bool) -> tuple[tuple[int, ...], str]:
        """What a running row keeps of a canvas, and why it ends, if it does."""
        stop = next((i for i, token in enumerate(ids) if token in self.settings.stop_ids), len(ids))
        row.counted += sum(token != self.settings.pad_token_id for token in ids[: stop + 1])
        kept = ids[: min(stop, row.left)]
        row.left -= len(kept)
        if stop == len(kept) and stop < len(ids):
            row.reason = "stop"
        elif row.left == 0 or last:
            row.reason = "length"
        return tuple(kept), row.reason

    def _finish(self) -> Finished:
        canvases = [canvas for row in self.rows for canvas in row.canvases]
        statistics = Statistics(
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused,
            generated_tokens=sum(len(canvas.ids) for canvas in canvases),
            steps=self.steps,
            prefill_seconds=self.seconds["prefill"],
            denoise_seconds=self.seconds["denoise"],
            commit_seconds=self.seconds["commit"],
            tokens_per_forward=sum(row.counted for row in self.rows) / max(1, sum(canvas.steps for canvas in canvases)),
            peak_memory_bytes=mx.get_peak_memory(),
            tuning=self.network.tuning.fingerprint,
            departures=self.settings.departures,
        )
        results = [
            self.reader.conclude(number, row.reason, tuple(row.canvases), statistics)
            for number, row in enumerate(self.rows)
        ]
        reasons = tuple(row.reason for row in self.rows)
        return Finished(reasons=reasons, statistics=statistics, results=tuple(results))

    def _timed(self, name: str, events: Iterator[Any]) -> Iterator[Any]:
        """The same events; only the time spent making them counts, not the time a consumer holds them."""
        while True:
            with self._clock(name):
                event = next(events, None)
            if event is None:
                return
            yield event

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


class _Canvas:
    """One canvas while it denoises, until every running row is settled. A settled row keeps its canvas and its best
    tokens while the others go on."""

    def __init__(
        self,
        network: Network,
        cache: PrefixCache,
        settings: GenerationConfig,
        noise: Noise,
        index: int,
        running: list[bool],
        reader: Reader,
        guides: list[Guide | None],
    ):
        self.network, self.cache, self.settings, self.noise, self.index = network, cache, settings, noise, index
        self.reader, self.guides = reader, guides
        self.log_probabilities: list[float | None] = [None] * len(guides)  # under a constraint, once a row is over
        self.canvas = noise.canvas(index)  # [B, L]
        self.signal: mx.array | None = None  # [B, L, H]; None is the zero signal of step 0
        self.best = self.canvas
        self.entropy = mx.zeros(self.canvas.shape)
        self.earlier: list[mx.array] = []  # best tokens of the steps before
        self.done = mx.array([not r for r in running])  # [B]
        self.unsure_count = self.canvas.size  # positions that the step before was not sure of

    def steps(self) -> Iterator[Denoised]:
        settings, tuning, table = self.settings, self.network.tuning, self.network.decoder.embed_tokens
        for step in range(settings.max_denoising_steps):
            shaping = self._shaping(step)
            hidden = self.network.denoise(self.canvas, self.cache, self.signal)  # 3: [B, L, H]
            dense = self._signal_is_dense(step)
            sums = conditioned.walk(  # 4
                hidden,
                table,
                shaping,
                self.guides,
                with_signal=dense,
                free_signal=settings.free_signal,
                tuning=tuning,
            )
            reading = sums.read(*self._draws(step))
            accepted = sampler.accept(reading.entropy, settings.entropy_bound)  # 5
            self._advance(reading, accepted, step)  # 6, 7
            unsure = vocabulary.soft_rows(reading, table) & ~self.done[:, None]
            lazy = [self.canvas, self.best, self.entropy, accepted, unsure, *([reading.signal] if dense else [])]
            mx.async_eval(*lazy)
            event = self._event(step, float(shaping.temperature), reading.guess, accepted, sums.pinned)
            self._note(sums, event)
            yield event
            if all(event.settled):
                return
            where = np.array(unsure)
            self.unsure_count, self.signal = int(where.sum()), reading.signal
            if self.signal is None:
                self.signal = sums.sparse_signal(where, tuning=tuning)

    def _draws(self, step: int) -> tuple[mx.array | None, mx.array | None]:
        """The numbers that the guess is drawn at: none if it is not drawn, and a path only under a constraint."""
        if self.settings.greedy:
            return None, None
        path = self.noise.path(self.index, step) if any(self.guides) else None
        return self.noise.draws(self.index, step), path

    def _note(self, sums: RowSums, event: Denoised) -> None:
        """How probable the constraints were, of rows that are over with this step."""
        last = event.step + 1 == event.steps
        over = [
            row
            for row, guide in enumerate(self.guides)
            if guide and self.log_probabilities[row] is None and (last or event.settled[row])
        ]
        if over:
            found = sums.log_probabilities()
            for row in over:
                self.log_probabilities[row] = found[row]

    def _shaping(self, step: int) -> vocabulary.Shaping:
        """How this step turns the head's scores into logits."""
        settings, canvas = self.settings, self.canvas
        t_min, t_max = settings.schedule
        return vocabulary.Shaping(
            cap=self.network.config.final_logit_softcapping,
            temperature=sampler.temperature(step, settings.max_denoising_steps, t_min=t_min, t_max=t_max),
            forbidden=settings.stop_ids if settings.avoid_empty and self.index == 0 else (),
            positions=mx.arange(canvas.size) % canvas.shape[1] == 0,  # position 0 of every row
        )

    def _signal_is_dense(self, step: int) -> bool:
        """Whether the walk makes the whole signal; else it is made afterwards for the unsure positions alone."""
        last = step + 1 == self.settings.max_denoising_steps
        return not last and (not self.settings.sparse_signal or self.unsure_count > self.canvas.size // 2)

    def _advance(self, reading: vocabulary.Reading, accepted: mx.array, step: int) -> None:
        """The next canvas, and which rows are settled with it."""
        stability = self.settings.stability_threshold
        renoised = sampler.renoise(accepted, reading.guess, self.noise.ids(self.index, step))
        self.best, self.canvas = self._keep(self.best, reading.best), self._keep(self.canvas, renoised)
        self.entropy = self._keep(self.entropy, reading.entropy)
        self.done = self.done | sampler.settled(
            self.best,
            self.earlier,
            self.entropy,
            stability=stability,
            confidence=self.settings.confidence_threshold,
        )
        self.earlier = [*self.earlier, self.best][-stability:] if stability else []

    def _keep(self, old: mx.array, new: mx.array) -> mx.array:
        """Rows that are done keep the old value."""
        return mx.where(self.done.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    def _event(
        self, step: int, temperature: float, guess: mx.array, accepted: mx.array, pinned: mx.array | None
    ) -> Denoised:
        """Waits for the step, and fetches its few numbers at once."""
        numbers = mx.stack([accepted.sum(axis=-1), self.entropy.mean(axis=-1), self.done])
        counts, means, settled = np.array(numbers).tolist()
        if any(mean != mean for mean in means):
            raise CheckpointError(
                f"the network computes NaN (canvas {self.index}, step {step}): its weights are damaged, or their values"
                " overflow.\nDownload the checkpoint again; float16 can overflow, bfloat16 does not."
            )
        return Denoised(
            index=self.index,
            step=step,
            steps=self.settings.max_denoising_steps,
            temperature=temperature,
            best=self.best,
            guess=guess,
            accepted=accepted,
            entropy=self.entropy,
            next_canvas=self.canvas,
            accepted_count=tuple(map(int, counts)),
            mean_entropy=tuple(means),
            settled=tuple(map(bool, settled)),
            decode=self.reader.decode,
            pinned=pinned,
        )


class _Trace:
    """What the steps of one canvas did, per row; `running` rows had not finished before it."""

    def __init__(self, running: list[bool]):
        self.running = running
        self.steps = [0] * len(running)
        self.accepted: list[list[int]] = [[] for _ in running]
        self.mean_entropy = [0.0] * len(running)
        self.settled = [False] * len(running)

    def add(self, event: Denoised) -> None:
        for row, runs in enumerate(self.running):
            if runs and not self.settled[row]:
                self.steps[row] += 1
                self.accepted[row].append(event.accepted_count[row])
                self.mean_entropy[row] = event.mean_entropy[row]
                self.settled[row] = event.settled[row]

    def row(self, row: int) -> dict[str, Any]:
        """A CanvasRow's fields."""
        return {
            "steps": self.steps[row],
            "settled": self.settled[row],
            "mean_entropy": self.mean_entropy[row],
            "accepted_per_step": tuple(self.accepted[row]),
        }
