"""The command line: the click group, and errors in one to three lines.

Exit status: 0 done · 1 failed · 2 wrong usage · 130 interrupted · 143 terminated.
"""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, Literal, NoReturn

import click

from . import joined, launched
from ._version import __version__
from .disk import reason
from .errors import ConfigError, DiffGemmaError, PeerError
from .options import LOADING, Option, open_model

COMMANDS = {
    "generate": "Write a reply to a prompt, and watch the canvas settle.",
    "chat": "Talk with the model.",
    "serve": "Serve the model to editors, chats and scripts, with a page.",
    "score": "Say how likely the model finds a text.",
    "convert": "Turn the released checkpoint into an MLX pack that fits.",
    "edit": "Write some lines of a file anew.",
    "decide": "Weigh the possible answers to a question, without writing one.",
    "check": "Check this installation and a model against the recorded reference.",
    "evaluate": "Run tasks of EleutherAI's lm-eval.",
    "bench": "Measure this machine; compare two measurements.",
    "tune": "Measure how this machine likes the work cut, once, and remember it.",
    "train": "Fine-tune with LoRA or in full, by the denoising objective.",
    "fuse": "Merge a LoRA adapter into its model.",
}

Machines = Literal["one", "share", "each"]  # of those that mlx.launch started: which run a command

_LAST = "Machine Other"  # the sections that come last


class Command(click.Command):
    """A command whose failures are one to three lines on stderr, with a traceback only on `--debug`."""

    everything = False  # whether the help that is being written is `--help-all`'s
    machines: Machines = "one"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (line := option.get_help_record(ctx)):
                sections.setdefault(getattr(option, "section", ""), []).append(line)
        for section, lines in sorted(sections.items(), key=lambda item: _LAST.find(item[0] or "-")):
            if self.everything or not section:
                with formatter.section(section or "Options"):
                    formatter.write_dl(lines)
        hidden = sum(map(len, sections.values())) - len(sections.get("", ()))
        if hidden and not self.everything:
            formatter.write_paragraph()
            formatter.write_text(f"{hidden} more options: {ctx.command_path} --help-all")

    def help_all(self, ctx: click.Context) -> str:
        """The help with every option, in its section."""
        self.everything = True
        try:
            return self.get_help(ctx)
        finally:
            self.everything = False

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # pyright: ignore
        args = list(sys.argv[1:] if args is None else args)
        say, lost = _complain, None
        if launched.rank() and self.machines != "each":
            say = joined.mute()
        try:
            with _terminable():
                _open_streams()
                status = super().main(args, prog_name, **{**extra, "standalone_mode": False})
                sys.stdout.flush()
        except (KeyboardInterrupt, click.Abort):
            status = 130
        except click.ClickException as error:
            status = error.exit_code
            say(error.format_message() + _hint(error))
        except PeerError as error:
            lost = error
        except SystemExit as error:
            status = error.code
        except Exception as error:
            if "--debug" in args:
                raise
            status = 1
            say(_in_words(error))
        if lost := lost or next((share.lost for share in joined.SHARES if share.lost), None):
            status = 1
            _complain(str(lost))
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        if launched.size() == 1 or self.machines == "each":
            return super().invoke(ctx)
        if self.machines == "one":
            if not launched.rank():
                raise ConfigError(f"{self.name} runs on one machine: start it without mlx.launch.")
            return None
        if not launched.rank():
            return super().invoke(ctx)
        found = {name: ctx.params.get(name) for name in LOADING}
        return _follow({name: value for name, value in found.items() if value is not None and value != ()})


class Group(Command, click.Group):
    """Imports a command's module when that command is asked for, so that `--help` is quick."""

    machines: Machines = "each"

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return import_module(f"mlx_diffgemma.{cmd_name}").main if cmd_name in COMMANDS else None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _open_streams() -> None:
    """What a stream's encoding cannot write is written as an escape, not an error. Errors: DiffGemmaError."""
    if sys.stdout is None:
        raise DiffGemmaError("standard output is closed: there is nowhere to write to.")
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        *((s, "backslashreplace") for s in (sys.stdout, sys.stderr)),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: what is open is closed, the cursor shown again."""

    def end(*_: object) -> NoReturn:
        sys.exit(143)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _follow(source: dict[str, Any]) -> None:
    """Compute what the first machine announces. Errors: PeerError."""
    model = open_model(source, quiet=True)
    from .pipeline.following import follow

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what waits for a message looks at no signals
    try:
        follow(model)
    except PeerError:
        raise
    except DiffGemmaError as error:
        raise PeerError(str(error)) from None


def _complain(message: str) -> None:
    text = "Error: " + message.replace("\n", "\n       ")
    with suppress(OSError):
        click.echo("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text), err=True)


def _hint(error: click.ClickException) -> str:
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    return f"\nSee: {ctx.command_path} --help" if ctx else ""


def _in_words(error: Exception) -> str:
    if isinstance(error, DiffGemmaError):
        return str(error)
    if isinstance(error, OSError):
        _lose_output(error)
        return f"{error.filename or 'the output'} cannot be used: {reason(error)}."
    if isinstance(error, MemoryError):
        return "there is not enough memory for this."
    what = str(error).strip().splitlines()
    return f"{type(error).__name__}: {what[0] if what else '(no message)'}\nRun again with --debug for the traceback."


def _lose_output(error: OSError) -> None:
    """When standard output is what failed, Python would fail again at the end, in its own words."""
    if error.filename is None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_NAMES = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Group, context_settings=_NAMES, invoke_without_command=True)
@click.version_option(__version__, prog_name="mlx_diffgemma", help="Print the version.")
@click.pass_context
def main(context: click.Context) -> None:
    """DiffusionGemma in MLX. Every command has its own --help."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def command(name: str, *, machines: Machines = "one") -> Callable[[Callable[..., None]], click.Command]:
    """Make a function the command `name`: `-h`, `--help-all`, `--version`, `--debug`, and plain errors.

    `machines`: of several that mlx.launch started, "one" refuses, "share" shares the model, "each" is run by all.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        made = click.command(name, cls=Command, context_settings=_NAMES)(function)
        made.machines = machines
        flag: dict[str, Any] = {"is_flag": True, "expose_value": False, "section": "Other"}
        made.params += [
            Option(["--help-all"], is_eager=True, callback=_help_all, help="Show this.", **flag),
            Option(["--version"], is_eager=True, callback=_say_version, help="Print the version.", **flag),
            Option(["--debug"], help="Show tracebacks.", **flag),
        ]
        return made

    return decorate


def _help_all(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and isinstance(ctx.command, Command):
        click.echo(ctx.command.help_all(ctx))
        ctx.exit()


def _say_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"mlx_diffgemma, version {__version__}")
        ctx.exit()
