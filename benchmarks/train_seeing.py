"""Eyes for the built-in model, the second stage: the text model learns to read what the tower spells.

    python -m benchmarks.train_seeing build/eyes [--steps 1500]    behind `benchmarks.train_eyes build/eyes`
    python -m benchmarks.train_seeing build/eyes --score 200       cells, grids and solutions right on held-out pictures

The tower stays as it is. A projection is fitted by least squares, so that a soft token looks like the character that it
stands for, and trained on with an adapter on the text model: "Read this puzzle:" wants the grid as the text prompts
write it; "Solve this Sudoku:" wants it, too, and then the solution, as far behind it as in text prompts: reading and
solving know distances, and an adapter does not easily learn others. Both are attached only where a prompt has a
picture, so nothing that is asked in words changes. Writes mlx_diffgemma/demo/eyes as build/eyes/seeing:
model.safetensors, the tower and the projection under their names in a checkpoint; config.json with the ids around a
picture; adapter/; puzzle.png, which the demo shows. Where the folder has neither that nor a tower, what is shipped is
trained on.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks import train_demo
from benchmarks.puzzle_pictures import draw, look
from benchmarks.train_demo import HELD_OUT_SEED, grid_text
from benchmarks.train_eyes import ALPHABET, PICTURES, SIDE, VISION, Speller, spelled
from mlx_diffgemma import load
from mlx_diffgemma.disk import replacing
from mlx_diffgemma.files import adapters
from mlx_diffgemma.files.shipped import BUILT_IN, EYES
from mlx_diffgemma.generation import engine
from mlx_diffgemma.generation.events import Committed
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.model.blocks import Block
from mlx_diffgemma.model.network import Network, leaves
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.text.pictures.images import scaled
from mlx_diffgemma.training import objective
from mlx_diffgemma.training.objective import Batch

if TYPE_CHECKING:
    from PIL.Image import Image

BEGIN, SOFT, END = 378, 379, 380  # ids around and in a picture: the vocabulary's first unused ones
READ = ("Read this puzzle:", "Read this Sudoku:", "What is in this picture?")
SOLVE = train_demo.SUDOKU_ASKS
SOLVED = "\nsolved:\n"  # 5 tokens, as there are in a text prompt between grid and solution
TOWER, PROJECTION = "model.encoder.vision_tower.", "model.encoder.embed_vision.embedding_projection.weight"
GRID = 47  # characters, and tokens, of a grid
PLACE = 4  # of a picture, in a prompt's ids: behind <bos><|turn>user\n
LORA = adapters.Lora(rank=8, scale=2.0)
BATCH, RATE, WARMUP = 16, 1e-3, 50
HARD = (0.15, 0.6, 0.25)  # how often a batch learns each canvas of an answer: grid, solution, its last three cells


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Pictures of puzzles as the tower sees them."""

    soft: np.ndarray  # [N, 64, C] float32, before the projection
    puzzles: list[np.ndarray]  # [36] each
    solutions: list[str]  # "" for a grid that is none


def look_at(speller: Speller, seed: int, count: int, *, unseen: bool = False) -> Seen:
    """`count` pictures, drawn and looked at: three in four are puzzles that have a solution."""
    rng = np.random.default_rng([seed, 77])
    made = list(train_demo.sudokus(np.random.default_rng([seed, 78]), count, train_demo.HELD_OUT_GIVENS))
    puzzles, solutions = [], []
    for number, (puzzle, solution) in enumerate(made):
        cells = np.array([".123456".index(c) for c in puzzle if c in ".123456"])
        if number % 4 == 3:
            cells, solution = np.where(rng.random(36) < rng.uniform(0.05, 0.7), 0, rng.integers(1, 7, 36)), ""
        puzzles.append(cells)
        solutions.append(solution)
    soft = []
    for start in range(0, count, 32):
        pictures = [draw(rng, cells, look(rng, unseen=unseen)) for cells in puzzles[start : start + 32]]
        patches = np.stack([scaled("", picture, PICTURES, PICTURES.budget).patches() for picture in pictures])
        with torch.no_grad():
            soft.append(speller.soft(torch.from_numpy(patches)).numpy())
    return Seen(soft=np.concatenate(soft), puzzles=puzzles, solutions=solutions)


class Seeing(nn.Module):
    """The text model with an adapter, and the projection: all that is trained."""

    def __init__(self, network: Network, projection: mx.array):
        super().__init__()
        self.network = network
        self.embedding_projection = nn.Linear(VISION["hidden_size"], network.config.hidden_size, bias=False)
        self.embedding_projection.weight = projection

    def embed(self, tokens: mx.array, soft: mx.array) -> mx.array:
        """Ids [B, T] whose pictures all begin at PLACE, and what is in them [B, 64, C] → embeddings [B, T, H]."""
        x, start = self.network.embed(tokens), PLACE + 1
        return mx.concatenate([x[:, :start], self.project(soft), x[:, start + SIDE**2 :]], axis=1)

    def project(self, soft: mx.array) -> mx.array:
        return self.embedding_projection(mx.fast.rms_norm(soft, None, 1e-6))

    def loss(self, batch: Batch, soft: mx.array) -> mx.array:
        """The decoder's mean cross-entropy: the objective of training, without that of the encoder."""
        place = mx.arange(batch.tokens.shape[1])
        inside = (place > PLACE) & (place <= PLACE + SIDE**2)
        together = inside[:, None] & inside
        _, prefix = objective.read_clean(self.network, self.embed(batch.tokens, soft), together=together)
        signal = objective.first_look(self.network, batch, prefix) if batch.looks else None
        hidden = objective.denoise(self.network, batch.noisy, batch.starts, prefix, signal)
        return objective.cross_entropy(self.network, hidden.flatten(0, 1), batch.clean.flatten()).mean()


def fitted(network: Network, model: DiffusionGemma, seen: Seen) -> mx.array:
    """The projection [H, C] that makes soft tokens most like the embeddings of what they stand for."""
    ids = [model.tokenizer.encode(character)[0] for character in ALPHABET]
    wanted = np.array(network.embed(mx.array([ids])))[0][np.array([spelled(cells) for cells in seen.puzzles])]
    x = seen.soft / np.sqrt((seen.soft**2).mean(-1, keepdims=True) + 1e-6)
    x, y = x.reshape(-1, x.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    solved = np.linalg.solve(x.T @ x + 1e-3 * len(x) * np.eye(x.shape[1]), x.T @ y)
    return mx.array(solved.T.astype(np.float32))


def prompt(model: DiffusionGemma, ask: str) -> list[int]:
    """The ids of a message that is a picture and these words."""
    ids = model.tokenizer.apply_chat_template([{"role": "user", "content": ask}])
    return [*ids[:PLACE], BEGIN, *[SOFT] * SIDE**2, END, *ids[PLACE:]]


def asked(rng: np.random.Generator, seen: Seen, number: int) -> tuple[str, str]:
    """A question about a picture, and its answer."""
    if seen.solutions[number] and rng.random() < 0.9:
        return str(rng.choice(SOLVE)), solved(seen, number)
    return str(rng.choice(READ)), grid_text(seen.puzzles[number])


def solved(seen: Seen, number: int) -> str:
    """The whole answer to one who asks for a solution."""
    return grid_text(seen.puzzles[number]) + SOLVED + seen.solutions[number]


def batch(model: DiffusionGemma, seen: Seen, rng: np.random.Generator) -> tuple[Batch, mx.array]:
    """A batch of one canvas each, as training/batches makes them, and its pictures."""
    config, stop = model.config, model.generation_config.stop_ids[-1]
    size, chosen = config.canvas_length, rng.integers(0, len(seen.puzzles), BATCH)
    questions = [asked(rng, seen, int(number)) for number in chosen]
    prompts = [prompt(model, ask) for ask, _ in questions]
    answers = [[*model.tokenizer.encode(answer), stop] for _, answer in questions]
    counts = [-(-len(answer) // size) for answer in answers]
    canvases = np.minimum(rng.choice(len(HARD), p=HARD), np.array(counts) - 1).tolist()
    starts = [len(p) + size * number for p, number in zip(prompts, canvases, strict=True)]
    tokens = np.zeros((BATCH, max(starts)), np.int32)
    clean = np.full((BATCH, size), stop, np.int32)
    for row, (ids, answer, number) in enumerate(zip(prompts, answers, canvases, strict=True)):
        before, canvas = [*ids, *answer[: number * size]], answer[number * size : (number + 1) * size]
        tokens[row, : len(before)] = before
        clean[row, : len(canvas)] = canvas
    corrupt = rng.random((BATCH, size)) < rng.random((BATCH, 1))
    noisy = np.where(corrupt, rng.integers(config.vocab_size, size=(BATCH, size)), clean).astype(np.int32)
    made = Batch(
        tokens=mx.array(tokens),
        lengths=mx.array(starts, mx.int32),
        starts=mx.array(starts, mx.int32),
        clean=mx.array(clean),
        noisy=mx.array(noisy),
        looks=BATCH // 2,
    )
    return made, mx.array(seen.soft[chosen])


def train(folder: Path, steps: int, *, pictures: int, seed: int = 5, every: int = 250) -> Iterator[dict[str, Any]]:
    """Train, from what is there on, and save; yields what it measures `every` steps."""
    speller, model = speller_of(folder), load(BUILT_IN)
    seen, unseen = look_at(speller, seed, pictures), look_at(speller, HELD_OUT_SEED, 32, unseen=True)
    if start_of(folder):
        seeing = kept(folder, model)
        model.network.train()
    else:
        projection = fitted(model.network, model, seen)
        adapters.attach(model.network, LORA)
        seeing = Seeing(model.network, projection)
    for layer in model.network.decoder.layers:
        layer.experts = objective.AllExperts(layer.experts)  # few: quicker than gathering, also when answering
    rates = optim.join_schedules(
        [optim.linear_schedule(0, RATE, WARMUP), optim.cosine_decay(RATE, max(steps - WARMUP, 1))], [WARMUP]
    )
    optimizer = optim.AdamW(rates, betas=[0.9, 0.99], weight_decay=0.0, bias_correction=True)
    step_of = nn.value_and_grad(seeing, lambda made, soft: seeing.loss(made, soft))
    rng, began, total = np.random.default_rng(seed), time.perf_counter(), 0.0
    for step in range(steps):
        loss, gradients = step_of(*batch(model, seen, rng))
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(seeing, gradients)
        mx.eval(seeing.parameters(), optimizer.state)
        total += loss.item()
        if (step + 1) % every == 0 or step + 1 == steps:
            save(folder, seeing, speller)
            seconds = (time.perf_counter() - began) / (step + 1)
            right = score(model, seeing, unseen)
            yield {"step": step + 1, "loss": total / (step % every + 1), "seconds": seconds} | right
            total = 0.0


def start_of(folder: Path) -> Path | None:
    """What there is to go on with: what was saved, or what is shipped if the folder has no tower of its own."""
    if (folder / "seeing").is_dir():
        return folder / "seeing"
    return None if (folder / "state.pt").is_file() else EYES


def speller_of(folder: Path) -> Speller:
    """The tower; behind the first stage its head, too, which nobody asks here."""
    speller, source = Speller(), start_of(folder)
    if source is None:
        speller.load_state_dict(torch.load(folder / "state.pt")["speller"])
    else:
        weights = load_file(source / "model.safetensors")
        speller.tower.load_state_dict({n.removeprefix(TOWER): w for n, w in weights.items() if n.startswith(TOWER)})
    return speller


def kept(folder: Path, model: DiffusionGemma) -> Seeing:
    """What was saved or is shipped, around a model of its own."""
    source = start_of(folder) or folder / "seeing"
    adapters.load(model.network, source / "adapter")
    found: Any = mx.load(str(source / "model.safetensors"))
    return Seeing(model.network, found[PROJECTION])


def save(folder: Path, seeing: Seeing, speller: Speller) -> None:
    """What the package ships."""
    target = folder / "seeing"
    adapters.save(seeing.network, LORA, target / "adapter")
    tower = {TOWER + n: mx.array(w.numpy()) for n, w in speller.tower.state_dict().items()}
    projection = {PROJECTION: seeing.embedding_projection.weight}
    mx.save_safetensors(str(target / "model.safetensors"), tower | projection, {"format": "mlx"})
    ids = {"boi_token_id": BEGIN, "image_token_id": SOFT, "eoi_token_id": END}
    told = {**ids, "vision_soft_tokens_per_image": PICTURES.budget, "vision_config": VISION}
    with replacing(target / "config.json", "w") as stream:
        stream.write(json.dumps(told, indent=2) + "\n")
    shown().save(target / "puzzle.png", optimize=True)


def shown() -> "Image":
    """The picture that the demo and the pages show: a puzzle, a size and colours that nobody was trained on."""
    rng = np.random.default_rng([HELD_OUT_SEED, 9])
    [(puzzle, _)] = train_demo.sudokus(rng, 1, (16, 16))
    cells = np.array([".123456".index(c) for c in puzzle if c in ".123456"])
    how = look(rng, unseen=True)
    return draw(rng, cells, replace(how, noise=0, paper=(250, 247, 240), line=(120, 120, 130), ink=(20, 60, 190)))


def score(model: DiffusionGemma, seeing: Seeing, seen: Seen) -> dict[str, float]:
    """Cells and grids read right, alone and before a solution, and puzzles solved, by the engine and the default
    sampler."""
    puzzles = [number for number, solution in enumerate(seen.solutions) if solution]
    read = answers(model, seeing, seen, READ[0], range(len(seen.puzzles)))
    told = answers(model, seeing, seen, SOLVE[0], puzzles)
    alone = [_same(answer, grid_text(cells)) for answer, cells in zip(read, seen.puzzles, strict=True)]
    before = [_same(answer, grid_text(seen.puzzles[n])) for answer, n in zip(told, puzzles, strict=True)]
    behind = [_same(answer[GRID:], solved(seen, n)[GRID:]) for answer, n in zip(told, puzzles, strict=True)]
    right = [answer == solved(seen, number) for answer, number in zip(told, puzzles, strict=True)]
    return {
        "cells": float(np.mean(alone)),
        "grids": float(np.mean([share == 1 for share in alone])),
        "cells before": float(np.mean(before)),
        "grids before": float(np.mean([share == 1 for share in before])),
        "cells solved": float(np.mean(behind)),
        "solved": float(np.mean(right)),
    }


def _same(answer: str, wanted: str) -> float:
    """The share of a grid's cells that an answer has right."""
    places = [i for i, character in enumerate(wanted) if character in ".123456"]
    return sum(i < len(answer) and answer[i] == wanted[i] for i in places) / len(places)


def in_words(seen: Seen) -> float:
    """The share of the same puzzles that are solved when they are written into the prompt."""
    puzzles = [number for number, solution in enumerate(seen.solutions) if solution]
    told = load(BUILT_IN).generate([f"{SOLVE[0]}\n{grid_text(seen.puzzles[number])}" for number in puzzles], seed=1)
    assert isinstance(told, list)
    return float(np.mean([said.text == seen.solutions[number] for said, number in zip(told, puzzles, strict=True)]))


def answers(model: DiffusionGemma, seeing: Seeing, seen: Seen, ask: str, numbers: Sequence[int]) -> list[str]:
    """What the model says about these pictures."""
    ids, said = prompt(model, ask), list[str]()
    settings = model.generation_config.replace(max_tokens=3 * model.config.canvas_length)
    for start in range(0, len(numbers), BATCH):
        some = numbers[start : start + BATCH]
        noise = SeededNoise(list(some), length=model.config.canvas_length, vocabulary=model.config.vocab_size)
        blocks = [
            [Block(start=PLACE + 1, stop=PLACE + 1 + SIDE**2, features=_feature(seeing, seen, number))]
            for number in some
        ]
        told: list[list[int]] = [[] for _ in some]
        for event in engine.generate(model.network, [ids] * len(some), settings, noise, pictures=blocks):
            for row, committed in zip(told, event.rows if isinstance(event, Committed) else (), strict=False):
                row += committed.ids
        said += map(model.tokenizer.decode, told)
    return said


def _feature(seeing: Seeing, seen: Seen, number: int) -> Any:
    return lambda: seeing.project(mx.array(seen.soft[number]))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--steps", default=1500, help=f"Of {BATCH} questions.")
@click.option("--pictures", default=6_000, help="To learn from.")
@click.option("--seed", default=5, help="Of the pictures and the questions; another one to go on with.")
@click.option("--score", "held_out", type=int, help="Train nothing; score what is there on so many held-out pictures.")
def main(folder: Path, steps: int, pictures: int, seed: int, held_out: int | None) -> None:
    torch.set_num_threads(1)
    if held_out is None:
        for line in train(folder, steps, pictures=pictures, seed=seed):
            print(json.dumps(line), flush=True)
        return
    model = load(BUILT_IN)
    seeing = kept(folder, model)
    seen = look_at(speller_of(folder), HELD_OUT_SEED + 1, held_out, unseen=True)
    print(
        json.dumps(score(model, seeing, seen) | {"solved in words": in_words(seen), "adapter": _count(model.network)})
    )


def _count(network: Network) -> int:
    return sum(w.size for name, w in leaves(network.parameters()).items() if "lora" in name)


if __name__ == "__main__":
    main()
