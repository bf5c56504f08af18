"""Make a pack from a checkpoint: planned to the byte, streamed a few rows at a time.

Because a recipe fixes every packed size beforehand, each shard's header is written first and workers then fill in
the tensors, piece by piece, wherever they belong: memory stays at a few pieces, whatever the checkpoint's size, and
the bytes do not depend on how the work was cut. A shard gets its name when it is whole; the folder gets its name
when everything is. What is there under `NAME.partial` after an interruption is taken up again.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from . import __version__, checkpoint, layout, quantize
from .checkpoint import INDEX, Checkpoint, read_json
from .config import RELEASED, GenerationConfig, Recipe
from .errors import CheckpointError, ConfigError
from .quantize import NAMES, WORDS, Planned
from .shards import SHARD, Shard, Tensor, as_array, as_raw, lay_out, read_rows, write_at

PIECE = 4_000_000  # bytes of the source that a worker holds at a time: measured best on two CPU cores
PLAN = "plan.json"  # in a partial folder: what it is going to be
_GPU = Lock()
INFINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}  # bits of +∞; above it lie the NaNs

# ------------------------------------------------------------------------------------------------------ the pieces


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows `start` … `stop` of a tensor, all leading dimensions taken together."""

    tensor: Tensor
    item: Planned
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.tensor.nbytes // self.tensor.rows


def cuts(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """The tensor's rows in runs of at most PIECE bytes, or one row."""
    step = max(1, PIECE * tensor.rows // tensor.nbytes)
    return ((start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step))


def pieces(pairs: Iterable[tuple[Tensor, Planned]]) -> list[Piece]:
    """All the work there is, in the order of the tensors."""
    return [Piece(tensor=t, item=item, start=a, stop=b) for t, item in pairs for a, b in cuts(t)]


def pack(piece: Piece, raw: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """What is stored for a piece and its raw rows, by tensor name, raw again; what is not packed is cast to `dtype`.

    Errors: CheckpointError for NaN or infinity, in the source or because `dtype` cannot hold a value.
    """
    cast = raw
    if piece.tensor.dtype != dtype:
        converted = as_array(raw, piece.tensor.dtype).astype(quantize.DTYPES[dtype])
        with device():
            cast = as_raw(converted)
    _refuse_nonfinite(piece.tensor, raw, cast, dtype)
    if (how := piece.item.how) is None:
        return {piece.item.source.name: cast}
    parts = quantize.quantize(as_array(cast, dtype), how)
    with device():
        mx.eval(parts)
    return {f"{piece.item.source.path}.{part}": as_raw(array) for part, array in parts.items()}


def device() -> AbstractContextManager[Any]:
    """A GPU is driven by one thread at a time; on a CPU every thread computes."""
    return nullcontext() if mx.default_device() == mx.cpu else _GPU


def _refuse_nonfinite(tensor: Tensor, raw: np.ndarray, cast: np.ndarray, dtype: str) -> None:
    if _largest(cast) < INFINITE[dtype]:
        return
    if _largest(raw) >= INFINITE[tensor.dtype]:
        raise CheckpointError(f"{tensor.file.name}: {tensor.name} holds NaN or infinity; expected finite weights.")
    raise CheckpointError(
        f"{tensor.file.name}: {tensor.name} has values that {WORDS[dtype]} cannot hold.\n"
        "Use --dtype bfloat16 or float32."
    )


def _largest(raw: np.ndarray) -> int:
    """The bits of the largest magnitude: for IEEE floats the order of bits is the order of magnitudes."""
    return int((raw & raw.dtype.type((1 << 8 * raw.itemsize - 1) - 1)).max(initial=0))


class Progress(Protocol):
    """Whoever wants to know how far the work is."""

    def begin(self, tensors: int, nbytes: int) -> None:
        """So many tensors and source bytes are ahead."""

    def advance(self, piece: Piece) -> None:
        """One piece is done."""


class Silence:
    """A Progress that nobody watches."""

    def begin(self, tensors: int, nbytes: int) -> None:
        pass

    def advance(self, piece: Piece) -> None:
        pass


# ----------------------------------------------------------------------------------------------------- conversion


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
        return sorted({quantize.describe(item.how, "") for item in self.planned})


def prepare(source: Checkpoint, recipe: Recipe, *, shard_bytes: int = SHARD, repo: str | None = None) -> Conversion:
    """Plan a conversion. Errors: CheckpointError for a source that is packed already, lacks its vision tensors, or
    has tied tensors that differ."""
    if source.quantized:
        raise CheckpointError(
            f"{source.folder} is quantized already ({len(source.quantized)} packed matrices).\n"
            f"Start from the released weights: --hf-path {RELEASED}"
        )
    sources = layout.sources(source.config)
    if missing := [s.name for s in sources if s.name not in source.tensors]:
        raise CheckpointError(
            f"{source.folder} lacks {len(missing)} tensors: {checkpoint.families(missing)}.\n"
            "A pack keeps the vision tensors; start from a checkpoint that has them."
        )
    for tensor, twin in source.tied:
        _refuse_untied(tensor, source.tensors[twin])
    planned = quantize.plan(recipe, sources)
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
        raise checkpoint.trained_apart(tensor, twin.name)


def convert(plan: Conversion, target: Path, *, force: bool = False, progress: Progress | None = None) -> None:
    """Write the pack: into `NAME.partial` beside the target, which takes the target's name when it is whole.

    Errors: ConfigError for a target that may not be written, CheckpointError for weights that cannot be converted
    (nothing is left behind) and for a full disk (finished shards are kept for the next run).
    """
    target = _checked_target(plan, target, force)
    partial = target.with_name(target.name + ".partial")
    with _claimed(partial, plan.fingerprint()):
        try:
            _write_shards(plan, partial, progress or Silence())
            _write_sides(plan, partial)
        except (CheckpointError, ConfigError):
            shutil.rmtree(partial)
            raise
        except OSError as error:
            raise CheckpointError(
                f"{partial} stopped growing: {error.strerror or error}.\n"
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
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise ConfigError(f"--mlx-path {target} is not empty. Choose another place, or replace it with --force.")
        if not (target / "config.json").is_file() or Path.cwd().is_relative_to(target):
            raise ConfigError(f"--mlx-path {target} does not look like a pack; --force replaces nothing else.")
    return target


@contextmanager
def _claimed(partial: Path, fingerprint: str) -> Iterator[None]:
    """Take up a partial folder that is going to be the same pack, or begin an empty one; one process at a time."""
    file = partial / PLAN
    if partial.exists() and not file.is_file() and (not partial.is_dir() or any(partial.iterdir())):
        raise ConfigError(f"{partial} is in the way, and this program did not make it. Move it elsewhere.")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+")
    except OSError as error:
        raise CheckpointError(f"{partial} cannot be written: {error.strerror or error}.") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process is writing {partial}. Wait for it, or choose another place.") from None
        stream.seek(0)
        if stream.read() != fingerprint:
            for path in partial.iterdir():
                if path != file:
                    path.unlink()
            stream.truncate(0)
            stream.write(fingerprint)
            stream.flush()
        yield


def _write_shards(plan: Conversion, folder: Path, progress: Progress) -> None:
    for path in folder.glob("*.tmp"):
        path.unlink()
    todo = [shard for shard in plan.shards if not _is_finished(folder / shard.name, shard)]
    needed, free = sum(shard.size for shard in todo) + (64 << 20), shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.1f} GB free and the pack needs {needed / 1e9:.1f} GB more.\n"
            "Make room, choose another --mlx-path, or a smaller --recipe."
        )
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


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Two threads per core, so that one reads while another computes; MLX keeps few freed buffers, so memory stays
    at what the pieces need."""
    before = mx.set_cache_limit(64 * PIECE)
    pool = ThreadPoolExecutor(min(2 * (os.cpu_count() or 1), 16))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        mx.set_cache_limit(before)


# -------------------------------------------------------------------------------------------------- beside the shards

SIDES = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*")


def _write_sides(plan: Conversion, folder: Path) -> None:
    """Index, config, tokenizer and templates, generation and processor config, model card."""
    where = {key: shard.name for shard in plan.shards for key in shard.slots}
    index = {"metadata": {"total_size": plan.total_size}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=4))
    block = quantize.quantization_block(plan.recipe, plan.planned)
    (folder / "config.json").write_text(json.dumps(output_config(plan.source, plan.recipe.dtype, block), indent=4))
    for file in side_files(plan.source.folder):
        shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(model_card(plan))


def side_files(folder: Path) -> list[Path]:
    """What travels with the weights unchanged."""
    made_here = {"config.json", INDEX, PLAN, "model_index.json"}
    found = {file for pattern in SIDES for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name not in made_here)


def output_config(source: Checkpoint, dtype: str, block: dict[str, object]) -> dict[str, Any]:
    """The source's config in the released dialect, with the `quantization` block and all stop ids."""
    config = json.loads(json.dumps(source.raw_config))
    for key in ("_name_or_path", "torch_dtype", "quantization", "quantization_config"):
        config.pop(key, None)
    text, vision = config["text_config"], config.get("vision_config")
    if (per_layer := text.pop("per_layer_config", None)) is not None:
        _write_geometry(source, text, per_layer)
    for part in (config, text, vision or {}):
        if "dtype" in part or part is config:
            part["dtype"] = dtype
    if vision and vision.get("rope_parameters", {}).get("rope_type") == "axial":
        vision["rope_parameters"]["rope_type"] = "default"
    generation_file = source.folder / "generation_config.json"
    if generation_file.exists():
        generation = {key: value for key, value in read_json(generation_file).items() if value is not None}
        config["generation_config"] = generation
        ids = (*source.config.eos_token_ids, *GenerationConfig.from_dict(generation).stop_ids)
        config["eos_token_id"] = list(dict.fromkeys(ids))
    if block:
        config["quantization"] = config["quantization_config"] = block
    return dict(sorted(config.items()))


def _write_geometry(source: Checkpoint, text: dict[str, Any], per_layer: dict[str, Any]) -> None:
    """Full layers in the released words, which every reader knows, if they say all there is to say."""
    kinds = {(layer.kind, layer.head_dim, layer.num_kv_heads) for layer in source.config.layers}
    sliding = {kind for kind in kinds if kind[0] == "sliding_attention"}
    full = kinds - sliding
    regular = sliding <= {("sliding_attention", text["head_dim"], text["num_key_value_heads"])} and len(full) <= 1
    if not regular:
        text["per_layer_config"] = per_layer
    elif full:
        (_, text["global_head_dim"], text["num_global_key_value_heads"]) = next(iter(full))


def model_card(plan: Conversion) -> str:
    """README.md: where the weights come from, what was done to them, how to run them."""
    base, recipe = plan.repo or RELEASED, plan.recipe
    origin = f"[{plan.repo}](https://huggingface.co/{plan.repo})" if plan.repo else "a local checkpoint"
    revision = f" at revision `{plan.revision}`" if plan.revision else ""
    lines = [
        "---",
        "library_name: mlx",
        "license: apache-2.0",
        "license_link: https://ai.google.dev/gemma/docs/gemma_4_license",
        "pipeline_tag: text-generation",
        f"base_model: {base}",
        "tags: [mlx, diffusion_gemma, text-diffusion]",
        "---",
        "",
        f"# DiffusionGemma for MLX, recipe `{recipe.name}`",
        "",
        f"Converted from {origin}{revision} by mlx_diffgemma {__version__}.",
        recipe.because,
        "",
        "| component | tensors | packing | bits per weight | bytes |",
        "|---|---|---|---|---|",
    ]
    for component, size in quantize.sizes(recipe, plan.planned).items():
        lines.append(
            f"| {component} | {size.tensors} | {size.packing} | {size.bits_per_weight:.2f} | {size.nbytes:,} |"
        )
    lines += [f"| total | | | | {plan.total_size:,} |", "", "```bash", "pip install mlx-diffgemma"]
    lines += ['mlx_diffgemma.generate --model PATH_OR_REPO "Why is the sky blue?"', "```", ""]
    return "\n".join(lines)
