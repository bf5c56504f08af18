"""One set of weights, run two ways: what the two passes promise beyond the numbers of test_parity."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.model import masks
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.proof.recordings import small_network
from tests.reference_models import MODELS, Model, text_config

QUANTIZED = [("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)] + [
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]


@pytest.fixture(scope="module")
def network() -> Network:
    return MODELS["plain"].network()


def ids(count: int, seed: int = 0, batch: int = 1) -> mx.array:
    return mx.random.randint(0, 256, (batch, count), key=mx.random.key(seed))


CANVAS = ids(24, seed=9)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_both_dialects_are_one_config(model: Model) -> None:
    """config.json as released, and as transformers writes it back."""
    written = json.loads(model.reference().config.to_json_string())
    assert "per_layer_config" in written["text_config"]
    same = {"image_token_id": written["image_token_id"], "eos_token_id": written["text_config"]["eos_token_id"]}
    ours = ModelConfig.from_dict(model.config | same)
    theirs = ModelConfig.from_dict(written)
    assert ours == theirs


def test_names_are_those_of_the_checkpoint() -> None:
    """transformers' parameters below `model.`, each once; experts carry `.weight`, the encoder its scalars alone."""
    told = {
        name.removeprefix("model.") + (".weight" if name.endswith(("gate_up_proj", "down_proj")) else "")
        for name in MODELS["plain"].reference().state_dict()
        if "vision" not in name and name != "lm_head.weight"
    }
    shared = {name for name in told if name.startswith("encoder.") and not name.endswith("layer_scalar")}
    assert {name for name, _ in tree_flatten(MODELS["plain"].network().parameters())} == told - shared


def test_embeddings_can_be_given_instead_of_ids(network: Network) -> None:
    one, two = network.make_cache(), network.make_cache()
    prompt = ids(20)
    assert mx.array_equal(network.encode(prompt, one), network.encode(network.embed(prompt), two))
    assert mx.array_equal(network.logits(CANVAS, one), network.logits(CANVAS, two))


def test_denoising_leaves_nothing_behind(network: Network) -> None:
    cache = network.make_cache()
    network.encode(ids(20), cache)
    before = network.logits(CANVAS, cache)
    network.logits(ids(24, seed=1), cache, mx.ones((1, 24, 256)))
    assert cache.length == 20
    assert mx.array_equal(network.logits(CANVAS, cache), before)


def test_a_zero_signal_is_no_signal(network: Network) -> None:
    cache = network.make_cache()
    network.encode(ids(20), cache)
    zero = network.denoise(CANVAS, cache, mx.zeros((1, 24, 32)))
    assert mx.array_equal(network.denoise(CANVAS, cache, None), zero)


def test_every_canvas_position_sees_every_other(network: Network) -> None:
    cache = network.make_cache()
    network.encode(ids(20), cache)
    before = np.array(network.logits(CANVAS, cache))
    for changed in (0, 23):
        canvas = np.array(CANVAS)
        canvas[0, changed] = (canvas[0, changed] + 1) % 256
        after = np.array(network.logits(mx.array(canvas), cache))
        assert (after != before).any(axis=-1).all()


def test_a_prompt_token_sees_nothing_after_it(network: Network) -> None:
    prompt = np.array(ids(20))
    one = network.encode(mx.array(prompt), network.make_cache())
    prompt[0, 12] = (prompt[0, 12] + 1) % 256
    two = network.encode(mx.array(prompt), network.make_cache())
    same = np.array((one == two).all(axis=-1))[0]
    assert same[:12].all() and not same[12:].any()


def test_rows_do_not_touch_each_other(network: Network) -> None:
    """Two rows of one batch, and the second with another neighbour."""
    prompts, canvases = ids(20, batch=2), ids(24, seed=9, batch=2)
    other = mx.concatenate([ids(20, seed=5), prompts[1:]])
    results = []
    for prompt in (prompts, other):
        cache = network.make_cache(2)
        network.encode(prompt, cache)
        results.append(np.array(network.logits(canvases, cache)))
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-4)
    assert np.abs(results[0][0] - results[1][0]).max() > 0.1


def test_logits_are_float32_and_capped(network: Network) -> None:
    loud = MODELS["five-heads"].network()
    for net, cap in ((network, 30.0), (loud, 10.0)):
        logits = net.head(mx.ones((1, 2, net.config.hidden_size)) * 1e4)
        assert logits.dtype == mx.float32
        assert mx.abs(logits).max().item() == cap


def test_everything_is_computed_in_the_dtype_of_the_weights() -> None:
    """Except the logits. MLX on a CPU multiplies experts in float32 only, so the layers are left out here."""
    net = small_network(config=MODELS["plain"].config, weights={"seed": 1})
    net.set_dtype(mx.bfloat16)
    assert net.embed(CANVAS).dtype == mx.bfloat16
    signal = net.soft_embedding(mx.zeros((1, 24, 256)))
    assert signal.dtype == mx.bfloat16
    assert net.decoder.self_conditioning.condition(net.embed(CANVAS), signal).dtype == mx.bfloat16
    assert net.head(net.embed(CANVAS)).dtype == mx.float32


@pytest.mark.parametrize(("mode", "bits", "group_size"), QUANTIZED)
def test_quantized_weights_of_every_mode_run(mode: str, bits: int, group_size: int) -> None:
    """Everything packed, the tied table included, against the same values unpacked."""
    text = text_config(hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_experts=4)
    model = Model(text=text, canvas_length=24, weights={"seed": 6, "branches": 0.1}, released_dialect=True)
    packed, plain = model.network(), model.network()
    nn.quantize(packed, group_size=group_size, bits=bits, mode=mode)
    packing = {"group_size": group_size, "bits": bits, "mode": mode}
    weights = dict(tree_flatten(packed.parameters()))
    for name, value in weights.items():
        if (scales := name.removesuffix("weight") + "scales") in weights and name.endswith("weight"):
            biases = weights.get(name.removesuffix("weight") + "biases")
            unpacked = mx.dequantize(value, weights[scales], biases, **packing, dtype=mx.float32)
            plain.load_weights([(name, unpacked)], strict=False)
    results = []
    for net in (packed, plain):
        cache = net.make_cache()
        net.encode(ids(20), cache)
        first = net.logits(CANVAS, cache)
        results += [first, net.logits(CANVAS, cache, first / 0.8)]
    for ours, truth in ((results[0], results[2]), (results[1], results[3])):
        # The modes with byte scales unpack embeddings to bfloat16, the others to float32.
        bound = 1e-5 if mode == "affine" else 0.05
        error = mx.sqrt(mx.square(ours - truth).mean() / mx.square(truth).mean())
        assert float(error) < bound


# --- Masks


def test_causal_mask() -> None:
    mask = masks.causal(3, visible=3, position=10, window=4, padding=None)
    assert isinstance(mask, masks.Window)
    assert np.array(mask.array()).astype(int).tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize(("length", "window", "expected"), [(5, None, "causal"), (5, 8, "causal"), (1, None, None)])
def test_no_mask_is_built_where_none_is_needed(length: int, window: int | None, expected: str | None) -> None:
    assert masks.causal(length, visible=3, position=3, window=window, padding=None) == expected
    assert masks.bidirectional(length, visible=3, position=3, padding=None) is None


def test_padding_is_seen_by_itself_alone() -> None:
    mask = masks.causal(4, visible=0, position=0, window=None, padding=mx.array([0, 2]))
    assert isinstance(mask, mx.array)
    whole = np.tril(np.ones((4, 4), int))
    padded = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert np.array(mask).astype(int)[:, 0].tolist() == [whole.tolist(), padded]
    canvas = masks.bidirectional(2, visible=3, position=4, padding=mx.array([0, 2]))
    assert isinstance(canvas, mx.array)
    assert np.array(canvas).astype(int)[:, 0, 0].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
