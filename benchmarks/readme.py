"""Write the generated tables anew, each between its markers in a page of docs/ or benchmarks/README.md.

    python -m benchmarks.readme

    recipes   what each recipe makes of the released shapes: computed
    macs      the most bits that fit a Mac: computed
    roofline  which recipe for which Mac, and how fast either decoding may be: computed (benchmarks/roofline.py)
    reach     how fast small Macs may be when experts are streamed: computed (benchmarks/reach.py)
    pairs     how fast two Macs may be that share the model: computed there, too
    step      our step beside mlx-vlm's: from benchmarks/results/step.json; empty while there is no such file
    quality   what each recipe keeps of the built-in model: likewise from recipes.json
    ideas     what each exact idea brings: likewise from ideas.json

tests/test_readme.py holds the files to them.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import common, ideas, reach, roofline
from benchmarks import recipes as measured_recipes
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.files import layout
from mlx_diffgemma.model import memory
from mlx_diffgemma.packing import plan
from mlx_diffgemma.packing.recipes import load_recipe
from mlx_diffgemma.readers import read_json

RESULTS = Path(__file__).with_name("results")
RECIPES = ("q8", "q6", "q4-bf16", "q4", "mxfp4", "q3", "q2")
PREFIXES = (4096, 131_072)  # that a Mac must have room for
PLACES = {
    common.ROOT / "docs" / "getting-started.md": ("macs",),
    common.ROOT / "docs" / "conversion.md": ("recipes",),
    common.ROOT / "docs" / "reach.md": ("reach", "pairs"),
    common.ROOT / "docs" / "measured.md": ("step", "quality"),
    common.ROOT / "README.md": ("roofline",),
    common.ROOT / "benchmarks" / "README.md": ("ideas",),
}


def blocks(results: Path = RESULTS) -> dict[str, str]:
    """What belongs between the markers, by name."""
    measured = {"step": ("step.json", step), "quality": ("recipes.json", quality), "ideas": ("ideas.json", idea_table)}
    made = {
        name: write(read_json(results / file)) if (results / file).exists() else ""
        for name, (file, write) in measured.items()
    }
    return {"macs": macs(), "recipes": recipes(), "roofline": _roofline(), "reach": _reach(), "pairs": _pairs(), **made}


@cache
def _roofline() -> str:
    return roofline.readme_section() + "\n"


@cache
def _reach() -> str:
    return reach.table() + "\n"


@cache
def _pairs() -> str:
    return reach.pairs() + "\n"


def place(text: str, name: str) -> tuple[int, int]:
    """Where the block `name` begins and ends in a text. Errors: SystemExit when it has no place there."""
    begin = re.search(rf"^<!-- {name}: begin.*?-->\n", text, re.MULTILINE)
    end = text.find(f"<!-- {name}: end -->")
    if begin is None or end < begin.end():
        raise SystemExit(f"There is no place for the table: add <!-- {name}: begin --> and <!-- {name}: end -->.")
    return begin.end(), end


def written(text: str, tables: dict[str, str]) -> str:
    """A text with the blocks in their places."""
    for name, table in tables.items():
        begin, end = place(text, name)
        text = text[:begin] + table + text[end:]
    return text


# ------------------------------------------------------------------------------------------------------------ tables


@cache
def recipes() -> str:
    """What each recipe makes of the released shapes, and the smallest Mac for 4K and 128K tokens of prefix."""
    rows = [
        "| recipe | experts | the rest | GB | bits a weight | Mac, 4K prefix | Mac, 128K prefix |",
        "|---" * 7 + "|",
    ]
    config = _released()
    for name in RECIPES:
        sizes = plan.sizes(recipe := load_recipe(name), plan.plan(recipe, layout.sources(config)))
        whole = plan.Size.sum(sizes.values())
        macs = [_macs(memory.memory_needed(config, _text_bytes(sizes), prefix)) for prefix in PREFIXES]
        label = f"`{name}`" + " (default)" * (name == "q4") + " (experimental)" * recipe.experimental
        figures = (f"{whole.nbytes / 1e9:.1f}", f"{whole.bits_per_weight:.1f}")
        rows.append(f"| {' | '.join((label, sizes['experts'].packing, sizes['attention'].packing, *figures, *macs))} |")
    return "\n".join(rows) + "\n"


@cache
def macs() -> str:
    """For each memory of a Mac the most bits that fit, as it comes and with a raised limit, and how much prefix."""
    config = _released()
    planned = {name: plan.plan(load_recipe(name), layout.sources(config)) for name in RECIPES}
    nbytes = {name: _text_bytes(plan.sizes(load_recipe(name), tensors)) for name, tensors in planned.items()}
    rows = ["| Mac | with 4K tokens of context | with 32K | with 128K |", "|---" * 4 + "|"]
    for mac in (mac for mac in memory.MACS if mac <= 48):
        cells = []
        for prefix in (4096, 32_768, 131_072):
            fits = {name: memory.smallest_macs(memory.memory_needed(config, nbytes[name], prefix)) for name in RECIPES}
            normal, raised = (next((n for n in RECIPES if (fits[n][i] or 1 << 30) <= mac), None) for i in (0, 1))
            more = f" (`{raised}`)" if raised and raised != normal else ""
            cells.append((f"`{normal}`" if normal else "–") + more)
        rows.append(f"| {mac} GB | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _released() -> ModelConfig:
    return ModelConfig.from_dict(read_json(roofline.RELEASED))


def _text_bytes(sizes: dict[str, plan.Size]) -> int:
    """Bytes of all that the text network loads."""
    return plan.Size.sum(sizes.values()).nbytes - sizes["vision"].nbytes


def _macs(needed: int) -> str:
    normal, raised = memory.smallest_macs(needed)
    return f"{normal} GB" + (f" ({raised} GB)" if raised and raised != normal else "")


def step(document: dict[str, Any]) -> str:
    """Time and memory of each part of a step, ours ÷ the peers', from a document of benchmarks/step.py."""
    results = document["results"]
    sides = list(results[0]["hidden_difference"])
    rows = []
    for name, part in results[0]["parts"].items():
        for side in (side for side in sides if side in part["ratio"]):
            cells = [_pair(result["parts"][name]["ratio"][side]) for result in results]
            rows.append([name if side == "mlx-vlm" else f"{name}, against {side}", *cells])
    header = ["part", *(f"prefix {result['prefix']:,}" for result in results)]
    return f"{common.table(rows, header)}\n\n{_step_notes(document)}\n"


def _pair(ratio: dict[str, float | None]) -> str:
    return " / ".join("–" if value is None else f"{value:.2f}" for value in (ratio["seconds"], ratio["memory"]))


def _step_notes(document: dict[str, Any]) -> str:
    versions, machine, text = document["versions"], document["machine"], document["config"]["text_config"]
    shares = [row["forward_share"] for row in document["projection"]]
    ratios = [row["ratio"] for row in document["projection"]]
    source = f"MLX {versions['mlx']} on {machine['cores']} cores of {machine['processor']}, {document['date'][:10]}"
    return (
        f"Ours ÷ mlx-vlm {versions['mlx-vlm']} in its faithful setting, time / memory, on equal weights: real"
        f" vocabulary and canvas, hidden size {text['hidden_size']},\n{text['num_hidden_layers']} layers, float32,"
        f" {source}; medians of {document['runs']} runs of `python -m benchmarks.step`.\n"
        f"In the 26B model the forward is {min(shares):.0%} to {max(shares):.0%} of a step, so the whole would take"
        f" {min(ratios):.2f} to {max(ratios):.2f} of mlx-vlm's time: projected, not measured."
    )


def quality(document: dict[str, Any]) -> str:
    """What each recipe keeps of the built-in model, from a document of benchmarks/recipes.py."""
    seeds, hard = len(document["seeds"]), ""
    if "hard" in document:
        hard = (
            f",\nand to {document['hard']} hard ones of each of three kinds: Sudokus of 12–18 givens, repeated names,"
            " unseen templates and longer JSON"
        )
    return (
        f"{measured_recipes.table(document['recipes'])}\n\n"
        "The built-in model in each recipe, computed in float32. Left: at settled canvases with half of their tokens"
        " replaced, against the\nunpacked model. Right: answers by the default sampler to"
        f" {document['count']} held-out questions of each of five tasks under {seeds} seeds{hard}\n"
        f"(`python -m benchmarks.recipes`, MLX {document['versions']['mlx']} on a CPU, {document['date'][:10]})."
        " A million weights say little about 26 billion.\n"
    )


def idea_table(document: dict[str, Any]) -> str:
    """What each exact idea brings, from a document of benchmarks/ideas.py."""
    versions, machine = document["versions"], document["machine"]
    return (
        f"{ideas.table(document)}\n\n"
        f"Behind {document['prefix']:,} tokens; MLX {versions['mlx']} on {machine['cores']} cores of"
        f" {machine['processor']}, {document['date'][:10]}; medians of {document['runs']} runs.\n"
    )


def main() -> None:
    tables = blocks()
    for file, names in PLACES.items():
        text = written(file.read_text(encoding="utf-8"), {name: tables[name] for name in names})
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
