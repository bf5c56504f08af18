"""Several answers to one prompt, and the one that the causal pass finds likeliest, by the mean over its tokens: the sum
would favour short ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from ..generation.events import Statistics
from ..generation.settings import GenerationConfig
from .results import Result

RETRY_BELOW = math.log(0.1)  # nats: one token less likely than that, and another answer is drawn

Answer = Callable[[list[int], list[int]], list[Result]]  # numbers of prompts, and a seed for each → their results


def choose(settings: GenerationConfig, seeds: Sequence[int | None], answer: Answer) -> list[Result]:
    """One result a prompt, after settings.best_of answers or up to settings.retries more than one.

    Attempt k of a prompt has its seed + k · prompts, so that no two answers share one where seeds are in a row.
    """
    first = [cast(int, seed) for seed in seeds]
    count = len(first)
    attempts: list[list[Result]] = [[] for _ in first]

    def more(prompts: list[int], tries: int) -> list[Statistics]:
        """So many more answers to these prompts, in one batch."""
        asked = [number for number in prompts for _ in range(tries)]
        begun = [len(attempts[number]) for number in prompts for _ in range(tries)]
        shifts = [done + k % tries for k, done in enumerate(begun)]
        found = answer(asked, [first[number] + shift * count for number, shift in zip(asked, shifts, strict=True)])
        for number, result in zip(asked, found, strict=True):
            attempts[number].append(result)
        return [found[0].statistics]

    spent = more(list(range(count)), settings.best_of)
    for _ in range(settings.retries):
        if doubtful := [number for number, found in enumerate(attempts) if _is_doubtful(_best(found))]:
            spent += more(doubtful, 1)
    kept = [_best(found) for found in attempts]
    statistics = _together(spent, kept, sum(map(len, attempts)) / count)
    return [replace(result, statistics=statistics) for result in kept]


def _best(found: list[Result]) -> Result:
    """The first of those with the best mean; an answer without any token is the last choice."""
    return max(found, key=lambda result: -math.inf if result.avg_logprob is None else result.avg_logprob)


def _is_doubtful(result: Result) -> bool:
    return min(result.logprobs or (-math.inf,)) < RETRY_BELOW


def _together(runs: list[Statistics], kept: list[Result], attempts: float) -> Statistics:
    """All runs as one: their time and steps, and the tokens of the answers that were kept."""
    forwards = sum(run.steps for run in runs)
    return replace(
        runs[0],
        prompt_tokens=sum(run.prompt_tokens for run in runs),
        reused_tokens=sum(run.reused_tokens for run in runs),
        generated_tokens=sum(len(result.tokens) for result in kept),
        steps=forwards,
        prefill_seconds=sum(run.prefill_seconds for run in runs),
        denoise_seconds=sum(run.denoise_seconds for run in runs),
        commit_seconds=sum(run.commit_seconds for run in runs),
        tokens_per_forward=sum(run.tokens_per_forward * run.steps for run in runs) / max(forwards, 1),
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
        early_canvases=sum(run.early_canvases for run in runs),
        attempts=attempts,
    )
