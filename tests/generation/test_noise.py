"""Noise: reproducible, independent of the batch, uniform, and replayable from a file."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.errors import NoiseError
from mlx_diffgemma.generation.noise import NoiseRecorder, RecordedNoise, SeededNoise


def noise(*seeds: int, length: int = 8, vocabulary: int = 50) -> SeededNoise:
    return SeededNoise(seeds, length=length, vocabulary=vocabulary)


def test_a_row_has_the_same_noise_in_every_batch() -> None:
    both, alone = noise(3, 7), noise(7)
    assert both.canvas(2)[1].tolist() == alone.canvas(2)[0].tolist()
    assert both.draws(1, 4)[1].tolist() == alone.draws(1, 4)[0].tolist()
    assert both.ids(1, 4)[1].tolist() == alone.ids(1, 4)[0].tolist()


def test_everything_but_the_address_is_different() -> None:
    arrays = [noise(s).ids(c, step).tolist() for s in (0, 1) for c in (0, 1) for step in (0, 1)]
    arrays += [noise(0).canvas(0).tolist(), noise(2**63).canvas(0).tolist(), noise(-1).canvas(0).tolist()]
    assert len({str(a) for a in arrays}) == len(arrays)


def test_the_global_random_state_is_left_alone() -> None:
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    noise(1).draws(0, 0)
    noise(1).canvas(0)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_ids_are_uniform_over_the_whole_vocabulary() -> None:
    vocabulary, total = 20, 40_000
    counts = np.bincount(np.array(noise(1, length=total, vocabulary=vocabulary).ids(0, 0))[0], minlength=vocabulary)
    assert len(counts) == vocabulary
    chi_square = ((counts - total / vocabulary) ** 2 / (total / vocabulary)).sum()
    assert chi_square < 43.8  # 99.9 % of a chi-square with 19 degrees of freedom


def test_draws_are_uniform() -> None:
    draws = np.array(noise(1, length=40_000).draws(0, 0))[0]
    assert draws.min() >= 0 and draws.max() < 1
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert ((counts - 2000) ** 2 / 2000).sum() < 43.8


def test_a_recording_gives_back_what_was_used(tmp_path: Path) -> None:
    recorder = NoiseRecorder(noise(1, 2))
    used = [recorder.canvas(0), recorder.draws(0, 0), recorder.ids(0, 0), recorder.canvas(1), recorder.ids(1, 2)]
    recorder.save(tmp_path / "noise.npz", seed=1)
    replay = RecordedNoise.load(tmp_path / "noise.npz")
    again = [replay.canvas(0), replay.draws(0, 0), replay.ids(0, 0), replay.canvas(1), replay.ids(1, 2)]
    assert [a.tolist() for a in used] == [a.tolist() for a in again]
    assert (replay.batch_size, replay.length) == (2, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["noise.npz"]


def test_a_recording_that_is_too_short_says_so(tmp_path: Path) -> None:
    recorder = NoiseRecorder(noise(1))
    recorder.canvas(0)
    recorder.ids(0, 0)
    recorder.save(tmp_path / "noise.npz")
    with pytest.raises(NoiseError, match="1 canvases of 1 steps; this run asks for step 1 of canvas 0"):
        RecordedNoise.load(tmp_path / "noise.npz").ids(0, 1)


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 broken"])
def test_a_damaged_recording_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "noise.npz").write_bytes(content)
    with pytest.raises(NoiseError, match="no recording of noise"):
        RecordedNoise.load(tmp_path / "noise.npz")
    with pytest.raises(NoiseError, match="there is no such file"):
        RecordedNoise.load(tmp_path / "absent.npz")


def test_shapes_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(NoiseError, match="do not fit together"):
        RecordedNoise(np.zeros((1, 1, 4)), np.zeros((1, 2, 1, 4)), np.zeros((1, 2, 1, 5)))
