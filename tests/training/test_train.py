"""The training command: data forms, refusals, LoRA to adapter to merged model, and a run that goes on."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from click.testing import CliRunner, Result

from benchmarks import train_demo
from mlx_diffgemma import load
from mlx_diffgemma.config import RELEASED
from mlx_diffgemma.errors import TrainingError
from mlx_diffgemma.files.checkpoint import open_checkpoint
from mlx_diffgemma.files.layout import is_vision
from mlx_diffgemma.files.shards import read_header
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.files.weights import load_network
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.packing import conversion
from mlx_diffgemma.packing.recipes import load_recipe
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.results import Result as Reply
from mlx_diffgemma.text.tokenizer import Tokenizer
from mlx_diffgemma.train import main
from mlx_diffgemma.training.data import ends_of, read_data
from mlx_diffgemma.training.settings import Settings
from tests import small, synthetic

QUICK = ["--steps", "4", "--batch-size", "4", "--warmup", "1", "--evaluate-every", "2", "--save-every", "2"]


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Compiling a step takes longer than these tests."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    train_demo.write_data(folder, train_demo.structured(1, 24), train_demo.structured(2, 4))
    return folder


def run(*options: object) -> Result:
    return CliRunner().invoke(main, [str(option) for option in options])


def text_of(model: DiffusionGemma) -> str:
    made = model.generate("Sort these names:\nZoe, Ada", seed=0, max_denoising_steps=4, max_tokens=8)
    assert isinstance(made, Reply)
    return made.text


def test_lora_writes_an_adapter_that_generation_takes(tmp_path: Path, data: Path) -> None:
    done = run("--data", data, "--output", tmp_path, "--rank", 2, "--exact-match", 1, "--fuse", *QUICK)
    assert done.exit_code == 0, done.output
    assert "step 4/4 · loss" in done.output
    assert "step 2 · held out" in done.output
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in log if event["event"] == "trained"] == [1, 2, 3, 4]
    assert all("exact_match" in event for event in log if event["event"] == "evaluated")
    texts = [text_of(load(BUILT_IN, adapter=tmp_path)), text_of(load(tmp_path / "model"))]
    assert texts[0] == texts[1]


def test_a_model_from_scratch_is_a_whole_checkpoint(tmp_path: Path, data: Path) -> None:
    train_demo.write_model(tmp_path / "start")
    done = run("--from-scratch", tmp_path / "start", "--data", data, "--output", tmp_path / "out", *QUICK)
    assert done.exit_code == 0, done.output
    load(tmp_path / "out" / "model")
    files = {file.name for file in (tmp_path / "out" / "model").iterdir()}
    assert {"config.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"} < files
    names = {tensor.name for tensor in read_header(tmp_path / "out" / "model" / "model.safetensors")}
    assert any(is_vision(name) for name in names)


def test_the_same_command_again_goes_on_and_another_is_refused(tmp_path: Path, data: Path) -> None:
    command = ("--data", data, "--output", tmp_path, *QUICK[2:], "--steps")
    first, same, longer = (run(*command, steps) for steps in (2, 2, 4))
    assert first.exit_code == same.exit_code == longer.exit_code == 0
    assert "step 2/2" in first.output and "step 1/" not in same.output
    assert "step 4/4" in longer.output and "step 1/" not in longer.output
    other = run(*command, 4, "--seed", 7)
    assert other.exit_code == 1 and "holds another run: its seed is 0, yours 7" in other.output


def test_peft_is_written_for_a_finished_run_without_training_again(tmp_path: Path, data: Path) -> None:
    first = run("--data", data, "--output", tmp_path, "--rank", 2, *QUICK[2:], "--steps", 1)
    assert not (tmp_path / "peft").exists()
    again = run("--data", data, "--output", tmp_path, "--rank", 2, *QUICK[2:], "--steps", 1, "--peft")
    assert first.exit_code == again.exit_code == 0, again.output
    assert "step 1/" not in again.output
    assert {file.name for file in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert any(weight.any() for weight in mx.load(str(tmp_path / "peft" / "adapter_model.safetensors")).values())


def test_options_may_come_from_a_file_and_the_command_line_wins(tmp_path: Path, data: Path) -> None:
    config = tmp_path / "options.toml"
    config.write_text(f'data = "{data}"\noutput = "{tmp_path / "out"}"\nsteps = 50\nbatch_size = 4\nrank = 2\n')
    done = run("--config", config, "--steps", 1)
    assert done.exit_code == 0, done.output
    assert "step 1/1 " in done.output


def test_both_forms_of_data_are_the_same_conversation(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Add 1"}, {"role": "assistant", "content": "2"}]}
    lines = [json.dumps(chat), json.dumps({"prompt": "Add 1", "completion": "2"}), ""]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    train, valid = read_data(str(tmp_path), Tokenizer.load(Path(BUILT_IN)))
    assert len(train) == 2
    assert train[0] == train[1]
    assert not valid


def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, str]) -> None:
    """A dataset on a Hub that has only what was asked for: its files, each with one answer."""
    from fnmatch import fnmatch

    def snapshot_download(repo: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert (repo, repo_type) == ("someone/pairs", "dataset")
        for name, answer in files.items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(json.dumps({"prompt": "Add 1", "completion": answer}))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


@pytest.mark.parametrize(
    ("files", "train", "valid"),
    [
        ({"train.jsonl": "1", "valid.jsonl": "2", "test.jsonl": "3", "README.md": ""}, ["1"], ["2"]),
        ({"data/train-00000-of-00002.jsonl": "1", "data/train-00001-of-00002.jsonl": "2"}, ["1", "2"], []),
        ({"train/a.jsonl": "1", "validation/a.jsonl": "2"}, ["1"], ["2"]),
        ({"data/pairs_Train.jsonl": "1", "data/pairs_dev.jsonl": "2"}, ["1"], ["2"]),
        ({"constraints.jsonl": "1"}, ["1"], []),
    ],
)
def test_files_of_a_hub_dataset_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], train: list[str], valid: list[str]
) -> None:
    hub(monkeypatch, tmp_path, files)
    tokenizer = Tokenizer.load(Path(BUILT_IN))
    found = read_data("someone/pairs", tokenizer)
    assert [[tokenizer.decode(list(example.response)) for example in part] for part in found] == [train, valid]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data/train-00000-of-00001.parquet": ""}, "no .jsonl file; parquet and other forms are not read"),
        ({"a.jsonl": "1", "test.jsonl": "2"}, "only a.jsonl, test.jsonl"),
        ({"main/train.jsonl": "1", "socratic/train.jsonl": "2"}, "in 2 folders: main, socratic"),
    ],
)
def test_a_hub_dataset_without_usable_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], message: str
) -> None:
    hub(monkeypatch, tmp_path, files)
    done = run("--data", "someone/pairs")
    assert done.exit_code == 1
    assert message in done.output
    assert len(done.output.splitlines()) <= 3


def test_the_tools_of_a_conversation_are_in_its_prompt(tmp_path: Path) -> None:
    small.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ tools[0].name }}: {{ messages[0].content }}")
    line = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(line | {"tools": [{"name": "clock"}]}))
    tokenizer = Tokenizer.load(tmp_path)
    (example,), _ = read_data(str(tmp_path), tokenizer)
    assert tokenizer.decode(list(example.prompt)) == "clock: ?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "train.jsonl:1"),
        ('{"text": "a"}', "messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "by the assistant"),
        ('{"prompt": "a"}', "completion"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "completion is [{"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text(line)
    done = run("--data", tmp_path)
    assert done.exit_code == 1
    assert "train.jsonl:1" in done.output
    assert message in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--data is needed"),
        (["--data", ".", "--full", "--rank", 4], "would do nothing"),
        (["--data", ".", "--full", "--peft"], "would do nothing"),
        (["--data", ".", "--train-router"], "needs --full"),
        (["--data", ".", "--targets", "attention,heads"], "heads"),
        (["--data", ".", "--from-scratch", ".", "--model", "."], "would do nothing"),
        (["--data", ".", "--config", "nowhere.toml"], "nowhere.toml"),
        (["--data", "./nowhere"], "nowhere"),
    ],
)
def test_what_cannot_work_is_refused(options: list[str], message: str) -> None:
    done = run(*options)
    assert done.exit_code == 1
    assert message in done.output


def test_memory_is_predicted_and_a_run_that_does_not_fit_is_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_diffgemma.model.memory.machine_limit", lambda: 10**6)
    done = run("--data", data, "--output", tmp_path, *QUICK)
    assert done.exit_code == 1
    assert "this machine gives 0.0 GB" in done.output
    assert not (tmp_path / "checkpoints").exists()


def test_layers_are_recomputed_where_only_that_fits(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_diffgemma.model.memory.machine_limit", lambda: 80 * 10**6)
    done = run("--data", data, "--output", tmp_path, *QUICK)
    assert done.exit_code == 0, done.output
    assert "Turning on --checkpoint-layers" in done.output
    position = json.loads((tmp_path / "checkpoints" / "step-0000004" / "position.json").read_text())
    assert position["settings"]["checkpoint_layers"]


# ------------------------------------------------------------------------------------------------- on a quantized pack

PAIRS = [("red", "rose"), ("blue", "sea"), ("green", "leaf"), ("white", "snow")] * 2


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model as the converter packs it with the default recipe."""
    folder = tmp_path_factory.mktemp("pack")
    last = small.VOCABULARY + 21
    kinds = ["sliding_attention", "full_attention"]
    config = synthetic.small_config(vocab_size=last, num_hidden_layers=2, layer_types=kinds, num_experts=4)
    config |= {"boi_token_id": last - 3, "image_token_id": last - 2, "eoi_token_id": last - 1, "canvas_length": 8}
    synthetic.small(folder / "source", config=config)
    small.write_tokenizer(folder / "source")
    conversion.convert(
        conversion.plan_conversion(open_checkpoint(folder / "source"), load_recipe("q4")), folder / "pack"
    )
    return folder / "pack"


def write_pairs(folder: Path) -> Path:
    folder.mkdir()
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in PAIRS]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


def test_a_quantized_base_stays_packed_and_its_adapter_learns(tmp_path: Path, pack: Path) -> None:
    """The adapter loads over the pack; merged, the pack has the same tensors, packed as they were, and loads again."""
    before = {file.name: file.read_bytes() for file in pack.iterdir()}
    data, out = write_pairs(tmp_path / "data"), tmp_path / "out"
    options = ["--model", pack, "--data", data, "--output", out, "--fuse", "--peft"]
    done = run(*options, "--steps", 5, "--warmup", 1, "--learning-rate", 2e-2)
    assert done.exit_code == 0, done.output
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    learned = [event["loss"] for event in log if event["event"] == "trained"]
    assert learned[-1] < 0.8 * learned[0]
    assert {file.name: file.read_bytes() for file in pack.iterdir()} == before
    assert json.loads((out / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == RELEASED
    plain, adapted, merged = (
        open_checkpoint(pack),
        load(pack, adapter=out).network,
        open_checkpoint(out / "model"),
    )
    assert {name: (t.shape, t.dtype) for name, t in merged.tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in plain.tensors.items()
    }
    assert merged.quantized == plain.quantized
    projection = adapted.decoder.layers[0].self_attn.q_proj
    assert isinstance(projection.linear, nn.QuantizedLinear)
    assert mx.abs(projection.lora_b).max().item() > 0
    logits = [logits_of(network) for network in (load_network(pack), adapted, load_network(out / "model"))]
    change, rounding = mx.abs(logits[1] - logits[0]).mean(), mx.abs(logits[2] - logits[1]).mean()
    assert rounding.item() < 0.5 * change.item()


def logits_of(network: Network) -> mx.array:
    cache = network.make_cache()
    network.encode(mx.arange(10, 20)[None], cache)
    return network.logits(mx.arange(8)[None] + 30, cache)


def test_what_ends_an_answer_and_what_fills_its_canvas() -> None:
    tokenizer = Tokenizer.load(Path(BUILT_IN))
    assert ends_of(tokenizer, "eos") == (106, 1)
    assert ends_of(tokenizer, "turn") == (106, 106)
    with pytest.raises(TrainingError, match="'eos' or 'turn'"):
        Settings(fill="pad")
