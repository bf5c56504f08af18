"""Experts that are read again for every pass: the same bits as from memory, whatever breaks off a pass."""

import gc
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import bench, load
from mlx_diffgemma.errors import CheckpointError, ConfigError, DiffGemmaError, MemoryLimitError, TrainingError
from mlx_diffgemma.files import adapters, checkpoint, reading, streaming
from mlx_diffgemma.generation.events import Committed, Denoised
from mlx_diffgemma.model.memory import memory_needed, weight_bytes
from mlx_diffgemma.packing.conversion import convert, plan_conversion
from mlx_diffgemma.packing.recipes import adhoc_recipe, load_recipe
from mlx_diffgemma.pipeline.machine.fitting import Sizes, smallest_streaming, streamed_layers
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.training.preparation import prepare
from mlx_diffgemma.training.settings import Settings
from tests import synthetic

LAYERS = 6
KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
PROMPT = list(range(3, 27))
RECIPES = ("bf16", "q2", "q3", "q4", "q6", "q8", "mxfp4", "mxfp8", "nvfp4")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random model, packed by a recipe."""
    folder = tmp_path_factory.mktemp("packs")
    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
    small |= {"global_head_dim": 32, "num_experts": 4, "num_hidden_layers": LAYERS, "layer_types": KINDS}
    config = synthetic.small_config(**small) | {"canvas_length": 16}
    source = synthetic.small(folder / "source", config=config, dtype="F32")

    def pack(recipe: str) -> Path:
        made = folder / recipe
        if not made.exists():
            chosen = adhoc_recipe(5, 64, "affine") if recipe == "5 bits" else load_recipe(recipe)
            chosen = replace(chosen, dtype="bfloat16" if recipe == "bf16" else "float32")  # what a CPU is quick at
            convert(plan_conversion(checkpoint.open_checkpoint(source), chosen), made)
        return made

    return pack


def told(model: DiffusionGemma, prompt: Any = PROMPT, **options: Any) -> str:
    """What a run says, by hash: ids and float32 entropies of every step, and the committed ids."""
    found = hashlib.sha256()
    asked = model.prepare(prompt, seed=5, **{"max_tokens": 32, "max_denoising_steps": 3, **options})
    for event in asked.events():
        if isinstance(event, Denoised):
            found.update(np.array(event.best).tobytes() + np.array(event.entropy).tobytes())
        elif isinstance(event, Committed):
            found.update(repr([row.ids for row in event.rows]).encode())
    return found.hexdigest()


@pytest.mark.parametrize("recipe", [*RECIPES, "5 bits"])
def test_the_bits_are_those_of_a_resident_model(packs: Callable[[str], Path], recipe: str) -> None:
    expected = told(load(packs(recipe), stream_experts=0))
    for count in (3, LAYERS):
        model = load(packs(recipe), stream_experts=count)
        assert told(model) == expected
        assert told(model) == expected  # the reader goes on from where it was
        assert len(model.network.experts.streamed) == count


def test_other_readers_packs_hold_gate_and_up_apart(packs: Callable[[str], Path], tmp_path: Path) -> None:
    pack = packs("q4")
    weights: dict[str, mx.array] = mx.load(str(pack / "model.safetensors"))  # type: ignore[assignment]
    for name in [name for name in weights if "gate_up_proj" in name]:
        gate, up = mx.split(weights.pop(name), 2, axis=1)
        weights |= {name.replace("gate_up_proj", "gate_proj"): gate, name.replace("gate_up_proj", "up_proj"): up}
    for file in pack.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    model = load(tmp_path, stream_experts=LAYERS)
    assert told(model) == told(load(pack))


def test_scores_batches_and_adapters_too(packs: Callable[[str], Path], tmp_path: Path) -> None:
    resident, streamed = load(packs("q4")), load(packs("q4"), stream_experts=5)
    assert resident.score(PROMPT * 3) == streamed.score(PROMPT * 3)
    batch = [PROMPT, PROMPT[:20], PROMPT[5:]]
    assert told(resident, batch) == told(streamed, batch)
    lora = adapters.Lora(rank=2, keys=adapters.TARGETS)
    adapters.attach(resident.network, lora)
    for name, weight in adapters.adapter_weights(resident.network).items():
        weight[:] = mx.random.normal(weight.shape, key=mx.random.key(len(name)))
    adapters.save(resident.network, lora, tmp_path)
    adapted = told(load(packs("q4"), adapter=tmp_path))
    assert adapted == told(load(packs("q4"), adapter=tmp_path, stream_experts=5)) != told(load(packs("q4")))


def test_a_batch_reads_no_more_than_one_prompt(packs: Callable[[str], Path]) -> None:
    model = load(packs("q4"), stream_experts=LAYERS)
    read = []
    for prompts in ([PROMPT], [PROMPT] * 4):
        results: Any = model.generate(prompts, seeds=[1] * len(prompts), max_tokens=16, max_denoising_steps=4)
        read.append(results[0].statistics.read_bytes)
    assert abs(read[0] - read[1]) <= 2 * streaming.SLOTS * model.network.experts.nbytes
    assert read[0] >= 5 * model.network.experts.bytes_a_pass


def test_what_breaks_off_leaves_the_reader_sound(packs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(packs("q4"), stream_experts=5)
    expected = told(model)
    events = model.stream(PROMPT, seed=1, max_tokens=32)
    for _ in range(3):
        next(events)
    events.close()  # type: ignore[attr-defined]
    assert told(model) == expected

    layers = model.network.decoder.layers
    for number, error in ((2, KeyboardInterrupt), (5, RuntimeError)):
        with monkeypatch.context() as patch:
            kept = layers[number]
            layers[number] = _Broken(error)
            patch.setitem(_Broken.experts, "down_proj", kept.experts["down_proj"])
            patch.setitem(_Broken.experts, "gate_up_proj", kept.experts["gate_up_proj"])
            with pytest.raises(error):
                told(model)
            layers[number] = kept
        assert told(model) == expected


class _Broken:
    """A layer that fails."""

    experts: ClassVar[dict[str, Any]] = {}

    def __init__(self, error: type[BaseException]):
        self.error, self.layer_scalar = error, mx.ones((1,))

    def __call__(self, *_: Any) -> mx.array:
        raise self.error


def test_an_interrupted_wait_is_no_end(packs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(packs("q4"), stream_experts=5)
    expected, wait, count = told(model), streaming._Slot.wait, iter(range(100))

    def interrupted(slot: Any) -> None:
        if next(count) == 7:
            raise KeyboardInterrupt
        wait(slot)

    with monkeypatch.context() as patch:
        patch.setattr(streaming._Slot, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            told(model)
    assert told(model) == expected


@pytest.mark.parametrize("change", ["written to", "cut off", "deleted", "replaced"])
def test_a_file_that_changes_is_an_error(packs: Callable[[str], Path], tmp_path: Path, change: str) -> None:
    for file in packs("q4").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model, weights = load(tmp_path, stream_experts=LAYERS), tmp_path / "model.safetensors"
    told(model)
    if change == "written to":
        with weights.open("r+b") as stream:
            stream.seek(-64, os.SEEK_END)
            stream.write(bytes(64))
    elif change == "cut off":
        os.truncate(weights, weights.stat().st_size // 2)
    elif change == "deleted":
        weights.unlink()
    else:
        (tmp_path / "new").write_bytes(weights.read_bytes())
        (tmp_path / "new").rename(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.* (changed|deleted|ends inside)"):
        told(model)


def test_weights_that_are_no_numbers_are_found(packs: Callable[[str], Path], tmp_path: Path) -> None:
    for file in packs("q4").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights: dict[str, mx.array] = mx.load(str(tmp_path / "model.safetensors"))  # type: ignore[assignment]
    weights["model.decoder.layers.4.experts.down_proj.scales"][3, 2, 0] = mx.nan
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(CheckpointError, match="experts of layer 4 hold NaN"):
        told(load(tmp_path, stream_experts=LAYERS))


def test_memory_decides_how_many_layers_are_streamed(packs: Callable[[str], Path]) -> None:
    resident = load(packs("q4"))
    sizes, config = Sizes.of(resident.network), resident.config
    context = min(4096, config.max_position_embeddings)
    for count in (0, 3, 4, LAYERS):
        exactly = memory_needed(config, sizes.held(count), context)
        model = load(packs("q4"), memory_limit=exactly)
        assert len(model.network.experts.streamed) == count
        assert weight_bytes(model.network) == pytest.approx(sizes.held(count), abs=1 << 16)
        assert sum("read from the disk" in notice for notice in model.notices) == (count > 0)
        if count != LAYERS:
            assert len(load(packs("q4"), memory_limit=exactly - 1).network.experts.streamed) > count
    floor = memory_needed(config, sizes.held(LAYERS), 0)
    assert streamed_layers(config, sizes, floor) == LAYERS
    with pytest.raises(
        MemoryLimitError, match=r"at least 0\.\d+ GB and memory_limit lets it use .* all but the experts.* a step"
    ):
        load(packs("q4"), memory_limit=floor - 1)
    with pytest.raises(MemoryLimitError, match=r"At least 6 of 6 layers must be streamed"):
        load(packs("q4"), memory_limit=floor, stream_experts=3)


@pytest.mark.parametrize("count", [1, 2, LAYERS + 1, -1])
def test_numbers_that_would_save_nothing_are_refused(packs: Callable[[str], Path], count: int) -> None:
    with pytest.raises(ConfigError, match=r"expected 0, or 3 … 6"):
        load(packs("q4"), stream_experts=count)


def test_what_would_read_everything_for_a_token_is_refused(packs: Callable[[str], Path]) -> None:
    model = load(packs("q4"), stream_experts=LAYERS)
    with pytest.raises(ConfigError, match=r"would read .* GB from the disk for every token"):
        model.prepare(PROMPT, decoding="autoregressive")
    with pytest.raises(TrainingError, match=r"would read .* GB"):
        prepare(model.network, Settings())


def test_a_plan_of_a_pack_knows_its_sizes_by_layer(packs: Callable[[str], Path]) -> None:
    source = packs("q4").parent / "source"
    conversion = plan_conversion(checkpoint.open_checkpoint(source), replace(load_recipe("q4"), dtype="float32"))
    network = load(packs("q4")).network
    sizes = Sizes.planned(network.config, conversion.planned)
    assert sizes == Sizes.of(network)
    assert smallest_streaming(network.config, sizes, 100) == (8, 0)
    huge = Sizes(trunk=2_500_000_000, layers=(2_000_000_000,) * LAYERS)  # 14.5 GB, and 6.5 with two slots
    mac, nbytes = smallest_streaming(network.config, huge, 100)
    assert (mac, nbytes) == (16, 4 * 2_000_000_000)


def test_layers_are_spread_evenly() -> None:
    assert streaming.spread(3, 6) == (1, 3, 5)
    assert streaming.spread(6, 6) == tuple(range(6))
    for count in range(1, 31):
        numbers = streaming.spread(count, 30)
        gaps = {b - a for a, b in itertools.pairwise(numbers)}
        assert len(set(numbers)) == count and numbers[-1] < 30 and max(gaps or {1}) - min(gaps or {1}) <= 1


def test_the_next_layer_is_read_while_one_computes(
    packs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(packs("q4"), stream_experts=5)
    experts: Any = model.network.experts
    evaluated, seen = streaming._evaluated, []

    def computed(x: mx.array, written: Any) -> mx.array:
        """Does not end before the other slot is filled: whoever reads only afterwards never gets here again."""
        for slot in experts._slots:
            slot.ready.result(timeout=60)
        seen.append({slot.number for slot in experts._slots})
        return evaluated(x, written)

    monkeypatch.setattr(streaming, "_evaluated", computed)
    told(model, max_tokens=16)
    numbers = experts.streamed  # behind the last layer comes the first: reading does not stop between passes
    assert seen == [{number, numbers[(i + 1) % 5]} for i, number in enumerate(numbers)] * 4


def test_nothing_is_left_behind(packs: Callable[[str], Path]) -> None:
    def left() -> tuple[int, int]:
        return len(os.listdir("/dev/fd")), threading.active_count()

    load(packs("q4"))
    gc.collect()
    before = left()

    def more() -> bool:  # of an earlier test something may end meanwhile
        return any(now > then for now, then in zip(left(), before, strict=True))

    for _ in range(5):
        told(load(packs("q4"), stream_experts=4), max_tokens=32)
    gc.collect()
    deadline = time.time() + 60
    while more() and time.time() < deadline:  # a thread takes a moment to end
        time.sleep(0.05)
    assert not more()


def test_a_file_that_cannot_be_opened_is_an_error(packs: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DiffGemmaError, match="there is no such file"):
        reading.Files([tmp_path / "none"])


def test_bench_says_which_is_the_limit(packs: Callable[[str], Path]) -> None:
    model = load(packs("q4"), stream_experts=LAYERS)
    told(model)
    parts = {"prefill_seconds": 1.0, "denoise_seconds": 8.0, "commit_seconds": 1.0, "seconds_per_step": 2.0}
    for waited, link, limit, computing in (
        (0, 0.9, "computing", 1.1),
        (4, 0, "the disk", 1.2),
        (0, 1.5, "the link", 0.5),
    ):
        runs = {"a": {"runs": [parts | {"waited_seconds": waited}]}, "b": {"left_out": "too long"}}
        streamed = bench.streaming(model, runs)
        assert streamed["layers"] == LAYERS and streamed["bytes_per_second"] > 0
        assert streamed["bytes_a_pass"] == model.network.experts.bytes_a_pass
        figures = {"prompts": runs, "streaming": streamed | {"bytes_a_pass": 3e6, "bytes_per_second": 2e6}}
        if link:
            shared = {"machines": 2, "weight_bytes": 1e9, "bytes_a_step": 1e6, "exchanges_a_step": 3}
            figures["sharing"] = shared | {"bytes_per_second": 1e9, "wait_seconds": 1e-3, "seconds_a_step": link}
        figures |= bench.limits(figures)
        assert bench._reach_as_text(figures)[-1] == (
            f"A step takes 2,000 ms: computing {computing * 1e3:,.0f}, the disk 1,500, the link {link * 1e3:,.0f};"
            f" the limit is {limit}."
        )
    assert not bench.limits({"prompts": runs})
