"""`mlx_diffgemma.check`: does this installation, on this device, compute what the reference computes?

Five parts: recordings of transformers are replayed; products and attention of the shapes the model uses, ragged edges
included, are compared with the same in float64; so is what only a device can show, and the vision tower; and a pack of
the released model is compared with its published logits.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .cli import command

if TYPE_CHECKING:
    from .proof.findings import Finding


@command("check")
@click.option("--model", metavar="PATH|REPO", help="A pack of the released model: its tower and published logits too.")
@click.option("--share", type=click.Choice(["2", "4"]), help="Products in so many machines' pieces, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead.")
def main(model: str | None, share: str | None, as_json: bool) -> None:
    """Compare what this installation computes with recordings of the reference. Exit status 1 if anything differs."""
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # the recordings are float32; MLX reads this at its first product
    from .files import hub
    from .proof.device import device
    from .proof.machine import machine
    from .proof.pieces import pieces
    from .proof.products import products
    from .proof.replay import replay
    from .proof.sight import sight

    folder = None if model is None else hub.resolve(model)
    found: list[Finding] = []
    for title, findings in (
        ("recordings of the reference", replay()),
        ("products and attention", products()),
        ("this device", device()),
        *([("products in pieces", pieces(int(share)))] if share else []),
        ("the vision tower", sight(folder)),
        ("published logits", _published(model)),
    ):
        own = list(findings if as_json else _watched(title, findings))
        if not as_json:
            say(own)
        found += own
    passed = all(finding.passed is not False for finding in found)
    if as_json:
        click.echo(json.dumps({"passed": passed, **machine(), "findings": [as_dict(finding) for finding in found]}))
    else:
        click.echo("This installation computes what the reference computes." if passed else _report(found))
    click.get_current_context().exit(0 if passed else 1)


def _watched(title: str, findings: "Iterator[Finding]") -> "Iterator[Finding]":
    """The same, with the part and the last check shown while the next one runs."""
    from .terminal.console import console

    with console(stderr=True).status(f"Checking {title}") as status:
        for number, finding in enumerate(findings, 1):
            status.update(f"Checking {title}: {number}, {finding.name}")
            yield finding


def _report(found: list["Finding"]) -> str:
    """What a departure means, and where to take it."""
    from importlib.metadata import version

    wrong = {finding.part for finding in found if finding.passed is False}
    whose = "MLX's (github.com/ml-explore/mlx)" if wrong <= {"products", "device"} else "this project's"
    return (
        "This installation is WRONG: do not trust what it generates.\n"
        f"With MLX {version('mlx')}; report the output of mlx_diffgemma.check --json in {whose} issues."
    )


def _published(model: str | None) -> "Iterator[Finding]":
    from .pipeline.loading import load
    from .proof.published import published_of

    yield from published_of(None if model is None else load(model).network, model)


def say(findings: list["Finding"]) -> None:
    """A line for what is wrong, left out or about the model itself; one line for all the rest."""
    good = [finding for finding in findings if finding.passed]
    for finding in findings:
        if finding.passed is not True or finding.part == "published":
            other = "differs" if finding.part == "pieces" else "left out"
            word = {None: other, False: "WRONG", True: "ok"}[finding.passed]
            click.echo(f"{word:8}  {finding.name}: {finding.says}")
    if good and good[0].part != "published":
        worst = max(good, key=lambda finding: finding.figures.get("error", 0.0))
        click.echo(
            f"{'ok':8}  {good[0].part}: {len(good)} of {len(findings)}; the furthest, {worst.name}: {worst.says}"
        )


def as_dict(finding: "Finding") -> dict[str, Any]:
    """For JSON, which has no NaN and no infinity."""
    figures = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in finding.figures.items()
    }
    return dataclasses.asdict(finding) | {"figures": figures}


if __name__ == "__main__":
    main()
