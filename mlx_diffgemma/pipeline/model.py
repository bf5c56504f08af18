"""Text in, text out: joins tokenizer, engine and network."""

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack, cast, get_args

import mlx.core as mx

from ..config import ModelConfig
from ..errors import BusyError, ConfigError, NoiseError, PromptError, TokenizerError
from ..generation import engine
from ..generation.constraint.automaton import Constraint
from ..generation.constraint.conditioned import Guides
from ..generation.events import Event, Finished, Prefilled
from ..generation.noise import Noise, NoiseRecorder, RecordedNoise, SeededNoise
from ..generation.settings import Decoding, GenerationConfig, GenerationOptions
from ..model import threads
from ..model.cache import PrefixCache
from ..model.memory import machine_limit, weight_bytes
from ..model.network import Network
from ..model.table import unpacked_dtype
from ..text.gate import Message, check_messages, check_text, check_tools
from ..text.language.automaton import Language
from ..text.language.texts import MARK, Hole
from ..text.tokenizer import Tokenizer
from ..values import flag, integer, many, optional, shown
from . import deciding, filling
from .chat import Chat
from .choosing import choose
from .constraints import Asked, Compiled, Compiler, timed
from .deciding import Decision
from .drafts import Draft
from .filling import Start
from .fitting import check_memory
from .pace import Pace
from .results import Answers, Result
from .scores import TextScores, score_ids

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
        notices: tuple[str, ...] = (),
    ):
        self.network, self._tokenizer, self.generation_config = network, tokenizer, generation_config
        self.folder, self.memory_limit = folder, memory_limit or machine_limit()
        self.pace = Pace(self.config.canvas_length)
        self.notices = notices  # what the checkpoint says that does nothing here, in a sentence each
        self._lock = threading.Lock()

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @cached_property
    def compiler(self) -> Compiler:
        """What turns languages into this model's constraints. Errors: TokenizerError."""
        return Compiler(self.tokenizer, self.config.vocab_size)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Errors: TokenizerError when it ships none."""
        if self._tokenizer is None:
            return Tokenizer.load(self.folder or Path("."))  # raises, and says what is missing
        return self._tokenizer

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the model; MLX's cache of freed buffers is emptied at the end. Errors: BusyError while another does."""
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                "this model is generating already; a model serves one thread at a time.\n"
                "Wait for it, close its stream, or give both prompts to one generate([…]) call."
            )
        threads.clear_at_the_end()
        try:
            yield
        finally:
            self._lock.release()
            mx.clear_cache()

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
        sanitize_control_tokens: bool = False,
        constraint: Language | Sequence[Language | None] | None = None,
        json_schema: Any = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        tool_choice: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Result | list[Result]:
        """Generate for one prompt (→ Result) or several at once (→ list of Results).

        A prompt is text, chat messages, or ids; text becomes a user message. With `sanitize_control_tokens` the control
        tokens in messages and tools are plain text. `options` are GenerationConfig's, `template_options` further
        variables of the chat template.
        A batch's `seeds` give each row the noise of its own single run; `seed` gives rows seed, seed + 1, …
        What the answer may be: `constraint`, a language for all prompts or one (or None) each; or `json_schema` (a
        dict, JSON text or a pydantic model), a `regex` for the whole answer, `choices`, or `tool_choice` ("required",
        or the name of one of the `tools`). A thought before the answer stays free.
        Errors: ConfigError for an option that does not exist or a constraint that cannot be met, PromptError,
        TokenizerError, BusyError.
        """
        request = self.prepare(
            prompt,
            seed=seed,
            seeds=seeds,
            noise=noise,
            enable_thinking=enable_thinking,
            tools=tools,
            template_options=template_options,
            sanitize_control_tokens=sanitize_control_tokens,
            constraint=constraint,
            json_schema=json_schema,
            regex=regex,
            choices=choices,
            tool_choice=tool_choice,
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
        sanitize_control_tokens: bool = False,
        constraint: Language | Sequence[Language | None] | None = None,
        json_schema: Any = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        tool_choice: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Event]:
        """The events of one generation as they happen: Prefilled, Denoised after every step, Committed with the
        text that became visible, Finished with the Result. Closing the iterator stops within a step. Errors: as
        `generate`, all but BusyError before the first event; ConfigError for best_of and retries, which choose among
        whole answers. Autoregressive decoding gives a Committed for every token, and no Denoised."""
        request = self.prepare(
            prompt,
            seed=seed,
            noise=noise,
            enable_thinking=enable_thinking,
            tools=tools,
            template_options=template_options,
            sanitize_control_tokens=sanitize_control_tokens,
            constraint=constraint,
            json_schema=json_schema,
            regex=regex,
            choices=choices,
            tool_choice=tool_choice,
            **options,
        )
        request.refuse_choosing()
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
        sanitize_control_tokens: bool = False,
        constraint: Language | Sequence[Language | None] | None = None,
        json_schema: Any = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        tool_choice: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> "Request":
        """Check everything that `generate` would, and run nothing yet. Errors: as `generate`, but for BusyError."""
        each = cast(list[Prompt], prompt if _is_batch(prompt) else [prompt])
        template: Any = {"enable_thinking": enable_thinking, "tools": tools, "template_options": template_options}
        prompts = [self.ids(p, sanitize_control_tokens=sanitize_control_tokens, **template) for p in each]
        asked = Asked(
            constraint=constraint,
            json_schema=json_schema,
            regex=regex,
            choices=choices,
            tool_choice=tool_choice,
            tools=tools,
        )
        return Request(self, prompts, options, Randomness(seed=seed, seeds=seeds, noise=noise), asked)

    def fill(
        self,
        text: str | None = None,
        *,
        mark: str = MARK,
        holes: Sequence[Hole] = (),
        prefix: str | None = None,
        suffix: str | None = None,
        prompt: str | None = None,
        seed: int | None = None,
        noise: Noise | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Result:
        """Fill the holes of a text; what is around them stays byte for byte. → the whole text, and its `holes`.

        Either a `text` with a `mark` at every hole, all of it on one canvas, and what may stand in the `holes`, one
        each (none: anything); or the `prefix` and `suffix` of a cursor: the lines about it are on the canvas, the rest
        is in the prompt. `prompt` says what is wanted, instead of the words that this package has for it.
        Errors: as `generate`; PromptError for a text that one canvas does not hold.
        """
        request = self.prepare_fill(
            text,
            mark=mark,
            holes=holes,
            prefix=prefix,
            suffix=suffix,
            prompt=prompt,
            seed=seed,
            noise=noise,
            **options,
        )
        return request.run()[0]

    def prepare_fill(
        self,
        text: str | None = None,
        *,
        mark: str = MARK,
        holes: Sequence[Hole] = (),
        prefix: str | None = None,
        suffix: str | None = None,
        prompt: str | None = None,
        seed: int | None = None,
        noise: Noise | None = None,
        **options: Unpack[GenerationOptions],
    ) -> "Request":
        """Check everything that `fill` would, and run nothing yet."""
        for name, given in (("text", text), ("mark", mark), ("prefix", prefix), ("suffix", suffix)):
            if given is not None:
                check_text(given, name)
        if not isinstance(holes, list | tuple) or not all(isinstance(hole, Hole) for hole in holes):
            raise ConfigError(f"holes is {shown(holes)}, expected a list of mlx_diffgemma.Hole.")
        task = filling.of_text(text, mark, holes) if prefix is suffix is None and text is not None else None
        if task is None:
            if text is not None or holes or (prefix is None and suffix is None):
                raise ConfigError("fill takes a text with marks, or a prefix and a suffix: one of these.")
            task = filling.of_cursor(prefix or "", suffix or "", self._canvas(options), self._count)
        return self._filled(task, prompt or task.prompt, Randomness(seed=seed, noise=noise), options)

    def edit(
        self,
        text: str,
        *,
        lines: tuple[int, int],
        instruction: str,
        start: Start = "noise",
        seed: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Result:
        """Write some lines (the first and the last, counted from 1) anew, by an instruction. → the whole text.

        On the canvas those lines are free, as many lines around them as fit are pinned; all of the text is in the
        prompt. `start`: the canvas begins as "noise", or, other than in the reference, with the "text" as it was.
        Errors: as `generate`; PromptError for lines that are not there, or that one canvas does not hold.
        """
        return self.prepare_edit(text, lines=lines, instruction=instruction, start=start, seed=seed, **options).run()[0]

    def prepare_edit(
        self,
        text: str,
        *,
        lines: tuple[int, int],
        instruction: str,
        start: Start = "noise",
        seed: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> "Request":
        """Check everything that `edit` would, and run nothing yet."""
        check_text(text, "text")
        check_text(instruction, "instruction")
        first_and_last = many(integer(), least=2, most=2).read(lines, "lines")
        task = filling.of_lines(text, first_and_last, instruction, self._canvas(options), self._count)
        request = self._filled(task, task.prompt, Randomness(seed=seed), options)
        if start not in get_args(Start):
            raise ConfigError(f"start is {start!r}, expected {' or '.join(map(repr, get_args(Start)))}.")
        if start == "text":
            request.start_from(self.tokenizer.encode(task.old))
        return request

    def decide(
        self,
        state: str,
        questions: Any,
        *,
        template: str = deciding.TEMPLATE,
        orders: bool = True,
        calibrate: bool = False,
        canvas_length: int | None = None,
        seed: int = 0,
    ) -> list[Decision]:
        """How probable each label of some questions about a `state` is, in one pass: no answer is written.

        Questions are a list, or an object by name, of {"type": "choice", "question": …, "choices": […]},
        {"type": "bool", "question": …} or {"type": "score", "question": …, "scale": [1, 5]}. All cyclic `orders` of the
        labels are asked as one batch and averaged. `calibrate` divides by what the labels get when the state says
        nothing. `template` words the prompt from {state}, {question} and {labels}. A `canvas_length` shorter than the
        model's is quicker and less right.
        Errors: ConfigError, PromptError, TokenizerError, MemoryLimitError, BusyError.
        """
        return deciding.decide(
            self,
            state,
            questions,
            template=template,
            orders=orders,
            calibrate=calibrate,
            canvas_length=canvas_length,
            seed=seed,
        )

    def _filled(
        self, task: filling.Task, prompt: str, randomness: "Randomness", options: GenerationOptions
    ) -> "Request":
        length = self._canvas(options)
        if (most := options.get("max_tokens", length)) > length:
            raise ConfigError(f"max_tokens is {most}; what is filled in is one canvas of {length} tokens.")
        pins = sum(map(self._count, task.draft.runs))
        if pins > most:
            raise PromptError(
                f"what is to stay has {pins} tokens and must be on one canvas, which holds {most}.\n"
                "Shorten the text, or give a prefix and a suffix: of those only the lines about the cursor are."
            )
        chosen: GenerationOptions = {**options, "max_tokens": most}
        asked = Asked(constraint=task.draft.language())
        return Request(self, [self.ids(prompt)], chosen, randomness, asked, task.draft)

    def _canvas(self, options: GenerationOptions) -> int:
        """Positions of this run's canvas. Errors: ConfigError for any option of the wrong kind."""
        return self.generation_config.replace(**options).canvas_length or self.config.canvas_length

    def _count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer.encode(text))

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """A conversation that prefills only what is new in each turn. `options` as in `generate`."""
        return Chat(self, system, options)

    def score(self, text: Prompt, answer: str | None = None, *, stride: int | None = None) -> TextScores:
        """Log-probability of every token given its left, by the causal pass: of a text (or ids), or of an `answer` to
        messages (or to a prompt as text), the end of its turn included.

        A text longer than the context is read in windows of the context's length that begin `stride` tokens apart; each
        token is scored once, in the first window that reaches it.
        Errors: PromptError for a text without a second token, ids out of range, or one too long without `stride`.
        """
        optional(integer(least=1)).read(stride, "stride")
        if answer is None:
            if not isinstance(text, str) and not _is_ids(text):
                raise PromptError("to score an answer, give messages and `answer`; without it, text or ids.")
            return self.score_from(self.text_ids(text) if isinstance(text, str) else self.ids(text), 1, stride=stride)
        asked = self.ids(text)
        check_text(answer, "answer")
        return self.score_from([*asked, *self._answer_ids(answer)], len(asked), stride=stride)

    def text_ids(self, text: str) -> list[int]:
        """A bare text as the model was trained to read it: behind <bos>."""
        ids, bos = self.tokenizer.encode(text), self.tokenizer.bos_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _answer_ids(self, answer: str) -> list[int]:
        """An answer, with the stop id that the template ends a turn with."""
        ids = self.tokenizer.encode(answer)
        marks = self.ids([{"role": "user", "content": "."}, {"role": "assistant", "content": "."}])
        ends = [i for i in self.generation_config.stop_ids if i in marks] or list(self.generation_config.stop_ids)
        return ids + ends[:1]

    def score_from(self, ids: list[int], start: int, *, stride: int | None = None) -> TextScores:
        """`score` of the ids from number `start` on. Errors: as `score`."""
        with self.alone():
            chunk = self.generation_config.prefill_step_size
            return score_ids(self.network, ids, start=start, chunk=chunk, stride=stride)

    def ids(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
    ) -> list[int]:
        """A prompt as ids. Errors: PromptError for one that is neither text, messages nor ids, TokenizerError for
        messages that the chat template does not take, and for an option that it does not know."""
        if isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
            if enable_thinking is not None or tools is not None or template_options or sanitize_control_tokens:
                raise PromptError(
                    "enable_thinking, tools, template_options and sanitize_control_tokens go to the chat template;"
                    " a prompt of ids has none."
                )
            return cast(list[int], list(prompt))
        if not isinstance(prompt, str) and not (isinstance(prompt, list | tuple) and prompt and _are_messages(prompt)):
            raise PromptError(
                "a prompt is text, a list of messages {'role': …, 'content': …}, or a list of ids;"
                f" got {shown(prompt)}."
            )
        for name, value in (("enable_thinking", enable_thinking), ("sanitize_control_tokens", sanitize_control_tokens)):
            optional(flag).read(value, name, fault=PromptError)
        tools = check_tools(tools)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": check_text(prompt, "the prompt")}]
        for name, given in (("enable_thinking", enable_thinking), ("tools", tools)):
            if given and not self.tokenizer.reads(name):
                raise TokenizerError(f"{name} would do nothing: {self.tokenizer.template()[1]} does not read it.")
        return self.tokenizer.apply_chat_template(
            check_messages(prompt),
            enable_thinking=enable_thinking,
            tools=tools,
            template_options=template_options,
            sanitize_control_tokens=sanitize_control_tokens,
        )


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
        model: DiffusionGemma,
        prompts: list[list[int]],
        options: GenerationOptions,
        randomness: Randomness,
        asked: Asked,
        draft: Draft | None = None,
    ):
        self.model, self.prompts, self.draft = model, prompts, draft
        self.departures: dict[str, Any] = {}  # from the reference, besides those of the settings
        self.settings = self._settings(options)
        self._length = self.settings.canvas_length or model.config.canvas_length
        tokens = engine.check(model.network, prompts, self.settings)
        self.constraints = self._compiled(asked)
        guides = Guides(self._constraints, len(prompts))
        guides.check(self.settings, model.config.vocab_size, tokens)
        self.noise, self.seeds = self._noise(randomness)
        if self.settings.chooses and randomness.noise is not None:
            raise ConfigError("best_of and retries draw other seeds: with recorded noise there are none.")
        self.check_memory()

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
        weights = weight_bytes(model.network) + self._kept_bytes()
        check_memory(model.config, weights, model.memory_limit, prefix, rows=rows, forks=forks)

    def _kept_bytes(self) -> int:
        """What a step under constraints holds for the signal: a weight of every id of a text at every position."""
        if self.settings.free_signal or self.settings.decoding != "diffusion":
            return 0
        sizes = [int((made.constraint.classes >= 0).sum()) for made in self.constraints if made]
        return (
            sum(sizes)
            * self.settings.best_of
            * self._length
            * unpacked_dtype(self.model.network.decoder.embed_tokens).size
        )

    def _settings(self, options: GenerationOptions) -> GenerationConfig:
        """The model's own with `options` over them. A `max_length`, of prompt and reply together, counts where nobody
        chose how long the reply may be, as in transformers (_prepare_generated_length)."""
        settings = self.model.generation_config.replace(**options)
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
            draft=self.draft,
            departures=self.departures,
            pace=self.model.pace,
        )
        for event in engine.generate(
            self.model.network,
            self.prompts,
            self.settings,
            self.noise,
            cache=cache,
            pauses=pauses,
            reader=reader,
            constraint=self._constraints,
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
        request.constraints = [self.constraints[number] for number in prompts]
        request.noise, request.seeds = request._noise(Randomness(seeds=seeds))
        return request


def _results(events: Iterator[Event]) -> list[Result]:
    return next(list(event.results) for event in events if isinstance(event, Finished))


def _is_ids(prompt: Prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(i, int) for i in prompt)


def _is_batch(prompt: Prompt | list[Prompt]) -> bool:
    """A list whose entries are prompts themselves: texts, message lists or id lists."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def _are_messages(prompt: Sequence[Any]) -> bool:
    return all(isinstance(message, dict) and "role" in message for message in prompt)
