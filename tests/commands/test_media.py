"""Videos and PDFs on the command line: sampled and scaled before a prompt, said in one line each, saved with a talk."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from mlx_diffgemma import load
from mlx_diffgemma.text.pictures import pages
from tests import seeing
from tests.commands.test_pictures import run, told
from tests.seeing import picture
from tests.text.test_pages import THREE, grey, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    seeing.write_checkpoint(folder / "model")
    (folder / "frames").mkdir()
    for number in range(6):
        picture(number).save(folder / "frames" / f"{number}.png")
    (folder / "report.pdf").write_bytes(THREE)
    picture(9).save(folder / "a.png")
    (folder / "film.mp4").write_text("hello")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    return str(folder / "model")


def test_a_video_stands_before_the_text(folder: Path, model: str) -> None:
    frames = str(folder / "frames")
    args = ("-p", "hi", "--video", frames, "--video-frames", "3", "--video-rate", "0.5")
    result = run("generate", "--model", model, "--seed", "3", "-m", "8", *args)
    assert result.exit_code == 0, result.output
    first, *_ = result.stderr.splitlines()
    assert first.startswith(frames) and first.endswith(": 3 of 6 frames, 12.0 seconds; 30 × 20 → 120 × 72, 180 tokens")
    one = told(model, *args)
    assert [seen["tokens"] for seen in one["pictures"]] == [60, 60, 60]
    part = {"type": "video", "path": frames, "frames": 3, "rate": 0.5}
    file = folder / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}]))
    assert told(model, "--messages", str(file))["ids"] == one["ids"]
    wide = told(model, "-p", "hi", "--video", frames, "--video-frames", "2", "--image-budget", "140")
    assert {seen["budget"] for seen in wide["pictures"]} == {140}


def test_pages_stand_before_the_text(folder: Path, model: str) -> None:
    """Behind pictures and videos, whatever the order of the options."""
    report, a = str(folder / "report.pdf"), str(folder / "a.png")
    args = ("-p", "hi", "--pdf", report, "--pages", "3,1", "--image", a, "--image-budget", "low")
    result = run("generate", "--model", model, "--seed", "3", "-m", "8", *args)
    assert result.exit_code == 0, result.output
    first, second, *_ = result.stderr.splitlines()
    assert first.startswith(a) and second.startswith(f"{report}: 2 of 3 pages; 595 × 842 → ")
    names = [seen["name"] for seen in told(model, *args)["pictures"]]
    assert names == [a, f"{report}, page 3", f"{report}, page 1"]
    [page] = told(model, "-p", "hi", "--pdf", report, "--pages", "2")["pictures"]
    assert page["budget"] == 1120 and page["original"] == [595, 842]


def test_what_does_not_fit_is_refused_before_a_page_is_drawn(
    folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(pages, "_drawn", lambda *args: drawn.append(args))
    refused = run("generate", "--model", model, "-p", "hi", "--pdf", str(folder / "report.pdf"))
    assert refused.exit_code == 1 and "does not fit the model's context" in refused.stderr, refused.output
    assert not drawn


@pytest.mark.parametrize("count", [3, 24])
def test_a_prompt_of_many_pages_holds_one_at_a_time(count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file to the answer: pixels of one page, then its soft tokens, then the next."""
    drawn: list[weakref.ref[Any]] = []
    draw = pages._drawn

    def spy(*args: Any) -> Any:
        assert not [pixels for pixels in drawn if pixels() is not None]
        drawn.append(weakref.ref(pixels := draw(*args)))
        return pixels

    monkeypatch.setattr(pages, "_drawn", spy)
    report = {"type": "pdf", "pdf": written([grey(n) for n in range(count)]), "budget": 70}
    result = load(folder / "model").generate([{"role": "user", "content": [report]}], seed=1, max_tokens=1)
    assert len(result.pictures) == len(drawn) == count


def test_a_talk(folder: Path, model: str, tmp_path: Path) -> None:
    frames, report, saved = str(folder / "frames"), str(folder / "report.pdf"), tmp_path / "talk.json"
    said = [f"/pdf {report}", "/pdf", "/video nothing.mp4", "what is it?", f"/save {saved}", "/help"]
    result = run(
        "chat", "--model", model, "--image-budget", "70", "--seed", "3", "-m", "8", input="\n".join(said) + "\n"
    )
    assert result.exit_code == 0, result.output
    assert f"{report}: 3 of 3 pages" in result.stderr.replace("\n", "")
    assert "/pdf needs the name of a file" in result.stderr and "nothing.mp4: this path does not" in result.stderr
    assert "/video" in result.stdout and "/pdf" in result.stdout
    messages = json.loads(saved.read_text())
    assert messages[0]["content"][0] == {"type": "pdf", "pdf": report, "budget": 70}
    (tmp_path / "asked.json").write_text(json.dumps(messages[:1]))
    assert told(model, "--messages", str(tmp_path / "asked.json"))["text"] == messages[1]["content"]
    few = run("chat", "--model", model, input=f"/video {frames}\n")
    assert "32 frames are asked for, and it has 6" in few.stderr.replace("\n", " ")


def test_a_file_of_prompts(folder: Path, model: str, tmp_path: Path) -> None:
    parts: list[list[dict[str, Any]]] = [[{"type": "video", "path": str(folder / "frames"), "frames": 2}]]
    parts += [[{"type": "pdf", "path": str(folder / "report.pdf"), "pages": "9"}]]
    lines = [{"messages": [{"role": "user", "content": [*p, {"type": "text", "text": "hi"}]}]} for p in parts]
    source, target = tmp_path / "prompts.jsonl", tmp_path / "replies.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("generate", "--model", model, "-m", "8", "-q", "--input", str(source), "--output", str(target))
    assert result.exit_code == 1, result.output
    film, report = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(film["pictures"]) == 2 and "the pages are '9', and it has pages 1 to 3" in report["error"]


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("-p", "hi", "--video", "film.mp4"), 1, "film.mp4: cannot be read as a video"),
        (("-p", "hi", "--video", "empty"), 1, "empty: this folder has no frames"),
        (("-p", "hi", "--video", "frames"), 1, "32 frames are asked for, and it has 6; ask for at most that many"),
        (("-p", "hi", "--pdf", "a.png"), 1, "a.png: is not a PDF"),
        (("-p", "hi", "--pdf", "report.pdf", "--pages", "2-9"), 1, "the pages are '2-9', and it has pages 1 to 3"),
        (("-p", "hi", "--image", "report.pdf"), 1, "is a PDF; give it with --pdf"),
        (("-p", "hi", "--pages", "2"), 2, "--pages would do nothing: there is no --pdf"),
        (("-p", "hi", "--video-frames", "2"), 2, "--video-frames would do nothing: there is no --video"),
        (("-p", "hi", "--video-rate", "2"), 2, "--video-rate would do nothing: there is no --video"),
        (("-p", "see <|video|>", "--video", "frames", "--video-frames", "1"), 1, "holds <|video|>, which stands for"),
        (("--input", "x", "--output", "y", "--pdf", "report.pdf"), 2, "--pdf is for a single prompt: with --input"),
        (("--messages", "x", "--video", "frames"), 2, "--video goes with --prompt"),
    ],
)
def test_what_is_refused(
    args: tuple[str, ...], status: int, words: str, folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = run("generate", "--model", model, *args)
    assert result.exit_code == status and words in result.stderr.replace("\n       ", " "), result.output
