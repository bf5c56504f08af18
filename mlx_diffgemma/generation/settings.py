"""What a run may choose: GenerationConfig, the only home of its defaults."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from ..config import IDS, PictureMask
from ..errors import ConfigError
from ..values import Field, Table, either, flag, integer, many, nearest, number, one_of, optional, shown

WHERE = "generation_config.json"

Decoding = Literal["diffusion", "autoregressive"]
LED_STEPS = 8  # more than a canvas takes that the model is sure of
MOST_LOGPROBS = 20  # of one place, as OpenAI's API has it

# Options of one decoding alone: beside the other they would do nothing.
OF_DIFFUSION = """
    max_denoising_steps t_min t_max entropy_bound stability_threshold confidence_threshold sparse_signal canvas_length
    free_steps stable_answer retries
""".split()
OF_AUTOREGRESSIVE = "top_p top_k min_p".split()


class GenerationOptions(TypedDict, total=False):
    """GenerationConfig's fields as keywords of `generate`, `stream`, `chat` and `prepare`."""

    max_tokens: int
    max_length: int | None
    max_denoising_steps: int
    t_min: float
    t_max: float
    entropy_bound: float
    stability_threshold: int
    confidence_threshold: float
    stop_ids: tuple[int, ...]
    pad_token_id: int
    prefill_step_size: int
    sparse_signal: bool
    canvas_length: int | None
    temperature: float
    greedy: bool
    avoid_empty: bool
    free_steps: int | None
    stable_answer: int | None
    decoding: Decoding
    top_p: float
    top_k: int
    min_p: float
    logprobs: bool | int
    best_of: int
    retries: int
    picture_mask: PictureMask


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to generate. The defaults are transformers' (DiffusionGemmaGenerationConfig), the checkpoint's
    `generation_config.json` comes over them, and what the caller names over both.

    Exact unless one of the departures is set, which are reported in the statistics of every result.
    """

    max_tokens: int = 256  # of the reply; transformers' max_new_tokens
    max_length: int | None = None  # of prompt and reply together; counts where max_tokens was not chosen
    max_denoising_steps: int = 48  # a canvas, at most
    t_min: float = 0.4  # what the temperature falls towards: the last step stays a part above it
    t_max: float = 0.8  # temperature of the first step (LinearTemperatureScheduleLogitsProcessor)
    entropy_bound: float = 0.1  # nats that one step may accept together (EntropyBoundSampler, arXiv 2505.24857)
    stability_threshold: int = 1  # steps without a change of the best tokens before a canvas is settled
    confidence_threshold: float = 0.005  # nats, mean over the canvas, below which it is settled; both of them:
    # StableAndConfidentStoppingCriteria
    stop_ids: tuple[int, ...] = (1, 106)  # <eos>, <turn|>: what stands before the first of them is the reply
    pad_token_id: int = 0  # fills shorter prompts of a batch on their left
    prefill_step_size: int = 2048  # prompt tokens encoded at a time: memory, not results
    sparse_signal: bool = True  # the signal's full product only where a position is not one token to its precision
    # Departures from the reference, by name.
    canvas_length: int | None = None  # tokens; shorter canvases than the model's, for short answers
    temperature: float = 1.0  # multiplies t_min and t_max; 0 is greedy, by the reference's temperatures
    greedy: bool = False  # the guess is the best token: no draw
    avoid_empty: bool = False  # no stop id at position 0 of the first canvas, in the signal too
    free_steps: int | None = None  # under a constraint: steps the model leads; None is 8, or 0 where holes are filled
    stable_answer: int | None = None  # steps without a change of the answer, up to a stop id, that end a canvas
    # Token by token instead: the causal pass of the same weights. `temperature`, `greedy` and `avoid_empty` apply.
    decoding: Decoding = "diffusion"
    top_p: float = 1.0  # the likeliest tokens that together have this probability; these three are mlx_lm's, and like
    top_k: int = 0  # there they look at the probabilities before the temperature. So many of the likeliest; 0: all
    min_p: float = 0.0  # tokens at least so likely as this times the likeliest
    # What the causal pass says about an answer, and answers chosen by it.
    logprobs: bool | int = False  # of every token; a number: with so many of the likeliest at each place
    best_of: int = 1  # answers drawn in one batch; the one with the best mean log-probability is given
    retries: int = 0  # more answers, while a token of the best one is less likely than RETRY_BELOW
    picture_mask: PictureMask = "transformers"  # who sees whom in a picture, see model/blocks; "gemma4": Google's code

    def __post_init__(self) -> None:
        for option in OPTIONS.fields:
            object.__setattr__(self, option.name, option.kind.read(getattr(self, option.name), option.name))
        if not self.t_min < self.t_max:
            raise ConfigError(f"t_min is {self.t_min}, expected less than t_max, {self.t_max}.")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ConfigError(
                f"temperature is {self.temperature}, expected 0 (greedy) or at least {LEAST_TEMPERATURE}."
            )
        if self.temperature == 0:
            if self.greedy:
                raise ConfigError("greedy would do nothing beside temperature 0, which says it already.")
            object.__setattr__(self, "greedy", True)
            object.__setattr__(self, "temperature", 1.0)
        self._check_autoregressive()
        self._check_scores()

    def _check_autoregressive(self) -> None:
        """Nothing that the decoding has no place for."""
        drawn = [name for name in ("temperature", *OF_AUTOREGRESSIVE) if getattr(self, name) != _default(name)]
        if self.decoding == "autoregressive" and self.greedy and drawn:
            raise ConfigError(f"{drawn[0]} would do nothing: greedy decoding draws no token.")
        others = OF_AUTOREGRESSIVE if self.decoding == "diffusion" else ["retries", "stable_answer"]
        for name in others:
            if getattr(self, name) != _default(name):
                raise ConfigError(self._foreign(name))

    def _check_scores(self) -> None:
        """One way of choosing, among answers that may differ."""
        if self.best_of > 1 and self.retries:
            raise ConfigError("best_of and retries both choose an answer by its log-probability: give one.")
        if self.best_of > 1 and self.decoding == "autoregressive" and self.greedy:
            raise ConfigError("best_of would do nothing: greedy autoregressive answers are all the same.")

    def _foreign(self, name: str) -> str:
        other = "diffusion" if name in OF_DIFFUSION else "autoregressive"
        return f"{name} would do nothing in {self.decoding} decoding.\nLeave it out, or set decoding to {other!r}."

    def replace(self, **options: Any) -> "GenerationConfig":
        """A copy with `options` set. Errors: ConfigError for one that does not exist, with the nearest name, and for
        one that the decoding has no place for."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown generation option {name!r}.{nearest(name, known)}")
        changed = dataclasses.replace(self, **options)
        foreign = OF_DIFFUSION if changed.decoding == "autoregressive" else OF_AUTOREGRESSIVE
        for name in foreign:
            if options.get(name, _default(name)) != _default(name):
                raise ConfigError(changed._foreign(name))
        return changed

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, stop_ids: tuple[int, ...] = ()) -> "GenerationConfig":
        """Read `generation_config.json`; `stop_ids` (the tokenizer's and config's) are joined to its own.

        Keys that mean nothing here are left alone: `unused_keys` says which. Errors: ConfigError.
        """
        given = FILE.given(values, WHERE)
        ids = given.pop("eos_token_id", ())
        sampler = given.pop("sampler_config", {})
        options: dict[str, Any] = {
            key: value for key, value in sampler.items() if key == "entropy_bound" and value is not None
        }
        options |= {RENAMED.get(key, key): value for key, value in given.items()}
        ids = tuple(dict.fromkeys((*(ids if isinstance(ids, tuple) else (ids,)), *stop_ids)))
        if ids:
            options["stop_ids"] = ids
        return cls(**options)

    @property
    def schedule(self) -> tuple[float, float]:
        """What the temperature falls towards, and where it begins."""
        return self.t_min * self.temperature, self.t_max * self.temperature

    @property
    def top_logprobs(self) -> int:
        """How many of the likeliest tokens are told at each place."""
        return 0 if isinstance(self.logprobs, bool) else self.logprobs

    @property
    def chooses(self) -> bool:
        """Whether an answer is chosen among several."""
        return self.best_of > 1 or self.retries > 0

    @property
    def scored(self) -> bool:
        """Whether every token's log-probability is wanted."""
        return bool(self.logprobs) or self.chooses

    @property
    def needs_last_hidden(self) -> bool:
        """Whether the prefix's last hidden state is: the next token's distribution follows from it."""
        return self.scored or self.decoding == "autoregressive"

    @property
    def led_steps(self) -> int:
        """First steps of a canvas in which the model leads, and the constraint follows."""
        return LED_STEPS if self.free_steps is None else self.free_steps

    @property
    def departures(self) -> dict[str, Any]:
        """The options in force that make a run differ from the reference algorithm; autoregressive: from the plain draw
        of every token by its probability, without those that say how tokens are drawn."""
        names = ["canvas_length", "temperature", "greedy", "avoid_empty", "stable_answer"]
        names += ["best_of", "retries", "picture_mask", *(["free_steps"] if self.free_steps else [])]
        if self.decoding == "autoregressive":
            names = ["avoid_empty", "best_of", "picture_mask"]
        return {name: value for name in names if (value := getattr(self, name)) != _default(name)}


def _default(name: str) -> Any:
    return GenerationConfig.__dataclass_fields__[name].default


# --------------------------------------------------------------------------------------------------- what is allowed

_MANY = 1 << 40  # far beyond any use
LEAST_TEMPERATURE = 0.001  # below, logits over it leave float32
OPTIONS = Table(
    Field("max_tokens", integer(least=1, most=_MANY)),
    Field("max_length", optional(integer(least=1, most=_MANY))),
    Field("max_denoising_steps", integer(least=1, most=1_000_000)),
    Field("t_min", number(least=0, most=1000)),
    Field("t_max", number(above=0, most=1000)),
    Field("entropy_bound", number(least=0)),
    Field("stability_threshold", integer(least=0, most=1_000_000)),
    Field("confidence_threshold", number(least=0)),
    Field("stop_ids", many(integer(least=0), most=1000)),
    Field("pad_token_id", integer(least=0)),
    Field("prefill_step_size", integer(least=1, most=1 << 30)),
    Field("sparse_signal", flag),
    Field("canvas_length", optional(integer(least=1, most=1 << 20))),
    Field("temperature", number(least=0, most=1000)),
    Field("greedy", flag),
    Field("avoid_empty", flag),
    Field("free_steps", optional(integer(least=0, most=1_000_000))),
    Field("stable_answer", optional(integer(least=1, most=1_000_000))),
    Field("decoding", one_of(*get_args(Decoding))),
    Field("top_p", number(above=0, most=1)),
    Field("top_k", integer(least=0, most=_MANY)),
    Field("min_p", number(least=0, most=1)),
    Field("logprobs", either(flag, integer(least=1, most=MOST_LOGPROBS))),
    Field("best_of", integer(least=1, most=1000)),
    Field("picture_mask", one_of(*get_args(PictureMask))),
    Field("retries", integer(least=0, most=1000)),
)
_KINDS = {option.name: option.kind for option in OPTIONS.fields}
RENAMED = {"max_new_tokens": "max_tokens"}  # the file's word → ours
_SAMPLER = Table(
    Field("_cls_name", one_of("EntropyBoundSamplerConfig"), None),
    Field("entropy_bound", _KINDS["entropy_bound"], None),
)
FILE = Table(
    Field("max_new_tokens", _KINDS["max_tokens"], None),
    *(
        Field(name, _KINDS[name], None)
        for name in ("max_length", "max_denoising_steps", "t_min", "t_max", "stability_threshold")
    ),
    *(Field(name, _KINDS[name], None) for name in ("confidence_threshold", "pad_token_id")),
    Field("eos_token_id", IDS, None),
    Field("sampler_config", _SAMPLER.kind, None),
    open=True,
)
# What transformers writes there besides, and what of it does nothing at these values.
_METADATA = frozenset(
    "_commit_hash _from_model_config bos_token_id cache_config cache_implementation disable_compile"
    " return_dict_in_generate transformers_version".split()
)
_AT_REST: dict[str, tuple[Any, ...]] = {
    "top_k": (0, 50),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "temperature": (1.0,),
    "repetition_penalty": (1.0,),
    "do_sample": (False,),
    "num_beams": (1,),
}


def unused_keys(values: dict[str, Any]) -> list[str]:
    """What `generation_config.json` says that does nothing here, in a sentence each: settings of autoregressive
    models, and names that nothing has. transformers refuses such a file; the model runs as if they were not there."""
    said = []
    for key, value in values.items():
        if key in FILE.names | _METADATA or value is None or value in _AT_REST.get(key, ()):
            continue
        hint = " This model does not use it." if key in _AT_REST else nearest(key, FILE.names, all_of_them=False)
        said.append(f"{WHERE}: {key} = {shown(value)} does nothing here.{hint}")
    return said
