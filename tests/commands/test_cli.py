"""The commands as a user meets them: exit status and message of every expected failure, output, help and signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from mlx_diffgemma import __version__
from mlx_diffgemma.cli import COMMANDS, main
from mlx_diffgemma.files import checkpoint
from mlx_diffgemma.model import memory
from mlx_diffgemma.pipeline import loading
from mlx_diffgemma.pipeline.machine import fitting
from tests import small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, args, input=stdin)


def shell(*args: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *args], capture_output=True, text=True, **settings)


# (arguments, exit status, what the message says); {model} is a small checkpoint, {tmp} an empty folder
REFUSED = [
    ("generate --model {model}x -p hi", 1, "there is no folder {model}x. Did you mean {model}?"),
    ("generate --model {tmp} -p hi", 1, "config.json is missing"),
    ("generate --model {tmp}/ar -p hi", 1, "gemma4"),
    ("generate --model {tmp}/other -p hi", 1, "llama"),
    ("generate --model {tmp}/mute -p hi", 1, "no tokenizer.json and no tokenizer.model"),
    ("generate --model {model}", 2, "give a prompt"),
    ("generate --model {model} -p hi --messages x.json", 2, "give a prompt: TEXT, --prompt"),
    ("generate --model {model} -p @{tmp}/none.txt", 1, "none.txt: there is no such file"),
    ("generate --model {model} -p @{tmp}/binary.txt", 1, "binary.txt is not UTF-8 text"),
    ("generate --model {model} -p @{tmp}", 1, "is a folder, expected a file"),
    ("generate --model {model} --messages {tmp}/broken.json", 1, "broken.json is not JSON"),
    ("generate --model {model} --messages {tmp}/list.json", 1, "list.json[0] is 1, expected a message"),
    ("generate --model {model} --messages {tmp}/list.json --system-prompt x", 2, "--messages holds its own"),
    ("generate --model {model} -p hi --promt x", 2, "No such option '--promt'. (Did you mean one of: '--prompt'"),
    ("generate --model {model} -p hi --gredy", 2, "'--greedy'"),
    ("generate --model {model} -p hi --max-tokens 0", 2, "0 is not in the range x>=1"),
    ("generate --model {model} -p hi --t-min 0.9", 1, "t_min is 0.9, expected less than t_max, 0.8"),
    ("generate --model {model} -p hi --canvas-length 17", 1, "canvas_length is 17, expected at most 16"),
    ("generate --model {model} -p hi --json --show-thinking", 2, "--show-thinking would do nothing"),
    ("generate --model {model} -p hi --record canvas.gif", 1, "expected a name ending in .svg, .html or .cast"),
    ("generate --model {model} -p hi --record {tmp}/no/canvas.svg", 1, "there is no folder"),
    ("generate --model {model} -p hi --adapter {tmp}/nowhere", 1, "nowhere"),
    ("chat --model {model}x", 1, "Did you mean"),
    ("chat --model {model} --promt x", 2, "No such option"),
    ("bench --model {model} --output {tmp}/no/bench.json", 1, "there is no folder"),
    ("bench --compare {tmp}/broken.json {tmp}/broken.json", 1, "broken.json is not JSON"),
    ("bench --compare {tmp}/list.json {tmp}/list.json", 1, "list.json holds [1, 2], expected an object"),
    ("convert --model {model} --q-bits 0", 1, "got 0 bits, group size 64"),
    ("convert --model {model} --q-group-size 0", 1, "got 4 bits, group size 0"),
    ("tune --show --forget", 2, "--show and --forget exclude one another"),
    ("score {tmp}", 1, "FILE {tmp} is a folder, expected a file"),
    ("score {tmp}/binary.txt", 1, "binary.txt is not UTF-8 text"),
    ("evaluate --tasks x --output-dir {tmp}/no", 1, "evaluation.json cannot be written: there is no folder"),
    ("generat", 2, "No such command 'generat'"),
    ("--hlep", 2, "No such option '--hlep'. Did you mean '--help'?"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "broken.json").write_text("[")
    (folder / "list.json").write_text("[1, 2]")
    for name, kind in (("ar", "gemma4"), ("other", "llama"), ("mute", "diffusion_gemma")):
        (folder / name).mkdir()
        config = small.CONFIG | {"model_type": kind, "architectures": [kind]}
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "mute" / "model.safetensors").symlink_to(Path(model) / "model.safetensors")
    return folder


@pytest.mark.parametrize(("line", "status", "message"), REFUSED, ids=[line for line, *_ in REFUSED])
def test_errors_are_one_to_three_lines(line: str, status: int, message: str, model: str, folder: Path) -> None:
    def filled(text: str) -> str:
        return text.replace("{model}", model).replace("{tmp}", str(folder))

    result = run(*filled(line).split())
    assert result.exit_code == status, result.output
    assert filled(message) in result.stderr
    assert result.stderr.startswith("Error: ")
    assert 1 <= len(result.stderr.strip().splitlines()) <= 3
    assert "Traceback" not in result.output and not result.stdout


@pytest.mark.parametrize("name", "generate chat score decide edit bench tune fuse train evaluate convert".split())
def test_an_empty_path_is_no_default(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model ""` is a slip (an unset variable of a shell), not the built-in model."""
    monkeypatch.chdir(folder)
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    rest = {
        "generate": ["-p", "hi"],
        "score": ["list.json"],
        "decide": ["-p", "x", "--choice", "a", "--choice", "b"],
        "edit": ["list.json", "--lines", "1", "-p", "x"],
        "train": ["--data", "."],
        "evaluate": ["--tasks", "x"],
    }
    result = run(name, "--model", "", *rest.get(name, []))
    assert result.exit_code == 1 and "empty" in result.stderr, result.output


@pytest.mark.parametrize(
    ("share", "prefix", "message"),
    [
        (0.5, 0, "needs at least 0.80 GB and this machine lets it use 0.80 GB: "),
        (1, 200, "Up to 200 tokens of prompt and reply would fit"),
    ],
)
def test_what_does_not_fit_in_memory_is_refused(
    share: float, prefix: int, message: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with room for a share of the weights, or for them and so much context."""
    weights = sum(array.nbytes for array in cast(dict[str, mx.array], mx.load(f"{model}/model.safetensors")).values())
    config = checkpoint.read_config(Path(model))
    limit = memory.memory_needed(config, int(share * weights), prefix)
    for asking in (loading, fitting):
        monkeypatch.setattr(asking, "machine_limit", lambda: limit)
    result = run("generate", "--model", model, "-p", "hi" * 200, "--stream-experts", "0")
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3


def test_an_offline_hub_is_explained() -> None:
    settings = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = shell("mlx_diffgemma.generate", "--model", "someone/nothing", "-p", "hi", env=settings)
    assert result.returncode == 1
    assert "someone/nothing" in result.stderr and "Hub" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3, result.stderr


def test_an_unforeseen_failure_has_its_traceback_on_request(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the sky fell\nand more")

    monkeypatch.setattr(loading, "load", fail)
    result = run("generate", "--model", model, "-p", "hi")
    assert result.exit_code == 1
    expected = "Error: RuntimeError: the sky fell\n       Run again with --debug for the traceback.\n"
    assert result.stderr.endswith(expected)
    result = run("generate", "--model", model, "-p", "hi", "--debug")
    assert isinstance(result.exception, RuntimeError)


def test_ctrl_c_ends_with_130_and_no_traceback(model: str) -> None:
    args = ["generate", "--model", model, "-p", "hi", "--events", "--seed", "1", "--max-tokens", "400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_diffgemma", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_does_not_wait_for_mlx(name: str) -> None:
    """Importing MLX, transformers or numpy is what takes seconds; click alone answers in a tenth of one."""
    module = f"mlx_diffgemma.{name}" if name else "mlx_diffgemma"
    slow = "mlx", "mlx_lm", "transformers", "numpy", "rich"
    look = f"import sys, atexit; atexit.register(lambda: print(*(set({slow!r}) & set(sys.modules)), file=sys.stderr))"
    script = f"{look}; sys.argv = ['x', '--help']; import runpy; runpy.run_module({module!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0 and "Usage:" in result.stdout
    assert not result.stderr.strip(), "what it imported, or a warning"


def test_every_command_is_listed_and_every_option_explained() -> None:
    result = run("--help")
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    for name in COMMANDS:
        command = main.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        options = [option for option in command.params if option.param_type_name == "option"]
        unexplained = [option.name for option in options if not getattr(option, "help", None)]
        assert not unexplained, f"{name}: {unexplained}"
    assert run("--version").stdout == f"mlx_diffgemma, version {__version__}\n"


def test_a_pipe_gets_the_bare_text_and_the_seed_repeats_it(model: str) -> None:
    first, second, other = (run("generate", "--model", model, "-p", "hi", "--seed", seed) for seed in "778")
    assert first.exit_code == 0
    assert first.stdout == second.stdout != other.stdout
    assert "seed 7" in first.stderr and "tokens/s" in first.stderr
    quiet = run("generate", "--model", model, "-p", "hi", "--seed", "7", "--quiet")
    assert quiet.stdout == first.stdout and not quiet.stderr


def test_the_prompt_comes_from_anywhere(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Héllo")
    (tmp_path / "messages.json").write_text(json.dumps([{"role": "user", "content": "Héllo"}]))
    ways = [
        (["-p", "Héllo"], None),
        (["-p", f"@{tmp_path}/prompt.txt"], None),
        (["-p", "-"], "Héllo"),
        (["--messages", f"{tmp_path}/messages.json"], None),
    ]
    texts = {run("generate", "--model", model, "--seed", "1", *args, stdin=stdin).stdout for args, stdin in ways}
    assert len(texts) == 1
    assert run("generate", "--model", model, "--seed", "1", "-p", "Héllo", "--system-prompt", "x").stdout not in texts


def test_json_is_one_object_with_everything(model: str) -> None:
    result = run("generate", "--model", model, "-p", "hi", "--seed", "7", "--json")
    told = json.loads(result.stdout)
    assert not result.stderr
    assert told["seed"] == 7 and told["finish_reason"] in ("stop", "length")
    assert [i for canvas in told["canvases"] for i in canvas["ids"]] == told["ids"]
    assert all(canvas["steps"] == len(canvas["accepted_per_step"]) for canvas in told["canvases"])
    assert {"prefill_seconds", "denoise_seconds", "peak_memory_bytes", "tokens_per_second"} <= told["statistics"].keys()


def test_events_are_json_lines(model: str) -> None:
    result = run("generate", "--model", model, "-p", "hi", "--seed", "7", "--events")
    kinds = [json.loads(line)["event"] for line in result.stdout.splitlines()]
    assert kinds[0] == "prefilled" and kinds[-1] == "finished" and "denoised" in kinds and "committed" in kinds


def test_a_departure_from_the_reference_is_reported(model: str) -> None:
    assert "not the reference" not in run("generate", "--model", model, "-p", "hi").stderr
    assert "not the reference: greedy=True" in run("generate", "--model", model, "-p", "hi", "--greedy").stderr


def test_thoughts_are_shown_on_request(model: str) -> None:
    shown = run("generate", "--model", model, "-p", "hi", "--seed", "3", "--thinking", "--show-thinking").stdout
    assert shown.startswith("[thinking]\n")
    assert "[thinking]" not in run("generate", "--model", model, "-p", "hi", "--seed", "3", "--thinking").stdout


def test_a_run_can_be_recorded(model: str, tmp_path: Path) -> None:
    result = run("generate", "--model", model, "-p", "hi", "--record", str(tmp_path / "canvas.cast"))
    assert result.exit_code == 0
    assert '"version": 2' in (tmp_path / "canvas.cast").read_text()


def test_chat_remembers_forgets_and_saves(model: str, tmp_path: Path) -> None:
    lines = ["/seed 5", "one", "/stats", "two", f"/save {tmp_path}/talk.json", "/nonsense", "/help", "/reset", "three"]
    lines += [f"/save {tmp_path}/later.json", "/exit", "never read"]
    result = run("chat", "--model", model, "--system-prompt", "Be brief.", "-m", "8", stdin="\n".join(lines))
    assert result.exit_code == 0
    assert "there is no command /nonsense" in result.stderr
    assert "seed 5" in result.output and "/reset" in result.stdout
    talk = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in talk] == ["system", "user", "assistant", "user", "assistant"]
    later = json.loads((tmp_path / "later.json").read_text())
    assert [m["content"] for m in later][:2] == ["Be brief.", "three"]
    assert run("generate", "--model", model, "--messages", str(tmp_path / "later.json"), "-m", "4").exit_code == 0


def test_bench_measures_writes_and_compares(model: str, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    asked = ("bench", "--model", model, "--repeat", "1", "--only", "fact", "--only", "long")
    for file, without in zip(files, [(), ("--without", "tiles", "--without", "in-place")], strict=True):
        result = run(*asked, *without, "--output", file)
        assert result.exit_code == 0, result.output
    report = json.loads(Path(files[0]).read_text())
    assert {"chip", "memory_bytes", "system", "mlx", "recipe", "weight_bytes", "load_seconds"} <= report.keys()
    fact = report["prompts"]["fact"]
    assert fact["steps_per_canvas"] == fact["runs"][0]["steps"] / len(fact["runs"][0]["canvases"])
    assert fact["seconds_to_first_canvas"] < fact["runs"][0]["seconds"] + 1e-9
    assert "512" in report["prompts"]["long"]["left_out"]  # the small model's context
    result = run("bench", "--compare", *files)
    assert result.exit_code == 0 and "B / A" in result.stdout and "without in-place" in result.stdout


def test_a_run_is_repeated_from_its_saved_noise(model: str, tmp_path: Path) -> None:
    file = str(tmp_path / "noise.npz")
    asked = ("generate", "--model", model, "-p", "Hi", "--json", "--max-tokens", "20")
    first = run(*asked, "--save-noise", file)
    again = run(*asked, "--noise", file)
    assert first.exit_code == again.exit_code == 0
    assert json.loads(first.stdout)["ids"] == json.loads(again.stdout)["ids"]
    both = run(*asked, "--noise", file, "--save-noise", file)
    assert both.exit_code == 2 and "would only copy it" in both.stderr
    seeded = run(*asked, "--noise", file, "--seed", "1")
    assert seeded.exit_code == 1 and "seed and noise" in seeded.stderr
