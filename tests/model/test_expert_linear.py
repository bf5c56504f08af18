"""Our layer of stacked experts gives the bits of mlx-lm's; adapters get mlx-lm's own, of the same arrays."""

import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_diffgemma.files import adapters
from mlx_diffgemma.model.expert_linear import ExpertLinear

EXPERTS, INPUTS, OUTPUTS = 5, 128, 96


def ours() -> ExpertLinear:
    made = ExpertLinear(INPUTS, OUTPUTS, EXPERTS)
    made.weight = mx.random.normal((EXPERTS, OUTPUTS, INPUTS), key=mx.random.key(3))
    return made


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    "how", [None, *(("affine", bits, 64) for bits in (2, 4, 8)), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_the_bits_are_mlx_lms(how: tuple[str, int, int] | None, ordered: bool) -> None:
    layer: Any = ours()
    theirs: Any = SwitchLinear(INPUTS, OUTPUTS, EXPERTS, bias=False)
    theirs.weight = layer.weight
    if how is not None:
        mode, bits, group = how
        layer, theirs = (m.to_quantized(group_size=group, bits=bits, mode=mode) for m in (layer, theirs))
        assert dict(layer.parameters()).keys() == {k for k, v in theirs.parameters().items() if v is not None}
    ids = np.random.default_rng(1).integers(0, EXPERTS, 40)
    x = mx.random.normal((40, 1, INPUTS), key=mx.random.key(4))
    chosen = mx.array(np.sort(ids) if ordered else ids)
    expected = theirs(x, chosen, sorted_indices=ordered)
    np.testing.assert_array_equal(layer(x, chosen, sorted_indices=ordered), expected)
    twin = adapters._of_mlx_lm(layer)
    assert type(twin) is (SwitchLinear if how is None else QuantizedSwitchLinear)
    np.testing.assert_array_equal(twin(x, chosen, sorted_indices=ordered), expected)


def test_loading_does_not_import_mlx_lm() -> None:
    script = "import sys; from mlx_diffgemma.files.weights import load_network; print('mlx_lm' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
