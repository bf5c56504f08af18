"""`mlx_diffgemma.chat`: a conversation on the live canvas."""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .cli import command
from .disk import new_file, reason, replacing
from .errors import DiffGemmaError, PeerError
from .generation.settings import GenerationOptions
from .options import BUDGET, Option, generation_options, model_options, open_model, run_options

if TYPE_CHECKING:
    from .pipeline.model import DiffusionGemma
    from .pipeline.results import Result

GENERATION = GenerationOptions.__annotations__


@command("chat", machines="share")
@model_options
@click.option("--system-prompt", metavar="TEXT", help="Goes before the conversation.")
@click.option("--thinking/--no-thinking", default=None, help="Ask for thinking, or for none.")
@click.option("--show-thinking", is_flag=True, help="Print the thoughts before each answer.")
@click.option(
    "--sanitize-control-tokens",
    cls=Option,
    section="Prompt",
    is_flag=True,
    help="Control tokens in what you type are plain text.",
)
@click.option("--image-budget", cls=Option, section="Prompt", metavar="N", help=BUDGET)
@generation_options
def main(
    source: dict[str, Any],
    image_budget: str | None,
    system_prompt: str | None,
    thinking: bool | None,
    show_thinking: bool,
    sanitize_control_tokens: bool,
    options: dict[str, Any],
) -> None:
    """Talk with the model. /help lists what else can be typed; Ctrl-C stops an answer, Ctrl-D ends the talk."""
    loaded = open_model(source)
    options = run_options(loaded, options) | ({"enable_thinking": thinking} if thinking is not None else {})
    options |= {"sanitize_control_tokens": True} if sanitize_control_tokens else {}
    talk = Talk(loaded, system_prompt, options, show_thinking=show_thinking, image_budget=image_budget)
    name = source.get("model", "The built-in model")
    ask = _line_editor(f"{name} listens. /help lists commands, Ctrl-D ends the talk.")
    while (line := ask()) is not None:
        try:
            if line.startswith("/"):
                talk.obey(line)
            elif line.strip():
                talk.answer(line)
        except PeerError:
            raise
        except DiffGemmaError as error:
            click.echo(f"Error: {error}", err=True)
        except EOFError:
            break


class Talk:
    """The conversation, and the commands that start with a slash. Each one's docstring is its help."""

    def __init__(
        self,
        model: "DiffusionGemma",
        system: str | None,
        options: dict[str, Any],
        *,
        show_thinking: bool,
        image_budget: str | None = None,
    ):
        self.model, self.show_thinking, self.image_budget = model, show_thinking, image_budget
        self.pictures: list[dict[str, Any]] = []  # parts that go before the next message
        self.chat = model.chat(system, **options)
        self.last: Result | None = None

    def answer(self, text: str) -> None:
        from .terminal import sinks

        stdout = sinks.on_stdout(self.model.tokenizer.decode, show_thinking=self.show_thinking)
        try:
            content = [*self.pictures, {"type": "text", "text": text}] if self.pictures else text
            self.last = said = sinks.show(self.chat.stream(content), stdout).result
            self.pictures = []
            self._mark(said)
            if not said.text.strip() and not said.tool_calls:
                click.echo("(an empty reply: say it in another way, or see --avoid-empty)", err=True)
        except KeyboardInterrupt:
            click.echo("(stopped: this turn is forgotten)", err=True)

    def _mark(self, result: "Result") -> None:
        from rich.console import Console

        from .terminal.marks import likelihood, marked

        console = Console()
        if result.logprobs is None or result.avg_logprob is None:
            return
        if console.is_terminal and not console.is_dumb_terminal:
            decode, color = self.model.tokenizer.decode, not console.no_color
            click.echo(marked(result.tokens, result.logprobs, decode, columns=console.width, color=color))
        click.echo(likelihood(result.avg_logprob), err=True)

    def obey(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        action = self.commands().get(name)
        if action is None:
            raise DiffGemmaError(f"there is no command /{name}; /help lists them.")
        action(argument.strip())

    def commands(self) -> dict[str, Callable[[str], None]]:
        actions = (self.help, self.image, self.video, self.pdf, self.reset, self.save, self.seed, self.decoding)
        actions = (*actions, self.logprobs, self.stats, self.exit)
        return {action.__name__: action for action in actions}

    def help(self, _: str) -> None:
        """list these commands"""
        for name, action in self.commands().items():
            click.echo(f"/{name:8} {action.__doc__}")

    def image(self, file: str) -> None:
        """FILE|URL: a picture that goes before the next message; several times for several"""
        self._show("image", file)

    def video(self, file: str) -> None:
        """FILE|FOLDER: a video, or a folder of its frames, before the next message"""
        self._show("video", file)

    def pdf(self, file: str) -> None:
        """FILE: the pages of a PDF before the next message"""
        self._show("pdf", file)

    def _show(self, kind: str, file: str) -> None:
        if not file:
            raise DiffGemmaError(f"/{kind} needs the name of a file, or a URL.")
        part = {"type": kind, kind: file, "budget": self.image_budget}
        [message] = self.model.opened([{"role": "user", "content": [part]}])
        self.pictures += message["content"]
        click.echo(f"{message['content'][0][kind]}", err=True)

    def reset(self, _: str) -> None:
        """forget the conversation, but not the system prompt"""
        self.chat.reset()
        self.pictures = []

    def save(self, file: str) -> None:
        """FILE.json: write the conversation, as generate --messages reads it"""
        from .text.pictures.parts import written

        if not file:
            raise DiffGemmaError("/save needs the name of a file.")
        path, messages = new_file(file, "/save"), written(self.chat.messages)
        try:
            with replacing(path, "w") as stream:
                stream.write(json.dumps(messages, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise DiffGemmaError(
                f"/save {path} failed: {reason(error)}. What was there before is still there."
            ) from None

    def seed(self, number: str) -> None:
        """N: use this seed from the next turn on; without N a new one each turn"""
        if number and not number.isdecimal():
            raise DiffGemmaError(f"/seed {number}: expected a whole number, or nothing.")
        self.chat.options["seed"] = int(number) if number else None

    def decoding(self, name: str) -> None:
        """diffusion|autoregressive: a canvas at a time, or token by token, from the next turn on"""
        options = {key: value for key, value in self.chat.options.items() if key in GENERATION} | {"decoding": name}
        self.model.generation_config.replace(**options)  # refuses what the chat's other options exclude
        self.chat.options["decoding"] = name

    def logprobs(self, number: str) -> None:
        """K|off: show each answer once more with its unlikely tokens marked, and K alternatives in its data"""
        if number and number != "off" and not number.isdecimal():
            raise DiffGemmaError(f"/logprobs {number}: expected a whole number, off, or nothing.")
        self.chat.options["logprobs"] = number != "off" and (int(number) if number else True)

    def stats(self, _: str) -> None:
        """what the last answer cost"""
        from .terminal.sinks import summary

        click.echo(summary(self.last) if self.last else "nothing was said yet")

    def exit(self, _: str) -> None:
        """end the talk, as Ctrl-D does"""
        raise EOFError


def _line_editor(greeting: str) -> Callable[[], str | None]:
    """Reads a line; None at the end of the input. On a terminal with a greeting, editing and history, and there
    Ctrl-C clears the line."""
    prompt = ""
    if sys.stdin is not None and sys.stdin.isatty():
        import readline  # noqa: F401  input() edits lines and remembers them once this is imported

        prompt = "› "
        click.echo(greeting, err=True)

    def ask() -> str | None:
        while True:
            try:
                return None if sys.stdin is None else input(prompt)
            except EOFError:
                if prompt:
                    click.echo()
                return None
            except KeyboardInterrupt:
                if not prompt:
                    raise
                click.echo()

    return ask


if __name__ == "__main__":
    main()
