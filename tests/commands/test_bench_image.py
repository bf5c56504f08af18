"""`bench --image` says what a picture costs, and refuses a pack that cannot see one."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_diffgemma import bench
from mlx_diffgemma.model.network import leaves
from mlx_diffgemma.model.vision import Eyes
from mlx_diffgemma.model.vision_config import VisionConfig
from mlx_diffgemma.pipeline.machine.measuring import looking
from mlx_diffgemma.text.pictures.images import BUDGETS
from tests import small
from tests.model.eyes import vision_config

VISION = vision_config(hidden_size=64, head_dim=32, num_hidden_layers=1, position_embedding_size=128)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The small model with a tower."""
    made = small.write_checkpoint(tmp_path / "model")
    weights: Any = mx.load(str(made / "model.safetensors"))
    tower = leaves(Eyes(VisionConfig.from_dict(VISION), small.CONFIG["text_config"]["hidden_size"]).parameters())
    whole = weights | {f"model.encoder.{name}": array for name, array in tower.items()}
    mx.eval(whole)
    mx.save_safetensors(str(made / "model.safetensors"), whole)
    (made / "config.json").write_text(json.dumps(small.CONFIG | {"vision_config": VISION}))
    return made


def run(*options: str | Path) -> Any:
    return CliRunner().invoke(bench.main, [*map(str, options)])


def test_a_picture_is_seen_and_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = run("--model", folder, "--only", "fact", "--repeat", "1", "--image", "70", "--output", out)
    assert done.exit_code == 0, done.output
    assert "A picture, scaled to 432 × 336, 63 tokens of 70:" in done.output
    told = json.loads(out.read_text())["picture"]
    assert (told["tokens"], told["patches"]) == (63, 567)
    assert "A picture, scaled to 432 × 336" in run("--report", out).output


def test_a_pack_that_cannot_see_is_refused_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    """The built-in model's tower is a stand-in; the other pack has none."""
    out = tmp_path / "bench.json"
    (folder / "config.json").write_text(json.dumps(small.CONFIG))
    for model, says in (
        ((), "eyes know 4 places a side, and a picture of 280 tokens"),
        (("--model", folder), "has no vision tower, so it cannot see pictures"),
    ):
        refused = run(*model, "--image", "280", "--output", out)
        assert refused.exit_code == 1
        assert says in refused.output
        assert "runs …" not in refused.output and not out.exists()


def test_budgets_are_the_five() -> None:
    (option,) = (option for option in bench.main.params if option.name == "image")
    assert [int(choice) for choice in option.type.choices] == list(BUDGETS)  # type: ignore[attr-defined]


def test_memory_grows_with_the_budget_within_what_is_estimated() -> None:
    eyes = Eyes(VisionConfig.from_dict(vision_config(hidden_size=256, intermediate_size=900, head_dim=64)), 64)
    found = [looking(eyes, budget, 1) for budget in (70, 140)]
    assert found[0]["looking_bytes"] < found[1]["looking_bytes"]
    assert all(each["looking_bytes"] <= each["estimated_bytes"] for each in found), found
