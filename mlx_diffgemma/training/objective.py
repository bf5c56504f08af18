"""The denoising objective: two losses of a batch, computed with the network's own layers.

    t ~ U(0, 1) per example; every id of one canvas of the response becomes a uniformly random id with probability t
    loss = mean cross-entropy over all positions of that canvas, stop-id fill included
         + mean cross-entropy of the encoder's next-token prediction over the real tokens

The decoder sees the prompt and the clean canvases before its own through the encoder's keys and values, and
gradients flow back through those. For half of the examples a first look, without gradient, gives the
self-conditioning signal; for the others it is zero, as at step 0 of generation.
Source: the recipes of google-deepmind/gemma (hackable_diffusion_adapter) and TRL (sft_diffusion_gemma).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..model.layers import Experts, Layer, geglu
from ..model.network import Network, leaves
from ..model.tuning import Tuning

FORBIDDEN = -1e9  # added to the scores of what may not be looked at
LOGITS = 1 << 24  # entries of the logits that exist at a time


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B examples, one canvas of each. Rows before `looks` take a first look."""

    tokens: mx.array  # [B, T] int32: prompt, response, stop id; padded on the right
    lengths: mx.array  # [B] int32: real tokens
    starts: mx.array  # [B] int32: position of the canvas
    clean: mx.array  # [B, L] int32
    noisy: mx.array  # [B, L] int32
    looks: int


def losses(network: Network, batch: Batch, *, recompute: bool = False) -> tuple[mx.array, mx.array]:
    """The decoder's and the encoder's mean cross-entropy, float32, in nats per token."""
    hidden, prefix = read_clean(network, batch.tokens, recompute=recompute)
    signal = first_look(network, batch, prefix) if batch.looks else None
    look = denoise(network, batch.noisy, batch.starts, prefix, signal, recompute=recompute)
    pairs = mx.arange(1, batch.tokens.shape[1]) < batch.lengths[:, None]  # [B, T − 1]
    states = mx.concatenate([look.flatten(0, 1), hidden[:, :-1].flatten(0, 1)])
    targets = mx.concatenate([batch.clean.flatten(), batch.tokens[:, 1:].flatten()])
    each = cross_entropy(network, states, targets)  # of both together: one order of pieces
    decoder, encoder = each[: batch.clean.size], each[batch.clean.size :]
    return decoder.mean(), (encoder * pairs.flatten()).sum() / pairs.sum()


def cross_entropy(network: Network, hidden: mx.array, targets: mx.array) -> mx.array:
    """Per token, [N], from hidden states [N, H]."""

    def piece(hidden: mx.array, targets: mx.array) -> mx.array:
        return nn.losses.cross_entropy(network.head(hidden[None])[0], targets)

    return _in_pieces(piece, network, hidden, targets)


def _in_pieces(forward: Callable[..., mx.array], network: Network, hidden: mx.array, *others: mx.array) -> mx.array:
    """`forward` of hidden states [N, H] and of what goes with each, a piece of the rows at a time, in the backward pass
    too: a piece begins when the one before it is done, with its gradients, so that no more than LOGITS logits exist at
    a time."""
    rows = max(1, LOGITS // network.config.vocab_size)
    if len(hidden) <= rows:
        return forward(hidden, *others)
    table = network.decoder.embed_tokens
    weights = leaves(table.trainable_parameters())
    count = len(weights)
    starts = range(0, len(hidden), rows)

    def put(arrays: Sequence[mx.array]) -> None:
        table.update(tree_unflatten(list(zip(weights, arrays, strict=True))))

    def all_pieces(*arrays: mx.array) -> mx.array:
        put(arrays[:count])
        done: list[mx.array] = []
        for start in starts:
            part = [array[start : start + rows] for array in arrays[count:]]
            done.append(forward(*(mx.depends(part, done[-1:]) if done else part)))
        return mx.concatenate(done)

    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        cotangent, output = (a[0] if isinstance(a, list | tuple) else a for a in (cotangents, outputs))
        total: list[mx.array] = []  # the weights' gradients so far
        done: list[mx.array] = []  # the states' gradients, a piece each
        for start in starts:
            part = [array[start : start + rows] for array in (*primals[count:], cotangent)]
            *part, slope = mx.depends(part, [*total, *done[-1:]] if done else [output])

            def piece(*arrays: mx.array, others: list[mx.array] = part[1:]) -> mx.array:
                put(arrays[:count])
                return forward(arrays[count], *others)

            _, gradients = mx.vjp(piece, [*primals[:count], part[0]], [slope])
            total = [a + b for a, b in zip(total, gradients, strict=False)] if done else list(gradients[:count])
            done.append(gradients[count])
        flat = [mx.zeros_like(array) for array in primals[count + 1 :]]
        return (*total, mx.concatenate(done), *flat)

    run: Any = mx.custom_function(all_pieces)
    run.vjp(backward)
    result = run(*weights.values(), hidden, *others)
    put(list(weights.values()))
    return result


def _run(forward: Callable[..., Any], module: nn.Module, *inputs: mx.array, recompute: bool) -> Any:
    """`forward(*inputs)`, which uses `module`'s weights; with `recompute`, again in the backward pass instead of
    keeping what it computes on the way.

    As mx.checkpoint, but the backward pass waits at each call for the gradients of its weights. MLX would leave them
    for the end of the whole pass, and until then hold all that this call has computed again, which is what
    recomputing was to save.
    """
    if not recompute:
        return forward(*inputs)
    weights = leaves(module.trainable_parameters())
    count = len(weights)

    def again(*arrays: mx.array) -> Any:
        module.update(tree_unflatten(list(zip(weights, arrays[:count], strict=True))))
        return forward(*arrays[count:])

    def backward(primals: Any, cotangents: Any, _: Any) -> Any:
        primals, cotangents = (list(a) if isinstance(a, list | tuple) else [a] for a in (primals, cotangents))
        _, gradients = mx.vjp(again, mx.depends(primals, cotangents), cotangents)
        return (*gradients[:count], *mx.depends(gradients[count:], gradients[:count]))

    run: Any = mx.custom_function(again)
    run.vjp(backward)
    result = run(*weights.values(), *inputs)
    module.update(tree_unflatten(list(weights.items())))
    return result


KeysValues = list[tuple[mx.array, mx.array]]  # per layer [B, heads, T, D]


def read_clean(
    network: Network, inputs: mx.array, *, together: mx.array | None = None, recompute: bool = False
) -> tuple[mx.array, KeysValues]:
    """The encoder's causal pass over whole sequences, ids [B, T] or embeddings [B, T, H]: last hidden states, and every
    layer's keys and values. `together` [T, T] is true where two positions belong to one picture, and see each other."""
    place = mx.arange(inputs.shape[1])
    distance = place[:, None] - place
    causal, near = distance >= 0, (distance >= 0) & (distance < network.config.sliding_window)
    if together is not None:
        causal, near = causal | together, near | together
    masks = {True: _scores(near), False: _scores(causal)}
    x, kept = inputs if inputs.ndim == 3 else network.embed(inputs), []
    scalars = network.encoder.language_model.layers
    for layer, scalar, kind in zip(network.decoder.layers, scalars, network.config.layers, strict=True):
        mask = masks[kind.is_sliding].astype(x.dtype)
        x, keys, values = _layer(layer, x, scalar.layer_scalar, mx.array(0), mask, recompute=recompute)
        kept.append((keys, values))
    return network.decoder.norm(x), kept


def denoise(
    network: Network,
    canvas: mx.array,
    starts: mx.array,
    prefix: KeysValues,
    signal: mx.array | None,
    *,
    recompute: bool = False,
) -> mx.array:
    """The decoder's look at canvases [B, L] that begin at `starts` [B], each behind its own prefix."""
    rows, length = canvas.shape
    place = mx.arange(prefix[0][0].shape[2])
    before = place < starts[:, None]  # [B, T]
    near = before & (place > starts[:, None] - network.config.sliding_window)
    itself = mx.ones((rows, length), mx.bool_)
    masks = {
        sliding: _scores(mx.concatenate([seen, itself], axis=1))[:, None, None]  # [B, 1, 1, T + L]
        for sliding, seen in ((True, near), (False, before))
    }
    x = network.decoder.self_conditioning.condition(network.embed(canvas), signal)
    for layer, kind, kept in zip(network.decoder.layers, network.config.layers, prefix, strict=True):
        mask = masks[kind.is_sliding].astype(x.dtype)
        x, _, _ = _layer(layer, x, layer.layer_scalar, starts, mask, *kept, recompute=recompute)
    return network.decoder.norm(x)


def _layer(
    layer: Layer, x: mx.array, scalar: mx.array, starts: mx.array, mask: mx.array, *prefix: mx.array, recompute: bool
) -> tuple[mx.array, mx.array, mx.array]:
    """One layer over x [B, T, H] behind the prefix's keys and values, if any: its output, and x's keys and values."""

    def forward(x: mx.array, scalar: mx.array, *prefix: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        own: list[mx.array] = []

        def memory(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
            own.extend((keys, values))
            if not prefix:
                return keys, values
            return mx.concatenate([prefix[0], keys], axis=2), mx.concatenate([prefix[1], values], axis=2)

        return layer(x, scalar, starts, memory, mask), own[0], own[1]

    return _run(forward, layer, x, scalar, *prefix, recompute=recompute)


def first_look(network: Network, batch: Batch, prefix: KeysValues) -> mx.array:
    """The self-conditioning signal [B, L, H]: of a look without a signal; zero from row `looks` on.

    No gradient flows into that look, but one does into the table that mixes its logits, as in transformers.
    """
    rows, looks = len(batch.starts), batch.looks
    still = [(mx.stop_gradient(keys[:looks]), mx.stop_gradient(values[:looks])) for keys, values in prefix]
    hidden = denoise(network, batch.noisy[:looks], batch.starts[:looks], still, None)

    def piece(hidden: mx.array) -> mx.array:
        return network.soft_embedding(mx.stop_gradient(network.head(hidden[None])))[0]

    signal = _in_pieces(piece, network, mx.stop_gradient(hidden).flatten(0, 1)).reshape(hidden.shape)
    return mx.concatenate([signal, mx.zeros((rows - looks, *signal.shape[1:]), signal.dtype)])


def _scores(seen: mx.array) -> mx.array:
    return mx.where(seen, 0.0, FORBIDDEN)


class AllExperts(Experts):
    """The same experts, run on every token and weighted by zero where the router did not choose them."""

    def __init__(self, experts: Experts):
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    def up(self, x: mx.array, experts: mx.array, tuning: Tuning) -> tuple[mx.array, mx.array, mx.array | None]:
        """[N, H] → the inner values of all experts, [N, E, M], and the ids [N, K] of those chosen."""
        into = self.gate_up_proj.weight  # [E, 2 M, H]
        gate, up = mx.split((x @ into.flatten(0, 1).T).reshape(len(x), into.shape[0], -1), 2, axis=-1)
        return geglu(gate, up), experts, None

    def down(self, wide: mx.array, chosen: mx.array, weights: mx.array, order: mx.array | None) -> mx.array:
        """Inner values [N, E, M] → [N, H]."""
        out = self.down_proj.weight  # [E, H, M]
        which = chosen[..., None] == mx.arange(out.shape[0])  # [N, K, E]
        share = (which * weights[..., None]).sum(axis=1)  # [N, E]
        return (wide * share[..., None]).flatten(1) @ out.swapaxes(1, 2).flatten(0, 1)
