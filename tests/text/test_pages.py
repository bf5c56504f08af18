"""Pages of PDFs: where they are drawn and when, what is kept of them, every refusal."""

import base64
import gc
import io
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_diffgemma.errors import PromptError
from mlx_diffgemma.text.pictures import pages, parts
from mlx_diffgemma.text.pictures.images import Picture, PictureConfig
from mlx_diffgemma.text.pictures.pages import chosen, open_pages
from mlx_diffgemma.text.pictures.sources import Access

CONFIG = PictureConfig()
SMALL = PictureConfig(patch_size=4, pooling=2)
A4 = (595, 842)


def written(contents: list[bytes], size: tuple[int, int] = A4, *, page: bytes = b"", trailer: bytes = b"") -> bytes:
    """A PDF with one page for each drawing; `page` is added to every page, `trailer` to the trailer."""
    kids = b" ".join(b"%d 0 R" % (3 + 2 * n) for n in range(len(contents)))
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    objects += [b"<< /Type /Pages /Kids [%s] /Count %d /MediaBox [0 0 %d %d] >>" % (kids, len(contents), *size)]
    for n, content in enumerate(contents):
        objects += [b"<< /Type /Page /Parent 2 0 R /Contents %d 0 R %s >>" % (4 + 2 * n, page)]
        objects += [b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content)]
    out, places = bytearray(b"%PDF-1.7\n"), []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start, count = len(out), len(objects) + 1
    out += b"xref\n0 %d\n0000000000 65535 f \n" % count + b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (count, trailer, start)
    return bytes(out)


def grey(number: int) -> bytes:
    """A page that is all of one grey."""
    return b"%.4f g 0 0 9999 9999 re f" % (number / 255)


ENCRYPTED = (
    b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O (%s) /U (%s) >> /ID [(0123456789abcdef) (0123456789abcdef)]"
)
ENCRYPTED %= (b"o" * 32, b"u" * 32)
THREE = written([grey(50), grey(100), grey(150)])


def test_a_page_fills_its_budget_and_stands_upright() -> None:
    """Red at the top left, blue at the bottom right, white where nothing is drawn."""
    corners = b"1 0 0 rg 0 421 298 421 re f 0 0 1 rg 297 0 298 421 re f"
    [page] = open_pages(written([corners]), CONFIG).pictures
    assert (page.size, page.tokens, page.original) == ((1344, 1872), 1092, A4)
    pixels = page.draw()
    assert (pixels.dtype, pixels.shape) == (np.uint8, (1872, 1344, 3))
    seen = [tuple(pixels[y, x].tolist()) for y, x in ((9, 9), (9, 1330), (1860, 9), (1860, 1330))]
    assert seen == [(255, 0, 0), (255, 255, 255), (255, 255, 255), (0, 0, 255)]
    assert page.patches().shape == (1092 * 9, 768)


def test_pages_are_taken_as_named() -> None:
    document = written([grey(10 * number) for number in range(1, 8)])
    for asked, expected in (
        (None, range(1, 8)),
        ("2-5", range(2, 6)),
        ("1,3", (1, 3)),
        ("6-", (6, 7)),
        ("7, 1", (7, 1)),
    ):
        drawn = [int(page.draw()[0, 0, 0]) for page in open_pages(document, SMALL, pages=asked, budget=70).pictures]
        assert drawn == [10 * number for number in expected]


def test_a_page_is_turned_as_it_says() -> None:
    [page] = open_pages(written([b"1 0 0 rg 0 600 100 242 re f"], page=b"/Rotate 90"), CONFIG).pictures
    assert page.original == A4[::-1] and page.draw()[9, -9].tolist() == [255, 0, 0]


def test_filled_forms_and_notes_are_drawn() -> None:
    """Objects that the table does not list: PDFium mends the table, as it must for many files."""
    look = b"<< /Type /XObject /Subtype /Form /BBox [0 0 200 200] /Length 25 >>\nstream\n%s 0 0 200 200 re f\nendstream"
    at = b"/Type /Annot /F 4 /Rect [%d 100 %d 300] /AP << /N %d 0 R >> "
    field = b"<< " + at % (100, 300, 7) + b"/Subtype /Widget /FT /Tx /T (a) /V (b) >>"
    note = b"<< " + at % (350, 550, 8) + b"/Subtype /Stamp >>"
    body = written([b""], page=b"/Annots [5 0 R 6 0 R]")
    body = body.replace(b"/Type /Catalog", b"/Type /Catalog /AcroForm << /Fields [5 0 R] >>")
    body = body[: body.rindex(b"xref\n0")]
    for number, more in enumerate((field, note, look % b"0 1 0 rg", look % b"1 0 0 rg"), 5):
        body += b"%d 0 obj\n%s\nendobj\n" % (number, more)
    [page] = open_pages(body + b"trailer\n<< /Root 1 0 R >>\n", CONFIG).pictures
    pixels = page.draw()
    assert pixels[1872 - 440, 440].tolist() == [0, 255, 0] and pixels[1872 - 440, 1000].tolist() == [255, 0, 0]


def test_a_page_says_how_it_was_scaled(tmp_path: Path) -> None:
    path = tmp_path / "report.pdf"
    path.write_bytes(THREE)
    seen = open_pages(path, CONFIG, pages="2-3")
    said = "595 × 842 → 1344 × 1872"
    assert str(seen).endswith(f"report.pdf: 2 of 3 pages; {said}, 2,184 tokens")
    assert str(seen.pictures[0]).endswith(f"report.pdf, page 2: {said}, 1092 tokens of 1120")


def test_keys_tell_documents_pages_and_budgets_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(THREE)
    uri = "data:application/pdf;base64," + base64.b64encode(THREE).decode()
    sources: list[Any] = [THREE, bytearray(THREE), memoryview(THREE), path, str(path), uri]
    assert len({tuple(page.key for page in open_pages(source, SMALL).pictures) for source in sources}) == 1
    other = written([grey(50), grey(100), grey(151)])
    seen = [open_pages(THREE, SMALL), open_pages(other, SMALL), open_pages(THREE, SMALL, budget=70)]
    seen += [open_pages(THREE, CONFIG)]
    assert len({page.key for each in seen for page in each.pictures}) == 12


def test_all_sources_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(THREE)
    monkeypatch.chdir(tmp_path)
    near = open_pages("a.pdf", SMALL)
    monkeypatch.chdir("/")
    for one, other in zip(near.pictures, open_pages(THREE, SMALL).pictures, strict=True):
        assert np.array_equal(one.draw(), other.draw())


def test_pages_are_pictures_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "report.pdf"
    path.write_bytes(THREE)
    part = {"type": "pdf", "pdf": str(path), "budget": 70, "pages": "2-3"}
    messages = parts.opened([{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}], SMALL)
    rest, pictures = parts.taken_out(messages)
    assert rest == [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Hi"}]}]
    assert [int(page.draw()[0, 0, 0]) for page in pictures] == [100, 150]
    assert parts.written(messages)[0]["content"][0] == part
    [same] = parts.seen(parts.opened(messages, CONFIG))
    assert same is parts.seen(messages)[0]
    code = {"type": "pdf", "base64": base64.b64encode(THREE).decode()}
    [whole] = parts.seen(parts.opened([{"role": "user", "content": [code]}], SMALL))
    assert len(whole.pictures) == 3 and whole.pictures[0].budget == 1120


# --- What is kept


@pytest.mark.parametrize("count", [3, 30])
def test_one_page_is_kept_at_a_time(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: none while they are opened, one while they are looked at, no document in between."""
    import pypdfium2

    gc.collect()
    gc.freeze()  # what earlier tests left need not be looked through at each page

    drawn: list[weakref.ref[np.ndarray]] = []
    documents: list[weakref.ref[Any]] = []
    draw, init = pages._drawn, pypdfium2.PdfDocument.__init__

    def live(kept: list[weakref.ref[Any]]) -> int:
        gc.collect()
        return sum(one() is not None for one in kept)

    def spy(*args: Any) -> np.ndarray:
        assert live(drawn) == 0
        drawn.append(weakref.ref(pixels := draw(*args)))
        return pixels

    def opened(self: Any, *args: Any, **options: Any) -> None:
        documents.append(weakref.ref(self))
        init(self, *args, **options)

    monkeypatch.setattr(pages, "_drawn", spy)
    monkeypatch.setattr(pypdfium2.PdfDocument, "__init__", opened)
    seen = open_pages(written([grey(n) for n in range(count)]), SMALL).pictures
    assert (len(seen), len(drawn), live(documents)) == (count, 0, 0)
    for number, page in enumerate(seen):
        assert abs(page.patches() * 255 - number).max() < 0.5
        assert live(drawn) == live(documents) == 0
    assert len(drawn) == count


SCAN = """
import re, resource, sys
from pathlib import Path
from mlx_diffgemma.text.pictures.images import PictureConfig
from mlx_diffgemma.text.pictures.pages import open_pages
seen = open_pages(sys.argv[1], PictureConfig()).pictures
total = sum(float(page.patches()[0, 0]) for page in seen)
own = Path("/proc/self/status")  # getrusage's peak on Linux begins with that of the process that started this one
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(seen), 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", own.read_text())[1]) if own.exists() else peak)
"""


def test_a_long_document_takes_no_more_memory(tmp_path: Path) -> None:
    """The process's peak for 30 scanned pages is that for 3, within one page's pixels; kept they would take 27."""
    scan = np.random.default_rng(0).integers(0, 256, (936, 672, 3), dtype=np.uint8)
    peaks = []
    for count in (3, 30):
        path = tmp_path / f"{count}.pdf"
        sheets = [Image.fromarray(np.roll(scan, n, 0)) for n in range(count)]
        sheets[0].save(path, save_all=True, append_images=sheets[1:], quality=60)
        run = subprocess.run([sys.executable, "-c", SCAN, str(path)], capture_output=True, text=True, check=True)
        pages_seen, peak = map(int, run.stdout.split())
        assert pages_seen == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 1344 * 1872 * 3, peaks


def test_threads_take_turns() -> None:
    seen = open_pages(THREE, SMALL, budget=70).pictures
    wrong: list[int] = []

    def look(page: Picture, level: int) -> None:
        for _ in range(20):
            wrong.extend([level] if (page.draw() != level).any() else [])

    threads = [threading.Thread(target=look, args=(page, 50 * (n + 1))) for n, page in enumerate(seen)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- What is refused


@pytest.mark.parametrize("asked", ["0", "4", "2-4", "3-2", "4-", "1,9", "0-2"])
def test_pages_it_has_not(asked: str) -> None:
    with pytest.raises(PromptError, match=f"the pages are '{asked}', and it has pages 1 to 3"):
        chosen(asked, 3, "a.pdf")


@pytest.mark.parametrize("asked", ["", ",", "1,", "-2", "a", "1-2-3", "1.5", "٣", "1 2", 3, [1], "9999999999"])
def test_pages_that_are_no_numbers(asked: Any) -> None:
    with pytest.raises(PromptError, match="expected numbers and ranges, as 3 or 2-5 or 1,4-"):
        chosen(asked, 3, "a.pdf")


PICTURE = io.BytesIO()
Image.new("RGB", (9, 9)).save(PICTURE, "PNG")
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "zero bytes": (b"", {}, "has zero bytes"),
    "text": (b"hello" * 99, {}, "is not a PDF"),
    "a picture": (PICTURE.getvalue(), {}, "is not a PDF"),
    "only a header": (b"%PDF-1.7\n", {}, "is broken and cannot be read"),
    "cut short": (THREE[:120], {}, "is broken and cannot be read"),
    "no pages": (written([]), {}, "has no pages|is broken"),
    "encrypted": (written([grey(9)], trailer=ENCRYPTED), {}, "is encrypted; save it without its password"),
    "page out of range": (THREE, {"pages": "2-5"}, "the pages are '2-5', and it has pages 1 to 3"),
    "a budget": (THREE, {"budget": 1000}, "expected 70, 140"),
    "None": (None, {}, "given as NoneType; expected a path"),
    "a list": ([THREE], {}, "given as list; expected a path"),
    "no such file": ("nothing/here.pdf", {}, "nothing/here.pdf: this path does not exist"),
    "a folder": (str(Path(__file__).parent), {}, "is a folder"),
    "file URL": ("file:///etc/passwd", {}, "file: is not fetched"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_document_is_refused(case: str) -> None:
    source, options, message = REFUSED[case]
    with pytest.raises(PromptError) as caught:
        open_pages(source, SMALL, **options)
    said = str(caught.value)
    assert re.search(message, said, re.DOTALL), said
    assert said.count("\n") < 3 and len(said) < 400


def test_a_document_that_changes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(THREE)
    [page, *_] = open_pages(path, SMALL).pictures
    path.write_bytes(written([grey(1)]))
    with pytest.raises(PromptError, match=r"a\.pdf: was changed or removed after it was opened"):
        page.draw()
    path.unlink()
    with pytest.raises(PromptError, match=r"a\.pdf: was changed or removed after it was opened"):
        page.draw()


def test_a_pdf_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pypdfium2", None)
    with pytest.raises(PromptError, match=r"pip install 'mlx-diffgemma\[pdf\]', or give its pages as pictures"):
        open_pages(THREE, SMALL)


def test_a_server_opens_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(THREE)
    with pytest.raises(PromptError, match="files are not opened here"):
        open_pages(tmp_path / "a.pdf", SMALL, access=Access(files=False))
