"""Which rows are whose, and how they are read."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.files.layout import expected_tensors
from mlx_diffgemma.model.sharing.share import SIZES, Share, check_divides
from tests import synthetic

RELEASED = ModelConfig.from_dict(synthetic.published("released/config.json"))


@pytest.mark.parametrize("size", SIZES)
def test_the_machines_rows_are_all_rows_once(size: int) -> None:
    """But for key heads, of which there may be fewer than machines."""
    check_divides(RELEASED, size)
    cut = 0
    for name, shape in expected_tensors(RELEASED).items():
        found = [Share(rank, size).spans(RELEASED, name.removeprefix("model.")) for rank in range(size)]
        if found[0] is None:
            assert found == [None] * size
            continue
        cut += 1
        rows = sorted(row for spans in found if spans for start, stop in spans for row in range(start, stop))
        if ".k_proj." in name and size == 4 and shape[0] == 1024:
            assert rows == sorted([*range(1024)] * 2)  # two key heads, each of two machines
        else:
            assert rows == list(range(shape[-2])), name
    assert cut == 30 * 8 + 25 + 3  # q, k, o; dense and sparse up, down; five full layers have no v


def test_gate_and_up_are_cut_alike() -> None:
    spans = Share(1, 2).spans(RELEASED, "decoder.layers.3.experts.gate_up_proj.weight")
    assert spans == ((352, 704), (704 + 352, 1408))


@pytest.mark.parametrize(
    ("size", "says"), [(3, "3 machines were launched"), (8, "8 machines"), (4, "4 does not divide")]
)
def test_what_does_not_divide_is_named(size: int, says: str) -> None:
    text = {"num_attention_heads": 6, "num_key_value_heads": 3, "num_global_key_value_heads": 1}
    config = ModelConfig.from_dict(synthetic.small_config(**text))
    with pytest.raises(ConfigError, match=says):
        check_divides(config, size)
    if size == 4:
        with pytest.raises(ConfigError, match="heads 6, 3 key heads"):
            check_divides(config, size)


def test_what_a_prefix_costs_a_machine() -> None:
    held = [layer.num_kv_heads for layer in Share(0, 4).own(RELEASED).layers]
    assert sorted(set(held)) == [1, 2]
    assert np.array_equal(mx.array(held), [2, 2, 2, 2, 2, 1] * 5)
