"""Chat templates: rendered as transformers renders them, bounded in time and size, because anyone may have written one.

The sandbox keeps a template from the machine, not from using it up: `9 ** (9 ** 9)`, three loops in one another, a text
doubled forty times. Every loop, call, filter and operator therefore passes here, where sizes are foretold before the
work is done and the clock is looked at.
"""

import functools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.visitor import NodeTransformer

from ..errors import TokenizerError
from . import growth

SECONDS = 5.0  # for one conversation; the released template takes a thousandth of a second
LARGEST = 16_000_000  # characters and entries of any one value, all that lies in it included
TOGETHER = 1_000_000_000  # and of all values that are made on the way
SOURCE = 1_000_000  # characters of a template; the released one has 17,000
DIGITS = 4_000  # bits of an integer
STRIDE = 64  # rounds of a loop between two looks at the clock

Json = dict[str, Any]


class _TooMuch(Exception):
    """A template that would take too long or grow too large."""


def render(source: str, name: str, messages: list[Json], **variables: Any) -> str:
    """The conversation in the words of the template `source`, which the errors call `name`.

    `variables` are the template's own: tools, bos_token, enable_thinking, …
    Errors: TokenizerError for a template that is damaged, too expensive, or refuses the messages.
    """
    template = _compiled(source, name)
    clock = cast(_Environment, template.environment).begin()
    try:
        context = template.new_context({"messages": _aliased(messages), **variables})
        pieces, size = [], 0
        for piece in template.root_render_func(context):
            size += len(piece)
            clock.check(size)
            pieces.append(piece)
        return "".join(pieces)
    except (_TooMuch, MemoryError, RecursionError) as error:
        raise _expensive(name, error) from None
    except jinja2.TemplateError as error:
        raise TokenizerError(f"{name} does not accept these messages: {_short(error)}") from error
    except Exception as error:  # the template's own mistakes: any operation on any value
        raise TokenizerError(f"{name} cannot be applied to these messages: {_short(error)}") from error


def literals(source: str, name: str) -> str:
    """Everything the template can write by itself, its texts and constants, apart from one another by NULs."""
    tree = _compiled(source, name).environment.parse(source)
    found = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    found |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(found))


def mentions(source: str, name: str, variable: str) -> bool:
    """Whether the template reads a variable of this name: an option that sets another would do nothing."""
    import jinja2.meta

    tree = _compiled(source, name).environment.parse(source)
    return variable in jinja2.meta.find_undeclared_variables(tree)


def _short(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text[:200] + ("" if text.endswith(".") else ".")


def _expensive(name: str, error: BaseException) -> TokenizerError:
    what = str(error) if isinstance(error, _TooMuch) else "more memory or depth than there is"
    return TokenizerError(f"{name} was stopped: it takes {what}.\nDo not trust it; copy the template of the original.")


@functools.lru_cache(maxsize=16)
def _compiled(source: str, name: str) -> jinja2.Template:
    if len(source) > SOURCE:
        raise TokenizerError(f"{name} has {len(source):,} characters, expected a template of at most {SOURCE:,}.")
    environment = _Environment()
    environment.begin()
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"{name} is no Jinja template: {error.message} (line {error.lineno}).") from error
    except (_TooMuch, MemoryError, RecursionError, SyntaxError, ValueError) as error:
        raise _expensive(name, error) from None


def _aliased(messages: list[Json]) -> list[Json]:
    """A message's reasoning under the names that templates read (transformers _alias_reasoning_fields)."""
    aliased = []
    for message in messages:
        fields = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((message[key] for key in fields if message.get(key) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        aliased.append(message)
    return aliased


# ------------------------------------------------------------------------------------------------ the environment


class _Clock(threading.local):
    """When the rendering of this thread must have ended."""

    def __init__(self) -> None:
        self.end, self.made = 0.0, 0.0
        self.begin()

    def begin(self) -> None:
        self.end, self.made = time.monotonic() + SECONDS, 0.0

    def make(self, size: float) -> None:
        """A value of this size is going to be made. Errors: _TooMuch."""
        self.made += size
        self.check(size)

    def check(self, size: float = 0) -> None:
        """Errors: _TooMuch for a value of this size, for too many values, or when the time is up."""
        if size > LARGEST:
            raise _TooMuch(f"values of more than {LARGEST:,} characters or entries")
        if self.made > TOGETHER:
            raise _TooMuch(f"values of more than {TOGETHER:,} characters or entries together")
        if time.monotonic() > self.end:
            raise _TooMuch(f"more than {SECONDS:.0f} seconds")

    def weigh(self, value: Any) -> Any:
        """`value`, unless all that lies in it is too much: lists may hold one another many times over."""
        total, level = 0, [value]
        while level:
            total += sum(map(growth.size, level))
            self.check(total)
            level = [entry for node in level for entry in growth.entries(node)]
        return value


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' environment (_cached_compile_jinja_template), with every step counted."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        extensions: list[Any] = [_Generation, jinja2.ext.loopcontrols]
        self.clock = _Clock()
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.clock.weigh)
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": _Dict(self.clock),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]  # random words, as many as are asked for
        self.filters["tojson"] = _tojson
        self.filters = {name: self._guarded(name, function) for name, function in self.filters.items()}
        self.filters |= {"_each": self._each, "_joined": self._joined, "_built": self.clock.weigh}

    def begin(self) -> _Clock:
        """Start the clock for a rendering in this thread."""
        self.clock.begin()
        return self.clock

    def concat(self, pieces: Iterable[str]) -> str:  # pyright: ignore  # the output of a macro or block
        return self._joined(pieces)

    def _generate(self, source: jinja2.nodes.Template, *args: Any, **options: Any) -> str:
        return super()._generate(_Counted().visit(source), *args, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.clock.make(growth.after(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **options: Any) -> Any:  # pyright: ignore
        owner = getattr(function, "__self__", None)
        longer = isinstance(owner, str) and growth.LENGTHENS.get(function.__name__)
        self.clock.make(longer(owner, *args, *options.values()) if longer else 0)
        return super().call(context, function, *args, **options)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        checked = super().wrap_str_format(value)
        if checked is None:
            return None

        def limited(*args: Any, **options: Any) -> str:
            self.clock.make(growth.formatted(value.__self__, *args, *options.values()))
            return checked(*args, **options)

        return functools.update_wrapper(limited, value)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is foretold; what jinja itself passes (a context) comes before the value."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def guarded(*args: Any, **options: Any) -> Any:
            if name in growth.WRITES:
                self.clock.weigh(args[first])
            longer = growth.LENGTHENS.get(name)
            self.clock.make(longer(*args[first:], *options.values()) if longer else 0)
            return function(*args, **options)

        return guarded

    def _each(self, entries: Iterable[Any]) -> Iterator[Any]:
        """The entries of a loop; one that takes too long is stopped."""
        for count, entry in enumerate(entries):
            if count % STRIDE == 0:
                self.clock.check()
            yield entry

    def _joined(self, parts: Iterable[Any]) -> str:
        pieces: list[str] = []
        size = 0
        for part in parts:
            pieces.append(str(self.clock.weigh(part)))
            size += len(pieces[-1])
            self.clock.check(size)
        return "".join(pieces)


class _Counted(NodeTransformer):
    """Loops, joins (`~`) and whatever is built through filters of ours, which count."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.For:
        node = cast(jinja2.nodes.For, self.generic_visit(node))
        node.iter = _filter(cast(jinja2.nodes.Expr, node.iter), "_each")
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Filter:
        node = cast(jinja2.nodes.Concat, self.generic_visit(node))
        return _filter(jinja2.nodes.List(node.nodes, lineno=node.lineno, environment=node.environment), "_joined")

    def visit_List(self, node: jinja2.nodes.List) -> jinja2.nodes.Filter:
        return _filter(cast(jinja2.nodes.List, self.generic_visit(node)), "_built")

    def visit_Dict(self, node: jinja2.nodes.Dict) -> jinja2.nodes.Filter:
        return _filter(cast(jinja2.nodes.Dict, self.generic_visit(node)), "_built")

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Expr:
        node = cast(jinja2.nodes.Tuple, self.generic_visit(node))
        return node if node.ctx != "load" else _filter(node, "_built")


def _filter(node: jinja2.nodes.Expr, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks what a model has written; here it is only its content."""

    tags = frozenset(("generation",))  # pyright: ignore

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """`dict` without its class's attributes."""

    def __init__(self, clock: _Clock):
        self._clock = clock

    def __call__(self, *args: Any, **entries: Any) -> Json:
        return self._clock.weigh(dict(*args, **entries))

    def fromkeys(self, *args: Any) -> Json:
        return self._clock.weigh(dict.fromkeys(*args))


class _Namespace(jinja2.utils.Namespace):
    """`namespace` without names that Python gives a meaning to."""

    def __init__(*args: Any, **attributes: Any) -> None:  # pyright: ignore  # so that namespace(self=…) works
        self, *rest = args
        values = dict(*rest, **attributes)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")
