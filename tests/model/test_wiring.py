"""Weights are wired while their model lives, on Metal alone, and never the whole working set."""

import gc

import mlx.core as mx
import pytest

from mlx_diffgemma.model import wiring

GB = 1_000_000_000


class Owner:
    """Of weights."""


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every limit that is set, on a Mac of 16 GB."""
    found: list[int] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 * GB})
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: found.append(limit) or 0)
    return found


def test_what_is_needed_and_room_for_a_step_until_the_model_goes(limits: list[int]) -> None:
    first, second = Owner(), Owner()
    assert wiring.wire(first, 3 * GB) == 3 * GB + wiring.ROOM == wiring.wired()
    assert wiring.wire(second, 1 * GB) == 4 * GB + 2 * wiring.ROOM
    del first
    gc.collect()
    assert wiring.wired() == 1 * GB + wiring.ROOM
    del second
    gc.collect()
    assert wiring.wired() == 0
    assert limits == [3 * GB + wiring.ROOM, 4 * GB + 2 * wiring.ROOM, 1 * GB + wiring.ROOM, 0]


def test_never_the_whole_working_set(limits: list[int]) -> None:
    owner = Owner()
    assert wiring.wire(owner, 40 * GB) == int(0.9 * 12 * GB)


def test_nothing_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail("there is nothing to wire"))
    assert wiring.wire(Owner(), GB) == 0 and wiring.wired() == 0
