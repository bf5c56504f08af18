"""`bench --steps` takes a step to pieces, `bench --report` writes what a user can paste."""

import json
from pathlib import Path

import pytest

from mlx_diffgemma import bench, load
from mlx_diffgemma.model.tuning import Tuning
from mlx_diffgemma.pipeline.measuring import PARTS, anatomy
from tests import small

KEYS = {"first", "twentieth", "typical", "after_a_pause"}


def test_a_step_has_parts_and_limits() -> None:
    network = small.network()
    found = anatomy(network, 100, 0.0)
    assert KEYS <= found.keys() and set(found["parts"]) == set(PARTS)
    assert set(found["limits"]) == {"compute", "memory", "kernels"}
    assert found["limits"][found["limit"]] == max(found["limits"].values()) > 0
    network.tuning = Tuning(scores=1)  # every query alone
    assert anatomy(network, 100, 0.0)["kernels"] > found["kernels"] + 100


def test_a_report_is_text_for_an_issue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    measure = ["--repeat", "1", "--only", "fact", "--steps", "--pause", "0", "--output", str(out)]
    for options in (measure, ["--report", str(out)]):
        with pytest.raises(SystemExit) as stopped:
            bench.main(options)
        assert not stopped.value.code
    steps = json.loads(out.read_text())["steps"]
    limit = load().config.max_position_embeddings - load().config.canvas_length
    assert [step["prefix"] for step in steps] == sorted({min(prefix, limit) for prefix in bench.PREFIXES})
    text = capsys.readouterr().out
    for word in ("- mlx: ", "- tuning: ", "- wired_bytes: ", "| fact |", "parts, each waited for", "× its limit"):
        assert word in text
