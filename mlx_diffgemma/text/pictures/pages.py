"""Pages of a PDF → pictures, drawn when the tower looks at them: a long document takes no more memory than a short one.
The one file that knows pypdfium2.
"""

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...errors import PromptError
from .images import Picture, PictureConfig, budget_of, scaled_size
from .sources import ANYWHERE, Access, opened

if TYPE_CHECKING:
    import numpy as np

BUDGET = 1120  # soft tokens of a page: print stays legible
_PDFIUM = threading.Lock()  # the library serves one thread at a time


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Pages of a PDF, each scaled for the tower when it looks."""

    name: str = field(compare=False)
    pictures: tuple[Picture, ...]
    total: int  # pages it has
    asked: str | None  # which pages, as they were asked for
    source: str | None = field(default=None, compare=False)  # the path or URL that it was opened from

    def __str__(self) -> str:
        (w, h), (wide, high) = self.pictures[0].original, self.pictures[0].size
        tokens = sum(picture.tokens for picture in self.pictures)
        said = f"{self.name}: {len(self.pictures):,} of {self.total:,} pages; {w} × {h} → {wide} × {high}"
        return f"{said}, {tokens:,} tokens"


def open_pages(
    source: Any,
    config: PictureConfig,
    *,
    pages: str | None = None,
    budget: int | str | None = None,
    access: Access = ANYWHERE,
) -> Pages:
    """The pages of a PDF, from a path, a `data:` URI, an http(s) URL or bytes, each as a picture at the size its budget
    needs, 1120 soft tokens unless said.

    `pages`: "2-5", "1,3", "4-" or None for all. No page is drawn before its picture's `draw`, and none is kept then.
    Errors: PromptError for what is no PDF, is encrypted or broken, for pages it has not, and a missing extra.
    """
    if isinstance(source, Pages):
        return source
    tokens = budget_of(budget, BUDGET)
    document = _examined(source, access)
    with document.open() as pdf:
        if not (count := len(pdf)):
            raise PromptError(f"{document.name}: has no pages.")
        numbers = chosen(pages, count, document.name)
        return Pages(
            name=document.name,
            pictures=tuple(document.page(pdf, number, config, tokens) for number in numbers),
            total=count,
            asked=pages,
            source=os.fspath(source) if isinstance(source, str | os.PathLike) else None,
        )


def chosen(pages: str | None, count: int, name: str) -> list[int]:
    """Page numbers from 1, in the order named. Errors: PromptError for others than 1 … `count`."""
    if pages is None:
        return list(range(1, count + 1))
    numbers: list[int] = []
    for part in pages.split(",") if isinstance(pages, str) else [""]:
        found = re.fullmatch(r"\s*(\d{1,9})\s*(-\s*(\d{1,9})?)?\s*", part, re.ASCII)
        if not found:
            raise PromptError(f"the pages are {pages!r}; expected numbers and ranges, as 3 or 2-5 or 1,4- (from 4 on).")
        first = int(found[1])
        last = first if not found[2] else int(found[3]) if found[3] else max(first, count)
        if not 1 <= first <= last <= count:
            raise PromptError(f"{name}: the pages are {pages!r}, and it has pages 1 to {count:,}.")
        numbers += range(first, last + 1)
    return numbers


@dataclass(frozen=True, kw_only=True)
class _Document:
    """A PDF that is opened anew for each look: what the library keeps of a page goes with it."""

    name: str
    whole: Path | bytes
    digest: str
    stamp: tuple[int, int] | None  # of a path: size, and when it was last written

    @contextmanager
    def open(self) -> Iterator[Any]:
        """The library's document. Errors: PromptError."""
        try:
            import pypdfium2  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise PromptError(
                f"{self.name}: PDFs need an extra: pip install 'mlx-diffgemma[pdf]', or give its pages as pictures."
            ) from None
        if isinstance(self.whole, Path) and self.stamp != _stamp(self.whole):
            raise PromptError(f"{self.name}: was changed or removed after it was opened; give it again.")
        with _PDFIUM:
            try:
                with pypdfium2.PdfDocument(self.whole) as pdf:
                    pdf.init_forms()
                    yield pdf
            except (pypdfium2.PdfiumError, OSError) as error:
                raise PromptError(f"{self.name}: {_complaint(error)}") from error

    def page(self, pdf: Any, number: int, config: PictureConfig, budget: int) -> Picture:
        width, height = pdf.get_page_size(number - 1)
        if not (width > 0 and height > 0):
            raise PromptError(f"{self.name}, page {number}: is {width:g} × {height:g} points large.")
        size = scaled_size(width, height, budget, config)
        facts = f"page {self.digest} {number} {budget} {config.patch_size} {config.pooling} {size[0]} {size[1]}"
        return Picture(
            key=hashlib.sha256(facts.encode()).hexdigest(),
            name=f"{self.name}, page {number}",
            original=(round(width), round(height)),
            size=size,
            budget=budget,
            config=config,
            draw=lambda: self.draw(number, size),
        )

    def draw(self, number: int, size: tuple[int, int]) -> "np.ndarray":
        """A page on white, uint8 [height, width, 3], with its notes and filled forms."""
        with self.open() as pdf:
            return _drawn(pdf, number - 1, *size)


def _examined(source: Any, access: Access) -> _Document:
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if not isinstance(source, str | os.PathLike | bytes):
        raise PromptError(f"a PDF is given as {type(source).__name__}; expected a path, a URL, a data: URI or bytes.")
    with opened(source, access) as (name, file):
        if b"%PDF" not in file.read(1024):
            raise PromptError(f"{name}: is not a PDF.")
        file.seek(0)
        path = None if isinstance(file, BytesIO) else Path(cast(str, source)).resolve()
        stamp = path and _stamp(path)  # before it is read: a later change shows
        digest = hashlib.file_digest(cast(BytesIO, file), "sha256").hexdigest()
        whole = path or cast(BytesIO, file).getvalue()
    return _Document(name=name, whole=whole, digest=digest, stamp=stamp)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def _complaint(error: Exception) -> str:
    from pypdfium2 import raw  # pyright: ignore[reportMissingImports]

    if getattr(error, "err_code", None) in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY):
        return "is encrypted; save it without its password first."
    return f"is broken and cannot be read: {' '.join(str(error).split())[:160].rstrip('.')}."


def _drawn(pdf: Any, index: int, width: int, height: int) -> "np.ndarray":
    """The page filled into exactly these pixels: nothing is scaled afterwards, letters stay sharp."""
    from pypdfium2 import PdfBitmap, raw  # pyright: ignore[reportMissingImports]

    page = pdf[index]
    bitmap = PdfBitmap.new_native(width, height, raw.FPDFBitmap_BGR, rev_byteorder=True)
    bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
    order = (bitmap, page, 0, 0, width, height, 0, raw.FPDF_ANNOT | raw.FPDF_REVERSE_BYTE_ORDER)
    raw.FPDF_RenderPageBitmap(*order)
    if page.formenv:
        raw.FPDF_FFLDraw(page.formenv, *order)
    return bitmap.to_numpy()
