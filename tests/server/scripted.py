"""A model that says what it is told to, and a chat template that knows tools and thoughts."""

import json
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


def call(name: str, **arguments: Any) -> str:
    """A call of a tool, as the model writes it."""
    spelled = (f'{k}:<|"|>{v}<|"|>' if isinstance(v, str) else f"{k}:{json.dumps(v)}" for k, v in arguments.items())
    return f"<|tool_call>call:{name}{{{','.join(spelled)}}}<tool_call|>"


CALL = call("weather", city="Rome", days=3)
CONFIG = small.CONFIG | {"text_config": small.CONFIG["text_config"] | {"max_position_embeddings": 16_384}}
WEIGHTS = {"seed": 0, "branches": 0.1, "sharpness": 10.0}
LONG = 262_144  # tokens
SURE = 3.0  # how far the script stands out of what else could be said


class Scripted:
    """A model whose canvases say a text, whatever it was asked: its hidden states are the embeddings of the script.

    A `blind` one does not read either: its prefix has the right length and holds zeros, so that the long prompts of
    agents cost nothing.
    """

    def __init__(self, folder: Path, *, blind: bool = False):
        self.folder, self.script, self.blind = folder, "", blind

    def __call__(self) -> DiffusionGemma:
        small.write_tokenizer(self.folder)
        (self.folder / "chat_template.jinja").write_text(TEMPLATE)
        config = CONFIG | {"text_config": CONFIG["text_config"] | {"max_position_embeddings": LONG}}
        network = small_network(config=config if self.blind else CONFIG, weights=WEIGHTS)
        tokenizer = Tokenizer.load(self.folder)
        settings = GenerationConfig(max_denoising_steps=4, stop_ids=(small.EOS, small.TURN_END))
        table, starts = network.decoder.embed_tokens.weight, WeakKeyDictionary[Any, int]()

        def denoise(canvas: mx.array, cache: Any, signal: Any) -> mx.array:
            said = cache.length - starts.setdefault(cache, cache.length)
            ids = [*tokenizer.encode(self.script), *[small.TURN_END] * (small.CANVAS + said)]
            hidden = SURE * table[mx.array(ids[said : said + small.CANVAS])]  # [L, H]
            return mx.broadcast_to(hidden, (canvas.shape[0], *hidden.shape))

        network.denoise = denoise  # type: ignore[method-assign]
        if self.blind:
            network.encode = advance  # type: ignore[method-assign]
        return DiffusionGemma(network, tokenizer, settings, folder=self.folder)


def advance(inputs: mx.array, cache: Any, *_: Any) -> mx.array:
    """As Network.encode, with zeros for keys, values and hidden states."""
    batch, count = inputs.shape
    config = CONFIG["text_config"]
    for layer, kind in zip(cache.layers, config["layer_types"], strict=True):
        sliding = kind == "sliding_attention"
        heads = config["num_key_value_heads" if sliding else "num_global_key_value_heads"]
        zeros = mx.zeros((batch, heads, count, config["head_dim" if sliding else "global_head_dim"]))
        layer.append(zeros, zeros)
    cache.advance(count)
    return mx.zeros((batch, count, config["hidden_size"]))
