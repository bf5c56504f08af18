"""What the benchmarks compare: one config and one set of weights as our network, mlx-vlm's model and transformers'."""

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.network import Network

if TYPE_CHECKING:  # each is imported by those who compare with it
    from mlx_vlm.models.diffusion_gemma import Model as PeerModel

Arrays = list[tuple[mx.array, mx.array]]  # keys and values of every layer


def config(hidden: int, layers: int, experts: int, vocabulary: int = 262_144) -> dict[str, Any]:
    """The released config with a smaller hidden size, fewer layers and experts; widths keep their proportions."""
    full = {*range(5, layers, 6), layers - 1}  # the last layer is a full one, always
    kinds = ["full_attention" if i in full else "sliding_attention" for i in range(layers)]
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": 256,
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": hidden * 3 // 4,
            "moe_intermediate_size": hidden // 4,
            "num_hidden_layers": layers,
            "layer_types": kinds,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "head_dim": 256,
            "global_head_dim": 512,
            "num_experts": experts,
            "top_k_experts": 8,
            "sliding_window": 1024,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-6,
        },
    }


def our_network(raw: dict[str, Any]) -> Network:
    """Random weights: matrices that keep the size of what passes through them, norms and scales 1."""
    network = Network(ModelConfig.from_dict(raw))
    weights = []
    for number, (name, value) in enumerate(dict(tree_flatten(network.parameters())).items()):
        if value.ndim > 1:
            value = mx.random.normal(value.shape, key=mx.random.key(number)) * value.shape[-1] ** -0.5
        weights.append((name, value))
    network.load_weights(weights)
    mx.eval(network.parameters())
    return network


def peer_model(raw: dict[str, Any], network: Network) -> "PeerModel":
    """mlx-vlm's model around the same arrays; it has no vision tower here."""
    from mlx_vlm.models.diffusion_gemma import Model, ModelConfig

    model = Model(ModelConfig.from_dict({**raw, "vision_config": None}))
    names, ours = dict(tree_flatten(model.parameters())), dict(tree_flatten(network.parameters()))
    model.load_weights([(f"model.{name}", weight) for name, weight in ours.items() if f"model.{name}" in names])
    return model


def reference_model(raw: dict[str, Any], network: Network) -> Any:
    """transformers' model in float32 with our network's weights."""
    import torch
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    from convert.record_reference import VISION

    config = DiffusionGemmaConfig.from_dict({**raw, "vision_config": VISION})
    model: Any = DiffusionGemmaForBlockDiffusion(config).eval()
    weights = dict(tree_flatten(network.parameters()))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "vision" not in name:
                value.copy_(torch.from_numpy(np.array(weights[_our_name(name)].astype(mx.float32))))
    return model


def _our_name(name: str) -> str:
    """Where our network keeps a weight of transformers' model; the encoder shares all but its layer scalars."""
    if name == "lm_head.weight":
        return "decoder.embed_tokens.weight"
    name = name.removeprefix("model.")
    if not name.endswith("layer_scalar"):
        name = name.replace("encoder.language_model.", "decoder.")
    return f"{name}.weight" if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else name


def generation_config(settings: GenerationConfig) -> dict[str, Any]:
    """Our settings in the words of generation_config.json, none left out: mlx-vlm does not stop early otherwise."""
    return {
        "max_new_tokens": settings.max_tokens,
        "max_denoising_steps": settings.max_denoising_steps,
        "t_min": settings.t_min,
        "t_max": settings.t_max,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": settings.entropy_bound},
        "stability_threshold": settings.stability_threshold,
        "confidence_threshold": settings.confidence_threshold,
        "eos_token_id": list(settings.stop_ids),
        "pad_token_id": settings.pad_token_id,
    }


def our_prefix(network: Network, prefix: Arrays, room: int) -> PrefixCache:
    """Our cache that holds these keys and values, with room for so many positions more."""
    cache, length = network.make_cache(), prefix[0][0].shape[2] if prefix else 0
    cache.reserve(length + room)
    for layer, (keys, values) in zip(cache.layers, prefix, strict=False):
        layer.append(keys, values)
    cache.advance(length)
    mx.eval(cache.state)
    return cache


def peer_prefix(model: Any, prefix: Arrays) -> list[Any]:
    """mlx-vlm's or mlx-lm's caches that hold these keys and values."""
    caches = model.make_cache()
    for cache, (keys, values) in zip(caches, prefix, strict=False):
        cache.update_and_fetch(keys, values)
    mx.eval([cache.state for cache in caches if prefix])
    return caches


def keys_and_values(network: Network, length: int) -> Arrays:
    """Random keys and values of `length` positions for every layer."""
    arrays = []
    for number, layer in enumerate(network.config.layers):
        shape = (1, layer.num_kv_heads, length, layer.head_dim)
        keys, values = (mx.random.normal(shape, key=mx.random.key(2 * number + i)) for i in (0, 1))
        arrays.append((keys, values))
    mx.eval(arrays)
    return arrays
