"""What a checkpoint's config.json says about the network.

Reading refuses keys it does not know, because a renamed key that silently becomes a default value is a wrong model.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConfigError
from .values import (
    Field,
    Table,
    anything,
    either,
    flag,
    integer,
    many,
    mapping,
    nearest,
    number,
    one_of,
    optional,
    shown,
)

RELEASED = "google/diffusiongemma-26B-A4B-it"
SLIDING, FULL = "sliding_attention", "full_attention"
WHERE = "config.json"
PictureMask = Literal["transformers", "gemma4"]  # who sees whom in a prompt with pictures: see model/blocks

# Keys that stand beside the architecture and do not change the maths of the text model, by the reason why.
HARMLESS: dict[str, str] = {
    "names and origin": "_name_or_path architectures model_type transformers_version id2label label2id",
    "dropout and first weights matter in training only": "attention_dropout initializer_range",
    "ids around pictures and sounds": "boi_token_id eoi_token_id image_token_id video_token_id audio_token_id",
    "how transformers calls a model": (
        "chunk_size_feed_forward generation_config is_decoder is_encoder_decoder is_causal output_attentions"
        " output_hidden_states problem_type return_dict use_cache"
    ),
    "how weights are stored, which their headers say": "dtype torch_dtype weight_format",
    "pictures, which the text model sets aside": (
        "vision_soft_tokens_per_image modalities modality_notes has_vision has_video has_audio optiq_vision"
    ),
}
_HARMLESS = frozenset(key for keys in HARMLESS.values() for key in keys.split())


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
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = 30.0
    bos_token_id: int = 2
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = (1, 106)
    image_token_id: int | None = None
    boi_token_id: int | None = field(default=None, compare=False)  # stand before and behind a picture's soft tokens
    eoi_token_id: int | None = field(default=None, compare=False)
    soft_tokens: int | None = field(default=None, compare=False)  # of a picture, where nobody asked for a budget
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
        if config.get("model_type") != "diffusion_gemma":
            raise ConfigError(
                f"{WHERE}: this is not a DiffusionGemma checkpoint: model_type is {shown(config.get('model_type'))},"
                " expected 'diffusion_gemma'.\n"
                "Autoregressive Gemma models run in mlx-lm; this package runs google/diffusiongemma-26B-A4B-it."
            )
        whole = OUTER.read(config, WHERE)
        _refuse_unknown_keys(config, whole["text_config"], ignore_keys)
        text = TEXT.kind.read(whole["text_config"], WHERE, "text_config")
        _check_together(text)
        eos = whole["eos_token_id"] if whole["eos_token_id"] is not None else text["eos_token_id"]
        return cls(
            **{key: text[key] for key in _PLAIN},
            layers=_layers(text),
            canvas_length=whole["canvas_length"],
            eos_token_ids=cls.eos_token_ids if eos is None else eos if isinstance(eos, tuple) else (eos,),
            **{key: whole[key] for key in _PICTURES},
            soft_tokens=whole["vision_soft_tokens_per_image"],
            vision=whole["vision_config"],
            quantization=whole["quantization"] or whole["quantization_config"],
        )


# --------------------------------------------------------------------------------------------------------- the keys
# The upper bounds are far beyond any model: they keep a slip of the pen from being taken for one.

_COUNT = integer(least=1, most=1 << 16)
_WIDTH = integer(least=1, most=1 << 20)
_PLACES = integer(least=1, most=1 << 40)
_ID = integer(least=0, most=1 << 31)
IDS = either(_ID, many(_ID, most=1000))
_OBJECT = mapping(anything)

ROPE = Table(
    Field("rope_type", one_of("default", "proportional"), None),
    Field("type", one_of("default", "proportional"), None),  # its older name
    Field("rope_theta", number(above=0)),
    Field("partial_rotary_factor", number(least=0, most=1), 1.0),
)
_OF_LAYER = Table(Field("head_dim", _COUNT, None), Field("num_key_value_heads", _COUNT, None))
TEXT = Table(
    Field("vocab_size", integer(least=1, most=1 << 24)),
    *(Field(name, _WIDTH) for name in ("hidden_size", "intermediate_size", "moe_intermediate_size")),
    Field("num_hidden_layers", integer(least=1, most=1000)),
    *(Field(name, _COUNT) for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts")),
    Field("top_k_experts", _COUNT),
    Field("sliding_window", _PLACES),
    Field("global_head_dim", _COUNT, 512),
    Field("num_global_key_value_heads", _COUNT, None),
    Field("per_layer_config", mapping(_OF_LAYER.kind), None),
    Field("layer_types", many(one_of(SLIDING, FULL), most=1000), ()),
    Field("rope_parameters", _OBJECT, None),
    Field("max_position_embeddings", _PLACES, ModelConfig.max_position_embeddings),
    Field("rms_norm_eps", number(above=0, most=1), ModelConfig.rms_norm_eps),
    Field("final_logit_softcapping", number(above=0), ModelConfig.final_logit_softcapping),
    Field("bos_token_id", _ID, ModelConfig.bos_token_id),
    Field("pad_token_id", _ID, ModelConfig.pad_token_id),
    Field("eos_token_id", IDS, None),
    # Values with only one meaning in this code: anything else is another model.
    Field("hidden_activation", one_of("gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
    Field("attention_bias", one_of(False), False),
    Field("use_bidirectional_attention", one_of("vision"), None),
    Field("enable_moe_block", one_of(True), True),
    Field("attention_k_eq_v", one_of(True), True),
    Field("num_kv_shared_layers", one_of(0), 0),
    Field("hidden_size_per_layer_input", one_of(0), 0),
    Field("vocab_size_per_layer_input", one_of(0), 0),
    Field("tie_word_embeddings", one_of(True), True),
    open=True,  # the unknown keys have an error of their own
)
_PICTURES = "boi_token_id image_token_id eoi_token_id".split()
OUTER = Table(
    Field("text_config", _OBJECT),
    Field("vision_config", _OBJECT, None),
    Field("canvas_length", _WIDTH, ModelConfig.canvas_length),
    Field("eos_token_id", IDS, None),
    *(Field(name, _ID, None) for name in _PICTURES),
    Field("vision_soft_tokens_per_image", integer(least=1, most=1 << 16), None),
    Field("tie_word_embeddings", one_of(True), True),
    Field("quantization", either(optional(_OBJECT), flag), None),
    Field("quantization_config", either(optional(_OBJECT), flag), None),
    open=True,
)
_PLAIN = """
    vocab_size hidden_size intermediate_size moe_intermediate_size num_attention_heads num_experts top_k_experts
    sliding_window max_position_embeddings rms_norm_eps final_logit_softcapping bos_token_id pad_token_id
""".split()


def _refuse_unknown_keys(config: dict[str, Any], text: dict[str, Any], ignore_keys: tuple[str, ...]) -> None:
    for where, keys, known in (("", config, OUTER.names), ("text_config.", text, TEXT.names)):
        for key in keys:
            if key not in known | _HARMLESS | {"bos_token_id", "pad_token_id"} and where + key not in ignore_keys:
                raise ConfigError(
                    f"{WHERE} has a key this version does not know: {where}{key} = {shown(keys[key])}."
                    f"{nearest(key, known, all_of_them=False)}\n"
                    f"Update mlx-diffgemma, or pass --ignore-key {where}{key} if you know it is harmless."
                )


def _check_together(text: dict[str, Any]) -> None:
    """Values that must fit one another."""
    if text["top_k_experts"] > text["num_experts"]:
        raise ConfigError(
            f"{WHERE}: text_config.top_k_experts is {text['top_k_experts']}, expected at most num_experts,"
            f" {text['num_experts']}."
        )
    for key in ("pad_token_id", "bos_token_id"):
        if text[key] >= text["vocab_size"]:
            raise ConfigError(
                f"{WHERE}: text_config.{key} is {text[key]}, expected an id of the vocabulary:"
                f" 0 … {text['vocab_size'] - 1}."
            )


# ------------------------------------------------------------------------------------------------------- the layers


def _layers(text: dict[str, Any]) -> tuple[LayerConfig, ...]:
    """Every layer's attention, the first one first."""
    count = text["num_hidden_layers"]
    kinds = list(text["layer_types"]) or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    if len(kinds) != count:
        raise ConfigError(
            f"{WHERE}: text_config.layer_types has {len(kinds)} entries, expected {count}, one for each layer."
        )
    kinds[-1] = FULL  # as transformers does: the last layer is a full one whatever the list says
    if stray := [i for i in text["per_layer_config"] or {} if not i.isdecimal() or int(i) >= count]:
        raise ConfigError(
            f"{WHERE}: text_config.per_layer_config has the key {shown(stray[0])}, expected layers: 0 … {count - 1}."
        )
    ropes = {kind: _rope(text, kind) for kind in dict.fromkeys(kinds)}
    return tuple(_layer(text, i, kind, ropes[kind]) for i, kind in enumerate(kinds))


def _layer(text: dict[str, Any], i: int, kind: str, rope: tuple[float, float]) -> LayerConfig:
    """Layer `i`; `per_layer_config` (transformers 5.23) wins over `global_*` (released)."""
    dim, kv_heads, heads = text["head_dim"], text["num_key_value_heads"], text["num_attention_heads"]
    if text["per_layer_config"] is not None:
        own = text["per_layer_config"].get(str(i), {})
        dim, kv_heads = own.get("head_dim") or dim, own.get("num_key_value_heads") or kv_heads
    elif kind == FULL:
        dim, kv_heads = text["global_head_dim"], text["num_global_key_value_heads"] or kv_heads
    if heads % kv_heads:
        raise ConfigError(
            f"{WHERE}: layer {i} shares {kv_heads} key heads (num_key_value_heads) among {heads} query heads"
            " (num_attention_heads); the second must be a multiple of the first."
        )
    if dim % 2:
        raise ConfigError(f"{WHERE}: layer {i} has a head_dim of {dim}, expected an even number: halves are rotated.")
    theta, share = rope
    rotated = 2 * int(share * dim // 2)
    return LayerConfig(kind=kind, head_dim=dim, num_kv_heads=kv_heads, rope_theta=theta, rotated_dims=rotated)


_DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}


def _rope(text: dict[str, Any], kind: str) -> tuple[float, float]:
    """Base of the frequencies, and the share of a head that is rotated, for one kind of layer.

    `rope_parameters` has one table for each kind of layer that there is; transformers, too, refuses one table for all
    (DiffusionGemmaTextRotaryEmbedding). Only where it is null do the class's own values hold.
    """
    given, where = text["rope_parameters"], "text_config.rope_parameters"
    if given is None:
        given = _DEFAULT_ROPE
    if given.get(kind) is None:
        raise ConfigError(
            f"{WHERE}: {where} says nothing of {kind}, which this model has;"
            f' expected {{"{kind}": {{"rope_theta": …}}}}.'
        )
    where = f"{where}.{kind}"
    rope = ROPE.kind.read(given[kind], WHERE, where)
    form, share = rope["rope_type"] or rope["type"] or "default", rope["partial_rotary_factor"]
    if form == "default" and share != 1:
        raise ConfigError(
            f"{WHERE}: {where} has a partial_rotary_factor of {share} and rope_type 'default', expected 'proportional'."
        )
    return float(rope["rope_theta"]), share
