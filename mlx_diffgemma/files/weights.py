"""Weights into a network and out of it: a load that fills every parameter exactly once, unpacking, writing."""

import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..disk import replacing_folder, visible
from ..errors import CheckpointError, ConfigError
from ..model.network import Network, leaves
from ..model.table import unpacked_dtype
from .checkpoint import Checkpoint, open_checkpoint, side_files
from .folder import read_tensors
from .layout import find_rule, is_vision
from .quantization import Quantization, dequantize
from .shards import Tensor, write_tensors

INFINITY = {mx.float32: 0x7F80_0000, mx.float16: 0x7C00, mx.bfloat16: 0x7F80}  # its bits


def load_network(path: Path, *, lazy: bool = False, ignore_keys: tuple[str, ...] = ()) -> Network:
    """The text network with the weights in `path`: every parameter filled exactly once, no tensor left over but
    vision's. `lazy` leaves the weights on disk until they are used.

    Errors: CheckpointError, ConfigError; unless lazy, for weights that are no numbers, too.
    """
    return filled(open_checkpoint(path, ignore_keys=ignore_keys), lazy=lazy)


def filled(checkpoint: Checkpoint, *, lazy: bool = False) -> Network:
    """`load_network` of a checkpoint that is open already."""
    network = unread(checkpoint)
    if not lazy:
        evaluate(network, checkpoint)
    return network


def unread(checkpoint: Checkpoint) -> Network:
    """The text network, its weights still on disk."""
    network = Network(checkpoint.config)
    quantized = {path.removeprefix("model."): how for path, how in checkpoint.quantized.items()}

    def packed(path: str, module: nn.Module) -> bool | dict[str, Any]:
        how = quantized.get(path)
        return False if how is None else {"bits": how.bits, "group_size": how.group_size, "mode": how.mode}

    nn.quantize(network, class_predicate=packed)
    weights = _read(checkpoint)
    try:
        network.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        what = str(error).splitlines()[0]
        raise CheckpointError(f"the network and {checkpoint.folder} disagree: {what}") from None
    network.eval()
    experts = {name.removesuffix(".weight") for name in weights if ".experts." in name and name.endswith(".weight")}
    if mx.default_device() == mx.cpu and not experts <= quantized.keys():
        network.set_dtype(mx.float32)  # MLX's CPU backend multiplies expert weights in float32 only
    return network


def evaluate(network: Network, checkpoint: Checkpoint) -> None:
    """Read the weights. Errors: CheckpointError for NaN and infinity, which are none."""
    mx.eval(network.parameters())
    found = {name: weight for name, weight in leaves(network.parameters()).items() if not network.experts.owns(name)}
    if (name := nonfinite(found)) is not None:  # of streamed experts it is asked when they come
        stored = checkpoint.tensors.get(f"model.{name}")
        file = stored.file.name if stored else checkpoint.folder
        raise CheckpointError(
            f"{file}: model.{name} holds NaN or infinity, expected finite weights.\nDownload the checkpoint again."
        )


def _read(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """The text network's weights by their names in it, still on disk; tied ones are compared, halves joined."""
    text = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_vision(name)}
    halves = [half for pair in checkpoint.joined.values() for half in pair]
    used = {tensor.file for tensor in (*text.values(), *halves, *(tensor for tensor, _ in checkpoint.tied))}
    files = {file: cast(dict[str, mx.array], mx.load(str(file))) for file in used}

    def array(tensor: Tensor) -> mx.array:
        return files[tensor.file][tensor.name]

    for tensor, twin in checkpoint.tied:
        if not mx.array_equal(array(tensor), array(text[twin])):
            raise trained_apart(tensor, twin)
    weights = {name: array(tensor) for name, tensor in text.items()}
    weights |= {name: mx.concatenate([array(a), array(b)], axis=1) for name, (a, b) in checkpoint.joined.items()}
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def nonfinite(weights: dict[str, mx.array]) -> str | None:
    """The first of these that holds NaN or infinity: what is generated from them says nothing, and need not look it."""
    largest = {name: largest_bits(weight) for name, weight in weights.items() if weight.dtype in INFINITY}
    mx.eval(largest)
    for name, (positive, negative) in largest.items():
        dtype = weights[name].dtype
        if int(positive) >= INFINITY[dtype] or int(negative) >= INFINITY[dtype] | 1 << 8 * dtype.size - 1:
            return name
    return None


def largest_bits(array: mx.array) -> tuple[mx.array, mx.array]:
    """The largest positive and the largest negative float as the integers that their bits are; lazy.

    NaN and infinity have the largest exponent, so no finite float of their sign is a larger integer. Nothing of the
    array's size is made, and a CPU does it ten times as fast as it asks every float.
    """
    signed, unsigned = (mx.int16, mx.uint16) if array.dtype.size == 2 else (mx.int32, mx.uint32)
    return array.view(signed).max(), array.view(unsigned).max()


def trained_apart(tensor: Tensor, twin: str) -> CheckpointError:
    """A tensor that this architecture shares with another, and that differs from it in this checkpoint."""
    return CheckpointError(
        f"{tensor.file.name}: {tensor.name} is not equal to {twin}, with which DiffusionGemma shares its weights.\n"
        "A model that was trained with the two apart cannot be expressed here."
    )


def packed_trunk(network: nn.Module) -> dict[str, nn.QuantizedLinear | nn.QuantizedEmbedding]:
    """The packed modules outside the experts, by path."""
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return {path: module for path, module in network.named_modules() if isinstance(module, kinds)}


def unpacked_growth(network: nn.Module) -> int:
    """How many bytes `unpack_trunk` would add."""
    growth = 0
    for module in packed_trunk(network).values():
        unpacked = module.weight.size * 32 // module.bits * unpacked_dtype(module).size
        growth += unpacked - sum(array.nbytes for array in module.parameters().values() if isinstance(array, mx.array))
    return growth


def unpack_trunk(network: nn.Module) -> None:
    """Store everything but the experts as plain matrices with the values the packed ones stand for.

    The same model, larger: with 256 rows a product is bound by arithmetic, where a packed one is the slower.
    """
    unpacked = []
    for path, module in packed_trunk(network).items():
        how = Quantization(bits=module.bits, group_size=module.group_size, mode=module.mode)
        plain = nn.Linear(1, 1, bias=False) if isinstance(module, nn.QuantizedLinear) else nn.Embedding(1, 1)
        plain.weight = dequantize(module, how, unpacked_dtype(module))
        mx.eval(plain.weight)
        unpacked.append((path, plain))
    network.update_modules(tree_unflatten(unpacked))
    mx.clear_cache()


def write_model(network: Network, source: Path, folder: Path) -> None:
    """A checkpoint under the released names (packed matrices under those of a pack), with the vision tower and all
    else that lies in `source`. It appears whole, in place of what was there.

    Errors: ConfigError for a folder that is, holds or lies in the source; OSError.
    """
    check_apart(folder, source)
    found = leaves(network.parameters())
    weights = {}
    for name, weight in found.items():
        stacked = ".experts." in name and name.replace(".weight", ".scales") not in found
        weights["model." + (name.removesuffix(".weight") if stacked else name)] = weight
    vision = _vision(source)
    files = {file: cast(dict[str, mx.array], mx.load(str(file))) for file in {t.file for t in vision.values()}}
    weights |= {name: files[tensor.file][tensor.name] for name, tensor in vision.items()}
    with replacing_folder(folder) as made:
        write_tensors(made / "model.safetensors", weights, {"format": "mlx"})
        for name in (Path("config.json"), *side_files(source)):
            (made / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, made / name)


def _vision(source: Path) -> dict[str, Tensor]:
    """The vision tower's tensors in a folder, under their pack names; it may hold nothing else, or not even them."""
    found = read_tensors(source) if visible(source, "*.safetensors") else {}
    return {target: tensor for name, tensor in found.items() if is_vision(target := find_rule(name)[1])}


def check_apart(folder: Path, source: Path) -> None:
    """Errors: ConfigError when writing `folder` would replace `source`, from which weights may still be read."""
    a, b = folder.resolve(), source.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ConfigError(
            f"{folder} and the model it is made from, {source}, lie inside one another: choose another place."
        )
