"""What a checkpoint says about itself, what a run may choose, and what a pack is made of.

The only home of defaults. Frozen dataclasses; reading one from JSON or TOML refuses keys it does not
know, because a renamed key that silently becomes a default value is a wrong model.
"""

import dataclasses
import functools
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
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
        known = {f.name for f in dataclasses.fields(cls)} | HARMLESS | _CHECKED.keys() | _GEOMETRY
        for where, keys in (("", config), ("text_config.", text)):
            for key in keys:
                if key not in known and where + key not in ignore_keys:
                    raise ConfigError(
                        f"config.json has a key this version does not know: {where}{key} = {keys[key]!r}.\n"
                        f"Update mlx-diffgemma, or pass --ignore-key {where}{key} if you know it is harmless."
                    )
        for key, allowed in _CHECKED.items():
            if text.get(key, allowed[0]) not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise ConfigError(f"config.json: text_config.{key} is {text[key]!r}, expected {expected}.")
        if config.get("tie_word_embeddings", True) is not True:
            raise ConfigError("config.json: tie_word_embeddings is false; DiffusionGemma ties its head and embedding.")
        eos = config.get("eos_token_id", text.get("eos_token_id", cls.eos_token_ids))
        required = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads")
        required += ("num_experts", "top_k_experts", "sliding_window")
        optional = ("max_position_embeddings", "rms_norm_eps", "final_logit_softcapping", "bos_token_id")
        optional += ("pad_token_id",)
        values = {key: _positive(text, key) for key in required}
        values |= {key: _number(text, key) for key in optional if text.get(key) is not None}
        canvas = {"canvas_length": config.get("canvas_length") or cls.canvas_length}
        vision = config.get("vision_config")
        _check("config.json: vision_config", vision, vision is None or isinstance(vision, dict), "an object or null")
        if values["top_k_experts"] > values["num_experts"]:
            raise ConfigError(
                f"config.json: top_k_experts {values['top_k_experts']} > num_experts {values['num_experts']}."
            )
        return cls(
            **values,
            layers=layers,
            canvas_length=_positive(canvas, "canvas_length"),
            eos_token_ids=_ids(eos),
            image_token_id=config.get("image_token_id"),
            vision=vision,
            quantization=config.get("quantization") or config.get("quantization_config"),
        )


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


def _positive(text: dict[str, Any], key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: text_config.{key} is {value!r}, expected a positive integer.")
    return value


def _number(text: dict[str, Any], key: str) -> Any:
    value = text[key]
    _check(f"config.json: text_config.{key}", value, type(value) in (int, float), "a number")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    _check("eos_token_id", value, all(type(i) is int for i in ids), "token ids")
    return ids


def _layers(text: dict[str, Any]) -> tuple[LayerConfig, ...]:
    """Per-layer geometry; `per_layer_config` (transformers 5.23) wins over `global_*` (released)."""
    count = _positive(text, "num_hidden_layers")
    kinds = text.get("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    if len(kinds) != count or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise ConfigError(
            f"config.json: text_config.layer_types must name {count} layers, each {SLIDING!r} or {FULL!r};"
            f" got {len(kinds)}: {sorted(set(map(str, kinds)))}."
        )
    kinds = [*kinds[:-1], FULL]  # as transformers does: the last layer is a full one whatever the list says
    heads, head_dim, kv_heads = (_positive(text, k) for k in ("num_attention_heads", "head_dim", "num_key_value_heads"))
    rope = text.get("rope_parameters") or _DEFAULT_ROPE
    per_layer = {int(i): dict(v) for i, v in (text.get("per_layer_config") or {}).items()}
    layers = []
    for i, kind in enumerate(kinds):
        geometry = {"head_dim": head_dim, "num_key_value_heads": kv_heads}
        if text.get("per_layer_config") is not None:
            geometry |= per_layer.get(i, {})
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
        params = dict(rope.get(kind) or _DEFAULT_ROPE[kind])
        rope_type = params.pop("rope_type", "default")
        theta, partial = params.pop("rope_theta"), params.pop("partial_rotary_factor", 1.0)
        expected = "proportional" if partial != 1.0 else rope_type
        if params or rope_type not in ("default", "proportional") or rope_type != expected:
            raise ConfigError(
                f"config.json: rope_parameters.{kind} is {rope[kind]!r}; expected rope_type 'default', or"
                " 'proportional' with a partial_rotary_factor, and a rope_theta."
            )
        dim = geometry["head_dim"]
        layers.append(
            LayerConfig(
                kind=kind,
                head_dim=dim,
                num_kv_heads=geometry["num_key_value_heads"],
                rope_theta=float(theta),
                rotated_dims=2 * int(partial * dim // 2),
            )
        )
    return tuple(layers)


# Sampling keys of autoregressive models, and the values at which they do nothing.
_UNUSED = {"top_k": (0, 50), "top_p": (1.0,), "min_p": (0.0,), "temperature": (1.0,), "repetition_penalty": (1.0,)}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to generate. The defaults are transformers' (DiffusionGemmaGenerationConfig), the checkpoint's
    `generation_config.json` comes over them, and what the caller names over both.

    Exact unless one of the last three is set: those depart from the reference and are reported in the
    statistics of every result.
    """

    max_tokens: int = 256
    max_denoising_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    entropy_bound: float = 0.1
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    stop_ids: tuple[int, ...] = (1, 106)
    pad_token_id: int = 0
    prefill_step_size: int = 2048
    sparse_signal: bool = True  # the signal's full product only where a position is not one token to its precision
    # Departures from the reference, by name.
    canvas_length: int | None = None  # shorter canvases than the model's, for short answers
    greedy: bool = False  # the guess is the best token: no draw
    avoid_empty: bool = False  # no stop id at position 0 of the first canvas, in the signal too

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_denoising_steps", "prefill_step_size"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _check("stability_threshold", self.stability_threshold, self.stability_threshold >= 0, "at least 0")
        _check("t_min", self.t_min, 0 < self.t_min <= self.t_max, f"above 0 and at most t_max ({self.t_max})")
        _check("entropy_bound", self.entropy_bound, self.entropy_bound >= 0, "at least 0")
        _check("confidence_threshold", self.confidence_threshold, self.confidence_threshold >= 0, "at least 0")
        if self.canvas_length is not None:
            _check("canvas_length", self.canvas_length, self.canvas_length >= 1, "at least 1")

    def replace(self, **options: Any) -> "GenerationConfig":
        """A copy with `options` set; an option that does not exist is a ConfigError with the nearest name."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown generation option {name!r}.{_nearest(name, known)}")
        return dataclasses.replace(self, **options)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, stop_ids: tuple[int, ...] = ()) -> "GenerationConfig":
        """Read `generation_config.json`; `stop_ids` (the tokenizer's and config's) are joined to its own.

        Keys that transformers writes for autoregressive models are ignored when they are null or at rest;
        sampling keys this algorithm has no place for (top_k, top_p, …) are refused by name.
        """
        renamed = {"max_new_tokens": "max_tokens"}
        options: dict[str, Any] = {}
        for key in ("max_new_tokens", "max_denoising_steps", "t_min", "t_max", "stability_threshold"):
            if values.get(key) is not None:
                options[renamed.get(key, key)] = values[key]
        for key in ("confidence_threshold", "pad_token_id"):
            if values.get(key) is not None:
                options[key] = values[key]
        sampler = values.get("sampler_config") or {}
        if sampler.get("_cls_name", "EntropyBoundSamplerConfig") != "EntropyBoundSamplerConfig":
            raise ConfigError(
                f"generation_config.json asks for the sampler {sampler['_cls_name']!r};"
                " only EntropyBoundSamplerConfig exists here."
            )
        if sampler.get("entropy_bound") is not None:
            options["entropy_bound"] = sampler["entropy_bound"]
        for key, at_rest in _UNUSED.items():
            if values.get(key) is not None and values[key] not in at_rest:
                raise ConfigError(f"generation_config.json sets {key} = {values[key]}, which this model does not use.")
        ids = dict.fromkeys((*_ids(values.get("eos_token_id")), *stop_ids))
        if ids:
            options["stop_ids"] = tuple(ids)
        return cls(**options)

    @property
    def departures(self) -> dict[str, Any]:
        """The options in force that make a run differ from the reference algorithm."""
        named = {"canvas_length": self.canvas_length, "greedy": self.greedy, "avoid_empty": self.avoid_empty}
        return {name: value for name, value in named.items() if value}


def _check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {value!r}, expected {expected}.")


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."


# What MLX means by a mode when nothing else is said: (group size, bits); the mx and nv modes have no other.
MODE_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How one matrix is packed; `where` in the errors of `from_dict` says who asked."""

    bits: int
    group_size: int
    mode: str = "affine"

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "Quantization":
        """Read `{bits, group_size, mode}`; absent values are MLX's defaults for the mode."""
        mode = values.get("mode", "affine")
        if mode not in tuple(MODE_DEFAULTS):
            raise ConfigError(f"{where}: mode is {mode!r}, expected one of {', '.join(MODE_DEFAULTS)}.")
        group_size, bits = MODE_DEFAULTS[mode]
        made = cls(bits=values.get("bits", bits), group_size=values.get("group_size", group_size), mode=mode)
        if type(made.bits) is not int or type(made.group_size) is not int:
            raise ConfigError(f"{where}: bits and group_size are integers; got {made.bits!r}, {made.group_size!r}.")
        if mode != "affine" and (made.group_size, made.bits) != (group_size, bits):
            raise ConfigError(
                f"{where}: {mode} is always {bits} bits in groups of {group_size};"
                f" got {made.bits} bits, group size {made.group_size}."
            )
        if mode == "affine" and (made.bits not in (2, 3, 4, 5, 6, 8) or made.group_size not in (32, 64, 128)):
            raise ConfigError(
                f"{where}: affine packing has 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128;"
                f" got {made.bits!r} bits, group size {made.group_size!r}."
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """As a `quantization` override in config.json: an override without a mode is affine."""
        values: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        return values if self.mode == "affine" else values | {"mode": self.mode}


@dataclass(frozen=True, kw_only=True)
class Override:
    """What a recipe says about the modules whose path matches a glob; `quantization` None leaves them as they are."""

    path: str
    quantization: Quantization | None
    because: str

    def matches(self, path: str) -> bool:
        """Whether a module path, written without the leading `model.`, is meant."""
        return glob(self.path).fullmatch(path) is not None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a pack is made of. `base` None quantizes nothing; of the overrides, the first that matches counts."""

    name: str
    because: str
    base: Quantization | None
    overrides: tuple[Override, ...] = ()
    dtype: str = "bfloat16"
    allow_low_bit_trunk: bool = False
    experimental: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any], name: str) -> "Recipe":
        """Read a recipe's TOML. Errors: ConfigError for an unknown key, a value MLX cannot pack, a missing reason."""
        known = {"because", "bits", "group_size", "mode", "dtype", "allow_low_bit_trunk", "experimental", "override"}
        _refuse_unknown(values, known, f"recipe {name}")
        overrides = []
        entries = values.get("override", [])
        _check(f"recipe {name}: override", entries, _is_tables(entries), "one or more [[override]] tables")
        for i, entry in enumerate(entries):
            where = f"recipe {name}, override {i + 1}"
            _refuse_unknown(entry, {"path", "because", "quantize", "bits", "group_size", "mode"}, where)
            for key in ("path", "because"):
                _check(f"{where}: {key}", entry.get(key), isinstance(entry.get(key), str) and entry[key], "a sentence")
            keep = entry.get("quantize", True) is False
            if keep and entry.keys() & {"bits", "group_size", "mode"}:
                raise ConfigError(f"{where}: `quantize = false` beside bits, group_size or mode; keep one of them.")
            quantization = None if keep else Quantization.from_dict(entry, where)
            overrides.append(Override(path=entry["path"], quantization=quantization, because=entry["because"]))
        quantized = bool(values.keys() & {"bits", "group_size", "mode"})
        if overrides and not quantized:
            raise ConfigError(f"recipe {name}: overrides without base bits; config.json needs a base.")
        _check(f"recipe {name}: because", values.get("because"), bool(values.get("because")), "a sentence")
        for key in ("allow_low_bit_trunk", "experimental"):
            _check(f"recipe {name}: {key}", values.get(key), values.get(key) in (None, True, False), "true or false")
        dtype = values.get("dtype", cls.dtype)
        _check(f"recipe {name}: dtype", dtype, dtype in DTYPES, " or ".join(DTYPES))
        return cls(
            name=name,
            because=values["because"],
            base=Quantization.from_dict(values, f"recipe {name}") if quantized else None,
            overrides=tuple(overrides),
            dtype=dtype,
            allow_low_bit_trunk=values.get("allow_low_bit_trunk", False),
            experimental=values.get("experimental", False),
        )


def knowledge() -> Path:
    """The folder `convert/`: the copy packed in the wheel, else the one beside the package."""
    package = Path(__file__).parent
    for path in (package / "_convert", package.parent / "convert"):
        if path.is_dir():
            return path
    raise ConfigError(f"this installation lacks the converter's data: no {package / '_convert'}. Install it again.")


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.stem for file in (knowledge() / "recipes").glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a TOML file. `extends` puts another recipe's overrides behind its own."""
    return Recipe.from_dict(_recipe_values(name, ()), Path(name).stem if name.endswith(".toml") else name)


def _recipe_values(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    file = Path(name) if name.endswith(".toml") else knowledge() / "recipes" / f"{name}.toml"
    if not file.is_file() or name in seen:
        raise ConfigError(f"there is no recipe {name!r}; expected a .toml file or one of {', '.join(recipe_names())}.")
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"recipe {file} cannot be read: {error}.") from None
    if (parent := values.pop("extends", None)) is None:
        return values
    inherited = _recipe_values(str(parent), (*seen, name)).get("override", [])
    return values | {"override": [*values.get("override", []), *inherited]}


def adhoc_recipe(bits: int | None, group_size: int | None, mode: str | None) -> Recipe:
    """The experts as asked (None: MLX's default for the mode), the trunk as in q4."""
    asked = {"bits": bits, "group_size": group_size, "mode": mode}
    base = Quantization.from_dict({key: value for key, value in asked.items() if value is not None}, "-q")
    packing = f"{base.bits}-bit/{base.group_size}" if base.mode == "affine" else base.mode
    because = f"Chosen on the command line: {packing} experts, 8-bit trunk."
    return dataclasses.replace(load_recipe("q4"), name=packing.replace("/", "-"), because=because, base=base)


DTYPES = ("bfloat16", "float16", "float32")


@functools.cache
def glob(pattern: str) -> re.Pattern[str]:
    """A dotted path pattern: `*` is (part of) one name, `**` anything; each becomes a group."""
    kinds = {"*": r"([^.]*)", "**": r"(.+)"}
    return re.compile("".join(kinds.get(part) or re.escape(part) for part in re.split(r"(\*\*|\*)", pattern)))


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _refuse_unknown(values: dict[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} has an unknown key {key!r}.{_nearest(key, sorted(known))}")
