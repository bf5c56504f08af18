"""`mlx_diffgemma.evaluate`: tasks of EleutherAI's lm-eval, with mlx_lm's option names."""

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from .cli import command
from .disk import new_file, replacing, user_path
from .errors import ConfigError
from .options import Option, generation_options, model_options, open_model, run_options

if TYPE_CHECKING:
    from .pipeline.model import DiffusionGemma


@command("evaluate")
@model_options
@click.option("--tasks", required=True, metavar="A,B|FOLDER", help="Tasks by name, or a folder of task files.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only so many questions of each task.")
@click.option("--num-shots", type=click.IntRange(0), metavar="N", help="Examples before each question.")
@click.option(
    "--batch-size",
    cls=Option,
    section="Run",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Texts at a time.",
)
@click.option(
    "--output-dir",
    cls=Option,
    section="Run",
    metavar="FOLDER",
    default=".",
    show_default=True,
    help="Where the JSON goes.",
)
@click.option(
    "--apply-chat-template/--no-chat-template",
    cls=Option,
    section="Run",
    default=True,
    help="Questions as a user's message.",
)
@generation_options
def main(
    source: dict[str, Any],
    tasks: str,
    limit: int | None,
    num_shots: int | None,
    batch_size: int,
    output_dir: str,
    apply_chat_template: bool,
    options: dict[str, Any],
) -> None:
    """Run tasks of lm-eval: texts by the chosen decoding, log-likelihoods by the causal pass."""
    file = new_file(user_path(output_dir, "--output-dir") / "evaluation.json", "--output-dir")
    loaded = open_model(source)
    found = evaluate(
        loaded,
        tasks,
        limit=limit,
        num_shots=num_shots,
        batch_size=batch_size,
        chat=apply_chat_template,
        options=run_options(loaded, options),
    )
    with replacing(file, "w") as stream:
        stream.write(json.dumps(found, indent=1, default=str, ensure_ascii=False) + "\n")
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            if isinstance(value, int | float):
                click.echo(f"{task:24} {name:28} {value:.4f}")
    click.echo(f"Written to {file}.", err=True)


def evaluate(
    model: "DiffusionGemma",
    tasks: str,
    *,
    limit: int | None,
    num_shots: int | None,
    batch_size: int,
    chat: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    """lm-eval's results, without the samples. Errors: ConfigError without lm-eval, for a task that is not there, and
    for one whose questions have to be fetched and cannot be."""
    try:
        lm_eval: Any = import_module("lm_eval")
        task_manager: Any = import_module("lm_eval.tasks").TaskManager

        from .pipeline.harness import Harness
    except ImportError:
        raise ConfigError("evaluate needs lm-eval: pip install 'mlx-diffgemma[eval]'.") from None
    options = dict(options)
    harness = Harness(model, batch_size=batch_size, seed=options.pop("seed", 0), options=options)  # pyright: ignore[reportArgumentType]
    path = user_path(tasks, "--tasks")
    folder = path if path.is_dir() else None
    manager = task_manager(include_path=str(folder) if folder else None, include_defaults=folder is None)
    names = sorted(manager.all_tasks) if folder else tasks.split(",")
    if not names:
        raise ConfigError(f"--tasks {tasks} is a folder without task files, which are YAML.")
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them.")
    try:
        found = lm_eval.simple_evaluate(
            model=harness,
            tasks=names,
            num_fewshot=num_shots,
            limit=limit,
            task_manager=manager,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            log_samples=False,
        )
    except (ConnectionError, OSError) as error:
        raise ConfigError(f"the questions of {tasks} cannot be had: {str(error).splitlines()[0]}") from error
    assert found is not None  # None only on machines other than the first
    return {key: found[key] for key in ("results", "configs", "versions", "n-shot", "n-samples") if key in found}


if __name__ == "__main__":
    main()
