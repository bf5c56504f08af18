"""A model with eyes, small enough for any test: `tests.small` with a random tower, and the tokens of pictures."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from mlx_diffgemma.model.vision import Eyes
from mlx_diffgemma.model.vision_config import VisionConfig
from mlx_diffgemma.pipeline.loading import load as load
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.proof.recordings import small_network
from tests import small

BOI, IMAGE, EOI = range(small.VOCABULARY, small.VOCABULARY + 3)
NAMES = {BOI: "<|image>", IMAGE: "<|image|>", EOI: "<image|>"}
BUDGET = 70
# As the released template writes parts, in small.
TEMPLATE = """{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}
{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}
{%- if p.type == 'text' %}{{ p.text | trim }}{% elif p.type in ['image', 'image_url'] %}{{ '<|image|>' }}
{%- elif p.type == 'video' %}{{ '<|video|>' }}{% endif %}
{%- endfor %}{% endif %}<turn|>
{% endfor %}<|turn>model
{% if enable_thinking %}<|channel>thought
{% endif %}"""
VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 512,
    "standardize": True,
}
CONFIG: dict[str, Any] = small.CONFIG | {
    "boi_token_id": BOI,
    "image_token_id": IMAGE,
    "eoi_token_id": EOI,
    "vision_soft_tokens_per_image": BUDGET,
    "vision_config": VISION,
    "text_config": small.CONFIG["text_config"]
    | {
        "vocab_size": small.VOCABULARY + 3,
        "max_position_embeddings": 2048,
        "use_bidirectional_attention": "vision",
    },
}


def eyes(seed: int = 0) -> Eyes:
    """Random weights that keep activations near 1 and make every one matter."""
    made = Eyes(VisionConfig.from_dict(VISION, soft_tokens=BUDGET), CONFIG["text_config"]["hidden_size"])
    random = np.random.default_rng(seed)
    weights = []
    for name, old in sorted(dict(tree_flatten(made.parameters())).items()):
        noise = random.standard_normal(old.shape).astype(np.float32)
        weights.append((name, mx.array(1 + 0.2 * noise if noise.ndim == 1 else noise / noise.shape[-1] ** 0.5)))
    made.load_weights(weights, strict=True)
    return made


def write_tokenizer(folder: Path) -> None:
    """`small.write_tokenizer` with the three tokens of pictures, and a template that knows them."""
    small.write_tokenizer(folder)
    fast, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("tokenizer", "tokenizer_config"))
    like = fast["added_tokens"][0]
    fast["added_tokens"] += [like | {"id": i, "content": name} for i, name in NAMES.items()]
    fast["model"]["vocab"] |= {name: i for i, name in NAMES.items()}
    config |= {"boi_token": NAMES[BOI], "image_token": NAMES[IMAGE], "eoi_token": NAMES[EOI]}
    (folder / "tokenizer.json").write_text(json.dumps(fast))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint folder in the released layout."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    network = small_network(config=CONFIG, weights={"seed": 0, "branches": 0.4, "sharpness": 10.0})
    experts = {f".experts.{name}.weight": f".experts.{name}" for name in ("gate_up_proj", "down_proj")}
    weights = {}
    for name, weight in dict(tree_flatten(network.parameters())).items():
        ending = next((e for e in experts if name.endswith(e)), "")
        weights["model." + name.removesuffix(ending) + experts.get(ending, "")] = weight
    tower = dict(tree_flatten(eyes().parameters()))
    weights |= {f"model.encoder.{name}": weight for name, weight in tower.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    generation = {"max_denoising_steps": 8, "max_new_tokens": 20, "eos_token_id": [small.EOS, small.TURN_END]}
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def model(folder: Path) -> DiffusionGemma:
    return load(write_checkpoint(folder))


def picture(seed: int = 0, width: int = 30, height: int = 20) -> Image.Image:
    """Noise: any two differ everywhere."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8), "RGB")


def asked(text: str, *pictures: Any, **more: Any) -> list[dict[str, Any]]:
    """A message of the user: pictures, then text."""
    parts = [{"type": "image", "image": source, **more} for source in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
