"""What each recipe does to the built-in model: argmax and entropy at converged canvases, against float32."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import checkpoint, packs
from mlx_diffgemma.cli import BUILT_IN
from mlx_diffgemma.config import load_recipe, recipe_names
from mlx_diffgemma.engine import Denoised, generate
from mlx_diffgemma.network import Network
from mlx_diffgemma.noise import SeededNoise
from mlx_diffgemma.tokenizer import Tokenizer

PROMPTS = (
    "Solve this Sudoku:\n14. 356\n... .4.\n35. 621\n... .3.\n2.6 514\n415 263",
    "Write this as JSON:\npet: horse\nname: Will",
    "Sort these names:\nLeo, Will, Eva, Ben, Cleo, Olga",
    "Add in columns:\n  4119\n+ 6858",
    "Fill in the template:\nDear {name}, your {item} will be ready on {day}.\nname: Tara\nitem: clock\nday: Thursday",
)
RENOISED = 0.3  # share of a converged canvas that is replaced for the harder of the two readings


@cache
def built_in() -> Network:
    return checkpoint.load_network(BUILT_IN)


@cache
def converged() -> list[tuple[list[int], mx.array]]:
    """Prompts, and the canvas at which the float32 model stopped for each."""
    tokenizer, settings = Tokenizer.load(BUILT_IN), checkpoint.read_generation_config(BUILT_IN)
    length, vocabulary = built_in().config.canvas_length, built_in().config.vocab_size
    found = []
    for number, text in enumerate(PROMPTS):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        noise = SeededNoise([number], length=length, vocabulary=vocabulary)
        one_canvas = settings.replace(max_tokens=length)
        events = [e for e in generate(built_in(), [prompt], one_canvas, noise) if isinstance(e, Denoised)]
        found.append((prompt, events[-1].best))
    return found


@dataclass(frozen=True)
class Reading:
    """Of two steps at each canvas, the second with the first's signal; flat over positions."""

    best: np.ndarray
    entropy: np.ndarray

    def agreement(self, other: "Reading") -> float:
        return float((self.best == other.best).mean())

    def correlation(self, other: "Reading") -> float:
        return float(np.corrcoef(self.entropy, other.entropy)[0, 1])


def reading(network: Network, renoised: float = 0.0) -> Reading:
    """Best tokens and entropies at the converged canvases, a share of each replaced by random ids."""
    best, entropy = [], []
    for number, (prompt, canvas) in enumerate(converged()):
        random = np.random.default_rng(number)
        ids = random.integers(0, network.config.vocab_size, canvas.shape)
        canvas = mx.array(np.where(random.random(canvas.shape) < renoised, ids, np.array(canvas)))
        prefix = network.make_cache()
        network.encode(mx.array([prompt]), prefix)
        signal = None
        for _ in range(2):
            logits = network.logits(canvas, prefix, signal) / 0.5
            p = mx.softmax(logits, axis=-1)
            best.append(np.array(logits.argmax(axis=-1)).flatten())
            entropy.append(np.array(-(p * mx.log(mx.maximum(p, 1e-30))).sum(axis=-1)).flatten())
            signal = logits
    return Reading(np.concatenate(best), np.concatenate(entropy))


@dataclass(frozen=True)
class Kept:
    """What a recipe keeps of the float32 model."""

    agreement: float  # share of equal best tokens at converged canvases
    correlation: float  # of entropies there
    renoised_agreement: float


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    """Every recipe, packed by the converter and computed in float32."""
    whole, whole_renoised = reading(built_in()), reading(built_in(), RENOISED)
    source = checkpoint.open_checkpoint(BUILT_IN)
    found = {}
    for name in recipe_names():
        target = tmp_path_factory.mktemp("packs") / name
        packs.convert(packs.prepare(source, load_recipe(name)), target)
        network = checkpoint.load_network(target)
        network.set_dtype(mx.float32)  # scales, biases and what is not packed: MLX on a CPU is slow in bfloat16
        own = reading(network)
        renoised = reading(network, RENOISED).agreement(whole_renoised)
        found[name] = Kept(own.agreement(whole), own.correlation(whole), renoised)
    return found


def test_float32_returns_its_converged_canvas() -> None:
    canvases = np.concatenate([np.tile(np.array(canvas).flatten(), 2) for _, canvas in converged()])
    assert (reading(built_in()).best == canvases).mean() > 0.9


def test_every_recipe_stays_close(kept: dict[str, Kept], record_summary: Callable[[str], None]) -> None:
    record_summary(
        "recipes on the built-in model against float32: equal argmax and entropy correlation at converged canvases,"
        f" equal argmax with {RENOISED:.0%} renoised"
    )
    for name, it in kept.items():
        record_summary(f"  {name:8} {it.agreement:6.1%}  {it.correlation:.4f}  {it.renoised_agreement:6.1%}")
    assert kept["q8"].agreement >= 0.99 and kept["q8"].correlation >= 0.99
    for name, it in kept.items():
        if not load_recipe(name).experimental:
            assert it.agreement >= 0.95 and it.correlation >= 0.85, name


def test_the_default_loses_no_more_than_a_point_to_q8(kept: dict[str, Kept]) -> None:
    assert kept["q4"].agreement >= kept["q8"].agreement - 0.01
