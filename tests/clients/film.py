"""Film the page: the capture and the stills of the README and docs/page.md, of a real server with the built-in model.

    python -m tests.clients.film

writes docs/page.webp (about 20 seconds, under 2 MB) and docs/page-*.webp. Chromium sends every picture it paints, with
its time; those are what the capture consists of.
"""

import base64
import io
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from mlx_diffgemma.terminal.scenes import JSON, SUDOKU
from tests.clients.conftest import chromium, served

DOCS = Path(__file__).parent.parent.parent / "docs"
WIDTH, HEIGHT = 960, 620
LARGEST = 2_000_000, 300_000  # bytes: of the capture, of the stills together
LONGEST = 0.19  # seconds that a picture stays: a busy machine paints late
LAST = 1200  # ms that the last picture stays


@dataclass
class Film:
    """What a page painted: pictures and when."""

    pictures: list[tuple[float, bytes]] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        session = page.context.new_cdp_session(page)

        def keep(event: Any) -> None:
            self.pictures.append((event["metadata"]["timestamp"], base64.b64decode(event["data"])))
            session.send("Page.screencastFrameAck", {"sessionId": event["sessionId"]})

        session.on("Page.screencastFrame", keep)
        session.send("Page.startScreencast", {"format": "png"})

    def save(self, file: Path, *, shortest: float = 0.066) -> float:
        """At most 15 pictures a second. → seconds."""
        kept: list[tuple[float, bytes]] = []
        for at, data in self.pictures:
            if kept and at - kept[-1][0] < shortest:
                kept[-1] = (kept[-1][0], data)
            else:
                kept.append((at, data))
        times = [at for at, _ in kept]
        durations = [round(1000 * min(b - a, LONGEST)) for a, b in pairwise(times)] + [LAST]
        images = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in kept]
        options: Any = {"save_all": True, "append_images": images[1:], "duration": durations, "loop": 0}
        images[0].save(file, lossless=True, quality=60, method=3, **options)
        return sum(durations) / 1000


def main() -> None:
    with served("--log-level", "error") as address, chromium() as browser:
        seconds = capture(browser, address, DOCS / "page.webp")
        stills = [still(browser, address, name, **how) for name, how in STILLS.items()]
    sizes = [file.stat().st_size for file in stills]
    print(f"{seconds:.0f} s, {(DOCS / 'page.webp').stat().st_size:,} bytes; stills {sum(sizes):,} bytes")
    if (DOCS / "page.webp").stat().st_size > LARGEST[0] or sum(sizes) > LARGEST[1]:
        raise SystemExit("too large for the repository.")


def capture(browser: Browser, address: str, file: Path) -> float:
    """The opening; both decodings; parts kept and the rest written anew; back through the steps."""
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
    page = context.new_page()
    film = Film()
    page.goto(address)
    film.watch(page)
    expect(page.locator("#opening .note")).to_contain_text("steps", timeout=20_000)
    page.wait_for_timeout(700)
    page.get_by_role("button", name="Side by side").click()
    page.wait_for_timeout(350)
    page.get_by_role("button", name=SUDOKU.name).click()
    for answer in page.locator(".pair .answer").all():
        expect(answer).not_to_have_attribute("aria-busy", "true", timeout=30_000)
    page.wait_for_timeout(600)
    page.get_by_role("button", name="Side by side").click()
    answer = page.locator(".pair .answer").first
    answer.get_by_role("button", name="Keep parts").click()
    pins = answer.locator(".pins [role=button]")
    for number in range(12, pins.count()):
        pins.nth(number).press("Space")
    page.wait_for_timeout(500)
    page.locator("#seed").evaluate("field => (field.value = 3)")
    answer.get_by_role("button", name="Write these anew").click()
    again = page.locator("#log .answer").last
    expect(again).not_to_have_attribute("aria-busy", "true", timeout=30_000)
    page.wait_for_timeout(500)
    steps = again.get_by_role("slider")
    steps.focus()
    for _ in range(9):
        page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(110)
    page.keyboard.press("End")
    page.wait_for_timeout(400)
    context.close()
    return film.save(file)


STILLS: dict[str, dict[str, Any]] = {
    "page-canvas": {"step": 2},
    "page-dark": {"color_scheme": "dark", "both": True},
    "page-narrow": {"width": 375, "height": 760, "step": 1},
    "page-pins": {"pins": True, "color_scheme": "dark"},
}


def still(
    browser: Browser,
    address: str,
    name: str,
    *,
    width: int = WIDTH,
    height: int = HEIGHT,
    step: int | None = None,
    both: bool = False,
    pins: bool = False,
    **settings: Any,
) -> Path:
    """One picture: of a step, of both decodings, or of pins."""
    context = browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=2, **settings)
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#opening .note")).to_contain_text("steps", timeout=20_000)
    if both:
        page.get_by_role("button", name="Side by side").click()
    if both or pins:
        page.get_by_role("button", name=JSON.name if pins else SUDOKU.name).click()
    for answer in page.locator(".answer:visible").all():
        expect(answer).not_to_have_attribute("aria-busy", "true", timeout=30_000)
    answer = page.locator(".answer:visible").first
    if step is not None:
        slider = "(range, step) => { range.value = step; range.dispatchEvent(new Event('input')); }"
        answer.get_by_role("slider").evaluate(slider, step)
    if pins:
        answer.get_by_role("button", name="Keep parts").click()
        for word in ("Vera", "pilot", "Oslo"):
            answer.locator(".pins [role=button]", has_text=word).press("Space")
    time.sleep(0.6)
    file = DOCS / f"{name}.webp"
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(file, quality=80, method=6)
    context.close()
    return file


if __name__ == "__main__":
    main()
