"""What was asked of a model, checked once, and run: by itself or among others."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..errors import ConfigError, NoiseError, PromptError
from ..generation import engine
from ..generation.constraint.automaton import Constraint
from ..generation.constraint.conditioned import Guides
from ..generation.events import Event, Finished, Prefilled
from ..generation.noise import Noise, NoiseRecorder, RecordedNoise, SeededNoise
from ..generation.settings import Decoding, GenerationConfig, GenerationOptions
from ..model.blocks import Block
from ..model.cache import PrefixCache
from ..model.memory import weight_bytes
from ..model.network import Network
from ..model.table import unpacked_dtype
from ..text.pictures.images import Seen
from ..values import integer, many, optional, shown
from .choosing import choose
from .machine.fitting import check_memory
from .obeying import filling
from .obeying.constraints import Asked, Compiled, timed
from .obeying.drafts import Draft
from .prompts import PromptIds
from .results import Answers, Result

if TYPE_CHECKING:
    from .model import DiffusionGemma


class Randomness:
    """Where a run's randomness comes from: a seed, seeds, recorded noise, or the operating system."""

    def __init__(self, *, seed: int | None = None, seeds: list[int] | None = None, noise: Noise | None = None):
        given = [name for name, value in (("seed", seed), ("seeds", seeds), ("noise", noise)) if value is not None]
        if len(given) > 1:
            raise PromptError(f"{' and '.join(given)} both say where randomness comes from: give one.")
        self.seed = optional(integer()).read(seed, "seed", fault=PromptError)
        self.seeds = optional(many(integer())).read(seeds, "seeds", fault=PromptError)
        if noise is not None and not all(hasattr(noise, part) for part in ("canvas", "draws", "ids")):
            raise NoiseError(f"noise is {shown(noise)}, expected RecordedNoise, SeededNoise or the like.")
        self.noise = noise

    def of(self, rows: int, length: int, vocabulary: int, decoding: Decoding) -> tuple[Noise, Sequence[int | None]]:
        """The noise of `rows` rows with canvases of `length`, and their seeds. Errors: PromptError, NoiseError."""
        if self.noise is not None:
            if isinstance(self.noise, RecordedNoise):
                _check_recording(self.noise, rows, length, decoding)
                self.noise.check(vocabulary)
            return self.noise, [None] * rows
        if self.seeds is not None and len(self.seeds) != rows:
            raise PromptError(f"{len(self.seeds)} seeds for {rows} prompts: give one each.")
        first = secrets.randbelow(2**32) if self.seed is None else self.seed
        seeds = list(self.seeds) if self.seeds is not None else [first + row for row in range(rows)]
        return SeededNoise(seeds, length=length, vocabulary=vocabulary), seeds


def _check_recording(noise: RecordedNoise, rows: int, length: int, decoding: Decoding) -> None:
    """Errors: NoiseError for a recording of another decoding, batch or canvas."""
    if noise.decoding != decoding:
        raise NoiseError(f"{noise.name} was recorded of {noise.decoding} decoding; this run's is {decoding}.")
    if noise.batch_size != rows or (decoding == "diffusion" and noise.length != length):
        raise NoiseError(
            f"{noise.name} is for {noise.batch_size} prompts and canvases of {noise.length};"
            f" this run has {rows} and {length}."
        )


class Request:
    """What was asked for, checked: `events` runs it, once; `run` too, and chooses among answers."""

    def __init__(
        self,
        model: "DiffusionGemma",
        prompts: list[PromptIds],
        options: GenerationOptions,
        randomness: Randomness,
        asked: Asked,
        draft: Draft | None = None,
    ):
        self.model, self.draft = model, draft
        self.prompts = [prompt.ids for prompt in prompts]
        self.pictures = [prompt.pictures for prompt in prompts]
        self.network = self._network()
        self.departures: dict[str, Any] = {}  # from the reference, besides those of the settings
        self.settings = self._settings(options)
        self._length = self.settings.canvas_length or model.config.canvas_length
        self.keys = [prompt.key(self.settings.picture_mask) for prompt in prompts]
        tokens = engine.check(self.network, self.prompts, self.settings, self._blocks)
        self.constraints = self._compiled(asked)
        guides = Guides(self._constraints, len(prompts))
        guides.check(self.settings, model.config.vocab_size, tokens)
        self.noise, self.seeds = self._noise(randomness)
        if self.settings.chooses and randomness.noise is not None:
            raise ConfigError("best_of and retries draw other seeds: with recorded noise there are none.")
        self.check_memory()

    def _network(self) -> Network:
        """What runs it: the model's own network, unless its eyes came with another. Errors: PromptError where that
        would answer prompts without pictures, too."""
        if not any(self.pictures):
            return self.model.network
        network = self.model.seeing.network
        if network is not self.model.network and not all(self.pictures):
            raise PromptError(
                "this model answers prompts with pictures by other weights than those without: they do not go into one"
                " batch.\nGive them in two calls."
            )
        return network

    @property
    def seen(self) -> list[Seen]:
        """To what the pictures of all prompts were scaled."""
        return [placed.picture.seen for row in self.pictures for placed in row]

    @property
    def _blocks(self) -> list[list[Block]]:
        """The pictures, as the engine takes them."""
        return [self.model.seeing.blocks(row) for row in self.pictures] if any(self.pictures) else []

    def _noise(self, randomness: Randomness) -> tuple[Noise, Sequence[int | None]]:
        decoding, vocabulary = self.settings.decoding, self.model.config.vocab_size
        return randomness.of(len(self.prompts), self._length, vocabulary, decoding)

    @property
    def room(self) -> int:
        """Positions that a prefix made for this run keeps free behind itself."""
        return engine.room(self.settings, self.model.config.canvas_length)

    def refuse_choosing(self) -> None:
        """Errors: ConfigError when an answer would be chosen among several: there is nothing to show before."""
        if self.settings.chooses:
            name = "best_of" if self.settings.best_of > 1 else "retries"
            raise ConfigError(f"{name} chooses among whole answers, so they cannot be streamed.\nUse generate().")

    def _compiled(self, asked: Asked) -> list[Compiled | None]:
        languages, seconds = timed(asked, len(self.prompts))
        if not any(languages):
            return [None] * len(self.prompts)
        compiler = self.model.compiler
        rows = zip(languages, self.prompts, strict=True)
        return [
            language and compiler.compiled(language, prompt, self.settings, also=seconds) for language, prompt in rows
        ]

    @property
    def _constraints(self) -> list[Constraint | None] | None:
        """As the engine takes them."""
        made = [compiled and compiled.constraint for compiled in self.constraints]
        return made if any(made) else None

    def check_memory(self, *, forks: int = 0) -> None:
        """Errors: MemoryLimitError when the run does not fit beside so many forks of its prefix."""
        model, rows = self.model, len(self.prompts) * self.settings.best_of
        prefix = max(map(len, self.prompts)) + self.settings.max_tokens
        weights = weight_bytes(self.network) + self._kept_bytes()
        seen = [placed for row in self.pictures for placed in row]
        sight = model.seeing.memory(seen) if seen else None
        check_memory(self.network.own, weights, model.memory_limit, prefix, rows=rows, forks=forks, sight=sight)

    def _kept_bytes(self) -> int:
        """What a step under constraints holds for the signal: a weight of every id of a text at every position."""
        if self.settings.decoding != "diffusion":
            return 0
        sizes = [int((made.constraint.classes >= 0).sum()) for made in self.constraints if made]
        return (
            sum(sizes) * self.settings.best_of * self._length * unpacked_dtype(self.network.decoder.embed_tokens).size
        )

    def _settings(self, options: GenerationOptions) -> GenerationConfig:
        """The model's own with `options` over them. A `max_length`, of prompt and reply together, counts where nobody
        chose how long the reply may be, as in transformers (_prepare_generated_length)."""
        settings = self.model.generation_config.replace(**options)
        if self.draft and settings.free_steps is None and settings.decoding == "diffusion":
            settings = settings.replace(free_steps=0)  # what is around a hole says what the prompt may not
        if settings.max_length is None or settings.max_tokens != GenerationConfig.max_tokens or "max_tokens" in options:
            return settings
        longest = max(map(len, self.prompts), default=0)
        if settings.max_length <= longest:
            raise PromptError(
                f"the prompt is {longest} tokens; max_length allows {settings.max_length} together with the reply.\n"
                "Shorten it, or say how long the reply may be: max_tokens."
            )
        return settings.replace(max_tokens=settings.max_length - longest)

    def events(self, cache: PrefixCache | None = None, pauses: Sequence[int] = ()) -> Iterator[Event]:
        """The engine's events, with texts and results; `cache` and `pauses` as `engine.generate` has them.

        Holds the model while it runs (`DiffusionGemma.alone`). Errors: BusyError.
        """
        with self.model.alone():
            yield from self.events_among_others(cache, pauses)

    def events_among_others(self, cache: PrefixCache | None = None, pauses: Sequence[int] = ()) -> Iterator[Event]:
        """`events` for whoever holds the model already: in one thread several requests can take turns at any event.

        MLX's cache of freed buffers is emptied between the chunks of a prompt, whose buffers never fit the next,
        longer one.
        """
        reader = Answers(
            self.model._tokenizer,
            self.prompts,
            self.seeds,
            constraints=self.constraints,
            pictures=self.pictures,
            draft=self.draft,
            departures=self.departures,
            pace=self.model.pace,
        )
        for event in engine.generate(
            self.network,
            self.prompts,
            self.settings,
            self.noise,
            cache=cache,
            pauses=pauses,
            reader=reader,
            constraint=self._constraints,
            pictures=self._blocks,
        ):
            if isinstance(event, Prefilled) and event.tokens < event.total:
                mx.clear_cache()
            elif isinstance(event, Finished):
                self.model.pace.note(event.statistics, rows=len(self.prompts))
            yield event

    def start_from(self, ids: list[int]) -> None:
        """Let the first canvas begin with `ids`, and not as noise; the statistics say so. Errors: ConfigError."""
        if self.settings.decoding != "diffusion":
            raise ConfigError("start='text' would do nothing: autoregressive decoding has no canvas.")
        if self.settings.chooses:
            raise ConfigError("best_of and retries draw other noise: a canvas that begins as a text has little.")
        stop_id, pad_id = self.settings.stop_ids[0], self.settings.pad_token_id
        self.noise = filling.StartingFrom(self.noise, ids, stop_id=stop_id, pad_id=pad_id)
        self.departures = {"start": "text"}

    def first_canvas(self, index: int) -> list[int]:
        """The ids that the first row's canvas `index` starts from: what can be shown of it before its first step."""
        return cast(list[int], self.noise.canvas(index)[0].tolist())

    def record(self) -> NoiseRecorder:
        """Have the run's noise kept, to be saved behind it."""
        self.noise = recorder = NoiseRecorder(self.noise)
        return recorder

    def run(self, events: "Callable[[Request], Iterator[Event]] | None" = None) -> list[Result]:
        """All of it; one Result a prompt: with best_of or retries, of the answer with the best mean log-probability.
        `events`: another way of running a request than by its own `events`."""
        run = events or Request.events
        if self.settings.chooses:
            return choose(self.settings, self.seeds, lambda prompts, seeds: _results(run(self._part(prompts, seeds))))
        return _results(run(self))

    def _part(self, prompts: list[int], seeds: list[int]) -> "Request":
        """The prompts of these numbers, for these seeds."""
        request = copy(self)
        request.prompts = [self.prompts[number] for number in prompts]
        request.pictures = [self.pictures[number] for number in prompts]
        request.constraints = [self.constraints[number] for number in prompts]
        request.noise, request.seeds = request._noise(Randomness(seeds=seeds))
        return request


def _results(events: Iterator[Event]) -> list[Result]:
    return next(list(event.results) for event in events if isinstance(event, Finished))
