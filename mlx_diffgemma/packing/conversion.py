"""Make a pack from a checkpoint: planned to the byte, streamed a few rows at a time.

Because a recipe fixes every packed size beforehand, each shard's header is written first and workers then fill in
the tensors, piece by piece, wherever they belong: memory stays at a few pieces, whatever the checkpoint's size, and
the bytes do not depend on how the work was cut. A shard gets its name when it is whole; the folder gets its name
when everything is. What is there under `NAME.partial` after an interruption is taken up again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..config import RELEASED
from ..disk import lock, reason, visible
from ..errors import CheckpointError, ConfigError
from ..files import layout
from ..files.checkpoint import Checkpoint, side_files
from ..files.folder import INDEX, families
from ..files.quantization import describe
from ..files.shards import NAMES, Tensor, read_rows, write_at
from ..files.weights import trained_apart
from .card import model_card, output_config
from .pieces import Piece, Progress, Silence, cuts, pack, pieces, workers
from .plan import SHARD, Planned, Shard, lay_out, plan, quantization_block
from .recipes import Recipe

PLAN = "plan.json"  # in a partial folder: what it is going to be


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A checked source, a recipe, and the shards they make."""

    source: Checkpoint
    recipe: Recipe
    planned: tuple[Planned, ...]
    shards: tuple[Shard, ...]
    repo: str | None = None
    revision: str | None = None

    @property
    def total_size(self) -> int:
        return sum(item.nbytes for item in self.planned)

    def tensors(self, items: Iterable[Planned]) -> Iterator[tuple[Tensor, Planned]]:
        return ((self.source.tensors[item.source.name], item) for item in items)

    def fingerprint(self) -> str:
        """Everything the bytes of the pack depend on; a partial folder with another one is started over."""
        files = sorted({tensor.file for tensor in self.source.tensors.values()})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        headers = [hashlib.sha256(shard.header).hexdigest() for shard in self.shards]
        made = {"sources": stats, "recipe": self.recipe.dtype, "headers": headers, "modes": self._modes()}
        return json.dumps(made | {"mlx": version("mlx"), "device": str(mx.default_device())}, indent=1)

    def _modes(self) -> list[str]:
        return sorted({describe(item.how, "") for item in self.planned})


def plan_conversion(
    source: Checkpoint, recipe: Recipe, *, shard_bytes: int = SHARD, repo: str | None = None
) -> Conversion:
    """Plan a conversion. Errors: CheckpointError for a source that is packed already, lacks its vision tensors, or
    has tied tensors that differ."""
    if source.quantized:
        raise CheckpointError(
            f"{source.folder} is quantized already ({len(source.quantized)} packed matrices).\n"
            f"Start from the released weights: --hf-path {RELEASED}"
        )
    if source.joined:
        raise CheckpointError(
            f"{source.folder} stores gate_proj and up_proj of its experts apart, which is read but not converted.\n"
            f"Start from the released weights: --hf-path {RELEASED}"
        )
    sources = layout.sources(source.config)
    if missing := [s.name for s in sources if s.name not in source.tensors]:
        raise CheckpointError(
            f"{source.folder} lacks {len(missing)} tensors: {families(missing)}.\n"
            "A pack keeps the vision tensors; start from a checkpoint that has them."
        )
    for tensor, twin in source.tied:
        _refuse_untied(tensor, source.tensors[twin])
    planned = plan(recipe, sources)
    snapshot = source.folder.resolve()
    return Conversion(
        source=source,
        recipe=recipe,
        planned=tuple(planned),
        shards=tuple(lay_out(planned, shard_bytes)),
        repo=repo,
        revision=snapshot.name if snapshot.parent.name == "snapshots" else None,
    )


def _refuse_untied(tensor: Tensor, twin: Tensor) -> None:
    alike = tensor.shape == twin.shape and tensor.dtype == twin.dtype
    if not alike or not all(
        np.array_equal(read_rows(tensor, start, stop), read_rows(twin, start, stop)) for start, stop in cuts(tensor)
    ):
        raise trained_apart(tensor, twin.name)


def convert(plan: Conversion, target: Path, *, force: bool = False, progress: Progress | None = None) -> None:
    """Write the pack: into `NAME.partial` beside the target, which takes the target's name when it is whole.

    Errors: ConfigError for a target that may not be written, CheckpointError for weights that cannot be converted
    (nothing is left behind) and for a full disk (finished shards are kept for the next run).
    """
    target = _checked_target(plan, target, force)
    partial = target.with_name(target.name + ".partial")
    progress = progress or Silence()
    with _claimed(partial, plan.fingerprint()) as locked:
        if not locked:
            progress.notice(f"{partial.parent} is on a disk without locks: see to it that nothing else writes there.")
        todo = _unfinished(plan, partial)
        try:
            _write_shards(plan, partial, todo, progress)
            _write_sides(plan, partial)
        except (CheckpointError, ConfigError):
            shutil.rmtree(partial)
            raise
        except OSError as error:
            raise CheckpointError(
                f"{partial} stopped growing: {reason(error)}.\n"
                "Finished shards are kept: see to it, then run the same command again."
            ) from error
        replaced = target.with_name(f".{target.name}.replaced")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        partial.rename(target)
        (target / PLAN).unlink()
        shutil.rmtree(replaced, ignore_errors=True)


def _checked_target(plan: Conversion, target: Path, force: bool) -> Path:
    target = target.expanduser().resolve()
    source = plan.source.folder.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise ConfigError(f"--mlx-path {target} and the source {source} lie inside one another; choose another place.")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--mlx-path {target} is a file; expected a folder that does not exist yet.")
    if target.is_dir() and visible(target):
        if not force:
            raise ConfigError(f"--mlx-path {target} is not empty. Choose another place, or replace it with --force.")
        if not (target / "config.json").is_file() or Path.cwd().is_relative_to(target):
            raise ConfigError(f"--mlx-path {target} does not look like a pack; --force replaces nothing else.")
    return target


@contextmanager
def _claimed(partial: Path, fingerprint: str) -> Iterator[bool]:
    """Take up a partial folder that is going to be the same pack, or begin an empty one; one process at a time, which
    a disk without locks (yields False) cannot see to."""
    file = partial / PLAN
    if partial.exists() and not file.is_file() and (not partial.is_dir() or visible(partial)):
        raise ConfigError(f"{partial} is in the way, and this program did not make it. Move it elsewhere.")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+")
    except OSError as error:
        raise CheckpointError(f"{partial} cannot be written: {reason(error)}.") from None
    with stream:
        locked = lock(
            stream, ConfigError(f"another process is writing {partial}. Wait for it, or choose another place.")
        )
        stream.seek(0)
        if stream.read() != fingerprint:
            for path in partial.iterdir():
                if path != file:
                    path.unlink(missing_ok=True)  # a `._` companion goes with its file
            stream.truncate(0)
            stream.write(fingerprint)
            stream.flush()
        yield locked


def _unfinished(plan: Conversion, folder: Path) -> list[Shard]:
    """The shards that are still to be written. Errors: CheckpointError where they do not fit; finished ones are kept,
    and without any the folder goes."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)
    todo = [shard for shard in plan.shards if not _is_finished(folder / shard.name, shard)]
    needed, free = sum(shard.size for shard in todo) + (64 << 20), shutil.disk_usage(folder).free
    if needed > free:
        if len(todo) == len(plan.shards):
            shutil.rmtree(folder)
        kept = len(plan.shards) - len(todo)
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.1f} GB free and the pack needs {needed / 1e9:.1f} GB more.\n"
            + (f"{kept} of {len(plan.shards)} shards are kept in {folder}. " if kept else "")
            + "Make room, choose another --mlx-path, or a smaller --recipe."
        )
    return todo


def _write_shards(plan: Conversion, folder: Path, todo: list[Shard], progress: Progress) -> None:
    tensors = [tensor for shard in todo for tensor, _ in plan.tensors(shard.items)]
    dtype = NAMES[plan.recipe.dtype]
    progress.begin(len(tensors), sum(tensor.nbytes for tensor in tensors))
    with workers() as pool:
        for shard in todo:
            with (folder / f"{shard.name}.tmp").open("wb", buffering=0) as stream:
                stream.write(shard.header)
                stream.truncate(shard.size)

                def write(piece: Piece, shard: Shard = shard, file: int = stream.fileno()) -> Piece:
                    raw = read_rows(piece.tensor, piece.start, piece.stop)
                    for name, rows in pack(piece, raw, dtype).items():
                        write_at(file, rows.data.cast("B"), shard.slots[name].start + piece.start * rows[0].nbytes)
                    return piece

                for piece in pool.map(write, pieces(plan.tensors(shard.items))):
                    progress.advance(piece)
                os.fsync(stream.fileno())
            (folder / f"{shard.name}.tmp").rename(folder / shard.name)


def _is_finished(file: Path, shard: Shard) -> bool:
    if not file.is_file() or file.stat().st_size != shard.size:
        return False
    with file.open("rb") as stream:
        return stream.read(len(shard.header)) == shard.header


def _write_sides(plan: Conversion, folder: Path) -> None:
    """Index, config, tokenizer and templates, generation and processor config, model card."""
    where = {key: shard.name for shard in plan.shards for key in shard.slots}
    index = {"metadata": {"total_size": plan.total_size}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=4))
    block = quantization_block(plan.recipe, plan.planned)
    (folder / "config.json").write_text(json.dumps(output_config(plan.source, plan.recipe.dtype, block), indent=4))
    for name in side_files(plan.source.folder):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(plan.source.folder / name, folder / name)
    (folder / "README.md").write_text(model_card(plan))
