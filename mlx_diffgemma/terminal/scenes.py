"""What the built-in model can do: its five tasks with a prompt to copy each, and the scenes of the demo."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.shipped import EYES


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing the built-in model was trained to do, and a question of the kind."""

    name: str
    prompt: str
    seed: int = 1
    pace: float = 0.9  # seconds that a step of it stays in sight when it is shown
    image: Path | None = None

    @property
    def message(self) -> dict[str, Any]:
        """As the user says it."""
        if self.image is None:
            return {"role": "user", "content": self.prompt}
        parts = [{"type": "image", "image": self.image}, {"type": "text", "text": self.prompt}]
        return {"role": "user", "content": parts}


NAMES = Task(name="sort names", prompt="Sort these names:\nNora, Ben, Zoe, Ivo, Ada, Kim")
JSON = Task(
    name="records to JSON",
    prompt="Write this as JSON:\nname: Vera\njob: pilot\ncity: Oslo\n\nname: Finn\njob: cook\ncity: Rome",
)
TABLE = Task(
    name="JSON to a table",
    prompt="Make a Markdown table:\n"
    '{"name": "Leo", "pet": "owl", "age": 71}\n{"name": "Finn", "pet": "goat", "age": 38}\n'
    '{"name": "Mia", "pet": "fox", "age": 64}',
)
LETTER = Task(
    name="fill in a template",
    prompt="Fill in the template:\nDear {name}, your {item} will be ready on {day}.\n"
    "name: Ada, Leo\nitem: lamp\nday: Friday",
)
SUDOKU = Task(  # 12 givens, of which every next digit follows; it takes a dozen steps under any seed
    name="6×6 Sudoku",
    prompt="Solve this Sudoku:\n1.. ...\n... .65\n..5 2..\n2.. 4.6\n6.. ...\n.2. .14",
    seed=8,
    pace=0.42,
)
SEEN = Task(name="6×6 Sudoku in a picture", prompt="Solve this Sudoku:", image=EYES / "puzzle.png")
TASKS = (NAMES, JSON, TABLE, LETTER, SUDOKU)
SCENES = (NAMES, JSON, TABLE, SEEN, SUDOKU)


def what_it_knows(tasks: Sequence[Task] = TASKS) -> str:
    """The tasks, with a command for each that can be copied."""
    width = max(len(task.name) for task in tasks)
    lines = ["The built-in model has a million weights and knows five tasks; a prompt to copy for each:"]
    for task in tasks:
        lines.append(f"  {task.name:{width}}  mlx_diffgemma.generate {_quoted(task.prompt)}")
    lines.append("It reads drawn 6×6 grids, too, and solves them: --image PUZZLE.png --prompt 'Solve this Sudoku:'")
    return "\n".join(lines)


def _quoted(prompt: str) -> str:
    """As bash and zsh read it, on one line."""
    if "\n" not in prompt:
        return shlex.quote(prompt)
    return "$'" + prompt.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
