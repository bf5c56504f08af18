"""What the converter refuses: in words, at once, and with nothing written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.convert import main
from mlx_diffgemma.files.folder import INDEX
from mlx_diffgemma.files.shards import read_header
from mlx_diffgemma.files.weights import load_network
from tests import synthetic


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def edit_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return damage


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return edit_json("config.json", lambda config: config.update(changes))


def edit_text_config(**changes: Any) -> Callable[[Path], None]:
    return edit_json("config.json", lambda config: config["text_config"].update(changes))


def shard(folder: Path, part: str = "") -> Path:
    """The first shard, or the one with a tensor."""
    return next(f for f in sorted(folder.glob("*.safetensors")) if any(part in t.name for t in read_header(f)))


def edit_header(change: Callable[[dict[str, Any]], None], part: str = "") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = shard(folder, part)
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        file.write_bytes(synthetic.wrap_header(header) + data[end:])

    return damage


def write_value(part: str, value: float) -> Callable[[Path], None]:
    """Put one value into the middle of a bf16 tensor."""

    def damage(folder: Path) -> None:
        file = shard(folder, part)
        tensor = next(t for t in read_header(file) if part in t.name)
        with file.open("r+b") as stream:
            stream.seek(tensor.start + tensor.nbytes // 4 * 2)
            stream.write(np.array([value], np.float32).view(np.uint32).astype(np.uint32)[0].tobytes()[2:])

    return damage


def rename_tensor(old: str, new: str) -> Callable[[Path], None]:
    def change(header: dict[str, Any]) -> None:
        header[new] = header.pop(old)

    def damage(folder: Path) -> None:
        edit_header(change, old)(folder)
        (folder / INDEX).unlink()

    return damage


def again(**options: Any) -> Callable[[Path], None]:
    """The checkpoint made anew with other options."""

    def damage(folder: Path) -> None:
        synthetic.small(folder, **options)

    return damage


def without_vision(folder: Path) -> None:
    synthetic.small(folder, config=synthetic.small_config() | {"vision_config": None})
    (folder / "config.json").write_text(json.dumps(synthetic.small_config()))


def overwrite(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def truncate(folder: Path) -> None:
    file = shard(folder, "layers.2.")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 2)


def lengthen(folder: Path) -> None:
    with shard(folder).open("ab") as stream:
        stream.write(b"\0\0")


def huge_header(folder: Path) -> None:
    with shard(folder).open("r+b") as stream:
        stream.write((1 << 40).to_bytes(8, "little"))


def text_header(folder: Path) -> None:
    with shard(folder).open("r+b") as stream:
        stream.write(b"version https://git-lfs.github.com/spec/v1\n")


def lose_shard(folder: Path) -> None:
    shard(folder, "layers.2.").unlink()


def two_forms(folder: Path) -> None:
    (folder / INDEX).unlink()
    shutil.copy(shard(folder), folder / "model.safetensors")


def lose_shard_and_index(folder: Path) -> None:
    lose_shard(folder)
    (folder / INDEX).unlink()


def shift_offsets(header: dict[str, Any]) -> None:
    first = next(entry for name, entry in header.items() if name != "__metadata__")
    first["data_offsets"] = [offset + 2 for offset in first["data_offsets"]]


def shrink_shape(header: dict[str, Any]) -> None:
    first = next(entry for name, entry in header.items() if name != "__metadata__")
    first["shape"] = [1]


def misshape(header: dict[str, Any]) -> None:
    entry = header["model.decoder.layers.0.router.proj.weight"]
    entry["shape"] = entry["shape"][::-1]


def retype(header: dict[str, Any]) -> None:
    for name, entry in header.items():
        if name != "__metadata__":
            entry |= {"dtype": "F8_E4M3", "shape": [2 * entry["shape"][0], *entry["shape"][1:]]}


def retarget(name: str, file: str) -> Callable[[Path], None]:
    return edit_json(INDEX, lambda index: index["weight_map"].update({name: file}))


EMBED = "model.decoder.embed_tokens.weight"
EXPERTS = "model.decoder.layers.1.experts.down_proj"
REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is missing": (lose_shard, r"lacks 1 of \d+ weight files: model-0000"),
    "a shard is missing, no index": (lose_shard_and_index, r"lacks 1 of \d+ weight files: model-0000"),
    "two sets of weights": (two_forms, r"has weights in more than one form, and no index says which: model-00001"),
    "a shard is truncated": (truncate, r"model-\d+-of-\d+.safetensors is truncated or padded: [\d,]+ bytes expected"),
    "a shard is padded": (lengthen, r"is truncated or padded"),
    "a header is huge": (huge_header, r"header claims 1,099,511,627,776 bytes"),
    "a pointer instead of a file": (text_header, r"is not a whole safetensors file"),
    "offsets do not begin at the data": (edit_header(shift_offsets), r"lies about offsets: .* begins at byte"),
    "offsets do not match the shape": (edit_header(shrink_shape), r"lies about offsets: .* is BF16 \[1\], 2 bytes"),
    "a name that would write on the terminal": (
        edit_header(lambda h: h.update({"\x1b[2J\n\n\nx": h.pop(EMBED)}), EMBED),
        r"does not have it|mentions 1 tensor: '.x1b\[2J.n.n.nx'",
    ),
    "an entry is not an entry": (edit_header(lambda h: h.update(x=3)), r"entry for x is malformed: 3"),
    "a negative dimension": (
        edit_header(lambda h: h.update(x={"dtype": "BF16", "shape": [-1], "data_offsets": [0, 0]})),
        r"entry for x is malformed",
    ),
    "a tensor is missing": (
        rename_tensor(EXPERTS, "model.decoder.layers.1.experts.down_proj.weight.biases"),
        r"no rule in convert/diffusiongemma-26b-a4b.toml mentions 1 tensor: ",
    ),
    "a tensor of a layer that is not there": (
        rename_tensor("model.decoder.layers.0.router.scale", "model.decoder.layers.9.router.scale"),
        r"lacks 1 of \d+ tensors: model.decoder.layers.\{n\}.router.scale",
    ),
    "an extra tensor": (
        again(extra={"model.decoder.sinks": (4,)}),
        r"mentions 1 tensor: model.decoder.sinks",
    ),
    "an extra layer": (
        again(extra={"model.decoder.layers.4.layer_scalar": (1,)}),
        r"has no place for 1 tensor: model.decoder.layers.\{n\}.layer_scalar",
    ),
    "a tensor is misshapen": (
        edit_header(misshape, "layers.0.router.proj"),
        r"router.proj.weight is BF16 \[128, 8\], expected BF16 or F16 or F32 \[8, 128\]",
    ),
    "config.json is another model's": (edit_text_config(vocab_size=321), r"embed_tokens.weight is BF16 \[320, 128\]"),
    "a NaN": (write_value(EXPERTS, float("nan")), r"experts.down_proj holds NaN or infinity; expected finite"),
    "an infinity": (write_value("layers.0.input_layernorm", float("inf")), r"input_layernorm.weight holds NaN or inf"),
    "the index names a file that is not there": (
        retarget(EMBED, "model-9.safetensors"),
        r"lacks 1 of \d+ weight files: model-9",
    ),
    "the index leaves the folder": (
        retarget(EMBED, "../model-00001-of-00002.safetensors"),
        r"outside the folder: \.\./",
    ),
    "the index names an absolute path": (retarget(EMBED, "/etc/passwd"), r"outside the folder: /etc/passwd"),
    "the index puts a tensor elsewhere": (
        retarget(EMBED, "model-00002-of-00010.safetensors"),
        r"puts model.decoder.embed_tokens.weight in model-00002",
    ),
    "the index names a tensor that is not there": (
        retarget("model.decoder.x", "model-00001-of-00010.safetensors"),
        r"names model.decoder.x, and model-00001-of-00010.safetensors does not have it",
    ),
    "the index forgets a tensor": (
        edit_json(INDEX, lambda index: index["weight_map"].pop(EMBED)),
        r"does not mention 1 tensor: model.decoder.embed_tokens.weight",
    ),
    "the index is a list": (
        overwrite(INDEX, "[]"),
        r"holds \[\], expected an object",
    ),
    "config.json is missing": (lambda folder: (folder / "config.json").unlink(), r"config.json is missing in"),
    "config.json is no JSON": (
        overwrite("config.json", "{"),
        r"config\.json is not JSON",
    ),
    "an unknown config key": (edit_config(rope_scaling={}), r"a key this version does not know: rope_scaling"),
    "an unknown text_config key": (edit_text_config(attn_sinks=True), r"does not know: text_config.attn_sinks"),
    "another activation": (edit_text_config(hidden_activation="silu"), r"hidden_activation is 'silu', expected"),
    "an autoregressive Gemma 4": (
        edit_config(model_type="gemma4"),
        r"not a DiffusionGemma checkpoint: model_type is 'gemma4'",
    ),
    "an autoregressive Gemma 4's names": (
        rename_tensor(EMBED, "model.language_model.embed_tokens.weight"),
        r"names of an autoregressive Gemma 4",
    ),
    "experts one by one": (
        rename_tensor(EXPERTS, "model.decoder.layers.1.experts.0.down_proj.weight"),
        r"This export stores every expert apart",
    ),
    "another tool's quantization": (
        edit_config(quantization_config={"quant_method": "compressed-tensors"}),
        r"another tool \(quantization\.quant_method is 'compressed-tensors'\)",
    ),
    "8-bit floats": (edit_header(retype), r"has dtype F8_E4M3, expected BF16, F16, F32"),
    "packed without saying how": (
        rename_tensor("model.decoder.layers.0.router.scale", "model.decoder.layers.0.router.proj.scales"),
        r"config.json has no `quantization` block",
    ),
    "a head of its own": (
        again(extra={"lm_head.weight": (320, 128)}),
        r"lm_head.weight is not equal to model.decoder.embed_tokens.weight",
    ),
    "vision tensors are missing": (
        without_vision,
        r"lacks \d+ tensors: model.encoder.embed_vision",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_converted_is_refused_in_words(case: str, tmp_path: Path) -> None:
    damage, message = REFUSALS[case]
    folder = synthetic.small(tmp_path / "source")
    damage(folder)
    result = run("--hf-path", folder, "--mlx-path", tmp_path / "pack")
    assert result.exit_code == 1, result.output
    assert re.search(message, result.stderr.replace("\n       ", "\n")), result.stderr
    assert len(result.stderr.strip().splitlines()) <= 4
    assert "Traceback" not in result.stderr
    assert "--debug" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ------------------------------------------------------------------------------------------- the target, the options


def test_a_target_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    source, target = synthetic.small(tmp_path / "source"), tmp_path / "pack"
    target.mkdir()
    (target / "thesis.txt").write_text("precious")
    result = run("--hf-path", source, "--mlx-path", target)
    assert result.exit_code == 1
    assert "is not empty. Choose another place, or replace it with --force" in result.stderr
    result = run("--hf-path", source, "--mlx-path", target, "--force")
    assert result.exit_code == 1
    assert "does not look like a pack; --force replaces nothing else" in result.stderr
    assert (target / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("target", ["source", ".", "source/pack"])
def test_target_and_source_may_not_overlap(target: str, tmp_path: Path) -> None:
    source = synthetic.small(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    result = run("--hf-path", source, "--mlx-path", tmp_path / target, "--force")
    assert result.exit_code == 1
    assert "lie inside one another" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_partial_folder_of_someone_else_is_not_touched(tmp_path: Path) -> None:
    source = synthetic.small(tmp_path / "source")
    (tmp_path / "pack.partial").mkdir()
    (tmp_path / "pack.partial" / "thesis.txt").write_text("precious")
    result = run("--hf-path", source, "--mlx-path", tmp_path / "pack")
    assert result.exit_code == 1
    assert "is in the way, and this program did not make it" in result.stderr
    assert (tmp_path / "pack.partial" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--recipe", "q5"], 1, "there is no recipe 'q5', expected a .toml file or one that comes along. Known: bf16"),
        (["--recipe", "q4", "-q"], 2, "--recipe and the -q options exclude one another"),
        (["--recipe", "q4", "--q-bits", "4"], 2, "--recipe and the -q options exclude one another"),
        (["--q-bits", "7"], 1, "affine packing has 2, 3, 4, 5, 6 or 8 bits"),
        (["--q-mode", "int4"], 2, "'int4' is not one of 'affine'"),
        (["--dry-run", "--verify"], 2, "--dry-run writes nothing"),
        (["--revision", "main"], 1, "a revision (main) exists only on the Hub"),
        (["--quantise"], 2, "No such option"),
    ],
)
def test_options_that_make_no_sense(options: list[str], status: int, message: str, tmp_path: Path) -> None:
    source = synthetic.small(tmp_path / "source")
    result = run("--hf-path", source, "--mlx-path", tmp_path / "pack", *options)
    assert result.exit_code == status, result.stderr
    assert message in result.stderr
    assert not (tmp_path / "pack").exists()


def test_float16_warns_and_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    source = synthetic.small(tmp_path / "source")
    result = run("--hf-path", source, "--mlx-path", tmp_path / "pack", "--dtype", "float16")
    assert result.exit_code == 0, result.stderr
    assert "Warning: Gemma's activations can overflow float16" in result.stderr
    write_value(EXPERTS, 1e5)(source)
    result = run("--hf-path", source, "--mlx-path", tmp_path / "other", "--dtype", "float16")
    assert result.exit_code == 1
    assert "experts.down_proj has values that float16 cannot hold" in result.stderr
    assert not (tmp_path / "other").exists()


def test_an_unknown_key_can_be_declared_harmless(tmp_path: Path) -> None:
    source = synthetic.small(tmp_path / "source")
    edit_text_config(attn_sinks=True)(source)
    result = run("--hf-path", source, "--mlx-path", tmp_path / "pack", "--ignore-key", "text_config.attn_sinks")
    assert result.exit_code == 0, result.stderr
    load_network(tmp_path / "pack")


def test_a_pack_is_no_source(tmp_path: Path) -> None:
    source = synthetic.small(tmp_path / "source")
    assert run("--hf-path", source, "--mlx-path", tmp_path / "pack").exit_code == 0
    result = run("--hf-path", tmp_path / "pack", "--mlx-path", tmp_path / "again")
    assert result.exit_code == 1
    assert "is quantized already" in result.stderr
    assert not (tmp_path / "again").exists()


# ------------------------------------------------------------------------------------------------- damage at random

TINY = synthetic.small_config(
    num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], vocab_size=64, num_experts=2
) | {"vision_config": None}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.small(tmp_path_factory.mktemp("tiny") / "source", config=TINY)


def replace_somewhere(value: Any, path: list[int], new: Any) -> Any:
    """The value with one part of it, found by walking `path`, replaced or (where `new` is ...) removed."""
    if not path or not isinstance(value, dict | list) or not value:
        return None if new is ... else new
    if isinstance(value, list):
        i = path[0] % len(value)
        return [*value[:i], replace_somewhere(value[i], path[1:], new), *value[i + 1 :]]
    key = sorted(value)[path[0] % len(value)]
    rest = {k: v for k, v in value.items() if k != key}
    return rest if new is ... and len(path) == 1 else rest | {key: replace_somewhere(value[key], path[1:], new)}


@settings(max_examples=150, deadline=None)
@given(
    where=st.sampled_from(["header", INDEX, "config.json"]),
    path=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    new=JSON | st.just(...),
)
def test_structures_damaged_at_random_never_give_a_traceback_or_a_target(
    where: str, path: list[int], new: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("random") / "source")
    if where == "header":
        file = shard(folder)
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = replace_somewhere(json.loads(data[8:end]), path, new)
        file.write_bytes(synthetic.wrap_header(header) + data[end:])
    else:
        (folder / where).write_text(json.dumps(replace_somewhere(json.loads((folder / where).read_text()), path, new)))
    succeeds_or_explains(folder)


@settings(max_examples=100, deadline=None)
@given(
    where=st.sampled_from(["header", INDEX]),
    position=st.floats(0, 1, exclude_max=True),
    data=st.binary(min_size=1, max_size=12),
    cut=st.booleans(),
)
def test_bytes_damaged_at_random_never_give_a_traceback_or_a_target(
    where: str, position: float, data: bytes, cut: bool, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("random") / "source")
    file = shard(folder) if where == "header" else folder / where
    before = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(before[:8], "little") if file.suffix == ".safetensors" else len(before)
    start = int(position * end)
    before[start : start + len(data)] = data
    file.write_bytes(before[:start] if cut else before)
    succeeds_or_explains(folder)


def succeeds_or_explains(folder: Path) -> None:
    """Either a whole pack, or a message and nothing else."""
    result = run("--hf-path", folder, "--mlx-path", folder.parent / "pack", "--recipe", "bf16")
    left = sorted(path.name for path in folder.parent.iterdir())
    assert "--debug" not in result.stderr, result.stderr  # how an unforeseen exception is announced
    if result.exit_code == 0:
        assert left == ["pack", "source"]
    else:
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.strip().splitlines()) <= 3
        assert left == ["source"]
