"""Which decoding would have been faster for a request, by what this process has measured of both. A hint and no more:
the faster one is not always the better one."""

from statistics import median

from ...generation.events import CanvasRow, Statistics

REMEMBERED = 9  # runs of each decoding
WORTH = 1.2  # times as long: below, the times of two runs of one kind differ as much


class Pace:
    """Seconds a step and a token, and steps a canvas, of the last single-prompt runs."""

    def __init__(self, canvas_length: int):
        self.canvas_length = canvas_length
        self._canvases: list[float] = []  # seconds a canvas, its commit included
        self._tokens: list[float] = []  # seconds a token

    def note(self, statistics: Statistics, *, rows: int) -> None:
        """Remember a run. Batches are left out: rows share a step, and end at different ones."""
        if rows != 1 or not statistics.steps or statistics.attempts != 1:
            return
        seconds = statistics.denoise_seconds + statistics.commit_seconds
        if statistics.decoding == "autoregressive":
            self._tokens = [*self._tokens, seconds / statistics.steps][-REMEMBERED:]
        else:
            canvases = max(1, -(-statistics.generated_tokens // self.canvas_length))
            self._canvases = [*self._canvases, seconds / canvases][-REMEMBERED:]

    def hint(self, canvases: tuple[CanvasRow, ...], statistics: Statistics) -> str:
        """One line for the result of a single prompt; empty while the other decoding is unmeasured, or as fast."""
        own = statistics.denoise_seconds + statistics.commit_seconds
        tokens = 1 + sum(len(canvas.ids) for canvas in canvases)
        if statistics.decoding == "diffusion":
            measured, count, name = self._tokens, tokens, "autoregressive"
        else:
            measured, count, name = self._canvases, -(-tokens // self.canvas_length), "diffusion"
        other = count * median(measured) if measured else 0.0
        if not other or own < WORTH * other:
            return ""
        return f"{name} decoding would have taken about {other:.2g} s by this machine's times"
