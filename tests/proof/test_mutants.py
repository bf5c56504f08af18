"""The known traps, built in on purpose one at a time: the parity measure, or the replay of recorded runs, must notice
each. A mutant is a function that breaks a fresh network (or the module it patches)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_diffgemma.files import shipped
from mlx_diffgemma.generation import engine, sampler, vocabulary
from mlx_diffgemma.model import cache, layers, masks, network, table
from mlx_diffgemma.model.layers import Attention, Router, SelfConditioning
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.model.tuning import Tuning
from mlx_diffgemma.proof.recordings import Recording
from mlx_diffgemma.proof.replay import replay_trajectory
from tests.reference_models import MODELS, Scenario, measure

Patch = pytest.MonkeyPatch
SUITE = [(Scenario("plain", 48, 1), 0), (Scenario("plain", 17, 3), 7)]
MUTANTS: dict[str, Callable[[Network, Patch], None]] = {}


def mutant(make: Callable[[Network, Patch], None]) -> Callable[[Network, Patch], None]:
    MUTANTS[make.__name__.replace("_", "-")] = make
    return make


def passes(net: Network) -> bool:
    return all(case.passes for scenario, chunk in SUITE for case in measure(net, scenario, chunk))


def test_the_network_as_it_is_passes() -> None:
    assert passes(MODELS["plain"].network())


# --- The router and the experts


class RouterOf(nn.Module):
    """Passes what a norm, `change`, makes of the residual to a router."""

    def __init__(self, router: nn.Module, change: nn.Module):
        super().__init__()
        self.router, self._change = router, change

    def __call__(self, residual: mx.array) -> tuple[mx.array, mx.array]:
        return self.router(self._change(residual))


@mutant
def router_reads_normed_states(net: Network, patch: Patch) -> None:
    for layer in net.decoder.layers:
        layer["router"] = RouterOf(layer["router"], layer["pre_feedforward_layernorm_2"])


def weights_of_router(patch: Patch, change: Callable[[Router, mx.array, mx.array], mx.array]) -> None:
    """Replace the router's weights [N, K], given the scores of all experts and the ids of the chosen."""
    original = Router.__call__

    def call(self: Router, residual: mx.array) -> tuple[mx.array, mx.array]:
        experts, _ = original(self, residual)
        x = mx.fast.rms_norm(residual, None, self.eps) * self.scale * residual.shape[-1] ** -0.5
        return experts, change(self, self.proj(x), experts)

    patch.setattr(Router, "__call__", call)


@mutant
def router_weights_are_not_renormalized(net: Network, patch: Patch) -> None:
    def change(router: Router, scores: mx.array, experts: mx.array) -> mx.array:
        return mx.take_along_axis(mx.softmax(scores, axis=-1), experts, axis=-1) * router.per_expert_scale[experts]

    weights_of_router(patch, change)


@mutant
def router_softmax_in_half_precision(net: Network, patch: Patch) -> None:
    def change(router: Router, scores: mx.array, experts: mx.array) -> mx.array:
        chosen = mx.take_along_axis(scores.astype(mx.float16), experts, axis=-1)
        return mx.softmax(chosen, axis=-1).astype(mx.float32) * router.per_expert_scale[experts]

    weights_of_router(patch, change)


@mutant
def router_has_no_root_scale(net: Network, patch: Patch) -> None:
    for layer in net.decoder.layers:
        layer.router.proj.weight *= net.config.hidden_size**0.5


@mutant
def per_expert_scale_is_ignored(net: Network, patch: Patch) -> None:
    for layer in net.decoder.layers:
        layer.router.per_expert_scale = mx.ones_like(layer.router.per_expert_scale)


@mutant
def one_expert_too_few(net: Network, patch: Patch) -> None:
    for layer in net.decoder.layers:
        layer.router.top_k -= 1


@mutant
def gate_and_up_are_swapped(net: Network, patch: Patch) -> None:
    for layer in net.decoder.layers:
        gate, up = mx.split(layer.experts.gate_up_proj.weight, 2, axis=1)
        layer.experts.gate_up_proj.weight = mx.concatenate([up, gate], axis=1)


@mutant
def gelu_is_the_exact_one(net: Network, patch: Patch) -> None:
    patch.setattr(layers, "geglu", lambda gate, up: nn.gelu(gate) * up)


@mutant
def both_branches_share_a_norm(net: Network, patch: Patch) -> None:
    for layer in net.decoder.layers:
        layer.pre_feedforward_layernorm_2 = layer.pre_feedforward_layernorm


# --- Norms and scalars


def norm_is_at_rest(find: Callable[[Network], list[nn.RMSNorm]]) -> Callable[[Network, Patch], None]:
    def make(net: Network, patch: Patch) -> None:
        for norm in find(net):
            norm.weight = mx.ones_like(norm.weight)

    return make


def norms(name: str) -> Callable[[Network], list[nn.RMSNorm]]:
    return lambda net: [layer[name] for layer in net.decoder.layers]


for _name in (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
):
    MUTANTS[f"{_name}-has-no-weight"] = norm_is_at_rest(norms(_name))
MUTANTS["q_norm-has-no-weight"] = norm_is_at_rest(lambda net: [x.self_attn.q_norm for x in net.decoder.layers])
MUTANTS["k_norm-has-no-weight"] = norm_is_at_rest(lambda net: [x.self_attn.k_norm for x in net.decoder.layers])
MUTANTS["last-norm-has-no-weight"] = norm_is_at_rest(lambda net: [net.decoder.norm])
MUTANTS["pre_norm-has-no-weight"] = norm_is_at_rest(lambda net: [net.decoder.self_conditioning.pre_norm])


@mutant
def norm_weights_count_from_one(net: Network, patch: Patch) -> None:
    for layer in net.decoder.layers:
        layer["input_layernorm"].weight += 1


@mutant
def layer_scalars_are_shared(net: Network, patch: Patch) -> None:
    for own, layer in zip(net.encoder.language_model.layers, net.decoder.layers, strict=True):
        own.layer_scalar = layer.layer_scalar


@mutant
def layer_scalars_are_ignored(net: Network, patch: Patch) -> None:
    for layer in (*net.encoder.language_model.layers, *net.decoder.layers):
        layer.layer_scalar = mx.ones((1,))


# --- Attention


def attention(patch: Patch, *, values: str = "", scale: float = 1.0) -> None:
    """Attention with other values ("normed" or "rotated" keys, or "raw": without their own norm), or another scale."""

    def call(
        self: Attention, x: mx.array, offset: int, memory: layers.Memory, mask: masks.Mask, tuning: Tuning
    ) -> mx.array:
        queries = self._rotate(self.q_norm(self._split(self.q_proj(x), self.heads)), offset)
        keys = self._split(self.k_proj(x), self.kv_heads)
        own = self._split(self.v_proj(x), self.kv_heads) if "v_proj" in self else keys
        normed = self.k_norm(keys)
        rotated = self._rotate(normed, offset)
        if "v_proj" not in self:
            own = {"normed": normed, "rotated": rotated.swapaxes(1, 2)}.get(values, own)
        own = (own if values == "raw" else mx.fast.rms_norm(own, None, self.eps)).swapaxes(1, 2)
        k, v = memory(rotated, own)
        y = layers.attend(queries * scale, k, v, mask, tuning)
        return self.o_proj(y.transpose(0, 2, 1, 3).flatten(2))

    patch.setattr(Attention, "__call__", call)


def test_the_copy_of_attention_passes(monkeypatch: Patch) -> None:
    attention(monkeypatch)
    assert passes(MODELS["plain"].network())


@mutant
def values_after_the_key_norm(net: Network, patch: Patch) -> None:
    attention(patch, values="normed")


@mutant
def values_after_rotation(net: Network, patch: Patch) -> None:
    attention(patch, values="rotated")


@mutant
def values_without_their_norm(net: Network, patch: Patch) -> None:
    attention(patch, values="raw")


@mutant
def attention_scale_of_the_head(net: Network, patch: Patch) -> None:
    attention(patch, scale=net.config.layers[0].head_dim ** -0.5)


def rotation(net: Network, **changes: float) -> None:
    for layer, config in zip(net.decoder.layers, net.config.layers, strict=True):
        if not config.is_sliding:
            layer.self_attn._periods = layers.periods(dataclasses.replace(config, **changes))


@mutant
def full_layers_rotate_whole_heads(net: Network, patch: Patch) -> None:
    rotation(net, rotated_dims=net.config.layers[1].head_dim)


@mutant
def full_layers_rotate_at_the_sliding_base(net: Network, patch: Patch) -> None:
    rotation(net, rope_theta=net.config.layers[0].rope_theta)


@mutant
def partial_rotation_divides_by_its_own_size(net: Network, patch: Patch) -> None:
    for layer, config in zip(net.decoder.layers, net.config.layers, strict=True):
        if not config.is_sliding:
            part = dataclasses.replace(config, head_dim=config.rotated_dims)
            still = mx.full(((config.head_dim - config.rotated_dims) // 2,), mx.inf)
            layer.self_attn._periods = mx.concatenate([layers.periods(part), still])


def keep_more(patch: Patch, positions: int) -> None:
    patch.setattr(cache.SlidingLayer, "kept", property(lambda self: self.window - 1 + positions))


@mutant
def window_is_one_too_wide(net: Network, patch: Patch) -> None:
    keep_more(patch, 1)


@mutant
def window_is_one_too_narrow(net: Network, patch: Patch) -> None:
    keep_more(patch, -1)


def causal_with(patch: Patch, change: Callable[[int | None], int | None]) -> None:
    original = masks.causal
    patch.setattr(masks, "causal", lambda length, *, window, **rest: original(length, window=change(window), **rest))


@mutant
def encoder_window_is_one_too_wide(net: Network, patch: Patch) -> None:
    causal_with(patch, lambda window: None if window is None else window + 1)


@mutant
def encoder_has_no_window(net: Network, patch: Patch) -> None:
    causal_with(patch, lambda window: None)


@mutant
def canvas_is_read_causally(net: Network, patch: Patch) -> None:
    def bidirectional(length: int, *, visible: int, position: int, padding: mx.array | None) -> masks.Mask:
        return masks.causal(length, visible=visible, position=position, window=None, padding=padding)

    patch.setattr(masks, "bidirectional", bidirectional)


@mutant
def canvas_has_a_window_per_query(net: Network, patch: Patch) -> None:
    def bidirectional(length: int, *, visible: int, position: int, padding: mx.array | None) -> masks.Mask:
        query, key = mx.arange(length)[:, None], mx.arange(-visible, length)[None]
        mask = query - key < net.config.sliding_window
        return mask if padding is None else mask & (key + position >= padding[:, None, None])[:, None]

    patch.setattr(masks, "bidirectional", bidirectional)


@mutant
def padding_is_looked_at(net: Network, patch: Patch) -> None:
    original = net.make_cache
    patch.setattr(Network, "make_cache", lambda self, batch, padding: original(batch))


@mutant
def canvas_counts_positions_from_zero(net: Network, patch: Patch) -> None:
    original = Network.denoise

    def denoise(self: Network, canvas: mx.array, prefix: cache.PrefixCache, signal: mx.array | None) -> mx.array:
        length, prefix.length = prefix.length, 0
        hidden = original(self, canvas, prefix, signal)
        prefix.length = length
        return hidden

    patch.setattr(Network, "denoise", denoise)


# --- The prefix cache


@mutant
def a_chunk_forgets_the_ones_before(net: Network, patch: Patch) -> None:
    original = Network.encode

    def encode(self: Network, tokens: mx.array, prefix: cache.PrefixCache) -> mx.array:
        for layer in prefix.layers:
            if isinstance(layer, cache.FullLayer):
                layer.length = 0
            else:
                layer._start = layer._end
        return original(self, tokens, prefix)

    patch.setattr(Network, "encode", encode)


@mutant
def the_canvas_stays_in_the_cache(net: Network, patch: Patch) -> None:
    for kind in (cache.FullLayer, cache.SlidingLayer):
        patch.setattr(kind, "look", kind.append)


# --- Self-conditioning, embeddings and the head


@mutant
def first_step_skips_self_conditioning(net: Network, patch: Patch) -> None:
    original = SelfConditioning.condition

    def condition(self: SelfConditioning, embeddings: mx.array, signal: mx.array | None, *how: Any) -> mx.array:
        return embeddings if signal is None else original(self, embeddings, signal, *how)

    patch.setattr(SelfConditioning, "condition", condition)


@mutant
def signal_is_not_scaled(net: Network, patch: Patch) -> None:
    original = table.soft_embedding
    root = net.config.hidden_size**0.5
    patch.setattr(network, "soft_embedding", lambda logits, table: original(logits, table) / root * 1.001)
    patch.setattr(net.decoder.self_conditioning, "pre_norm", nn.Identity())


@mutant
def signal_is_rounded_to_half(net: Network, patch: Patch) -> None:
    original = table.soft_embedding
    patch.setattr(network, "soft_embedding", lambda logits, table: original(logits.astype(mx.float16), table))


@mutant
def embeddings_are_not_scaled(net: Network, patch: Patch) -> None:
    patch.setattr(network, "scaled", lambda embeddings: embeddings)


@mutant
def logits_have_no_softcap(net: Network, patch: Patch) -> None:
    patch.setattr(network, "softcap", lambda logits, cap: logits)


@mutant
def softcap_in_half_precision(net: Network, patch: Patch) -> None:
    def softcap(logits: mx.array, cap: float) -> mx.array:
        return (cap * mx.tanh(logits.astype(mx.float16) / cap)).astype(mx.float32)

    patch.setattr(network, "softcap", softcap)


@pytest.mark.parametrize("name", MUTANTS)
def test_parity_notices(name: str, monkeypatch: Patch) -> None:
    net = MODELS["plain"].network()
    MUTANTS[name](net, monkeypatch)
    assert not passes(net)


# --- The sampler and the loop: noticed by the recorded runs

RUNS = ("first", "early-batch", "stability-3")
LOOP_MUTANTS: dict[str, Callable[[Patch], None]] = {}


def loop_mutant(make: Callable[[Patch], None]) -> Callable[[Patch], None]:
    LOOP_MUTANTS[make.__name__.replace("_", "-")] = make
    return make


@loop_mutant
def temperature_ends_at_its_minimum(patch: Patch) -> None:
    def temperature(step: int, steps: int, *, t_min: float, t_max: float) -> float:
        return t_min + (t_max - t_min) * (steps - step - 1) / (steps - 1)

    patch.setattr(sampler, "temperature", temperature)


def reading_with(
    patch: Patch, change: Callable[[Callable[..., vocabulary.Reading], vocabulary.Sums, Any], Any]
) -> None:
    """`change` takes the place of Sums.read; it gets the original, the sums and the draws."""
    original = vocabulary.Sums.read
    patch.setattr(vocabulary.Sums, "read", lambda sums, draws: change(original, sums, draws))


def walked_unshaped(sums: vocabulary.Sums) -> vocabulary.Sums:
    """The same walk at temperature 1."""
    shaping = dataclasses.replace(sums.shaping, temperature=1.0)
    return vocabulary.walk(sums.hidden, sums.table, shaping, with_signal=sums.whole.soft is not None)


@loop_mutant
def signal_from_unshaped_logits(patch: Patch) -> None:
    reading_with(
        patch,
        lambda read, sums, draws: dataclasses.replace(
            read(sums, draws), signal=read(walked_unshaped(sums), None).signal
        ),
    )


@loop_mutant
def entropy_of_unshaped_logits(patch: Patch) -> None:
    reading_with(
        patch,
        lambda read, sums, draws: dataclasses.replace(
            read(sums, draws), entropy=read(walked_unshaped(sums), None).entropy
        ),
    )


@loop_mutant
def the_guess_is_committed(patch: Patch) -> None:
    def change(read, sums, draws) -> vocabulary.Reading:
        reading = read(sums, draws)
        return dataclasses.replace(reading, best=reading.guess)

    reading_with(patch, change)


@loop_mutant
def the_guess_is_the_best_token(patch: Patch) -> None:
    reading_with(patch, lambda read, sums, draws: read(sums, None))


@loop_mutant
def the_bound_counts_the_last_entropy(patch: Patch) -> None:
    def accept(entropy: mx.array, bound: float) -> mx.array:
        order = mx.argsort(entropy, axis=-1)
        kept = mx.cumsum(mx.take_along_axis(entropy, order, axis=-1), axis=-1) <= bound
        return mx.put_along_axis(mx.zeros_like(kept), order, kept, axis=-1)

    patch.setattr(sampler, "accept", accept)


@loop_mutant
def accepted_positions_are_frozen(patch: Patch) -> None:
    frozen: dict[tuple[int, ...], mx.array] = {}
    original = sampler.accept

    def accept(entropy: mx.array, bound: float) -> mx.array:
        frozen[entropy.shape] = original(entropy, bound) | frozen.get(entropy.shape, mx.array(False))
        return frozen[entropy.shape]

    patch.setattr(sampler, "accept", accept)


@loop_mutant
def rejected_positions_keep_their_guess(patch: Patch) -> None:
    patch.setattr(sampler, "renoise", lambda accepted, guess, ids: guess)


@loop_mutant
def history_includes_the_present(patch: Patch) -> None:
    original = sampler.settled
    patch.setattr(
        sampler, "settled", lambda best, earlier, entropy, **rest: original(best, [*earlier, best], entropy, **rest)
    )


@loop_mutant
def settled_rows_go_on(patch: Patch) -> None:
    patch.setattr(engine._Canvas, "_part", lambda self, settled: None)
    patch.setattr(engine._Canvas, "_keep", lambda self, old, new: new)


@loop_mutant
def rows_that_go_on_take_other_places_than_the_prefix_has(patch: Patch) -> None:
    patch.setattr(cache.PrefixCache, "keep", lambda self, rows: None)


@loop_mutant
def rows_that_go_on_get_the_noise_of_those_that_left(patch: Patch) -> None:
    patch.setattr(
        engine._Canvas, "_draws", lambda self, rows, step: (self.noise.draws(self.index, step)[: self.going], None)
    )


@loop_mutant
def committed_canvases_are_not_encoded(patch: Patch) -> None:
    original = network.Network.encode

    def encode(self: Network, tokens: mx.array, prefix: cache.PrefixCache, *pictures: Any) -> mx.array:
        return original(self, tokens, prefix, *pictures) if prefix.length == 0 else tokens

    patch.setattr(network.Network, "encode", encode)


def departures(name: str) -> list[str]:
    recording = Recording.load(shipped.references() / f"trajectory-settling-{name}.npz")
    return replay_trajectory(recording, recording.network())


@pytest.mark.parametrize("name", LOOP_MUTANTS)
def test_the_recorded_runs_notice(name: str, monkeypatch: Patch) -> None:
    LOOP_MUTANTS[name](monkeypatch)
    assert any(departures(run) for run in RUNS)
