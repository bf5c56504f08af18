"""Products and attention of the shapes the model uses, ragged edges included, against the same in float64."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import mlx.core as mx


from .findings import Finding, on_gpu

FLOAT32, BFLOAT16 = 2e-5, 1e-2  # bounds on the RMS error of one product, in units of its RMS


def products() -> Iterator[Finding]:
    """Products of the shapes the model uses; real sizes on a GPU, narrower ones on a CPU."""
    import mlx.core as mx

    hidden, expert, experts, vocabulary = (2816, 704, 16, 2048) if on_gpu() else (384, 96, 8, 512)
    ragged = (1, 7, 33, 255, 257) if on_gpu() else (1, 7, 33)
    dtypes = (mx.float32, mx.bfloat16) if on_gpu() else (mx.float32,)
    checks: dict[str, Callable[[], Iterator[tuple[mx.array, np.ndarray]]]] = {}
    for dtype, rows in product(dtypes, ragged):
        name = f"{rows} rows, {str(dtype).removeprefix('mlx.core.')}"
        checks[f"product, {name}"] = partial(_dense, rows, hidden, vocabulary, dtype)
        checks[f"experts, {name}"] = partial(_experts, rows, hidden, expert, experts, dtype, None)
        for mode, bits, group in PACKINGS:
            packing = {"mode": mode, "bits": bits, "group_size": group}
            packed = f"{mode} {bits} bits by {group}, {name}"
            checks[f"packed product, {packed}"] = partial(_packed, rows, hidden, vocabulary, dtype, packing)
            checks[f"packed experts, {packed}"] = partial(_experts, rows, hidden, expert, experts, dtype, packing)
        for heads, dim in (((16, 8), 256), ((16, 2), 512)):
            checks[f"attention, {heads[0]} heads of {dim}, {name}"] = partial(_attention, rows, *heads, dim, dtype)
    for name, check in checks.items():
        bound = BFLOAT16 if name.endswith("bfloat16") else FLOAT32
        error = max(relative_error(ours, truth) for _ in range(3 if on_gpu() else 1) for ours, truth in check())
        says = f"relative error {error:.1e}, bound {bound:.0e}"
        yield Finding(part="products", name=name, passed=error <= bound, says=says, figures={"error": error})


PACKINGS = [("affine", bits, group) for bits, group in ((2, 64), (3, 64), (4, 32), (4, 64), (5, 64), (6, 64), (8, 128))]


PACKINGS += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def relative_error(ours: "mx.array", truth: "np.ndarray") -> float:
    """RMS of the difference over the RMS of the truth; infinite where ours is not finite."""
    import mlx.core as mx
    import numpy as np

    error = np.array(ours.astype(mx.float32)) - truth
    return float(np.sqrt(np.mean(error**2) / np.mean(truth**2))) if np.isfinite(error).all() else float("inf")


def _random(*shape: int, dtype: "mx.Dtype") -> "mx.array":
    import mlx.core as mx

    return (mx.random.normal(shape, key=mx.random.key(sum(shape))) * shape[-1] ** -0.25).astype(dtype)


def _exact(x: "mx.array") -> "np.ndarray":
    import mlx.core as mx
    import numpy as np

    return np.array(x.astype(mx.float32)).astype(np.float64)


def _dense(rows: int, hidden: int, width: int, dtype: "mx.Dtype") -> Iterator[tuple["mx.array", "np.ndarray"]]:
    x, w = _random(rows, hidden, dtype=dtype), _random(width, hidden, dtype=dtype)
    yield x @ w.T, _exact(x) @ _exact(w).T


def _packed(
    rows: int, hidden: int, width: int, dtype: "mx.Dtype", packing: dict[str, Any]
) -> Iterator[tuple["mx.array", "np.ndarray"]]:
    """As the head reads the embedding table, and as the signal does."""
    import mlx.core as mx

    packed: Any = mx.quantize(_random(width, hidden, dtype=dtype), **packing)
    plain = _exact(mx.dequantize(*packed, **packing))
    for x, transpose in ((_random(rows, hidden, dtype=dtype), True), (_random(rows, width, dtype=dtype), False)):
        yield (
            mx.quantized_matmul(x, *packed, transpose=transpose, **packing),
            _exact(x) @ (plain.T if transpose else plain),
        )


def _experts(
    rows: int, hidden: int, width: int, experts: int, dtype: "mx.Dtype", packing: dict[str, Any] | None
) -> Iterator[tuple["mx.array", "np.ndarray"]]:
    """Rows through the expert of each, in any order and sorted."""
    import mlx.core as mx
    import numpy as np

    w, x = _random(experts, width, hidden, dtype=dtype), _random(rows, 1, hidden, dtype=dtype)
    packed: Any = () if packing is None else mx.quantize(w, **packing)
    plain = _exact(w if packing is None else mx.dequantize(*packed, **packing))
    ids = np.random.default_rng(rows).integers(0, experts, rows)
    for chosen, ordered in ((ids, False), (np.sort(ids), True)):
        which = {"rhs_indices": mx.array(chosen), "sorted_indices": ordered}
        if packing is None:
            ours = mx.gather_mm(x, w.swapaxes(-1, -2), **which)
        else:
            ours = mx.gather_qmm(x, *packed, transpose=True, **which, **packing)
        yield ours, _exact(x) @ plain[chosen].swapaxes(-1, -2)


def _attention(
    rows: int, heads: int, kv_heads: int, dim: int, dtype: "mx.Dtype"
) -> Iterator[tuple["mx.array", "np.ndarray"]]:
    """A canvas of `rows` behind a prefix of odd length: all visible, causal, and with padding."""
    import mlx.core as mx

    from ..model.layers import attend
    from ..model.tuning import DEFAULT

    total = rows + 101
    q = _random(1, heads, rows, dim, dtype=dtype)
    k, v = _random(1, kv_heads, total, dim, dtype=dtype), _random(1, kv_heads, total, dim, dtype=dtype) * 2
    order: Any = np.arange(total)
    for mask, visible in (
        (None, np.ones((rows, total), bool)),
        ("causal" if rows > 1 else None, order <= order[-rows:, None]),
        (mx.array(order >= 5)[None, None, None], np.broadcast_to(order >= 5, (rows, total))),
    ):
        yield attend(q, k, v, mask, DEFAULT), truth_of_attention(q, k, v, visible)


def truth_of_attention(q: "mx.array", k: "mx.array", v: "mx.array", visible: "np.ndarray") -> "np.ndarray":
    """Attention at scale 1 in float64, all keys at once: q [B, heads, T, D], k, v [B, kv heads, K, D], bool [T, K]."""
    import numpy as np

    shared = q.shape[1] // k.shape[1]
    outputs = []
    for head in range(q.shape[1]):  # one after the other: a long prefix's scores are many
        scores = _exact(q[:, head]) @ _exact(k[:, head // shared]).swapaxes(-1, -2)
        seen = np.where(visible, scores, -np.inf)
        weights = np.exp(seen - seen.max(-1, keepdims=True))
        outputs.append(weights @ _exact(v[:, head // shared]) / weights.sum(-1, keepdims=True))
    return np.stack(outputs, axis=1)
