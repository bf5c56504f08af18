"""Whole runs of transformers' `generate` with pictures, walked by our tower and engine: the same guesses, accepted
sets, steps and ids. Then the traps between the tower and the canvas, built in on purpose: each must leave the path."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from convert import record_reference as reference
from mlx_diffgemma.generation.run import Run
from mlx_diffgemma.model.blocks import Block, BlockMask, Spans
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.model.vision import Eyes, Projection, VisionTower
from mlx_diffgemma.proof.recordings import Recording
from mlx_diffgemma.proof.replay import replay_trajectory

torch.set_num_threads(1)  # on models this small, threads only wait for each other

Patch = pytest.MonkeyPatch
RUNS = reference.SEEING_RUNS


@cache
def recorded(name: str) -> Recording:
    """transformers, now."""
    arrays, provenance = reference.record_seeing(RUNS[name], "cpu")
    return Recording(name=name, provenance=provenance, arrays=arrays)


def departures(name: str, **options: Any) -> list[str]:
    recording = recorded(name)
    return replay_trajectory(recording, recording.network(), **options)


@pytest.mark.parametrize("name", RUNS)
def test_the_same_accepted_sets_steps_and_ids(name: str, record_summary: Callable[[str], None]) -> None:
    assert departures(name) == []
    told = recorded(name).arrays
    accepted = int((told["accepted"].any(-1)).sum())
    record_summary(
        f"generate with pictures, {name}: {len(told['pictures'])} pictures, {len(told['canvas'])} canvases,"
        f" {int(told['steps'].sum())} steps, {accepted} of them accepting something: the same"
    )


@pytest.mark.parametrize("chunk", [1, 10])
def test_a_prompt_in_chunks_is_the_same_run(chunk: int) -> None:
    for name in ("three-pictures", "batch"):
        assert departures(name, prefill_step_size=chunk) == []


def test_the_runs_cover_what_pictures_can_do() -> None:
    told = {name: recorded(name).arrays for name in RUNS}
    sizes = {name: [stop - start for _, start, stop, _, _ in told[name]["pictures"].tolist()] for name in RUNS}
    assert max(sizes["wider-than-the-window"]) > reference.SMALL["sliding_window"]
    assert [len(sizes[name]) for name in ("picture", "two-pictures", "three-pictures")] == [1, 2, 3]
    assert told["batch"]["padding"].any() and len(told["batch"]["prompt"]) > len(set(told["batch"]["pictures"][:, 0]))
    assert any(arrays["settled"].any() for arrays in told.values())
    assert not told["steps-run-out"]["settled"].all()
    assert all((arrays["accepted"] & ~arrays["accepted"].all(-1, keepdims=True)).any() for arrays in told.values())
    renoised = [(arrays["ids"] == reference.IMAGE) & ~arrays["accepted"] for arrays in told.values()]
    assert any(places.any() for places in renoised)  # an image id on a canvas, where it is an ordinary token


# --- Traps


MUTANTS: dict[str, Callable[[Patch], None]] = {}
SUITE = ("picture", "three-pictures", "batch", "equal-ids")


def mutant(make: Callable[[Patch], None]) -> Callable[[Patch], None]:
    MUTANTS[make.__name__.replace("_", "-")] = make
    return make


def shown(change: Callable[[list[list[Block]]], list[list[Block]]]) -> Callable[[Patch], None]:
    """Other blocks than those of the prompts."""
    original = Recording.pictures
    return lambda patch: patch.setattr(Recording, "pictures", lambda self: change(original(self)))


def features(change: Callable[[mx.array], mx.array]) -> Callable[[Patch], None]:
    """Other soft tokens [n, H]."""
    return shown(
        lambda rows: [[dataclasses.replace(b, features=lambda b=b: change(b.features())) for b in row] for row in rows]
    )


MUTANTS["soft-tokens-are-scaled-as-text"] = features(lambda x: x * x.shape[-1] ** 0.5)
MUTANTS["soft-tokens-backwards"] = features(lambda x: x[::-1])
MUTANTS["soft-tokens-begin-one-late"] = features(lambda x: mx.concatenate([x[-1:], x[:-1]]))
MUTANTS["pictures-without-their-pixels"] = features(mx.zeros_like)


def about_the_first(rows: list[list[Block]]) -> list[list[Block]]:
    """What was seen first is what is seen: a cache by ids, which are equal."""
    seen: dict[int, Block] = {}
    return [
        [dataclasses.replace(b, features=seen.setdefault(b.stop - b.start, b).features) for b in row] for row in rows
    ]


def in_another_order(rows: list[list[Block]]) -> list[list[Block]]:
    """The features of all pictures in one line, the last picture's first, cut where the placeholders are."""
    found = [b.features() for row in rows for b in row]
    line, end = mx.concatenate(found[::-1]), 0
    made: list[list[Block]] = []
    for row in rows:
        made.append([])
        for block in row:
            start, end = end, end + block.stop - block.start
            made[-1].append(dataclasses.replace(block, features=lambda x=line[start:end]: x))
    return made


MUTANTS["about-the-first-picture"] = shown(about_the_first)
MUTANTS["pictures-in-another-order"] = shown(in_another_order)


def encoded(change: Callable[[Sequence[Spans]], Sequence[Spans]]) -> Callable[[Patch], None]:
    """Other blocks for the masks alone."""
    original = Network.encode

    def encode(self: Network, x: mx.array, cache: Any, blocks: Sequence[Spans] = (), kind: Any = "transformers") -> Any:
        return original(self, x, cache, change(blocks), kind)

    return lambda patch: patch.setattr(Network, "encode", encode)


MUTANTS["no-block-at-all"] = encoded(lambda blocks: ())
MUTANTS["boi-and-eoi-belong-to-the-block"] = encoded(lambda rows: [[(a - 1, b + 1) for a, b in row] for row in rows])
MUTANTS["pictures-of-a-prompt-are-one-block"] = encoded(
    lambda rows: [[(row[0][0], row[-1][1])] if row else [] for row in rows]
)
MUTANTS["blocks-of-the-first-row-alone"] = encoded(
    lambda rows: [() if number else row for number, row in enumerate(rows)]
)


@mutant
def the_mask_of_another_model(patch: Patch) -> None:
    original = Network.encode
    patch.setattr(
        Network, "encode", lambda self, x, cache, blocks=(), kind="": original(self, x, cache, blocks, "gemma4")
    )


@mutant
def a_block_ends_with_the_window(patch: Patch) -> None:
    original = BlockMask._block
    patch.setattr(BlockMask, "_block", lambda self, *where: original(dataclasses.replace(self, kind="gemma4"), *where))


@mutant
def boi_is_overwritten(patch: Patch) -> None:
    original = Run._inputs

    def inputs(self: Run, start: int, end: int) -> tuple[mx.array, Sequence[Spans]]:
        x, blocks = original(self, start, end)
        for row, spans in enumerate(blocks):
            for a, _ in spans:
                x[row, a - 1] = x[row, a]
        return x, blocks

    patch.setattr(Run, "_inputs", inputs)


@mutant
def soft_tokens_share_a_position(patch: Patch) -> None:
    """The picture is one position of the prompt, as other models have it."""
    from mlx_diffgemma.model.layers import Attention

    blocks: list[Sequence[Spans]] = [()]
    encode, rotate = Network.encode, Attention._rotate

    def encoding(
        self: Network, x: mx.array, cache: Any, spans: Sequence[Spans] = (), kind: Any = "transformers"
    ) -> Any:
        blocks[0] = spans
        hidden = encode(self, x, cache, spans, kind)
        blocks[0] = ()
        return hidden

    def rotating(self: Attention, x: mx.array, offset: Any) -> mx.array:
        if not any(blocks[0]) or x.shape[0] > 1:
            return rotate(self, x, offset)
        inside = [sum(a < i < b for a, b in blocks[0][0]) for i in range(x.shape[1])]
        places = np.arange(x.shape[1]) - np.cumsum(inside)
        return mx.concatenate([rotate(self, x[:, i : i + 1], offset + int(p)) for i, p in enumerate(places)], axis=2)

    patch.setattr(Network, "encode", encoding)
    patch.setattr(Attention, "_rotate", rotating)


@mutant
def image_ids_of_a_canvas_are_padding(patch: Patch) -> None:
    original = Network.denoise
    padding = reference.DEFAULTS["pad_token_id"]

    def denoise(self: Network, canvas: mx.array, *rest: Any) -> mx.array:
        return original(self, mx.where(canvas == reference.IMAGE, padding, canvas), *rest)

    patch.setattr(Network, "denoise", denoise)


@mutant
def rows_and_columns_are_swapped(patch: Patch) -> None:
    original = Eyes.see
    patch.setattr(Eyes, "see", lambda self, patches, columns: original(self, patches, len(patches) // columns))


@mutant
def not_standardized(patch: Patch) -> None:
    original = VisionTower.__call__

    def call(self: VisionTower, *arguments: Any) -> mx.array:
        self.pop("std_bias", None)
        return original(self, *arguments)

    patch.setattr(VisionTower, "__call__", call)


@mutant
def projected_without_a_norm(patch: Patch) -> None:
    patch.setattr(Projection, "__call__", lambda self, x: self.embedding_projection(x))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_trap_leaves_the_path(name: str, monkeypatch: Patch) -> None:
    MUTANTS[name](monkeypatch)
    assert any(departures(run) for run in SUITE)
