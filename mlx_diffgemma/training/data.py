"""Examples from JSON lines: conversations, or prompts and completions, of a folder or a Hub dataset."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..disk import user_path, visible
from ..errors import TokenizerError, TrainingError
from ..files import hub
from ..readers import json_lines
from ..text.gate import Message, check_messages, check_text, check_tools
from ..text.tokenizer import Tokenizer
from ..values import shown


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question and answer as ids; the answer has no stop id."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response) + 1


class Ends(NamedTuple):
    """The id that closes an answer, and the one that fills the rest of its last canvas."""

    stop: int
    fill: int


SPLITS = {"train": "train|training", "valid": "valid|validation|val|dev"}  # and what else files of one are called


def read_data(path_or_repo: str, tokenizer: Tokenizer) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: of a folder with train.jsonl and, if there is one, valid.jsonl, or of a Hub
    dataset, where the files may lie in one folder, in several parts, and say train, and valid, validation, val or dev.

    Errors: TrainingError naming file and line.
    """
    folder = user_path(path_or_repo, "--data")
    if folder.is_file():
        raise TrainingError(f"--data {folder} is a file, expected the folder that has it as train.jsonl.")
    if folder.is_dir():
        files = {split: [folder / f"{split}.jsonl"] for split in SPLITS if (folder / f"{split}.jsonl").is_file()}
        if "train" not in files:
            raise TrainingError(f"--data {folder} has no train.jsonl.\n{EXPECTED}")
    else:
        files = _hub_files(path_or_repo)
    train, valid = (
        [example for file in files.get(split, []) for example in _read(file, tokenizer)] for split in SPLITS
    )
    return train, valid


def _hub_files(repo: str) -> dict[str, list[Path]]:
    """The .jsonl files of a Hub dataset by split; a single file without a split's name is the training data."""
    folder = hub.dataset(repo)
    found = visible(folder, "**/*.jsonl")
    if not found:
        raise TrainingError(
            f"{repo} has no .jsonl file; parquet and other forms are not read.\n"
            f'Make one: datasets.load_dataset("{repo}")["train"].to_json("my-data/train.jsonl"), then --data my-data.'
        )
    files: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        named = re.compile(rf"(^|[^a-z])({names})([^a-z]|$)")
        if matching := [file for file in found if named.search(file.relative_to(folder).as_posix().lower())]:
            files[split] = matching
    if "train" not in files and len(found) == 1:
        files["train"] = found
    if "train" not in files:
        names = ", ".join(file.relative_to(folder).as_posix() for file in found[:3])
        raise TrainingError(f"{repo} has no file for training, only {names}.\nExpected train.jsonl, in any folder.")
    folders = sorted({file.parent for file in files["train"]})
    if len(folders) > 1:
        raise TrainingError(
            f"{repo} has training data in {len(folders)} folders: {folders[0].name or '.'}, {folders[1].name}, …\n"
            f"Choose one: --data {folders[0]}"
        )
    return files


def _read(file: Path, tokenizer: Tokenizer) -> list[Example]:
    examples = []
    for where, values in json_lines(file, fault=TrainingError):
        messages, answer, tools = _conversation(values, where)
        try:
            prompt = tokenizer.apply_chat_template(messages, tools=tools)
        except TokenizerError as error:
            raise TrainingError(f"{where}: {error}") from None
        examples.append(Example(prompt=tuple(prompt), response=tuple(tokenizer.encode(answer))))
    if not examples:
        raise TrainingError(f"{file} has no examples.\n{EXPECTED}")
    return examples


EXPECTED = 'Expected {"messages": [..., an assistant\'s]} or {"prompt": text, "completion": text} on each line.'


def _conversation(values: Any, where: str) -> tuple[list[Message], str, list[dict[str, Any]] | None]:
    """The messages before the last answer, that answer, and the tools the model may call. Errors: TrainingError."""
    if not isinstance(values, dict):
        raise TrainingError(f"{where} holds {shown(values)}, expected an object.\n{EXPECTED}")
    tools = check_tools(values.get("tools"), f"{where}: tools", fault=TrainingError)
    if "prompt" in values:
        prompt, answer = (
            check_text(values.get(k), f"{where}: {k}", fault=TrainingError) for k in ("prompt", "completion")
        )
        return [{"role": "user", "content": prompt}], answer, tools
    if "messages" not in values:
        raise TrainingError(f"{where} has neither messages nor prompt and completion.\n{EXPECTED}")
    *before, last = check_messages(values["messages"], f"{where}: messages", fault=TrainingError)
    answer = last.get("content")
    if last["role"] not in ("assistant", "model") or not isinstance(answer, str):
        raise TrainingError(f"{where}: the last message is no text by the assistant.\n{EXPECTED}")
    if not before:
        raise TrainingError(f"{where}: there is no message before the answer.\n{EXPECTED}")
    return before, answer, tools


def ends_of(tokenizer: Tokenizer, fill: str) -> Ends:
    """An answer is closed by <turn|> and filled up with <eos>, or with <turn|> again; a tokenizer that lacks one of
    them gives its own end of text. Errors: TrainingError when it has none."""
    named = [tokenizer.id_of(token) for token in ("<turn|>", "<eos>")]
    own = next(iter(tokenizer.stop_ids), None)
    turn, eos = (own if found is None else found for found in named)
    if turn is None or eos is None:
        raise TrainingError("the tokenizer has no <turn|>, no <eos> and no eos_token: nothing can end an answer.")
    return Ends(turn, eos if fill == "eos" else turn)
