"""One denoising step, ours beside mlx-vlm's and transformers', on the same weights, canvas and prefix, in one run.

    python -m benchmarks.step [--prefix 300 4096 16384] [--runs 5] [--hidden 512] [--layers 6]
    python -m benchmarks.step --transformers --out benchmarks/results/step.json

Real vocabulary (262,144), canvas (256), window (1,024) and heads; hidden size and depth are scaled down so that a step
fits a CPU. float32, random weights. The prefix is random keys and values, put into each side's cache: what a step costs
depends on how long it is, not on what it says. mlx-vlm runs its faithful setting: entropy-bound sampler, temperature 1,
full canvas. Its step is spelled out here with its own functions, in the order of its loop; transformers' is its own
`_denoising_step`, in PyTorch on the CPU with a thread per core.

    forward     from canvas and signal to hidden states (transformers': without a signal, which it makes from logits)
    vocabulary  from hidden states to best, guess, accepted, next canvas and signal
    cache       putting the canvas's keys and values behind the prefix, in all layers; part of the forward
    step        all of it
    commit      the causal pass that adds a settled canvas to the prefix; once a canvas

Runs alternate; figures are medians, ratios ours ÷ theirs: below 1 is faster or smaller. "memory" is what a part needs
at its peak beyond what it found: counted by MLX, for transformers by the operating system (Linux). The projection
weighs the ratios of forward and vocabulary by the share each has in a step of the released model: it was not measured.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.generate import diffusion as peer_loop
from mlx_vlm.models.diffusion_gemma import Model as PeerModel
from mlx_vlm.models.diffusion_gemma import language as peer_language

from benchmarks import common, models, roofline
from benchmarks.models import Arrays
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.generation import sampler, vocabulary
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.readers import read_json

STEPS, STEP = 48, 10  # a step in the middle of the schedule
SETTINGS = GenerationConfig()
PARTS = ("forward", "vocabulary", "cache", "step", "commit")  # commit last: it lengthens the prefix
CHIPS = ("M3 Pro", "M2 Ultra", "M5 Max, 40 cores")
PUBLISHED = {  # the forward's share of a step of the 26B model, as others measured it
    "M3 Pro, measured by diffgemma": (449 + 234) / (449 + 234 + 106),
    "M5 Max, measured by vmlx": 0.91,
}


# --------------------------------------------------------------------------------------------------------- the sides


class Ours:
    """Our step in the middle of a canvas."""

    def __init__(self, network: Network, prefix: Arrays, new: Arrays, commits: int):
        """`new`: what the canvas adds to each layer's keys and values. There is room for so many commits."""
        length, size = network.config.canvas_length, network.config.vocab_size
        self.network, self.cache, self.new = network, models.our_prefix(network, prefix, commits * length), new
        self.noise = SeededNoise([0], length=length, vocabulary=size)
        temperature = sampler.temperature(STEP, STEPS, t_min=0.4, t_max=0.8)
        self.shaping = vocabulary.Shaping(cap=30.0, temperature=temperature)
        self.canvas = self.noise.canvas(0)
        self.signal = mx.random.normal((1, length, network.config.hidden_size), key=mx.random.key(1))
        self.best = self.canvas
        self.hidden = self.forward()
        mx.eval(self.hidden, self.signal)

    def forward(self, signal: mx.array | None = None) -> mx.array:
        return self.network.denoise(self.canvas, self.cache, self.signal if signal is None else signal)

    def read(self, hidden: mx.array) -> list[Any]:
        sums = vocabulary.walk(hidden, self.network.decoder.embed_tokens, self.shaping, tuning=self.network.tuning)
        reading = sums.read(self.noise.draws(0, STEP))
        accepted = sampler.accept(reading.entropy, SETTINGS.entropy_bound)
        canvas = sampler.renoise(accepted, reading.guess, self.noise.ids(0, STEP))
        settled = sampler.settled(reading.best, [self.best], reading.entropy, stability=1, confidence=0.005)
        return [canvas, reading.signal, settled, reading.best]

    def look(self) -> None:
        for layer, (keys, values) in zip(self.cache.layers, self.new, strict=True):
            mx.eval(layer.look(keys, values))

    def step(self) -> None:
        outputs = self.read(self.forward())
        mx.eval(outputs)
        outputs[2].item()

    def commit(self) -> None:
        self.network.encode(self.canvas, self.cache)
        mx.eval(self.cache.state)

    def parts(self) -> dict[str, Callable[[], None]]:
        return {
            "forward": lambda: mx.eval(self.forward()),
            "vocabulary": lambda: mx.eval(self.read(self.hidden)),
            "cache": self.look,
            "step": self.step,
            "commit": self.commit,
        }


class Theirs:
    """mlx-vlm's step (generate/diffusion.py, entropy-bound branch), with its functions in its order."""

    def __init__(self, model: Any, prefix: Arrays, ours: Ours):
        self.model, self.signal, self.canvas, self.new = model, ours.signal, ours.canvas, ours.new
        self.cache = models.peer_prefix(model, prefix)
        self.masks = model.diffusion_decoder_masks(self.canvas, self.cache, None)
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

    def read(self, logits: mx.array) -> list[Any]:
        """Everything after the head: `logits` are softcapped."""
        processed = logits / sampler.temperature(STEP, STEPS, t_min=0.4, t_max=0.8)
        best = mx.argmax(processed, axis=-1).astype(mx.int32)
        guess = peer_loop._diffusion_sample_canvas(processed, mx.int32, 1.0)
        entropy = peer_loop._diffusion_token_entropy(processed)
        signal = self.model.diffusion_self_conditioning(processed, self.context)
        accepted = peer_loop._diffusion_entropy_transfer_mask(entropy, SETTINGS.entropy_bound)
        length, size = logits.shape[1:]
        random = peer_loop._diffusion_initialize_canvas(1, length, size, mx.int32)
        canvas = mx.where(accepted, mx.where(accepted, guess, self.canvas), random)
        stopping = {"stability_threshold": 1, "confidence_threshold": 0.005}
        peer_loop._diffusion_stable_and_confident(best, processed, [self.canvas], stopping)
        return [canvas, signal, best]

    def vocabulary(self) -> None:
        table = self.model.model.decoder.embed_tokens
        mx.eval(self.read(self.model._softcap(table.as_linear(self.hidden))))

    def look(self) -> None:
        """As its Attention does: the prefix, cut to the window, and the canvas in a new array."""
        for layer, cache, new in zip(self.model.layers, self.cache, self.new, strict=True):
            attention = layer.self_attn
            first = -(attention.config.sliding_window - 1) if attention.is_sliding else 0
            old: Any = peer_language._cache_state(cache)
            mx.eval([mx.concatenate([o[:, :, first:], n], axis=2) for o, n in zip(old, new, strict=True)])

    def step(self) -> None:
        mx.eval(self.read(self.logits(self.canvas, self.signal)))

    def commit(self) -> None:
        self.cache = self.model.diffusion_update_cache(self.canvas, cache=self.cache)
        mx.eval([c.state for c in self.cache])

    def parts(self) -> dict[str, Callable[[], None]]:
        return {
            "forward": lambda: mx.eval(self.forward()),
            "vocabulary": self.vocabulary,
            "cache": self.look,
            "step": self.step,
            "commit": self.commit,
        }


class Reference:
    """transformers' step: `DiffusionGemmaForBlockDiffusion._denoising_step`, float32."""

    def __init__(self, model: Any, prefix: Arrays, canvas: mx.array):
        import torch
        from transformers import DiffusionGemmaGenerationConfig, DynamicCache  # pyright: ignore

        from convert.record_reference import CACHE

        self.torch, self.model = torch, model
        self.length, self.canvas = prefix[0][0].shape[2], torch.from_numpy(np.array(canvas)).long()
        self.prefix = {CACHE: DynamicCache(config=model.config.get_text_config())}
        with torch.inference_mode():
            for number, arrays in enumerate(prefix):
                self.prefix[CACHE].update(*(torch.from_numpy(np.array(array)) for array in arrays), number)
            shape = (1, canvas.shape[1], model.config.text_config.vocab_size)
            self.logits = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        settings = DiffusionGemmaGenerationConfig(**models.generation_config(SETTINGS))
        self.own = {
            "sampler": model._prepare_sampler(settings),
            "logits_processor": model._prepare_logits_processor(settings),
            "diffusion_stopping_criteria": model._prepare_diffusion_stopping_criteria(settings),
        }
        self.hidden = self.forward()

    def forward(self) -> Any:
        with self.torch.inference_mode():
            decoder = self.model.model.decoder
            return decoder(decoder_input_ids=self.canvas, **self.prefix).last_hidden_state

    def step(self) -> None:
        end = self.length
        with self.torch.inference_mode():
            self.model._denoising_step(
                decoder_forward=self.model.forward,
                current_canvas=self.canvas,
                argmax_canvas=self.canvas,
                input_ids=self.torch.zeros((1, end), dtype=self.torch.long),
                decoder_position_ids=self.torch.arange(end, end + self.canvas.shape[1])[None],
                self_conditioning_logits=self.logits,
                mask_mapping={"full_attention": None, "sliding_attention": None},  # as it makes them without padding
                finished_denoising=self.torch.zeros(1, dtype=self.torch.bool),
                cur_step=STEPS - STEP,  # it counts the steps that remain
                **self.prefix,
                **self.own,
            )

    def parts(self) -> dict[str, Callable[[], Any]]:
        return {"forward": self.forward, "step": self.step}


# --------------------------------------------------------------------------------------------------------- measuring


def memory(part: Callable[[], Any]) -> int:
    """Bytes a part needs beyond what is held before it, as MLX counts them; 0 if it allocates nothing."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    part()
    return max(mx.get_peak_memory() - before, 0)


def resident_memory(part: Callable[[], Any]) -> int | None:
    """The same as the operating system counts them; None where it does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    part()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def compare(network: Network, model: PeerModel, reference: Any, prefix: int, runs: int) -> dict[str, Any]:
    """All sides at one prefix length, part by part. `reference` is transformers' model, or None."""
    arrays, new = (models.keys_and_values(network, length) for length in (prefix, network.config.canvas_length))
    ours = Ours(network, arrays, new, commits=runs + 2)
    theirs = Theirs(model, arrays, ours)
    sides: dict[str, Any] = {"ours": ours, "mlx-vlm": theirs}
    differences = {"mlx-vlm": mx.abs(ours.hidden - theirs.hidden).max().item()}
    if reference is not None:
        sides["transformers"] = their = Reference(reference, arrays, ours.canvas)
        unsignalled = network.denoise(ours.canvas, ours.cache, None)
        differences["transformers"] = float(np.abs(np.array(unsignalled) - their.hidden.numpy()).max())
    works = {side: work.parts() for side, work in sides.items()}
    parts = {name: measure({side: work[name] for side, work in works.items() if name in work}, runs) for name in PARTS}
    return {"prefix": prefix, "hidden_difference": differences, "parts": parts}


def measure(sides: dict[str, Callable[[], Any]], runs: int) -> dict[str, Any]:
    """Median seconds, bytes, and ours ÷ theirs of both."""
    seconds = {side: float(np.median(times)) for side, times in common.alternate(sides, runs).items()}
    counted = {side: (resident_memory if side == "transformers" else memory)(part) for side, part in sides.items()}
    others = [side for side in sides if side != "ours"]
    ratios = {
        side: {"seconds": _ratio(seconds["ours"], seconds[side]), "memory": _ratio(counted["ours"], counted[side])}
        for side in others
    }
    return {"seconds": seconds, "memory": counted, "ratio": ratios}


def _ratio(mine: float | None, other: float | None) -> float | None:
    return mine / other if other and mine is not None else None


# -------------------------------------------------------------------------------------------------------- projecting


def forward_shares(prefix: int) -> dict[str, float]:
    """The forward's share of a step of the 26B model in q4: published ones, and those of roofline.py's bounds."""
    released = ModelConfig.from_dict(read_json(roofline.RELEASED))
    parts = roofline.step(roofline.Model.of(released, "q4"), prefix=prefix)
    forward = [part for part in parts if part.name not in ("head", "signal")]
    chips = [roofline.Macs.read().chips[name] for name in CHIPS]
    bounds = {chip.name: roofline.bound(forward, chip) / roofline.bound(parts, chip) for chip in chips}
    return PUBLISHED | {f"{name}, least time": share for name, share in bounds.items()}


def projection(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The ratio to mlx-vlm that a whole step would have at 26B if each part's ratio were as measured here."""
    ratios = {part: result["parts"][part]["ratio"]["mlx-vlm"]["seconds"] for part in ("forward", "vocabulary")}
    return [
        {
            "machine": name,
            "prefix": result["prefix"],
            "forward_share": share,
            "ratio": share * ratios["forward"] + (1 - share) * ratios["vocabulary"],
        }
        for name, share in forward_shares(result["prefix"]).items()
    ]


# ----------------------------------------------------------------------------------------------------------- command


def rows(result: dict[str, Any], sides: Sequence[str]) -> list[list[object]]:
    """One row per part of one prefix: seconds and MB of every side, then the ratios."""
    table: list[list[object]] = []
    for name, part in result["parts"].items():
        seconds = [_shown(part["seconds"].get(side), 1, "s") for side in sides]
        counted = [_shown(part["memory"].get(side), 1e-6, "MB") for side in sides]
        ratios = [part["ratio"].get(side, {}) for side in sides[1:]]
        pairs = [_shown(ratio.get(what)) for ratio in ratios for what in ("seconds", "memory")]
        table.append([result["prefix"], name, *seconds, *counted, *pairs])
    return table


def _shown(value: float | None, scale: float = 1, unit: str = "") -> str:
    return "–" if value is None else f"{value * scale:.{3 if unit == 's' else 2 - (unit == 'MB')}f} {unit}".strip()


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    raw = models.config(options.hidden, options.layers, options.experts, options.vocabulary)
    network = models.our_network(raw)
    model, reference = models.peer_model(raw, network), None
    document: dict[str, Any] = {"benchmark": "step", "config": raw, "runs": options.runs}
    if options.transformers:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        document["torch_threads"] = torch.get_num_threads()
        reference = models.reference_model(raw, network)
    results = []
    for prefix in options.prefix:
        results.append(compare(network, model, reference, prefix, options.runs))
        parts = results[-1]["parts"].items()
        told = ", ".join(f"{name} {part['ratio']['mlx-vlm']['seconds']:.2f}" for name, part in parts)
        print(f"behind {prefix}, ours ÷ mlx-vlm: {told}", file=sys.stderr, flush=True)
    sides = ["ours", "mlx-vlm", *(["transformers"] if options.transformers else [])]
    ratios = [f"{what} ÷ {side}" for side in sides[1:] for what in ("time", "memory")]
    header = ["prefix", "part", *sides, *(f"{side}, memory" for side in sides), *ratios]
    common.report([row for result in results for row in rows(result, sides)], header)
    projections = [row for result in results for row in projection(result)]
    projected = [[p["machine"], p["prefix"], f"{p['forward_share']:.0%}", f"{p['ratio']:.2f}"] for p in projections]
    title = "Projected, not measured: ours ÷ mlx-vlm for a whole step at 26B, each part's ratio by its share"
    common.report(projected, ["share of the forward on", "prefix", "share", "ratio"], title)
    common.finish(common.provenance() | document | {"results": results, "projection": projections}, options.out)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[300, 4096, 16_384])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--transformers", action="store_true", help="transformers on the CPU as a third side")
    parser.add_argument("--out", type=Path, help="write the JSON document there as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
