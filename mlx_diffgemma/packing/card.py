"""What a pack says about itself: config.json in the released dialect, and the model card."""

import json
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..config import RELEASED
from ..files.checkpoint import Checkpoint
from ..files.shipped import knowledge
from ..generation.settings import GenerationConfig
from ..readers import read_json, read_toml
from ..values import Field, Table, many, mapping, one_of, text
from .plan import sizes
from .recipes import recipe_names

if TYPE_CHECKING:
    from .conversion import Conversion


def output_config(source: Checkpoint, dtype: str, block: dict[str, object]) -> dict[str, Any]:
    """The source's config in the released dialect, with the `quantization` block and all stop ids."""
    config = json.loads(json.dumps(source.raw_config))
    for key in ("_name_or_path", "torch_dtype", "quantization", "quantization_config"):
        config.pop(key, None)
    text, vision = config["text_config"], config.get("vision_config")
    if (per_layer := text.pop("per_layer_config", None)) is not None:
        _write_geometry(source, text, per_layer)
    for part in (config, text, vision or {}):
        if "dtype" in part or part is config:
            part["dtype"] = dtype
    if vision and vision.get("rope_parameters", {}).get("rope_type") == "axial":
        vision["rope_parameters"]["rope_type"] = "default"
    generation_file = source.folder / "generation_config.json"
    if generation_file.exists():
        generation = {key: value for key, value in read_json(generation_file).items() if value is not None}
        config["generation_config"] = generation
        ids = (*source.config.eos_token_ids, *GenerationConfig.from_dict(generation).stop_ids)
        config["eos_token_id"] = list(dict.fromkeys(ids))
    if block:
        config["quantization"] = config["quantization_config"] = block
    return dict(sorted(config.items()))


def _write_geometry(source: Checkpoint, text: dict[str, Any], per_layer: dict[str, Any]) -> None:
    """Full layers in the released words, which every reader knows, if they say all there is to say."""
    kinds = {(layer.kind, layer.head_dim, layer.num_kv_heads) for layer in source.config.layers}
    sliding = {kind for kind in kinds if kind[0] == "sliding_attention"}
    full = kinds - sliding
    regular = sliding <= {("sliding_attention", text["head_dim"], text["num_key_value_heads"])} and len(full) <= 1
    if not regular:
        text["per_layer_config"] = per_layer
    elif full:
        (_, text["global_head_dim"], text["num_global_key_value_heads"]) = next(iter(full))


def model_card(plan: "Conversion") -> str:
    """README.md: where the weights come from, what was done to them, how to run them."""
    base, recipe = plan.repo or RELEASED, plan.recipe
    origin = f"[{plan.repo}](https://huggingface.co/{plan.repo})" if plan.repo else "a local checkpoint"
    revision = f" at revision `{plan.revision}`" if plan.revision else ""
    lines = [
        "---",
        "library_name: mlx",
        "license: apache-2.0",
        "license_link: https://ai.google.dev/gemma/docs/gemma_4_license",
        "pipeline_tag: text-generation",
        f"base_model: {base}",
        "tags: [mlx, diffusion_gemma, text-diffusion]",
        "---",
        "",
        f"# DiffusionGemma for MLX, recipe `{recipe.name}`",
        "",
        f"Converted from {origin}{revision} by mlx_diffgemma {__version__}.",
        recipe.because,
        "",
        "| component | tensors | packing | bits per weight | bytes |",
        "|---|---|---|---|---|",
    ]
    for component, size in sizes(recipe, plan.planned).items():
        lines.append(
            f"| {component} | {size.tensors} | {size.packing} | {size.bits_per_weight:.2f} | {size.nbytes:,} |"
        )
    lines += [f"| total | | | | {plan.total_size:,} |", "", *_readers(recipe.name), "```bash"]
    lines += ['mlx_diffgemma.generate --model . "Why is the sky blue?"', "```", ""]
    return "\n".join(lines + _of_pictures(plan))


def _of_pictures(plan: "Conversion") -> list[str]:
    """What the pack's vision tower is stored as; that it has none, where the source has none."""
    tower = [item for item in plan.planned if item.source.component == "vision"]
    if not tower:
        return ["It has no vision tower: it cannot see pictures.", ""]
    size = sizes(plan.recipe, tower)["vision"]
    return [f"It sees pictures: its vision tower is {size.packing}, {size.nbytes / 1e9:.2f} GB.", ""]


_READER = Table(Field("name", text()), Field("how", one_of("run", "read")), Field("refuses", mapping(text())))
_READERS = Table(Field("reader", many(_READER.kind)))


def _readers(recipe: str) -> list[str]:
    """Which other programs take this recipe, and which do not, and why. Nothing for a recipe of one's own."""
    if recipe not in recipe_names():
        return []
    readers = _READERS.read(read_toml(knowledge() / "readers.toml"), "readers.toml")["reader"]
    good = [reader["name"] for reader in readers if recipe not in reader["refuses"]]
    lines = [f"Also read by {', '.join(good)}."]
    lines += [
        f"Not by {reader['name']}: {reader['refuses'][recipe]}." for reader in readers if reader["name"] not in good
    ]
    return [*lines, ""]
