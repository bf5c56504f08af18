"""The recordings of transformers, replayed without it: single passes, and whole runs of the sampler."""

import numpy as np
import pytest

from mlx_diffgemma.files import shipped
from mlx_diffgemma.proof import recordings
from mlx_diffgemma.proof.recordings import Recording
from mlx_diffgemma.proof.replay import replay_logits, replay_trajectory

LOGITS = sorted(shipped.references().glob("logits-*-float32.npz"))
TRAJECTORIES = sorted(shipped.references().glob("trajectory-*.npz"))


def name(path) -> str:
    return path.stem


def test_there_are_recordings_of_every_kind() -> None:
    stems = [path.stem for path in (*LOGITS, *TRAJECTORIES)]
    assert {"logits-small-float32", "logits-real-heads-float32"} <= set(stems)
    assert len(TRAJECTORIES) >= 10


@pytest.mark.parametrize("path", sorted(shipped.references().glob("*.npz")), ids=name)
def test_a_recording_says_where_it_comes_from(path) -> None:
    provenance = Recording.load(path).provenance
    assert {"kind", "device", "dtype", "versions", "commit", "model"} <= provenance.keys()
    assert provenance["versions"]["transformers"].startswith("5.23")
    assert len(provenance["commit"]) == 40


@pytest.mark.parametrize("path", LOGITS, ids=name)
def test_logits(path) -> None:
    recording = Recording.load(path)
    for case in replay_logits(recording, recording.network()).values():
        assert case.ratio <= 2.5
        assert case.same_best == 1.0


@pytest.mark.parametrize("path", TRAJECTORIES, ids=name)
def test_trajectory(path) -> None:
    recording = Recording.load(path)
    assert replay_trajectory(recording, recording.network()) == []


def test_the_trajectories_cover_every_way_to_end() -> None:
    told = {path.stem.removeprefix("trajectory-settling-"): Recording.load(path) for path in TRAJECTORIES}
    batch = told["batch"].arrays["row_steps"]
    assert len(set(batch[0].tolist())) > 1  # rows settle at different steps
    assert 0 in batch[-1] and batch[-1].any()  # and finish at different canvases
    assert not told["steps-run-out"].arrays["settled"].all()
    assert len(told["stop"].arrays["canvas"]) < 3
    window = told["behind-window"].provenance["model"]["config"]["text_config"]["sliding_window"]
    assert told["behind-window"].arrays["prompt"].shape[1] > window


@pytest.mark.parametrize("what", ["guess", "accepted", "best", "entropy", "committed", "row_steps", "settled"])
def test_a_replay_notices_a_difference(what: str) -> None:
    recording = Recording.load(shipped.references() / "trajectory-settling-stop.npz")
    first = (0,) * recording.arrays[what].ndim
    recording.arrays[what][first] = 1 - recording.arrays[what][first]
    assert replay_trajectory(recording, recording.network())


def test_weights_follow_from_name_shape_and_seed_alone() -> None:
    one = recordings.random_weights({"model.decoder.norm.weight": (4,), "a.weight": (2, 3)}, seed=5)
    two = recordings.random_weights({"a.weight": (2, 3)}, seed=5)
    assert np.array_equal(one["a.weight"], two["a.weight"])
    known = [float.fromhex(x) for x in ("0x1.02e4fcp+0", "0x1.7d3efp-1", "0x1.117ac8p+0")]
    assert recordings.random_weights({"a": (3,)}, seed=0)["a"].tolist() == known
