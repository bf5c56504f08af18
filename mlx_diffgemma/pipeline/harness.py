"""A loaded model as EleutherAI's lm-eval sees one: log-likelihoods by the causal pass, texts by either decoding.

The one file that imports lm_eval; without it, importing this is an ImportError.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

from ..errors import ConfigError
from ..generation.settings import GenerationOptions
from .model import DiffusionGemma
from .results import Result

NO_EFFECT = {"do_sample", "temperature", "until", "max_gen_toks"}  # generation_kwargs that are read, or at rest here


class Harness(LM):
    """`options` are for every text that is written; seeds count up from `seed`, one a request."""

    def __init__(self, model: DiffusionGemma, *, batch_size: int, seed: int, options: GenerationOptions):
        super().__init__()
        self.model, self.batch_size, self.seed, self.options = model, batch_size, seed, options

    @property
    def tokenizer_name(self) -> str:
        """Part of the names under which lm-eval keeps requests."""
        return str(self.model.folder or "mlx_diffgemma").replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. Errors: ConfigError for one that is to be continued in the model's own turn."""
        if not add_generation_prompt:
            raise ConfigError("this task continues an answer that it begins itself; the chat template cannot say that.")
        return self.model.tokenizer.render(chat_history)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(context, continuation) → log-probability of the continuation, and whether it is greedy decoding's."""
        return [self._continuation(*request.args) for request in requests]

    def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        blanks = len(context) - len(context.rstrip())  # belong to the continuation's first token
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        ids, start = self._ids(context + continuation), len(self._ids(context))
        ids, start = self._fitting(ids, start)
        found = self.model.score_from(ids, max(start, 1))
        return found.total, found.best == found.tokens

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """(text,) → log-probability of all of it, in windows that overlap by half where it is too long."""
        limit = self.model.config.max_position_embeddings
        return [self.model.score_from(self._ids(r.args[0]), 1, stride=max(limit // 2, 1)).total for r in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """(context, generation_kwargs) → text up to the first of its `until`."""
        texts: list[str] = []
        for first, batch, most in _batches(requests, self.batch_size):
            prompts = [self._fitting(self._ids(request.args[0]), 0, most)[0] for request in batch]
            seeds = [self.seed + first + row for row in range(len(batch))]
            options: GenerationOptions = {"max_tokens": most, **self.options}
            results = self.model.generate([*prompts], seeds=seeds, **options)
            assert isinstance(results, list)  # for a list of prompts
            texts += [_cut(result, request.args[1]) for result, request in zip(results, batch, strict=True)]
        return texts

    def _ids(self, text: str) -> list[int]:
        """A text behind <bos>; a rendered conversation has it already."""
        return self.model.text_ids(text)

    def _fitting(self, ids: list[int], start: int, behind: int = 0) -> tuple[list[int], int]:
        """Without the tokens on the left that the context has no room for, as lm-eval asks."""
        limit = self.model.config.max_position_embeddings
        over = max(0, len(ids) + max(behind, 1) - limit)
        return ids[over:], max(start - over, 0)


def _batches(requests: Sequence[Any], size: int) -> Iterator[tuple[int, list[Any], int]]:
    """Neighbours that want as many tokens: where a batch begins, its requests, the tokens."""
    start = 0
    while start < len(requests):
        most = requests[start].args[1].get("max_gen_toks", 256)
        stop = start
        while stop < min(start + size, len(requests)) and requests[stop].args[1].get("max_gen_toks", 256) == most:
            stop += 1
        yield start, list(requests[start:stop]), most
        start = stop


def _cut(result: Result, wanted: dict[str, Any]) -> str:
    """The text up to the first stop string. Errors: ConfigError for a generation option that would be ignored."""
    if unknown := sorted(set(wanted) - NO_EFFECT):
        raise ConfigError(f"the task sets {unknown[0]} for its texts, which this model does not use.")
    until = wanted.get("until") or []
    found = (result.text.find(stop) for stop in ([until] if isinstance(until, str) else until) if stop)
    return result.text[: min((at for at in found if at >= 0), default=len(result.text))]
