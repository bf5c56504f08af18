"""Conversions that are interrupted, and packs that are verified."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import CheckpointError, ConfigError
from mlx_diffgemma.files import shards
from mlx_diffgemma.files.checkpoint import open_checkpoint
from mlx_diffgemma.files.shards import read_header
from mlx_diffgemma.files.weights import load_network
from mlx_diffgemma.packing import conversion, pieces
from mlx_diffgemma.packing.conversion import Conversion, convert, plan_conversion
from mlx_diffgemma.packing.recipes import load_recipe
from mlx_diffgemma.packing.verification import verify
from tests import synthetic

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with the released layout; nobody writes to it."""
    return synthetic.small(tmp_path_factory.mktemp("source") / "checkpoint")


def plan_for(source: Path, recipe: str = "q4", shard_bytes: int = 60_000) -> Conversion:
    return plan_conversion(open_checkpoint(source), load_recipe(recipe), shard_bytes=shard_bytes)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


WORKER = """
import sys, time
from pathlib import Path
from mlx_diffgemma.files.checkpoint import open_checkpoint
from mlx_diffgemma.packing import conversion
from mlx_diffgemma.packing.recipes import load_recipe

write = conversion.write_at
def slowly(*args):
    time.sleep(0.002)
    write(*args)
conversion.write_at = slowly
plan = conversion.plan_conversion(open_checkpoint(Path(sys.argv[1])), load_recipe("q4"), shard_bytes=60_000)
conversion.convert(plan, Path(sys.argv[2]))
"""


def test_killed_at_random_moments_and_resumed_the_bytes_are_the_same(source: Path, tmp_path: Path) -> None:
    convert(plan_for(source), tmp_path / "whole")
    partial, pack = tmp_path / "pack.partial", tmp_path / "pack"
    rng, killed, finished = random.Random(0), 0, set()
    while killed < 3 and not pack.exists():
        process = subprocess.Popen([sys.executable, "-c", WORKER, source, pack], cwd=ROOT)
        while process.poll() is None and not set(partial.glob("*.tmp")):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        assert pack.exists() or {file.name for file in partial.glob("*.safetensors")} >= finished
        finished = {file.name for file in partial.glob("*.safetensors")}
    assert killed >= 2
    if not pack.exists():
        convert(plan_for(source), pack)
    assert contents(pack) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pack", "whole"]


class StopAfter(pieces.Silence):
    """Raises after so many pieces."""

    def __init__(self, pieces: int, error: BaseException | None):
        self.pieces, self.error, self.seen = pieces, error, 0

    def advance(self, piece: pieces.Piece) -> None:
        self.seen += 1
        if self.error and self.seen == self.pieces:
            raise self.error


def test_after_ctrl_c_the_old_pack_is_there_and_finished_shards_stay_finished(source: Path, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    convert(plan_for(source, "q8"), pack)
    before = contents(pack)
    plan = plan_for(source)
    first, rest = StopAfter(60, KeyboardInterrupt()), StopAfter(0, None)
    with pytest.raises(KeyboardInterrupt):
        convert(plan, pack, force=True, progress=first)
    assert contents(pack) == before
    finished = [shard for shard in plan.shards if (tmp_path / "pack.partial" / shard.name).exists()]
    assert finished
    convert(plan, pack, force=True, progress=rest)
    assert rest.seen == sum(len(shard.items) for shard in plan.shards if shard not in finished)
    load_network(pack)
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


@pytest.mark.parametrize("change", ["recipe", "source"])
def test_what_was_begun_for_another_recipe_or_source_is_not_taken_up(change: str, tmp_path: Path) -> None:
    source = synthetic.small(tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert(plan_for(source), tmp_path / "pack", progress=StopAfter(60, KeyboardInterrupt()))
    if change == "source":
        synthetic.small(source, seed=1)
    plan = plan_for(source, "q8" if change == "recipe" else "q4")
    convert(plan, tmp_path / "pack")
    convert(plan, tmp_path / "fresh")
    assert contents(tmp_path / "pack") == contents(tmp_path / "fresh")


def test_a_full_disk_is_noticed_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"has 0.0 GB free and the pack needs 0.1 GB more"):
        convert(plan_for(source), tmp_path / "pack")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_keeps_what_is_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write_at = [0], shards.write_at

    def until_full(file: int, data: memoryview, position: int) -> None:
        written[0] += len(data)
        if written[0] > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_at(file, data, position)

    monkeypatch.setattr(conversion, "write_at", until_full)
    with pytest.raises(CheckpointError, match=r"the disk is full.\nFinished shards are kept"):
        convert(plan_for(source), tmp_path / "pack")
    assert [path.name for path in tmp_path.iterdir()] == ["pack.partial"]
    kept = contents(tmp_path / "pack.partial")
    assert any(name.endswith(".safetensors") for name in kept)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(CheckpointError, match=r"shards are kept in .*pack\.partial"):
        convert(plan_for(source), tmp_path / "pack")
    assert {name for name in kept if name.endswith(".safetensors")} <= set(contents(tmp_path / "pack.partial"))
    monkeypatch.undo()
    convert(plan_for(source), tmp_path / "pack")
    load_network(tmp_path / "pack")


def test_two_processes_do_not_write_one_pack(source: Path, tmp_path: Path) -> None:
    class Second(pieces.Silence):
        def advance(self, piece: pieces.Piece) -> None:
            with pytest.raises(ConfigError, match="another process is writing"):
                convert(plan_for(source), tmp_path / "pack")

    convert(plan_for(source), tmp_path / "pack", progress=Second())
    load_network(tmp_path / "pack")


MEASURE = """
import resource, sys
from pathlib import Path
from mlx_diffgemma.files.checkpoint import open_checkpoint
from mlx_diffgemma.packing import conversion
from mlx_diffgemma.packing.recipes import load_recipe

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()  # Linux counts the parent's memory in ru_maxrss
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
plan = conversion.plan_conversion(open_checkpoint(Path(sys.argv[1])), load_recipe("q4"))
before = peak()
conversion.convert(plan, Path(sys.argv[2]))
print(peak() - before)
"""


def test_memory_stays_at_a_few_pieces(tmp_path: Path) -> None:
    """Half a gigabyte of zeros, in tensors of up to 134 MB, costs less than 100 MB."""
    config = synthetic.small_config(hidden_size=1024, moe_intermediate_size=1024, num_experts=16, vocab_size=1024)
    source = synthetic.write(tmp_path / "source", config)
    sizes = [tensor.nbytes for tensor in open_checkpoint(source).tensors.values()]
    assert sum(sizes) > 400_000_000
    assert max(sizes) > 60_000_000
    command = [sys.executable, "-c", MEASURE, source, tmp_path / "pack"]
    grown = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert 0 < grown < 100_000_000


# ---------------------------------------------------------------------------------------------------- verification


@pytest.fixture(scope="module")
def pack(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-file pack; whoever damages it repairs it."""
    folder = tmp_path_factory.mktemp("pack") / "pack"
    convert(plan_for(source, shard_bytes=1 << 40), folder)
    return folder


def test_verification_reports_the_error_of_every_component(source: Path, pack: Path) -> None:
    errors = verify(open_checkpoint(source), pack)
    worst = {component: max(e.relative for e in tensors.values()) for component, tensors in errors.items()}
    assert worst.pop("norms and scalars") == worst.pop("vision") == 0
    assert 0.03 < worst.pop("experts") < 0.15
    assert all(0 < error < 0.02 for error in worst.values())
    assert sum(len(tensors) for tensors in errors.values()) == len(open_checkpoint(source).tensors)


@settings(max_examples=40, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_verification_fails_on_any_flipped_bit(position: float, bit: int, source: Path, pack: Path) -> None:
    file = pack / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = min(tensor.start for tensor in read_header(file))
    offset = start + int(position * (len(data) - start))
    data[offset] ^= 1 << bit
    file.write_bytes(data)
    try:
        with pytest.raises(CheckpointError, match=r"is not what its packing makes of the source: 1 of"):
            verify(open_checkpoint(source), pack)
    finally:
        data[offset] ^= 1 << bit
        file.write_bytes(data)


def test_verification_looks_at_the_config_too(source: Path, tmp_path: Path) -> None:
    convert(plan_for(source), tmp_path / "pack")
    config = json.loads((tmp_path / "pack" / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (tmp_path / "pack" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json: text_config.rms_norm_eps is 1e-05, expected 1e-06"):
        verify(open_checkpoint(source), tmp_path / "pack")


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_said_before_the_work(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    said: list[str] = []

    class Watch(pieces.Silence):
        def begin(self, tensors: int, nbytes: int) -> None:
            said.append("begun")

        def notice(self, text: str) -> None:
            said.append(text)

    def refuse(*_: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr("fcntl.flock", refuse)
    convert(plan_for(source), tmp_path / "pack", progress=Watch())
    assert said == [f"{tmp_path} is on a disk without locks: see to it that nothing else writes there.", "begun"]
    assert (tmp_path / "pack/config.json").is_file()
