"""Logits of a first step behind prompts with pictures: transformers' and ours."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import torch
from transformers import DynamicCache
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as reference
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from mlx_diffgemma.config import PictureMask
from mlx_diffgemma.generation import engine
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.blocks import Block
from mlx_diffgemma.model.network import Network

Spans = list[tuple[int, int]]
Rows = list[tuple[int, Spans]]  # of every row: padding in front, and its blocks


def reference_logits(
    model: torch.nn.Module, ids: np.ndarray, rows: Rows, features: np.ndarray, canvas: np.ndarray, kind: PictureMask
) -> np.ndarray:
    """transformers' logits [B, L, V] in the dtype of its weights; `kind` picks the model of the two whose mask it is.
    Ids [B, P]; of `features` [B, P, H] what stands in the blocks counts."""
    dtype = next(model.parameters()).dtype
    kinds = torch.zeros(ids.shape, dtype=torch.long)
    real = torch.ones(ids.shape, dtype=torch.long)
    for row, (padding, spans) in enumerate(rows):
        real[row, :padding] = 0
        for start, stop in spans:
            kinds[row, start:stop] = 1
    tokens = torch.from_numpy(ids)
    cache_ = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        embedded = model.model.encoder.get_input_embeddings()(tokens)
        embedded = torch.where(kinds[..., None] == 1, torch.from_numpy(features).to(dtype), embedded)
        common = {"inputs_embeds": embedded, "attention_mask": real, "past_key_values": cache_}
        common |= {"config": model.config.get_text_config(), "position_ids": torch.arange(ids.shape[1])[None]}
        if kind == "gemma4":
            sequence = gemma4.get_block_sequence_ids_for_mask(kinds, device=kinds.device)
            masks = gemma4.create_masks_for_vision_model(**common, block_sequence_ids=sequence)
        else:
            masks = reference.DiffusionGemmaEncoderModel.create_masks_for_generate(**common, mm_token_type_ids=kinds)
        model.model.encoder.language_model(
            inputs_embeds=embedded,
            attention_mask=masks,
            past_key_values=cache_,
            position_ids=common["position_ids"],
        )
        whole = torch.nn.functional.pad(real, (0, canvas.shape[1]), value=1)
        out = model(
            decoder_input_ids=torch.from_numpy(canvas),
            past_key_values=cache_,
            decoder_attention_mask=whole,
        )
    return out.logits.double().numpy()


def both_sides(window: int) -> Callable[..., torch.Tensor]:
    """In place of transformers' sliding_window_overlay, which bounds a block by the window on its left alone."""
    return lambda row, head, query, key: abs(query - key) < window


def our_logits(
    network: Network,
    ids: np.ndarray,
    rows: Rows,
    features: np.ndarray,
    canvas: np.ndarray,
    kind: PictureMask,
    chunk: int = 1000,
) -> np.ndarray:
    """The same from our engine, the prompt read in chunks of at most so many tokens."""
    pictures = [
        [Block(start=a - pad, stop=b - pad, features=lambda r=row, a=a, b=b: mx.array(features[r, a:b])) for a, b in s]
        for row, (pad, s) in enumerate(rows)
    ]
    prompts = [row[padding:].tolist() for row, (padding, _) in zip(ids, rows, strict=True)]
    length = canvas.shape[1]
    settings = GenerationConfig(prefill_step_size=chunk, picture_mask=kind, max_tokens=length)
    noise = SeededNoise([0] * len(rows), length=length, vocabulary=network.config.vocab_size)
    prefix = network.make_cache(len(rows), [padding for padding, _ in rows])
    events = engine.generate(network, prompts, settings, noise, cache=prefix, pictures=pictures)
    while prefix.length < ids.shape[1]:
        next(events)
    return np.array(network.logits(mx.array(canvas), prefix))
