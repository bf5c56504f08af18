"""A video → some of its frames as pictures, and the words that say when each is shown, as transformers' Gemma 4
processor has them (Gemma4VideoProcessor, Gemma4Processor.replace_video_token). The one file that knows PyAV.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from ...errors import PromptError
from .images import Picture, PictureConfig, Source, budget_of, check_pixels, from_pixels, open_picture
from .sources import ANYWHERE, Access, opened, shortened

FRAMES = 32  # of every video, however long it is
BUDGET = 70  # soft tokens of a frame
RATE = 24.0  # frames a second where nobody says
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".heic", ".heif")
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,gif"  # FFmpeg's others include playlists, which open files


@dataclass(frozen=True, kw_only=True)
class Video:
    """Frames of a video, each scaled for the tower, and the second at which each is shown."""

    name: str = field(compare=False)
    pictures: tuple[Picture, ...]
    seconds: tuple[float, ...]
    total: int  # frames there were to choose from
    rate: float  # frames a second
    rate_from: Literal["file", "asked", "assumed"]
    sound: bool = False  # it has some, which nobody hears
    source: str | None = field(default=None, compare=False)  # the path or URL that it was opened from

    @property
    def tokens(self) -> int:
        """Soft tokens of all frames; labels and the two around each frame come on top."""
        return sum(picture.tokens for picture in self.pictures)

    @property
    def labels(self) -> tuple[str, ...]:
        """When each frame is shown: minutes:seconds, rounded down."""
        return tuple(map(_label, self.seconds))

    def __str__(self) -> str:
        (w, h), (wide, high) = self.pictures[0].original, self.pictures[0].size
        said = f"{self.name}: {len(self.pictures):,} of {self.total:,} frames, {self.total / self.rate:.1f} seconds"
        said += f" at the {self.rate:g} frames a second that are assumed" if self.rate_from == "assumed" else ""
        said += f"; {w} × {h} → {wide} × {high}, {self.tokens:,} tokens"
        return said + ("; its sound is ignored" if self.sound else "")


def _label(seconds: float) -> str:
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def open_video(
    source: Source,
    config: PictureConfig,
    *,
    frames: int = FRAMES,
    budget: int | str | None = None,
    rate: float | None = None,
    access: Access = ANYWHERE,
) -> Video:
    """Sample and scale a video: a file as `sources` takes it, a folder of pictures, a list of them, or an array
    uint8 [frames, height, width, 3].

    Frame i of `frames` is number i · total // frames. `budget` is of each frame, 70 unless said; `rate` is of pictures
    in a folder or list, frames a second, 24 unless said: files say their own.
    Errors: PromptError for fewer frames than are asked for, what is no video, and a missing decoder.
    """
    if isinstance(source, Video):
        return source
    made = _sampled(source, config, frames, budget_of(budget, BUDGET), rate, access)
    return replace(made, source=os.fspath(source) if isinstance(source, str | os.PathLike) else None)


def _sampled(
    source: Source, config: PictureConfig, frames: int, tokens: int, rate: float | None, access: Access
) -> Video:
    if type(frames) is not int or frames < 1:
        raise PromptError(f"the frames of a video are {frames!r}; expected a whole number of at least 1.")
    if _is_folder(source, access):
        source = Path(source)
        return _from_pictures(shortened(str(source)), _in_order(source), config, frames, tokens, rate, access)
    if isinstance(source, list | tuple) or getattr(source, "ndim", 0) == 4:
        return _from_pictures(f"list of {len(source):,} frames", source, config, frames, tokens, rate, access)
    if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        raise PromptError(
            f"a video is given as {type(source).__name__}; expected a path, a URL, bytes, a folder or list of"
            " pictures, or a uint8 array [frames, height, width, 3]."
        )
    if rate is not None:
        raise PromptError("a video file says itself how many frames a second it has; leave the rate out.")
    with opened(bytes(source) if isinstance(source, bytearray | memoryview) else source, access) as (name, file):
        return _from_file(name, file, config, frames, tokens)


def sampled(frames: int, total: int, name: str) -> list[int]:
    """The numbers of the frames to take of `total`. Errors: PromptError where there are fewer than `frames`.

    Source: transformers default_sample_indices_fn.
    """
    if frames > total:
        raise PromptError(f"{name}: {frames:,} frames are asked for, and it has {total:,}; ask for at most that many.")
    return [i * total // frames for i in range(frames)]


# ------------------------------------------------------------------------------------------------ folders and lists


def _is_folder(source: Source, access: Access) -> bool:
    if not access.files or not isinstance(source, str | os.PathLike):
        return False
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):  # a name that is too long, a NUL in it
        return False


def _in_order(folder: Path) -> list[Path]:
    """The pictures in a folder by name, frame2 before frame10. Errors: PromptError when there are none."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and not path.name.startswith(".")]
    if not found:
        raise PromptError(
            f"{shortened(str(folder))}: this folder has no frames; expected pictures named {', '.join(ENDINGS[:4])}, …"
        )
    return sorted(found, key=lambda path: [(part.zfill(20), part) for part in re.split(r"(\d+)", path.name)])


def _from_pictures(
    name: str,
    pictures: Sequence[Source],
    config: PictureConfig,
    frames: int,
    budget: int,
    rate: float | None,
    access: Access,
) -> Video:
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate < 1e6):
        raise PromptError(f"the frames a second of a video are {rate!r}; expected a number above 0.")
    numbers, each = sampled(frames, len(pictures), name), rate or RATE
    return Video(
        name=name,
        pictures=tuple(open_picture(pictures[n], config, budget=budget, access=access) for n in numbers),
        seconds=tuple(n / each for n in numbers),
        total=len(pictures),
        rate=float(each),
        rate_from="assumed" if rate is None else "asked",
    )


# ------------------------------------------------------------------------------------------------------------ files


def _from_file(name: str, file: IO[bytes], config: PictureConfig, frames: int, budget: int) -> Video:
    with _container(name, file) as (container, stream):
        total, rate = stream.frames, float(stream.average_rate or stream.guessed_rate or 0)
        sound = bool(container.streams.audio)
        if not total:  # WebM and others do not say
            total = sum(1 for _ in container.decode(stream))
    numbers = sampled(frames, total, name)
    with _container(name, file) as (container, stream):
        pictures = _pictures(name, container.decode(stream), numbers, rate or RATE, config, budget)
    return Video(
        name=name,
        pictures=pictures,
        seconds=tuple(n / (rate or RATE) for n in numbers),
        total=total,
        rate=rate or RATE,
        rate_from="file" if rate else "assumed",
        sound=sound,
    )


def _pictures(
    name: str, decoded: Iterator[Any], numbers: list[int], rate: float, config: PictureConfig, budget: int
) -> tuple[Picture, ...]:
    """The frames of these numbers, scaled one after the other; the decoder is asked for none behind the last."""
    wanted, pictures = set(numbers), []
    for number, frame in enumerate(decoded):
        if number in wanted:
            at = f"{name}, {_label(number / rate)}"
            pictures.append(from_pixels(at, _upright(frame), config, budget))  # and the frame is let go
        if number == numbers[-1]:
            return tuple(pictures)
    raise PromptError(f"{name}: cannot be read to its end: {len(pictures):,} of {len(numbers):,} frames are there.")


def _upright(frame: Any) -> np.ndarray:
    """uint8 [height, width, 3], turned as the file says: phones film on their side."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


@contextmanager
def _container(name: str, file: IO[bytes]) -> Iterator[tuple[Any, Any]]:
    """The opened file and its first video stream. Errors: PromptError, here and while frames are decoded."""
    try:
        import av  # pyright: ignore[reportMissingImports]
        from av.error import FFmpegError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise PromptError(
            f"{name}: video files need an extra: pip install 'mlx-diffgemma[video]', or give a folder of frames."
        ) from None
    file.seek(0)
    try:
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
        with av.open(file, "r", container_options=options) as container:
            if not container.streams.video:
                raise PromptError(f"{name}: holds no video.")
            stream = container.streams.video[0]
            check_pixels(name, stream.width, stream.height)
            stream.thread_type = "AUTO"
            yield container, stream
    except MemoryError as error:
        raise PromptError(f"{name}: too large for the memory that is free.") from error
    except (FFmpegError, ValueError, OSError) as error:
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PromptError(
            f"{name}: cannot be read as a video: {' '.join(what.split())[:160]}.\n"
            "Expected MP4, MOV, MKV, WebM, AVI, MPEG, FLV, Ogg, WMV or GIF."
        ) from error
