"""`mlx_diffgemma.generate`: a reply to one prompt, on a live canvas, as bare text or as JSON."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli import Option, command, generation_options, model_options, open_model, run_options
from .errors import PromptError

if TYPE_CHECKING:
    from .pipeline.model import DiffusionGemma, Request
    from .pipeline.results import Result
    from .terminal.recording import Recording
    from .terminal.sinks import Sink
    from .text.tokenizer import Message

EXAMPLE = "Solve this Sudoku:\n63. ...\n.15 63.\n.56 2..\n.21 ..5\n... 5..\n... 34."


@command("generate")
@model_options
@click.option("-p", "--prompt", metavar="TEXT|@FILE|-", help="Text, a file's content, or stdin.")
@click.option(
    "--messages",
    cls=Option,
    section="Prompt",
    metavar="FILE.json",
    help='A conversation instead: [{"role": …, "content": …}, …].',
)
@click.option("--system-prompt", cls=Option, section="Prompt", metavar="TEXT", help="Goes before the prompt.")
@click.option(
    "--thinking/--no-thinking", cls=Option, section="Prompt", default=None, help="Ask for thinking, or for none."
)
@click.option(
    "--show-thinking", cls=Option, section="Output", is_flag=True, help="Print the thoughts before the answer."
)
@click.option("--json", "form", flag_value="json", help="One JSON object: text, ids, timings, …")
@click.option(
    "--events", "form", flag_value="events", cls=Option, section="Output", help="One JSON line for each event."
)
@click.option(
    "--noise", cls=Option, section="Noise", metavar="FILE", help="Repeat a run from the noise it saved, on any machine."
)
@click.option("--save-noise", cls=Option, section="Noise", metavar="FILE", help="Save the noise of this run.")
@click.option("--record", metavar="FILE", help="Save the canvas as .svg, .html or .cast.")
@click.option(
    "--pace",
    type=click.FloatRange(0),
    default=0,
    metavar="SECONDS",
    cls=Option,
    section="Output",
    help="Stay so long at every step.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the reply and nothing else.")
@generation_options
def main(source: dict[str, Any], options: dict[str, Any], **wanted: Any) -> None:
    """Write a reply to a prompt. On a terminal the canvas is shown as it settles; a pipe gets the bare text."""
    Reply(source=source, options=options, **wanted).give()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the command line asks for. Errors when it is made: UsageError for options that exclude one another."""

    source: dict[str, Any]
    options: dict[str, Any]
    prompt: str | None
    messages: str | None
    system_prompt: str | None
    thinking: bool | None
    show_thinking: bool
    form: str | None  # "json", "events" or None: text
    noise: str | None
    save_noise: str | None
    record: str | None
    pace: float  # seconds
    quiet: bool

    def __post_init__(self) -> None:
        if self.form and self.show_thinking:
            raise click.UsageError(f"--{self.form} holds the thoughts already: --show-thinking would do nothing.")
        if self.noise and self.save_noise:
            raise click.UsageError("--noise has its noise already: --save-noise would only copy it.")

    @property
    def is_example(self) -> bool:
        return "model" not in self.source and self.prompt is None and self.messages is None

    @property
    def talkative(self) -> bool:
        return not self.quiet and self.form is None

    def give(self) -> None:
        from .pipeline.results import result_json
        from .terminal.sinks import paced, show, summary

        asked = conversation(EXAMPLE if self.is_example else self.prompt, self.messages, self.system_prompt)
        recording = self._recording(asked)  # before the model is loaded: it refuses bad names
        model = open_model(self.source, quiet=not self.talkative)
        if self.is_example and self.talkative:
            click.echo(EXAMPLE + "\n", err=True)
        request = model.prepare(asked, enable_thinking=self.thinking, **self._run_options(model))
        recorder = request.record() if self.save_noise else None
        if request.settings.chooses:
            result = self._chosen(request)
        else:
            events = paced(request.events(), self.pace) if self.pace else request.events()
            result = show(events, *self._sinks(model, recording)).result
        if recorder and self.save_noise:
            settings, tuning = dataclasses.asdict(request.settings), result.statistics.tuning
            recorder.save(self.save_noise, prompt=asked, settings=settings, seed=result.seed, tuning=tuning)
        if self.form == "json":
            click.echo(json.dumps(result_json(result), ensure_ascii=False))
        elif self.talkative:
            click.echo(summary(result), err=True)

    def _chosen(self, request: "Request") -> "Result":
        """An answer chosen among several: there is nothing to show before it is there."""
        for name, given in (("events", self.form == "events"), ("record", self.record), ("pace", self.pace)):
            if given:
                raise click.UsageError(f"--best-of and --retries choose among whole answers: --{name} shows none.")
        if self.save_noise:
            raise click.UsageError("--best-of and --retries draw several answers: repeat the one given by its --seed.")
        [result] = request.run()
        if self.form is None:
            thought = f"[thinking]\n{result.thinking}\n[answer]\n" if self.show_thinking and result.thinking else ""
            click.echo(thought + result.text)
        return result

    def _recording(self, asked: "list[Message]") -> "Recording | None":
        from .terminal.recording import Recording

        if self.record is None:
            return None
        recording = Recording(self.record)
        recording.commit(asked[-1]["content"] + "\n\n")
        return recording

    def _run_options(self, model: "DiffusionGemma") -> dict[str, Any]:
        from .generation.noise import RecordedNoise

        return run_options(model, self.options) | ({"noise": RecordedNoise.load(self.noise)} if self.noise else {})

    def _sinks(self, model: "DiffusionGemma", recording: "Recording | None") -> "list[Sink]":
        from .terminal.sinks import Live, Voice, on_stdout

        decode, thoughts = model.tokenizer.decode, self.show_thinking
        sinks: list[Sink] = []
        if self.form != "json":
            events = self.form == "events"
            sinks.append(on_stdout(decode, events=events, bare=self.quiet, show_thinking=thoughts))
        if recording:
            sinks.append(Live(recording, decode, every_step=True, voice=Voice(show_thinking=thoughts)))
        return sinks


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
