"""`mlx_diffgemma.decide`: how probable each label of a question is, in one pass and without writing an answer."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from .cli import command
from .errors import PromptError
from .obeying import read_text, text_of
from .options import Option, model_options, open_model
from .readers import parse_json

if TYPE_CHECKING:
    from .pipeline.deciding import Decision


@command("decide", machines="share")
@model_options
@click.option("--state", metavar="TEXT|@FILE", help="What the questions are about.")
@click.option(
    "--questions", metavar="FILE.json", help='{"urgent": {"type": "bool", "question": …}, …}; also choice, score.'
)
@click.option("-p", "--prompt", metavar="TEXT|@FILE", help="One question with its matter, for --choice.")
@click.option("--choice", "choices", multiple=True, metavar="TEXT", help="A label of --prompt: give it once for each.")
@click.option(
    "--one-order",
    cls=Option,
    section="Reading",
    is_flag=True,
    help="List the labels in one order, and do not average over all cyclic ones.",
)
@click.option(
    "--calibrate",
    cls=Option,
    section="Reading",
    is_flag=True,
    help="Divide by what the labels get when nothing is asked about.",
)
@click.option(
    "--canvas-length",
    cls=Option,
    section="Reading",
    type=click.IntRange(1),
    help="Tokens of a shorter canvas than the model's: quicker, and less right.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the canvas's noise.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list with everything.")
def main(source: dict[str, Any], as_json: bool, one_order: bool, **wanted: Any) -> None:
    """Decide questions about a state, and say how probable each label is: no answer is written."""
    from .pipeline.deciding import questions_of

    state, questions = _asked(**{name: wanted.pop(name) for name in ("state", "questions", "prompt", "choices")})
    questions_of(questions)
    model = open_model(source, quiet=as_json)
    decisions = model.decide(state, questions, orders=not one_order, **wanted)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(decision) for decision in decisions], ensure_ascii=False))
    else:
        click.echo("\n".join(map(_said, decisions)))


def _asked(state: str | None, questions: str | None, prompt: str | None, choices: tuple[str, ...]) -> tuple[str, Any]:
    """State and questions. Errors: UsageError when they are neither given one way nor the other, PromptError."""
    if prompt is not None and choices and state is questions is None:
        return text_of(prompt, "--prompt"), {"answer": {"question": "Which is it?", "choices": choices}}
    if state is None or questions is None or prompt is not None or choices:
        raise click.UsageError("give --state and --questions, or --prompt and a --choice for each label.")
    return text_of(state, "--state"), parse_json(read_text(questions, "--questions"), questions, fault=PromptError)


def _said(decision: "Decision") -> str:
    """One line: the answer, then the labels, the most probable first."""
    answer = decision.answer if decision.mean is None else f"{decision.answer} (mean {decision.mean:.2f})"
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    ranked = sorted(decision.probabilities.items(), key=lambda item: -item[1])
    shares = " · ".join(f"{label} {share:.1%}" for label, share in ranked[:10])
    return f"{decision.name}: {answer}   {shares} · outside of the labels {decision.outside:.1%}"


if __name__ == "__main__":
    main()
