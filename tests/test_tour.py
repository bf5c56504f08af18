"""The notebook: every code cell runs, in order, and what it shows draws itself. No Jupyter is needed for that."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_diffgemma import Committed, Denoised

FILE = Path(__file__).parent.parent / "docs" / "tour.ipynb"
NOTEBOOK = json.loads(FILE.read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


class Display:
    """IPython's `display`: keeps what a notebook would show, and can be updated."""

    def __init__(self) -> None:
        self.shown: list[Any] = []

    def __call__(self, thing: Any, *, display_id: bool = False) -> "Display":
        self.shown.append(thing)
        return self

    def update(self, thing: Any) -> None:
        self.shown.append(thing)


def run(cell: str, names: dict[str, Any]) -> Any:
    """Run a cell; its value is that of its last expression, as in a notebook."""
    *body, last = ast.parse(cell).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], ast.Expr(ast.Constant(None))
    exec(compile(ast.fix_missing_locations(ast.Module(body, [])), FILE.name, "exec"), names)
    return eval(compile(ast.fix_missing_locations(ast.Expression(last.value)), FILE.name, "eval"), names)


@pytest.fixture(scope="module")
def toured() -> tuple[list[Any], dict[str, Any]]:
    """What the cells gave, and the names they left."""
    names: dict[str, Any] = {"display": Display()}
    return [run(cell, names) for cell in CODE], names


def test_the_notebook_is_well_formed_and_empty_of_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        own = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | own
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_it_is_short() -> None:
    assert sum(bool(line.strip()) for cell in CODE for line in cell.splitlines()) <= 50


def test_every_cell_runs_and_what_it_shows_draws_itself(toured: tuple[list[Any], dict[str, Any]]) -> None:
    values, names = toured
    shown = [value for value in (*values, *names["display"].shown) if value is not None and not isinstance(value, str)]
    assert len(shown) >= 8
    assert all("<div" in thing._repr_html_() for thing in shown)
    assert names["result"].finish_reason == "stop"


def test_the_canvas_is_drawn_step_by_step(toured: tuple[list[Any], dict[str, Any]]) -> None:
    _, names = toured
    steps = [event for event in names["steps"] if isinstance(event, Denoised)]
    committed = next(event for event in names["steps"] if isinstance(event, Committed))
    assert len(steps) == names["result"].statistics.steps >= 2
    first, last = steps[0]._repr_html_(), steps[-1]._repr_html_()
    length = steps[0].best.shape[1]
    assert f"accepted {steps[0].accepted_count[0]}/{length}" in first and "settled" in last
    for event, drawn in ((steps[0], first), (steps[-1], last)):
        assert drawn.count("background:") == event.accepted_count[0]
        assert drawn.count("opacity:") == length - event.accepted_count[0] + 1  # and the note
    assert committed.text.splitlines()[0] in committed._repr_html_()


def test_what_a_model_writes_is_no_markup() -> None:
    from mlx_diffgemma.generation.drawing import canvas_html, text_html

    assert "<b>" not in text_html("<b>bold</b>", "<i>")
    drawn = canvas_html([1, 2], [True, False], [0.0, 9.0], lambda ids: "<b> " * len(ids), "a note")
    assert "<b>" not in drawn and drawn.count("&lt;b&gt;") == 2 and "opacity:0.15" in drawn
