"""config.json, generation_config.json and the rotations that follow from them, against transformers' own reading; and a
table of what is wrong with each value, with the words that say so."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
    DiffusionGemmaConfig,
    DiffusionGemmaTextConfig,
)
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRotaryEmbedding

from mlx_diffgemma.config import FULL, SLIDING, ModelConfig
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.generation.settings import GenerationConfig, unused_keys
from mlx_diffgemma.model.layers import periods

from .small import CONFIG

DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}


def changed(config: dict[str, Any] = CONFIG, **changes: Any) -> dict[str, Any]:
    """The small config with dotted keys (`text_config__head_dim`) set; `...` takes a key out."""
    made = {**config, "text_config": dict(config["text_config"])}
    for key, value in changes.items():
        *outer, name = key.split("__")
        place = made["text_config"] if outer else made
        if value is ...:
            place.pop(name, None)
        else:
            place[name] = value
    return made


def frequencies(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Ours, by kind of layer, [D / 2]."""
    layers = ModelConfig.from_dict(config).layers
    return {layer.kind: 1 / np.array(periods(layer), dtype=np.float64) for layer in layers}


def reference(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """transformers', by kind of layer, [D / 2]."""
    text = DiffusionGemmaTextConfig(**changed(config)["text_config"])
    rotary = DiffusionGemmaTextRotaryEmbedding(text)
    return {kind: getattr(rotary, f"{kind}_inv_freq").double().numpy() for kind in rotary.rope_type}


def compare(config: dict[str, Any]) -> None:
    ours, theirs = frequencies(config), reference(config)
    assert ours.keys() == theirs.keys()
    for kind in ours:
        np.testing.assert_allclose(ours[kind], theirs[kind], rtol=1e-6, err_msg=kind)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        ...,
        {SLIDING: DEFAULT, FULL: PROPORTIONAL},
        {SLIDING: {"type": "default", "rope_theta": 1e4}, FULL: {"type": "proportional", "rope_theta": 1e6}},
        {SLIDING: {"rope_theta": 5e3}, FULL: {"rope_theta": 7}},
        {SLIDING: PROPORTIONAL, FULL: DEFAULT},
        {SLIDING: DEFAULT, FULL: {**PROPORTIONAL, "partial_rotary_factor": 1}},
        {SLIDING: DEFAULT, FULL: {**PROPORTIONAL, "partial_rotary_factor": 0.3}},
    ],
    ids=str,
)
def test_rotations_in_every_dialect_are_those_of_transformers(rope: Any) -> None:
    compare(changed(text_config__rope_parameters=rope))


def test_what_transformers_cannot_build_from_is_refused() -> None:
    """One table for all layers, or none for a kind that there is."""
    for rope in ({}, DEFAULT, PROPORTIONAL, {FULL: PROPORTIONAL}):
        with pytest.raises(KeyError):
            reference(changed(text_config__rope_parameters=dict(rope)))
        with pytest.raises(ConfigError, match="says nothing of sliding_attention"):
            frequencies(changed(text_config__rope_parameters=rope))


@settings(max_examples=60, deadline=None)
@given(
    theta=st.floats(2, 1e8),
    share=st.floats(0.0, 1.0),
    head=st.integers(1, 64),
    form=st.sampled_from(["default", "proportional"]),
)
def test_rotations_of_any_numbers(theta: float, share: float, head: int, form: str) -> None:
    own: dict[str, Any] = {"rope_type": form, "rope_theta": theta}
    own |= {"partial_rotary_factor": share} if form == "proportional" else {}
    compare(changed(text_config__rope_parameters={SLIDING: DEFAULT, FULL: own}, text_config__global_head_dim=2 * head))


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config__layer_types": [FULL] * 3},
        {"text_config__layer_types": [SLIDING] * 3},  # the last is a full one all the same
        {"text_config__layer_types": None, "text_config__num_hidden_layers": 12},
        {"text_config__layer_types": ..., "text_config__num_hidden_layers": 7},
        {"text_config__per_layer_config": {"2": {"head_dim": 32, "num_key_value_heads": 2}}},
        {"text_config__global_head_dim": ...},
        {"text_config__num_global_key_value_heads": ...},
        {"text_config__num_global_key_value_heads": None},
    ],
    ids=str,
)
def test_layers_in_every_dialect_are_those_of_transformers(changes: dict[str, Any]) -> None:
    config = changed(**changes)
    compare(config)
    text = DiffusionGemmaTextConfig(**changed(**changes)["text_config"])
    for i, layer in enumerate(ModelConfig.from_dict(config).layers):
        own = text.per_layer_config[i]
        assert (layer.kind, layer.head_dim, layer.num_kv_heads) == (
            text.layer_types[i],
            own.head_dim,
            own.num_key_value_heads,
        )


@pytest.mark.parametrize(
    "key", "max_position_embeddings rms_norm_eps final_logit_softcapping bos_token_id pad_token_id".split()
)
def test_an_absent_or_empty_value_is_transformers_default(key: str) -> None:
    for value in (None, ...):
        own = ModelConfig.from_dict(changed(**{f"text_config__{key}": value}))
        assert getattr(own, key) == getattr(DiffusionGemmaTextConfig(), key)
    assert ModelConfig.from_dict(changed(canvas_length=...)).canvas_length == DiffusionGemmaConfig().canvas_length


# ---------------------------------------------------------------------------------------------- wrong values, in words

COUNT = "expected a positive integer"
WRONG_CONFIG: list[tuple[dict[str, Any], str]] = [
    *(({f"text_config__{key}": value}, f"text_config.{key} is {shown}, {COUNT}") for key in (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads"
        " num_key_value_heads head_dim num_experts top_k_experts sliding_window max_position_embeddings".split()
    ) for value, shown in ((0, "0"), (-1, "-1"), (2.5, "2.5"), ("4", "'4'"), (True, "true"), ([4], "[4]"))),
    *(({f"text_config__{key}": 10**13}, f"{key} is 10000000000000, expected an integer of at most") for key in (
        "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim num_experts sliding_window".split()
    )),
    *(({f"text_config__{key}": ...}, f"text_config.{key} is null, {COUNT}") for key in (
        "vocab_size hidden_size num_hidden_layers num_experts sliding_window".split()
    )),
    *(({f"text_config__{key}": value}, f"text_config.{key} is {shown}, expected a number") for key in (
        "rms_norm_eps final_logit_softcapping".split()
    ) for value, shown in ((0, "0"), (-1.0, "-1.0"), ("1e-6", "'1e-6'"), (float("nan"), "nan"), (float("inf"), "inf"))),
    ({"text_config__top_k_experts": 9}, "text_config.top_k_experts is 9, expected at most num_experts, 4"),
    ({"text_config__num_key_value_heads": 3}, "shares 3 key heads (num_key_value_heads) among 2 query heads"),
    ({"text_config__head_dim": 15}, "a head_dim of 15, expected an even number"),
    ({"text_config__pad_token_id": 10**6}, "text_config.pad_token_id is 1000000, expected an id of the vocabulary"),
    ({"text_config__bos_token_id": -1}, "text_config.bos_token_id is -1"),
    ({"eos_token_id": [1, -1]}, "eos_token_id[1] is -1, expected an integer of at least 0"),
    ({"eos_token_id": "1"}, "eos_token_id is '1', expected an integer"),
    ({"text_config__layer_types": [SLIDING]}, "layer_types has 1 entries, expected 3"),
    ({"text_config__layer_types": [SLIDING, "linear_attention", FULL]}, "layer_types[1] is 'linear_attention'"),
    ({"text_config__per_layer_config": {"9": {}}}, "per_layer_config has the key '9', expected layers: 0 … 2"),
    ({"text_config__per_layer_config": {"1": {"hidden": 3}}}, "unknown key text_config.per_layer_config.1.hidden"),
    ({"text_config__rope_parameters": []}, "text_config.rope_parameters is [], expected an object"),
    ({"text_config__rope_parameters": {}}, "rope_parameters says nothing of sliding_attention"),
    ({"text_config__rope_parameters": DEFAULT}, "rope_parameters says nothing of sliding_attention"),
    ({"text_config__rope_parameters": {FULL: {}, SLIDING: DEFAULT}}, "full_attention.rope_theta is null"),
    ({"text_config__rope_parameters": {FULL: DEFAULT}}, "rope_parameters says nothing of sliding_attention"),
    ({"text_config__rope_parameters": {SLIDING: {**DEFAULT, "factor": 2}}}, "sliding_attention.factor = 2"),
    *(({"text_config__rope_parameters": {SLIDING: {**DEFAULT, "rope_type": form}}}, f"rope_type is '{form}'")
        for form in "linear dynamic yarn longrope llama3".split()),
    ({"text_config__rope_parameters": {SLIDING: {**DEFAULT, "partial_rotary_factor": 0.5}}}, "expected 'proportional'"),
    ({"text_config__rope_theta": 1e4}, "a key this version does not know: text_config.rope_theta"),
    ({"text_config__rope_scaling": {"factor": 8}}, "a key this version does not know: text_config.rope_scaling"),
    ({"text_config__hidden_activation": "relu"}, "text_config.hidden_activation is 'relu'"),
    ({"text_config__attention_bias": True}, "text_config.attention_bias is true, expected false"),
    ({"canvas_length": 0}, f"canvas_length is 0, {COUNT}"),
    ({"canvas_lenght": 8}, "canvas_lenght = 8. Did you mean 'canvas_length'?"),
    ({"text_config": None}, "text_config is null, expected an object"),
    ({"vision_config": "x"}, "vision_config is 'x', expected an object"),
    ({"quantization": "4bit"}, "quantization is '4bit'"),
    ({"model_type": "gemma4"}, "model_type is 'gemma4', expected 'diffusion_gemma'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), WRONG_CONFIG, ids=str)
def test_a_wrong_value_in_config_is_named(changes: dict[str, Any], words: str) -> None:
    config = {**CONFIG, **changes} if "text_config" in changes else changed(**changes)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(config)
    assert words in str(caught.value) and "config.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


WRONG_GENERATION: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a positive integer"),
    ({"max_new_tokens": "96"}, "max_new_tokens is '96'"),
    ({"max_length": 0}, "max_length is 0"),
    ({"max_denoising_steps": 1.5}, "max_denoising_steps is 1.5"),
    ({"t_min": -0.4}, "t_min is -0.4, expected a number of at least 0"),
    ({"t_max": 0}, "t_max is 0, expected a number above 0"),
    ({"t_min": 0.8, "t_max": 0.8}, "t_min is 0.8, expected less than t_max, 0.8"),
    ({"t_max": float("nan")}, "t_max is nan"),
    ({"stability_threshold": True}, "stability_threshold is true"),
    ({"confidence_threshold": -0.1}, "confidence_threshold is -0.1"),
    ({"pad_token_id": -1}, "pad_token_id is -1"),
    ({"eos_token_id": [1, 1.5]}, "eos_token_id[1] is 1.5, expected an integer"),
    ({"sampler_config": []}, "sampler_config is [], expected an object"),
    ({"sampler_config": {"entropy_bound": "x"}}, "sampler_config.entropy_bound is 'x'"),
    ({"sampler_config": {"entropi_bound": 1}}, "unknown key sampler_config.entropi_bound = 1. Did you mean"),
    ({"sampler_config": {"_cls_name": "Other"}}, "sampler_config._cls_name is 'Other'"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "words"), WRONG_GENERATION, ids=str)
def test_a_wrong_value_in_generation_config_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationConfig.from_dict(values)
    assert words in str(caught.value)
    assert "generation_config.json" in str(caught.value) or "t_max, 0.8" in words


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"t_mim": 0.3}, "t_mim = 0.3 does nothing here. Did you mean 't_min'?"),
        ({"max_new_token": 9}, "Did you mean 'max_new_tokens'?"),
        ({"top_k": 64}, "top_k = 64 does nothing here. This model does not use it."),
        ({"do_sample": True}, "do_sample = true does nothing here"),
        ({"do_sample": False, "top_k": 50, "transformers_version": "5"}, ""),
    ],
    ids=str,
)
def test_what_does_nothing_in_generation_config_is_said(values: dict[str, Any], words: str) -> None:
    said = unused_keys(values)
    assert words in said[0] if words else not said
