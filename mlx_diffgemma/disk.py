"""Paths, files and locks: what a user's path means, and how a file comes to be there whole or not at all.

`._*` and `.DS_Store`, which macOS leaves in folders on foreign disks, are nobody's files.
"""

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import ConfigError, DiffGemmaError
from .values import shown

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your share of the disk is used up",
    errno.EFBIG: "the disk does not hold files of this size",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links lead in a circle",
    errno.EIO: "the disk reports an input/output error",
    errno.EMFILE: "this process has too many files open",
    errno.ENFILE: "this machine has too many files open",
    errno.ESTALE: "the network disk has lost it",
    errno.EPIPE: "its reader has gone",
}
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)  # of SMB, some NFS, sshfs
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def reason(error: OSError) -> str:
    """Why, in words: the error's number decides, not its type."""
    known = REASONS.get(error.errno or 0)
    return known or (error.strerror or str(error) or type(error).__name__).lower()


# ----------------------------------------------------------------------------------------------------------- paths


def user_path(text: str | Path, option: str) -> Path:
    """What a user wrote as a path, with `~` for a home. `option` names it in the errors.

    Errors: ConfigError for an empty one, one with a NUL, a home that nobody has, and a relative path when the working
    directory was deleted.
    """
    if not isinstance(text, str | Path):
        raise ConfigError(f"{option} is {shown(text)}, expected a path.")
    if not str(text):
        raise ConfigError(f"{option} is empty, expected a path.")
    if "\0" in str(text):
        raise ConfigError(f"{option} {str(text)!r} holds a NUL character, which no path can.")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{option} {text}: there is no such home folder.") from None
    if not path.is_absolute():
        try:
            os.getcwd()
        except OSError:
            raise ConfigError(
                f"{option} {text}: the working directory was deleted, so a relative path leads nowhere.\n"
                "Change to another folder (cd ~), or give a path that begins with / or ~."
            ) from None
    return path


def existing_file(text: str | Path, option: str) -> Path:
    """A file to read. Errors: ConfigError when there is none, it is a folder, or it may not be read."""
    path = user_path(text, option)
    found = _is_folder(path, option)
    if found is None:
        raise ConfigError(f"{option} {path}: there is no such file.")
    if found:
        raise ConfigError(f"{option} {path} is a folder, expected a file.")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"{option} {path} cannot be read: permission denied.")
    return path


def new_file(text: str | Path, option: str) -> Path:
    """A file to write, which may be there already: asked before the work, so that its result is not lost.

    Errors: ConfigError when its folder does not exist or may not be written, and when it is a folder itself.
    """
    path = user_path(text, option)
    if _is_folder(path, option):
        raise ConfigError(f"{option} {path} is a folder, expected the name of a file.")
    folder = _is_folder(path.parent, option)
    if not folder:
        what = "there is no folder" if folder is None else "this is no folder:"
        raise ConfigError(f"{option} {path} cannot be written: {what} {path.parent}.")
    if not os.access(path if path.exists() and not path.is_file() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be written: permission denied in {path.parent}.")
    return path


def new_folder(text: str | Path, option: str) -> Path:
    """A folder to fill; it and the folders above it are made when the work begins, or may be there already.

    Errors: ConfigError when it is a file, lies below one, or may not be written.
    """
    path = user_path(text, option)
    above = path
    while (found := _is_folder(above, option)) is None and above != above.parent:
        above = above.parent
    if not found:
        raise ConfigError(f"{option} {path}: {above} is a file, expected a folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path} cannot be written: permission denied in {above}.")
    return path


def _is_folder(path: Path, option: str) -> bool | None:
    """None when there is nothing of this name."""
    try:
        return path.is_dir() if path.exists() else None
    except OSError as error:
        raise ConfigError(f"{option} {_short(path)} cannot be used: {reason(error)}.") from None


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 120 else f"{text[:60]}…{text[-40:]}"


def is_junk(name: str) -> bool:
    """Whether a file of this name is only macOS's note about another one, or about its folder."""
    return name.startswith("._") or name == ".DS_Store"


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder and matches `pattern`, in order of names, without what macOS leaves there."""
    return sorted(path for path in folder.glob(pattern) if not is_junk(path.name))


# ----------------------------------------------------------------------------------------------------------- files


@contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """A stream for the whole new content of `path`: written beside it, flushed to the disk, and renamed at the end.

    `mode` is "wb", or "w" for UTF-8 text. Until the end the old file stays as it is; when the block fails, so does it
    for good, and what was written is removed. A device or a pipe is written in place. Errors: OSError.
    """
    path = Path(path)
    target = path.resolve() if path.is_symlink() else path  # a link stays a link
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if target.exists() and not target.is_file():
        with open(target, mode, **text) as stream:
            yield stream
        return
    beside = target.parent / f".{secrets.token_hex(6)}.part"
    try:
        with open(beside, mode.replace("w", "x"), **text) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, beside, str(beside)):
            error.filename = str(path)  # a write that fails names no file, and the one beside is nobody's
        raise


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder beside `path`, which takes its name (and its place) at the end, and is removed on failure.

    Errors: OSError.
    """
    path = Path(path)
    mark = secrets.token_hex(6)
    beside, old = path.with_name(f".{mark}.part"), path.with_name(f".{mark}.old")
    beside.mkdir(parents=True)
    try:
        yield beside
        if path.exists():
            path.rename(old)
        beside.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------- locks


def lock(stream: IO[Any], busy: DiffGemmaError) -> bool:
    """Hold the file of an open stream until it is closed; False on a disk that has no locks.

    Errors: `busy` when another process holds it, OSError for anything else.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        if error.errno in HELD:
            raise busy from None
        raise
    return True
