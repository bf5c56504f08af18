"""The runs that benchmarks/bits.py compares, and the process that makes them from one tree.

It enters by the front door alone (`load`, `generate`, `stream`, `chat`, the attributes of events and results), and
knows events by their names, so that trees whose rooms lie elsewhere make the same runs.
"""

import argparse
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_diffgemma

SORT, SUDOKU = "Sort these names:\nZoe, Ada, Kim, Ben, Olga", "Solve this Sudoku:\n632 ..4\n51. 3..\n32. .41\n.51 632"
TABLE = 'Make a Markdown table:\n{"name": "Ada", "age": 31}\n{"name": "Ben", "age": 42}'
NAMES = ("Ada", "Ben", "Cleo", "Eva", "Ivo", "Jane", "Kim", "Leo", "Olga", "Rosa", "Tara", "Will", "Zoe")
LONGER = "Sort these names:\n" + ", ".join(reversed(NAMES * 2))  # than the built-in model's window of 64
LONG = "Sort these names:\n" + ", ".join(reversed(NAMES * 4))
TURNS = (SORT, TABLE, "Sort these names:\nLeo, Will, Eva")
FLOATS = ("entropy", "mean_entropy")
VOCABULARIES = {"built-in": 640, "restless": 640, "wide": 20_000}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "steps-4": {"max_denoising_steps": 4},
    "bound-1": {"entropy_bound": 1.0},
    "stability-0": {"stability_threshold": 0, "confidence_threshold": 0.05},
    "stability-3": {"stability_threshold": 3},
    "greedy": {"greedy": True},
    "avoid-empty": {"avoid_empty": True},
    "canvas-24": {"canvas_length": 24},
    "dense-signal": {"sparse_signal": False},
    "canvases-3": {"max_tokens": 130, "stop_ids": (2,)},  # <bos>, which is hardly ever written
}
CHUNKS = {"prefill_step_size": 32}
SHORT = {"max_denoising_steps": 12}  # most random canvases never settle


@dataclass(frozen=True, kw_only=True)
class Run:
    """One generation: a stream for one prompt, a batch for several, a conversation of turns."""

    model: str  # a folder
    prompts: tuple[Any, ...]  # texts or lists of ids
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None  # None: from recorded noise
    turns: bool = False
    trunk: str = "auto"


def ids(length: int, model: str = "restless") -> list[int]:
    """A prompt of random ids."""
    return np.random.default_rng(length).integers(0, VOCABULARIES[model], length).tolist()


def _runs() -> Iterator[tuple[str, Run]]:
    for number, (name, settings) in enumerate(SETTINGS.items()):
        yield f"built-in/{name}", Run(model="built-in", prompts=(TABLE,), settings=settings, seed=number)
        for model in ("restless", "wide"):
            steps = SHORT | {"max_tokens": 48} | settings
            yield f"{model}/{name}", Run(model=model, prompts=(ids(20, model),), settings=steps, seed=number)
    whole = {"max_tokens": 48}
    yield "restless/48-steps", Run(model="restless", prompts=(ids(20),), settings=whole)
    for model in ("restless", "wide"):
        for length in (1, 64, 65, 150):
            name, prompts = f"{model}/prompt-{length}", (ids(length, model),)
            yield name, Run(model=model, prompts=prompts, settings=SHORT | whole)
            if length > 64:
                yield f"{name}-chunks", Run(model=model, prompts=prompts, settings=SHORT | whole | CHUNKS)
    yield "built-in/long", Run(model="built-in", prompts=(LONG,))
    yield "built-in/long-chunks", Run(model="built-in", prompts=(LONG,), settings=CHUNKS, seed=5)
    texts = (SORT, LONG, TABLE, SUDOKU)
    for rows in (2, 3, 4):
        for model in VOCABULARIES:
            lengths = (30, 150, 9, 1)[:rows]
            prompts = texts[:rows] if model == "built-in" else tuple(ids(length, model) for length in lengths)
            settings = {"max_tokens": 96} if model == "built-in" else SHORT | whole
            yield f"{model}/batch-{rows}", Run(model=model, prompts=prompts, settings=settings, seed=rows)
            yield f"{model}/batch-{rows}-noise", Run(model=model, prompts=prompts, settings=settings | CHUNKS)
    for name in ("defaults", "canvas-24", "stability-3", "dense-signal"):
        settings = {"max_tokens": 96} | SETTINGS[name]
        yield f"built-in/chat-{name}", Run(model="built-in", prompts=TURNS, settings=settings, seed=3, turns=True)
    yield "built-in/chat-noise", Run(model="built-in", prompts=TURNS, settings={"max_tokens": 96}, turns=True)
    brief = {"max_tokens": 48, "max_denoising_steps": 4, "stability_threshold": 3}  # packed products are slow on a CPU
    for recipe in ("q8", "q4", "q4-bf16-float32", "mxfp4", "q2"):
        yield f"{recipe}/short", Run(model=recipe, prompts=(TABLE,), settings=brief, seed=1)
        yield f"{recipe}/long", Run(model=recipe, prompts=(LONGER,), settings=brief)
        yield f"{recipe}/batch-2", Run(model=recipe, prompts=(SORT, TABLE), settings=brief | {"max_denoising_steps": 2})
    brief |= {"max_denoising_steps": 2}
    yield "q4/chat", Run(model="q4", prompts=TURNS, settings=brief, seed=3, turns=True)
    yield "q4-float32/trunk-bf16", Run(model="q4-float32", prompts=(LONGER,), settings=brief, seed=2, trunk="bf16")


RUNS = dict(_runs())


class Noise:
    """Noise that no tree makes: it follows from purpose, canvas and step alone."""

    def __init__(self, rows: int, length: int, vocabulary: int):
        self.shape, self.vocabulary = (rows, length), vocabulary

    def canvas(self, canvas: int) -> mx.array:
        return self._ids(0, canvas, 0)

    def draws(self, canvas: int, step: int) -> mx.array:
        return mx.array(np.random.default_rng([1, canvas, step]).random(self.shape, np.float32))

    def ids(self, canvas: int, step: int) -> mx.array:
        return self._ids(2, canvas, step)

    def _ids(self, *address: int) -> mx.array:
        return mx.array(np.random.default_rng(address).integers(0, self.vocabulary, self.shape, np.int32))


Record = tuple[str, dict[str, np.ndarray]]  # where in the run, and what was there


@cache
def model(folder: Path, trunk: str) -> Any:
    options: Any = {} if trunk == "auto" else {"trunk": trunk}
    return mlx_diffgemma.load(folder, **options)


def records(run: Run, models: Path) -> Iterator[Record]:
    """What a run shows, in order: every step of a stream, then every canvas and the answer of every row."""
    loaded = model(models / run.model, run.trunk)
    options = dict(run.settings)
    rows = 1 if run.turns else len(run.prompts)
    if run.seed is None:
        length = run.settings.get("canvas_length") or loaded.config.canvas_length
        options["noise"] = Noise(rows, length, loaded.config.vocab_size)
    elif rows == 1:
        options["seed"] = run.seed
    else:
        options["seeds"] = [run.seed + 100 * row for row in range(rows)]
    if run.turns:
        chat = loaded.chat()
        for turn, text in enumerate(run.prompts):
            yield from _stream(chat.stream(text, **options), f"turn {turn}, ")
    elif rows == 1:
        yield from _stream(loaded.stream(run.prompts[0], **options))
    else:
        for row, result in enumerate(loaded.generate(list(run.prompts), **options)):
            yield from _answer(result, f"row {row}, ")


def _stream(events: Any, where: str = "") -> Iterator[Record]:
    committed = 0  # canvases: the field that counts them has had two names
    for event in events:
        if type(event).__name__ == "Denoised":
            names = ("best", "guess", "accepted", "entropy", "settled")
            yield (
                f"{where}canvas {committed}, step {event.step}",
                {name: np.array(getattr(event, name)) for name in names},
            )
        elif type(event).__name__ == "Committed":
            committed += 1
        elif type(event).__name__ == "Finished":
            yield from _answer(event.result, where)


def _answer(result: Any, where: str) -> Iterator[Record]:
    for index, canvas in enumerate(result.canvases):
        found = {name: getattr(canvas, name) for name in ("ids", "steps", "settled", "accepted_per_step")}
        # Of a batch these means are all there is to see of the entropies: float32, as Python floats.
        found["mean_entropy"] = np.float32(canvas.mean_entropy)
        yield f"{where}canvas {index}", {name: np.array(value) for name, value in found.items()}
    answer = {"tokens": result.tokens, "finish_reason": result.finish_reason, "text": result.text}
    yield f"{where}answer", {name: np.array(value) for name, value in answer.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, required=True, help="where mlx_diffgemma must come from")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("runs", nargs="+")
    arguments = parser.parse_args()
    found = Path(mlx_diffgemma.__file__).resolve()
    if not found.is_relative_to(arguments.tree.resolve()):
        raise SystemExit(f"mlx_diffgemma comes from {found}, expected {arguments.tree}.")
    made: dict[str, list[Record] | str] = {}

    for name in arguments.runs:
        try:
            made[name] = list(records(RUNS[name], arguments.models))
        except Exception as error:  # told from a difference, and no reason to lose the other runs
            made[name] = f"{type(error).__name__}: {error}"
    arguments.out.write_bytes(pickle.dumps(made))


if __name__ == "__main__":
    main()
