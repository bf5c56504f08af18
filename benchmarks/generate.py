"""Whole generations: ours, mlx-vlm's and transformers', with the same weights and prompts, in one run.

    python -m benchmarks.generate                                    the built-in model, its own tasks
    python -m benchmarks.generate --model FOLDER --prompt "…"        another float checkpoint in the released dialect
    python -m benchmarks.generate --scaled 512 6 32 --max-steps 8    random weights at the real vocabulary: hidden
                                                                     size, layers, experts

mlx-vlm runs in its faithful setting: entropy-bound sampler, temperature 1, full canvas, every key of the generation
config. All three read ids and give ids: nobody makes text. The random draws differ, so the steps do: read tokens/s
beside steps a canvas. Runs alternate; figures are medians over runs, prompts taken together; ratios are ours ÷ theirs.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import common, models
from mlx_diffgemma.files import checkpoint, weights
from mlx_diffgemma.generation import engine, events
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.proof.recordings import small_network
from mlx_diffgemma.readers import read_json
from mlx_diffgemma.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Run:
    """One generation, or the sum of several. Seconds count from the call."""

    tokens: int  # without the stop id
    steps: int
    canvases: int
    seconds: float
    cpu_seconds: float = 0.0  # of this process: what else the machine does is not in it
    prefill: float
    first_sign: float  # until the caller gets anything of the canvas to look at
    first_canvas: float
    memory: int  # peak bytes beyond the weights; 0 where nobody counts them

    @classmethod
    def sum(cls, runs: Sequence["Run"]) -> "Run":
        """Several prompts together; memory is the largest."""
        total = {name: sum(getattr(run, name) for run in runs) for name in asdict(runs[0])}
        return cls(**total | {"memory": max(run.memory for run in runs)})


Side = Callable[[list[int], int], Run]  # ids and a seed → a generation


# --------------------------------------------------------------------------------------------------------- the sides


def ours(network: Network, settings: GenerationConfig) -> Side:
    length, vocabulary = network.config.canvas_length, network.config.vocab_size

    def generate(prompt: list[int], seed: int) -> Run:
        noise = SeededNoise([seed], length=length, vocabulary=vocabulary)
        before = mx.get_active_memory()
        begun, marks, committed = time.perf_counter(), {}, []
        for event in engine.generate(network, [prompt], settings, noise):
            now = time.perf_counter() - begun
            marks.setdefault(type(event), now)
            if isinstance(event, events.Prefilled):
                marks[events.Prefilled] = now
            elif isinstance(event, events.Committed):
                committed.append(event.rows[0])
        return Run(
            tokens=sum(len(row.ids) for row in committed),
            steps=sum(row.steps for row in committed),
            canvases=len(committed),
            seconds=marks[events.Finished],
            prefill=marks[events.Prefilled],
            first_sign=marks[events.Denoised],
            first_canvas=marks[events.Committed],
            memory=mx.get_peak_memory() - before,
        )

    return generate


class _Stops:
    """All that mlx-vlm needs of a tokenizer here: when to stop, and a detokenizer that makes no text."""

    last_segment = ""

    def __init__(self, ids: Sequence[int]):
        self.ids = set(ids)
        self.stopping_criteria, self.detokenizer = self, self

    def __call__(self, token: int) -> bool:
        return token in self.ids

    def add_eos_token_ids(self, ids: Sequence[int]) -> None:
        self.ids.update(ids)

    def reset(self) -> None: ...

    def finalize(self) -> None: ...

    def add_token(self, token: int, skip_special_token_ids: Sequence[int]) -> None: ...


def mlx_vlm(raw: dict[str, Any], network: Network, settings: GenerationConfig) -> Side:
    from mlx_vlm.generate.diffusion import stream_diffusion_generate

    model = models.peer_model(raw, network)
    model.config.generation_config = models.generation_config(settings)
    stops: Any = _Stops(settings.stop_ids)

    def generate(prompt: list[int], seed: int) -> Run:
        mx.random.seed(seed)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        begun, blocks, last = time.perf_counter(), [], None
        for result in stream_diffusion_generate(
            model,
            stops,
            stops,
            mx.array([prompt], mx.int32),
            None,
            None,
            max_tokens=settings.max_tokens,
            skip_special_token_ids=[],
            temperature=1.0,
            diffusion_full_canvas=True,
            diffusion_sampler="entropy-bound",
            prefill_step_size=settings.prefill_step_size,
        ):
            last = result
            if result.diffusion_block_complete:
                blocks.append(time.perf_counter() - begun)
        assert last is not None  # its last result has the reason it stopped
        return Run(
            tokens=last.generation_tokens - (last.finish_reason == "stop"),
            steps=last.diffusion_denoising_steps,
            canvases=len(blocks),
            seconds=time.perf_counter() - begun,
            prefill=last.prompt_tokens / last.prompt_tps,
            first_sign=blocks[0],
            first_canvas=blocks[0],
            memory=mx.get_peak_memory() - before,
        )

    return generate


def transformers(raw: dict[str, Any], network: Network, settings: GenerationConfig) -> Side:
    import torch
    from transformers import DiffusionGemmaGenerationConfig  # pyright: ignore[reportAttributeAccessIssue]

    if threads := os.environ.get("OPENBLAS_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # as many as MLX's products get
    model = models.reference_model(raw, network)
    config = DiffusionGemmaGenerationConfig(**models.generation_config(settings))
    marks: dict[str, list[float]] = {"encoder": [], "decoder": []}
    for name, times in marks.items():
        getattr(model.model, name).register_forward_pre_hook(lambda *_, times=times: times.append(time.perf_counter()))

    def generate(prompt: list[int], seed: int) -> Run:
        torch.manual_seed(seed)
        marks["encoder"].clear()
        marks["decoder"].clear()
        begun = time.perf_counter()
        output = model.generate(torch.tensor([prompt]), generation_config=config)
        end = time.perf_counter()
        ids = output.sequences[0, len(prompt) :].tolist()
        stop = next((i for i, token in enumerate(ids) if token in settings.stop_ids), len(ids))
        passes = [*marks["decoder"], *marks["encoder"][1:2], end]
        return Run(
            tokens=min(stop, settings.max_tokens),
            steps=len(marks["decoder"]),
            canvases=len(marks["encoder"]),
            seconds=end - begun,
            prefill=marks["decoder"][0] - begun,
            first_sign=passes[1] - begun,
            first_canvas=[*marks["encoder"], end][1] - begun,
            memory=0,
        )

    return generate


SIDES = {"mlx-vlm": mlx_vlm, "transformers": transformers}


# --------------------------------------------------------------------------------------------------------- comparing


def measure(sides: dict[str, Side], prompts: list[list[int]], runs: int) -> dict[str, list[Run]]:
    """Every side takes all prompts `runs` times, in turn, after a round that does not count; sums over prompts."""
    found: dict[str, list[Run]] = {name: [] for name in sides}

    def turn(name: str, side: Side) -> Callable[[], None]:
        return lambda: found[name].append(Run.sum([_worked(side, prompt, len(found[name])) for prompt in prompts]))

    common.alternate({name: turn(name, side) for name, side in sides.items()}, runs)
    return {name: every[1:] for name, every in found.items()}


def _worked(side: Side, prompt: list[int], seed: int) -> Run:
    begun = time.process_time()
    run = side(prompt, seed)
    return replace(run, cpu_seconds=time.process_time() - begun)


FIGURES: dict[str, Callable[[Run, int], float]] = {
    "tokens_per_second": lambda run, _: run.tokens / run.seconds,
    "steps_per_canvas": lambda run, _: run.steps / run.canvases,
    "seconds_per_step": lambda run, _: (run.seconds - run.prefill) / run.steps,  # commits included
    "cpu_seconds_per_step": lambda run, _: run.cpu_seconds / run.steps,  # prefill included
    "seconds_to_first_sign": lambda run, prompts: run.first_sign / prompts,
    "seconds_to_first_canvas": lambda run, prompts: run.first_canvas / prompts,
    "prefill_seconds": lambda run, prompts: run.prefill / prompts,
    "memory_megabytes": lambda run, _: run.memory / 1e6,
}


def summary(runs: dict[str, list[Run]], prompts: int) -> dict[str, dict[str, float]]:
    """Medians, by figure and side."""
    return {
        figure: {name: statistics.median(value(run, prompts) for run in every) for name, every in runs.items()}
        for figure, value in FIGURES.items()
    }


def rows(medians: dict[str, dict[str, float]]) -> Iterator[list[object]]:
    """A table of the medians, and ours ÷ theirs."""
    for figure, values in medians.items():
        mine = values["ours"]
        others = [name for name in values if name != "ours"]
        ratios = [f"{mine / values[name]:.2f}" if values[name] else "–" for name in others]
        yield [figure.replace("_", " "), *(f"{value:.4g}" if value else "–" for value in values.values()), *ratios]


# ----------------------------------------------------------------------------------------------------------- command


def load(options: argparse.Namespace) -> tuple[dict[str, Any], Network, GenerationConfig, list[list[int]]]:
    """config.json, our network, the generation config and the prompts as ids."""
    if options.scaled:
        raw = models.config(*options.scaled)
        network = small_network(config=raw, weights={"seed": 0, "branches": 0.1, "sharpness": 10.0})
        ids = np.random.default_rng(0).integers(0, network.config.vocab_size, options.prompt_tokens).tolist()
        return raw, network, GenerationConfig(), [ids]
    folder = options.model
    if not (folder / "config.json").exists():
        raise SystemExit(f"there is no checkpoint in {folder}: give one with --model, or --scaled.")
    tokenizer = Tokenizer.load(folder)
    settings = checkpoint.read_generation_config(folder)
    stop_ids = tuple(dict.fromkeys((*settings.stop_ids, *tokenizer.stop_ids)))
    messages = [[{"role": "user", "content": text}] for text in options.prompt or common.PROMPTS]
    prompts = [tokenizer.apply_chat_template(message) for message in messages]
    network = weights.load_network(folder)
    return read_json(folder / "config.json"), network, settings.replace(stop_ids=stop_ids), prompts


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    raw, network, settings, prompts = load(options)
    wanted = {"max_tokens": options.max_tokens, "max_denoising_steps": options.max_steps}
    settings = settings.replace(**{name: value for name, value in wanted.items() if value is not None})
    sides = {"ours": ours(network, settings)}
    sides |= {name: make(raw, network, settings) for name, make in SIDES.items() if name not in options.without}
    runs = measure(sides, prompts, options.runs)
    medians = summary(runs, len(prompts))
    header = ["figure", *sides, *(f"ours ÷ {name}" for name in sides if name != "ours")]
    model = "x".join(map(str, options.scaled)) if options.scaled else options.model.name
    title = f"{model}, {len(prompts)} prompts, medians of {options.runs} runs"
    common.report(list(rows(medians)), header, title)
    document = {
        "benchmark": "generate",
        "model": model,
        "config": raw,
        "settings": models.generation_config(settings),
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "medians": medians,
        "runs": {name: [asdict(run) for run in every] for name, every in runs.items()},
    }
    common.finish(common.provenance() | document, options.out)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=common.DEMO, help="a checkpoint folder (default: the built-in)")
    parser.add_argument("--prompt", action="append", help="may be repeated (default: the built-in model's five tasks)")
    parser.add_argument("--scaled", type=int, nargs=3, metavar=("HIDDEN", "LAYERS", "EXPERTS"), help="random weights")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of random ids, with --scaled")
    parser.add_argument("--max-tokens", type=int, help="default: the checkpoint's")
    parser.add_argument("--max-steps", type=int, help="steps a canvas at most (default: the checkpoint's)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--without", action="append", choices=list(SIDES), default=[], help="leave one out")
    parser.add_argument("--out", type=Path, help="write the JSON document there as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
