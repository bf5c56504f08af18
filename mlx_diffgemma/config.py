"""What a checkpoint's config.json says about the network; the words and checks that every reader of settings shares.

Reading refuses keys it does not know, because a renamed key that silently becomes a default value is a wrong model.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError

RELEASED = "google/diffusiongemma-26B-A4B-it"
SLIDING, FULL = "sliding_attention", "full_attention"

# Keys that Hugging Face writes beside the architecture and that do not change the maths of the text model.
HARMLESS = frozenset(
    """
    _name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eoi_token_id
    eos_token_id generation_config id2label image_token_id boi_token_id initializer_range is_encoder_decoder
    is_decoder label2id model_type output_attentions output_hidden_states pad_token_id problem_type
    quantization quantization_config return_dict text_config tie_word_embeddings torch_dtype
    transformers_version use_cache vision_config vision_soft_tokens_per_image canvas_length is_causal
    """.split()
)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer's attention: everything in which sliding and full layers differ."""

    kind: str
    head_dim: int
    num_kv_heads: int
    rope_theta: float
    rotated_dims: int  # leading dimensions of a head that are rotated; the frequencies still divide by head_dim

    @property
    def is_sliding(self) -> bool:
        return self.kind == SLIDING


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture, from `config.json` in either dialect (transformers DiffusionGemmaConfig)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    num_experts: int
    top_k_experts: int
    sliding_window: int
    layers: tuple[LayerConfig, ...]
    canvas_length: int = 256
    max_position_embeddings: int = 262_144
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = 30.0
    bos_token_id: int = 2
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = (1, 106)
    image_token_id: int | None = None
    vision: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    quantization: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @classmethod
    def from_dict(cls, config: dict[str, Any], *, ignore_keys: tuple[str, ...] = ()) -> "ModelConfig":
        """Read a `config.json` in the released dialect or in the one transformers 5.23 writes back.

        `ignore_keys` are unknown keys (as `text_config.name`) the caller declares harmless.
        Errors: ConfigError for another model, an unknown key, or a value this code has no maths for.
        """
        if config.get("model_type") != "diffusion_gemma" or not isinstance(config.get("text_config"), dict):
            raise ConfigError(
                f"config.json: this is not a DiffusionGemma checkpoint: model_type is {config.get('model_type')!r},"
                " expected 'diffusion_gemma'.\n"
                "Autoregressive Gemma models run in mlx-lm; this package runs google/diffusiongemma-26B-A4B-it."
            )
        text = config["text_config"]
        layers = _layers(text)
        _refuse_unknown_keys(config, text, {f.name for f in dataclasses.fields(cls)}, ignore_keys)
        _refuse_other_maths(config, text)
        values = {key: _positive(text, key) for key in _REQUIRED}
        values |= {key: _number(text, key) for key in _OPTIONAL if text.get(key) is not None}
        canvas = {"canvas_length": config.get("canvas_length") or cls.canvas_length}
        vision = config.get("vision_config")
        check("config.json: vision_config", vision, vision is None or isinstance(vision, dict), "an object or null")
        if values["top_k_experts"] > values["num_experts"]:
            raise ConfigError(
                f"config.json: top_k_experts {values['top_k_experts']} > num_experts {values['num_experts']}."
            )
        return cls(
            **values,
            layers=layers,
            canvas_length=_positive(canvas, "canvas_length"),
            eos_token_ids=ids_of(config.get("eos_token_id", text.get("eos_token_id", cls.eos_token_ids))),
            image_token_id=config.get("image_token_id"),
            vision=vision,
            quantization=config.get("quantization") or config.get("quantization_config"),
        )


_REQUIRED = """
    vocab_size hidden_size intermediate_size moe_intermediate_size num_attention_heads num_experts top_k_experts
    sliding_window
""".split()
_OPTIONAL = "max_position_embeddings rms_norm_eps final_logit_softcapping bos_token_id pad_token_id".split()
# Values with only one meaning in this code: anything else is another model.
_CHECKED: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": ("vision", None),
    "enable_moe_block": (True, None),
    "attention_k_eq_v": (True, None),
    "num_kv_shared_layers": (0, None),
    "hidden_size_per_layer_input": (0, None),
    "vocab_size_per_layer_input": (0, None),
}
_GEOMETRY = frozenset(
    """
    num_hidden_layers layer_types head_dim global_head_dim num_key_value_heads num_global_key_value_heads
    per_layer_config rope_parameters
    """.split()
)
_DEFAULT_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}


def _refuse_unknown_keys(
    config: dict[str, Any], text: dict[str, Any], fields: set[str], ignore_keys: tuple[str, ...]
) -> None:
    known = fields | HARMLESS | _CHECKED.keys() | _GEOMETRY
    for where, keys in (("", config), ("text_config.", text)):
        for key in keys:
            if key not in known and where + key not in ignore_keys:
                raise ConfigError(
                    f"config.json has a key this version does not know: {where}{key} = {keys[key]!r}.\n"
                    f"Update mlx-diffgemma, or pass --ignore-key {where}{key} if you know it is harmless."
                )


def _refuse_other_maths(config: dict[str, Any], text: dict[str, Any]) -> None:
    for key, allowed in _CHECKED.items():
        if text.get(key, allowed[0]) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ConfigError(f"config.json: text_config.{key} is {text[key]!r}, expected {expected}.")
    if config.get("tie_word_embeddings", True) is not True:
        raise ConfigError("config.json: tie_word_embeddings is false; DiffusionGemma ties its head and embedding.")


def _positive(text: dict[str, Any], key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: text_config.{key} is {value!r}, expected a positive integer.")
    return value


def _number(text: dict[str, Any], key: str) -> Any:
    value = text[key]
    check(f"config.json: text_config.{key}", value, type(value) in (int, float), "a number")
    return value


def ids_of(value: Any) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    check("eos_token_id", value, all(type(i) is int for i in ids), "token ids")
    return ids


def _layers(text: dict[str, Any]) -> tuple[LayerConfig, ...]:
    """Every layer's attention, the first one first."""
    kinds = _kinds(text)
    return tuple(_layer(text, i, kind) for i, kind in enumerate(kinds))


def _kinds(text: dict[str, Any]) -> list[str]:
    count = _positive(text, "num_hidden_layers")
    kinds = text.get("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    if len(kinds) != count or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise ConfigError(
            f"config.json: text_config.layer_types must name {count} layers, each {SLIDING!r} or {FULL!r};"
            f" got {len(kinds)}: {sorted(set(map(str, kinds)))}."
        )
    return [*kinds[:-1], FULL]  # as transformers does: the last layer is a full one whatever the list says


def _layer(text: dict[str, Any], i: int, kind: str) -> LayerConfig:
    """Layer `i`; `per_layer_config` (transformers 5.23) wins over `global_*` (released)."""
    heads, head_dim, kv_heads = (_positive(text, k) for k in ("num_attention_heads", "head_dim", "num_key_value_heads"))
    geometry = {"head_dim": head_dim, "num_key_value_heads": kv_heads}
    if (per_layer := text.get("per_layer_config")) is not None:
        geometry |= {int(k): v for k, v in per_layer.items()}.get(i, {})
    elif kind == FULL:
        geometry["head_dim"] = text.get("global_head_dim") or 512
        geometry["num_key_value_heads"] = text.get("num_global_key_value_heads") or kv_heads
    if unknown := geometry.keys() - {"head_dim", "num_key_value_heads"}:
        raise ConfigError(f"config.json: per_layer_config.{i} has a key this version does not know: {unknown}.")
    if heads % geometry["num_key_value_heads"]:
        raise ConfigError(
            f"config.json: layer {i} shares {geometry['num_key_value_heads']} key heads among {heads} query heads;"
            " the second must be a multiple of the first."
        )
    theta, rotated = _rope(text, kind)
    dim = geometry["head_dim"]
    return LayerConfig(
        kind=kind,
        head_dim=dim,
        num_kv_heads=geometry["num_key_value_heads"],
        rope_theta=theta,
        rotated_dims=2 * int(rotated * dim // 2),
    )


def _rope(text: dict[str, Any], kind: str) -> tuple[float, float]:
    """Base of the frequencies, and the share of a head that is rotated, for one kind of layer."""
    given = (text.get("rope_parameters") or _DEFAULT_ROPE).get(kind) or _DEFAULT_ROPE[kind]
    params = dict(given)
    rope_type = params.pop("rope_type", "default")
    theta, partial = params.pop("rope_theta"), params.pop("partial_rotary_factor", 1.0)
    expected = "proportional" if partial != 1.0 else rope_type
    if params or rope_type not in ("default", "proportional") or rope_type != expected:
        raise ConfigError(
            f"config.json: rope_parameters.{kind} is {given!r}; expected rope_type 'default', or"
            " 'proportional' with a partial_rotary_factor, and a rope_theta."
        )
    return float(theta), partial


def check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {value!r}, expected {expected}.")


def nearest(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."


def refuse_unknown(values: dict[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} has an unknown key {key!r}.{nearest(key, sorted(known))}")
