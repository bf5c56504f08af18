"""A thousand generations in one process: do memory and step time stay what they were?

    python -m benchmarks.soak                               1,000 generations of the built-in model
    python -m benchmarks.soak --model FOLDER --runs 200 --window 50
    python -m benchmarks.soak --stream-experts 4 --runs 500

Every generation has its own seed and one of the prompts in turn. Compared are medians over the first and the last
`--window` generations. Exit status 1 if memory grew: MLX's live arrays, MLX's cache of freed buffers, or the process
as a whole, each by more than `--allow` MB; or if there are more open files or threads. Step time is reported, in
processor time too: that one does not depend on what else the machine does.
"""

import argparse
import gc
import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_diffgemma
from benchmarks import common
from mlx_diffgemma.pipeline.model import DiffusionGemma, Prompt


@dataclass(frozen=True, kw_only=True)
class Sample:
    """After one generation."""

    seconds: float
    seconds_per_step: float
    cpu_seconds_per_step: float  # of this process: what else the machine does is not in it
    steps: int
    tokens: int
    live_bytes: int  # MLX's arrays
    cached_bytes: int  # freed buffers that MLX keeps
    resident_bytes: int  # the whole process
    objects: int  # that Python's collector tracks
    handles: int  # open files
    threads: int


COUNTS = ("handles", "threads")
MEMORY = ("live_bytes", "cached_bytes", "resident_bytes")


def run(model: DiffusionGemma, prompts: Sequence[Prompt], runs: int, **options: Any) -> list[Sample]:
    """`runs` generations, the prompts in turn, with seeds 0, 1, …"""
    samples = []
    for i in range(runs):
        begun, worked = time.perf_counter(), time.process_time()
        result = model.generate(prompts[i % len(prompts)], seed=i, **options)
        seconds, worked = time.perf_counter() - begun, time.process_time() - worked
        assert not isinstance(result, list)  # one prompt, one result
        samples.append(
            Sample(
                seconds=seconds,
                seconds_per_step=result.statistics.seconds_per_step,
                cpu_seconds_per_step=worked / result.statistics.steps,
                steps=result.statistics.steps,
                tokens=len(result.tokens),
                live_bytes=mx.get_active_memory(),
                cached_bytes=mx.get_cache_memory(),
                resident_bytes=common.resident_bytes(),
                objects=len(gc.get_objects()),
                handles=len(os.listdir("/dev/fd")),
                threads=threading.active_count(),
            )
        )
    return samples


def compare(samples: Sequence[Sample], window: int) -> dict[str, dict[str, float]]:
    """Medians over the first and last `window` samples, by field."""
    parts = {"first": samples[:window], "last": samples[-window:]}
    return {
        field: {name: statistics.median(getattr(s, field) for s in part) for name, part in parts.items()}
        for field in Sample.__dataclass_fields__
    }


def grown(medians: dict[str, dict[str, float]], allowed: int) -> list[str]:
    """What the last window holds more of than the first: memory by more than `allowed` bytes, open files, threads."""
    most = dict.fromkeys(MEMORY, allowed) | dict.fromkeys(COUNTS, 0)
    return [field for field, least in most.items() if medians[field]["last"] - medians[field]["first"] > least]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = _options(arguments)
    model = mlx_diffgemma.load(options.model, stream_experts=options.stream_experts)
    prompts = options.prompt or common.PROMPTS
    wanted = {"max_tokens": options.max_tokens, "max_denoising_steps": options.max_steps}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    begun = time.perf_counter()
    samples = run(model, prompts, options.runs, **wanted)
    medians = compare(samples, options.window)
    faults = grown(medians, options.allow << 20)
    rows = [[field.replace("_", " "), *map(_show, both.values()), _show_ratio(both)] for field, both in medians.items()]
    header = ["median of a generation", f"first {options.window}", f"last {options.window}", "last ÷ first"]
    common.report(rows, header, f"{options.runs} generations in {time.perf_counter() - begun:.0f} s")
    verdict = f"grown: {', '.join(faults)}" if faults else "nothing grew"
    print(verdict, "", sep="\n")
    document = {"benchmark": "soak", "model": options.model.name, "runs": options.runs, "window": options.window}
    document |= {"options": wanted, "medians": medians, "allowed_megabytes": options.allow, "grown": faults}
    common.finish(common.provenance() | document, options.out)
    return 1 if faults else 0


def _show(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _show_ratio(both: dict[str, float]) -> str:
    return f"{both['last'] / both['first']:.3f}" if both["first"] else "–"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=common.DEMO, help="a checkpoint folder (default: the built-in)")
    parser.add_argument("--stream-experts", type=int, metavar="N", help="read the experts of N layers in every pass")
    parser.add_argument("--prompt", action="append", help="may be repeated (default: four tasks of the built-in model)")
    parser.add_argument("--runs", type=int, default=1000, help="generations")
    parser.add_argument("--window", type=int, default=100, help="how many at either end are compared")
    parser.add_argument("--max-tokens", type=int, help="default: the checkpoint's")
    parser.add_argument("--max-steps", type=int, help="steps a canvas at most (default: the checkpoint's)")
    parser.add_argument("--allow", type=int, default=8, metavar="MB", help="growth that is no growth")
    parser.add_argument("--out", type=Path, help="write the JSON document there as well")
    options = parser.parse_args(arguments)
    if options.runs < 2 * options.window:
        parser.error(f"--runs {options.runs} is less than two windows of {options.window}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
