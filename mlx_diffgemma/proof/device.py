"""What only a device can show: kernels that its sizes choose, positions far out, and what this package does on it,
against float64 or MLX's CPU on equal inputs. On a CPU the same runs with narrower sizes, and shows little.

Bounds. A product of float32 or bfloat16 rows rounds each result once and sums in float32: its relative RMS error is
that of `products`, 2e-5 and 1e-2. A rotation's angle is float32: position / period, off by 2⁻²² of itself at most after
four roundings, to which sine and cosine add a few units. What is compared between GPU and CPU is integers, or a sum
of rounded products: those bounds again.
"""

import math
from collections.abc import Callable, Iterator
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import mlx.core as mx

from .findings import Finding, on_gpu
from .products import BFLOAT16, FLOAT32, relative_error, truth_of_attention

POSITIONS = (0, 4_096, 32_768, 131_072, 262_143)
UNITS = 2.0**-20  # of sine, cosine and two products, for values around 1


def device() -> Iterator[Finding]:
    """Every check, group by group."""
    gpu = on_gpu()
    for position in POSITIONS:
        yield _rotation(position)
    for rows in (2_048, 16_384, 32_768) if gpu else (512,):
        yield _experts(rows, *((2816, 704, 128) if gpu else (192, 64, 16)))
    for rows, keys in ((256, 1_024), (256, 9_216), (256, 33_792)) if gpu else ((32, 600),):
        yield _attention(f"attention in pieces, {rows} rows behind {keys} keys", rows, keys, None)
    for rows in (1, 2, 5, 8):
        keys = 4_097 if gpu else 601
        yield _attention(f"attention of a short chunk, {rows} rows behind {keys} keys", rows, keys, "causal")
    rows = 2_048 if gpu else 128
    yield _attention(f"attention of a chunk, {rows} rows, causal", rows, 0, "causal")
    yield _row_slice(8_192 if gpu else 1_024)
    yield from _against_the_cpu()
    yield _fresh_thread()
    yield _gradient()


def _finding(name: str, error: float, bound: float) -> Finding:
    says = f"relative error {error:.1e}, bound {bound:.0e}"
    return Finding(part="device", name=name, passed=error <= bound, says=says, figures={"error": error, "bound": bound})


def _normal(*shape: int, seed: int = 0) -> "np.ndarray":
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def _dtype() -> "mx.Dtype":
    import mlx.core as mx

    return mx.bfloat16 if on_gpu() else mx.float32


def _bound() -> float:
    return BFLOAT16 if on_gpu() else FLOAT32


def _rotation(position: int) -> Finding:
    """A full layer's rotation (period 10⁶, a quarter of the head) at one position: the largest error of a pair, in
    units of its length and of its bound."""
    import mlx.core as mx

    from ..config import LayerConfig
    from ..model.layers import periods

    layer = LayerConfig(kind="full_attention", head_dim=512, num_kv_heads=2, rope_theta=1e6, rotated_dims=128)
    made, x = periods(layer), _normal(1, 1, 4, 512)
    options: dict[str, Any] = {"traditional": False, "base": None, "scale": 1.0, "freqs": made}
    ours = np.array(mx.fast.rope(mx.array(x), 512, offset=position, **options)).astype(np.float64)
    angle = (position + np.arange(4))[:, None] / np.array(made).astype(np.float64)  # [4, 256]
    a, b = x[..., :256].astype(np.float64), x[..., 256:].astype(np.float64)
    truth = np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)
    error = np.hypot(*np.split(ours - truth, 2, axis=-1)) / np.hypot(a, b)
    worst = float((error / (angle * 2.0**-22 + UNITS)).max())
    says = f"{worst:.2f} of what a float32 angle's rounding allows"
    name = f"rotation at position {position:,}"
    return Finding(part="device", name=name, passed=worst <= 1, says=says, figures={"error": worst})


def _experts(rows: int, hidden: int, width: int, experts: int) -> Finding:
    """Sorted rows through packed experts, up and down: the two products of an expert branch."""
    import mlx.core as mx

    packing: dict[str, Any] = {"group_size": 64, "bits": 4, "mode": "affine"}
    ids = np.sort(np.random.default_rng(rows).integers(0, experts, rows))
    worst = 0.0
    for inputs, outputs in ((hidden, 2 * width), (width, hidden)):
        if inputs % 64:
            continue
        plain = mx.array(_normal(experts, outputs, inputs) * inputs**-0.5).astype(_dtype())
        packed: Any = mx.quantize(plain, **packing)
        values = mx.dequantize(*packed, **packing)
        x = mx.array(_normal(rows, 1, inputs)).astype(_dtype())
        ours = mx.gather_qmm(x, *packed, rhs_indices=mx.array(ids), transpose=True, sorted_indices=True, **packing)
        some = np.unique(np.linspace(0, rows - 1, 64).astype(int))  # rows from everywhere, the last one too
        exact = [
            np.array(x[int(i), 0].astype(mx.float32)).astype(np.float64)
            @ np.array(values[int(ids[i])].astype(mx.float32)).astype(np.float64).T
            for i in some
        ]
        worst = max(worst, relative_error(ours[mx.array(some)][:, 0], np.stack(exact)))
    return _finding(
        f"experts, {experts} of them, {rows} sorted rows, {hidden} → {2 * width}, {width} → {hidden}", worst, _bound()
    )


def _attention(name: str, rows: int, before: int, mask: Any) -> Finding:
    """Both kinds of layers' heads, as `attend` cuts them, for rows from everywhere."""
    import mlx.core as mx

    from ..model.layers import attend
    from ..model.tuning import DEFAULT

    worst, total = 0.0, before + rows
    for heads, kv_heads, dim in ((16, 8, 256), (16, 2, 512)) if on_gpu() else ((4, 2, 64), (8, 1, 128)):
        q = mx.array(_normal(1, heads, rows, dim) * dim**-0.25).astype(_dtype())
        k = mx.array(_normal(1, kv_heads, total, dim, seed=1) * dim**-0.25).astype(_dtype())
        v = mx.array(_normal(1, kv_heads, total, dim, seed=2)).astype(_dtype())
        ours = attend(q, k, v, mask if rows > 1 else None, DEFAULT)
        some = np.unique(np.linspace(0, rows - 1, 16).astype(int))
        visible = (
            np.arange(total) <= (before + some)[:, None] if mask is not None else np.ones((len(some), total), bool)
        )
        truth = truth_of_attention(q[:, :, mx.array(some)], k, v, visible)
        worst = max(worst, relative_error(ours[:, :, mx.array(some)], truth))
    return _finding(name, worst, _bound())


def _row_slice(size: int) -> Finding:
    """The signal's product: packed rows of one fold, cut out of the table, not transposed."""
    import mlx.core as mx

    hidden, packing = 2816 if on_gpu() else 256, {"group_size": 64, "bits": 4, "mode": "affine"}
    table = mx.array(_normal(2 * size, hidden)).astype(_dtype())
    packed: Any = mx.quantize(table, **packing)
    p = mx.softmax(mx.array(_normal(64, size) * 3), axis=-1).astype(_dtype())
    fold = [part[size:] for part in packed]
    ours = mx.quantized_matmul(p, *fold, transpose=False, **packing)
    values = np.array(mx.dequantize(*packed, **packing)[size:].astype(mx.float32)).astype(np.float64)
    truth = np.array(p.astype(mx.float32)).astype(np.float64) @ values
    return _finding(
        f"product with a row slice, {size:,} of {2 * size:,} rows, not transposed",
        relative_error(ours, truth),
        _bound(),
    )


def _against_the_cpu() -> Iterator[Finding]:
    """Accepting, drawing and the sparse signal, on this device and on MLX's CPU, of equal inputs."""
    import mlx.core as mx
    import mlx.nn as nn

    from ..generation import sampler, vocabulary

    entropy = np.abs(_normal(2, 256)) * np.float32(0.02)
    made = [_on(where, lambda: sampler.accept(mx.array(entropy), 0.1)) for where in (mx.default_device(), mx.cpu)]
    differ = int((made[0] != made[1]).sum())
    says = f"{differ} of {entropy.size} positions differ; a sum that rounds otherwise may move the last one of a row"
    yield Finding(part="device", name="accepted positions", passed=differ <= 2, says=says, figures={"error": differ})

    table = nn.Embedding(4_096, 128)
    table.weight = mx.array(_normal(4_096, 128))
    x, draws = mx.array(_normal(1, 64, 128)), mx.array(np.random.default_rng(0).random((1, 64), np.float32))
    mx.eval(table.weight, x, draws)

    def read() -> "list[mx.array]":
        sums = vocabulary.walk(x, table, vocabulary.Shaping(cap=30.0, temperature=0.7))
        reading = sums.read(draws)
        sparse = vocabulary.sparse_signal(sums, reading.best, mx.arange(64))
        assert reading.signal is not None  # asked for by default
        return [reading.best, reading.guess, reading.entropy, reading.signal, sparse]

    here, there = (_on(where, read) for where in (mx.default_device(), mx.cpu))
    differ = int((here[0] != there[0]).sum() + (here[1] != there[1]).sum())
    says = f"{differ} of 128 ids differ; a draw within rounding of a neighbour's share may fall to either"
    yield Finding(part="device", name="best and guessed ids", passed=differ <= 1, says=says, figures={"error": differ})
    for name, number in (("entropies", 2), ("the signal", 3), ("the sparse signal", 4)):
        error = np.abs(here[number] - there[number]).max() / np.abs(there[number]).max()
        yield _finding(f"{name}, here and on the CPU", float(error), 10 * FLOAT32)


def _on(where: Any, work: "Callable[[], Any]") -> Any:
    """What `work` computes on a device, in numpy."""
    import mlx.core as mx

    before = mx.default_device()
    mx.set_default_device(where)
    try:
        made = work()
        return [np.array(array) for array in made] if isinstance(made, list) else np.array(made)
    finally:
        mx.set_default_device(before)


def _fresh_thread() -> Finding:
    """A generation in a thread that did not load the model gives what this one gives."""
    from ..files import shipped
    from ..files.weights import load_network
    from ..generation.engine import generate
    from ..generation.events import Committed
    from ..generation.noise import SeededNoise
    from ..generation.settings import GenerationConfig
    from ..model.threads import clear_at_the_end

    network, found = load_network(shipped.BUILT_IN), []
    settings, length = GenerationConfig(max_denoising_steps=3), network.config.canvas_length

    def ask() -> list[int]:
        noise = SeededNoise([1], length=length, vocabulary=network.config.vocab_size)
        events = generate(network, [[2, 5, 9]], settings.replace(max_tokens=length), noise)
        return [token for event in events if isinstance(event, Committed) for token in event.rows[0].ids]

    def work() -> None:
        clear_at_the_end()
        try:
            found.append(ask())
        except RuntimeError as error:
            found.append(str(error))

    thread = Thread(target=work)
    thread.start()
    thread.join()
    said = ask()
    says = "the same tokens" if found == [said] else f"{found[0]} instead of {said}"
    return Finding(part="device", name="a thread that did not load", passed=found == [said], says=says)


def _gradient() -> Finding:
    """The gradient of a loss through one network, here and on the CPU: what training stands on."""
    import mlx.core as mx
    import mlx.nn as nn

    from ..files import shipped
    from ..files.weights import load_network
    from ..model.network import leaves

    network = load_network(shipped.BUILT_IN)
    network.set_dtype(mx.float32)
    network.freeze()
    network.decoder.layers[0].self_attn.unfreeze()
    canvas = mx.array(np.random.default_rng(3).integers(0, network.config.vocab_size, (1, 32)))
    mx.eval(canvas)

    def loss() -> "mx.array":
        hidden = network.denoise(canvas, network.make_cache(), None)
        return nn.losses.cross_entropy(network.head(hidden), canvas, reduction="mean")

    def gradients() -> "list[mx.array]":
        return list(leaves(nn.value_and_grad(network, loss)()[1]).values())

    here, there = (_on(where, gradients) for where in (mx.default_device(), mx.cpu))
    error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(here, there, strict=True))
    return _finding("a gradient, here and on the CPU", error if math.isfinite(error) else float("inf"), 100 * FLOAT32)
