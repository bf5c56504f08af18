"""What `check` asks of the vision tower: that it finds this one right, and a wrong one wrong."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.model import vision
from mlx_diffgemma.proof import sight
from mlx_diffgemma.proof.findings import Finding
from tests import synthetic
from tests.model.eyes import TOWERS, Case, expected, rms

Patch = pytest.MonkeyPatch


def wrong() -> set[str]:
    return {finding.name.split(",")[0].split(" of ")[0] for finding in sight.sight() if finding.passed is False}


def test_the_tower_is_right() -> None:
    findings = list(sight.sight())
    assert [finding.passed for finding in findings] == [True] * 12 + [None]
    assert findings[-1].says == "no --model was given."
    names = " ".join(finding.name for finding in findings)
    wanted = ("attention of 12 × 12", "rotation of 3 × 51", "pooling of 33 × 6", "random tower")
    assert all(word in names for word in wanted)


@pytest.mark.parametrize("name", ["released", "heads of 72", "small patches"])
def test_the_truth_is_the_references(name: str) -> None:
    case = Case(name, 12, 18)
    truth, rival = expected(case)
    ours = sight.truth_of_tower(TOWERS[name].eyes(), case.patches(), case.columns)
    assert rms(ours - truth) < 0.1 * rms(rival - truth)


MUTANTS: dict[str, tuple[str, Callable[..., Any], set[str]]] = {
    "the last key is lost": (
        "look",
        lambda f, q, k, v: f(q, k[:-1], v[:-1]),
        {"attention", "a random tower"},
    ),
    "a head's tail is lost": (
        "look",
        lambda f, q, k, v: f(q * (mx.arange(72) < 64), k, v),
        {"attention", "a random tower"},
    ),
    "rotation of text": (
        "rotation",
        lambda f, c, *rest: f(dataclasses.replace(c, rope_theta=1e4), *rest),
        {"rotation", "a random tower"},
    ),
    "runs are pooled": (
        "pool",
        lambda f, x, r, c, k: x.reshape(-1, k * k, x.shape[-1]).mean(axis=1),
        {"pooling", "a random tower"},
    ),
    "gelu is the exact one": ("geglu", lambda f, gate, up: mx.sigmoid(1.702 * gate) * gate * up, {"a random tower"}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_tower_is_found(name: str, monkeypatch: Patch) -> None:
    what, change, found = MUTANTS[name]
    original = getattr(vision, what)
    monkeypatch.setattr(vision, what, lambda *arguments: change(original, *arguments))
    assert wrong() == found


# ------------------------------------------------------------------------------------------------ the pack's own tower


def own(folder: Path) -> Finding:
    return sight._own(folder)


def test_a_packs_own_tower_gives_numbers(tmp_path: Path) -> None:
    finding = own(synthetic.small(tmp_path))
    assert finding.passed
    assert finding.figures["from_float64"] < 1e-5
    assert "4 soft tokens of RMS" in finding.says


def test_a_tower_that_gives_none_is_wrong(tmp_path: Path) -> None:
    plain = synthetic.random_fill(0, "BF16")

    def fill(name: str, shape: tuple[int, ...]) -> bytes:
        raw = plain(name, shape)
        return b"\xff\xff" * (len(raw) // 2) if name.endswith("std_scale") else raw

    finding = own(synthetic.small(tmp_path, fill=fill))
    assert finding.passed is False
    assert "no numbers" in finding.says


@pytest.mark.parametrize("lacking", ["config", "tower"])
def test_a_pack_without_one_is_left_out_and_said(lacking: str, tmp_path: Path) -> None:
    folder = synthetic.small(tmp_path, index=False, limit=1 << 40)
    values = json.loads((folder / "config.json").read_text())
    if lacking == "config":
        del values["vision_config"]
        (folder / "config.json").write_text(json.dumps(values))
    else:
        weights: Any = mx.load(str(folder / "model.safetensors"))
        text = {name: weight for name, weight in weights.items() if "vision" not in name}
        mx.eval(text)
        mx.save_safetensors(str(folder / "model.safetensors"), text)
    finding = own(folder)
    assert finding.passed is None
    assert "has no vision tower" in finding.says


def test_a_stand_in_is_left_out() -> None:
    """The built-in model's."""
    finding = own(BUILT_IN)
    assert finding.passed is None
    assert "a stand-in" in finding.says
