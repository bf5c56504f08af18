"""transformers' processor for the small model with eyes, without the parts for sounds and videos."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

from tests.seeing import BUDGET, TEMPLATE, VISION


class Processor(Gemma4Processor):
    """Takes none in the place of processors that need other libraries."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return object


def processor(folder: Path) -> Processor:
    """With the tokenizer of a folder."""
    sizes = {"patch_size": VISION["patch_size"], "pooling_kernel_size": VISION["pooling_kernel_size"]}
    images = Gemma4ImageProcessorPil(max_soft_tokens=BUDGET, **sizes)
    made = Processor(None, images, AutoTokenizer.from_pretrained(folder), None, chat_template=TEMPLATE)
    made.boa_token = made.eoa_token = "<none>"  # or it refuses every prompt
    return made
