"""`mlx_diffgemma.bench`: the same prompts on every machine, one JSON file, and a table to compare two of them."""

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import launched
from .cli import command
from .disk import existing_file, new_file, replacing
from .errors import ConfigError, PromptError
from .options import Option, model_options, open_model
from .readers import read_json
from .values import Field, Table, anything, either, many, mapping, number, text

if TYPE_CHECKING:
    from .model.tuning import Tuning
    from .pipeline.model import DiffusionGemma

PASSAGE = (
    "A lighthouse keeper writes down the weather four times a day: the wind, the state of the sea, the height of the"
    " clouds and how far away the next headland can be seen. "
)
# name → (prompt, tokens wanted at most). The lengths are part of the benchmark: do not change them, add new ones.
PROMPTS = {
    "fact": ("What is the capital of France? Answer in one sentence.", 64),
    "prose": ("Write a short story about a lighthouse keeper who finds a message in a bottle.", 1024),
    "code": ("Write a Python function that merges two sorted lists, with a docstring and three tests.", 512),
    "long": (PASSAGE * 90 + "\n\nWhat does the keeper write down, and how often? Answer in one sentence.", 64),
}
SEED = 1234
PREFIXES = (300, 8_192, 32_768)  # tokens behind which --steps takes a step to pieces
WITHOUT = {  # exact ideas that can be left out for comparison, and what takes their place
    "tiles": "all of the vocabulary's logits at once",
    "streams": "the tiles on one CPU stream; nothing changes on a GPU",
    "sparse-signal": "the signal's full product for every position",
    "in-place": "the prefix copied in front of the canvas's keys and values in every layer",
    "pieces": "attention over the whole prefix at once, under whole masks",
    "sorted-experts": "the experts' rows in the order of the tokens",
}
WAITED = 0.1  # share of the time that computing may wait before the disk is called the limit
FIGURES = {  # key → what it is called in a table
    "seconds_to_first_canvas": "first text, s",
    "prefill_tokens_per_second": "prefill, tokens/s",
    "steps_per_canvas": "steps a canvas",
    "seconds_per_step": "a step, s",
    "tokens_per_second": "tokens/s",
    "peak_memory_bytes": "peak, GB",
}


@command("bench", machines="share")
@model_options
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs of each prompt.")
@click.option("--only", type=click.Choice(list(PROMPTS)), multiple=True, help="Run this prompt; may be repeated.")
@click.option(
    "--without", type=click.Choice(list(WITHOUT)), multiple=True, help="Leave out an exact idea; may be repeated."
)
@click.option("--output", metavar="FILE", default="bench.json", show_default=True, help="Where the figures go.")
@click.option("--steps", is_flag=True, help="Take a step to pieces too: parts, limits, products, one after a pause.")
@click.option("--pause", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds, for --steps.")
@click.option(
    "--decodings", is_flag=True, cls=Option, section="Both decodings", help="Answer the prompts token by token as well."
)
@click.option(
    "--image",
    type=click.Choice(["70", "140", "280", "560", "1120"]),
    cls=Option,
    section="Pictures",
    help="See a picture of so many soft tokens as well: time and memory of the vision tower.",
)
@click.option("--report", metavar="FILE", help="Measure nothing: print a file of figures as a text for an issue.")
@click.option("--compare", nargs=2, metavar="A.json B.json", help="Measure nothing: print two files side by side.")
def main(
    source: dict[str, Any],
    repeat: int,
    only: tuple[str, ...],
    without: tuple[str, ...],
    output: str,
    steps: bool,
    pause: float,
    decodings: bool,
    image: str | None,
    report: str | None,
    compare: tuple[str, str] | None,
) -> None:
    """Measure generation on this machine, by the reference algorithm and fixed seeds; medians of the runs."""
    if compare:
        _table(*(_read(file) for file in compare), names=compare)
        return
    if report is not None:
        _read(report, "--report")
        click.echo(as_text(read_json(existing_file(report, "--report"), fault=ConfigError)))
        return
    if launched.size() > 1 and (steps or without):
        raise ConfigError("--steps and --without measure one machine: start them without mlx.launch.")
    target = new_file(output, "--output")
    begun = time.perf_counter()
    loaded = open_model(source)
    from .proof.machine import machine

    about = machine() | describe(loaded, source.get("model")) | {"load_seconds": time.perf_counter() - begun}
    found: dict[str, Any] = {}
    seen = None if image is None else see(loaded, source, int(image), repeat)  # not every pack can
    leave_out(loaded, without)
    prompts = PROMPTS if only or "model" in source else own_prompts()
    by_token: dict[str, Any] = {}
    for name in only or prompts:
        click.echo(f"{name}: {(repeat + 1) * (1 + decodings)} runs …", err=True)
        try:
            runs = repeated(loaded, *prompts[name], repeat)
            found[name] = medians(runs)
            if decodings:
                other = repeated(loaded, *prompts[name], repeat, decoding="autoregressive", greedy=True)
                by_token[name] = medians(other) | {"agreement": agreement(runs, other)}
        except PromptError as error:  # a prompt longer than a small model's context
            found[name] = {"left_out": str(error)}
    figures: dict[str, Any] = about | memory() | {"without": list(without), "prompts": found}
    if decodings:
        figures["autoregressive"] = by_token
    if loaded.network.experts.streamed:
        figures["streaming"] = streaming(loaded, found)
    if loaded.network.tuning.share.size > 1:
        figures["sharing"] = sharing(loaded)
    figures |= limits(figures)
    if seen is not None:
        figures["picture"] = seen
    if steps:
        from .pipeline.machine.speeds import speeds

        figures |= {"steps": take_apart(loaded, pause), "products": speeds(loaded.network)}
    with replacing(target, "w") as stream:
        stream.write(json.dumps(figures, indent=1) + "\n")
    if decodings:
        _table(figures, figures | {"prompts": by_token}, names=("diffusion", "token by token, greedy"))
        click.echo("\n".join(f"{name}: {run['agreement']:.0%} of the tokens alike" for name, run in by_token.items()))
    else:
        _table(figures)
    if steps:
        click.echo("\n".join(_steps_as_text(figures)))
    if told := _reach_as_text(figures):
        click.echo("\n".join(told))
    if seen is not None:
        click.echo(_picture_as_text(seen))
    click.echo(f"Written to {output}. To compare: mlx_diffgemma.bench --compare {output} OTHER.json")


def memory() -> dict[str, Any]:
    """What MLX holds now, what it held at most, what Metal keeps wired, and what MLX says about the device."""
    import mlx.core as mx

    from .model import wiring

    return {
        "active_bytes": mx.get_active_memory(),
        "cached_bytes": mx.get_cache_memory(),
        "peak_bytes": mx.get_peak_memory(),
        "wired_bytes": wiring.wired(),
        "device_info": {name: value for name, value in mx.device_info().items() if isinstance(value, int | str)},
    }


def streaming(model: "DiffusionGemma", prompts: dict[str, Any]) -> dict[str, Any]:
    """What the reader read since the model was loaded and how fast, and how long the counted runs waited for it."""
    experts = model.network.experts
    runs = [run for prompt in prompts.values() for run in prompt.get("runs", ())]
    seconds = sum(run["prefill_seconds"] + run["denoise_seconds"] + run["commit_seconds"] for run in runs)
    waited = sum(run["waited_seconds"] for run in runs) / max(seconds, 1e-9)
    return {
        "layers": len(experts.streamed),
        "bytes_a_pass": experts.bytes_a_pass,
        "bytes_per_second": experts.traffic.nbytes / max(experts.traffic.read_seconds, 1e-9),
        "waited": waited,  # a share of the time
    }


def _streaming_as_text(told: dict[str, Any]) -> str:
    return (
        f"Streamed: the experts of {told['layers']} layers, {told['bytes_a_pass'] / 1e9:.3g} GB a pass at"
        f" {told['bytes_per_second'] / 1e9:.3g} GB/s; {told['waited']:.0%} of the time computing waited for them."
    )


def sharing(model: "DiffusionGemma") -> dict[str, Any]:
    """What a step exchanges, how fast the link is, and how long that takes."""
    from .model.memory import weight_bytes
    from .model.sharing.ranks import Leader
    from .model.table import unpacked_dtype
    from .pipeline.machine import link

    share, config = model.network.tuning.share, model.config
    assert isinstance(share, Leader)
    size = unpacked_dtype(model.network.decoder.embed_tokens).size
    step = link.of_step(config, share.size, item_size=size) + link.messages(config, config.canvas_length, size)
    speed = share.measure()
    return {
        "machines": share.size,
        "weight_bytes": weight_bytes(model.network),  # of this one
        "exchanges_a_step": step.count,
        "bytes_a_step": step.nbytes,
        "wait_seconds": speed.wait,
        "bytes_per_second": speed.bytes_per_second,
        "seconds_a_step": step.count * speed.wait + step.nbytes / speed.bytes_per_second,
    }


def _sharing_as_text(told: dict[str, Any]) -> str:
    return (
        f"{told['machines']} machines, {told['weight_bytes'] / 1e9:.3g} GB of weights on this one. A step exchanges"
        f" {told['bytes_a_step'] / 1e6:.3g} MB in {told['exchanges_a_step']} exchanges; the link sends"
        f" {told['bytes_per_second'] / 1e9:.3g} GB/s and takes {told['wait_seconds'] * 1e3:.2g} ms for the least."
    )


def limits(figures: dict[str, Any]) -> dict[str, Any]:
    """Of a model that is streamed or shared: seconds of a step for each of three. The disk reads while the others work;
    computing and the link wait for one another."""
    taken = [run["seconds_per_step"] for prompt in figures["prompts"].values() for run in prompt.get("runs", ())]
    streamed, shared = figures.get("streaming"), figures.get("sharing")
    if not taken or not (streamed or shared):
        return {}
    step, waited = statistics.median(taken), streamed["waited"] if streamed else 0.0
    link = shared["seconds_a_step"] if shared else 0.0
    disk = streamed["bytes_a_pass"] / max(streamed["bytes_per_second"], 1e-9) if streamed else 0.0
    computing = max(step * (1 - waited) - link, 0.0)
    limit = "the disk" if waited > WAITED else "the link" if link > computing else "computing"
    return {"limits": {"step": step, "computing": computing, "disk": disk, "link": link, "limit": limit}}


def _reach_as_text(figures: dict[str, Any]) -> list[str]:
    """A line each of streaming and of sharing, and one that says which of three is the limit."""
    told = [_streaming_as_text(figures["streaming"])] if "streaming" in figures else []
    told += [_sharing_as_text(figures["sharing"])] if "sharing" in figures else []
    if limits := figures.get("limits"):
        step, computing, disk, link = (_figure(1e3 * limits[key]) for key in ("step", "computing", "disk", "link"))
        told.append(
            f"A step takes {step} ms: computing {computing}, the disk {disk}, the link {link}; the limit is"
            f" {limits['limit']}."
        )
    return told


def see(model: "DiffusionGemma", source: dict[str, Any], budget: int, repeat: int) -> dict[str, Any]:
    """What a picture costs. Errors: ConfigError for a pack without a vision tower."""
    from .files.eyes import load_eyes
    from .pipeline.machine.measuring import looking

    eyes = load_eyes(model.folder or Path(), model.config, ignore_keys=source.get("ignore_key", ()))
    return looking(eyes, budget, repeat)


def _picture_as_text(told: dict[str, Any]) -> str:
    wide, high = told["size"]
    tower, looked, estimated = (told[f"{key}_bytes"] / 1e9 for key in ("tower", "looking", "estimated"))
    return (
        f"A picture, scaled to {wide} × {high}, {told['tokens']} tokens of {told['budget']}:"
        f" {told['tower_seconds']:.3g} s to see it, {told['scaling_seconds']:.2g} s to scale it; {tower:.3g} GB of"
        f" tower and {looked:.3g} GB to look (estimated: {estimated:.3g})."
    )


def take_apart(model: "DiffusionGemma", pause: float) -> list[dict[str, Any]]:
    """A step behind each of PREFIXES that fits; the pause comes once."""
    from .model.memory import memory_needed, weight_bytes
    from .pipeline.machine.measuring import anatomy

    config, weights = model.config, weight_bytes(model.network)
    limit = config.max_position_embeddings - config.canvas_length
    lengths = sorted({min(prefix, limit) for prefix in PREFIXES})
    fitting = [n for n in lengths if memory_needed(config, weights, n) <= model.memory_limit]
    return [anatomy(model.network, prefix, pause if prefix == fitting[0] else 0.0) for prefix in fitting]


def _step_as_text(step: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in step["parts"].items())
    limits = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in step["limits"].items())
    named = (("typical", "a step"), ("first", "the first"), ("twentieth", "the twentieth"))
    taken = ", ".join(f"{word} {1e3 * step[key]:.4g}" for key, word in named)
    return (
        f"Behind {step['prefix']} tokens, ms: {taken},"
        f" one after {step['pause']:.0f} s {1e3 * step['after_a_pause']:.4g}\n"
        f"  parts, each waited for: {parts}\n"
        f"  at least: {limits}; a step is {step['times_the_limit']:.1f} × its limit, {step['limit']};"
        f" {step['kernels']} kernels"
    )


def _steps_as_text(figures: dict[str, Any]) -> list[str]:
    """What --steps found, a line or three a prefix, then one a product; nothing without it."""
    products = [
        f"{found['product']} ({found['kernel']}, {found['rows']} rows):"
        f" {found['teraflops']:.3g} TFLOP/s, {found['gigabytes']:.3g} GB/s of weights"
        for found in figures.get("products", ())
    ]
    return [*map(_step_as_text, figures.get("steps", ())), *products]


def as_text(figures: dict[str, Any]) -> str:
    """A file of figures as Markdown, to be pasted into an issue."""
    about = ("chip", "system", "mlx", "mlx_diffgemma", "device", "model", "recipe", "tuning", "weight_bytes")
    about += ("wired_bytes", "active_bytes", "cached_bytes", "peak_bytes", "load_seconds", "device_info")
    lines = [f"- {name}: {figures[name]}" for name in about if name in figures]
    lines += ["", "| prompt | " + " | ".join(FIGURES.values()) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for name, run in figures["prompts"].items():
        if "left_out" not in run:
            scaled = [run[key] * (1e-9 if key.endswith("_bytes") else 1) for key in FIGURES]
            lines.append(f"| {name} | " + " | ".join(f"{value:.3g}" for value in scaled) + " |")
    lines += ["", *reach] if (reach := _reach_as_text(figures)) else []
    lines += ["", _picture_as_text(figures["picture"])] if "picture" in figures else []
    lines += ["", *_steps_as_text(figures)]
    return "\n".join(lines).strip()


def own_prompts() -> dict[str, tuple[str, int]]:
    """What the built-in model can answer; it says nothing to the others."""
    from .terminal.scenes import TASKS

    return {task.name: (task.prompt, 96) for task in TASKS}


def leave_out(model: "DiffusionGemma", without: tuple[str, ...]) -> None:
    """Have a model work without these ideas of WITHOUT. The same tokens come out."""
    model.network.tuning = plain_tuning(model.network.tuning, without)
    if "sparse-signal" in without:
        model.generation_config = model.generation_config.replace(sparse_signal=False)


def plain_tuning(tuning: "Tuning", without: tuple[str, ...]) -> "Tuning":
    """The tuning that leaves out these ideas of WITHOUT; the sparse signal is an option of a run instead."""
    many = 1 << 62
    changes: dict[str, dict[str, Any]] = {
        "tiles": {"tile": many},
        "streams": {"streams": 1},
        "sparse-signal": {},
        "in-place": {"write_in_place": False},
        "pieces": {"scores": many, "skip_hidden_keys": False},
        "sorted-experts": {"sort_from": many},
    }
    return replace(tuning, **{field: value for name in without for field, value in changes[name].items()})


Run = tuple[dict[str, Any], tuple[int, ...]]  # figures, and the answer's ids


def repeated(model: "DiffusionGemma", prompt: str, tokens: int, repeat: int, **options: Any) -> list[Run]:
    """`repeat` runs, after one that is not counted."""
    return [_run(model, prompt, tokens, SEED + i, options) for i in range(-1, repeat)][1:]


def medians(runs: list[Run]) -> dict[str, Any]:
    """Medians over the runs; the figures of every run are kept beside them."""
    told = [figures for figures, _ in runs]
    return {key: statistics.median(figures[key] for figures in told) for key in FIGURES} | {"runs": told}


def agreement(runs: list[Run], others: list[Run]) -> float:
    """Share of tokens alike, in the same order, 0 … 1: twice the matching ones ÷ those of both; the mean over runs."""
    pairs = zip(runs, others, strict=True)
    return statistics.mean(SequenceMatcher(None, a, b, autojunk=False).ratio() for (_, a), (_, b) in pairs)


def _run(model: "DiffusionGemma", prompt: str, tokens: int, seed: int, options: dict[str, Any]) -> Run:
    import mlx.core as mx

    from .generation.events import Committed, Finished
    from .pipeline.results import statistics_json

    mx.reset_peak_memory()
    begun, first, result = time.perf_counter(), 0.0, None
    for event in model.stream(prompt, seed=seed, max_tokens=tokens, **options):
        if isinstance(event, Committed):
            first = first or time.perf_counter() - begun
        elif isinstance(event, Finished):
            result = event.result
    assert result is not None  # the last event is Finished
    told = statistics_json(result.statistics)
    figures = told | {
        "seed": seed,
        "seconds": time.perf_counter() - begun,
        "seconds_to_first_canvas": first,
        "prefill_tokens_per_second": told["prompt_tokens"] / max(told["prefill_seconds"], 1e-9),
        "steps_per_canvas": statistics.mean(canvas.steps for canvas in result.canvases),
        "canvases": [{"steps": canvas.steps, "settled": canvas.settled} for canvas in result.canvases],
    }
    return figures, result.tokens


def describe(model: "DiffusionGemma", name: str | None) -> dict[str, Any]:
    """Which weights: name, recipe (the default packing, if packed), parameters and their bytes."""
    from .model.memory import weight_bytes
    from .model.network import leaves

    arrays = list(leaves(model.network.parameters()).values())
    packing = model.config.quantization or {}
    recipe = {key: packing[key] for key in ("bits", "group_size", "mode") if key in packing}
    return {
        "model": Path(name).name if name else "built-in",
        "recipe": recipe or str(arrays[0].dtype).removeprefix("mlx.core."),
        "weight_bytes": weight_bytes(model.network),
        "canvas_length": model.config.canvas_length,
        "tuning": model.network.tuning.fingerprint,
        "notices": list(model.notices),
    }


_RUN = Table(*(Field(key, number(least=0), None) for key in FIGURES), Field("left_out", text(), None), open=True)
_REPORT = Table(
    Field("chip", text()),
    Field("model", text()),
    Field("recipe", either(text(), mapping(anything))),
    Field("without", many(text()), ()),
    Field("prompts", mapping(_RUN.kind)),
    open=True,
)


def _read(file: str, option: str = "--compare") -> dict[str, Any]:
    """A file that this command wrote. Errors: ConfigError."""
    path = existing_file(file, option)
    return _REPORT.read(read_json(path, fault=ConfigError), f"{option} {file}")


def _table(*reports: dict[str, Any], names: tuple[str, ...] = ("",)) -> None:
    """One row a prompt and figure, one column a report, and with two reports the second divided by the first."""
    from rich.table import Table as Shown

    from .terminal.console import console

    table = Shown("prompt", "figure")
    for report, name in zip(reports, names, strict=True):
        left_out = "".join(f"\nwithout {idea}" for idea in report.get("without", ()))
        title = f"{name}\n{report['chip']}\n{report['model']} {report['recipe']}{left_out}"
        table.add_column(title.strip(), justify="right")
    if len(reports) == 2:
        table.add_column("B / A", justify="right")
    for row in _rows(reports):
        table.add_row(*row)
    console().print(table)


def _rows(reports: tuple[dict[str, Any], ...]) -> Iterator[list[str]]:
    for name in reports[0]["prompts"]:
        runs = [report["prompts"].get(name, {}) for report in reports]
        if all(run.get("left_out") for run in runs):
            yield [name, "left out: too long"]
            continue
        for key, title in FIGURES.items():
            values = [run.get(key) for run in runs]
            scale = 1e-9 if key.endswith("_bytes") else 1
            cells = ["–" if not value else _figure(value * scale) for value in values]
            if len(values) == 2:
                cells.append("–" if None in values or not values[0] else f"{values[1] / values[0]:.2f}")
            yield [name if key == next(iter(FIGURES)) else "", title, *cells]


def _figure(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
