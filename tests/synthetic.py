"""Checkpoints with the released layout, made up on the spot: small random ones, and real-size ones without content.

Names and shapes come from the config; header style, shard assignment and index are those of the released files,
byte for byte (test_checkpoint.py compares them).
"""

import json
import lzma
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.files.folder import INDEX
from mlx_diffgemma.files.layout import expected_tensors
from mlx_diffgemma.files.shards import DTYPES, SIZES, as_raw

DATA = Path(__file__).parent / "data"
SIDES = {
    "tokenizer_config.json": '{"tokenizer_class": "GemmaTokenizer"}',
    "processor_config.json": '{"processor_class": "Gemma4Processor"}',
    "chat_template.jinja": "{{ messages }}\n",
}
Fill = Callable[[str, tuple[int, ...]], bytes]


def published(name: str) -> Any:
    """A JSON file below tests/data, compressed or not."""
    file = DATA / name
    return json.loads(file.read_bytes() if file.exists() else lzma.decompress((DATA / f"{name}.xz").read_bytes()))


def small_config(**text: Any) -> dict[str, Any]:
    """The released config scaled down: two layers of each kind, widths that are no powers of two."""
    config = published("released/config.json")
    kinds = ["sliding_attention", "full_attention"] * 2
    config["text_config"] |= {
        "hidden_size": 128,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 32,
        "global_head_dim": 64,
        "num_experts": 8,
        "top_k_experts": 2,
        "sliding_window": 16,
        "vocab_size": 320,
    } | text
    config["vision_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "global_head_dim": 16,
        "num_hidden_layers": 2,
        "position_embedding_size": 64,
    }
    return config | {"boi_token_id": 317, "image_token_id": 318, "eoi_token_id": 319, "canvas_length": 32}


def natural(name: str) -> list[tuple[int, Any]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def assign(shapes: dict[str, tuple[int, ...]], item_size: int, limit: int) -> list[list[str]]:
    """Greedy shards over naturally sorted names."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(shapes, key=natural):
        size = item_size * math.prod(shapes[name])
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def encode_header(entries: dict[str, tuple[str, tuple[int, ...]]], **metadata: str) -> tuple[bytes, int]:
    """Header bytes and data size of a safetensors file whose tensors lie in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    position = 0
    for name, (dtype, shape) in entries.items():
        end = position + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return wrap_header(header), position


def wrap_header(header: Any) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def random_fill(seed: int, dtype: str) -> Fill:
    """Values of plausible size; the two sets of layer scalars differ. Attention is kept soft: a sharp one amplifies
    rounding, and readers are compared closely."""
    rng = np.random.default_rng(seed)

    def fill(name: str, shape: tuple[int, ...]) -> bytes:
        values = rng.standard_normal(shape, np.float32)
        if name.endswith("layer_scalar"):
            values = rng.uniform(0.6, 1.4, shape)
        elif name.endswith(("_min", "_max")):
            values = np.float32(-1.2 if name.endswith("_min") else 1.4)
        elif len(shape) == 1:
            values = (0.3 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0) + 0.1 * values
        else:
            values /= math.sqrt(shape[-1])
        return as_raw(mx.array(values.astype(np.float32)).astype(DTYPES[dtype])).tobytes()

    return fill


def write(
    folder: Path,
    config: dict[str, Any],
    *,
    fill: Fill | None = None,
    dtype: str = "BF16",
    limit: int = 5_000_000_000,
    index: bool = True,
    extra: dict[str, tuple[int, ...]] | None = None,
) -> Path:
    """A Hugging Face checkpoint; without `fill` its shards are sparse files of zeros.

    `extra` adds tensors; with one shard only, the file is called model.safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = expected_tensors(ModelConfig.from_dict(config)) | (extra or {})
    shards = assign(shapes, SIZES[dtype], limit)
    where = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(names, file)
        header, size = encode_header({name: (dtype, shapes[name]) for name in sorted(names)})
        with (folder / file).open("wb") as stream:
            stream.write(header)
            for name in sorted(names) if fill else ():
                stream.write(fill(name, shapes[name]) if fill else b"")
            stream.truncate(len(header) + size)
    if index:
        (folder / INDEX).write_text(encode_index(shapes, where, SIZES[dtype]))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_bytes((DATA / "released/generation_config.json").read_bytes())
    for name, text in SIDES.items():
        (folder / name).write_text(text)
    return folder


def encode_index(shapes: dict[str, tuple[int, ...]], where: dict[str, str], item_size: int) -> str:
    """As transformers writes it: buffers are counted in the size, not among the parameters."""
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    buffers = sum(n for name, n in count.items() if name.endswith(("layer_scalar", "std_bias", "std_scale")))
    total = sum(count.values())
    metadata = {"total_parameters": total - buffers, "total_size": item_size * total}
    return json.dumps({"metadata": metadata, "weight_map": where}, indent=2, sort_keys=True) + "\n"


def small(folder: Path, *, seed: int = 0, dtype: str = "BF16", **options: Any) -> Path:
    """A small random checkpoint in several shards."""
    options = {"limit": 400_000, "fill": random_fill(seed, dtype)} | options
    return write(folder, options.pop("config", None) or small_config(), dtype=dtype, **options)


def block_fill(seed: int = 0) -> Fill:
    """Random bf16 values, for checkpoints of many gigabytes: one random block, begun elsewhere in every tensor."""
    rng = np.random.default_rng(seed)
    block = as_raw(mx.array(0.02 * rng.standard_normal(1 << 24, np.float32)).astype(mx.bfloat16))

    def fill(name: str, shape: tuple[int, ...]) -> bytes:
        return np.resize(np.roll(block, zlib.crc32(name.encode()) % len(block)), math.prod(shape)).tobytes()

    return fill
