"""The weight files of a folder: which they are, by the index or by their names, and every tensor in them.

Nothing is believed: index and headers must agree, and no name leads out of the folder.
"""

import hashlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from ..disk import visible
from ..errors import CheckpointError
from ..readers import read_json
from ..values import Field, Table, mapping, text
from .shards import Tensor, printable, read_header

INDEX = "model.safetensors.index.json"
SIDECARS = ("optiq_vision.safetensors", "optiq/optiq_vision.safetensors")  # where OptiQ packs keep their vision tower
BLOCK, BLOCKS = 4096, 64  # bytes, and how many of them a fingerprint takes from a file
_INDEX = Table(Field("weight_map", mapping(text(empty=False))), open=True)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of all weight files by name, checked against the index. Errors: CheckpointError."""
    files, index = _files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for tensor in read_header(folder / file):
            if other := tensors.get(tensor.name):
                raise CheckpointError(f"{printable(tensor.name)} is in two files: {other.file.name} and {file}.")
            tensors[tensor.name] = tensor
    if index is not None:
        _compare(folder, tensors, index)
    return tensors


def fingerprint_of(folder: Path) -> str:
    """The weights and the config in `folder`, by their sizes, headers and evenly spread blocks: quick, and the same for
    a copy elsewhere."""
    digest = hashlib.sha256()
    for file in (folder / "config.json", *visible(folder, "*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for i in range(BLOCKS):
                stream.seek(size * i // BLOCKS)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]


def _files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The weight files by their paths below the folder, and which tensor the index (if there is one) says is where."""
    sidecars = [name for name in SIDECARS if (folder / name).is_file()]
    if (folder / INDEX).exists():
        index = _INDEX.read(read_json(folder / INDEX), INDEX, fault=CheckpointError)["weight_map"]
        names = sorted(set(index.values()))
        for name in names:
            if name not in SIDECARS and (Path(name).name != name or name == ".." or "\\" in name or "\0" in name):
                raise CheckpointError(
                    f"{INDEX} names a file outside the folder: {printable(name)}. Do not trust this checkpoint."
                )
    else:
        index, names = None, _named(folder)
    if not names:
        raise CheckpointError(f"no model*.safetensors in {folder}: there are no weights to read.")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of {len(names)} weight files: {', '.join(map(printable, absent[:3]))}"
            f"{' …' if len(absent) > 3 else ''}.\nDownload the checkpoint again."
        )
    return list(dict.fromkeys((*names, *sidecars))), index


def _named(folder: Path) -> list[str]:
    """Without an index: one file, or all parts of a numbered set."""
    names = found = [path.name for path in visible(folder, "model*.safetensors")]
    if match := re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", names[0] if names else ""):
        names = [f"model-{i + 1:05d}-of-{match[1]}.safetensors" for i in range(min(int(match[1]), 100_000))]
    if len(found) > len(names):
        raise CheckpointError(f"{folder} has weights in more than one form, and no index says which: {found[0]}, …")
    return names


def _compare(folder: Path, tensors: dict[str, Tensor], index: dict[str, str]) -> None:
    for name, file in index.items():
        if name not in tensors:
            raise CheckpointError(f"{INDEX} names {printable(name)}, and {printable(file)} does not have it.")
        found = tensors[name].file.relative_to(folder).as_posix()
        if found != file:
            raise CheckpointError(f"{INDEX} puts {printable(name)} in {printable(file)}; it is in {found}.")
    beside = {name for name in tensors if tensors[name].file.relative_to(folder).as_posix() in SIDECARS}
    if extra := tensors.keys() - index.keys() - beside:
        raise CheckpointError(f"{INDEX} does not mention {count(extra)}: {families(extra)}.")


def count(names: Collection[str]) -> str:
    """How many tensors, in words."""
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def families(names: Iterable[str], limit: int = 3) -> str:
    """Names for an error message, layers folded together: `layers.{n}.mlp.up_proj.weight (30 ×)`."""
    counts: dict[str, int] = {}
    for name in sorted(names):
        folded = re.sub(r"\.\d+\.", ".{n}.", printable(name))
        counts[folded] = counts.get(folded, 0) + 1
    shown = [f"{name} ({number} ×)" if number > 1 else name for name, number in counts.items()]
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more kinds" if len(shown) > limit else "")
