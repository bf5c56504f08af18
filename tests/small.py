"""A model small enough for any test: random weights that settle, and a byte tokenizer with the family's markers."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.proof.recordings import small_network
from mlx_diffgemma.text.tokenizer import Tokenizer

MARKERS = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"]
MARKERS += ["<|tool_call>", "<tool_call|>", '<|"|>', "<|think|>"]
EOS, BOS, TURN_END, CHANNEL, END_CHANNEL = 1, 2, 5, 6, 7
FIRST_BYTE = len(MARKERS)  # the id of byte 0
FIRST_LETTER = FIRST_BYTE + 256
LETTERS = [chr(code) for code in range(32, 127)]
VOCABULARY = FIRST_LETTER + len(LETTERS)
CANVAS = 16
TEMPLATE = (
    "<bos>{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<turn|>\n{% endfor %}<|turn>model\n{% if enable_thinking %}<|channel>thought\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "canvas_length": CANVAS,
    "eos_token_id": [EOS],
    "text_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_experts": 4,
        "top_k_experts": 2,
        "sliding_window": 12,
        "max_position_embeddings": 512,
    },
}


def network(*, seed: int = 0, branches: float = 0.1, sharpness: float = 10.0) -> Network:
    """A few layers of every kind; with small branches it nearly copies its canvas, and so settles."""
    return small_network(config=CONFIG, weights={"seed": seed, "branches": branches, "sharpness": sharpness})


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja: one token per ASCII letter, and one per byte."""
    byte_pieces = {f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)}
    vocabulary = {token: i for i, token in enumerate(MARKERS)} | byte_pieces
    vocabulary |= {letter: FIRST_LETTER + i for i, letter in enumerate(LETTERS)}
    special = [
        {"id": i, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, token in enumerate(MARKERS)
    ]
    fast = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": vocabulary, "merges": []},
        "truncation": None,
        "padding": None,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "extra_special_tokens": MARKERS[3:],
    }
    (folder / "tokenizer.json").write_text(json.dumps(fast))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def model(folder: Path, **weights: Any) -> DiffusionGemma:
    """A whole pipeline; `folder` gets the tokenizer's files."""
    write_tokenizer(folder)
    settings = GenerationConfig(max_tokens=40, max_denoising_steps=12, stop_ids=(EOS, TURN_END))
    return DiffusionGemma(network(**weights), Tokenizer.load(folder), settings, folder=folder)


def write_checkpoint(folder: Path) -> Path:
    """`model` as a checkpoint folder in the released layout."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    experts = {f".experts.{name}.weight": f".experts.{name}" for name in ("gate_up_proj", "down_proj")}
    weights = {}
    for name, weight in dict(tree_flatten(network().parameters())).items():
        ending = next((e for e in experts if name.endswith(e)), "")
        weights["model." + name.removesuffix(ending) + experts.get(ending, "")] = weight
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    generation = {"max_denoising_steps": 12, "max_new_tokens": 40, "eos_token_id": [EOS, TURN_END]}
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
