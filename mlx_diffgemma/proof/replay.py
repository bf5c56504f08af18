"""Recordings of the reference, through our network and our engine."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..generation.events import Committed, Denoised
    from ..model.network import Network

from ..errors import CheckpointError
from ..files import shipped
from .findings import Finding, on_gpu
from .recordings import Recording


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """How far our logits [B, L, V] are from the truth (transformers in float64), and how far the recorded ones were."""

    rms_error: float
    recorded_rms_error: float
    same_best: float  # share of positions whose best token is the truth's

    @property
    def ratio(self) -> float:
        return self.rms_error / self.recorded_rms_error


def replay_logits(recording: Recording, network: "Network") -> dict[str, Closeness]:
    """Run every case of a recording of kind "logits" through `network`."""
    return {name: _replay_case(recording, name, network) for name in recording.provenance["cases"]}


def _replay_case(recording: Recording, name: str, network: "Network") -> Closeness:
    import mlx.core as mx

    x = {key.removeprefix(name + "/"): a for key, a in recording.arrays.items() if key.startswith(name + "/")}
    cache = network.make_cache(x["prompt"].shape[0], x["padding"].tolist())
    for ids in (x["prompt"], *x["canvases"]):
        network.encode(mx.array(ids), cache)
    signal = mx.array(x["signal"]) if "signal" in x else None
    logits = np.array(network.logits(mx.array(x["canvas"]), cache, signal))
    return Closeness(
        rms_error=float(np.sqrt(np.mean(np.square(logits - x["truth"])))),
        recorded_rms_error=float(np.sqrt(np.mean(np.square(x["logits"] - x["truth"])))),
        same_best=float((logits.argmax(-1) == x["truth"].argmax(-1)).mean()),
    )


def replay_trajectory(recording: Recording, network: "Network", **options: Any) -> list[str]:
    """Run a recording of kind "trajectory" through our engine with its noise; where we left its path, in words.

    Compared for each row, up to the step at which it was settled: guesses, accepted sets, best canvases, mean entropy;
    then steps, settled or not, and the ids that were committed.
    """
    from ..errors import NoiseError
    from ..generation.engine import generate
    from ..generation.events import Committed, Denoised
    from ..generation.noise import RecordedNoise
    from ..generation.settings import GenerationConfig

    told = recording.arrays
    settings = GenerationConfig().replace(**recording.provenance["settings"])
    settings = settings.replace(stop_ids=tuple(settings.stop_ids), **options)
    prompts = [row[pad:].tolist() for row, pad in zip(told["prompt"], told["padding"], strict=True)]
    noise = RecordedNoise(told["canvas"], told["draws"], told["ids"], name=recording.name)
    departures, canvases = [], 0
    try:
        for event in generate(network, prompts, settings, noise, pictures=recording.pictures()):
            if isinstance(event, Denoised):
                departures += _of_step(event, told)
            elif isinstance(event, Committed):
                departures += _of_canvas(event, told, settings.stop_ids)
                canvases += 1
    except NoiseError as error:  # it went on past the end of the recording
        departures.append(str(error))
    if canvases != len(told["canvas"]):
        departures.append(f"{canvases} canvases instead of {len(told['canvas'])}")
    return departures


def _of_step(event: "Denoised", told: dict[str, np.ndarray]) -> Iterator[str]:
    c, s = event.index, event.step
    for row in np.flatnonzero(s < told["row_steps"][c]):
        for what in ("guess", "accepted", "best"):
            differ = np.array(getattr(event, what))[row] != told[what][c, s, row]
            if differ.any():
                yield f"canvas {c}, step {s}, row {row}: {what} differs at {differ.sum()} of {differ.size} positions"
        ours, theirs = float(event.entropy[row].mean()), float(told["entropy"][c, s, row])
        if not abs(ours - theirs) <= 1e-4 * (1 + theirs):
            yield f"canvas {c}, step {s}, row {row}: mean entropy {ours} instead of {theirs}"


def _of_canvas(event: "Committed", told: dict[str, np.ndarray], stop_ids: tuple[int, ...]) -> Iterator[str]:
    c = event.index
    for number, row in enumerate(event.rows):
        ids = told["committed"][c, number].tolist() if told["row_steps"][c, number] else []
        stop = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
        theirs = (told["row_steps"][c, number], told["settled"][c, number], tuple(ids[:stop]))
        if (row.steps, row.settled, row.ids) != theirs:
            yield f"canvas {c}, row {number}: steps, settled, ids {row.steps, row.settled, row.ids} instead of {theirs}"


RATIO = 10.0  # bound on our RMS error in units of the recorded run's; kernels that are wrong miss it by hundreds


def replay() -> Iterator[Finding]:
    """Every recording, through the device in use."""
    paths = sorted(shipped.references().glob("*.npz"))
    if not paths:
        raise CheckpointError(f"there are no recordings in {shipped.references()}: the installation is incomplete.")
    for path in paths:
        recording = Recording.load(path)
        if recording.provenance["kind"] == "trajectory":
            yield _run(recording)
        elif recording.provenance["dtype"] == "bfloat16" and not on_gpu():
            why = "MLX multiplies experts in bfloat16 on a GPU only."
            yield Finding(part="recordings", name=recording.name, passed=None, says=why)
        else:
            yield from _passes(recording)


def _run(recording: "Recording") -> Finding:
    departures = replay_trajectory(recording, recording.network())
    says = departures[0] if departures else "the same guesses, accepted sets, steps and tokens"
    figures = {"departures": len(departures)}
    return Finding(part="recordings", name=recording.name, passed=not departures, says=says, figures=figures)


def _passes(recording: "Recording") -> Iterator[Finding]:
    import mlx.core as mx

    network = recording.network()
    dtype = getattr(mx, recording.provenance["dtype"])
    network.set_dtype(dtype)
    for name, case in replay_logits(recording, network).items():
        passed = case.ratio <= RATIO and (dtype != mx.float32 or case.same_best == 1.0)
        says = f"error {case.rms_error:.1e}, {case.ratio:.1f} × PyTorch's on {recording.provenance['device']}"
        figures = dataclasses.asdict(case) | {"error": case.ratio}
        yield Finding(part="recordings", name=f"{recording.name}/{name}", passed=passed, says=says, figures=figures)
