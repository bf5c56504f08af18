"""The eyes: one picture's patches in, its soft tokens out, ready to stand among the prompt's embeddings.

A small transformer of its own (transformers gemma4_vision): every patch of a picture sees every other, a square of
patches becomes one soft token, and a projection lifts it to the text model's width. Pictures go through one by one and
without padding, so that none depends on another. `P` patches, row by row; `C` the tower's width.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import attend
from .tuning import Tuning
from .vision_config import VisionConfig

FUSED = (64, 80, 128)  # head sizes for which MLX has a fused attention kernel (Metal; CUDA takes these too)
RUNS = Tuning(scores=1 << 22)  # of queries, of one head: few bytes, and a CPU's caches like them


class ClippedLinear(nn.Module):
    """A linear layer whose weight the checkpoint keeps one name deeper; with `use_clipped_linears`, its input and its
    output are clamped to four stored numbers (transformers Gemma4ClippableLinear)."""

    def __init__(self, config: VisionConfig, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        if config.use_clipped_linears:
            self.input_min, self.input_max = mx.array(-mx.inf), mx.array(mx.inf)
            self.output_min, self.output_max = mx.array(-mx.inf), mx.array(mx.inf)

    def __call__(self, x: mx.array) -> mx.array:
        if "input_min" not in self:
            return self.linear(x)
        x = mx.clip(x, self.input_min.astype(x.dtype), self.input_max.astype(x.dtype))
        y = self.linear(x)
        return mx.clip(y, self.output_min.astype(y.dtype), self.output_max.astype(y.dtype))


class PatchEmbedder(nn.Module):
    """Pixels of a patch → [C], plus what its column and its row mean."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = mx.ones((2, config.position_embedding_size, config.hidden_size))

    def __call__(self, patches: mx.array, rows: int, columns: int) -> mx.array:
        """[P, 3 · patch²] in 0 … 1 → [P, C]."""
        by_column = self.position_embedding_table[0, None, :columns]
        by_row = self.position_embedding_table[1, :rows, None]
        x = (2 * (patches.astype(mx.float32) - 0.5)).astype(by_row.dtype)
        return self.input_proj(x) + (by_column + by_row).reshape(rows * columns, -1)


class Norm(nn.Module):
    """RMS norm, its weight multiplied in float32 too: rounded once, where nn.RMSNorm rounds 16 bits twice."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = mx.ones((size,)), eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x.astype(mx.float32), self.weight.astype(mx.float32), self.eps).astype(x.dtype)


Rotation = tuple[mx.array, mx.array]  # cosines and sines [P, 1, 2, D / 4]: axis x, then y


def rotation(config: VisionConfig, rows: int, columns: int, dtype: mx.Dtype) -> Rotation:
    """How far each patch turns a head's pairs: half of them by its column, half by its row.

    Angles are float32 (one patch of a long strip turns by 3,000 rad, where float32's steps are 2e-4: parity needs
    the same ones), their cosines correctly rounded on any device, then cast. Source: transformers
    Gemma4VisionRotaryEmbedding.
    """
    pairs = config.head_dim // 4
    exponents = np.arange(0, 2 * pairs, 2, dtype=np.float32) / np.float32(2 * pairs)
    frequencies = np.float32(1) / (np.float32(config.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
    angles = np.empty((rows, columns, 1, 2, pairs), np.float32)
    angles[..., 0, :] = (np.arange(columns, dtype=np.float32)[:, None] * frequencies)[:, None]
    angles[..., 1, :] = (np.arange(rows, dtype=np.float32)[:, None] * frequencies)[:, None, None]
    exact = angles.reshape(rows * columns, 1, 2, pairs).astype(np.float64)
    cosines, sines = (mx.array(f(exact).astype(np.float32)).astype(dtype) for f in (np.cos, np.sin))
    return cosines, sines


def rotate(x: mx.array, turn: Rotation) -> mx.array:
    """Turn heads [P, heads, D]; inside each axis's half, channel i pairs with the one half of that half on."""
    halves = x.reshape(*x.shape[:2], 2, 2, -1)  # [P, heads, axis, first or second of the pair, D / 4]
    return mx.stack(_turned(halves[..., 0, :], halves[..., 1, :], *turn), axis=-2).reshape(x.shape)


@partial(mx.compile, shapeless=True)
def _turned(first: mx.array, second: mx.array, cosines: mx.array, sines: mx.array) -> list[mx.array]:
    a, b, c, s = (part.astype(mx.float32) for part in (first, second, cosines, sines))
    return [(a * c - b * s).astype(first.dtype), (b * c + a * s).astype(first.dtype)]


class Attention(nn.Module):
    """Every patch sees every other. Normed queries, keys and values, the values without a weight; scale 1."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = ClippedLinear(config, config.hidden_size, queries)
        self.k_proj = ClippedLinear(config, config.hidden_size, keys)
        self.v_proj = ClippedLinear(config, config.hidden_size, keys)
        self.o_proj = ClippedLinear(config, queries, config.hidden_size)
        self.q_norm = Norm(self.head_dim, self.eps)
        self.k_norm = Norm(self.head_dim, self.eps)

    def __call__(self, x: mx.array, turn: Rotation) -> mx.array:
        """[P, C] → [P, C]."""
        queries = rotate(self.q_norm(self._split(self.q_proj(x))), turn)
        keys = rotate(self.k_norm(self._split(self.k_proj(x))), turn)
        values = mx.fast.rms_norm(self._split(self.v_proj(x)), None, self.eps)
        return self.o_proj(look(queries, keys, values).flatten(1))

    def _split(self, x: mx.array) -> mx.array:
        return x.reshape(len(x), -1, self.head_dim)


def look(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Softmax attention at scale 1 without a mask: queries [P, heads, D], keys and values [P, kv heads, D] →
    [P, heads, D].

    Heads are filled up with zeros to the next size with a fused kernel, which changes no score. The first value filled
    in is a one: it comes out as the sum of a query's weights, and dividing by that takes back what MLX's CPU softmax
    loses over many keys (1e-5 of the sum of 10,080 weights in float32).
    """
    dim = queries.shape[-1]
    spare = next((size for size in FUSED if size >= dim), dim) - dim
    one = mx.ones((*values.shape[:2], min(spare, 1)), values.dtype)
    q, k, v = (
        mx.pad(x.transpose(1, 0, 2), [(0, 0), (0, 0), (0, dim + spare - x.shape[-1])])[None]  # [1, heads, P, D']
        for x in (queries, keys, mx.concatenate([values, one], axis=-1))
    )
    fused = mx.default_device() == mx.gpu and dim + spare in FUSED
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0) if fused else _by_heads(q, k, v)
    y = y[0].transpose(1, 0, 2).astype(queries.dtype)
    return y[..., :dim] / y[..., dim : dim + 1] if spare else y


def _by_heads(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Head by head, and runs of queries inside: all scores [heads, P, P] would be 3.3 GB a layer at the released sizes
    and 1,120 tokens. In float32, as a fused kernel has its scores; on a CPU that is faster, too."""
    q, k, v = (x.astype(mx.float32) for x in (queries, keys, values))
    shared = q.shape[1] // k.shape[1]  # query heads to one of keys and values
    heads = [(slice(i, i + 1), slice(i // shared, i // shared + 1)) for i in range(q.shape[1])]
    return mx.concatenate([attend(q[:, own], k[:, its], v[:, its], None, RUNS) for own, its in heads], axis=1)


class MLP(nn.Module):
    """down(gelu(gate x) · up x)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.gate_proj = ClippedLinear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = ClippedLinear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = ClippedLinear(config, config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


@partial(mx.compile, shapeless=True)
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) · up with the tanh form of gelu, computed in float32 and rounded once."""
    return nn.gelu_approx(gate.astype(mx.float32)).astype(gate.dtype) * up


class Layer(nn.Module):
    """Attention, then an MLP, each between two norms (transformers Gemma4VisionEncoderLayer)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        norm = partial(Norm, config.hidden_size, config.rms_norm_eps)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def __call__(self, x: mx.array, turn: Rotation) -> mx.array:
        """[P, C] → [P, C]."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), turn))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Layers(nn.Module):
    """What the checkpoint keeps below `vision_tower.encoder.`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]


class VisionTower(nn.Module):
    """Patches → pooled, standardized features [n, C]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = Layers(config)
        if config.standardize:
            self.std_bias, self.std_scale = mx.zeros((config.hidden_size,)), mx.ones((config.hidden_size,))

    def __call__(self, patches: mx.array, columns: int) -> mx.array:
        """[P, 3 · patch²] of a picture `columns` patches wide → [P / pooling², C], row by row."""
        rows = len(patches) // columns
        x = self.patch_embedder(patches, rows, columns)
        turn = rotation(self.config, rows, columns, x.dtype)
        for layer in self.encoder.layers:
            x = layer(x, turn)
        pooled = pool(x, rows, columns, self.config.pooling_kernel_size)
        # Large numbers that cancel, beyond float16's range: in float32 until they are small again.
        y = pooled.astype(mx.float32) * x.shape[-1] ** 0.5
        if "std_bias" in self:
            y = (y - self.std_bias.astype(mx.float32)) * self.std_scale.astype(mx.float32)
        return y.astype(x.dtype)


def pool(x: mx.array, rows: int, columns: int, side: int) -> mx.array:
    """[P, C] → the mean of each square of side² patches, summed in float32, [P / side², C]."""
    squares = x.astype(mx.float32).reshape(rows // side, side, columns // side, side, -1)
    return squares.mean(axis=(1, 3)).flatten(0, 1).astype(x.dtype)


class Projection(nn.Module):
    """The tower's width → the text model's: a norm without weight, then a matrix; no sqrt(H) as for text."""

    def __init__(self, config: VisionConfig, hidden_size: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.embedding_projection = nn.Linear(config.hidden_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """[n, C] → [n, H]."""
        return self.embedding_projection(mx.fast.rms_norm(x, None, self.eps))


class Eyes(nn.Module):
    """All weights for pictures; their names are the checkpoint's below `model.encoder.`."""

    def __init__(self, config: VisionConfig, hidden_size: int):
        super().__init__()
        self.vision_tower = VisionTower(config)
        self.embed_vision = Projection(config, hidden_size)

    def __call__(self, patches: mx.array, columns: int) -> mx.array:
        """One picture: patches [P, 3 · patch²] in 0 … 1, row by row, `columns` to a row → soft tokens [n, H].

        A patch's pixels stand row by row, their three colours side by side. Rows and columns are multiples of
        pooling_kernel_size, and at most position_embedding_size.
        """
        return self.embed_vision(self.vision_tower(patches, columns))

    def see(self, patches: mx.array, columns: int) -> mx.array:
        """`__call__`, evaluated: what lasts is the soft tokens alone, so that pictures never pile up in a graph."""
        tokens = self(patches, columns)
        mx.eval(tokens)
        return tokens


def looking_bytes(config: VisionConfig, patches: int, item_size: int = 2) -> int:
    """Bytes beside the weights to look at a picture of that many patches: an MLP's three arrays, what stands around it,
    and a run's scores. Measured at the released sizes in float32: 543 MB at 5,041 patches and 1,152 at 9,801, where
    this says 663 and 1,194."""
    return patches * (3 * config.intermediate_size + 13 * config.hidden_size) * item_size + 24 * RUNS.scores
