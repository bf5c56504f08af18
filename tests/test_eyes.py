"""The pictures that eyes are trained on, and both stages of training them."""

import colorsys
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from benchmarks import puzzle_pictures, train_eyes, train_seeing
from benchmarks.train_demo import grid_text
from mlx_diffgemma.files.shipped import EYES
from mlx_diffgemma.model.vision import Eyes
from mlx_diffgemma.model.vision_config import VisionConfig
from mlx_diffgemma.text.pictures.images import scaled

TOWER = VisionConfig.from_dict(train_eyes.VISION)


def looks(*, unseen: bool) -> list[puzzle_pictures.Look]:
    rng = np.random.default_rng(7)
    return [puzzle_pictures.look(rng, unseen=unseen) for _ in range(200)]


def hue(look: puzzle_pictures.Look) -> float:
    return colorsys.rgb_to_hsv(*look.ink)[0]


def test_held_out_pictures_share_neither_sizes_nor_hues_with_the_others() -> None:
    seen, unseen = looks(unseen=False), looks(unseen=True)
    assert not {look.size for look in seen} & {look.size for look in unseen}
    bright = [look for look in seen + unseen if max(look.ink) - min(look.ink) > 30]  # bytes of a dark hue are coarse
    for look in bright:
        middle = sum(puzzle_pictures.UNSEEN_HUES) / 2
        assert (abs(hue(look) - middle) < 0.11) == (look in unseen) or abs(abs(hue(look) - middle) - 0.1) < 0.02


def test_every_picture_fills_the_budget_with_a_square_of_soft_tokens() -> None:
    for number, look in enumerate(looks(unseen=False) + looks(unseen=True)):
        if number % 20 == 0:
            picture = puzzle_pictures.draw(np.random.default_rng(0), np.zeros(36, int), look)
            seen = scaled("", picture, train_eyes.PICTURES, 70)
            assert (seen.size, seen.tokens) == ((128, 128), train_eyes.SIDE**2)


def test_a_digit_is_drawn_inside_its_cell() -> None:
    rng = np.random.default_rng(3)
    for cell in range(36):
        look = puzzle_pictures.look(rng)
        cells = np.zeros(36, int)
        empty = np.asarray(puzzle_pictures.draw(np.random.default_rng(0), cells, look)).astype(int)
        cells[cell] = 1 + cell % 6
        drawn = np.asarray(puzzle_pictures.draw(np.random.default_rng(0), cells, look)).astype(int)
        ys, xs = np.nonzero(np.abs(drawn - empty).max(axis=-1))
        row, column = divmod(cell, 6)
        for places, corner, index in ((xs, look.corner[0], column), (ys, look.corner[1], row)):
            assert len(places)
            assert (places >= corner + index * look.cell - 1).all()
            assert (places <= corner + (index + 1) * look.cell + 1).all()


def test_soft_tokens_spell_the_grid_as_prompts_write_it() -> None:
    cells = np.random.default_rng(1).integers(0, 7, 36)
    said = "".join(train_eyes.ALPHABET[i] for i in train_eyes.spelled(cells))
    assert said.rstrip("\n") == grid_text(cells)
    assert np.array_equal(np.array(train_eyes.spelled(cells))[train_eyes.CELLS], cells)


def test_the_tower_in_training_is_the_tower_that_looks() -> None:
    """Patch 8 and pool 2, in transformers and here."""
    torch.manual_seed(0)
    speller = train_eyes.Speller().eval()
    patches, _ = train_eyes.batch(5, 0, size=2)
    with torch.no_grad():
        places = speller.places.expand(2, -1, -1)
        theirs = speller.tower(pixel_values=patches, pixel_position_ids=places).last_hidden_state.reshape(2, 64, -1)
    ours = Eyes(TOWER, 128).vision_tower
    ours.load_weights([(name, mx.array(w.numpy())) for name, w in speller.tower.state_dict().items()])
    for one, expected in zip(patches.numpy(), theirs.numpy(), strict=True):
        assert np.abs(np.array(ours(mx.array(one), 16)) - expected).max() < 1e-4 * np.abs(expected).max()


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_eyes, "score", lambda speller, count: {})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    list(train_eyes.train(whole, 4, size=2, every=1))
    steps = [line["step"] for line in islice(train_eyes.train(parts, 4, size=2, every=1), 2)]
    assert steps == [1, 2]
    assert [line["step"] for line in train_eyes.train(parts, 4, size=2, every=1)] == [3, 4]
    assert (whole / "tower.safetensors").read_bytes() == (parts / "tower.safetensors").read_bytes()


def test_without_a_tower_of_its_own_the_second_stage_trains_what_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_seeing, "score", lambda model, seeing, seen: {})
    [line] = train_seeing.train(tmp_path, 2, pictures=4)
    made: Any = mx.load(str(tmp_path / "seeing" / "model.safetensors"))
    shipped: Any = mx.load(str(EYES / "model.safetensors"))
    assert made.keys() == shipped.keys()
    changed = [name for name in made if not mx.array_equal(made[name], shipped[name])]
    assert line["step"] == 2 and changed == [train_seeing.PROJECTION]
    for name in ("config.json", "puzzle.png"):
        assert (tmp_path / "seeing" / name).read_bytes() == (EYES / name).read_bytes()
