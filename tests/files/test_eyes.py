"""The tower of a folder, opened for itself: every layout in which one is published gives the same weights, and what is
no tower is refused in words."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import CheckpointError, ConfigError
from mlx_diffgemma.files.checkpoint import open_checkpoint, read_config
from mlx_diffgemma.files.eyes import load_eyes, open_eyes
from mlx_diffgemma.files.folder import SIDECARS
from mlx_diffgemma.files.quantization import Quantization, dequantize, quantize
from mlx_diffgemma.model.vision import Eyes
from mlx_diffgemma.packing.conversion import convert, plan_conversion
from mlx_diffgemma.packing.recipes import load_recipe, recipe_names
from mlx_diffgemma.packing.verification import verify
from tests import synthetic
from tests.model.eyes import TOWERS, WORST, Case, ratio

Weights = dict[str, mx.array]
PROJECTION = "model.encoder.embed_vision.embedding_projection"


def clipped_config() -> dict[str, Any]:
    config = synthetic.small_config()
    config["vision_config"]["use_clipped_linears"] = True
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.small(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.small(tmp_path_factory.mktemp("clipped") / "checkpoint", config=clipped_config())


def stored(folder: Path) -> Weights:
    """All tensors of a folder's files."""
    return {name: array for file in folder.rglob("*.safetensors") for name, array in load(file).items()}


def load(file: Path) -> Weights:
    return cast(Weights, mx.load(str(file)))


def tower(weights: Weights) -> Weights:
    return {name: array for name, array in weights.items() if "vision" in name}


def written(folder: Path, source: Path, weights: Weights, **config: Any) -> Path:
    """A folder with these weights in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def opened(folder: Path) -> Eyes:
    return open_eyes(folder, read_config(folder))


def held(eyes: Eyes) -> Weights:
    return {f"model.encoder.{name}": array for name, array in cast(Any, tree_flatten(eyes.parameters()))}


def plain_of(parts: Weights, how: Quantization) -> mx.array:
    """The matrix that packed parts stand for, its scales multiplied in float32."""
    wide = {part: array.astype(mx.float32) if array.dtype == mx.bfloat16 else array for part, array in parts.items()}
    return dequantize(wide, how, mx.float32)


def assert_same(eyes: Eyes, right: Weights) -> None:
    found = held(eyes)
    assert found.keys() == right.keys()
    for name, array in right.items():
        assert mx.array_equal(found[name], array.astype(mx.float32)), name


# --------------------------------------------------------------------------------------------------------- all layouts


@pytest.mark.parametrize("name", TOWERS)
def test_a_saved_tower_sees_as_the_references_does(name: str, tmp_path: Path) -> None:
    made, config = TOWERS[name], synthetic.small_config()
    config["vision_config"] = made.config
    config["text_config"]["hidden_size"] = made.hidden_size
    weights = {f"model.encoder.{key}": mx.array(w.numpy()) for key, w in made.reference().state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    eyes = open_eyes(tmp_path, ModelConfig.from_dict(config))
    assert ratio(eyes, Case(name, 12, 18)) <= WORST


def test_the_released_layout_in_several_files(source: Path) -> None:
    assert len(list(source.glob("*.safetensors"))) > 3
    eyes = opened(source)
    assert_same(eyes, tower(stored(source)))
    assert eyes.vision_tower.config.soft_tokens == 280


@pytest.mark.parametrize("tokens", [70, 1120])
def test_the_budget_is_the_checkpoints(tokens: int, source: Path, tmp_path: Path) -> None:
    folder = written(tmp_path, source, stored(source), vision_soft_tokens_per_image=tokens)
    assert opened(folder).vision_tower.config.soft_tokens == tokens


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_keeps_the_tower(name: str, source: Path, tmp_path: Path) -> None:
    convert(plan_conversion(open_checkpoint(source), load_recipe(name)), tmp_path / "pack")
    assert_same(opened(tmp_path / "pack"), tower(stored(source)))


def test_bounds_of_clipped_linears_are_kept_and_checked(clipped: Path, tmp_path: Path) -> None:
    right = tower(stored(clipped))
    assert sum(name.endswith("output_max") for name in right) == 2 * 7
    convert(plan_conversion(open_checkpoint(clipped), load_recipe("q4")), tmp_path / "pack")
    for folder in (clipped, tmp_path / "pack"):
        assert_same(opened(folder), right)
    errors = verify(open_checkpoint(clipped), tmp_path / "pack")["vision"]
    assert len(errors) == len(right) and not any(deviation.error for deviation in errors.values())
    one = "model.encoder.vision_tower.encoder.layers.1.mlp.up_proj.input_max"
    without = written(tmp_path / "without", clipped, {n: w for n, w in stored(clipped).items() if n != one})
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*up_proj\.input_max"):
        opened(without)


def test_an_infinite_bound_bounds_nothing(clipped: Path, tmp_path: Path) -> None:
    weights = {n: mx.full((), mx.inf, w.dtype) if n.endswith("_max") else w for n, w in stored(clipped).items()}
    folder = written(tmp_path / "m", clipped, weights)
    convert(plan_conversion(open_checkpoint(folder), load_recipe("q4")), tmp_path / "pack")
    assert_same(load_eyes(tmp_path / "pack", read_config(tmp_path / "pack")), tower(weights))


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_older_packs_of_mlx_community_pack_the_projection(mode: str, source: Path, tmp_path: Path) -> None:
    how = Quantization.from_dict({"mode": mode}, "")
    plain = tower(stored(source))
    parts = quantize(plain.pop(f"{PROJECTION}.weight"), how)
    weights = stored(source) | {f"{PROJECTION}.{part}": array for part, array in parts.items()}
    block = {"bits": how.bits, "group_size": how.group_size, "mode": mode}
    folder = written(tmp_path, source, weights, quantization=block)
    eyes = opened(folder)
    found = {name: array for name, array in held(eyes).items() if PROJECTION not in name}
    assert found.keys() == plain.keys()
    unpacked = plain_of(parts, how)
    pooled = mx.random.normal((5, unpacked.shape[1]), key=mx.random.key(0))
    expected = mx.fast.rms_norm(pooled, None, 1e-6) @ unpacked.T
    assert mx.allclose(eyes.embed_vision(pooled), expected, atol=1e-5)


def test_a_packed_tower_sees_what_its_packing_stands_for(source: Path, tmp_path: Path) -> None:
    """8 bits for all matrices of attention, as an override may ask for them."""
    how, weights, unpacked = Quantization(bits=8, group_size=32), stored(source), stored(source)
    block: dict[str, Any] = {"bits": 4, "group_size": 64, "mode": "affine"}
    for name in list(weights):
        if "vision" in name and "_proj.linear.weight" in name and "self_attn" in name:
            path = name.removesuffix(".weight")
            parts = quantize(weights.pop(name), how)
            weights |= {f"{path}.{part}": array for part, array in parts.items()}
            unpacked[name] = plain_of(parts, how)
            block[path] = how.to_dict()
    packed = opened(written(tmp_path / "packed", source, weights, quantization=block))
    plain = opened(written(tmp_path / "plain", source, unpacked))
    patches = mx.random.uniform(shape=(36, 768), key=mx.random.key(1))
    assert mx.allclose(packed.see(patches, 6), plain.see(patches, 6), atol=1e-4)


@pytest.mark.parametrize("sidecar", SIDECARS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_optiqs_tower_lies_in_a_file_of_its_own(sidecar: str, prefix: str, source: Path, tmp_path: Path) -> None:
    weights = stored(source)
    right = tower(weights)
    folder = written(tmp_path, source, {name: w for name, w in weights.items() if name not in right})
    (folder / sidecar).parent.mkdir(exist_ok=True)
    named = {name.replace("model.encoder.", prefix): w for name, w in right.items()}
    mx.save_safetensors(str(folder / sidecar), named)
    assert_same(opened(folder), right)


def test_only_the_towers_bytes_are_read_and_only_when_it_looks(source: Path) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    eyes = opened(source)
    assert mx.get_active_memory() - before < 100_000
    patches = mx.array(np.zeros((36, 768), np.float32))
    eyes.see(patches, 6)
    size = sum(w.nbytes for w in held(eyes).values())
    assert mx.get_active_memory() - before < 1.5 * size


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("lacking", ["config", "tensors"])
def test_a_checkpoint_without_a_tower_says_so_in_two_lines(lacking: str, source: Path, tmp_path: Path) -> None:
    weights, keys = stored(source), {}
    if lacking == "config":
        keys["vision_config"] = ...
    else:
        weights = {name: w for name, w in weights.items() if "vision" not in name}
    folder = written(tmp_path, source, weights, **keys)
    with pytest.raises(ConfigError, match=r"has no vision tower, so it cannot see pictures: config\.json") as caught:
        opened(folder)
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.encoder.vision_tower.std_bias"), r"lacks 1 of .*std_bias"),
        (lambda w: w.update({"model.encoder.vision_tower.extra": mx.ones(3)}), r"no place for 1 tensor: .*extra"),
        (lambda w: w.update({"model.encoder.vision_tower.std_bias": mx.ones(3)}), r"std_bias is F32 \[3\], expected"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(change: Any, message: str, source: Path, tmp_path: Path) -> None:
    weights = stored(source)
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        opened(written(tmp_path, source, weights))


def test_weights_that_are_no_numbers_are_refused(source: Path, tmp_path: Path) -> None:
    weights = stored(source)
    name = "model.encoder.vision_tower.encoder.layers.1.mlp.up_proj.linear.weight"
    spoiled = mx.array(weights[name])
    spoiled[3, 5] = mx.nan
    folder = written(tmp_path, source, weights | {name: spoiled})
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity"):
        load_eyes(folder, read_config(folder))
    load_eyes(source, read_config(source))


def test_another_tower_is_refused_only_by_who_looks(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text())
    values["vision_config"]["pan_and_scan"] = True
    (folder / "config.json").write_text(json.dumps(values))
    open_checkpoint(folder)
    with pytest.raises(ConfigError, match=r"does not know: vision_config\.pan_and_scan"):
        opened(folder)
    open_eyes(folder, read_config(folder), ignore_keys=("vision_config.pan_and_scan",))
