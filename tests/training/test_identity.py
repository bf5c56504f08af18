"""A folder belongs to one run: what differs is named, and a second process waits outside."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_diffgemma.errors import TrainingError
from mlx_diffgemma.files.folder import fingerprint_of
from mlx_diffgemma.training.data import Example
from mlx_diffgemma.training.identity import FILE, claimed, identity
from mlx_diffgemma.training.settings import Settings

DATA = [Example(prompt=(2, 5), response=(6, 7)), Example(prompt=(2, 6), response=(8,))]


PLAIN = Settings()


def made(settings: Settings = PLAIN, data: list[Example] = DATA, processes: int = 1, **origin: Any) -> Any:
    return identity(settings, data, processes, {"base": "abc", "adapter": {"rank": 4}} | origin)


OTHERS = {
    "learning_rate": made(Settings(learning_rate=5e-3)),
    "seed": made(Settings(seed=9)),
    "training data": made(data=DATA[:1]),
    "base": made(base="def"),
    "adapter": made(adapter={"rank": 8}),
    "processes": made(processes=2),
}


def test_the_same_run_goes_on_and_may_be_longer_or_watched_more(tmp_path: Path) -> None:
    for settings in (Settings(), Settings(), Settings(steps=9000, save_every=7, evaluate_every=3, keep=5)):
        with claimed(tmp_path, made(settings)) as locked:
            assert locked
        (tmp_path / "step-0000001").mkdir(exist_ok=True)


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_by_what_differs(tmp_path: Path, name: str) -> None:
    with claimed(tmp_path, made()):
        (tmp_path / "step-0000001").mkdir()
    said = (tmp_path / FILE).read_bytes()
    with pytest.raises(TrainingError, match=f"holds another run: its {name} is "), claimed(tmp_path, OTHERS[name]):
        pass
    assert (tmp_path / FILE).read_bytes() == said


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_without_checkpoints_belongs_to_nobody(tmp_path: Path, name: str) -> None:
    with claimed(tmp_path, made()):
        pass
    with claimed(tmp_path, OTHERS[name]):
        assert json.loads((tmp_path / FILE).read_text()) == OTHERS[name]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        claimed(tmp_path, made()),
        pytest.raises(TrainingError, match="another process is training into"),
        claimed(tmp_path, made()),
    ):
        pass


def test_checkpoints_without_a_run_are_not_taken_up(tmp_path: Path) -> None:
    (tmp_path / "step-0000001").mkdir()
    with pytest.raises(TrainingError, match=r"has checkpoints and no run\.json"), claimed(tmp_path, made()):
        pass


def test_a_fingerprint_is_of_contents_not_of_places(tmp_path: Path) -> None:
    for name, text in (("a", "weights"), ("b", "weights"), ("c", "weightz")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(text)
    a, b, c = (fingerprint_of(tmp_path / name) for name in "abc")
    assert a == b != c
