"""Block-diffusion generation as one generator of events: prefill → denoise → commit. Token ids only: no text, no
files, no printing.

    prefix ← encode(prompt)                          in chunks
    for each canvas:
        canvas ← random ids;  signal ← 0
        for step in 0 … steps − 1:
            hidden  ← denoise(canvas, prefix, signal)
            reading ← best, guess, entropy, signal of hidden, at the step's temperature
            canvas  ← guess where accepted, fresh random ids elsewhere
            stop when settled
        commit best: it becomes text, and is encoded into the prefix before the next canvas

Source: transformers DiffusionGemmaGenerationMixin.generate.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import ConfigError, PromptError
from ..model.cache import PrefixCache
from ..model.network import Network
from . import sampler, vocabulary
from .events import CanvasRow, Committed, Denoised, Event, Finished, Prefilled, Statistics
from .noise import Noise
from .settings import GenerationConfig


@dataclass(kw_only=True)
class _Row:
    """One prompt's progress."""

    left: int  # tokens it may still get
    reason: str = ""  # empty while it runs
    tokens: int = 0  # kept
    counted: int = 0  # as tokens_per_forward counts them
    forwards: int = 0


def generate(
    network: Network,
    prompts: list[list[int]],
    settings: GenerationConfig,
    noise: Noise,
    cache: PrefixCache | None = None,
    pause_at: int | None = None,
) -> Iterator[Event]:
    """Generate for B prompts of ids at once; a shorter one is padded on its left, as transformers does.

    A `cache` that already holds the first tokens of the (single) prompt saves encoding those; one of the Prefilled
    events comes when it holds exactly `pause_at` tokens, so that the caller can take a snapshot there. Closing
    the generator stops within a step.
    Errors, before any work: PromptError for an empty prompt or one that leaves no room for a canvas, ConfigError for
    a canvas longer than the model's.
    """
    longest = max(map(len, prompts), default=0)
    length = settings.canvas_length or network.config.canvas_length
    canvases = _check(network, prompts, settings, longest, length)
    padding = [longest - len(prompt) for prompt in prompts]
    if cache is None:
        cache = network.make_cache(len(prompts), padding, length)
    reused = cache.length
    mx.reset_peak_memory()
    seconds = {"prefill": 0.0, "denoise": 0.0, "commit": 0.0}
    cache.reserve(longest + (canvases - 1) * length)
    padded = [[settings.pad_token_id] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    yield from _timed(_prefill(network, padded, cache, settings.prefill_step_size, pause_at), seconds, "prefill")

    rows = [_Row(left=settings.max_tokens) for _ in prompts]
    steps = 0
    for index in range(canvases):
        running = [not row.reason for row in rows]
        trace = _Trace(len(rows))
        best = mx.zeros((len(rows), length), mx.int32)
        for event in _timed(_denoise(network, cache, settings, noise, index, running), seconds, "denoise"):
            trace.add(event, running)
            best = event.best
            steps += 1
            yield event
        yield Committed(canvas=index, rows=_commit(best, rows, trace, settings, last=index == canvases - 1))
        if all(row.reason for row in rows):
            break
        start = time.perf_counter()
        network.encode(best, cache)
        mx.eval(cache.state)
        seconds["commit"] += time.perf_counter() - start
    yield Finished(
        reasons=tuple(row.reason for row in rows),
        statistics=Statistics(
            prompt_tokens=sum(map(len, prompts)),
            reused_tokens=reused,
            generated_tokens=sum(row.tokens for row in rows),
            steps=steps,
            prefill_seconds=seconds["prefill"],
            denoise_seconds=seconds["denoise"],
            commit_seconds=seconds["commit"],
            tokens_per_forward=sum(row.counted for row in rows) / max(1, sum(row.forwards for row in rows)),
            peak_memory_bytes=mx.get_peak_memory(),
            departures=settings.departures,
        ),
    )


def _check(network: Network, prompts: list[list[int]], settings: GenerationConfig, longest: int, length: int) -> int:
    """How many canvases fit the request and the context; PromptError when not even one does."""
    limit, trained = network.config.max_position_embeddings, network.config.canvas_length
    if length > trained:
        raise ConfigError(f"canvas_length is {length}, expected at most {trained}, the model's own.")
    if not prompts or not all(prompts):
        raise PromptError("the prompt has no tokens: give at least one (a chat template always does).")
    if longest + length > limit:
        raise PromptError(
            f"the prompt is {longest} tokens; with one canvas of {length} it does not fit the model's context of"
            f" {limit}.\nShorten it by at least {longest + length - limit} tokens."
        )
    return min(-(-settings.max_tokens // length), (limit - longest) // length)


def _prefill(
    network: Network, prompts: list[list[int]], cache: PrefixCache, chunk: int, pause_at: int | None
) -> Iterator[Prefilled]:
    """Encode what the cache does not hold yet, chunk by chunk, so that memory does not grow with the prompt."""
    ids = mx.array(prompts, mx.int32)
    total = ids.shape[1]
    while cache.length < total:
        end = min(cache.length + chunk, total)
        if pause_at is not None and cache.length < pause_at < end:
            end = pause_at
        network.encode(ids[:, cache.length : end], cache)
        mx.eval(cache.state)
        if end < total:
            mx.clear_cache()  # buffers of a full-length chunk never fit the next, longer one
        yield Prefilled(tokens=end, total=total)


def _denoise(
    network: Network,
    cache: PrefixCache,
    settings: GenerationConfig,
    noise: Noise,
    index: int,
    running: list[bool],
) -> Iterator[Denoised]:
    """The steps of one canvas, until every running row is settled. A settled row keeps its canvas and its best
    tokens while the others go on."""
    table, steps = network.decoder.embed_tokens, settings.max_denoising_steps
    canvas, signal = noise.canvas(index), None
    best, entropy = canvas, mx.zeros(canvas.shape)
    earlier: list[mx.array] = []  # best canvases of the steps before
    done = mx.array([not r for r in running])
    soft = canvas.size  # positions that the step before was not sure of
    for step in range(steps):
        shape = _shape(network, settings, canvas, index, step)
        hidden = network.denoise(canvas, cache, signal)
        dense = step + 1 < steps and (not settings.sparse_signal or soft > canvas.size // 2)
        draws = None if settings.greedy else noise.draws(index, step)
        reading = vocabulary.read(hidden, table, shape, draws, with_signal=dense)
        accepted = sampler.accept(reading.entropy, settings.entropy_bound)
        following = sampler.renoise(accepted, reading.guess, noise.ids(index, step))
        best, canvas = _keep(done, best, reading.best), _keep(done, canvas, following)
        entropy = _keep(done, entropy, reading.entropy)
        done = done | sampler.settled(
            best,
            earlier,
            entropy,
            stability=settings.stability_threshold,
            confidence=settings.confidence_threshold,
        )
        earlier = [*earlier, best][-settings.stability_threshold :] if settings.stability_threshold else []
        unsure = vocabulary.soft_rows(reading, table) & ~done[:, None]
        mx.async_eval(canvas, best, entropy, accepted, unsure, *([reading.signal] if dense else []))
        counts, means, settled = np.array(mx.stack([accepted.sum(axis=-1), entropy.mean(axis=-1), done])).tolist()
        yield Denoised(
            canvas=index,
            step=step,
            steps=steps,
            temperature=float(shape.temperature),
            best=best,
            guess=reading.guess,
            accepted=accepted,
            entropy=entropy,
            current=canvas,
            accepted_count=tuple(map(int, counts)),
            mean_entropy=tuple(means),
            settled=tuple(map(bool, settled)),
        )
        if all(settled):
            return
        rows = np.flatnonzero(np.array(unsure))
        soft = len(rows)
        signal = reading.signal
        if signal is None:
            signal = vocabulary.sparse_signal(hidden, table, shape, reading.best, mx.array(rows))


def _shape(network: Network, settings: GenerationConfig, canvas: mx.array, index: int, step: int) -> vocabulary.Shape:
    """How this step turns the head's scores into logits."""
    temperature = sampler.temperature(step, settings.max_denoising_steps, t_min=settings.t_min, t_max=settings.t_max)
    forbidden = settings.stop_ids if settings.avoid_empty and index == 0 else ()
    starts = mx.arange(canvas.size) % canvas.shape[1] == 0  # position 0 of every row
    cap = network.config.final_logit_softcapping
    return vocabulary.Shape(cap=cap, temperature=temperature, forbidden=forbidden, positions=starts)


def _keep(done: mx.array, old: mx.array, new: mx.array) -> mx.array:
    """Rows that are done keep the old value."""
    return mx.where(done.reshape(-1, *[1] * (new.ndim - 1)), old, new)


class _Trace:
    """What the steps of one canvas did, per row."""

    def __init__(self, rows: int):
        self.steps = [0] * rows
        self.accepted: list[list[int]] = [[] for _ in range(rows)]
        self.mean_entropy = [0.0] * rows
        self.settled = [False] * rows

    def add(self, event: Denoised, running: list[bool]) -> None:
        for row, runs in enumerate(running):
            if runs and not self.settled[row]:
                self.steps[row] += 1
                self.accepted[row].append(event.accepted_count[row])
                self.mean_entropy[row] = event.mean_entropy[row]
                self.settled[row] = event.settled[row]


def _commit(
    best: mx.array, rows: list[_Row], trace: _Trace, settings: GenerationConfig, *, last: bool
) -> tuple[CanvasRow, ...]:
    """Turn the best tokens [B, L] into each row's kept ids, and note which rows are finished."""
    committed = []
    for number, (row, ids) in enumerate(zip(rows, np.array(best).tolist(), strict=True)):
        kept: list[int] = []
        if not row.reason:
            row.forwards += trace.steps[number]
            stop = next((i for i, token in enumerate(ids) if token in settings.stop_ids), len(ids))
            row.counted += sum(token != settings.pad_token_id for token in ids[: stop + 1])
            kept = ids[: min(stop, row.left)]
            row.left -= len(kept)
            row.tokens += len(kept)
            if stop == len(kept) and stop < len(ids):
                row.reason = "stop"
            elif row.left == 0 or last:
                row.reason = "length"
        committed.append(
            CanvasRow(
                ids=tuple(kept),
                steps=trace.steps[number],
                settled=trace.settled[number],
                mean_entropy=trace.mean_entropy[number],
                accepted_per_step=tuple(trace.accepted[number]),
                reason=row.reason if trace.steps[number] else "",
            )
        )
    return tuple(committed)


def _timed(events: Iterator[Any], seconds: dict[str, float], name: str) -> Iterator[Any]:
    """The same events; only the time spent making them counts, not the time a consumer holds them."""
    while True:
        start = time.perf_counter()
        event = next(events, None)
        seconds[name] += time.perf_counter() - start
        if event is None:
            return
        yield event
