"""From what an answer may say to what the engine is held to: a language meets the model's tokenizer.

Byte automata take every spelling of a text, choices and literal text the tokenizer's own, but where a token may reach
over a pin's end (joints.py). A constraint speaks of the answer: a thought in front of it is free, and must be closed in
time for the answer to fit.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from time import perf_counter
from typing import Any

import numpy as np

from ...errors import ConfigError, TokenizerError
from ...generation.constraint import automaton, parts
from ...generation.constraint.automaton import Constraint
from ...generation.events import CanvasRow
from ...generation.settings import GenerationConfig
from ...text.channels import CHANNEL, END_CHANNEL
from ...text.gate import check_text
from ...text.language import regex as patterns
from ...text.language import schema as schemas
from ...text.language import texts, values
from ...text.language.automaton import BYTES, Automaton, Language, Part, Spelled
from ...text.tokenizer import Tokenizer
from .joints import Joints

THINK = "<|think|>"  # in a prompt: the model may think before it answers
KEPT = 32  # compiled constraints, the latest


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A constraint with what was asked for."""

    language: Language
    constraint: Constraint
    seconds: float  # that language and constraint took, when they were made


@dataclass(frozen=True, kw_only=True)
class Obeyed:
    """How a result was held to its constraint."""

    log_probability: float | None  # of a text of the constraint, by the last step of every canvas: log Z, nats; None
    # for autoregressive decoding, where the constraint is no condition: it only leaves out tokens, one place at a time
    states: int
    classes: int
    pairs: int  # of states: what a step's time is proportional to
    compile_seconds: float
    notes: tuple[str, ...]  # what of the request was left out, in words


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """What a caller may constrain an answer with: one of these, or nothing."""

    constraint: Language | Sequence[Language | None] | None = None
    json_schema: Any = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    tool_choice: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None

    def languages(self, rows: int) -> list[Language | None]:
        """One a row. Errors: ConfigError for two constraints at once, or one that cannot be met."""
        names = ("constraint", "json_schema", "regex", "choices")
        given = [name for name in names if getattr(self, name) is not None]
        given += ["tool_choice"] if self.tool_choice not in (None, "auto", "none") else []
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} would both constrain the answer: give one.\n"
                "Languages can be joined: constraint=literal('Answer: ') + regex('[0-9]+')."
            )
        if self.tool_choice is not None and not self.tools:
            raise ConfigError(f"tool_choice is {self.tool_choice!r}, but there are no tools.")
        if self.constraint is not None and not isinstance(self.constraint, Language):
            return self._each(self.constraint, rows)
        return [self._language()] * rows

    def _each(self, languages: Any, rows: int) -> list[Language | None]:
        if not isinstance(languages, Sequence) or isinstance(languages, str):
            raise ConfigError(
                f"constraint is a Language, or a list with one (or None) a prompt, got {languages!r:.60}.\n"
                "Make one with regex(…), json_schema(…), choices(…) or literal(…) of mlx_diffgemma."
            )
        if len(languages) != rows:
            raise ConfigError(f"{len(languages)} constraints for {rows} prompts: give one for all, or one each.")
        for language in languages:
            if language is not None and not isinstance(language, Language):
                raise ConfigError(f"constraint holds {language!r:.60}, expected a Language or None.")
        return list(languages)

    def _language(self) -> Language | None:
        if isinstance(self.constraint, Language):
            return self.constraint
        if self.json_schema is not None:
            with _of("JSON schema"):
                return json_language(self.json_schema)
        if self.regex is not None:
            if not check_text(self.regex, "regex", fault=ConfigError):
                raise ConfigError("regex is empty, and so would every answer be.")
            with _of("regex"):
                return regex_language(self.regex)
        if self.choices is not None:
            return texts.choices(self.choices)
        if self.tool_choice in (None, "auto", "none"):
            return None
        return values.tool_call(_chosen(self.tools or (), self.tool_choice))


@contextmanager
def _of(what: str) -> Iterator[None]:
    """Errors about a language that do not say what it is of do so now."""
    try:
        yield
    except ConfigError as error:
        raise error if what.split()[-1] in str(error) else ConfigError(f"the {what}: {error}") from None


def _chosen(tools: Sequence[Mapping[str, Any]], name: str | None) -> list[Mapping[str, Any]]:
    """The tools that a forced call may call: all for "required", else the one of that name."""
    functions = [tool.get("function", tool) for tool in tools]
    found = [function for function in functions if name in ("required", function.get("name"))]
    if not found:
        known = ", ".join(str(function.get("name")) for function in functions)
        raise ConfigError(f"tool_choice names {name!r}; there are {known}, and auto, none and required.")
    return found


def json_language(schema: Any) -> Language:
    """As `values.json_schema`, kept by content."""
    schema = schemas.read(schema)
    try:
        return _json_language(json.dumps(schema))
    except (TypeError, ValueError, RecursionError):
        return values.json_schema(schema)  # not JSON: it is refused there, and where in the schema is said


@lru_cache(maxsize=KEPT)
def _json_language(schema: str) -> Language:
    return values.json_schema(schema)


@lru_cache(maxsize=KEPT)
def regex_language(pattern: str) -> Language:
    """As `regex.regex`, kept by content."""
    return patterns.regex(pattern)


class Compiler:
    """Languages → constraints of one model; what it made lately is kept by content."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int):
        """`vocabulary`: how many ids the model has. Errors: TokenizerError when the bytes of ids are not known."""
        self.tokenizer = tokenizer
        known = tokenizer.token_bytes[:vocabulary]
        self.tokens = known + [None] * (vocabulary - len(known))
        self.spellings = parts.Spellings(self.tokens)
        self.joints = Joints(self.tokens, lambda text: [self.tokens[i] or b"" for i in self.spell(text)])
        self._made: OrderedDict[Any, Compiled] = OrderedDict()

    def compiled(
        self, language: Language, prompt: Sequence[int], settings: GenerationConfig, *, also: float = 0.0
    ) -> Compiled:
        """For an answer to the `prompt`; `also`: seconds that the language took.

        Errors: ConfigError, TokenizerError for what no ids spell.
        """
        whole = thought(self.tokenizer, prompt) + language
        key = (whole.digest, whole.notes, settings.stop_ids, settings.pad_token_id)
        if key not in self._made:
            began = perf_counter()
            made_of = self._parts(self.joints.healed(whole.parts))
            made = automaton.build(made_of, self.spellings, stop_ids=settings.stop_ids, pad_id=settings.pad_token_id)
            self._made[key] = Compiled(language=whole, constraint=made, seconds=perf_counter() - began)
        self._made.move_to_end(key)
        while len(self._made) > KEPT:
            self._made.popitem(last=False)
        return replace(self._made[key], seconds=self._made[key].seconds + also)

    def spell(self, text: str) -> tuple[int, ...]:
        """The tokenizer's own spelling. Errors: TokenizerError when it is not the text's bytes."""
        ids = tuple(self.tokenizer.encode(text))
        said = [self.tokens[i] if i < len(self.tokens) else None for i in ids]
        if None in said:
            name = self.tokenizer.piece(ids[said.index(None)])
            raise TokenizerError(
                f"{text!r:.60} cannot be written: {name!r} in it is a special token, which is no text."
            )
        if (spelled := b"".join(filter(None, said))) != text.encode():
            raise TokenizerError(
                f"{text!r:.60} cannot be written byte for byte: this tokenizer makes {spelled!r:.60} of it."
            )
        return ids

    def _parts(self, given: Sequence[Part]) -> list[parts.Part]:
        """Equal automata become one object: it is lifted once."""
        made: dict[str, parts.Part] = {}
        for part in given:
            digest = Language(parts=(part,)).digest
            if digest not in made:
                made[digest] = self._spelled(part) if isinstance(part, Spelled) else self._pattern(part)
        return [made[Language(parts=(part,)).digest] for part in given]

    def _spelled(self, part: Spelled) -> parts.Spelled:
        return parts.Spelled(choices=tuple(self.spell(text) for text in part.texts))

    def _pattern(self, part: Automaton) -> parts.Pattern:
        ids = {name: self.tokenizer.id_of(name) for name in part.controls}
        if missing := [name for name, token in ids.items() if token is None or token >= len(self.tokens)]:
            raise TokenizerError(f"this model's tokenizer has no {' and no '.join(missing)}, which the language needs.")
        controls = tuple(token for token in ids.values() if token is not None)
        return parts.Pattern(
            transitions=part.transitions, start=part.start, accepting=part.accepting, controls=controls
        )


def thought(tokenizer: Tokenizer, prompt: Sequence[int]) -> Language:
    """What may stand before the answer: the rest of a thought that the prompt has opened; or a thought or none, where
    the prompt asks for thinking; else nothing."""
    opened = tokenizer.opens_channel(list(prompt))
    asked = tokenizer.id_of(THINK) in prompt and tokenizer.id_of(CHANNEL) is not None
    if not opened and not asked:
        return Language(parts=())
    opens, closes = BYTES, BYTES + 1
    transitions = np.full((3, BYTES + 2), -1, np.int32)  # before the thought, in it, behind it
    transitions[0, opens] = transitions[1, :BYTES] = 1
    transitions[1, closes] = 2
    accepting = np.array([True, False, True])
    if opened:
        transitions, accepting = transitions[1:] - (transitions[1:] > 0), accepting[1:]
    free = Automaton(transitions=transitions, accepting=accepting, controls=(CHANNEL, END_CHANNEL))
    return Language(parts=(free,))


def obeyed(compiled: Compiled, canvases: Sequence[CanvasRow]) -> Obeyed:
    """The report on one row."""
    made, found = compiled.constraint, [canvas.log_probability for canvas in canvases]
    return Obeyed(
        log_probability=None if None in found else sum(filter(None, found)),
        states=made.states,
        classes=made.table.shape[1],
        pairs=len(made.pairs.target),
        compile_seconds=compiled.seconds,
        notes=compiled.language.notes,
    )


def timed(asked: Asked, rows: int) -> tuple[list[Language | None], float]:
    """The languages, and the seconds they took."""
    began = perf_counter()
    return asked.languages(rows), perf_counter() - began
