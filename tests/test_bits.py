"""benchmarks/bits.py: equal sides are equal, and what is planted in one is noticed, told and measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bits, bits_runs, common

SEEDED, RECORDED = "restless/prompt-65-chunks", "restless/steps-4"
ENTROPY = np.array([[0.08, 0.01, 0.5, 0.04]], np.float32)


def step(number: int, **changed: np.ndarray) -> bits_runs.Record:
    """One step's record of four positions."""
    arrays = {
        "best": np.array([[1, 2, 3, 4]]),
        "guess": np.array([[1, 2, 3, 4]]),
        "accepted": np.array([[True, True, False, True]]),
        "entropy": ENTROPY,
        "settled": np.array([False]),
    }
    return f"canvas 0, step {number}", arrays | changed


def test_what_is_planted_is_noticed_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other draws: a run from a seed changes, one from recorded noise does not."""
    with bits.tree("HEAD", tmp_path / "planted") as planted:
        with (planted / "mlx_diffgemma" / "__init__.py").open("a") as file:
            file.write("\nimport mlx.core as mx\ndraw = mx.random.uniform\n")
            file.write("mx.random.uniform = lambda **options: 0.5 * draw(**options)\n")
        assert bits.main(["HEAD", str(planted), "--only", SEEDED, RECORDED, "--json", str(tmp_path / "bits.json")]) == 1
    assert not (tmp_path / "planted").exists()
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "2 runs: 1 equal, 0 with other entropies, 1 with other ids"
    assert told[0].startswith(f"{SEEDED}: ids from canvas 0, step ") and "; guess: " in told[0]
    (found,) = json.loads((tmp_path / "bits.json").read_text())["differences"]
    assert (found["run"], found["kind"], found["ulps"]) == (SEEDED, "ids", 0)


def test_how_far_a_draw_is_from_another_guess(tmp_path: Path) -> None:
    """From the next id and from the one before: moved so far the draw gives it, moved a quarter as far it does not."""
    bits.make_models(common.ROOT, tmp_path / "models", {"restless"})
    run, place = bits_runs.RUNS[RECORDED], (0, 2, 3)
    model = bits_runs.model(tmp_path / "models" / "restless", None)
    noise = bits_runs.noise(run, model, 1)

    def guess(by: float) -> int:
        return bits_runs.guess(model, run, bits_runs.Moved(noise, place, by), place)

    for sign in (1, -1):
        target = guess(0) + sign
        by = sign * bits_runs.distance(run, tmp_path / "models", place, target)
        assert 0 < abs(by) <= 1
        assert sign * guess(by / 4) < sign * target <= sign * guess(by)


def test_entropies_are_compared_bit_for_bit() -> None:
    nearly = np.nextafter(ENTROPY, np.float32(1))
    found = bits.difference(RECORDED, [step(0), step(1)], [step(0), step(1, entropy=nearly)])
    assert found is not None
    assert (found.kind, found.where, found.ulps) == ("entropies", "canvas 0, step 1", 1)
    assert found.nats == np.spacing(np.float32(0.5))
    assert bits.difference(RECORDED, [step(0)], [step(0)]) is None


def test_units_of_the_last_place_count_through_zero() -> None:
    tiny = np.float32(1e-45)  # the smallest above 0
    assert bits.apart(np.array([tiny]), np.array([-tiny]))[0] == 3  # −0 and +0 are two bit patterns
    assert bits.apart(np.array([np.nan, 1.0]), np.array([np.nan, 1.0]))[0] == 0


def test_behind_the_first_changed_id_nothing_is_compared() -> None:
    guess = np.array([[1, 2, 3, 9]])
    old = [step(0), step(1)]
    new = [step(0, guess=guess), step(1, entropy=2 * ENTROPY)]
    found = bits.difference(RECORDED, old, new)
    assert found is not None
    assert (found.kind, found.where, found.ulps, found.guess) == ("ids", "canvas 0, step 0", 0, ((0, 0, 3), 9))
    assert found.ids == "guess: 1 of 4 differ at [0, 3]: 4 → 9, entropy there 4.00e-02 nats"


def test_an_acceptance_tells_its_room() -> None:
    """The entropies before the third in order sum to 0.05; the bound is 0.1."""
    accepted = np.array([[False, True, False, True]])
    found = bits.difference(RECORDED, [step(0)], [step(0, accepted=accepted)])
    assert found is not None and "5.0e-02 nats from the entropy bound" in found.ids


def test_a_run_that_fails_or_stops_earlier_is_no_equal_run() -> None:
    failed = bits.difference(RECORDED, [step(0)], "PromptError: none")
    shorter = bits.difference(RECORDED, [step(0), step(1)], [step(0)])
    elsewhere = bits.difference(RECORDED, [step(1)], [step(2)])
    assert failed is not None and (failed.kind, failed.where) == ("failed", "NEW")
    assert shorter is not None and (shorter.kind, shorter.where) == ("ids", "the end")
    assert elsewhere is not None and elsewhere.ids == "NEW is at canvas 0, step 2"


def test_the_runs_are_many_and_of_every_kind() -> None:
    runs = bits_runs.RUNS
    assert len(runs) >= 40
    assert {run.recorded for run in runs.values()} == {run.turns for run in runs.values()} == {True, False}
    assert {len(run.prompts) for run in runs.values() if not run.turns} == {1, 2, 3, 4}
    assert {run.model for run in runs.values()} >= {"built-in", "restless", "wide", "q8", "q4", "mxfp4", "q2"}
