"""`mlx_diffgemma.convert`: the released checkpoint into an MLX pack that fits.

The work is done in packing/; what the converter knows is data, in convert/.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli import command
from .config import RELEASED, ModelConfig
from .disk import new_folder, user_path
from .files.quantization import MODE_DEFAULTS, describe
from .options import Option
from .packing.recipes import DTYPES, Recipe, adhoc_recipe, load_recipe, recipe_names

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from .files.checkpoint import Checkpoint
    from .packing.conversion import Conversion
    from .packing.plan import Planned
    from .packing.verification import Deviation


def print_plan(config: ModelConfig, recipe: Recipe, planned: "Sequence[Planned]") -> None:
    """What a conversion will make: sizes to the byte, memory to run it, and the Macs it fits."""
    from rich.table import Table

    from .model.memory import memory_needed, smallest_macs
    from .packing.plan import Size, lay_out, sizes
    from .pipeline.machine.fitting import Sizes, smallest_streaming
    from .terminal.console import console

    out, weight_files = console(), sum(shard.size for shard in lay_out(planned))
    table = Table("component", "tensors", "packing", "bits/weight", "bytes", title=f"recipe {recipe.name}")
    for column in table.columns[1:]:
        column.justify = "right"
    components = sizes(recipe, planned)
    total = Size.sum(components.values())
    for component, size in (*components.items(), ("total", total)):
        row = (str(size.tensors), size.packing, f"{size.bits_per_weight:.2f}", f"{size.nbytes:,}")
        table.add_row(component, *row, style="bold" if size is total else "")
    out.print(recipe.because, table, f"weight files: {weight_files:,} bytes", sep="\n", highlight=False)
    text = total.nbytes - (components["vision"].nbytes if "vision" in components else 0)
    titles = ("prefix", "memory to run", "fits a Mac of", "with a raised limit*", "two Macs of")
    memory = Table(*titles, "streamed, a Mac of", "GB a pass", title="estimated")
    for prefix in (4096, 32_768, 131_072):
        needed = memory_needed(config, text, prefix)
        smallest = [f"{mac} GB" if mac else "none" for mac in smallest_macs(needed)]
        mac, nbytes = smallest_streaming(config, Sizes.planned(config, planned), prefix)
        streamed = (f"{mac} GB", f"{nbytes / 1e9:.1f}") if mac else ("none", "")
        two = _two_macs(config, planned, prefix)
        memory.add_row(f"{prefix // 1024}K", f"{needed / 1e9:.1f} GB", *smallest, two, *streamed)
    out.print(memory, "* sudo sysctl iogpu.wired_limit_mb=…", sep="\n", highlight=False)
    out.print(_of_pictures(config, total.nbytes - text), highlight=False, soft_wrap=True)
    _warn(recipe, planned)


def _two_macs(config: ModelConfig, planned: "Sequence[Planned]", prefix: int) -> str:
    """The smallest Macs of which two hold the model together, as they come."""
    from .model.memory import memory_needed, smallest_macs
    from .model.sharing.share import Share
    from .pipeline.machine.fitting import Sizes

    half = Share(0, 2)
    mac, _ = smallest_macs(memory_needed(half.own(config), Sizes.planned(config, planned, half).held(0), prefix))
    return f"{mac} GB" if mac else "none"


def _of_pictures(config: ModelConfig, tower: int) -> str:
    """What a prompt with pictures adds to the memory that is estimated, in a sentence."""
    from .model.memory import STEP
    from .model.vision import looking_bytes
    from .model.vision_config import VisionConfig

    if config.vision is None:
        return "No vision tower: the pack cannot see pictures."
    vision = VisionConfig.of_sizes(config.vision)
    most = 1120 * vision.pooling_kernel_size**2
    added = tower + max(looking_bytes(vision, most) - STEP, 0)
    return f"Prompts with pictures: {added / 1e9:.2f} GB more, the vision tower; others leave it on the disk."


def _warn(recipe: Recipe, planned: "Sequence[Planned]") -> None:
    from .files.folder import families

    if recipe.dtype == "float16":
        click.echo("Warning: Gemma's activations can overflow float16 and turn into NaN; bfloat16 is safe.", err=True)
    if recipe.experimental:
        click.echo(f"Warning: recipe {recipe.name} is experimental. {recipe.because}", err=True)
    changed: dict[str, list[str]] = {}
    for item in planned:
        if item.wanted:
            wanted, got = describe(item.wanted, ""), describe(item.how, recipe.dtype)
            line = f"{wanted} does not divide their width: {got} instead"
            changed.setdefault(line, []).append(item.source.path)
    for line, paths in changed.items():
        click.echo(f"Warning: {families(paths)}: {line}.", err=True)


def print_errors(errors: "dict[str, dict[str, Deviation]]") -> None:
    """The verification's report: per component, the relative RMS error and the worst tensor."""
    from rich.table import Table

    from .packing.verification import Deviation
    from .terminal.console import console

    table = Table("component", "relative RMS error", "worst tensor", "its error", title="every byte as it should be")
    table.columns[2].overflow = "fold"
    for component, tensors in errors.items():
        whole = Deviation()
        for one in tensors.values():
            whole.add(one.error, one.weight)
        worst = max(tensors, key=lambda name: tensors[name].relative)
        table.add_row(
            component, f"{whole.relative:.2e}", worst.removeprefix("model."), f"{tensors[worst].relative:.2e}"
        )
    console().print(table)


_recipe_option = partial(click.option, cls=Option, section="In place of a recipe")
_source_option = partial(click.option, cls=Option, section="Source")


@command("convert")
@click.option("--hf-path", "--model", default=RELEASED, metavar="PATH|REPO", help="[default: the released model]")
@click.option("--mlx-path", default="mlx_model", show_default=True, metavar="PATH", help="The folder to make.")
@click.option("--recipe", metavar="NAME|FILE.toml", help=f"{', '.join(recipe_names())}, or your own.  [default: q4]")
@click.option("--dry-run", is_flag=True, help="Say what would be made, to the byte.")
@click.option("--verify", "verifying", is_flag=True, help="Re-read the pack against the source.")
@click.option("--force", is_flag=True, help="Replace a pack that is at --mlx-path.")
@click.option("--upload-repo", metavar="REPO", help="Upload the pack there.")
@_recipe_option("-q", "--quantize", "ad_hoc", is_flag=True, help="A recipe from the three options below.")
@_recipe_option("--q-bits", type=int, help="Bits per weight of the experts.")
@_recipe_option("--q-group-size", type=int, help="Weights that share a scale.")
@_recipe_option("--q-mode", type=click.Choice(list(MODE_DEFAULTS)), help="How they are packed.")
@_recipe_option("--dtype", type=click.Choice(DTYPES), help="Of what is not packed.  [default: the recipe's]")
@_source_option("--revision", help="Branch, tag or commit of a Hub repository.")
@_source_option("--ignore-key", multiple=True, metavar="KEY", help="An unknown config key that you know is harmless.")
def main(recipe: str | None, ad_hoc: bool, dtype: str | None, **wanted: Any) -> None:
    """Turn a DiffusionGemma checkpoint into an MLX pack that fits.

    An interrupted conversion continues where it was when the same command is run again.
    """
    asked = tuple(wanted.pop(name) for name in ("q_bits", "q_group_size", "q_mode"))
    ad_hoc = ad_hoc or any(value is not None for value in asked)
    if ad_hoc and recipe is not None:
        raise click.UsageError("--recipe and the -q options exclude one another.")
    job = Job(recipe=adhoc_recipe(*asked) if ad_hoc else load_recipe("q4" if recipe is None else recipe), **wanted)
    job = replace(job, recipe=replace(job.recipe, dtype=dtype or job.recipe.dtype))
    if job.dry_run:
        job.say()
    else:
        job.do()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the command line asks for. Errors when it is made: UsageError for options that exclude one another."""

    recipe: Recipe
    hf_path: str
    revision: str | None
    mlx_path: str
    upload_repo: str | None
    dry_run: bool
    verifying: bool
    force: bool
    ignore_key: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.dry_run and (self.upload_repo or self.verifying or self.force):
            raise click.UsageError("--dry-run writes nothing: it excludes --upload-repo, --verify and --force.")

    @property
    def local(self) -> bool:
        return user_path(self.hf_path, "--hf-path").is_dir()

    def say(self) -> None:
        """What would be made. A Hub repository's plan follows from its config alone, and so do all shapes."""
        from .files import checkpoint, hub
        from .files.layout import sources
        from .packing.conversion import plan_conversion
        from .packing.plan import plan

        folder = hub.resolve(self.hf_path, self.revision, weights=False, option="--hf-path")
        if self.local:
            source = checkpoint.open_checkpoint(folder, ignore_keys=self.ignore_key)
            print_plan(source.config, self.recipe, plan_conversion(source, self.recipe).planned)
        else:
            config = checkpoint.read_config(folder, ignore_keys=self.ignore_key)
            print_plan(config, self.recipe, plan(self.recipe, sources(config)))

    def do(self) -> None:
        """Convert, verify, upload: whichever was asked for."""
        from .files import checkpoint, hub
        from .packing.conversion import plan_conversion

        if self.upload_repo:
            hub.check_upload(self.upload_repo)
        target = new_folder(self.mlx_path, "--mlx-path")
        folder = hub.resolve(self.hf_path, self.revision, option="--hf-path")
        source = checkpoint.open_checkpoint(folder, ignore_keys=self.ignore_key)
        conversion = plan_conversion(source, self.recipe, repo=None if self.local else self.hf_path)
        if not (self.verifying and not self.force and (target / "config.json").is_file()):
            _warn(self.recipe, conversion.planned)
            _convert_aloud(conversion, target, self.force)
        if self.verifying:
            _verify_aloud(source, target)
        if self.upload_repo:
            hub.upload(target, self.upload_repo)
            click.echo(f"https://huggingface.co/{self.upload_repo}")


def _verify_aloud(source: "Checkpoint", target: Path) -> None:
    from .packing.verification import verify
    from .terminal.progress import Bar

    with Bar("verifying") as bar:
        errors = verify(source, target, bar)
    print_errors(errors)


def _convert_aloud(plan: "Conversion", target: Path, force: bool) -> None:
    from .packing.conversion import convert
    from .terminal.progress import Bar

    try:
        with Bar("converting") as bar:
            convert(plan, target, force=force, progress=bar)
    except KeyboardInterrupt:
        click.echo("Interrupted. Finished shards are kept; run the same command again to continue.", err=True)
        raise
    click.echo(f"{target}: {plan.total_size / 1e9:.2f} GB, recipe {plan.recipe.name}")


if __name__ == "__main__":
    main()
