"""Token by token: the causal pass that commits canvases is a language model of its own, so the same weights can also
be read from left to right. Same prefix, events and rules of ending as the canvas.

    1  prefix ← encode(prompt)                 its last hidden state says the first token
       for each token:
    2      logits ← head(last hidden state)    one row of the vocabulary
    3      token  ← best, or drawn from what top_p, min_p and top_k leave, at the temperature; under a constraint of
                    tokens behind which a text of it can still end within the tokens left
    4      last hidden state ← encode(token)   queued before the token is looked at: the device never waits

Left to right the model was trained by predicting the next token; see docs/decodings.md for what it is good at.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..errors import ConfigError
from ..model.cache import PrefixCache
from ..model.network import Network
from . import vocabulary
from .constraint.conditioned import Guides
from .events import CanvasRow, Committed, Event, Reader
from .noise import Noise
from .run import Pictures, Row, Run, check_prompts
from .settings import GenerationConfig

ROOM = 64  # positions that a window keeps free behind itself, so that it is shifted once in so many tokens


def generate(
    network: Network,
    prompts: list[list[int]],
    settings: GenerationConfig,
    noise: Noise,
    *,
    cache: PrefixCache | None,
    pauses: Sequence[int],
    reader: Reader,
    guides: Guides,
    pictures: Pictures = (),
) -> Iterator[Event]:
    """`engine.generate` with settings.decoding "autoregressive". Closing the iterator stops within a token.
    Errors, before any work: PromptError for an empty prompt, or one that fills the context or the cache."""
    count = count_tokens(network, prompts, settings)
    run = _Run(count, guides, network, prompts, settings, noise, reader, ROOM, cache, pictures)
    run.reserve(count)
    return run.events(pauses)


def count_tokens(
    network: Network, prompts: list[list[int]], settings: GenerationConfig, pictures: Pictures = ()
) -> int:
    """How many tokens fit the request and the context. Errors: PromptError when not even one does; ConfigError for a
    model whose experts are streamed, which every token would read again."""
    if network.experts.streamed:
        raise ConfigError(
            f"autoregressive decoding would read {network.experts.bytes_a_pass / 1e9:.2f} GB from the disk for every"
            " token: this model's experts do not fit in memory.\nDecode by diffusion, which reads them once a step."
        )
    return min(settings.max_tokens, check_prompts(network, prompts, settings, 1, "one token", pictures))


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of every row, and what its distribution says at temperature 1."""

    ids: mx.array  # [B] int32
    logits: mx.array  # [B, V] float32
    total: mx.array  # [B]: log Σ exp(logit)
    logprob: mx.array  # [B] of the token, nats
    entropy: mx.array  # [B] nats

    def numbers(self) -> tuple[list[int], list[float], list[float]]:
        """Ids, log-probabilities and entropies; waits for them."""
        logprobs, entropies = np.array(mx.stack([self.logprob, self.entropy])).tolist()
        return cast(list[int], self.ids.tolist()), logprobs, entropies


class _Run(Run):
    """One run of `count` tokens."""

    def __init__(self, count: int, guides: Guides, *args: Any):
        super().__init__(*args)
        self.count, self.guides = count, guides

    def events(self, pauses: Sequence[int]) -> Iterator[Event]:
        yield from self.timed("prefill", self.prefill(pauses))  # 1
        token = None
        for number in range(self.count):
            with self.clock("commit"):
                token = token or self._next(number)
                upcoming = self._next(number + 1, token) if number + 1 < self.count else None
                made = self._commit(number, token, last=upcoming is None)
            self.steps += 1
            yield made
            if all(row.reason for row in self.rows):
                break
            token = upcoming
        for row in self.rows:
            row.canvases = [_joined(row.canvases)]
        yield self.finish()

    def _next(self, number: int, before: Token | None = None) -> Token:
        """Token `number`, being computed; behind the one `before`."""
        if before is not None:
            self.last = self.network.encode(before.ids[:, None], self.cache)  # 4: [B, 1, H]
        assert self.last is not None  # kept, where settings.needs_last_hidden
        logits = self.network.head(self.last)[:, 0]  # 2: [B, V]
        forbidden = self.settings.stop_ids if self.settings.avoid_empty and number == 0 else ()
        token = choose(logits, self.settings, self.noise, number, forbidden, self._allowed(number, before))  # 3
        mx.async_eval(self.cache.state, token.ids, token.logprob, token.entropy)
        return token

    def _allowed(self, number: int, before: Token | None) -> mx.array | None:
        """The ids that constraints allow for token `number`, bool [B, V]: these wait for the token before."""
        if before is not None and any(self.guides.constraints):
            for row, token in enumerate(np.array(before.ids).tolist()):
                self.guides.advance(row, [token])
        return self.guides.next_ids(self.count - number, self.network.config.vocab_size)

    def _commit(self, number: int, token: Token, *, last: bool) -> Committed:
        """The token becomes each running row's id and text; `last`: there is no room for another."""
        ids, logprobs, entropies = token.numbers()
        top = self.settings.top_logprobs
        likeliest = vocabulary.likeliest(token.logits, token.total, top) if top else None
        rows = []
        for index, row in enumerate(self.rows):
            scores: dict[str, Any] = {}
            if self.settings.scored:
                scores = {"logprobs": (logprobs[index],), "top_logprobs": likeliest and (likeliest[index],)}
            rows.append(self._row(index, row, ids[index], entropies[index], scores, last=last))
        return Committed(index=number, rows=tuple(rows))

    def _row(
        self, index: int, row: Row, token: int, entropy: float, scores: dict[str, Any], *, last: bool
    ) -> CanvasRow:
        if row.reason:
            return CanvasRow(ids=(), steps=0, settled=False, mean_entropy=0.0, accepted_per_step=())
        kept = row.keep([token], self.settings, last=last)
        text, thinking = self.reader.read(index, kept, last=bool(row.reason))
        made = CanvasRow(
            ids=kept,
            steps=1,
            settled=True,
            mean_entropy=entropy,
            accepted_per_step=(1,),
            reason=row.reason,
            stop_id=row.stop_id,
            text=text,
            thinking=thinking,
            **scores,
        )
        row.canvases.append(made)
        return made


def choose(
    logits: mx.array,
    settings: GenerationConfig,
    noise: Noise,
    number: int,
    forbidden: tuple[int, ...] = (),
    among: mx.array | None = None,
) -> Token:
    """Token `number` of every row from its logits [B, V]: the best, or drawn at noise.token(number), in vocabulary
    order; none that is `forbidden`, and of those `among` which it is to be, bool [B, V]."""
    maximum, mass, slope = _sums(logits)
    allowed = logits
    if forbidden:
        banned = (mx.arange(logits.shape[1])[:, None] == mx.array(forbidden)).any(axis=-1)
        allowed = mx.where(banned, vocabulary.LOWEST, logits)
    if among is not None:
        allowed = mx.where(among, allowed, vocabulary.LOWEST)
    if settings.greedy:
        ids = allowed.argmax(axis=-1).astype(mx.int32)
    else:
        kept = keep(allowed, top_p=settings.top_p, top_k=settings.top_k, min_p=settings.min_p)
        weights = mx.exp((kept - kept.max(axis=-1, keepdims=True)) / settings.temperature)
        ids = vocabulary.invert(weights, noise.token(number))
    total = maximum + mx.log(mass)
    own = mx.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return Token(ids=ids, logits=logits, total=total, logprob=own - total, entropy=mx.log(mass) - slope / mass)


def keep(logits: mx.array, *, top_p: float, top_k: int, min_p: float) -> mx.array:
    """Logits [B, V] with −1e30 at the tokens that an option leaves out. Each looks at all probabilities, and those
    before the temperature; equals at an edge stay together.

    Source: mlx_lm.sample_utils.make_sampler.
    """
    least = mx.full((len(logits), 1), -mx.inf)
    if min_p > 0:
        least = mx.maximum(least, logits.max(axis=-1, keepdims=True) + math.log(min_p))
    if 0 < top_k < logits.shape[1]:
        least = mx.maximum(least, mx.topk(logits, top_k, axis=-1).min(axis=-1, keepdims=True))
    if top_p < 1:
        ascending = mx.sort(logits, axis=-1)
        masses = mx.softmax(ascending, axis=-1, precise=True)
        above = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)  # of the likelier ones
        dropped = (above >= top_p).sum(axis=-1, keepdims=True)
        least = mx.maximum(least, mx.take_along_axis(ascending, dropped, axis=-1))
    return mx.where(logits < least, vocabulary.LOWEST, logits)


def _sums(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Of logits [B, V]: the maximum, Σ w and Σ w · (logit − maximum), with w = exp(logit − maximum); [B] each."""
    maximum = logits.max(axis=-1, keepdims=True)
    above = logits - maximum
    weights = mx.exp(above)
    return maximum[:, 0], weights.sum(axis=-1), (weights * above).sum(axis=-1)


def _joined(rows: list[CanvasRow]) -> CanvasRow:
    """All tokens of a row as one."""
    scored, listed = rows[0].logprobs is not None, rows[0].top_logprobs is not None
    return CanvasRow(
        ids=tuple(i for row in rows for i in row.ids),
        steps=len(rows),
        settled=True,
        mean_entropy=sum(row.mean_entropy for row in rows) / len(rows),
        accepted_per_step=(1,) * len(rows),
        reason=rows[-1].reason,
        stop_id=rows[-1].stop_id,
        text="".join(row.text for row in rows),
        thinking="".join(row.thinking for row in rows),
        logprobs=tuple(p for row in rows for p in row.logprobs or ()) if scored else None,
        top_logprobs=tuple(p for row in rows for p in row.top_logprobs or ()) if listed else None,
    )
