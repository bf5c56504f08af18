"""The vision tower of a checkpoint folder, opened for itself: only prompts with pictures need it.

Any folder will do whose text model is read: released ones, packs, mlx-community's (the older ones pack the projection),
OptiQ's with the tower in a file of its own.
"""

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..config import RELEASED, ModelConfig
from ..errors import CheckpointError, ConfigError
from ..model.network import leaves
from ..model.vision import Eyes
from ..model.vision_config import VisionConfig
from ..readers import read_json
from .checkpoint import read_vision
from .weights import nonfinite


def open_eyes(folder: Path, config: ModelConfig, *, ignore_keys: tuple[str, ...] = ()) -> Eyes:
    """The tower and its projection; every weight stays on disk until it is used. `config` is the text model's, and
    `ignore_keys` are unknown keys (as `vision_config.name`) that the caller declares harmless.

    On a CPU 16-bit weights become float32, as the text network's do. Errors: ConfigError for a checkpoint without a
    tower and for a `vision_config` there is no maths for, CheckpointError for tensors that do not belong to it.
    """
    folder = Path(folder)
    if config.vision is None:
        raise _blind(folder, "config.json has no vision_config")
    tokens = read_json(folder / "config.json").get("vision_soft_tokens_per_image")
    eyes = Eyes(VisionConfig.from_dict(config.vision, soft_tokens=tokens, ignore_keys=ignore_keys), config.hidden_size)
    tensors, quantized = read_vision(folder, config)
    if not tensors:
        raise _blind(folder, "config.json describes one, and no file holds its weights")

    def packed(path: str, module: nn.Module) -> bool | dict[str, Any]:
        how = quantized.get(f"model.encoder.{path}")
        return False if how is None else {"bits": how.bits, "group_size": how.group_size, "mode": how.mode}

    nn.quantize(eyes, class_predicate=packed)
    files = {file: cast(dict[str, mx.array], mx.load(str(file))) for file in {t.file for t in tensors.values()}}
    weights = [(name.removeprefix("model.encoder."), files[t.file][t.name]) for name, t in tensors.items()]
    eyes.load_weights(weights, strict=True)
    eyes.eval()
    if mx.default_device() == mx.cpu:
        eyes.set_dtype(mx.float32)
    return eyes


def load_eyes(folder: Path, config: ModelConfig, *, ignore_keys: tuple[str, ...] = ()) -> Eyes:
    """`open_eyes`, read. Errors: CheckpointError for NaN and infinity, too."""
    eyes = open_eyes(folder, config, ignore_keys=ignore_keys)
    mx.eval(eyes.parameters())
    weights = {name: weight for name, weight in leaves(eyes.parameters()).items() if weight.ndim}  # a bound may be inf
    if (name := nonfinite(weights)) is not None:
        raise CheckpointError(
            f"{folder}: model.encoder.{name} holds NaN or infinity, expected finite weights.\n"
            "Download the checkpoint again."
        )
    return eyes


def _blind(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{folder} has no vision tower, so it cannot see pictures: {why}.\n"
        f"Leave the pictures out, or take a model that has one: {RELEASED}, or a pack of it."
    )
