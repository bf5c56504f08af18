"""lm-eval's tasks on the built-in model: local ones, without the Hub."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks import demo_score, reasoning
from mlx_diffgemma import load
from mlx_diffgemma.cli import main
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.pipeline.harness import Harness, _batches, _cut
from mlx_diffgemma.pipeline.model import DiffusionGemma

COUNT = 4


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return load(BUILT_IN)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of written answers and one of choices, from files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    questions = [
        {"question": e.prompt, "answer": e.answer, "choices": [e.answer, e.answer[::-1]], "label": 0}
        for e in demo_score.held_out("template", COUNT)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    shared: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    written = {
        "task": "local_written",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<end>"], "max_gen_toks": 96, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    chosen = {
        "task": "local_chosen",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (written, chosen):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(shared | task))  # JSON is YAML
    return folder


def evaluate(*args: str) -> Result:
    return CliRunner().invoke(main, ["evaluate", *args])


def test_local_tasks_run_by_either_decoding(tasks: Path, tmp_path: Path, model: DiffusionGemma) -> None:
    for decoding in ("diffusion", "autoregressive"):
        options = ["--tasks", str(tasks), "--output-dir", str(tmp_path), "--decoding", decoding, "--batch-size", "3"]
        result = evaluate(*options)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "evaluation.json").read_text())["results"]
        questions = demo_score.held_out("template", COUNT)
        answers = [
            model.generate(e.prompt, seed=number, decoding=decoding, max_tokens=96)  # type: ignore[arg-type]
            for number, e in enumerate(questions)
        ]
        right = [a.text == e.answer for a, e in zip(answers, questions, strict=True)]  # type: ignore[union-attr]
        assert found["local_written"]["exact_match,none"] == sum(right) / COUNT > 0
        assert found["local_chosen"]["acc,none"] == 1.0


def test_log_likelihoods_are_the_causal_passes(model: DiffusionGemma) -> None:
    class Asked:
        def __init__(self, *args: Any):
            self.args = args

    harness = Harness(model, batch_size=2, seed=0, options={})
    whole = model.score_from(model.text_ids("Sort these names"), 1)
    [(nats, greedy)] = harness.loglikelihood([Asked("Sort", " these names")])  # type: ignore[list-item]
    start = len(model.text_ids("Sort"))
    assert nats == pytest.approx(sum(whole.logprobs[start - 1 :]), abs=1e-4)
    assert greedy == (whole.best[start - 1 :] == whole.tokens[start - 1 :])
    [blank] = harness.loglikelihood([Asked("Sort ", "these names")])  # type: ignore[list-item]
    assert blank[0] == pytest.approx(nats, abs=1e-4) and blank[1] == greedy
    assert harness.loglikelihood_rolling([Asked("Sort these names")]) == pytest.approx([whole.total], abs=1e-4)  # type: ignore[list-item]
    wanted = [{"max_gen_toks": n} for n in (8, 8, 8, 16)]
    grouped = _batches([Asked("x", w) for w in wanted], 2)  # type: ignore[list-item]
    assert [(start, len(batch), most) for start, batch, most in grouped] == [(0, 2, 8), (2, 1, 8), (3, 1, 16)]
    said = type("Said", (), {"text": "one. two! three"})()
    assert _cut(said, {"until": ["!", "."]}) == "one" and _cut(said, {"until": "?"}) == said.text
    with pytest.raises(ConfigError, match="the task sets num_beams"):
        _cut(said, {"num_beams": 3})


def test_what_cannot_be_evaluated_is_refused(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import tasks as lm_tasks

    own, manager = Path(lm_tasks.__file__).parent, lm_tasks.TaskManager

    def of_one_folder(*, include_path: str | None, include_defaults: bool) -> Any:
        assert include_defaults and include_path is None  # of all tasks lm-eval has: looking through them takes seconds
        return manager(include_path=str(own / "hellaswag"), include_defaults=False)

    monkeypatch.setattr(lm_tasks, "TaskManager", of_one_folder)
    assert "there is no folder" in evaluate("--tasks", "x", "--output-dir", str(tmp_path / "absent")).stderr
    unknown = evaluate("--tasks", "no_such_task", "--output-dir", str(tmp_path))
    assert unknown.exit_code == 1 and "lm-eval knows no task 'no_such_task'" in unknown.stderr
    hub = evaluate("--tasks", "hellaswag", "--limit", "1", "--output-dir", str(tmp_path))
    assert hub.exit_code == 1 and "the questions of hellaswag cannot be had" in hub.stderr, hub.output
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    missing = evaluate("--tasks", str(tasks), "--output-dir", str(tmp_path))
    assert missing.exit_code == 1 and "pip install 'mlx-diffgemma[eval]'" in missing.stderr


def test_procedural_questions_become_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """reasoning-gym stands aside here: its questions are the built-in model's, its scoring is equality."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    entries = [{"question": e.prompt, "answer": e.answer} for e in demo_score.held_out("template", COUNT)]
    gym: Any = ModuleType("reasoning_gym")
    gym.create_dataset = lambda name, *, size, seed: entries[:size]
    gym.get_score_answer_fn = lambda name: lambda answer, entry: float(answer == entry["answer"])
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    made = CliRunner().invoke(reasoning.main, [str(tmp_path / "tasks"), "--datasets", "made_up", "--count", "3"])
    assert made.exit_code == 0
    told = evaluate("--tasks", str(tmp_path / "tasks"), "--output-dir", str(tmp_path))
    assert told.exit_code == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["results"]["reasoning_made_up"]["score,none"] == 1
    assert found["n-samples"]["reasoning_made_up"]["effective"] == 3
