"""Text in, text out: joins tokenizer, engine and network."""

import dataclasses
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..config import ModelConfig
from ..errors import BusyError, NoiseError, PromptError
from ..generation import engine
from ..generation.events import Committed, Event, Finished
from ..generation.noise import Noise, RecordedNoise, SeededNoise
from ..generation.settings import GenerationConfig
from ..model.cache import PrefixCache
from ..model.memory import machine_limit, weight_bytes
from ..model.network import Network
from ..text.tokenizer import Message, Tokenizer
from .chat import Chat
from .fitting import check_memory
from .results import Answer, Result

Prompt = str | list[Message] | list[int]


class DiffusionGemma:
    """A loaded model. One thread generates at a time; a second one gets BusyError, never a mixed canvas."""

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer | None,
        generation_config: GenerationConfig,
        *,
        folder: Path | None = None,
        memory_limit: int | None = None,
    ):
        self.network, self._tokenizer, self.generation_config = network, tokenizer, generation_config
        self.folder, self.memory_limit = folder, memory_limit or machine_limit()
        self._lock = threading.Lock()

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Errors: TokenizerError when it ships none."""
        if self._tokenizer is None:
            return Tokenizer.load(self.folder or Path("."))  # raises, and says what is missing
        return self._tokenizer

    def generate(
        self,
        prompt: Prompt | list[Prompt],
        *,
        seed: int | None = None,
        seeds: list[int] | None = None,
        noise: Noise | None = None,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> Result | list[Result]:
        """Generate for one prompt (→ Result) or several at once (→ list of Results).

        A prompt is text, chat messages, or ids; text becomes a user message. `options` are GenerationConfig's.
        A batch's `seeds` give each row the noise of its own single run; `seed` gives rows seed, seed + 1, …
        Errors: ConfigError for an option that does not exist, PromptError, TokenizerError, BusyError.
        """
        batch = _is_batch(prompt)
        each = cast(list[Prompt], prompt if batch else [prompt])
        prompts = [self.ids(p, enable_thinking=enable_thinking, tools=tools) for p in each]
        results: list[Result] = []
        for event in self._events(prompts, seed=seed, seeds=seeds, noise=noise, options=options):
            if isinstance(event, Finished):
                results = event.result
        return results if batch else results[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        seed: int | None = None,
        noise: Noise | None = None,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> Iterator[Event]:
        """The events of one generation as they happen: Prefilled, Denoised after every step, Committed with the
        text that became visible, Finished with the Result. Closing the iterator stops within a step."""
        ids = self.ids(prompt, enable_thinking=enable_thinking, tools=tools)
        for event in self._events([ids], seed=seed, noise=noise, options=options):
            yield dataclasses.replace(event, result=event.result[0]) if isinstance(event, Finished) else event

    def chat(self, system: str | None = None, **options: Any) -> "Chat":
        """A conversation that prefills only what is new in each turn. `options` as in `generate`."""
        return Chat(self, system, options)

    def ids(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """A prompt as ids. Errors: PromptError for one that is neither text, messages nor ids of this model."""
        if isinstance(prompt, list) and prompt and all(isinstance(i, int) for i in prompt):
            size = self.config.vocab_size
            ids = cast(list[int], prompt)
            if bad := [i for i in ids if not 0 <= i < size]:
                raise PromptError(f"the prompt has the id {bad[0]}; this model's ids are 0 … {size - 1}.")
            if enable_thinking is not None or tools is not None:
                raise PromptError("enable_thinking and tools go to the chat template; a prompt of ids has none.")
            return list(ids)
        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise PromptError(
                "a prompt is text, a list of messages {'role': …, 'content': …}, or a list of ids;"
                f" got {str(prompt)[:60]!r}."
            )
        return self.tokenizer.apply_chat_template(messages, enable_thinking=enable_thinking, tools=tools)

    def _events(
        self,
        prompts: list[list[int]],
        *,
        options: dict[str, Any],
        seed: int | None = None,
        seeds: list[int] | None = None,
        noise: Noise | None = None,
        cache: PrefixCache | None = None,
        pause_at: int | None = None,
    ) -> Iterator[Event]:
        """The engine's events, with text and results filled in; holds the lock while it runs."""
        settings = self.generation_config.replace(**options)
        seeds = _seeds(len(prompts), seed, seeds, noise)
        length = settings.canvas_length or self.config.canvas_length
        if noise is None:
            noise = SeededNoise(seeds, length=length, vocabulary=self.config.vocab_size)
        elif isinstance(noise, RecordedNoise) and (noise.batch_size, noise.length) != (len(prompts), length):
            raise NoiseError(
                f"{noise.name} is for {noise.batch_size} prompts and canvases of {noise.length};"
                f" this run has {len(prompts)} and {length}."
            )
        prefix = max(map(len, prompts)) + settings.max_tokens
        check_memory(self.config, weight_bytes(self.network), self.memory_limit, prefix, rows=len(prompts))
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                "this model is generating already; a model serves one thread at a time.\n"
                "Wait for it, close its stream, or give both prompts to one generate([…]) call."
            )
        try:
            answers = [Answer(self._tokenizer, prompt) for prompt in prompts]
            for event in engine.generate(self.network, prompts, settings, noise, cache, pause_at):
                if isinstance(event, Committed):
                    parts = [answer.add(row) for answer, row in zip(answers, event.rows, strict=True)]
                    event = dataclasses.replace(event, text=parts[0][0], thinking=parts[0][1])
                elif isinstance(event, Finished):
                    rows = zip(answers, event.reasons, seeds or [None] * len(prompts), strict=True)
                    event = dataclasses.replace(event, result=[a.result(r, event.statistics, s) for a, r, s in rows])
                yield event
        finally:
            self._lock.release()
            mx.clear_cache()


def _is_batch(prompt: Prompt | list[Prompt]) -> bool:
    """A list whose entries are prompts themselves: texts, message lists or id lists."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def _seeds(rows: int, seed: int | None, seeds: list[int] | None, noise: Noise | None) -> list[int]:
    """One seed per row; none when the noise is given. A fresh one is drawn from the operating system."""
    given = [name for name, value in (("seed", seed), ("seeds", seeds), ("noise", noise)) if value is not None]
    if len(given) > 1:
        raise PromptError(f"{' and '.join(given)} both say where randomness comes from: give one.")
    if noise is not None:
        return []
    if seeds is not None:
        if len(seeds) != rows:
            raise PromptError(f"{len(seeds)} seeds for {rows} prompts: give one each.")
        return list(seeds)
    first = secrets.randbelow(2**32) if seed is None else seed
    return [first + row for row in range(rows)]
