"""Abuse: bad inputs to every command and to the API, and what becomes of each; valid ones that look odd, too.

    python -m benchmarks.abuse [--only KIND,…] [--jobs 2] [--list OUTCOME] [--json FILE]

A case is a folder, a change to it, and a command or a few lines of Python, run in a process of its own. Outcomes:

    clean     exit 1 or 2, one to three lines in words, and the file, option or key is named
    raw       a library's words, an exception's name, or a traceback
    nowhere   in words, but what is wrong is not named
    silent    bad input, exit 0
    refused   valid input, not accepted
    loss      a file that was there is gone or changed
    junk      files that nobody asked for stay behind
    crash     ended by a signal
    hang      over 20 seconds of processor time
"""

# ruff: noqa: E501, SIM115
# fmt: off
# (a case stands on one line)

import contextlib
import importlib
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

HANG = 20  # seconds
MEMORY = 6 << 30  # bytes of address space beyond what the process has at its start
OUTCOMES = ("clean", "good", "raw", "nowhere", "silent", "refused", "loss", "junk", "crash", "hang")
FINE = ("clean", "good")
LIBRARIES = re.compile(
    r"\b[A-Z]\w*(Error|Exception|Warning)\b|Traceback|\[Errno|pybind|incompatible function|codec can't|object has no attribute"
    r"|NoneType|unexpected keyword|missing \d+ required|unhashable|is not JSON serializable|invalid literal|not supported"
    r" between|index out of range|Expected object or value|dict\[|list\[|nanobind|(?<![\w.\])])\[\w+\] |--debug"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input. `names`: words of which one must be in the message; none where nothing needs to be named."""

    kind: str
    name: str
    args: tuple[str, ...] = ()  # of `mlx_diffgemma`
    code: str = ""  # or Python, run with load, model (the folder) and errors at hand
    setup: Callable[[Path], Any] = lambda folder: None
    names: tuple[str, ...] = ()
    good: bool = False
    keep: tuple[str, ...] = ()  # files that must stay as they were
    leaves: tuple[str, ...] = ()  # what may be new afterwards (glob)
    stdin: bytes | None = b""
    environment: dict[str, str] = field(default_factory=dict)


CASES: list[Case] = []


def add(kind: str, name: str, *args: str, **rest: Any) -> None:
    CASES.append(Case(kind=kind, name=name, args=args, **rest))


# ------------------------------------------------------------------------------------------------------- materials

GENERATE = ("generate", "-q", "--prompt", "Sort the names: Zoe, Adam", "--seed", "1", "--max-tokens", "8")
ALOUD = ("generate", *GENERATE[2:], "--model", "m")  # with the notes on standard error
USER = {"role": "user", "content": "Sort the names: Zoe, Adam"}


def demo() -> Path:
    import mlx_diffgemma

    return Path(mlx_diffgemma.__file__).parent / "demo"


def copied(folder: Path, name: str = "m") -> Path:
    """The built-in model, its weights as a link."""
    target = folder / name
    target.mkdir()
    for file in demo().iterdir():
        if file.suffix == ".safetensors":
            os.link(file, target / file.name) if _same_disk(file, target) else shutil.copyfile(file, target / file.name)
        else:
            shutil.copyfile(file, target / file.name)
    return target


def _same_disk(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev


def edited(file: str, change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """The model with one of its JSON files changed; a change that returns something replaces the file's text."""

    def setup(folder: Path) -> None:
        path = copied(folder) / file
        values = json.loads(path.read_text()) if path.exists() else {}
        new = change(values)
        path.write_text(new if isinstance(new, str) else json.dumps(values))

    return setup


def with_file(name: str, content: bytes | str) -> Callable[[Path], Any]:
    def setup(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return setup


def all_of(*setups: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: [setup(folder) for setup in setups]


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set a dotted key."""

    def change(values: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            values = values[parent]
        values[last] = value

    return change


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            values = values[parent]
        del values[last]

    return change


def short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, float) else repr(value)
    return text if len(text) < 40 else text[:37] + "…"


# ----------------------------------------------------------------------------------------------- config.json (7, 11)

BAD_COUNTS: list[Any] = [0, -1, -(10**12), 2.5, "4", True, [4], {}, 10**12, 1e400]
BAD_NUMBERS: list[Any] = [-1.0, "1e-6", [1], {}, True, float("nan"), float("inf"), 1e400]
COUNTS = "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads".split()
COUNTS += "num_key_value_heads head_dim num_experts top_k_experts sliding_window max_position_embeddings".split()
ON_MODEL = (*GENERATE, "--model", "m")


def raw_json(values: Any) -> str:
    return json.dumps(values)


def config_cases() -> None:
    kind = "config.json"
    for key in COUNTS:
        for value in BAD_COUNTS:
            if value == 10**12 and key in ("sliding_window", "max_position_embeddings"):
                continue
            add(kind, f"{key} = {short(value)}", *ON_MODEL, names=(key,), setup=edited("config.json", put(f"text_config.{key}", value)))
        if key not in ("max_position_embeddings",):
            add(kind, f"no {key}", *ON_MODEL, names=(key,), setup=edited("config.json", drop(f"text_config.{key}")))
    for key in ("global_head_dim", "num_global_key_value_heads"):
        for value in (0, -2, 3.5, "64", [64], True, 10**12):
            add(kind, f"{key} = {short(value)}", *ON_MODEL, names=(key, "head", "layer"), setup=edited("config.json", put(f"text_config.{key}", value)))
    for key in ("rms_norm_eps", "final_logit_softcapping"):
        for value in [*BAD_NUMBERS, *([0, 0.0] if "soft" in key else [])]:
            add(kind, f"{key} = {short(value)}", *ON_MODEL, names=(key, "config.json"), setup=edited("config.json", put(f"text_config.{key}", value)))
    for value in (0, -1, 2.5, "48", [48], 10**12, {}, True):
        add(kind, f"canvas_length = {short(value)}", *ON_MODEL, names=("canvas_length", "memory", "context"), setup=edited("config.json", put("canvas_length", value)))
    add(kind, "eos_token_id beyond the vocabulary", *ALOUD, good=True, names=("eos_token_id has 1000000000",), setup=edited("config.json", put("eos_token_id", 10**9)))
    for value in ("x", [1.5], [True], -1, [-3], {"a": 1}, [[1]]):
        add(kind, f"eos_token_id = {short(value)}", *ON_MODEL, names=("eos_token_id",), setup=edited("config.json", put("eos_token_id", value)))
    for value in (-1, 640, 10**9, "0", 1.5, [0]):
        add(kind, f"pad_token_id = {short(value)}", *ON_MODEL, names=("pad_token_id",), setup=edited("config.json", put("text_config.pad_token_id", value)))
    for value in ([], {}, "x", ["sliding_attention"], ["full_attention"] * 5, ["linear_attention"] * 4, [None] * 4, [1, 2, 3, 4], 7):
        if value == []:
            continue
        add(kind, f"layer_types = {short(value)}", *ON_MODEL, names=("layer_types",), setup=edited("config.json", put("text_config.layer_types", value)))
    for value in (None, [], "x", 5, True):
        add(kind, f"text_config = {short(value)}", *ON_MODEL, names=("text_config", "config.json"), setup=edited("config.json", put("text_config", value)))
    for value in ("x", [], 5, True, {"hidden_size": "8"}, {"hidden_size": 0}):
        add(kind, f"vision_config = {short(value)}", *ON_MODEL, names=("vision_config",), setup=edited("config.json", put("vision_config", value)))
    for value in ("gemma", None, 5, "diffusion_gemma2", ["diffusion_gemma"]):
        add(kind, f"model_type = {short(value)}", *ON_MODEL, names=("model_type",), setup=edited("config.json", put("model_type", value)))
    for key, value in {"hidden_activation": "relu", "attention_bias": True, "use_bidirectional_attention": "all", "enable_moe_block": False,
                       "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 256}.items():
        add(kind, f"{key} = {short(value)}", *ON_MODEL, names=(key,), setup=edited("config.json", put(f"text_config.{key}", value)))
    add(kind, "tie_word_embeddings false", *ON_MODEL, names=("tie_word_embeddings",), setup=edited("config.json", put("tie_word_embeddings", False)))
    for where in ("", "text_config."):
        add(kind, f"unknown key {where}new_thing", *ON_MODEL, names=("new_thing",), setup=edited("config.json", put(f"{where}new_thing", 3)))
    for name, raw in {"empty": "", "list": "[]", "null": "null", "number": "3", "cut": '{"model_type": "diff', "deep": '{"a":' * 3000 + "1" + "}" * 3000, "NaN": '{"a": NaN}',
                      "twice": '{"model_type": "x", "model_type": "diffusion_gemma"}', "utf-16": "", "huge int": '{"a": ' + "9" * 5000 + "}", "BOM only": "\ufeff"}.items():
        content: Any = '{"a": 1}'.encode("utf-16") if name == "utf-16" else raw
        add(kind, f"file: {name}", *ON_MODEL, names=("config.json",), setup=all_of(copied, with_file("m/config.json", content)))
    for name, values in {
        "heads not a multiple": {"num_key_value_heads": 3}, "more chosen than experts": {"top_k_experts": 9}, "odd head": {"head_dim": 31},
        "per_layer_config a list": {"per_layer_config": []}, "per_layer_config of words": {"per_layer_config": {"x": {}}}, "per_layer_config of numbers": {"per_layer_config": {"1": 5}},
        "per_layer_config unknown": {"per_layer_config": {"1": {"hidden_size": 3}}}, "per_layer_config zero": {"per_layer_config": {"1": {"head_dim": 0}}},
        "per_layer_config beyond": {"per_layer_config": {"99": {"head_dim": 64}}},
    }.items():
        def change(config: dict[str, Any], values: dict[str, Any] = values) -> None:
            config["text_config"].update(values)
        add(kind, name, *ON_MODEL, names=(*values, "head", "experts", "layer"), setup=edited("config.json", change))
    rope: dict[str, Any] = {
        "a list": [], "a text": "default", "a number": 10000.0, "unknown layers": {"local": {"rope_theta": 1.0}}, "one kind only": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "theta zero": {"sliding_attention": {"rope_theta": 0}, "full_attention": {"rope_theta": 1e6}}, "theta negative": {"sliding_attention": {"rope_theta": -1e4}, "full_attention": {"rope_theta": 1e6}},
        "theta text": {"sliding_attention": {"rope_theta": "1e4"}, "full_attention": {"rope_theta": 1e6}}, "no theta": {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "default"}},
        "theta NaN": {"sliding_attention": {"rope_theta": float("nan")}, "full_attention": {"rope_theta": 1e6}}, "yarn": {"sliding_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "full_attention": {"rope_theta": 1e6}},
        "linear": {"sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "full_attention": {"rope_theta": 1e6}}, "partial 2": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 2.0}},
        "partial negative": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": -0.25}}, "a list inside": {"sliding_attention": [1e4], "full_attention": {"rope_theta": 1e6}},
        "flat": {"rope_type": "default", "rope_theta": 10000.0}, "kind a number": {"sliding_attention": {"rope_type": 3, "rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}, "unknown inside": {"sliding_attention": {"rope_theta": 1e4, "mscale": 2}, "full_attention": {"rope_theta": 1e6}},
    }
    for name, value in rope.items():
        add("rope", name, *ON_MODEL, names=("rope",), setup=edited("config.json", put("text_config.rope_parameters", value)))
    blocks: dict[str, Any] = {"a list": [], "a text": "4bit", "bits 7": {"bits": 7, "group_size": 64}, "bits text": {"bits": "4", "group_size": 64}, "no bits": {"group_size": 64}, "mode": {"bits": 4, "group_size": 64, "mode": "int4"},
                              "foreign": {"quant_method": "gptq", "bits": 4}, "override a number": {"bits": 4, "group_size": 64, "model.decoder.embed_tokens": 5}}
    for name, value in blocks.items():
        if name in ("a list", "bits text", "bits 7", "mode", "a text", "foreign"):
            add("quantization", name, *ON_MODEL, names=("quantiz", "bits", "mode"), setup=edited("config.json", put("quantization", value)))


# ------------------------------------------------------------------------------------------ generation_config.json (20)


def generation_config_cases() -> None:
    kind = "generation_config.json"
    bad: dict[str, list[Any]] = {
        "max_new_tokens": [0, -5, 2.5, "96", [96], True, float("nan")],
        "max_denoising_steps": [0, -1, 1.5, "48", [], True],
        "t_min": [-0.4, "x", float("nan"), float("inf"), 5.0, [], True],
        "t_max": [-0.8, "x", float("nan"), float("inf"), [], 0.1, True],
        "stability_threshold": [-1, 1.5, "1", [], True],
        "confidence_threshold": [-0.1, "x", float("nan"), [], True],
        "pad_token_id": [-1, 640, 10**9, "0", 1.5],
        "eos_token_id": [-1, "x", [1.5], {}, [True]],
        "sampler_config": ["x", [], 5, {"_cls_name": "Other"}, {"entropy_bound": -1}, {"entropy_bound": "x"}, {"entropy_bound": float("nan")}, {"entropi_bound": 0.1}],
    }
    for key, values in bad.items():
        for value in values:
            add(kind, f"{key} = {short(value)}", *ON_MODEL, names=(key, "generation_config.json"), setup=edited("generation_config.json", put(key, value)))
    for key, value in {"max_denoising_step": 20, "t_mim": 0.4, "entropy_bound": 0.2, "confidence_treshold": 1, "max_new_token": 20}.items():
        add(kind, f"typo {key}", *ALOUD, good=True, names=(key,), setup=edited("generation_config.json", put(key, value)))
    for name, raw in {"empty": "", "list": "[]", "cut": '{"t_max"', "twice": '{"t_max": 1, "t_max": 2}', "not UTF-8": b'{"a": "\xff"}'}.items():
        add(kind, f"file: {name}", *ON_MODEL, names=("generation_config.json",), setup=all_of(copied, with_file("m/generation_config.json", raw)))
    for value in (640, [1, 10**9]):
        add(kind, f"eos_token_id = {value}", *ALOUD, good=True, names=("generation_config.json: eos_token_id has",), setup=edited("generation_config.json", put("eos_token_id", value)))
    for key, value in {"top_k": 64, "top_p": 0.95, "temperature": 0.7, "do_sample": True, "repetition_penalty": 1.1, "num_beams": 4}.items():
        add(kind, f"autoregressive {key}", *ON_MODEL, good=True, setup=edited("generation_config.json", put(key, value)))


# ---------------------------------------------------------------------------------------------- tokenizer files (3, 8, 10)

BOMBS = {
    "loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops over a variable": "{% set r = range(90000) | list %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "tower": "{{ 7 ** (8 ** 9) }}", "tower in a condition": "{% if 3 ** (9 ** 9) > 1 %}x{% endif %}", "long text": "{{ 'ab' * 30000000000 }}", "long list": "{% set x = [0] * 9000000000 %}{{ x | length }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}", "nested lists": "{% set n = namespace(x=['a']) %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "macro recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "macro fan": "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(64) }}", "padding": "{{ 'x'.rjust(30000000000) }}",
    "centre": "{{ 'x' | center(30000000000) }}", "format": "{{ '{:30000000000}'.format('x') }}", "printf": "{{ '%30000000000s' % 'x' }}", "join": "{{ ('z' * 100000).join(['a'] * 100000) }}", "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "endless output": "{% for i in range(90000) %}{{ 'abcdefghij' * 1000 }}{% endfor %}", "deep brackets": "{{ " + "[" * 4000 + "]" * 4000 + " }}", "growing number": "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
}
BAD_TEMPLATES = {"unclosed": "{% for m in messages %}", "unknown tag": "{% frobnicate %}", "raises": "{{ raise_exception('no') }}", "undefined": "{{ messages[0].x.y }}", "kinds": "{{ messages + 1 }}", "private": "{{ messages.__class__.__mro__ }}",
                 "import": "{% import 'os' as os %}", "include": "{% include '/etc/passwd' %}", "filter": "{{ messages | nothing }}", "division": "{{ 1 / 0 }}", "key": "{{ {}['a']['b'] }}", "index": "{{ ''[5] + 'a' }}"}


def tokenizer_cases() -> None:
    for name, source in BOMBS.items():
        add("template", f"bomb: {name}", *ON_MODEL, names=("chat_template",), setup=all_of(copied, with_file("m/chat_template.jinja", source)))
    for name, source in BAD_TEMPLATES.items():
        add("template", name, *ON_MODEL, names=("template",), setup=all_of(copied, with_file("m/chat_template.jinja", source)))
    add("template", "not UTF-8", *ON_MODEL, names=("chat_template",), setup=all_of(copied, with_file("m/chat_template.jinja", b"\xff\xfe")))
    add("template", "a folder", *ON_MODEL, names=("template",), setup=lambda f: [copied(f), (f / "m/chat_template.jinja").unlink(), (f / "m/chat_template.jinja").mkdir()])
    add("template", "none", *ON_MODEL, names=("chat template",), setup=lambda f: [copied(f), (f / "m/chat_template.jinja").unlink()])
    add("template", "thinking where it knows none", *ON_MODEL, "--thinking", names=("thinking",), setup=copied)
    kind = "tokenizer"
    for key, values in {"bos_token": [5, [], {}, True], "eos_token": [5, [], {}], "extra_special_tokens": ["x", 5, [5], {"a": 5}], "added_tokens_decoder": [[], 5, {"x": {}}, {"5": 7}], "chat_template": [5, {"a": 1}, [5], [{"name": "default"}]],
                        "tokenizer_class": [5, [], "LlamaTokenizer"], "model_specific_special_tokens": [[], 5, {"a": 5}]}.items():
        for value in values:
            names = ("tokenizer_config.json", key)
            setup = edited("tokenizer_config.json", put(key, value))
            if key == "chat_template":
                setup = all_of(setup, lambda f: (f / "m/chat_template.jinja").unlink())
            add(kind, f"{key} = {short(value)}", *ON_MODEL, names=names, setup=setup)
    for name, raw in {"empty": "", "list": "[]", "cut": '{"a', "NaN": '{"a": NaN}', "not UTF-8": b"\xff", "deep": "[" * 5000}.items():
        add(kind, f"tokenizer_config.json: {name}", *ON_MODEL, names=("tokenizer_config.json",), setup=all_of(copied, with_file("m/tokenizer_config.json", raw)))
        add(kind, f"tokenizer.json: {name}", *ON_MODEL, names=("tokenizer.json",), setup=all_of(copied, with_file("m/tokenizer.json", raw)))
    add(kind, "none", *ON_MODEL, names=("tokenizer",), setup=lambda f: [copied(f), *(p.unlink() for p in (f / "m").glob("tokenizer.*"))])
    add(kind, "tokenizer.model cut", *ON_MODEL, names=("tokenizer.model",), setup=lambda f: [copied(f), *(p.unlink() for p in (f / "m").glob("tokenizer.json")), (f / "m/tokenizer.model").write_bytes(b"xyz")])

    def fast(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
        def setup(folder: Path) -> None:
            model = copied(folder)
            pieces = {f"<0x{b:02X}>": 12 + b for b in range(256)} | {t: i for i, t in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"))} | {c: 300 + i for i, c in enumerate("abcdefghijklmnop")}
            added = [{"id": i, "content": t, "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False} for t, i in pieces.items() if i < 6]
            values = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "ByteFallback"},
                      "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": pieces, "merges": []}, "truncation": None, "padding": None}
            change(values)
            (model / "tokenizer.json").write_text(json.dumps(values))
            (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}))
            for file in model.glob("tokenizer.model"):
                file.unlink()
        return setup

    add(kind, "ids beyond the vocabulary", *ON_MODEL, names=("id", "tokenizer"), setup=fast(lambda v: v["model"]["vocab"].update({c: 70000 + i for i, c in enumerate("abcdefghijklmnop")})))
    add(kind, "an added id beyond", *ON_MODEL, names=("id", "tokenizer"), setup=fast(lambda v: v["added_tokens"].append({**v["added_tokens"][0], "id": 9999, "content": "Sort"}) or v["model"]["vocab"].update({"Sort": 9999})))
    add(kind, "no model", *ON_MODEL, names=("tokenizer.json",), setup=fast(lambda v: v.pop("model")))
    add(kind, "unknown model", *ON_MODEL, names=("tokenizer.json",), setup=fast(lambda v: v["model"].update(type="Magic")))
    add(kind, "merges of nothing", *ON_MODEL, names=("tokenizer.json",), setup=fast(lambda v: v["model"].update(merges=[["no", "where"]])))
    add(kind, "a plain good one", *ON_MODEL, good=True, setup=fast(lambda v: None))
    add(kind, "truncation left on", *ON_MODEL, good=True, setup=fast(lambda v: v.update(truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0})))


# ------------------------------------------------------------------------------------------------------ options (21)


def option_cases() -> None:
    kind = "options"
    bad: dict[str, list[str]] = {
        "--seed": ["x", "1.5", ""], "--max-tokens": ["0", "-1", "x", "1.5", "nan", "1e30"], "--max-denoising-steps": ["0", "-3", "x", "inf"], "--t-max": ["-1", "nan", "inf", "x", "0", "-inf", "0.1"],
        "--t-min": ["-1", "nan", "inf", "x", "9"], "--entropy-bound": ["-1", "nan", "x", "-inf"], "--stability-threshold": ["-1", "x", "1.5"], "--confidence-threshold": ["-1", "nan", "x"],
        "--prefill-step-size": ["0", "-1", "x"], "--canvas-length": ["0", "-1", "x", "49", "100000"], "--pace": ["-1", "nan", "inf", "x"], "--trunk": ["x", ""], "--memory-limit": ["0", "-1", "nan", "x", "0.0000001"],
        "--model": ["", "absent", "no/such/model/here", "\ud800"], "--adapter": ["", "absent"], "--noise": ["", "absent"], "--save-noise": ["", "absent/x.npz", "."], "--record": ["", "x.gif", "absent/x.svg", ".svg/"],
        "--messages": ["", "absent.json", "."],
    }
    for option, values in bad.items():
        for value in values:
            base = ("generate", "-q", "--seed", "1", "--max-tokens", "8") if option not in ("--seed", "--max-tokens") else ("generate", "-q")
            base += () if option == "--messages" else ("--prompt", "Sort: b, a")
            add(kind, f"generate {option} {value!a}", *base, option, value, names=(option, option.strip("-").replace("-", "_"), value if value.strip("./") and len(value) > 4 else option, "folder \\ud800"))
    for args, names in [
        (("generate",), ("prompt",)), (("generate", "--prompt", ""), ("prompt",)), (("generate", "--prompt", "   "), ("prompt",)), (("generate", "--prompt", "@absent.txt"), ("absent.txt",)), (("generate", "--prompt", "@."), (".", "prompt")),
        (("generate", "--prompt", "x", "--messages", "m.json"), ("--messages",)), (("generate", "--prompt", "x", "--json", "--show-thinking"), ("--show-thinking",)), (("generate", "--prompt", "x", "--noise", "a", "--save-noise", "b"), ("--save-noise", "--noise")),
        (("generate", "--nonsense"), ("--nonsense",)), (("generat",), ("generat",)), (("generate", "--prompt"), ("--prompt",)), (("generate", "--prompt", "bad \udcff end"), ("prompt",)), (("generate", "--prompt", "x", "--system-prompt", "\udc80"), ("system",)),
        (("generate", "--prompt", "x", "--trunk", "bf16"), ("trunk",)), (("generate", "--prompt", "x", "--greedy", "--seed", "1", "--noise", "n.npz"), ("n.npz", "--noise", "--seed")),
    ]:
        if args == ("generate",):
            continue
        add(kind, "generate " + " ".join(map(ascii, args[1:])), *args, names=names)
    for option, values in {"--recipe": ["", "absent", "q99", "x.toml", "../q4"], "--q-bits": ["0", "7", "-4", "x", "4.5"], "--q-group-size": ["0", "17", "x", "-32"], "--q-mode": ["x", ""], "--dtype": ["int8", ""], "--hf-path": ["", "absent"], "--mlx-path": ["", "file"]}.items():
        for value in values:
            extra = () if option == "--hf-path" else ("--hf-path", "m")
            add(kind, f"convert {option} {value!r}", "convert", *extra, option, value, names=(option, option.strip("-").replace("q-", "").replace("-", "_"), value or option), setup=all_of(copied, with_file("file", "x")), keep=("file",))
    for args, names in [
        (("convert", "--hf-path", "m", "--recipe", "q4", "-q"), ("--recipe",)), (("convert", "--hf-path", "m", "--dry-run", "--force"), ("--dry-run",)), (("convert", "--hf-path", "m", "--mlx-path", "m"), ("--mlx-path",)), (("convert", "--hf-path", "m", "--mlx-path", "m/sub"), ("--mlx-path",)),
        (("convert", "--hf-path", "m", "--mlx-path", "full"), ("full",)), (("convert", "--hf-path", "m", "--mlx-path", "full", "--force"), ("full",)), (("convert", "--hf-path", "m", "--revision", "main"), ("revision",)), (("convert", "--hf-path", "file"), ("file",)),
        (("convert", "--hf-path", "m", "--upload-repo", "a/b"), ("upload", "a/b")),
    ]:
        add(kind, " ".join(args), *args, names=names, setup=all_of(copied, with_file("file", "x"), with_file("full/x", "x")), keep=("file", "full/x", "m/config.json"))
    data = with_file("d/train.jsonl", '{"prompt": "a", "completion": "b"}\n' * 4)
    for option, values in {
        "--rank": ["0", "-1", "x", "2.5", "1e9"], "--scale": ["x", "nan", "inf", "-inf"], "--targets": ["", "x", "attention,x", ","], "--steps": ["0", "-1", "x", "1.5"], "--batch-size": ["0", "-1", "x", "5"], "--accumulate": ["0", "-2", "x"],
        "--learning-rate": ["x", "-1", "nan", "inf"], "--warmup": ["-1", "x"], "--optimizer": ["sgd", ""], "--max-length": ["0", "-1", "x", "3"], "--seed": ["x", "-1"], "--evaluate-every": ["0", "-1", "x"], "--save-every": ["0", "x"], "--exact-match": ["-1", "x"],
        "--data": ["", "absent", "no/such"], "--output": ["", "file"], "--config": ["", "absent.toml", "."], "--model": ["", "absent"], "--from-scratch": ["", "absent"],
    }.items():
        for value in values:
            base = ("train",) if option == "--data" else ("train", "--data", "d")
            base += () if option == "--steps" else ("--steps", "1")
            base += () if option == "--batch-size" else ("--batch-size", "2")
            base += () if option == "--output" else ("--output", "o")
            add(kind, f"train {option} {value!r}", *base, option, value, names=(option, option.strip("-").replace("-", "_"), value if len(value) > 3 else option), setup=all_of(data, with_file("file", "x")), keep=("file",), leaves=("o", "o/*"))
    for args, names in [
        (("train",), ("--data",)), (("train", "--data", "d", "--full", "--rank", "4"), ("--rank",)), (("train", "--data", "d", "--train-router"), ("--train-router",)), (("train", "--data", "d", "--from-scratch", "m", "--model", "m"), ("--model",)), (("train", "--data", "d", "--full", "--fuse"), ("--fuse",)),
    ]:
        add(kind, " ".join(args), *args, names=names, setup=all_of(data, copied))
    for option, values in {"--repeat": ["0", "x"], "--only": ["x", ""], "--without": ["x", ""], "--output": ["", "absent/x.json", "."], "--model": ["", "absent"]}.items():
        for value in values:
            add(kind, f"bench {option} {value!r}", "bench", *(() if option == "--only" else ("--only", "fact")), *(() if option == "--repeat" else ("--repeat", "1")), option, value, names=(option, value or f"{option[2:]} is empty"))
    for option, values in {"--model": ["", "absent"]}.items():
        for value in values:
            add(kind, f"check {option} {value!r}", "check", option, value, names=(option, value or f"{option[2:]} is empty"))
            add(kind, f"chat {option} {value!r}", "chat", option, value, names=(option, value or f"{option[2:]} is empty"))
    add(kind, "chat --system-prompt half", "chat", "--system-prompt", "\udcff", stdin=b"hi\n", names=("system",))
    for args in (("--version",), ("--help",), ("generate", "--help"), ("train", "-h"), ("generate", "--version")):
        add(kind, "good: " + " ".join(args), *args, good=True)


# ------------------------------------------------------------------------------------------------ texts (13, 18, 22)


def text_cases() -> None:
    kind = "messages"
    ask = ("generate", "-q", "--seed", "1", "--max-tokens", "8", "--messages", "x.json")
    bad: dict[str, Any] = {
        "empty list": [], "object": {}, "text": "hi", "number": 5, "null": None, "list of text": ["hi"], "no role": [{"content": "x"}], "null role": [{"role": None, "content": "x"}], "number role": [{"role": 1, "content": "x"}], "list role": [{"role": ["user"], "content": "x"}],
        "number content": [{"role": "user", "content": 5}], "bool content": [{"role": "user", "content": False}], "object content": [{"role": "user", "content": {"text": "x"}}], "list of text content": [{"role": "user", "content": ["x"]}],
        "image part": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}], "audio part": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "video part": [{"role": "user", "content": [{"type": "video"}]}], "image_url part": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "unknown part": [{"role": "user", "content": [{"type": "dance"}]}], "part without type": [{"role": "user", "content": [{"text": "x"}]}], "part without text": [{"role": "user", "content": [{"type": "text"}]}], "part with number": [{"role": "user", "content": [{"type": "text", "text": 4}]}],
        "calls a text": [USER, {"role": "assistant", "tool_calls": "f"}], "calls of text": [USER, {"role": "assistant", "tool_calls": ["f"]}], "mixed": [USER, "x"], "nested": [[USER]], "surrogate": [{"role": "user", "content": "a\ud800b"}], "surrogate role": [{"role": "us\udfff", "content": "a"}],
        "deep": None,
    }
    for name, value in bad.items():
        raw = "[" * 5000 + "]" * 5000 if name == "deep" else json.dumps(value)
        add(kind, name, *ask, setup=with_file("x.json", raw), names=("x.json", "messages"))
    for name, raw in {"empty": "", "cut": '[{"role"', "not UTF-8": b'[{"role":"user","content":"\xe9"}]', "utf-16": json.dumps([USER]).encode("utf-16"), "NaN": '[{"role":"user","content":"x","n":NaN}]', "twice": '[{"role":"user","role":"system","content":"x"}]'}.items():
        add(kind, f"file: {name}", *ask, setup=with_file("x.json", raw), names=("x.json",))
    for name, value in {"null name": [{**USER, "name": None}], "null content": [USER, {"role": "assistant", "content": None}, USER], "text parts": [{"role": "user", "content": [{"type": "text", "text": "Sort the names: Zoe, Adam"}]}], "joined emoji": [{"role": "user", "content": "👩‍👩‍👧 \u2028 \0"}]}.items():
        add(kind, f"good: {name}", *ask, setup=with_file("x.json", json.dumps(value)), good=True)
    add(kind, "good: BOM", *ask, setup=with_file("x.json", "\ufeff" + json.dumps([USER])), good=True)
    for name, raw in {"not UTF-8": b"caf\xe9", "utf-16": "Sort".encode("utf-16"), "empty": b"", "blank": b" \n", "binary": bytes(range(256))}.items():
        add("prompt", f"stdin: {name}", "generate", "-q", "--prompt", "-", stdin=raw, names=("prompt", "standard input", "stdin"))
        add("prompt", f"file: {name}", "generate", "-q", "--prompt", "@p.txt", setup=with_file("p.txt", raw), names=("p.txt", "prompt"))
    add("prompt", "good: stdin BOM", "generate", "-q", "--max-tokens", "4", "--prompt", "-", stdin="\ufeffSort: b, a".encode(), good=True)
    add("prompt", "good: piped", "generate", "-q", "--max-tokens", "4", stdin=b"Sort: b, a", good=True)
    add("prompt", "good: positional", "generate", "-q", "--max-tokens", "4", "Sort: b, a", good=True)
    add("prompt", "a folder", "generate", "-q", "--prompt", "@d", setup=with_file("d/x", "x"), names=("d",))
    add("prompt", "home", "generate", "-q", "--max-tokens", "4", "--prompt", "@~/p.txt", setup=with_file("p.txt", "Sort: b, a"), environment={"HOME": "."}, good=True)
    for name, raw in {"half characters": b"a\xffb\nSort: b, a\n/exit\n", "unknown command": b"/nothing\n", "save nowhere": b"/save absent/x.json\n", "save nothing": b"/save\n", "seed": b"/seed x\n", "save a folder": b"/save .\n"}.items():
        add("chat", name, "chat", stdin=raw, good=True, names=("Error",))


# --------------------------------------------------------------------------------------------------- training (1, 14)


def training_cases() -> None:
    base = ("train", "--data", "d", "--steps", "1", "--batch-size", "1", "--output", "o")
    pair = '{"prompt": "Sort: b, a", "completion": "a, b"}\n'
    lines: dict[str, bytes | str] = {
        "empty file": "", "blank lines": "\n\n", "not JSON": "{\n", "a list": "[]\n", "a number": "3\n", "no completion": '{"prompt": "a"}\n', "null completion": '{"prompt": "a", "completion": null}\n', "number prompt": '{"prompt": 3, "completion": "b"}\n', "empty messages": '{"messages": []}\n',
        "messages a text": '{"messages": "hi"}\n', "last is the user's": '{"messages": [{"role": "user", "content": "x"}]}\n', "no role": '{"messages": [{"content": "x"}, {"role": "assistant", "content": "y"}]}\n', "null answer": '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null}]}\n',
        "image": '{"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "y"}]}\n', "tools a text": '{"prompt": "a", "completion": "b", "tools": "f"}\n', "surrogate": '{"prompt": "a\\ud800", "completion": "b"}\n', "surrogate answer": '{"prompt": "a", "completion": "\\udc00"}\n',
        "latin-1": b'{"prompt": "caf\xe9", "completion": "b"}\n', "utf-16": pair.encode("utf-16"), "NaN": '{"prompt": "a", "completion": "b", "w": NaN}\n', "deep": '{"prompt": ' + "[" * 3000 + "]" * 3000 + ', "completion": "b"}\n', "twice": '{"prompt": "a", "prompt": "b", "completion": "c"}\n', "cut": '{"prompt": "a", "compl\n',
        "a key of nothing": '{"text": "abc"}\n', "number messages": '{"messages": 5}\n', "list of lists": '{"messages": [["user", "x"]]}\n',
    }
    for name, raw in lines.items():
        bad = raw if isinstance(raw, bytes) else raw.encode()
        good_first = bad if name in ("empty file", "blank lines", "utf-16") else pair.encode() + bad
        add("data", name, *base, setup=with_file("d/train.jsonl", good_first), names=("train.jsonl:2", "train.jsonl"), leaves=("o", "o/*"))
        add("data", f"valid: {name}", *base, setup=all_of(with_file("d/train.jsonl", pair), with_file("d/valid.jsonl", good_first)), names=("valid.jsonl:2", "valid.jsonl"), leaves=("o", "o/*"))
    add("data", "good: separators", *base, setup=with_file("d/train.jsonl", json.dumps({"prompt": "b\u2028a\u0085", "completion": "x"}, ensure_ascii=False) + "\n"), good=True, leaves=("o", "o/*"))
    add("data", "good: BOM, CRLF", *base, setup=with_file("d/train.jsonl", "\ufeff" + pair.replace("\n", "\r\n")), good=True, leaves=("o", "o/*"))
    add("data", "good: macOS notes", *base, setup=all_of(with_file("d/train.jsonl", pair), with_file("d/._train.jsonl", b"\0\5\x16\7")), good=True, leaves=("o", "o/*"))
    add("data", "good: home", *("train", "--data", "~/d", "--steps", "1", "--batch-size", "1", "--output", "o"), setup=with_file("d/train.jsonl", pair), good=True, environment={"HOME": "."}, leaves=("o", "o/*"))
    add("data", "all too long", *base, "--max-length", "5", setup=with_file("d/train.jsonl", pair), names=("--max-length", "max_length"), leaves=("o", "o/*"))
    add("data", "no train.jsonl", *base, setup=with_file("d/x.jsonl", pair), names=("train.jsonl",))
    add("data", "a file", "train", "--data", "f.jsonl", "--steps", "1", setup=with_file("f.jsonl", pair), names=("f.jsonl", "--data"))
    toml: dict[str, str] = {"cut": "steps = ", "unknown": "stepz = 3", "text steps": 'steps = "3"', "float steps": "steps = 1.5", "bool steps": "steps = true", "nan rate": "learning_rate = nan", "inf rate": "learning_rate = inf", "negative rate": "learning_rate = -1.0", "rate text": 'learning_rate = "x"',
                            "betas number": "betas = 3", "betas three": "betas = [0.9, 0.9, 0.9]", "betas text": 'betas = ["a", "b"]', "betas one": "betas = [1.0, 1.0]", "optimizer": 'optimizer = "sgd"', "fill": 'fill = "x"', "share": "self_conditioning = 2.0", "weight": "encoder_weight = -1.0", "clip": "clip = -1.0", "decay": "weight_decay = nan",
                            "targets": "targets = 5", "data number": "data = 5", "full text": 'full = "yes"', "keep": "keep = 0", "table": "[steps]\nx = 1", "warmup": "warmup = -3", "final": "final_rate = nan", "rank": "rank = 2.5", "scale": 'scale = "x"', "scale nan": "scale = nan", "seed": "seed = 1.5", "model list": "model = []", "output": "output = 3"}
    for name, text in toml.items():
        keys = tuple(re.findall(r"^\[?(\w+)", text, re.M))
        args = ("train", "--config", "c.toml", "--batch-size", "1") + (() if "data" in keys else ("--data", "d")) + (() if "output" in keys else ("--output", "o")) + (() if {"steps"} & set(keys) else ("--steps", "1"))
        add("train --config", name, *args, setup=all_of(with_file("c.toml", text), with_file("d/train.jsonl", pair)), names=(*keys, "c.toml"), leaves=("o", "o/*"))

    def trained(folder: Path) -> None:
        """A finished run of one step, made once and copied."""
        with_file("d/train.jsonl", pair * 4)(folder)
        shutil.copytree(finished_run(), folder / "o")

    again = ("train", "--data", "d", "--steps", "1", "--batch-size", "2", "--output", "o")
    keep = ("o/adapters.safetensors", "o/adapter_config.json")
    add("resume", "good: the same again", *again, setup=trained, good=True, leaves=("o/*",))
    for name, change in {"other data": ("--data", "d2"), "other rate": ("--learning-rate", "0.01"), "other seed": ("--seed", "7"), "other rank": ("--rank", "4"), "other scale": ("--scale", "4"), "other targets": ("--targets", "attention"), "other batch": ("--batch-size", "1"), "more steps": ("--steps", "3"), "other optimizer": ("--optimizer", "muon"),
                         "full": ("--full",), "other model": ("--model", "m"), "other warmup": ("--warmup", "3"), "accumulate": ("--accumulate", "2")}.items():
        def setup(folder: Path) -> None:
            trained(folder)
            with_file("d2/train.jsonl", pair.replace("Sort", "Order") * 4)(folder)
            model = copied(folder)
            config = json.loads((model / "config.json").read_text())
            config["text_config"]["rms_norm_eps"] = 1e-5
            (model / "config.json").write_text(json.dumps(config))
        if name == "more steps":  # the same run, and further
            add("resume", "good: more steps", *again, *change, setup=setup, good=True, names=("Continuing from step 1 of 3",), leaves=("o/*",))
            continue
        add("resume", name, *again, *change, setup=setup, names=("o", "--output"), keep=keep, leaves=("o/*",))
    for name, spoil in {
        "cut position": lambda s: (s / "position.json").write_text('{"st'), "no position": lambda s: (s / "position.json").unlink(), "position of text": lambda s: (s / "position.json").write_text('{"step": "x"}'), "empty step": lambda s: [f.unlink() for f in s.iterdir()],
        "cut weights": lambda s: (s / "weights.safetensors").write_bytes(b"xx"), "no optimizer": lambda s: (s / "optimizer.safetensors").unlink(), "step beyond": lambda s: (s / "position.json").write_text('{"step": 99}'), "negative step": lambda s: (s / "position.json").write_text('{"step": -1}'),
    }.items():
        def spoiled(folder: Path, spoil: Callable[[Path], Any] = spoil) -> None:
            trained(folder)
            spoil(next((folder / "o/checkpoints").glob("step-0*")))
        add("resume", name, *again, setup=spoiled, names=("step-", "position.json", "checkpoints"), leaves=("o/*",))
    for name in ("step-zzz", "step-", "._step-0000009", ".DS_Store"):
        def stray(folder: Path, name: str = name) -> None:
            trained(folder)
            (folder / "o/checkpoints" / name).mkdir()
        add("resume", f"good: stray {name}", *again, setup=stray, good=True, leaves=("o/*",))


_FINISHED: list[Path] = []


def finished_run() -> Path:
    return _FINISHED[0]


def make_finished_run(scratch: Path) -> None:
    """Train one step, in a process of its own, for the cases about runs that go on."""
    with_file("d/train.jsonl", '{"prompt": "Sort: b, a", "completion": "a, b"}\n' * 4)(scratch)
    command = ("train", "--data", "d", "--steps", "1", "--batch-size", "2", "--output", "o")
    out = run_child(command, "", scratch, b"", {}, patience=600)  # MLX compiles kernels for it, if it never did here
    if out.status != 0:
        raise SystemExit(f"a plain training fails: status {out.status}: {out.stderr} {out.stdout}")
    _FINISHED.append(scratch / "o")


# ------------------------------------------------------------------------------------------------------ adapters (19)


def adapter_cases() -> None:
    base = (*GENERATE, "--adapter", "a")

    def adapter(folder: Path) -> Path:
        (folder / "a").mkdir()
        for name in ("adapter_config.json", "adapters.safetensors"):
            shutil.copyfile(finished_run() / name, folder / "a" / name)
        return folder / "a"

    def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def setup(folder: Path) -> None:
            file = adapter(folder) / "adapter_config.json"
            values = json.loads(file.read_text())
            change(values)
            file.write_text(json.dumps(values))
        return setup

    lora: dict[str, list[Any]] = {"rank": [0, -1, 2.5, "16", None, [], True, 10**9, 7, float("nan")], "scale": ["2.0", None, [], {}, float("nan"), float("inf"), True], "keys": ["q_proj", None, [], 5, ["x"], [5], {"a": 1}, ["self_attn.q_proj", "self_attn.q_proj"]], "dropout": [0.1, "x", float("nan"), -1]}
    for key, values in lora.items():
        for value in values:
            add("adapters", f"{key} = {short(value)}", *base, setup=config(lambda c, k=key, v=value: c["lora_parameters"].update({k: v})), names=("adapter_config.json", "a", key))
    for name, change in {"dora": lambda c: c.update(fine_tune_type="dora"), "type a number": lambda c: c.update(fine_tune_type=3), "no parameters": lambda c: c.pop("lora_parameters"), "parameters a list": lambda c: c.update(lora_parameters=[]), "num_layers": lambda c: c.update(num_layers=2), "num_layers text": lambda c: c.update(num_layers="4")}.items():
        add("adapters", name, *base, setup=config(change), names=("adapter_config.json", "a"))
    for name, raw in {"empty": "", "list": "[]", "cut": "{", "NaN": '{"lora_parameters": NaN}', "twice": '{"a": 1, "a": 2}', "not UTF-8": b"\xff", "deep": "[" * 4000}.items():
        add("adapters", f"config: {name}", *base, setup=lambda f, r=raw: [adapter(f), with_file("a/adapter_config.json", r)(f)], names=("adapter_config.json",))
    for name, raw in {"empty": b"", "words": b"version https://git-lfs.github.com/spec/v1\n", "cut": None, "zeros": bytes(200)}.items():
        def weights(folder: Path, raw: bytes | None = raw) -> None:
            file = adapter(folder) / "adapters.safetensors"
            file.write_bytes(file.read_bytes()[:-50] if raw is None else raw)
        add("adapters", f"weights: {name}", *base, setup=weights, names=("adapters.safetensors",))

    def retyped(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def setup(folder: Path) -> None:
            import numpy as np

            file = adapter(folder) / "adapters.safetensors"
            raw = file.read_bytes()
            size = struct.unpack("<Q", raw[:8])[0]
            header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
            tensors = {k: np.frombuffer(body[slice(*e["data_offsets"])], np.float32).reshape(e["shape"]).copy() for k, e in header.items() if k != "__metadata__"}
            change(tensors)
            write_safetensors(file, tensors)
        return setup

    def first(tensors: dict[str, Any]) -> str:
        return sorted(tensors)[0]

    for name, change in {"NaN": lambda t: t[first(t)].__setitem__(0, float("nan")), "infinity": lambda t: t[first(t)].__setitem__(0, float("inf")), "integers": lambda t: t.update({first(t): t[first(t)].astype("int32")}), "one missing": lambda t: t.pop(first(t)), "one more": lambda t: t.update(extra=t[first(t)]),
                         "another shape": lambda t: t.update({first(t): t[first(t)][:1]}), "renamed": lambda t: t.update(x=t.pop(first(t))), "none": lambda t: t.clear()}.items():
        add("adapters", f"tensors: {name}", *base, setup=retyped(change), names=("adapters.safetensors", "a", "adapter"))
    add("adapters", "weights only", *base, setup=lambda f: (adapter(f) / "adapter_config.json").unlink(), names=("adapter_config.json",))
    add("adapters", "config only", *base, setup=lambda f: (adapter(f) / "adapters.safetensors").unlink(), names=("adapters.safetensors",))
    add("adapters", "a file", *GENERATE, "--adapter", "a/adapters.safetensors", setup=adapter, names=("a/adapters.safetensors",))
    add("adapters", "good", *base, setup=adapter, good=True)
    add("adapters", "good: home", *GENERATE, "--adapter", "~/a", setup=adapter, environment={"HOME": "."}, good=True)
    add("adapters", "good: brackets", *GENERATE, "--adapter", "x[/b]", setup=lambda f: [adapter(f), (f / "x[").mkdir(), (f / "a").rename(f / "x[/b]")], good=True)


def write_safetensors(file: Path, tensors: dict[str, Any]) -> None:
    kinds = {"float32": "F32", "int32": "I32", "float64": "F64", "float16": "F16", "uint32": "U32"}
    header, body = {}, b""
    for name, array in tensors.items():
        data = array.tobytes()
        header[name] = {"dtype": kinds[array.dtype.name], "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


# -------------------------------------------------------------------------------------------- weights, noise, recipes


def weight_cases() -> None:
    kind = "weights"

    def spoiled(change: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> Callable[[Path], None]:
        def setup(folder: Path) -> None:
            file = copied(folder) / "model.safetensors"
            raw = file.read_bytes()
            size = struct.unpack("<Q", raw[:8])[0]
            header, body = change(json.loads(raw[8 : 8 + size]), raw[8 + size :])
            text = header if isinstance(header, bytes) else json.dumps(header).encode()
            file.unlink()
            file.write_bytes(struct.pack("<Q", len(text)) + text + body)
        return setup

    def name_of(header: dict[str, Any], part: str = "q_proj") -> str:
        return next(k for k in header if part in k)

    def patched(value: float, part: str) -> Callable[[dict[str, Any], bytes], tuple[Any, bytes]]:
        def change(header: dict[str, Any], body: bytes) -> tuple[Any, bytes]:
            start = header[name_of(header, part)]["data_offsets"][0]
            return header, body[:start] + struct.pack("<f", value) + body[start + 4 :]
        return change

    cases: dict[str, Callable[[dict[str, Any], bytes], tuple[Any, bytes]]] = {
        "not JSON": lambda h, b: (b"{" * 100, b), "a list": lambda h, b: ([], b), "deep": lambda h, b: (b'{"a":' * 4000, b), "cut": lambda h, b: (h, b[:-64]), "padded": lambda h, b: (h, b + b"\0" * 8), "empty header": lambda h, b: ({}, b"" if True else b),
        "one renamed": lambda h, b: ({("x" if k == name_of(h) else k): v for k, v in h.items()}, b), "shape of text": lambda h, b: (h | {name_of(h): {**h[name_of(h)], "shape": "x"}}, b), "shape negative": lambda h, b: (h | {name_of(h): {**h[name_of(h)], "shape": [-1, 2]}}, b),
        "offsets swapped": lambda h, b: (h | {name_of(h): {**h[name_of(h)], "data_offsets": h[name_of(h)]["data_offsets"][::-1]}}, b), "dtype I64": lambda h, b: (h | {name_of(h): {**h[name_of(h)], "dtype": "I64"}}, b), "dtype a number": lambda h, b: (h | {name_of(h): {**h[name_of(h)], "dtype": 5}}, b),
        "dtype unknown": lambda h, b: (h | {name_of(h): {**h[name_of(h)], "dtype": "F8"}}, b), "entry a list": lambda h, b: (h | {name_of(h): []}, b), "shape swapped": lambda h, b: (h | {name_of(h, "embed_tokens"): {**h[name_of(h, "embed_tokens")], "shape": h[name_of(h, "embed_tokens")]["shape"][::-1]}}, b),
        "NaN in attention": patched(float("nan"), "q_proj"), "infinity in the embedding": patched(float("inf"), "embed_tokens"), "NaN in a norm": patched(float("nan"), "layers.1.input_layernorm"), "NaN in experts": patched(float("nan"), "experts.down_proj"), "infinity in a scalar": patched(float("-inf"), "layer_scalar"),
    }
    for name, change in cases.items():
        for command in (ON_MODEL, ("convert", "--hf-path", "m", "--mlx-path", "p")):
            add(kind, f"{command[0]}: {name}", *command, setup=spoiled(change), names=("model.safetensors", "tensors", "decoder", "m "))
    for name, raw in {"empty": b"", "words": b"version https://git-lfs", "zeros": bytes(1000), "huge header": struct.pack("<Q", 1 << 60) + b"{}"}.items():
        def replaced(folder: Path, raw: bytes = raw) -> None:
            model = copied(folder)
            (model / "model.safetensors").unlink()
            (model / "model.safetensors").write_bytes(raw)
        add(kind, f"file: {name}", *ON_MODEL, setup=replaced, names=("model.safetensors",))
    for name, value in {"list": "[]", "cut": "{", "no map": "{}", "map a list": '{"weight_map": []}', "outside": '{"weight_map": {"a": "../x.safetensors"}}', "number": '{"weight_map": {"a": 5}}', "absent file": '{"weight_map": {"a": "b.safetensors"}}', "twice": '{"weight_map": {}, "weight_map": {}}', "NaN": '{"weight_map": NaN}'}.items():
        add("index", name, *ON_MODEL, setup=all_of(copied, with_file("m/model.safetensors.index.json", value)), names=("index.json", "b.safetensors"))
    add("weights", "good: macOS notes", *ON_MODEL, setup=all_of(copied, with_file("m/._model.safetensors", b"\0\5\x16\7"), with_file("m/._config.json", b"\0\5")), good=True)
    noise = (*GENERATE, "--noise", "n.npz")

    def noisy(**arrays: Any) -> Callable[[Path], None]:
        def setup(folder: Path) -> None:
            import numpy as np

            shapes: dict[str, Any] = {"canvas": np.zeros((1, 1, 48), np.int32), "draws": np.zeros((1, 48, 1, 48), np.float32), "ids": np.zeros((1, 48, 1, 48), np.int32)}
            for key, change in arrays.items():
                shapes[key] = change(np, shapes[key])
            np.savez(folder / "n.npz", **{k: v for k, v in shapes.items() if v is not None})
        return setup

    for name, change in {
        "ids beyond": {"ids": lambda np, a: a + 10**6}, "ids negative": {"ids": lambda np, a: a - 5}, "canvas beyond": {"canvas": lambda np, a: a + 640}, "canvas negative": {"canvas": lambda np, a: a - 1}, "draws NaN": {"draws": lambda np, a: a + np.nan}, "draws beyond": {"draws": lambda np, a: a + 7}, "draws negative": {"draws": lambda np, a: a - 1},
        "ids of floats": {"ids": lambda np, a: a + 0.5}, "text": {"ids": lambda np, a: a.astype(str)}, "no draws": {"draws": lambda np, a: None}, "shapes": {"draws": lambda np, a: a[:, :3]}, "another length": {"canvas": lambda np, a: a[..., :20], "draws": lambda np, a: a[..., :20], "ids": lambda np, a: a[..., :20]},
        "one dimension": {"canvas": lambda np, a: a[0]}, "objects": {"ids": lambda np, a: a.astype(object)}, "complex": {"draws": lambda np, a: a.astype(complex)},
    }.items():
        add("noise", name, *(a for a in noise if a not in ("--seed", "1")), setup=noisy(**change), names=("n.npz",))
    for name, raw in {"empty": b"", "words": b"abc", "zip": b"PK\3\4xx"}.items():
        add("noise", f"file: {name}", *(a for a in noise if a not in ("--seed", "1")), setup=with_file("n.npz", raw), names=("n.npz",))
    add("noise", "with a seed", *noise, setup=noisy(), names=("seed",))
    recipes: dict[str, str] = {
        "empty": "", "no reason": "bits = 4", "cut": "bits =", "unknown": 'because = "x"\nbitz = 4', "bits text": 'because = "x"\nbits = "4"', "bits 7": 'because = "x"\nbits = 7', "bits float": 'because = "x"\nbits = 4.0', "bits nan": 'because = "x"\nbits = nan', "bits true": 'because = "x"\nbits = true', "group 17": 'because = "x"\nbits = 4\ngroup_size = 17', "mode": 'because = "x"\nmode = "int4"', "mode number": 'because = "x"\nmode = 4',
        "dtype": 'because = "x"\ndtype = "int8"', "dtype list": 'because = "x"\ndtype = []', "because number": "because = 3\nbits = 4", "override a table": 'because = "x"\nbits = 4\n[override]\npath = "a"', "override a list": 'because = "x"\nbits = 4\noverride = [1]', "override without path": 'because = "x"\nbits = 4\n[[override]]\nbits = 8\nbecause = "y"', "override nowhere": 'because = "x"\nbits = 8\n[[override]]\npath = "zzz"\nbits = 8\nbecause = "y"',
        "quantize text": 'because = "x"\nbits = 8\n[[override]]\npath = "**"\nquantize = "no"\nbecause = "y"', "extends itself": 'extends = "r.toml"\nbecause = "x"', "extends nothing": 'extends = "zzz"\nbecause = "x"', "extends number": 'extends = 5\nbecause = "x"', "low trunk": 'because = "x"\nbits = 4', "experimental text": 'because = "x"\nbits = 8\nexperimental = "yes"', "allow number": 'because = "x"\nbits = 8\nallow_low_bit_trunk = 1',
        "path number": 'because = "x"\nbits = 8\n[[override]]\npath = 5\nbits = 8\nbecause = "y"', "not UTF-8": "", "mx with bits": 'because = "x"\nmode = "mxfp4"\nbits = 8',
    }
    for name, text in recipes.items():
        add("recipes", name, "convert", "--hf-path", "m", "--mlx-path", "p", "--recipe", "r.toml", setup=all_of(copied, with_file("r.toml", b"\xff\xfe" if name == "not UTF-8" else text)), names=("r.toml", "recipe r", "recipe"))
    compare = ("bench", "--compare", "a.json", "b.json")
    whole = '{"chip": "x", "model": "m", "recipe": "r", "prompts": {}}'
    for name, raw in {"empty": "", "list": "[]", "cut": "{", "no prompts": '{"chip": "x"}', "prompts a list": '{"prompts": []}', "no chip": '{"prompts": {}}', "prompt a number": '{"chip": "x", "model": "m", "recipe": "r", "prompts": {"fact": 5}}', "figure a text": '{"chip": "x", "model": "m", "recipe": "r", "prompts": {"fact": {"tokens_per_second": "x"}}}',
                      "figure NaN": '{"chip": "x", "model": "m", "recipe": "r", "prompts": {"fact": {"tokens_per_second": NaN}}}', "without a text": '{"chip": "x", "model": "m", "recipe": "r", "without": 5, "prompts": {}}', "chip a list": '{"chip": [], "model": "m", "recipe": "r", "prompts": {}}', "not UTF-8": b"\xff"}.items():
        add("bench --compare", name, *compare, setup=all_of(with_file("a.json", whole), with_file("b.json", raw)), names=("b.json",))
    add("bench --compare", "absent", *compare, names=("a.json",))
    add("bench --compare", "good: brackets", "bench", "--compare", "x[b].json", "b.json", setup=all_of(with_file("x[b].json", whole), with_file("b.json", whole.replace('"x"', '"M3 [/b] Max"'))), good=True)


# ---------------------------------------------------------------------- edit, decide, score, evaluate, tune, fuse, obey


def later_cases() -> None:
    note = with_file("t.txt", "one\ntwo\nthree\n")
    edit = ("edit", "-q", "--seed", "1", "t.txt", "--prompt", "Sort", "--lines", "2")
    for name, args, names in [
        ("no file", ("edit", "--lines", "1", "-p", "x"), ("FILE",)), ("no lines", ("edit", "t.txt", "-p", "x"), ("--lines",)), ("no prompt", ("edit", "t.txt", "--lines", "1"), ("--prompt",)), ("absent", ("edit", "absent.txt", "--lines", "1", "-p", "x"), ("absent.txt",)),
        ("a folder", ("edit", ".", "--lines", "1", "-p", "x"), (".",)), ("empty path", ("edit", "", "--lines", "1", "-p", "x"), ("FILE",)), ("blank prompt", ("edit", "t.txt", "--lines", "1", "-p", " "), ("prompt", "instruction")), ("half prompt", ("edit", "t.txt", "--lines", "1", "-p", "\udcff"), ("prompt", "instruction")),
        *((f"lines {value!r}", ("edit", "t.txt", "-p", "x", "--lines", value), ("lines",)) for value in ("0", "9", "2-9", "3-1", "x", "-1", "1-", "1,2", "", "1-2-3", "99999999999999999999")),
        ("start", (*edit, "--start", "middle"), ("--start",)), ("template options", (*edit, "--template-options", '{"a": 1}'), ("--template-options",)), ("canvas too short", (*edit, "--canvas-length", "1"), ("canvas",)), ("best of", (*edit, "--best-of", "0"), ("--best-of",)), ("temperature", (*edit, "--temperature", "nan"), ("--temperature",)),
        ("max tokens", (*edit, "--max-tokens", "0"), ("--max-tokens",)), ("absent model", (*edit, "--model", "absent"), ("absent",)),
    ]:
        add("edit", name, *args, setup=note, names=names, keep=("t.txt",))
    for name, raw in {"not UTF-8": b"a\xff\nb\n", "utf-16": "one\ntwo\n".encode("utf-16"), "empty": b"", "binary": bytes(range(256)) * 4}.items():
        add("edit", f"file: {name}", "edit", "-q", "t.txt", "--lines", "1", "-p", "x", setup=with_file("t.txt", raw), names=("t.txt", "line"), keep=("t.txt",))
    add("edit", "good: shown", *edit, setup=note, good=True, keep=("t.txt",))
    add("edit", "good: autoregressive", *edit, "--decoding", "autoregressive", setup=note, good=True, keep=("t.txt",))
    add("edit", "good: no newline at the end", *edit, setup=with_file("t.txt", "one\r\ntwo"), good=True, keep=("t.txt",))
    add("edit", "full disk", *edit, "--write", setup=note, names=("t.txt",), keep=("t.txt",), environment={"ABUSE_FULL_DISK": "1"})
    add("edit", "good: home", "edit", "-q", "--seed", "1", "~/t.txt", "--prompt", "Sort", "--lines", "2", "--write", setup=note, environment={"HOME": "."}, good=True)

    decide = ("decide", "--state", "It rains.", "--questions", "q.json")
    questions: dict[str, str | bytes] = {
        "empty": "", "list": "[]", "object of nothing": "{}", "null": "null", "cut": '{"a"', "number": "5", "deep": '{"a":' * 300 + "1" + "}" * 300, "NaN": '{"a": {"type": "score", "question": "x", "least": NaN}}', "twice": '{"a": {"type": "bool", "question": "x"}, "a": {"type": "bool", "question": "y"}}',
        "no question": '{"a": {"type": "bool"}}', "blank question": '{"a": {"type": "bool", "question": " "}}', "question a number": '{"a": {"type": "bool", "question": 5}}', "unknown type": '{"a": {"type": "colour", "question": "x"}}', "type a list": '{"a": {"type": [], "question": "x"}}', "a text": '{"a": "is it?"}', "no choices": '{"a": {"type": "choice", "question": "x"}}',
        "empty choices": '{"a": {"question": "x", "choices": []}}', "one choice": '{"a": {"question": "x", "choices": ["a"]}}', "choices twice": '{"a": {"question": "x", "choices": ["a", "a"]}}', "choices of numbers": '{"a": {"question": "x", "choices": [1, 2]}}', "choices a text": '{"a": {"question": "x", "choices": "ab"}}', "empty choice": '{"a": {"question": "x", "choices": ["", "a"]}}',
        "unknown key": '{"a": {"type": "bool", "question": "x", "colour": 1}}', "half a question": '{"a": {"type": "bool", "question": "\\ud800"}}', "not UTF-8": b'{"a": {"type": "bool", "question": "\xe9"}}', "utf-16": '{"a": {}}'.encode("utf-16"), "long choice": json.dumps({"a": {"question": "x", "choices": ["a", "b " * 500]}}),
    }
    for name, raw in questions.items():
        add("decide", f"questions: {name}", *decide, setup=with_file("q.json", raw), names=("q.json", "a:", "question", "'a'", "choice", "label"))
    fine = with_file("q.json", '{"wet": {"type": "bool", "question": "Is it wet?"}}')
    for name, args, names in [
        ("no state", ("decide", "--questions", "q.json"), ("--state",)), ("no questions", ("decide", "--state", "x"), ("--questions",)), ("absent", ("decide", "--state", "x", "--questions", "absent.json"), ("absent.json",)), ("a folder", ("decide", "--state", "x", "--questions", "."), ("--questions",)), ("absent state", ("decide", "--state", "@absent", "--questions", "q.json"), ("absent",)),
        ("half state", ("decide", "--state", "\udcff", "--questions", "q.json"), ("--state",)), ("both ways", (*decide, "--prompt", "x", "--choice", "a"), ("--prompt",)), ("one choice", ("decide", "--prompt", "x", "--choice", "a"), ("choice", "label")), ("choice twice", ("decide", "--prompt", "x", "--choice", "a", "--choice", "a"), ("'a'", "choice", "label")), ("empty choice", ("decide", "--prompt", "x", "--choice", "", "--choice", "a"), ("choice", "label")),
        ("prompt without choices", ("decide", "--prompt", "x"), ("--choice",)), ("canvas 0", (*decide, "--canvas-length", "0"), ("--canvas-length",)), ("canvas beyond", (*decide, "--canvas-length", "49"), ("canvas",)), ("canvas below a label", ("decide", "--prompt", "x", "--choice", "aaa bbb ccc", "--choice", "b", "--canvas-length", "1"), ("canvas",)), ("seed", (*decide, "--seed", "x"), ("--seed",)),
    ]:
        add("decide", name, *args, setup=fine, names=names)
    add("decide", "good", *decide, setup=fine, good=True)

    for name, raw in {"empty": b"", "not UTF-8": b"a\xffb", "utf-16": "Sort".encode("utf-16"), "binary": bytes(range(256))}.items():
        add("score", f"file: {name}", "score", "t.txt", setup=with_file("t.txt", raw), names=("t.txt",))
        add("score", f"stdin: {name}", "score", "-", stdin=raw, names=("standard input",))
    for name, args, names in [
        ("no file", ("score",), ("FILE",)), ("absent", ("score", "absent.txt"), ("absent.txt",)), ("a folder", ("score", "."), (".",)), ("empty path", ("score", ""), ("FILE",)), ("stride 0", ("score", "t.txt", "--stride", "0"), ("--stride",)), ("stride text", ("score", "t.txt", "--stride", "x"), ("--stride",)), ("absent model", ("score", "t.txt", "--model", "absent"), ("absent",)),
        ("too long", ("score", "long.txt"), ("--stride", "stride")), ("stride beyond", ("score", "long.txt", "--stride", "100000"), ("stride",)), ("closed", ("score", "-"), ("standard input",)),
    ]:
        add("score", name, *args, setup=all_of(note, with_file("long.txt", "Sort the names. " * 4000)), names=names, stdin=None if name == "closed" else b"")
    for name, raw in {"one letter": b"a", "BOM": "\ufeffSort: b, a".encode(), "emoji": "👩‍👩‍👧 \u2028".encode()}.items():
        add("score", f"good: {name}", "score", "t.txt", setup=with_file("t.txt", raw), good=True)
    add("score", "good: home", "score", "~/t.txt", setup=note, environment={"HOME": "."}, good=True)

    for name, args, names in [
        ("no tasks", ("evaluate",), ("--tasks",)), ("unknown", ("evaluate", "--tasks", "no_such_task"), ("no_such_task",)), ("empty", ("evaluate", "--tasks", ""), ("--tasks",)), ("limit 0", ("evaluate", "--tasks", "x", "--limit", "0"), ("--limit",)), ("shots", ("evaluate", "--tasks", "x", "--num-shots", "-1"), ("--num-shots",)), ("batch", ("evaluate", "--tasks", "x", "--batch-size", "0"), ("--batch-size",)),
        ("absent folder", ("evaluate", "--tasks", "x", "--output-dir", "absent"), ("absent",)), ("a file", ("evaluate", "--tasks", "x", "--output-dir", "t.txt"), ("t.txt",)), ("empty folder", ("evaluate", "--tasks", "d"), ("d", "task")), ("absent model", ("evaluate", "--tasks", "x", "--model", "absent"), ("absent",)), ("decoding", ("evaluate", "--tasks", "x", "--decoding", "y"), ("--decoding",)),
    ]:
        add("evaluate", name, *args, setup=all_of(note, with_file("d/x.txt", "x")), names=names, keep=("t.txt",))

    for name, args, names in [
        ("absent model", ("tune", "--model", "absent"), ("absent",)), ("empty model", ("tune", "--model", ""), ("model",)), ("a file", ("tune", "--model", "t.txt"), ("t.txt",)), ("a folder of nothing", ("tune", "--model", "d"), ("config.json",)), ("both", ("tune", "--forget", "--show"), ("--show", "--forget")), ("forget absent", ("tune", "--forget", "--model", "absent"), ("absent",)), ("nonsense", ("tune", "--nonsense"), ("--nonsense",)),
    ]:
        add("tune", name, *args, setup=all_of(note, with_file("d/x.txt", "x")), names=names, environment={"MLX_DIFFGEMMA_CACHE": "cache"}, leaves=("cache", "cache/*"))

    def kept(change: Callable[[dict[str, Any]], Any] | str) -> Callable[[Path], None]:
        def setup(folder: Path) -> None:
            from mlx_diffgemma.files import tuned
            from mlx_diffgemma.model.tuning import DEFAULT

            os.environ["MLX_DIFFGEMMA_CACHE"] = str(folder / "cache")
            file = tuned.remember(copied(folder), "m", DEFAULT, {})
            del os.environ["MLX_DIFFGEMMA_CACHE"]
            values: Any = json.loads(file.read_text())
            file.write_text(change if isinstance(change, str) else json.dumps(change(values) or values))
        return setup

    spoiled: dict[str, Any] = {"empty": "", "cut": "{", "list": "[]", "deep": "[" * 5000, "NaN": '{"tuning": NaN}', "no tuning": lambda v: v.pop("tuning"), "tile of text": lambda v: v["tuning"].update(tile="x"), "tile 0": lambda v: v["tuning"].update(tile=0), "scores nothing": lambda v: v["tuning"].update(scores=None), "trunk": lambda v: v["tuning"].update(trunk="gold"),
                               "measured with numbers": lambda v: v.update(measured_with={"chip": 5}), "measured with a list": lambda v: v.update(measured_with=[]), "another chip": lambda v: v["measured_with"].update(chip="M9"), "wired of text": lambda v: v["tuning"].update(wired="yes")}
    for name, change in spoiled.items():
        add("tune", f"remembered: {name}", *ALOUD, setup=kept(change), good=True, names=("left alone",), environment={"MLX_DIFFGEMMA_CACHE": "cache"})
        add("tune", f"shown: {name}", "tune", "--show", setup=kept(change), good=True, environment={"MLX_DIFFGEMMA_CACHE": "cache"})

    for name, args, names in [
        ("absent adapter", ("fuse", "--adapter", "absent"), ("absent",)), ("empty adapter", ("fuse", "--adapter", ""), ("--adapter",)), ("a file", ("fuse", "--adapter", "t.txt"), ("t.txt",)), ("no adapter", ("fuse", "--adapter", "d"), ("adapter_config.json",)), ("into something", ("fuse", "--adapter", "d", "--save-path", "d"), ("--save-path", "d")), ("into a file", ("fuse", "--adapter", "d", "--save-path", "t.txt"), ("t.txt",)), ("empty target", ("fuse", "--adapter", "d", "--save-path", ""), ("--save-path",)), ("absent model", ("fuse", "--model", "absent", "--adapter", "d"), ("absent",)),
    ]:
        add("fuse", name, *args, setup=all_of(note, with_file("d/x.txt", "x")), names=names, keep=("t.txt", "d/x.txt"))

    obey = ("generate", "-q", "--seed", "1", "--max-tokens", "8", "--prompt", "x")
    schemas: dict[str, Any] = {"cut": "{", "NaN": '{"const": NaN}', "deep": '{"items":' * 400 + "true" + "}" * 400, "type": {"type": "colour"}, "type a number": {"type": 5}, "unknown word": {"typ": "string"}, "nowhere": {"$ref": "#/a"}, "outside": {"$ref": "https://x.y/z"}, "impossible": {"type": "integer", "minimum": 3, "maximum": 2}, "nothing": {"not": {}}, "pattern": {"type": "string", "pattern": "("}, "look-around": {"type": "string", "pattern": "(?=a)b"},
                              "huge": {"type": "string", "minLength": 10**8}, "enum a text": {"enum": "x"}, "enum of nothing": {"enum": []}, "items a list": {"type": "array", "items": [1]}, "required a text": {"type": "object", "required": "a"}, "properties a list": {"properties": []}, "format": {"type": "string", "format": "phone"}, "bounds of text": {"type": "integer", "minimum": "x"}, "min above max": {"type": "array", "minItems": 3, "maxItems": 1}, "twice": '{"type": "string", "type": "integer"}', "infinity": '{"type": "number", "maximum": 1e999}'}
    for name, value in schemas.items():
        text = value if isinstance(value, str) else json.dumps(value)
        add("obey", f"schema: {name}", *obey, "--json-schema", text, names=("schema",))
        add("obey", f"schema in a file: {name}", *obey, "--json-schema", "s.json", setup=with_file("s.json", text), names=("schema",))
    for name, args, names in [
        ("schema absent", ("--json-schema", "absent.json"), ("absent.json",)), ("schema empty", ("--json-schema", ""), ("--json-schema",)), ("schema a folder", ("--json-schema", "."), ("--json-schema",)), ("schema a list", ("--json-schema", "[]"), ("--json-schema", "schema")), ("regex open", ("--regex", "("), ("regular", "regex")), ("regex empty", ("--regex", ""), ("regex", "answer")), ("regex backwards", ("--regex", "(a)\\1"), ("\\1", "regex", "back")), ("regex look", ("--regex", "a(?=b)"), ("look",)), ("regex huge", ("--regex", "(a{1000}){1000}"), ("regex", "states")), ("regex half", ("--regex", "\udcff"), ("regex",)),
        ("one choice empty", ("--choice", ""), ("choice",)), ("choices twice", ("--choice", "a", "--choice", "a"), ("'a'", "choice")), ("choice half", ("--choice", "\udc80"), ("choice",)), ("choice too long", ("--choice", "word " * 200), ("max_tokens", "tokens")), ("both", ("--regex", "a", "--choice", "b"), ("--choice",)), ("hole alone", ("--hole", "X"), ("--hole",)),
    ]:
        add("obey", name, *obey, *args, names=names)
    bare = ("generate", "-q", "--seed", "1")
    for name, args, names in [
        ("fill without a mark", ("--fill", "nothing to fill"), ("<fill>", "mark")), ("fill absent", ("--fill", "@absent"), ("absent",)), ("fill half", ("--fill", "a\udcff<fill>"), ("--fill",)), ("fill too long", ("--fill", "word " * 400 + "<fill>"), ("canvas",)), ("hole empty", ("--fill", "a", "--hole", ""), ("mark", "--hole")), ("fill and thinking", ("--fill", "a <fill>", "--thinking"), ("--thinking",)), ("suffix absent", ("--suffix", "@absent"), ("absent",)), ("fill and regex", ("--fill", "a <fill>", "--regex", "b"), ("--regex",)),
        ("retries", ("--prompt", "x", "--retries", "-1"), ("--retries",)), ("best of and retries", ("--prompt", "x", "--retries", "1", "--best-of", "2"), ("best_of", "retries")), ("best of, events", ("--prompt", "x", "--events", "--best-of", "2"), ("--events", "-q")), ("logprobs 0", ("--prompt", "x", "--logprobs", "0"), ("logprobs",)), ("logprobs 21", ("--prompt", "x", "--logprobs", "21"), ("logprobs",)), ("logprobs text", ("--prompt", "x", "--logprobs", "many"), ("logprobs", "many")), ("top p alone", ("--prompt", "x", "--top-p", "0.9"), ("top_p",)), ("top p 2", ("--prompt", "x", "--top-p", "2", "--decoding", "autoregressive"), ("top_p", "--top-p")),
        ("top k nan", ("--prompt", "x", "--top-k", "nan", "--decoding", "autoregressive"), ("--top-k",)), ("stable, autoregressive", ("--prompt", "x", "--stable-answer", "2", "--decoding", "autoregressive"), ("stable_answer",)), ("steps, autoregressive", ("--prompt", "x", "--max-denoising-steps", "2", "--decoding", "autoregressive"), ("max_denoising_steps",)), ("temperature tiny", ("--prompt", "x", "--temperature", "1e-9"), ("temperature",)), ("unknown stop", ("--prompt", "x", "--extra-eos-token", "<nothing>"), ("<nothing>",)), ("empty stop", ("--prompt", "x", "--extra-eos-token", ""), ("--extra-eos-token",)),
        *((f"template options {value!a}", ("--prompt", "x", "--template-options", value), ("--template-options", "template_options", "template")) for value in ("", "{", "[]", '{"a": NaN}', '{"a":' * 200 + "1" + "}" * 200, '{"messages": []}', '{"\ud800": 1}', '{"nothing_reads_this": 1}')),
    ]:
        add("obey", name, *bare, *args, names=names)

    batch = ("generate", "--input", "p.jsonl", "--output", "r.jsonl", "-q", "--seed", "1", "--max-tokens", "4")
    prompts = with_file("p.jsonl", '{"prompt": "Sort: b, a"}\n')
    for name, raw in {"empty": b"", "blank": b"\n\n", "not UTF-8": b"\xff\n", "utf-16": '{"prompt": "a"}\n'.encode("utf-16"), "twice the same id": b'{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n'}.items():
        add("batches", f"input: {name}", *batch, setup=with_file("p.jsonl", raw), names=("p.jsonl",))
    for name, line in {"not JSON": "{", "a list": "[]", "no prompt": "{}", "prompt a number": '{"prompt": 5}', "both": '{"prompt": "a", "messages": []}', "messages of nothing": '{"messages": []}', "image": '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "half": '{"prompt": "\\ud800"}', "NaN": '{"prompt": "a", "w": NaN}', "deep": '{"prompt": ' + "[" * 200 + "]" * 200 + "}", "seed of text": '{"prompt": "a", "seed": "x"}', "id a list": '{"prompt": "a", "id": []}', "empty prompt": '{"prompt": ""}', "a key of the reply": '{"prompt": "a", "text": "x"}'}.items():
        add("batches", f"line: {name}", *batch, setup=with_file("p.jsonl", '{"prompt": "Sort: b, a"}\n' + line + "\n"), names=("line 2", "2:", "id 2", " 2 ", "p.jsonl:2", "1 of 2"), leaves=("r.jsonl", "r.jsonl.journal"))
    journals: dict[str, bytes] = {"words": b"hello\n", "list": b"[]\n", "deep": b"[" * 3000 + b"\n", "no seed": b'{"about": {}}\n', "seed of text": b'{"about": {}, "seed": "x"}\n', "lines of text": b'{"about": {}, "seed": 1}\n{"lines": "x"}\n', "lines of numbers": b'{"about": {}, "seed": 1}\n{"lines": [1]}\n', "another run's": b'{"about": {"model": "other"}, "seed": 1}\n', "NaN": b'{"about": NaN, "seed": 1}\n'}
    for name, raw in journals.items():
        add("batches", f"journal: {name}", *batch, setup=all_of(prompts, with_file("r.jsonl.journal", raw)), names=("r.jsonl.journal",), keep=("r.jsonl.journal",))
    for name, args, names in [
        ("no output", ("generate", "--input", "p.jsonl"), ("--output",)), ("absent", ("generate", "--input", "absent.jsonl", "--output", "r.jsonl"), ("absent.jsonl",)), ("output there", ("generate", "--input", "p.jsonl", "--output", "t.txt"), ("t.txt",)), ("output nowhere", ("generate", "--input", "p.jsonl", "--output", "absent/r.jsonl"), ("absent",)), ("output a folder", ("generate", "--input", "p.jsonl", "--output", "."), ("--output",)), ("batch size", (*batch, "--batch-size", "0"), ("--batch-size",)), ("with a prompt", (*batch, "--prompt", "x"), ("--prompt",)), ("with events", (*batch, "--events"), ("--events",)), ("output alone", ("generate", "--prompt", "x", "--output", "r.jsonl"), ("--output",)), ("empty input", ("generate", "--input", "", "--output", "r.jsonl"), ("--input",)),
    ]:
        add("batches", name, *args, setup=all_of(prompts, note), names=names, keep=("t.txt", "p.jsonl"))
    add("batches", "full disk", *batch, setup=prompts, names=("r.jsonl",), environment={"ABUSE_FULL_DISK": "1"})
    add("batches", "good: home", "generate", "--input", "~/p.jsonl", "--output", "~/r.jsonl", "-q", "--max-tokens", "4", setup=prompts, environment={"HOME": "."}, good=True, leaves=("r.jsonl",))
    add("batches", "good: separators", *batch, setup=with_file("p.jsonl", json.dumps({"prompt": "b\u2028a\u0085"}, ensure_ascii=False) + "\r\n"), good=True, leaves=("r.jsonl",))
    add("full disk", "train without locks", "train", "--data", "d", "--steps", "1", "--batch-size", "1", "--output", "o", setup=with_file("d/train.jsonl", '{"prompt": "a", "completion": "b"}\n'), good=True, names=("lock",), leaves=("o", "o/*"), environment={"ABUSE_NO_LOCKS": "1"})
    add("full disk", "batches without locks", *batch, setup=prompts, good=True, leaves=("r.jsonl",), environment={"ABUSE_NO_LOCKS": "1"})
    head = "m = load(model)\n"
    for code, names in {
        "m.score('')": ("score",), "m.score(5)": ("text",), "m.score('a\\ud800')": ("text",), "m.score([])": ("text", "ids"), "m.score([10**9])": ("id",), "m.score([-1])": ("id",), "m.score('a', stride=0)": ("stride",), "m.score('a', stride='x')": ("stride",), "m.score('a', answer=5)": ("answer",),
        "m.decide('x', {})": ("question",), "m.decide(5, {'a': {'type': 'bool', 'question': 'x'}})": ("state",), "m.decide('x', {'a': 5})": ("a",), "m.decide('x', {'a': {'type': 'bool', 'question': 'x'}}, canvas_length=0)": ("canvas_length",), "m.decide('x', {'a': {'type': 'bool', 'question': 'x'}}, seed='x')": ("seed",), "m.decide('x', {'a': {'type': 'bool', 'question': 'x'}}, orders='x')": ("orders",),
        "m.fill('no mark')": ("mark", "<fill>"), "m.fill(5)": ("text",), "m.fill('a <fill>', mark='')": ("mark",), "m.fill('a <fill>', holes=[5])": ("hole",), "m.fill('a <fill>', holes=5)": ("hole",), "m.fill()": ("text", "prefix"), "m.fill(prefix=5)": ("prefix",), "m.generate('a', json_schema=5)": ("schema",), "m.generate('a', json_schema='{')": ("schema",), "m.generate('a', regex=5)": ("regex",), "m.generate('a', choices='ab')": ("choices",), "m.generate('a', choices=[])": ("choices",), "m.generate('a', choices=[5])": ("choice",),
        "m.generate('a', constraint=5)": ("constraint",), "m.generate('a', tool_choice='x')": ("tool_choice",), "m.generate('a', regex='a', choices=['b'])": ("choices", "regex"), "m.generate('a', logprobs=99)": ("logprobs",), "m.generate('a', best_of=0)": ("best_of",), "m.generate('a', retries='x')": ("retries",), "m.generate('a', decoding='x')": ("decoding",), "m.generate('a', top_k=5)": ("top_k",), "m.generate('a', template_options=5)": ("template_options",), "m.generate('a', template_options={'a': object()})": ("option 'a'",), "m.generate('a', sanitize_control_tokens='x')": ("sanitize_control_tokens",),
        "next(m.stream('a', best_of=2))": ("best_of",), "m.edit('a', lines=(1, 1), instruction='')": ("instruction", "edit"), "m.prepare_edit('a\\nb', lines=(0, 1), instruction='x')": ("lines",), "m.prepare_edit('a', lines='x', instruction='x')": ("lines",), "m.prepare_edit(5, lines=(1, 1), instruction='x')": ("text",),
    }.items():
        if code.startswith("m.edit("):
            continue
        CASES.append(Case(kind="later API", name=code, code=head + code, names=names, setup=copied))


# -------------------------------------------------------------------------------------------------------------- API


def api_cases() -> None:
    head = "m = load(model)\n"
    calls: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name, values in {
        "max_tokens": ["0", "-1", "2.5", "'8'", "None and 0 or []", "float('nan')", "True", "10**30"], "max_denoising_steps": ["0", "-1", "1.5", "'x'", "[]"], "t_min": ["-1", "'x'", "float('nan')", "float('inf')", "5", "None"], "t_max": ["-1", "'x'", "float('nan')", "float('inf')", "[]"], "entropy_bound": ["-1", "'x'", "float('nan')", "None"],
        "stability_threshold": ["-1", "1.5", "'x'"], "confidence_threshold": ["-1", "'x'", "float('nan')"], "stop_ids": ["5", "'x'", "(1.5,)", "(-1,)", "(10**9,)", "None"], "pad_token_id": ["-1", "10**9", "'x'", "1.5"], "prefill_step_size": ["0", "-1", "2.5", "'x'"], "canvas_length": ["0", "-1", "49", "2.5", "'x'", "True"], "greedy": ["'yes'", "5"],
        "avoid_empty": ["'yes'", "5"], "sparse_signal": ["'x'"], "temperature": ["-1", "0.0001", "'x'", "float('nan')"], "max_token": ["8"], "seed": ["'x'", "1.5", "[1]"], "seeds": ["5", "[1, 2]", "['x']", "[1.5]"], "noise": ["5", "'n.npz'"], "tools": ["'x'", "5", "[5]", "[{'a': float('nan')}]"], "enable_thinking": ["'yes'", "5"],
    }.items():
        for value in values:
            calls[f"generate({name}={value})"] = (head + f"m.generate('Sort: b, a', {name}={value})", (name, name.rstrip("s")))
    for value in ("5", "None", "[]", "b'x'", "{}", "[{}]", "[{'role': 'user'}, 5]", "[[]]", "[1.5, 2]", "[-1]", "[640]", "[True, False]", "[10**30]", "'bad \\ud800'", "[{'role': 'user', 'content': object()}]", "[{'role': 'user', 'content': float('nan')}]", "['a', 5]", "('a', 'b')", "[1, 'a']"):
        calls[f"generate({value})"] = (head + f"m.generate({value})", ("prompt", "messages", "id"))
    for value in ("5", "None", "''", "'absent'", "b'x'", "'a\\0b'", "[]", "'x' * 5000", "'\\ud800'"):
        if value == "None":
            continue
        calls[f"load({value})"] = (f"load({value})", ("load", "path", "folder", "absent", "model"))
    for option, values in {"trunk": ["'x'", "5"], "memory_limit": ["-1", "0", "'x'", "1000", "float('nan')"], "adapter": ["5", "'absent'", "''"], "revision": ["'main'", "5"]}.items():
        for value in values:
            calls[f"load({option}={value})"] = (f"load(model, {option}={value})", (option, "memory", "absent"))
    for value in ("5", "None", "'bad \\ud800'", "[]", "b'x'", "{'role': 'user'}"):
        calls[f"chat().send({value})"] = (head + f"m.chat().send({value})", ("text", "message", "prompt"))
    for value in ("5", "'bad \\udfff'", "[]"):
        calls[f"chat({value})"] = (head + f"m.chat({value}).send('hi')", ("system", "message"))
    calls["chat(max_token=3)"] = (head + "m.chat(max_token=3).send('hi')", ("max_token",))
    for name, (code, names) in calls.items():
        CASES.append(Case(kind="API", name=name, code=code, names=names, setup=copied))
    good = {
        "load()": "load().generate('Sort: b, a', max_tokens=4)", "generate twice": head + "m.generate('Sort: b, a', max_tokens=4); m.generate(['a', 'b'], max_tokens=4)", "null keys": head + "m.generate([{'role': 'user', 'content': 'a', 'name': None}], max_tokens=4)",
        "tuple of messages": head + "m.generate([{'role': 'user', 'content': ({'type': 'text', 'text': 'a'},)}], max_tokens=4)", "Path": "import pathlib\nload(pathlib.Path(model)).generate('a', max_tokens=4)",
        "another thread": head + "import threading\nr = []\nt = threading.Thread(target=lambda: r.append(m.generate('Sort: b, a', max_tokens=4)))\nt.start(); t.join()\nassert r",
        "a batch of emoji": head + "m.generate(['👩‍👩‍👧', 'é'], max_tokens=4)", "an empty turn": head + "m.generate('', max_tokens=4); m.generate(['', ''], max_tokens=4); m.chat(max_tokens=4).send('')", "ids beside text": head + "m.generate([[1, 2], 'a'], max_tokens=4)", "no temperature at the end": head + "m.generate('a', t_min=0, max_tokens=4)", "numpy ids": head + "import numpy as np\nm.generate([int(i) for i in np.arange(5)], max_tokens=4)",
    }
    for name, code in good.items():
        CASES.append(Case(kind="API", name=f"good: {name}", code=code, good=True, setup=copied))


# -------------------------------------------------------------------------------------------- places: disks, terminals


def place_cases() -> None:
    kind = "paths"
    for name, args in {
        "record": ("--record", "~/x.svg"), "save-noise": ("--save-noise", "~/x.npz"),
    }.items():
        add(kind, f"good: home, {name}", *GENERATE, *args, environment={"HOME": "."}, good=True, leaves=("x.*",))
    add(kind, "good: home, model", *GENERATE, "--model", "~/m", environment={"HOME": "."}, setup=copied, good=True)
    add(kind, "good: home, bench", "bench", "--only", "fact", "--repeat", "1", "--output", "~/b.json", environment={"HOME": "."}, good=True, leaves=("b.json",))
    for name in ("x[/b]", "[bold]", "plain [4bit]", "a b'c\"d", "é東", "-m", "%s", "{x}"):
        def named(folder: Path, name: str = name) -> None:
            model = copied(folder)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            model.rename(folder / name)
        add(kind, f"good: model {name}", *GENERATE[:1], *GENERATE[2:], "--model", f"./{name}", setup=named, good=True)
        add(kind, f"absent {name}", *GENERATE, "--model", f"./{name}", names=(name,))
    for name, value in {"0": "0", "1": "1", "text": "x", "huge": "100000"}.items():
        add("terminal", f"good: COLUMNS={name}", *GENERATE[:1], *GENERATE[2:], environment={"COLUMNS": value}, good=True)
    add("terminal", "good: ASCII", *GENERATE[:1], *GENERATE[2:], environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, good=True)
    add("terminal", "good: help in ASCII", "generate", "--help", environment={"PYTHONIOENCODING": "ascii"}, good=True)
    add("terminal", "good: bench in ASCII", "bench", "--only", "fact", "--repeat", "1", "--output", "b.json", environment={"PYTHONIOENCODING": "ascii"}, good=True, leaves=("b.json",))
    add("terminal", "good: dumb", *GENERATE[:1], *GENERATE[2:], environment={"TERM": "dumb"}, good=True)
    for name, args in {"record": ("--record", "old.svg"), "save-noise": ("--save-noise", "old.npz")}.items():
        add("full disk", name, *GENERATE, *args, setup=all_of(with_file("old.svg", "old"), with_file("old.npz", "old")), keep=("old.svg", "old.npz"), names=("old",), environment={"ABUSE_FULL_DISK": "1"})
    add("full disk", "bench", "bench", "--only", "fact", "--repeat", "1", "--output", "old.json", setup=with_file("old.json", "old"), keep=("old.json",), names=("old.json",), environment={"ABUSE_FULL_DISK": "1"})
    add("full disk", "chat /save", "chat", setup=with_file("old.json", "old"), stdin=b"/save old.json\n", keep=("old.json",), good=True, environment={"ABUSE_FULL_DISK": "1"})
    add("full disk", "convert", "convert", "--hf-path", "m", "--mlx-path", "p", "--recipe", "q8", setup=copied, names=("p",), leaves=("p.partial", "p.partial/*"), environment={"ABUSE_FULL_DISK": "1"})
    add("full disk", "train", "train", "--data", "d", "--steps", "1", "--batch-size", "1", "--output", "o", setup=with_file("d/train.jsonl", '{"prompt": "a", "completion": "b"}\n'), names=("o",), leaves=("o", "o/*"), environment={"ABUSE_FULL_DISK": "1"})
    add("full disk", "no locks", "convert", "--hf-path", "m", "--mlx-path", "p", "--recipe", "q8", setup=copied, good=True, leaves=("p", "p/*"), environment={"ABUSE_NO_LOCKS": "1"})
    add("paths", "deleted working directory", "generate", "-q", "--prompt", "Sort: b, a", "--max-tokens", "4", "--record", "x.svg", names=("working directory", "--record"), environment={"ABUSE_GONE": "1"})
    add("paths", "good: deleted working directory", "generate", "-q", "--prompt", "Sort: b, a", "--max-tokens", "4", good=True, environment={"ABUSE_GONE": "1"})
    add("paths", "good: closed stdin", "generate", "-q", "--prompt", "Sort: b, a", "--max-tokens", "4", good=True, stdin=None)
    add("paths", "closed stdin as the prompt", "generate", "-q", "--prompt", "-", names=("prompt", "standard input"), stdin=None)


# ---------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    status: int  # exit status, or minus the signal
    stdout: str
    stderr: str
    seconds: float  # of processor time


def preload() -> None:
    """Import once what every case needs; the cases are forks."""
    import mlx_diffgemma

    for module in pkgutil.walk_packages(mlx_diffgemma.__path__, "mlx_diffgemma."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("mlx_lm.tool_parsers.gemma4", "jinja2.sandbox", "tokenizers", "sentencepiece", "rich.progress", "rich.table", "huggingface_hub"):
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.utils.chat_template_utils")


def child(args: tuple[str, ...], code: str, folder: Path, environment: dict[str, str]) -> int:
    """What the process of a case does: the command, or the code, to an exit status."""
    os.chdir(folder)
    os.environ.update({"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "200"} | environment)
    if os.environ.get("HOME") == ".":
        os.environ["HOME"] = str(folder)
    if "PYTHONIOENCODING" in environment:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="ascii", errors="strict" if stream is sys.stdout else "backslashreplace")
    _sabotage(folder)
    if code:
        return _api(code)
    from mlx_diffgemma.cli import main

    try:
        main.main(list(args), "mlx_diffgemma")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _sabotage(folder: Path) -> None:
    """Disks that are full or have no locks, a working directory that is gone."""
    import errno
    import fcntl

    if os.environ.get("ABUSE_GONE"):
        gone = folder / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
    if os.environ.get("ABUSE_FULL_DISK"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if os.environ.get("ABUSE_NO_LOCKS"):
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOTSUP, "Operation not supported")
        fcntl.flock = refuse


def _api(code: str) -> int:
    from mlx_diffgemma import load
    from mlx_diffgemma.errors import DiffGemmaError

    try:
        exec(code, {"load": load, "model": "m"})
    except DiffGemmaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        print(f"Error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def run_child(args: tuple[str, ...], code: str, folder: Path, stdin: bytes | None, environment: dict[str, str], patience: float = 8 * HANG) -> Outcome:
    """Fork, run, wait until it ends or has computed for HANG seconds; the machine may be busy with something else."""
    pipes = {number: os.pipe() for number in (0, 1, 2)}
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.setsid()
            for number, (read, write) in pipes.items():
                os.dup2(write if number else read, number)
            for ends in pipes.values():
                for end in ends:
                    os.close(end)
            sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
            if stdin is None:
                sys.stdin = None
            limit = _address_space() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            status = child(args, code, folder, environment)
            sys.stdout.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(status)
    os.close(pipes[0][0])
    os.close(pipes[1][1])
    os.close(pipes[2][1])
    with ThreadPoolExecutor(3) as pool:
        pool.submit(_feed, pipes[0][1], stdin or b"")
        out, err = (pool.submit(_drain, pipes[number][0]) for number in (1, 2))
        status, computed = _wait(pid, begun + patience)
        said = [text.result().decode("utf-8", "replace") for text in (out, err)]
    return Outcome(status, *said, computed)


def _feed(end: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), open(end, "wb") as stream:
        stream.write(data)


def _drain(end: int) -> bytes:
    with open(end, "rb") as stream:
        return stream.read()


def _wait(pid: int, end: float) -> tuple[int, float]:
    """Exit status, and seconds of processor time; killed when those, or a lot of waiting, are too many."""
    while True:
        done, raw, used = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(raw), used.ru_utime + used.ru_stime
        if _computed(pid) > HANG or time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -9, HANG + 1.0
        time.sleep(0.01)


def _computed(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _address_space() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmSize:"):
            return int(line.split()[1]) * 1024
    return 0


def state(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, small files with their content."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() and p.stat().st_size < 100_000 else None
        for p in sorted(folder.rglob("*"))
    }


def judge(case: Case, outcome: Outcome, before: dict[str, bytes | None], after: dict[str, bytes | None]) -> tuple[str, str]:
    """The outcome's name, and what to show of it."""
    said = [line for line in outcome.stderr.strip().splitlines() if line.strip()]
    at = next((i for i, line in enumerate(said) if line.startswith(("Error:", "Failed:"))), None)
    message = " ".join(said[at:]) if at is not None else " ".join(said)
    shown = message[:200] or outcome.stdout.strip()[:120]
    if outcome.seconds > HANG:
        return "hang", f"{outcome.seconds:.0f} s"
    if outcome.status < 0 or outcome.status in (70, 134, 139):
        return "crash", f"status {outcome.status}: {shown}"
    if lost := [name for name in case.keep if after.get(name, b"gone") != before.get(name)]:
        return "loss", f"{lost[0]}: {shown}"
    allowed = [re.compile(pattern.replace("*", ".*")) for pattern in case.leaves]
    new = [name for name in after if name not in before and not any(p.fullmatch(name) for p in allowed)]
    if case.good:
        if outcome.status != 0:
            return "refused", shown
        if "Traceback" in outcome.stderr or (case.names and not any(n in outcome.stderr + outcome.stdout for n in case.names)):
            return "silent", shown
        return ("junk", ", ".join(new[:3])) if new else ("good", "")
    if outcome.status == 0:
        return "silent", shown
    if new:
        return "junk", f"{', '.join(new[:3])}: {shown}"
    if LIBRARIES.search(message) or at is None or len(said) - at > 3 or outcome.status not in (1, 2):
        return "raw", shown
    if case.names and not any(name and name in message for name in case.names):
        return "nowhere", shown
    return "clean", shown


def run_case(case: Case) -> tuple[str, str, float]:
    with tempfile.TemporaryDirectory(prefix="abuse-") as scratch:
        folder = Path(scratch)
        case.setup(folder)
        before = state(folder)
        outcome = run_child(case.args, case.code, folder, case.stdin, case.environment)
        return *judge(case, outcome, before, state(folder)), outcome.seconds


def build() -> None:
    for make in (later_cases, config_cases, generation_config_cases, tokenizer_cases, option_cases, text_cases, training_cases, adapter_cases, weight_cases, api_cases, place_cases):
        make()


@click.command()
@click.option("--only", help="Kinds, separated by commas.")
@click.option("--part", default="1/1", help="N/M: every M-th case, from the N-th on.")
@click.option("--list", "listed", default="raw,nowhere,silent,refused,loss,junk,crash,hang", help="Outcomes to list.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write every outcome here, too.")
def main(only: str | None, part: str, listed: str, file: Path | None) -> None:
    preload()
    build()
    with tempfile.TemporaryDirectory(prefix="abuse-run-") as scratch:
        make_finished_run(Path(scratch))
        number, parts = map(int, part.split("/"))
        chosen = [case for case in CASES if only is None or case.kind in only.split(",")][number - 1 :: parts]
        found = []
        for case in chosen:
            try:
                outcome, shown, seconds = run_case(case)
            except Exception as error:
                raise RuntimeError(f"case {case.kind}: {case.name}") from error
            found.append({"kind": case.kind, "name": case.name, "outcome": outcome, "shown": shown, "seconds": round(seconds, 2)})
            if outcome in listed.split(","):
                print(f"{outcome:8} {case.kind}: {case.name} → {ascii(shown)[1:-1]}", flush=True)
    report(found)
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n")


def report(found: Iterable[dict[str, Any]]) -> None:
    """Counts by kind and outcome."""
    found = list(found)
    kinds = list(dict.fromkeys(entry["kind"] for entry in found))
    print("| kind | inputs | " + " | ".join(OUTCOMES) + " |")
    print("|---" * (len(OUTCOMES) + 2) + "|")
    for kind in (*kinds, "all"):
        counts = Counter(entry["outcome"] for entry in found if kind in ("all", entry["kind"]))
        print(f"| {kind} | {sum(counts.values())} | " + " | ".join(str(counts[o] or "") for o in OUTCOMES) + " |")


if __name__ == "__main__":
    main()
