"""One denoising step, ours beside mlx-vlm's, on the same weights, canvas and prefix, in one run.

    python benchmarks/step.py [--prefix 300 4096 16384] [--runs 5] [--hidden 512] [--layers 6] [--out FILE]

Real vocabulary (262,144), canvas (256), window (1,024) and heads; hidden size and depth are scaled down so that a step
fits a CPU. float32, random weights. mlx-vlm runs its faithful setting: entropy-bound sampler, temperature 1, full
canvas. Its step is spelled out here with its own functions, in the order of its loop. Runs alternate; ratios are
ours ÷ theirs, of medians; below 1 is faster or smaller. "memory" is what a step needs beyond weights and prefix.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_vlm.generate import diffusion as peer_loop
from mlx_vlm.models.diffusion_gemma import Model as PeerModel
from mlx_vlm.models.diffusion_gemma import ModelConfig as PeerConfig

from benchmarks import common
from mlx_diffgemma import sampler, vocabulary
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.network import Network
from mlx_diffgemma.noise import SeededNoise

STEPS, STEP = 48, 10  # a step in the middle of the schedule
SETTINGS = GenerationConfig()


def config(hidden: int, layers: int, experts: int) -> dict[str, Any]:
    """The released config with a smaller hidden size, fewer layers and experts; widths keep their proportions."""
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": 256,
        "text_config": {
            "vocab_size": 262_144,
            "hidden_size": hidden,
            "intermediate_size": hidden * 3 // 4,
            "moe_intermediate_size": hidden // 4,
            "num_hidden_layers": layers,
            "layer_types": kinds,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "head_dim": 256,
            "global_head_dim": 512,
            "num_experts": experts,
            "top_k_experts": 8,
            "sliding_window": 1024,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-6,
        },
    }


def our_network(raw: dict[str, Any]) -> Network:
    """Random weights: matrices that keep the size of what passes through them, norms and scales 1."""
    network = Network(ModelConfig.from_dict(raw))
    weights = []
    for number, (name, value) in enumerate(tree_flatten(network.parameters())):
        if value.ndim > 1:
            value = mx.random.normal(value.shape, key=mx.random.key(number)) * value.shape[-1] ** -0.5
        weights.append((name, value))
    network.load_weights(weights)
    mx.eval(network.parameters())
    return network


def peer_model(raw: dict[str, Any], network: Network) -> PeerModel:
    """mlx-vlm's model around the same arrays; it has no vision tower here."""
    model = PeerModel(PeerConfig.from_dict({**raw, "vision_config": None}))
    names = {name for name, _ in tree_flatten(model.parameters())}
    model.load_weights([(f"model.{n}", w) for n, w in tree_flatten(network.parameters()) if f"model.{n}" in names])
    return model


class Ours:
    """Our step in the middle of a canvas."""

    def __init__(self, network: Network, prompt: mx.array, chunk: int = 2048):
        self.network, self.cache = network, network.make_cache()
        self.cache.reserve(prompt.shape[1])
        for start in range(0, prompt.shape[1], chunk):
            network.encode(prompt[:, start : start + chunk], self.cache)
            mx.eval(self.cache.state)
        length, size = network.config.canvas_length, network.config.vocab_size
        self.noise = SeededNoise([0], length=length, vocabulary=size)
        self.shape = vocabulary.Shape(cap=30.0, temperature=sampler.temperature(STEP, STEPS, t_min=0.4, t_max=0.8))
        self.canvas = self.noise.canvas(0)
        self.signal = mx.random.normal((1, length, network.config.hidden_size), key=mx.random.key(1))
        self.best = self.canvas
        self.hidden = self.forward()
        mx.eval(self.hidden, self.signal)

    def forward(self) -> mx.array:
        return self.network.denoise(self.canvas, self.cache, self.signal)

    def read(self, hidden: mx.array) -> list[mx.array]:
        reading = vocabulary.read(hidden, self.network.decoder.embed_tokens, self.shape, self.noise.draws(0, STEP))
        accepted = sampler.accept(reading.entropy, SETTINGS.entropy_bound)
        canvas = sampler.renoise(accepted, reading.guess, self.noise.ids(0, STEP))
        settled = sampler.settled(reading.best, [self.best], reading.entropy, stability=1, confidence=0.005)
        return [canvas, reading.signal, settled, reading.best]

    def step(self) -> None:
        outputs = self.read(self.forward())
        mx.eval(outputs)
        outputs[2].item()


class Theirs:
    """mlx-vlm's step (generate/diffusion.py, entropy-bound branch), with its functions in its order."""

    def __init__(self, model: PeerModel, prompt: mx.array, signal: mx.array, canvas: mx.array):
        self.model, self.signal, self.canvas = model, signal, canvas
        self.cache = model.diffusion_prefill_cache(prompt, cache=None, prefill_step_size=2048, chunk_prefill=True)
        mx.eval([c.state for c in self.cache])
        self.masks = model.diffusion_decoder_masks(canvas, self.cache, None)
        _, self.logits = peer_loop._make_diffusion_decoder_logits_fns(
            model, self.cache, self.masks, compile_graph=False
        )
        self.context = model.diffusion_prepare_self_conditioning()
        self.hidden = self.forward()
        mx.eval(self.hidden)

    def forward(self) -> mx.array:
        decoder = self.model.model.decoder
        return decoder(
            self.canvas,
            cache=self.cache,
            self_conditioning_embeddings=self.signal,
            decoder_attention_mask=self.masks,
        )

    def read(self, logits: mx.array) -> list[mx.array]:
        """Everything after the head: `logits` are softcapped."""
        processed = logits / sampler.temperature(STEP, STEPS, t_min=0.4, t_max=0.8)
        best = mx.argmax(processed, axis=-1).astype(mx.int32)
        guess = peer_loop._diffusion_sample_canvas(processed, mx.int32, 1.0)
        entropy = peer_loop._diffusion_token_entropy(processed)
        signal = self.model.diffusion_self_conditioning(processed, self.context)
        accepted = peer_loop._diffusion_entropy_transfer_mask(entropy, SETTINGS.entropy_bound)
        random = peer_loop._diffusion_initialize_canvas(1, 256, 262_144, mx.int32)
        canvas = mx.where(accepted, mx.where(accepted, guess, self.canvas), random)
        stopping = {"stability_threshold": 1, "confidence_threshold": 0.005}
        peer_loop._diffusion_stable_and_confident(best, processed, [self.canvas], stopping)
        return [canvas, signal, best]

    def vocabulary(self) -> None:
        table = self.model.model.decoder.embed_tokens
        mx.eval(self.read(self.model._softcap(table.as_linear(self.hidden))))

    def step(self) -> None:
        mx.eval(self.read(self.logits(self.canvas, self.signal)))


def memory(step: Callable[[], None]) -> int:
    """Bytes a step needs beyond what is held before it."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    return mx.get_peak_memory() - before


def compare(network: Network, model: PeerModel, prefix: int, runs: int) -> dict[str, Any]:
    """Both sides at one prefix length: seconds per part, memory, ratios."""
    prompt = mx.random.randint(0, 262_144, (1, prefix), key=mx.random.key(2))
    ours = Ours(network, prompt)
    theirs = Theirs(model, prompt, ours.signal, ours.canvas)
    difference = mx.abs(ours.hidden - theirs.hidden).max().item()
    parts: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (lambda: mx.eval(ours.forward()), lambda: mx.eval(theirs.forward())),
        "vocabulary": (lambda: mx.eval(ours.read(ours.hidden)), theirs.vocabulary),
        "step": (ours.step, theirs.step),
    }
    document: dict[str, Any] = {"prefix": prefix, "hidden_difference": difference}
    for name, (mine, other) in parts.items():
        times = common.alternate({"ours": mine, "mlx-vlm": other}, runs)
        seconds = {side: float(np.median(values)) for side, values in times.items()}
        document[name] = {**seconds, "ratio": seconds["ours"] / seconds["mlx-vlm"]}
    mine, other = memory(ours.step), memory(theirs.step)
    document["memory"] = {"ours": mine, "mlx-vlm": other, "ratio": mine / other}
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[300, 4096, 16_384])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    raw = config(arguments.hidden, arguments.layers, arguments.experts)
    network = our_network(raw)
    model = peer_model(raw, network)
    document = {**common.provenance(), "config": raw, "results": []}
    rows = []
    for prefix in arguments.prefix:
        result = compare(network, model, prefix, arguments.runs)
        document["results"].append(result)
        for part in ("forward", "vocabulary", "step", "memory"):
            unit, scale = ("MB", 1e-6) if part == "memory" else ("s", 1.0)
            mine, other = (result[part][side] * scale for side in ("ours", "mlx-vlm"))
            rows.append([prefix, part, f"{mine:.3f} {unit}", f"{other:.3f} {unit}", f"{result[part]['ratio']:.2f}"])
    common.report(rows, header=["prefix", "part", "ours", "mlx-vlm", "ratio"])
    common.finish(document, arguments.out)


if __name__ == "__main__":
    main()
