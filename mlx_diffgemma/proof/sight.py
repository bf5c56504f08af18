"""The vision tower against the same in float64: its parts at the released head and patch sizes, a small random tower
whole, and the tower of a pack, of which only that it gives numbers is asked.

Bounds. Each part rounds once or sums in float32, as `products` has it. A tower of two layers rounds some forty times
one behind the other; in bfloat16 transformers' own error is 6 % of the soft tokens' RMS after three layers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from .findings import Finding, on_gpu
from .products import BFLOAT16, FLOAT32, relative_error, truth_of_attention

if TYPE_CHECKING:
    import mlx.core as mx

    from ..model.vision import Eyes

TOWER = {"float32": 1e-5, "bfloat16": 1e-1}  # bounds on the soft tokens' RMS error, in units of their RMS
SHAPES = ((12, 12), (3, 51), (33, 6))  # rows and columns of patches
VISION: dict[str, Any] = {  # the released heads and patches, fewer of them and fewer layers
    "hidden_size": 288,
    "intermediate_size": 480,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 72,
    "patch_size": 16,
    "position_embedding_size": 128,
    "standardize": True,
}
RELEASED = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_key_value_heads": 16}


def sight(folder: Path | None = None) -> Iterator[Finding]:
    """Every check; the last one is of the tower in `folder`, the pack that is checked."""
    import mlx.core as mx

    for dtype in (mx.float32, mx.bfloat16) if on_gpu() else (mx.float32,):
        name = str(dtype).removeprefix("mlx.core.")
        bound = FLOAT32 if dtype == mx.float32 else BFLOAT16
        for rows, columns in SHAPES:
            for what, check in (("attention", _attention), ("rotation", _rotation), ("pooling", _pooling)):
                error = check(rows, columns, dtype)
                yield _finding(f"{what} of {rows} × {columns} patches, {name}", error, bound)
        eyes = small_tower(dtype)
        for rows, columns in SHAPES:
            patches = _uniform(rows * columns, 768)
            error = relative_error(eyes.see(mx.array(patches), columns), truth_of_tower(eyes, patches, columns))
            yield _finding(f"a random tower, {rows} × {columns} patches, {name}", error, TOWER[name])
    yield _own(folder)


def _finding(name: str, error: float, bound: float) -> Finding:
    says = f"relative error {error:.1e}, bound {bound:.0e}"
    return Finding(part="eyes", name=name, passed=error <= bound, says=says, figures={"error": error, "bound": bound})


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def _uniform(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).random(shape, np.float32)


def _exact(x: "mx.array") -> np.ndarray:
    import mlx.core as mx

    return np.array(x.astype(mx.float32)).astype(np.float64)


def small_tower(dtype: "mx.Dtype") -> "Eyes":
    """A tower of VISION, as wide as the released one on a GPU; its random weights keep activations near 1."""
    import mlx.core as mx

    from ..model.network import leaves
    from ..model.vision import Eyes
    from ..model.vision_config import VisionConfig

    eyes = Eyes(VisionConfig.from_dict(VISION | (RELEASED if on_gpu() else {})), 320)
    weights = []
    for number, (name, value) in enumerate(leaves(eyes.parameters()).items()):
        noise = _normal(*value.shape, seed=number)
        made = 1 + 0.2 * noise if noise.ndim == 1 else noise * np.float32(value.shape[-1] ** -0.5)
        weights.append((name, mx.array(made).astype(dtype)))
    eyes.load_weights(weights)
    return eyes


def _attention(rows: int, columns: int, dtype: "mx.Dtype") -> float:
    """Heads of 72, filled up to a size that a fused kernel has."""
    import mlx.core as mx

    from ..model.vision import look

    count = rows * columns
    q, k, v = (mx.array(_normal(count, 4, 72, seed=n) * np.float32(72**-0.25)).astype(dtype) for n in range(3))
    heads = [x.transpose(1, 0, 2)[None] for x in (q, k, v)]
    truth = truth_of_attention(heads[0], heads[1], heads[2], np.ones((count, count), bool))
    return relative_error(look(q, k, v), truth[0].transpose(1, 0, 2))


def _rotation(rows: int, columns: int, dtype: "mx.Dtype") -> float:
    import mlx.core as mx

    from ..model.vision import rotate, rotation
    from ..model.vision_config import VisionConfig

    x = mx.array(_normal(rows * columns, 2, 72)).astype(dtype)
    config = VisionConfig.from_dict(VISION)
    return relative_error(rotate(x, rotation(config, rows, columns, dtype)), _turned(_exact(x), rows, columns, 100.0))


def _pooling(rows: int, columns: int, dtype: "mx.Dtype") -> float:
    import mlx.core as mx

    from ..model.vision import pool

    x = mx.array(_normal(rows * columns, 64)).astype(dtype)
    return relative_error(pool(x, rows, columns, 3), _pooled(_exact(x), rows, columns, 3))


# ------------------------------------------------------------------------------------------------------- in float64


def truth_of_tower(eyes: "Eyes", patches: np.ndarray, columns: int) -> np.ndarray:
    """Soft tokens [n, H] of patches [P, 3 · patch²] in float64, by the weights as they are held; unpacked ones, and no
    clipped linears. One layer's weights are in memory at a time."""
    tower, rows = eyes.vision_tower, len(patches) // columns
    config, embedder = tower.config, tower.patch_embedder
    table = embedder.position_embedding_table
    x = (2 * patches.astype(np.float64) - 1) @ _exact(embedder.input_proj.weight).T
    by_column, by_row = _exact(table[0, :columns]), _exact(table[1, :rows])
    x = x + (by_row[:, None] + by_column[None]).reshape(rows * columns, -1)
    for layer in tower.encoder.layers:
        x = _through(layer, x, rows, columns, config)
    x = _pooled(x, rows, columns, config.pooling_kernel_size) * config.hidden_size**0.5
    if config.standardize:
        x = (x - _exact(tower.std_bias)) * _exact(tower.std_scale)
    return _normed(x, config.rms_norm_eps) @ _exact(eyes.embed_vision.embedding_projection.weight).T


def _through(layer: Any, x: np.ndarray, rows: int, columns: int, config: Any) -> np.ndarray:
    """One layer of the tower."""

    def norm(module: Any, x: np.ndarray) -> np.ndarray:
        return _normed(x, config.rms_norm_eps) * _exact(module.weight)

    def linear(module: Any, x: np.ndarray) -> np.ndarray:
        return x @ _exact(module.linear.weight).T

    own, count = layer.self_attn, len(x)
    y = norm(layer.input_layernorm, x)
    q, k, v = (linear(m, y).reshape(count, -1, config.head_dim) for m in (own.q_proj, own.k_proj, own.v_proj))
    q, k = (_turned(norm(m, z), rows, columns, config.rope_theta) for m, z in ((own.q_norm, q), (own.k_norm, k)))
    y = linear(own.o_proj, _attended(q, k, _normed(v, config.rms_norm_eps)))
    x = x + norm(layer.post_attention_layernorm, y)
    y = norm(layer.pre_feedforward_layernorm, x)
    y = linear(layer.mlp.down_proj, _gelu(linear(layer.mlp.gate_proj, y)) * linear(layer.mlp.up_proj, y))
    return x + norm(layer.post_feedforward_layernorm, y)


def _attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[P, heads, D] → [P, heads · D]: everyone sees everyone, at scale 1."""
    heads = []
    for head in range(q.shape[1]):
        own = head * k.shape[1] // q.shape[1]
        scores = q[:, head] @ k[:, own].T
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights @ v[:, own] / weights.sum(-1, keepdims=True))
    return np.concatenate(heads, axis=-1)


def _normed(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _turned(x: np.ndarray, rows: int, columns: int, theta: float) -> np.ndarray:
    """Heads [P, heads, D]: the first half turns by the column, the second by the row, by float32 angles."""
    half = x.shape[-1] // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = np.float32(1) / (np.float32(theta) ** exponents.astype(np.float64)).astype(np.float32)
    row, column = np.divmod(np.arange(rows * columns), columns)
    turned = []
    for part, place in ((x[..., :half], column), (x[..., half:], row)):
        angle = (place.astype(np.float32)[:, None] * frequencies).astype(np.float64)[:, None]
        a, b = np.split(part, 2, axis=-1)
        turned += [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate(turned, axis=-1)


def _pooled(x: np.ndarray, rows: int, columns: int, side: int) -> np.ndarray:
    squares = x.reshape(rows // side, side, columns // side, side, -1)
    return squares.mean(axis=(1, 3)).reshape(-1, x.shape[-1])


# ------------------------------------------------------------------------------------------------- the pack's own


def _own(folder: Path | None) -> Finding:
    """The pack's tower at a small picture: numbers, and, where its matrices are plain, how near float64's."""
    name = "the pack's own tower"

    def left_out(why: str) -> Finding:
        return Finding(part="eyes", name=name, passed=None, says=why)

    if folder is None:
        return left_out("no --model was given.")
    import mlx.core as mx

    from ..files.checkpoint import read_config
    from ..files.eyes import open_eyes

    try:
        eyes = open_eyes(folder, read_config(folder))
    except ConfigError as error:
        return left_out(str(error).splitlines()[0])
    config, side = eyes.vision_tower.config, eyes.vision_tower.config.pooling_kernel_size
    if config.position_embedding_size < 2 * side:
        return left_out(f"it knows {config.position_embedding_size} places a side: a stand-in that sees nothing.")
    patches = _uniform(4 * side * side, 3 * config.patch_size**2)
    tokens = np.array(eyes.see(mx.array(patches), 2 * side).astype(mx.float32))
    passed = bool(np.isfinite(tokens).all() and (np.ptp(tokens, axis=0) > 0).any())
    says = f"{len(tokens)} soft tokens of RMS {np.sqrt(np.mean(tokens**2)):.2f}"
    figures: dict[str, Any] = {"rms": float(np.sqrt(np.mean(tokens**2)))}
    if passed and not config.use_clipped_linears and not _packed(eyes):
        figures["from_float64"] = relative_error(mx.array(tokens), truth_of_tower(eyes, patches, 2 * side))
        says += f", {figures['from_float64']:.1e} of it from float64"
    return Finding(
        part="eyes", name=name, passed=passed, says=says if passed else f"no numbers: {says}", figures=figures
    )


def _packed(eyes: "Eyes") -> bool:
    from ..model.network import leaves

    return any(name.endswith(".scales") for name in leaves(eyes.parameters()))
