"""Packs as others publish them: each dialect loads with the right values, or is refused in words.

Every case is a pack of ours, changed into another tool's form: its names, its config, its files.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.config import HARMLESS
from mlx_diffgemma.errors import CheckpointError, ConfigError
from mlx_diffgemma.files.checkpoint import open_checkpoint
from mlx_diffgemma.files.folder import INDEX, SIDECARS
from mlx_diffgemma.files.quantization import Quantization, quantize
from mlx_diffgemma.files.weights import load_network
from mlx_diffgemma.packing.conversion import convert, plan_conversion
from mlx_diffgemma.packing.recipes import load_recipe, recipe_names
from tests import synthetic

Weights = dict[str, mx.array]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.small(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(scope="module")
def plain(source: Path) -> Weights:
    """The unpacked tensors under their names in a pack."""
    checkpoint = open_checkpoint(source)
    files = {file: mx.load(str(file)) for file in {tensor.file for tensor in checkpoint.tensors.values()}}
    return {name: cast(Weights, files[tensor.file])[tensor.name] for name, tensor in checkpoint.tensors.items()}


def written(folder: Path, source: Path, weights: Weights, block: dict[str, Any] | None, **config: Any) -> Path:
    """A pack of one shard with these weights and this `quantization` block."""
    folder.mkdir(parents=True)
    values = json.loads((source / "config.json").read_text()) | config
    if block is not None:
        values["quantization"] = block
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def packed(plain: Weights, how: Callable[[str], Quantization | None]) -> Weights:
    """The weights with the matrices for which `how` (path → packing) says so packed."""
    made: Weights = {}
    for name, weight in plain.items():
        path = name.removesuffix(".weight")
        packing = how(path) if weight.ndim >= 2 else None
        if packing is None:
            made[name] = weight
        else:
            made |= {f"{path}.{part}": array for part, array in quantize(weight, packing).items()}
    return made


def values_of(folder: Path) -> Weights:
    """The network's weights as plain float32 matrices."""
    network = load_network(folder)
    modules = dict(network.named_modules())
    found = {}
    for name, array in cast(list[tuple[str, mx.array]], tree_flatten(network.parameters())):
        path, _, part = name.rpartition(".")
        module = cast(Any, modules.get(path))
        if part in ("scales", "biases"):
            continue
        if "scales" in (module or {}):
            how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            array = mx.dequantize(module.weight, module.scales, module.get("biases"), **how)
        found[name] = array.astype(mx.float32)
    return found


def expected(plain: Weights, how: Callable[[str], Quantization | None]) -> Weights:
    """What `values_of` must give: every matrix packed and unpacked."""
    values = {}
    for name, weight in plain.items():
        if "vision" in name:
            continue
        packing = how(name.removesuffix(".weight")) if weight.ndim >= 2 else None
        if packing is not None:
            parts = quantize(weight, packing)
            options = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}
            weight = mx.dequantize(parts["weight"], parts["scales"], parts.get("biases"), **options)
        values[name.removeprefix("model.")] = weight.astype(mx.float32)
    return values


def assert_same(found: Weights, right: Weights) -> None:
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert mx.array_equal(found[name], value), name


AFFINE4, AFFINE8 = Quantization(bits=4, group_size=64), Quantization(bits=8, group_size=64)
MX4, MX8 = Quantization.from_dict({"mode": "mxfp4"}, ""), Quantization.from_dict({"mode": "mxfp8"}, "")
NV4 = Quantization.from_dict({"mode": "nvfp4"}, "")


def is_experts(path: str) -> bool:
    return ".experts." in path


# ------------------------------------------------------------------------------------------------------------- vmlx


def vmlx(path: str) -> Quantization | None:
    """Attention and experts in mxfp4, router and dense MLP in mxfp8, the rest as it is."""
    if "vision" in path or "embed_tokens" in path or "self_conditioning" in path:
        return None
    return MX8 if ".mlp." in path or ".router." in path else MX4


def test_vmlx_mxfp4(source: Path, plain: Weights, tmp_path: Path) -> None:
    half = {name: weight.astype(mx.float16) for name, weight in plain.items()}
    weights = packed(half, vmlx)
    paths = [name.removesuffix(".weight") for name, weight in half.items() if weight.ndim >= 2]
    block: dict[str, Any] = {"bits": 4, "group_size": 32, "mode": "mxfp4", "quantization_backend": "mlx"}
    block |= {"family": "diffusion_gemma", "canvas_length": 256, "quantized_roles": ["attention"]}
    block |= {"passthrough_roles": ["embedding"]}
    for path in paths:
        how = vmlx(path)
        if how is None:
            block[path] = False
        elif how == MX8:
            block[path] = {"bits": 8, "group_size": 32, "mode": "mxfp8"}
    keys: dict[str, Any] = {"weight_format": "mxfp4", "modalities": ["text"], "modality_notes": {"text": "x"}}
    keys |= {"has_vision": True, "has_video": False, "has_audio": False}
    folder = written(tmp_path / "pack", source, weights, block, **keys)
    index = {"metadata": {"format": "mxfp4"}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    assert_same(values_of(folder), expected(half, vmlx))


def test_a_packed_matrix_that_config_calls_unpacked_is_refused(source: Path, plain: Weights, tmp_path: Path) -> None:
    path = "model.decoder.layers.0.self_attn.q_proj"
    block = {"bits": 4, "group_size": 64, path: False}
    folder = written(tmp_path / "pack", source, packed(plain, lambda p: None if "vision" in p else AFFINE4), block)
    with pytest.raises(CheckpointError, match=r"q_proj is packed .* and config.json says False"):
        open_checkpoint(folder)


# ------------------------------------------------------------------------------------------------------------ OptiQ


def optiq(path: str) -> Quantization | None:
    bits = (3, 4, 5, 6, 8)[sum(map(ord, path)) % 5]
    return None if "vision" in path else Quantization(bits=bits, group_size=64)


@pytest.mark.parametrize("place", ["root, unindexed", "root, indexed", "optiq, indexed", "optiq, unindexed"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_optiq(place: str, prefix: str, source: Path, plain: Weights, tmp_path: Path) -> None:
    vision = {name: weight for name, weight in plain.items() if "vision" in name}
    assert len(vision) == 31
    text = {name: weight for name, weight in plain.items() if name not in vision}
    weights = packed(text, optiq)
    block: dict[str, Any] = {"bits": 4, "group_size": 64}
    for path in (name.removesuffix(".weight") for name, weight in text.items() if weight.ndim >= 2):
        how = optiq(path)
        assert how is not None
        block[path] = {"bits": how.bits, "group_size": 64}
    told = {"sidecar": SIDECARS[1], "dtype": "bfloat16", "n_tensors": 31, "base_model": "google/x"}
    keys: dict[str, Any] = {"optiq_vision": told} if "indexed" in place and "un" not in place else {}
    folder = written(tmp_path / "pack", source, weights, block, **keys)
    sidecar = SIDECARS[0] if place.startswith("root") else SIDECARS[1]
    (folder / sidecar).parent.mkdir(exist_ok=True)
    named = {name.replace("model.encoder.", prefix): weight for name, weight in vision.items()}
    mx.save_safetensors(str(folder / sidecar), named)
    where = dict.fromkeys(weights, "model.safetensors")
    where |= {} if "unindexed" in place else dict.fromkeys(named, sidecar)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_same(values_of(folder), expected(plain, optiq))
    assert sum("vision" in name for name in open_checkpoint(folder).tensors) == 31


@pytest.mark.parametrize("name", ["optiq/other.safetensors", "../optiq_vision.safetensors", "sub/model.safetensors"])
def test_no_other_file_below_or_outside_the_folder_is_read(
    name: str, source: Path, plain: Weights, tmp_path: Path
) -> None:
    folder = written(tmp_path / "pack", source, plain, None)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(plain, name)}))
    with pytest.raises(CheckpointError, match="names a file outside the folder"):
        open_checkpoint(folder)


# ------------------------------------------------------------------------------------------------------ older mlx-vlm


@pytest.mark.parametrize("base", [MX4, MX8, NV4, AFFINE4], ids=lambda how: how.mode + str(how.bits))
def test_an_override_without_a_mode_is_affine_whatever_the_base(
    base: Quantization, source: Path, plain: Weights, tmp_path: Path
) -> None:
    def how(path: str) -> Quantization | None:
        if "vision_tower" in path:
            return None
        return AFFINE8 if ".mlp." in path or ".router." in path else base

    block: dict[str, Any] = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    for name, weight in plain.items():
        if weight.ndim >= 2 and how(name.removesuffix(".weight")) == AFFINE8:
            block[name.removesuffix(".weight")] = {"group_size": 64, "bits": 8}
    folder = written(tmp_path / "pack", source, packed(plain, how), block)
    assert_same(values_of(folder), expected(plain, how))


# -------------------------------------------------------------------------------------------------------- tied, packed


def tied(plain: Weights) -> Weights:
    weights = packed(plain, lambda path: None if "vision" in path else AFFINE4)
    head = "model.decoder.embed_tokens."
    copies = {name.replace(head, "lm_head."): a for name, a in weights.items() if name.startswith(head)}
    layer = "model.decoder.layers.0.self_attn."
    other = "model.encoder.language_model.layers.0.self_attn."
    copies |= {name.replace(layer, other): a for name, a in weights.items() if name.startswith(layer)}
    return weights | copies


def test_tied_tensors_of_a_pack_are_compared_part_by_part(source: Path, plain: Weights, tmp_path: Path) -> None:
    weights, block = tied(plain), {"bits": 4, "group_size": 64}
    folder = written(tmp_path / "pack", source, weights, block)
    assert_same(values_of(folder), expected(plain, lambda path: AFFINE4))
    for part in ("lm_head.scales", "model.encoder.language_model.layers.0.self_attn.k_proj.weight"):
        changed = mx.array(weights[part])
        changed[0, 0] = changed[0, 0] + 1
        damaged = written(tmp_path / part, source, weights | {part: changed}, block)
        with pytest.raises(CheckpointError, match=r"is not equal to .*, with which DiffusionGemma shares"):
            load_network(damaged)


# ----------------------------------------------------------------------------------------------------------- vision


def test_vision_without_a_vision_config_is_set_aside_and_said(source: Path, plain: Weights, tmp_path: Path) -> None:
    how: Callable[[str], Quantization | None] = lambda path: None if "vision" in path else AFFINE4  # noqa: E731
    block = {"bits": 4, "group_size": 64}
    folder = written(tmp_path / "pack", source, packed(plain, how), block, vision_config=...)
    assert_same(values_of(folder), expected(plain, how))
    (said,) = open_checkpoint(folder).notices
    assert "no vision_config: 31 of a vision tower are set aside" in said.replace(" tensors", "")


# ---------------------------------------------------------------------------------------------------- split experts


@pytest.mark.parametrize("how", [None, AFFINE4, MX4], ids=["plain", "affine", "mxfp4"])
def test_gate_and_up_apart(how: Quantization | None, source: Path, plain: Weights, tmp_path: Path) -> None:
    def packing(path: str) -> Quantization | None:
        return how if is_experts(path) else None

    halves: Weights = {}
    for name, weight in plain.items():
        if "gate_up_proj" in name:
            rows = weight.shape[1] // 2
            halves[name.replace("gate_up_proj", "gate_proj")] = weight[:, :rows]
            halves[name.replace("gate_up_proj", "up_proj")] = weight[:, rows:]
        else:
            halves[name] = weight
    weights = packed(halves, packing)
    if how is None:  # as a Hugging Face export would name them
        weights = {n.removesuffix(".weight") if is_experts(n) else n: w for n, w in weights.items()}
    block = None if how is None else {"bits": how.bits, "group_size": how.group_size, "mode": how.mode}
    folder = written(tmp_path / "pack", source, weights, block)
    assert_same(values_of(folder), expected(plain, packing))
    one = next(name for name in weights if ".experts.up_proj" in name)
    lacking = {name: weight for name, weight in weights.items() if name != one}
    with pytest.raises(CheckpointError, match="do not make one whole gate_up_proj"):
        open_checkpoint(written(tmp_path / "lacking", source, lacking, block))
    renamed = {name.replace(".experts.", ".experts.switch_glu."): weight for name, weight in weights.items()}
    with pytest.raises(CheckpointError, match="mlx-lm's names for the experts") as caught:
        open_checkpoint(written(tmp_path / "glu", source, renamed, block))
    assert "every expert apart" not in str(caught.value)


def test_frequencies_that_an_older_export_wrote_down_are_ignored(source: Path, plain: Weights, tmp_path: Path) -> None:
    extra = {f"model.{part}.rotary_emb.inv_freq": mx.ones((4,)) for part in ("decoder", "decoder.layers.0.self_attn")}
    folder = written(tmp_path / "pack", source, plain | extra, None)
    assert_same(values_of(folder), expected(plain, lambda path: None))


# ------------------------------------------------------------------------------------------------------ config keys

OWN = {"model_type", "image_token_id", "boi_token_id", "eoi_token_id"}  # have a meaning at the top, and values of
OWN |= {"vision_soft_tokens_per_image"}  # their own


@pytest.mark.parametrize("where", ["", "text_config."])
@pytest.mark.parametrize("key", sorted({key for keys in HARMLESS.values() for key in keys.split()} - OWN))
def test_harmless_keys_are_read_over(key: str, where: str, source: Path, tmp_path: Path) -> None:
    values = json.loads((source / "config.json").read_text())
    (values["text_config"] if where else values)[key] = "something"
    folder = tmp_path / "m"
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps(values))
    open_checkpoint(folder)


def test_keys_nobody_knows_are_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(source, folder)
    values = json.loads((source / "config.json").read_text()) | {"has_smell": True}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="--ignore-key has_smell"):
        open_checkpoint(folder)
    open_checkpoint(folder, ignore_keys=("has_smell",))


# ---------------------------------------------------------------------------------------------- what we give to others


@pytest.mark.parametrize("name", recipe_names())
def test_our_packs_as_other_readers_expect_them(name: str, source: Path, tmp_path: Path) -> None:
    """Experts in the block's base; overrides under full names; no weight file that the index does not name."""
    pack = tmp_path / "pack"
    convert(plan_conversion(open_checkpoint(source), load_recipe(name)), pack)
    config, index = (json.loads((pack / file).read_text()) for file in ("config.json", INDEX))
    assert {file.name for file in pack.rglob("*.safetensors")} == set(index["weight_map"].values())
    block = config.get("quantization", {})
    modules = {key for key, value in block.items() if isinstance(value, dict)}
    assert all(key.startswith("model.") and f"{key}.weight" in index["weight_map"] for key in modules)
    assert not any(is_experts(key) for key in modules)
    assert config.get("quantization_config", {}) == block
