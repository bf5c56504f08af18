"""Recordings of the reference: where they are, what is in them, and the small models they were made with.

convert/record_reference.py writes them and documents the files. Nothing here imports MLX before it is needed: the
recorder uses `random_weights` on machines without it.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .engine import Committed, Denoised
    from .network import Network

HERE = Path(__file__).parent


def folder() -> Path:
    """Where the recordings are: inside the installed package, else beside it in tests/reference."""
    packaged = HERE / "_reference"
    return packaged if packaged.is_dir() else HERE.parent / "tests" / "reference"


def random_weights(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int,
    branches: float = 1.0,
    sharpness: float = 1.0,
    tied_scalars: bool = False,
) -> dict[str, np.ndarray]:
    """Float32 weights that follow from a name, its shape and a seed alone, on every machine and NumPy.

    Matrices keep the size of what passes through them, norms and scales lie around 1, layer scalars between 0.7 and
    1.3: nothing is at rest, so nothing can be left out unnoticed. `branches` scales what each layer adds to the
    residual (a small one makes a model that nearly copies its canvas, and so settles), `sharpness` the logits;
    with `tied_scalars` the encoder's layer scalars equal the decoder's.
    """
    weights = {}
    for name, shape in shapes.items():
        key = name.removeprefix("model.").removesuffix(".weight")
        if tied_scalars:
            key = key.replace("encoder.language_model", "decoder")
        bits = np.random.PCG64([seed, zlib.crc32(key.encode())]).random_raw(int(np.prod(shape)))
        uniform = ((bits >> 40).astype(np.float32) * 2.0**-23 - 1).reshape(shape)  # [-1, 1), exact in float32
        scale = (3 / shape[-1]) ** 0.5 if len(shape) > 1 else 1.0
        if key.endswith(("post_attention_layernorm", "post_feedforward_layernorm")):
            scale = branches
        elif key == "decoder.norm":
            scale = sharpness
        weights[name] = np.float32(scale) * (uniform if len(shape) > 1 else 1 + np.float32(0.3) * uniform)
    return weights


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One file: its arrays, and what they are and come from."""

    name: str
    provenance: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: Path) -> "Recording":
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return cls(name=path.stem, provenance=json.loads(str(arrays.pop("provenance"))), arrays=arrays)

    def network(self) -> "Network":
        """Our network with the weights of the recording's model, in float32. Errors: CheckpointError for a built-in
        model that is not the recorded one."""
        model = self.provenance["model"]
        return _built_in(self.name, **model) if "folder" in model else small_network(**model)


def _built_in(name: str, *, folder: str, sha256: str) -> "Network":
    from .checkpoint import load_network
    from .errors import CheckpointError

    weights = HERE / folder / "model.safetensors"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != sha256:
        raise CheckpointError(
            f"{name} was recorded with other weights than those in {weights}.\n"
            "Record it again: python convert/record_reference.py --only demo"
        )
    return load_network(weights.parent)


def small_network(*, config: dict[str, Any], weights: dict[str, Any]) -> "Network":
    """A network with `random_weights(**weights)`."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from .config import ModelConfig
    from .network import Network

    network = Network(ModelConfig.from_dict(config))
    shapes = {name: value.shape for name, value in dict(tree_flatten(network.parameters())).items()}
    network.load_weights([(name, mx.array(w)) for name, w in random_weights(shapes, **weights).items()])
    network.eval()
    return network


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


def replay_trajectory(recording: Recording, network: "Network") -> list[str]:
    """Run a recording of kind "trajectory" through our engine with its noise; where we left its path, in words.

    Compared for each row, up to the step at which it was settled: guesses, accepted sets, best canvases, mean entropy;
    then steps, settled or not, and the ids that were committed.
    """
    from .config import GenerationConfig
    from .engine import Committed, Denoised, generate
    from .errors import NoiseError
    from .noise import RecordedNoise

    told = recording.arrays
    settings = GenerationConfig().replace(**recording.provenance["settings"])
    settings = settings.replace(stop_ids=tuple(settings.stop_ids))
    prompts = [row[pad:].tolist() for row, pad in zip(told["prompt"], told["padding"], strict=True)]
    noise = RecordedNoise(told["canvas"], told["draws"], told["ids"], name=recording.name)
    departures, canvases = [], 0
    try:
        for event in generate(network, prompts, settings, noise):
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
    c, s = event.canvas, event.step
    for row in np.flatnonzero(s < told["row_steps"][c]):
        for what in ("guess", "accepted", "best"):
            differ = np.array(getattr(event, what))[row] != told[what][c, s, row]
            if differ.any():
                yield f"canvas {c}, step {s}, row {row}: {what} differs at {differ.sum()} of {differ.size} positions"
        ours, theirs = float(event.entropy[row].mean()), float(told["entropy"][c, s, row])
        if not abs(ours - theirs) <= 1e-4 * (1 + theirs):
            yield f"canvas {c}, step {s}, row {row}: mean entropy {ours} instead of {theirs}"


def _of_canvas(event: "Committed", told: dict[str, np.ndarray], stop_ids: tuple[int, ...]) -> Iterator[str]:
    c = event.canvas
    for number, row in enumerate(event.rows):
        ids = told["committed"][c, number].tolist() if told["row_steps"][c, number] else []
        stop = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
        theirs = (told["row_steps"][c, number], told["settled"][c, number], tuple(ids[:stop]))
        if (row.steps, row.settled, row.ids) != theirs:
            yield f"canvas {c}, row {number}: steps, settled, ids {row.steps, row.settled, row.ids} instead of {theirs}"
