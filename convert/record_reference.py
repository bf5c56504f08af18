"""Run transformers' own model and write down what it computes: the recordings in tests/reference/.

    python convert/record_reference.py [--device cpu|cuda] [--only NAME] [--out tests/reference]

The one file that imports torch. Needs torch, transformers 5.23 and this package's Python files; MLX need not be there.
Every file is an .npz without pickles. Its entry `provenance` is a JSON string:

    kind      "logits" or "trajectory"
    device    "cpu", or "cuda" with the card's name;   dtype   what the model ran in
    versions  python, torch, transformers, numpy;   commit   of this repository;   seed   of every random choice
    model     {"config": config.json, "weights": arguments of recordings.random_weights}, or {"folder": "demo"}

Kind "logits": softcapped logits of single decoder passes. `cases` in the provenance lists, by name,
`{"rms_error": RMS of the logits' error against truth}`; per case NAME the arrays are

    NAME/prompt    int32 [B, P]     ids, left-padded           NAME/padding  int32 [B]  padding tokens in front
    NAME/canvases  int32 [n, B, L]  committed before           NAME/canvas   int32 [B, L]
    NAME/signal    float32 [B, L, V], only with self-conditioning: the logits it was computed from
    NAME/logits    float32 [B, L, V], as computed in `dtype`   NAME/truth    the same from a run in float64

Kind "trajectory": whole runs of transformers' `generate`, with its random choices. C canvases, S steps (the most of
any canvas; zeros behind the last step of a shorter one), B rows, L canvas positions:

    prompt     int32 [B, P]           ids, left-padded         padding    int32 [B]
    canvas     int32 [C, B, L]        the ids each canvas started from
    draws      float32 [C, S, B, L]   one number in [0, 1): the middle of the drawn id's interval of the cumulative
                                      distribution (float64, vocabulary order), so that inverting it draws that id
    ids        int32 [C, S, B, L]     the fresh random ids of the renoise
    steps      int32 [C]              steps each canvas took, until its last row was done
  and what came of them
    guess      int32 [C, S, B, L]     the ids drawn            accepted   bool [C, S, B, L]
    best       int32 [C, S, B, L]     the argmax canvas        entropy    float32 [C, S, B]  mean, nats
    row_steps  int32 [C, B]           steps until the row was settled; 0 for a row that had met a stop id before
    settled    bool [C, B]            whether it was, within the steps allowed
    committed  int32 [C, B, L]        after the canvas: `best`, with padding behind the first stop id
  `settings` in the provenance are the generation options, `margins` how close any decision of the run came to falling
  the other way (logits between the best two tokens, nats at the entropy bound and at the confidence threshold).
  What a row "did" after it was settled is transformers' business: compare steps below row_steps alone.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mlx_diffgemma.recordings import random_weights  # noqa: E402

# transformers builds a vision tower whatever the text model: the smallest one.
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_hidden_layers": 1,
    "position_embedding_size": 4,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


# --- The reference as functions ------------------------------------------------------------------------------------


def small_model(config: dict[str, Any], weights: dict[str, Any]) -> DiffusionGemmaForBlockDiffusion:
    """transformers' model in float32 with `random_weights(**weights)`."""
    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict({**config, "vision_config": VISION})).eval()
    model.set_experts_implementation("eager")
    state = {name: value for name, value in model.state_dict().items() if "vision" not in name}
    shapes = {name: tuple(value.shape) for name, value in state.items() if name != "lm_head.weight"}
    values = random_weights(shapes, **weights)
    for name in shapes:  # the encoder's names for the weights that it shares; its layer scalars stay its own
        shared = name.replace("model.encoder.language_model.", "model.decoder.")
        if shared != name and not name.endswith("layer_scalar"):
            values[name] = values[shared]
    values["lm_head.weight"] = values["model.decoder.embed_tokens.weight"]
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(torch.from_numpy(values[name]))
    return model


def encode(
    model: DiffusionGemmaForBlockDiffusion,
    prompt: np.ndarray,
    padding: np.ndarray,
    canvases: np.ndarray,
    chunk: int = 0,
) -> tuple[DynamicCache, torch.Tensor]:
    """The cache after a left-padded prompt [B, P], in pieces of `chunk` if given, and the canvases [n, B, L]; and the
    attention mask of all those tokens."""
    cache = DynamicCache(config=model.config.get_text_config())
    pieces = [prompt[:, i : i + chunk] for i in range(0, prompt.shape[1], chunk)] if chunk else [prompt]
    mask = torch.from_numpy(np.arange(prompt.shape[1])[None] >= padding[:, None]).to(model.device)
    mask = torch.nn.functional.pad(mask, (0, canvases.shape[0] * canvases.shape[-1]), value=True)
    end = 0
    with torch.no_grad():
        for piece in (*pieces, *canvases):
            end += piece.shape[1]
            ids = torch.from_numpy(piece).long().to(model.device)
            model.model.encoder(input_ids=ids, attention_mask=mask[:, :end], past_key_values=cache)
    return cache, mask


def decode(
    model: DiffusionGemmaForBlockDiffusion,
    canvas: np.ndarray,
    cache: DynamicCache,
    mask: torch.Tensor,
    signal: np.ndarray | None,
) -> np.ndarray:
    """Softcapped logits [B, L, V] of one decoder pass, float64 from a float64 model (transformers rounds them to
    float32 before the softcap; everything up to there is its own forward)."""
    logits = None if signal is None else torch.from_numpy(signal).to(model.device, model.dtype)
    with torch.no_grad():
        hidden = model.model(
            decoder_input_ids=torch.from_numpy(canvas).long().to(model.device),
            past_key_values=cache,
            decoder_attention_mask=torch.nn.functional.pad(mask, (0, canvas.shape[1]), value=True),
            self_conditioning_logits=logits,
        ).last_hidden_state
        scores = model.lm_head(hidden)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        cap = model.final_logit_softcapping
        return (torch.tanh(scores / cap) * cap).cpu().numpy()


@contextmanager
def router_gaps(model: DiffusionGemmaForBlockDiffusion) -> Iterator[list[float]]:
    """Collects, per router call, the smallest lead of a chosen expert's score over the best one left out. At a gap of
    rounding size two correct runs may take different experts."""
    gaps: list[float] = []
    k = model.config.get_text_config().top_k_experts

    def look(module: torch.nn.Module, args: Any, scores: torch.Tensor) -> None:
        if scores.shape[-1] > k:
            best = scores.topk(k + 1, dim=-1).values
            gaps.append(float((best[..., k - 1] - best[..., k]).min()))

    routers = [m for name, m in model.named_modules() if name.endswith("router.proj")]
    hooks = [router.register_forward_hook(look) for router in routers]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()
