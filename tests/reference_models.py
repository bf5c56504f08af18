"""The oracle of the parity tests: transformers' DiffusionGemma with random weights, and our network with the same.

`truth` is transformers in float64, `rival` the same in float32; our error is measured in units of the rival's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from convert import record_reference as reference
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.proof.recordings import small_network

torch.set_num_threads(1)  # on models this small, threads only wait for each other

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A small model: the text config, what its weights follow from, and the dialect our config is read from."""

    text: dict[str, Any]
    canvas_length: int
    weights: dict[str, Any]
    released_dialect: bool

    @property
    def config(self) -> dict[str, Any]:
        return {"model_type": "diffusion_gemma", "text_config": self.text, "canvas_length": self.canvas_length}

    def reference(self) -> Any:
        """transformers' model in float32."""
        return reference.small_model(self.config, self.weights)

    def network(self) -> Network:
        """Ours, in float32."""
        config = self.config if self.released_dialect else self.reference().config.to_dict()
        return small_network(config=config, weights=self.weights)


def text_config(**changes: Any) -> dict[str, Any]:
    """A text config in the released dialect, with sliding layers before and between full ones."""
    return {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 5,
        "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "num_experts": 8,
        "top_k_experts": 2,
        "sliding_window": 16,
        "max_position_embeddings": 4096,
        **changes,
    }


MODELS = {
    "plain": Model(text=text_config(), canvas_length=24, weights={"seed": 1}, released_dialect=True),
    "one-global-head": Model(
        text=text_config(num_global_key_value_heads=1, num_experts=4, top_k_experts=1),
        canvas_length=24,
        weights={"seed": 2, "tied_scalars": True},
        released_dialect=False,
    ),
    "three-heads": Model(
        text=text_config(num_attention_heads=3, num_key_value_heads=1, num_global_key_value_heads=1, hidden_size=40),
        canvas_length=64,
        weights={"seed": 3},
        released_dialect=False,
    ),
    "many-experts": Model(
        text=text_config(
            num_experts=32,
            top_k_experts=8,
            vocab_size=251,
            sliding_window=24,
            layer_types=[SLIDING, FULL, SLIDING, SLIDING, SLIDING],  # the last becomes a full one
        ),
        canvas_length=64,
        weights={"seed": 4},
        released_dialect=True,
    ),
    "five-heads": Model(
        text=text_config(
            num_attention_heads=5,
            num_key_value_heads=5,
            num_global_key_value_heads=1,
            head_dim=8,
            num_hidden_layers=6,
            layer_types=None,
            hidden_size=64,
            final_logit_softcapping=10.0,
            rms_norm_eps=1e-5,
        ),
        canvas_length=24,
        weights={"seed": 5, "sharpness": 3.0},
        released_dialect=True,
    ),
}


@dataclass(frozen=True)
class Scenario:
    """One prefix: a model, how many prompt tokens, and one row or a left-padded batch of three."""

    model: str
    length: int
    batch: int

    def padding(self) -> np.ndarray:
        """Padding per row: none, about half of the prompt, and all but one token."""
        return np.array([0, self.length // 2, self.length - 1][: self.batch])


def lengths(model: Model) -> tuple[int, ...]:
    window = model.text["sliding_window"]
    return (1, window - 1, window, window + 1, 3 * window)


SCENARIOS = [Scenario(name, n, batch) for name, model in MODELS.items() for n in lengths(model) for batch in (1, 3)]
COMMITTED = (0, 1, 3)  # canvases before the one that is looked at
SIGNALS = (False, True)
CHUNKS = (0, 7, 16)  # tokens per piece of the prompt; 0: in one piece


ROUTER_TIE = 1e-6  # scores closer than this may be ordered either way in float32


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Random ids for a scenario, and the logits the signal comes from."""

    prompt: np.ndarray  # [B, P]
    padding: np.ndarray  # [B]
    canvases: np.ndarray  # [3, B, L]
    canvas: np.ndarray  # [B, L]
    signal: np.ndarray  # float32 [B, L, V]


def _inputs(scenario: Scenario, attempt: int) -> Inputs:
    model = MODELS[scenario.model]
    random = np.random.default_rng([model.weights["seed"], scenario.length, scenario.batch, attempt])
    vocabulary, canvas = model.text["vocab_size"], (scenario.batch, model.canvas_length)
    return Inputs(
        prompt=random.integers(0, vocabulary, (scenario.batch, scenario.length)),
        padding=scenario.padding(),
        canvases=random.integers(0, vocabulary, (max(COMMITTED), *canvas)),
        canvas=random.integers(0, vocabulary, canvas),
        signal=random.normal(0, 4, (*canvas, vocabulary)).astype(np.float32),
    )


@cache
def _references(name: str) -> tuple[Any, Any]:
    """transformers' model in float64 and in float32."""
    return MODELS[name].reference().double(), MODELS[name].reference()


def _reference_logits(model: Any, x: Inputs) -> list[np.ndarray]:
    """[B, L, V] for every number of committed canvases, without and with the signal."""
    logits, done = [], 0
    prefix = reference.encode(model, x.prompt, x.padding, x.canvases[:0])
    for committed in COMMITTED:
        prefix, done = reference.extend(model, prefix, x.canvases[done:committed]), committed
        logits += [reference.decode(model, x.canvas, *prefix, x.signal if on else None) for on in SIGNALS]
    return logits


@cache
def expected(scenario: Scenario) -> tuple[Inputs, list[tuple[np.ndarray, np.ndarray]]]:
    """The first random inputs without a tie in any router, and their logits: truth and rival, in the order of
    `_reference_logits`. At a tie either expert is right, and the logits of two correct runs differ at large."""
    truth, rival = _references(scenario.model)
    attempts = count()
    while True:
        x = _inputs(scenario, next(attempts))
        with reference.router_gaps(truth) as gaps:
            logits = _reference_logits(truth, x)
        if min(gaps) > ROUTER_TIE:
            return x, list(zip(logits, _reference_logits(rival, x), strict=True))


@cache
def network(name: str) -> Network:
    return MODELS[name].network()


def ours(net: Network, scenario: Scenario, chunk: int) -> Iterator[np.ndarray]:
    """Our logits in the order of `expected`, with the prompt read in pieces of `chunk`."""
    x, _ = expected(scenario)
    prefix = net.make_cache(scenario.batch, x.padding.tolist())
    for start in range(0, scenario.length, chunk or scenario.length):
        net.encode(mx.array(x.prompt[:, start : start + (chunk or scenario.length)]), prefix)
        mx.eval(prefix.state)
    done = 0
    for committed in COMMITTED:
        for canvas in x.canvases[done:committed]:
            net.encode(mx.array(canvas), prefix)
        done = committed
        for on in SIGNALS:
            yield np.array(net.logits(mx.array(x.canvas), prefix, mx.array(x.signal) if on else None))


@dataclass(frozen=True)
class Measure:
    """Our RMS error over the rival's, and whether every argmax is the truth's, true ties aside."""

    ratio: float
    same_argmax: bool

    @property
    def passes(self) -> bool:
        return self.ratio <= WORST and self.same_argmax


MEDIAN, WORST = 1.2, 2.5  # bounds of the ratio over the matrix


def compare(logits: np.ndarray, truth: np.ndarray, rival: np.ndarray) -> Measure:
    """A tie is a place where the truth prefers its argmax to ours by less than the rival's own largest error."""
    best, other = truth.argmax(-1), logits.argmax(-1)
    lead = np.take_along_axis(truth, best[..., None], -1) - np.take_along_axis(truth, other[..., None], -1)
    return Measure(
        ratio=float(_rms(logits - truth) / _rms(rival - truth)),
        same_argmax=bool((lead <= np.abs(rival - truth).max()).all()),
    )


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def measure(net: Network, scenario: Scenario, chunk: int) -> list[Measure]:
    """One scenario, read in pieces of `chunk`: a measure for each of `expected`."""
    pairs = zip(ours(net, scenario, chunk), expected(scenario)[1], strict=True)
    return [compare(logits, truth, rival) for logits, (truth, rival) in pairs]


@cache
def measured(scenario: Scenario, chunk: int) -> list[Measure]:
    """`measure` of our own network; each is computed once per run."""
    return measure(network(scenario.model), scenario, chunk)
