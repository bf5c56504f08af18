"""The built-in model's data and recipe: everything `mlx_diffgemma/demo/` was made from, from a seed.

    python -m benchmarks.train_demo data build/demo       tokenizer, config and JSONL data
    python -m benchmarks.train_demo train build/demo      the training command, stage by stage
    python -m benchmarks.train_demo curve build/demo      docs/training_curve.svg from the logs

The model speaks a toy language of a few hundred words. It knows five tasks, asked in plain English: 6×6 Sudoku,
records → JSON, JSON → Markdown table, sorting names, and filling in a template. Sorting numbers and adding in
columns were in the first stages' data, too; they had hardly begun to be learned when the time was up.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jane Kim Leo Mia Nora Olga Paul Rosa Sam Tara Uma Vera Will Yara Zoe"
CITIES = "Athens Berlin Cairo Delhi Geneva Lagos Lima London Madrid Oslo Paris Quito Rome Seoul Tokyo Vienna"
ANIMALS = "cat dog fox goat hen horse mouse owl rabbit snake"
COLORS = "black blue brown gold green pink red silver white yellow"
FRUITS = "apple banana cherry fig grape kiwi lemon mango melon pear"
ITEMS = "bag bike book chair clock coat drum flute hat kite lamp phone ring shirt table vase"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
JOBS = "baker cook doctor farmer guard judge nurse pilot singer teacher"
WORDS = {
    "name": NAMES.split(),
    "city": CITIES.split(),
    "pet": ANIMALS.split(),
    "color": COLORS.split(),
    "fruit": FRUITS.split(),
    "item": ITEMS.split(),
    "day": DAYS.split(),
    "job": JOBS.split(),
}
NUMBERS = ("age", "score", "room", "year")  # two digits each
FIELDS = (*WORDS, *NUMBERS)


class Example(NamedTuple):
    """One question and its only right answer."""

    task: str
    prompt: str
    answer: str


# Sudoku: rows of six, boxes two rows high and three columns wide. A digit set is a 6-bit mask.

ROW, COLUMN = np.divmod(np.arange(36), 6)
BOX = ROW // 2 * 2 + COLUMN // 3
PEERS = (ROW[:, None] == ROW) | (COLUMN[:, None] == COLUMN) | (BOX[:, None] == BOX)  # [36, 36], itself included
UNITS = np.concatenate([ROW == np.arange(6)[:, None], COLUMN == np.arange(6)[:, None], BOX == np.arange(6)[:, None]])


def random_grids(rng: np.random.Generator, count: int) -> np.ndarray:
    """Full grids, [count, 36] digits 1 … 6: shuffled bands, rows, columns and digits of backtracked grids."""
    base = np.zeros((min(count, 200), 36), np.int64)
    for grid in base:
        _fill(rng, grid, 0)
    grids = base[rng.integers(0, len(base), count)].reshape(count, 6, 6)
    for i in range(count):
        rows = np.concatenate([band * 2 + rng.permutation(2) for band in rng.permutation(3)])
        columns = np.concatenate([stack * 3 + rng.permutation(3) for stack in rng.permutation(2)])
        grids[i] = (rng.permutation(6) + 1)[grids[i][rows][:, columns] - 1]
    return grids.reshape(count, 36)


def _fill(rng: np.random.Generator, grid: np.ndarray, cell: int) -> bool:
    """Fill `grid` [36] from `cell` on, in place; False when it cannot be done."""
    if cell == 36:
        return True
    for digit in rng.permutation(6) + 1:
        if not (grid[PEERS[cell]] == digit).any():
            grid[cell] = digit
            if _fill(rng, grid, cell + 1):
                return True
    grid[cell] = 0
    return False


def solvable_by_singles(puzzles: np.ndarray) -> np.ndarray:
    """Which of the puzzles [N, 36] (0 = empty) are filled by naked and hidden singles alone, bool [N].

    Such a puzzle has exactly one solution: every step is forced.
    """
    filled = puzzles.copy()
    digits = np.arange(1, 7)
    while True:
        has = filled[:, :, None] == digits  # [N, 36, 6]
        seen = np.einsum("pq,nqd->npd", PEERS.astype(np.int8), has.astype(np.int8)) > 0
        free = ~seen & (filled == 0)[:, :, None]
        places = np.einsum("uq,nqd->nud", UNITS.astype(np.int8), free.astype(np.int8)) == 1  # hidden single in a unit
        hidden = free & (np.einsum("uq,nud->nqd", UNITS.astype(np.int8), places.astype(np.int8)) > 0)
        naked = free & (free.sum(-1, keepdims=True) == 1)
        forced = hidden | naked
        new = np.where((forced.sum(-1) == 1) & (filled == 0), forced.argmax(-1) + 1, 0)
        if not new.any():
            return np.all(filled > 0, axis=1)
        filled = np.where(new > 0, new, filled)


def sudokus(rng: np.random.Generator, count: int, givens: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Puzzle and solution texts; the number of givens is uniform in the closed range `givens`."""
    made = 0
    while made < count:
        grids = random_grids(rng, 2048)
        shown = rng.integers(givens[0], givens[1] + 1, len(grids))
        order = rng.random((len(grids), 36)).argsort(axis=1).argsort(axis=1)
        puzzles = np.where(order < shown[:, None], grids, 0)
        good = solvable_by_singles(puzzles)
        for puzzle, grid in list(zip(puzzles[good], grids[good], strict=True))[: count - made]:
            yield grid_text(puzzle), grid_text(grid)
            made += 1


def grid_text(cells: np.ndarray) -> str:
    """Six rows of six digits, "." for an empty cell, a space between the two columns of boxes."""
    rows = ["".join(".123456"[c] for c in row) for row in cells.reshape(6, 6)]
    return "\n".join(f"{row[:3]} {row[3:]}" for row in rows)


# The structured tasks. Each takes a random generator and returns prompt and answer.


def record_to_json(rng: random.Random) -> tuple[str, str]:
    fields = rng.sample(FIELDS, rng.randint(2, 4))
    count = rng.choice((1, 1, 2, 3))
    records = [{field: _value(rng, field) for field in fields} for _ in range(count)]
    lines = ["\n".join(f"{k}: {v}" for k, v in record.items()) for record in records]
    ask = rng.choice(("Write this as JSON:", "Turn this record into JSON:", "Convert this to JSON:", "JSON, please:"))
    rows = [json.dumps(record) for record in records]
    return f"{ask}\n" + "\n\n".join(lines), rows[0] if count == 1 else "[\n" + ",\n".join(rows) + "\n]"


def json_to_table(rng: random.Random) -> tuple[str, str]:
    fields = rng.sample(FIELDS, rng.randint(2, 3))
    records = [{field: _value(rng, field) for field in fields} for _ in range(rng.randint(2, 4))]
    ask = rng.choice(("Make a Markdown table:", "Turn this JSON into a table:", "Show this as a Markdown table:"))
    cells = [fields, ["---"] * len(fields), *[[str(v) for v in record.values()] for record in records]]
    table = "\n".join("| " + " | ".join(row) + " |" for row in cells)
    return f"{ask}\n" + "\n".join(json.dumps(record) for record in records), table


def sort_numbers(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(10, 100), rng.randint(4, 7))
    ask = rng.choice(("Sort these numbers:", "Put these numbers in order:", "Order from low to high:"))
    return f"{ask}\n" + ", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers)))


def sort_names(rng: random.Random) -> tuple[str, str]:
    names = rng.sample(WORDS["name"], rng.randint(4, 8))
    ask = rng.choice(("Sort these names:", "Put these names in order:", "List these names from A to Z:"))
    return f"{ask}\n" + ", ".join(names), "\n".join(f"- {name}" for name in sorted(names))


def add(rng: random.Random) -> tuple[str, str]:
    a, b = (rng.randint(1000, 9999) for _ in range(2))
    ask = rng.choice(("Add these numbers:", "What is the sum?", "Add in columns:"))
    return f"{ask}\n  {a}\n+ {b}", f"  {a}\n+ {b}\n------\n{a + b:6d}"


TEMPLATES = (
    "Dear {name}, your {item} will be ready on {day}.",
    "Hello {name}, please bring a {color} {item} to {city}.",
    "{name} is a {job} from {city} who likes the {color} {pet}.",
    "On {day} the {job} will meet {name} in room {room}.",
    "Hello {name}, the {fruit} is in room {room}. See you on {day}!",
    "The {color} {pet} of {name} will eat one {fruit} on {day}.",
    "Dear {name}, the {job} from {city} has your {color} {item}.",
)


def fill_template(rng: random.Random) -> tuple[str, str]:
    template = rng.choice(TEMPLATES)
    fields = [field for field in FIELDS if f"{{{field}}}" in template]
    values = {field: _value(rng, field) for field in fields}
    names = rng.sample(WORDS["name"], rng.choice((1, 1, 2, 3, 4)))
    ask = rng.choice(("Fill in the template:", "Fill in this text:", "Write this text for each name:"))
    rng.shuffle(fields)
    given = [f"{field}: {', '.join(names) if field == 'name' else values[field]}" for field in fields]
    filled = [template.format(**{**values, "name": name}) for name in names]
    return f"{ask}\n{template}\n" + "\n".join(given), "\n".join(filled)


def _value(rng: random.Random, field: str) -> str | int:
    return rng.choice(WORDS[field]) if field in WORDS else rng.randint(10, 99)


STRUCTURED: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "json": record_to_json,
    "table": json_to_table,
    "sort numbers": sort_numbers,
    "sort names": sort_names,
    "add": add,
    "template": fill_template,
}
SUDOKU_ASKS = ("Solve this Sudoku:", "Please solve this Sudoku:", "Fill in this Sudoku:", "Can you solve this puzzle?")
HELD_OUT_GIVENS = (20, 28)  # of 36 cells, drawn uniformly; puzzles that singles solve


def structured(seed: int, count: int) -> Iterator[Example]:
    """`count` examples, the tasks in turn."""
    rng = random.Random(seed)
    tasks = list(STRUCTURED.items())
    for i in range(count):
        task, make = tasks[i % len(tasks)]
        yield Example(task, *make(rng))


def sudoku(seed: int, count: int, givens: tuple[int, int] = HELD_OUT_GIVENS) -> Iterator[Example]:
    """`count` puzzles with their solutions."""
    asks = random.Random(seed)
    for puzzle, solution in sudokus(np.random.default_rng(seed), count, givens):
        yield Example("sudoku", f"{asks.choice(SUDOKU_ASKS)}\n{puzzle}", solution)


# The tokenizer: fixed pieces, so that a digit, a word of the toy language or a bit of JSON is one token each.

SPECIAL = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>"}
SPECIAL |= {49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>"}
SPECIAL |= {100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>"}  # ids as in Gemma 4
SYMBOLS = """. , : ; ! ? + - * / = | { } [ ] ( ) " ' _ # < > --- ------""".split()
SYMBOLS += [" ", ": ", ", ", "| ", " | ", " |\n", " |", '{"', '": "', '": ', '", "', ', "', '"}', '"},\n', "},\n"]
SYMBOLS += ["[\n", "\n]", "\n\n", "- ", ":\n", "+ ", "{", "} ", "}.", "},"]
SPEECH = """
Solve Please solve Fill Can this Sudoku you puzzle in Write Turn Convert as record into JSON please to Make a Markdown
table Show Sort these numbers Put order Order from low high names List A Z Add What is the sum columns template text
for each name Dear your will be ready on Hello bring who likes On meet room See The of eat one has user model system
""".split()
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [chr(c) for c in range(ord("A"), ord("Z") + 1)]


def pieces() -> list[str]:
    """Every ordinary piece, most useful first; a leading space is part of a word of plain English."""
    words = [word for field in WORDS.values() for word in field]
    spoken = [piece for word in SPEECH for piece in (word, " " + word)]
    every = [*"0123456789", *SYMBOLS, *words, *FIELDS, *spoken, *LETTERS]
    return list(dict.fromkeys(every))


def write_tokenizer(folder: Path) -> int:
    """Write tokenizer.model and tokenizer.json, their config and the chat template; returns the vocabulary's size.

    A unigram model in which every piece costs the same: the fewest pieces win. Bytes catch what is left.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # its classes are made at run time
    model = proto.ModelProto()
    kind = proto.ModelProto.SentencePiece
    ordinary = iter(pieces())
    fixed = SPECIAL | {107: "\n"}
    size = -(-(len(pieces()) + len(fixed) + 256) // 64) * 64
    for i in range(size):
        if i >= size - 256:
            piece, score, form = f"<0x{i - size + 256:02X}>", -50.0, kind.BYTE
        elif i in fixed:
            piece, score, form = fixed[i], 0.0, kind.USER_DEFINED
            form = {0: kind.CONTROL, 1: kind.CONTROL, 2: kind.CONTROL, 3: kind.UNKNOWN}.get(i, form)
        elif (word := next(ordinary, None)) is not None:
            piece, score, form = (
                word.replace(" ", "\u2581"),
                -10.0 - i / 1024,
                kind.NORMAL,
            )  # exact in float32, so that sums do not depend on their order
        else:
            piece, score, form = f"<unused{i}>", -99.0, kind.UNUSED
        model.pieces.add(piece=piece, score=score, type=form)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = proto.TrainerSpec.UNIGRAM, size, True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 3, 2, 1, 0
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece, trainer.pad_piece = "<unk>", "<bos>", "<eos>", "<pad>"
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", False, False
    normalizer.escape_whitespaces = True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer.json").write_text(
        json.dumps(_fast_tokenizer(model, kind), ensure_ascii=False, indent=1) + "\n"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return size


def _fast_tokenizer(model: Any, kind: Any) -> dict[str, Any]:
    """The same pieces as tokenizer.json, for readers that would take tokenizer.model for a BPE.

    There any piece may match text, bytes and unused ones too: `<` stands alone before them, so none can. They cost what
    the dearest ordinary piece does, since what no piece spells costs ten more than that. The newline is a piece among
    others, as it is for sentencepiece.
    """
    dearest = min(piece.score for piece in model.pieces if piece.type == kind.NORMAL)
    spelling = (kind.NORMAL, kind.USER_DEFINED)
    vocabulary = [[piece.piece, piece.score if piece.type in spelling else dearest] for piece in model.pieces]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": piece, "special": True} | flags for i, piece in sorted(SPECIAL.items())]
    alone = {"type": "Split", "pattern": {"Regex": "<(?=0x|unused)"}, "behavior": "Isolated", "invert": False}
    blank = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": alone,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [blank, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocabulary, "byte_fallback": True},
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "model_specific_special_tokens": {
        "sot_token": "<|turn>",
        "eot_token": "<turn|>",
        "soc_token": "<|channel>",
        "eoc_token": "<channel|>",
        "think_token": "<|think|>",
        "std_token": "<|tool>",
        "etd_token": "<tool|>",
        "stc_token": "<|tool_call>",
        "etc_token": "<tool_call|>",
        "str_token": "<|tool_response>",
        "etr_token": "<tool_response|>",
        "escape_token": '<|"|>',
    },
}
CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {{- "<|turn>" + ("model" if message["role"] == "assistant" else message["role"]) + "\\n" }}
    {%- set content = message["content"] %}
    {%- set said = namespace(text=content if content is string else "") %}
    {%- for part in content if content is not string %}
        {%- set said.text = said.text + ("<|image|>" if part["type"] == "image" else part["text"]) %}
    {%- endfor %}
    {{- said.text | trim + "<turn|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|turn>model\\n" }}{% endif %}
"""


# The model: the released architecture, a thousandth as wide.

CANVAS = 48
CONFIG = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "model_type": "diffusion_gemma",
    "canvas_length": CANVAS,
    "dtype": "float32",
    "eos_token_id": [1, 106],
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "diffusion_gemma_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "dtype": "float32",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 64,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
        },
        "sliding_window": 64,
        "tie_word_embeddings": True,
        "top_k_experts": 2,
        "use_bidirectional_attention": "vision",
    },
}
# transformers builds a vision tower whatever is asked of it: the smallest one, at rest, so that no weight is missing.
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_hidden_layers": 1,
    "patch_size": 4,
    "position_embedding_size": 4,
    "standardize": False,
}
GENERATION_CONFIG = {
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106],
    "max_denoising_steps": 48,
    "max_new_tokens": 3 * CANVAS,
    "pad_token_id": 0,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "stability_threshold": 1,
    "t_max": 0.8,
    "t_min": 0.4,
}
HELD_OUT_SEED = 1_000_000  # training seeds are small
TASKS = ("json", "table", "sort names", "template")  # what it is trained on to the end and scored on, with Sudoku


class Stage(NamedTuple):
    """One run of the training command, on data of its own; it starts from the stage before."""

    steps: int
    tasks: dict[str, int]  # examples per structured task
    puzzles: int
    givens: tuple[int, int]
    options: dict[str, Any]  # of the command


RECIPE = {
    "optimizer": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "betas": [0.9, 0.98],
    "batch_size": 16,
    "accumulate": 2,
    "train_router": True,
    "fill": "turn",
    "max_length": 160,
    "evaluate_every": 250,
    "exact_match": 40,
    "final_rate": 1.0,
}
EVERY = ("json", "table", "sort numbers", "sort names", "add", "template")
LATER = ("add", "sort numbers", "sort names", "json", "table", "template")
STAGES = (
    Stage(1100, dict.fromkeys(EVERY, 10_000), 60_000, (20, 32), {"warmup": 100}),
    Stage(400, dict.fromkeys(EVERY, 14_000), 24_000, (18, 30), {"warmup": 20}),
    Stage(
        500,
        {
            "add": 26_000,
            "sort numbers": 17_000,
            "sort names": 9_000,
            "json": 14_000,
            "table": 12_000,
            "template": 13_000,
        },
        9_000,
        (18, 30),
        {"warmup": 20},
    ),
    Stage(
        900,
        {"json": 10_000, "table": 7_000, "template": 9_500, "sort names": 4_000},
        3_500,
        HELD_OUT_GIVENS,
        {"warmup": 10, "final_rate": 0.01},
    ),
    Stage(
        900,
        {"sort names": 10_400, "json": 3_000, "table": 2_900, "template": 2_900},
        9_600,
        HELD_OUT_GIVENS,
        {"warmup": 20, "learning_rate": 1.5e-3, "final_rate": 0.01},
    ),
)


def write_model(folder: Path) -> None:
    """What `train --from-scratch` starts from: tokenizer, configs, and the weights of a vision tower at rest."""
    import mlx.core as mx

    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.files.layout import expected_tensors, is_vision

    size = write_tokenizer(folder)
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], "vocab_size": size}, "vision_config": VISION}
    shapes = expected_tensors(ModelConfig.from_dict(config)).items()
    tower = {name: mx.ones(shape) if len(shape) == 1 else mx.zeros(shape) for name, shape in shapes if is_vision(name)}
    mx.save_safetensors(str(folder / "model.safetensors"), tower)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2) + "\n")


def write_data(folder: Path, examples: Iterator[Example], held_out: Iterator[Example]) -> None:
    """train.jsonl and valid.jsonl in mlx-lm's completions form; nothing held out is trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    valid = list(held_out)
    asked = {example.prompt for example in valid}
    _write_lines(folder / "valid.jsonl", valid)
    _write_lines(folder / "train.jsonl", [example for example in examples if example.prompt not in asked])


def _write_lines(file: Path, examples: list[Example]) -> None:
    lines = (json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in examples)
    file.write_text("".join(lines))


def stage_data(number: int) -> Iterator[Example]:
    """The training examples of a stage; its seed is its number, from 1."""
    stage, seed = STAGES[number - 1], number
    if len(set(stage.tasks.values())) == 1:
        yield from structured(seed, sum(stage.tasks.values()))
    else:
        rng = random.Random(seed)
        for task, count in stage.tasks.items():
            yield from (Example(task, *STRUCTURED[task](rng)) for _ in range(count))
    yield from sudoku(seed, stage.puzzles, stage.givens)


def valid_data() -> Iterator[Example]:
    """Held-out examples in turn: each task and Sudoku."""
    made = [e for e in structured(HELD_OUT_SEED, 96) if e.task in TASKS]
    for i, puzzle in enumerate(sudoku(HELD_OUT_SEED, 16)):
        yield from made[4 * i : 4 * i + 4]
        yield puzzle


# The recipe.


def make_data(folder: Path) -> None:
    """start/ (tokenizer, configs) and data-1/ … in `folder`."""
    write_model(folder / "start")
    for number in range(1, len(STAGES) + 1):
        write_data(folder / f"data-{number}", stage_data(number), valid_data())


def train(folder: Path) -> None:
    """Every stage by `python -m mlx_diffgemma.train`; a stage that is interrupted goes on where it was."""
    for number, stage in enumerate(STAGES, 1):
        options = {**RECIPE, **stage.options, "steps": stage.steps, "seed": number - 1, "full": True}
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in options.items())
        (folder / f"stage-{number}.toml").write_text("".join(lines))
        before = (
            ["--model", folder / f"stage-{number - 1}/model"] if number > 1 else ["--from-scratch", folder / "start"]
        )
        command = [sys.executable, "-m", "mlx_diffgemma.train", "--config", folder / f"stage-{number}.toml", *before]
        command += ["--data", folder / f"data-{number}", "--output", folder / f"stage-{number}"]
        subprocess.run([str(part) for part in command], check=True)


def read_logs(folder: Path) -> list[dict[str, Any]]:
    """All stages' logs as one: steps count on; a step that was repeated after an interruption counts once."""
    events: list[dict[str, Any]] = []
    done = 0
    for number, stage in enumerate(STAGES, 1):
        lines = (folder / f"stage-{number}" / "log.jsonl").read_text().splitlines()
        last = {(e["event"], e["step"]): e for e in map(json.loads, lines)}
        events += [{**e, "step": e["step"] + done, "stage": number} for e in last.values() if e["step"] <= stage.steps]
        done += stage.steps
    return events


def curve(events: list[dict[str, Any]]) -> str:
    """The training curve as an SVG: the canvas's loss in training (mean of 20 steps) and held out, log scale."""
    width, height, left, top = 640, 320, 60, 20
    trained = [(e["step"], e["decoder_loss"]) for e in events if e["event"] == "trained"]
    pieces = [trained[i : i + 20] for i in range(0, len(trained), 20)]
    smooth = [(piece[-1][0], float(np.mean([loss for _, loss in piece]))) for piece in pieces]
    held = [(e["step"], e["decoder_loss"]) for e in events if e["event"] == "evaluated"]
    steps = trained[-1][0]

    def place(point: tuple[float, float]) -> str:
        x = left + (width - left - 20) * point[0] / steps
        y = top + (height - top - 50) * (1 - (np.log10(np.clip(point[1], 0.01, 10)) + 2) / 3)
        return f"{x:.1f},{y:.1f}"

    def label(x: float, y: float, text: str, anchor: str = "middle") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>'

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    parts.append("<style>text{font-size:12px;fill:#777} path{fill:none;stroke-width:1.5}</style>")
    for loss in (0.01, 0.1, 1, 10):
        x, y = map(float, place((0, loss)).split(","))
        parts.append(f'<path d="M{x},{y}H{width - 20}" stroke="#9994"/>' + label(x - 6, y + 4, f"{loss:g}", "end"))
    ends = np.cumsum([stage.steps for stage in STAGES])
    for end in ends:
        x, y = map(float, place((end, 0.01)).split(","))
        parts.append(f'<path d="M{x},{top}V{y}" stroke="#9994"/>' + label(x, y + 16, str(end)))
    parts.append(f'<path d="M{" ".join(map(place, smooth))}" stroke="#4a90d9"/>')
    for point in held:
        x, y = place(point).split(",")
        parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="#d9534a"/>')
    parts.append(
        label(left, height - 8, "canvas loss, nats per token, by step: training (line) and held out (dots)", "start")
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(what: str, folder: Path) -> None:
    if what == "data":
        make_data(folder)
    elif what == "train":
        train(folder)
    else:
        (Path(__file__).parent.parent / "docs" / "training_curve.svg").write_text(curve(read_logs(folder)))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("data", "train", "curve"):
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
