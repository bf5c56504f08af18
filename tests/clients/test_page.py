"""The page in a browser, on a real server with the built-in model."""

import base64
import io
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect

from mlx_diffgemma.terminal.scenes import JSON, LETTER, NAMES, SUDOKU
from tests.clients.conftest import AXE

Open = Callable[..., Page]
expect.set_options(timeout=20_000)
SOLVED = "156 342\n342 165\n465 231\n231 456\n614 523\n523 614"
# A drop, as a browser makes it.
DROP = """([data, type]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "four.png", { type }));
  window.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
}"""


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Open]:
    """Open the page; whatever the browser complains about fails the test."""
    contexts, complaints = [], []

    def open_page(width: int = 1280, height: int = 800, *, path: str = "", **settings: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address + path)
        expect(page.locator("#model")).to_have_text("the built-in model")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in complaints if "status of 400" not in text] == []


def ask(page: Page, prompt: str, *, seed: int = 1, pace: str | None = None) -> Locator:
    """Type a prompt and send it. → its answer."""
    page.locator("#settings").evaluate("node => (node.hidden = false)")
    page.fill("#seed", str(seed))
    if pace is not None:
        page.select_option("#pace", pace)
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    return page.locator("#log .turn").last.locator(".answer").first


def settle(page: Page) -> None:
    """The opening's puzzle is solved."""
    expect(page.locator("#opening .note")).to_contain_text("15 steps")


def done(answer: Locator) -> str:
    """What it says when it has come to its end."""
    expect(answer).not_to_have_attribute("aria-busy", "true")
    return answer.locator(".text").last.inner_text()


def test_it_is_alive_before_anybody_types(opened: Open) -> None:
    page = opened()
    expect(page.locator("#specimen .cell").first).to_be_visible(timeout=2000)
    settle(page)
    assert page.locator("#specimen .text").last.inner_text() == SOLVED


def test_typing_and_watching(opened: Open) -> None:
    page = opened()
    page.evaluate(
        """() => { window.seen = new Set(); new MutationObserver((all) => all.forEach(({ target }) =>
          target.classList.forEach((name) => window.seen.add(name)))).observe($("log"), { subtree: true,
          attributes: true, attributeFilter: ["class"] }); }""".replace("$", "document.getElementById")
    )
    answer = ask(page, SUDOKU.prompt, seed=SUDOKU.seed, pace="140")
    expect(answer.locator(".canvas .k4")).to_have_count(48)  # noise, before anybody has looked at it
    done(answer)
    assert {"k0", "k1", "k2", "k3", "changed", "rest"} <= set(page.evaluate("[...window.seen]"))
    assert done(answer) == SOLVED == page.locator("#announce").text_content()
    assert answer.locator(".canvas").get_attribute("aria-hidden") == "true" and answer.locator(".canvas").is_hidden()
    expect(page.locator("#prompt")).to_have_value("")


def test_a_conversation_goes_on_and_an_example_begins_anew(opened: Open) -> None:
    page = opened()
    done(ask(page, NAMES.prompt))
    with page.expect_request("**/v1/chat/completions") as asked:
        done(ask(page, LETTER.prompt))
    assert [message["role"] for message in asked.value.post_data_json["messages"]] == ["user", "assistant", "user"]
    page = opened()
    settle(page)
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_role("button", name=JSON.name).click()
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": JSON.prompt}]
    json.loads(done(page.locator("#log .answer")))


def test_scrubbing(opened: Open) -> None:
    page = opened()
    answer = ask(page, SUDOKU.prompt, seed=SUDOKU.seed, pace="0")
    done(answer)
    steps, note = answer.get_by_role("slider", name="Step"), answer.locator(".note")
    steps.focus()
    page.keyboard.press("Home")
    expect(note).to_contain_text("step 1 ")
    first = answer.locator(".canvas").inner_text()
    page.keyboard.press("ArrowRight")
    expect(note).to_contain_text("step 2 ")
    assert answer.locator(".canvas").inner_text() != first
    assert "nats" in (steps.get_attribute("aria-valuetext") or "")
    answer.locator(".canvas .cell").nth(4).hover()
    expect(note).to_contain_text("accepted")
    steps.focus()
    page.keyboard.press("Space")
    expect(answer.get_by_role("button", name="Pause")).to_be_visible()
    expect(note).to_contain_text("steps ·")
    assert done(answer) == SOLVED


def test_keeping_parts(opened: Open) -> None:
    page = opened()
    answer = ask(page, SUDOKU.prompt, seed=SUDOKU.seed, pace="0")
    done(answer)
    answer.get_by_role("button", name="Keep parts").click()
    pins = answer.locator(".pins [role=button]")
    assert pins.count() == 36 and set(pins.evaluate_all("all => all.map((pin) => pin.ariaPressed)")) == {"true"}
    expect(answer.get_by_role("button", name="Write these anew")).to_be_disabled()
    expect(pins.first).to_be_focused()
    for _ in range(18):
        page.keyboard.press("ArrowRight")
    for _ in range(18):
        page.keyboard.press("Space")
        page.keyboard.press("ArrowRight")
    with page.expect_request("**/v1/chat/completions") as asked:
        answer.get_by_role("button", name="Write these anew").click()
    assert asked.value.post_data_json["diffusion"]["pins"] == {"text": "156 342\n342 165\n465 231\n<fill>"}
    again = page.locator("#log .answer").last
    expect(again.locator(".canvas .pinned").first).to_be_visible()
    assert done(again).startswith("156 342\n342 165\n465 231\n")


def test_letting_go_by_pointer(opened: Open) -> None:
    page = opened()
    answer = ask(page, LETTER.prompt, pace="0")
    done(answer)
    answer.get_by_role("button", name="Keep parts").click()
    name = answer.locator(".pins [role=button]", has_text="Leo")
    name.click()
    expect(name).to_have_attribute("aria-pressed", "false")
    answer.get_by_role("button", name="Cancel").click()
    expect(answer.locator(".pins")).to_have_count(0)
    expect(answer.get_by_role("button", name="Keep parts")).to_be_visible()


def test_holes_choices_and_json(opened: Open) -> None:
    page = opened()
    page.select_option("#shape", "fill")
    page.fill("#template", "Dear Ada, your ")
    page.get_by_role("button", name="Insert a hole").click()
    page.locator("#template").press_sequentially(" will be ready on Friday.")
    text = done(ask(page, LETTER.prompt))
    assert text.startswith("Dear Ada, your lamp") and text.endswith(" will be ready on Friday.")
    page.select_option("#shape", "choice")
    page.fill("#choices", "- Zoe\n- Ada")
    assert done(ask(page, "Sort these names:\nAda")) in ("- Zoe", "- Ada")
    page.select_option("#shape", "json")
    page.fill("#schema", '{"type": "array", "items": {"type": "object", "properties": {"city": {"type": "string"}}}}')
    assert isinstance(json.loads(done(ask(page, JSON.prompt))), list)
    page.select_option("#shape", "fill")
    page.fill("#template", "no hole")
    page.fill("#prompt", "go")
    page.press("#prompt", "Enter")
    expect(page.get_by_role("alert")).to_contain_text("no hole")


def test_stopping(opened: Open) -> None:
    """At a temperature at which nothing ever settles, an answer would take minutes."""
    page = opened()
    page.get_by_role("button", name="Settings").click()
    page.fill("#temperature", "40")
    answer = ask(page, SUDOKU.prompt, pace="0")
    expect(answer.locator(".note")).to_contain_text("step")
    page.keyboard.press("Escape")
    expect(answer.locator(".note")).to_contain_text("stopped at step", timeout=1000)
    page.fill("#temperature", "")
    began = time.monotonic()
    assert done(ask(page, NAMES.prompt)).startswith("- Ada")
    assert time.monotonic() - began < 5  # nobody computes for the answer that was left


def test_both_decodings_side_by_side(opened: Open) -> None:
    page = opened()
    page.get_by_role("button", name="Side by side").click()
    ask(page, SUDOKU.prompt, seed=SUDOKU.seed, pace="0")
    left, right = page.locator(".pair .answer").nth(0), page.locator(".pair .answer").nth(1)
    assert done(left) == SOLVED and len(done(right)) == len(SOLVED)
    expect(left.locator(".note")).to_contain_text("15 steps")
    expect(right.locator(".note")).to_contain_text("passes")


def test_a_picture_is_dropped_and_sent(opened: Open) -> None:
    page = opened()
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(file, "png")
    data = base64.b64encode(file.getvalue()).decode()
    page.evaluate(DROP, [data, "image/png"])
    expect(page.get_by_role("img", name="four.png")).to_be_visible()
    said = {"choices": [{"index": 0, "delta": {"content": "four"}, "finish_reason": "stop"}], "diffusion": {"steps": 1}}
    fulfill(page, [said])
    with page.expect_request("**/v1/chat/completions") as asked:
        answer = ask(page, "How many colours?")
    picture, words = asked.value.post_data_json["messages"][0]["content"]
    assert picture["image_url"]["url"] == "data:image/png;base64," + data and words["text"] == "How many colours?"
    assert done(answer) == "four"
    expect(page.locator("#pictures")).to_be_hidden()
    page.evaluate(DROP, [base64.b64encode(b"no picture").decode(), "image/png"])
    expect(page.get_by_role("alert")).to_contain_text("four.png")


def test_a_model_without_eyes_is_offered_no_pictures(opened: Open) -> None:
    page = opened()
    expect(page.get_by_text("Picture", exact=True)).to_be_visible()
    told = {"object": "list", "data": [{"id": "built-in", "object": "model", "input_modalities": ["text"]}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=told))
    page.reload()
    settle(page)
    expect(page.get_by_text("Picture", exact=True)).to_be_hidden()
    page.evaluate(DROP, ["", "image/png"])
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#pictures")).to_be_hidden()


def test_what_the_server_refuses_is_said(opened: Open) -> None:
    page = opened()
    page.get_by_role("button", name="Settings").click()
    page.fill("#canvas", "100000")
    answer = ask(page, "hello")
    expect(answer.get_by_role("alert")).to_contain_text("context")
    assert page.locator("#send").is_visible()


def test_a_shell_gets_the_same_answer(opened: Open) -> None:
    page = opened()
    answer = ask(page, "Fill in the template:\nIt's {name}'s.\nname: Ada", pace="0")
    text = done(answer)
    answer.get_by_role("button", name="curl").click()
    command = page.evaluate("navigator.clipboard.readText()")
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=30).stdout
    chunks = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text


def test_only_commits_move_where_motion_is_not_wanted(opened: Open) -> None:
    page = opened(reduced_motion="reduce")
    settle(page)
    page.evaluate(
        """() => { window.moved = 0; new MutationObserver((all) => (window.moved += all.filter(
          ({ target }) => target.closest?.(".canvas")).length)).observe(document.body, { subtree: true,
          childList: true, attributes: true, attributeFilter: ["class"] }); }"""
    )
    answer = ask(page, SUDOKU.prompt, seed=SUDOKU.seed)
    assert done(answer) == SOLVED and page.evaluate("window.moved") == 0
    answer.get_by_role("slider", name="Step").press("ArrowLeft")  # by hand, everything can be seen
    expect(answer.locator(".canvas .cell").first).to_be_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.cell')).transitionDuration") == "0s"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_dark_and_accessible(opened: Open, scheme: Any) -> None:
    """axe in every state, wide and narrow; nothing is ever wider than the window."""
    for width in (1280, 375):
        page = opened(width, 812, color_scheme=scheme, reduced_motion="reduce")
        settle(page)
        inspect(page, "opening")
        page.get_by_role("button", name="Settings").click()
        for shape in ("fill", "choice", "json"):
            page.select_option("#shape", shape)
            inspect(page, shape)
        page.select_option("#shape", "free")
        answer = ask(page, SUDOKU.prompt, seed=SUDOKU.seed)
        done(answer)
        page.get_by_role("button", name="Settings").click()
        inspect(page, "answer")
        answer.get_by_role("slider", name="Step").press("Home")
        inspect(page, "a step")
        answer.get_by_role("button", name="Keep parts").click()
        answer.locator(".pins [role=button]").nth(3).press("Space")
        inspect(page, "pins")
        page.get_by_role("button", name="Side by side").click()
        done(ask(page, JSON.prompt))
        inspect(page, "side by side")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, background[4:-1].split(",")))
    assert (brightness < 150) == (scheme == "dark")


def inspect(page: Page, state: str) -> None:
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, state
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run().then(({ violations }) => violations)")
    grave = [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found]
    assert grave == [], state


def test_frames_a_second(opened: Open, capsys: pytest.CaptureFixture[str]) -> None:
    """The released model's canvas: 256 positions, 48 steps, all of them changing, as fast as they come."""
    page = opened()
    settle(page)
    fulfill(page, [*canvas(256, 48), {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]}])
    page.evaluate(
        """() => { window.frames = []; window.drafts = new Set();
          const watch = (now) => (window.frames.push(now), window.drafts.add(
            document.querySelector("#log .note")?.textContent), requestAnimationFrame(watch));
          requestAnimationFrame(watch); }"""
    )
    began = time.monotonic()
    answer = ask(page, "go", pace="140")
    done(answer)
    seconds = time.monotonic() - began
    frames = page.evaluate("window.frames")
    gaps = sorted(b - a for a, b in pairwise(frames))
    drafts = page.evaluate("[...window.drafts].filter((note) => note?.startsWith('step')).length")
    with capsys.disabled():
        print(
            f"\n256 positions, {drafts} drafts in {seconds:.1f} s; {1000 * len(gaps) / sum(gaps):.0f} frames a second,"
            f" median {gaps[len(gaps) // 2]:.0f} ms, 95th percentile {gaps[int(len(gaps) * 0.95)]:.0f} ms"
        )
    assert drafts == 48


def canvas(length: int, steps: int) -> Iterator[dict[str, Any]]:
    """Drafts of which every position changes with every step."""
    for step in range(steps):
        nats = [3 * (1 - step / steps) * ((i * 7919) % length) / length for i in range(length)]
        tokens = [[step * length + i, f" w{(i * 31 + step) % 997}", nats[i], nats[i] < 0.1] for i in range(length)]
        told = {"accepted": step, "mean_entropy": 3 - step / 20, "channel": "content", "end": length, "tokens": tokens}
        draft = {"type": "diffusion_frame", "block": 0, "step": step, "total": steps, "text": "", "diffusion": told}
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": None}], **draft}


def fulfill(page: Page, chunks: list[dict[str, Any]]) -> None:
    """Answer in the server's place."""
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

    def answer(route: Route) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)
