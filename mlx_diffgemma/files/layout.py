"""What a checkpoint holds: every tensor's name and shape, computed from the config, and its fate, from convert/."""

import functools
import re
import tomllib
from dataclasses import dataclass
from typing import Any

from ..config import ModelConfig
from ..model.vision_config import VisionConfig
from .shipped import knowledge


@functools.cache
def glob(pattern: str) -> re.Pattern[str]:
    """A dotted path pattern: `*` is (part of) one name, `**` anything; each becomes a group."""
    kinds = {"*": r"([^.]*)", "**": r"(.+)"}
    return re.compile("".join(kinds.get(part) or re.escape(part) for part in re.split(r"(\*\*|\*)", pattern)))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What convert/diffusiongemma-26b-a4b.toml says about the names that match `pattern`."""

    fate: str
    pattern: re.Pattern[str]
    target: str
    component: str
    quantize: bool
    on_request: bool  # packed only where a recipe's override names it in full, from `encoder.` on
    because: str
    half: int = 0  # of a tensor that is stored in two: 0 its first rows, 1 its last


# What may become of a tensor, in the order in which the rules are asked, and the key that has its name in a pack.
FATES = {"join": "to", "keep": "name", "rename": "to", "drop": "same_as", "ignore": "name", "refuse": "name"}


@functools.cache
def rules() -> tuple[Rule, ...]:
    """All rules, in the order in which they are asked."""
    described = tomllib.loads((knowledge() / "diffusiongemma-26b-a4b.toml").read_text())
    return tuple(
        Rule(
            fate=fate,
            pattern=glob(entry["name"]),
            target=entry[key],
            component=entry.get("component", ""),
            quantize=entry.get("quantize", False),
            on_request=entry.get("on_request", False),
            because=entry["because"],
            half=entry.get("half", 0),
        )
        for fate, key in FATES.items()
        for entry in described[fate]
    )


@functools.cache
def find_rule(name: str) -> tuple[Rule | None, str]:
    """The first rule for a tensor name, and the name its target means for this one."""
    for rule in rules():
        if match := rule.pattern.fullmatch(name):
            target = rule.target
            for part in match.groups():
                target = re.sub(r"\*+", part, target, count=1)
            return rule, target
    return None, name


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Hugging Face checkpoint with this config, vision included: released name → shape."""
    hidden, dense = config.hidden_size, config.intermediate_size
    experts, wide = config.num_experts, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.decoder.embed_tokens.weight": (config.vocab_size, hidden)}
    for i, layer in enumerate(config.layers):
        prefix = f"model.decoder.layers.{i}."
        queries, keys = config.num_attention_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        shapes[f"{prefix}self_attn.q_proj.weight"] = (queries, hidden)
        shapes[f"{prefix}self_attn.k_proj.weight"] = (keys, hidden)
        if layer.is_sliding:
            shapes[f"{prefix}self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, queries)
        for norm in ("q_norm", "k_norm"):
            shapes[f"{prefix}self_attn.{norm}.weight"] = (layer.head_dim,)
        shapes |= _gated_mlp(f"{prefix}mlp.", "", hidden, dense)
        shapes[f"{prefix}router.proj.weight"] = (experts, hidden)
        shapes[f"{prefix}router.scale"] = (hidden,)
        shapes[f"{prefix}router.per_expert_scale"] = (experts,)
        shapes[f"{prefix}experts.gate_up_proj"] = (experts, 2 * wide, hidden)
        shapes[f"{prefix}experts.down_proj"] = (experts, hidden, wide)
        for norm in (*_NORMS, "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
        shapes[f"{prefix}pre_feedforward_layernorm_2.weight"] = (hidden,)
        shapes[f"{prefix}layer_scalar"] = (1,)
        shapes[f"model.encoder.language_model.layers.{i}.layer_scalar"] = (1,)
    shapes["model.decoder.norm.weight"] = (hidden,)
    shapes["model.decoder.self_conditioning.pre_norm.weight"] = (hidden,)
    shapes |= _gated_mlp("model.decoder.self_conditioning.", "", hidden, dense)
    return shapes | (_vision_tensors(config.vision, hidden) if config.vision else {})


_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _gated_mlp(prefix: str, suffix: str, hidden: int, wide: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    return {f"{prefix}{name}{suffix}.weight": shape for name, shape in shapes.items()}


def _vision_tensors(vision: dict[str, Any], text_hidden: int) -> dict[str, tuple[int, ...]]:
    """The vision tower (transformers gemma4_vision) and the projection into the text model."""
    sizes = VisionConfig.of_sizes(vision)
    hidden, tower = sizes.hidden_size, "model.encoder.vision_tower."
    shapes: dict[str, tuple[int, ...]] = {
        "model.encoder.embed_vision.embedding_projection.weight": (text_hidden, hidden),
        f"{tower}patch_embedder.input_proj.weight": (hidden, 3 * sizes.patch_size**2),
        f"{tower}patch_embedder.position_embedding_table": (2, sizes.position_embedding_size, hidden),
    }
    if sizes.standardize:
        shapes |= {f"{tower}std_bias": (hidden,), f"{tower}std_scale": (hidden,)}
    for i in range(sizes.num_hidden_layers):
        prefix = f"{tower}encoder.layers.{i}."
        matrices = _vision_attention(sizes, prefix) | _gated_mlp(
            f"{prefix}mlp.", ".linear", hidden, sizes.intermediate_size
        )
        if sizes.use_clipped_linears:
            modules = [name.removesuffix(".linear.weight") for name in matrices]
            shapes |= {f"{module}.{bound}": () for module in modules for bound in _BOUNDS}
        shapes |= matrices
        shapes |= {f"{prefix}self_attn.{norm}.weight": (sizes.head_dim,) for norm in ("q_norm", "k_norm")}
        shapes |= {f"{prefix}{norm}.weight": (hidden,) for norm in _NORMS}
    return shapes


_BOUNDS = ("input_min", "input_max", "output_min", "output_max")  # of a clipped linear


def _vision_attention(sizes: VisionConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    queries, keys = (heads * sizes.head_dim for heads in (sizes.num_attention_heads, sizes.num_key_value_heads))
    hidden = sizes.hidden_size
    shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    return {f"{prefix}self_attn.{name}_proj.linear.weight": shape for name, shape in shapes.items()}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tensor before packing: its name in a pack, and what the rules say about it."""

    name: str
    shape: tuple[int, ...]
    component: str
    quantize: bool
    on_request: bool = False

    @property
    def path(self) -> str:
        return self.name.removesuffix(".weight")


def sources(config: ModelConfig) -> list[Source]:
    """`expected_tensors` under the names of an MLX pack, with what the rules say about each."""
    made = []
    for name, shape in expected_tensors(config).items():
        rule, target = find_rule(name)
        assert rule is not None
        what = {"component": rule.component, "quantize": rule.quantize, "on_request": rule.on_request}
        made.append(Source(name=target, shape=shape, **what))
    return made


def is_vision(name: str) -> bool:
    """Tensors that the text network sets aside."""
    return name.startswith(("model.encoder.vision_tower.", "model.encoder.embed_vision."))
