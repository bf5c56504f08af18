"""Experts that pass through memory, measured: what a slow disk costs, and how much memory the real size takes.

    python -m benchmarks.streamed speeds              a reader held to several speeds: the larger, not the sum
    python -m benchmarks.streamed memory --dtype float32    the released sizes in q4, files of zeros, three limits
    python -m benchmarks.streamed memory --limits 5         at one, as the pack is on a Mac
    python -m benchmarks.streamed memory --dtype float32 --layers 6 --canvas 256 --limits 3.6 4.1 5

`speeds`: a random model of 12 layers in q4. The reader sleeps until what it has read would have come at a speed;
runs of each speed and from memory take turns, and figures are medians. Reading is the bytes of a run ÷ that speed.
`memory`: `mlx_diffgemma.generate --canvas-length 16 --max-denoising-steps 1 --memory-limit GB` on a pack of the
released names and shapes, sparse files that take no room on the disk; in memory their pages are like others.
Each run is a process of its own that may not have more private memory than `--allowed` times its limit (RLIMIT_DATA),
less than the pack is large. Its peak is what wait4 says, MLX and Python included; foretold is what `load` reckons with,
model/memory.py. A run takes two minutes of a CPU with `--dtype float32`, eighteen without. Exit status 1 when one
fails or takes more than its limit.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import common
from mlx_diffgemma import load
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.files import checkpoint, layout, reading
from mlx_diffgemma.files.folder import INDEX
from mlx_diffgemma.model.memory import memory_needed
from mlx_diffgemma.packing import plan
from mlx_diffgemma.packing.conversion import convert, plan_conversion
from mlx_diffgemma.packing.recipes import Recipe, load_recipe
from mlx_diffgemma.pipeline.machine.fitting import Sizes, streamed_layers

UNITS = (0.25, 0.5, 1.0, 2.0, 4.0)  # seconds of reading for one of computing
STEPS, CANVAS = 3, 32


# ------------------------------------------------------------------------------------------------------- the speeds


@dataclass
class Slow:
    """Files of a disk that reads so many bytes a second."""

    files: reading.Files
    speed: float

    def read(self, rows: reading.Rows, target: np.ndarray) -> None:
        begun = time.perf_counter()
        self.files.read(rows, target)
        time.sleep(max(begun + target.nbytes / self.speed - time.perf_counter(), 0))

    def check(self) -> None:
        self.files.check()


def small_pack(folder: Path) -> Path:
    """12 layers with most of their weights in experts."""
    from benchmarks.models import config
    from tests import synthetic

    text = config(512, 12, 32, 4096)["text_config"] | {"head_dim": 64, "global_head_dim": 64}
    whole = synthetic.small_config(**text) | {"canvas_length": CANVAS}
    source = synthetic.small(folder / "source", config=whole, dtype="F32", limit=1 << 40)
    recipe = replace(load_recipe("q4"), dtype="float32")  # what a CPU is quick at
    convert(plan_conversion(checkpoint.open_checkpoint(source), recipe), folder / "pack")
    return folder / "pack"


def speeds(runs: int, units: Sequence[float]) -> None:
    """Seconds of runs whose reading takes so many times as long as their computing."""
    with TemporaryDirectory() as folder:
        pack = small_pack(Path(folder))
        resident, streamed = load(pack, stream_experts=0), load(pack, stream_experts=12)
        experts: Any = streamed.network.experts
        files, options = experts._files, {"seed": 1, "max_tokens": CANVAS}
        options |= {"max_denoising_steps": STEPS, "confidence_threshold": 0.0}
        nbytes = (STEPS + 1) * experts.bytes_a_pass  # the prompt, and each step

        def run(model: Any, speed: float = 0.0) -> float:
            experts._files = Slow(files, speed) if speed else files
            for slot in experts._slots:
                slot.wait()
            begun = time.perf_counter()
            model.generate(list(range(3, 27)), **options)
            return time.perf_counter() - begun

        run(resident), run(streamed)
        computing = statistics.median(run(resident) for _ in range(3))
        chosen = [nbytes / (computing * unit) for unit in units]
        taken: dict[float, list[float]] = {0.0: [], **{speed: [] for speed in chosen}}
        for _ in range(runs):
            taken[0.0].append(run(resident))
            for speed in chosen:
                taken[speed].append(run(streamed, speed))
        computing, rows = statistics.median(taken[0.0]), []
        for speed in chosen:
            seconds, read = statistics.median(taken[speed]), nbytes / speed
            ratios = f"{seconds / max(computing, read):.2f}", f"{seconds / (computing + read):.2f}"
            rows.append([f"{speed / 1e9:.3f}", f"{computing:.2f}", f"{read:.2f}", f"{seconds:.2f}", *ratios])
        header = ["GB/s", "computing, s", "reading, s", "streamed run, s", "÷ the larger", "÷ the sum"]
        common.report(rows, header, f"{STEPS} steps, {nbytes / 1e9:.2f} GB read, medians of {runs} runs")


# ------------------------------------------------------------------------------------------------------- the memory


def pack_of_zeros(folder: Path, recipe: Recipe, layers: int) -> Sizes:
    """The released model's first layers by a recipe, as sparse files, with a tokenizer of a few tokens."""
    from benchmarks.roofline import RELEASED
    from tests import small

    raw = json.loads(RELEASED.read_bytes())
    kinds = raw["text_config"]["layer_types"][:layers]
    raw["text_config"] |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    config = ModelConfig.from_dict(raw)
    planned = plan.plan(recipe, layout.sources(config))
    shards = plan.lay_out(planned)
    for shard in shards:
        with (folder / shard.name).open("wb") as stream:
            stream.write(shard.header)
            stream.truncate(shard.size)
    where = {name: shard.name for shard in shards for name in shard.slots}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    block = plan.quantization_block(recipe, planned)
    (folder / "config.json").write_text(json.dumps(raw | {"quantization": block, "dtype": recipe.dtype}))
    small.write_tokenizer(folder)
    return Sizes.planned(config, planned)


def memory(limits: Sequence[float], allowed: float, recipe: Recipe, layers: int, asked: Sequence[str]) -> bool:
    """Peaks of runs at so many GB; whether all ended well and stayed below."""
    rows, good = [], True
    with TemporaryDirectory() as name:
        folder = Path(name)
        sizes = pack_of_zeros(folder, recipe, layers)
        config = checkpoint.read_config(folder)
        for limit in limits:
            count = streamed_layers(config, sizes, int(limit * 1e9))
            status, seconds, peak, told = measured(folder, asked, limit, allowed)
            good &= not status and peak <= limit * 1e9
            keys = ("prompt_tokens", "steps", "peak_memory_bytes")
            prompt, steps, arrays = (told.get("statistics", {}).get(key, 0) for key in keys)
            foretold = memory_needed(config, sizes.held(count), prompt)
            figures = f"{foretold / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{peak / foretold:.2f}", f"{seconds:.0f}"
            rows.append(
                [f"{limit:g}", f"{limit * allowed:.2f}", count, prompt, *figures, f"{arrays / 1e9:.2f}", steps, status]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    header = ["limit, GB", "RLIMIT_DATA, GB", "layers streamed", "prompt", "foretold, GB", "peak, GB", "÷ foretold"]
    weights = (sizes.trunk + sum(sizes.layers)) / 1e9
    common.report(
        rows, [*header, "s", "of it arrays, GB", "steps", "status"], f"{recipe.name}, {weights:.1f} GB of weights"
    )
    return good


def measured(
    folder: Path, asked: Sequence[str], limit: float, allowed: float
) -> tuple[int, float, int, dict[str, Any]]:
    """Exit status, seconds and peak of a run of the command, and what it printed."""
    command = [sys.executable, "-m", "mlx_diffgemma.generate", "--model", str(folder), "--json", *asked]
    command += ["--memory-limit", f"{limit:g}", "--max-denoising-steps", "1"]
    data = int(limit * allowed * 1e9)
    begun = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (data, data)),
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds = time.perf_counter() - begun
    return process.returncode, seconds, peak, json.loads(said) if said else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speeds", "memory"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--units", type=float, nargs="+", default=UNITS, help="seconds of reading for one of computing")
    parser.add_argument("--limits", type=float, nargs="+", default=(5.0, 9.0, 13.0), metavar="GB")
    parser.add_argument("--allowed", type=float, default=1.1, metavar="TIMES", help="RLIMIT_DATA, in units of a limit")
    parser.add_argument("--recipe", default="q4")
    parser.add_argument("--layers", type=int, default=30, help="the first so many")
    parser.add_argument("--canvas", type=int, default=16, help="tokens")
    parser.add_argument("--letters", type=int, default=4, help="of the prompt, each a token")
    parser.add_argument("--dtype", help="of what is not packed (default: the recipe's; a CPU is quicker at float32)")
    options = parser.parse_args(arguments)
    if options.what == "speeds":
        speeds(options.runs, options.units)
        return 0
    recipe = load_recipe(options.recipe)
    recipe = replace(recipe, dtype=options.dtype or recipe.dtype)
    asked = ["--prompt", "a" * options.letters, "--canvas-length", str(options.canvas)]
    asked += ["--max-tokens", str(options.canvas)]
    return 0 if memory(options.limits, options.allowed, recipe, options.layers, asked) else 1


if __name__ == "__main__":
    raise SystemExit(main())
