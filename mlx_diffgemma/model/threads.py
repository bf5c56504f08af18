"""MLX's streams end with the thread that used them, while Python still runs."""

import atexit
import threading

import mlx.core as mx


class _AtTheEnd:
    """Lives as long as the thread that holds it in `_HELD`; Python lets go of it in that thread, at its end."""

    def __del__(self) -> None:
        mx.clear_streams()


_HELD = threading.local()
atexit.register(mx.clear_streams)


def clear_at_the_end() -> None:
    """Clear this thread's streams when it ends. To be called by whatever has MLX work in a thread.

    MLX clears them by itself only after Python is gone from the thread: a process that ends soon after such a thread
    then aborts with status 134 (mlx #4110, #4327, whose advice this is).
    """
    _HELD.cleared = getattr(_HELD, "cleared", None) or _AtTheEnd()
