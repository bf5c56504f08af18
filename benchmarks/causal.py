"""A token of the causal pass beside mlx-lm's own Gemma 4, and what scoring a canvas costs; each in one run.

    python -m benchmarks.causal [--prefix 300 4096] [--runs 20] [--out FILE.json]

Released heads, window and vocabulary, hidden size and depth scaled down, packed in 4 bits on both sides: the same
weights, behind the same random keys and values. A token is one causal pass, the head on its row, the best id, its
log-probability and the entropy (mlx-lm's: all log-probabilities, as its generate_step has them). "memory" is what a
token needs beyond weights and prefix.

Scoring: log-probabilities of 256 committed tokens from the hidden states of the pass that commits, in float32,
÷ 12 steps and that pass.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.gemma4_text import Model as PeerModel
from mlx_lm.models.gemma4_text import ModelArgs

from benchmarks import common, models
from benchmarks.models import Arrays
from benchmarks.step import Ours, memory
from mlx_diffgemma.generation import autoregressive, vocabulary
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.network import Network, leaves

GREEDY = GenerationConfig(decoding="autoregressive", greedy=True)
STEPS = 12  # of the canvas that scoring is held against


def peer(raw: dict[str, Any], network: Network) -> PeerModel:
    """mlx-lm's Gemma 4 around the network's arrays: the same text model without a canvas."""
    text = raw["text_config"] | {
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
    }
    model = PeerModel(ModelArgs.from_dict(text))
    named = {}
    for name, value in leaves(network.parameters()).items():
        if "self_conditioning" in name or (name.startswith("decoder") and name.endswith("layer_scalar")):
            continue  # the canvas's alone
        name = name.replace("encoder.language_model.", "decoder.").replace("decoder.", "model.")
        named[name.removesuffix(".weight") if ".experts." in name else name] = value
    model.load_weights(list(model.sanitize(named).items()))
    return model


def packed(model: nn.Module) -> None:
    """4 bits in groups of 64, the routers 8."""
    nn.quantize(model, 64, 4, class_predicate=lambda path, module: _packing(path, module))
    mx.eval(model.parameters())


def _packing(path: str, module: nn.Module) -> bool | dict[str, int]:
    if path.endswith("router.proj"):
        return {"group_size": 64, "bits": 8}
    return hasattr(module, "to_quantized")


class OurToken:
    """Token after token, as autoregressive decoding takes them."""

    def __init__(self, network: Network, prefix: Arrays, room: int):
        self.network, self.cache = network, models.our_prefix(network, prefix, room)
        self.noise = SeededNoise([0], length=1, vocabulary=network.config.vocab_size)
        self.ids, self.logits = mx.zeros((1,), mx.int32), mx.zeros(())

    def __call__(self) -> None:
        last = self.network.encode(self.ids[:, None], self.cache)
        token = autoregressive.choose(self.network.head(last)[:, 0], GREEDY, self.noise, 0)
        self.ids, self.logits = token.ids, token.logits
        mx.eval(self.cache.state, token.ids, token.logprob, token.entropy)


class PeerToken:
    """mlx-lm's, as its generate_step takes them, with greedy sampling."""

    def __init__(self, model: PeerModel, prefix: Arrays):
        self.model, self.cache = model, models.peer_prefix(model, prefix)
        self.ids, self.logits = mx.zeros((1,), mx.int32), mx.zeros(())

    def __call__(self) -> None:
        self.logits = self.model(self.ids[None], cache=self.cache)[:, -1]
        logprobs = self.logits - mx.logsumexp(self.logits, keepdims=True)
        self.ids = mx.argmax(logprobs, axis=-1)
        mx.eval([cache.state for cache in self.cache], self.ids, logprobs)


def token(network: Network, model: PeerModel, prefix: int, runs: int) -> dict[str, Any]:
    """A token of both sides behind a prefix."""
    arrays = models.keys_and_values(network, prefix)
    sides = {"ours": OurToken(network, arrays, runs + 8), "mlx-lm": PeerToken(model, arrays)}
    for side in sides.values():
        side()
    difference = mx.abs(sides["ours"].logits - sides["mlx-lm"].logits).max().item()
    seconds = {name: float(np.median(times)) for name, times in common.alternate(sides, runs).items()}
    counted = {name: memory(side) for name, side in sides.items()}
    return {"prefix": prefix, "logit_difference": difference, "seconds": seconds, "memory": counted}


def scoring(network: Network, prefix: int, runs: int) -> dict[str, Any]:
    """What log-probabilities of a whole canvas cost, beside the steps that settled it."""
    length = network.config.canvas_length
    arrays, new = (models.keys_and_values(network, count) for count in (prefix, length))
    ours = Ours(network, arrays, new, commits=runs + 2)
    shaping = vocabulary.Shaping(cap=network.config.final_logit_softcapping, temperature=1.0)

    def score() -> None:
        table, tuning = network.decoder.embed_tokens, network.tuning
        found = vocabulary.score(ours.hidden[0], table, shaping, ours.canvas[0], top=0, tuning=tuning)
        found.split(length)  # looks at them

    works = {"score": score, "step": ours.step, "commit": ours.commit}
    seconds = {name: float(np.median(times)) for name, times in common.alternate(works, runs).items()}
    share = seconds["score"] / (STEPS * seconds["step"] + seconds["commit"])
    return {"prefix": prefix, "seconds": seconds, "share": share}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[300, 4096])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    raw = models.config(asked.hidden, asked.layers, asked.experts, asked.vocabulary)
    network = models.our_network(raw)
    scored = [scoring(network, prefix, max(asked.runs // 4, 1)) for prefix in asked.prefix]
    model = peer(raw, network)
    for side in (network, model):
        packed(side)
    tokens = [token(network, model, prefix, asked.runs) for prefix in asked.prefix]
    rows = []
    for found in tokens:
        for what, scale, unit in (("seconds", 1e3, "ms"), ("memory", 1e-6, "MB")):
            mine, other = (found[what][side] for side in ("ours", "mlx-lm"))
            rows.append([found["prefix"], what, f"{mine * scale:.2f} {unit}", f"{other * scale:.2f} {unit}"])
            rows[-1].append(f"{mine / other:.2f}")
    common.report(rows, ["prefix", "a token's", "ours", "mlx-lm", "ratio"])
    costs = [[s["prefix"], *(f"{s['seconds'][n]:.3f} s" for n in ("score", "step", "commit"))] for s in scored]
    rows = [[*row, f"{found['share']:.1%}"] for row, found in zip(costs, scored, strict=True)]
    common.report(rows, ["prefix", "scoring", "a step", "commit", f"scoring ÷ {STEPS} steps and a commit"])
    document = {"benchmark": "causal", "config": raw, "runs": asked.runs, "tokens": tokens, "scoring": scored}
    common.finish(common.provenance() | document, asked.out)


if __name__ == "__main__":
    main()
