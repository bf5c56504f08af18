"""Paths, files and locks: refused before the work, whole or not at all, and held by one process."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_diffgemma import disk
from mlx_diffgemma.errors import ConfigError

Check = Callable[..., Path]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `file`, `folder/` and a home of its own."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "folder"))
    return tmp_path


@pytest.mark.parametrize(
    ("check", "text", "words"),
    [
        (disk.user_path, "", "--x is empty, expected a path"),
        (disk.user_path, "a\0b", "holds a NUL character"),
        (disk.user_path, "~nobody-here/x", "--x ~nobody-here/x: there is no such home folder"),
        (disk.existing_file, "absent", "--x absent: there is no such file"),
        (disk.existing_file, "folder", "--x folder is a folder, expected a file"),
        (disk.existing_file, "file/below", "there is no such file"),
        (disk.existing_file, "x" * 300, "cannot be used: the name is too long"),
        (disk.new_file, "folder", "--x folder is a folder, expected the name of a file"),
        (disk.new_file, "absent/x.json", "cannot be written: there is no folder absent"),
        (disk.new_file, "file/x.json", "cannot be written: this is no folder: file"),
        (disk.new_file, "x" * 300, "cannot be used: the name is too long"),
        (disk.new_file, "folder/" + "y/" * 3000, "cannot be used: the name is too long"),
        (disk.new_folder, "file", "--x file: file is a file, expected a folder"),
        (disk.new_folder, "file/a/b", "file is a file, expected a folder"),
        (disk.new_folder, "x" * 300, "cannot be used: the name is too long"),
    ],
)
def test_paths_that_lead_nowhere(here: Path, check: Check, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(text, "--x")
    assert words in str(caught.value) and len(str(caught.value)) < 300


def test_paths_as_a_shell_means_them(here: Path) -> None:
    assert disk.new_file("~/x.json", "--x") == here / "folder/x.json"
    assert disk.new_folder("~/a/b/c", "--x") == here / "folder/a/b/c"
    assert disk.existing_file("file", "--x") == Path("file")
    assert disk.new_file("/dev/null", "--x") == Path("/dev/null")
    assert disk.new_file("x[b] é.json", "--x") == Path("x[b] é.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_that_may_not_be_written(here: Path) -> None:
    (here / "folder").chmod(0o500)
    for check in (disk.new_file, disk.new_folder):
        with pytest.raises(ConfigError, match="permission denied in"):
            check("folder/x", "--x")


def test_a_deleted_working_directory(here: Path) -> None:
    gone = here / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="the working directory was deleted"):
        disk.new_file("x.json", "--x")
    assert disk.new_file(here / "x.json", "--x") == here / "x.json"


def test_macos_notes_are_nobodys_files(tmp_path: Path) -> None:
    for name in (".DS_Store", "._a.json", "a.json", ".hidden", "b.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in disk.visible(tmp_path)] == [".hidden", "a.json", "b.txt"]
    assert [path.name for path in disk.visible(tmp_path, "*.json")] == ["a.json"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("old")
    file.chmod(0o640)
    with pytest.raises(RuntimeError), disk.replacing(file, "w") as stream:
        stream.write("half")
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.json", "old")]
    with disk.replacing(file, "w") as stream:
        stream.write("new é\n")
        assert file.read_text() == "old"
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.json", "new é\n".encode())]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught, disk.replacing(tmp_path / "x", "w") as stream:
        stream.write("new")
    assert disk.reason(caught.value) == "the disk is full"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with disk.replacing(tmp_path / "link", "w") as stream:
        stream.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    with disk.replacing("/dev/null") as stream:
        stream.write(b"x")
    assert Path("/dev/null").is_char_device()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(RuntimeError), disk.replacing_folder(folder) as beside:
        (beside / "half").touch()
        raise RuntimeError
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["m", "m/old"]
    with disk.replacing_folder(folder) as beside:
        (beside / "new").touch()
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["m", "m/new"]


@pytest.mark.parametrize("code", disk.NO_LOCKS)
def test_a_disk_without_locks_is_used_without(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (tmp_path / "x").open("w") as stream:
        assert disk.lock(stream, ConfigError("busy")) is False


def test_one_process_holds_a_lock(tmp_path: Path) -> None:
    held = f"import fcntl; f = open({str(tmp_path / 'x')!r}, 'w'); fcntl.flock(f, 2); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with (tmp_path / "x").open("w") as stream:
        with pytest.raises(ConfigError, match="busy"):
            disk.lock(stream, ConfigError("busy"))
        other.communicate(b"\n")
        assert disk.lock(stream, ConfigError("busy")) is True


def test_an_unknown_reason_is_the_systems_own() -> None:
    assert disk.reason(OSError(errno.ENOSPC, "?")) == "the disk is full"
    assert disk.reason(OSError(errno.EBUSY, "Device busy")) == "device busy"
    assert disk.reason(OSError("odd")) == "odd"
    assert disk.reason(OSError()) == "oserror"


def test_a_write_that_fails_names_the_file_that_was_meant(tmp_path: Path) -> None:
    """The system names none, or the one beside it."""
    for name in (None, "beside"):
        with pytest.raises(OSError, match="No space left") as caught, disk.replacing(tmp_path / "bench.json") as stream:
            raise OSError(errno.ENOSPC, "No space left", stream.name if name else None)
        assert caught.value.filename == str(tmp_path / "bench.json")
    with pytest.raises(OSError, match="gone") as caught, disk.replacing(tmp_path / "x"):
        raise FileNotFoundError(errno.ENOENT, "gone", "another")
    assert caught.value.filename == "another" and not list(tmp_path.iterdir())
