"""`mlx_diffgemma.generate`: a reply to one prompt, on a live canvas, as bare text or as JSON."""

import dataclasses
import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli import command, generation_options, model_options, open_model
from .errors import PromptError

if TYPE_CHECKING:
    from .generation.noise import SeededNoise
    from .pipeline.model import DiffusionGemma
    from .terminal.sinks import Sink
    from .text.tokenizer import Message

EXAMPLE = "Solve this Sudoku:\n63. ...\n.15 63.\n.56 2..\n.21 ..5\n... 5..\n... 34."


@command("generate")
@model_options
@click.option("-p", "--prompt", metavar="TEXT|@FILE|-", help="The prompt: text, a file's content, or standard input.")
@click.option("--messages", metavar="FILE.json", help='A conversation instead: [{"role": …, "content": …}, …].')
@click.option("--system-prompt", metavar="TEXT", help="Goes before the prompt.")
@click.option("--thinking/--no-thinking", default=None, help="Ask the chat template for thinking, or for none.")
@click.option("--show-thinking", is_flag=True, help="Print the thoughts before the answer.")
@click.option("--json", "form", flag_value="json", help="Print one JSON object: text, ids, steps, timings, seed, …")
@click.option("--events", "form", flag_value="events", help="Print one JSON line for each event as it happens.")
@click.option("--noise", metavar="FILE", help="Repeat a run from the noise it saved, on any machine.")
@click.option("--save-noise", metavar="FILE", help="Save the noise of this run.")
@click.option("--record", metavar="FILE", help="Save what the canvas did as .svg, .html or .cast.")
@click.option("--pace", type=click.FloatRange(0), default=0, metavar="SECONDS", help="Stay so long at every step.")
@click.option("-q", "--quiet", is_flag=True, help="Print the reply and nothing else.")
@generation_options
def main(
    source: dict[str, Any],
    prompt: str | None,
    messages: str | None,
    system_prompt: str | None,
    thinking: bool | None,
    show_thinking: bool,
    form: str | None,
    noise: str | None,
    save_noise: str | None,
    record: str | None,
    pace: float,
    quiet: bool,
    options: dict[str, Any],
) -> None:
    """Write a reply to a prompt. On a terminal the canvas is shown as it settles; a pipe gets the bare text."""
    if form and show_thinking:
        raise click.UsageError(f"--{form} holds the thoughts already: --show-thinking would do nothing.")
    example = "model" not in source and prompt is None and messages is None
    if noise and save_noise:
        raise click.UsageError("--noise has its noise already: --save-noise would only copy it.")
    asked, chosen = conversation(EXAMPLE if example else prompt, messages, system_prompt), dict(options)
    from .generation.noise import NoiseRecorder, RecordedNoise
    from .pipeline.results import result_json
    from .terminal import recording as recordings
    from .terminal import sinks as terminal

    recording = recordings.Recording(record) if record else None  # before the model is loaded: it refuses bad names
    talkative = not quiet and form is None
    loaded = open_model(source, quiet=not talkative)
    decode = loaded.tokenizer.decode
    if example and talkative:
        click.echo(EXAMPLE + "\n", err=True)
    sinks: list[Sink] = [] if form == "json" else [terminal.on_stdout(decode, events=form == "events", bare=quiet)]
    if recording:
        recording.commit(asked[-1]["content"] + "\n\n")
        sinks.append(terminal.Live(recording, decode, every_step=True))
    recorder = None
    if noise:
        options["noise"] = RecordedNoise.load(noise)
    elif save_noise:
        recorder = options["noise"] = NoiseRecorder(seeded(loaded, options))
    events = loaded.stream(asked, enable_thinking=thinking, **options)
    events = terminal.paced(events, pace) if pace else events
    result = terminal.show(terminal.with_thinking(events) if show_thinking else events, *sinks).result
    if recorder and save_noise:
        recorder.save(save_noise, prompt=asked, settings=dataclasses.asdict(loaded.generation_config) | chosen)
    if form == "json":
        click.echo(json.dumps(result_json(result), ensure_ascii=False))
    elif talkative:
        click.echo(terminal.summary(result), err=True)


def seeded(model: "DiffusionGemma", options: dict[str, Any]) -> "SeededNoise":
    """The noise a run with these options would use; takes the seed out of them."""
    from .generation.noise import SeededNoise

    seed = options.pop("seed", None)
    seed = secrets.randbelow(2**32) if seed is None else seed
    length = options.get("canvas_length") or model.config.canvas_length
    return SeededNoise([seed], length=length, vocabulary=model.config.vocab_size)


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


if __name__ == "__main__":
    main()
