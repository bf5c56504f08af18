"""Checkpoint folders: names, shapes and packing, held against each other before a byte of a tensor is read.

Three kinds of folder are read: a Hugging Face checkpoint (released or saved by transformers), a pack of this project,
and the mlx-community packs. Nothing is believed: headers, offsets, indexes, names and shapes are checked against
each other and against config.json.
"""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import RELEASED, ModelConfig
from ..errors import CheckpointError, ConfigError
from ..generation.settings import GenerationConfig
from .layout import find_rule, is_vision, sources
from .quantization import Quantization, packing
from .shards import FLOATS, Tensor, printable, read_header

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder whose names, shapes and packing agree with its config. Tensors are keyed by their names in a pack."""

    folder: Path
    raw_config: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, Tensor]
    quantized: dict[str, Quantization] = field(default_factory=dict)  # module path, as in the pack → packing
    tied: tuple[tuple[Tensor, str], ...] = ()  # dropped tensors, and the pack name of the tensor each must equal


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Errors: CheckpointError when the file is absent or something else."""
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file.name} is missing in {file.parent}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} cannot be read as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file.name} holds a {type(values).__name__}, expected an object.")
    return values


def _shard_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and which tensor the index (if there is one) says is where."""
    if (folder / INDEX).exists():
        where = read_json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
            raise CheckpointError(f"{INDEX}: weight_map is not a map from tensor to file name.")
        names = sorted(set(where.values()))
        for name in names:
            if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
                raise CheckpointError(
                    f"{INDEX} names a file outside the folder: {name!r}. Do not trust this checkpoint."
                )
    else:
        where = None
        names = found = sorted(path.name for path in folder.glob("model*.safetensors"))
        if match := re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", names[0] if names else ""):
            names = [f"model-{i + 1:05d}-of-{match[1]}.safetensors" for i in range(min(int(match[1]), 100_000))]
        if len(found) > len(names):
            raise CheckpointError(f"{folder} has weights in more than one form, and no index says which: {found[0]}, …")
    if not names:
        raise CheckpointError(f"no model*.safetensors in {folder}: there are no weights to read.")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of {len(names)} weight files: {', '.join(map(printable, absent[:3]))}"
            f"{' …' if len(absent) > 3 else ''}.\nDownload the checkpoint again."
        )
    return [folder / name for name in names], where


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of all shards, checked against the index."""
    files, index = _shard_files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for tensor in read_header(file):
            if other := tensors.get(tensor.name):
                raise CheckpointError(f"{printable(tensor.name)} is in two files: {other.file.name} and {file.name}.")
            tensors[tensor.name] = tensor
    if index is not None:
        for name, file in index.items():
            if name not in tensors:
                raise CheckpointError(f"{INDEX} names {printable(name)}, and {file} does not have it.")
            if tensors[name].file.name != file:
                raise CheckpointError(f"{INDEX} puts {printable(name)} in {file}; it is in {tensors[name].file.name}.")
        if extra := tensors.keys() - index.keys():
            raise CheckpointError(f"{INDEX} does not mention {_tensors(extra)}: {families(extra)}.")
    return tensors


def _tensors(names: Collection[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def families(names: Iterable[str], limit: int = 3) -> str:
    """Names for an error message, layers folded together: `layers.{n}.mlp.up_proj.weight (30 ×)`."""
    counts: dict[str, int] = {}
    for name in sorted(names):
        folded = re.sub(r"\.\d+\.", ".{n}.", printable(name))
        counts[folded] = counts.get(folded, 0) + 1
    shown = [f"{name} ({count} ×)" if count > 1 else name for name, count in counts.items()]
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more kinds" if len(shown) > limit else "")


def open_checkpoint(folder: Path, *, ignore_keys: tuple[str, ...] = ()) -> Checkpoint:
    """Read every header and hold it against config.json; no tensor is read, and `ignore_keys` are forgotten.

    Errors: ConfigError or CheckpointError for anything missing, extra, misshapen or unknown. All vision tensors
    may be absent together (packs that keep them elsewhere).
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    config = _parse(raw, ignore_keys)
    for key in ignore_keys:
        *part, name = key.split(".")
        (raw["text_config"] if part else raw).pop(name, None)
    if isinstance(config.quantization, dict) and "quant_method" in config.quantization:
        raise CheckpointError(
            f"{folder} was quantized by another tool ({config.quantization['quant_method']!r}).\n"
            f"Start from {RELEASED} or an MLX pack."
        )
    tensors, tied = _by_pack_name(_read_tensors(folder))
    expected = {source.name: source.shape for source in sources(config)}
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    quantized = {path: _packing_of(path, config) for path in packed if f"{path}.weight" in expected}
    stored: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    for name, shape in expected.items():
        path = name.removesuffix(".weight")
        if path not in quantized:
            stored[name] = (FLOATS, shape)
            continue
        if shape[-1] % quantized[path].group_size:
            raise CheckpointError(f"{path}: groups of {quantized[path].group_size} do not divide {shape[-1]} columns.")
        for part, (dtype, packed_shape) in packing(shape, quantized[path], "float").items():
            stored[f"{path}.{part}"] = (FLOATS if dtype == "float" else (dtype,), packed_shape)
    _compare(tensors, stored, folder)
    return Checkpoint(folder=folder, raw_config=raw, config=config, tensors=tensors, quantized=quantized, tied=tied)


def _by_pack_name(found: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[tuple[Tensor, str], ...]]:
    """Sort tensors by fate: those that stay under their pack names, and those tied to one of them."""
    tensors: dict[str, Tensor] = {}
    tied: list[tuple[Tensor, str]] = []
    unknown = []
    for name, tensor in found.items():
        matrix, _, part = name.rpartition(".")
        packed = f"{matrix}.weight" if part in ("scales", "biases") else name
        rule, target = find_rule(packed)
        if rule is None:
            unknown.append(name)
        elif rule.fate == "refuse":
            raise CheckpointError(f"this checkpoint cannot be read: it has {printable(name)}.\n{rule.because}")
        elif rule.fate == "drop":
            tied.append((tensor, find_rule(target)[1]))
        elif (target := target if packed == name else name) in tensors:
            raise CheckpointError(f"{target} is there twice: as {name} and as {tensors[target].name}.")
        else:
            tensors[target] = tensor
    unknown += [tensor.name for tensor, target in tied if target not in tensors]
    if unknown:
        raise CheckpointError(
            f"no rule in convert/diffusiongemma-26b-a4b.toml mentions {_tensors(unknown)}: {families(unknown)}.\n"
            "This is another model, or a newer one than this version knows."
        )
    return tensors, tuple(tied)


def _packing_of(path: str, config: ModelConfig) -> Quantization:
    """How config.json says a matrix is packed; an override without a mode is affine, whatever the base is."""
    blocks = config.quantization
    if not blocks or not isinstance(blocks, dict):
        raise CheckpointError(f"{path} is packed (it has .scales), and config.json has no `quantization` block.")
    override = blocks.get(path)
    values = override if isinstance(override, dict) else blocks
    values = {key: value for key, value in values.items() if key in ("bits", "group_size", "mode")}
    return Quantization.from_dict(values, f"config.json, quantization of {path}")


def _compare(
    tensors: dict[str, Tensor], stored: dict[str, tuple[tuple[str, ...], tuple[int, ...]]], folder: Path
) -> None:
    """Errors: CheckpointError naming what is missing, extra, misshapen or of the wrong dtype."""
    missing = stored.keys() - tensors.keys()
    vision = {name for name in stored if is_vision(name)}
    if not vision & tensors.keys():
        missing -= vision
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(stored)} tensors: {families(missing)}.\n"
            "Download the checkpoint again, or check that config.json belongs to it."
        )
    if extra := tensors.keys() - stored.keys():
        raise CheckpointError(
            f"the model that config.json describes has no place for {_tensors(extra)}: {families(extra)}.\n"
            "Check that config.json belongs to this checkpoint."
        )
    for name, tensor in tensors.items():
        dtypes, shape = stored[name]
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{tensor.file.name}: {name} is {tensor.dtype} {list(tensor.shape)},"
                f" expected {' or '.join(dtypes)} {list(shape)} by config.json."
            )


def read_config(folder: Path, *, ignore_keys: tuple[str, ...] = ()) -> ModelConfig:
    """The architecture of the checkpoint in `folder`."""
    return _parse(read_json(Path(folder) / "config.json"), ignore_keys)


def _parse(config: dict[str, Any], ignore_keys: tuple[str, ...]) -> ModelConfig:
    try:
        return ModelConfig.from_dict(config, ignore_keys=ignore_keys)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"config.json has a value of the wrong kind: {error}.") from None


def read_generation_config(folder: Path) -> GenerationConfig:
    """generation_config.json where there is one; its stop ids are joined by those of config.json."""
    file = Path(folder) / "generation_config.json"
    values = read_json(file) if file.exists() else {}
    return GenerationConfig.from_dict(values, stop_ids=read_config(folder).eos_token_ids)


SIDES = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*")


def side_files(folder: Path) -> list[Path]:
    """What travels with the weights unchanged."""
    made_here = {"config.json", INDEX, "plan.json", "model_index.json"}
    found = {file for pattern in SIDES for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name not in made_here)
