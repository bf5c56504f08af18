"""What a terminal shows, checked on a small terminal of our own; what a pipe gets; what a recording holds."""

import io
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlx.core as mx
import pytest
from rich.cells import cell_len
from rich.console import Console

from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.generation.events import CanvasRow, Committed, Denoised, Event, Finished, Prefilled, Statistics
from mlx_diffgemma.terminal import recording, screen, sinks
from mlx_diffgemma.terminal.canvas import Line, Painter, glyphs, wrap

WORDS = [f" {word}" for word in "the canvas starts as noise and settles word by word until nothing changes".split()]
WIDE = [*"画布从噪声开始，一个字一个字地确定下来。", "日本語", "한국어", "🙂", "\n"]
VOCABULARY = ["", *dict.fromkeys(WORDS + WIDE), *(f" x{i}" for i in range(100))]
STATISTICS = Statistics(
    prompt_tokens=8,
    reused_tokens=0,
    generated_tokens=96,
    steps=16,
    prefill_seconds=0.1,
    denoise_seconds=1.0,
    commit_seconds=0.1,
    tokens_per_forward=6.0,
    peak_memory_bytes=0,
    tuning="trunk auto",
)


def decode(ids: list[int]) -> str:
    return "".join(VOCABULARY[i] for i in ids)


def denoised(best: list[int], accepted: list[bool], entropy: list[float], step: int = 0, canvas: int = 0) -> Denoised:
    return Denoised(
        index=canvas,
        step=step,
        steps=48,
        temperature=0.8,
        best=mx.array([best]),
        guess=mx.array([best]),
        accepted=mx.array([accepted]),
        entropy=mx.array([entropy]),
        next_canvas=mx.array([[(7 * i + step) % len(VOCABULARY) for i in best]]),
        accepted_count=(sum(accepted),),
        mean_entropy=(sum(entropy) / len(entropy),),
        settled=(False,),
    )


def committed(text: str, canvas: int = 0, thinking: str = "") -> Committed:
    row = CanvasRow(ids=(1, 2), steps=8, settled=True, mean_entropy=0.001, accepted_per_step=(1, 2))
    return Committed(index=canvas, rows=(replace(row, text=text, thinking=thinking),))


def finished() -> Finished:
    return Finished(reasons=("stop",), statistics=STATISTICS)


def script(length: int = 48, canvases: int = 3, steps: int = 8) -> Iterator[Event]:
    """Canvases that settle from left to right, out of noise; the last one is half empty."""
    rng = random.Random(0)
    pool = [VOCABULARY.index(word) for word in WORDS + WIDE]
    yield Prefilled(tokens=8, total=8)
    for canvas in range(canvases):
        words = [pool[(canvas * 5 + i) % len(pool)] for i in range(length if canvas + 1 < canvases else length // 2)]
        target = words + [0] * (length - len(words))
        for step in range(steps):
            known = [i < (step + 1) * length // steps for i in range(length)]
            best = [t if k else rng.randrange(len(VOCABULARY)) for t, k in zip(target, known, strict=True)]
            entropy = [0.01 if k else rng.uniform(0.0, 3.0) for k in known]
            yield denoised(best, known, entropy, step, canvas)
        yield committed(decode(words), canvas)
    yield finished()


TEXT = "".join(event.text for event in script() if isinstance(event, Committed))


class Tube(io.StringIO):
    """A terminal that knows the few codes the canvas uses: rows of cells, a cursor, scrollback that nobody erases."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns, self.rows, self.x, self.y, self.wrap, self.cursor = columns, [[]], 0, 0, True, True
        self.codes: set[str] = set()
        self.pictures: list[list[str]] = []

    def write(self, text: str, /) -> int:
        for code, character in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|(.|\n)", text, re.DOTALL):
            if code:
                self._obey(code)
            else:
                self._put(character)
        self.pictures.append(self.lines())
        return len(text)

    def lines(self) -> list[str]:
        return "\n".join("".join(row).rstrip() for row in self.rows).rstrip("\n").split("\n")

    def _obey(self, code: str) -> None:
        count = int(code[:-1] or 1) if code[:-1].isdigit() or not code[:-1] else 0
        if code[-1] == "A":
            assert self.y >= count, "the cursor left the screen"
            self.y -= count
        elif code[-1] == "C":
            self.x += count
        elif code[-1] == "K":
            del self.rows[self.y][self.x :]
        elif code in ("?7l", "?7h"):
            self.wrap = code[-1] == "h"
        elif code in ("?25l", "?25h"):
            self.cursor = code[-1] == "h"
        elif code[-1] == "m":
            self.codes |= set(code[:-1].split(";"))
        else:
            assert code in ("?2026h", "?2026l"), f"an unknown code: {code}"

    def _put(self, character: str) -> None:
        if character in "\r\n":
            self.x, self.y = 0, self.y + (character == "\n")
        else:
            size = cell_len(character)
            if self.x + size > self.columns:
                assert self.wrap, "a line is wider than the terminal"
                self.x, self.y = 0, self.y + 1
            self._row()[self.x : self.x + size] = [character] + [""] * (size - 1)
            self.x += size
        self._row()

    def _row(self) -> list[str]:
        self.rows += [[] for _ in range(self.y + 1 - len(self.rows))]
        row = self.rows[self.y]
        row += [" "] * (self.x - len(row))
        return row


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """render's clock; it stands still until it is told to go on."""
    now = [100.0]
    monkeypatch.setattr(sinks.time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def ticking(events: Iterator[Event], advance: Callable[[float], None], seconds: float = 1.0) -> Iterator[Event]:
    for event in events:
        advance(seconds)
        yield event


def live(tube: Tube, color: bool = True, height: int = 60) -> sinks.Live:
    console = Console(file=tube, width=tube.columns, height=height, force_terminal=True, no_color=not color)
    return sinks.Live(screen.Terminal(console), decode, color=color)


def wrapped(text: str, columns: int) -> list[str]:
    """Text as a terminal shows it: broken wherever a row is full."""
    tube = Tube(columns)
    tube.write(text + "\n")
    return tube.lines()


@pytest.mark.parametrize("columns", [80, 40, 13])
def test_what_stays_is_the_text_alone(columns: int, clock: Callable[[float], None]) -> None:
    tube = Tube(columns)
    sinks.show(ticking(script(), clock), live(tube))
    assert tube.lines() == wrapped(TEXT, columns)
    assert tube.cursor and tube.wrap


def test_the_canvas_is_drawn_in_place_under_what_was_committed(clock: Callable[[float], None]) -> None:
    tube = Tube(80)
    sinks.show(ticking(script(), clock), live(tube))
    status = [[line for line in picture if "step " in line] for picture in tube.pictures]
    assert max(map(len, status)) == 1, "an older drawing was left behind"
    assert sum(map(len, status)) == 3 * 8, "a step was not drawn"
    first = tube.pictures[next(i for i, found in enumerate(status) if found)]
    assert re.match(r"step 1/48 · accepted 6/48 · entropy \d\.\d{3}", first[-1])


def test_a_tall_canvas_is_cut_to_the_window(clock: Callable[[float], None]) -> None:
    tube = Tube(20)
    sinks.show(ticking(script(length=120, canvases=1), clock), live(tube, height=10))
    drawn = [picture for picture in tube.pictures if any("step " in line for line in picture)]
    assert max(map(len, drawn)) == 9
    assert all("more lines" in picture[0] for picture in drawn)


def test_an_interrupt_leaves_the_committed_text_and_a_clean_terminal(clock: Callable[[float], None]) -> None:
    def interrupted() -> Iterator[Event]:
        for event in script():
            if isinstance(event, Denoised) and event.index == 1 and event.step == 3:
                raise KeyboardInterrupt
            yield event

    tube = Tube(40)
    with pytest.raises(KeyboardInterrupt):
        sinks.show(ticking(interrupted(), clock), live(tube))
    first = next(event.text for event in script() if isinstance(event, Committed))
    assert tube.lines() == wrapped(first, 40)
    assert tube.cursor and tube.wrap


def test_after_a_resize_nothing_is_left_behind(clock: Callable[[float], None]) -> None:
    """A narrower terminal has rewrapped the old drawing: it takes more rows to erase."""
    tube, sink = Tube(60), None
    sink = live(tube)
    sink(next(event for event in script() if isinstance(event, Denoised)))
    before = [line for line in tube.lines() if line]
    tube.columns = 25
    tube.rows = [list(line[i : i + 25]) for line in before for i in range(0, len(line), 25)]
    tube.y = len(tube.rows) - 1
    sink.screen.console.width = 25  # type: ignore[attr-defined]
    sink.close()
    assert not any(tube.lines())


def test_colors_are_left_out_when_asked(clock: Callable[[float], None]) -> None:
    plain, colored = Tube(80), Tube(80)
    sinks.show(ticking(script(), clock), live(plain, color=False))
    sinks.show(ticking(script(), clock), live(colored))
    assert plain.codes <= {"", "0", "1", "2"}
    assert {"32", "90", "36"} <= colored.codes


def test_certainty_decides_how_a_position_looks() -> None:
    painter = Painter(decode)
    a, b = VOCABULARY.index(" the"), VOCABULARY.index(" noise")
    accepted, entropy = [True, True, False, False, False], [0.0, 0.0, 0.05, 0.8, 2.0]
    painter.cells([a, a, a, a, a], [b] * 5, accepted, entropy)
    cells = painter.cells([a, b, a, a, a], [b] * 5, accepted, entropy)
    seen = {style: "".join(text for text, _, s in cells if s == style) for _, _, style in cells}
    assert (seen[""], seen["changed"], seen["likely"], seen["unsure"]) == (" the", " noise", " the", " the")
    assert len(seen["noise"]) == len(" the") and "the" not in seen["noise"]


def test_what_is_pinned_looks_pinned_from_the_first_step_on() -> None:
    painter = Painter(decode)
    a, b = VOCABULARY.index(" the"), VOCABULARY.index(" noise")
    cells = painter.cells([a, a, b], [b] * 3, [False, True, False], [2.0, 0.0, 2.0], [True, False, False])
    assert [style for _, _, style in cells] == ["pinned"] * 4 + [""] * 4 + ["noise"] * 6
    assert "".join(text for text, _, style in cells if style == "pinned") == " the"


def test_no_line_is_wider_than_the_window() -> None:
    rng = random.Random(1)
    for columns in (3, 10, 40):
        cells = [(text, size, "") for _ in range(200) for text, size in glyphs(rng.choice(VOCABULARY))]
        lines = wrap(cells, columns)
        assert max(cell_len(text) for line in lines for text in ["".join(run for run, _ in line)]) <= columns
        squeezed = "".join(run for line in lines for run, _ in line).replace(" ", "")
        assert squeezed == "".join(text for text, _, _ in cells).replace(" ", "").replace("\n", "")


def test_a_character_of_several_byte_tokens_is_shown_whole() -> None:
    alphabet = "画布é".encode()

    def decode_bytes(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    cells = Painter(decode_bytes).cells([*alphabet, 65], [0] * 9, [True] * 9, [0.0] * 9)
    assert [text for text, _, _ in cells] == ["画", "布", "é", "A"]


def test_at_most_fifteen_frames_a_second_and_arrays_are_read_only_to_be_drawn(clock: Callable[[float], None]) -> None:
    class Frames:
        size = (80, 24)
        drawn = 0

        def draw(self, lines: list[Line]) -> None:
            self.drawn += 1

        def commit(self, text: str) -> None: ...
        def close(self) -> None: ...

    class Counted:
        reads = 0
        shape = (1, 2)

        def __getitem__(self, row: int) -> mx.array:
            self.reads += 1
            return mx.array([1, 2])

    frames, array = Frames(), Counted()
    sink = sinks.Live(frames, decode)
    event = denoised([1, 2], [True, False], [0.0, 1.0], step=5)
    event = Denoised(**(vars(event) | dict.fromkeys(("best", "next_canvas", "accepted", "entropy"), array)))
    for _ in range(1000):
        clock(0.01)
        sink(event)
    assert 140 <= frames.drawn <= 150
    assert array.reads == 4 * frames.drawn


def test_drawing_takes_at_most_a_fiftieth_of_the_time(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a drawing is slow (here 10 ms), there are fewer of them."""
    spent = [0.0]

    class Slow:
        size = (80, 24)

        def draw(self, lines: list[Line]) -> None:
            clock(0.01)
            spent[0] += 0.01

        def commit(self, text: str) -> None: ...
        def close(self) -> None: ...

    sink = sinks.Live(Slow(), decode)
    event = denoised([1, 2], [True, False], [0.0, 1.0], step=5)
    for _ in range(3000):
        clock(0.01)
        sink(event)
    assert 0.3 <= spent[0] <= 0.025 * 30


def test_a_pipe_gets_the_bare_text() -> None:
    file = io.StringIO()
    last = sinks.show(script(), sinks.BareText(file))
    assert file.getvalue() == TEXT + "\n"
    assert isinstance(last, Finished)


def test_events_are_one_json_object_a_line() -> None:
    file = io.StringIO()
    sinks.show(script(), sinks.JsonLines(file, decode))
    rows = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [row["event"] for row in rows] == ["prefilled", *(["denoised"] * 8 + ["committed"]) * 3, "finished"]
    assert len(rows[1]["best"]) == len(rows[1]["accepted"]) == len(rows[1]["entropy"]) == 48
    assert "".join(row["text"] for row in rows if row["event"] == "committed") == TEXT
    assert rows[-1]["reason"] == "stop"


def test_a_models_words_cannot_move_the_cursor() -> None:
    tube = Tube(40)
    evil = "a\x1b[2J\x1b]0;title\x07\rb\x9b1A\tc"
    sinks.show(iter([committed(evil), finished()]), live(tube))
    assert tube.lines() == ["a[2J]0;titleb1A    c"]


def test_thoughts_come_before_the_answer_they_led_to() -> None:
    events = [
        committed("", thinking="2 + 2"),
        committed("", thinking=" is 4"),
        committed("Four"),
        committed("."),
        finished(),
    ]
    voice = sinks.Voice(show_thinking=True)
    texts = [voice(event) for event in events if isinstance(event, Committed)]
    assert "".join(texts) == "[thinking]\n2 + 2 is 4\n[answer]\nFour."


def test_a_pace_keeps_every_step_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(sinks.time, "sleep", slept.append)
    pace = sinks.Pace(0.2)
    assert list(map(type, pace(script()))) == list(map(type, script()))
    assert slept == [0.2] * 25  # the noise of the first canvas, and every step
    assert abs(pace.slept - sum(slept)) < 1e-9


def test_recordings_show_every_frame(tmp_path: Path, clock: Callable[[float], None]) -> None:
    for name in ("a.svg", "a.html", "a.cast"):
        sink: Any = sinks.Live(recording.Recording(tmp_path / name), decode)
        sinks.show(ticking(script(), clock, 0.1), sink)
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    groups = root.findall("{http://www.w3.org/2000/svg}g")
    shown = "".join("".join(groups[-1].itertext()).split())
    assert shown == "".join(TEXT.split())
    assert len(groups) == 3 * 8 + 3  # the steps and the commits
    assert (tmp_path / "a.html").read_text().count("<svg") == 1
    header, *frames = [json.loads(line) for line in (tmp_path / "a.cast").read_text().splitlines()]
    assert header["version"] == 2 and header["width"] == 80 and len(frames) == len(groups)
    assert [seconds for seconds, _, _ in frames] == sorted(seconds for seconds, _, _ in frames)


def test_a_recording_of_another_kind_is_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a name ending in \.svg, \.html or \.cast"):
        recording.Recording(tmp_path / "canvas.gif")


def test_ctrl_z_is_minded_while_a_canvas_is_drawn() -> None:
    """The cursor is hidden then; what a shell without job control ignores stays ignored."""
    terminal = screen.Terminal(Console(file=io.StringIO(), width=20))
    before = signal.getsignal(signal.SIGTSTP)
    for handler, minded in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        signal.signal(signal.SIGTSTP, handler)
        terminal.draw([[("a", "")]])
        assert (signal.getsignal(signal.SIGTSTP) != handler) is minded
        terminal.close()
        assert signal.getsignal(signal.SIGTSTP) == handler
    signal.signal(signal.SIGTSTP, before)
