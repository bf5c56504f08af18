"""What one machine computes where several share a model: some output rows of every matrix.

Pieces are gathered, never summed, so that no sum changes its order: the result is one machine's, to the bit, wherever a
kernel rounds pieces as it rounds the whole (proof/pieces compares them; small float32 products of a CPU do not).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx

from ...config import LayerConfig, ModelConfig
from ...errors import ConfigError
from ..cache import PrefixCache

T = TypeVar("T")
Spans = tuple[tuple[int, int], ...]  # rows of a matrix, from … to
Done = Callable[..., None]  # waits for arrays, before what was announced is over


class Share:
    """A machine that is alone: its rows are all rows. With another `rank` and `size` it says which rows are whose."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    def gather(self, *pieces: mx.array) -> list[mx.array]:
        """Last axes that every machine has some of → whole ones; all in one exchange."""
        return list(pieces)

    def announced(self, what: str, cache: PrefixCache | None = None, **told: Any) -> AbstractContextManager[Done]:
        """Have the other machines do the same pass, on their counterparts of a prefix. What holds pieces of others has
        been waited for when it is over (`done(arrays)`), so that all machines exchange them in the same order."""
        return nullcontext(_nothing)

    def make_cache(self, config: ModelConfig, **options: Any) -> PrefixCache:
        """A prefix that `announced` knows."""
        return PrefixCache(config, **options)

    def together(self, work: Callable[[], T]) -> T:
        """What every machine does for itself. Errors: on every machine, when it failed on one."""
        return work()

    def agree(self, **facts: str) -> None:
        """Errors: ConfigError when the machines do not say the same."""

    def least(self, number: int) -> int:
        """The smallest of what the machines say."""
        return number

    def ready(self) -> None:
        """The model is loaded: passes may come, or none for a long time."""

    def end(self) -> None:
        """There will be no further pass."""

    def part(self, parts: int) -> range:
        """Which of so many equal parts are this machine's."""
        return range(parts * self.rank // self.size, parts * (self.rank + 1) // self.size)

    # --------------------------------------------------------------------------------------------------- the rows

    def heads(self, config: ModelConfig, layer: LayerConfig) -> tuple[int, int]:
        """How many query heads and key heads a machine has: of fewer key heads than machines some share one."""
        return config.num_attention_heads // self.size, max(layer.num_kv_heads // self.size, 1)

    def own(self, config: ModelConfig) -> ModelConfig:
        """The same architecture with the key heads of one machine."""
        layers = [replace(layer, num_kv_heads=self.heads(config, layer)[1]) for layer in config.layers]
        return replace(config, layers=tuple(layers))

    def spans(self, config: ModelConfig, name: str) -> Spans | None:
        """The output rows of a parameter (by its dotted name in the network) that are this machine's; None: all."""
        match name.split("."):
            case ["decoder", "layers", number, "self_attn", projection, _]:
                return self._attention(config, config.layers[int(number)], projection)
            case ["decoder", "layers", _, "experts", "gate_up_proj", *_]:
                wide = config.moe_intermediate_size
                [(start, stop)] = self._span(wide)
                return (start, stop), (wide + start, wide + stop)
            case ["decoder", "layers", _, "mlp" | "experts", projection, *_] | [
                "decoder",
                "self_conditioning",
                projection,
                _,
            ]:
                widths = {
                    "gate_proj": config.intermediate_size,
                    "up_proj": config.intermediate_size,
                    "down_proj": config.hidden_size,
                }
                return self._span(widths[projection]) if projection in widths else None
        return None

    def _attention(self, config: ModelConfig, layer: LayerConfig, projection: str) -> Spans | None:
        dim, kv_heads = layer.head_dim, layer.num_kv_heads
        match projection:
            case "q_proj":
                return self._span(config.num_attention_heads * dim)
            case "k_proj" | "v_proj":
                first, count = self.rank * kv_heads // self.size, self.heads(config, layer)[1]
                return ((first * dim, (first + count) * dim),)
            case "o_proj":
                return self._span(config.hidden_size)
        return None

    def _span(self, rows: int) -> Spans:
        part = self.part(rows)
        return ((part.start, part.stop),)


ALONE = Share()
SIZES = (2, 4)  # machines; the sums over the vocabulary have four parts


def check_divides(config: ModelConfig, size: int) -> None:
    """Errors: ConfigError when a model cannot be shared by so many machines: what does not divide."""
    if size not in (1, *SIZES):
        raise ConfigError(f"{size} machines were launched; a model is shared by {' or '.join(map(str, SIZES))}.")
    widths = {"heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    widths |= {"intermediate_size": config.intermediate_size, "moe_intermediate_size": config.moe_intermediate_size}
    uneven = [f"{name} {width}" for name, width in widths.items() if width % size]
    uneven += [
        f"{count} key heads"
        for count in sorted({layer.num_kv_heads for layer in config.layers})
        if count % size and size % count
    ]
    if uneven:
        raise ConfigError(f"{size} machines cannot share this model: {size} does not divide its {', '.join(uneven)}.")


def _nothing(*arrays: mx.array | Sequence[mx.array]) -> None:
    pass
