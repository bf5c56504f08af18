"""The built-in model: what is shipped is a real checkpoint, small, and does what its page says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import demo_score, train_demo
from mlx_diffgemma import load
from mlx_diffgemma.files.checkpoint import open_checkpoint
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.results import Result

DEMO = BUILT_IN


@pytest.fixture(scope="module")
def demo() -> DiffusionGemma:
    return load(DEMO)


def test_it_fits_the_wheel() -> None:
    assert sum(file.stat().st_size for file in DEMO.rglob("*")) <= 8e6


def test_it_has_every_feature_of_the_released_model() -> None:
    config = open_checkpoint(DEMO).config
    assert {layer.kind for layer in config.layers} == {"sliding_attention", "full_attention"}
    assert not config.layers[-1].is_sliding
    assert 1 < config.top_k_experts < config.num_experts
    assert config.layers[-1].rotated_dims < config.layers[-1].head_dim


def test_tokenizer_and_configs_are_those_the_recipe_writes(tmp_path: Path) -> None:
    train_demo.write_model(tmp_path)
    for file in tmp_path.iterdir():
        if file.name == "model.safetensors":  # there, of the vision tower alone
            continue
        assert file.read_bytes() == (DEMO / file.name).read_bytes(), file.name


def test_every_text_comes_back_from_its_ids(demo: DiffusionGemma) -> None:
    for example in train_demo.structured(5, 60):
        for text in (example.prompt, example.answer):
            assert demo.tokenizer.decode(demo.tokenizer.encode(text)) == text
    assert demo.tokenizer.decode(demo.tokenizer.encode("Grüße, 東京 🙂")) == "Grüße, 東京 🙂"


def test_digits_and_markers_have_ids_of_their_own(demo: DiffusionGemma) -> None:
    ids = demo.tokenizer.apply_chat_template([{"role": "user", "content": "Solve this Sudoku:\n12. 4.6"}])
    assert ids[:2] == [2, 105]
    assert ids.count(106) == 1
    digits = [demo.tokenizer.encode(digit) for digit in "0123456789"]
    assert all(len(digit) == 1 for digit in digits)


def test_a_sudoku_answer_fills_one_canvas(demo: DiffusionGemma) -> None:
    example = next(train_demo.sudoku(1, 1))
    assert len(demo.tokenizer.encode(example.answer)) + 1 == demo.config.canvas_length


def test_puzzles_have_one_solution() -> None:
    """Counted by trying everything, independently of the generator's rule."""

    def solutions(grid: list[int], limit: int = 2) -> int:
        if 0 not in grid:
            return 1
        cell = grid.index(0)
        row, column = divmod(cell, 6)
        seen = {grid[p] for p in range(36) if p // 6 == row or p % 6 == column}
        seen |= {grid[p] for p in range(36) if p // 12 == row // 2 and p % 6 // 3 == column // 3}
        found = 0
        for digit in {1, 2, 3, 4, 5, 6} - seen:
            found += solutions([*grid[:cell], digit, *grid[cell + 1 :]], limit - found)
            if found >= limit:
                break
        return found

    for puzzle, solution in train_demo.sudokus(np.random.default_rng(3), 20, train_demo.HELD_OUT_GIVENS):
        cells = [int(c) if c != "." else 0 for c in puzzle if c in ".123456"]
        assert 20 <= sum(c > 0 for c in cells) <= 28
        assert solutions(cells) == 1
        assert all(p in (s, ".") for p, s in zip(puzzle, solution, strict=True))


@pytest.mark.parametrize("task", [*train_demo.TASKS, "sudoku"])
def test_it_answers_held_out_questions(demo: DiffusionGemma, task: str) -> None:
    """Fewer of each task than benchmarks/demo_score.py asks, and a wide margin: a wrong network fails this."""
    score = demo_score.score(demo, demo_score.held_out(task, 20), [0])
    assert score["exact"] >= 0.75
    assert score["settled"] >= 0.85


def test_transformers_solves_the_same_puzzles(demo: DiffusionGemma) -> None:
    """The same files, loaded by transformers' own class, with its own sampler and noise."""
    import torch
    from transformers import DiffusionGemmaForBlockDiffusion

    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(DEMO, dtype=torch.float32, output_loading_info=True)
    model, found = loaded
    assert not any(found.values())  # no weight missing, none left over
    torch.manual_seed(0)
    for example in train_demo.sudoku(train_demo.HELD_OUT_SEED, 3):
        prompt = demo.tokenizer.apply_chat_template([{"role": "user", "content": example.prompt}])
        with torch.no_grad():
            made = model.generate(torch.tensor([prompt]), max_new_tokens=48)
        assert demo.tokenizer.decode(made.sequences[0, len(prompt) :].tolist()) == example.answer
        ours = demo.generate(example.prompt, seed=0)
        assert isinstance(ours, Result)
        assert ours.text == example.answer


def test_the_chat_template_is_the_released_ones_shape(demo: DiffusionGemma) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Sort these names:"},
    ]
    text = demo.tokenizer.render(messages)
    assert text == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello<turn|>\n"
        "<|turn>user\nSort these names:<turn|>\n<|turn>model\n"
    )
    assert json.loads((DEMO / "generation_config.json").read_text())["max_denoising_steps"] == 48
