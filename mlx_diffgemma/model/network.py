"""One set of weights, run two ways: `encode` reads causally and extends the prefix cache, `denoise` looks at a
canvas and the prefix in both directions and leaves nothing behind.

The two share everything but one scalar per layer (transformers DiffusionGemmaModel).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import ModelConfig, PictureMask
from . import masks
from .blocks import BlockMask, Spans
from .cache import LayerCache, PrefixCache
from .layers import Layer, Memory, SelfConditioning
from .supply import Resident, Supply
from .table import scaled, soft_embedding, softcap
from .tuning import DEFAULT, Tuning


class Decoder(nn.Module):
    """All weights of the text model; their names are the checkpoint's below `model.decoder.`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, layer) for layer in config.layers]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)


class LayerScalar(nn.Module):
    """The one number per layer that the encoder does not share."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class LanguageModel(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = [LayerScalar() for _ in config.layers]


class Encoder(nn.Module):
    """What the checkpoint keeps below `model.encoder.` for text."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.language_model = LanguageModel(config)


class Network(nn.Module):
    """DiffusionGemma's text model. `B` batch, `T` tokens, `L` canvas, `H` hidden, `V` vocabulary."""

    def __init__(self, config: ModelConfig, tuning: Tuning = DEFAULT):
        super().__init__()
        self.config, self.tuning = config, tuning
        self.experts: Supply = Resident()
        self.decoder = Decoder(config)
        self.encoder = Encoder(config)

    @property
    def own(self) -> ModelConfig:
        """The architecture with the key heads that this machine holds: what a prefix costs here."""
        return self.tuning.share.own(self.config)

    def make_cache(
        self, batch_size: int = 1, left_padding: list[int] | None = None, canvas_length: int | None = None
    ) -> PrefixCache:
        """An empty prefix cache for this network."""
        return self.tuning.share.make_cache(
            self.config,
            batch_size=batch_size,
            left_padding=left_padding,
            canvas_length=canvas_length,
            write_in_place=self.tuning.write_in_place,
        )

    def embed(self, ids: mx.array) -> mx.array:
        """Ids [B, T] → embeddings [B, T, H], scaled by sqrt(H) rounded to their dtype."""
        return scaled(self.decoder.embed_tokens(ids))

    def encode(
        self,
        inputs: mx.array,
        cache: PrefixCache,
        blocks: Sequence[Spans] = (),
        picture_mask: PictureMask = "transformers",
    ) -> mx.array:
        """Read ids [B, T], or embeddings [B, T, H], behind the prefix and add them to it.

        `blocks` says of every row where among these T tokens a picture's begin and end: whole ones, in order.
        Returns hidden states [B, T, H] after the last norm; they cost nothing unless they are evaluated.
        """
        told = {"inputs": inputs, "blocks": blocks, "picture_mask": picture_mask}
        with self.tuning.share.announced("encode", cache, **told) as done:
            x = self._encode(inputs, cache, blocks, picture_mask)
            done(x, cache.state)
        return x

    def _encode(
        self, inputs: mx.array, cache: PrefixCache, blocks: Sequence[Spans], picture_mask: PictureMask
    ) -> mx.array:
        x = inputs if inputs.ndim == 3 else self.embed(inputs)
        scalars = [layer.layer_scalar for layer in self.encoder.language_model.layers]
        padding = _counts(cache, x.shape[0]) if any(blocks) else []

        def mask(layer: LayerCache) -> masks.Mask:
            if any(blocks):
                beyond = cache.length - layer.length  # positions that the layer has let go
                return tuple(
                    BlockMask(
                        length=x.shape[1],
                        visible=layer.length,
                        hidden=max(padded - beyond, 0),
                        window=layer.window,
                        spans=spans,
                        kind=picture_mask,
                    )
                    for padded, spans in zip(padding, blocks, strict=True)
                )
            return masks.causal(
                x.shape[1],
                visible=layer.length,
                position=cache.length,
                window=layer.window,
                padding=cache.padding,
            )

        x = self._layers(x, scalars, cache, mask, lambda layer: layer.append)
        cache.advance(x.shape[1])
        return x

    def denoise(self, canvas: mx.array, cache: PrefixCache, signal: mx.array | None) -> mx.array:
        """One look at the canvas ids [B, L] behind the prefix, given the signal [B, L, H] of the step before
        (None: the zero signal of step 0). Returns hidden states [B, L, H] after the last norm. A canvas of fewer rows
        than the prefix looks at its first ones."""
        with self.tuning.share.announced("denoise", cache, canvas=canvas, signal=signal) as done:
            x = self.decoder.self_conditioning.condition(self.embed(canvas), signal, self.tuning)
            x = self._look(x, cache)
            done(x)
        return x

    def _look(self, x: mx.array, cache: PrefixCache) -> mx.array:
        scalars = [layer.layer_scalar for layer in self.decoder.layers]

        padding = None if cache.padding is None else cache.padding[: len(x)]

        def mask(layer: LayerCache) -> masks.Mask:
            return masks.bidirectional(x.shape[1], visible=layer.length, position=cache.length, padding=padding)

        return self._layers(x, scalars, cache, mask, lambda layer: layer.look)

    def _layers(
        self,
        x: mx.array,
        scalars: list[mx.array],
        cache: PrefixCache,
        mask: Callable[[LayerCache], masks.Mask],
        memory: Callable[[LayerCache], Memory],
    ) -> mx.array:
        """All layers and the last norm; one mask per kind of layer (layers of a kind hold the same positions)."""
        by_window = {layer.window: mask(layer) for layer in cache.layers}
        for number, (layer, scalar, kept) in enumerate(zip(self.decoder.layers, scalars, cache.layers, strict=True)):
            with self.experts.layer(number, layer.experts) as done:
                y = layer(x, scalar, cache.length, memory(kept), by_window[kept.window], self.tuning)
                x = done(y, kept.state)
        return self.decoder.norm(x)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states [B, T, H] → softcapped float32 logits [B, T, V]."""
        table = self.decoder.embed_tokens
        return softcap(table.as_linear(hidden), self.config.final_logit_softcapping)

    def soft_embedding(self, logits: mx.array) -> mx.array:
        """Temperature-shaped logits [B, L, V] → the signal [B, L, H] for the next step."""
        return soft_embedding(logits, self.decoder.embed_tokens)

    def logits(
        self, canvas: mx.array, cache: PrefixCache, self_conditioning_logits: mx.array | None = None
    ) -> mx.array:
        """Softcapped float32 logits [B, L, V] of one denoising step (transformers forward); for tests and tools."""
        signal = None if self_conditioning_logits is None else self.soft_embedding(self_conditioning_logits)
        return self.head(self.denoise(canvas, cache, signal))


def _counts(cache: PrefixCache, rows: int) -> list[int]:
    """Padding tokens in front of every row."""
    return [0] * rows if cache.padding is None else cast(list[int], cache.padding.tolist())


def leaves(tree: dict[str, Any]) -> dict[str, mx.array]:
    """The arrays of a tree of parameters, by dotted name."""
    flat: Any = tree_flatten(tree)
    return dict(flat)
