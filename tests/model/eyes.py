"""The oracle for pictures: transformers' tower and projection with random weights, and ours with the same.

`truth` runs in float64 throughout (transformers' own code falls back to float32 in its norms; here it does not), with
the float32 angles that the reference defines; `rival` is transformers in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import torch
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig, Gemma4VisionConfig

from mlx_diffgemma.model.vision import Eyes, VisionConfig

torch.set_num_threads(1)


def vision_config(**changes: Any) -> dict[str, Any]:
    """`vision_config` as the released one, small: heads of 36 (as 72, no multiple of 8), a standardizing tower."""
    return {
        "model_type": "gemma4_vision",
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 36,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 10240,
        "standardize": True,
        "use_clipped_linears": False,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
        **changes,
    }


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A tower by its config, the text model's width, and a seed of its weights."""

    config: dict[str, Any]
    hidden_size: int
    seed: int

    def reference(self) -> torch.nn.ModuleDict:
        config = Gemma4VisionConfig(**self.config)
        config._attn_implementation = "sdpa"
        text = Gemma4TextConfig(hidden_size=self.hidden_size)
        parts = {
            "vision_tower": gemma4.Gemma4VisionModel(config),
            "embed_vision": gemma4.Gemma4MultimodalEmbedder(config, text),
        }
        model = torch.nn.ModuleDict(parts).eval().requires_grad_(False)
        random = torch.Generator().manual_seed(self.seed)
        for name, value in sorted((dict(model.named_parameters()) | dict(model.named_buffers())).items()):
            if "inv_freq" not in name:
                value.data.copy_(_weight(name, torch.randn(value.shape, generator=random)))
        return model

    def eyes(self, dtype: mx.Dtype = mx.float32) -> Eyes:
        made = Eyes(VisionConfig.from_dict(self.config), self.hidden_size)
        weights = {name: mx.array(value.numpy()).astype(dtype) for name, value in self.reference().state_dict().items()}
        made.load_weights(list(weights.items()), strict=True)
        return made


def _weight(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Values that keep activations near 1 and make every one matter."""
    if name.endswith("std_bias"):
        return 0.5 * noise * len(noise) ** 0.5
    if name.endswith("std_scale"):
        return (1 + 0.3 * noise) / len(noise) ** 0.5
    if name.endswith(("_min", "_max")):
        return torch.tensor(-1.2 if name.endswith("_min") else 1.4)
    if name.endswith("position_embedding_table"):
        return 0.3 * noise
    return 1 + 0.2 * noise if noise.ndim == 1 else noise / noise.shape[-1] ** 0.5


TOWERS = {
    "released": Tower(config=vision_config(), hidden_size=64, seed=0),
    "heads of 72": Tower(
        config=vision_config(hidden_size=64, head_dim=72, num_attention_heads=1, num_key_value_heads=1),
        hidden_size=48,
        seed=1,
    ),
    "heads of 64": Tower(
        config=vision_config(hidden_size=128, head_dim=64, intermediate_size=160, num_hidden_layers=4),
        hidden_size=96,
        seed=2,
    ),
    "shared keys, clipped": Tower(
        config=vision_config(
            num_attention_heads=4, num_key_value_heads=2, head_dim=20, standardize=False, use_clipped_linears=True
        ),
        hidden_size=64,
        seed=3,
    ),
    "small patches": Tower(
        config=vision_config(
            hidden_size=64, head_dim=32, patch_size=8, pooling_kernel_size=2, rms_norm_eps=1e-5, num_hidden_layers=2
        ),
        hidden_size=32,
        seed=4,
    ),
}


@cache
def _references(name: str) -> tuple[torch.nn.ModuleDict, torch.nn.ModuleDict]:
    return TOWERS[name].reference().double(), TOWERS[name].reference()


@dataclass(frozen=True)
class Case:
    """One picture for one tower: noise of rows × columns patches."""

    tower: str
    rows: int
    columns: int

    def patches(self) -> np.ndarray:
        size = 3 * TOWERS[self.tower].config["patch_size"] ** 2
        random = np.random.default_rng([self.rows, self.columns])
        return random.random((self.rows * self.columns, size), np.float32)


@cache
def expected(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Soft tokens [n, H]: truth and rival."""
    truth, rival = _references(case.tower)
    return features(truth, case), features(rival, case)


def features(model: torch.nn.ModuleDict, case: Case) -> np.ndarray:
    """transformers' soft tokens of an unpadded picture, in the dtype of its weights."""
    dtype = next(model.parameters()).dtype
    rows, columns = divmod(np.arange(case.rows * case.columns), case.columns)
    positions = torch.from_numpy(np.stack([columns, rows], axis=-1))[None]
    with torch.no_grad(), float64_throughout() if dtype == torch.float64 else nullcontext():
        pixels = torch.from_numpy(case.patches())[None].to(dtype if dtype == torch.float64 else torch.float32)
        pooled = model["vision_tower"](pixels, positions).last_hidden_state
        return model["embed_vision"](pooled).to(torch.float64).numpy()


@contextmanager
def float64_throughout() -> Iterator[None]:
    """`.float()` keeps float64, in all but the angles of the rotation."""
    to_float32 = torch.Tensor.float

    def rotation(self: Any, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (to_float32(positions)[..., None] * self.inv_freq.to(torch.float32)).double()
        return self.recomposition_frequencies(angles.cos()), self.recomposition_frequencies(angles.sin())

    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(gemma4.Gemma4VisionRotaryEmbedding, "forward", rotation),
    ):
        yield


def ours(eyes: Eyes, case: Case) -> np.ndarray:
    return np.array(eyes.see(mx.array(case.patches()), case.columns).astype(mx.float32))


def ratio(eyes: Eyes, case: Case) -> float:
    """Our RMS error in units of the rival's."""
    truth, rival = expected(case)
    return rms(ours(eyes, case) - truth) / rms(rival - truth)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


MEDIAN, WORST = 1.2, 2.0  # bounds of the ratio


def cases(budgets: tuple[int, ...], shapes: tuple[tuple[int, int], ...]) -> list[Case]:
    """Pictures of these shapes at these budgets, for every tower that can hold them."""
    from mlx_diffgemma.text.pictures.images import PictureConfig, scaled_size

    made = []
    for name, tower in TOWERS.items():
        patch = tower.config["patch_size"]
        config = PictureConfig(patch_size=patch, pooling=tower.config["pooling_kernel_size"])
        for budget in budgets:
            for width, height in shapes:
                wide, high = scaled_size(width, height, budget, config)
                made.append(Case(name, high // patch, wide // patch))
    return list(dict.fromkeys(made))
