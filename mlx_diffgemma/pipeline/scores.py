"""Texts scored by the causal pass: the log-probability of every token given its left, perplexity."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from ..errors import PromptError
from ..generation import vocabulary
from ..generation.run import check_ids
from ..model.cache import PrefixCache
from ..model.network import Network


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """Tokens and their log-probabilities in nats, each given everything in front of it."""

    tokens: tuple[int, ...]  # those that were scored: not the ones that were only read
    logprobs: tuple[float, ...]
    best: tuple[int, ...]  # what greedy decoding would have written at each place

    @property
    def total(self) -> float:
        """Log-probability of all of them, nats."""
        return math.fsum(self.logprobs)

    @property
    def avg_logprob(self) -> float:
        """Their mean, nats a token."""
        return self.total / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.avg_logprob)

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits for each byte of the text that the tokens spell: comparable between tokenizers."""
        return -self.total / math.log(2) / text_bytes


def score_ids(
    network: Network, ids: list[int], *, start: int = 1, chunk: int = 2048, stride: int | None = None
) -> TextScores:
    """Score the tokens from `start` on, in chunks whose context is carried in the prefix cache.

    Errors: PromptError for nothing to score, or a text longer than the context without a `stride`.
    """
    found = list(score_parts(network, ids, start=start, chunk=chunk, stride=stride))
    logprobs = tuple(nats for part in found for nats in part.logprobs)
    return TextScores(tokens=tuple(ids[start:]), logprobs=logprobs, best=tuple(i for part in found for i in part.best))


def score_parts(
    network: Network, ids: list[int], *, start: int = 1, chunk: int = 2048, stride: int | None = None, top: int = 0
) -> Iterator[vocabulary.Scores]:
    """`score_ids` chunk by chunk, with the `top` likeliest tokens of each place. Errors: as `score_ids`."""
    limit = network.config.max_position_embeddings
    check_ids(network.config.vocab_size, [ids])
    if start < 1 or len(ids) <= start:
        raise PromptError("there is nothing to score: a token is scored by what stands in front of it.")
    if stride is None and len(ids) > limit:
        raise PromptError(
            f"the text is {len(ids)} tokens; the model's context is {limit}.\n"
            "Score it in windows that overlap: give a stride, for example half of the context."
        )
    if stride is not None and not 1 <= stride < limit:
        raise PromptError(f"the stride is {stride} tokens, expected 1 … {limit - 1}: less than the model's context.")
    for first, scored, end in _windows(len(ids), start, limit, stride or limit - 1):
        yield from _window(network, ids[first:end], scored - first, chunk, top)


def _windows(length: int, start: int, limit: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where windows of `limit` tokens begin, at which token they begin to score, and where they end."""
    first, scored = 0, start
    while scored < length:
        end = min(first + limit, length)
        if end > scored:
            yield first, scored, end
            scored = end
        first += stride


def _window(network: Network, ids: list[int], start: int, chunk: int, top: int) -> Iterator[vocabulary.Scores]:
    """Scores of the tokens from `start` on, chunk by chunk."""
    cache = network.make_cache(canvas_length=chunk)
    cache.reserve(len(ids))
    for begin in range(0, len(ids) - 1, chunk):
        yield _chunk(network, cache, ids[begin : begin + chunk + 1], max(0, start - 1 - begin), top)


def _chunk(network: Network, cache: PrefixCache, ids: list[int], skipped: int, top: int) -> vocabulary.Scores:
    """Read all but the last of the ids, and score all but the first, without the first `skipped` of these."""
    hidden = network.encode(mx.array([ids[:-1]], mx.int32), cache)[0]  # [T, H]
    if skipped >= len(ids) - 1:
        mx.eval(cache.state)
        return vocabulary.Scores(logprobs=[], best=[], top=None)
    shaping = vocabulary.Shaping(cap=network.config.final_logit_softcapping, temperature=1.0)
    targets, table = mx.array(ids[1 + skipped :], mx.int32), network.decoder.embed_tokens
    found = vocabulary.score(hidden[skipped:], table, shaping, targets, top=top, tuning=network.tuning)
    mx.eval(cache.state)
    return found
