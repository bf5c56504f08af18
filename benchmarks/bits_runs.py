"""The runs that benchmarks/bits.py compares, and the process that makes them from one tree.

It enters by the front door alone (`load`, `generate`, `stream`, `chat`, the attributes of events and results), and
knows events by their names, so that trees whose rooms lie elsewhere make the same runs.
"""

import argparse
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
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
RANDOM = {"restless": 640, "wide": 20_000}  # models of random weights, and how many ids they have
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
BRIEF = {"max_denoising_steps": 12, "max_tokens": 48}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A stream of one prompt, a batch of several, or a conversation."""

    model: str  # a folder
    prompts: tuple[Any, ...]  # texts or lists of ids; one of each turn, else one of each row
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    recorded: bool = False  # the seed makes noise that no tree makes, and that is handed over
    turns: bool = False
    trunk: str | None = None


def ids(length: int, model: str = "restless") -> list[int]:
    """A prompt of random ids."""
    return np.random.default_rng(length).integers(0, RANDOM[model], length).tolist()


def _by_settings() -> Iterator[tuple[str, Run]]:
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        yield f"built-in/{name}", Run(model="built-in", prompts=(TABLE,), settings=settings, seed=seed)
        for model in RANDOM:
            prompt, brief = ids(20, model), BRIEF | settings
            yield f"{model}/{name}", Run(model=model, prompts=(prompt,), settings=brief, seed=seed, recorded=True)
    yield "restless/48-steps", Run(model="restless", prompts=(ids(20),), settings={"max_tokens": 48}, seed=7)


def _by_length() -> Iterator[tuple[str, Run]]:
    """Prompts of one token, of the window, longer than it; whole and in chunks."""
    for model in RANDOM:
        for length in (1, 64, 65, 150):
            whole = Run(model=model, prompts=(ids(length, model),), settings=BRIEF, seed=length, recorded=True)
            yield f"{model}/prompt-{length}", whole
            if length > 64:
                yield f"{model}/prompt-{length}-chunks", replace(whole, settings=BRIEF | CHUNKS, recorded=False)
    yield "built-in/long", Run(model="built-in", prompts=(LONG,), recorded=True)
    yield "built-in/long-chunks", Run(model="built-in", prompts=(LONG,), settings=CHUNKS, seed=5)


def _batches() -> Iterator[tuple[str, Run]]:
    texts, lengths = (SORT, LONG, TABLE, SUDOKU), (30, 150, 9, 1)
    for rows in (2, 3, 4):
        batches = {model: tuple(ids(length, model) for length in lengths[:rows]) for model in RANDOM}
        for model, prompts in (batches | {"built-in": texts[:rows]}).items():
            seeded = Run(model=model, prompts=prompts, settings=BRIEF, seed=rows)
            yield f"{model}/batch-{rows}", seeded
            yield f"{model}/batch-{rows}-noise", replace(seeded, settings=BRIEF | CHUNKS, recorded=True)


def _conversations() -> Iterator[tuple[str, Run]]:
    for name in ("defaults", "canvas-24", "stability-3", "dense-signal"):
        settings = {"max_tokens": 96} | SETTINGS[name]
        seeded = Run(model="built-in", prompts=TURNS, settings=settings, seed=3, turns=True)
        yield f"built-in/chat-{name}", seeded
        if name == "defaults":
            yield "built-in/chat-noise", replace(seeded, recorded=True)


def _recipes() -> Iterator[tuple[str, Run]]:
    """Packed products are slow on a CPU: few steps."""
    four = {"max_tokens": 48, "max_denoising_steps": 4, "stability_threshold": 3}
    two = four | {"max_denoising_steps": 2}
    for model in ("q8", "q4", "q4-bf16-float32", "mxfp4", "q2"):
        yield f"{model}/short", Run(model=model, prompts=(TABLE,), settings=four, seed=1)
        yield f"{model}/long", Run(model=model, prompts=(LONGER,), settings=four, recorded=True)
        yield f"{model}/batch-2", Run(model=model, prompts=(SORT, TABLE), settings=two, recorded=True)
    yield "q4/chat", Run(model="q4", prompts=TURNS, settings=two, seed=3, turns=True)
    yield "q4-float32/trunk-bf16", Run(model="q4-float32", prompts=(LONGER,), settings=two, seed=2, trunk="bf16")


RUNS = dict(chain(_by_settings(), _by_length(), _batches(), _conversations(), _recipes()))


class Noise:
    """Noise that no tree makes: it follows from a seed, purpose, canvas and step alone."""

    def __init__(self, seed: int, rows: int, length: int, vocabulary: int):
        self.seed, self.shape, self.vocabulary = seed, (rows, length), vocabulary

    def canvas(self, canvas: int) -> mx.array:
        return self._ids(0, canvas, 0)

    def draws(self, canvas: int, step: int) -> mx.array:
        return mx.array(np.random.default_rng([self.seed, 1, canvas, step]).random(self.shape, np.float32))

    def ids(self, canvas: int, step: int) -> mx.array:
        return self._ids(2, canvas, step)

    def _ids(self, *address: int) -> mx.array:
        return mx.array(np.random.default_rng([self.seed, *address]).integers(0, self.vocabulary, self.shape, np.int32))


class Moved(Noise):
    """The same noise, but for one draw of row 0, which is moved by `by`."""

    def __init__(self, noise: Noise, address: tuple[int, int, int], by: float):
        super().__init__(noise.seed, *noise.shape, noise.vocabulary)
        self.address, self.by = address, by

    def draws(self, canvas: int, step: int) -> mx.array:
        draws = np.array(super().draws(canvas, step))
        if (canvas, step) == self.address[:2]:
            place = (0, self.address[2])
            draws[place] = np.clip(draws[place] + self.by, 0, np.nextafter(np.float32(1), np.float32(0)))
        return mx.array(draws)


Record = tuple[str, dict[str, np.ndarray]]  # where in the run, and what was there


@cache
def model(folder: Path, trunk: str | None) -> Any:
    options: Any = {"trunk": trunk} if trunk else {}
    return mlx_diffgemma.load(folder, **options)


def records(run: Run, models: Path) -> Iterator[Record]:
    """What a run shows, in order: every step of a stream, then every canvas and the answer of every row."""
    loaded = model(models / run.model, run.trunk)
    options = dict(run.settings)
    rows = 1 if run.turns else len(run.prompts)
    if run.recorded:
        options["noise"] = noise(run, loaded, rows)
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


def noise(run: Run, loaded: Any, rows: int) -> Noise:
    return Noise(
        run.seed, rows, run.settings.get("canvas_length") or loaded.config.canvas_length, loaded.config.vocab_size
    )


def distance(run: Run, models: Path, address: tuple[int, int, int], target: int) -> float:
    """How far at most the draw of one guess (canvas, step, position) is from one that gives the id `target`, to a
    factor of 4; the guess follows the draw in the order of the ids. A probability; infinite for an id that no draw
    reaches."""
    loaded = model(models / run.model, run.trunk)
    own = noise(run, loaded, 1)
    known = guess(loaded, run, own, address)
    by = 2.0**-24 if known < target else -(2.0**-24)
    while abs(by) <= 1:
        reached = guess(loaded, run, Moved(own, address, by), address)
        if (reached >= target) if by > 0 else (reached <= target):
            return abs(by)
        by *= 4
    return float("inf")


def guess(loaded: Any, run: Run, noise: Noise, address: tuple[int, int, int]) -> int:
    """The guess of one step at one position."""
    canvas, step, position = address
    events = loaded.stream(run.prompts[0], **run.settings, noise=noise)
    found = next(event for index, event in _canvases(events) if (index, getattr(event, "step", -1)) == (canvas, step))
    events.close()
    return int(np.array(found.guess)[0, position])


def _canvases(events: Any) -> Iterator[tuple[int, Any]]:
    """Each event with the canvas it belongs to, counted here: the field that says so has had two names."""
    committed = 0
    for event in events:
        yield committed, event
        committed += type(event).__name__ == "Committed"


def _stream(events: Any, where: str = "") -> Iterator[Record]:
    names = ("best", "guess", "accepted", "entropy", "settled")
    for canvas, event in _canvases(events):
        if type(event).__name__ == "Denoised":
            place = f"{where}canvas {canvas}, step {event.step}"
            yield place, {name: np.array(getattr(event, name)) for name in names}
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
    parser.add_argument("--asked", type=Path, required=True, help="JSON: names of runs, and distances")
    arguments = parser.parse_args()
    found = Path(mlx_diffgemma.__file__).resolve()
    if not found.is_relative_to(arguments.tree.resolve()):
        raise SystemExit(f"mlx_diffgemma comes from {found}, expected {arguments.tree}.")
    asked, models = json.loads(arguments.asked.read_text()), arguments.models
    if "runs" in asked:
        answer: Any = {name: attempt(RUNS[name], models) for name in asked["runs"]}
    else:
        answer = [distance(RUNS[name], models, tuple(address), target) for name, address, target in asked["distances"]]
    arguments.out.write_bytes(pickle.dumps(answer))


def attempt(run: Run, models: Path) -> list[Record] | str:
    """A run's records, or why there are none: an error is no reason to lose the other runs."""
    try:
        return list(records(run, models))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
