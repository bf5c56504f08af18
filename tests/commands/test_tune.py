"""`mlx_diffgemma.tune` chooses what is surely faster and nothing else; what it remembers is used, or left alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_diffgemma import load, tune
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.files import tuned
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.model.tuning import DEFAULT, Tuning
from mlx_diffgemma.pipeline.machine.measuring import Step
from tests import small

Patch = pytest.MonkeyPatch
TRUNK = tune.Trial(field="trunk", values=("packed", "bf16"), together=False)
TILE = tune.Trial(field="tile", values=(8_192, 32_768, 65_536), together=True)
CHOICE = replace(DEFAULT, tile=16_384, scores=1 << 20)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.setenv("MLX_DIFFGEMMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Machine:
    """Steps of made-up length, on a machine that is now and then busy with something else."""

    def __init__(self, seed: int, seconds: dict[object, float], field: str):
        self.random, self.seconds, self.field, self.runs = np.random.default_rng(seed), seconds, field, 0

    def __call__(self, tunings: Sequence[Tuning]) -> list[list[float]]:
        self.runs += 1
        drift = self.random.uniform(0.9, 1.1)  # from process to process
        busy = self.random.uniform(1, 1.4, 21) * drift
        return [
            list(self.seconds[getattr(tuning, self.field)] * busy * self.random.uniform(0.97, 1.03, 21))
            for tuning in tunings
        ]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("trial", [TRUNK, TILE], ids=["processes", "turns"])
def test_a_slow_candidate_is_never_chosen(seed: int, trial: tune.Trial) -> None:
    seconds: dict[object, float] = {value: 1.0 + 0.05 * number for number, value in enumerate(trial.values)}
    chosen, _ = tune.choose(trial, DEFAULT, Machine(seed, seconds, trial.field))
    assert getattr(chosen, trial.field) == trial.values[0]


@pytest.mark.parametrize("seed", range(20))
def test_a_fast_candidate_is_chosen(seed: int) -> None:
    chosen, _ = tune.choose(TILE, DEFAULT, Machine(seed, {8_192: 1.0, 32_768: 0.9, 65_536: 0.95}, "tile"))
    assert chosen.tile == 32_768
    machine = Machine(seed, {"packed": 1.0, "bf16": 0.6}, "trunk")
    assert tune.choose(TRUNK, DEFAULT, machine)[0].trunk == "bf16"
    assert machine.runs == 4  # and once more the other way round


def test_a_candidate_without_room_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(tunings: Sequence[Tuning]) -> list[list[float]]:
        if tunings[0].trunk == "bf16":
            raise tune.NotMeasured("this model needs 60.0 GB and this machine lets it use 48.0 GB.")
        return [[1.0] * 7 for _ in tunings]

    assert tune.choose(TRUNK, DEFAULT, measure)[0].trunk == "packed"
    assert "trunk bf16: left out, this model needs 60.0 GB" in capsys.readouterr().err


def test_no_device_needs_more_than_12_processes() -> None:
    for gpu, metal in ((False, False), (True, False), (True, True)):
        every = tune.trials(gpu=gpu, metal=metal)
        assert sum(1 if trial.together else len(trial.values) for trial in every) + 2 <= 12
        assert {trial.field for trial in every} <= set(tuned.FIELDS)


def test_a_step_is_a_step() -> None:
    """Taken again it goes on with its own canvas, and leaves the prefix as it was."""
    step = Step(network=small.network(branches=1.0, sharpness=1.0), prefix=30)
    first = np.array(step.canvas)
    before = [np.array(array) for layer in step.cache.layers for array in layer.held or ()]
    assert step.take() > 0 and step.signal is not None and not np.array_equal(first, step.canvas)
    assert all(seconds >= 0 for seconds in step.parts().values())
    after = [np.array(array) for layer in step.cache.layers for array in layer.held or ()]
    assert step.cache.length == 30 and all(map(np.array_equal, before, after))


# --------------------------------------------------------------------------------------------------------- remembered


def test_load_uses_what_is_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    assert load().network.tuning == DEFAULT
    tuned.remember(BUILT_IN, "built-in", CHOICE, {"tile": "8192"})
    model = load()
    assert model.network.tuning == replace(CHOICE, trunk="auto") and not model.notices
    assert load(tuning=DEFAULT).network.tuning == DEFAULT
    tune.remembered(None, forget=False)
    assert "built-in: trunk auto, tile 16384, scores 1048576" in capsys.readouterr().out
    tune.remembered(str(BUILT_IN), forget=True)
    assert load().network.tuning == DEFAULT
    tune.remembered(None, forget=True)
    assert "Nothing is remembered." in capsys.readouterr().out


@pytest.mark.parametrize("key", ["chip", "system", "mlx", "mlx_diffgemma"])
def test_a_choice_of_other_circumstances_is_left_alone_with_one_line(key: str, monkeypatch: Patch) -> None:
    tuned.remember(BUILT_IN, "built-in", CHOICE, {})
    file = tuned.file_of(BUILT_IN)
    kept = json.loads(file.read_text())
    kept["measured_with"][key] = "another"
    file.write_text(json.dumps(kept))
    model = load()
    assert model.network.tuning == DEFAULT
    assert len(model.notices) == 1 and f"{key} another, now" in model.notices[0] and "\n" not in model.notices[0]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"tuning": {}}', "\x00", '{"measured_with": {}, "tuning": {"tile": 1}}']
    + [
        json.dumps({"measured_with": {}, "tuning": dict.fromkeys(tuned.FIELDS, 1) | change})
        for change in ({"tile": -1}, {"trunk": "gold"}, {"wired": "yes"}, {"scores": None}, {"scores": 1e9})
    ],
)
def test_a_broken_choice_is_left_alone_with_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    tuned.remember(BUILT_IN, "built-in", CHOICE, {})
    tuned.file_of(BUILT_IN).write_text(text)
    model = load()
    assert model.network.tuning == DEFAULT
    assert len(model.notices) == 1 and "left alone" in model.notices[0]
    tune.remembered(None, forget=False)
    assert "not a choice of mlx_diffgemma.tune" in capsys.readouterr().out


def steps(seconds: dict[int | None, float]):
    """A stand-in for processes that measure: a tile's steps take so long."""
    return lambda pack: lambda tunings: [[seconds.get(tuning.tile, 1.0)] * 21 for tuning in tunings]


def test_the_whole_command(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune, "in_a_process", steps({32_768: 0.5}))
    tune.tune(None)
    out, err = capsys.readouterr()
    assert "tile 32768" in out and "Remembered in" in out and "says little about the real one" in err
    assert load().network.tuning.tile == 32_768


def test_killed_half_way_what_finished_is_remembered(monkeypatch: Patch) -> None:
    def measure(tunings: Sequence[Tuning]) -> list[list[float]]:
        if tunings[0].scores != tunings[-1].scores:
            raise KeyboardInterrupt
        return [[0.5 if tuning.tile == 32_768 else 1.0] * 21 for tuning in tunings]

    monkeypatch.setattr(tune, "in_a_process", lambda pack: measure)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(None)
    assert load().network.tuning == replace(DEFAULT, tile=32_768)


def test_a_cache_that_cannot_be_written_is_said(
    cache: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(tune, "in_a_process", steps({32_768: 0.5}))
    tune.tune(None)
    assert "tile 32768" in (out := capsys.readouterr().out) and "cannot be remembered" in out
    assert load().network.tuning == DEFAULT


def test_two_at_once_is_refused(cache: Path) -> None:
    with tune._alone(cache), pytest.raises(ConfigError, match="another"), tune._alone(cache):
        pass


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(tune.NotMeasured, match="nowhere"):
        tune.in_a_process(str(tmp_path / "nowhere"))([DEFAULT])
