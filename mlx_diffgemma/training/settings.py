"""What a training run may choose. Source of the defaults: TRL (sft_diffusion_gemma) and google-deepmind/gemma."""

from dataclasses import dataclass
from typing import Any

from ..errors import TrainingError
from ..values import Field, Kind, Table, Unfit, flag, integer, many, number, one_of


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
    fill: str = "eos"  # what fills the canvas behind an answer's <turn|>: as TRL and Google's recipes, or "turn" again
    train_router: bool = False
    checkpoint_layers: bool = False  # recompute layers in the backward pass: less memory, a third more time
    max_length: int = 4096  # longer examples are left out
    seed: int = 0
    evaluate_every: int = 100
    save_every: int = 100
    keep: int = 2  # newest checkpoints that stay

    def __post_init__(self) -> None:
        for option in OPTIONS.fields:
            value = option.kind.read(getattr(self, option.name), option.name, fault=TrainingError)
            object.__setattr__(self, option.name, value)


def _pair() -> Kind:
    kind = many(number(least=0))

    def take(value: Any) -> tuple[float, ...]:
        pair = kind.take(value)
        if len(pair) != 2 or max(pair) >= 1:
            raise Unfit(words, value)
        return pair

    words = "two numbers of at least 0 and less than 1"
    return Kind(words, take)


_COUNT = integer(least=1, most=1_000_000_000)
OPTIONS = Table(
    *(Field(name, _COUNT) for name in ("steps", "batch_size", "accumulate")),
    Field("learning_rate", number(above=0, most=1000)),
    Field("final_rate", number(least=0, most=1)),
    Field("warmup", integer(least=0, most=1_000_000_000)),
    Field("betas", _pair()),
    Field("weight_decay", number(least=0, most=1000)),
    Field("clip", number(least=0)),
    Field("optimizer", one_of("adamw", "muon")),
    Field("self_conditioning", number(least=0, most=1)),
    Field("encoder_weight", number(least=0, most=1000)),
    Field("fill", one_of("eos", "turn")),
    *(Field(name, flag) for name in ("train_router", "checkpoint_layers")),
    Field("seed", integer(least=0, most=1 << 62)),
    *(Field(name, _COUNT) for name in ("max_length", "evaluate_every", "save_every", "keep")),
)
