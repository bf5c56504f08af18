"""Write the reference pages anew from the code: docs/python.md from docstrings, docs/commands.md from the help texts.

    python -m docs.write

tests/test_readme.py holds the pages to them.
"""

import ast
import inspect
import os
import textwrap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import click

import mlx_diffgemma
from benchmarks.readme import written
from mlx_diffgemma import cli

FOLDER = Path(__file__).parent
WIDTH = 100  # of the help texts


def pages() -> dict[Path, dict[str, str]]:
    """What belongs between the markers of each page."""
    return {FOLDER / "python.md": {"api": api()}, FOLDER / "commands.md": {"commands": commands()}}


# ----------------------------------------------------------------------------------------------------------- commands


def commands() -> str:
    """Every command's `--help-all`."""
    parts = []
    for name in cli.COMMANDS:
        command = cli.main.get_command(click.Context(cli.main), name)
        assert isinstance(command, cli.Command)
        names = command.context_settings["help_option_names"]
        context = click.Context(
            command, info_name=f"mlx_diffgemma.{name}", terminal_width=WIDTH, help_option_names=names
        )
        parts.append(f"## {name}\n\n```text\n{command.help_all(context).rstrip()}\n```\n")
    return "\n" + "\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------------- Python


def api() -> str:
    """Every public name: its signature or fields as they stand in the source, and its docstring."""
    parts = []
    for name in mlx_diffgemma.__all__:
        item = getattr(mlx_diffgemma, name)
        if inspect.isclass(item):
            parts.append("\n".join(_class(name, item)))
        elif inspect.isfunction(item):
            parts.append("\n".join(_function(name, item, level=2)))
    return "\n" + "\n".join(parts) + "\n"


def _class(name: str, item: type) -> Iterator[str]:
    node, lines = _parsed(item)
    assert isinstance(node, ast.ClassDef)
    bases = ", ".join(base.__name__ for base in item.__bases__ if base is not object)
    yield f"## {name}\n"
    yield (f"A {bases}. " if bases else "") + _prose(ast.get_docstring(node)) + "\n"
    if fields := [child for child in node.body if isinstance(child, ast.AnnAssign)]:
        block = lines[fields[0].lineno - 1 : _end_of(fields[-1], lines)]
        yield f"```text\n{textwrap.dedent(chr(10).join(block)).rstrip()}\n```\n"
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and not child.name.startswith("_") and ast.get_docstring(child):
            member = inspect.getattr_static(item, child.name)
            if isinstance(member, property | cached_property):
                yield f"`{name}.{child.name}` → `{_returns(child)}`: {_prose(ast.get_docstring(child))}\n"
            else:
                yield from _function(f"{name}.{child.name}", getattr(item, child.name), level=3)


def _function(name: str, item: object, *, level: int) -> Iterator[str]:
    node, lines = _parsed(item)
    assert isinstance(node, ast.FunctionDef)
    signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])).rstrip()
    yield f"{'#' * level} {name}\n"
    yield f"```text\n{signature.removesuffix(':')}\n```\n"
    yield _prose(ast.get_docstring(node)) + "\n"


def _parsed(item: object) -> tuple[ast.stmt, list[str]]:
    source = textwrap.dedent(inspect.getsource(item))  # type: ignore[arg-type]
    return ast.parse(source).body[0], source.splitlines()


def _end_of(field: ast.AnnAssign, lines: list[str]) -> int:
    """The last line of a field, with the comment lines that go on behind it."""
    end = field.end_lineno or field.lineno
    while end < len(lines) and lines[end].lstrip().startswith("#"):
        end += 1
    return end


def _returns(node: ast.FunctionDef) -> str:
    return ast.unparse(node.returns).strip("'\"") if node.returns else "None"


def _prose(docstring: str | None) -> str:
    return inspect.cleandoc(docstring or "").strip()


def main() -> None:
    os.environ.pop("COLUMNS", None)
    for file, blocks in pages().items():
        file.write_text(written(file.read_text(encoding="utf-8"), blocks), encoding="utf-8")


if __name__ == "__main__":
    main()
