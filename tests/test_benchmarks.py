"""The benchmarks: roofline's arithmetic against sums made here from published sizes, and a tiny run of each."""

import ast
import dataclasses
import json
import time
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import causal, common, generate, kernels, load, reach, readme, roofline, soak, step, streamed, vision
from benchmarks import models as peers
from benchmarks.models import generation_config, peer_model, reference_model
from mlx_diffgemma.config import LayerConfig, ModelConfig
from mlx_diffgemma.files import reading
from mlx_diffgemma.files.checkpoint import open_checkpoint
from mlx_diffgemma.files.weights import load_network
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.memory import MACS, smallest_macs
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.model.tuning import DEFAULT, Tuning
from mlx_diffgemma.packing.recipes import load_recipe
from mlx_diffgemma.pipeline import loading

from . import small, synthetic

HIDDEN, LAYERS, CANVAS, VOCABULARY = 2816, 30, 256, 262_144


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_dict(synthetic.published("released/config.json"))


@pytest.fixture(scope="module")
def models(config: ModelConfig) -> dict[str, roofline.Model]:
    recipes = {*roofline.BY_QUALITY, *(m.recipe for m in roofline.Macs.read().measurements)}
    return {name: roofline.Model.of(config, name) for name in recipes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint in float32, with a tokenizer."""
    made = tmp_path_factory.mktemp("small")
    synthetic.small(made, config=synthetic.small_config(vocab_size=small.VOCABULARY), dtype="F32")
    small.write_tokenizer(made)
    return made


# ---------------------------------------------------------------------------------------------------------- roofline


def test_parameters_are_those_of_the_released_checkpoint(models: dict[str, roofline.Model]) -> None:
    counted = {name: size.parameters for name, size in models["bf16"].sizes.items()}
    q_and_k_norms = 25 * 2 * 256 + 5 * 2 * 512
    router_vectors = LAYERS * (HIDDEN + 128)
    assert counted == {
        "embedding": 738_197_504,
        "experts": 22_837_985_280,
        "attention": 1_110_197_760 - q_and_k_norms,
        "dense MLP": 535_265_280,
        "router": 10_901_760 - router_vectors,
        "self-conditioning": 17_844_992 - HIDDEN,
        "norms and scalars": 594_236 + q_and_k_norms + router_vectors + HIDDEN,
    }
    assert sum(counted.values()) == 25_250_986_812


def test_a_step_is_2_33_teraflop(models: dict[str, roofline.Model]) -> None:
    parts = {part.name: part.flops for part in roofline.step(models["q4"])}
    sliding = HIDDEN * 256 * (16 + 8 + 8 + 16)
    full = HIDDEN * 512 * (16 + 2 + 16)
    assert parts["experts"] == 2 * CANVAS * 8 * 3 * 704 * HIDDEN * LAYERS
    assert parts["attention projections"] == 2 * CANVAS * (25 * sliding + 5 * full)
    assert parts["dense MLP"] == 2 * CANVAS * 3 * 2112 * HIDDEN * LAYERS
    assert parts["head"] == parts["signal"] == 2 * CANVAS * HIDDEN * VOCABULARY
    smaller = [parts.pop(name) for name in ("attention", "router", "self-conditioning")]
    assert sum(parts.values()) == pytest.approx(2.33e12, rel=0.001)
    assert sum(smaller) < 0.03 * 2.33e12


@pytest.mark.parametrize(
    ("recipe", "gigabytes"),
    [
        ("bf16", {"experts": 45.676, "attention": 2.220, "embedding": 1.476, "dense MLP": 1.071}),
        ("q8", {"experts": 24.265, "attention": 1.180, "embedding": 0.784, "dense MLP": 0.569}),
        ("q4", {"experts": 12.846, "attention": 1.180, "embedding": 0.784, "dense MLP": 0.569}),
        ("mxfp4", {"experts": 12.133, "attention": 1.180, "embedding": 0.784, "dense MLP": 0.569}),
    ],
)
def test_bytes_of_the_recipes(models: dict[str, roofline.Model], recipe: str, gigabytes: dict[str, float]) -> None:
    sizes = models[recipe].sizes
    assert {name: round(sizes[name].nbytes / 1e9, 3) for name in gigabytes} == pytest.approx(gigabytes, abs=0.002)


def test_q4_is_the_published_4bit_pack_but_for_self_conditioning(models: dict[str, roofline.Model]) -> None:
    published = synthetic.published("mlx-community/4bit.model.safetensors.index.json")["metadata"]["total_size"]
    vision_tower, embed_vision = 2 * 569_550_384, 3_244_032 * 9 // 16  # bf16; 4 bits and 4/64 of 16-bit scale and bias
    eight_instead_of_four = 3 * 2112 * HIDDEN // 2
    assert models["q4"].weight_bytes == published - vision_tower - embed_vision + eight_instead_of_four


@pytest.mark.parametrize("prefix", [0, 3, 25])
def test_attention_counts_every_pair_that_a_mask_allows(prefix: int) -> None:
    config = ModelConfig.from_dict(synthetic.small_config())
    rows, window = 40, config.sliding_window
    query, key = np.arange(prefix, prefix + rows)[:, None], np.arange(prefix + rows)[None]
    causal = key <= query
    flops = {False: 0, True: 0}
    for layer in config.layers:
        near = query - key < window if layer.is_sliding else np.ones_like(causal)
        held = (key >= prefix - window + 1) | (not layer.is_sliding)
        width = 4 * config.num_attention_heads * layer.head_dim
        flops[True] += width * int((causal & near).sum())
        flops[False] += width * int(np.broadcast_to(held, causal.shape).sum())
    for kind, expected in flops.items():
        assert roofline._attention(config, rows, prefix, causal=kind).flops == expected


def test_few_rows_touch_few_experts(models: dict[str, roofline.Model]) -> None:
    def touched(rows: int) -> float:
        part = next(p for p in roofline.step(models["q4"], canvas=rows) if p.name == "experts")
        return part.nbytes / models["q4"].sizes["experts"].nbytes

    picks = np.random.default_rng(0).random((200, 24, 128)).argsort(axis=-1)[..., :8].reshape(200, -1)
    drawn = np.mean([len(np.unique(pick)) / 128 for pick in picks])
    assert touched(1) == pytest.approx(8 / 128)
    assert touched(24) == pytest.approx(drawn, abs=0.01)
    assert touched(256) == pytest.approx(1)


def test_a_bound_is_the_larger_of_compute_and_memory() -> None:
    chip = roofline.Chip(name="c", tflops=2, bandwidth=100)
    compute = roofline.Part(name="p", flops=4e12, nbytes=1e9)
    memory = roofline.Part(name="p", flops=1e9, nbytes=3e11)
    assert (chip.seconds(compute), chip.limit(compute)) == (2, "compute")
    assert (chip.seconds(memory), chip.limit(memory)) == (3, "memory")
    assert roofline.bound([compute, memory], chip) == 5


def test_tokens_per_second_are_canvases_over_steps_and_a_commit(models: dict[str, roofline.Model]) -> None:
    model, chip = models["q4"], roofline.Macs.read().chips["M4 Pro"]
    step = roofline.bound(roofline.step(model, prefix=1024), chip)
    commit = roofline.bound(roofline.encode(model, 256, 1024), chip)
    assert roofline.tokens_per_second(model, chip, 10) == pytest.approx(256 / (10 * step + commit))
    assert roofline.answer_seconds(model, chip, steps=30, canvases=3) == pytest.approx(30 * step + 2 * commit)
    pieces = [
        roofline.bound(roofline.encode(model, n, start), chip) for n, start in ((2048, 0), (2048, 2048), (4, 4096))
    ]
    assert roofline.bound(roofline.prefill(model, 4100), chip) == pytest.approx(sum(pieces))


def test_a_token_reads_eight_experts_and_the_whole_table_once(models: dict[str, roofline.Model]) -> None:
    parts = {part.name: part for part in roofline.token(models["q4"])}
    assert parts["experts"].nbytes == pytest.approx(models["q4"].sizes["experts"].nbytes * 8 / 128)
    assert parts["head"].nbytes == models["q4"].sizes["embedding"].nbytes
    assert parts["head"].flops == 2 * HIDDEN * VOCABULARY
    assert "signal" not in parts


def test_a_canvas_at_the_break_even_takes_as_long_as_its_tokens(models: dict[str, roofline.Model]) -> None:
    macs = roofline.Macs.read()
    efficiencies = (macs.efficiencies(models), macs.efficiencies(models, tokens=True))
    likely = roofline.Likely.of(models["q4"], macs.chips["M1 Ultra"], *efficiencies)
    assert likely.break_even * likely.step + likely.commit == pytest.approx(256 * likely.token)
    assert likely.tokens_per_second(likely.break_even) == pytest.approx(1 / likely.token)
    published = roofline.break_even_table(macs, models)
    assert len(published) >= 2
    assert all(float(str(row[-1])) == pytest.approx(float(str(row[-2])), rel=0.25) for row in published)


def test_keys_and_values_are_those_of_the_prefix_cache(config: ModelConfig, models: dict[str, roofline.Model]) -> None:
    terms = roofline.memory_terms(models["q4"], 32_768, 0)
    held = sum(nbytes for name, nbytes in terms.items() if name.startswith("keys and values"))
    cache = Network.make_cache(_Bare(config))  # pyright: ignore[reportArgumentType]
    for layer, kept in zip(config.layers, cache.layers, strict=True):
        _fill(kept.append, layer, 32_768)
        _fill(kept.look, layer, 256)
    assert held == cache.nbytes == 5 * 33_024 * 4096 + 25 * 1279 * 8192


class _Bare:
    """As much of a network as its cache needs; the real one's weights would fill this machine."""

    def __init__(self, config: ModelConfig):
        self.config, self.tuning = config, DEFAULT


def _fill(write: Callable[[mx.array, mx.array], Any], layer: LayerConfig, tokens: int) -> None:
    """Lazy keys and values: their shapes are all that is asked for."""
    zeros = mx.zeros((1, layer.num_kv_heads, tokens, layer.head_dim), mx.bfloat16)
    write(zeros, zeros)


def test_q4_behind_32k_tokens_stays_below_18_gigabytes(models: dict[str, roofline.Model]) -> None:
    terms = roofline.memory_terms(models["q4"], 32_768, roofline.PROMISED_STEP)
    weights, full, sliding, canvas, step = 15_410_840_184, 671_088_640, 209_510_400, 57_671_680, 300_000_000
    assert sum(terms.values()) == weights + full + sliding + canvas + step == 16_649_110_904 < 18_000_000_000


def test_a_recipe_is_chosen_as_the_converter_reports() -> None:
    for nbytes in range(1 << 33, 1 << 37, 1 << 30):
        usual, raised = smallest_macs(nbytes)
        for memory in MACS:
            expected = "q8" if usual and memory >= usual else "q8*" if raised and memory >= raised else None
            assert roofline.choose(memory, dict.fromkeys(roofline.BY_QUALITY, nbytes)) == expected
    assert roofline.choose(36, {"q8": 30 << 30, "q6": 23 << 30, "q4": 17 << 30}) == "q6"
    assert roofline.choose(18, {"q8": 30 << 30, "q6": 23 << 30, "q4": 13 << 30}) == "q4*"


def test_published_measurements_confirm_bound_and_forecast(models: dict[str, roofline.Model]) -> None:
    checks = roofline.check(roofline.Macs.read(), models)
    assert all(0.05 < c["reached"] < 1 for c in checks)  # nobody beats the bound
    assert max(abs(c["error"]) for c in checks if c["fitted"]) < 1e-9
    errors = sorted(abs(c["error"]) for c in checks if not c["fitted"])
    assert len(errors) >= 6
    assert errors[len(errors) // 2] < 0.15


def test_the_short_table_of_macs_says_how_far_to_trust_it() -> None:
    section = roofline.readme_section()
    assert section.count("\n| M") == len(roofline.README_MACS) <= 12
    assert "`q4`" in section or "`q6`" in section
    assert "12 to 15 steps" in section and "not measured here" in section
    macs = roofline.Macs.read()
    assert all(memory in macs.chips[name].memory for name, memory in roofline.README_MACS)


def test_a_streamed_step_takes_the_longer_of_computing_and_reading(models: dict[str, roofline.Model]) -> None:
    model, macs = models["q4"], roofline.Macs.read()
    chip, nbytes = macs.chips["M2"], reach.streamed(models["q4"], 16)
    assert 5e9 < nbytes < 7e9 and reach.streamed(model, 24) == 0
    unhindered = reach.rate(model, chip, 1.0, 0, 1.0)
    assert reach.rate(model, chip, 1.0, nbytes, 1000.0) == unhindered
    slow = reach.rate(model, chip, 1.0, nbytes, 0.1)
    assert slow == pytest.approx(256 / (13 * nbytes / 1e8))
    assert reach.table("q3", [2.8]).count("\n") == 1 + len(reach.MACHINES)


# ------------------------------------------------------------------------------------------------------------ common


def test_runs_alternate_and_warm_up() -> None:
    order: list[str] = []
    seconds = common.alternate({name: lambda name=name: order.append(name) for name in "ab"}, runs=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_table_is_aligned() -> None:
    table = common.table([["one", "0.5 s", None], ["three", "10.25 s", 3]], ["name", "time", "n"])
    assert table.splitlines() == [
        "| name  |    time |   n |",
        "| ----- | ------: | --: |",
        "| one   |   0.5 s |     |",
        "| three | 10.25 s |   3 |",
    ]


def test_the_document_is_the_last_line_and_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document: dict[str, Any] = common.provenance() | {"figure": 1.5}
    print("something before")
    common.finish(document, tmp_path / "deep" / "out.json")
    assert _last_line(capsys) == document == json.loads((tmp_path / "deep" / "out.json").read_text())
    assert {"date", "machine", "versions", "commit"} <= document.keys()
    assert document["versions"]["mlx"]


def _last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_no_benchmark_imports_one_that_imports_it() -> None:
    """Imports inside functions count, too."""
    graph = {}
    for file in (common.ROOT / "benchmarks").glob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "benchmarks":
                found |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
                found.add((node.module or "").split(".")[1])
        graph[file.stem] = found
    assert "common" in graph["step"]
    TopologicalSorter(graph).prepare()  # raises CycleError


# ------------------------------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize("benchmark", [roofline, soak, generate, step, load], ids=lambda module: module.__name__)
def test_help(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--help"])
    assert stopped.value.code == 0
    assert benchmark.__doc__.splitlines()[0] in capsys.readouterr().out


def test_roofline_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--recipe", "q8", "--tflops", "989", "--bandwidth", "4800", "--out", str(tmp_path / "out.json")])
    document = _last_line(capsys)
    assert document == json.loads((tmp_path / "out.json").read_text())
    assert document["limits"]["seconds_per_step"] == pytest.approx(26.8e9 / 4.8e12, rel=0.3)  # memory holds it back


def test_a_pack_of_zeros_has_the_released_sizes_and_takes_no_room(tmp_path: Path) -> None:
    sizes = streamed.pack_of_zeros(tmp_path, load_recipe("q4"), LAYERS)
    opened = open_checkpoint(tmp_path)
    experts = [tensor.nbytes for name, tensor in opened.tensors.items() if ".experts." in name]
    assert sum(experts) == sum(sizes.layers) and len(sizes.layers) == LAYERS
    assert sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512 < 8_000_000


def test_a_slow_reader_is_slow(folder: Path) -> None:
    tensor = open_checkpoint(folder).tensors["model.decoder.embed_tokens.weight"]
    target = np.empty((tensor.rows, tensor.shape[-1]), np.uint32)
    begun = time.perf_counter()
    streamed.Slow(reading.Files([tensor.file]), target.nbytes / 0.2).read(reading.whole(tensor), target)
    assert 0.2 <= time.perf_counter() - begun < 20


def test_soak_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--runs", "6", "--window", "3", "--max-tokens", "8", "--max-steps", "2", "--prompt", "ab"]
    status = soak.main(["--model", str(folder), *arguments])
    document = _last_line(capsys)
    assert status == 0 and document["grown"] == []
    assert document["medians"]["tokens"] == {"first": 8, "last": 8}
    assert document["medians"]["live_bytes"]["first"] > 0


def test_soak_sees_growth() -> None:
    sizes = {"live_bytes": 100, "cached_bytes": 0, "resident_bytes": 1000, "objects": 1, "steps": 1, "tokens": 1}
    sizes |= {"handles": 1, "threads": 1}
    before = soak.Sample(seconds=1, seconds_per_step=1, cpu_seconds_per_step=1, **sizes)
    for field in (*soak.MEMORY, *soak.COUNTS):
        after = dataclasses.replace(before, **{field: 5000})
        assert soak.grown(soak.compare([before] * 4 + [after] * 4, window=3), allowed=1000) == [field]
    assert soak.grown(soak.compare([before] * 6, window=3), allowed=0) == []


@pytest.fixture
def short_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads are the released ones: a canvas of 256 behind them takes a CPU seconds a step."""
    whole = peers.config
    monkeypatch.setattr(peers, "config", lambda *sizes: whole(*sizes) | {"canvas_length": 32})


@pytest.mark.usefixtures("short_canvas")
def test_a_step_of_all_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden", "32", "--layers", "2", "--experts", "8", "--vocabulary", "512", "--prefix", "40"]
    step.main([*sizes, "--runs", "1", "--transformers", "--out", str(tmp_path / "step.json")])
    document = _last_line(capsys)
    assert document == json.loads((tmp_path / "step.json").read_text())
    (result,) = document["results"]
    assert result["hidden_difference"].keys() == {"mlx-vlm", "transformers"}
    assert max(result["hidden_difference"].values()) < 1e-3
    assert tuple(result["parts"]) == step.PARTS
    assert result["parts"]["cache"]["memory"]["ours"] == 0  # written in place
    assert result["parts"]["cache"]["memory"]["mlx-vlm"] > 0
    compared = {name for name, part in result["parts"].items() if "transformers" in part["ratio"]}
    assert compared == {"forward", "step"}
    assert "step, against transformers" in readme.step(document)


def test_a_tower_beside_another(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 2, "num_key_value_heads": 2}
    narrow = {"head_dim": 36, "position_embedding_size": 64}
    monkeypatch.setattr(vision, "VISION", vision.VISION | small | narrow)
    vision.main(["--budget", "70", "--layers", "1", "2", "--runs", "1"])
    document = _last_line(capsys)
    assert [found["layers"] for found in document["results"]] == [1, 2]
    assert max(found["difference"] for found in document["results"]) < 1e-3
    first, second = (found["seconds"] for found in document["results"])
    (whole,) = document["projected"]
    assert whole["seconds"]["ours"] == pytest.approx(first["ours"] + 26 * (second["ours"] - first["ours"]))


@pytest.mark.usefixtures("short_canvas")
def test_a_causal_token_is_the_one_that_mlx_lm_makes(tmp_path: Path) -> None:
    sizes = ["--hidden", "256", "--layers", "2", "--experts", "8", "--vocabulary", "512", "--prefix", "40", "1100"]
    causal.main([*sizes, "--runs", "1", "--out", str(tmp_path / "causal.json")])
    document = json.loads((tmp_path / "causal.json").read_text())
    assert [found["prefix"] for found in document["tokens"]] == [40, 1100]  # within the window, and beyond it
    assert max(found["logit_difference"] for found in document["tokens"]) < 1e-3
    assert all(0 < found["share"] < 1 for found in document["scoring"])


def test_a_projection_weighs_the_parts_by_their_shares(models: dict[str, roofline.Model]) -> None:
    parts = {"forward": 0.9, "vocabulary": 0.4}
    measured = {name: {"ratio": {"mlx-vlm": {"seconds": ratio}}} for name, ratio in parts.items()}
    rows = {row["machine"]: row for row in step.projection({"prefix": 1024, "parts": measured})}
    assert rows["M5 Max, measured by vmlx"]["ratio"] == pytest.approx(0.91 * 0.9 + 0.09 * 0.4)
    work = {part.name: part for part in roofline.step(models["q4"], prefix=1024)}
    chip = roofline.Macs.read().chips["M2 Ultra"]
    least = {name: chip.seconds(part) for name, part in work.items()}
    share = 1 - (least["head"] + least["signal"]) / sum(least.values())
    assert rows["M2 Ultra, least time"]["forward_share"] == pytest.approx(share)
    assert 0.6 < share < 0.8


@pytest.mark.parametrize("side", load.SIDES)
def test_a_load_in_parts(side: str, folder: Path) -> None:
    figures = load.measure(side, folder)
    assert figures.keys() == {"import", "model", "tokenizer", "load", "process", "peak_gb"}
    assert 0 < figures["model"] + figures["tokenizer"] < figures["load"]
    assert figures["import"] + figures["load"] < figures["process"]


def test_a_made_pack_has_a_tokenizer_of_its_size(tmp_path: Path) -> None:
    pack = load.make_pack(tmp_path, hidden=64, layers=2, experts=8, vocabulary=1024)
    loaded = loading.load(pack)
    assert loaded.config.vocab_size == loaded.tokenizer.vocab_size == 1024
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("ab cd")) == "ab cd"
    assert len(loaded.tokenizer.encode("ab cd")) == 3  # the two merges, and the space


def test_generate_runs_all_three(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--runs", "1", "--max-tokens", "40", "--max-steps", "2", "--prompt", "ab"]
    generate.main(["--model", str(folder), *arguments])
    document = _last_line(capsys)
    assert set(document["runs"]) == {"ours", "mlx-vlm", "transformers"}
    for (run,) in document["runs"].values():
        assert run["steps"] == 2 * run["canvases"]  # random weights never settle
        assert 0 < run["tokens"] <= 40
        assert 0 < run["prefill"] < run["first_sign"] <= run["first_canvas"] < run["seconds"]


def test_all_three_have_the_same_weights(folder: Path) -> None:
    import torch

    raw = json.loads((folder / "config.json").read_text())
    network = load_network(folder)
    random = np.random.default_rng(0)
    prompt, canvas = (random.integers(0, small.VOCABULARY, (1, n)) for n in (20, 32))
    cache = network.make_cache()
    network.encode(mx.array(prompt), cache)
    ours = np.array(network.logits(mx.array(canvas), cache))
    theirs = np.array(peer_model(raw, network)(mx.array(prompt), canvas_ids=mx.array(canvas)).logits)
    with torch.no_grad():
        model = reference_model(raw, network)
        reference = model(input_ids=torch.tensor(prompt), decoder_input_ids=torch.tensor(canvas)).logits.numpy()
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, reference, atol=2e-4)
    np.testing.assert_allclose(theirs, reference, atol=2e-4)


def test_a_generation_config_for_the_others_leaves_nothing_out() -> None:
    published = synthetic.published("released/generation_config.json")
    made = generation_config(GenerationConfig.from_dict(published))
    assert made == {key: value for key, value in published.items() if key != "transformers_version"}


def test_kernels_do_not_become_more() -> None:
    """Counted from the graph at released shapes ; nothing is computed."""
    network = kernels.make_network(6, packed=False)
    counted = {part: sum(c.values()) for part, c in kernels.step(network, 300, Tuning(tile=32_768, streams=1)).items()}
    assert counted["vocabulary"] <= 250 and counted["sampler"] <= 20
    assert counted["layers"] <= 6 * 52 + 20  # twenty for embedding and self-conditioning
    many = kernels.step(network, 300, Tuning(tile=8_192, streams=1))
    assert sum(many["vocabulary"].values()) > 2.5 * counted["vocabulary"]
