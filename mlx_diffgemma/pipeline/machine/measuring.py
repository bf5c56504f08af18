"""One denoising step behind a prefix of any length, timed as a whole and by part. The prefix is random keys and values,
so that nothing has to be encoded for it."""

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import ConfigError
from ...generation import sampler, vocabulary
from ...generation.noise import SeededNoise
from ...model.cache import PrefixCache
from ...model.network import Network, leaves
from ...model.tuning import Tuning
from ...model.vision import Eyes, looking_bytes
from ...text.pictures.images import PictureConfig, from_pixels, scaled_size

PARTS = ("building", "layers", "vocabulary", "sampler", "waiting")


def filled_cache(network: Network, length: int) -> PrefixCache:
    """A prefix of `length` positions that nobody wrote."""
    cache = network.make_cache()
    cache.reserve(length)
    dtype = network.embed(mx.zeros((1, 1), mx.int32)).dtype
    for number, (layer, kind) in enumerate(zip(cache.layers, network.config.layers, strict=True)):
        held = length if layer.window is None else min(length, layer.window - 1)
        if held:
            shape = (1, kind.num_kv_heads, held, kind.head_dim)
            layer.append(*(mx.random.normal(shape, dtype, key=mx.random.key(2 * number + i)) for i in (0, 1)))
        mx.eval(layer.state)
    cache.advance(length)
    return cache


@dataclass(kw_only=True)
class Step:
    """A step that can be taken again and again: canvas and signal go on as in a run, the prefix stays."""

    network: Network
    prefix: int  # tokens
    cache: PrefixCache = field(init=False)
    taken: int = 0

    def __post_init__(self) -> None:
        config = self.network.config
        self.cache = filled_cache(self.network, self.prefix)
        self.noise = SeededNoise([0], length=config.canvas_length, vocabulary=config.vocab_size)
        self.canvas = self.noise.canvas(0)
        self.signal: mx.array | None = None

    def take(self) -> float:
        """Seconds of one whole step, as a run takes it."""
        begun = time.perf_counter()
        hidden = self._hidden()
        sums = self._walk(hidden)
        reading, after = self._after(sums)
        mx.eval(after, reading.signal)
        self.canvas, self.signal, self.taken = after, reading.signal, self.taken + 1
        return time.perf_counter() - begun

    def parts(self) -> dict[str, float]:
        """Seconds by part. Each part is waited for before the next begins, which a run does not: together they are
        slower than a step. `building` is Python's work on the graph; `waiting` is one look at a small array."""
        seconds, clock = {}, time.perf_counter
        begun = clock()
        hidden = self._hidden()
        sums = self._walk(hidden)
        reading, after = self._after(sums)
        seconds["building"] = clock() - begun
        for name, arrays in (
            ("layers", [hidden]),
            ("vocabulary", [reading.best, reading.guess, reading.entropy, reading.tail, reading.signal]),
            ("sampler", [after]),
            ("waiting", [after.sum()]),
        ):
            begun = clock()
            mx.eval(arrays)
            seconds[name] = clock() - begun
        return seconds

    def kernels(self) -> int:
        """How many primitives a step has, views left out, by its graph on this device."""
        reading, after = self._after(self._walk(self._hidden()))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "graph.dot"
            mx.export_to_dot(str(file), after, reading.signal)
            names = re.findall(r'\[label ="([^"]+)", shape=rectangle\]', file.read_text())
        return sum(name not in VIEWS for name in names)

    def _hidden(self) -> mx.array:
        return self.network.denoise(self.canvas, self.cache, self.signal)

    def _walk(self, hidden: mx.array) -> vocabulary.Sums:
        shaping = vocabulary.Shaping(cap=self.network.config.final_logit_softcapping, temperature=0.6)
        return vocabulary.walk(hidden, self.network.decoder.embed_tokens, shaping, tuning=self.network.tuning)

    def _after(self, sums: vocabulary.Sums) -> tuple[vocabulary.Reading, mx.array]:
        reading = sums.read(self.noise.draws(0, self.taken))
        accepted = sampler.accept(reading.entropy, 0.1)
        return reading, sampler.renoise(accepted, reading.guess, self.noise.ids(0, self.taken))


def by_turns(network: Network, tunings: Sequence[Tuning], prefix: int, rounds: int) -> list[list[float]]:
    """Seconds of `rounds` steps with each tuning, in the order A B A B …: what slows the machine down slows all. Two
    steps of each come before and do not count."""
    step, seconds = Step(network=network, prefix=prefix), [[] for _ in tunings]
    for turn in range(rounds + 2):
        for number, tuning in enumerate(tunings):
            network.tuning = tuning
            taken = step.take()
            if turn > 1:
                seconds[number].append(taken)
    return seconds


PHOTOGRAPH = (1080, 1440)  # pixels high and wide, what `looking` looks at


def looking(eyes: Eyes, budget: int, repeat: int) -> dict[str, Any]:
    """What it takes to look at a picture of noise with a budget of so many soft tokens: seconds to scale and cut it and
    to see it (medians; a look before does not count), and bytes beside the tower's weights, measured and estimated."""
    config = eyes.vision_tower.config
    pictures = PictureConfig(patch_size=config.patch_size, pooling=config.pooling_kernel_size)
    pixels = np.random.default_rng(0).integers(0, 256, (*PHOTOGRAPH, 3), np.uint8)
    needed = max(scaled_size(PHOTOGRAPH[1], PHOTOGRAPH[0], budget, pictures)) // config.patch_size
    if needed > config.position_embedding_size:
        raise ConfigError(
            f"this model's eyes know {config.position_embedding_size} places a side, and a picture of {budget} tokens"
            f" has {needed}: it cannot see one."
        )
    mx.eval(eyes.parameters())
    cutting, seeing, most = list[float](), list[float](), 0
    for _ in range(repeat + 1):
        begun = time.perf_counter()
        picture = from_pixels("noise", pixels, pictures, budget)
        patches = mx.array(picture.patches())
        cutting.append(time.perf_counter() - begun)
        mx.eval(patches)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        begun = time.perf_counter()
        eyes.see(patches, picture.columns)
        seeing.append(time.perf_counter() - begun)
        most = max(most, mx.get_peak_memory() - held)
    arrays = leaves(eyes.parameters())
    size = arrays["vision_tower.patch_embedder.position_embedding_table"].dtype.size
    return {
        "budget": budget,
        "size": list(picture.size),
        "tokens": picture.tokens,
        "patches": len(patches),
        "scaling_seconds": statistics.median(cutting[1:]),
        "tower_seconds": statistics.median(seeing[1:]),
        "tower_bytes": sum(array.nbytes for array in arrays.values()),
        "looking_bytes": most,
        "estimated_bytes": looking_bytes(config, len(patches), size),
    }


# ------------------------------------------------------------------------------------------------ anatomy of a step

VIEWS = set("Reshape Transpose Slice Squeeze ExpandDims Broadcast Flatten Unflatten Split AsStrided Depends".split())
VIEWS |= {"StopGradient", "BroadcastAxes", "View", "Full"}


def anatomy(network: Network, prefix: int, pause: float) -> dict[str, Any]:
    """What a step behind so many tokens consists of, in seconds: the first, the twentieth, one after a pause (slower:
    the weights were paged out, or the chip's clock fell), its parts, and its three limits on this device."""
    step = Step(network=network, prefix=prefix)
    taken = [step.take() for _ in range(20)]
    parts = [step.parts() for _ in range(5)]
    time.sleep(pause)
    typical = statistics.median(taken[5:])
    limits = _limits(network, prefix, step.kernels())
    strongest = max(limits, key=lambda name: limits[name])
    return {
        "prefix": prefix,
        "first": taken[0],
        "twentieth": taken[-1],
        "typical": typical,
        "after_a_pause": step.take(),
        "pause": pause,
        "parts": {name: statistics.median(each[name] for each in parts) for name in PARTS},
        "limits": limits,
        "limit": strongest,
        "times_the_limit": typical / limits[strongest],
        "kernels": step.kernels(),
    }


def _limits(network: Network, prefix: int, kernels: int) -> dict[str, float]:
    """The seconds that a step takes at least: for its arithmetic at the speed of a plain product of 256 rows, for its
    bytes at the speed of a copy, and for its kernels at the speed of very small ones; all three measured here."""
    config, rows = network.config, network.config.canvas_length
    size, experts = config.hidden_size, config.num_experts
    expert = 3 * size * config.moe_intermediate_size
    touched = experts * (1 - (1 - config.top_k_experts / experts) ** rows)  # of a layer's experts, expected
    other = 3 * size * config.intermediate_size + size * experts
    operations = 4.0 * rows * config.vocab_size * size  # head and signal
    parameters = float(config.vocab_size * size)
    seen = 0
    for layer in config.layers:
        heads, dim = config.num_attention_heads, layer.head_dim
        projections = size * dim * (2 * heads + layer.num_kv_heads * (2 if layer.is_sliding else 1))
        keys = rows + (min(prefix, config.sliding_window - 1) if layer.is_sliding else prefix)
        operations += 2.0 * rows * (projections + other + config.top_k_experts * expert)
        operations += 4.0 * rows * heads * dim * keys
        parameters += projections + other + touched * expert
        seen += 2 * keys * layer.num_kv_heads * dim
    arrays = list(leaves(network.parameters()).values())
    whole = config.vocab_size * size + sum(experts * expert for _ in config.layers)
    width = sum(a.nbytes for a in arrays) / max(whole, 1)  # bytes a weight; the trunk is a small part
    dtype = network.embed(mx.zeros((1, 1), mx.int32)).dtype
    return {
        "compute": operations / _products_per_second(rows, min(size, 2816), dtype),
        "memory": (parameters * width + seen * dtype.size) / _bytes_per_second(),
        "kernels": kernels * _seconds_per_kernel(),
    }


def _best_of(work: Callable[[], mx.array], runs: int = 4) -> float:
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        mx.eval(work())
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _products_per_second(rows: int, size: int, dtype: mx.Dtype) -> float:
    """Operations a second of [rows, size] times [size, 4 · size]."""
    x, w = mx.ones((rows, size), dtype), mx.ones((size, 4 * size), dtype)
    mx.eval(x, w)
    return 8.0 * rows * size * size / _best_of(lambda: x @ w)


def _bytes_per_second() -> float:
    """Bytes read and written a second by an addition to 64 MB."""
    x = mx.ones((1 << 24,), mx.float32)
    mx.eval(x)
    return 2.0 * x.nbytes / _best_of(lambda: x + 1)


def _seconds_per_kernel(count: int = 200) -> float:
    """Of a kernel that has nothing to do, behind another."""

    def chain() -> mx.array:
        x = mx.zeros((8,))
        for _ in range(count):
            x = mx.sin(x)
        return x

    return _best_of(chain) / count
