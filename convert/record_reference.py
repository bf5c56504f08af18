"""Run transformers' own model and write down what it computes: the recordings in tests/reference/.

    python convert/record_reference.py [--device cpu|cuda] [--only NAME] [--out tests/reference]

Beside tests and benchmarks the one file that imports torch. Needs torch, transformers 5.23 or 5.24 and this package's
Python files; MLX need not be there. When the built-in model is trained anew, record it anew: --only demo.

Every file is an .npz without pickles. Its entry `provenance` is a JSON string:

    kind      "logits" or "trajectory"
    device    "cpu", or "cuda" with the card's name;   dtype   what the model ran in
    versions  python, torch, transformers, numpy;   commit   of this repository;   seed   of every random choice
    model     {"config": config.json, "weights": arguments of recordings.random_weights}, or, for the built-in model,
              {"folder": "demo", "sha256": of its model.safetensors}

Kind "logits": softcapped logits of single decoder passes. `cases` in the provenance lists, by name,
`{"rms_error": RMS of the logits' error against truth}`; per case NAME the arrays are

    NAME/prompt    int32 [B, P]     ids, left-padded           NAME/padding  int32 [B]  padding tokens in front
    NAME/canvases  int32 [n, B, L]  committed before           NAME/canvas   int32 [B, L]
    NAME/signal    float32 [B, L, V], only with self-conditioning: the logits it was computed from
    NAME/logits    float32 [B, L, V], as computed in `dtype`   NAME/truth    the same from a run in float64

Kind "trajectory": whole runs of transformers' `generate`, with its random choices. C canvases, S steps (the most of
any canvas; zeros behind the last step of a shorter one), B rows, L canvas positions:

    prompt     int32 [B, P]           ids, left-padded         padding    int32 [B]
    canvas     int32 [C, B, L]        the ids each canvas started from
    draws      float32 [C, S, B, L]   one number in [0, 1): the middle of the drawn id's interval of the cumulative
                                      distribution (float64, vocabulary order), so that inverting it draws that id
    ids        int32 [C, S, B, L]     the fresh random ids of the renoise
    steps      int32 [C]              steps each canvas took, until its last row was done
  and what came of them
    guess      int32 [C, S, B, L]     the ids drawn            accepted   bool [C, S, B, L]
    best       int32 [C, S, B, L]     the argmax canvas        entropy    float32 [C, S, B]  mean, nats
    row_steps  int32 [C, B]           steps until the row was settled; 0 for a row that had met a stop id before
    settled    bool [C, B]            whether it was, within the steps allowed
    committed  int32 [C, B, L]        after the canvas: `best`, with padding behind the first stop id
  `settings` in the provenance are the generation options, `margins` how close any decision of the run came to falling
  the other way (logits between the best two tokens, probability about a draw, nats at the entropy bound and at the
  confidence threshold).
  Runs with pictures have two more, all of noise:
    pictures   int32 [n, 5]           row, start and stop of its soft tokens in `prompt`, and its patches' rows, columns
    pixels     uint8 [P, 3 · patch²]  the patches of all pictures, row by row; the tower sees them divided by 255
  What a row "did" after it was settled is transformers' business: compare steps below row_steps alone.
"""

import argparse
import copy
import hashlib
import inspect
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mlx_diffgemma.proof.recordings import random_weights  # noqa: E402
from mlx_diffgemma.text.tokenizer import Tokenizer  # noqa: E402

BUILT_IN = ROOT / "mlx_diffgemma" / "demo"

# transformers builds a vision tower whatever the text model: the smallest one, where the config has none.
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_hidden_layers": 1,
    "position_embedding_size": 4,
}
Model = Any  # DiffusionGemmaForBlockDiffusion; its annotations do not fit how it is called
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What transformers calls the argument that takes a cache: "past_key_values" up to 5.23, where 5.24 says "cache".
_PARAMETERS = inspect.signature(DiffusionGemmaForBlockDiffusion.forward).parameters
CACHE = next(name for name in ("cache", "past_key_values") if name in _PARAMETERS)


# --- The reference as functions ------------------------------------------------------------------------------------


def model_of(config: dict[str, Any]) -> Model:
    """transformers' model in float32, with any weights."""
    config = copy.deepcopy(config)  # transformers changes layer_types in place
    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict({"vision_config": VISION} | config)).eval()
    model.set_experts_implementation("eager")
    return model


def small_model(config: dict[str, Any], weights: dict[str, Any]) -> Model:
    """transformers' model in float32 with `random_weights(**weights)`; any tower where the config has none."""
    model = model_of(config)
    sees = "vision_config" in config
    state = {name: value for name, value in model.state_dict().items() if sees or "vision" not in name}
    shapes = {name: tuple(value.shape) for name, value in state.items() if name != "lm_head.weight"}
    values = random_weights(shapes, **weights)
    for name in shapes:  # the encoder's names for the weights that it shares; its layer scalars stay its own
        shared = name.replace("model.encoder.language_model.", "model.decoder.")
        if shared != name and not name.endswith("layer_scalar"):
            values[name] = values[shared]
    values["lm_head.weight"] = values["model.decoder.embed_tokens.weight"]
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(torch.from_numpy(values[name]))
    return model


def built_in_model(folder: Path) -> Model:
    """transformers' model in float32 with the weights of a folder in the released layout."""
    model = model_of(json.loads((folder / "config.json").read_text()))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    shared = ("model.encoder.language_model.", "lm_head.")  # the decoder's own tensors under another name
    if unexpected or not all(name.startswith(shared) for name in missing):
        raise SystemExit(f"{folder} does not fit the model: unexpected {unexpected}, missing {missing}")
    model.tie_weights()
    return model


Prefix = tuple[DynamicCache, torch.Tensor]  # and the mask of all its tokens


def encode(model: Model, prompt: np.ndarray, padding: np.ndarray, canvases: np.ndarray) -> Prefix:
    """After a left-padded prompt [B, P] and the canvases [n, B, L]."""
    cache = DynamicCache(config=model.config.get_text_config())
    mask = torch.from_numpy(np.arange(prompt.shape[1])[None] >= padding[:, None]).to(model.device)
    _read(model, prompt, cache, mask)
    return extend(model, (cache, mask), canvases)


def extend(model: Model, prefix: Prefix, canvases: np.ndarray) -> Prefix:
    """The same after more canvases; the prefix given is used up."""
    cache, mask = prefix
    for canvas in canvases:
        mask = torch.nn.functional.pad(mask, (0, canvas.shape[1]), value=True)
        _read(model, canvas, cache, mask)
    return cache, mask


def _read(model: Model, ids: np.ndarray, cache: DynamicCache, mask: torch.Tensor) -> None:
    with torch.no_grad():
        tokens = torch.from_numpy(ids).long().to(model.device)
        model.model.encoder(input_ids=tokens, attention_mask=mask, **{CACHE: cache})


def decode(
    model: Model,
    canvas: np.ndarray,
    cache: DynamicCache,
    mask: torch.Tensor,
    signal: np.ndarray | None,
) -> np.ndarray:
    """Softcapped logits [B, L, V] of one decoder pass, float64 from a float64 model (transformers rounds them to
    float32 before the softcap; everything up to there is its own forward)."""
    logits = None if signal is None else torch.from_numpy(signal).to(model.device, model.dtype)
    with torch.no_grad():
        hidden = model.model(
            decoder_input_ids=torch.from_numpy(canvas).long().to(model.device),
            decoder_attention_mask=torch.nn.functional.pad(mask, (0, canvas.shape[1]), value=True),
            self_conditioning_logits=logits,
            **{CACHE: cache},
        ).last_hidden_state
        scores = model.lm_head(hidden)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        cap = model.final_logit_softcapping
        return (torch.tanh(scores / cap) * cap).cpu().numpy()


@contextmanager
def router_gaps(model: Model) -> Iterator[list[float]]:
    """Collects, per router call, the smallest lead of a chosen expert's score over the best one left out. At a gap of
    rounding size two correct runs may take different experts."""
    gaps: list[float] = []
    k = model.config.get_text_config().top_k_experts

    def look(module: torch.nn.Module, args: Any, scores: torch.Tensor) -> None:
        if scores.shape[-1] > k:
            best = scores.topk(k + 1, dim=-1).values
            gaps.append(float((best[..., k - 1] - best[..., k]).min()))

    routers = [m for name, m in model.named_modules() if name.endswith("router.proj")]
    hooks = [router.register_forward_hook(look) for router in routers]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()


# --- Trajectories --------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Step:
    """What transformers drew and decided in one denoising step."""

    draws: np.ndarray  # [B, L]
    guess: np.ndarray
    best: np.ndarray
    accepted: np.ndarray
    entropy: np.ndarray  # [B]
    ids: np.ndarray
    done: np.ndarray  # [B], after this step
    margins: dict[str, np.ndarray]  # [B] each


@dataclass(kw_only=True)
class Canvas:
    start: np.ndarray  # [B, L]
    steps: list[Step] = field(default_factory=list)


class Recorder:
    """Listens to one `generate`: its draws through torch.multinomial, its random ids through the sampler, its
    decisions through the denoising step. Nothing it listens to is changed."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.canvases: list[Canvas] = []
        self._ids = torch.empty(0)
        self._guess = self._probabilities = torch.empty(0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        sampler, mixin = generation.EntropyBoundSampler, generation.DiffusionGemmaGenerationMixin
        with (
            mock.patch.object(torch, "multinomial", self._multinomial(torch.multinomial)),
            mock.patch.object(sampler, "initialize_canvas", self._random_ids(sampler.initialize_canvas)),
            mock.patch.object(mixin, "_prepare_denoiser_inputs", self._canvas(mixin._prepare_denoiser_inputs)),
            mock.patch.object(mixin, "_denoising_step", self._step(mixin._denoising_step)),
        ):
            yield

    def _multinomial(self, original: Callable) -> Callable:
        def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
            self._guess = original(probabilities, num_samples)
            self._probabilities = probabilities.double()
            return self._guess

        return multinomial

    def _random_ids(self, original: Callable) -> Callable:
        def initialize_canvas(*args: Any, **named: Any) -> torch.Tensor:
            self._ids = original(*args, **named)
            return self._ids

        return initialize_canvas

    def _canvas(self, original: Callable) -> Callable:
        def prepare(*args: Any, **named: Any) -> tuple:
            prepared = original(*args, **named)
            self.canvases.append(Canvas(start=prepared[0].cpu().numpy()))
            return prepared

        return prepare

    def _step(self, original: Callable) -> Callable:
        def step(*args: Any, **named: Any) -> tuple:
            out = original(*args, **named)
            best, done = out[1].cpu().numpy(), out[3].cpu().numpy()
            probabilities = self._probabilities.view(*best.shape, -1)
            entropy = torch.special.entr(probabilities).sum(-1)
            accepted = named["sampler"].accepted_token_mask
            draws, room = middle(self._probabilities, self._guess)
            self.canvases[-1].steps.append(
                Step(
                    draws=draws.view(best.shape).cpu().numpy(),
                    guess=self._guess.view(best.shape).cpu().numpy(),
                    best=best,
                    accepted=accepted.cpu().numpy(),
                    entropy=entropy.mean(-1).cpu().numpy(),
                    ids=self._ids.cpu().numpy(),
                    done=done.copy(),
                    margins={"guess": room.view(best.shape).amin(-1).cpu().numpy()}
                    | margins(probabilities, entropy, accepted, self.settings),
                )
            )
            return out

        return step


def middle(probabilities: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For drawn ids [N, 1] of float64 probabilities [N, V]: the middle of each one's interval of the cumulative
    distribution, as float32 below 1, and half the interval."""
    cumulative = probabilities.cumsum(-1)
    upper = cumulative.gather(-1, ids) / cumulative[:, -1:]
    lower = upper - probabilities.gather(-1, ids) / cumulative[:, -1:]
    return ((upper + lower) / 2).float().clamp(max=1 - 2**-24), (upper - lower) / 2


def margins(
    probabilities: torch.Tensor, entropy: torch.Tensor, accepted: torch.Tensor, settings: dict[str, Any]
) -> dict[str, np.ndarray]:
    """How close each row's decisions in one step came to falling the other way, [B] each: the lead of the best token
    (in log probability), and the room about the entropy bound and the confidence threshold, in nats."""
    best = probabilities.topk(2, dim=-1).values.log()
    ascending = entropy.sort(dim=-1).values
    room = (ascending.cumsum(-1) - ascending - settings["entropy_bound"]).abs().amin(-1)
    last = entropy.masked_fill(~accepted, -torch.inf).amax(-1)
    first = entropy.masked_fill(accepted, torch.inf).amin(-1)
    smallest = {
        "best": (best[..., 0] - best[..., 1]).amin(-1),
        "accept": torch.minimum(room, first - last),
        "confidence": (entropy.mean(-1) - settings["confidence_threshold"]).abs(),
    }
    return {name: value.cpu().numpy() for name, value in smallest.items()}


Picture = np.ndarray  # uint8 [rows, columns, 3 · patch²]


def trajectory(
    model: Model,
    prompts: list[list[int]],
    settings: dict[str, Any],
    seed: int,
    pictures: Sequence[Sequence[Picture]] = (),
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Run `generate` on prompts of ids with our GenerationConfig's options; the arrays of a file of kind "trajectory",
    and its margins. Of `pictures`, a list a prompt, the soft tokens' ids stand in the prompts already."""
    longest = max(map(len, prompts))
    padding = np.array([longest - len(prompt) for prompt in prompts], np.int32)
    rows = [[settings["pad_token_id"]] * pad + ids for pad, ids in zip(padding, prompts, strict=True)]
    prompt = np.array(rows, np.int32)
    shown = [picture for row in pictures for picture in row]
    seen = looked_at(model, prompt, shown) if shown else {}
    options = dict(settings)
    config = generation.DiffusionGemmaGenerationConfig(
        max_new_tokens=options.pop("max_tokens"),
        eos_token_id=options.pop("stop_ids"),
        sampler_config=generation.EntropyBoundSamplerConfig(entropy_bound=options.pop("entropy_bound")),
        **options,
    )
    torch.manual_seed(seed)
    recorder = Recorder(settings)
    with recorder.listening():
        out = model.generate(
            torch.from_numpy(prompt).long().to(model.device),
            attention_mask=torch.from_numpy(np.arange(longest)[None] >= padding[:, None]).to(model.device),
            generation_config=config,
            **{name: torch.from_numpy(array).to(model.device) for name, array in seen.items()},
        )
    canvases = recorder.canvases
    shape = (len(canvases), max(len(canvas.steps) for canvas in canvases), *canvases[0].start.shape)
    committed = out.sequences[:, longest:].cpu().numpy().reshape(shape[2], shape[0], shape[3]).swapaxes(0, 1)
    arrays = {
        "prompt": prompt,
        "padding": padding,
        "canvas": np.stack([canvas.start for canvas in canvases]).astype(np.int32),
        "steps": np.array([len(canvas.steps) for canvas in canvases], np.int32),
        "row_steps": np.zeros((shape[0], shape[2]), np.int32),
        "settled": np.zeros((shape[0], shape[2]), bool),
        "committed": committed.astype(np.int32),
        "draws": np.zeros(shape, np.float32),
        "ids": np.zeros(shape, np.int32),
        "guess": np.zeros(shape, np.int32),
        "best": np.zeros(shape, np.int32),
        "accepted": np.zeros(shape, bool),
        "entropy": np.zeros(shape[:3], np.float32),
    }
    smallest = dict.fromkeys(canvases[0].steps[0].margins, float("inf"))
    for c, canvas in enumerate(canvases):
        alive = ~np.isin(committed[:c], settings["stop_ids"]).any((0, 2))
        for s, step in enumerate(canvas.steps):
            for name in ("draws", "ids", "guess", "best", "accepted", "entropy"):
                arrays[name][c, s] = getattr(step, name)
            arrays["row_steps"][c] += alive
            for name, values in step.margins.items():
                smallest[name] = min([smallest[name], *values[alive].tolist()])
            arrays["settled"][c] |= alive & step.done
            alive &= ~step.done
    return arrays | placed(model, prompt, shown), smallest


def looked_at(model: Model, prompt: np.ndarray, pictures: list[Picture]) -> dict[str, np.ndarray]:
    """What transformers' processor hands to `generate` beside the ids: patches and their positions (x, y), filled up to
    the largest picture, and which ids are soft tokens."""
    most = max(len(picture) * picture.shape[1] for picture in pictures)
    pixels = np.zeros((len(pictures), most, pictures[0].shape[-1]), np.float32)
    positions = np.full((len(pictures), most, 2), -1)
    for number, picture in enumerate(pictures):
        rows, columns, width = picture.shape
        pixels[number, : rows * columns] = picture.reshape(-1, width).astype(np.float32) / 255
        y, x = np.divmod(np.arange(rows * columns), columns)
        positions[number, : rows * columns] = np.stack([x, y], axis=-1)
    kinds = (prompt == model.config.image_token_id).astype(np.int64)
    return {"pixel_values": pixels, "image_position_ids": positions, "mm_token_type_ids": kinds}


def placed(model: Model, prompt: np.ndarray, pictures: list[Picture]) -> dict[str, np.ndarray]:
    """The arrays `pictures` and `pixels`, or none. Soft tokens of two pictures never touch: eoi and boi part them."""
    if not pictures:
        return {}
    soft = np.pad(prompt == model.config.image_token_id, [(0, 0), (1, 1)]).astype(np.int8)
    starts, stops = (np.argwhere(np.diff(soft, axis=1) == step) for step in (1, -1))
    shapes = np.array([picture.shape[:2] for picture in pictures])
    found = np.concatenate([starts, stops[:, 1:], shapes], axis=1).astype(np.int32)
    return {"pictures": found, "pixels": np.concatenate([p.reshape(-1, p.shape[-1]) for p in pictures])}


# --- What is recorded ----------------------------------------------------------------------------------------------

SLIDING, FULL = "sliding_attention", "full_attention"
SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 5,
    "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "num_experts": 8,
    "top_k_experts": 2,
    "sliding_window": 16,
    "max_position_embeddings": 4096,
}
# The released model's heads and experts, which kernels are chosen by, on a narrow residual and a shorter window.
REAL_HEADS = SMALL | {
    "num_hidden_layers": 3,
    "layer_types": [SLIDING, SLIDING, FULL],
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": 2,
    "num_experts": 128,
    "top_k_experts": 8,
    "sliding_window": 256,
}
# With small `branches` (random_weights) a model nearly copies its canvas: "settling" settles after some steps, and in
# "real-heads" an expert taken for another at bfloat16's precision does little harm.
MODELS: dict[str, dict[str, Any]] = {
    "small": {"text": SMALL, "weights": {"seed": 11}},
    "real-heads": {"text": REAL_HEADS, "weights": {"seed": 12, "branches": 0.2}},
    "settling": {"text": SMALL, "weights": {"seed": 13, "branches": 0.2, "sharpness": 4.0}},
}
CANVAS_LENGTH = 24

# A model that sees: soft tokens of 12² pixels, some pictures wider than the window of 16, heads of 12.
BOI, IMAGE, EOI = 317, 318, 319
EYES = {
    "model_type": "gemma4_vision",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_hidden_layers": 2,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 32,
    "standardize": True,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
}
SEEING = {
    "config": {
        "model_type": "diffusion_gemma",
        "canvas_length": CANVAS_LENGTH,
        "text_config": SMALL | {"use_bidirectional_attention": "vision"},
        "vision_config": EYES,
        "boi_token_id": BOI,
        "image_token_id": IMAGE,
        "eoi_token_id": EOI,
    },
    "weights": {"seed": 14, "branches": 0.25, "sharpness": 4.0},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of one decoder pass."""

    length: int  # of the prompt
    batch: int = 1
    canvases: int = 0
    signal: bool = False


CASES: dict[str, dict[str, Case]] = {
    "small": {
        "one-token": Case(length=1),
        "window": Case(length=16, signal=True),
        "canvas-behind-window": Case(length=41, canvases=1, signal=True),
        "padded": Case(length=17, batch=3, canvases=1, signal=True),
    },
    "real-heads": {
        "ragged": Case(length=37, signal=True),
        "behind-window": Case(length=281, signal=True),
    },
}

DEFAULTS = {
    "max_tokens": 3 * CANVAS_LENGTH,
    "max_denoising_steps": 48,
    "t_min": 0.4,
    "t_max": 0.8,
    "entropy_bound": 0.1,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "stop_ids": [1, 106],
    "pad_token_id": 0,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trajectory: prompts, random ids of these lengths or texts, and what differs from the defaults."""

    lengths: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    pictures: tuple[tuple[tuple[int, int], ...], ...] = ()  # of each prompt: rows and columns of patches
    settings: dict[str, Any] = field(default_factory=dict)


RUNS = {
    "first": Run(lengths=(5,)),
    "second": Run(lengths=(12,)),
    "third": Run(lengths=(16,)),
    "behind-window": Run(lengths=(53,)),
    "batch": Run(lengths=(30, 9, 1), settings={"stop_ids": list(range(1, 9))}),
    "early-batch": Run(lengths=(8, 6, 3), settings={"stability_threshold": 0, "confidence_threshold": 0.01}),
    "stop": Run(lengths=(7,), settings={"stop_ids": list(range(1, 25))}),
    "steps-run-out": Run(lengths=(7,), settings={"max_denoising_steps": 6}),
    "no-stability": Run(lengths=(7,), settings={"stability_threshold": 0, "confidence_threshold": 0.05}),
    "stability-3": Run(lengths=(7,), settings={"stability_threshold": 3}),
    "entropy-bound-1": Run(lengths=(7,), settings={"entropy_bound": 1.0, "t_min": 0.5, "t_max": 1.0}),
}

ONE_CANVAS = {"max_tokens": CANVAS_LENGTH}
SEEING_RUNS = {
    "picture": Run(lengths=(9,), pictures=(((6, 9),),)),
    "wider-than-the-window": Run(lengths=(6,), pictures=(((15, 12),),), settings=ONE_CANVAS),
    "a-strip": Run(lengths=(25,), pictures=(((3, 30),),), settings=ONE_CANVAS),
    "two-pictures": Run(lengths=(14,), pictures=(((12, 6), (6, 6)),), settings=ONE_CANVAS),
    "three-pictures": Run(lengths=(40,), pictures=(((9, 9), (18, 9), (3, 3)),), settings=ONE_CANVAS),
    "batch": Run(lengths=(21, 5, 12), pictures=(((9, 6),), ((12, 12), (6, 3)), ()), settings=ONE_CANVAS),
    "equal-ids": Run(lengths=(8, 8), pictures=(((9, 9),), ((9, 9),)), settings=ONE_CANVAS),
    "steps-run-out": Run(lengths=(7,), pictures=(((6, 15),),), settings={"max_denoising_steps": 5}),
}

SUDOKU = "Solve this Sudoku:\n14. 356\n... .4.\n35. 621\n... .3.\n2.6 514\n415 263"
TABLE = (
    'Show this as a Markdown table:\n{"score": 91, "pet": "dog", "room": 58}\n{"score": 21, "pet": "mouse", "room": 46}'
)
TEMPLATE = (
    "Write this text for each name:\nDear {name}, your {item} will be ready on {day}."
    "\nitem: kite\nday: Monday\nname: Jane, Ivo, Rosa, Will"
)
NAMES = "Sort these names:\nLeo, Will, Eva, Ben, Cleo, Olga"
ENDLESS = {"stop_ids": [2]}  # bos, which it never writes: three canvases whatever the answer
DEMO_RUNS = {
    "sudoku": Run(texts=(SUDOKU,), settings=ENDLESS),
    "table": Run(texts=(TABLE,), settings=ENDLESS),
    "template": Run(texts=(TEMPLATE,), settings=ENDLESS),
    "behind-window": Run(texts=(SUDOKU + "\n\n" + TABLE,)),
    "batch": Run(texts=(SUDOKU, TEMPLATE, NAMES)),
}

# Decisions nearer than this to falling the other way are not recorded: two correct runs could differ there.
MARGINS = {"best": 2e-4, "guess": 1e-6, "accept": 5e-6, "confidence": 1e-6}
ROUTER_TIE = 1e-6


Recorded = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays and provenance


def record_logits(name: str, dtype: str, device: str) -> Recorded:
    """A file of kind "logits". Inputs with a tie in a router are drawn again."""
    recipe = recipe_of(name)
    model = small_model(**recipe).to(device, DTYPES[dtype])
    truth = small_model(**recipe).to(device, DTYPES[dtype]).double()
    arrays: dict[str, np.ndarray] = {}
    cases = {}
    for number, (case_name, case) in enumerate(CASES[name].items()):
        seed = 0
        while True:
            x, signal = inputs(case, recipe["config"]["text_config"]["vocab_size"], [number, seed])
            with router_gaps(truth) as gaps:
                prefix = encode(truth, x["prompt"], x["padding"], x["canvases"])
                true_logits = decode(truth, x["canvas"], *prefix, signal)
            if min(gaps) > ROUTER_TIE:
                break
            seed += 1
        logits = decode(model, x["canvas"], *encode(model, x["prompt"], x["padding"], x["canvases"]), signal)
        x |= {"logits": logits, "truth": true_logits.astype(np.float32)} | (
            {} if signal is None else {"signal": signal}
        )
        arrays |= {f"{case_name}/{key}": value for key, value in x.items()}
        cases[case_name] = {"rms_error": float(np.sqrt(np.mean((logits - true_logits) ** 2))), "seed": [number, seed]}
    return arrays, {"kind": "logits", "model": recipe, "dtype": dtype, "cases": cases}


def inputs(case: Case, vocabulary: int, seed: list[int]) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Random ids for a case, and the logits the signal is made from."""
    random = np.random.default_rng(seed)
    shape = (case.batch, CANVAS_LENGTH)
    x = {
        "prompt": random.integers(0, vocabulary, (case.batch, case.length), np.int32),
        "padding": np.array([0, case.length // 2, case.length - 1][: case.batch], np.int32),
        "canvases": random.integers(0, vocabulary, (case.canvases, *shape), np.int32),
        "canvas": random.integers(0, vocabulary, shape, np.int32),
    }
    return x, random.normal(0, 4, (*shape, vocabulary)).astype(np.float32) if case.signal else None


def recipe_of(name: str) -> dict[str, Any]:
    """Arguments of `small_model`, and of recordings.small_network."""
    text, weights = MODELS[name]["text"], MODELS[name]["weights"]
    config = {"model_type": "diffusion_gemma", "canvas_length": CANVAS_LENGTH, "text_config": text}
    return {"config": config, "weights": weights}


def record_small(run: Run, device: str) -> Recorded:
    """A file of kind "trajectory" from the model that settles, with random prompts."""
    recipe = recipe_of("settling")

    def prompts(seed: int) -> list[list[int]]:
        random = np.random.default_rng(seed)
        return [random.integers(0, SMALL["vocab_size"], length).tolist() for length in run.lengths]

    arrays, provenance = with_margins(small_model(**recipe).to(device), prompts, DEFAULTS | run.settings)
    return arrays, provenance | {"model": recipe}


def record_seeing(run: Run, device: str) -> Recorded:
    """A file of kind "trajectory" from the model that sees: random ids with pictures of noise among them."""
    patch = 3 * EYES["patch_size"] ** 2

    def pictures(seed: int) -> list[list[Picture]]:
        random = np.random.default_rng([seed, 1])
        return [[random.integers(0, 256, (*shape, patch), np.uint8) for shape in row] for row in run.pictures]

    def prompts(seed: int) -> list[list[int]]:
        random = np.random.default_rng(seed)
        texts = [random.integers(0, BOI, length).tolist() for length in run.lengths]
        return [with_pictures(ids, shapes) for ids, shapes in zip(texts, run.pictures, strict=True)]

    model = small_model(**SEEING).to(device)
    arrays, provenance = with_margins(model, prompts, DEFAULTS | run.settings, pictures)
    return arrays, provenance | {"model": SEEING}


def with_pictures(ids: list[int], shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Ids with every picture's among them, spread evenly, as transformers' processor writes them."""
    made, done = list[int](), 0
    for number, (rows, columns) in enumerate(shapes, 1):
        end = number * len(ids) // (len(shapes) + 1)
        made += [*ids[done:end], BOI, *[IMAGE] * (rows * columns // EYES["pooling_kernel_size"] ** 2), EOI]
        done = end
    return made + ids[done:]


def record_built_in(run: Run, device: str) -> Recorded:
    """A file of kind "trajectory" from the built-in model, with prompts in its language."""
    tokenizer = Tokenizer.load(BUILT_IN)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in run.texts]
    model = built_in_model(BUILT_IN).to(device)
    settings = DEFAULTS | {"max_tokens": 3 * model.config.canvas_length} | run.settings
    arrays, provenance = with_margins(model, lambda seed: prompts, settings)
    digest = hashlib.sha256((BUILT_IN / "model.safetensors").read_bytes()).hexdigest()
    return arrays, provenance | {"model": {"folder": BUILT_IN.name, "sha256": digest}}


def with_margins(
    model: Model,
    prompts: Callable[[int], list[list[int]]],
    settings: dict[str, Any],
    pictures: Callable[[int], list[list[Picture]]] = lambda seed: [],
) -> Recorded:
    """A trajectory from the first seed with which every decision keeps its margin."""
    seed = 0
    while True:
        arrays, smallest = trajectory(model, prompts(seed), settings, seed, pictures(seed))
        if all(smallest[name] >= limit for name, limit in MARGINS.items()):
            break
        seed += 1
    provenance = {"kind": "trajectory", "dtype": "float32", "settings": settings, "seed": seed, "margins": smallest}
    return arrays, provenance


def main() -> None:
    parser = argparse.ArgumentParser(description="Record transformers' DiffusionGemma into tests/reference.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", metavar="NAME", help="record files whose names contain NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "reference")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    jobs: dict[str, Callable[[str], Recorded]] = {}
    for name, dtype in (("small", "float32"), ("real-heads", "float32"), ("real-heads", "bfloat16")):
        jobs[f"logits-{name}-{dtype}"] = partial(record_logits, name, dtype)
    jobs |= {f"trajectory-settling-{name}": partial(record_small, run) for name, run in RUNS.items()}
    jobs["trajectory-seeing-picture"] = partial(record_seeing, SEEING_RUNS["picture"])
    jobs |= {f"trajectory-demo-{name}": partial(record_built_in, run) for name, run in DEMO_RUNS.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"device": device_name(options.device), "versions": versions(), "commit": commit()}
    for name in (name for name in jobs if options.only in name):
        arrays, provenance = jobs[name](options.device)
        contents: dict[str, Any] = arrays | {"provenance": np.array(json.dumps(provenance | about))}
        np.savez_compressed(options.out / f"{name}.npz", **contents)
        print(name, {key: provenance[key] for key in ("cases", "margins", "seed") if key in provenance}, flush=True)


def device_name(device: str) -> str:
    return f"cuda: {torch.cuda.get_device_name()}" if device == "cuda" else "cpu"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
