"""The tower against transformers', in units of its float32 error; its traps as mutants; configs that are refused."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.model import vision
from mlx_diffgemma.model.tuning import Tuning
from mlx_diffgemma.model.vision import Eyes, VisionConfig
from tests.model.eyes import MEDIAN, TOWERS, WORST, Case, cases, expected, features, ours, ratio, rms, vision_config

SHAPES = ((512, 512), (1200, 300), (5, 7), (12, 3000))
QUICK = cases((70,), SHAPES)
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def eyes() -> dict[str, Eyes]:
    return {name: tower.eyes() for name, tower in TOWERS.items()}


def test_features_are_the_references(eyes: dict[str, Eyes], record_summary: Callable[[str], None]) -> None:
    ratios = {case: ratio(eyes[case.tower], case) for case in QUICK}
    worst = max(ratios, key=lambda case: ratios[case])
    median = float(np.median(list(ratios.values())))
    record_summary(
        f"soft tokens: error {median:.2f} of torch's, worst {ratios[worst]:.2f} ({worst}), {len(ratios)} pictures"
    )
    assert median <= MEDIAN and ratios[worst] <= WORST, (median, worst, ratios[worst])


def test_the_weights_names_are_the_checkpoints(eyes: dict[str, Eyes]) -> None:
    for name, tower in TOWERS.items():
        own = {key: value.shape for key, value in tree_flatten(eyes[name].parameters())}
        assert own == {key: tuple(value.shape) for key, value in tower.reference().state_dict().items()}


@pytest.mark.parametrize(("dtype", "bound"), [(mx.bfloat16, 1.2), (mx.float16, 1.2)])
def test_sixteen_bits_are_as_near_as_the_references(dtype: mx.Dtype, bound: float) -> None:
    """Pooled features reach beyond float16's range before they are standardized, and cancel: float32 there."""
    import torch

    case = Case("released", 24, 24)
    tower = TOWERS[case.tower]
    kind = torch.bfloat16 if dtype == mx.bfloat16 else torch.float16
    truth, rival, own = tower.reference().to(kind).double(), tower.reference().to(kind), tower.eyes(dtype)
    for parts in (truth["vision_tower"], rival["vision_tower"], own.vision_tower):
        parts.encoder.layers[-1].post_feedforward_layernorm.weight *= 4096
        parts.std_bias *= 4096
        parts.std_scale *= 1 / 4096
    exact = features(truth, case)
    own_error, its_error = rms(ours(own, case) - exact), rms(features(rival, case) - exact)
    assert own_error <= bound * its_error, (own_error, its_error, rms(exact))


def test_runs_of_queries_change_nothing(eyes: dict[str, Eyes], monkeypatch: Patch) -> None:
    case = Case("released", 24, 24)
    whole = ours(eyes[case.tower], case)
    monkeypatch.setattr(vision, "RUNS", Tuning(scores=4 * 576 * 50))
    parts = ours(eyes[case.tower], case)
    assert not np.array_equal(parts, np.zeros_like(parts)) and rms(parts - whole) < 1e-6


def test_where_a_fused_kernel_is_no_runs_are_taken(eyes: dict[str, Eyes], monkeypatch: Patch) -> None:
    case = Case("released", 24, 24)
    runs = ours(eyes[case.tower], case)
    monkeypatch.setattr(vision.mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(vision, "attend", None)
    assert rms(ours(eyes[case.tower], case) - runs) < 1e-6


def test_many_keys_keep_their_sum(eyes: dict[str, Eyes]) -> None:
    """MLX's CPU softmax loses 1e-5 of a sum of 10,080 weights in float32; a column of ones in the values shows it."""
    random = np.random.default_rng(0)
    queries, keys = (random.normal(size=(4096, 1, 20)).astype(np.float32) for _ in range(2))
    values = np.ones((4096, 1, 20), np.float32)
    y = np.array(vision.look(*map(mx.array, (queries[:64], keys, values))))
    assert np.abs(y - 1).max() < 2e-7


def test_a_packed_projection_gives_what_it_stands_for() -> None:
    """Older packs of mlx-community quantize `embedding_projection` alone."""
    case = Case("heads of 64", 24, 24)
    packed, plain = TOWERS[case.tower].eyes(), TOWERS[case.tower].eyes()
    nn.quantize(packed, 64, 4, class_predicate=lambda path, _: path.endswith("embedding_projection"))
    matrix = packed.embed_vision.embedding_projection
    plain.embed_vision.embedding_projection.weight = mx.dequantize(matrix.weight, matrix.scales, matrix.biases, 64, 4)
    assert rms(ours(packed, case) - ours(plain, case)) < 1e-5


def test_only_soft_tokens_last(eyes: dict[str, Eyes]) -> None:
    case = Case("released", 24, 24)
    patches = mx.array(case.patches())
    mx.eval(patches)
    eyes[case.tower].see(patches, case.columns)
    before = mx.get_active_memory()
    kept = [eyes[case.tower].see(patches, case.columns) for _ in range(3)]
    assert mx.get_active_memory() - before <= 2 * sum(tokens.nbytes for tokens in kept)


def test_many_pictures_of_one_shape_at_once_as_training_wants_them() -> None:
    tower = TOWERS["small patches"]
    eyes = tower.eyes()
    batch = mx.random.uniform(shape=(3, 48, 192), key=mx.random.key(0))
    one_by_one = mx.stack([eyes(patches, 8) for patches in batch])
    assert mx.allclose(mx.vmap(lambda patches: eyes(patches, 8))(batch), one_by_one, atol=1e-5)
    loss = nn.value_and_grad(eyes, lambda: mx.vmap(lambda patches: eyes(patches, 8))(batch).square().mean())
    flat: Any = tree_flatten(loss()[1])
    assert all(mx.isfinite(gradient).all() and mx.abs(gradient).max() > 0 for _, gradient in flat)


# --- Traps: every one must show on one of these pictures


MUTANTS: dict[str, Callable[[Eyes, Patch], None]] = {}
SUITE = [Case("released", 12, 27), Case("heads of 72", 21, 15), Case("shared keys, clipped", 12, 12)]


def mutant(make: Callable[[Eyes, Patch], None]) -> Callable[[Eyes, Patch], None]:
    MUTANTS[make.__name__.replace("_", "-")] = make
    return make


def changed(name: str, change: Callable[..., Any]) -> Callable[[Eyes, Patch], None]:
    """A function of the module wrapped: `change` gets the original first."""
    original = getattr(vision, name)
    return lambda eyes, patch: patch.setattr(vision, name, lambda *args: change(original, *args))


def called(kind: type, change: Callable[..., Any]) -> Callable[[Eyes, Patch], None]:
    """A module's call wrapped: `change` gets the original, then the module and its arguments."""
    original = kind.__call__
    return lambda eyes, patch: patch.setattr(kind, "__call__", lambda *args: change(original, *args))


MUTANTS["pixels-from-0"] = called(vision.PatchEmbedder, lambda f, self, x, r, c: f(self, x / 2 + 0.5, r, c))


@mutant
def position_tables_are_swapped(eyes: Eyes, patch: Patch) -> None:
    embedder = eyes.vision_tower.patch_embedder
    embedder.position_embedding_table = embedder.position_embedding_table[::-1]


@mutant
def positions_by_row_only(eyes: Eyes, patch: Patch) -> None:
    embedder = eyes.vision_tower.patch_embedder
    embedder.position_embedding_table = embedder.position_embedding_table * mx.array([0.0, 1.0])[:, None, None]


def turned(change: Callable[[mx.array], mx.array]) -> Callable[[Eyes, Patch], None]:
    """Other cosines and sines [P, 1, 2, D / 4]."""
    return changed("rotation", lambda f, *args: tuple(change(part) for part in f(*args)))


MUTANTS["axes-are-swapped"] = turned(lambda part: part[:, :, ::-1])
MUTANTS["x-turns-everything"] = turned(lambda part: mx.concatenate([part[:, :, :1]] * 2, axis=2))
MUTANTS["no-rotation"] = changed("rotate", lambda f, x, turn: x)
MUTANTS["rotation-backwards"] = changed("rotate", lambda f, x, turn: f(x, (turn[0], -turn[1])))


@mutant
def frequencies_of_the_whole_head(eyes: Eyes, patch: Patch) -> None:
    original = vision.rotation

    def rotation(config: VisionConfig, *args: Any) -> vision.Rotation:
        import dataclasses

        return original(dataclasses.replace(config, rope_theta=config.rope_theta**0.5), *args)

    patch.setattr(vision, "rotation", rotation)


@mutant
def rotation_of_text(eyes: Eyes, patch: Patch) -> None:
    import dataclasses

    original = vision.rotation
    patch.setattr(vision, "rotation", lambda c, *args: original(dataclasses.replace(c, rope_theta=10_000.0), *args))


@mutant
def neighbours_are_pairs(eyes: Eyes, patch: Patch) -> None:
    def rotate(x: mx.array, turn: vision.Rotation) -> mx.array:
        pairs = x.reshape(*x.shape[:2], 2, -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        turned = [first * turn[0] - second * turn[1], second * turn[0] + first * turn[1]]
        return mx.stack(turned, axis=-1).reshape(x.shape)

    patch.setattr(vision, "rotate", rotate)


@mutant
def pairs_reach_over_the_whole_head(eyes: Eyes, patch: Patch) -> None:
    def rotate(x: mx.array, turn: vision.Rotation) -> mx.array:
        first, second = mx.split(x, 2, axis=-1)
        cosines, sines = (part.flatten(-2) for part in turn)
        return mx.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)

    patch.setattr(vision, "rotate", rotate)


MUTANTS["scale-of-the-head"] = changed("look", lambda f, q, k, v: f(q * q.shape[-1] ** -0.5, k, v))
MUTANTS["scale-of-the-filled-head"] = changed("look", lambda f, q, k, v: f(q * (q.shape[-1] / 64) ** 0.5, k, v))
MUTANTS["values-are-rotated-keys"] = changed("look", lambda f, q, k, v: f(q, k, k))


@mutant
def patches_look_back_only(eyes: Eyes, patch: Patch) -> None:
    original = vision.attend
    patch.setattr(vision, "attend", lambda q, k, v, mask, tuning: original(q, k, v, "causal", tuning))


@mutant
def filled_heads_are_cut_in_front(eyes: Eyes, patch: Patch) -> None:
    def look(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        padded = [mx.pad(x, [(0, 0), (0, 0), (8, 0)]) for x in (queries, keys, values)]
        return original(*padded)[..., : queries.shape[-1]]

    original = vision.look
    patch.setattr(vision, "look", look)


@mutant
def values_without_their_norm(eyes: Eyes, patch: Patch) -> None:
    original = mx.fast.rms_norm
    patch.setattr(mx.fast, "rms_norm", lambda x, w, eps: x if w is None and x.ndim == 3 else original(x, w, eps))


def at_rest(find: Callable[[Any], Any]) -> Callable[[Eyes, Patch], None]:
    """A norm without its weight, in every layer."""

    def make(eyes: Eyes, patch: Patch) -> None:
        for layer in eyes.vision_tower.encoder.layers:
            find(layer).weight = mx.ones_like(find(layer).weight)

    return make


MUTANTS["q_norm-has-no-weight"] = at_rest(lambda layer: layer.self_attn.q_norm)
MUTANTS["k_norm-has-no-weight"] = at_rest(lambda layer: layer.self_attn.k_norm)
for _name in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"):
    MUTANTS[f"{_name}-has-no-weight"] = at_rest(lambda layer, name=_name: layer[name])


@mutant
def norm_weights_count_from_one(eyes: Eyes, patch: Patch) -> None:
    for layer in eyes.vision_tower.encoder.layers:
        layer.input_layernorm.weight = layer.input_layernorm.weight + 1


@mutant
def norms_come_before_only(eyes: Eyes, patch: Patch) -> None:
    for layer in eyes.vision_tower.encoder.layers:
        layer["post_attention_layernorm"] = nn.Identity()


MUTANTS["gelu-is-the-exact-one"] = changed("geglu", lambda f, gate, up: nn.gelu(gate) * up)
MUTANTS["gate-and-up-are-swapped"] = changed("geglu", lambda f, gate, up: f(up, gate))


def pooled(change: Callable[[mx.array, int, int, int], mx.array]) -> Callable[[Eyes, Patch], None]:
    return changed("pool", lambda f, x, rows, columns, side: change(x, rows, columns, side))


MUTANTS["runs-are-pooled"] = pooled(lambda x, r, c, k: x.reshape(-1, k * k, x.shape[-1]).mean(axis=1))
MUTANTS["the-largest-is-pooled"] = pooled(
    lambda x, r, c, k: x.reshape(r // k, k, c // k, k, -1).max(axis=(1, 3)).flatten(0, 1)
)
MUTANTS["soft-tokens-by-column"] = pooled(
    lambda x, r, c, k: x.reshape(r // k, k, c // k, k, -1).mean(axis=(1, 3)).swapaxes(0, 1).flatten(0, 1)
)
MUTANTS["rows-and-columns-are-swapped"] = pooled(
    lambda x, r, c, k: x.reshape(c // k, k, r // k, k, -1).mean(axis=(1, 3)).flatten(0, 1)
)
MUTANTS["no-root-of-the-width"] = changed("pool", lambda f, x, *args: f(x, *args) * x.shape[-1] ** -0.5)


@mutant
def bias_behind_the_scale(eyes: Eyes, patch: Patch) -> None:
    if "std_bias" in eyes.vision_tower:
        eyes.vision_tower.std_bias = eyes.vision_tower.std_bias / eyes.vision_tower.std_scale


@mutant
def not_standardized(eyes: Eyes, patch: Patch) -> None:
    eyes.vision_tower.pop("std_bias", None)


@mutant
def projection_without_its_norm(eyes: Eyes, patch: Patch) -> None:
    eyes.embed_vision.eps = 1e12


MUTANTS["soft-tokens-are-scaled-as-text"] = called(
    vision.Projection, lambda f, self, x: f(self, x) * f(self, x).shape[-1] ** 0.5
)
MUTANTS["clipping-is-ignored"] = called(vision.ClippedLinear, lambda f, self, x: self.linear(x))
MUTANTS["only-inputs-are-clipped"] = called(
    vision.ClippedLinear,
    lambda f, self, x: self.linear(mx.clip(x, self.input_min, self.input_max) if "input_min" in self else x),
)
MUTANTS["only-outputs-are-clipped"] = called(
    vision.ClippedLinear,
    lambda f, self, x: mx.clip(self.linear(x), self.output_min, self.output_max) if "input_min" in self else f(self, x),
)


@mutant
def the_last_layer_is_left_out(eyes: Eyes, patch: Patch) -> None:
    eyes.vision_tower.encoder.layers = eyes.vision_tower.encoder.layers[:-1]


def passes(break_it: Callable[[Eyes], None]) -> bool:
    for case in SUITE:
        eyes = TOWERS[case.tower].eyes()
        break_it(eyes)
        if not ratio(eyes, case) <= WORST:
            return False
    return True


def test_the_suite_passes_as_it_is() -> None:
    assert passes(lambda _: None)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_trap_is_noticed(name: str, monkeypatch: Patch) -> None:
    for case in SUITE:
        expected(case)  # before any patch
    assert not passes(lambda eyes: MUTANTS[name](eyes, monkeypatch))


# --- Configs


RELEASED = {
    "model_type": "gemma4_vision",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "global_head_dim": 72,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10240,
    "default_output_length": 280,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "standardize": True,
    "use_clipped_linears": False,
    "attention_bias": False,
    "dtype": "bfloat16",
    "_name_or_path": "",
}


def test_the_released_config_is_read_in_both_dialects() -> None:
    config = VisionConfig.from_dict(RELEASED)
    assert (config.hidden_size, config.head_dim, config.soft_tokens, config.standardize) == (1152, 72, 280, True)
    written = RELEASED | {"rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"}}
    assert VisionConfig.from_dict(written) == config
    assert VisionConfig.from_dict(RELEASED, soft_tokens=560).soft_tokens == 560


def test_what_a_config_leaves_out_is_as_in_transformers() -> None:
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

    optional = ("pooling_kernel_size", "rms_norm_eps", "standardize", "use_clipped_linears", "rope_parameters")
    short = {key: value for key, value in vision_config().items() if key not in optional}
    theirs = Gemma4VisionConfig(**short)
    ours = VisionConfig.from_dict(short)
    for key in optional[:-1]:
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "vision_config.hidden_size is null, expected a positive integer"),
        ({"num_hidden_layers": 0}, "vision_config.num_hidden_layers is 0"),
        ({"head_dim": 72.0}, "vision_config.head_dim is 72.0"),
        ({"patch_size": True}, "vision_config.patch_size is true"),
        ({"position_embedding_size": 1 << 40}, "vision_config.position_embedding_size is 1099511627776.*at most"),
        ({"pooling_kernel_size": -3}, "vision_config.pooling_kernel_size is -3"),
        ({"head_dim": 70}, "vision_config.head_dim is 70, expected a multiple of 4"),
        ({"num_key_value_heads": 3}, "vision_config.num_key_value_heads is 3, expected a divisor"),
        ({"global_head_dim": 64}, "vision_config.global_head_dim is 64, expected head_dim, 72"),
        ({"model_type": "siglip_vision_model"}, "vision_config.model_type is 'siglip_vision_model'"),
        ({"hidden_activation": "gelu"}, "vision_config.hidden_activation is 'gelu'"),
        ({"attention_bias": True}, "vision_config.attention_bias is true"),
        ({"standardize": 1}, "vision_config.standardize is 1, expected true or false"),
        ({"rms_norm_eps": "1e-6"}, "vision_config.rms_norm_eps is '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "vision_config.rms_norm_eps is nan"),
        ({"rope_parameters": {"rope_type": "linear"}}, "vision_config.rope_parameters"),
        ({"rope_parameters": {"rope_theta": 100.0, "factor": 2.0}}, "vision_config.rope_parameters.*factor"),
        ({"rope_parameters": {"rope_theta": 1}}, "vision_config.rope_parameters.rope_theta is 1"),
        ({"rope_parameters": [100.0]}, "vision_config.rope_parameters"),
        ({"default_output_length": -1}, "vision_config.default_output_length is -1"),
        ({"use_pan_and_scan": True}, "does not know: vision_config.use_pan_and_scan = true"),
    ],
)
def test_configs_that_mean_something_else_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {key: value for key, value in (RELEASED | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        VisionConfig.from_dict(values)


@pytest.mark.parametrize("tokens", [-1, 2.5, "280"])
def test_a_budget_of_the_config_is_a_number(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="vision_soft_tokens_per_image is"):
        VisionConfig.from_dict(RELEASED, soft_tokens=tokens)


def test_who_does_not_look_needs_sizes_only() -> None:
    """A text-only run of a checkpoint with another tower: its tensors are counted, and set aside."""
    config = VisionConfig.of_sizes(RELEASED | {"hidden_activation": "relu", "new_key": 1})
    assert (config.hidden_size, config.standardize) == (1152, True)


def test_an_unknown_key_can_be_declared_harmless() -> None:
    with_key = RELEASED | {"new_key": 1}
    assert VisionConfig.from_dict(with_key, ignore_keys=("vision_config.new_key",)) == VisionConfig.from_dict(RELEASED)
