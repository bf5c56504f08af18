"""Both decodings, scores and choices on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_diffgemma import bench, load
from mlx_diffgemma.chat import Talk
from mlx_diffgemma.cli import main
from mlx_diffgemma.errors import ConfigError, DiffGemmaError
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.terminal.canvas import Painter
from mlx_diffgemma.terminal.marks import cells, likelihood, marked
from mlx_diffgemma.terminal.sinks import Live, summary
from tests import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def model(folder: str) -> DiffusionGemma:
    return load(folder)


def run(*args: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, args, input=text)


def generate(folder: str, *args: str) -> Result:
    return run("generate", "--model", folder, "-p", "hi", "--seed", "3", "-m", "20", *args)


def told(folder: str, *args: str) -> dict[str, Any]:
    result = generate(folder, "--json", *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_generate_token_by_token(folder: str, model: DiffusionGemma) -> None:
    found = told(folder, "--decoding", "autoregressive", "--top-p", "0.9", "--top-k", "9", "--min-p", "0.01")
    options: dict[str, Any] = {"decoding": "autoregressive", "top_p": 0.9, "top_k": 9, "min_p": 0.01}
    api = model.generate("hi", seed=3, max_tokens=20, **options)
    assert not isinstance(api, list)
    assert found["ids"] == list(api.tokens) and found["statistics"]["decoding"] == "autoregressive"
    shown = generate(folder, "--decoding", "autoregressive")
    assert shown.exit_code == 0 and "token by token" in shown.stderr and "steps a canvas" not in shown.stderr
    lines = generate(folder, "--decoding", "autoregressive", "--events").stdout.splitlines()
    kinds = [json.loads(line)["event"] for line in lines]
    assert kinds[0] == "prefilled" and kinds[-1] == "finished" and set(kinds[1:-1]) == {"committed"}


def test_noise_of_tokens_is_saved_and_repeated(folder: str, tmp_path: Path) -> None:
    file = str(tmp_path / "noise.npz")
    first = told(folder, "--decoding", "autoregressive", "--save-noise", file)
    again = run(
        *f"generate --model {folder} -p hi -m 20 --json --noise {file} --decoding autoregressive".split(" "),
    )
    assert json.loads(again.stdout)["ids"] == first["ids"]
    other = run(*f"generate --model {folder} -p hi -m 20 --noise {file}".split(" "))
    assert other.exit_code == 1 and "recorded of autoregressive decoding; this run's is diffusion" in other.stderr


def test_logprobs_best_of_and_retries(folder: str) -> None:
    plain, listed = told(folder, "--logprobs"), told(folder, "--logprobs", "3")
    assert plain["avg_logprob"] == listed["avg_logprob"] < 0
    assert "top_logprobs" not in plain["canvases"][0] and len(listed["canvases"][0]["top_logprobs"][0]) == 3
    best = generate(folder, "--best-of", "2")
    assert best.exit_code == 0 and "2 answers drawn" in best.stderr and "nats a token" in best.stderr
    assert told(folder, "--retries", "1")["statistics"]["attempts"] in (1, 2)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--top-p", "0.9"], 1, "top_p would do nothing in diffusion decoding"),
        (["--decoding", "autoregressive", "--t-max", "1"], 1, "t_max would do nothing in autoregressive"),
        (["--decoding", "autoregressive", "--retries", "1"], 1, "retries would do nothing"),
        (["--best-of", "2", "--events"], 2, "--events shows none"),
        (["--best-of", "2", "--save-noise", "x.npz"], 2, "repeat the one given by its --seed"),
        (["--logprobs", "21"], 1, "logprobs is 21"),
        (["--logprobs", "many"], 2, "is not a number of tokens"),
        (["--decoding", "causal"], 2, "is not one of 'diffusion', 'autoregressive'"),
    ],
)
def test_what_would_do_nothing_is_refused(folder: str, options: list[str], status: int, message: str) -> None:
    result = generate(folder, *options)
    assert result.exit_code == status and message in result.stderr, result.output


def test_score(folder: str, model: DiffusionGemma, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Hello there")
    found = json.loads(run("score", "--model", folder, "--json", str(tmp_path / "text.txt")).stdout)
    expected = model.score("Hello there")
    assert found["perplexity"] == expected.perplexity
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte(11))
    assert "".join(token["text"] for token in found["tokens"]) == "Hello there"
    line = run("score", "--model", folder, "-", text="Hello there").stdout
    assert line.startswith(f"perplexity {expected.perplexity:.6g} · ") and line.endswith("· 11 tokens\n")
    long = run("score", "--model", folder, "-", text="x" * 600)
    assert long.exit_code == 1 and "the text is 601 tokens; the model's context is 512" in long.stderr
    assert "600 tokens" in run("score", "--model", folder, "--stride", "256", "-", text="x" * 600).stdout
    for args, text, message in (
        ("-", "", "standard input is empty"),
        ("absent.txt", None, "absent.txt: there is no such file"),
    ):
        refused = run("score", "--model", folder, args, text=text)
        assert refused.exit_code == 1 and message in refused.stderr


def test_a_talk_changes_its_decoding_and_shows_log_probabilities(
    model: DiffusionGemma, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(model, None, {"max_tokens": 12, "seed": 1, "enable_thinking": None}, show_thinking=False)
    talk.obey("/decoding autoregressive")
    talk.obey("/logprobs 2")
    talk.answer("hi")
    assert talk.last is not None and talk.last.statistics.decoding == "autoregressive"
    assert talk.last.avg_logprob is not None and likelihood(talk.last.avg_logprob) in capsys.readouterr().err
    assert talk.last.canvases[0].top_logprobs
    talk.obey("/decoding diffusion")
    talk.obey("/logprobs off")
    talk.answer("and now?")
    assert talk.last.statistics.decoding == "diffusion" and talk.last.logprobs is None
    with pytest.raises(ConfigError, match="decoding is 'causal'"):
        talk.obey("/decoding causal")
    with pytest.raises(DiffGemmaError, match="/logprobs x"):
        talk.obey("/logprobs x")
    assert talk.chat.options["decoding"] == "diffusion"


def test_unlikely_tokens_are_marked(model: DiffusionGemma) -> None:
    ids = model.tokenizer.encode("abcd")
    found = cells(ids, [-0.1, -1.0, -5.0, -0.1, -9.0], Painter(model.tokenizer.decode))
    assert found == [("a", 1, ""), ("b", 1, "doubted"), ("c", 1, "odd"), ("d", 1, "")]
    text = marked(ids, [-0.1] * 4, model.tokenizer.decode, columns=2, color=True)
    assert text == "ab\ncd"


class _Pad:
    """A screen that keeps what was drawn last before each commit."""

    size = (80, 24)

    def __init__(self) -> None:
        self.drawn: list[Any] = []
        self.last_frames: list[Any] = []

    def draw(self, lines: list[Any]) -> None:
        self.drawn = lines

    def commit(self, text: str) -> None:
        self.last_frames.append(self.drawn)

    def close(self) -> None: ...


def test_the_last_frame_of_a_canvas_shows_its_log_probabilities(model: DiffusionGemma) -> None:
    pad = _Pad()
    live = Live(pad, model.tokenizer.decode)
    result = None
    for event in model.stream("hi", seed=3, max_tokens=16, logprobs=True):
        live(event)
        result = getattr(event, "results", (result,))[0]
    assert result is not None and result.avg_logprob is not None
    [lines] = pad.last_frames
    assert lines[-1] == [(likelihood(result.avg_logprob), "status")]
    assert {style for line in lines[:-1] for _, style in line} <= {"", "doubted", "odd"}
    assert f"log-probability {likelihood(result.avg_logprob)}" in summary(result)


def test_bench_measures_both_decodings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--repeat", "1", "--only", "fact", "--decodings", "--output", str(out)])
    assert not stopped.value.code
    figures = json.loads(out.read_text())
    canvas, token = figures["prompts"]["fact"], figures["autoregressive"]["fact"]
    assert token["runs"][0]["decoding"] == "autoregressive" and canvas["runs"][0]["decoding"] == "diffusion"
    assert 0 <= token["agreement"] <= 1 and token["seconds_to_first_canvas"] > 0
    shown = capsys.readouterr().out
    assert "of the tokens alike" in shown


def test_agreement_is_the_share_of_tokens_in_order() -> None:
    assert bench.agreement([({}, (1, 2, 3, 4))], [({}, (1, 2, 3, 4))]) == 1
    assert bench.agreement([({}, (1, 2, 3, 4))], [({}, (1, 9, 3))]) == pytest.approx(2 * 2 / 7)
