"""Whether a product in pieces has the bits of the whole one, on this device: what several machines compute of it.

Metal chooses kernels by shape, and some of them add in another order. Where that is so, the machines that share a model
still agree with one another, and so with as many processes on one machine; but a seed writes something else alone.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .findings import Finding, on_gpu
from .products import _random

if TYPE_CHECKING:
    import mlx.core as mx

Q4: dict[str, Any] = {"group_size": 64, "bits": 4, "mode": "affine"}
TOP_K = 8


def pieces(count: int) -> Iterator[Finding]:
    """The released model's products, for a canvas, in `count` pieces; narrower ones on a CPU."""
    for name, made in _checks():
        for packed in (False, True):
            whole, part = made(packed)
            yield _finding(f"{name}, {'q4' if packed else 'plain'}", whole, [part(i, count) for i in range(count)])
    yield from _attention(count)


Piece = Callable[[int, int], "mx.array"]


def _checks() -> Iterator[tuple[str, Callable[[bool], "tuple[mx.array, Piece]"]]]:
    """Name → whether packed → the whole product, and one of so many pieces."""
    scale, rows = (1, 256) if on_gpu() else (4, 48)
    hidden, dense, expert = 2816 // scale, 2112 // scale, 704 // scale
    widths = {"q_proj": (4096 // scale, hidden), "k_proj": (2048 // scale, hidden), "o_proj": (hidden, 4096 // scale)}
    widths |= {"a full layer's k_proj": (1024 // scale, hidden), "gate_proj": (dense, hidden)}
    widths |= {"down_proj": (hidden, dense // 64 * 64)}
    of_experts = {"gate_up_proj": (2 * expert, hidden), "down_proj": (hidden, expert // 64 * 64)}
    for name, (outputs, inputs) in widths.items():
        yield name, lambda packed, o=outputs, i=inputs: _dense(rows, o, i, packed)
    for name, (outputs, inputs) in of_experts.items():
        yield f"experts' {name}", lambda packed, o=outputs, i=inputs: _experts(rows * TOP_K, o, i, packed)


def _dense(rows: int, outputs: int, inputs: int, packed: bool) -> "tuple[mx.array, Piece]":
    import mlx.core as mx

    x, w = _random(rows, inputs, dtype=_dtype()), _random(outputs, inputs, dtype=_dtype())
    arrays: Any = mx.quantize(w, **Q4) if packed else [w]

    def product(some: Any) -> "mx.array":
        return mx.quantized_matmul(x, *some, transpose=True, **Q4) if packed else x @ some[0].T

    return product(arrays), lambda i, n: product([a[len(a) * i // n : len(a) * (i + 1) // n] for a in arrays])


def _experts(rows: int, outputs: int, inputs: int, packed: bool) -> "tuple[mx.array, Piece]":
    import mlx.core as mx

    experts = 128 if on_gpu() else 8
    x, w = _random(rows, 1, inputs, dtype=_dtype()), _random(experts, outputs, inputs, dtype=_dtype())
    arrays: Any = mx.quantize(w, **Q4) if packed else [w]
    which: Any = {"rhs_indices": mx.sort(mx.arange(rows) % experts), "sorted_indices": True}

    def product(some: Any) -> "mx.array":
        if packed:
            return mx.gather_qmm(x, *some, transpose=True, **which, **Q4)
        return mx.gather_mm(x, some[0].swapaxes(-1, -2), **which)

    return product(arrays), lambda i, n: product([a[:, outputs * i // n : outputs * (i + 1) // n] for a in arrays])


def _attention(count: int) -> Iterator[Finding]:
    """Some heads, and the key heads that they share."""
    from ..model.layers import attend
    from ..model.tuning import DEFAULT

    rows, total = (256, 1280) if on_gpu() else (48, 96)
    for heads, kv_heads, dim in ((16, 8, 256), (16, 2, 512)) if on_gpu() else ((8, 4, 32), (8, 2, 64)):
        q = _random(1, heads, rows, dim, dtype=_dtype())
        k, v = (_random(1, kv_heads, total, dim + 2 * i, dtype=_dtype())[..., :dim] for i in (0, 1))
        parts = []
        for i in range(count):
            own = slice(heads * i // count, heads * (i + 1) // count)
            first = kv_heads * i // count
            keys = slice(first, first + max(kv_heads // count, 1))
            parts.append(attend(q[:, own], k[:, keys], v[:, keys], None, DEFAULT))
        name = f"attention, {heads} heads of {dim}"
        yield _finding(name, attend(q, k, v, None, DEFAULT), parts, axis=1)


def _finding(name: str, whole: "mx.array", parts: list["mx.array"], axis: int = -1) -> Finding:
    import mlx.core as mx

    joined = mx.concatenate(parts, axis=axis)
    furthest = float(mx.abs(joined.astype(mx.float32) - whole.astype(mx.float32)).max())
    equal = bool(mx.array_equal(joined, whole))
    says = "the same bits" if equal else f"other bits in {len(parts)} pieces, by up to {furthest:.1e}"
    return Finding(part="pieces", name=name, passed=equal or None, says=says, figures={"furthest": furthest})


def _dtype() -> "mx.Dtype":
    import mlx.core as mx

    return mx.bfloat16 if on_gpu() else mx.float32
