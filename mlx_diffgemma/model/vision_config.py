"""What config.json says about the vision tower."""

from dataclasses import dataclass
from typing import Any

from ..config import WHERE
from ..errors import ConfigError
from ..values import Field, Table, anything, flag, integer, mapping, nearest, number, one_of, shown

KEY = "vision_config"


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The tower's architecture, from `vision_config` of config.json (transformers Gemma4VisionConfig)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int
    position_embedding_size: int
    pooling_kernel_size: int = 3
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    standardize: bool = False  # as transformers: the released config says true
    use_clipped_linears: bool = False
    soft_tokens: int = 280  # a picture's budget where nobody asked for another

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], *, soft_tokens: int | None = None, ignore_keys: tuple[str, ...] = ()
    ) -> "VisionConfig":
        """Read `vision_config`; `soft_tokens` is the config's `vision_soft_tokens_per_image`, `ignore_keys` are unknown
        keys (as `vision_config.name`) that the caller declares harmless.

        Errors: ConfigError, by key, for another architecture, an unknown key, or a value there is no maths for.
        """
        for key in values:
            if key not in _KNOWN and f"{KEY}.{key}" not in ignore_keys:
                raise ConfigError(
                    f"{WHERE} has a key this version does not know: {KEY}.{key} = {shown(values[key])}."
                    f"{nearest(key, _KNOWN, all_of_them=False)}\n"
                    f"Update mlx-diffgemma, or pass --ignore-key {KEY}.{key} if you know it is harmless."
                )
        read = MATHS.kind.read(values, WHERE, KEY)
        heads, shared, dim = (read[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        _together(heads % shared == 0, "num_key_value_heads", shared, f"a divisor of num_attention_heads, {heads}")
        _together(dim % 4 == 0, "head_dim", dim, "a multiple of 4: half of it turns by x and half by y, in pairs")
        also = read["global_head_dim"]
        _together(also in (None, dim), "global_head_dim", also, f"head_dim, {dim}")
        rope = ROPE.kind.read(read["rope_parameters"] or {}, WHERE, f"{KEY}.rope_parameters")
        tokens = soft_tokens or read["default_output_length"]
        sizes = cls.of_sizes(values)
        return cls(
            **{**vars(sizes), "rms_norm_eps": float(read["rms_norm_eps"]), "rope_theta": float(rope["rope_theta"])}
            | {"soft_tokens": _TOKENS.read(tokens, WHERE, "vision_soft_tokens_per_image")}
        )

    @classmethod
    def of_sizes(cls, values: dict[str, Any]) -> "VisionConfig":
        """What the shapes of the weights follow from, and nothing else checked: for those who do not look.

        Errors: ConfigError for a size that is none.
        """
        return cls(**SIZES.kind.read(values, WHERE, KEY))


def _together(good: bool, key: str, value: Any, expected: str) -> None:
    if not good:
        raise ConfigError(f"{WHERE}: {KEY}.{key} is {shown(value)}, expected {expected}.")


# The upper bounds are far beyond any tower: they keep a slip of the pen from being taken for one.
_COUNT = integer(least=1, most=1 << 12)
_TOKENS = integer(least=1, most=1 << 16)
SIZES = Table(
    Field("hidden_size", integer(least=1, most=1 << 16)),
    Field("intermediate_size", integer(least=1, most=1 << 18)),
    *(Field(name, _COUNT) for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")),
    Field("patch_size", integer(least=1, most=1 << 8)),
    Field("position_embedding_size", integer(least=1, most=1 << 20)),
    Field("pooling_kernel_size", integer(least=1, most=1 << 4), VisionConfig.pooling_kernel_size),
    Field("standardize", flag, VisionConfig.standardize),
    Field("use_clipped_linears", flag, VisionConfig.use_clipped_linears),
    open=True,
)
MATHS = Table(
    *SIZES.fields,
    Field("global_head_dim", _COUNT, None),
    Field("rms_norm_eps", number(above=0, most=1), VisionConfig.rms_norm_eps),
    Field("rope_parameters", mapping(anything), None),
    Field("default_output_length", _TOKENS, VisionConfig.soft_tokens),
    # Values with only one meaning in this code: anything else is another tower.
    Field("model_type", one_of("gemma4_vision"), "gemma4_vision"),
    Field("hidden_activation", one_of("gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
    Field("attention_bias", one_of(False), False),
    open=True,  # the unknown keys have an error of their own
)
ROPE = Table(  # the released config calls the rotation "default", transformers 5.23 "axial": they mean the same one
    Field("rope_type", one_of("axial", "default"), "axial"),
    Field("rope_theta", number(above=1), VisionConfig.rope_theta),
)
_KNOWN = MATHS.names.union(
    """
    _name_or_path architectures attention_dropout chunk_size_feed_forward dtype id2label initializer_range
    is_encoder_decoder label2id max_position_embeddings output_attentions output_hidden_states problem_type
    return_dict torch_dtype transformers_version
    """.split()
)
