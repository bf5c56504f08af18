"""Languages: their sizes and how long they take, and how often they disagree with what others say of the same text.

    python -m benchmarks.languages [--runs 5] [--out FILE]      sizes, in bytes: tokens are another matter
    python -m benchmarks.languages --check [--scale 10]         random patterns and schemas: the tests', but more
    python -m benchmarks.languages --suite FOLDER               JSON Schema's own test-suite: its tests/draft2020-12

Of the suite it is asked that no invalid value is accepted. A valid value need not be: unnamed properties, other orders,
other spellings of a number and some formats are never written. Those that are not accepted are listed.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import jsonschema

from benchmarks import common
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.text.language.automaton import Automaton, Language
from mlx_diffgemma.text.language.regex import regex
from mlx_diffgemma.text.language.scalars import strings
from mlx_diffgemma.text.language.syntax import Layout
from mlx_diffgemma.text.language.texts import free_text
from mlx_diffgemma.text.language.values import any_json, json_schema, tool_call
from tests.text import oracle, patterns
from tests.text.schemas import HAND, ORDER, PETS, TREE, Sampler, columns, random_schema, texts

LINE = Layout(indents=())
TEXT = {"type": "string"}
FIELDS: dict[str, Any] = {
    "name": TEXT,
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "mail": TEXT,
    "state": {"enum": ["active", "inactive", "pending"]},
    "date": TEXT | {"format": "date"},
}
BOUNDED = FIELDS | {name: TEXT | {"maxLength": 40} for name in ("name", "mail")}


def fields(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


LANGUAGES: dict[str, Callable[[], Language]] = {
    "enum of 5 labels": lambda: json_schema({"enum": ["very bad", "bad", "neutral", "good", "very good"]}),
    r"date \d{4}-mm-dd": lambda: regex(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"),
    "free text": free_text,
    "5 fields, open strings": lambda: json_schema(fields(FIELDS)),
    "5 fields, one line": lambda: json_schema(fields(FIELDS), layout=LINE),
    "5 fields, maxLength 40": lambda: json_schema(fields(BOUNDED)),
    "nested order": lambda: json_schema(ORDER),
    "nested order, one line": lambda: json_schema(ORDER, layout=LINE),
    "oneOf by a const": lambda: json_schema(PETS),
    "tree, depth 4": lambda: json_schema(TREE),
    "any JSON, depth 2": lambda: any_json(depth=2),
    "any JSON, depth 4": any_json,
    "40 optional fields": lambda: json_schema(
        {"properties": {f"field {n}": TEXT for n in range(40)}, "type": "object"}
    ),
    "enum of 2,000 labels": lambda: json_schema({"enum": [f"label {n * 7919 % 100_000}" for n in range(2000)]}),
    "string, maxLength 1000": lambda: json_schema(TEXT | {"maxLength": 1000}),
    "call with the order": lambda: tool_call([{"name": "place_order", "parameters": ORDER}]),
}


def sizes(runs: int) -> dict[str, dict[str, float]]:
    """States, classes of bytes and the median of seconds of every language; nothing is cached from run to run."""
    found = {}
    for name, make in LANGUAGES.items():
        seconds = []
        for _ in range(runs):
            strings.cache_clear()
            begun = time.perf_counter()
            [automaton] = make().parts
            seconds.append(time.perf_counter() - begun)
        assert isinstance(automaton, Automaton)
        classes = columns(automaton).shape[1]
        found[name] = {"states": automaton.states, "classes": classes, "seconds": statistics.median(seconds)}
    return found


def against_jsonschema(random: Random, schemas: int) -> dict[str, Any]:
    """Texts drawn from schemas by hand and at random, parsed and validated; and the texts with a letter changed that
    are still accepted."""
    counts, wrong = Counter[str](), []
    for schema in [*(schema for schema, _, _ in HAND if "nullable" not in str(schema)), *_random(random, schemas)]:
        counts["schemas"] += 1
        try:
            sampler = Sampler.of(_automaton(schema))
        except ConfigError as error:
            counts["unsatisfiable" if "nothing satisfies" in str(error) else "refused"] += 1
            continue
        check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        for _ in range(20):
            text = sampler.draw(random, random.randint(0, 80)).decode()
            at = random.randrange(len(text) + 1)
            changed = text[:at] + random.choice('"\\u09-e.,:{}[] \n😀') + text[at + random.randint(0, 1) :]
            for written in [text, *([changed] if sampler.automaton.accepts(changed) else [])]:
                counts["texts"] += 1
                if not check.is_valid(json.loads(written)):
                    wrong.append(f"{schema}: {written}")
    return {**counts, "wrong": wrong}


def against_llguidance(random: Random, schemas: int) -> dict[str, Any]:
    """Which bytes may follow every prefix of a few texts."""
    counts, wrong = Counter[str](), []
    for schema in [*(schema for schema, _, _ in HAND), *_random(random, schemas)]:
        if oracle.comparable(schema) and (found := oracle.compare(schema, random, 4)):
            counts += found[0] + Counter(["schemas"])
            wrong += found[1]
    return {**counts, "wrong": wrong}


def _random(random: Random, schemas: int) -> list[Any]:
    return [random_schema(random, random.randint(1, 3)) for _ in range(schemas)]


def _automaton(schema: Any) -> Automaton:
    [automaton] = json_schema(schema).parts
    assert isinstance(automaton, Automaton)
    return automaton


def against_suite(folder: Path) -> dict[str, Any]:
    """The cases of JSON Schema's test-suite whose schema we take."""
    counts, wrong, unwritten = Counter[str](), [], []
    for path in sorted([*folder.glob("*.json"), *folder.glob("optional/format/*.json")]):
        for case in json.loads(path.read_text("utf-8")):
            try:
                automaton = _automaton(case["schema"])
            except ConfigError:
                counts["schemas refused"] += 1
                continue
            counts["schemas"] += 1
            for test in case["tests"]:
                accepted = any(map(automaton.accepts, texts(test["data"])))
                counts[f"{'valid' if test['valid'] else 'invalid'}, {'accepted' if accepted else 'not accepted'}"] += 1
                name = f"{path.stem}: {case['description']}: {test['description']}"
                if accepted != test["valid"]:
                    (wrong if accepted else unwritten).append(name)
    return {**counts, "wrong": wrong, "unwritten": unwritten}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    document: dict[str, Any] = {"benchmark": "languages"}
    if options.suite:
        document["suite"] = against_suite(options.suite)
    if options.check:
        tried, total, wrong = patterns.disagreements(Random(options.seed), 24_000 * options.scale)
        document["re"] = {"patterns": tried, "strings": total, "wrong": wrong}
        document["jsonschema"] = against_jsonschema(Random(options.seed), 200 * options.scale)
        document["llguidance"] = against_llguidance(Random(options.seed), 200 * options.scale)
    if not options.suite and not options.check:
        document["sizes"] = sizes(options.runs)
        rows = [[n, f"{s['states']:,}", str(s["classes"]), f"{s['seconds']:.3f}"] for n, s in document["sizes"].items()]
        common.report(rows, ["language", "states", "classes", "seconds"], f"languages, median of {options.runs} runs")
    for name in ("suite", "re", "jsonschema", "llguidance"):
        for what, figure in document.get(name, {}).items():
            lines = figure if isinstance(figure, list) else []
            print(f"{name:>10}  {what}: {len(lines) if isinstance(figure, list) else f'{figure:,}'}")
            print("".join(f"            {line}\n" for line in lines), end="")
    common.finish(common.provenance() | document, options.out)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="hold random languages against re, jsonschema, llguidance")
    parser.add_argument("--scale", type=int, default=10, help="how many times as many as in the tests")
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--suite", type=Path, help="JSON-Schema-Test-Suite/tests/draft2020-12")
    parser.add_argument("--out", type=Path, help="write the JSON document there as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
