"""rich's console as this package uses it: a path, a name or a model's words are text, never markup."""

from rich.console import Console


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that prints `x[/b]` as it is. COLUMNS=0 means that nobody knows: 80."""
    made = Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
    if made.width < 1:
        made = Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, width=80)
    return made
