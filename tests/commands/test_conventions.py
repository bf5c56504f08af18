"""What hands know from mlx_lm: the same spellings, help that fits a screen, and refusals of what would do nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from mlx_diffgemma import __version__, load
from mlx_diffgemma.cli import COMMANDS, Command, main
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.files import adapters, weights
from mlx_diffgemma.generation.settings import GenerationConfig
from tests import small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def told(model: str, *args: str) -> dict:
    result = run("generate", "--model", model, "-p", "hi", "--seed", "3", "--json", *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_help_all_has_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    short, long = (run(name, flag) for flag in ("--help", "--help-all"))
    assert len(short.stdout.splitlines()) <= 24
    command = main.get_command(None, name)  # type: ignore[arg-type]
    assert isinstance(command, Command)
    shown = [option for option in command.params if not getattr(option, "hidden", False)]
    spellings = [opt for option in shown for opt in option.opts if opt.startswith("--")]
    missing = [spelling for spelling in spellings if spelling not in long.stdout]
    assert not missing
    hidden = [option for option in shown if getattr(option, "section", "")]
    assert f"{len(hidden)} more options: main {name} --help-all" in short.stdout
    assert run(name, "--version").stdout == f"mlx_diffgemma, version {__version__}\n"


def test_temperature_multiplies_the_schedule() -> None:
    assert GenerationConfig(temperature=0.5).schedule == (0.2, 0.4)
    assert GenerationConfig().schedule == (0.4, 0.8)
    assert GenerationConfig(temperature=1.0).departures == {}
    assert GenerationConfig(temperature=0) == GenerationConfig(greedy=True)
    with pytest.raises(ConfigError, match="would do nothing beside temperature 0"):
        GenerationConfig(temperature=0, greedy=True)
    with pytest.raises(ConfigError, match="temperature is 1e-05"):
        GenerationConfig(temperature=1e-5)


def test_temp_is_temperature_and_zero_is_greedy(model: str) -> None:
    halved = told(model, "--temp", "0.5")
    assert halved["statistics"]["departures"] == {"temperature": 0.5}
    by_hand = told(model, "--t-max", "0.4", "--t-min", "0.2")
    assert halved["ids"] == by_hand["ids"] and halved["canvases"] == by_hand["canvases"]
    assert halved["canvases"] != told(model)["canvases"]
    greedy = told(model, "--temp", "0")
    assert greedy["ids"] == told(model, "--greedy")["ids"]
    assert greedy["statistics"]["departures"] == {"greedy": True}


def test_template_options_reach_the_template_and_unread_ones_are_refused(model: str) -> None:
    thinking = told(model, "--chat-template-config", '{"enable_thinking": true}')
    assert thinking["ids"] == told(model, "--thinking")["ids"] != told(model)["ids"]
    for options, status, message in (
        (["--chat-template-config", '{"tone": "kind"}'], 1, "does not read the option 'tone': it would do nothing"),
        (["--chat-template-config", '{"bos_token": "x"}'], 1, "'bos_token' is given elsewhere already"),
        (["--chat-template-config", '{"enable_thinking": true}', "--thinking"], 1, "given elsewhere already"),
        (["--chat-template-config", "tone"], 2, "'tone' is not JSON"),
        (["--chat-template-config", "[1]"], 2, "not a JSON object"),
    ):
        result = run("generate", "--model", model, "-p", "hi", *options)
        assert result.exit_code == status and message in result.stderr, result.output


def test_an_extra_stop_token_ends_the_reply(model: str) -> None:
    tokenizer = load(model).tokenizer
    token = next(i for i in told(model)["ids"] if i >= small.FIRST_LETTER)
    ids = told(model, "--extra-eos-token", tokenizer.piece(token))["ids"]
    assert ids == told(model)["ids"][: len(ids)] and token not in ids
    for name, message in (("<eos>", "it ends a reply already"), ("ab", "is 2 tokens of this model")):
        result = run("generate", "--model", model, "-p", "hi", "--extra-eos-token", name)
        assert result.exit_code == 1 and message in result.stderr


@pytest.fixture
def interpreted() -> Iterator[None]:
    """The kernels of a compiled step would take a CPU's compiler a minute."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("interpreted")
def test_train_with_the_names_of_mlx_lm_then_fuse(model: str, tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "1", "completion": "2"}\n' * 2)
    adapter, fused = str(tmp_path / "adapter"), str(tmp_path / "fused")
    asked = f"--model {model} --data {tmp_path} --adapter-path {adapter} --iters 2 --max-seq-length 64 --batch-size 1"
    asked += " --grad-checkpoint --steps-per-eval 1 --grad-accumulation-steps 2 --learning-rate 0.01"
    result = run("train", *asked.split())
    assert result.exit_code == 0, result.output
    log = [json.loads(line) for line in (tmp_path / "adapter" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["event"] == "trained"] == [1, 2]
    assert sum(line["event"] == "evaluated" for line in log) >= 2

    fuse = ("fuse", "--model", model, "--adapter-path", adapter, "--save-path", fused)
    result = run(*fuse)
    assert result.exit_code == 0, result.output
    network = weights.load_network(Path(model))
    adapters.load(network, Path(adapter))
    layer = network.decoder.layers[0].self_attn.q_proj
    expected = layer.linear.weight + layer.scale * (layer.lora_a @ layer.lora_b).T
    merged = weights.load_network(Path(fused)).decoder.layers[0].self_attn.q_proj.weight
    assert mx.allclose(merged, expected, atol=1e-6) and not mx.array_equal(merged, layer.linear.weight)
    assert run("generate", "--model", fused, "-p", "hi", "-m", "4").exit_code == 0
    again = run(*fuse)
    assert again.exit_code == 1 and "is there already" in again.stderr
    assert run(*fuse, "--force").exit_code == 0
    onto = run("fuse", "--model", model, "--adapter-path", adapter, "--save-path", model, "--force")
    assert onto.exit_code == 1 and "is the model itself" in onto.stderr


def test_template_options_without_a_prompt_are_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    options = ["--model", model, "--chat-template-config", '{"enable_thinking": true}']
    for command in (
        ("generate", "--fill", "a <fill>."),
        ("edit", str(tmp_path / "a.txt"), "--lines", "1", "-p", "hi"),
    ):
        result = run(*command, *options)
        assert result.exit_code == 2 and "--template-options would do nothing" in result.stderr, result.output
