"""Find, download and read checkpoints: names, shapes, packing, and a load that fills every parameter exactly once.

Reads three kinds of folder: a Hugging Face checkpoint (released or saved by transformers), a pack of this project,
and the mlx-community packs. Nothing is believed: headers, offsets, indexes, names and shapes are checked against
each other and against config.json before a byte of a tensor is read.
"""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from .config import RELEASED, GenerationConfig, ModelConfig, Quantization
from .errors import CheckpointError, ConfigError
from .layout import expected_tensors as expected_tensors
from .layout import find_rule, is_vision, sources
from .network import Network
from .quantize import packing
from .shards import FLOATS, Tensor, printable, read_header

PACKS = tuple(f"mlx-community/diffusiongemma-26B-A4B-it-{kind}" for kind in ("4bit", "8bit", "bf16"))
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


# ------------------------------------------------------------------------------------------------------- the files


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


# -------------------------------------------------------------------------------------------------- the whole folder


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


def load_network(path: Path, *, lazy: bool = False, ignore_keys: tuple[str, ...] = ()) -> Network:
    """The text network with the weights in `path`: every parameter filled exactly once, no tensor left over but
    vision's. `lazy` leaves the weights on disk until they are used."""
    checkpoint = open_checkpoint(path, ignore_keys=ignore_keys)
    network = Network(checkpoint.config)
    quantized = {path.removeprefix("model."): how for path, how in checkpoint.quantized.items()}

    def packed(path: str, module: nn.Module) -> bool | dict[str, Any]:
        how = quantized.get(path)
        return False if how is None else {"bits": how.bits, "group_size": how.group_size, "mode": how.mode}

    nn.quantize(network, class_predicate=packed)
    text = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_vision(name)}
    used = [*text.values(), *(tensor for tensor, _ in checkpoint.tied)]
    files = {file: cast(dict[str, mx.array], mx.load(str(file))) for file in {tensor.file for tensor in used}}
    for tensor, twin in checkpoint.tied:
        if not mx.array_equal(files[tensor.file][tensor.name], files[text[twin].file][text[twin].name]):
            raise trained_apart(tensor, twin)
    weights = {name.removeprefix("model."): files[t.file][t.name] for name, t in text.items()}
    try:
        network.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        raise CheckpointError(f"the network and {path} disagree: {str(error).splitlines()[0]}") from None
    network.eval()
    experts = {name.removesuffix(".weight") for name in weights if ".experts." in name and name.endswith(".weight")}
    if mx.default_device() == mx.cpu and not experts <= quantized.keys():
        network.set_dtype(mx.float32)  # MLX's CPU backend multiplies expert weights in float32 only
    if not lazy:
        mx.eval(network.parameters())
    return network


def trained_apart(tensor: Tensor, twin: str) -> CheckpointError:
    """A tensor that this architecture shares with another, and that differs from it in this checkpoint."""
    return CheckpointError(
        f"{tensor.file.name}: {tensor.name} is not equal to {twin}, with which DiffusionGemma shares its weights.\n"
        "A model that was trained with the two apart cannot be expressed here."
    )


# --------------------------------------------------------------------------------------------------------- the Hub


def resolve(path_or_repo: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """A local folder as it is, or a Hub repository downloaded (resumably) into the Hub's cache.

    `weights=False` fetches everything but the tensors. Errors: CheckpointError for a folder or repository that is
    absent, gated or unreachable, with the nearest name; ConfigError for a revision of a local folder.
    """
    folder = Path(path_or_repo).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"{folder} is a local folder; a revision ({revision}) exists only on the Hub.")
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; expected the folder of a checkpoint.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path_or_repo)):
        raise CheckpointError(f"there is no folder {folder}.{_nearest_folder(folder)}")
    return _download(str(path_or_repo), revision, weights)


def _nearest_folder(folder: Path) -> str:
    import difflib

    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return f" A Hub repository is written owner/name, as {RELEASED}."
    close = difflib.get_close_matches(folder.name, names, n=1)
    return f" Did you mean {folder.parent / close[0]}?" if close else f" {folder.parent} has no folder like it."


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    import difflib

    from huggingface_hub import errors, snapshot_download

    patterns = ["*.json", "*.jinja", "tokenizer.model"] + (["model*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then run `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        close = difflib.get_close_matches(repo, (RELEASED, *PACKS), n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise CheckpointError(f"there is no folder and no Hub repository {repo}, or it is private.{hint}") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision!r}.") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repo} is not a folder here and cannot be fetched from the Hub: {str(error).splitlines()[0][:120]}"
        ) from None


def check_upload(repo: str) -> None:
    """Errors: CheckpointError unless someone is logged in who could upload; asked before hours of work."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().whoami()
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise CheckpointError(
            f"cannot upload to {repo}: {reason}\nRun `hf auth login`, or leave out the upload."
        ) from None


def upload(folder: Path, repo: str) -> None:
    """Upload a pack; what the Hub already has is not sent twice."""
    from huggingface_hub import HfApi, errors

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{folder} is complete, its upload to {repo} failed: {str(error)[:160]}") from None
