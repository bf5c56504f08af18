"""From messages with pictures to logits: transformers' processor, tower and model on one side, ours on the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from mlx_diffgemma.pipeline.model import DiffusionGemma
from tests import seeing, small
from tests.seeing import asked, picture
from tests.text.processor import processor

CANVAS = np.random.default_rng(0).integers(0, seeing.CONFIG["text_config"]["vocab_size"], (1, small.CANVAS))
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": asked("What is it?", picture(1)),
    "three, in two turns": [
        *asked("One?", picture(1)),
        {"role": "assistant", "content": "Two."},
        *asked("So?", picture(2, 9, 60), picture(3, 50, 50)),
    ],
    "no text": [{"role": "user", "content": [{"type": "image", "image": picture(4, 200, 3)}]}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing.write_checkpoint(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionGemma:
    return seeing.load(folder)


def theirs(folder: Path, messages: list[dict[str, Any]], dtype: torch.dtype) -> np.ndarray:
    """Logits of a first step. `generate` hands the encoder its masks; by itself it drops those of pictures."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval().to(dtype)
    model.set_experts_implementation("eager")
    form: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    told = processor(folder).apply_chat_template(messages, add_generation_prompt=True, **form)
    told = {name: value.to(dtype) if value.is_floating_point() else value for name, value in told.items()}
    encoder, length, text = model.model.encoder, told["input_ids"].shape[1], model.config.get_text_config()
    prefix, places = DynamicCache(config=text), torch.arange(length)[None]
    with torch.no_grad():
        masks = encoder.create_masks_for_generate(
            config=text,
            inputs_embeds=encoder.get_input_embeddings()(told["input_ids"]),
            attention_mask=told.pop("attention_mask"),
            past_key_values=prefix,
            position_ids=places,
            mm_token_type_ids=told["mm_token_type_ids"],
        )
        encoder(**told, attention_mask=masks, past_key_values=prefix)
        visible = torch.ones(1, length + small.CANVAS, dtype=torch.long)
        canvas = torch.from_numpy(CANVAS)
        out = model(decoder_input_ids=canvas, past_key_values=prefix, decoder_attention_mask=visible)
    return out.logits.double().numpy()


def ours(model: DiffusionGemma, messages: list[dict[str, Any]]) -> np.ndarray:
    request = model.prepare(messages, seed=0)
    cache = model.network.make_cache()
    events = request.events(cache)
    while cache.length < len(request.prompts[0]):
        next(events)
    events.close()  # type: ignore[attr-defined]
    return np.array(model.network.logits(mx.array(CANVAS), cache))


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def test_logits(folder: Path, model: DiffusionGemma, record_summary: Callable[[str], None]) -> None:
    ratios = []
    for messages in CONVERSATIONS.values():
        truth, rival = (theirs(folder, messages, dtype) for dtype in (torch.float64, torch.float32))
        ratios.append(rms(ours(model, messages) - truth) / rms(rival - truth))
    record_summary(f"from messages with pictures to logits: error {', '.join(f'{r:.2f}' for r in ratios)} of torch's")
    assert max(ratios) <= 2.0


def test_another_picture_would_show(folder: Path, model: DiffusionGemma) -> None:
    truth = theirs(folder, CONVERSATIONS["one"], torch.float32)
    assert rms(ours(model, asked("What is it?", picture(2))) - truth) > 0.01 * rms(truth)
