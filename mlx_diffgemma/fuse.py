"""`mlx_diffgemma.fuse`: a LoRA adapter merged into its model, as a model of its own."""

import click

from .cli import command
from .disk import new_folder, user_path
from .errors import ConfigError
from .files.shipped import BUILT_IN


@command("fuse")
@click.option("--model", metavar="PATH|REPO", help="What was fine-tuned.  [default: the built-in one]")
@click.option(
    "--adapter", "--adapter-path", "adapter", default="adapters", show_default=True, metavar="PATH", help="Its adapter."
)
@click.option("--save-path", default="fused_model", show_default=True, metavar="PATH", help="The folder to make.")
@click.option("--force", is_flag=True, help="Replace what is at --save-path.")
def main(model: str | None, adapter: str, save_path: str, force: bool) -> None:
    """Merge an adapter made by train into its model. A packed projection is packed again, as it was."""
    target, source = new_folder(save_path, "--save-path"), user_path(adapter, "--adapter-path")
    if target.exists() and not force:
        raise ConfigError(f"{target} is there already.\nChoose another --save-path, or replace it with --force.")
    from .files import adapters
    from .files.hub import resolve
    from .files.weights import load_network, write_model

    folder = resolve(BUILT_IN if model is None else model)
    if target.exists() and target.samefile(folder):
        raise ConfigError(f"--save-path {target} is the model itself: choose another folder.")
    network = load_network(folder, lazy=True)
    adapters.load(network, source)
    adapters.fuse(network)
    write_model(network, folder, target)
    click.echo(f"Model: {target}  (mlx_diffgemma.generate --model {target})")


if __name__ == "__main__":
    main()
