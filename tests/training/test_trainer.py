"""The objective against torch, and a training loop that learns, stops and continues."""

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import TrainingError
from mlx_diffgemma.files.adapters import TARGETS, Lora, attach
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.network import Network, leaves
from mlx_diffgemma.model.tuning import DEFAULT
from mlx_diffgemma.training import objective, optimizer, preparation, scoring
from mlx_diffgemma.training.batches import Batches, make_batch
from mlx_diffgemma.training.data import Ends, Example
from mlx_diffgemma.training.objective import Batch
from mlx_diffgemma.training.settings import Settings
from mlx_diffgemma.training.trainer import Evaluated, Saved, Trained, Trainer
from tests.reference_models import Model, text_config

ENDS = Ends(stop=106, fill=1)


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Compiling a step takes longer than these tests."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def examples(count: int, seed: int = 0, vocabulary: int = 200) -> list[Example]:
    """Random prompts and answers; every third answer needs two canvases of 24."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        prompt, response = rng.integers(3, vocabulary, 6 + i % 5), rng.integers(3, vocabulary, 30 if i % 3 == 2 else 8)
        made.append(Example(prompt=tuple(prompt.tolist()), response=tuple(response.tolist())))
    return made


def small(**text: object) -> Network:
    config = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 16,
        "num_experts": 4,
        "top_k_experts": 2,
        "sliding_window": 16,
        **text,
    }
    network = Network(
        ModelConfig.from_dict({"model_type": "diffusion_gemma", "text_config": config, "canvas_length": 12})
    )
    preparation.initialize(network, 0)
    return network


def batch_for(network: Network, looks: int) -> Batch:
    settings = Settings(batch_size=3, self_conditioning=looks / 3)
    return make_batch(examples(3), np.random.default_rng(5), network.config, settings, ENDS)


def same(one: dict, other: dict) -> None:
    """Two trees of gradients, to rounding."""
    assert leaves(one).keys() == leaves(other).keys()
    for name, gradient in leaves(one).items():
        assert mx.allclose(gradient, leaves(other)[name], atol=1e-5), name


# ------------------------------------------------------------------------------------------------ against transformers


def torch_losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The two losses from transformers' forward passes, one example after the other and nothing padded."""
    decoder, encoder, pairs = [], [], 0

    def cross_entropy(logits: torch.Tensor, targets: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, torch.tensor(targets).long(), reduction="none")

    for row in range(len(batch.starts)):
        start, length = np.array(batch.starts)[row], np.array(batch.lengths)[row]
        tokens, clean, noisy = (np.array(a)[row] for a in (batch.tokens, batch.clean, batch.noisy))
        prefix, canvas = torch.tensor(tokens[None, :start]).long(), torch.tensor(noisy[None]).long()
        signal = None
        if row < batch.looks:
            with torch.no_grad():
                signal = model(input_ids=prefix, decoder_input_ids=canvas).logits
        look = model(input_ids=prefix, decoder_input_ids=canvas, self_conditioning_logits=signal)
        decoder.append(cross_entropy(look.logits[0], clean).mean())
        hidden = model.model.encoder(input_ids=torch.tensor(tokens[None, :length]).long()).last_hidden_state
        cap = model.config.text_config.final_logit_softcapping
        logits = cap * torch.tanh(model.lm_head(hidden)[0, :-1] / cap)
        encoder.append(cross_entropy(logits, tokens[1:length]).sum())
        pairs += length - 1
    return torch.stack(decoder).mean(), torch.stack(encoder).sum() / pairs


def shared_gradients(model: Any) -> dict[str, np.ndarray]:
    """By decoder name; what encoder, decoder and head share is one weight, and its gradients add up."""
    summed: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = name.replace("model.encoder.language_model.", "model.decoder.")
            name = name.replace("lm_head.weight", "model.decoder.embed_tokens.weight")
            summed[name] = summed.get(name, 0) + parameter.grad.numpy()
    return summed


# Branches are small because with large ones float32 itself, torch's as ours, is 3e-4 from float64 in the gradients.
CASES = {
    "eight-experts": Model(
        text=text_config(), canvas_length=24, weights={"seed": 1, "branches": 0.3}, released_dialect=True
    ),
    "sixteen-experts": Model(
        text=text_config(num_experts=16, top_k_experts=4, num_global_key_value_heads=1, sliding_window=24),
        canvas_length=12,
        weights={"seed": 2, "branches": 0.3},
        released_dialect=True,
    ),
}


@pytest.mark.parametrize("looks", [0, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_torch(name: str, looks: int) -> None:
    """Truth is transformers in float64; examples that are longer than the window, and answers of two canvases."""
    model, network = CASES[name].reference().double(), CASES[name].network()
    preparation.prepare(network, Settings(train_router=True))
    batch = batch_for(network, looks)
    assert batch.looks == looks

    def total() -> tuple[mx.array, tuple[mx.array, mx.array]]:
        decoder, encoder = objective.losses(network, batch)
        return decoder + encoder, (decoder, encoder)

    (_, ours), gradients = nn.value_and_grad(network, total)()
    theirs = torch_losses(model, batch)
    for loss, truth in zip(ours, theirs, strict=True):
        assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    (theirs[0] + theirs[1]).backward()
    expected = shared_gradients(model)
    for path, gradient in leaves(gradients).items():
        released = "model." + (path.removesuffix(".weight") if ".experts." in path else path)
        if released.endswith("layer_scalar"):
            continue  # buffers in transformers: they have no gradient there
        truth = expected.pop(released)
        assert np.linalg.norm(np.array(gradient) - truth) <= 1e-4 * np.linalg.norm(truth), released
    assert not expected


def test_a_zero_signal_is_what_generation_starts_with() -> None:
    """A row without a first look trains on the network's own step 0."""
    network = small()
    batch = make_batch(examples(1, vocabulary=128), np.random.default_rng(0), network.config, Settings(), ENDS)
    start = int(np.array(batch.starts)[0])
    cache = network.make_cache()
    network.encode(batch.tokens[:, :start], cache)
    _, prefix = objective.read_clean(network, batch.tokens)
    ours = objective.denoise(network, batch.noisy, batch.starts, prefix, None)
    assert mx.allclose(ours, network.denoise(batch.noisy, cache, None), atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the batches


def test_a_canvas_of_the_response_is_corrupted_and_the_fill_is_supervised() -> None:
    network = small()
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        made = examples(3, vocabulary=128)
        batch = make_batch(made, rng, network.config, Settings(), ENDS)
        for row, example in enumerate(made):
            start, clean = np.array(batch.starts)[row], np.array(batch.clean)[row].tolist()
            answer = [*example.response, ENDS.stop, *[ENDS.fill] * 24]
            offset = start - len(example.prompt)
            assert offset % 12 == 0
            assert clean == answer[offset : offset + 12]
            seen.add((row, offset))
            assert np.array(batch.tokens)[row, : example.length].tolist() == [
                *example.prompt,
                *example.response,
                ENDS.stop,
            ]
    assert seen == {(0, 0), (1, 0), (2, 0), (2, 12), (2, 24)}


def test_noise_is_uniform_in_level_and_over_the_vocabulary() -> None:
    network = small()
    rng, levels, ids = np.random.default_rng(0), [], []
    for _ in range(400):
        batch = make_batch(examples(3, vocabulary=128), rng, network.config, Settings(), ENDS)
        changed = np.array(batch.noisy) != np.array(batch.clean)
        levels += changed.mean(axis=1).tolist()
        ids += np.array(batch.noisy)[changed].tolist()
    assert np.histogram(levels, bins=5, range=(0, 1))[0].min() > 0.12 * len(levels)
    assert set(ids) == set(range(128))
    counts = np.bincount(ids, minlength=128)
    assert counts.max() < 2 * counts.mean()


def test_batches_depend_on_the_seed_and_their_number_alone() -> None:
    made = examples(50)
    settings = Settings(batch_size=4)
    first, second = Batches(made, settings), Batches(made, settings)
    forward = [first[i] for i in range(30)]
    assert [second[i] for i in reversed(range(30))] == forward[::-1]
    epoch = [e for batch in forward[: first.per_epoch] for e in batch]
    assert len(set(epoch)) == len(epoch) == 48
    assert forward[: first.per_epoch] != forward[first.per_epoch : 2 * first.per_epoch]


def test_long_examples_are_left_out_and_too_few_are_refused() -> None:
    made = examples(30)
    assert Batches(made, Settings(batch_size=4, max_length=30)).left_out == 10
    with pytest.raises(TrainingError, match="at least one batch of 64"):
        Batches(made, Settings(batch_size=64))


# ------------------------------------------------------------------------------------------------------ the same maths


def test_running_all_experts_is_running_the_chosen_ones() -> None:
    network = small()
    plain = network.decoder.layers[0]
    x = mx.random.normal((7, 32), key=mx.random.key(1))
    chosen, weights = plain.router(x)
    every = objective.AllExperts(plain.experts)
    assert mx.allclose(every(x, chosen, weights, DEFAULT), plain.experts(x, chosen, weights, DEFAULT), atol=1e-5)


def test_pieces_of_the_vocabulary_pass_give_the_same_loss_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small()
    batch = make_batch(examples(4, vocabulary=128), np.random.default_rng(0), network.config, Settings(), ENDS)
    gradient = nn.value_and_grad(network, lambda: sum(objective.losses(network, batch)))
    whole = gradient()
    monkeypatch.setattr(objective, "LOGITS", 128 * 5)
    pieces = gradient()
    assert pieces[0].item() == pytest.approx(whole[0].item(), rel=1e-6)
    same(whole[1], pieces[1])


@pytest.mark.parametrize("lora", [None, Lora(rank=2, keys=TARGETS)], ids=["full", "lora"])
def test_recomputing_changes_nothing(lora: Lora | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, and pieces of the vocabulary pass, whose table has no gradient beside an adapter."""
    monkeypatch.setattr(objective, "LOGITS", 128 * 5)
    runs = []
    for again in (False, True):
        network = small()
        if lora:
            attach(network, lora)
        preparation.prepare(network, Settings())
        batch = make_batch(examples(4, vocabulary=128), np.random.default_rng(0), network.config, Settings(), ENDS)
        runs.append(
            nn.value_and_grad(network, lambda n=network, b=batch, a=again: sum(objective.losses(n, b, recompute=a)))()
        )
    assert runs[0][0].item() == pytest.approx(runs[1][0].item(), rel=1e-6)
    same(runs[0][1], runs[1][1])


def test_pieces_of_the_vocabulary_pass_bound_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the rows, the same logits at a time: forward, backward and first look one piece after another."""
    monkeypatch.setattr(objective, "LOGITS", 1 << 19)
    peaks = []
    for count in (4, 16):
        network = small(vocab_size=1 << 15)
        batch = make_batch(examples(count, vocabulary=128), np.random.default_rng(0), network.config, Settings(), ENDS)
        mx.eval(network.parameters(), batch.tokens, batch.clean, batch.noisy)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(nn.value_and_grad(network, lambda n=network, b=batch: sum(objective.losses(n, b)))())
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.3 * peaks[0]


def test_recomputing_layers_needs_less_memory() -> None:
    """MLX would keep what is computed again until the end, if the gradients of the weights did not come first."""
    peaks = []
    for again in (False, True):
        network = small(num_hidden_layers=8, layer_types=["sliding_attention", "full_attention"] * 4)
        batch = make_batch(examples(16, vocabulary=128), np.random.default_rng(0), network.config, Settings(), ENDS)
        mx.eval(network.parameters(), batch.tokens, batch.clean, batch.noisy)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(
            nn.value_and_grad(network, lambda n=network, b=batch, a=again: sum(objective.losses(n, b, recompute=a)))()
        )
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.5 * peaks[0]


# ------------------------------------------------------------------------------------------------------------ the loop

QUICK = Settings(
    steps=12, batch_size=4, learning_rate=5e-3, warmup=2, train_router=True, save_every=4, evaluate_every=6, seed=3
)


def start(folder: Path, settings: Settings = QUICK) -> Trainer:
    network = small()
    preparation.prepare(network, settings)
    made = examples(24, vocabulary=128)
    return Trainer(network, settings, examples=made[:16], held_out=made[16:], ends=ENDS, folder=folder)


def weights(folder: Path, step: int) -> dict[str, mx.array]:
    return mx.load(str(folder / f"step-{step:07d}" / "weights.safetensors"))  # pyright: ignore[reportReturnType]


def test_eight_examples_are_learned_by_heart(tmp_path: Path) -> None:
    """Two of each in a batch, under different noise: the loss goes to zero, and generation gives the answers back."""
    settings = Settings(
        steps=250, batch_size=16, learning_rate=1e-2, train_router=True, warmup=10, betas=(0.9, 0.98), final_rate=0.03
    )
    network = small()
    preparation.prepare(network, settings)
    rng = np.random.default_rng(0)
    made = [Example(prompt=(2, 3 + i), response=tuple(rng.integers(3, 100, 6).tolist())) for i in range(8)]
    run = Trainer(network, settings, examples=made * 2, held_out=[], ends=ENDS, folder=tmp_path)
    losses = [event.decoder_loss for event in run.run() if isinstance(event, Trained)]
    assert np.mean(losses[-20:]) < 0.02
    given = scoring.answers(network, made, GenerationConfig(max_tokens=12), seed=0)
    assert all(ids == example.response for example, ids, _ in given)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("lora", [None, Lora(rank=2, keys=TARGETS)], ids=["full", "lora"])
def test_a_step_can_be_compiled(
    lora: Lora | None, recompute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both halves are traced, where MLX refuses what is read and not among the inputs, and then run interpreted: their
    hundred kernels would take a CPU's compiler a minute."""
    compile_, traced = mx.compile, []

    def tracing(function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> Callable[..., Any]:
        compiled = compile_(function, inputs=inputs, outputs=outputs)
        assert [*map(id, inputs)] == [*map(id, outputs)]  # what is no input stays as it was when it was traced

        def call(*given: Any) -> Any:
            network, *optimizer = (tree_unflatten(tree_flatten(state)) for state in outputs)
            mx.enable_compile()
            compiled(*given)
            mx.disable_compile()
            traced.append(function.__name__)
            run.network.update(network)
            for state in optimizer:
                run.optimizer.state = state
            return function(*given)

        return call

    network = small()
    if lora:
        attach(network, lora)
    settings = dataclasses.replace(QUICK, steps=1, checkpoint_layers=recompute)
    preparation.prepare(network, settings)
    made = examples(8, vocabulary=128)
    run = Trainer(network, settings, examples=made, held_out=[], ends=ENDS, folder=tmp_path)
    monkeypatch.setattr(mx, "compile", tracing)
    [loss] = [event.loss for event in run.run() if isinstance(event, Trained)]
    assert traced == ["_value_and_grad", "_apply"] and loss > 0


def test_muon_learns_as_well(tmp_path: Path) -> None:
    events = list(start(tmp_path, dataclasses.replace(QUICK, optimizer="muon", steps=30)).run())
    trained = [event.loss for event in events if isinstance(event, Trained)]
    assert np.mean(trained[-5:]) < np.mean(trained[:5]) - 0.5


def test_muon_makes_the_step_of_every_matrix_in_a_stack_orthogonal() -> None:
    muon = optimizer.Muon(1.0, momentum=0.0, weight_decay=0.0)
    gradient = mx.random.normal((3, 8, 6), key=mx.random.key(0)) * mx.array([1.0, 1e-3, 1e3])[:, None, None]
    muon.init({"w": mx.zeros((3, 8, 6))})
    step = muon.apply_gradients({"w": gradient}, {"w": mx.zeros((3, 8, 6))})["w"]
    sizes = np.linalg.svd(np.array(step), compute_uv=False) / (8 / 6) ** 0.5
    assert sizes.min() > 0.6
    assert sizes.max() < 1.3


def test_events_say_what_happened(tmp_path: Path) -> None:
    events = list(start(tmp_path).run())
    assert [e.step for e in events if isinstance(e, Trained)] == list(range(1, 13))
    assert [e.step for e in events if isinstance(e, Evaluated)] == [6, 12]
    assert [e.step for e in events if isinstance(e, Saved)] == [4, 8, 12]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["step-0000008", "step-0000012"]


def test_accumulated_gradients_are_the_mean_of_their_batches(tmp_path: Path) -> None:
    settings = Settings(steps=1, batch_size=4, accumulate=2, warmup=1, train_router=True, seed=1)
    run = start(tmp_path, settings)
    parts = []
    for number in range(2):
        rng = np.random.default_rng((settings.seed, 2, number))
        batch = make_batch(run.batches[number], rng, run.network.config, settings, ENDS)
        parts.append(nn.value_and_grad(run.network, lambda b=batch: sum(objective.losses(run.network, b)))())
    before = run.network.decoder.norm.weight
    event = next(e for e in run.run() if isinstance(e, Trained))
    assert event.loss == pytest.approx((parts[0][0] + parts[1][0]).item() / 2, rel=1e-5)
    mean = (parts[0][1]["decoder"]["norm"]["weight"] + parts[1][1]["decoder"]["norm"]["weight"]) / 2
    moved = run.network.decoder.norm.weight - before
    clear = mx.abs(mean) > 1e-3  # AdamW's first step goes against the gradient's sign
    assert mx.array_equal(mx.where(clear, mx.sign(moved), 0), mx.where(clear, -mx.sign(mean), 0))


def test_a_killed_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    list(start(unbroken).run())
    script = (
        "import mlx.core as mx\nmx.disable_compile()\n"
        "from pathlib import Path\nfrom tests.training.test_trainer import start\n"
    )
    script += f"for event in start(Path({str(killed)!r})).run(): print(event.step, flush=True)\n"
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= 9:
                child.send_signal(signal.SIGKILL)
                break
    steps = sorted(p.name for p in killed.glob("step-*"))
    assert steps[-1] == "step-0000008"
    list(start(killed).run())
    for name, weight in weights(unbroken, 12).items():
        assert mx.array_equal(weight, weights(killed, 12)[name]), name


def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    list(start(tmp_path).run())
    network = small()
    preparation.prepare(network, Settings())  # the router is frozen here
    other = Trainer(network, QUICK, examples=examples(8, vocabulary=128), held_out=[], ends=ENDS, folder=tmp_path)
    with pytest.raises(TrainingError, match="holds another run"):
        next(other.run())


def test_a_half_written_checkpoint_is_not_taken_up(tmp_path: Path) -> None:
    (tmp_path / ".step-0000004").mkdir(parents=True)
    assert next(e.step for e in start(tmp_path).run() if isinstance(e, Trained)) == 1


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_weights(tmp_path: Path) -> None:
    run = start(tmp_path)
    with pytest.raises(TrainingError, match=r"step 6.*\n.*step-0000004"):
        for event in run.run():
            if event.step == 5:
                run.network.decoder.norm.weight = run.network.decoder.norm.weight * mx.nan
    kept = weights(tmp_path, 4)
    assert all(mx.isfinite(weight).all().item() for weight in kept.values())


def test_the_router_stays_frozen_unless_asked_for(tmp_path: Path) -> None:
    network = small()
    preparation.prepare(network, Settings())
    assert not [name for name in leaves(network.trainable_parameters()) if "router" in name]


def test_the_learning_rate_warms_up_and_falls_to_its_end() -> None:
    rate = optimizer.schedule(Settings(steps=110, warmup=10, learning_rate=1.0, final_rate=0.1))
    values = [float(rate(mx.array(step))) for step in range(110)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == pytest.approx(1.0, abs=1e-3)
    assert values[-1] == pytest.approx(0.1, abs=1e-2)


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"steps": 0}, {"optimizer": "sgd"}, {"self_conditioning": 2.0}):
        with pytest.raises(TrainingError):
            Settings(**wrong)  # pyright: ignore[reportArgumentType]
