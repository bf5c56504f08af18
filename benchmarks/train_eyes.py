"""Eyes for the built-in model, the first stage: a tower whose soft tokens spell the grid that it sees.

    python -m benchmarks.train_eyes build/eyes [--steps 12000]     train, or go on where it was interrupted
    python -m benchmarks.train_eyes build/eyes --score 320         cells and whole grids right on held-out pictures

Gemma 4's vision tower, as transformers builds it, is given pictures of grids (`puzzle_pictures`). The soft token in row
r and column c learns to say character c of line r of the grid as the text prompts write it, through a linear head that
is thrown away: what a text model then finds in the picture's place is the grid, spelled. Writes tower.safetensors,
with the checkpoint's names. A batch is a function of its number, so an interrupted run ends with the same bits.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.puzzle_pictures import draw, look
from benchmarks.train_demo import HELD_OUT_SEED, grid_text
from mlx_diffgemma.disk import replacing
from mlx_diffgemma.text.pictures.images import PictureConfig, scaled

PICTURES = PictureConfig(patch_size=8, pooling=2, budget=70)
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 32,
    "num_hidden_layers": 2,
    "patch_size": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 140,  # patches to a side of the longest strip that a budget of 70 allows
    "standardize": False,
}
SIDE = 8  # soft tokens to a side: all pictures here are nearly square
ALPHABET = ".123456 \n"  # the first seven as the cells' numbers
CELLS = [row * SIDE + column + column // 3 for row in range(6) for column in range(6)]  # the soft token of each cell
BATCH, RATE, WARMUP, COOLING = 16, 2e-3, 200, 0.3  # the last 0.3 of the steps, the rate falls to nothing
SEED = 1


def batch(seed: int, number: int, *, unseen: bool = False, hard: float = 1, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Patches [B, 256, 192] and cells [B, 36] of pictures that depend on seed and number only. Between 5 and 70 % of a
    picture's cells are empty, and the digits follow no rule, so that every one of them must be read."""
    rng = np.random.default_rng([seed, number])
    empty = rng.random((size, 36)) < rng.uniform(0.05, 0.7, (size, 1))
    cells = np.where(empty, 0, rng.integers(1, 7, (size, 36)))
    pictures = [draw(rng, grid, look(rng, unseen=unseen, hard=hard)) for grid in cells]
    patches = np.stack([scaled("", picture, PICTURES, PICTURES.budget).patches() for picture in pictures])
    return torch.from_numpy(patches), torch.from_numpy(cells)


def spelled(cells: np.ndarray) -> list[int]:
    """Cells [36] → for each of the 64 soft tokens the character, as its number in ALPHABET; what is left are line
    ends."""
    lines = grid_text(cells).split("\n") + [""] * (SIDE - 6)
    return [ALPHABET.index(character) for line in lines for character in line.ljust(SIDE, "\n")]


class Speller(nn.Module):
    """The tower, and the head that is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Gemma4VisionConfig, Gemma4VisionModel

        self.tower = Gemma4VisionModel(Gemma4VisionConfig(**VISION))
        self.head = nn.Linear(VISION["hidden_size"], len(ALPHABET))
        with torch.no_grad():  # the default's 0.02 and ones would leave a tower of this width asleep
            for weight in self.tower.parameters():
                if weight.ndim == 2:
                    weight.normal_(std=weight.shape[1] ** -0.5)
            table = self.tower.patch_embedder.position_embedding_table
            table[:, : 2 * SIDE].normal_(std=0.5)
            table[:, 2 * SIDE :] = 0
        row, column = np.divmod(np.arange(4 * SIDE**2), 2 * SIDE)
        self.places = torch.from_numpy(np.stack([column, row], axis=-1))

    def soft(self, patches: Tensor) -> Tensor:
        """[B, 256, 192] → the soft tokens before a projection, [B, 64, C]."""
        places = self.places.expand(len(patches), -1, -1)
        return self.tower(pixel_values=patches, pixel_position_ids=places).last_hidden_state.unflatten(
            0, (len(patches), -1)
        )

    def forward(self, patches: Tensor) -> Tensor:
        """[B, 256, 192] → what each soft token says, [B, 64, alphabet]."""
        soft = self.soft(patches)
        return self.head(nn.functional.rms_norm(soft, soft.shape[-1:], eps=1e-6))  # as the projection norms them


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, from 0."""
    return RATE * min(1, (step + 1) / WARMUP, (steps - step) / (COOLING * steps))


def train(folder: Path, steps: int, *, size: int = BATCH, every: int = 100) -> Iterator[dict[str, Any]]:
    """Train to the last step, from the state in `folder` on if there is one; yields what it measures `every` steps."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    speller = Speller()
    optimizer = torch.optim.AdamW(speller.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    first = _resume(folder, speller, optimizer)
    began, total = time.perf_counter(), 0.0
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        patches, cells = batch(SEED, step, hard=min(1, 3 * step / steps), size=size)
        targets = torch.tensor([spelled(grid) for grid in cells.numpy()])
        loss = nn.functional.cross_entropy(speller(patches).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(speller.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % every == 0 or step + 1 == steps:
            _save(folder, speller, optimizer, step + 1)
            seconds = (time.perf_counter() - began) / (step + 1 - first)
            yield {"step": step + 1, "loss": total / ((step - first) % every + 1), "seconds": seconds} | score(
                speller, 64
            )
            total = 0.0


def _resume(folder: Path, speller: Speller, optimizer: torch.optim.Optimizer) -> int:
    """The step of the state in `folder`, 0 without one."""
    if not (folder / "state.pt").is_file():
        return 0
    state = torch.load(folder / "state.pt")
    speller.load_state_dict(state["speller"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _save(folder: Path, speller: Speller, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"speller": speller.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with replacing(folder / "state.pt", "wb") as stream:
        torch.save(state, stream)
    save_file(
        {f"vision_tower.{name}": w for name, w in speller.tower.state_dict().items()}, folder / "tower.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"vision_config": VISION}, indent=2) + "\n")


@torch.no_grad()
def score(speller: Speller, count: int) -> dict[str, float]:
    """The share of cells, and of whole grids, read right on `count` held-out pictures: sizes and hues nobody trained
    on."""
    right = []
    for number in range(-(-count // BATCH)):
        patches, cells = batch(HELD_OUT_SEED, number, unseen=True)
        right.append(speller(patches)[:, CELLS, :7].argmax(-1) == cells)
    every = torch.cat(right)[:count]
    return {"cells": every.float().mean().item(), "grids": every.all(1).float().mean().item()}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--steps", default=12_000, help=f"Of {BATCH} pictures.")
@click.option("--score", "pictures", type=int, help="Train nothing; score what is there on so many held-out pictures.")
def main(folder: Path, steps: int, pictures: int | None) -> None:
    torch.set_num_threads(1)
    if pictures is None:
        for line in train(folder, steps):
            print(json.dumps(line), flush=True)
        return
    speller = Speller()
    speller.load_state_dict(torch.load(folder / "state.pt")["speller"])
    print(json.dumps(score(speller, pictures)))


if __name__ == "__main__":
    main()
