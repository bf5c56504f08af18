"""What a command does that `mlx.launch` started on several machines: which of them speaks, and what becomes of all when
one is lost."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import launched

if TYPE_CHECKING:
    from .model.sharing.ranks import Ranks
    from .model.sharing.share import Share

SHARES: "list[Ranks]" = []
PATIENCE = 2.0  # seconds that a command has to end by itself when another machine was lost


def share() -> "Share":
    """The machines that mlx.launch started, or this one alone. Errors: ConfigError."""
    from .model.sharing.share import ALONE

    if launched.size() == 1:
        return ALONE
    from .model.sharing.ranks import join

    _overhear()
    joined = join()
    if joined.rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one says when it is over
    SHARES.append(joined)
    return joined


def _overhear() -> None:
    """MLX's ring tells each failed look at a socket on standard error, some twenty lines in pieces; ours is one. When
    it has given up, a pass that comes too late for its failure waits for ever: then the process is ended from here."""
    kept = os.dup(2)
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)
    sys.stderr = open(kept, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115  as long as the process

    def pass_on() -> None:
        passing, ending = True, threading.Thread(target=_end_soon, daemon=True)
        with open(read, "rb") as lines:
            for line in lines:
                passing = passing and (b"[ring]" not in line or "MLX_RING_VERBOSE" in os.environ)
                if passing:
                    os.write(kept, line)
                if b"Too many send/recv errors" in line and ending.ident is None:
                    ending.start()

    threading.Thread(target=pass_on, daemon=True).start()


def _end_soon() -> None:
    """Another machine was lost. What ends as it should has ended by then."""
    time.sleep(PATIENCE)
    if not any(joined.lost for joined in SHARES):
        from .model.sharing.ranks import LOST

        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # a live canvas hides the cursor
        sys.stderr.write(f"Error: {LOST}\n")
    os._exit(1)


def mute() -> Callable[[str], None]:
    """On another machine than the first: that one speaks."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  as long as the process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports may swallow what Python raises
    return lambda _: None
