"""Where randomness comes from. A run needs three things: the first canvas, one uniform draw per position and step
(the guess inverts the distribution at it), and random ids for the positions that are renoised. Under a constraint it
needs one draw more: the guess's path through the language. Token by token it needs one draw a token, and no more.

Random generators differ between frameworks and devices, so a run is repeated elsewhere from its recorded
noise, not from its seed.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..disk import reason, replacing
from ..errors import NoiseError
from .settings import Decoding

CANVAS, DRAWS, IDS, PATH, TOKEN = range(5)
NAMES = ("canvas", "draws", "ids", "path")  # in a file


class Noise(Protocol):
    """The randomness of B rows, addressed by canvas and step: asking twice gives the same answer."""

    def canvas(self, index: int) -> mx.array:
        """The ids that canvas number `index` starts from, int32 [B, L], uniform over the whole vocabulary."""
        ...

    def draws(self, index: int, step: int) -> mx.array:
        """One number in [0, 1) per position, float32 [B, L], at which the guess is drawn."""
        ...

    def ids(self, index: int, step: int) -> mx.array:
        """Fresh ids for the positions that are not accepted, int32 [B, L], uniform over the whole vocabulary."""
        ...

    def path(self, index: int, step: int) -> mx.array:
        """One number in [0, 1) per position, float32 [B, L]: under a constraint the guess's classes are drawn at it."""
        ...

    def token(self, number: int) -> mx.array:
        """One number in [0, 1) per row, float32 [B], at which token `number` of autoregressive decoding is drawn."""
        ...


class SeededNoise:
    """Noise from one seed per row (an integer, modulo 2**64): a row gets the same noise whatever batch it runs in.

    Every array has a key of its own, so nothing depends on the order of calls or on MLX's global random state.
    """

    def __init__(self, seeds: Sequence[int], *, length: int, vocabulary: int):
        self.seeds, self.length, self.vocabulary = tuple(seeds), length, vocabulary

    def canvas(self, index: int) -> mx.array:
        return self._ids(CANVAS, index, 0)

    def draws(self, index: int, step: int) -> mx.array:
        return self._uniform(DRAWS, index, step)

    def ids(self, index: int, step: int) -> mx.array:
        return self._ids(IDS, index, step)

    def path(self, index: int, step: int) -> mx.array:
        return self._uniform(PATH, index, step)

    def token(self, number: int) -> mx.array:
        return mx.concatenate([mx.random.uniform(shape=(1,), key=key) for key in self._keys(TOKEN, number)])

    def _uniform(self, *path: int) -> mx.array:
        return mx.stack([mx.random.uniform(shape=(self.length,), key=key) for key in self._keys(*path)])

    def _ids(self, purpose: int, index: int, step: int) -> mx.array:
        keys = self._keys(purpose, index, step)
        return mx.stack([mx.random.randint(0, self.vocabulary, (self.length,), mx.int32, key=k) for k in keys])

    def _keys(self, *path: int) -> list[mx.array]:
        return [mx.random.key(_mixed(seed, *path)) for seed in self.seeds]


def _mixed(seed: int, *path: int) -> int:
    """A 64-bit number that depends on every bit of the seed and of the path (splitmix64's finalizer, chained)."""
    state = 0
    for part in (seed, *path):
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


_WORDS = {"iu": "whole numbers", "f": "numbers with a fraction"}


class RecordedNoise:
    """Noise read from a recording: `canvas` [C, B, L], and `draws`, `ids` and, of a run under a constraint, `path`
    [C, S, B, L] for C canvases, S steps; of autoregressive decoding `tokens` [T, B], and no canvases."""

    def __init__(
        self,
        canvas: np.ndarray,
        draws: np.ndarray,
        ids: np.ndarray,
        path: np.ndarray | None = None,
        tokens: np.ndarray | None = None,
        *,
        name: str = "the recording",
    ):
        self._canvas, self._draws, self._ids, self._path, self._tokens = canvas, draws, ids, path, tokens
        self.name = name
        alike = draws.shape == ids.shape and (path is None or path.shape == ids.shape)
        if canvas.ndim != 3 or not alike or draws.shape[:1] + draws.shape[2:] != canvas.shape:
            raise NoiseError(
                f"{name}: the shapes of the noise do not fit together: canvas {canvas.shape}, draws {draws.shape},"
                f" ids {ids.shape}{'' if path is None else f', path {path.shape}'}; expected [C, B, L], [C, S, B, L]."
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RecordedNoise":
        """Read a file written by `NoiseRecorder.save` or by convert/record_reference.py. Errors: NoiseError."""
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                if lacking := {"canvas", "draws", "ids"} - set(file.files):
                    raise NoiseError(f"{path} is no recording of noise: it has no {', '.join(sorted(lacking))}.")
                arrays = (file["canvas"], file["draws"], file["ids"], file.get("path"), file.get("tokens"))
                return cls(*arrays, name=str(path))
        except OSError as error:
            raise NoiseError(f"{path} cannot be read: {reason(error)}.") from error
        except (ValueError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise NoiseError(f"{path} is no recording of noise: expected a file that --save-noise wrote.") from error

    def check(self, vocabulary: int) -> None:
        """Errors: NoiseError for ids that a vocabulary of this size does not have, and draws outside [0, 1)."""
        for name, array, kinds in (
            ("canvas", self._canvas, "iu"),
            ("ids", self._ids, "iu"),
            ("draws", self._draws, "f"),
            ("path", self._path, "f"),
            ("tokens", self._tokens, "f"),
        ):
            if array is None:
                continue
            if array.dtype.kind not in kinds:
                raise NoiseError(f"{self.name}: {name} holds {array.dtype}, expected {_WORDS[kinds]}.")
            limit = 1 if kinds == "f" else vocabulary
            if array.size and not (0 <= array.min() and array.max() < limit):  # false for NaN, too
                expected = "draws of at least 0 and less than 1" if kinds == "f" else f"ids 0 … {vocabulary - 1}"
                raise NoiseError(
                    f"{self.name}: {name} holds {array.min()} … {array.max()}, expected {expected}.\n"
                    "It was recorded with another model, or is damaged."
                )

    @property
    def batch_size(self) -> int:
        return self._canvas.shape[1]

    @property
    def decoding(self) -> Decoding:
        """Which decoding it was recorded of."""
        return "diffusion" if self._tokens is None else "autoregressive"

    @property
    def length(self) -> int:
        """Positions per canvas."""
        return self._canvas.shape[2]

    def canvas(self, index: int) -> mx.array:
        self._check(index, 0)
        return mx.array(self._canvas[index]).astype(mx.int32)

    def draws(self, index: int, step: int) -> mx.array:
        self._check(index, step)
        return mx.array(self._draws[index, step]).astype(mx.float32)

    def ids(self, index: int, step: int) -> mx.array:
        self._check(index, step)
        return mx.array(self._ids[index, step]).astype(mx.int32)

    def path(self, index: int, step: int) -> mx.array:
        self._check(index, step)
        if self._path is None:
            raise NoiseError(f"{self.name} was recorded without a constraint: it holds no paths through a language.")
        return mx.array(self._path[index, step]).astype(mx.float32)

    def token(self, number: int) -> mx.array:
        count = 0 if self._tokens is None else len(self._tokens)
        if self._tokens is None or number >= count:
            raise NoiseError(
                f"{self.name} holds noise for {count} tokens; this run asks for one more.\n"
                "Use the settings it was recorded with, or record a longer run."
            )
        return mx.array(self._tokens[number]).astype(mx.float32)

    def _check(self, index: int, step: int) -> None:
        canvases, steps = self._ids.shape[:2]
        if index >= canvases or step >= steps:
            raise NoiseError(
                f"{self.name} holds noise for {canvases} canvases of {steps} steps; this run asks for step {step} of"
                f" canvas {index}.\nUse the settings it was recorded with, or record a longer run."
            )


class NoiseRecorder:
    """Passes another noise through and keeps what was used, for `save`."""

    def __init__(self, noise: Noise):
        self.noise = noise
        self._canvases: dict[int, np.ndarray] = {}
        self._steps: dict[tuple[int, int, int], np.ndarray] = {}
        self._tokens: dict[int, np.ndarray] = {}

    def canvas(self, index: int) -> mx.array:
        array = self.noise.canvas(index)
        self._canvases[index] = np.array(array)
        return array

    def draws(self, index: int, step: int) -> mx.array:
        return self._keep(DRAWS, index, step, self.noise.draws(index, step))

    def ids(self, index: int, step: int) -> mx.array:
        return self._keep(IDS, index, step, self.noise.ids(index, step))

    def path(self, index: int, step: int) -> mx.array:
        return self._keep(PATH, index, step, self.noise.path(index, step))

    def token(self, number: int) -> mx.array:
        array = self.noise.token(number)
        self._tokens[number] = np.array(array)
        return array

    def _keep(self, purpose: int, index: int, step: int, array: mx.array) -> mx.array:
        self._steps[purpose, index, step] = np.array(array)
        return array

    def save(self, path: str | os.PathLike[str], **provenance: object) -> None:
        """Write what was used; `provenance` goes in as JSON. What was at `path` is replaced at the end."""
        arrays = self._of_tokens() if self._tokens else self._of_canvases()
        with replacing(path) as file:
            np.savez_compressed(file, provenance=json.dumps(provenance), **arrays)

    def _of_canvases(self) -> dict[str, Any]:
        canvas = np.stack([self._canvases[c] for c in sorted(self._canvases)])
        steps = 1 + max(step for _, _, step in self._steps)
        shape = (canvas.shape[0], steps, *canvas.shape[1:])
        arrays = {"draws": np.zeros(shape, np.float32), "ids": np.zeros(shape, np.int32)}
        if any(purpose == PATH for purpose, _, _ in self._steps):
            arrays["path"] = np.zeros(shape, np.float32)
        for (purpose, c, step), array in self._steps.items():
            arrays[NAMES[purpose]][c, step] = array
        return {"canvas": canvas, **arrays}

    def _of_tokens(self) -> dict[str, Any]:
        tokens = np.stack([self._tokens[number] for number in sorted(self._tokens)])  # [T, B]
        none = np.zeros((0, 0, tokens.shape[1], 0), np.float32)
        canvas = np.zeros((0, tokens.shape[1], 0), np.int32)
        return {"canvas": canvas, "draws": none, "ids": none.astype(np.int32), "tokens": tokens}
