"""Making packs: round trips through two readers, refusals, interruptions, verification."""

import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlx_diffgemma.config import RELEASED
from mlx_diffgemma.convert import main
from mlx_diffgemma.files import checkpoint, quantization, shards
from mlx_diffgemma.files.checkpoint import open_checkpoint
from mlx_diffgemma.files.folder import INDEX
from mlx_diffgemma.files.shards import read_header
from mlx_diffgemma.files.weights import load_network
from mlx_diffgemma.packing import conversion
from mlx_diffgemma.packing.card import model_card, output_config
from mlx_diffgemma.packing.conversion import convert, plan_conversion
from mlx_diffgemma.packing.recipes import load_recipe, recipe_names
from tests import synthetic
from tests.synthetic import published, small_config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with the released layout; nobody writes to it."""
    return synthetic.small(tmp_path_factory.mktemp("source") / "checkpoint")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def convert_folder(folder: Path, target: Path, recipe: str = "q4", **changes: Any) -> Path:
    convert(plan_conversion(open_checkpoint(folder), replace(load_recipe(recipe), **changes)), target)
    return target


# ---------------------------------------------------------------------------------------------------- round trips


def saved_by_transformers(folder: Path, dtype: str) -> Path:
    """A fine-tuned checkpoint as transformers writes it: its own config dialect, one file, no index."""
    import torch
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(small_config()))
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.6, 1.4)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "released": lambda folder: synthetic.small(folder),
    "no-index": lambda folder: synthetic.small(folder, index=False),
    "single-file": lambda folder: synthetic.small(folder, limit=1 << 40, index=False),
    "float32": lambda folder: synthetic.small(folder, dtype="F32"),
    "float16": lambda folder: synthetic.small(folder, dtype="F16"),
    "other-sizes": lambda folder: synthetic.small(
        folder,
        config=small_config(
            hidden_size=96, intermediate_size=80, moe_intermediate_size=40, num_experts=5, top_k_experts=3
        ),
    ),
    "transformers-float32": lambda folder: saved_by_transformers(folder, "float32"),
    "transformers-bfloat16": lambda folder: saved_by_transformers(folder, "bfloat16"),
}


def inputs(size: int) -> tuple[mx.array, mx.array, mx.array]:
    """A prompt longer than the sliding window, a canvas, and the logits of a step before."""
    rng = np.random.default_rng(0)
    prompt, canvas = (mx.array(rng.integers(0, size, (1, length))) for length in (21, 32))
    return prompt, canvas, mx.array(3 * rng.standard_normal((1, 32, size), np.float32))


def vocabulary(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]


def our_logits(folder: Path) -> mx.array:
    network = load_network(folder)
    network.set_dtype(mx.float32)
    prompt, canvas, before = inputs(vocabulary(folder))
    cache = network.make_cache()
    network.encode(prompt, cache)
    return network.logits(canvas, cache, before)


def mlx_vlms_logits(folder: Path) -> mx.array:
    from mlx_vlm.utils import load_model

    model = load_model(folder)
    prompt, canvas, before = inputs(vocabulary(folder))
    return model(input_ids=prompt, canvas_ids=canvas, self_conditioning_logits=before).logits


def transformers_logits(folder: Path) -> mx.array:
    import torch
    from transformers import DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    prompt, canvas, before = (torch.tensor(np.array(array)) for array in inputs(vocabulary(folder)))
    with torch.no_grad():
        answer = model(input_ids=prompt.long(), decoder_input_ids=canvas.long(), self_conditioning_logits=before)
    return mx.array(answer.logits.numpy())


def distance(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_gives_the_logits_it_had(kind: str, tmp_path: Path) -> None:
    """The checkpoint read by us and by transformers, its pack read by us and by mlx-vlm: four times the same."""
    folder = KINDS[kind](tmp_path / "source")
    pack = convert_folder(folder, tmp_path / "pack", "bf16", dtype="float32")
    ours = our_logits(pack)
    assert float(mx.abs(ours).max()) > 0.5
    assert distance(ours, our_logits(folder)) == 0
    assert distance(ours, mlx_vlms_logits(pack)) < 1e-4
    if kind != "no-index":  # transformers reads no shards without one
        assert distance(ours, transformers_logits(folder)) < 1e-4


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_gives_a_pack_that_both_read_alike(recipe: str, source: Path, tmp_path: Path) -> None:
    pack = convert_folder(source, tmp_path / "pack", recipe, dtype="float32")
    assert distance(our_logits(pack), mlx_vlms_logits(pack)) < 1e-4


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_plan_is_true_to_the_byte(recipe: str, source: Path, tmp_path: Path) -> None:
    plan = plan_conversion(open_checkpoint(source), load_recipe(recipe), shard_bytes=200_000)
    convert(plan, tmp_path / "pack")
    files = sorted((tmp_path / "pack").glob("*.safetensors"))
    assert {file.name: file.stat().st_size for file in files} == {shard.name: shard.size for shard in plan.shards}
    assert len(files) > 1
    tensors = [tensor for file in files for tensor in read_header(file)]
    assert sum(tensor.nbytes for tensor in tensors) == plan.total_size
    assert all(tensor.start % shards.SIZES[tensor.dtype] == 0 for tensor in tensors)
    arrays = {name: array for file in files for name, array in mx.load(str(file)).items()}  # pyright: ignore
    assert arrays.keys() == json.loads((tmp_path / "pack" / INDEX).read_text())["weight_map"].keys()
    how = {item.source.path: item.how for item in plan.planned}
    original = open_checkpoint(source).tensors
    for path in ("model.decoder.embed_tokens", "model.decoder.layers.1.experts.down_proj"):
        raw = mx.load(str(original[f"{path}.weight"].file))[original[f"{path}.weight"].name]  # pyright: ignore
        packing = how[path]
        whole = quantization.quantize(raw, packing) if packing else {"weight": raw}  # pyright: ignore
        assert all(mx.array_equal(arrays[f"{path}.{part}"], array) for part, array in whole.items())


def test_an_unpacked_pack_is_as_good_a_source(source: Path, tmp_path: Path) -> None:
    """For someone who has the bf16 pack and wants q4: the same bytes."""
    unpacked = convert_folder(source, tmp_path / "bf16", "bf16")
    assert contents(convert_folder(unpacked, tmp_path / "twice")) == contents(convert_folder(source, tmp_path / "once"))


def test_config_and_what_lies_beside_are_as_the_published_packs_have_them(tmp_path: Path) -> None:
    """config.json of a bf16 pack of the released config: the published bytes."""
    released = published("released/config.json")
    (tmp_path / "config.json").write_text(json.dumps(released))
    (tmp_path / "generation_config.json").write_text(json.dumps(published("released/generation_config.json")))
    model = checkpoint.read_config(tmp_path)
    made = checkpoint.Checkpoint(folder=tmp_path, raw_config=released, config=model, tensors={})
    text = json.dumps(output_config(made, "bfloat16", {}), indent=4)
    assert text == lzma.decompress((synthetic.DATA / "mlx-community/bf16.config.json.xz").read_bytes()).decode()
    block = published("mlx-community/4bit.config.json")["quantization"]
    assert output_config(made, "bfloat16", block) == published("mlx-community/4bit.config.json")


def test_the_pack_comes_with_everything_beside_the_weights(source: Path, tmp_path: Path) -> None:
    pack = convert_folder(source, tmp_path / "pack")
    for name in (*synthetic.SIDES, "generation_config.json"):
        assert (pack / name).read_bytes() == (source / name).read_bytes()
    card = (pack / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\n")
    assert "| experts | 24 | 4-bit/64 | 4.50 | 442,368 |" in card
    assert "It sees pictures: its vision tower is bfloat16, 0.00 GB." in card
    assert not (pack / conversion.PLAN).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_the_model_card_names_the_source_revision(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "hub" / "snapshots" / "0123abc"
    copy.mkdir(parents=True)
    for file in source.iterdir():
        (copy / file.name).symlink_to(file)
    plan = plan_conversion(open_checkpoint(copy), load_recipe("q4"), repo="google/diffusiongemma-26B-A4B-it")
    card = model_card(plan)
    assert "base_model: google/diffusiongemma-26B-A4B-it" in card
    assert "at revision `0123abc`" in card
    assert f"{plan.total_size:,}" in card


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_converts_and_verifies(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "pack"
    made = run("--hf-path", source, "--mlx-path", target, "--verify")
    assert made.exit_code == 0, made.stderr
    assert f"converting: {len(open_checkpoint(source).tensors)}/" in made.stderr
    assert "relative RMS error" in made.stdout
    before = contents(target)
    again = run("--hf-path", source, "--mlx-path", target, "--verify")
    assert again.exit_code == 0, again.stderr
    assert "converting" not in again.stderr
    data = bytearray((target / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (target / "model.safetensors").write_bytes(data)
    damaged = run("--hf-path", source, "--mlx-path", target, "--verify")
    assert damaged.exit_code == 1
    assert "is not what its packing makes of the source" in damaged.stderr
    repaired = run("--hf-path", source, "--mlx-path", target, "--verify", "--force")
    assert repaired.exit_code == 0, repaired.stderr
    assert contents(target) == before


def test_a_dry_run_writes_nothing_and_is_exact(source: Path, tmp_path: Path) -> None:
    dry = run("--hf-path", source, "--mlx-path", tmp_path / "pack", "--dry-run", "--recipe", "q6")
    assert dry.exit_code == 0, dry.stderr
    assert not list(tmp_path.iterdir())
    pack = convert_folder(source, tmp_path / "pack", "q6")
    assert f"weight files: {(pack / 'model.safetensors').stat().st_size:,} bytes" in dry.stdout
    assert f"{json.loads((pack / INDEX).read_text())['metadata']['total_size']:,}" in dry.stdout


def test_a_dry_run_of_a_hub_repository_needs_its_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published("released/config.json")))
    asked: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append({"repo": repo} | options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    dry = run("--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert asked[0]["repo"] == RELEASED
    assert not any("safetensors" in pattern for pattern in asked[0]["allow_patterns"])
    assert "16,556,429,016" in dry.stdout
    assert "32 GB" in dry.stdout
    assert "Prompts with pictures: 1.15 GB more, the vision tower; others leave it on the disk." in dry.stdout


def test_uploads_are_refused_early_and_done_late(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    calls: list[str] = []

    class Hub:
        def whoami(self) -> None:
            raise errors.LocalTokenNotFoundError("no token")

        def create_repo(self, repo: str, **options: Any) -> None:
            calls.append(f"create {repo}")

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append(f"upload {sorted(contents(folder_path))[0]} to {repo_id}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    options = ("--hf-path", source, "--mlx-path", tmp_path / "pack", "--upload-repo", "me/pack")
    refused = run(*options)
    assert refused.exit_code == 1
    assert "Run `hf auth login`" in refused.stderr
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Hub, "whoami", lambda self: None)
    done = run(*options)
    assert done.exit_code == 0, done.stderr
    assert calls == ["create me/pack", "upload README.md to me/pack"]
    assert "https://huggingface.co/me/pack" in done.stdout


def test_experimental_recipes_and_odd_widths_are_announced(tmp_path: Path) -> None:
    source = KINDS["other-sizes"](tmp_path / "source")
    made = run("--hf-path", source, "--mlx-path", tmp_path / "pack", "--recipe", "q3")
    assert made.exit_code == 0, made.stderr
    assert "Warning: recipe q3 is experimental." in made.stderr
    assert "experts.down_proj (4 ×): 3-bit/64 does not divide their width: bfloat16 instead." in made.stderr
    load_network(tmp_path / "pack")


def test_a_source_without_a_tower_makes_a_pack_without_one(tmp_path: Path) -> None:
    config = synthetic.small_config()
    del config["vision_config"]
    source = synthetic.small(tmp_path / "source", config=config)
    dry = run("--hf-path", source, "--dry-run")
    assert "No vision tower: the pack cannot see pictures." in dry.stdout
    pack = convert_folder(source, tmp_path / "pack", "q4")
    assert "It has no vision tower: it cannot see pictures." in (pack / "README.md").read_text()
    load_network(pack)
