"""What prompts with pictures need besides text: eyes, the ids around pictures, and soft tokens remembered."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import ConfigError, PromptError
from ..files import adapters
from ..files.eyes import load_eyes, open_eyes
from ..files.shipped import BUILT_IN, EYES
from ..files.weights import load_network
from ..model.blocks import Block
from ..model.memory import SightMemory
from ..model.network import Network
from ..model.vision import Eyes
from ..model.vision_config import VisionConfig
from ..readers import read_json
from ..text.pictures.images import Picture, PictureConfig
from ..text.placing import Frame
from ..text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .model import DiffusionGemma
    from .prompts import Placed

REMEMBERED = 256_000_000  # bytes of soft tokens; a picture of 1,120 of the released model's has 6 million


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a model reads prompts with pictures by. `network` encodes and answers them, `tokenizer` writes them: the
    model's own, unless its eyes came with others."""

    network: Network
    tokenizer: Tokenizer
    eyes: Eyes  # opened; their weights may still be on the disk
    read: Callable[[], Eyes]  # the same, read: in the thread that looks first, since MLX's lazy arrays belong to one
    frame: Frame
    looks: "Looks" = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "looks", Looks(self.read))

    @property
    def config(self) -> VisionConfig:
        return self.eyes.vision_tower.config

    @property
    def pictures(self) -> PictureConfig:
        """How pictures are scaled."""
        config = self.config
        return PictureConfig(
            patch_size=config.patch_size, pooling=config.pooling_kernel_size, budget=config.soft_tokens
        )

    def check(self, pictures: Sequence[Picture]) -> None:
        """Errors: PromptError for one with more patches to a side than the tower has places for."""
        for picture in pictures:
            most = max(picture.size) // self.config.patch_size
            if most > (places := self.config.position_embedding_size):
                raise PromptError(f"{picture.name}: {most} patches to a side; this model's eyes know {places} places.")

    def blocks(self, pictures: "Sequence[Placed]") -> list[Block]:
        """As the engine takes them: nobody looks before they are needed."""
        return [
            Block(start=placed.start, stop=placed.stop, features=lambda picture=placed.picture: self.looks.at(picture))
            for placed in pictures
        ]

    def memory(self, pictures: "Sequence[Placed]") -> SightMemory:
        """What these pictures need, one at least; of their soft tokens as many as are remembered."""
        patches = [placed.picture.tokens * self.config.pooling_kernel_size**2 for placed in pictures]
        needed = SightMemory.of(self.eyes, patches)
        return replace(needed, tokens=min(needed.tokens, self.looks.most_bytes))


class Looks:
    """Soft tokens of the pictures that were looked at lately, by what these show, in at most so many bytes."""

    def __init__(self, read: Callable[[], Eyes], most_bytes: int = REMEMBERED):
        self._read, self.most_bytes = read, most_bytes
        self.taken = 0  # looks, for those who count
        self._kept: OrderedDict[str, mx.array] = OrderedDict()

    @cached_property
    def _eyes(self) -> Eyes:
        return self._read()

    @property
    def nbytes(self) -> int:
        return sum(tokens.nbytes for tokens in self._kept.values())

    def at(self, picture: Picture) -> mx.array:
        """A picture's soft tokens [n, H]."""
        if picture.key not in self._kept:
            self.taken += 1
            self._kept[picture.key] = self._eyes.see(mx.array(picture.patches()), picture.columns)
        self._kept.move_to_end(picture.key)
        tokens = self._kept[picture.key]
        while self.nbytes > self.most_bytes and self._kept:
            self._kept.popitem(last=False)
        return tokens


def own_sight(model: "DiffusionGemma", *, ignore_keys: tuple[str, ...] = ()) -> Sight:
    """With the eyes in the model's own folder. Errors: ConfigError where there are none, or config.json does not say
    how pictures stand in a prompt."""
    if model.folder is None:
        raise ConfigError("this model was made without a folder, so it has no eyes: load one that has a vision tower.")
    folder, config = model.folder, model.config
    eyes = open_eyes(folder, config, ignore_keys=ignore_keys)
    begin, image, end = config.boi_token_id, config.image_token_id, config.eoi_token_id
    if begin is None or image is None or end is None:
        raise ConfigError(
            "config.json lacks one of boi_token_id, image_token_id, eoi_token_id: pictures have no place in this"
            " model's prompts.\nCopy them from the checkpoint that it was made of."
        )
    placeholder = model.tokenizer.beside.texts.get("image_token") or Frame.placeholder
    frame = Frame(begin=begin, image=image, end=end, placeholder=placeholder)
    return Sight(
        network=model.network,
        tokenizer=model.tokenizer,
        eyes=eyes,
        read=lambda: load_eyes(folder, config, ignore_keys=ignore_keys),
        frame=frame,
    )


def built_in_sight(model: "DiffusionGemma", *, adapter: Path | None = None) -> Sight:
    """With the eyes that the built-in model brings along. They were trained with an adapter of the text model, in a
    network of its own, so that what is asked in words keeps its bits. Errors: ConfigError beside another `adapter`, and
    where machines share the model."""
    if adapter is not None:
        raise ConfigError(
            f"the built-in model sees by an adapter of its own, and {adapter} is another.\n"
            "Leave the pictures out, or the adapter."
        )
    if model.network.tuning.share.size > 1:
        raise ConfigError(
            "the built-in model sees by a network of its own, which is not cut: several machines share one without"
            " pictures.\nLeave the pictures out, or run it on one machine."
        )
    told = read_json(EYES / "config.json")
    network = load_network(BUILT_IN)
    adapters.load(network, EYES / "adapter")
    mx.eval(network.parameters())  # lazy arrays would end with this thread
    network.tuning = model.network.tuning
    begin, image, end = (told[f"{name}_token_id"] for name in ("boi", "image", "eoi"))
    config = replace(model.config, vision=told["vision_config"])
    return Sight(
        network=network,
        tokenizer=model.tokenizer,
        eyes=open_eyes(EYES, config),
        read=lambda: load_eyes(EYES, config),
        frame=Frame(begin=begin, image=image, end=end),
    )
