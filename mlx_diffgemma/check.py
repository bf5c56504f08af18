"""`mlx_diffgemma.check`: does this installation, on this device, compute what the reference computes?

Three parts: recordings of transformers are replayed; products and attention of the shapes the model uses, ragged edges
included, are compared with the same in float64; and a pack of the released model is compared with its published logits.
"""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import click

from .cli import command
from .errors import CheckpointError

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

    from .config import ModelConfig
    from .network import Network
    from .recordings import Recording

RATIO = 10.0  # bound on our RMS error in units of the recorded run's; kernels that are wrong miss it by hundreds
FLOAT32, BFLOAT16 = 2e-5, 1e-2  # bounds on the RMS error of one product, in units of its RMS


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check: `passed` is None when it was left out, and `says` why."""

    part: str
    name: str
    passed: bool | None
    says: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


@command("check")
@click.option("--model", metavar="PATH|REPO", help="A pack of the released model: compare its published logits too.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead.")
def main(model: str | None, as_json: bool) -> None:
    """Compare what this installation computes with recordings of the reference. Exit status 1 if anything differs."""
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # the recordings are float32; MLX reads this at its first product
    found: list[Finding] = []
    for findings in (replay(), products(), published_of(model)):
        own = list(findings)
        if not as_json:
            say(own)
        found += own
    passed = all(finding.passed is not False for finding in found)
    if as_json:
        click.echo(json.dumps({"passed": passed, **machine(), "findings": [as_dict(finding) for finding in found]}))
    else:
        wrong = "This installation is WRONG: do not trust what it generates, and report the output of --json."
        click.echo("This installation computes what the reference computes." if passed else wrong)
    click.get_current_context().exit(0 if passed else 1)


def say(findings: list[Finding]) -> None:
    """A line for what is wrong, left out or about the model itself; one line for all the rest."""
    good = [finding for finding in findings if finding.passed]
    for finding in findings:
        if finding.passed is not True or finding.part == "published":
            word = {None: "left out", False: "WRONG", True: "ok"}[finding.passed]
            click.echo(f"{word:8}  {finding.name}: {finding.says}")
    if good and good[0].part != "published":
        worst = max(good, key=lambda finding: finding.figures.get("error", 0.0))
        click.echo(
            f"{'ok':8}  {good[0].part}: {len(good)} of {len(findings)}; the furthest, {worst.name}: {worst.says}"
        )


def as_dict(finding: Finding) -> dict[str, Any]:
    """For JSON, which has no NaN and no infinity."""
    figures = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in finding.figures.items()
    }
    return dataclasses.asdict(finding) | {"figures": figures}


def machine() -> dict[str, Any]:
    """What was checked, and on what."""
    from importlib.metadata import version

    import mlx.core as mx

    from . import __version__

    return {
        "version": __version__,
        "mlx": version("mlx"),
        "device": str(mx.default_device()),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def on_gpu() -> bool:
    import mlx.core as mx

    return mx.default_device().type == mx.DeviceType.gpu


# --- Recordings


def replay() -> Iterator[Finding]:
    """Every recording, through the device in use."""
    from . import recordings

    paths = sorted(recordings.folder().glob("*.npz"))
    if not paths:
        raise CheckpointError(f"there are no recordings in {recordings.folder()}: the installation is incomplete.")
    for path in paths:
        recording = recordings.Recording.load(path)
        if recording.provenance["kind"] == "trajectory":
            yield _run(recording)
        elif recording.provenance["dtype"] == "bfloat16" and not on_gpu():
            why = "MLX multiplies experts in bfloat16 on a GPU only."
            yield Finding(part="recordings", name=recording.name, passed=None, says=why)
        else:
            yield from _passes(recording)


def _run(recording: "Recording") -> Finding:
    from .recordings import replay_trajectory

    departures = replay_trajectory(recording, recording.network())
    says = departures[0] if departures else "the same guesses, accepted sets, steps and tokens"
    figures = {"departures": len(departures)}
    return Finding(part="recordings", name=recording.name, passed=not departures, says=says, figures=figures)


def _passes(recording: "Recording") -> Iterator[Finding]:
    import mlx.core as mx

    from .recordings import replay_logits

    network = recording.network()
    dtype = getattr(mx, recording.provenance["dtype"])
    network.set_dtype(dtype)
    for name, case in replay_logits(recording, network).items():
        passed = case.ratio <= RATIO and (dtype != mx.float32 or case.same_best == 1.0)
        says = f"error {case.rms_error:.1e}, {case.ratio:.1f} × PyTorch's on {recording.provenance['device']}"
        figures = dataclasses.asdict(case) | {"error": case.ratio}
        yield Finding(part="recordings", name=f"{recording.name}/{name}", passed=passed, says=says, figures=figures)


# --- Products


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
        error = max(_relative_error(ours, truth) for _ in range(3 if on_gpu() else 1) for ours, truth in check())
        says = f"relative error {error:.1e}, bound {bound:.0e}"
        yield Finding(part="products", name=name, passed=error <= bound, says=says, figures={"error": error})


PACKINGS = [("affine", bits, group) for bits, group in ((2, 64), (3, 64), (4, 32), (4, 64), (5, 64), (6, 64), (8, 128))]
PACKINGS += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def _relative_error(ours: "mx.array", truth: "np.ndarray") -> float:
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
    import numpy as np

    from .layers import attend

    total = rows + 101
    q = _random(1, heads, rows, dim, dtype=dtype)
    k, v = _random(1, kv_heads, total, dim, dtype=dtype), _random(1, kv_heads, total, dim, dtype=dtype) * 2
    shared = heads // kv_heads
    scores = _exact(q) @ np.repeat(_exact(k), shared, axis=1).swapaxes(-1, -2)
    order: Any = np.arange(total)
    for mask, visible in (
        (None, np.ones((rows, total), bool)),
        ("causal" if rows > 1 else None, order <= order[-rows:, None]),
        (mx.array(order >= 5)[None, None, None], np.broadcast_to(order >= 5, (rows, total))),
    ):
        seen = np.where(visible, scores, -np.inf)
        weights = np.exp(seen - seen.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        yield attend(q, k, v, mask), weights @ np.repeat(_exact(v), shared, axis=1)


# --- Published logits

# Two correct bfloat16 runs, on two vendors' GPUs, differ by 0.22 on average (1.1 at most) in the six-layer case. Bounds
# on the mean difference are multiples of that, by the bits of most weights: a judgement, with room for the recipe's own
# error; a wrong network misses them by far, since these logits lie between −30 and 30.
SPREAD = 0.22
TIMES = {16: 3, 8: 4, 6: 6, 5: 8, 4: 12, 3: 20, 2: 30}
RANKS = 0.8  # least mean rank correlation of the twelve logits of a position


def published_of(model: str | None) -> Iterator[Finding]:
    """Load a model and compare it, if it is the released one."""
    if model is None:
        why = "no --model was given."
        yield Finding(part="published", name="published logits", passed=None, says=why)
        return
    from .pipeline import load

    network = load(model).network
    if not is_released(network.config):
        why = f"{model} is not of the released model's shape, and only that one's logits were published."
        yield Finding(part="published", name="published logits", passed=None, says=why)
        return
    yield from published(network)


def is_released(config: "ModelConfig") -> bool:
    """Whether this is the shape of google/diffusiongemma-26B-A4B-it."""
    shape = (config.num_hidden_layers, config.hidden_size, config.num_experts, config.vocab_size)
    return shape == (30, 2816, 128, 262_144)


def published(network: "Network") -> Iterator[Finding]:
    """The whole network and its first six layers against the logits published for them."""
    from . import recordings

    told = json.loads((recordings.folder() / "published_logits.json").read_text())
    bits = (network.config.quantization or {"bits": 16})["bits"]
    for name in ("full_model", "first_6_layers"):
        with first_layers(network, told[name]["layers"]):
            yield closeness(name, _logits(network, told["input_ids"]), told[name]["logits"], bits)


@contextmanager
def first_layers(network: "Network", count: int) -> Iterator[None]:
    """The network with its first `count` layers alone."""
    config, own, encoder = network.config, network.decoder.layers, network.encoder.language_model.layers
    network.config = dataclasses.replace(config, layers=config.layers[:count])
    network.decoder.layers, network.encoder.language_model.layers = own[:count], encoder[:count]
    try:
        yield
    finally:
        network.config = config
        network.decoder.layers, network.encoder.language_model.layers = own, encoder


def _logits(network: "Network", prompt: list[int], rows: int = 10, ids: int = 12) -> "np.ndarray":
    """Logits of the first positions and ids, of a canvas that counts from 0, without a signal."""
    import mlx.core as mx
    import numpy as np

    cache = network.make_cache()
    network.encode(mx.array([prompt]), cache)
    hidden = network.denoise(mx.arange(network.config.canvas_length)[None], cache, None)
    return np.array(network.head(hidden[:, :rows])[0, :, :ids])


def closeness(name: str, logits: "np.ndarray", told: list[list[float]], bits: int) -> Finding:
    """Compare logits [rows, ids] with published ones; the verdict depends on the bits of most weights."""
    import numpy as np

    difference = np.abs(logits - np.array(told))
    ranks = np.mean([_rank_correlation(a, b) for a, b in zip(logits, np.array(told), strict=True)])
    bound = SPREAD * TIMES[bits]
    figures = {"mean": float(difference.mean()), "max": float(difference.max()), "ranks": float(ranks), "bits": bits}
    says = (
        f"differs from CUDA by {figures['mean']:.2f} on average (bound at {bits} bits: {bound:.2f}) and"
        f" {figures['max']:.2f} at most; ranks agree to {ranks:.2f}."
        f" Two correct bfloat16 runs differ by {SPREAD} and 1.1."
    )
    passed = bool(difference.mean() <= bound and ranks >= RANKS)
    return Finding(part="published", name=name, passed=passed, says=says, figures=figures)


def _rank_correlation(a: "np.ndarray", b: "np.ndarray") -> float:
    """Spearman's."""
    import numpy as np

    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


if __name__ == "__main__":
    main()
