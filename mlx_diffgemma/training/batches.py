"""Which examples belong to which batch, and what of them is corrupted: pure functions of the seed."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..config import ModelConfig
from ..errors import TrainingError
from .data import Ends, Example
from .objective import Batch
from .settings import Settings

BUCKET = 16  # lengths are padded to multiples of this, so that few shapes are compiled


def make_batch(
    examples: Sequence[Example], rng: np.random.Generator, config: ModelConfig, settings: Settings, ends: Ends
) -> Batch:
    """Choose a canvas of every response, and corrupt it: each of its ids becomes a random one with a probability
    that is itself drawn for each example, uniform in [0, 1)."""
    size, rows = config.canvas_length, len(examples)
    width = -(-max(example.length for example in examples) // BUCKET) * BUCKET
    tokens = np.full((rows, width), config.pad_token_id, np.int32)
    clean = np.full((rows, size), ends.fill, np.int32)
    starts = np.zeros(rows, np.int32)
    for row, example in enumerate(examples):
        answer = [*example.response, ends.stop]
        tokens[row, : example.length] = [*example.prompt, *answer]
        first = int(rng.integers(-(-len(answer) // size))) * size
        canvas = answer[first : first + size]
        clean[row, : len(canvas)] = canvas
        starts[row] = len(example.prompt) + first
    corrupt = rng.random((rows, size)) < rng.random((rows, 1))
    noisy = np.where(corrupt, rng.integers(config.vocab_size, size=(rows, size)), clean).astype(np.int32)
    return Batch(
        tokens=mx.array(tokens),
        lengths=mx.array([example.length for example in examples], mx.int32),
        starts=mx.array(starts),
        clean=mx.array(clean),
        noisy=mx.array(noisy),
        looks=int(rows * settings.self_conditioning + rng.random()),
    )


def fitting(examples: Sequence[Example], settings: Settings) -> list[Example]:
    """Those that are not longer than `max_length`."""
    return [example for example in examples if example.length <= settings.max_length]


class Batches:
    """Which examples belong to which batch: a pure function of the seed and the batch's number.

    Every epoch is shuffled; neighbours of similar length are batched together inside pools of 64 batches.
    """

    def __init__(self, examples: Sequence[Example], settings: Settings):
        self.examples = fitting(examples, settings)
        self.left_out = len(examples) - len(self.examples)
        self.settings = settings
        self.per_epoch = len(self.examples) // settings.batch_size
        if not self.per_epoch:
            raise TrainingError(
                f"{len(self.examples)} training examples of at most {settings.max_length} tokens, expected at least"
                f" one batch of {settings.batch_size}.\nGive more data, a smaller batch_size or a larger max_length."
            )
        self._epoch, self._order = -1, np.zeros((0, 0), np.int64)

    def __getitem__(self, number: int) -> list[Example]:
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return [self.examples[i] for i in self._order[index]]

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.settings.seed, 1, epoch))
        size = self.settings.batch_size
        order = rng.permutation(len(self.examples))[: self.per_epoch * size]
        lengths = np.array([example.length for example in self.examples])
        pools = [order[i : i + 64 * size] for i in range(0, len(order), 64 * size)]
        batches = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, size) for pool in pools])
        batches = rng.permuted(batches, axis=1)  # the first rows of a batch take the first look
        return batches[rng.permutation(len(batches))]
