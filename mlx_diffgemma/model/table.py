"""The embedding table, packed or not, in its two roles: rows of embeddings, and the head that scores them.

Everything that reads the table goes through here: scaled rows, scores of a run of ids, weighted sums of rows, softcap.
"""

from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

Table = nn.Embedding | nn.QuantizedEmbedding


def scaled(embeddings: mx.array) -> mx.array:
    """Times sqrt(H), rounded to the embeddings' dtype first (transformers DiffusionGemmaTextScaledWordEmbedding)."""
    return embeddings * mx.array(embeddings.shape[-1] ** 0.5, embeddings.dtype)


def softcap(logits: mx.array, cap: float) -> mx.array:
    """cap · tanh(logits / cap), in float32."""
    return shaped(logits, mx.array(cap, mx.float32), mx.array(1.0))


@partial(mx.compile, shapeless=True)  # one pass over memory instead of five
def shaped(scores: mx.array, cap: mx.array, temperature: mx.array) -> mx.array:
    return cap * mx.tanh(scores.astype(mx.float32) / cap) / temperature


def soft_embedding(logits: mx.array, table: Table) -> mx.array:
    """The signal of the next step, [B, L, H], from shaped logits [B, L, V].

    As the reference does, the logits are rounded to the table's dtype, and so are the probabilities.
    """
    dtype = unpacked_dtype(table)
    probabilities = mx.softmax(logits.astype(dtype).astype(mx.float32), axis=-1, precise=True)
    return scaled(mix(probabilities.astype(dtype), table, slice(None)))


def unpacked_dtype(module: nn.Module) -> mx.Dtype:
    """The dtype of the values that a module's weights stand for; MLX unpacks modes with byte scales to bfloat16."""
    if not isinstance(module, nn.QuantizedEmbedding | nn.QuantizedLinear):
        return module["weight"].dtype
    return module.scales.dtype if module.mode == "affine" else mx.bfloat16


class Runs(NamedTuple):
    """`count` runs of `size` neighbouring rows of the table, the first from `first`, each `apart` rows after the one
    before; `apart` divides the table, and no run reaches over a multiple of it."""

    first: int
    size: int
    count: int = 1
    apart: int = 0

    def of(self, rows: mx.array) -> mx.array:
        """A view of rows [V, w]: [size, w] for a single run, else [count, size, w]."""
        if self.count == 1:
            return rows[self.first : self.first + self.size]
        run, start = divmod(self.first, self.apart)
        runs = rows.reshape(-1, self.apart, rows.shape[-1])
        return runs[run : run + self.count, start : start + self.size]


def scores(x: mx.array, table: Table, ids: slice | mx.array | Runs) -> mx.array:
    """x [N, H] times the rows `ids` of the table → [N, n], of several runs [count, N, size]."""
    if isinstance(table, nn.QuantizedEmbedding):
        packed = _packed(table, ids)
        return mx.quantized_matmul(x[None] if packed[0].ndim > 2 else x, *packed, transpose=True, **_packing(table))
    return x @ _rows(table.weight, ids).swapaxes(-1, -2)


def mix(p: mx.array, table: Table, ids: slice | mx.array | Runs) -> mx.array:
    """Weights p [..., n] over the rows `ids` of the table, of several runs [count, N, size] → their weighted sums
    [..., H]."""
    if isinstance(table, nn.QuantizedEmbedding):
        return mx.quantized_matmul(p, *_packed(table, ids), transpose=False, **_packing(table))
    return p @ _rows(table.weight, ids)


def block_scores(x: mx.array, table: Table, block: mx.array, size: int) -> mx.array:
    """x [N, H] times the rows of one block of `size` ids per position → [N, size]."""
    rows = x[:, None]  # [N, 1, H]
    if isinstance(table, nn.QuantizedEmbedding):
        parts: list[Any] = [a if a is None else a.reshape(-1, size, a.shape[-1]) for a in _packed(table, slice(None))]
        return mx.gather_qmm(rows, *parts, rhs_indices=block, transpose=True, **_packing(table))[:, 0]
    weight = table.weight.reshape(-1, size, x.shape[-1])
    return mx.gather_mm(rows, weight.swapaxes(-1, -2), rhs_indices=block)[:, 0]


def _rows(array: mx.array, ids: slice | mx.array | Runs) -> mx.array:
    return ids.of(array) if isinstance(ids, Runs) else array[ids]


def _packed(table: nn.QuantizedEmbedding, ids: slice | mx.array | Runs) -> tuple[mx.array, mx.array, mx.array | None]:
    biases = table.get("biases")
    return _rows(table.weight, ids), _rows(table.scales, ids), None if biases is None else _rows(biases, ids)


def _packing(table: nn.QuantizedEmbedding) -> dict:
    return {"group_size": table.group_size, "bits": table.bits, "mode": table.mode}
