"""Checkpoint folders: names, shapes and packing, held against each other before a byte of a tensor is read.

Read are Hugging Face checkpoints (released or saved by transformers), packs of this project, and those that others
publish: mlx-vlm's, mlx-community's, vmlx's, OptiQ's. What becomes of each name is said in convert/.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import RELEASED, ModelConfig
from ..disk import visible
from ..errors import CheckpointError
from ..generation.settings import GenerationConfig, unused_keys
from ..readers import read_json
from .folder import INDEX, count, families, read_tensors
from .layout import find_rule, is_vision, sources
from .quantization import Quantization, packing
from .shards import FLOATS, Tensor, printable

Stored = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]  # name → possible dtypes, shape


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder whose names, shapes and packing agree with its config. Tensors are keyed by their names in a pack."""

    folder: Path
    raw_config: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, Tensor]
    quantized: dict[str, Quantization] = field(default_factory=dict)  # module path, as in the pack → packing
    tied: tuple[tuple[Tensor, str], ...] = ()  # dropped tensors, and the pack name of the tensor each must equal
    joined: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # pack name → its first and last rows
    notices: tuple[str, ...] = ()  # what was set aside, in a sentence each


@dataclass(frozen=True, kw_only=True)
class _Sorted:
    """The tensors of a folder by fate."""

    kept: dict[str, Tensor]
    tied: list[tuple[Tensor, str]]
    joined: dict[str, dict[int, Tensor]]
    paths: dict[str, str]  # a module's path in a pack → the one it has here, by which config.json may call it


def open_checkpoint(folder: Path, *, ignore_keys: tuple[str, ...] = ()) -> Checkpoint:
    """Read every header and hold it against config.json; no tensor is read, and `ignore_keys` are forgotten.

    Errors: ConfigError or CheckpointError for anything missing, extra, misshapen or unknown. All vision tensors
    may be absent together (packs that keep them elsewhere), or there without a `vision_config` (mlx-lm's leave it out).
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    config = ModelConfig.from_dict(raw, ignore_keys=ignore_keys)
    for key in ignore_keys:
        *part, name = key.split(".")
        (raw.get(part[0]) or {} if part else raw).pop(name, None)
    _refuse_other_tools(folder, config)
    found = _sort(read_tensors(folder))
    tensors, notices = _without_lone_vision(found.kept, config)
    quantized = _quantized(tensors, found, config)
    _compare(tensors, found.joined, _stored(config, quantized), folder)
    return Checkpoint(
        folder=folder,
        raw_config=raw,
        config=config,
        tensors=tensors,
        quantized=quantized,
        tied=tuple(found.tied),
        joined={name: (halves[0], halves[1]) for name, halves in found.joined.items()},
        notices=notices,
    )


def read_vision(folder: Path, config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Quantization]]:
    """The vision tower's tensors in a folder by their names in a pack, and how its matrices are packed; it may hold
    nothing else, or not even them. Errors: CheckpointError for one that is missing, extra, misshapen or unknown."""
    found = _sort({name: t for name, t in read_tensors(folder).items() if is_vision(_fate(name)[3])})
    quantized = _quantized(found.kept, found, config)
    stored = {name: what for name, what in _stored(config, quantized).items() if is_vision(name)}
    _compare(found.kept, {}, stored, folder)
    return found.kept, quantized


def _refuse_other_tools(folder: Path, config: ModelConfig) -> None:
    block = config.quantization or {}
    if "quant_method" in block:
        raise CheckpointError(
            f"{folder} was quantized by another tool (quantization.quant_method is {block['quant_method']!r}).\n"
            f"Start from {RELEASED} or an MLX pack."
        )
    if block:
        Quantization.from_dict(block, "config.json, quantization")


def _sort(found: dict[str, Tensor]) -> _Sorted:
    """Which tensors stay under their pack names, which must equal another, which are rows of another."""
    sorted_ = _Sorted(kept={}, tied=[], joined={}, paths={})
    unknown = []
    for name, tensor in found.items():
        path, part, rule, target = _fate(name)
        if rule is None:
            unknown.append(name)
        elif rule.fate == "refuse":
            raise CheckpointError(f"this checkpoint cannot be read: it has {printable(name)}.\n{rule.because}")
        elif rule.fate == "drop":
            sorted_.tied.append((tensor, target))
        elif rule.fate == "join":
            sorted_.joined.setdefault(target, {})[rule.half] = tensor
            sorted_.paths[target.removesuffix(f".{part}")] = path
        elif rule.fate != "ignore":
            if target in sorted_.kept:
                raise CheckpointError(f"{target} is there twice: as {name} and as {sorted_.kept[target].name}.")
            sorted_.kept[target] = tensor
            sorted_.paths[target.removesuffix(f".{part}")] = path
    unknown += [tensor.name for tensor, target in sorted_.tied if target not in sorted_.kept]
    if unknown:
        raise CheckpointError(
            f"{found[unknown[0]].file}: no rule in convert/diffusiongemma-26b-a4b.toml mentions {count(unknown)}:"
            f" {families(unknown)}.\n"
            "This is another model, or a newer one than this version knows."
        )
    if halves := [name for name, found_ in sorted_.joined.items() if len(found_) != 2 or name in sorted_.kept]:
        raise CheckpointError(f"gate_proj and up_proj do not make one whole gate_up_proj: {families(halves)}.")
    return sorted_


def _fate(name: str) -> tuple[str, str, Any, str]:
    """A tensor's module and part, the rule for it, and the pack name that the rule gives it.

    `scales` and `biases` of a packed matrix go where its `weight` goes, and equal what that one's equal.
    """
    path, _, part = name.rpartition(".")
    if part not in ("scales", "biases"):
        rule, target = find_rule(name)
        if rule is not None and rule.fate == "drop":
            target = find_rule(target)[1]
        return path, part, rule, target
    rule, target = find_rule(f"{path}.weight")
    if rule is not None and rule.fate == "drop":
        target = find_rule(target)[1]
    return path, part, rule, f"{target.removesuffix('.weight')}.{part}"


def _without_lone_vision(tensors: dict[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Vision tensors are set aside where config.json does not describe a tower."""
    lone = [name for name in tensors if is_vision(name)]
    if config.vision is not None or not lone:
        return tensors, ()
    text = {name: tensor for name, tensor in tensors.items() if not is_vision(name)}
    return text, (f"config.json has no vision_config: {count(lone)} of a vision tower are set aside.",)


def _quantized(tensors: dict[str, Tensor], found: _Sorted, config: ModelConfig) -> dict[str, Quantization]:
    names = [*tensors, *found.joined]
    paths = [name.removesuffix(".scales") for name in names if name.endswith(".scales")]
    return {path: _packing_of(path, found.paths[path], config) for path in paths}


def _packing_of(path: str, own: str, config: ModelConfig) -> Quantization:
    """How config.json says a matrix is packed, under its pack name or its own; an override without a mode is affine,
    whatever the base is."""
    block = config.quantization
    if not block:
        raise CheckpointError(f"{own} is packed (it has .scales), and config.json has no `quantization` block.")
    override = next((block[name] for name in (path, own) if name in block), None)
    if override is not None and override is not True and not isinstance(override, dict):
        raise CheckpointError(f"{own} is packed (it has .scales), and config.json says {override!r} of its packing.")
    return Quantization.from_dict(
        override if isinstance(override, dict) else block, f"config.json, quantization of {own}"
    )


def _stored(config: ModelConfig, quantized: dict[str, Quantization]) -> Stored:
    """What must lie in the files: pack name → dtypes and shape."""
    stored: Stored = {}
    for source in sources(config):
        how = quantized.get(source.path)
        if how is None:
            stored[source.name] = (FLOATS, source.shape)
            continue
        if source.shape[-1] % how.group_size:
            raise CheckpointError(
                f"{source.path}: groups of {how.group_size} do not divide {source.shape[-1]} columns."
            )
        for part, (dtype, shape) in packing(source.shape, how, "float").items():
            stored[f"{source.path}.{part}"] = (FLOATS if dtype == "float" else (dtype,), shape)
    return stored


def _compare(tensors: dict[str, Tensor], joined: dict[str, dict[int, Tensor]], stored: Stored, folder: Path) -> None:
    """Errors: CheckpointError naming what is missing, extra, misshapen or of the wrong dtype."""
    names: Collection[str] = tensors.keys() | joined.keys()
    missing = stored.keys() - names
    vision = {name for name in stored if is_vision(name)}
    if not vision & names:
        missing -= vision
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(stored)} tensors: {families(missing)}.\n"
            "Download the checkpoint again, or check that config.json belongs to it."
        )
    if extra := names - stored.keys():
        raise CheckpointError(
            f"the model that config.json describes has no place for {count(extra)}: {families(extra)}.\n"
            "Check that config.json belongs to this checkpoint."
        )
    for name, tensor in tensors.items():
        _compare_one(tensor, name, *stored[name])
    for name, halves in joined.items():
        dtypes, (experts, rows, width) = stored[name]
        for half in halves.values():
            _compare_one(half, half.name, dtypes, (experts, rows // 2, width))


def _compare_one(tensor: Tensor, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{tensor.file.name}: {name} is {tensor.dtype} {list(tensor.shape)},"
            f" expected {' or '.join(dtypes)} {list(shape)} by config.json."
        )


# ----------------------------------------------------------------------------------------------- beside the weights


def read_config(folder: Path, *, ignore_keys: tuple[str, ...] = ()) -> ModelConfig:
    """The architecture of the checkpoint in `folder`."""
    return ModelConfig.from_dict(read_json(Path(folder) / "config.json"), ignore_keys=ignore_keys)


def read_generation_config(folder: Path, config: ModelConfig | None = None) -> GenerationConfig:
    """generation_config.json where there is one; its stop ids are joined by those of config.json. Ids that the
    vocabulary does not have can stop nothing, and are left out. Errors: CheckpointError, ConfigError."""
    config = config or read_config(folder)
    settings = GenerationConfig.from_dict(_generation(folder), stop_ids=config.eos_token_ids)
    if settings.pad_token_id >= config.vocab_size:
        raise CheckpointError(
            f"generation_config.json: pad_token_id is {settings.pad_token_id}, expected an id of the vocabulary:"
            f" 0 … {config.vocab_size - 1}."
        )
    return settings.replace(stop_ids=tuple(i for i in settings.stop_ids if i < config.vocab_size))


def unused_settings(folder: Path, config: ModelConfig) -> list[str]:
    """What generation_config.json says that does nothing here, and stop ids that no token has, in a sentence each."""
    said, values = unused_keys(_generation(folder)), read_json(folder / "config.json")
    for file, ids in (
        ("config.json", values.get("eos_token_id", values["text_config"].get("eos_token_id"))),
        ("generation_config.json", _generation(folder).get("eos_token_id")),
    ):
        for i in ids if isinstance(ids, list) else [ids]:
            if i is not None and i >= config.vocab_size:
                said.append(f"{file}: eos_token_id has {i}, and the vocabulary ends at {config.vocab_size - 1}.")
    return said


def _generation(folder: Path) -> dict[str, Any]:
    file = Path(folder) / "generation_config.json"
    return read_json(file) if file.exists() else {}


SIDES = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*", "chat_templates/*.jinja")


def side_files(folder: Path) -> list[Path]:
    """What travels with the weights unchanged, as paths below the folder."""
    made_here = {"config.json", INDEX, "plan.json", "model_index.json"}
    found = {file for pattern in SIDES for file in visible(folder, pattern) if file.is_file()}
    return sorted(file.relative_to(folder) for file in found if file.name not in made_here)
