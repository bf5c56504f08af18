"""Whether constraints hold, and what they cost or bring in answers.

    python -m benchmarks.obey schemas [--count 200]     random schemas and texts with holes: valid, ended, pins kept
    python -m benchmarks.obey code [--count 100]        gaps in code and lines of it written anew: is the rest kept
    python -m benchmarks.obey answers [--count 120]     right answers and steps, free and conditioned
    python -m benchmarks.obey gaps [--count 120]        the same of texts with a gap, and of lines written anew
    python -m benchmarks.obey decide [--count 200]      accuracy and calibration of decisions, beside written answers

`schemas` and `code` run the built-in model with noised weights (0.35 of each matrix's RMS) and a small random network
that never settles: what they write on their own is noise. The questions are in benchmarks/obey_answers.py.
"""

import argparse
import json
import random
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema

import mlx_diffgemma
from benchmarks import common, obey_answers
from benchmarks.obey_answers import NOISE
from mlx_diffgemma import Hole, load
from mlx_diffgemma.errors import ConfigError, PromptError, TokenizerError
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.results import Result

Validator = jsonschema.Draft202012Validator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["schemas", "code", "answers", "gaps", "decide"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result there, too")
    asked = parser.parse_args()
    usual = {"schemas": 200, "code": 100, "decide": 200}.get(asked.what, 120)
    made = WHAT[asked.what](asked.count or usual, asked.seed)
    common.finish(common.provenance() | {"what": asked.what, "seed": asked.seed, "found": made}, asked.out)


def spoilt_models(folder: Path, seed: int) -> dict[str, DiffusionGemma]:
    """What can be relied on for nothing."""
    from tests import small

    return {
        f"built-in model, noise {NOISE}": obey_answers.noised(load(BUILT_IN), NOISE, seed),
        "random network": small.model(folder, seed=seed, branches=1.0, sharpness=1.0),
    }


# ------------------------------------------------------------------------------------------------------- do they hold


def schemas(count: int, seed: int) -> dict[str, Any]:
    return _each(lambda model: held(model, count, seed), seed)


def _each(run: Callable[[DiffusionGemma], str], seed: int) -> dict[str, Any]:
    """What a run says of every spoilt model."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in spoilt_models(Path(folder), seed).items():
            found[name] = run(model)
            print(f"{name}: {found[name]}", flush=True)
    return found


def held(model: DiffusionGemma, count: int, seed: int, *, steps: int = 3) -> str:
    """Run `count` random schemas and as many texts with holes; what came of it, in words. Errors: AssertionError for an
    answer that breaks its constraint."""
    rng = random.Random(seed)
    room = 2 * model.config.canvas_length
    done = settled = refused = 0
    while done < count:
        schema = random_schema(rng, depth=2)
        try:
            request = model.prepare(
                "JSON, please",
                json_schema=schema,
                max_tokens=room,
                max_denoising_steps=steps,
                seed=rng.randrange(2**32),
            )
        except ConfigError as error:
            assert "shortest has" in str(error) or "too large" in str(error), error
            refused += 1
            continue
        [result] = request.run()
        ended(result, room)
        jsonschema.validate(json.loads(result.text), schema, cls=Validator, format_checker=Validator.FORMAT_CHECKER)
        settled += all(canvas.settled for canvas in result.canvases)
        done += 1
    for _ in range(count):
        text, holes = random_draft(rng, model.config.canvas_length // 2)
        result = model.fill(text, holes=holes, max_denoising_steps=steps, seed=rng.randrange(2**32))
        ended(result, model.config.canvas_length)
        assert result.holes is not None and len(result.holes) == len(holes)
        rebuilt = iter(result.holes)
        assert "".join(run + next(rebuilt, "") for run in text.split("<fill>")) == result.text
        for hole, found in zip(holes, result.holes, strict=True):
            assert hole.most is None or hole.least <= len(found) <= hole.most
            assert hole.choices is None or found in hole.choices
    return (
        f"{done} of {done} schemas valid and ended ({settled} settled, {refused} had no text that fits {room} tokens);"
        f" {count} of {count} texts with holes kept every pin"
    )


def ended(result: Result, room: int) -> None:
    """That the text is complete: by a stop id, or with the last token there was room for."""
    assert result.finish_reason == "stop" or len(result.tokens) == room, (result.finish_reason, len(result.tokens))


def random_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema of the kinds that people write."""
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"type": "integer", **_bounds(rng)},
        lambda: {"type": "number"},
        lambda: {"type": "string", "maxLength": rng.randint(1, 9)},
        lambda: {"type": "string", "pattern": rng.choice(["^[A-Z][a-z]+$", "^\\d{3}-\\d{2}$", "^(a|bc)*d$", "[!?]$"])},
        lambda: {"type": "string", "format": rng.choice(["date", "time", "ipv4", "email"])},
        lambda: {"enum": rng.sample(["red", "green", "blue", 1, 2.5, None, True, "é🙂", '"\\'], rng.randint(1, 4))},
        lambda: {"const": rng.choice(["x y", 0, False, [1, "a"], {"k": None}])},
        lambda: {"type": ["string", "null"], "minLength": 1, "maxLength": 4},
    ]
    if depth:
        inner = lambda: random_schema(rng, depth - 1)  # noqa: E731
        kinds += 2 * [
            lambda: _object(rng, inner),
            lambda: {"type": "array", "items": inner(), "minItems": rng.randint(0, 1), "maxItems": rng.randint(1, 3)},
            lambda: {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": 2},
            lambda: {"anyOf": [inner(), inner()]},
        ]
    return rng.choice(kinds)()


def _bounds(rng: random.Random) -> dict[str, int]:
    low = rng.randint(-50, 50)
    return rng.choice([{}, {"minimum": low}, {"maximum": low}, {"minimum": low, "maximum": low + rng.randint(0, 200)}])


def _object(rng: random.Random, inner: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    names = rng.sample(["name", "age", "a b", "city", "ok", "x"], rng.randint(1, 3))
    required = [name for name in names if rng.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: inner() for name in names},
        "required": required,
        "additionalProperties": False,
    }


def random_draft(rng: random.Random, room: int) -> tuple[str, list[Hole]]:
    """A text of about so many characters with one to three holes."""
    letters = string.ascii_letters + string.digits + " \n\t.,{}<é"
    holes = [
        rng.choice([Hole(least=1), Hole(least=1, most=4), Hole(pattern="[0-9]+"), Hole(choices=("yes", "no", "maybe"))])
        for _ in range(rng.randint(1, 3))
    ]
    runs = ["".join(rng.choices(letters, k=rng.randint(0, room // 6))) for _ in range(len(holes) + 1)]
    return "<fill>".join(runs), holes


# ----------------------------------------------------------------------------------------------------------------- code


def code(count: int, seed: int) -> dict[str, Any]:
    return _each(lambda model: kept(model, count, seed), seed)


def kept(model: DiffusionGemma, count: int, seed: int, *, steps: int = 3) -> str:
    """Gaps at random places in this package's own code, and random lines of it written anew: in words, what came of
    it. Errors: AssertionError where anything but the gap or those lines changed."""
    rng = random.Random(seed)
    files = sorted(Path(mlx_diffgemma.__file__).parent.rglob("*.py"))
    done = refused = 0
    while done < 2 * count:
        lines = rng.choice(files).read_text("utf-8").splitlines(keepends=True)
        first = rng.randrange(max(1, len(lines) - 12))
        text = "".join(lines[first : first + 12])
        options: Any = {"max_denoising_steps": steps, "seed": rng.randrange(2**32)}
        try:
            if done < count:
                _cursor(model, text, rng.randrange(len(text) + 1), options)
            else:
                _lines(model, text, rng.randrange(1, text.count("\n") + 1), options)
            done += 1
        except (PromptError, TokenizerError):
            refused += 1  # a line that the small canvas does not hold, or that has a special token's name in it
    of = f"{count} of {count}"
    return f"{of} gaps and {of} edits kept all other bytes; refused, too long or with a special token: {refused}"


def _cursor(model: DiffusionGemma, text: str, at: int, options: Any) -> None:
    result = model.fill(prefix=text[:at], suffix=text[at:], **options)
    assert result.holes is not None and result.text == text[:at] + result.holes[0] + text[at:], result.text


def _lines(model: DiffusionGemma, text: str, line: int, options: Any) -> None:
    start = "noise" if line % 2 else "text"
    result = model.edit(text, lines=(line, line), instruction="Make it shorter", start=start, **options)
    lines = text.splitlines(keepends=True)
    before, after = "".join(lines[: line - 1]), "".join(lines[line:])
    assert len(result.text) >= len(before + after), result.text
    assert result.text.startswith(before) and result.text.endswith(after), result.text


WHAT: dict[str, Callable[[int, int], Any]] = {
    "schemas": schemas,
    "code": code,
    "answers": obey_answers.answers,
    "gaps": obey_answers.gaps,
    "decide": obey_answers.decisions,
}

if __name__ == "__main__":
    main()
