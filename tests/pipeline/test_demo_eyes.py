"""The built-in model's eyes: what was drawn is read and solved, on pictures of sizes and colours that nobody trained
on, and nothing that is asked in words changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import puzzle_pictures, train_demo, train_seeing
from benchmarks.train_demo import HELD_OUT_SEED, grid_text
from mlx_diffgemma import load
from mlx_diffgemma.cli import main
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.files.shipped import EYES
from mlx_diffgemma.model.sharing.share import Share
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.results import Result
from mlx_diffgemma.terminal.scenes import SEEN, SUDOKU
from mlx_diffgemma.terminal.thumbnail import COLUMNS, thumbnail

COUNT = 12


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return load()


def asked(picture: Any, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def answers(model: DiffusionGemma, prompts: list[Any]) -> list[str]:
    results = model.generate(prompts, seed=1)
    assert isinstance(results, list)
    return [result.text for result in results]


def one(result: Result | list[Result]) -> Result:
    assert isinstance(result, Result)
    return result


@pytest.fixture(scope="module")
def held_out() -> list[tuple[Any, np.ndarray, str]]:
    """Pictures, what is in them, and the solutions."""
    rng = np.random.default_rng([HELD_OUT_SEED, 5])
    found = []
    for puzzle, solution in train_demo.sudokus(rng, COUNT, train_demo.HELD_OUT_GIVENS):
        cells = np.array([".123456".index(c) for c in puzzle if c in ".123456"])
        picture = puzzle_pictures.draw(rng, cells, puzzle_pictures.look(rng, unseen=True))
        found.append((picture, cells, solution))
    return found


def test_grids_are_read_as_prompts_write_them(model: DiffusionGemma, held_out: list[Any]) -> None:
    read = answers(model, [asked(picture, "Read this puzzle:") for picture, _, _ in held_out])
    cells = [
        [a == b for a, b in zip(text, grid_text(cells), strict=False)]
        for text, (_, cells, _) in zip(read, held_out, strict=True)
    ]
    assert np.mean([same for row in cells for same in row]) >= 0.97


def test_puzzles_are_read_and_then_solved(model: DiffusionGemma, held_out: list[Any]) -> None:
    told = answers(model, [asked(picture, "Solve this Sudoku:") for picture, _, _ in held_out])
    wanted = [f"{grid_text(cells)}\nsolved:\n{solution}" for _, cells, solution in held_out]
    assert np.mean([a == b for a, b in zip(told, wanted, strict=True)]) >= 0.8


def test_words_alone_are_answered_as_if_there_were_no_eyes(model: DiffusionGemma) -> None:
    def felt(of: DiffusionGemma) -> tuple[Any, ...]:
        result = one(of.generate(SUDOKU.prompt, seed=SUDOKU.seed))
        return result.tokens, [canvas.mean_entropy for canvas in result.canvases]

    model.generate([SEEN.message], seed=1)
    assert felt(model) == felt(load())
    assert model.seeing.network is not model.network


def test_the_shipped_puzzle_is_read_from_the_command_line() -> None:
    told = CliRunner().invoke(main, ["generate", "--image", str(EYES / "puzzle.png"), "--prompt", SEEN.prompt])
    assert told.exit_code == 0, told.output
    assert told.stdout.startswith(".1. 5.4\n.25 ...\n5.. 43.\n13. .5.\n..6 3.5\n... 6.2")
    assert (np.asarray(train_seeing.shown()) == np.asarray(_opened(EYES / "puzzle.png"))).all()
    assert "421 × 403 → 128 × 128, 64 tokens of 70" in told.stderr


def test_the_shipped_puzzle_is_solved_from_the_command_line() -> None:
    told = CliRunner().invoke(main, ["generate", "--image", str(EYES / "puzzle.png"), "-p", "Solve this Sudoku:"])
    assert told.exit_code == 0, told.output
    read, solution = told.stdout.strip().split("\nsolved:\n")
    assert read == ".1. 5.4\n.25 ...\n5.. 43.\n13. .5.\n..6 3.5\n... 6.2"
    assert all(a == b for a, b in zip(read, solution, strict=True) if a != ".") and "." not in solution
    cells = np.array([[int(cell) for cell in line.replace(" ", "")] for line in solution.split("\n")])
    boxes = cells.reshape(3, 2, 2, 3).swapaxes(1, 2).reshape(6, 6)
    assert all(set(unit) == set(range(1, 7)) for unit in (*cells, *cells.T, *boxes))


def _opened(file: Path) -> Any:
    from PIL import Image

    return Image.open(file)


def test_prompts_are_what_the_eyes_were_trained_with(model: DiffusionGemma) -> None:
    prompt = model.read(asked(EYES / "puzzle.png", "Read this puzzle:"))
    assert prompt.ids == train_seeing.prompt(model, "Read this puzzle:")


def test_a_conversation_looks_once_and_goes_on_in_words(model: DiffusionGemma) -> None:
    before, chat = model.seeing.looks.taken, model.chat()
    picture = train_seeing.shown().rotate(0)
    first = chat.send(asked(picture, "Read this puzzle:")[0]["content"], seed=1)
    chat.send("Sort these names:\nZoe, Ada", seed=1)
    assert first.pictures and model.seeing.looks.taken <= before + 1


def test_another_adapter_and_pictures_do_not_go_together() -> None:
    model = load(adapter=EYES / "adapter")
    assert one(model.generate(SUDOKU.prompt, seed=1)).text
    with pytest.raises(ConfigError, match="sees by an adapter of its own"):
        model.read([SEEN.message])


def test_machines_that_share_the_model_see_nothing() -> None:
    model = load()
    model.network.tuning = replace(model.network.tuning, share=Share(0, 2))
    with pytest.raises(ConfigError, match="several machines share one without"):
        model.read([SEEN.message])


def test_a_thumbnail_has_two_pixels_a_character(model: DiffusionGemma) -> None:
    [placed] = model.read([SEEN.message]).pictures
    lines = thumbnail(placed.picture).plain.split("\n")
    assert len(lines) == COLUMNS // 2 and {len(line) for line in lines} == {COLUMNS}
