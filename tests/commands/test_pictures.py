"""Pictures on the command line: before a prompt, in files of messages and of prompts, in a talk."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_diffgemma.cli import main
from tests import seeing, small
from tests.seeing import picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    seeing.write_checkpoint(folder / "model")
    picture(1).save(folder / "a.png")
    picture(2, 9, 60).save(folder / "b.png")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    return str(folder / "model")


def run(*args: str, **options: Any) -> Result:
    return CliRunner().invoke(main, args, **options)


def told(model: str, *args: str) -> dict[str, Any]:
    result = run("generate", "--model", model, "--seed", "3", "-m", "8", "--json", *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_pictures_stand_before_the_text(folder: Path, model: str) -> None:
    a, b = str(folder / "a.png"), str(folder / "b.png")
    result = run("generate", "--model", model, "--seed", "3", "-m", "8", "-p", "hi", "--image", a, "--image", b)
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert lines[0].startswith(a) and lines[0].endswith(": 30 × 20 → 120 × 72, 60 tokens of 70")
    assert lines[1].startswith(b) and "tokens of 70" in lines[1]
    one = told(model, "-p", "hi", "--image", a)
    assert [seen["name"] for seen in one["pictures"]] == [a]
    parts = [{"type": "image", "path": a}, {"type": "text", "text": "hi"}]
    file = folder / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": parts}]))
    assert told(model, "--messages", str(file))["ids"] == one["ids"]
    quiet = run("generate", "--model", model, "--seed", "3", "-m", "8", "-p", "hi", "--image", a, "-q")
    assert quiet.stderr == "" and quiet.stdout


def test_budgets_and_masks(folder: Path, model: str) -> None:
    a = str(folder / "a.png")
    for asked, budget in (("140", 140), ("high", 1120), ("low", 70)):
        assert told(model, "-p", "hi", "--image", a, "--image-budget", asked)["pictures"][0]["budget"] == budget
    masked = told(model, "-p", "hi", "--image", a, "--picture-mask", "gemma4")
    assert masked["statistics"]["departures"] == {"picture_mask": "gemma4"}
    file = folder / "budget.json"
    file.write_text(json.dumps([{"role": "user", "content": [{"type": "image", "path": a}]}]))
    assert told(model, "--messages", str(file), "--image-budget", "140")["pictures"][0]["budget"] == 140


def test_a_form_is_filled_in_from_a_picture(folder: Path, model: str) -> None:
    made = told(model, "-p", "hi", "--image", str(folder / "a.png"), "--fill", "a <fill>")
    assert made["text"].startswith("a ") and len(made["pictures"]) == 1


def test_a_file_of_prompts(folder: Path, model: str) -> None:
    a, source, target = str(folder / "a.png"), folder / "prompts.jsonl", folder / "replies.jsonl"
    parts = [{"type": "image", "path": a}, {"type": "text", "text": "hi"}]
    missing = [{"type": "image", "path": "nothing.png"}]
    prompts = [{"prompt": "hi"}, *({"messages": [{"role": "user", "content": p}]} for p in (parts, missing))]
    source.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    common = ("generate", "--model", model, "--seed", "3", "-m", "8", "-q")
    result = run(*common, "--input", str(source), "--output", str(target))
    assert result.exit_code == 1, result.output
    replies = [json.loads(line) for line in target.read_text().splitlines()]
    assert "pictures" not in replies[0] and replies[1]["pictures"][0]["budget"] == 70
    assert "nothing.png: this path does not exist" in replies[2]["error"]
    alone = run("generate", "--model", model, "--seed", "4", "-m", "8", "-p", "hi", "--image", a, "--json")
    assert json.loads(alone.stdout)["ids"] == replies[1]["ids"]
    wide = run(*common, "--input", str(source), "--output", str(target) + "2", "--image-budget", "140")
    assert wide.exit_code == 1
    assert json.loads(Path(str(target) + "2").read_text().splitlines()[1])["pictures"][0]["budget"] == 140


def test_a_talk(folder: Path, model: str, tmp_path: Path) -> None:
    a, saved = str(folder / "a.png"), tmp_path / "talk.json"
    said = [f"/image {a}", "/image nothing.png", "what is it?", "and now?", f"/save {saved}", "/image", "/help"]
    result = run("chat", "--model", model, "--seed", "3", "-m", "8", input="\n".join(said) + "\n")
    assert result.exit_code == 0, result.output
    assert f"{a}: 30 × 20 → 120 × 72, 60 tokens of 70" in result.stderr.replace("\n", "")
    assert "Error: nothing.png: this path does not exist" in result.stderr
    assert "Error: /image needs the name of a file, or a URL." in result.stderr
    assert "/image" in result.stdout
    messages = json.loads(saved.read_text())
    assert messages[0]["content"][0] == {"type": "image", "image": a, "budget": 70}
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    asked = messages[:1]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    assert told(model, "--messages", str(tmp_path / "asked.json"))["text"] == messages[1]["content"]


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("-p", "hi", "--image", "nothing.png"), 1, "nothing.png: this path does not exist; expected a file."),
        (("-p", "hi", "--image", "A", "--image-budget", "71"), 1, "a picture's budget is '71'; expected 70, 140"),
        (("-p", "hi", "--image-budget", "70"), 2, "--image-budget would do nothing: there is no --image"),
        (("-p", "hi", "--picture-mask", "gemma4"), 1, "picture_mask would do nothing: the prompt has no picture"),
        (("--messages", "M", "--image", "A"), 2, "--image goes with --prompt; --messages holds its own pictures"),
        (("--messages", "M", "--image-budget", "70"), 2, "--image-budget would do nothing: "),
        (("--image", "A"), 2, "give a prompt: TEXT, --prompt"),
        (("-p", "see <|image|>", "--image", "A"), 1, "holds <|image|>, which stands for a picture"),
        (("--input", "P", "--output", "Q", "--image", "A"), 2, "--image is for a single prompt: with --input"),
    ],
)
def test_what_is_refused(args: tuple[str, ...], status: int, words: str, folder: Path, model: str) -> None:
    (folder / "text.json").write_text('[{"role": "user", "content": "hi"}]')
    named = {"A": str(folder / "a.png"), "M": str(folder / "text.json")}
    result = run("generate", "--model", model, *(named.get(arg, arg) for arg in args))
    assert result.exit_code == status and words in result.stderr.replace("\n       ", " "), result.output


def test_models_without_eyes(folder: Path, tmp_path: Path) -> None:
    a = str(folder / "a.png")
    blind = run("generate", "--model", str(small.write_checkpoint(tmp_path / "m")), "-p", "hi", "--image", a)
    assert blind.exit_code == 1 and "has no vision tower" in blind.stderr
    demo = run("generate", "--image", a)
    assert demo.exit_code == 2 and "give a prompt" in demo.stderr
