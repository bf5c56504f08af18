"""One projection of all experts: E matrices in one array, each row through the one of its expert.

What mlx-lm's SwitchLinear and QuantizedSwitchLinear compute, under the same names; importing those took nine tenths of
the time until a model could load. Adapters are mlx-lm's, and get mlx-lm's layers (files/adapters.py).
"""

import mlx.core as mx
import mlx.nn as nn


class ExpertLinear(nn.Module):
    """x [..., 1, in] and expert ids [...] → [..., 1, out]."""

    weight: mx.array  # [E, out, in]

    def __init__(self, inputs: int, outputs: int, experts: int):
        super().__init__()
        self.weight = mx.zeros((experts, outputs, inputs))

    def __call__(self, x: mx.array, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
        weight = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(x, weight, rhs_indices=experts, sorted_indices=sorted_indices)

    def to_quantized(self, group_size: int = 64, bits: int = 4, mode: str = "affine") -> "QuantizedExpertLinear":
        """Packed; as `mlx.nn.quantize` asks."""
        packed = mx.quantize(self.weight, group_size=group_size, bits=bits, mode=mode)
        return QuantizedExpertLinear(*packed, group_size=group_size, bits=bits, mode=mode)


class QuantizedExpertLinear(nn.Module):
    """The same with packed matrices; frozen."""

    weight: mx.array  # [E, out, packed in]
    scales: mx.array
    biases: mx.array | None

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        *,
        group_size: int,
        bits: int,
        mode: str,
    ):
        super().__init__()
        self.weight, self.scales, self.biases = weight, scales, biases
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.freeze()

    def __call__(self, x: mx.array, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )
