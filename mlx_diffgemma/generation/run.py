"""What both decodings share: the prefix, its prefill, the rows, and where the time went."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..errors import ConfigError, PromptError
from ..model.blocks import Block, Spans, chunk_end
from ..model.cache import PrefixCache
from ..model.network import Network
from .events import CanvasRow, Finished, Prefilled, Reader, Statistics
from .noise import Noise
from .settings import GenerationConfig

RESERVED = 8192  # tokens of an answer that buffers are made for at once; beyond, they grow by a quarter each time


Pictures = Sequence[Sequence[Block]]  # every prompt's, in order


def check_prompts(
    network: Network,
    prompts: list[list[int]],
    settings: GenerationConfig,
    behind: int,
    what: str,
    pictures: Pictures = (),
) -> int:
    """How many tokens fit behind the longest prompt; PromptError when they are fewer than `behind`, which is `what`,
    and for ids that the vocabulary does not have: nothing behind this looks at an id again."""
    limit = network.config.max_position_embeddings
    size = network.config.vocab_size
    check_ids(size, prompts)
    for name, ids in (("stop_ids", settings.stop_ids), ("pad_token_id", (settings.pad_token_id,))):
        if bad := [i for i in ids if i >= size]:
            raise ConfigError(f"{name} has the id {bad[0]}; this model's ids are 0 … {size - 1}.")
    if not prompts or not all(prompts):
        raise PromptError("the prompt has no tokens: give at least one (a chat template always does).")
    longest = max(map(len, prompts))
    if longest + behind > limit:
        seen = next((row for row, ids in zip(pictures, prompts, strict=False) if len(ids) == longest), ())
        raise PromptError(
            f"the prompt is {longest} tokens; with {what} it does not fit the model's context of"
            f" {limit}.\n{told_of_pictures(seen, limit - behind - longest)}Shorten it by at least"
            f" {longest + behind - limit} tokens."
        )
    return limit - longest


def told_of_pictures(pictures: Sequence[Block], room: int) -> str:
    """How long each picture of a prompt is, in a sentence; `room` is what there is beside the whole prompt."""
    if not pictures:
        return ""
    tokens = [picture.stop - picture.start for picture in pictures]
    each = ", ".join(map(str, tokens[:8])) + ", …" * (len(tokens) > 8)
    there_is = max(room + sum(tokens), 0)
    return f"{len(tokens)} pictures of {each} take {sum(tokens)} of them, where there is room for {there_is}. "


def check_ids(size: int, prompts: list[list[int]]) -> None:
    """Errors: PromptError for an id outside 0 … size − 1."""
    for number, prompt in enumerate(prompts):
        if prompt and not (0 <= min(prompt) and max(prompt) < size):
            bad = next(i for i in prompt if not 0 <= i < size)
            which = f"prompt {number + 1}" if len(prompts) > 1 else "the prompt"
            raise PromptError(
                f"{which} has the id {bad}; this model's ids are 0 … {size - 1}.\n"
                "If it was made of text, tokenizer and weights do not belong together."
            )


@dataclass(kw_only=True)
class Row:
    """One prompt's progress."""

    left: int  # tokens it may still get
    reason: str = ""  # empty while it runs
    stop_id: int | None = None  # the one that ended it
    canvases: list[CanvasRow] = field(default_factory=list)
    counted: int = 0  # tokens, as tokens_per_forward counts them

    def keep(self, ids: list[int], settings: GenerationConfig, *, last: bool) -> tuple[int, ...]:
        """What a running row keeps of new ids; sets why it ends, if it does. `last`: there is no room for more."""
        stop = next((i for i, token in enumerate(ids) if token in settings.stop_ids), len(ids))
        self.counted += sum(token != settings.pad_token_id for token in ids[: stop + 1])
        kept = ids[: min(stop, self.left)]
        self.left -= len(kept)
        if stop == len(kept) and stop < len(ids):
            self.reason, self.stop_id = "stop", ids[stop]
        elif self.left == 0 or last:
            self.reason = "length"
        return tuple(kept)


class Run:
    """One run. `room` is how many positions the prefix keeps free behind itself."""

    def __init__(
        self,
        network: Network,
        prompts: list[list[int]],
        settings: GenerationConfig,
        noise: Noise,
        reader: Reader,
        room: int,
        cache: PrefixCache | None,
        pictures: Pictures = (),
    ):
        self.network, self.settings, self.noise, self.reader = network, settings, noise, reader
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        padded = [[settings.pad_token_id] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
        self.padded = mx.array(padded, mx.int32)  # [B, P]
        rows = zip(padding, pictures or [()] * len(prompts), strict=True)
        self.pictures = [[replace(p, start=p.start + pad, stop=p.stop + pad) for p in row] for pad, row in rows]
        self.spans: list[Spans] = [[(p.start, p.stop) for p in row] for row in self.pictures]
        self.prompt_tokens = sum(map(len, prompts))
        if cache is not None and not cache.length < longest:
            raise PromptError(
                f"the prefix that was handed over holds {cache.length} tokens, expected fewer than the prompt has,"
                f" {longest}."
            )
        self.cache = cache or network.make_cache(len(prompts), padding, room)
        self.reused = self.cache.length
        self.rows = [Row(left=settings.max_tokens) for _ in prompts]
        self.steps = 0
        self._before = replace(network.experts.traffic)
        self.seconds = {"prefill": 0.0, "denoise": 0.0, "commit": 0.0}
        self.last: mx.array | None = None  # [B, 1, H]: the prefix's last hidden state, where it is needed

    def reserve(self, tokens: int) -> None:
        """Announce how many tokens will come behind the prompt; of very many, which seldom come, only the first."""
        self.cache.reserve(self.padded.shape[1] + min(tokens, RESERVED))

    def prefill(self, pauses: Sequence[int]) -> Iterator[Prefilled]:
        """Encode what the cache does not hold yet, chunk by chunk, so that memory does not grow with the prompt."""
        total = self.padded.shape[1]
        while self.cache.length < total:
            end = min(self.cache.length + self.settings.prefill_step_size, total)
            end = min((pause for pause in pauses if self.cache.length < pause < end), default=end)
            end = chunk_end(self.cache.length, end, self.spans)
            self.encode(*self._inputs(self.cache.length, end), last=end == total)
            yield Prefilled(tokens=end, total=total)

    def _inputs(self, start: int, end: int) -> tuple[mx.array, Sequence[Spans]]:
        """The prompt's tokens `start` … `end` − 1 as the network takes them: ids [B, T], or, with the soft tokens of
        the pictures among them, embeddings [B, T, H]; and where in every row those are."""
        ids = self.padded[:, start:end]
        here = [[picture for picture in row if start <= picture.start < end] for row in self.pictures]
        if not any(here):
            return ids, ()
        x = self.network.embed(ids)
        for row, pictures in enumerate(here):
            for picture in pictures:
                x[row, picture.start - start : picture.stop - start] = picture.features().astype(x.dtype)
        return x, [[(picture.start - start, picture.stop - start) for picture in row] for row in here]

    def encode(self, inputs: mx.array, blocks: Sequence[Spans] = (), *, last: bool = True) -> mx.array:
        """Add ids [B, T], or embeddings [B, T, H] with `blocks`, to the prefix → hidden states [B, T, H]. Its `last`
        one is kept if it will be needed."""
        hidden = self.network.encode(inputs, self.cache, blocks, self.settings.picture_mask)
        self.last = hidden[:, -1:] if last and self.settings.needs_last_hidden else None
        mx.eval(self.cache.state, *([] if self.last is None else [self.last]))
        return hidden

    def finish(self) -> Finished:
        canvases = [canvas for row in self.rows for canvas in row.canvases]
        traffic = self.network.experts.traffic
        statistics = Statistics(
            decoding=self.settings.decoding,
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
            read_bytes=traffic.nbytes - self._before.nbytes,
            waited_seconds=traffic.waited_seconds - self._before.waited_seconds,
            early_canvases=sum(canvas.early for canvas in canvases),
            departures=self.settings.departures,
        )
        results = [
            self.reader.conclude(number, row.reason, tuple(row.canvases), statistics)
            for number, row in enumerate(self.rows)
        ]
        reasons = tuple(row.reason for row in self.rows)
        return Finished(reasons=reasons, statistics=statistics, results=tuple(results))

    def timed(self, name: str, events: Iterator[Any]) -> Iterator[Any]:
        """The same events; only the time spent making them counts, not the time a consumer holds them."""
        while True:
            with self.clock(name):
                event = next(events, None)
            if event is None:
                return
            yield event

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
