"""Files as users mean them: what is written appears whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file that takes the name `path` when the block ends: written beside it, flushed, renamed.

    A block that fails leaves what was there before, and nothing else. Text is UTF-8. Errors: OSError.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder beside `path` that takes its name, and its place, when the block ends; a block that fails leaves
    what was there before, and nothing else. Errors: OSError."""
    path = Path(path)
    beside, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.replaced")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        beside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
