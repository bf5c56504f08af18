"""The least a step can cost: arithmetic and bytes from a config and a recipe, time from a chip's compute and bandwidth.

    python -m benchmarks.roofline                           all tables, for the released model in q4
    python -m benchmarks.roofline --recipe q8 --prefix 32768
    python -m benchmarks.roofline --tflops 989 --bandwidth 4800      another machine than a Mac

README has a shorter table of Macs (benchmarks/readme.py writes it).
The bound of a part is the larger of arithmetic ÷ peak and bytes ÷ bandwidth, the bound of a step their sum: each part
needs the result of the one before it. It is a bound, not a forecast. What published programs reach of it, the
*efficiency*, is fitted on one measurement per class of GPU and checked on all others (macs.toml); forecasts that use
it say so. Nothing here was measured by this project.
"""

import argparse
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from mlx_diffgemma.config import LayerConfig, ModelConfig
from mlx_diffgemma.files import layout
from mlx_diffgemma.model.memory import SYSTEM, memory_needed
from mlx_diffgemma.packing import plan
from mlx_diffgemma.packing.recipes import load_recipe, recipe_names
from mlx_diffgemma.readers import read_json

RELEASED = common.ROOT / "tests" / "data" / "released" / "config.json"
MACS = Path(__file__).with_name("macs.toml")
ITEM = 2  # bytes of a key, a value, an activation
CHUNK = 2048  # prompt tokens read at a time
BY_QUALITY = ("q8", "q6", "q4")  # more bits settle in fewer steps; bf16 was never found better than q8
PROMPT = 8192  # tokens of the prompt whose cost is shown
TABLE_PREFIX = 32_768  # what the table of Macs leaves room for
STARTS = 0.003  # seconds a token beside its bytes, on any Mac: a thousand small kernels; chosen by eye on macs.toml
PROMISED, PROMISED_STEP = 18_000_000_000, 300_000_000  # the launch's 18 GB; bytes beside weights and prefix


# ---------------------------------------------------------------------------------------------- arithmetic and bytes


@dataclass(frozen=True, kw_only=True)
class Part:
    """Products of one kind: floating-point operations, and bytes that must come from memory at least once."""

    name: str
    flops: float
    nbytes: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """A config and a recipe: parameters and stored bytes per component, without vision."""

    config: ModelConfig
    recipe: str
    sizes: dict[str, plan.Size]

    @classmethod
    def of(cls, config: ModelConfig, recipe: str) -> "Model":
        """What the converter would make of the config with a recipe of this name (or TOML file)."""
        chosen = load_recipe(recipe)
        sizes = plan.sizes(chosen, plan.plan(chosen, layout.sources(config)))
        return cls(config=config, recipe=recipe, sizes={k: size for k, size in sizes.items() if k != "vision"})

    @property
    def weight_bytes(self) -> int:
        return sum(size.nbytes for size in self.sizes.values())


def step(model: Model, *, canvas: int | None = None, prefix: int = 0) -> list[Part]:
    """One denoising step over `canvas` positions (default: the model's) behind `prefix` tokens."""
    rows = canvas or model.config.canvas_length
    table = model.sizes["embedding"]
    product = {"flops": 2.0 * rows * table.parameters, "nbytes": float(table.nbytes)}
    return [
        *_layers(model, rows, prefix, causal=False),
        _dense("self-conditioning", model.sizes["self-conditioning"], rows),
        Part(name="head", **product),
        Part(name="signal", **product),
    ]


def token(model: Model, prefix: int = 0) -> list[Part]:
    """One token of autoregressive decoding: the causal pass over one position, and the head."""
    table = model.sizes["embedding"]
    return [*_layers(model, 1, prefix, causal=True), _dense("head", table, 1)]


def encode(model: Model, tokens: int, prefix: int = 0) -> list[Part]:
    """The causal pass over `tokens` behind `prefix`: a commit, or a piece of a prompt."""
    return _layers(model, tokens, prefix, causal=True)


def prefill(model: Model, tokens: int) -> list[Part]:
    """Reading a prompt, in pieces of CHUNK tokens."""
    starts = range(0, tokens, CHUNK)
    return [part for start in starts for part in encode(model, min(CHUNK, tokens - start), start)]


def _layers(model: Model, rows: int, prefix: int, *, causal: bool) -> list[Part]:
    config, experts = model.config, model.sizes["experts"]
    chosen = config.top_k_experts / config.num_experts
    touched = 1 - (1 - chosen) ** rows  # share of the experts that some row picks, if all are picked alike
    return [
        Part(name="experts", flops=2 * rows * experts.parameters * chosen, nbytes=experts.nbytes * touched),
        _dense("attention projections", model.sizes["attention"], rows),
        _attention(config, rows, prefix, causal=causal),
        _dense("dense MLP", model.sizes["dense MLP"], rows),
        _dense("router", model.sizes["router"], rows),
    ]


def _dense(name: str, size: plan.Size, rows: int) -> Part:
    return Part(name=name, flops=2.0 * rows * size.parameters, nbytes=float(size.nbytes))


def _attention(config: ModelConfig, rows: int, prefix: int, *, causal: bool) -> Part:
    """Scores and their product with the values; keys and values are read once and the new ones written."""
    flops, nbytes = 0.0, 0.0
    for layer in config.layers:
        held = _held(config, layer, prefix)
        seen = held + rows
        pairs = rows * seen - (rows * (rows - 1) // 2 if causal else 0)
        if causal and layer.is_sliding:
            pairs = sum(min(prefix + i + 1, config.sliding_window) for i in range(rows))
        flops += 4.0 * config.num_attention_heads * layer.head_dim * pairs
        nbytes += _per_token(layer) * (seen + rows)
    return Part(name="attention", flops=flops, nbytes=nbytes)


def _held(config: ModelConfig, layer: LayerConfig, prefix: int) -> int:
    """Prefix positions that a layer keeps: all, or the last window − 1."""
    return min(prefix, config.sliding_window - 1) if layer.is_sliding else prefix


def _per_token(layer: LayerConfig) -> int:
    """Bytes of one position's key and value."""
    return 2 * layer.num_kv_heads * layer.head_dim * ITEM


# -------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A GPU: peak of a 16-bit matrix product, and memory bandwidth. `efficiency` is empty where none was fitted."""

    name: str
    tflops: float
    bandwidth: float  # GB/s
    memory: tuple[int, ...] = ()  # GB it is sold with
    calibration: str = ""

    def seconds(self, part: Part) -> float:
        """The least a part takes."""
        return max(part.flops / (self.tflops * 1e12), part.nbytes / (self.bandwidth * 1e9))

    def limit(self, part: Part) -> str:
        """What holds the part back."""
        compute = part.flops / (self.tflops * 1e12) >= part.nbytes / (self.bandwidth * 1e9)
        return "compute" if compute else "memory"


def bound(parts: Iterable[Part], chip: Chip) -> float:
    """The least seconds that parts take one after another."""
    return sum(chip.seconds(part) for part in parts)


def answer_seconds(model: Model, chip: Chip, *, steps: float, canvases: float = 1, prefix: int = 1024) -> float:
    """The least seconds from the first step to the last: all steps, and a commit between two canvases."""
    commit = bound(encode(model, model.config.canvas_length, prefix), chip)
    return steps * bound(step(model, prefix=prefix), chip) + (canvases - 1) * commit


def tokens_per_second(model: Model, chip: Chip, steps: float, *, prefix: int = 1024) -> float:
    """The most full canvases can give, at so many steps each; every canvas is committed."""
    commit = bound(encode(model, model.config.canvas_length, prefix), chip)
    return model.config.canvas_length / (steps * bound(step(model, prefix=prefix), chip) + commit)


def break_even(seconds_per_step: float, seconds_per_commit: float, seconds_per_token: float, canvas: int) -> float:
    """Steps at which a full canvas takes as long as its tokens one by one; with fewer the canvas is faster."""
    return (canvas * seconds_per_token - seconds_per_commit) / seconds_per_step


# -------------------------------------------------------------------------------------------------------------- Macs


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A figure somebody published: seconds a step, tokens a second of an answer, of a prompt, or token by token."""

    chip: str
    software: str
    recipe: str
    kind: str
    value: float
    source: str
    canvas: int = 256
    tokens: int = 0
    steps: int = 0
    canvases: int = 1
    fitted: bool = False

    def workload(self) -> str:
        if self.kind == "step":
            return f"step, canvas {self.canvas}"
        if self.kind == "prefill":
            return f"prompt of {self.tokens}"
        if self.kind == "token":
            return "token by token"
        return f"{self.tokens} tokens, {self.steps} steps"

    def bound(self, model: Model, chip: Chip) -> float:
        """The same figure at the bound; more is slower for a step, faster for the rates."""
        if self.kind == "step":
            return bound(step(model, canvas=self.canvas, prefix=256), chip)
        if self.kind == "prefill":
            return self.tokens / bound(prefill(model, self.tokens), chip)
        if self.kind == "token":
            return 1 / bound(token(model, prefix=256), chip)
        return self.tokens / answer_seconds(model, chip, steps=self.steps, canvases=self.canvases, prefix=256)

    def share(self, model: Model, chip: Chip) -> float:
        """How much of the bound was reached, 0 … 1; of a token without the start of its kernels."""
        limit = self.bound(model, chip)
        if self.kind == "token":
            return 1 / limit / (1 / self.value - STARTS)
        return limit / self.value if self.kind == "step" else self.value / limit

    def forecast(self, model: Model, chip: Chip, efficiency: float) -> float:
        """The figure at a given efficiency."""
        limit = self.bound(model, chip)
        if self.kind == "token":
            return 1 / (1 / limit / efficiency + STARTS)
        return limit / efficiency if self.kind == "step" else limit * efficiency


@dataclass(frozen=True, kw_only=True)
class Macs:
    """macs.toml."""

    chips: dict[str, Chip]
    measurements: tuple[Measurement, ...]

    @classmethod
    def read(cls, file: Path = MACS) -> "Macs":
        values = tomllib.loads(file.read_text(encoding="utf-8"))
        per_core = {g["name"]: g["tflops_per_core"] for g in values["generation"]}
        classes = {g: c["name"] for c in values["calibration"] for g in c["generations"]}
        chips = {}
        for chip in values["chip"]:
            generation = chip["name"].replace(",", "").split()[0]
            chips[chip["name"]] = Chip(
                name=chip["name"],
                tflops=round(chip["cores"] * per_core[generation], 2),
                bandwidth=chip["bandwidth"],
                memory=tuple(chip["memory"]),
                calibration=classes[generation],
            )
        return cls(chips=chips, measurements=tuple(Measurement(**m) for m in values["measurement"]))

    def efficiencies(self, models: dict[str, Model], *, tokens: bool = False) -> dict[str, float]:
        """Per class of GPU, the share of the bound that its fitted measurement reached: by canvases, or by `tokens`,
        where memory is the limit and not the products."""
        fitted = (m for m in self.measurements if m.fitted and (m.kind == "token") == tokens)
        return {self.chips[m.chip].calibration: m.share(models[m.recipe], self.chips[m.chip]) for m in fitted}


def lent(memory: int) -> tuple[float, int]:
    """Bytes that Metal lends one process on a Mac with so many GB: as it comes, and with iogpu.wired_limit_mb raised.

    As it comes: two thirds of up to 36 GB, three quarters of more. Logged by Metal itself: 10,923 MiB of 16 GB
    (abetlen/llama-cpp-python issue 687), 21,845 MiB of 32 GB (ggml-org/llama.cpp pull request 2011), 96 GB of 128;
    macOS 26 lends more, 107.5 GiB of 128 (antirez/ds4 pull request 893). Raised: all but 4 GiB, as in model/memory.py.
    """
    nbytes = memory << 30
    return nbytes * (2 / 3 if memory <= 36 else 3 / 4), nbytes - SYSTEM


def choose(memory: int, needs: dict[str, int]) -> str | None:
    """The best recipe that fits a Mac with so many GB; starred if only a raised limit makes room, else None."""
    usual, raised = lent(memory)
    fitting = [name for name in BY_QUALITY if needs[name] <= usual]
    starred = [f"{name}*" for name in BY_QUALITY if needs[name] <= raised]
    return next(iter(fitting + starred), None)


# ------------------------------------------------------------------------------------------------------------ tables


def parts_table(model: Model, chip: Chip, prefix: int) -> list[list[object]]:
    """One row per part of a step, then the step, a commit and a prompt."""
    parts, commit = step(model, prefix=prefix), encode(model, model.config.canvas_length, prefix)
    rows = [[*_row(part.name, [part], chip), chip.limit(part)] for part in parts]
    whole = {"a step": parts, "a commit": commit, f"a prompt of {PROMPT:,} tokens": prefill(model, PROMPT)}
    return rows + [[*_row(name, every, chip), ""] for name, every in whole.items()]


def _row(name: str, parts: Sequence[Part], chip: Chip) -> list[object]:
    flops, nbytes = sum(part.flops for part in parts), sum(part.nbytes for part in parts)
    return [name, f"{flops / 1e12:.3f}", f"{nbytes / 1e9:.2f}", f"{1e3 * bound(parts, chip):.1f}"]


def memory_terms(model: Model, prefix: int, step_bytes: int) -> dict[str, int]:
    """What must be in memory to denoise behind a prefix: bytes by what they are for."""
    config = model.config
    kinds = {
        "full": [c for c in config.layers if not c.is_sliding],
        "sliding": [c for c in config.layers if c.is_sliding],
    }
    terms = {f"weights: {name}": size.nbytes for name, size in model.sizes.items()}
    for kind, layers in kinds.items():
        held = sum(_per_token(layer) * _held(config, layer, prefix) for layer in layers)
        terms[f"keys and values: prefix, {len(layers)} {kind} layers"] = held
    terms["keys and values: canvas"] = sum(_per_token(layer) for layer in config.layers) * config.canvas_length
    return terms | {"arrays of one step": step_bytes}


def check(macs: Macs, models: dict[str, Model]) -> list[dict[str, Any]]:
    """Every published measurement with its bound, its forecast at the fitted efficiency, and the forecast's error."""
    efficiencies = {tokens: macs.efficiencies(models, tokens=tokens) for tokens in (False, True)}
    documents = []
    for m in macs.measurements:
        chip, model = macs.chips[m.chip], models[m.recipe]
        forecast = m.forecast(model, chip, efficiencies[m.kind == "token"][chip.calibration])
        figures = {"bound": m.bound(model, chip), "forecast": forecast, "reached": m.share(model, chip)}
        documents.append(asdict(m) | figures | {"workload": m.workload(), "error": forecast / m.value - 1})
    return documents


CHECK_HEADER = ["chip", "software", "recipe", "workload", "published", "bound", "forecast", "reached", "error"]


def check_table(checks: list[dict[str, Any]]) -> list[list[object]]:
    """One row per measurement."""
    rows: list[list[object]] = []
    for c in checks:
        form = "{:.3f} s" if c["kind"] == "step" else "{:.1f} tok/s"
        figures = [form.format(c[key]) for key in ("value", "bound", "forecast")]
        verdict = "fitted" if c["fitted"] else f"{c['error']:+.0%}"
        rows.append([c["chip"], c["software"], c["recipe"], c["workload"], *figures, f"{c['reached']:.0%}", verdict])
    return rows


MAC_HEADER = ["Mac", "GPU", "memory: recipe", "ms a step: least, likely", "likely tok/s: 24, 12 steps"]


def mac_table(macs: Macs, models: dict[str, Model], prefix: int) -> list[list[object]]:
    """Per chip: the recipe for each memory, and the speed of the best of them behind 1,024 tokens."""
    efficiencies = macs.efficiencies(models)
    needs = {name: memory_needed(models[name].config, models[name].weight_bytes, prefix) for name in BY_QUALITY}
    rows: list[list[object]] = []
    for chip in macs.chips.values():
        picks = {memory: choose(memory, needs) for memory in chip.memory}
        best = next((pick.rstrip("*") for pick in reversed(picks.values()) if pick), None)
        speed = ["–", "–"] if best is None else _speed(models[best], chip, efficiencies[chip.calibration])
        gpu = f"{chip.tflops:.1f} TFLOP/s, {chip.bandwidth:.0f} GB/s"
        recipes = " · ".join(f"{memory} GB: {pick or '–'}" for memory, pick in picks.items())
        rows.append([chip.name, gpu, recipes, *speed])
    return rows


def _speed(model: Model, chip: Chip, efficiency: float) -> list[str]:
    least = 1e3 * bound(step(model, prefix=1024), chip)
    rates = [tokens_per_second(model, chip, steps) * efficiency for steps in (24, 12)]
    return [f"{model.recipe}: {least:.0f}, {least / efficiency:.0f}", f"{rates[0]:.0f}, {rates[1]:.0f}"]


README_MACS = (  # chip, and GB of memory
    ("M1 Max", 64),
    ("M2 Pro", 32),
    ("M2 Ultra", 64),
    ("M3 Pro", 36),
    ("M3 Max, 40 cores", 64),
    ("M3 Ultra", 96),
    ("M4", 32),
    ("M4 Pro", 48),
    ("M4 Max, 40 cores", 64),
    ("M5", 32),
    ("M5 Pro", 48),
    ("M5 Max, 40 cores", 64),
)
README_HEADER = [
    "Mac",
    "memory",
    "recipe",
    "canvas: s a step",
    "tokens/s",
    "token by token: tokens/s",
    "canvas pays below",
]
README_STEPS = (15, 12)  # of a canvas, as is typical


def readme_rows(macs: Macs, models: dict[str, Model]) -> list[list[object]]:
    """The short table of Macs: what fits as macOS comes (`*`: after raising the limit), and both decodings' likely
    speeds."""
    needs = {n: memory_needed(models[n].config, models[n].weight_bytes, TABLE_PREFIX) for n in BY_QUALITY}
    efficiencies, by_token = macs.efficiencies(models), macs.efficiencies(models, tokens=True)
    rows: list[list[object]] = []
    for name, memory in README_MACS:
        chip, recipe = macs.chips[name], choose(memory, needs) or ""
        likely = Likely.of(models[recipe.rstrip("*")], chip, efficiencies, by_token)
        slow, fast = (likely.tokens_per_second(steps) for steps in README_STEPS)
        speeds = [f"{likely.step:.2f}", f"{slow:.0f} – {fast:.0f}", f"{1 / likely.token:.0f}"]
        rows.append([name, f"{memory} GB", f"`{recipe}`", *speeds, f"{likely.break_even:.0f} steps"])
    return rows


@dataclass(frozen=True, kw_only=True)
class Likely:
    """Seconds that a model likely takes on a chip behind 1,024 tokens, by the efficiencies of the chip's class."""

    step: float
    commit: float
    token: float
    canvas: int  # tokens

    @classmethod
    def of(cls, model: Model, chip: Chip, efficiencies: dict[str, float], by_token: dict[str, float]) -> "Likely":
        efficiency, length = efficiencies[chip.calibration], model.config.canvas_length
        return cls(
            step=bound(step(model, prefix=1024), chip) / efficiency,
            commit=bound(encode(model, length, 1024), chip) / efficiency,
            token=bound(token(model, prefix=1024), chip) / by_token[chip.calibration] + STARTS,
            canvas=length,
        )

    def tokens_per_second(self, steps: float) -> float:
        """Of full canvases, all of them committed."""
        return self.canvas / (steps * self.step + self.commit)

    @property
    def break_even(self) -> float:
        return break_even(self.step, self.commit, self.token, self.canvas)


PUBLISHED_HEADER = ["chip", "recipe", "tokens/s", "s a step", "break-even: published", "forecast"]


def break_even_table(macs: Macs, models: dict[str, Model]) -> list[list[object]]:
    """Where both decodings were published for a chip, with as many bits: the break-even, and its forecast.
    The commits were not published; the likely ones stand in for them."""
    efficiencies, by_token = macs.efficiencies(models), macs.efficiencies(models, tokens=True)
    rows: list[list[object]] = []
    steps = [m for m in macs.measurements if m.kind == "step" and m.canvas == 256]
    for a, b in ((a, b) for a in steps for b in macs.measurements if b.kind == "token"):
        if a.chip == b.chip and _bits(a.recipe) == _bits(b.recipe):
            likely = Likely.of(models[a.recipe], macs.chips[a.chip], efficiencies, by_token)
            told = break_even(a.value, likely.commit, 1 / b.value, likely.canvas)
            rows.append([a.chip, a.recipe, b.value, a.value, f"{told:.1f}", f"{likely.break_even:.1f}"])
    return rows


def _bits(recipe: str) -> int:
    """Of an expert's weight."""
    base = load_recipe(recipe).base
    return base.bits if base else 8 * ITEM


def readme_section() -> str:
    """The short table of Macs with the words it needs."""
    macs, released = Macs.read(), ModelConfig.from_dict(read_json(RELEASED))
    names = dict.fromkeys((*BY_QUALITY, *(m.recipe for m in macs.measurements)))
    models = {name: Model.of(released, name) for name in names}
    errors = sorted(abs(c["error"]) for c in check(macs, models) if not c["fitted"])
    few, many = sorted(README_STEPS)
    note = (
        f"The most bits that fit with {TABLE_PREFIX // 1024}K tokens of context (`*`: after raising the limit). Both"
        " ways to write with the same weights: a\n"
        f"canvas of 256 tokens at a time, here at {few} to {many} steps each, and token by token. A full canvas is"
        " the faster one while it settles in fewer\n"
        "steps than the last column says; an answer that fills a part of it, in as much fewer. A model of arithmetic"
        f" and bandwidth, checked against\n{len(errors)} published measurements (median error"
        f" {errors[len(errors) // 2]:.0%}), not measured here: `python -m benchmarks.roofline`. Speeds token"
        " by token\nhave a constant that was chosen by eye on four of these."
    )
    return f"{common.table(readme_rows(macs, models), README_HEADER)}\n\n{note}"


# ----------------------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    config = ModelConfig.from_dict(read_json(options.config))
    macs = Macs.read()
    names = dict.fromkeys((options.recipe, *BY_QUALITY, *(m.recipe for m in macs.measurements)))
    models = {name: Model.of(config, name) for name in names}
    chip = macs.chips[options.chip]
    if options.tflops:
        chip = Chip(name="as given", tflops=options.tflops, bandwidth=options.bandwidth)
    limits = _report_step(models[options.recipe], chip, options.prefix)
    terms = _report_promise(models["q4"])
    checks = check(macs, models)
    common.report(check_table(checks), CHECK_HEADER, "Published measurements, the bound, and forecasts")
    common.report(break_even_table(macs, models), PUBLISHED_HEADER, "Below so many steps a full canvas is faster")
    common.report(mac_table(macs, models, TABLE_PREFIX), MAC_HEADER, "Which recipe for which Mac")
    document = {"limits": limits, "memory": terms, "efficiency": macs.efficiencies(models), "checks": checks}
    document["efficiency_by_token"] = macs.efficiencies(models, tokens=True)
    common.finish(common.provenance() | document, options.out)


def _report_step(model: Model, chip: Chip, prefix: int) -> dict[str, Any]:
    """Print what a step, a commit and a prompt cost at least; the same as a document."""
    canvas = model.config.canvas_length
    title = f"Behind {prefix} tokens, {model.recipe}, on {chip.name} ({chip.tflops:g} TFLOP/s, {chip.bandwidth:g} GB/s)"
    common.report(parts_table(model, chip, prefix), ["part", "TFLOP", "GB", "least ms", "held back by"], title)
    rates = {steps: tokens_per_second(model, chip, steps, prefix=prefix) for steps in (12, 24, 48)}
    print(
        "At most",
        ", ".join(f"{rate:.0f} tokens/s at {steps} steps a canvas" for steps, rate in rates.items()),
        end="\n\n",
    )
    parts, commit = step(model, prefix=prefix), encode(model, canvas, prefix)
    return {
        "recipe": model.recipe,
        "chip": asdict(chip),
        "prefix": prefix,
        "step": [asdict(part) for part in parts],
        "commit": [asdict(part) for part in commit],
        "seconds_per_step": bound(parts, chip),
        "seconds_per_commit": bound(commit, chip),
        "tokens_per_second_by_steps": rates,
        "prefill_tokens_per_second": PROMPT / bound(prefill(model, PROMPT), chip),
    }


def _report_promise(model: Model) -> dict[str, int]:
    """Print the sum that must stay below the 18 GB of the model's launch; its terms."""
    terms = memory_terms(model, TABLE_PREFIX, PROMISED_STEP)
    total = sum(terms.values())
    free = PROMISED - total
    rows = [[name, f"{nbytes:,}"] for name, nbytes in (terms | {"sum": total, "of 18 GB stay free": free}).items()]
    common.report(rows, [f"{model.recipe} behind {TABLE_PREFIX:,} tokens", "bytes"], "The promised 18 GB")
    return terms


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=RELEASED, help="a config.json (default: the released one)")
    parser.add_argument("--recipe", default="q4", help=f"{', '.join(recipe_names())}, or a TOML file")
    parser.add_argument(
        "--chip", default="M3 Pro", choices=list(Macs.read().chips), metavar="CHIP", help="as in macs.toml"
    )
    parser.add_argument("--tflops", type=float, help="peak of another machine; needs --bandwidth")
    parser.add_argument("--bandwidth", type=float, help="its memory bandwidth, GB/s")
    parser.add_argument("--prefix", type=int, default=1024, help="tokens before the canvas")
    parser.add_argument("--out", type=Path, help="write the JSON document there as well")
    options = parser.parse_args(arguments)
    if (options.tflops is None) != (options.bandwidth is None):
        parser.error("--tflops and --bandwidth belong together")
    return options


if __name__ == "__main__":
    main()
