"""Whole runs of transformers' `generate` with pictures on trained weights: the built-in model's eyes, their adapter
fused into the text model. The same guesses, accepted sets, steps and ids."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import puzzle_pictures, train_demo
from benchmarks.train_demo import HELD_OUT_SEED
from benchmarks.train_seeing import SOLVED
from convert import record_reference as reference
from mlx_diffgemma import load
from mlx_diffgemma.files import adapters
from mlx_diffgemma.files.shipped import BUILT_IN, EYES
from mlx_diffgemma.files.weights import load_network, write_model
from mlx_diffgemma.model.vision import Eyes
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.proof.recordings import Recording
from mlx_diffgemma.proof.replay import replay_trajectory

torch.set_num_threads(1)


@dataclass(frozen=True)
class OfTheBuiltIn(Recording):
    own: Eyes

    def eyes(self) -> Eyes:
        return self.own


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return load()


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model that sees, as one checkpoint in the released layout."""
    home = tmp_path_factory.mktemp("fused")
    (home / "eyes").mkdir()
    config = json.loads((BUILT_IN / "config.json").read_text()) | json.loads((EYES / "config.json").read_text())
    (home / "eyes" / "config.json").write_text(json.dumps(config))
    (home / "eyes" / "model.safetensors").write_bytes((EYES / "model.safetensors").read_bytes())
    network = load_network(BUILT_IN)
    adapters.load(network, EYES / "adapter")
    adapters.fuse(network)
    write_model(network, home / "eyes", home / "model")
    return home / "model"


def drawn(seed: int) -> tuple[Any, dict[str, str]]:
    """A picture that nobody trained on, and what is to be said about it."""
    rng = np.random.default_rng([HELD_OUT_SEED, 11, seed])
    [(puzzle, solution)] = train_demo.sudokus(rng, 1, train_demo.HELD_OUT_GIVENS)
    cells = np.array([".123456".index(c) for c in puzzle if c in ".123456"])
    picture = puzzle_pictures.draw(rng, cells, puzzle_pictures.look(rng, unseen=True))
    return picture, {READ: puzzle, SOLVE: puzzle + SOLVED + solution}


READ, SOLVE = "Read this puzzle:", "Solve this Sudoku:"
RUNS: dict[str, list[tuple[str, tuple[int, ...]]]] = {  # a row: what is asked, and the pictures before it
    "one": [(READ, (1,))],
    "another": [(READ, (2,))],
    "read-and-solved": [(SOLVE, (3,))],
    "two-pictures": [(READ, (4, 5))],
    "a-batch": [(READ, (6,)), (READ, (7,))],
    "beside-a-text": [(READ, (8,)), ("Sort these names:\nZoe, Ada, Kim", ())],
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_accepted_sets_steps_and_ids(name: str, fused: Path, model: DiffusionGemma) -> None:
    prompts, pictures = list[list[int]](), list[list[np.ndarray]]()
    for text, seeds in RUNS[name]:
        parts = [{"type": "image", "image": drawn(seed)[0]} for seed in seeds]
        prompt = model.read([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])
        prompts.append(prompt.ids)
        pictures.append([squares(placed.picture.draw()) for placed in prompt.pictures])
    settings = reference.DEFAULTS | {"stop_ids": [1, 106], "max_tokens": 144 if SOLVE in RUNS[name][0] else 48}
    recorded = reference.with_margins(
        reference.built_in_model(fused), lambda seed: prompts, settings, lambda seed: pictures
    )
    recording = OfTheBuiltIn(name=name, arrays=recorded[0], provenance=recorded[1], own=model.seeing.eyes)
    assert replay_trajectory(recording, load_network(fused)) == []
    text, seeds = RUNS[name][0]
    if len(seeds) == 1:
        said = model.tokenizer.decode(
            [i for i in recorded[0]["committed"][:, 0].flatten().tolist() if i not in (0, 106)]
        )
        wanted = drawn(seeds[0])[1][text]
        assert len(said) == len(wanted)
        assert np.mean([a == b for a, b in zip(said, wanted, strict=True)]) > 0.95


def squares(pixels: np.ndarray) -> np.ndarray:
    """A picture's pixels as the recorder takes them: uint8 [rows, columns, 3 · patch²]."""
    high, wide, _ = pixels.shape
    return pixels.reshape(high // 8, 8, wide // 8, 8, 3).swapaxes(1, 2).reshape(high // 8, wide // 8, -1)
