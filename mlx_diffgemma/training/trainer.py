"""One loop that yields events: no printing, no argument parsing. What is learned is in objective.py."""

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from ..disk import replacing, replacing_folder
from ..errors import TrainingError
from ..files.shards import write_tensors
from ..model.network import Network, leaves
from ..readers import read_json
from ..values import Field, Table, integer
from .batches import Batches, fitting, make_batch
from .data import Ends, Example
from .identity import checkpoints, claimed, identity
from .objective import Batch, losses
from .optimizer import make_optimizer
from .settings import Settings


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One step is done. Losses in nats per token."""

    step: int  # 1 … steps
    steps: int
    loss: float
    decoder_loss: float
    encoder_loss: float
    tokens: int  # encoded and denoised in this step
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The held-out loss, under the same noise every time."""

    step: int
    decoder_loss: float
    encoder_loss: float


@dataclass(frozen=True, kw_only=True)
class Saved:
    step: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Started:
    """The run begins, or goes on behind `step`."""

    step: int  # 0 for a new run, `steps` for a finished one
    steps: int
    locked: bool  # False where the disk has no locks: nothing keeps a second run out


Event = Started | Trained | Evaluated | Saved


class Trainer:
    """Trains the trainable parameters of `network` and keeps checkpoints in `folder`.

    A run that is killed and started again continues from the newest checkpoint and ends with the same bits; no other
    run does, and no two at once. Started in a group of processes (mlx.launch), every process takes its own batches and
    gradients are averaged.
    """

    def __init__(
        self,
        network: Network,
        settings: Settings,
        *,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        ends: Ends,
        folder: Path,
        origin: dict[str, Any] | None = None,
    ):
        """`origin` is what the result depends on besides settings and examples: base and adapter, by name.

        Errors: TrainingError for examples that make no batch, or have ids that the vocabulary does not have.
        """
        self.network, self.settings, self.ends, self.folder = network, settings, ends, Path(folder)
        self.batches = Batches(examples, settings)
        self.held_out = fitting(held_out, settings)
        self.held_out_left_out = len(held_out) - len(self.held_out)
        _check_ids(network.config.vocab_size, [*self.batches.examples, *self.held_out], ends)
        self.optimizer = make_optimizer(settings)
        self.optimizer.init(network.trainable_parameters())
        self.group = mx.distributed.init()
        self.identity = identity(settings, self.batches.examples, self.group.size(), origin or {})
        self.step = 0

    def run(self) -> Iterator[Event]:
        """Train to the last step, from the newest checkpoint on if the folder has one of this run.

        Errors: TrainingError when the folder holds another run or is held by another process, and when the loss is no
        longer a number; OSError.
        """
        with self._claim() as locked:
            self.resume()
            yield Started(step=self.step, steps=self.settings.steps, locked=locked)
            state = [self.network.state, self.optimizer.state]  # the dicts that resuming filled
            self._gradients = mx.compile(self._value_and_grad, inputs=state[:1], outputs=state[:1])
            self._update = mx.compile(self._apply, inputs=state, outputs=state)
            while self.step < self.settings.steps:
                yield self._train_step()
                last = self.step == self.settings.steps
                if self.held_out and (last or self.step % self.settings.evaluate_every == 0):
                    yield self.evaluate()
                if (last or self.step % self.settings.save_every == 0) and self.group.rank() == 0:
                    yield self.save()

    @contextmanager
    def _claim(self) -> Iterator[bool]:
        """The first process holds the folder for all; when it may not, none of them begins."""
        with ExitStack() as stack:
            locked, refused = True, None
            if self.group.rank() == 0:
                try:
                    locked = stack.enter_context(claimed(self.folder, self.identity))
                except TrainingError as error:
                    refused = error
            if self._of_all([float(refused is not None)])[0]:
                raise refused or TrainingError("the first process of the group may not train: see its message.")
            yield locked

    def _of_all(self, numbers: list[float]) -> list[float]:
        """The mean over all processes: every one of them goes on, or none."""
        if self.group.size() == 1:
            return numbers
        return np.array(mx.distributed.all_sum(mx.array(numbers), group=self.group) / self.group.size()).tolist()

    def _train_step(self) -> Trained:
        start = time.perf_counter()
        settings, workers = self.settings, self.group.size()
        gradients, tokens = None, 0
        parts = np.zeros(2)  # the two losses
        for part in range(settings.accumulate):
            number = (self.step * settings.accumulate + part) * workers + self.group.rank()
            rng = np.random.default_rng((settings.seed, 2, number))
            batch = make_batch(self.batches[number], rng, self.network.config, settings, self.ends)
            arrays = (batch.tokens, batch.lengths, batch.starts, batch.clean, batch.noisy)
            pair, new = self._gradients(*arrays, batch.looks)
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            mx.eval(pair, gradients)
            parts += [np.array(loss) for loss in pair]
            tokens += batch.tokens.size + batch.clean.size
        gradients = tree_map(lambda g: g / settings.accumulate, gradients)
        gradients = nn.average_gradients(gradients, self.group)
        decoder, encoder = self._of_all((parts / settings.accumulate).tolist())
        loss = decoder + settings.encoder_weight * encoder
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step + 1}: training stopped. The last good weights are in\n"
                f"{self._newest() or 'no checkpoint yet'}. Lower learning_rate, or start from another seed."
            )
        self._update(gradients)
        mx.eval(self.network.state, self.optimizer.state)
        self.step += 1
        return Trained(
            step=self.step,
            steps=settings.steps,
            loss=loss,
            decoder_loss=decoder,
            encoder_loss=encoder,
            tokens=tokens * workers,
            seconds=time.perf_counter() - start,
            peak_memory_bytes=mx.get_peak_memory(),
        )

    def _value_and_grad(
        self, tokens: mx.array, lengths: mx.array, starts: mx.array, clean: mx.array, noisy: mx.array, looks: int
    ) -> tuple[tuple[mx.array, mx.array], dict]:
        batch = Batch(tokens=tokens, lengths=lengths, starts=starts, clean=clean, noisy=noisy, looks=looks)

        def objective() -> tuple[mx.array, tuple[mx.array, mx.array]]:
            decoder, encoder = losses(self.network, batch, recompute=self.settings.checkpoint_layers)
            return decoder + self.settings.encoder_weight * encoder, (decoder, encoder)

        (_, parts), gradients = nn.value_and_grad(self.network, objective)()
        return parts, gradients

    def _apply(self, gradients: dict) -> None:
        if self.settings.clip:
            gradients, _ = optim.clip_grad_norm(gradients, self.settings.clip)
        self.optimizer.update(self.network, gradients)

    def evaluate(self) -> Evaluated:
        """Mean losses over the held-out examples, always under the same noise."""
        size = self.settings.batch_size
        rng = np.random.default_rng((self.settings.seed, 3))
        ordered = sorted(self.held_out, key=lambda example: example.length)
        sums, count = np.zeros(2), 0
        for first in range(0, len(ordered), size):
            batch = make_batch(ordered[first : first + size], rng, self.network.config, self.settings, self.ends)
            pair = losses(self.network, batch)
            mx.eval(pair)
            rows = len(batch.starts)
            sums, count = sums + rows * np.array([float(np.array(loss)) for loss in pair]), count + rows
        return Evaluated(step=self.step, decoder_loss=sums[0] / count, encoder_loss=sums[1] / count)

    def save(self) -> Saved:
        """Write weights, optimizer and position; the folder appears only when it is whole. Errors: OSError."""
        final = self.folder / f"step-{self.step:07d}"
        position = {"step": self.step, "settings": asdict(self.settings)}
        with replacing_folder(final) as made:
            write_tensors(made / WEIGHTS, leaves(self.network.trainable_parameters()))
            write_tensors(made / OPTIMIZER, leaves(self.optimizer.state))
            with replacing(made / POSITION, "w") as stream:
                stream.write(json.dumps(position, indent=2) + "\n")
        for old in checkpoints(self.folder)[: -self.settings.keep]:
            shutil.rmtree(old)
        return Saved(step=self.step, folder=final)

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one. Errors: TrainingError when it is damaged, or trained
        other weights."""
        if (newest := self._newest()) is None:
            return
        try:
            position = read_json(newest / POSITION, fault=TrainingError)
            step = _POSITION.read(position, str(newest / POSITION), fault=TrainingError)["step"]
            weights, saved = (_arrays(newest / file) for file in (WEIGHTS, OPTIMIZER))
        except TrainingError as error:
            raise TrainingError(f"{error}\nDelete {newest} to continue from the checkpoint before it.") from None
        if step > self.settings.steps:
            raise TrainingError(f"{newest / POSITION}: step is {step}, expected at most {self.settings.steps}.")
        trained = leaves(self.network.trainable_parameters())
        if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in trained.items()}:
            raise TrainingError(
                f"{newest} is a checkpoint of another kind of run: it trained other weights.\n"
                "Choose another output folder, or delete it to start anew."
            )
        self.network.load_weights(list(weights.items()), strict=False)
        self.optimizer.state = tree_unflatten(list(saved.items()))
        self.step = step
        mx.eval(self.network.state, self.optimizer.state)

    def _newest(self) -> Path | None:
        return next(reversed(checkpoints(self.folder)), None)


WEIGHTS, OPTIMIZER, POSITION = "weights.safetensors", "optimizer.safetensors", "position.json"
_POSITION = Table(Field("step", integer(least=1)), open=True)


def _arrays(file: Path) -> dict[str, mx.array]:
    """Errors: TrainingError for a file that is absent or damaged."""
    try:
        return cast(dict[str, mx.array], mx.load(str(file)))
    except (RuntimeError, ValueError, OSError):
        what = "is damaged" if file.is_file() else "is missing"
        raise TrainingError(f"{file} {what}: it cannot be continued.") from None


def _check_ids(size: int, examples: Sequence[Example], ends: Ends) -> None:
    """Errors: TrainingError for an id outside 0 … size − 1: nothing behind this looks at one again."""
    highest = max(max((*example.prompt, *example.response, *ends)) for example in examples)
    if highest >= size:
        raise TrainingError(
            f"the examples have the id {highest}; this model's ids are 0 … {size - 1}.\n"
            "Tokenizer and weights do not belong together."
        )
