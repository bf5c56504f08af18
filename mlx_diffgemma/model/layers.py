"""The parts of one transformer layer, top to bottom. Weight names are Hugging Face's.

Every projection reads and writes the model's dtype; norms, router weights and softmaxes work in float32 inside.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import LayerConfig, ModelConfig
from .blocks import BlockMask
from .expert_linear import ExpertLinear, QuantizedExpertLinear
from .masks import Mask, WholeMask, Window
from .tuning import DEFAULT, Tuning

# What attention looks at: takes the keys and values just computed, returns all that may be seen.
Memory = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]

ROWS = 32  # of one tile of a product on Metal
FEW, WIDEST = 8, 256  # most queries and head size for which MLX has an attention kernel that knows groups


@mx.compile  # a shapeless chain of this length would be two kernels
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) · up with the tanh form of gelu (transformers "gelu_pytorch_tanh")."""
    return nn.gelu_approx(gate) * up


@partial(mx.compile, shapeless=True)
def _scaled(x: mx.array, scale: mx.array, by: mx.array) -> mx.array:
    return x * scale * by


@partial(mx.compile, shapeless=True)
def _weighted(y: mx.array, weights: mx.array) -> mx.array:
    return y * weights


@partial(mx.compile, shapeless=True)
def _added(x: mx.array, y: mx.array, scalar: mx.array) -> mx.array:
    return (x + y) * scalar


class MLP(nn.Module):
    """The dense branch, and the body of self-conditioning: down(gelu(gate x) · up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array, tuning: Tuning = DEFAULT) -> mx.array:
        [wide] = tuning.share.gather(self.up(x))
        return tuning.share.gather(self.down_proj(wide))[0]

    def up(self, x: mx.array) -> mx.array:
        """[…, H] → the inner values that `down_proj` takes."""
        return geglu(self.gate_proj(x), self.up_proj(x))


class Router(nn.Module):
    """Picks K of E experts for each token, from the raw residual (transformers DiffusionGemmaTextRouter)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.top_k_experts
        self.eps = config.rms_norm_eps
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))

    def __call__(self, residual: mx.array) -> tuple[mx.array, mx.array]:
        """[N, H] → expert ids [N, K] and their float32 weights [N, K].

        The weights are the softmax over all experts, renormalized over the K chosen: the same as the
        softmax over the chosen scores alone.
        """
        by = mx.array(residual.shape[-1] ** -0.5, residual.dtype)
        x = _scaled(mx.fast.rms_norm(residual, None, self.eps), self.scale, by)
        scores = self.proj(x).astype(mx.float32)  # [N, E]
        experts = mx.argpartition(mx.stop_gradient(scores), kth=-self.top_k, axis=-1)[..., -self.top_k :]
        weights = mx.softmax(mx.take_along_axis(scores, experts, axis=-1), axis=-1, precise=True)
        return experts, _weighted(weights, self.per_expert_scale[experts])


class Experts(nn.Module):
    """E gated MLPs in two stacked weights; `gate_up_proj` holds the gate's rows first."""

    gate_up_proj: ExpertLinear | QuantizedExpertLinear
    down_proj: ExpertLinear | QuantizedExpertLinear

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.moe_intermediate_size
        self.gate_up_proj = ExpertLinear(config.hidden_size, 2 * size, config.num_experts)
        self.down_proj = ExpertLinear(size, config.hidden_size, config.num_experts)

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array, tuning: Tuning) -> mx.array:
        """[N, H], expert ids [N, K], weights [N, K] → [N, H]."""
        wide, chosen, order = self.up(x, experts, tuning)
        return self.down(wide, chosen, weights, order).astype(x.dtype)

    def up(self, x: mx.array, experts: mx.array, tuning: Tuning) -> tuple[mx.array, mx.array, mx.array | None]:
        """[N, H] and expert ids [N, K] → the chosen experts' inner values, whose they are, and the order they are in:
        [N, K, 1, M] and [N, K] as chosen (None), or [N · K, 1, M] and [N · K] sorted by expert."""
        tokens, top_k = experts.shape
        if tokens * top_k < tuning.sort_from:
            return self._gated(x[:, None, None], experts, sorted_indices=False), experts, None
        order = mx.argsort(experts.flatten())  # rows of one expert together
        # The axis is added before the rows are gathered: added last, it makes strides that BLAS dislikes.
        rows = x[:, None][order // top_k]  # [N · K, 1, H]
        chosen = experts.flatten()[order]
        return self._gated(rows, chosen, sorted_indices=True), chosen, order

    def down(self, wide: mx.array, chosen: mx.array, weights: mx.array, order: mx.array | None) -> mx.array:
        """What `up` gave → [N, H], weighted by [N, K]."""
        if order is None:
            y = self.down_proj(wide, chosen, sorted_indices=False)[:, :, 0]  # [N, K, H]
        else:
            back = mx.put_along_axis(mx.zeros_like(order), order, mx.arange(order.size, dtype=order.dtype), axis=0)
            y = self.down_proj(wide, chosen, sorted_indices=True)
            y = y[:, 0][back].reshape(*weights.shape, -1)  # [N, K, H]
        return _weighted(y, weights[..., None]).sum(axis=1)

    def _gated(self, x: mx.array, experts: mx.array, *, sorted_indices: bool) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x, experts, sorted_indices=sorted_indices), 2, axis=-1)
        return geglu(gate, up)


class Attention(nn.Module):
    """Attention with normed queries and keys and scale 1. Full layers have no `v_proj`: the values are the
    key projection, before its norm and before rotation."""

    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, layer.num_kv_heads, layer.head_dim
        self.eps = config.rms_norm_eps
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        if layer.is_sliding:
            self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=self.eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=self.eps)
        self._periods = periods(layer)

    def __call__(self, x: mx.array, offset: int | mx.array, memory: Memory, mask: Mask, tuning: Tuning) -> mx.array:
        """[B, T, H] at positions `offset` … `offset` + T − 1 → [B, T, H]."""
        queries = self._split(self.q_proj(x), self.heads)  # [B, T, heads, D]; a norm copies what is transposed
        keys = self._split(self.k_proj(x), self.kv_heads)
        values = self._split(self.v_proj(x), self.kv_heads) if "v_proj" in self else keys
        values = mx.fast.rms_norm(values, None, self.eps).swapaxes(1, 2)  # [B, heads, T, D]
        keys, values = memory(self._rotate(self.k_norm(keys), offset), values)
        y = attend(self._rotate(self.q_norm(queries), offset), keys, values, mask, tuning)
        [heads] = tuning.share.gather(y.swapaxes(1, 2).flatten(2))
        return tuning.share.gather(self.o_proj(heads))[0]

    def _split(self, x: mx.array, heads: int) -> mx.array:
        return x.reshape(*x.shape[:2], heads, self.head_dim)

    def _rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """[B, T, heads, D] → [B, heads, T, D], rotated."""
        x = x.swapaxes(1, 2)
        return mx.fast.rope(
            x, self.head_dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._periods
        )


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask, tuning: Tuning) -> mx.array:
    """Softmax attention at scale 1: queries [B, heads, T, D], keys and values [B, kv heads, K, D].

    MLX has fused kernels for small heads only; for others it holds every score at once. Where those would be many
    (a long prefix, a long chunk), and where a window hides most keys, runs of queries are taken one after the
    other, each with the keys it can see. A query's result is its own, so this changes nothing.
    """
    length, total = queries.shape[2], keys.shape[2]
    heads = queries.shape[1] * tuning.share.size  # the same runs, whoever shares the heads
    most = max(tuning.scores // (heads * total * queries.dtype.size), 1)  # queries at once
    if isinstance(mask, tuple):
        rows = [slice(i, i + 1) for i in range(len(mask))]
        return mx.concatenate([_attend_row(queries[i], keys[i], values[i], mask[i.start], most) for i in rows])
    if isinstance(mask, Window):
        step = min(most, max(mask.window // 4, 1)) if tuning.skip_hidden_keys else length
        pieces = list(mask.pieces(step))
    elif length <= most:
        return _attend(queries, keys, values, mask)
    else:
        group = queries.shape[1] // keys.shape[1]
        runs = _equal_runs(length, most, max(ROWS // group, 1))
        pieces = [_piece(mask, length, total, start, stop, group) for start, stop in runs]
    return _attend_pieces(queries, keys, values, pieces)


def _attend_row(queries: mx.array, keys: mx.array, values: mx.array, mask: BlockMask, most: int) -> mx.array:
    """One row that holds pictures; what is padding sees nothing, and nothing sees it."""
    step = most if mask.window is None else min(most, max(mask.window // 4, 1))
    padding = [mx.zeros((*queries.shape[:2], mask.skipped, queries.shape[3]), queries.dtype)] if mask.skipped else []
    if mask.skipped == mask.length:
        return padding[0]
    return mx.concatenate([*padding, _attend_pieces(queries, keys, values, mask.pieces(step))], axis=2)


Pieces = Iterable[tuple[slice, slice, WholeMask]]  # queries, the keys they see, the mask between the two


def _attend_pieces(queries: mx.array, keys: mx.array, values: mx.array, pieces: Pieces) -> mx.array:
    outputs: list[mx.array] = []
    for rows, columns, part in pieces:
        q = mx.depends(queries[:, :, rows], outputs[-1:]) if outputs else queries[:, :, rows]  # not all at once
        outputs.append(_attend(q, keys[:, :, columns], values[:, :, columns], part))
    return mx.concatenate(outputs, axis=2)


def _attend(queries: mx.array, keys: mx.array, values: mx.array, mask: WholeMask) -> mx.array:
    """All of it at once. Queries that share keys become rows of one product, where they are masked alike or the mask
    has a row for each of them: keys and values are read once for all; MLX would read them once a head, where it has no
    kernel of its own.
    """
    batch, heads, length, dim = queries.shape
    kv_heads = keys.shape[1]
    group, own_kernel = heads // kv_heads, length <= FEW and dim <= WIDEST
    folded = group > 1 and (_rows(mask) == group * length or (_rows(mask) == 1 and not own_kernel))
    rows = queries.reshape(batch, kv_heads, -1, dim) if folded else queries
    return mx.fast.scaled_dot_product_attention(rows, keys, values, scale=1.0, mask=mask).reshape(queries.shape)


def _rows(mask: WholeMask) -> int | None:
    """Of a mask: 1 if every query sees the same keys; None if MLX makes them."""
    return 1 if mask is None else None if isinstance(mask, str) else mask.shape[-2]


def _equal_runs(length: int, most: int, rows: int) -> Iterator[tuple[int, int]]:
    """0 … `length` in as few runs as hold at most `most`: none is much shorter than another (a last run of 4 would pass
    over all keys for little), and where it takes no more runs they are multiples of `rows`, which fill tiles."""
    count = -(-length // most)
    unit = rows if rows <= most and -(-length // (most // rows * rows)) == count else 1
    units = -(-length // unit)
    for run in range(count):
        yield units * run // count * unit, min(units * (run + 1) // count * unit, length)


def _piece(
    mask: WholeMask, length: int, total: int, start: int, stop: int, group: int
) -> tuple[slice, slice, WholeMask]:
    """Queries `start` … `stop`, the keys they can see, and what is left of the mask: a row for each of the `group` of
    queries at a place that share keys."""
    rows, columns = slice(start, stop), slice(0, total)
    if isinstance(mask, str):  # "causal": the queries are the last keys, so these see nothing behind `stop`
        before = total - length
        columns = slice(0, before + stop)
        some = mx.arange(columns.stop) <= mx.arange(before + start, columns.stop)[:, None]
    elif mask is None or mask.shape[-2] == 1:
        return rows, columns, mask
    else:
        some = mask[..., rows, :]
    return rows, columns, mx.concatenate([some] * group, axis=-2)


def periods(layer: LayerConfig) -> mx.array:
    """Rotation periods over 2π, float32 [D / 2]; unrotated dimensions have an infinite one.

    Proportional RoPE rotates a part of the head but divides by the full head size. Made in float64 and rounded once, on
    no device: an array that waits to be computed belongs to the thread that made it, and this one is no parameter that
    loading would compute.
    """
    made = np.full(layer.head_dim // 2, np.inf)
    made[: layer.rotated_dims // 2] = layer.rope_theta ** (np.arange(0, layer.rotated_dims, 2) / layer.head_dim)
    return mx.array(made.astype(np.float32))


class Layer(nn.Module):
    """Attention, then a dense and an expert branch side by side; seven norms (DiffusionGemmaDecoderTextLayer)."""

    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.router = Router(config)
        self.experts = Experts(config)
        norm = partial(nn.RMSNorm, config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()
        self.pre_feedforward_layernorm_2 = norm()
        self.post_feedforward_layernorm_1 = norm()
        self.post_feedforward_layernorm_2 = norm()
        self.layer_scalar = mx.ones((1,))

    def __call__(
        self,
        x: mx.array,
        scalar: mx.array,
        offset: int | mx.array,
        memory: Memory,
        mask: Mask,
        tuning: Tuning = DEFAULT,
    ) -> mx.array:
        """[B, T, H] → [B, T, H]; `scalar` is the encoder's or the decoder's `layer_scalar`."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), offset, memory, mask, tuning))
        flat = x.flatten(0, 1)  # [N, H]
        experts, weights = self.router(flat)  # the raw residual, not a normed one
        normed = self.pre_feedforward_layernorm_2(flat)
        wide, chosen, order = self.experts.up(normed, experts, tuning)
        dense, wide = tuning.share.gather(self.mlp.up(self.pre_feedforward_layernorm(x)), wide)
        sparse = self.experts.down(wide, chosen, weights, order).astype(normed.dtype)
        dense, sparse = tuning.share.gather(self.mlp.down_proj(dense), sparse)
        branches = self.post_feedforward_layernorm_1(dense)
        branches = branches + self.post_feedforward_layernorm_2(sparse.reshape(x.shape))
        return _added(x, self.post_feedforward_layernorm(branches), scalar)


class SelfConditioning(MLP):
    """Adds what the step before believed to the canvas's embeddings; its last norm has no weight."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.intermediate_size)
        self.pre_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eps = config.rms_norm_eps

    def condition(self, embeddings: mx.array, signal: mx.array | None, tuning: Tuning = DEFAULT) -> mx.array:
        """[B, L, H] and the signal [B, L, H] → [B, L, H]. None is the zero signal, whose MLP is zero."""
        if signal is not None:
            embeddings = embeddings + self(self.pre_norm(signal), tuning)
        return mx.fast.rms_norm(embeddings, None, self.eps)
