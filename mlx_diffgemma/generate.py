"""`mlx_diffgemma.generate`: a reply to a prompt, on a live canvas, as text or JSON; to a file of prompts; the demo."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from . import launched
from .cli import command
from .disk import existing_file, new_file, reason
from .errors import PromptError
from .obeying import Obeying, obeying_options
from .options import BUDGET, Number, Option, generation_options, model_options, open_model, run_options
from .readers import decoded, parse_json, read_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from .pipeline.model import DiffusionGemma
    from .pipeline.requests import Request
    from .pipeline.results import Result
    from .terminal.recording import Recording
    from .terminal.sinks import Pace, Sink
    from .text.gate import Message


_prompt_option = partial(click.option, cls=Option, section="Prompt")
_output_option = partial(click.option, cls=Option, section="Output")
_noise_option = partial(click.option, cls=Option, section="Noise")
_offline_option = partial(click.option, cls=Option, section="A file of prompts")


@command("generate", machines="share")
@model_options
@click.argument("text", required=False)
@click.option("-p", "--prompt", metavar="TEXT|@FILE|-", help="Text, a file's content, or stdin.")
@click.option("--image", "images", multiple=True, metavar="FILE|URL", help="A picture before the text; repeatable.")
@_prompt_option("--image-budget", metavar="N", help=BUDGET)
@_prompt_option("--video", "videos", multiple=True, metavar="FILE|FOLDER", help="A video, or its frames; repeatable.")
@_prompt_option("--video-frames", type=click.IntRange(1), metavar="N", help="Frames of a video.  [default: 32]")
@_prompt_option("--video-rate", type=Number(0, min_open=True), metavar="X", help="Frames a second in a folder.")
@_prompt_option("--pdf", "pdfs", multiple=True, metavar="FILE", help="The pages of a PDF as pictures; repeatable.")
@_prompt_option("--pages", metavar="2-5,7", help="Some pages of a PDF.  [default: all]")
@_prompt_option("--messages", metavar="FILE.json", help='A conversation instead: [{"role": …, "content": …}, …].')
@_prompt_option("--system-prompt", metavar="TEXT", help="Goes before the prompt.")
@_prompt_option("--thinking/--no-thinking", default=None, help="Ask for thinking, or for none.")
@_output_option("--show-thinking", is_flag=True, help="Print the thoughts before the answer.")
@_prompt_option("--sanitize-control-tokens", is_flag=True, help="Control tokens in the prompt are plain text.")
@click.option("--json", "form", flag_value="json", help="One JSON object: text, ids, timings, …")
@_output_option("--events", "form", flag_value="events", help="One JSON line for each event.")
@_noise_option("--noise", metavar="FILE", help="Repeat a run from the noise it saved, on any machine.")
@_noise_option("--save-noise", metavar="FILE", help="Save the noise of this run.")
@click.option("--record", metavar="FILE", help="Save the canvas as .svg, .html or .cast.")
@_output_option("--pace", type=Number(0), metavar="SECONDS", help="Stay so long at every step.")
@_offline_option("--input", "input_file", metavar="FILE.jsonl", help='A prompt a line: {"prompt": …, "id": …}.')
@_offline_option("--output", metavar="FILE.jsonl", help="The replies, a line each; a killed run goes on from here.")
@_offline_option("--batch-size", type=click.IntRange(1), metavar="N", help="Prompts at a time.  [default: 8]")
@click.option("-q", "--quiet", is_flag=True, help="Print the reply and nothing else.")
@obeying_options
@generation_options
def main(
    source: dict[str, Any],
    options: dict[str, Any],
    obeying: dict[str, Any],
    text: str | None,
    prompt: str | None,
    input_file: str | None,
    output: str | None,
    batch_size: int | None,
    **wanted: Any,
) -> None:
    """Write a reply to a prompt: TEXT, --prompt, or what is piped in. On a terminal the canvas is shown as it settles;
    a pipe gets the bare text. Without a prompt and a model, the built-in one shows what it can do."""
    if text is not None and prompt is not None:
        raise click.UsageError("the prompt is there twice: as an argument and as --prompt.")
    wanted["prompt"] = prompt if text is None else text
    if input_file is not None:
        if output is None:
            raise click.UsageError("--input needs --output: where the replies go.")
        if obeying:
            name = next(iter(obeying)).replace("_", "-")
            raise click.UsageError(f"--{name} is for a single prompt: with --input it would do nothing.")
        Offline(source=source, options=options, **_for_a_file(wanted)).run(input_file, output, batch_size)
        return
    for name, value in (("--output", output), ("--batch-size", batch_size)):
        if value is not None:
            raise click.UsageError(f"{name} goes with --input: it would do nothing.")
    Reply(source=source, options=options, obeying=Obeying(**obeying), **wanted).give()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the command line asks for. Errors when it is made: UsageError for options that exclude one another,
    ConfigError for files that cannot be read or written."""

    source: dict[str, Any]
    options: dict[str, Any]
    obeying: Obeying
    prompt: str | None
    images: tuple[str, ...]
    image_budget: str | None
    videos: tuple[str, ...]
    video_frames: int | None
    video_rate: float | None  # frames a second
    pdfs: tuple[str, ...]
    pages: str | None
    messages: str | None
    system_prompt: str | None
    thinking: bool | None
    show_thinking: bool
    sanitize_control_tokens: bool
    form: str | None  # "json", "events" or None: text
    noise: str | None
    save_noise: str | None
    record: str | None
    pace: float | None  # seconds
    quiet: bool

    def __post_init__(self) -> None:
        if self.form and self.show_thinking:
            raise click.UsageError(f"--{self.form} holds the thoughts already: --show-thinking would do nothing.")
        if self.noise and self.save_noise:
            raise click.UsageError("--noise has its noise already: --save-noise would only copy it.")
        if self.noise is not None:
            existing_file(self.noise, "--noise")
        self._check_shown()
        for option, file in (("--save-noise", self.save_noise), ("--record", self.record)):
            if file is not None:
                new_file(file, option)

    def _check_shown(self) -> None:
        """What can be known of pictures before a model is loaded. Errors: PromptError."""
        if self.shown.option:
            from .text.pictures import sources

            for source in (*self.images, *self.videos, *self.pdfs):
                sources.check(source, folders=source in self.videos)

    @property
    def talkative(self) -> bool:
        return not self.quiet and self.form is None

    def give(self) -> None:
        from .text.pictures.parts import seen

        asked = self._asked()
        recording = self._recording()  # before the model is loaded: it refuses bad names
        filling = self.obeying.is_filling
        self.obeying.check()
        if asked is None and not filling and self.talkative and not (self.noise or self.save_noise):
            Demo(self, recording).show()
            return
        model = open_model(self.source, quiet=not self.talkative)
        if asked is None and not filling:
            from .terminal.scenes import SUDOKU

            asked = [{"role": "user", "content": SUDOKU.prompt}]
        if recording and asked:
            recording.commit(_shown(asked[-1]) + "\n\n")
        opened = model.opened(asked)
        if self.talkative:
            for picture in seen(opened):
                click.echo(f"{picture}", err=True)
        request, pace = self.request(model, opened), self._pace()
        recorder = request.record() if self.save_noise else None
        result = self._chosen(request) if request.settings.chooses else self.run(model, request, pace, recording)
        if recorder and self.save_noise:
            settings, tuning = dataclasses.asdict(request.settings), result.statistics.tuning
            file = new_file(self.save_noise, "--save-noise")
            recorder.save(file, prompt=asked, settings=settings, seed=result.seed, tuning=tuning)
        self._conclude(result)

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

    def request(self, model: "DiffusionGemma", asked: "list[Message] | None", **options: Any) -> "Request":
        """The run for these messages, checked."""
        from .generation.noise import RecordedNoise

        chosen: dict[str, Any] = {**options, **run_options(model, self.options)}
        if self.noise is not None:
            chosen["noise"] = RecordedNoise.load(existing_file(self.noise, "--noise"))
        template = {"enable_thinking": self.thinking, "sanitize_control_tokens": self.sanitize_control_tokens}
        template |= {"template_options": chosen.pop("template_options", None)}
        return self.obeying.request(model, asked, template=template, run_options=chosen)

    def run(self, model: "DiffusionGemma", request: "Request", pace: "Pace", recording: "Recording | None") -> "Result":
        """Generate, and show it."""
        from .terminal.sinks import Live, Voice, on_stdout, show

        decode, thoughts = model.tokenizer.decode, self.show_thinking
        noise = request.first_canvas if request.settings.decoding == "diffusion" else None
        sinks: list[Sink] = []
        if self.form != "json":
            events = self.form == "events"
            stdout = on_stdout(decode, events=events, bare=self.quiet, show_thinking=thoughts, pace=pace, noise=noise)
            sinks.append(stdout)
        if recording:
            voice = Voice(show_thinking=thoughts)
            sinks.append(Live(recording, decode, pace=pace, every_step=True, noise=noise, voice=voice))
        return show(pace(request.events()), *sinks).result

    def _conclude(self, result: "Result") -> None:
        from .pipeline.results import result_json
        from .terminal.scenes import what_it_knows
        from .terminal.sinks import summary

        if self.form == "json":
            click.echo(json.dumps(result_json(result), ensure_ascii=False))
        elif self.talkative:
            click.echo(summary(result), err=True)
            if not result.text.strip() and not result.tool_calls:
                known = what_it_knows() if "model" not in self.source else "--avoid-empty asks for at least one token."
                click.echo(f"The reply is empty. {known}", err=True)

    def _pace(self) -> "Pace":
        from .terminal.sinks import Pace

        return Pace(self.pace or 0)

    def _recording(self) -> "Recording | None":
        from .terminal.recording import Recording

        return None if self.record is None else Recording(new_file(self.record, "--record"))

    def _asked(self) -> "list[Message] | None":
        """The chat messages; None for the demo."""
        prompt = self.prompt
        if prompt is None and self.messages is None:
            prompt = _piped()
            demo = "model" not in self.source or self.obeying.is_filling
            if prompt is None and demo and self.system_prompt is None and not self.shown.option:
                return None
        return conversation(prompt, self.messages, self.system_prompt, self.shown)

    @property
    def shown(self) -> "Shown":
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Shown)}
        return Shown(**own)


class Demo:
    """The built-in model's scenes, one after the other."""

    def __init__(self, reply: Reply, recording: "Recording | None"):
        self.reply, self.recording = reply, recording

    def show(self) -> None:
        from .terminal.console import console
        from .terminal.scenes import SCENES, what_it_knows
        from .terminal.sinks import Pace
        from .terminal.thumbnail import thumbnail
        from .text.pictures.parts import taken_out

        model, screen = open_model(self.reply.source, quiet=True), console()
        live = screen.is_terminal and not screen.is_dumb_terminal
        for number, scene in enumerate(SCENES):
            default = scene.pace if live or self.recording else 0.0
            pace = Pace(default if self.reply.pace is None else self.reply.pace)
            messages = model.opened([scene.message])
            if live and scene.image and screen.color_system and not screen.no_color:
                screen.print("", *map(thumbnail, taken_out(messages)[1]), sep="\n")
            screen.print(f"{'' if number == 0 else chr(10)}{scene.prompt}\n", style="bold")
            if self.recording:
                self.recording.commit(f"{'' if number == 0 else chr(10)}{scene.prompt}\n\n", "asked")
            pace.rest()
            request = self.reply.request(model, messages, seed=scene.seed)
            self.reply.run(model, request, pace, self.recording)
        click.echo(f"\n{what_it_knows()}", err=True)
        click.echo("The real model: mlx_diffgemma.convert, then mlx_diffgemma.chat --model PATH (README)", err=True)


# ---------------------------------------------------------------------------------------------------- a file of prompts


def _for_a_file(wanted: dict[str, Any]) -> dict[str, Any]:
    """What of the options a file of prompts takes. Errors: UsageError for one that is for a single prompt."""
    taken = {"system_prompt", "thinking", "sanitize_control_tokens", "quiet", "image_budget"}
    if single := [name for name, value in wanted.items() if name not in taken and value not in (None, False, ())]:
        plural = {"images": "image", "videos": "video", "pdfs": "pdf"}
        name = (plural | {"form": wanted["form"]}).get(single[0], single[0].replace("_", "-"))
        raise click.UsageError(f"--{name} is for a single prompt: with --input it would do nothing.")
    return {name: wanted[name] for name in taken}


@dataclass(frozen=True, kw_only=True)
class Offline:
    """Replies to a file of prompts."""

    source: dict[str, Any]
    options: dict[str, Any]
    system_prompt: str | None
    thinking: bool | None
    sanitize_control_tokens: bool
    quiet: bool
    image_budget: str | None

    def run(self, file: str, output: str, batch_size: int | None) -> None:
        """Exit status 1 when a line failed: its reply says why."""
        from ._version import __version__
        from .pipeline import offline
        from .terminal.progress import Count

        target = new_file(output, "--output")
        lines = offline.read_lines(existing_file(file, "--input"), self.system_prompt, budget=self.image_budget)
        model = open_model(self.source, quiet=self.quiet)
        chosen = run_options(model, self.options) | self._template()
        seed = chosen.pop("seed", None)
        about = {"version": __version__, "model": self.source, "options": chosen}
        about |= {"tuning": model.network.tuning.fingerprint}
        job = offline.Offline(model, lines, target, batch_size=batch_size or 8, seed=seed, options=chosen, about=about)
        if not job.journal.locked and not self.quiet:
            click.echo(f"Note: {target} is on a disk without locks: see to it that nothing else writes it.", err=True)
        try:
            with Count("replies", quiet=self.quiet) as count:
                for progress in job.run():
                    count(progress.done, progress.total, f"{progress.failed} failed" * bool(progress.failed))
        except KeyboardInterrupt:
            click.echo(f"Interrupted: {job.journal.path} keeps what is done; the same command continues.", err=True)
            raise
        self._conclude(offline.failures(target), len(lines), target)

    def _template(self) -> dict[str, Any]:
        given = {"enable_thinking": self.thinking, "sanitize_control_tokens": self.sanitize_control_tokens or None}
        return {name: value for name, value in given.items() if value is not None}

    def _conclude(self, failed: list[tuple[str | int, str]], total: int, target: "Path") -> None:
        for name, error in failed[:5]:
            click.echo(f"Failed: {name}: {error.splitlines()[0]}", err=True)
        if failed:
            click.echo(f"{len(failed)} of {total} failed; each says why in {target}, as `error`.", err=True)
        click.get_current_context().exit(1 if failed else 0)


# -------------------------------------------------------------------------------------------------------- the prompt


def _piped() -> str | None:
    """What is piped into the command, None when nothing is."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty() or launched.size() > 1:
        return None
    return _standard_input() or None


def _standard_input() -> str:
    """Errors: PromptError when it is closed, or not UTF-8, or has no end."""
    if launched.size() > 1:
        raise PromptError("mlx.launch never closes standard input: give the prompt as TEXT or @FILE.")
    if sys.stdin is None:
        raise PromptError("standard input is closed: it cannot be the prompt.")
    raw = getattr(sys.stdin, "buffer", None)
    try:
        return sys.stdin.read() if raw is None else decoded(raw.read(), "standard input", fault=PromptError)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is closed"
        raise PromptError(f"standard input cannot be read: {why}.") from None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What stands before the prompt: pictures, videos, PDFs. Errors when it is made: UsageError for an option that
    would do nothing."""

    images: tuple[str, ...] = ()
    image_budget: str | None = None
    videos: tuple[str, ...] = ()
    video_frames: int | None = None
    video_rate: float | None = None
    pdfs: tuple[str, ...] = ()
    pages: str | None = None

    def __post_init__(self) -> None:
        for option, value, needed, files in (
            ("--video-frames", self.video_frames, "--video", self.videos),
            ("--video-rate", self.video_rate, "--video", self.videos),
            ("--pages", self.pages, "--pdf", self.pdfs),
        ):
            if value is not None and not files:
                raise click.UsageError(f"{option} would do nothing: there is no {needed}.")

    @property
    def option(self) -> str:
        """The first option that shows something, or nothing."""
        given = {"--image": self.images, "--video": self.videos, "--pdf": self.pdfs}
        return next((option for option, files in given.items() if files), "")

    @property
    def parts(self) -> "list[Message]":
        """As a message holds them, not opened yet."""
        frames = {"frames": self.video_frames} if self.video_frames is not None else {}
        found: list[Message] = [{"type": "image", "image": file} for file in self.images]
        found += [{"type": "video", "video": file, **frames, "rate": self.video_rate} for file in self.videos]
        found += [{"type": "pdf", "pdf": file, "pages": self.pages} for file in self.pdfs]
        return [part | {"budget": self.image_budget} for part in found]


def conversation(prompt: str | None, messages: str | None, system_prompt: str | None, shown: Shown) -> "list[Message]":
    """The chat messages that the options ask for; pictures are not opened yet. Errors: UsageError; PromptError,
    ConfigError for a file that cannot be read and a text that is none."""
    from .text.gate import PICTURES, check_messages, check_text
    from .text.pictures.parts import bare, has_pictures, with_budget

    if (prompt is None) == (messages is None):
        raise click.UsageError("give a prompt: TEXT, --prompt (text, @file or - for standard input) or --messages.")
    if messages is not None:
        if system_prompt is not None:
            raise click.UsageError("--system-prompt goes with --prompt; --messages holds its own.")
        if shown.option:
            raise click.UsageError(f"{shown.option} goes with --prompt; --messages holds its own pictures.")
        found = parse_json(_content(messages, "--messages"), messages, fault=PromptError)
        checked = check_messages(bare(found), messages, reads=PICTURES)
        if (budget := shown.image_budget) is not None and not has_pictures(found):
            raise click.UsageError(f"--image-budget would do nothing: {messages} has no picture.")
        return with_budget(found, budget) if budget is not None else found if has_pictures(found) else checked
    assert prompt is not None
    text = _standard_input() if prompt == "-" else prompt
    if prompt.startswith("@"):
        text = decoded(_content(prompt[1:], "--prompt"), prompt[1:], fault=PromptError)
    if not check_text(text, "the prompt").strip():
        raise PromptError("the prompt is empty.")
    if shown.image_budget is not None and not shown.option:
        raise click.UsageError("--image-budget would do nothing: there is no --image, --video or --pdf.")
    system = [] if system_prompt is None else [check_text(system_prompt, "--system-prompt")]
    content = [*shown.parts, {"type": "text", "text": text}] if shown.option else text
    return [*({"role": "system", "content": said} for said in system), {"role": "user", "content": content}]


def _content(file: str, option: str) -> bytes:
    return read_bytes(existing_file(file, option), fault=PromptError)


def _shown(message: "Message") -> str:
    """A message as a recording shows it."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


if __name__ == "__main__":
    main()
