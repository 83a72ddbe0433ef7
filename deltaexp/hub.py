"""Deltas on the Hugging Face Hub: fetched with their checks, pushed and read back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaexp import checkpoint
from deltaexp.card import REPO_ID
from deltaexp.errors import CheckpointError, ConfigError, HubError
from deltaexp.interop.opendelta import PICKLED

FILES = [checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.MANIFEST, PICKLED]
"""What loading a delta needs, OpenDelta's tensors among it."""


def fetch(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a delta: ``path_or_repo`` itself if it is one, else its copy in the Hub's cache.

    Raises:
        CheckpointError: If it is neither a folder nor the name of a repository.
        HubError: If the repository cannot be fetched.
    """
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    if not REPO_ID.fullmatch(str(path_or_repo)):
        raise CheckpointError(
            f"There is no folder {str(path_or_repo)!r}, and it is no name of a repository on the Hub either, which would "
            "look like 'DeltaHub/sst2-t5-base'."
        )
    from huggingface_hub import snapshot_download

    with _explained(f"The delta {str(path_or_repo)!r} (which is no folder here) could not be fetched from the Hub"):
        found = Path(
            snapshot_download(
                str(path_or_repo),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                allow_patterns=FILES,
            )
        )
    if not (found / checkpoint.CONFIG).exists():
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"The repository {str(path_or_repo)!r}{at} holds no {checkpoint.CONFIG}, so it is no saved delta. "
            "Deltas may lie on another branch: name it with revision."
        )
    return found


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload the folder of a delta in one commit, then read every file back and compare its digest.

    Args:
        folder: A delta as `DeltaModel.save_finetuned` writes it.
        repo_id: The repository, made if it does not exist.
        private: Whether a repository made here is private; None takes the organisation's default.
        revision: A branch, made if it does not exist; None is the main one.
        token: Access token; None takes the one of ``hf auth login`` or ``HF_TOKEN``.
        message: Commit message.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: If the folder is no complete delta; nothing is uploaded.
        HubError: If the Hub refuses, cannot be reached or holds other bytes afterwards; the folder is untouched.
    """
    from huggingface_hub import HfApi, snapshot_download

    folder = Path(folder)
    if not REPO_ID.fullmatch(repo_id):
        raise ConfigError(f"{repo_id!r} is no name of a repository; it must look like 'DeltaHub/sst2-t5-base'.")
    saved = checkpoint.read(folder)
    if saved.manifest is None:
        raise CheckpointError(f"{str(folder)!r} has no manifest.json, and only deltas that can be checked are pushed.")
    names = tuple(sorted(saved.manifest.files))
    checkpoint.check_files(folder, saved.manifest, names)
    again = f"The delta is safe in {str(folder)!r}; push it later with: python -m deltaexp push {folder} {repo_id}"
    api = HfApi(token=token)
    with _explained(f"The delta could not be pushed to {repo_id!r}", again):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[*names, checkpoint.MANIFEST],
            revision=revision,
            commit_message=message or f"Add a {saved.config.delta_type} delta trained with deltaexp",
        )
    with (
        tempfile.TemporaryDirectory() as copy,
        _explained(f"The delta was pushed to {repo_id!r} but could not be read back", again),
    ):
        snapshot_download(
            repo_id, revision=commit.oid, token=token, local_dir=copy, allow_patterns=[*names, checkpoint.MANIFEST]
        )
        found = checkpoint.read_manifest(Path(copy))
        if found is None or found.to_json() != saved.manifest.to_json():
            raise HubError(f"The manifest.json that {repo_id!r} holds now is not the one that was pushed. {again}")
        try:
            checkpoint.check_files(Path(copy), found, names)
        except CheckpointError as error:
            raise HubError(f"What {repo_id!r} holds now is not what was pushed: {error} {again}") from error
    return commit.commit_url


@contextmanager
def _explained(what: str, advice: str = "") -> Iterator[None]:
    """Turn the client's errors into one `HubError` that says what could not be done, why, and what to do."""
    from huggingface_hub import errors

    reasons: list[tuple[Any, str]] = [
        (errors.LocalTokenNotFoundError, "there is no access token: run `hf auth login` or set HF_TOKEN"),
        (errors.GatedRepoError, "the repository is gated: ask for access on its page"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (
            errors.RepositoryNotFoundError,
            "there is no such repository, or your token may not see it (run `hf auth login` or set HF_TOKEN)",
        ),
        (errors.LocalEntryNotFoundError, "it is not in the cache, and the Hub cannot be reached"),
        (errors.OfflineModeIsEnabled, "offline mode is on (HF_HUB_OFFLINE)"),
        (errors.HfHubHTTPError, ""),
        (errors.HTTPError, "the Hub cannot be reached"),  # of httpx or httpx2, whichever this client uses
        (OSError, "the Hub cannot be reached"),
        (ValueError, "the Hub's client refuses it"),
    ]
    try:
        yield
    except tuple(kind for kind, _ in reasons) as error:
        reason = next(text for kind, text in reasons if isinstance(error, kind))
        status = getattr(getattr(error, "response", None), "status_code", None)
        if not reason:
            reason = {
                401: "the access token is missing or not valid: run `hf auth login` or set HF_TOKEN",
                403: "your token may not write there: use one with write access",
            }.get(status or 0, "the Hub answered with an error")
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        said = f" ({first_line.strip()})"
        raise HubError(f"{what}: {reason}{said}. {advice}".strip()) from error
