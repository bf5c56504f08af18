"""The Hugging Face Hub: repositories to folders, packs to repositories. Only this room knows huggingface_hub."""

import re
from pathlib import Path

from ..config import RELEASED
from ..disk import is_junk, reason, user_path
from ..errors import CheckpointError, ConfigError, TrainingError
from ..values import shown
from .folder import SIDECARS

PACKS = tuple(f"mlx-community/diffusiongemma-26B-A4B-it-{kind}" for kind in ("4bit", "8bit", "bf16"))


def resolve(
    path_or_repo: str | Path, revision: str | None = None, *, weights: bool = True, option: str = "model"
) -> Path:
    """A local folder as it is, or a Hub repository downloaded (resumably) into the Hub's cache.

    `weights=False` fetches everything but the tensors; `option` is what errors call the path. Errors: CheckpointError
    for a folder or repository that is absent, gated or unreachable, with the nearest name; ConfigError for a revision
    of a local folder.
    """
    if not isinstance(path_or_repo, str | Path):
        raise CheckpointError(f"the model's path is {shown(path_or_repo)}, expected a folder or a Hub repository.")
    folder = user_path(path_or_repo, option)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:
        raise CheckpointError(f"{option} {str(folder)[:120]} cannot be used: {reason(error)}.") from None
    if is_folder:
        if revision is not None:
            raise ConfigError(f"{folder} is a local folder; a revision ({revision}) exists only on the Hub.")
        return folder
    if exists:
        raise CheckpointError(f"{folder} is a file; expected the folder of a checkpoint.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path_or_repo)):
        raise CheckpointError(f"there is no folder {folder}.{_nearest_folder(folder)}")
    if revision is not None and not isinstance(revision, str):
        raise ConfigError(f"revision is {shown(revision)}, expected a branch, a tag or a commit.")
    return _download(str(path_or_repo), revision, weights)


def _nearest_folder(folder: Path) -> str:
    import difflib

    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir() and not is_junk(path.name)]
    except OSError:
        return f" A Hub repository is written owner/name, as {RELEASED}."
    close = difflib.get_close_matches(folder.name, names, n=1)
    return f" Did you mean {folder.parent / close[0]}?" if close else f" {folder.parent} has no folder like it."


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    import difflib

    from huggingface_hub import errors, snapshot_download

    patterns = ["*.json", "*.jinja", "tokenizer.model"] + (["model*.safetensors", *SIDECARS] if weights else [])
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then run `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        close = difflib.get_close_matches(repo, (RELEASED, *PACKS), n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise CheckpointError(f"there is no folder and no Hub repository {repo}, or it is private.{hint}") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision!r}.") from None
    except Exception as error:  # the errors of its HTTP library are of no common kind
        raise CheckpointError(
            f"{repo} is not a folder here and cannot be fetched from the Hub: {_why(error)}"
        ) from None


def _why(error: Exception) -> str:
    """The first sentence of a failure of the Hub's, or why the disk refused."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    unreached = isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError)
    if unreached or re.search("Connect|Timeout", type(error).__name__):  # of whichever HTTP library it has
        return "no connection to the Hub."
    if isinstance(error, OSError) and error.errno is not None:
        return f"{reason(error)}."
    text = (str(error).strip().splitlines() or ["no answer"])[0]
    return text if len(text) <= 160 else f"{text[:159]}…"


def check_upload(repo: str) -> None:
    """Errors: CheckpointError unless someone is logged in who could upload; asked before hours of work."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:
        raise CheckpointError(
            f"cannot upload to {repo}: {_why(error)}\nRun `hf auth login`, or leave out the upload."
        ) from None


def upload(folder: Path, repo: str) -> None:
    """Upload a pack; what the Hub already has is not sent twice."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:
        raise CheckpointError(f"{folder} is complete, its upload to {repo} failed: {_why(error)}") from None


def dataset(repo: str) -> Path:
    """The .jsonl files of a dataset repository, downloaded. Errors: TrainingError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=["*.jsonl"]))
    except Exception as error:
        raise TrainingError(f"--data {repo} is no folder and no dataset that can be fetched: {_why(error)}") from None
