"""`mlx_diffgemma.check`: what it finds right, and that it finds what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import check
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.files import shipped
from mlx_diffgemma.model.expert_linear import ExpertLinear
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.proof import device, products, published, replay
from mlx_diffgemma.proof.findings import Finding
from mlx_diffgemma.proof.published import closeness
from mlx_diffgemma.proof.recordings import Recording, small_network
from tests.reference_models import MODELS, text_config

Patch = pytest.MonkeyPatch
TOLD = json.loads((shipped.references() / "published_logits.json").read_text())


def run(monkeypatch: Patch, *arguments: str, **parts: list[Finding]) -> int:
    """The command with made-up findings of all parts but the last; its exit status."""
    for name in ("replay", "products", "device", "sight"):
        monkeypatch.setattr(f"mlx_diffgemma.proof.{name}.{name}", lambda *_, name=name: iter(parts.get(name, [])))
    with pytest.raises(SystemExit) as stopped:
        check.main(list(arguments))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


GOOD = Finding(part="products", name="a product", passed=True, says="exact")
BAD = Finding(part="products", name="another product", passed=False, says="far off")


def test_everything_right_is_status_0(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, products=[GOOD]) == 0
    out = capsys.readouterr().out
    assert "ok        products: 1 of 1; the furthest, a product: exact" in out
    assert "left out  published logits: no --model was given." in out


def test_anything_wrong_is_status_1_and_said(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, products=[GOOD, BAD]) == 1
    assert "WRONG     another product: far off" in capsys.readouterr().out


@pytest.mark.parametrize(("findings", "passed"), [([GOOD], True), ([GOOD, BAD], False)])
def test_json_is_one_line(
    findings: list[Finding], passed: bool, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--json", products=findings) == (0 if passed else 1)
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["passed"] is passed
    assert {"mlx_diffgemma", "mlx", "device", "chip"} <= report.keys()
    assert [f["passed"] for f in report["findings"]] == [f.passed for f in findings] + [None]


def test_json_has_no_infinity() -> None:
    finding = Finding(part="products", name="a product", passed=False, says="", figures={"error": float("inf")})
    assert check.as_dict(finding)["figures"] == {"error": None}


def test_every_recording_is_replayed(monkeypatch: Patch) -> None:
    monkeypatch.setattr(replay, "replay_trajectory", lambda recording, network: [])
    monkeypatch.setattr(replay, "replay_logits", lambda recording, network: {})
    seen = {finding.name for finding in replay.replay()}
    assert {path.stem for path in shipped.references().glob("trajectory-*.npz")} <= seen
    assert "logits-real-heads-bfloat16" in seen  # left out on a CPU, and said so


def test_a_wrong_network_is_found(monkeypatch: Patch) -> None:
    path = shipped.references() / "logits-small-float32.npz"
    monkeypatch.setattr(shipped, "references", lambda: Path("recordings"))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([path]))
    original = Recording.network

    def network(recording: Recording) -> Network:
        made = original(recording)
        made.decoder.layers[0].layer_scalar = mx.array([1.0])
        return made

    assert all(finding.passed for finding in replay.replay())
    monkeypatch.setattr(Recording, "network", network)
    assert not any(finding.passed for finding in replay.replay())


def test_no_recordings_is_an_error(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(shipped, "references", lambda: tmp_path)
    with pytest.raises(CheckpointError, match="incomplete"):
        next(replay.replay())


def test_the_bfloat16_recording_is_as_close_as_the_reference(monkeypatch: Patch) -> None:
    """On a CPU MLX has no expert product in bfloat16: it is made from the one in float32."""
    original = ExpertLinear.__call__

    def product(self: ExpertLinear, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        wide = ExpertLinear(1, 1, 1)
        wide.weight = self.weight.astype(mx.float32)
        return original(wide, x.astype(mx.float32), indices, sorted_indices=sorted_indices).astype(x.dtype)

    monkeypatch.setattr(ExpertLinear, "__call__", product)
    findings = list(replay._passes(Recording.load(shipped.references() / "logits-real-heads-bfloat16.npz")))
    assert len(findings) == 2
    assert all(finding.passed and finding.figures["error"] <= 2.5 for finding in findings)


def test_products_are_right() -> None:
    findings = list(products.products())
    assert all(finding.passed for finding in findings)
    names = " ".join(finding.name for finding in findings)
    assert all(word in names for word in ("affine 2", "affine 8", "mxfp4", "mxfp8", "nvfp4", "heads of 512"))


def last_row_is_lost(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A kernel whose last, ragged tile is wrong."""

    def broken(*arguments: Any, **named: Any) -> mx.array:
        y = original(*arguments, **named)
        return mx.concatenate([y[..., :-1], mx.zeros_like(y[..., -1:])], axis=-1)

    return broken


@pytest.mark.parametrize(
    ("kernel", "word"),
    [("quantized_matmul", "packed product"), ("gather_qmm", "packed experts"), ("gather_mm", "experts")],
)
def test_a_wrong_kernel_is_found(kernel: str, word: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(products, "PACKINGS", [("affine", 4, 64)])
    monkeypatch.setattr(mx, kernel, last_row_is_lost(getattr(mx, kernel)))
    wrong = {finding.name.split(",")[0] for finding in products.products() if not finding.passed}
    assert wrong == {word}


def test_wrong_attention_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(products, "PACKINGS", [])
    broken = last_row_is_lost(mx.fast.scaled_dot_product_attention)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", broken)
    wrong = {finding.name.split(",")[0] for finding in products.products() if not finding.passed}
    assert wrong == {"attention"}


# --- Published logits


def test_two_correct_runs_agree() -> None:
    """The six-layer case on another vendor's GPU."""
    other = np.array(TOLD["first_6_layers_xpu_rows_0_1"]["logits"])
    finding = closeness("", other, TOLD["first_6_layers"]["logits"][:2], bits=16)
    assert finding.passed
    assert finding.figures["mean"] == pytest.approx(published.SPREAD, abs=0.005)
    assert finding.figures["max"] == pytest.approx(1.1, abs=0.05)


@pytest.mark.parametrize("bits", published.TIMES)
@pytest.mark.parametrize("case", ["full_model", "first_6_layers"])
def test_another_network_does_not_agree(case: str, bits: int) -> None:
    told = np.array(TOLD[case]["logits"])
    other = TOLD["full_model" if case == "first_6_layers" else "first_6_layers"]["logits"]
    assert closeness(case, told, told.tolist(), bits).passed
    assert not closeness(case, told, other, bits).passed
    assert not closeness(case, told[:, ::-1], told.tolist(), bits).passed


@pytest.fixture
def large_vocabulary() -> Network:
    """Knows every id of the published prompt."""
    text = text_config(vocab_size=262_144, num_hidden_layers=7, layer_types=None)
    return small_network(
        config=MODELS["plain"].config | {"text_config": text, "canvas_length": 256}, weights={"seed": 1}
    )


def test_the_published_cases_run(large_vocabulary: Network, monkeypatch: Patch, tmp_path: Path) -> None:
    told = {"input_ids": TOLD["input_ids"]}
    for name, layers in (("full_model", 7), ("first_6_layers", 6)):
        with published.first_layers(large_vocabulary, layers):
            told[name] = {"layers": layers, "logits": published._logits(large_vocabulary, TOLD["input_ids"]).tolist()}
    assert told["full_model"]["logits"] != told["first_6_layers"]["logits"]
    (tmp_path / "published_logits.json").write_text(json.dumps(told))
    assert not any(finding.passed for finding in published.published(large_vocabulary))  # a random network
    monkeypatch.setattr(shipped, "references", lambda: tmp_path)
    assert [finding.passed for finding in published.published(large_vocabulary)] == [True, True]
    assert large_vocabulary.config.num_hidden_layers == 7


def test_first_layers_are_a_network_of_their_own() -> None:
    whole = MODELS["plain"].network()
    text = MODELS["plain"].text | {"num_hidden_layers": 2, "layer_types": MODELS["plain"].text["layer_types"][:2]}
    part = small_network(config=MODELS["plain"].config | {"text_config": text}, weights=MODELS["plain"].weights)
    canvas = mx.arange(24)[None]

    def logits(net: Network) -> mx.array:
        cache = net.make_cache()
        net.encode(mx.array([[1, 2, 3]]), cache)
        return net.logits(canvas, cache)

    with published.first_layers(whole, 2):
        assert mx.array_equal(logits(whole), logits(part))
    assert len(whole.decoder.layers) == 5


def test_only_the_released_model_has_published_logits() -> None:
    findings = list(published.published_of(MODELS["plain"].network(), "somewhere"))
    assert [(f.passed, f.name) for f in findings] == [(None, "published logits")]


def test_the_device_is_right() -> None:
    """On a CPU the sizes are narrow; that every check of a device is there, and finds this one right."""
    findings = list(device.device())
    assert all(finding.passed for finding in findings), [f for f in findings if not f.passed]
    names = " ".join(finding.name for finding in findings)
    wanted = "position 262,143|sorted rows|pieces|short chunk|row slice|accepted|guessed|sparse|thread|gradient"
    assert all(word in names for word in wanted.split("|"))


def test_a_wrong_device_is_found(monkeypatch: Patch) -> None:
    """A cosine that loses large angles, attention that forgets keys, a product that loses a row, other samples."""
    rope, attention, product = mx.fast.rope, mx.fast.scaled_dot_product_attention, mx.quantized_matmul
    monkeypatch.setattr(mx.fast, "rope", lambda x, *a, offset, **b: rope(x, *a, offset=min(offset, 100_000), **b))
    found = [device._rotation(position).passed for position in device.POSITIONS]
    assert found == [True, True, True, False, False]
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda q, k, v, **o: attention(q, k[:, :, 1:], v[:, :, 1:], **o)
    )
    assert not device._attention("attention", 8, 100, None).passed
    monkeypatch.setattr(mx, "quantized_matmul", lambda x, *a, **b: product(x * (mx.arange(x.shape[-1]) > 0), *a, **b))
    assert not device._row_slice(256).passed
    seen: list[int] = []

    def elsewhere(where: Any, work: Callable[[], Any]) -> Any:
        """Every second result is another device's, and differs."""
        seen.append(1)
        made = work()
        parts = [np.array(part) + len(seen) % 2 for part in (made if isinstance(made, list) else [made])]
        return parts if isinstance(made, list) else parts[0]

    monkeypatch.setattr(device, "_on", elsewhere)
    assert not any(finding.passed for finding in device._against_the_cpu())
