"""What machines that share a model send each other: counted before anything is sent."""

from dataclasses import dataclass

from ...config import ModelConfig
from ...generation.vocabulary import PARTS, most_numbers


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """Exchanges, and the bytes that each machine sends in them."""

    count: int
    nbytes: int

    def __add__(self, other: "Exchanged") -> "Exchanged":
        return Exchanged(count=self.count + other.count, nbytes=self.nbytes + other.nbytes)


def of_step(config: ModelConfig, machines: int, *, rows: int = 0, item_size: int = 2, signal: bool = True) -> Exchanged:
    """Pieces gathered in one step of `rows` positions (0: a canvas) of the network and the walk over the vocabulary,
    behind a `signal` or without one. What is told before each pass comes to it: `messages`."""
    rows = rows or config.canvas_length
    return of_pass(config, machines, rows, item_size, signal=signal) + of_walk(config, machines, rows)


def of_pass(config: ModelConfig, machines: int, rows: int, item_size: int, *, signal: bool = False) -> Exchanged:
    """All layers: heads; out of `o_proj`; the inner values of the dense branch and of the chosen experts; both out."""
    hidden, dense = config.hidden_size, config.intermediate_size
    chosen = config.top_k_experts * config.moe_intermediate_size
    heads = [config.num_attention_heads * layer.head_dim for layer in config.layers]
    width = sum(head + hidden + dense + chosen + 2 * hidden for head in heads) + signal * (dense + hidden)
    count = 4 * len(config.layers) + 2 * signal
    return Exchanged(count=count, nbytes=_sent(rows * width * item_size, machines))


def of_walk(config: ModelConfig, machines: int, rows: int, *, signal: bool = True) -> Exchanged:
    """The sums over the vocabulary's parts, float32, with the soft embeddings of the signal."""
    columns = 2 + (3 + config.hidden_size if signal else 2) + most_numbers(config.vocab_size)
    return Exchanged(count=1, nbytes=_sent(PARTS * rows * columns * 4, machines))


def messages(config: ModelConfig, rows: int, item_size: int) -> Exchanged:
    """What the leader tells of a step: the canvas, the signal, and the hidden states of the walk."""
    told = rows * (4 + 2 * config.hidden_size * item_size)
    return Exchanged(count=4, nbytes=told)


def _sent(nbytes: int, machines: int) -> int:
    """A machine passes on every piece but one."""
    return nbytes // machines * (machines - 1)
