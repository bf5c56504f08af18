"""`mlx_diffgemma.tune`: which way of cutting the work this machine likes, measured once for a pack and remembered.

One field of Tuning after the other. Tile and scores take turns step by step in one process; trunk, wired and operations
need a process of their own each, and one that seems faster is measured against the default once more, the other way
round. Nothing approximate is a candidate: all of them compute the same, to rounding. This process holds no weights.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli import command
from .errors import ConfigError, DiffGemmaError
from .files.shipped import BUILT_IN

if TYPE_CHECKING:
    from .model.tuning import Tuning

PREFIXES = (300, 8_192, 32_768)  # tokens, as far as the context reaches
ROUNDS = 7  # steps of every candidate behind every prefix
GAIN = 0.02  # less than this is noise: the default stays
WINS = 0.75  # of the turns that a candidate must be faster in
LONGEST = 900  # seconds a process may take

Seconds = list[list[float]]  # for each candidate, every step of every prefix in turn


@command("tune")
@click.option("--model", metavar="PATH|REPO", help="A pack.  [default: the small built-in model]")
@click.option("--show", is_flag=True, help="Measure nothing: what is remembered.")
@click.option("--forget", is_flag=True, help="Measure nothing: forget what is remembered, of --model or of all.")
@click.option("--run", hidden=True, help="What a process measures, in JSON.")
def main(model: str | None, show: bool, forget: bool, run: str | None) -> None:
    """Measure how this machine likes the work cut, once: minutes. From then on --model is used that way."""
    if run is not None:
        click.echo(json.dumps(measured(**json.loads(run))))
    elif show and forget:
        raise click.UsageError("--show and --forget exclude one another.")
    elif show or forget:
        remembered(model, forget=forget)
    else:
        tune(model)


# ------------------------------------------------------------------------------------------------------ choosing


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Some values of one field of Tuning, the default's first."""

    field: str
    values: tuple[Any, ...]
    together: bool  # one process can measure them step by step


def trials(*, gpu: bool, metal: bool) -> list[Trial]:
    """What is tried on a device, at most 12 processes."""
    found = [Trial(field="trunk", values=("packed", "bf16"), together=False)]
    found += [Trial(field="tile", values=(32_768, 8_192, 65_536) if gpu else (8_192, 32_768, 65_536), together=True)]
    found += [Trial(field="scores", values=(1 << 26, 1 << 28), together=True)]
    if metal:
        found += [Trial(field="wired", values=(True, False), together=False)]
        found += [Trial(field="operations", values=(None, 100, 200), together=False)]
    return found


Measure = Callable[[Sequence["Tuning"]], Seconds]  # of tunings that one process measures by turns


def choose(trial: Trial, base: "Tuning", measure: Measure) -> tuple["Tuning", Seconds]:
    """The value of a field that is surely faster than the default, or the default.

    A candidate whose process fails (no room for it) is left out. Errors: what `measure` raises for the default.
    """
    tunings = [replace(base, **{trial.field: value}) for value in trial.values]
    if trial.together:
        seconds = measure(tunings)
        best = min(range(len(tunings)), key=lambda i: _typical(seconds[i], seconds[0]))
        return tunings[best if faster(seconds[best], seconds[0]) else 0], seconds
    seconds = [measure(tunings[:1])[0]]
    for tuning in tunings[1:]:
        try:
            seconds += measure([tuning])
        except NotMeasured as error:
            click.echo(f"{trial.field} {getattr(tuning, trial.field)}: left out, {error}", err=True)
            seconds.append([])
    best = min(range(len(tunings)), key=lambda i: _typical(seconds[i], seconds[0]))
    if best and faster(seconds[best], seconds[0]):
        again = [measure([tunings[best]])[0], measure(tunings[:1])[0]]  # the other way round
        if faster(again[0], again[1]) and faster(seconds[best], again[1]) and faster(again[0], seconds[0]):
            return tunings[best], seconds
    return tunings[0], seconds


def faster(candidate: list[float], default: list[float]) -> bool:
    """Whether a candidate's steps are surely faster than the default's, step by step."""
    if not candidate:
        return False
    wins = sum(a < b for a, b in zip(candidate, default, strict=False)) / min(len(candidate), len(default))
    return wins >= WINS and _typical(candidate, default) < 1 - GAIN


def _typical(candidate: list[float], default: list[float]) -> float:
    """The median of its steps in units of the default's same step: every prefix counts alike."""
    if not candidate:
        return float("inf")
    return statistics.median(a / b for a, b in zip(candidate, default, strict=False))


# ------------------------------------------------------------------------------------------------------ measuring


class NotMeasured(DiffGemmaError):
    """A process that measures ended without a result."""


def measured(pack: str, tunings: list[dict[str, Any]]) -> Seconds:
    """What one process does: load the pack and take turns."""
    from .files.weights import unpack_trunk, unpacked_growth
    from .model.memory import memory_needed, weight_bytes
    from .model.tuning import Tuning
    from .pipeline.loading import load
    from .pipeline.machine.fitting import check_memory
    from .pipeline.machine.measuring import by_turns

    wanted = [Tuning(**values) for values in tunings]
    unpack = wanted[0].trunk == "bf16"
    model = load(pack, tuning=replace(wanted[0], trunk="packed") if unpack else wanted[0])
    network = model.network
    if unpack:
        check_memory(network.config, weight_bytes(network) + unpacked_growth(network), model.memory_limit)
        unpack_trunk(network)
    settled = "bf16" if unpack else network.tuning.trunk
    seconds: Seconds = [[] for _ in wanted]
    limit = network.config.max_position_embeddings - network.config.canvas_length
    for prefix in sorted({min(prefix, limit) for prefix in PREFIXES}):
        if memory_needed(network.config, weight_bytes(network), prefix) > model.memory_limit:
            continue
        turns = by_turns(network, [replace(tuning, trunk=settled) for tuning in wanted], prefix, ROUNDS)
        for all_of_it, new in zip(seconds, turns, strict=True):
            all_of_it += new
    return seconds


def in_a_process(pack: str) -> Measure:
    """Measure in a process of its own. Errors: NotMeasured."""

    def measure(tunings: Sequence["Tuning"]) -> Seconds:
        from .files.tuned import FIELDS

        values = [{field: getattr(tuning, field) for field in FIELDS} for tuning in tunings]
        job = json.dumps({"pack": pack, "tunings": values})
        environment = dict(os.environ)
        if tunings[0].operations is not None:
            environment["MLX_MAX_OPS_PER_BUFFER"] = str(tunings[0].operations)
        command_line = [sys.executable, "-m", "mlx_diffgemma.tune", "--run", job]
        try:
            done = subprocess.run(command_line, capture_output=True, text=True, timeout=LONGEST, env=environment)
        except subprocess.TimeoutExpired:
            raise NotMeasured(f"it took more than {LONGEST // 60} minutes.") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise NotMeasured(said[-1].removeprefix("Error: ") if said else f"it ended with status {done.returncode}.")
        return json.loads(done.stdout.splitlines()[-1])

    return measure


def tune(name: str | None) -> None:
    """Measure, choose, remember: field by field, so that what finished stays when the rest does not."""
    import mlx.core as mx
    from rich.progress import Progress

    from .files import checkpoint, hub, tuned
    from .model.tuning import DEFAULT
    from .terminal.console import console

    pack = hub.resolve(BUILT_IN if name is None else name)
    config, stderr = checkpoint.read_config(pack), console(stderr=True)
    if name is None:
        stderr.print("The small built-in model says little about the real one: --model PATH measures that.")
    metal = mx.metal.is_available()
    every = trials(gpu=mx.default_device() == mx.gpu, metal=metal)
    if not config.quantization:
        every = [trial for trial in every if trial.field != "trunk"]  # nothing to unpack
    base, told, unwritten = DEFAULT, {}, ""
    with _alone(tuned.folder()), Progress(console=stderr, transient=True) as bar:
        task = bar.add_task("Measuring", total=len(every))
        for trial in every:
            bar.update(task, description=f"Measuring {trial.field}")
            base, seconds = choose(trial, base, in_a_process(str(pack)))
            told[trial.field] = _told(trial, base, seconds)
            stderr.print(f"{trial.field}: {told[trial.field]}")
            bar.advance(task)
            try:
                tuned.remember(pack, name or "built-in", base, told)
            except (OSError, DiffGemmaError) as error:
                unwritten = f"The choice cannot be remembered: {error}"
    click.echo(", ".join(f"{trial.field} {getattr(base, trial.field)}" for trial in every))
    click.echo(unwritten or f"Remembered in {tuned.file_of(pack)}; --no-tuned leaves it out, tune --forget forgets it.")


def _told(trial: Trial, chosen: "Tuning", seconds: Seconds) -> str:
    """Every value with its steps in units of the default's."""
    values = []
    for value, steps in zip(trial.values, seconds, strict=True):
        values.append(f"{value} {_typical(steps, seconds[0]):.2f}" if steps else f"{value} –")
    return f"{getattr(chosen, trial.field)} ({', '.join(values)} × the default's step)"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two that measure at once would measure each other. Where the folder cannot be written, nobody is asked.

    Errors: ConfigError when another process measures.
    """
    from .disk import lock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "tune.lock").open("w")
    except OSError:
        yield
        return
    with stream:
        lock(
            stream,
            ConfigError("another mlx_diffgemma.tune is measuring: wait for it."),
        )
        yield


def remembered(name: str | None, *, forget: bool) -> None:
    """Show what is remembered, or forget it: of one pack, or of all."""
    from .files import hub, tuned

    found = tuned.everything()
    if name is not None:
        own = tuned.file_of(hub.resolve(name))
        found = [(file, kept) for file, kept in found if file == own]
    if not found:
        click.echo("Nothing is remembered.")
    for file, kept in found:
        if forget:
            with suppress(FileNotFoundError):
                file.unlink()
            click.echo(f"Forgotten: {kept['pack'] if kept else file}")
        elif kept is None:
            click.echo(f"{file}: not a choice of mlx_diffgemma.tune; it is left alone.")
        else:
            values = ", ".join(f"{field} {value}" for field, value in kept["tuning"].items())
            with_ = ", ".join(kept["measured_with"].values())
            click.echo(f"{kept['pack']}: {values}\n  measured with {with_}\n  {file}")


if __name__ == "__main__":
    main()
