"""One denoising step behind a prefix of any length, timed as a whole and by part. The prefix is random keys and values,
so that nothing has to be encoded for it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..generation import sampler, vocabulary
from ..generation.noise import SeededNoise
from ..model.cache import PrefixCache
from ..model.network import Network
from ..model.tuning import Tuning

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
