"""Text in, text out: joins tokenizer, engine and network."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack, cast, get_args

import mlx.core as mx

from ..config import ModelConfig
from ..errors import BusyError, ConfigError, PromptError
from ..generation.events import Event
from ..generation.noise import Noise
from ..generation.settings import GenerationConfig, GenerationOptions
from ..model import threads
from ..model.memory import machine_limit
from ..model.network import Network
from ..text.gate import check_text
from ..text.language.automaton import Language
from ..text.language.texts import MARK, Hole
from ..text.pictures import parts
from ..text.pictures.sources import ANYWHERE, Access
from ..text.tokenizer import Tokenizer
from ..values import integer, many, optional, shown
from . import deciding
from .chat import Chat
from .deciding import Decision
from .machine.pace import Pace
from .obeying import filling
from .obeying.constraints import Asked, Compiler
from .obeying.filling import Start
from .prompts import Prompt, PromptIds, PromptReader, is_ids
from .requests import Randomness, Request
from .results import Result
from .scores import TextScores, score_ids
from .sight import Sight, own_sight


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
        see: Callable[["DiffusionGemma"], Sight] = own_sight,
    ):
        self.network, self._tokenizer, self.generation_config = network, tokenizer, generation_config
        self.folder, self.memory_limit = folder, memory_limit or machine_limit()
        self.pace = Pace(self.config.canvas_length)
        self.notices = notices  # what the checkpoint says that does nothing here, in a sentence each
        self._lock, self._see = threading.Lock(), see

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @cached_property
    def compiler(self) -> Compiler:
        """What turns languages into this model's constraints. Errors: TokenizerError."""
        return Compiler(self.tokenizer, self.config.vocab_size)

    @cached_property
    def seeing(self) -> Sight:
        """What prompts with pictures are read by. Errors: ConfigError for a model without eyes."""
        return self._see(self)

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

        A prompt is text, chat messages, or ids; text becomes a user message. The content of a message may be a list of
        parts, pictures among them: {"type": "image", "image": a path, URL, bytes, a PIL picture or a uint8 array},
        with a "budget" of soft tokens (70, 140, 280, 560, 1120), or OpenAI's {"type": "image_url", …}; videos
        and PDFs, {"type": "video", "video": …, "frames": 32} and {"type": "pdf", "pdf": …, "pages": "2-5"}.
        With `sanitize_control_tokens` the control tokens in messages and tools are plain text. `options` are
        GenerationConfig's, `template_options` further variables of the chat template.
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
        prompts = [self.read(p, sanitize_control_tokens=sanitize_control_tokens, **template) for p in each]
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
        prompt: Prompt | None = None,
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
        prompt: Prompt | None = None,
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
        with self.alone():
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
        self, task: filling.Task, prompt: Prompt, randomness: "Randomness", options: GenerationOptions
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
        return Request(self, [self.read(prompt)], chosen, randomness, asked, task.draft)

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
            if not isinstance(text, str) and not is_ids(text):
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
        """A prompt without pictures as ids. Errors: as `read`, and PromptError for one with pictures."""
        found = self.read(
            prompt,
            enable_thinking=enable_thinking,
            tools=tools,
            template_options=template_options,
            sanitize_control_tokens=sanitize_control_tokens,
        )
        if found.pictures:
            raise PromptError("this prompt has pictures, and only text is read here.")
        return found.ids

    def read(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_options: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
    ) -> PromptIds:
        """A prompt as ids, with the pictures in it, opened and scaled: a prompt again. Errors: PromptError for one that
        is neither text, messages nor ids, and for a picture that cannot be read, ConfigError for a picture where the
        model has no eyes, TokenizerError for messages that the chat template does not take, and for an option that it
        does not know."""
        return PromptReader(
            model=self,
            enable_thinking=enable_thinking,
            tools=tools,
            template_options=template_options,
            sanitize_control_tokens=sanitize_control_tokens,
        ).of(prompt)

    def opened(self, messages: Any, *, access: Access = ANYWHERE) -> Any:
        """The same messages; the pictures in them are opened and scaled, so that this is not done again. Errors:
        PromptError for one that cannot be read, ConfigError where the model has no eyes."""
        if not parts.has_pictures(messages):
            return messages
        found = parts.opened(messages, self.seeing.pictures, access=access)
        self.seeing.check(parts.taken_out(found)[1])
        return found


def _is_batch(prompt: Prompt | list[Prompt]) -> bool:
    """A list whose entries are prompts themselves: texts, message lists or id lists."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list | PromptIds)
