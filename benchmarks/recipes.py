"""What each recipe keeps of the built-in model: distributions, steps to settle, right answers.

    python -m benchmarks.recipes --out benchmarks/results/recipes.json

The converter packs the built-in model by every recipe. All compute in float32, so that nothing but the weights
differs. Canvases at which the float32 model settled get half of their positions replaced at random, and every pack
takes the same two steps from there: equal best tokens, accepted sets in common (intersection ÷ union), correlation of
the entropies. Then it answers the held-out questions of demo_score.py by the default sampler, and ones that are hard by
nature (decodings.py: Sudokus of 12–18 givens, lists with repeated names, unseen templates and longer JSON), where a
model that is nearly always right can still tell recipes apart: right answers, steps, mean log-probability of a token.
"""

import argparse
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import common, decodings, demo_score, train_demo
from mlx_diffgemma import load
from mlx_diffgemma.files import checkpoint, weights
from mlx_diffgemma.generation import sampler
from mlx_diffgemma.generation.engine import generate
from mlx_diffgemma.generation.events import Denoised
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.packing import conversion
from mlx_diffgemma.packing.recipes import load_recipe, recipe_names
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.text.tokenizer import Tokenizer

RENOISED = 0.5  # share of a settled canvas that is replaced
TEMPERATURE = 0.5
TASKS = (*train_demo.TASKS, "sudoku")
HARD = ("sudoku", "doubles", "structured")


@cache
def built_in() -> Network:
    return weights.load_network(common.DEMO)


@cache
def settled() -> list[tuple[list[int], np.ndarray]]:
    """Two held-out prompts of each task, and the canvas [1, L] at which the float32 model stopped for each."""
    tokenizer, settings = Tokenizer.load(common.DEMO), checkpoint.read_generation_config(common.DEMO)
    length, vocabulary = built_in().config.canvas_length, built_in().config.vocab_size
    examples = [example for task in TASKS for example in demo_score.held_out(task, 2)]
    found = []
    for number, example in enumerate(examples):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": example.prompt}])
        noise = SeededNoise([number], length=length, vocabulary=vocabulary)
        one_canvas = settings.replace(max_tokens=length)
        events = [e for e in generate(built_in(), [prompt], one_canvas, noise) if isinstance(e, Denoised)]
        found.append((prompt, np.array(events[-1].best)))
    return found


@dataclass(frozen=True)
class Reading:
    """Of two steps at each canvas, the second with the first's signal; flat over positions."""

    best: np.ndarray
    accepted: np.ndarray
    entropy: np.ndarray

    @classmethod
    def of(cls, network: Network, renoised: float) -> "Reading":
        """At the settled canvases, a share of each replaced by random ids."""
        best, accepted, entropy = [], [], []
        for number, (prompt, canvas) in enumerate(settled()):
            random = np.random.default_rng(number)
            ids = random.integers(0, network.config.vocab_size, canvas.shape)
            ids = mx.array(np.where(random.random(canvas.shape) < renoised, ids, canvas))
            prefix = network.make_cache()
            network.encode(mx.array([prompt]), prefix)
            signal = None
            for _ in range(2):
                signal = network.logits(ids, prefix, signal) / TEMPERATURE
                p = mx.softmax(signal, axis=-1)
                nats = -(p * mx.log(mx.maximum(p, 1e-30))).sum(axis=-1)
                best.append(np.array(signal.argmax(axis=-1)).flatten())
                entropy.append(np.array(nats).flatten())
                accepted.append(np.array(sampler.accept(nats, GenerationConfig().entropy_bound)).flatten())
        return cls(np.concatenate(best), np.concatenate(accepted), np.concatenate(entropy))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a recipe keeps of the float32 model."""

    equal_best: float
    accept_overlap: float  # intersection ÷ union
    entropy_correlation: float

    @classmethod
    def of(cls, whole: Reading, own: Reading) -> "Kept":
        return cls(
            equal_best=float((whole.best == own.best).mean()),
            accept_overlap=float((whole.accepted & own.accepted).sum() / (whole.accepted | own.accepted).sum()),
            entropy_correlation=float(np.corrcoef(whole.entropy, own.entropy)[0, 1]),
        )


def pack(name: str, folder: Path) -> Path:
    """The built-in model by a recipe, in a new folder inside `folder`."""
    target = folder / name
    conversion.convert(conversion.plan_conversion(checkpoint.open_checkpoint(common.DEMO), load_recipe(name)), target)
    return target


def answers(model: DiffusionGemma, count: int, seeds: list[int]) -> dict[str, float]:
    """Right answers to Sudoku and to everything, settled canvases and steps per canvas, over all held-out questions."""
    scores = {task: demo_score.score(model, demo_score.held_out(task, count), seeds) for task in TASKS}
    mean = {key: float(np.mean([score[key] for score in scores.values()])) for key in ("exact", "settled", "steps")}
    return mean | {"sudoku": scores["sudoku"]["exact"]}


def hard_answers(model: DiffusionGemma, count: int) -> dict[str, float]:
    """The same of `count` questions of each hard kind, one seed each, means over kinds; `hard_Sudoku` alone, too."""
    measured = {}
    for kind in HARD:
        questions = list(decodings.KINDS[kind][0](train_demo.HELD_OUT_SEED + 1, count))
        measured[kind] = decodings.measure(model, questions, [0], {"logprobs": True})
    right = {kind: figures["right"][0] for kind, figures in measured.items()}
    means = {key: float(np.mean([m[key] for m in measured.values()])) for key in ("steps", "avg_logprob")}
    hard = {f"hard_{key}": value for key, value in (means | {"right": float(np.mean(list(right.values())))}).items()}
    return hard | {f"hard_{kind}": value for kind, value in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="held-out questions of each task")
    parser.add_argument("--hard", type=int, default=60, help="hard questions of each kind")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", nargs="+", default=["float32", *recipe_names()], help="recipes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    whole = Reading.of(built_in(), RENOISED)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            source = common.DEMO if name == "float32" else pack(name, Path(folder))
            network = weights.load_network(source)
            network.set_dtype(mx.float32)  # what is not packed, scales and biases
            kept = Kept.of(whole, Reading.of(network, RENOISED))
            model = load(source)
            model.network.set_dtype(mx.float32)
            found[name] = asdict(kept) | answers(model, arguments.count, seeds) | hard_answers(model, arguments.hard)
            print(name, found[name], flush=True)
    print(table(found))
    counts = {"count": arguments.count, "hard": arguments.hard, "seeds": seeds}
    common.finish(common.provenance() | counts | {"recipes": found}, arguments.out)


def table(found: dict[str, dict[str, float]]) -> str:
    """One row a recipe; hard questions where they were asked."""
    shown = {
        "equal best": ("equal_best", ".1%"),
        "accepted alike": ("accept_overlap", ".1%"),
        "entropy correlation": ("entropy_correlation", ".4f"),
        "steps a canvas": ("steps", ".2f"),
        "right": ("exact", ".1%"),
        "hard: steps": ("hard_steps", ".1f"),
        "hard: right": ("hard_right", ".1%"),
        "hard: mean log p": ("hard_avg_logprob", ".3f"),
    }
    shown = {title: (key, how) for title, (key, how) in shown.items() if all(key in row for row in found.values())}
    rows = [[f"`{name}`", *(f"{row[key]:{how}}" for key, how in shown.values())] for name, row in found.items()]
    header = ["recipe", *shown]
    return common.table(rows, header)


if __name__ == "__main__":
    main()
