"""Regular expressions at random, held against `re` itself."""

import re
from random import Random

from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.text.language.regex import regex
from tests.text.schemas import Sampler

LETTERS = "ab0_ \n-A\x00\x7f\x80é߿ࠀ\uffff漢😀\U0010ffffΩ٣"  # the edges of UTF-8, and a digit that is not ASCII's
CLASSES = [r"\d", r"\w", r"\s", r"\D", r"\W", r"\S"]


def random_pattern(random: Random, depth: int = 4) -> str:
    """A pattern of the supported syntax; anchors stand only where they may."""
    kind = random.random()
    if depth == 0 or kind < 0.3:
        atom = random.choice(
            [_letter, _set, lambda r: ".", lambda r: r.choice(CLASSES), lambda r: r"\u00e9", lambda r: r"\x41"]
        )
        return atom(random)
    if kind < 0.55:
        return random_pattern(random, depth - 1) + random_pattern(random, depth - 1)
    if kind < 0.75:
        either, other = random_pattern(random, depth - 1), random_pattern(random, depth - 1)
        return f"({random.choice(['', '?:', '?s:'])}{either}|{other})"
    if kind < 0.78:
        return f"({random_pattern(random, depth - 1)}|)"
    if kind < 0.82 and depth == 4:
        return random.choice(["^", r"\A", ""]) + f"(?:{random_pattern(random, 3)})" + random.choice(["$", r"\Z", ""])
    least = random.randint(0, 2)
    counts = [f"{{{least},{least + random.randint(0, 2)}}}", f"{{{least}}}", f"{{{least},}}", f"{{,{least}}}"]
    return (
        f"(?:{random_pattern(random, depth - 1)})" + random.choice(["*", "+", "?", *counts]) + random.choice(["", "?"])
    )


def _letter(random: Random) -> str:
    return re.escape(random.choice(LETTERS))


def _set(random: Random) -> str:
    members = []
    for _ in range(random.randint(1, 3)):
        low, high = sorted(random.sample(LETTERS, 2))
        members.append(random.choice([_letter(random), f"{re.escape(low)}-{re.escape(high)}", random.choice(CLASSES)]))
    return f"[{random.choice(['', '', '^'])}{''.join(members)}]"


def disagreements(random: Random, strings: int) -> tuple[int, int, list[tuple[str, str]]]:
    """How many patterns and strings were tried, and the pairs on which `re.fullmatch` and our automaton disagree. A
    third of the strings are random, a third members of the language, a third such members with one letter changed."""
    patterns, tried, wrong = 0, 0, []
    while tried < strings:
        pattern = random_pattern(random)
        try:
            automaton = regex(pattern).parts[0]
        except ConfigError as error:
            if "matches no text" not in str(error):
                wrong.append((pattern, str(error)))
            continue
        patterns += 1
        matches, sampler = re.compile(pattern, re.ASCII).fullmatch, Sampler.of(automaton)
        for _ in range(30):
            texts = ["".join(random.choices(LETTERS, k=random.randint(0, 6))), sampler.draw(random, 20).decode()]
            at = random.randrange(len(texts[1]) + 1)
            texts.append(texts[1][:at] + random.choice(LETTERS) + texts[1][at + random.randint(0, 1) :])
            tried += len(texts)
            wrong += [(pattern, t) for t in texts if automaton.accepts(t) != bool(matches(t))]
            wrong += [(pattern, texts[1])] if not matches(texts[1]) else []
    return patterns, tried, wrong
