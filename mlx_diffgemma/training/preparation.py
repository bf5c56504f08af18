"""Before the first step: memory, first weights, what is frozen."""

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..config import ModelConfig
from ..errors import TrainingError
from ..model.expert_linear import ExpertLinear
from ..model.layers import Layer
from ..model.network import Network, leaves
from .objective import LOGITS, AllExperts
from .settings import Settings

ALL_EXPERTS = 8  # up to so many experts, running all of them is quicker than gathering


def memory_needed(network: Network, settings: Settings, length: int) -> int:
    """Bytes at the peak of a step with examples of `length` tokens, predicted; nothing is computed for it.

    Per token a layer keeps its residuals, projections, both branches' gates and its rows of attention scores, or with
    `checkpoint_layers` its input, keys and values; an adapter is float32 and keeps its inputs so. Per trained parameter
    there are a gradient, two moments, an update.
    """
    config, size = network.config, network.decoder.norm.weight.dtype.size
    tokens = settings.batch_size * (length + int((1 + settings.self_conditioning) * config.canvas_length))
    layers, inputs = [], 0
    for layer, module in zip(config.layers, network.decoder.layers, strict=True):
        heads = (2 * config.num_attention_heads + 2 * layer.num_kv_heads) * layer.head_dim
        wide = 4 * config.intermediate_size + config.top_k_experts * (4 * config.moe_intermediate_size)
        scores = 2 * config.num_attention_heads * (length + config.canvas_length)
        plain = 12 * config.hidden_size + heads + wide + config.top_k_experts * config.hidden_size + scores
        layers.append(size * plain + (4 * _adapted_inputs(module, config) if size < 4 else 0))
        inputs += size * (config.hidden_size + 2 * layer.num_kv_heads * layer.head_dim)
    kept = max(layers) + inputs if settings.checkpoint_layers else sum(layers)
    weights = sum(weight.nbytes for weight in leaves(network.parameters()).values())
    trained = sum(weight.size for weight in leaves(network.trainable_parameters()).values())
    logits = 84 * min(LOGITS, tokens * config.vocab_size)  # of a piece in a compiled step: 21 times float32, measured
    return weights + 16 * trained + tokens * kept + logits


def _adapted_inputs(layer: Layer, config: ModelConfig) -> int:
    """Numbers per token that a layer's adapters read."""
    found = [weight.shape for name, weight in leaves(layer.parameters()).items() if name.endswith("lora_a")]
    return sum(shape[0] if len(shape) == 2 else config.top_k_experts * shape[-1] for shape in found)


def prepare(network: Network, settings: Settings) -> None:
    """Make a network ready to train: the router frozen unless asked for, few experts run all together.

    Errors: TrainingError for a network whose experts are streamed.
    """
    if network.experts.streamed:
        raise TrainingError(
            f"every pass of training would read {network.experts.bytes_a_pass / 1e9:.2f} GB from the disk: the experts"
            f" of {len(network.experts.streamed)} layers are streamed.\nTrain where the model fits in memory."
        )
    network.train()
    for layer in network.decoder.layers:
        if not settings.train_router:
            layer.router.freeze()
        plain = all(type(p) is ExpertLinear for p in (layer.experts.gate_up_proj, layer.experts.down_proj))
        if plain and network.config.num_experts <= ALL_EXPERTS:
            layer.experts = AllExperts(layer.experts)


def initialize(network: Network, seed: int) -> None:
    """Weights to start from: matrices keep variances, the embedding has unit norm, attention starts at 1 / sqrt(D)."""
    key = mx.random.key(seed)
    fresh = []
    for name, weight in leaves(network.parameters()).items():
        if weight.ndim >= 2:
            key, draw = mx.random.split(key)
            fresh.append((name, mx.random.normal(weight.shape, key=draw) * weight.shape[-1] ** -0.5))
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            fresh.append((name, mx.full(weight.shape, weight.shape[0] ** -0.25)))
        else:
            fresh.append((name, mx.ones(weight.shape)))
    network.update(tree_unflatten(fresh))
