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

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, ConfigError
from ..model.cache import PrefixCache
from ..model.network import Network
from . import autoregressive, sampler, vocabulary
from .constraint import conditioned
from .constraint.automaton import Constraint
from .constraint.conditioned import Guide, Guides, RowSums
from .events import CanvasRow, Committed, Denoised, Event, NoReader, Reader
from .noise import Noise
from .run import Pictures, Run, check_prompts
from .settings import GenerationConfig


def generate(
    network: Network,
    prompts: list[list[int]],
    settings: GenerationConfig,
    noise: Noise,
    *,
    cache: PrefixCache | None = None,
    pauses: Sequence[int] = (),
    reader: Reader | None = None,
    constraint: Constraint | Sequence[Constraint | None] | None = None,
    pictures: Pictures = (),
) -> Iterator[Event]:
    """Generate for B prompts of ids at once; a shorter one is padded on its left, as transformers does.

    A `cache` that already holds the first tokens of the (single) prompt saves encoding those, and is written to; one
    of the Prefilled events comes when it holds exactly so many tokens as each of `pauses` says: there it can be forked.
    `pictures` are every prompt's, in order: what they look like overwrites their ids, and no pause lies inside one.
    `reader` fills in texts and results. Rows go on with texts of the `constraint` alone, one for all or one a row.
    Closing the iterator stops within a step.
    Errors, before any work: PromptError for an empty prompt or one that leaves no room for a canvas, ConfigError for
    a canvas longer than the model's, or a constraint that these settings cannot meet.
    With settings.decoding "autoregressive" the same events come from the causal pass (see autoregressive.py).
    """
    guides, tokens = Guides(constraint, len(prompts)), check(network, prompts, settings, pictures)
    guides.check(settings, network.config.vocab_size, tokens)
    if settings.decoding == "autoregressive":
        return autoregressive.generate(
            network,
            prompts,
            settings,
            noise,
            cache=cache,
            pauses=pauses,
            reader=reader or NoReader(),
            guides=guides,
            pictures=pictures,
        )
    length = settings.canvas_length or network.config.canvas_length
    canvases = count_canvases(network, prompts, settings, length)
    run = _Run(length, guides, network, prompts, settings, noise, reader or NoReader(), length, cache, pictures)
    run.reserve((canvases - 1) * length)
    return run.events(canvases, pauses)


def check(
    network: Network,
    prompts: list[list[int]],
    settings: GenerationConfig,
    pictures: Pictures = (),
) -> int:
    """The most tokens that a row can get. Errors: as `generate` has them."""
    _check_pictures(settings, pictures)
    if settings.decoding == "autoregressive":
        return autoregressive.count_tokens(network, prompts, settings, pictures)
    length = settings.canvas_length or network.config.canvas_length
    return min(settings.max_tokens, count_canvases(network, prompts, settings, length, pictures) * length)


def _check_pictures(settings: GenerationConfig, pictures: Pictures) -> None:
    if settings.picture_mask != GenerationConfig.picture_mask and not any(pictures):
        raise ConfigError("picture_mask would do nothing: the prompt has no picture.")


def room(settings: GenerationConfig, canvas_length: int) -> int:
    """Positions that a prefix keeps free behind itself for a run: a canvas, unless tokens come one by one."""
    return autoregressive.ROOM if settings.decoding == "autoregressive" else settings.canvas_length or canvas_length


def count_canvases(
    network: Network, prompts: list[list[int]], settings: GenerationConfig, length: int, pictures: Pictures = ()
) -> int:
    """How many canvases of `length` fit the request and the context; PromptError when not even one does."""
    trained = network.config.canvas_length
    if length > trained:
        raise ConfigError(f"canvas_length is {length}, expected at most {trained}, the model's own.")
    room = check_prompts(network, prompts, settings, length, f"one canvas of {length}", pictures)
    return min(-(-settings.max_tokens // length), room // length)


class _Run(Run):
    """One run of canvases of `length`."""

    def __init__(self, length: int, guides: Guides, *args: Any):
        super().__init__(*args)
        self.length, self.guides = length, guides
        self.at_work = list(range(len(self.rows)))  # numbers of the rows that the batch still holds, as the prefix does

    def events(self, canvases: int, pauses: Sequence[int]) -> Iterator[Event]:
        yield from self.timed("prefill", self.prefill(pauses))  # 1
        for index in range(canvases):
            best = mx.zeros((len(self.rows), self.length), mx.int32)
            trace = _Trace([not row.reason for row in self.rows])
            canvas = self._canvas(index, (canvases - index) * self.length)  # 2
            for event in self.timed("denoise", canvas.steps()):  # 3 – 7
                event = self._of_all_rows(event)
                trace.add(event)
                best = event.best
                self.steps += 1
                yield event
            self._follow(canvas)
            yield self._commit(index, best, trace, canvas, last=index == canvases - 1)  # 8
            if all(row.reason for row in self.rows):
                break
            with self.clock("commit"):
                self._let_go()
                if not self.settings.scored:
                    self.encode(best if self._whole else best[mx.array(self.at_work)])
        yield self.finish()

    def _canvas(self, index: int, budget: int) -> "_Canvas":
        """The next canvas of the rows at work; `budget` are the tokens that this and later ones can hold."""
        noise = self.noise if self._whole else SomeRows(self.noise, self.at_work)
        guides = self.guides.of_canvas([0 if row.reason else min(row.left, budget) for row in self.rows])
        chosen = [guides[number] for number in self.at_work]
        return _Canvas(self.network, self.cache, self.settings, noise, index, self.reader, chosen)

    @property
    def _whole(self) -> bool:
        """Whether the batch holds all rows, in order."""
        return self.at_work == list(range(len(self.rows)))

    def _follow(self, canvas: "_Canvas") -> None:
        """The canvas may have put its rows in another order; what it knows of them comes in that order now."""
        if canvas.places != list(range(len(self.at_work))):
            order = mx.array(canvas.places)
            self.at_work = [self.at_work[row] for row in canvas.places]
            self.last = None if self.last is None else self.last[order]
            canvas.log_probabilities = [canvas.log_probabilities[row] for row in canvas.places]
            canvas.best_logprob = canvas.best_logprob[order]

    def _let_go(self) -> None:
        """Rows that have finished leave the batch: they cost nothing any more."""
        going = [number for number in self.at_work if not self.rows[number].reason]
        if len(going) < len(self.at_work):
            places = [self.at_work.index(number) for number in going]
            self.cache.keep(places)
            self.last = None if self.last is None else self.last[mx.array(places)]
            self.at_work = going

    def _of_all_rows(self, event: Denoised) -> Denoised:
        """An event of the rows at work as one of all rows; those that have left show padding."""
        if self._whole:
            return event
        among = partial(_among, self.at_work)

        def told(rest: Any, some: Sequence[Any]) -> tuple[Any, ...]:
            found = dict(zip(self.at_work, some, strict=False))
            return tuple(found.get(number, rest) for number in range(len(self.rows))) if some else ()

        shape = (len(self.rows), self.length)
        padding = mx.full(shape, self.settings.pad_token_id, mx.int32)
        return replace(
            event,
            **{name: among(padding, getattr(event, name)) for name in ("best", "guess", "next_canvas")},
            accepted=among(mx.zeros(shape, mx.bool_), event.accepted),
            entropy=among(mx.zeros(shape), event.entropy),
            pinned=None if event.pinned is None else among(mx.zeros(shape, mx.bool_), event.pinned),
            accepted_count=told(0, event.accepted_count),
            mean_entropy=told(0.0, event.mean_entropy),
            settled=told(True, event.settled),
            early=told(False, event.early),
        )

    def _commit(self, index: int, best: mx.array, trace: "_Trace", canvas: "_Canvas", *, last: bool) -> Committed:
        """The best tokens [B, L] become each row's ids and text; with scores, behind the pass that commits them."""
        kept: list[tuple[int, ...]] = []
        for number, (row, ids) in enumerate(zip(self.rows, np.array(best).tolist(), strict=True)):
            self.guides.advance(number, ids)
            kept.append(row.keep(ids, self.settings, last=last) if not row.reason else ())
        scores: dict[int, dict[str, Any]] = {}
        if self.settings.scored:
            told = [len(kept[number]) + (self.rows[number].reason == "stop") for number in self.at_work]
            with self.clock("commit"):
                found = self._scores(best[mx.array(self.at_work)], canvas, told)
            scores = dict(zip(self.at_work, found, strict=True))
        probable = dict(zip(self.at_work, canvas.log_probabilities, strict=True))
        committed = []
        for number, row in enumerate(self.rows):
            on = trace.running[number]
            ids, ending = kept[number], {"reason": row.reason, "stop_id": row.stop_id} if on else {}
            text, thinking = self.reader.read(number, ids, last=bool(row.reason)) if on else ("", "")
            told_of = {**trace.row(number), **scores.get(number, {}), "log_probability": probable.get(number)}
            made = CanvasRow(ids=ids, text=text, thinking=thinking, **ending, **told_of)
            row.canvases += [made] if made.steps else []
            committed.append(made)
        return Committed(index=index, rows=tuple(committed))

    def _scores(self, best: mx.array, canvas: "_Canvas", told: list[int]) -> list[dict[str, Any]]:
        """Encode the canvas of the rows at work; log-probabilities of the first `told` tokens of each, as CanvasRow's
        fields."""
        before = self.last
        assert before is not None  # kept, where settings.needs_last_hidden
        hidden = mx.concatenate([before, self.encode(best)[:, :-1]], axis=1)  # what each token followed from
        at = mx.array([row * self.length + i for row, count in enumerate(told) for i in range(count)], mx.int32)
        if not at.size:
            return [{} for _ in told]
        shaping = vocabulary.Shaping(cap=self.network.config.final_logit_softcapping, temperature=1.0)
        ids, top = best.flatten()[at], self.settings.top_logprobs
        x, table, tuning = hidden.flatten(0, 1)[at], self.network.decoder.embed_tokens, self.network.tuning
        found = vocabulary.score(x, table, shaping, ids, top=top, tuning=tuning)
        own = np.array(canvas.best_logprob.flatten()[at]).tolist()
        fields = []
        for count in told:
            row, found = found.split(count)
            fields.append(row.fields() | {"canvas_logprobs": tuple(own[:count])})
            own = own[count:]
        return fields


class _Canvas:
    """One canvas of the rows at work while it denoises, until every row is settled. A settled row keeps its canvas and
    its best tokens while the others go on, and costs nothing: those stand first in the prefix."""

    def __init__(
        self,
        network: Network,
        cache: PrefixCache,
        settings: GenerationConfig,
        noise: Noise,
        index: int,
        reader: Reader,
        guides: list[Guide | None],
    ):
        self.network, self.cache, self.settings, self.noise, self.index = network, cache, settings, noise, index
        self.reader, self.guides = reader, guides
        self.log_probabilities: list[float | None] = [None] * len(guides)  # under a constraint, once a row is over
        self.places = list(range(len(guides)))  # the rows as the prefix holds them; those that go on stand first
        self.going = len(guides)  # how many go on
        self.canvas = noise.canvas(index)  # [B, L]
        self.signal: mx.array | None = None  # [going, L, H], in their places; None is the zero signal of step 0
        self.best = self.canvas
        self.entropy = mx.zeros(self.canvas.shape)
        self.best_logprob = mx.zeros(self.canvas.shape)  # of the best tokens, by the step's own distribution
        self.earlier: list[mx.array] = []  # best tokens of the steps before
        self.done = mx.zeros(len(guides), mx.bool_)  # [B]
        self.early = mx.zeros_like(self.done)  # [B]: done by settings.stable_answer alone
        self.pinned: mx.array | None = None  # [B, L], under a constraint
        self.unsure_count = self.canvas.size  # positions that the step before was not sure of

    def steps(self) -> Iterator[Denoised]:
        settings, tuning, table = self.settings, self.network.tuning, self.network.decoder.embed_tokens
        for step in range(settings.max_denoising_steps):
            rows = self._rows()
            shaping = self._shaping(step)
            canvas = self.canvas if rows is None else self.canvas[mx.array(rows)]
            hidden = self.network.denoise(canvas, self.cache, self.signal)  # 3: [going, L, H]
            dense = self._signal_is_dense(step)
            sums = conditioned.walk(  # 4
                hidden,
                table,
                shaping,
                [self.guides[row] for row in self.places[: self.going]],
                with_signal=dense,
                led=step < settings.led_steps,
                tuning=tuning,
            )
            reading = self._of_all(rows, sums.read(*self._draws(rows, step)))
            accepted = sampler.accept(reading.entropy, settings.entropy_bound)  # 5
            self._advance(reading, accepted, step)  # 6, 7
            unsure = vocabulary.soft_rows(reading, table) & ~self.done[:, None]
            lazy = [self.canvas, self.best, self.entropy, accepted, unsure, *([reading.signal] if dense else [])]
            mx.async_eval(*lazy)
            event = self._event(step, float(shaping.temperature), reading.guess, accepted, self._pinned(rows, sums))
            self._note(sums, event)
            yield event
            if all(event.settled) or event.step + 1 == event.steps:
                return
            where = np.array(unsure)
            self.unsure_count, self.signal = int(where.sum()), reading.signal
            if self.signal is None:
                self.signal = sums.sparse_signal(where[self.places[: self.going]], tuning=tuning)
            self._part(event.settled)

    def _part(self, settled: Sequence[bool]) -> None:
        """Settled rows give up their places to those behind them that go on."""
        before = self.places[: self.going]
        going, over = ([row for row in before if settled[row] is told] for told in (False, True))
        if not over:
            return
        assert self.signal is not None
        self.signal = self.signal[mx.array([before.index(row) for row in going])]
        if going != before[: len(going)]:
            self.cache.keep([*map(self.places.index, going + over), *range(self.going, len(self.places))])
        self.places[: self.going], self.going = going + over, len(going)

    def _rows(self) -> list[int] | None:
        """The rows that go on, in their places; None: all, in order."""
        rows = self.places[: self.going]
        return None if rows == list(range(len(self.guides))) else rows

    def _of_all(self, rows: list[int] | None, reading: vocabulary.Reading) -> vocabulary.Reading:
        """What was read of some rows, among what the others were left with."""
        if rows is None:
            return reading
        return replace(
            reading,
            best=_among(rows, self.best, reading.best),
            guess=_among(rows, self.best, reading.guess),
            entropy=_among(rows, self.entropy, reading.entropy),
            tail=_among(rows, mx.zeros_like(self.entropy), reading.tail),
        )

    def _pinned(self, rows: list[int] | None, sums: RowSums) -> mx.array | None:
        """Positions without a choice, of all rows; None without constraints."""
        if (found := sums.pinned) is not None:
            before = mx.zeros(self.canvas.shape, mx.bool_) if self.pinned is None else self.pinned
            self.pinned = found if rows is None else _among(rows, before, found)
        return self.pinned

    def _draws(self, rows: list[int] | None, step: int) -> tuple[mx.array | None, mx.array | None]:
        """The numbers that the guess is drawn at: none if it is not drawn, and a path only under a constraint."""
        if self.settings.greedy:
            return None, None
        noise = self.noise if rows is None else SomeRows(self.noise, rows)
        path = noise.path(self.index, step) if any(self.guides) else None
        return noise.draws(self.index, step), path

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
                self.log_probabilities[row] = found[self.places.index(row)]

    def _shaping(self, step: int) -> vocabulary.Shaping:
        """How this step turns the head's scores into logits."""
        settings, length = self.settings, self.canvas.shape[1]
        t_min, t_max = settings.schedule
        return vocabulary.Shaping(
            cap=self.network.config.final_logit_softcapping,
            temperature=sampler.temperature(step, settings.max_denoising_steps, t_min=t_min, t_max=t_max),
            forbidden=settings.stop_ids if settings.avoid_empty and self.index == 0 else (),
            positions=mx.arange(self.going * length) % length == 0,  # position 0 of every row
        )

    def _signal_is_dense(self, step: int) -> bool:
        """Whether the walk makes the whole signal; else it is made afterwards for the unsure positions alone."""
        last = step + 1 == self.settings.max_denoising_steps
        return not last and (
            not self.settings.sparse_signal or self.unsure_count > self.going * self.canvas.shape[1] // 2
        )

    def _advance(self, reading: vocabulary.Reading, accepted: mx.array, step: int) -> None:
        """The next canvas, and which rows are settled with it."""
        stability = self.settings.stability_threshold
        renoised = sampler.renoise(accepted, reading.guess, self.noise.ids(self.index, step))
        self.best, self.canvas = self._keep(self.best, reading.best), self._keep(self.canvas, renoised)
        self.entropy = self._keep(self.entropy, reading.entropy)
        if self.settings.scored:
            self.best_logprob = self._keep(self.best_logprob, mx.log1p(-reading.tail))
        done = self.done | sampler.settled(
            self.best,
            self.earlier,
            self.entropy,
            stability=stability,
            confidence=self.settings.confidence_threshold,
        )
        if answer := self.settings.stable_answer:
            stable = sampler.answer_stable(self.best, self.earlier, self.settings.stop_ids, steps=answer)
            self.early = self.early | (stable & ~done)
            done = done | stable
        self.done = done
        remembered = max(stability, self.settings.stable_answer or 0)
        self.earlier = [*self.earlier, self.best][-remembered:] if remembered else []

    def _keep(self, old: mx.array, new: mx.array) -> mx.array:
        """Rows that are done keep the old value."""
        return mx.where(self.done.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    def _event(
        self, step: int, temperature: float, guess: mx.array, accepted: mx.array, pinned: mx.array | None
    ) -> Denoised:
        """Waits for the step, and fetches its few numbers at once."""
        numbers = mx.stack([accepted.sum(axis=-1), self.entropy.mean(axis=-1), self.done, self.early])
        counts, means, settled, early = np.array(numbers).tolist()
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
            early=tuple(map(bool, early)) if self.settings.stable_answer else (),
            decode=self.reader.decode,
            pinned=pinned,
        )


def _among(rows: list[int], rest: mx.array, some: mx.array) -> mx.array:
    """[B, …] with the values of `some` in these rows."""
    whole = mx.array(rest)
    whole[mx.array(rows)] = some
    return whole


class SomeRows:
    """Another noise, of some rows of its batch alone."""

    def __init__(self, noise: Noise, rows: Sequence[int]):
        self.noise, self.rows = noise, mx.array(list(rows))

    def canvas(self, index: int) -> mx.array:
        return self.noise.canvas(index)[self.rows]

    def draws(self, index: int, step: int) -> mx.array:
        return self.noise.draws(index, step)[self.rows]

    def ids(self, index: int, step: int) -> mx.array:
        return self.noise.ids(index, step)[self.rows]

    def path(self, index: int, step: int) -> mx.array:
        return self.noise.path(index, step)[self.rows]

    def token(self, number: int) -> mx.array:
        return self.noise.token(number)[self.rows]


class _Trace:
    """What the steps of one canvas did, per row; `running` rows had not finished before it."""

    def __init__(self, running: list[bool]):
        self.running = running
        self.steps = [0] * len(running)
        self.accepted: list[list[int]] = [[] for _ in running]
        self.mean_entropy = [0.0] * len(running)
        self.settled = [False] * len(running)
        self.early = [False] * len(running)

    def add(self, event: Denoised) -> None:
        for row, runs in enumerate(self.running):
            if runs and not self.settled[row]:
                self.steps[row] += 1
                self.accepted[row].append(event.accepted_count[row])
                self.mean_entropy[row] = event.mean_entropy[row]
                self.settled[row] = event.settled[row]
                self.early[row] = bool(event.early) and event.early[row]

    def row(self, row: int) -> dict[str, Any]:
        """A CanvasRow's fields."""
        return {
            "steps": self.steps[row],
            "settled": self.settled[row] and not self.early[row],
            "early": self.early[row],
            "mean_entropy": self.mean_entropy[row],
            "accepted_per_step": tuple(self.accepted[row]),
        }
