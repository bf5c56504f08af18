"""`mlx_diffgemma.edit`: some lines of a file written anew, by an instruction; the others stay byte for byte."""

import difflib
from typing import TYPE_CHECKING, Any

import click

from .cli import command
from .disk import existing_file, new_file, replacing
from .obeying import read_text
from .options import Option, generation_options, model_options, open_model, run_options

if TYPE_CHECKING:
    from .pipeline.requests import Request


class Lines(click.ParamType):
    """10-14, or 10."""

    name = "lines"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        first, dash, last = str(value).partition("-")
        if not first.isdecimal() or not (last if dash else first).isdecimal():
            self.fail(f"{value!r} names no lines: expected 10-14, or 10.", param, ctx)
        return int(first), int(last if dash else first)


@command("edit", machines="share")
@model_options
@click.argument("file")
@click.option("--lines", type=Lines(), required=True, metavar="A-B", help="Which lines to write anew, from 1.")
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="What is to become of them.")
@click.option(
    "--start",
    cls=Option,
    section="Not the reference (reported in the result)",
    type=click.Choice(["noise", "text"]),
    default="noise",
    help="How the canvas begins: as noise; or, not the reference, as the text was.",
    show_default=True,
)
@click.option("--write", is_flag=True, help="Change the file, not only show the change.")
@click.option("-q", "--quiet", is_flag=True, help="Print the change and nothing else.")
@generation_options
def main(file: str, lines: tuple[int, int], prompt: str, start: Any, write: bool, quiet: bool, **rest: Any) -> None:
    """Write some lines of FILE anew and print the change as a diff; all other lines stay as they are."""
    from .pipeline.obeying.drafts import check_lines

    if "template_options" in rest["options"]:
        raise click.UsageError("--template-options would do nothing: an edit writes its own prompt.")
    old = read_text(file, "FILE")
    check_lines(old, lines)
    if write:
        new_file(file, "FILE")
    model = open_model(rest["source"], quiet=quiet)
    request = model.prepare_edit(
        old, lines=lines, instruction=prompt, start=start, **run_options(model, rest["options"])
    )
    new = _run(request, quiet)
    changes = difflib.unified_diff(_lines(old), _lines(new), f"a/{file}", f"b/{file}")
    for change in changes:
        click.echo(change if change.endswith("\n") else change + "\n\\ No newline at end of file\n", nl=False)
    if write and new != old:
        with replacing(existing_file(file, "FILE")) as stream:
            stream.write(new.encode())


def _run(request: "Request", quiet: bool) -> str:
    """The text as it is now; the canvas is shown on a terminal."""
    from .terminal.console import console
    from .terminal.screen import Terminal
    from .terminal.sinks import Live, show, summary

    stderr = console(stderr=True)
    live = stderr.is_terminal and not stderr.is_dumb_terminal and not quiet
    sinks = [Live(Terminal(stderr), request.model.tokenizer.decode, color=not stderr.no_color)] if live else []
    result = show(request.events(), *sinks).result
    if not quiet:
        click.echo(summary(result), err=True)
    return result.text


def _lines(text: str) -> list[str]:
    """With their ends, which are "\\n" alone: difflib would take others for ends, too."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


if __name__ == "__main__":
    main()
