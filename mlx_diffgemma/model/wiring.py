"""Metal keeps in memory what it is told to keep, and nothing else: so weights and prefix are wired while models live.

Without it macOS may page weights out between two steps. The limit is the process's, not a model's: models add what
they need, and take it away again.
"""

import threading
import weakref

import mlx.core as mx

# Metal's recommended working set is a limit, not an aim: a small Mac whose whole working set was wired has frozen
# (ekryski/vmlx-swift #421), and mlx-lm warns above nine tenths.
SHARE = 0.9
ROOM = 1_500_000_000  # bytes for a step's arrays

_LOCK = threading.Lock()
_wired: dict[int, int] = {}  # by owner, in bytes


def most() -> int:
    """Bytes that may be wired: nine tenths of what Metal recommends; 0 where there is no Metal."""
    if not mx.metal.is_available() or mx.default_device() != mx.gpu:
        return 0
    return int(SHARE * int(mx.device_info().get("max_recommended_working_set_size", 0)))


def wire(owner: object, needed: int) -> int:
    """Have `needed` bytes (weights and prefix) and room for a step wired for as long as `owner` lives.

    Returns the process's limit in bytes, 0 where nothing can be wired. To be called when the weights are evaluated.
    """
    if not (limit := most()):
        return 0
    with _LOCK:
        if id(owner) not in _wired:
            weakref.finalize(owner, _unwire, id(owner))
        _wired[id(owner)] = needed + ROOM
        return _set(limit)


def wired() -> int:
    """The limit that is set now, in bytes."""
    return min(sum(_wired.values()), most())


def _unwire(owner: int) -> None:
    with _LOCK:
        _wired.pop(owner, None)
        _set(most())


def _set(limit: int) -> int:
    now = min(sum(_wired.values()), limit)
    mx.set_wired_limit(now)
    return now
