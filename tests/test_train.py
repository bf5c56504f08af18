"""The training command: data forms, refusals, LoRA to adapter to merged model, and a run that goes on."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from benchmarks import train_demo
from mlx_diffgemma import load
from mlx_diffgemma.checkpoint import is_vision
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.pipeline import Result as Reply
from mlx_diffgemma.shards import read_header
from mlx_diffgemma.train import builtin, main

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
    texts = [text_of(load(builtin(), adapter=tmp_path)), text_of(load(tmp_path / "model"))]
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


def test_the_same_command_again_goes_on_and_then_does_nothing(tmp_path: Path, data: Path) -> None:
    first = run("--data", data, "--output", tmp_path, *QUICK[2:], "--steps", 2)
    more = run("--data", data, "--output", tmp_path, *QUICK)
    assert first.exit_code == more.exit_code == 0
    assert "step 4/4" in more.output
    assert "step 1/" not in more.output


def test_options_may_come_from_a_file_and_the_command_line_wins(tmp_path: Path, data: Path) -> None:
    config = tmp_path / "options.toml"
    config.write_text(f'data = "{data}"\noutput = "{tmp_path / "out"}"\nsteps = 50\nbatch_size = 4\nrank = 2\n')
    done = run("--config", config, "--steps", 1)
    assert done.exit_code == 0, done.output
    assert "step 1/1 " in done.output


def test_both_forms_of_data_are_the_same_conversation(tmp_path: Path) -> None:
    from mlx_diffgemma.tokenizer import Tokenizer
    from mlx_diffgemma.train import read_data

    chat = {"messages": [{"role": "user", "content": "Add 1"}, {"role": "assistant", "content": "2"}]}
    lines = [json.dumps(chat), json.dumps({"prompt": "Add 1", "completion": "2"}), ""]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    train, valid = read_data(str(tmp_path), Tokenizer.load(Path(builtin())))
    assert len(train) == 2
    assert train[0] == train[1]
    assert not valid


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "train.jsonl:1"),
        ('{"text": "a"}', "messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "by the assistant"),
        ('{"prompt": "a"}', "completion"),
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
    monkeypatch.setattr("os.sysconf", lambda name: 4096)
    done = run("--data", data, "--output", tmp_path, *QUICK)
    assert done.exit_code == 1
    assert "this machine has 0.0 GB" in done.output
    assert not (tmp_path / "checkpoints").exists()
