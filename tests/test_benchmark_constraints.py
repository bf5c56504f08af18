"""The benchmark of constraints on a small made-up vocabulary: the languages it names take what they should."""

import json

import pytest

from benchmarks import constraints, models
from mlx_diffgemma.generation.constraint.automaton import Constraint

FIELDS = {"name": "Ada", "age": 31, "email": "a@b.c", "status": "new", "ok": True}
ORDER = {
    "id": 7,
    "customer": {"name": "Ada", "email": ""},
    "items": [{"sku": "k", "count": 1, "price": 2.5}, {"sku": "é😀", "count": 0, "price": 0}],
    "total": 2.5,
}
TAKEN = {
    "5 labels": "mixed",
    "a date": "2026-11-30",
    "free text": "Anything\nat all: ünï",
    "5 fields, open strings": json.dumps(FIELDS),
    "5 fields, maxLength 40": json.dumps(FIELDS | {"name": "x" * 40}),
    "a nested order": json.dumps(ORDER, ensure_ascii=False),
    "any JSON, 2 deep": '[{"a": null}, -1.5]',
}
REFUSED = {
    "5 labels": "mixe",
    "a date": "2026-13-30",
    "5 fields, open strings": json.dumps(FIELDS | {"ok": 1}),
    "5 fields, maxLength 40": json.dumps(FIELDS | {"name": "x" * 41}),
    "a nested order": json.dumps(ORDER | {"total": "2.5"}),
    "any JSON, 2 deep": "[[[1]]]",
}


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Constraint], list[list[object]], dict[bytes, int]]:
    pieces = constraints.made_up(3000)
    made, rows = constraints.sizes(pieces)
    return made, rows, {piece: i for i, piece in enumerate(pieces) if piece}


def test_the_languages_take_what_they_should(measured: tuple) -> None:
    made, _, ids = measured
    byte = {bytes([i]): ids[bytes([i])] for i in range(256)}
    for spelling in (ids, byte):
        for name, text in TAKEN.items():
            state = made[name].walk(made[name].start, constraints.spelled(text, spelling))
            assert state >= 0 and made[name].distance[state] == 0
        for name, text in REFUSED.items():
            state = made[name].walk(made[name].start, constraints.spelled(text, spelling))
            assert state < 0 or made[name].distance[state] > 0


def test_a_step_is_timed(measured: tuple) -> None:
    made, name = measured[0], constraints.TIMED[1]
    [row] = constraints.times({name: made[name]}, models.config(32, 1, 8, 3000), runs=1)
    assert row[0] == name and all(float(cell) >= 0 for cell in row[1:])


def test_what_is_too_large_has_its_pairs_in_the_table(measured: tuple) -> None:
    made, rows, _ = measured
    assert set(constraints.LANGUAGES) - set(made) == {"a string, maxLength 1000"}
    assert int(rows[-1][4].replace(",", "")) > 20_000
