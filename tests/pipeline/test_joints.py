"""Where literal text meets a part that is none: which tokens may reach over, and that no text is lost or won."""

from itertools import product
from random import Random

import pytest

from mlx_diffgemma import Hole, Language, choices, literal, load, regex
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.pipeline.obeying.constraints import Compiler
from mlx_diffgemma.pipeline.obeying.joints import Joints
from mlx_diffgemma.text.language.automaton import Automaton, Part, Spelled
from mlx_diffgemma.text.language.texts import free_text

TOKENS = [
    None,
    b"a",
    b"b",
    b"c",
    b"ab",
    b"bc",
    b" ",
    b" a",
    b"c ",
    *("é".encode()[i : i + 1] for i in (0, 1)),
    "éa".encode(),
]


def split(text: str) -> list[bytes]:
    """The longest piece first."""
    rest, found = text.encode(), []
    while rest:
        found.append(max((t for t in TOKENS if t and rest.startswith(t)), key=len))
        rest = rest[len(found[-1]) :]
    return found


def healed(language: Language) -> list[Part]:
    return Joints(TOKENS, split).healed(language.parts)


def takes(parts: list[Part], text: bytes) -> bool:
    """Whether the parts, one after the other, spell the text in some way."""
    if not parts:
        return not text
    first, rest = parts[0], parts[1:]
    for end in range(len(text) + 1):
        here = text[:end]
        own = [t.encode() for t in first.texts] if isinstance(first, Spelled) else None
        if (here in own if own is not None else first.accepts(here)) and takes(rest, text[end:]):  # type: ignore[union-attr]
            return True
    return False


def random_language(random: Random) -> Language:
    """Literals and other parts, in any order."""
    made = Language(parts=())
    for _ in range(random.randint(2, 4)):
        word = "".join(random.choices("abc é", k=random.randint(1, 3)))
        kinds = [literal(word), regex(random.choice(["a*", "[bc]+", "(ab|c)?", "é?a"])), choices([word, word + "b"])]
        made += random.choice(kinds)
    return made


def test_no_text_is_lost_or_won() -> None:
    random, words = Random(16), ["".join(some) for n in range(5) for some in product("abc ", repeat=n)]
    moved = 0
    for _ in range(60):
        language = random_language(random)
        parts = healed(language)
        moved += len(parts) != len(language.parts) or any(
            isinstance(a, Spelled) and a != b for a, b in zip(parts, language.parts, strict=True)
        )
        for word in random.sample(words, 60):
            text = word.replace("b", random.choice(["b", "é"])).encode()
            assert takes(parts, text) == takes(list(language.parts), text), (language.parts, text)
    assert moved > 10


@pytest.mark.parametrize(
    ("language", "literals"),
    [
        (literal("ca") + regex("b*"), ["c"]),  # "ab" reaches over
        (literal("ca") + regex("[ac]"), ["ca", None]),  # no token begins with a and goes on with a or c
        (regex("b+") + literal("ca"), [None, "a"]),  # "bc"
        (regex("b?a") + literal("ca"), [None, "ca"]),
        (regex("a*") + literal("b"), [None]),  # all of a literal moves
        (literal("c ") + choices(["ab", "b"]), [None, None]),  # one token, and " a" reaches over
        (literal("cé") + regex("a"), ["c"]),  # a character of several tokens is not cut
        (literal("a") + literal("b"), ["a", "b"]),  # literals beside each other are as they are
    ],
)
def test_what_moves(language: Language, literals: list[str | None]) -> None:
    parts = healed(language)
    found = [part.texts[0] if isinstance(part, Spelled) and len(part.texts) == 1 else None for part in parts]
    assert [text for text in found if text] == [text for text in literals if text]


def test_choices_stay_choices_and_automata_automata() -> None:
    [first] = healed(literal("c ") + choices(["ab", "b"]))
    assert first == Spelled(texts=("c ab", "c b"))
    [first] = healed(literal(" ") + free_text())
    assert isinstance(first, Automaton) and first.accepts(" a") and not first.accepts("a")


def test_a_gap_inside_of_a_word_is_filled_with_the_words_own_token() -> None:
    model = load(BUILT_IN)
    tokenizer, compiler = model.tokenizer, Compiler(model.tokenizer, model.config.vocab_size)
    ids = tokenizer.encode("- Rosa\n")
    assert b"Rosa" in [compiler.tokens[i] for i in ids]
    language = literal("- Ro") + Hole(least=1).language() + literal("a\n")
    made = compiler.compiled(language, tokenizer.encode("Hi"), model.generation_config).constraint
    state = made.walk(made.start, ids)
    assert state >= 0 and made.distance[state] == 0
    apart = [i for text in ("- Ro", "s", "a\n") for i in tokenizer.encode(text)]
    assert made.distance[made.walk(made.start, apart)] == 0, "and in any other spelling"
    prompt = "Sort these names:\nZoe, Rosa, Ada, Kim, Ben"
    filled = model.fill("- Ada\n- Ben\n- Kim\n- Ro<fill>a\n- Zoe", prompt=prompt, seed=1)
    assert filled.text == "- Ada\n- Ben\n- Kim\n- Rosa\n- Zoe"
