"""Pictures among a prompt's tokens: keys and masks of every run against the rule written out; logits against
transformers' in units of its float32 error; the traps as mutants."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from mlx_diffgemma.config import PictureMask
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.generation import engine, run
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model import network as network_module
from mlx_diffgemma.model.blocks import BlockMask, chunk_end
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.model.tuning import DEFAULT
from tests.model.behind_pictures import Rows, Spans, both_sides, our_logits, reference_logits
from tests.reference_models import Model, text_config

WINDOW = 16
MODEL = Model(
    text=text_config(num_experts=4, top_k_experts=4, use_bidirectional_attention="vision"),  # no router can tie
    canvas_length=24,
    weights={"seed": 7},
    released_dialect=True,
)
KINDS: tuple[PictureMask, ...] = ("transformers", "gemma4")
LAYOUTS: dict[str, tuple[int, Rows]] = {  # the prompt's length, and its rows
    "one": (30, [(0, [(5, 17)])]),
    "at both ends": (40, [(0, [(0, 9), (31, 40)])]),
    "wider than the window": (60, [(0, [(12, 44)])]),
    "side by side": (64, [(0, [(2, 12), (13, 25), (40, 55)])]),
    "rows differ": (48, [(0, [(3, 20), (30, 40)]), (11, [(12, 30)]), (20, [])]),
    "long padding": (50, [(0, [(8, 42)]), (41, [(43, 49)])]),
}


def allowed(kind: PictureMask, window: int | None, spans: Spans, hidden: int, query: int, key: int) -> bool:
    """The rule, one pair at a time; positions from the first key on."""
    same = any(a <= query < b and a <= key < b for a, b in spans)
    near = window is None or query - key < window
    causal = key <= query
    if key < hidden:
        return False
    if kind == "transformers":
        return (causal and near) or same
    if window is None:
        return causal
    return (causal or same) and abs(query - key) < window


def array(mask: BlockMask, step: int) -> np.ndarray:
    """The pieces put together, bool [queries, keys]."""
    whole = np.zeros((mask.length, mask.visible + mask.length), bool)
    done = mask.skipped
    for rows, columns, part in mask.pieces(step):
        assert rows.start == done and rows.stop - rows.start <= step
        done, shape = rows.stop, (rows.stop - rows.start, columns.stop - columns.start)
        seen = np.ones(shape, bool) if part is None else np.tri(*shape, shape[1] - shape[0], dtype=bool)
        whole[rows, columns] = np.array(part) if isinstance(part, mx.array) else seen
    assert done == mask.length
    return whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 4, 16])
def test_runs_are_the_rule(kind: PictureMask, window: int | None) -> None:
    layouts: list[Spans] = [[(0, 5)], [(3, 12)], [(2, 4), (5, 20)], [(1, 6), (7, 9), (14, 22)], [(21, 22)]]
    for spans, visible, hidden, step in product(layouts, (0, 3), (0, 2, 5), (1, 3, 50)):
        if any(a + visible < hidden for a, _ in spans):
            continue
        mask = BlockMask(length=22, visible=visible, hidden=hidden, window=window, spans=spans, kind=kind)
        moved = [(a + visible, b + visible) for a, b in spans]
        expected = [
            [allowed(kind, window, moved, hidden, visible + query, key) for key in range(visible + 22)]
            for query in range(22)
        ]
        assert np.array_equal(array(mask, step), np.array(expected)), (spans, visible, hidden, step)


def test_a_chunk_cuts_no_block() -> None:
    rows = [[(4, 10), (11, 20)], [(8, 13)]]
    ends = {(0, 3): 3, (0, 4): 4, (0, 7): 4, (0, 10): 4, (0, 12): 4, (4, 12): 20, (4, 20): 20, (0, 20): 20}
    assert {ask: chunk_end(*ask, rows) for ask in ends} == ends


# --- Against transformers


@cache
def _references() -> tuple[torch.nn.Module, torch.nn.Module]:
    models = MODEL.reference().double(), MODEL.reference()
    for model in models:
        model.config.text_config.use_bidirectional_attention = "vision"
    return models


@cache
def network() -> Network:
    return MODEL.network()


def inputs(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [B, P], what stands at the blocks [B, P, H], and a canvas [B, L]."""
    length, rows = LAYOUTS[name]
    random = np.random.default_rng([length, len(rows)])
    size = MODEL.text["vocab_size"]
    ids = random.integers(0, size, (len(rows), length))
    features = random.normal(0, 1, (len(rows), length, MODEL.text["hidden_size"])).astype(np.float32)
    return ids, features, random.integers(0, size, (len(rows), MODEL.canvas_length))


def expected(name: str, kind: PictureMask, *, float64: bool) -> np.ndarray:
    """transformers' logits of a first step; `kind` picks the model of the two whose mask it is."""
    ids, features, canvas = inputs(name)
    return reference_logits(_references()[not float64], ids, LAYOUTS[name][1], features, canvas, kind)


def ours(name: str, kind: PictureMask, chunk: int = 1000) -> np.ndarray:
    ids, features, canvas = inputs(name)
    return our_logits(network(), ids, LAYOUTS[name][1], features, canvas, kind, chunk)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


CASES = [(name, kind) for name in LAYOUTS for kind in KINDS]


@cache
def references(name: str, kind: PictureMask) -> tuple[np.ndarray, np.ndarray]:
    """transformers' logits in float64 and in float32. Its gemma4 bounds a block by the window on its left alone; where
    a block is wider than the window, both sides here, as Google's own code has it."""
    wide = any(stop - start > WINDOW for _, spans in LAYOUTS[name][1] for start, stop in spans)
    with pytest.MonkeyPatch.context() as patch:
        if wide:
            patch.setattr(gemma4, "sliding_window_overlay", both_sides)
        return expected(name, kind, float64=True), expected(name, kind, float64=False)


def ratio(name: str, kind: PictureMask, chunk: int = 1000) -> float:
    truth, rival = references(name, kind)
    return rms(ours(name, kind, chunk) - truth) / rms(rival - truth)


def test_logits_are_the_references(record_summary: Callable[[str], None]) -> None:
    ratios = {(*case, chunk): ratio(*case, chunk) for case in CASES for chunk in (1000, 5, 17)}
    worst, median = max(ratios.values()), float(np.median(list(ratios.values())))
    record_summary(f"logits behind pictures: error {median:.2f} of torch's, worst {worst:.2f}, {len(ratios)} prompts")
    assert median <= 1.2 and worst <= 2.0, ratios


def test_few_scores_at_once_change_nothing() -> None:
    small = MODEL.network()
    small.tuning = replace(DEFAULT, scores=1 << 10)
    _, features, _ = inputs("side by side")
    spans = LAYOUTS["side by side"][1][0][1]
    read = [net.encode(mx.array(features), net.make_cache(), [spans]) for net in (small, network())]
    assert mx.allclose(*read, atol=1e-4)


def test_the_masks_differ() -> None:
    for name in LAYOUTS:
        one, other = (references(name, kind)[0] for kind in KINDS)
        assert rms(one - other) > 1e-3 * rms(one), name


# --- Traps: every one must show in one of these prompts


def causal(self: BlockMask) -> Iterator[tuple[int, int, None]]:
    if self.skipped < self.length:
        yield self.skipped, self.length, None


def block_in_the_window(self: BlockMask, a: int, b: int, start: int, stop: int) -> tuple[slice, mx.array | None]:
    return ORIGINAL(replace(self, kind="gemma4"), a, b, start, stop)


def joined(self: BlockMask) -> Iterator[tuple[int, int, tuple[int, int] | None]]:
    first, last = self.spans[0][0], self.spans[-1][1]
    return RUNS(replace(self, spans=[(first, last)]))


ORIGINAL, RUNS = BlockMask._block, BlockMask._runs
MUTANTS = {
    "blocks are causal": ("_runs", causal),
    "a block ends with the window": ("_block", block_in_the_window),
    "blocks are one": ("_runs", joined),
    "padding is seen": ("_counts", lambda cache, rows: [0] * rows),
}
SUITE = ("wider than the window", "side by side", "rows differ")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_trap_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for layout in SUITE:
        assert ratio(layout, "transformers") <= 2.0
    attribute, change = MUTANTS[name]
    monkeypatch.setattr(network_module if attribute == "_counts" else BlockMask, attribute, change)
    assert not all(ratio(layout, "transformers") <= 2.0 for layout in SUITE)


def test_a_cut_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "chunk_end", lambda start, end, rows: end)
    with pytest.raises((ValueError, AssertionError)):
        assert ratio("one", "transformers", 9) <= 2.0


def test_a_mask_of_no_picture_is_refused() -> None:
    settings = GenerationConfig(picture_mask="gemma4")
    noise = SeededNoise([0], length=MODEL.canvas_length, vocabulary=MODEL.text["vocab_size"])
    for ask in (
        lambda: engine.generate(network(), [[1]], settings, noise),
        lambda: engine.check(network(), [[1]], settings),
    ):
        with pytest.raises(ConfigError, match="picture_mask would do nothing: the prompt has no picture"):
            ask()
