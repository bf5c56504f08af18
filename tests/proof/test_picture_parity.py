"""From pixels to logits: tower, projection, prompt, mask and a first step, ours against transformers' in float64, in
units of its float32 error. Each side sees the patches with its own tower."""

import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import get_args
from unittest import mock

import numpy as np
import torch
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from mlx_diffgemma.config import PictureMask
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.model.vision import Eyes
from mlx_diffgemma.text.pictures.images import PictureConfig, scaled_size
from tests.model import eyes
from tests.model.behind_pictures import Rows, both_sides, our_logits, reference_logits
from tests.model.eyes import MEDIAN, TOWERS, WORST, Case, rms
from tests.reference_models import Model, text_config

TOWER = "small patches"  # whose soft tokens are as wide as the text model
MODEL = Model(
    text=text_config(num_experts=4, top_k_experts=4, use_bidirectional_attention="vision"),  # no router can tie
    canvas_length=24,
    weights={"seed": 8},
    released_dialect=True,
)


@dataclass(frozen=True)
class Asked:
    """Of every row how many text tokens, and pictures: width, height, budget."""

    rows: tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...]

    def cases(self) -> list[list[Case]]:
        patch, pool = (TOWERS[TOWER].config[key] for key in ("patch_size", "pooling_kernel_size"))
        config = PictureConfig(patch_size=patch, pooling=pool)
        made = []
        for _, pictures in self.rows:
            sizes = [scaled_size(wide, high, budget, config) for wide, high, budget in pictures]
            made.append([Case(TOWER, high // patch, wide // patch) for wide, high in sizes])
        return made


def one(tokens: int, *pictures: tuple[int, int, int]) -> Asked:
    return Asked(rows=((tokens, pictures),))


SUITE = [
    *(one(20, (wide, high, 70)) for wide, high in ((512, 512), (1200, 300), (5, 7), (12, 3000), (641, 479), (1, 1))),
    *(one(9, (640, 480, budget)) for budget in (140, 280)),
    one(30, (512, 512, 70), (300, 1200, 70)),
    one(11, (90, 60, 70), (90, 60, 140)),
    one(3, (5, 7, 140), (1920, 1080, 70)),
    one(40, (512, 512, 70), (1200, 300, 70), (5, 7, 70)),
    one(8, (640, 480, 70), (640, 480, 70), (640, 480, 70)),
    Asked(rows=((30, ((512, 512, 70),)), (5, ((300, 1200, 70), (40, 40, 70))))),
    Asked(rows=((60, ((512, 512, 70),)), (12, ()))),
    Asked(rows=((4, ()), (7, ((1200, 300, 70),)), (50, ((60, 90, 70), (640, 480, 70), (9, 16, 140))))),
]
KINDS: tuple[PictureMask, ...] = get_args(PictureMask)


@cache
def references() -> tuple[torch.nn.Module, torch.nn.Module]:
    models = MODEL.reference().double(), MODEL.reference()
    for model in models:
        model.config.text_config.use_bidirectional_attention = "vision"
    return models


@cache
def ours() -> tuple[Network, Eyes]:
    return MODEL.network(), TOWERS[TOWER].eyes()


def prompt(asked: Asked) -> tuple[np.ndarray, Rows, np.ndarray]:
    """Ids [B, P], padding and blocks, and a canvas: text, and pictures spread among it."""
    random = np.random.default_rng(zlib.crc32(repr(asked).encode()))
    size, length = MODEL.text["vocab_size"], MODEL.canvas_length
    made: list[tuple[list[int], list[tuple[int, int]]]] = []
    for (tokens, _), cases in zip(asked.rows, asked.cases(), strict=True):
        ids, spans = [], []
        for number, case in enumerate(cases, 1):
            ids += random.integers(0, size, number * tokens // (len(cases) + 1) + 1).tolist()
            spans.append((len(ids), len(ids) + case.rows * case.columns // 4))
            ids += [0] * (case.rows * case.columns // 4)
        made.append((ids + random.integers(0, size, tokens // (len(cases) + 1) + 1).tolist(), spans))
    longest = max(len(ids) for ids, _ in made)
    padded = [[0] * (longest - len(ids)) + ids for ids, _ in made]
    rows = [(longest - len(ids), [(a + longest - len(ids), b + longest - len(ids)) for a, b in s]) for ids, s in made]
    return np.array(padded), rows, random.integers(0, size, (len(made), length))


def placed(asked: Asked, rows: Rows, length: int, see: Callable[[Case], np.ndarray]) -> np.ndarray:
    """Every picture's soft tokens at its block, [B, P, H]."""
    x = np.zeros((len(rows), length, MODEL.text["hidden_size"]), np.float64)
    for number, ((_, spans), cases) in enumerate(zip(rows, asked.cases(), strict=True)):
        for (start, stop), case in zip(spans, cases, strict=True):
            x[number, start:stop] = see(case)
    return x


def ratio(asked: Asked, kind: PictureMask) -> float:
    ids, rows, canvas = prompt(asked)
    network, own = ours()

    def seen(see: Callable[[Case], np.ndarray]) -> np.ndarray:
        return placed(asked, rows, ids.shape[1], see)

    with mock.patch.object(gemma4, "sliding_window_overlay", both_sides) if kind == "gemma4" else nullcontext():
        truth, rival = (
            reference_logits(model, ids, rows, seen(lambda case, side=side: eyes.expected(case)[side]), canvas, kind)
            for side, model in enumerate(references())
        )
    features = seen(lambda case: eyes.ours(own, case)).astype(np.float32)
    return rms(our_logits(network, ids, rows, features, canvas, kind, 50) - truth) / rms(rival - truth)


def test_logits_of_pixels_are_the_references(record_summary: Callable[[str], None]) -> None:
    ratios = {(asked, kind): ratio(asked, kind) for asked in SUITE for kind in KINDS}
    median, worst = float(np.median(list(ratios.values()))), max(ratios.values())
    record_summary(f"pixels to logits: error {median:.2f} of torch's, worst {worst:.2f}, {len(ratios)} prompts")
    assert median <= MEDIAN and worst <= WORST, ratios
