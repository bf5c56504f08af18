"""What a constraint costs: its size, how long it takes to build, and a step under it beside a free one.

    python -m benchmarks.constraints [--tokenizer tokenizer.json] [--hidden 512] [--layers 6] [--runs 3]

At the real vocabulary (262,144 ids) and canvas (256), without a model's weights. A tokenizer file gives the pieces; the
default makes some of Gemma's lengths: counts differ a little, classes and states hardly. The network is step.py's:
hidden size and depth scaled down, so that a step fits a CPU. Its distributions are nearly flat: no class can be left
out, and all positions are unsure, which is what costs most.

    states, classes   of the constraint, with the tail
    ids               that have a class: the rows of the table that a step reads
    pairs             (state, next state): the chain's work
    build             seconds: bytes (schema or regex to byte automaton), then ids (to token classes)
    chain             seconds a step on the host: classes joined, chain, path, ids drawn
    pass, step        the vocabulary pass, and a whole step, conditioned ÷ free: runs alternate, medians. Led by the
                      model, as a canvas's first steps are, or by the constraint
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import common, models, step
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.generation.constraint import conditioned
from mlx_diffgemma.generation.constraint.automaton import Constraint, build
from mlx_diffgemma.generation.constraint.chain import condition
from mlx_diffgemma.generation.constraint.classes import ClassOrder, Head, read
from mlx_diffgemma.generation.constraint.conditioned import Guide
from mlx_diffgemma.generation.constraint.parts import Pattern, Spelled, Spellings
from mlx_diffgemma.generation.vocabulary import Shaping
from mlx_diffgemma.text.language.automaton import Automaton, Language
from mlx_diffgemma.text.language.regex import regex
from mlx_diffgemma.text.language.texts import fill, free_text
from mlx_diffgemma.text.language.values import any_json, json_schema

VOCABULARY, CANVAS = 262_144, 256
PAD, EOS, TURN_END = 0, 1, 106
NUMBER, TEXT = {"type": "integer"}, {"type": "string"}
TIMED = ("5 labels", "5 fields, open strings", "5 fields, maxLength 40")  # steps are measured with these


def record(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def five_fields(text: dict[str, Any]) -> dict[str, Any]:
    states = {"enum": ["new", "shipped", "returned"]}
    return record(name=text, age=NUMBER, email=text, status=states, ok={"type": "boolean"})


def order() -> dict[str, Any]:
    item = record(sku=TEXT, count=NUMBER, price={"type": "number"})
    items = {"type": "array", "items": item, "minItems": 1, "maxItems": 4}
    return record(id=NUMBER, customer=record(name=TEXT, email=TEXT), items=items, total={"type": "number"})


LANGUAGES: dict[str, Callable[[], Language]] = {
    "5 labels": lambda: regex("positive|negative|neutral|mixed|unknown"),
    "a date": lambda: regex(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"),
    "free text": free_text,
    "code, a hole between two lines": lambda: fill("def f(x):\n<fill>\n    return x\n"),
    "5 fields, open strings": lambda: json_schema(five_fields(TEXT)),
    "5 fields, maxLength 40": lambda: json_schema(five_fields(TEXT | {"maxLength": 40})),
    "a nested order": lambda: json_schema(order()),
    "any JSON, 2 deep": lambda: any_json(depth=2),
    "any JSON, 4 deep": lambda: any_json(depth=4),
    "a string, maxLength 1000": lambda: json_schema(TEXT | {"maxLength": 1000}),
}


def pieces_of(path: Path | None) -> list[bytes | None]:
    """The bytes of every id, of a tokenizer.json or made up."""
    if path is None:
        return made_up(VOCABULARY)
    raw = json.loads(path.read_text("utf-8"))
    special = {token["id"] for token in raw["added_tokens"] if token["special"] or "unused" in token["content"]}
    pieces: list[bytes | None] = [None] * VOCABULARY
    for piece, i in raw["model"]["vocab"].items():
        is_byte = len(piece) == 6 and piece.startswith("<0x")
        text = bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()
        pieces[i] = None if i in special else text
    return pieces


def made_up(count: int) -> list[bytes | None]:
    """All bytes, then words of letters, digits and marks, a sixth of them in other scripts, as long as Gemma's."""
    rng = random.Random(0)
    latin = "etaoinshrdlcumwfgypbvkjxqz" * 6 + "ETAOINSHRDLCU" + "0123456789" + "\"'{}[]:,.-_/\\()<>=+*#\n\t"
    other = "".join(map(chr, [*range(0x430, 0x450), *range(0x3B1, 0x3CA), *range(0x4E00, 0x4F00), 0x1F600]))
    words: dict[str, None] = {}
    while len(words) < count - 256 - TURN_END - 1:
        letters = other if rng.random() < 1 / 6 else latin
        length = min(max(1, round(rng.gauss(6, 3))), 16)
        words["".join(rng.choices(letters, k=length)).rjust(length + (rng.random() < 0.5))] = None
    return [None] * (TURN_END + 1) + [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]


def spelled(text: str, ids: dict[bytes, int]) -> tuple[int, ...]:
    """The text by its longest pieces: some spelling that this vocabulary has."""
    rest, found = text.encode(), []
    while rest:
        length = next(n for n in range(min(len(rest), 48), 0, -1) if rest[:n] in ids)
        found.append(ids[rest[:length]])
        rest = rest[length:]
    return tuple(found)


def constraint_of(language: Language, spellings: Spellings, ids: dict[bytes, int], most: int) -> Constraint:
    """The language over ids; an automaton with control symbols is not among them here."""
    parts = [
        Pattern(transitions=part.transitions, start=part.start, accepting=part.accepting)
        if isinstance(part, Automaton)
        else Spelled(choices=tuple(spelled(text, ids) for text in part.texts))
        for part in language.parts
    ]
    return build(parts, spellings, stop_ids=[EOS, TURN_END], pad_id=PAD, most=most)


def sizes(pieces: list[bytes | None]) -> tuple[dict[str, Constraint], list[list[Any]]]:
    """Every language's constraint, and its row of the table."""
    spellings, ids = Spellings(pieces), {piece: i for i, piece in enumerate(pieces) if piece}
    made, rows = {}, []
    for name, language in LANGUAGES.items():
        start = time.perf_counter()
        compiled = language()
        seconds = time.perf_counter() - start
        try:
            constraint = constraint_of(compiled, spellings, ids, most=20_000)
        except ConfigError as error:
            rows.append([name, None, None, None, str(error).split(": ")[1].split(" or")[0], None, f"{seconds:.2f}"])
            continue
        made[name] = constraint
        classes = (constraint.classes >= 0).sum()
        counts = [constraint.states, constraint.table.shape[1], int(classes), len(constraint.pairs.target)]
        rows.append([name, *counts, constraint.fewest, f"{seconds:.2f} + {constraint.seconds:.2f}"])
        print(*rows[-1], sep="  ", flush=True)
    return made, rows


def chain_seconds(constraint: Constraint, hidden: mx.array, head: Head) -> float:
    """What the host does in a step."""
    reading = read(hidden, head, ClassOrder(constraint.classes), keep=False)
    draws = np.random.default_rng(0).random((2, CANVAS))
    start = time.perf_counter()
    chain = condition(constraint, reading.sums, constraint.start, CANVAS)
    reading.pick(chain.sample(draws[0]), draws[1])
    return time.perf_counter() - start


def times(made: dict[str, Constraint], raw: dict[str, Any], runs: int) -> list[list[Any]]:
    """Free, and conditioned, led by the model or by the constraint: the vocabulary pass and the step."""
    network = models.our_network(raw)
    ours = step.Ours(network, models.keys_and_values(network, 300), [], commits=0)
    path = ours.noise.path(0, step.STEP)

    def work(guide: Guide | None, *, led: bool, whole: bool) -> Callable[[], None]:
        def run() -> None:
            hidden, table = ours.forward() if whole else ours.hidden, network.decoder.embed_tokens
            sums = conditioned.walk(hidden, table, ours.shaping, [guide], led=led, tuning=network.tuning)
            reading = sums.read(ours.noise.draws(0, step.STEP), path)
            mx.eval(reading.best, reading.guess, reading.entropy, reading.tail, reading.signal)

        return run

    head, rows = Head(table=network.decoder.embed_tokens, shaping=Shaping(cap=30.0, temperature=0.6)), []
    for name in (name for name in TIMED if name in made):
        constraint = made[name]
        guide = Guide(constraint=constraint, order=ClassOrder(constraint.classes), state=constraint.start, left=CANVAS)
        ways = {
            f"{kind} {part}": work(None if kind == "free" else guide, led=kind == "led", whole=part == "step")
            for kind in ("free", "led", "held")
            for part in ("pass", "step")
        }
        seconds = {way: float(np.median(found)) for way, found in common.alternate(ways, runs).items()}
        host = chain_seconds(constraint, ours.hidden[0], head)
        ratios = [
            f"{seconds[f'{kind} {part}'] / seconds[f'free {part}']:.2f}"
            for kind in ("led", "held")
            for part in ("pass", "step")
        ]
        rows.append([name, f"{host:.3f}", *(f"{seconds[way]:.2f}" for way in ways), *ratios])
        print(*rows[-1], sep="  ", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json of 262,144 pieces")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sizes-only", action="store_true")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    made, rows = sizes(pieces_of(chosen.tokenizer))
    common.report(rows, ["language", "states", "classes", "ids", "pairs", "fewest", "build, s"], "Sizes")
    document = {"provenance": common.provenance(), "sizes": rows}
    if not chosen.sizes_only:
        found = times(made, models.config(chosen.hidden, chosen.layers, chosen.experts, VOCABULARY), chosen.runs)
        kinds = ("by the model", "by the constraint")
        ways = [f"{part} {way}" for way in ("free", *kinds) for part in ("pass", "step")]
        ratios = [f"{part} {way} ×" for way in kinds for part in ("pass", "step")]
        header = ["language", "chain, s", *ways, *ratios]
        common.report(found, header, "Seconds")
        document["times"] = found
    common.finish(document, chosen.out)


if __name__ == "__main__":
    main()
