"""Reading checkpoints: the released layout, the published packs, the strict load."""

import hashlib
import json
import lzma
import math
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.config import RELEASED, ModelConfig
from mlx_diffgemma.errors import CheckpointError, ConfigError, DiffGemmaError
from mlx_diffgemma.files import checkpoint, hub
from mlx_diffgemma.files.checkpoint import open_checkpoint
from mlx_diffgemma.files.folder import INDEX
from mlx_diffgemma.files.layout import expected_tensors, find_rule, is_vision, rules, sources
from mlx_diffgemma.files.quantization import packing
from mlx_diffgemma.files.shards import SIZES
from mlx_diffgemma.files.shipped import knowledge
from mlx_diffgemma.files.weights import load_network
from mlx_diffgemma.pipeline.loading import load
from tests import small, synthetic
from tests.synthetic import published

KINDS = ("4bit", "8bit", "bf16")


def released() -> ModelConfig:
    return ModelConfig.from_dict(published("released/config.json"))


def test_names_and_shapes_rebuild_the_released_files_byte_for_byte() -> None:
    shapes = expected_tensors(released())
    shards = synthetic.assign(shapes, 2, 5_000_000_000)
    facts = published("released/shards.json")
    assert len(shapes) == 1047
    assert len(shards) == len(facts) == 11
    where = {}
    for names, (file, fact) in zip(shards, facts.items(), strict=True):
        header, size = synthetic.encode_header({name: ("BF16", shapes[name]) for name in sorted(names)})
        assert hashlib.sha256(header).hexdigest() == fact["header_sha256"], file
        assert len(header) + size == fact["size"], file
        where |= dict.fromkeys(names, file)
    index = lzma.decompress((synthetic.DATA / "released" / f"{INDEX}.xz").read_bytes()).decode()
    assert synthetic.encode_index(shapes, where, 2) == index


def test_every_released_name_has_a_rule_and_every_rule_a_name() -> None:
    names = expected_tensors(released())
    found = {name: find_rule(name) for name in names}
    assert all(rule and rule.fate in ("keep", "rename") and rule.because for rule, _ in found.values())
    assert {rule.component for rule, _ in found.values() if rule and not rule.component} == set()
    packed = [name if name.endswith(".weight") else f"{name}.weight" for name in names if ".experts." in name]
    used = {find_rule(name)[0] for name in (*names, *packed)}
    shortened = [rule for rule in rules() if rule.fate == "rename" and rule.component == "vision"]  # in packs of others
    unused = [rule for rule in rules() if rule.fate in ("keep", "rename") and rule not in (*used, *shortened)]
    assert unused == []
    described = tomllib.loads((knowledge() / "diffusiongemma-26b-a4b.toml").read_text())
    assert described["source"]["repo"] == RELEASED


@pytest.mark.parametrize(
    ("name", "fate", "target"),
    [
        ("lm_head.weight", "drop", "model.decoder.embed_tokens.weight"),
        ("model.encoder.language_model.norm.weight", "drop", "model.decoder.norm.weight"),
        (
            "model.encoder.language_model.layers.3.experts.down_proj",
            "drop",
            "model.decoder.layers.3.experts.down_proj",
        ),
        (
            "model.encoder.language_model.layers.3.layer_scalar",
            "keep",
            "model.encoder.language_model.layers.3.layer_scalar",
        ),
        ("model.decoder.layers.7.experts.gate_up_proj", "rename", "model.decoder.layers.7.experts.gate_up_proj.weight"),
    ],
)
def test_rules_name_the_right_target(name: str, fate: str, target: str) -> None:
    rule, found = find_rule(name)
    assert rule and (rule.fate, found) == (fate, target)


def published_pack(kind: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a published pack stores by our reckoning: the names come from its index, everything else from us."""
    config = published(f"mlx-community/{kind}.config.json")
    model = ModelConfig.from_dict(config)
    index = published(f"mlx-community/{kind}.{INDEX}")["weight_map"]
    stored = {}
    for source in sources(model):
        if f"{source.path}.scales" in index:
            how = checkpoint._packing_of(source.path, source.path, model)
            for part, what in packing(source.shape, how, "BF16").items():
                stored[f"{source.path}.{part}"] = what
        else:
            stored[source.name] = ("BF16", source.shape)
    return stored


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_sizes_equal_the_published_packs(kind: str) -> None:
    index = published(f"mlx-community/{kind}.{INDEX}")
    stored = published_pack(kind)
    assert stored.keys() == index["weight_map"].keys()
    size = sum(SIZES[dtype] * math.prod(shape) for dtype, shape in stored.values())
    assert size == index["metadata"]["total_size"]


def write_published(folder: Path, kind: str) -> Path:
    """A published pack without its content, under its own names, config and shard assignment."""
    where = published(f"mlx-community/{kind}.{INDEX}")["weight_map"]
    stored = published_pack(kind)
    for file in set(where.values()):
        header, size = synthetic.encode_header({name: stored[name] for name in sorted(stored) if where[name] == file})
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + size)
    (folder / INDEX).write_text(json.dumps(published(f"mlx-community/{kind}.{INDEX}")))
    (folder / "config.json").write_text(json.dumps(published(f"mlx-community/{kind}.config.json")))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_published_packs_fill_the_network_and_mlx_vlms(kind: str, tmp_path: Path) -> None:
    """Both loads are lazy and strict: the same names, shapes and packings, as two independent readers see them."""
    from mlx_vlm.utils import load_model

    folder = write_published(tmp_path, kind)
    ours = dict(tree_flatten(load_network(folder, lazy=True).parameters()))
    theirs = dict(tree_flatten(load_model(folder, lazy=True).parameters()))
    text = {name: array for name, array in theirs.items() if "vision" not in name}
    assert {f"model.{name}": looks(array) for name, array in ours.items()} == {
        name: looks(array) for name, array in text.items()
    }


def looks(array: mx.array) -> tuple[Any, ...]:
    """Shape and kind; which float it is depends on the backend."""
    return array.shape, "float" if mx.issubdtype(array.dtype, mx.floating) else array.dtype


def test_loads_a_hugging_face_folder_as_it_is(tmp_path: Path) -> None:
    folder = synthetic.small(tmp_path, dtype="F32")
    loaded = dict(tree_flatten(load_network(folder).parameters()))
    raw: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        raw |= mx.load(str(file))  # pyright: ignore
    text = {name: array for name, array in raw.items() if not is_vision(name)}
    assert len(loaded) == len(text)
    for name, array in text.items():
        assert mx.array_equal(loaded[find_rule(name)[1].removeprefix("model.")], array), name
    scalars = [loaded[f"{side}.layers.0.layer_scalar"].item() for side in ("decoder", "encoder.language_model")]
    assert scalars[0] != scalars[1]


def test_an_index_is_not_needed(tmp_path: Path) -> None:
    with_index = open_checkpoint(synthetic.small(tmp_path / "a"))
    without = open_checkpoint(synthetic.small(tmp_path / "b", index=False))
    single = open_checkpoint(synthetic.small(tmp_path / "c", index=False, limit=1 << 40))
    assert with_index.tensors.keys() == without.tensors.keys() == single.tensors.keys()
    assert len({tensor.file for tensor in single.tensors.values()}) == 1


def test_vision_may_be_absent_as_a_whole_but_not_in_part(tmp_path: Path) -> None:
    config = synthetic.small_config()
    text_only = synthetic.small(tmp_path / "a", config=config | {"vision_config": None})
    (text_only / "config.json").write_text(json.dumps(config))
    load_network(text_only)
    shapes = expected_tensors(ModelConfig.from_dict(config))
    extra = {name: shapes[name] for name in ("model.encoder.vision_tower.std_bias",)}
    part = synthetic.small(tmp_path / "b", config=config | {"vision_config": None}, extra=extra)
    (part / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks \d+ of \d+ tensors: .*vision_tower"):
        load_network(part)


def test_tied_tensors_may_be_there_if_they_are_equal(tmp_path: Path) -> None:
    fills = synthetic.random_fill(0, "BF16")
    kept: dict[str, bytes] = {}

    def fill(name: str, shape: tuple[int, ...]) -> bytes:
        twin = {"lm_head.weight": "model.decoder.embed_tokens.weight"}.get(name, name)
        return kept.setdefault(twin, fills(twin, shape))

    tied = {"lm_head.weight": (320, 128)}
    load_network(synthetic.small(tmp_path / "equal", extra=tied, fill=fill))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not equal to model.decoder.embed_tokens.weight"):
        load_network(synthetic.small(tmp_path / "apart", extra=tied))


def test_generation_config_joins_the_stop_ids(tmp_path: Path) -> None:
    settings = checkpoint.read_generation_config(synthetic.small(tmp_path))
    assert set(settings.stop_ids) == {1, 106, 50}
    assert settings.max_denoising_steps == 48


def test_resolve_finds_folders_and_explains_the_rest(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    assert hub.resolve(str(tmp_path / "my-model")) == tmp_path / "my-model"
    with pytest.raises(CheckpointError, match=r"Did you mean .*my-model"):
        hub.resolve(str(tmp_path / "my-modle"))
    with pytest.raises(ConfigError, match=r"a revision .* exists only on the Hub"):
        hub.resolve(str(tmp_path / "my-model"), "main")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        hub.resolve(str(tmp_path / "file"))


def test_resolve_explains_the_hubs_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    answer = SimpleNamespace(headers={}, status_code=404, request=None)

    cases = [
        (errors.RepositoryNotFoundError, "no Hub repository gogle/diffusiongemma-26B-A4B-it.*Did you mean google/"),
        (errors.GatedRepoError, "is gated: accept its terms"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
    ]
    for kind, message in cases:

        def refuse(*args: Any, kind: type = kind, **kwargs: Any) -> None:
            raise kind("no", response=answer)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(CheckpointError, match=message):
            hub.resolve("gogle/diffusiongemma-26B-A4B-it", "v9")

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise errors.LocalEntryNotFoundError("Got: ConnectError: [Errno -2]")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="cannot be fetched from the Hub: no connection to the Hub"):
        hub.resolve("google/diffusiongemma-26B-A4B-it")


def test_a_failure_of_whichever_http_library_is_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """requests' are OSErrors, httpx' are not."""

    class ConnectTimeout(Exception):
        pass

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectTimeout("[Errno -2] Name or service not known")

    for name in ("snapshot_download", "HfApi.whoami", "HfApi.create_repo"):
        monkeypatch.setattr(f"huggingface_hub.{name}", fail)
    for call in (
        lambda: hub.resolve("google/diffusiongemma-26B-A4B-it"),
        lambda: hub.check_upload("me/pack"),
        lambda: hub.upload(tmp_path, "me/pack"),
        lambda: hub.dataset("me/data"),
    ):
        with pytest.raises(DiffGemmaError, match=r": no connection to the Hub\."):
            call()


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "config.json",
            {"eos_token_id": [1, 10**6]},
            "config.json: eos_token_id has 1000000, and the vocabulary ends at",
        ),
        ("generation_config.json", {"eos_token_id": 999}, "generation_config.json: eos_token_id has 999"),
        ("generation_config.json", {"t_mim": 0.3}, "Did you mean 't_min'?"),
    ],
)
def test_what_does_nothing_is_said_once(tmp_path: Path, file: str, change: dict[str, Any], said: str) -> None:
    folder = small.write_checkpoint(tmp_path)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | change))
    model = load(folder)
    assert [note for note in model.notices if said in note] == list(model.notices)
    assert max(model.generation_config.stop_ids) < model.config.vocab_size
