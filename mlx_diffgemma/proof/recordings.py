"""Recordings of the reference: where they are, what is in them, and the small models they were made with.

convert/record_reference.py writes them and documents the files. Nothing here imports MLX before it is needed: the
recorder uses `random_weights` on machines without it.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..model.blocks import Block
    from ..model.network import Network
    from ..model.vision import Eyes

from ..files.shipped import PACKAGE


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

    def eyes(self) -> "Eyes":
        """Our tower with the weights of the recording's."""
        return small_eyes(**self.provenance["model"])

    def pictures(self) -> "list[list[Block]]":
        """What our tower makes of the recorded pictures: a list a prompt, or none
        where there are no pictures."""
        import mlx.core as mx

        from ..model.blocks import Block

        if "pictures" not in self.arrays:
            return []
        eyes, end = self.eyes(), 0
        padding = self.arrays["padding"].tolist()
        rows: list[list[Block]] = [[] for _ in padding]
        for row, start, stop, high, wide in self.arrays["pictures"].tolist():
            patches = self.arrays["pixels"][end : end + high * wide].astype(np.float32) / 255
            end += high * wide
            soft = eyes.see(mx.array(patches), wide)
            rows[row].append(Block(start=start - padding[row], stop=stop - padding[row], features=lambda x=soft: x))
        return rows


def _built_in(name: str, *, folder: str, sha256: str) -> "Network":
    from ..errors import CheckpointError
    from ..files.weights import load_network

    weights = PACKAGE / folder / "model.safetensors"
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

    from ..config import ModelConfig
    from ..model.network import Network

    network = Network(ModelConfig.from_dict(config))
    shapes = {name: value.shape for name, value in dict(tree_flatten(network.parameters())).items()}
    network.load_weights([(name, mx.array(w)) for name, w in random_weights(shapes, **weights).items()])
    network.eval()
    return network


def small_eyes(*, config: dict[str, Any], weights: dict[str, Any]) -> "Eyes":
    """A tower with `random_weights(**weights)`."""
    import mlx.core as mx

    from ..model.network import leaves
    from ..model.vision import Eyes
    from ..model.vision_config import VisionConfig

    eyes = Eyes(VisionConfig.from_dict(config["vision_config"]), config["text_config"]["hidden_size"])
    shapes = {f"encoder.{name}": value.shape for name, value in leaves(eyes.parameters()).items()}
    made = random_weights(shapes, **weights)
    eyes.load_weights([(name.removeprefix("encoder."), mx.array(w)) for name, w in made.items()])
    return eyes
