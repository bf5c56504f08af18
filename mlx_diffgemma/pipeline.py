"""Text in, text out: joins tokenizer, engine and network."""

import bisect
import dataclasses
import math
import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import mlx.core as mx
from mlx.utils import tree_flatten

from . import checkpoint, engine, quantize
from .cache import PrefixCache, Snapshot
from .config import GenerationConfig, ModelConfig
from .engine import CanvasRow, Committed, Event, Finished, Prefilled, Statistics
from .errors import BusyError, ConfigError, MemoryLimitError, NoiseError, PromptError, TokenizerError
from .network import Network
from .noise import Noise, RecordedNoise, SeededNoise
from .tokenizer import Message, Tokenizer

Prompt = str | list[Message] | list[int]

Trunk = Literal["auto", "packed", "bf16"]
ROOMY_PREFIX = 32_768  # tokens of prefix that must still fit for the trunk to be unpacked by itself
CACHE_LIMIT = 1 << 30  # bytes of freed buffers MLX may keep for reuse


@dataclass(frozen=True, kw_only=True)
class Result:
    """One prompt's answer."""

    text: str  # without thinking and tool calls
    thinking: str | None
    tool_calls: list[dict[str, Any]]  # {"name": …, "arguments": {…}}
    tokens: tuple[int, ...]  # everything generated, without the stop id
    finish_reason: str  # "stop" or "length"
    canvases: tuple[CanvasRow, ...]
    stats: Statistics  # of the whole run: in a batch, of all rows together
    seed: int | None  # None when the noise was recorded


def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    trunk: Trunk = "auto",
    memory_limit: int | None = None,
) -> "DiffusionGemma":
    """Load a model: a pack made by `mlx_diffgemma.convert`, an mlx-community pack, or a Hugging Face folder.

    `adapter` is a folder written by `mlx_diffgemma.train`. `trunk` says how everything but the experts is held:
    "packed" as the pack has it, "bf16" unpacked (the same values, faster products, more memory), "auto" unpacked
    on a GPU with room for it. `memory_limit` in bytes is this process's budget, instead of what the machine has.
    Errors: CheckpointError, ConfigError, MemoryLimitError.
    """
    folder = checkpoint.resolve(path_or_repo, revision=revision)
    config, limit = checkpoint.read_config(folder), memory_limit or machine_limit()
    _check_memory(config, sum(file.stat().st_size for file in folder.glob("*.safetensors")), limit)
    network = checkpoint.load_network(folder)
    _settle_trunk(network, trunk, limit)
    if adapter is not None:
        from . import adapters

        adapters.load(network, Path(adapter))
    try:
        tokenizer = Tokenizer.load(folder)
    except TokenizerError:
        tokenizer = None
    generation_config = checkpoint.read_generation_config(folder)
    if tokenizer is not None:
        stop_ids = tuple(dict.fromkeys((*generation_config.stop_ids, *tokenizer.stop_ids)))
        generation_config = generation_config.replace(stop_ids=stop_ids)
    mx.set_cache_limit(CACHE_LIMIT)
    return DiffusionGemma(network, tokenizer, generation_config, folder=folder, memory_limit=limit)


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
        _check_memory(self.config, _weight_bytes(self.network), self.memory_limit, prefix, rows=len(prompts))
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                "this model is generating already; a model serves one thread at a time.\n"
                "Wait for it, close its stream, or give both prompts to one generate([…]) call."
            )
        try:
            answers = [_Answer(self._tokenizer, prompt) for prompt in prompts]
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


def machine_limit() -> int:
    """Bytes this process may use: what Metal lends it, else the memory of the GPU or of the machine."""
    info = mx.device_info()
    lent = info.get("max_recommended_working_set_size") or info.get("total_memory")
    return int(lent or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _weight_bytes(network: Network) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(network.parameters())).values())


def _settle_trunk(network: Network, trunk: Trunk, limit: int) -> None:
    """Unpack the trunk if it was asked for, or if there is a GPU and room for a long prefix beside it.

    Errors: ConfigError for a word that is none of the three, or when there is nothing to unpack.
    """
    if trunk not in get_args(Trunk):
        raise ConfigError(f"trunk is {trunk!r}, expected {', '.join(map(repr, get_args(Trunk)))}.")
    growth = quantize.unpacked_growth(network)
    if trunk == "bf16" and not growth:
        raise ConfigError("trunk='bf16' would do nothing: this pack's trunk is not packed.")
    roomy = quantize.memory_needed(network.config, _weight_bytes(network) + growth, ROOMY_PREFIX) <= limit
    if trunk == "bf16" or (trunk == "auto" and growth and roomy and mx.default_device() == mx.gpu):
        quantize.unpack_trunk(network)


def _check_memory(config: ModelConfig, weights: int, limit: int, prefix: int = 0, *, rows: int = 1) -> None:
    """Errors: MemoryLimitError when the weights, or they and the context, cannot fit; says what would."""

    def needed(prefix: int) -> int:
        whole = quantize.memory_needed(config, weights, prefix)
        return whole + (rows - 1) * (whole - quantize.memory_needed(config, weights, 0))

    if needed(0) > limit:
        parameters = sum(math.prod(shape) for shape in checkpoint.expected_tensors(config).values())
        bits = 8 * max(limit - needed(0) + weights, 0) / parameters
        fits = f"A pack of at most {bits:.1f} bits a weight would fit" if bits > 2 else "No recipe is small enough"
        hint = ", or raise the limit: sudo sysctl iogpu.wired_limit_mb=…" if mx.metal.is_available() else "."
        raise MemoryLimitError(
            f"this model needs {needed(0) / 1e9:.1f} GB and this machine lets it use {limit / 1e9:.1f} GB.\n"
            f"{fits}: see mlx_diffgemma.convert --dry-run{hint}"
        )
    if needed(prefix) > limit:
        fits = bisect.bisect_right(range(prefix), limit, key=needed) - 1
        raise MemoryLimitError(
            f"the model and a context of {prefix} tokens need {needed(prefix) / 1e9:.1f} GB; this machine lets it use"
            f" {limit / 1e9:.1f} GB.\nUp to {fits} tokens of prompt and reply would fit."
        )


class Chat:
    """A conversation. Thoughts of earlier turns are left out of its history, as the model's card asks."""

    def __init__(self, model: DiffusionGemma, system: str | None, options: dict[str, Any]):
        self.model, self.options = model, options
        self.system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages: list[Message] = list(self.system)
        self._cache: PrefixCache | None = None
        self._known: list[int] = []  # the ids the snapshot holds
        self._snapshot: Snapshot | None = None

    def send(self, text: str, **options: Any) -> Result:
        """Say something; returns the answer. `options` are for this turn only."""
        result = None
        for event in self.stream(text, **options):
            if isinstance(event, Finished):
                result = event.result
        assert result is not None  # the engine's last event is Finished
        return result

    def stream(self, text: str, **options: Any) -> Iterator[Event]:
        """`send`, as events. A turn that is not finished leaves no trace in the history."""
        messages = [*self.messages, {"role": "user", "content": text}]
        options = {**self.options, **options}
        template = {k: options.pop(k, None) for k in ("enable_thinking", "tools")}
        run = {k: options.pop(k, None) for k in ("seed", "noise")}
        ids = self.model.ids(messages, **template)
        lasting = self._lasting(ids, messages, template)
        cache = self._rewind(ids, options)
        for event in self.model._events([ids], options=options, cache=cache, pause_at=lasting, **run):
            if isinstance(event, Prefilled) and event.tokens == lasting:
                self._known, self._snapshot = ids[:lasting], cache.snapshot()
            elif isinstance(event, Finished):
                event = dataclasses.replace(event, result=event.result[0])
                answer: Message = {"role": "assistant", "content": event.result.text}
                if event.result.tool_calls:
                    answer["tool_calls"] = [{"type": "function", "function": c} for c in event.result.tool_calls]
                self.messages = [*messages, answer]
            yield event

    def _lasting(self, ids: list[int], messages: list[Message], template: dict[str, Any]) -> int:
        """How many of the prompt's ids the next turn's prompt will begin with, whatever the answer is.

        Nearly all; but a template may open the model's turn in another way than it writes down its history.
        """
        later = self.model.ids([*messages, {"role": "assistant", "content": "."}], **template)
        pairs = enumerate(zip(ids, later, strict=False))
        return next((i for i, (now, then) in pairs if now != then), min(len(ids), len(later)))

    def _rewind(self, ids: list[int], options: dict[str, Any]) -> PrefixCache:
        """The cache, back where the last prompt and this one part, or a new one if that is not known."""
        known = len(self._known)
        if self._cache is not None and self._snapshot is not None and known < len(ids) and ids[:known] == self._known:
            self._cache.restore(self._snapshot)
        else:
            self._cache = self.model.network.make_cache(canvas_length=options.get("canvas_length"))
            self._known, self._snapshot = [], None
        return self._cache


class _Answer:
    """What one row has said so far."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: list[int]):
        self.tokenizer = tokenizer
        self.open_channel = tokenizer is not None and tokenizer.opens_channel(prompt)
        self.tokens: list[int] = []
        self.canvases: list[CanvasRow] = []
        self.shown = ("", "")

    def add(self, row: CanvasRow) -> tuple[str, str]:
        """Take in a canvas; returns the text and the thoughts that became visible. Half a UTF-8 character waits for
        its rest."""
        if row.steps:
            self.canvases.append(row)
        self.tokens += row.ids
        if self.tokenizer is None:
            return "", ""
        parts = self.tokenizer.split(self.tokens, open_channel=self.open_channel)
        text, thinking = (t if row.reason else t.rstrip("\ufffd") for t in (parts.text, parts.thinking or ""))
        shown, self.shown = self.shown, (text, thinking)
        return text[len(shown[0]) :], thinking[len(shown[1]) :]

    def result(self, reason: str, statistics: Statistics, seed: int | None) -> Result:
        text, thinking, calls = "", None, []
        if self.tokenizer is not None:
            parts = self.tokenizer.split(self.tokens, open_channel=self.open_channel)
            text, thinking, calls = parts.text, parts.thinking, parts.tool_calls
        return Result(
            text=text,
            thinking=thinking,
            tool_calls=calls,
            tokens=tuple(self.tokens),
            finish_reason=reason,
            canvases=tuple(self.canvases),
            stats=statistics,
            seed=seed,
        )


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
