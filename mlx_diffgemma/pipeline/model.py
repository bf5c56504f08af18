"""Text in, text out: joins tokenizer, engine and network."""

import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

import mlx.core as mx

from ..config import ModelConfig
from ..errors import BusyError, NoiseError, PromptError
from ..generation import engine
from ..generation.events import Event, Finished, Prefilled
from ..generation.noise import Noise, NoiseRecorder, RecordedNoise, SeededNoise
from ..generation.settings import GenerationConfig, GenerationOptions
from ..model.cache import PrefixCache
from ..model.memory import machine_limit, weight_bytes
from ..model.network import Network
from ..text.tokenizer import Message, Tokenizer
from .chat import Chat
from .fitting import check_memory
from .results import Answers, Result

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
        template_options: dict[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Result | list[Result]:
        """Generate for one prompt (→ Result) or several at once (→ list of Results).

        A prompt is text, chat messages, or ids; text becomes a user message. `options` are GenerationConfig's,
        `template_options` further variables of the chat template. A batch's `seeds` give each row the noise of its own
        single run; `seed` gives rows seed, seed + 1, …
        Errors: ConfigError for an option that does not exist, PromptError, TokenizerError, BusyError.
        """
        request = self.prepare(
            prompt,
            seed=seed,
            seeds=seeds,
            noise=noise,
            enable_thinking=enable_thinking,
            tools=tools,
            template_options=template_options,
            **options,
        )
        results = request.run()
        return results if _is_batch(prompt) else results[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        seed: int | None = None,
        noise: Noise | None = None,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Event]:
        """The events of one generation as they happen: Prefilled, Denoised after every step, Committed with the
        text that became visible, Finished with the Result. Closing the iterator stops within a step. Errors: as
        `generate`, all but BusyError before the first event."""
        request = self.prepare(
            prompt,
            seed=seed,
            noise=noise,
            enable_thinking=enable_thinking,
            tools=tools,
            template_options=template_options,
            **options,
        )
        return request.events()

    def prepare(
        self,
        prompt: Prompt | list[Prompt],
        *,
        seed: int | None = None,
        seeds: list[int] | None = None,
        noise: Noise | None = None,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> "Request":
        """Check everything that `generate` would, and run nothing yet. Errors: as `generate`, but for BusyError."""
        each = cast(list[Prompt], prompt if _is_batch(prompt) else [prompt])
        prompts = [
            self.ids(p, enable_thinking=enable_thinking, tools=tools, template_options=template_options) for p in each
        ]
        return Request(self, prompts, options, Randomness(seed=seed, seeds=seeds, noise=noise))

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """A conversation that prefills only what is new in each turn. `options` as in `generate`."""
        return Chat(self, system, options)

    def ids(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> list[int]:
        """A prompt as ids. Errors: PromptError for one that is neither text, messages nor ids of this model."""
        if isinstance(prompt, list) and prompt and all(isinstance(i, int) for i in prompt):
            size = self.config.vocab_size
            ids = cast(list[int], prompt)
            if bad := [i for i in ids if not 0 <= i < size]:
                raise PromptError(f"the prompt has the id {bad[0]}; this model's ids are 0 … {size - 1}.")
            if enable_thinking is not None or tools is not None or template_options:
                raise PromptError(
                    "enable_thinking, tools and template_options go to the chat template; a prompt of ids has none."
                )
            return list(ids)
        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise PromptError(
                "a prompt is text, a list of messages {'role': …, 'content': …}, or a list of ids;"
                f" got {str(prompt)[:60]!r}."
            )
        return self.tokenizer.apply_chat_template(
            messages, enable_thinking=enable_thinking, tools=tools, template_options=template_options
        )


class Randomness:
    """Where a run's randomness comes from: a seed, seeds, recorded noise, or the operating system."""

    def __init__(self, *, seed: int | None = None, seeds: list[int] | None = None, noise: Noise | None = None):
        given = [name for name, value in (("seed", seed), ("seeds", seeds), ("noise", noise)) if value is not None]
        if len(given) > 1:
            raise PromptError(f"{' and '.join(given)} both say where randomness comes from: give one.")
        self.seed, self.seeds, self.noise = seed, seeds, noise

    def of(self, rows: int, length: int, vocabulary: int) -> tuple[Noise, Sequence[int | None]]:
        """The noise of `rows` rows with canvases of `length`, and their seeds. Errors: PromptError, NoiseError."""
        if self.noise is not None:
            if isinstance(self.noise, RecordedNoise) and (self.noise.batch_size, self.noise.length) != (rows, length):
                raise NoiseError(
                    f"{self.noise.name} is for {self.noise.batch_size} prompts and canvases of {self.noise.length};"
                    f" this run has {rows} and {length}."
                )
            return self.noise, [None] * rows
        if self.seeds is not None and len(self.seeds) != rows:
            raise PromptError(f"{len(self.seeds)} seeds for {rows} prompts: give one each.")
        first = secrets.randbelow(2**32) if self.seed is None else self.seed
        seeds = list(self.seeds) if self.seeds is not None else [first + row for row in range(rows)]
        return SeededNoise(seeds, length=length, vocabulary=vocabulary), seeds


class Request:
    """What was asked for, checked: `events` runs it, once."""

    def __init__(
        self, model: DiffusionGemma, prompts: list[list[int]], options: GenerationOptions, randomness: Randomness
    ):
        self.model, self.prompts = model, prompts
        self.settings = model.generation_config.replace(**options)
        length = self.settings.canvas_length or model.config.canvas_length
        engine.count_canvases(model.network, prompts, self.settings, length)
        self.noise, self.seeds = randomness.of(len(prompts), length, model.config.vocab_size)
        self.check_memory()

    def check_memory(self, *, forks: int = 0) -> None:
        """Errors: MemoryLimitError when the run does not fit beside so many forks of its prefix."""
        model, rows = self.model, len(self.prompts)
        prefix = max(map(len, self.prompts)) + self.settings.max_tokens
        check_memory(model.config, weight_bytes(model.network), model.memory_limit, prefix, rows=rows, forks=forks)

    def events(self, cache: PrefixCache | None = None, pause_at: int | None = None) -> Iterator[Event]:
        """The engine's events, with texts and results; `cache` and `pause_at` as `engine.generate` has them.

        Holds the model's lock while it runs. MLX's cache of freed buffers is emptied between the chunks of a prompt,
        whose buffers never fit the next, longer one, and at the end. Errors: BusyError.
        """
        if not self.model._lock.acquire(blocking=False):
            raise BusyError(
                "this model is generating already; a model serves one thread at a time.\n"
                "Wait for it, close its stream, or give both prompts to one generate([…]) call."
            )
        try:
            reader = Answers(self.model._tokenizer, self.prompts, self.seeds)
            for event in engine.generate(
                self.model.network,
                self.prompts,
                self.settings,
                self.noise,
                cache=cache,
                pause_at=pause_at,
                reader=reader,
            ):
                if isinstance(event, Prefilled) and event.tokens < event.total:
                    mx.clear_cache()
                yield event
        finally:
            self.model._lock.release()
            mx.clear_cache()

    def record(self) -> NoiseRecorder:
        """Have the run's noise kept, to be saved behind it."""
        self.noise = recorder = NoiseRecorder(self.noise)
        return recorder

    def run(self) -> list[Result]:
        """All of it; one Result a row."""
        return next(list(event.results) for event in self.events() if isinstance(event, Finished))


def _is_batch(prompt: Prompt | list[Prompt]) -> bool:
    """A list whose entries are prompts themselves: texts, message lists or id lists."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
