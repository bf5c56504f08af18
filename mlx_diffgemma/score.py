"""`mlx_diffgemma.score`: how likely the model finds a text, token by token, by its causal pass."""

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from .cli import command
from .disk import existing_file
from .errors import PromptError
from .options import model_options, open_model
from .readers import decoded, read_bytes
from .text.gate import check_text

if TYPE_CHECKING:
    from .pipeline.model import DiffusionGemma
    from .pipeline.scores import TextScores


@command("score")
@click.argument("file", metavar="FILE|-")
@model_options
@click.option("--stride", type=click.IntRange(1), metavar="N", help="Windows for a text longer than the context.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with every token.")
def main(file: str, source: dict[str, Any], stride: int | None, as_json: bool) -> None:
    """Score a text: the log-probability of every token given those before it, perplexity, bits a byte.

    On a terminal the text is shown with its unlikely tokens marked.
    """
    text = _read(file)
    loaded = open_model(source, quiet=as_json)
    found = loaded.score(text, stride=stride)
    if as_json:
        click.echo(json.dumps(as_data(loaded, text, found), ensure_ascii=False))
        return
    _show(loaded, found)
    told = as_data(loaded, text, found)
    click.echo(
        f"perplexity {found.perplexity:.6g} · {told['bits_per_byte']:.4f} bits a byte ·"
        f" {found.avg_logprob:.4f} nats a token · {len(found.tokens)} tokens"
    )


def as_data(model: "DiffusionGemma", text: str, found: "TextScores") -> dict[str, Any]:
    """Everything about a scored text; log-probabilities in nats."""
    tokens = zip(found.tokens, found.logprobs, strict=True)
    return {
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte(len(text.encode())),
        "avg_logprob": found.avg_logprob,
        "tokens": [{"id": i, "text": model.tokenizer.piece(i), "logprob": nats} for i, nats in tokens],
    }


def _show(model: "DiffusionGemma", found: "TextScores") -> None:
    from rich.console import Console

    from .terminal.marks import marked

    console = Console()
    if console.is_terminal and not console.is_dumb_terminal:
        decode = model.tokenizer.decode
        click.echo(marked(found.tokens, found.logprobs, decode, columns=console.width, color=not console.no_color))
        click.echo()


def _read(file: str) -> str:
    """Errors: PromptError for a text that cannot be read or is empty, ConfigError for a path that is no file."""
    if file == "-":
        if sys.stdin is None:
            raise PromptError("standard input is closed: there is no text to score.")
        text, where = check_text(sys.stdin.read(), "standard input"), "standard input"
    else:
        path = existing_file(file, "FILE")
        text, where = decoded(read_bytes(path, fault=PromptError), file, fault=PromptError), file
    if not text:
        raise PromptError(f"{where} is empty: there is nothing to score.")
    return text


if __name__ == "__main__":
    main()
