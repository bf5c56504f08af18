"""What a command line says that an answer must obey: a schema, a pattern, choices, or a text with holes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from .disk import existing_file
from .errors import PromptError
from .options import gathered
from .readers import decoded, read_bytes

if TYPE_CHECKING:
    from .pipeline.model import DiffusionGemma
    from .pipeline.requests import Request

MARK = "<fill>"
_OBEYING: dict[str, dict[str, Any]] = {
    "json_schema": {"metavar": "FILE|JSON", "help": "The answer is JSON that obeys this schema; '{}': any JSON."},
    "regex": {"metavar": "PATTERN", "help": "The answer matches this regular expression from end to end."},
    "choices": {"multiple": True, "metavar": "TEXT", "help": "The answer is one of these: give it once for each."},
    "fill": {"metavar": "TEXT|@FILE", "help": f"Fill in this text wherever it says {MARK}; the rest stays as it is."},
    "hole": {"metavar": "MARK", "help": f"Where --fill is to be filled in.  [default: {MARK}]"},
    "prefix": {"metavar": "TEXT|@FILE", "help": "Fill in between this text, up to a cursor, …"},
    "suffix": {"metavar": "TEXT|@FILE", "help": "… and this one, behind the cursor."},
}


def obeying_options(function: Callable[..., None]) -> Callable[..., None]:
    """What `Obeying` takes, handed over as one dict `obeying` that holds what the user set and nothing else."""
    table = {name: {"section": "An answer that obeys", **settings} for name, settings in _OBEYING.items()}
    return gathered(function, "obeying", table, {"choices": ["--choice"]})


@dataclass(frozen=True, kw_only=True)
class Obeying:
    """What an answer must obey, nothing perhaps. Errors when it is made: UsageError for options that exclude one
    another."""

    json_schema: str | None = None
    regex: str | None = None
    choices: tuple[str, ...] = ()
    fill: str | None = None
    hole: str | None = None
    prefix: str | None = None
    suffix: str | None = None

    def __post_init__(self) -> None:
        named = {"json_schema": "--json-schema", "regex": "--regex", "choices": "--choice", "fill": "--fill"}
        given = [option for name, option in named.items() if getattr(self, name) not in (None, ())]
        cursor = [f"--{name}" for name in ("prefix", "suffix") if getattr(self, name) is not None]
        if len(given) > 1 or (given and cursor):
            raise click.UsageError(f"{' and '.join(given + cursor)} would both constrain the answer: give one.")
        if self.hole is not None and self.fill is None:
            raise click.UsageError("--hole is the mark of --fill: it would do nothing.")

    @property
    def is_filling(self) -> bool:
        """Whether a text is filled in: it is its own prompt, then."""
        return (self.fill, self.prefix, self.suffix) != (None, None, None)

    def check(self) -> None:
        """What can be checked without a model. Errors: ConfigError, PromptError."""
        from .pipeline.obeying.constraints import Asked
        from .pipeline.obeying.drafts import Draft

        texts = self._texts
        if self.fill is not None:
            Draft.marked(texts["text"], texts["mark"], ())
        Asked(**self._constraint).languages(1)

    @property
    def _constraint(self) -> dict[str, Any]:
        schema = None if self.json_schema is None else schema_of(self.json_schema)
        return {"json_schema": schema, "regex": self.regex, "choices": self.choices or None}

    @property
    def _texts(self) -> dict[str, str]:
        """What `prepare_fill` takes."""
        if self.fill is not None:
            return {"text": text_of(self.fill, "--fill"), "mark": MARK if self.hole is None else self.hole}
        ends = {"prefix": self.prefix, "suffix": self.suffix}
        return {name: text_of(text, f"--{name}") for name, text in ends.items() if text is not None}

    def request(
        self, model: "DiffusionGemma", asked: Any, *, template: dict[str, Any], run_options: dict[str, Any]
    ) -> "Request":
        """The answer to `asked`, prepared. Errors: UsageError, and those of `model.prepare` and `prepare_fill`."""
        if not self.is_filling:
            return model.prepare(asked, **template, **self._constraint, **run_options)
        if template["enable_thinking"]:
            raise click.UsageError("--thinking does not go with a text to fill in: the canvas holds that text alone.")
        if asked is None and template["template_options"]:
            raise click.UsageError("--template-options would do nothing: there is no prompt.")
        asked = None if asked is None else model.read(asked, **template)
        return model.prepare_fill(**self._texts, prompt=asked, **run_options)


def text_of(value: str, option: str) -> str:
    """TEXT|@FILE → the text, its line ends as they are. Errors: PromptError for half characters, and as `read_text`."""
    from .text.gate import check_text

    return read_text(value[1:], option) if value.startswith("@") else check_text(value, option)


def schema_of(value: str) -> str:
    """FILE|JSON → JSON text."""
    is_json = value.lstrip().startswith("{") or value in ("true", "false")
    return value if is_json else read_text(value.removeprefix("@"), "--json-schema")


def read_text(file: str, option: str) -> str:
    """A file's text, byte for byte. Errors: ConfigError, PromptError for one that cannot be read, or is not UTF-8."""
    raw = read_bytes(existing_file(file, option), fault=PromptError)
    decoded(raw, file, fault=PromptError)  # which leaves a byte-order mark out
    return raw.decode()
