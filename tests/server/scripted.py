"""A model that says what it is told to, and a chat template that knows tools and thoughts."""

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.proof.recordings import small_network
from mlx_diffgemma.text.tokenizer import Tokenizer
from tests import small

# Tools declared, calls and their answers in history, thinking on request: what the released template does, in small.
TEMPLATE = """{{ bos_token }}
{%- if tools or enable_thinking or messages[0].role == 'system' %}<|turn>system
{%- if enable_thinking %}<|think|>{% endif %}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for tool in tools or [] %}<tool>{{ tool.function | tojson }}</tool>{% endfor %}<turn|>
{% endif %}
{%- for m in messages if m.role != 'system' %}
{%- if m.role == 'tool' %}<|turn>tool
{{ m.name }}={{ m.content }}<turn|>
{% else %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}<|tool_call>call:{{ call.function.name }}{
{%- for key, value in call.function.arguments.items() %}{{ key }}:{{ value }}{% endfor -%}
}<tool_call|>{% endfor %}<turn|>
{% endif %}
{%- endfor %}<|turn>model
"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "strict": True,
        "parameters": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": "boolean"},
                "share": {"type": "number"},
            },
            "required": ["city", "days"],
        },
    },
}
CALL = '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>'
CONFIG = small.CONFIG | {"text_config": small.CONFIG["text_config"] | {"max_position_embeddings": 16_384}}
WEIGHTS = {"seed": 0, "branches": 0.1, "sharpness": 10.0}
SURE = 3.0  # how far the script stands out of what else could be said


class Scripted:
    """A model whose canvases say a text, whatever it was asked: its hidden states are the embeddings of the script."""

    def __init__(self, folder: Path):
        self.folder, self.script = folder, ""

    def __call__(self) -> DiffusionGemma:
        small.write_tokenizer(self.folder)
        (self.folder / "chat_template.jinja").write_text(TEMPLATE)
        network, tokenizer = small_network(config=CONFIG, weights=WEIGHTS), Tokenizer.load(self.folder)
        settings = GenerationConfig(max_denoising_steps=4, stop_ids=(small.EOS, small.TURN_END))
        table, starts = network.decoder.embed_tokens.weight, WeakKeyDictionary[Any, int]()

        def denoise(canvas: mx.array, cache: Any, signal: Any) -> mx.array:
            said = cache.length - starts.setdefault(cache, cache.length)
            ids = [*tokenizer.encode(self.script), *[small.TURN_END] * (small.CANVAS + said)]
            hidden = SURE * table[mx.array(ids[said : said + small.CANVAS])]  # [L, H]
            return mx.broadcast_to(hidden, (canvas.shape[0], *hidden.shape))

        network.denoise = denoise  # type: ignore[method-assign]
        return DiffusionGemma(network, tokenizer, settings, folder=self.folder)
