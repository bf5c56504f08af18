"""The memory that `train` predicts before it starts, and what MLX counts at the peak of a step.

    python -m benchmarks.train_memory [--only NAME,…]

Random weights of the released model's proportions, with its vocabulary of 262,144 at scaled widths, a smaller
vocabulary at larger ones, LoRA and full training, layers kept and recomputed. Each runs in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

SETTLED = 2  # steps: the second holds the optimizer's moments


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network and how it is trained."""

    vocabulary: int
    hidden: int
    layers: int
    length: int = 256  # tokens of an example
    canvas: int = 64
    batch: int = 2
    full: bool = False
    recompute: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The released model's proportions: heads of 1/11 of the width, experts of a quarter."""
        text = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden // 4,
            "moe_intermediate_size": self.hidden // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "num_global_key_value_heads": 1,
            "head_dim": self.hidden // 8,
            "global_head_dim": self.hidden // 4,
            "num_experts": 16,
            "top_k_experts": 4,
            "sliding_window": 128,
        }
        return {"model_type": "diffusion_gemma", "text_config": text, "canvas_length": self.canvas}


SIZES = {
    "released vocabulary, LoRA": Size(vocabulary=262_144, hidden=128, layers=6),
    "released vocabulary, wider, LoRA": Size(vocabulary=262_144, hidden=256, layers=6, batch=4, length=384),
    "released vocabulary, full": Size(vocabulary=262_144, hidden=128, layers=6, full=True),
    "released vocabulary, recomputed": Size(vocabulary=262_144, hidden=256, layers=12, batch=8, recompute=True),
    "vocabulary of 32,768, LoRA": Size(vocabulary=32_768, hidden=512, layers=6, batch=4),
    "vocabulary of 32,768, full": Size(vocabulary=32_768, hidden=256, layers=6, batch=4, full=True),
}


def measure(size: Size, folder: Path) -> dict[str, int]:
    """Bytes predicted, and at the peak of a step."""
    import mlx.core as mx

    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.files.adapters import Lora, attach
    from mlx_diffgemma.model.network import Network
    from mlx_diffgemma.training import preparation
    from mlx_diffgemma.training.data import Ends, Example
    from mlx_diffgemma.training.settings import Settings
    from mlx_diffgemma.training.trainer import Trained, Trainer

    network = Network(ModelConfig.from_dict(size.config))
    preparation.initialize(network, 0)
    if not size.full:
        attach(network, Lora())
    mx.eval(network.parameters())
    settings = Settings(steps=SETTLED, batch_size=size.batch, checkpoint_layers=size.recompute, max_length=size.length)
    preparation.prepare(network, settings)
    prompt = tuple(range(3, 3 + size.length - size.canvas))
    examples = [Example(prompt=prompt, response=tuple(range(9 + i, 8 + i + size.canvas))) for i in range(size.batch)]
    predicted = preparation.memory_needed(network, settings, max(example.length for example in examples))
    run = Trainer(network, settings, examples=examples, held_out=[], ends=Ends(stop=106, fill=1), folder=folder)
    mx.clear_cache()
    mx.reset_peak_memory()
    peak = max(event.peak_memory_bytes for event in run.run() if isinstance(event, Trained))
    return {"predicted": predicted, "measured": peak}


@click.command()
@click.option("--only", help="Sizes by name, separated by semicolons.")
@click.option("--one", hidden=True, help="What a process measures.")
def main(only: str | None, one: str | None) -> None:
    if one is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(SIZES[one], Path(folder))))
        return
    print(f"{'':36}predicted  measured  predicted ÷ measured")
    for name in SIZES if only is None else only.split(";"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.train_memory", "--one", name], capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        predicted, measured = found["predicted"], found["measured"]
        print(f"{name:36}{predicted / 1e9:6.2f} GB {measured / 1e9:6.2f} GB  {predicted / measured:.2f}", flush=True)


if __name__ == "__main__":
    main()
