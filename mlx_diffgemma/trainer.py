"""Settings, batches, optimizer, and one loop that yields events: no printing, no argument parsing.

What is learned is in objective.py. Source of the defaults: TRL (sft_diffusion_gemma) and google-deepmind/gemma.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from . import engine
from .adapters import leaves
from .config import GenerationConfig, ModelConfig
from .errors import TrainingError
from .layers import Layer
from .network import Network
from .noise import SeededNoise
from .objective import LOGITS, AllExperts, Batch, losses

BUCKET = 16  # lengths are padded to multiples of this, so that few shapes are compiled
ALL_EXPERTS = 8  # up to so many experts, running all of them is quicker than gathering


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run. The defaults are for LoRA; TRL and the official recipe use the same rate and schedule."""

    steps: int = 800
    batch_size: int = 8  # examples per gradient
    accumulate: int = 1  # gradients per step
    learning_rate: float = 1.5e-4
    final_rate: float = 0.1  # of the learning rate, at the end of the cosine
    warmup: int = 25
    betas: tuple[float, float] = (0.95, 0.99)
    weight_decay: float = 1e-4
    clip: float = 1.0  # of the gradient's global norm; 0 clips nothing
    optimizer: str = "adamw"  # or "muon": orthogonalized momentum for matrices, AdamW for the rest
    self_conditioning: float = 0.5  # share of examples that see a first look's signal
    encoder_weight: float = 1.0  # of the encoder's next-token loss
    fill: str = (
        "eos"  # what fills the canvas behind an answer's <turn|>: "eos" (TRL, Google's recipes), or "turn" again
    )
    train_router: bool = False
    checkpoint_layers: bool = False  # recompute layers in the backward pass: less memory, a third more time
    max_length: int = 4096  # longer examples are left out
    seed: int = 0
    evaluate_every: int = 100
    save_every: int = 100
    keep: int = 2  # newest checkpoints that stay

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "max_length", "evaluate_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if self.optimizer not in ("adamw", "muon"):
            raise TrainingError(f"optimizer is {self.optimizer!r}, expected 'adamw' or 'muon'.")
        if self.fill not in ("eos", "turn"):
            raise TrainingError(f"fill is {self.fill!r}, expected 'eos' or 'turn'.")
        if not 0 <= self.self_conditioning <= 1:
            raise TrainingError(f"self_conditioning is {self.self_conditioning}, expected 0 … 1.")


# ------------------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question and answer as ids; the answer has no stop id."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response) + 1


class Ends(NamedTuple):
    """The id that closes an answer, and the one that fills the rest of its last canvas."""

    stop: int
    fill: int


def make_batch(
    examples: Sequence[Example], rng: np.random.Generator, config: ModelConfig, settings: Settings, ends: Ends
) -> Batch:
    """Choose a canvas of every response, and corrupt it."""
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


class Batches:
    """Which examples belong to which batch: a pure function of the seed and the batch's number.

    Every epoch is shuffled; neighbours of similar length are batched together inside pools of 64 batches.
    """

    def __init__(self, examples: Sequence[Example], settings: Settings):
        self.examples = [example for example in examples if example.length <= settings.max_length]
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


# --------------------------------------------------------------------------------------------------------- network


def memory_needed(network: Network, settings: Settings, length: int) -> int:
    """Bytes at the peak of a step with examples of `length` tokens, predicted; nothing is computed for it.

    Per token a layer keeps its residuals, projections, both branches' gates and its rows of attention scores, or with
    `checkpoint_layers` its input, keys and values; an adapter is float32 and keeps its inputs so. Per trained parameter
    there are a gradient, two moments, an update.
    """
    config, size = network.config, network.decoder.norm.weight.dtype.size
    tokens = settings.batch_size * (length + int((1 + settings.self_conditioning) * config.canvas_length))
    layers, inputs = [], 0
    for layer, module in zip(config.layers, network.decoder.layers, strict=True):
        heads = (2 * config.num_attention_heads + 2 * layer.num_kv_heads) * layer.head_dim
        wide = 4 * config.intermediate_size + config.top_k_experts * (4 * config.moe_intermediate_size)
        scores = 2 * config.num_attention_heads * (length + config.canvas_length)
        plain = 12 * config.hidden_size + heads + wide + config.top_k_experts * config.hidden_size + scores
        layers.append(size * plain + (4 * _adapted_inputs(module, config) if size < 4 else 0))
        inputs += size * (config.hidden_size + 2 * layer.num_kv_heads * layer.head_dim)
    kept = max(layers) + inputs if settings.checkpoint_layers else sum(layers)
    weights = sum(weight.nbytes for weight in leaves(network.parameters()).values())
    trained = sum(weight.size for weight in leaves(network.trainable_parameters()).values())
    logits = 16 * min(LOGITS, tokens * config.vocab_size)
    return weights + 16 * trained + tokens * kept + logits


def _adapted_inputs(layer: Layer, config: ModelConfig) -> int:
    """Numbers per token that a layer's adapters read."""
    found = [weight.shape for name, weight in leaves(layer.parameters()).items() if name.endswith("lora_a")]
    return sum(shape[0] if len(shape) == 2 else config.top_k_experts * shape[-1] for shape in found)


def prepare(network: Network, settings: Settings) -> None:
    """Make a network ready to train: the router frozen unless asked for, few experts run all together."""
    network.train()
    for layer in network.decoder.layers:
        if not settings.train_router:
            layer.router.freeze()
        plain = all(type(p) is SwitchLinear for p in (layer.experts.gate_up_proj, layer.experts.down_proj))
        if plain and network.config.num_experts <= ALL_EXPERTS:
            layer.experts = AllExperts(layer.experts)


def initialize(network: Network, seed: int) -> None:
    """Weights to start from: matrices keep variances, the embedding has unit norm, attention starts at 1 / sqrt(D)."""
    key = mx.random.key(seed)
    fresh = []
    for name, weight in leaves(network.parameters()).items():
        if weight.ndim >= 2:
            key, draw = mx.random.split(key)
            fresh.append((name, mx.random.normal(weight.shape, key=draw) * weight.shape[-1] ** -0.5))
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            fresh.append((name, mx.full(weight.shape, weight.shape[0] ** -0.25)))
        else:
            fresh.append((name, mx.ones(weight.shape)))
    network.update(tree_unflatten(fresh))


# ------------------------------------------------------------------------------------------------------- optimizer


class Muon(optim.Muon):
    """MLX's Muon, with one orthogonalization per matrix of a stack instead of one for all."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        momentum = self.momentum * state["v"] + (1 - self.momentum) * gradient
        state["v"] = momentum
        x = (1 - self.momentum) * gradient + self.momentum * momentum  # Nesterov
        tall = x.shape[-2] > x.shape[-1]
        x = x.swapaxes(-1, -2) if tall else x
        x = x / (mx.sqrt(mx.square(x).sum(axis=(-2, -1), keepdims=True)) + 1e-7)
        for _ in range(self.ns_steps):
            square = x @ x.swapaxes(-1, -2)
            x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
        x = x.swapaxes(-1, -2) if tall else x
        rate = self.learning_rate * max(1, x.shape[-2] / x.shape[-1]) ** 0.5
        return parameter * (1 - self.learning_rate * self.weight_decay) - rate * x


MUON_RATE = 10  # Muon's learning rate over AdamW's


def schedule(settings: Settings, factor: float = 1.0) -> Callable[[mx.array], mx.array]:
    """Learning rate by step: linear warmup, then a cosine to `final_rate`."""

    def rate(step: mx.array) -> mx.array:
        warm = (step + 1) / max(1, settings.warmup)
        done = mx.clip((step - settings.warmup) / max(1, settings.steps - settings.warmup), 0, 1)
        cosine = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + mx.cos(math.pi * done))
        return settings.learning_rate * factor * mx.minimum(warm, cosine)

    return rate


def make_optimizer(settings: Settings) -> optim.Optimizer:
    adamw = optim.AdamW(
        schedule(settings), betas=list(settings.betas), weight_decay=settings.weight_decay, bias_correction=True
    )
    if settings.optimizer == "adamw":
        return adamw
    muon = Muon(schedule(settings, MUON_RATE), weight_decay=settings.weight_decay)
    return optim.MultiOptimizer([muon, adamw], [lambda name, weight: weight.ndim >= 2 and "embed" not in name])


# ------------------------------------------------------------------------------------------------------------ loop


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


Event = Trained | Evaluated | Saved


class Trainer:
    """Trains the trainable parameters of `network` and keeps checkpoints in `folder`.

    A run that is killed and started again continues from the newest checkpoint and ends with the same bits. Started
    in a group of processes (mlx.launch), every process takes its own batches and gradients are averaged.
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
    ):
        self.network, self.settings, self.ends, self.folder = network, settings, ends, Path(folder)
        self.batches = Batches(examples, settings)
        self.held_out = list(held_out)
        self.optimizer = make_optimizer(settings)
        self.optimizer.init(network.trainable_parameters())
        self.group = mx.distributed.init()
        self.step = 0

    def run(self) -> Iterator[Event]:
        """Train to the last step. Errors: TrainingError when the loss is no longer a number."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
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
        decoder, encoder = (parts / settings.accumulate).tolist()
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
        """Write weights, optimizer and position; the folder appears only when it is whole."""
        final = self.folder / f"step-{self.step:07d}"
        partial_folder = self.folder / f".{final.name}"
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
        mx.save_safetensors(str(partial_folder / "weights.safetensors"), leaves(self.network.trainable_parameters()))
        mx.save_safetensors(str(partial_folder / "optimizer.safetensors"), leaves(self.optimizer.state))
        position = {"step": self.step, "settings": asdict(self.settings)}
        (partial_folder / "position.json").write_text(json.dumps(position, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial_folder, final)
        for old in self._checkpoints()[: -self.settings.keep]:
            shutil.rmtree(old)
        return Saved(step=self.step, folder=final)

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one. Errors: TrainingError when it trained other weights."""
        if (newest := self._newest()) is None:
            return
        weights: Any = mx.load(str(newest / "weights.safetensors"))
        if weights.keys() != leaves(self.network.trainable_parameters()).keys():
            raise TrainingError(
                f"{newest} is a checkpoint of another kind of run: it trained other weights.\n"
                "Choose another output folder, or delete it to start anew."
            )
        self.network.load_weights(list(weights.items()), strict=False)
        saved: Any = mx.load(str(newest / "optimizer.safetensors"))
        self.optimizer.state = tree_unflatten(list(saved.items()))
        self.step = json.loads((newest / "position.json").read_text())["step"]
        mx.eval(self.network.state, self.optimizer.state)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _newest(self) -> Path | None:
        return next(reversed(self._checkpoints()), None)


def answers(
    network: Network, examples: Sequence[Example], settings: GenerationConfig, *, seed: int, batch_size: int = 16
) -> Iterator[tuple[Example, tuple[int, ...], list[engine.CanvasRow]]]:
    """Generate for every example: the example, the ids of the answer, and its canvases. For exact-match scores."""
    config = network.config
    length = settings.canvas_length or config.canvas_length
    for first in range(0, len(examples), batch_size):
        group = examples[first : first + batch_size]
        seeds = range(seed * 1_000_003 + first, seed * 1_000_003 + first + len(group))
        noise = SeededNoise(seeds, length=length, vocabulary=config.vocab_size)
        rows: list[list[engine.CanvasRow]] = [[] for _ in group]
        for event in engine.generate(network, [list(e.prompt) for e in group], settings, noise):
            if isinstance(event, engine.Committed):
                for canvases, row in zip(rows, event.rows, strict=True):
                    canvases += [row] if row.steps else []
        for example, canvases in zip(group, rows, strict=True):
            yield example, tuple(i for row in canvases for i in row.ids), canvases
