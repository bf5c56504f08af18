"""`mlx_diffgemma.generate`: a reply to one prompt, on a live canvas, as bare text or as JSON."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli import command, generation_options, model_options, open_model
from .errors import PromptError

if TYPE_CHECKING:
    from .engine import Statistics
    from .pipeline import DiffusionGemma, Result
    from .render import Sink
    from .tokenizer import Message

EXAMPLE = "Solve this Sudoku:\n1.. 2.5\n5.2 ...\n.53 421\n241 .63\n..5 1..\n..6 352"


@command("generate")
@model_options
@click.option("-p", "--prompt", metavar="TEXT|@FILE|-", help="The prompt: text, a file's content, or standard input.")
@click.option("--messages", metavar="FILE.json", help='A conversation instead: [{"role": …, "content": …}, …].')
@click.option("--system-prompt", metavar="TEXT", help="Goes before the prompt.")
@click.option("--thinking/--no-thinking", default=None, help="Ask the chat template for thinking, or for none.")
@click.option("--show-thinking", is_flag=True, help="Print the thoughts before the answer.")
@click.option("--json", "form", flag_value="json", help="Print one JSON object: text, ids, steps, timings, seed, …")
@click.option("--events", "form", flag_value="events", help="Print one JSON line for each event as it happens.")
@click.option("--record", metavar="FILE", help="Save what the canvas did as .svg, .html or .cast.")
@click.option("-q", "--quiet", is_flag=True, help="Print the reply and nothing else.")
@generation_options
def main(
    model: str | None,
    adapter: str | None,
    prompt: str | None,
    messages: str | None,
    system_prompt: str | None,
    thinking: bool | None,
    show_thinking: bool,
    form: str | None,
    record: str | None,
    quiet: bool,
    options: dict[str, Any],
) -> None:
    """Write a reply to a prompt. On a terminal the canvas is shown as it settles; a pipe gets the bare text."""
    if form and show_thinking:
        raise click.UsageError(f"--{form} holds the thoughts already: --show-thinking would do nothing.")
    example = model is None and prompt is None and messages is None
    asked = conversation(EXAMPLE if example else prompt, messages, system_prompt)
    from . import render

    recording = render.Recording(record) if record else None  # before the model is loaded: it refuses bad names
    talkative = not quiet and form is None
    loaded = open_model(model, adapter, quiet=not talkative)
    if example and talkative:
        click.echo(EXAMPLE + "\n", err=True)
    sinks: list[Sink] = [] if form == "json" else [on_terminal(loaded, events=form == "events", bare=quiet)]
    if recording:
        recording.commit(asked[-1]["content"] + "\n\n")
        sinks.append(render.Live(recording, loaded.tokenizer.decode))
    events = loaded.stream(asked, enable_thinking=thinking, **options)
    result = render.show(render.with_thinking(events) if show_thinking else events, *sinks).result
    if form == "json":
        click.echo(json.dumps(result_json(result), ensure_ascii=False))
    elif talkative:
        click.echo(summary(result), err=True)


def conversation(prompt: str | None, messages: str | None, system_prompt: str | None) -> "list[Message]":
    """The chat messages that the options ask for. Errors: UsageError, PromptError for a file that cannot be read."""
    if (prompt is None) == (messages is None):
        raise click.UsageError("give a prompt: either --prompt (text, @file or - for standard input) or --messages.")
    if messages is not None:
        if system_prompt is not None:
            raise click.UsageError("--system-prompt goes with --prompt; --messages holds its own.")
        return _messages(messages)
    assert prompt is not None
    text = sys.stdin.read() if prompt == "-" else _read(prompt[1:]) if prompt.startswith("@") else prompt
    if not text.strip():
        raise PromptError("the prompt is empty.")
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    return [*system, {"role": "user", "content": text}]


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PromptError(f"the prompt file {file} cannot be read: {reason}.") from None


def _messages(file: str) -> "list[Message]":
    try:
        found = json.loads(_read(file))
    except ValueError as error:
        raise PromptError(f"{file} is not JSON: {error}.") from None
    if not isinstance(found, list) or not found or not all(isinstance(m, dict) and "role" in m for m in found):
        raise PromptError(f'{file}: expected a list of messages [{{"role": "user", "content": "…"}}, …].')
    return found


def on_terminal(model: "DiffusionGemma", *, events: bool = False, bare: bool = False) -> "Sink":
    """The live canvas on a terminal, bare text elsewhere, JSON lines if asked for."""
    from rich.console import Console

    from . import render

    console = Console()
    if events:
        return render.JsonLines(sys.stdout, model.tokenizer.decode)
    if bare or not console.is_terminal or console.is_dumb_terminal:
        return render.Plain(sys.stdout)
    return render.Live(render.Terminal(console), model.tokenizer.decode, color=not console.no_color)


def result_json(result: "Result") -> dict[str, Any]:
    """Everything about a reply as plain data; seconds and bytes are in the names."""
    return {
        "text": result.text,
        "thinking": result.thinking,
        "tool_calls": result.tool_calls,
        "ids": list(result.tokens),
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "canvases": [dataclasses.asdict(canvas) for canvas in result.canvases],
        "statistics": statistics_json(result.stats),
    }


def statistics_json(statistics: "Statistics") -> dict[str, Any]:
    derived = ("seconds_per_step", "tokens_per_second")
    return dataclasses.asdict(statistics) | {name: getattr(statistics, name) for name in derived}


def summary(result: "Result") -> str:
    """One line: how much, how fast, in how many steps, and what departed from the reference."""
    s = result.stats
    steps = [canvas.steps for canvas in result.canvases]
    unsettled = sum(not canvas.settled for canvas in result.canvases)
    parts = [
        f"{s.generated_tokens} tokens in {s.denoise_seconds + s.commit_seconds:.2f} s",
        f"{s.tokens_per_second:.1f} tokens/s",
        f"{sum(steps) / max(len(steps), 1):.1f} steps a canvas" + f" ({unsettled} not settled)" * bool(unsettled),
        f"{s.seconds_per_step:.3f} s a step",
        f"peak {s.peak_memory_bytes / 1e9:.2f} GB",
        f"seed {result.seed}",
    ]
    departures = [f"not the reference: {name}={value}" for name, value in s.departures.items()]
    return " · ".join(parts + departures + ["stopped at --max-tokens"] * (result.finish_reason == "length"))


if __name__ == "__main__":
    main()
