"""What a training run may choose. Source of the defaults: TRL (sft_diffusion_gemma) and google-deepmind/gemma."""

from dataclasses import dataclass

from ..errors import TrainingError


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
