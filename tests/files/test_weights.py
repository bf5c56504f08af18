"""Weights are numbers: NaN and infinity are found in their bits, whatever the dtype, before anything is generated."""

import math
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.files.weights import INFINITY, largest_bits, load_network
from tests import small

BITS = {mx.float32: mx.uint32, mx.float16: mx.uint16, mx.bfloat16: mx.uint16}


def is_finite(array: mx.array) -> bool:
    positive, negative = largest_bits(array)
    infinity = INFINITY[array.dtype]
    return int(positive) < infinity and int(negative) < infinity | 1 << 8 * array.dtype.size - 1


@settings(max_examples=200, deadline=None)
@given(dtype=st.sampled_from(list(BITS)), values=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_any_bits_are_numbers_where_mlx_says_so(dtype: mx.Dtype, values: list[int]) -> None:
    kind = np.uint32 if dtype == mx.float32 else np.uint16
    array = mx.array(np.array(values, np.uint32).astype(kind)).view(dtype)
    assert is_finite(array) == mx.isfinite(array).all().item()


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
def test_the_edges(dtype: mx.Dtype) -> None:
    largest = mx.finfo(dtype).max
    assert is_finite(mx.array([largest, -largest, 0.0, -0.0], dtype))
    for value in (math.nan, math.inf, -math.inf):
        assert not is_finite(mx.array([1.0, value, -1.0], dtype))
    assert not is_finite(-mx.array([math.nan], dtype))


@pytest.mark.parametrize("part", "embed_tokens q_proj input_layernorm router.proj down_proj layer_scalar".split())
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_checkpoint_with_one_is_refused_and_says_where(tmp_path: Path, part: str, value: float) -> None:
    folder = small.write_checkpoint(tmp_path)
    file = folder / "model.safetensors"
    weights = cast(dict[str, mx.array], mx.load(str(file)))
    name = next(name for name in weights if part in name)
    spoiled: Any = weights[name].flatten()
    spoiled[-1] = value
    weights[name] = spoiled.reshape(weights[name].shape)
    mx.save_safetensors(str(file), weights)
    own = name if name.endswith(".weight") or part == "layer_scalar" else f"{name}.weight"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {own} holds NaN or infinity"):
        load_network(folder)
    load_network(folder, lazy=True)
