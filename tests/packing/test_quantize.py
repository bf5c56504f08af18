"""Recipes: what they may say, what they make of every matrix, and sizes to the byte."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import ConfigError, MemoryLimitError
from mlx_diffgemma.files import layout, quantization, shards
from mlx_diffgemma.files.layout import Source
from mlx_diffgemma.files.quantization import Quantization
from mlx_diffgemma.files.shards import SIZES
from mlx_diffgemma.model import memory
from mlx_diffgemma.model.vision import Eyes
from mlx_diffgemma.model.vision_config import VisionConfig
from mlx_diffgemma.packing import plan as planning
from mlx_diffgemma.packing.plan import Planned
from mlx_diffgemma.packing.recipes import Override, Recipe, adhoc_recipe, load_recipe, recipe_names
from mlx_diffgemma.pipeline.machine import fitting
from tests.synthetic import published

RELEASED = ModelConfig.from_dict(published("released/config.json"))


def plan(recipe: Recipe) -> list[Planned]:
    return planning.plan(recipe, layout.sources(RELEASED))


def by_component(recipe: Recipe) -> dict[str, str]:
    return {name: size.packing for name, size in planning.sizes(recipe, plan(recipe)).items()}


# Totals of the released model. bf16 is the published figure; q8 is the published 8bit pack, which packs embed_vision
# too. The mx and nv totals are q4's with the experts' bytes exchanged: 4.25, 8.25 and 4.5 bits a weight.
EXPERTS = 22_837_985_280
EMBED_VISION = 2816 * 1152
Q4 = 16_556_429_016


@pytest.mark.parametrize(
    ("name", "experts", "trunk", "total"),
    [
        ("bf16", "bfloat16", "bfloat16", 51_647_562_456),
        ("q8", "8-bit/64", "8-bit/64", 27_972_380_376 + EMBED_VISION * 15 // 16),
        ("q6", "6-bit/64", "8-bit/64", Q4 + EXPERTS // 4),
        ("q4", "4-bit/64", "8-bit/64", Q4),
        ("q4-bf16", "4-bit/64", "bfloat16", 51_647_562_456 - EXPERTS * 23 // 16),
        ("mxfp4", "mxfp4", "8-bit/64", Q4 - EXPERTS // 32),
        ("mxfp8", "mxfp8", "8-bit/64", Q4 + EXPERTS * 15 // 32),
        ("nvfp4", "nvfp4", "8-bit/64", Q4),
        ("q3", "3-bit/64", "8-bit/64", Q4 - EXPERTS // 8),
        ("q2", "2-bit/32", "8-bit/64", Q4 - EXPERTS * 3 // 16),
    ],
)
def test_recipes_pack_what_they_say(name: str, experts: str, trunk: str, total: int) -> None:
    recipe = load_recipe(name)
    packings = by_component(recipe)
    assert packings.pop("experts") == experts
    assert packings.pop("vision") == packings.pop("norms and scalars") == "bfloat16"
    assert set(packings.values()) == {trunk}
    assert sum(item.nbytes for item in plan(recipe)) == total
    assert recipe.experimental == (name in ("q3", "q2"))


def test_every_recipe_is_in_the_table_above() -> None:
    marks = test_recipes_pack_what_they_say.pytestmark[0].args[1]
    assert sorted(case[0] for case in marks) == recipe_names()


def test_the_published_4bit_block_but_for_self_conditioning() -> None:
    recipe = load_recipe("q4")
    theirs = published("mlx-community/4bit.config.json")["quantization"]
    ours = planning.quantization_block(recipe, plan(recipe))
    added = {key: ours.pop(key) for key in list(ours) if "self_conditioning" in key}
    assert list(ours.items()) == list(theirs.items())
    assert set(map(str, added.values())) == {"{'group_size': 64, 'bits': 8}"}
    assert len(added) == 3


def test_overrides_under_an_mx_base_are_affine_without_saying_so() -> None:
    recipe = load_recipe("mxfp4")
    block = planning.quantization_block(recipe, plan(recipe))
    assert {key: block[key] for key in ("group_size", "bits", "mode")} == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert block["model.decoder.embed_tokens"] == {"group_size": 64, "bits": 8}


@pytest.mark.parametrize("component", planning.TRUNK)
def test_the_trunk_stays_at_8_bits_unless_the_recipe_says_so(component: str) -> None:
    path = next(s.path for s in layout.sources(RELEASED) if s.component == component and s.quantize)
    low = Override(path=path.removeprefix("model."), quantization=Quantization(bits=4, group_size=64), because="a test")
    values: dict[str, Any] = {"name": "low", "because": "a test", "base": Quantization(bits=8, group_size=64)}
    with pytest.raises(ConfigError, match=f"{component}\\) at 4 bits, expected 8 or more"):
        plan(Recipe(**values, overrides=(low,)))
    allowed = plan(Recipe(**values, overrides=(low,), allow_low_bit_trunk=True))
    assert next(item.how for item in allowed if item.source.path == path) == low.quantization


def vision_of(path: str) -> list[Planned]:
    """The tower's tensors in a recipe that packs everything to 4 bits, and `path` to 8."""
    override = Override(path=path, quantization=Quantization(bits=8, group_size=64), because="a test")
    base = Quantization(bits=4, group_size=64)
    recipe = Recipe(name="r", because="a test", base=base, overrides=(override,), allow_low_bit_trunk=True)
    return [item for item in plan(recipe) if item.source.component == "vision"]


def test_the_tower_is_packed_where_an_override_names_it() -> None:
    packed = [item for item in vision_of("encoder.**") if item.how]
    assert {str(item.how and item.how.bits) for item in packed} == {"8"}
    assert len(packed) == 27 * 6 + 1  # down_proj, 4,304 wide, has no groups of 32
    assert sum("down_proj" in item.source.name and item.wanted is not None for item in vision_of("encoder.**")) == 27


@pytest.mark.parametrize("path", ["decoder.embed_tokens", "**.self_attn.**", "*coder.**.q_proj*"])
def test_the_tower_is_packed_nowhere_else(path: str) -> None:
    assert not any(item.how for item in vision_of(path))


def test_the_command_lines_recipe_keeps_the_trunk() -> None:
    assert by_component(adhoc_recipe(5, 32, None))["experts"] == "5-bit/32"
    assert by_component(adhoc_recipe(5, 32, None))["attention"] == "8-bit/64"
    assert by_component(adhoc_recipe(None, None, "mxfp4"))["experts"] == "mxfp4"
    assert by_component(adhoc_recipe(None, None, None))["experts"] == "4-bit/64"
    with pytest.raises(ConfigError, match=r"mxfp4 is always 4 bits in groups of 32; got 8 bits"):
        adhoc_recipe(8, None, "mxfp4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('because = "x"\nbit = 4', "unknown key bit = 4. Did you mean 'bits'"),
        ("bits = 4", "because is null, expected text"),
        ('because = "x"\nbits = 7', "2, 3, 4, 5, 6 or 8 bits"),
        ('because = "x"\nbits = "4"', "bits is '4', expected an integer"),
        ('because = "x"\nbits = 4.0', "bits is 4.0, expected an integer"),
        ('because = "x"\nmode = ["affine"]', "mode is ['affine'], expected 'affine' or"),
        ('because = "x"\nexperimental = "no"', "experimental is 'no', expected true or false"),
        ('because = "x"\nmode = "int4"', "mode is 'int4', expected 'affine' or"),
        ('because = "x"\nmode = "nvfp4"\ngroup_size = 64', "nvfp4 is always 4 bits in groups of 16"),
        ('because = "x"\ndtype = "float8"', "dtype is 'float8'"),
        ('because = "x"\nbits = 4\noverride = 3', "override is 3, expected a list"),
        ('because = "x"\nbits = 4\n[[override]]\npath = "decoder.**"\nbits = 8', "override[0].because is null"),
        (
            'because = "x"\nbits = 4\n[[override]]\npath = "decoder.**"\nbits = 8\nquantize = false\nbecause = "x"',
            "`quantize = false` beside bits",
        ),
        ('because = "x"\n[[override]]\npath = "decoder.**"\nbits = 8\nbecause = "x"', "overrides without base bits"),
        (
            'because = "x"\nbits = 8\n[[override]]\npath = "decoder.layer.*"\nbits = 4\nbecause = "x"',
            "'decoder.layer.*' matches nothing",
        ),
        (
            'because = "x"\nbits = 8\n[[override]]\npath = "encoder.vision_tower.std_*"\nbits = 8\nbecause = "x"',
            "matches nothing that can be packed",
        ),
        ('extends = "mine.toml"\nbecause = "x"', "recipe mine.toml extends itself"),
        ("because = ", "is not TOML"),
    ],
)
def test_recipes_that_are_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        plan(load_recipe("mine.toml"))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_groups_that_do_not_divide_a_width_become_smaller_or_vanish() -> None:
    recipe = Recipe(name="r", because="a test", base=Quantization(bits=4, group_size=128))
    sources = [
        Source(name=f"m{n}.weight", shape=(8, n), component="experts", quantize=True) for n in (256, 704, 96, 40)
    ]
    planned = planning.plan(recipe, sources)
    assert [item.how and item.how.group_size for item in planned] == [128, 64, 32, None]
    assert [item.wanted for item in planned] == [None, recipe.base, recipe.base, recipe.base]
    assert list(planning.quantization_block(recipe, planned)) == ["group_size", "bits", "mode", "m704", "m96"]
    assert planned[3].stored == {"m40.weight": ("BF16", (8, 40))}


@pytest.mark.parametrize(
    "how",
    [Quantization(bits=bits, group_size=32) for bits in (2, 3, 4, 5, 6, 8)]
    + [Quantization.from_dict({"mode": mode}, "test") for mode in ("mxfp4", "mxfp8", "nvfp4")],
)
def test_sizes_are_those_mlx_makes(how: Quantization) -> None:
    matrix = mx.random.normal((3, 4, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    parts = quantization.quantize(matrix, how)
    stored = quantization.packing((3, 4, 64), how, "BF16")
    assert {part: (shards.DTYPES[dtype], shape) for part, (dtype, shape) in stored.items()} == {
        part: (array.dtype, array.shape) for part, array in parts.items()
    }
    assert sum(array.nbytes for array in parts.values()) == sum(SIZES[d] * math.prod(s) for d, s in stored.values())
    back = quantization.dequantize(parts, how, mx.float32)
    span = float((matrix.max() - matrix.min()).astype(mx.float32))
    step = span / (2**how.bits - 1) if how.mode == "affine" else 0.7
    assert float(mx.abs(back - matrix).max()) < 0.75 * step + 0.03  # scales and biases are rounded to bf16


def test_memory_to_run_is_weights_prefix_and_a_step() -> None:
    weights = 15_410_000_000
    short, long = (memory.memory_needed(RELEASED, weights, prefix) for prefix in (4096, 131_072))
    assert long - short == 20_480 * (131_072 - 4096)
    assert short - weights - memory.STEP == 20_480 * (4096 + 256) + 204_800 * (1023 + 256)
    assert memory.smallest_macs(short) == (24, 24)
    assert memory.smallest_macs(10_000_000_000) == (16, 16)
    assert memory.smallest_macs(200_000_000_000) == (None, None)


def test_memory_to_see_is_tower_soft_tokens_and_the_larger_of_a_look_and_a_step() -> None:
    eyes = Eyes(VisionConfig.from_dict(dict(RELEASED.vision or {})), RELEASED.hidden_size)
    eyes.set_dtype(mx.bfloat16)
    sight = memory.SightMemory.of(eyes, (2520, 10_080))
    assert sight.weights == 2 * sum(math.prod(s.shape) for s in layout.sources(RELEASED) if s.component == "vision")
    assert sight.tokens == 1400 * 2816 * 2
    assert 0.2e9 < sight.looking < memory.STEP  # a look at 1,120 tokens takes less than a step does
    needed = memory.memory_needed(RELEASED, 0, 4096)
    assert memory.memory_needed(RELEASED, 0, 4096, sight=sight) == needed + sight.weights + sight.tokens
    larger = dataclasses.replace(sight, looking=memory.STEP + 5)
    assert memory.memory_needed(RELEASED, 0, 4096, sight=larger) == needed + sight.weights + sight.tokens + 5


def test_pictures_that_do_not_fit_in_memory_are_refused() -> None:
    sight = memory.SightMemory(weights=2_000_000_000, tokens=10_000_000, looking=0)
    needed = memory.memory_needed(RELEASED, 10_000_000_000, 4096)
    fitting.check_memory(RELEASED, 10_000_000_000, needed + 2_010_000_000, 4096, sight=sight)
    fitting.check_memory(RELEASED, 10_000_000_000, needed, 4096)
    with pytest.raises(
        MemoryLimitError, match=r"with its pictures this prompt needs .* 2\.01 GB of it to see"
    ) as caught:
        fitting.check_memory(RELEASED, 10_000_000_000, needed + 2_000_000_000, 4096, sight=sight)
    assert len(str(caught.value).splitlines()) <= 3
