"""`bench --steps` takes a step to pieces, `bench --report` writes what a user can paste."""

import json
from pathlib import Path

import pytest

from mlx_diffgemma import bench, load
from mlx_diffgemma.model.tuning import Tuning
from mlx_diffgemma.pipeline.machine.measuring import PARTS, anatomy
from mlx_diffgemma.pipeline.machine.speeds import speeds
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


def test_a_product_s_speed_is_that_of_its_sums() -> None:
    """Each of the five once, and the figures are those of the shapes: operations and bytes are in one proportion."""
    network = small.network()
    found = {each["product"]: each for each in speeds(network)}
    assert len(found) == 5
    config = network.config
    queries, up = found["queries"], found["experts' gate and up"]
    assert (queries["rows"], up["rows"]) == (config.canvas_length, config.canvas_length * config.top_k_experts)
    for each, shares in (
        (queries, 1),
        (up, config.num_experts),
    ):  # of a matrix's float32 weights each row meets a share
        assert each["teraflops"] / each["gigabytes"] == pytest.approx(2e-3 * each["rows"] / 4 / shares)


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
    for word in (
        "- mlx: ",
        "- tuning: ",
        "- wired_bytes: ",
        "| fact |",
        "parts, each waited for",
        "× its limit",
        "TFLOP/s",
    ):
        assert word in text
