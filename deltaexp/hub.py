"""Deltas on the Hugging Face Hub: fetched into its cache, no more than is needed, and checked there."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaexp import checkpoint
from deltaexp.checksum import file_sha256
from deltaexp.errors import CheckpointError, DamagedFileError, HubError, MissingFileError, UnsafeFileError
from deltaexp.hubclient import COMMIT, explained, is_repo_id, passing, persistently, status
from deltaexp.interop.opendelta import PICKLED
from deltaexp.manifest import DAMAGED, MANIFEST, check_files, read_manifest
from deltaexp.redaction import redact

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a PEFT adapter."""
HEADS = (checkpoint.CONFIG, MANIFEST, ADAPTER_CONFIG)
"""The small files that tell what a repository holds, and so what else is needed of it."""
ATTEMPTS = 3
"""How often a step of fetching is tried while the Hub fails in a way that may pass."""
NEEDS = ("config", "delta", "all")


def fetch(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    needs: str = "delta",
) -> Path:
    """Return the folder of a delta: ``path_or_repo`` itself if it is one, else its copy in the Hub's cache.

    What was fetched is compared with the manifest; where a file of the cache is damaged and the Hub can be reached, it is
    downloaded once more, with a warning. Where the Hub cannot be asked, the copy in the cache is returned with a warning that
    it may be stale; offline by wish (``local_files_only``, ``HF_HUB_OFFLINE``) there is none.

    Args:
        path_or_repo: A folder, or the name of a repository.
        revision: Branch, tag or commit; None is the main branch.
        token: Access token; None takes the one of ``hf auth login`` or ``HF_TOKEN``.
        cache_dir: The cache; None is the Hub's own.
        force_download: Download everything anew.
        local_files_only: Do not ask the Hub.
        needs: What is needed of it: ``config``, ``delta`` (which loading needs), or ``all`` that its manifest lists.

    Raises:
        CheckpointError: If it is neither a folder nor the name of a repository, or holds no delta.
        DamagedFileError: If a file is not the one that was pushed.
        MissingFileError: If the repository lacks a file.
        UnsafeFileError: If a name in the repository leads out of its folder.
        HubError: If the repository cannot be fetched.
    """
    folder, repo = Path(path_or_repo), str(path_or_repo)
    if folder.is_dir():
        return folder
    if not is_repo_id(repo):
        raise CheckpointError(
            f"There is no folder {repo!r}, and it is no name of a repository on the Hub either, which would look like "
            "'DeltaHub/sst2-t5-base'."
        )
    with explained(f"The delta {repo!r} (which is no folder here) could not be fetched from the Hub", token=token):
        source = _Source(repo, revision, token, cache_dir, local_files_only)
        found = source.download(HEADS, revision, force_download)
        source.warn_if_stale(found)
        source.check_names(found)
        names = source.needed(found, needs)
        if names:
            source.download(names, found.name, force_download)
        try:
            _check(found, names)
        except DamagedFileError as error:
            if source.offline or source.unreachable:
                raise
            warnings.warn(
                f"A file of {repo!r} in the cache is damaged, so the delta is downloaded again. What was found: {error}",
                stacklevel=3,
            )
            source.download([*HEADS, *names], found.name, force=True)
            _check(found, source.needed(found, needs))
    return found


class _Source:
    """A repository, and how it is to be asked."""

    def __init__(
        self, repo: str, revision: str | None, token: str | None, cache_dir: str | Path | None, local_files_only: bool
    ) -> None:
        from huggingface_hub import constants

        self.repo, self.revision, self.token, self.cache_dir = repo, revision, token, cache_dir
        self.offline = local_files_only or bool(constants.HF_HUB_OFFLINE)
        self.local_files_only = local_files_only
        self.unreachable = "" if self.offline or COMMIT.fullmatch(revision or "") else self._silence()

    def _silence(self) -> str:
        """Return why the Hub does not say which commit is the newest; the empty string where it does.

        The client would take what is in its cache then, without a word.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=self.token)
        try:
            self._do(lambda: api.model_info(self.repo, revision=self.revision, timeout=10))
        except Exception as error:
            if not passing(error):  # an answer: there is no such repository, say, or it is not for everybody
                raise
            code = status(error)
            return redact(f"it answered {code}" if code else f"{type(error).__name__}: {error}", [self.token])
        return ""

    def _do(self, action: Any) -> Any:
        return persistently(f"fetching {self.repo}", action, attempts=ATTEMPTS, connect=False)

    def download(self, names: Sequence[str], revision: str | None, force: bool) -> Path:
        """Fetch files by their names, those that are there, and return their folder in the cache."""
        from huggingface_hub import errors, snapshot_download

        def action() -> str:
            return snapshot_download(
                self.repo,
                revision=revision,
                token=self.token,
                cache_dir=self.cache_dir,
                force_download=force,
                local_files_only=self.local_files_only or bool(self.unreachable),
                allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in names],
            )

        if not self.unreachable:
            return Path(self._do(action))
        try:
            return Path(action())
        except errors.LocalEntryNotFoundError as error:
            raise HubError(
                f"The delta {self.repo!r} (which is no folder here) is not in the Hub's cache, or not all of it, and the Hub "
                f"cannot be reached: {self.unreachable}."
            ) from error

    def warn_if_stale(self, found: Path) -> None:
        """Say that the commit in the cache may not be the newest."""
        if self.unreachable:
            day = time.strftime("%Y-%m-%d", time.localtime(found.stat().st_mtime))
            warnings.warn(
                f"The Hub could not be asked for the newest commit of {self.repo!r} ({self.unreachable}), so the one in the "
                f"cache is used: {found.name[:12]}, fetched on {day}, revision {self.revision or 'main'!r}. It may be stale. "
                "To have no doubt, name the commit: revision=...",
                stacklevel=4,
            )

    def check_names(self, found: Path) -> None:
        """Refuse a repository in which a name leads out of its folder.

        Raises:
            UnsafeFileError: If one does.
        """
        import huggingface_hub
        from huggingface_hub import errors

        listed: list[str] = []
        if hasattr(huggingface_hub, "get_cached_repo_tree"):  # older clients keep no list
            try:
                entries = huggingface_hub.get_cached_repo_tree(self.repo, revision=found.name, cache_dir=self.cache_dir)
                listed = [entry.path for entry in entries]
            except (OSError, getattr(errors, "CachedRepoTreeNotFoundError", OSError)):
                listed = []  # an older client fetched it
        for name in listed:
            if name.startswith(("/", "~")) or set(name) & set("\\:\0") or {"..", "."} & set(name.split("/")):
                raise UnsafeFileError(
                    f"The repository {self.repo!r} lists a file {name!r}, which would lie outside of its folder. Do not "
                    "use it: somebody made it by hand."
                )
        home = found.parent.parent.resolve()
        for path in found.iterdir() if found.is_dir() else []:
            if not path.resolve().is_relative_to(home):
                raise UnsafeFileError(
                    f"{str(path)!r} in the Hub's cache is a link that leads out of the cache's folder. Delete {str(home)!r} "
                    "and fetch the delta again."
                )

    def needed(self, found: Path, needs: str) -> list[str]:
        """Return the names of the files that are needed besides the small ones.

        Raises:
            CheckpointError: If the repository holds no delta.
            UnsafeFileError: If the manifest names a file outside of its folder.
        """
        config, adapter, manifest = ((found / name).exists() for name in (checkpoint.CONFIG, ADAPTER_CONFIG, MANIFEST))
        if not (config or adapter):
            at = f" at revision {self.revision!r}" if self.revision else ""
            raise CheckpointError(
                f"The repository {self.repo!r}{at} holds no {checkpoint.CONFIG}, so it is no saved delta. "
                "Deltas may lie on another branch: name it with revision."
            )
        if manifest and config:
            if needs == "all":
                listed = read_manifest(found)
                return sorted(listed.files) if listed else []
            return [] if needs == "config" else [checkpoint.WEIGHTS]
        if adapter:
            return [ADAPTER_WEIGHTS]
        # Without a manifest: what an old version of deltaexp saved, or OpenDelta, whose tensors are in a pickle.
        opendelta = "opendelta_version" in (found / checkpoint.CONFIG).read_text(encoding="utf-8", errors="replace")
        return [PICKLED] if opendelta else [checkpoint.WEIGHTS]


def _check(found: Path, names: Sequence[str]) -> None:
    """Compare what was fetched with the manifest, or, where there is none, with the names that the cache gives to contents.

    Raises:
        MissingFileError: If a file is not there.
        DamagedFileError: If one has other bytes.
    """
    for name in names:
        if not (found / name).exists():
            raise MissingFileError(
                f"The repository is not complete: it has no {name}, without which the rest of {str(found)!r} is no delta. "
                "Nothing was loaded; whoever made it must push it again."
            )
    manifest = read_manifest(found) if (found / checkpoint.CONFIG).exists() else None
    if manifest is not None:
        check_files(found, manifest, [checkpoint.CONFIG, *(name for name in names if name != checkpoint.CONFIG)])
        return
    for name in names:
        content = (found / name).resolve().name  # of a large file, its sha256
        if re.fullmatch("[0-9a-f]{64}", content) and (found / name).is_symlink() and file_sha256(found / name) != content:
            raise DamagedFileError(f"{str(found / name)!r} is not the file that the Hub has. {DAMAGED}")
