"""Pushing a delta to the Hugging Face Hub: in one commit, read back and compared, whatever goes wrong on the way."""

from __future__ import annotations

import glob
import hashlib
import json
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaexp import checkpoint, verification
from deltaexp.card import check_card
from deltaexp.checksum import file_sha256
from deltaexp.errors import CardError, CheckpointError, HubConflictError, HubError, UnsafeFileError, listing
from deltaexp.hubclient import check_push, explained, log, persistently, status
from deltaexp.manifest import MANIFEST, is_plain_name

ROUNDS = 3
"""How often a push begins anew when somebody else has made a commit in the meantime."""


@dataclass(frozen=True)
class Pushed:
    """What a push has left on the Hub."""

    url: str
    """The address of the commit, or of the pull request."""
    commit: str
    """The commit that was read back and verified."""


@dataclass(frozen=True)
class _File:
    path: Path
    sha256: str
    git: str
    """The name that git gives to the content."""


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    parent_commit: str | None = None,
    token: str | None = None,
    message: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Pushed:
    """Upload the folder of a delta in one commit, then read every file back and compare its digest.

    What is wrong with the delta, its card or the wishes is told before anything is made or uploaded. While the Hub fails in a
    way that may pass (5xx, 429 with its ``Retry-After``, broken connections), the steps are repeated, and said so. A commit
    whose answer was lost is found again. Files of an earlier delta that the new one does not have go in the same commit.

    Args:
        folder: A delta as `DeltaModel.save_finetuned` writes it.
        repo_id: The repository, made if it does not exist.
        private: Whether the repository is private; None takes the organisation's default for a new one, and what an old one is.
        revision: A branch, made if it does not exist; None is the main one.
        tag: A name for the commit.
        create_pr: Propose the commit in a pull request instead of making it.
        parent_commit: Push only if this is the last commit there.
        token: Access token; None takes the one of ``hf auth login`` or ``HF_TOKEN``.
        message: Commit message.
        say: Takes the sentences that say what is waited for; the log where none is given.

    Raises:
        ConfigError: If a name is none, or two wishes contradict one another.
        CheckpointError: If the folder is no complete delta, or a file of it lies elsewhere.
        CardError: If the Hub would refuse the model card.
        HubConflictError: If the repository has moved on from ``parent_commit``, or is not what was asked for.
        HubError: If the Hub refuses, cannot be reached or holds other bytes afterwards; the folder is untouched.
    """
    from huggingface_hub import HfApi

    check_push(repo_id, revision=revision, tag=tag, create_pr=create_pr, parent_commit=parent_commit)
    files = _checked(Path(folder))
    saved = checkpoint.read_config(Path(folder))
    wishes = {"private": private, "revision": revision, "tag": tag, "create_pr": create_pr or None, "message": message}
    again = resume_command(folder, repo_id, {**wishes, "parent_commit": parent_commit})
    upload = _Upload(HfApi(token=token), repo_id, revision, files, log.warning if say is None else say)
    advice = f"The delta is safe in {str(folder)!r}; push it later with: {again}"
    with explained(f"The delta could not be pushed to {repo_id!r}", advice, token):
        upload.check_card(advice)
        upload.make(private, create_pr, again)
        if tag is not None:
            upload.check_tag(tag, again)
        title = message or f"Add a {saved.delta_type} delta trained with deltaexp"
        pushed = upload.commit(title, parent_commit, create_pr, resume_command(folder, repo_id, wishes))
    with explained(f"The delta was pushed to {repo_id!r} but could not be read back", advice, token):
        upload.read_back(pushed.commit, advice)
    if tag is not None:
        with explained(f"The delta was pushed to {repo_id!r} and verified, but not tagged", advice, token):
            upload.set_tag(tag, pushed.commit)
    return pushed


def resume_command(folder: str | Path, repo_id: str, wishes: dict[str, Any]) -> str:
    """Return the command that pushes a folder with the same wishes."""
    words = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in wishes.items()
        if value is not None
    ]
    return shlex.join(["python", "-m", "deltaexp", "push", str(folder), repo_id, *words])


def _checked(folder: Path) -> dict[str, _File]:
    """Return the files of a delta that is complete, unchanged and has nothing of this machine in it.

    Raises:
        CheckpointError: If it is not.
    """
    # Before anything is read: a link may lead to what is nobody else's business.
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UnsafeFileError(
                f"{str(path)!r} is a link that leads out of the folder of the delta, and what lies elsewhere is not pushed. "
                f"If you mean its content, copy the folder with its files first: cp -rL {shlex.quote(str(folder))} FOLDER"
            )
    saved = checkpoint.read(folder)
    if saved.manifest is None:
        raise CheckpointError(f"{str(folder)!r} has no {MANIFEST}, and only deltas that can be checked are pushed.")
    verification.check_saved(saved)
    names = sorted(saved.manifest.files)
    home = f"{Path.home()}/".encode()
    files = {name: _file(folder / name) for name in [*names, MANIFEST]}
    for name in files:
        if not name.endswith(".safetensors") and len(home) > 2 and home in (folder / name).read_bytes():
            raise UnsafeFileError(
                f"{str(folder / name)!r} names your home folder, which is nobody else's business, so it is not pushed. "
                "Save the delta anew with this version of deltaexp, which leaves folders of yours out."
            )
    if checkpoint.CARD not in files:
        raise CardError(f"{str(folder)!r} has no model card {checkpoint.CARD}. Save the delta anew.")
    check_card((folder / checkpoint.CARD).read_text(encoding="utf-8"))
    return files


def _file(path: Path) -> _File:
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            git.update(chunk)
    return _File(path, file_sha256(path), git.hexdigest())


class _Upload:
    """The steps of a push; each may be repeated."""

    def __init__(
        self, api: Any, repo_id: str, revision: str | None, files: dict[str, _File], say: Callable[[str], None]
    ) -> None:
        self.api, self.repo_id, self.revision, self.files, self.say = api, repo_id, revision, files, say
        self.branch = revision or "main"

    def _do(self, what: str, action: Callable[[], Any], done: Callable[[], Any] | None = None) -> Any:
        return persistently(what, action, done=done, say=self.say)

    def check_card(self, advice: str) -> None:
        """Let the Hub judge the card, as its client does before an upload."""
        from huggingface_hub import ModelCard

        text = self.files[checkpoint.CARD].path.read_text(encoding="utf-8")
        try:
            self._do(
                "checking the model card", lambda: ModelCard(text, ignore_metadata_errors=True).validate(repo_type="model")
            )
        except ValueError as error:
            raise CardError(f"The Hub refuses the model card: {str(error).strip()} Nothing was uploaded. {advice}") from error

    def make(self, private: bool | None, create_pr: bool, again: str) -> None:
        """Make the repository and the branch where they are not there."""
        self._do("making the repository", lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
        if private is not None:
            found = self._do("asking for the repository", lambda: self.api.model_info(self.repo_id)).private
            if bool(found) != private:
                is_now, wanted = ("private", "public") if found else ("public", "private")
                raise HubConflictError(
                    f"The repository {self.repo_id!r} is there already and is {is_now}, and {wanted} was asked for. Nothing "
                    f"was uploaded. Set it in its settings on the Hub, name another repository, or leave private out: {again}"
                )
        if self.revision not in (None, "main") and not str(self.revision).startswith("refs/"):
            self._do(
                "making the branch",
                lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True),
            )

    def head(self) -> str:
        """Return the last commit of the branch."""
        return str(self._do("asking for the last commit", lambda: self.api.model_info(self.repo_id, revision=self.branch)).sha)

    def listed(self, revision: str) -> dict[str, str]:
        """Return the files of a commit with the digest that the Hub tells of each: sha256, or git's where it is small."""
        from huggingface_hub.hf_api import RepoFile

        def action() -> dict[str, str]:
            entries = self.api.list_repo_tree(self.repo_id, revision=revision, recursive=True)
            return {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in entries if isinstance(e, RepoFile)}

        return self._do("listing the files", action)

    def holds(self, revision: str) -> bool:
        """Say whether a commit has the delta, all of it, and nothing left of another."""
        found = self.listed(revision)
        same = all(found.get(name) in (file.sha256, file.git) for name, file in self.files.items())
        return same and not self.outdated(revision, found)

    def outdated(self, revision: str, found: dict[str, str]) -> list[str]:
        """Return the files of another delta that a commit has and this delta has not: those that the manifest there lists."""
        if found.get(MANIFEST) in (None, self.files[MANIFEST].sha256, self.files[MANIFEST].git):
            return []
        with tempfile.TemporaryDirectory() as folder:

            def action() -> str:
                return self.api.hf_hub_download(self.repo_id, MANIFEST, revision=revision, local_dir=folder)

            text = Path(self._do("reading what is there", action)).read_text(encoding="utf-8", errors="replace")
        try:
            names = list(json.loads(text)["files"])
        except (ValueError, KeyError, TypeError):
            return []  # it is nobody's manifest, so nothing is known of what belongs to it
        return sorted(name for name in names if is_plain_name(name) and name in found and name not in self.files)

    def check_tag(self, tag: str, again: str) -> None:
        """Refuse a tag that names something else already, before anything is uploaded."""
        target = self._tags().get(tag)
        if target is not None and not self.holds(target):
            raise HubConflictError(
                f"The tag {tag!r} of {self.repo_id!r} names another delta already, in the commit {target[:12]}. Nothing was "
                f"uploaded. Choose another tag: {again}"
            )

    def _tags(self) -> dict[str, str]:
        refs = self._do("listing the tags", lambda: self.api.list_repo_refs(self.repo_id))
        return {ref.name: ref.target_commit for ref in refs.tags}

    def commit(self, title: str, parent: str | None, create_pr: bool, again: str) -> Pushed:
        """Make the commit, or find that it is there; it goes onto the commit that was looked at, and on no other."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        pulls = self._pulls() if create_pr else {}
        for left in reversed(range(ROUNDS)):
            head = self.head()
            if not create_pr and self.holds(head):
                return self._committed(head)
            if parent is not None and not create_pr and not head.startswith(parent):
                raise self._moved(parent, head, again)
            base = parent if create_pr and parent else head
            gone = self.outdated(base, self.listed(base))

            def action(base: str = base, gone: list[str] = gone) -> Pushed:
                # Made anew for each attempt: the client writes into them what it has done.
                adds = [CommitOperationAdd(name, str(file.path)) for name, file in self.files.items()]
                info = self.api.create_commit(
                    self.repo_id,
                    [*adds, *(CommitOperationDelete(name) for name in gone)],
                    commit_message=title,
                    revision=self.revision,
                    create_pr=create_pr,
                    # Without it the client's choice of what to send could go with a commit that somebody else has made since.
                    parent_commit=base,
                )
                return Pushed(info.pr_url or info.commit_url, info.oid)

            def done(base: str = base) -> Pushed | None:
                if create_pr:
                    new = {name: oid for name, oid in self._pulls().items() if name not in pulls}
                    found = next((name for name, oid in new.items() if self.holds(oid)), None)
                    number = str(found).rsplit("/", 1)[-1]
                    return Pushed(f"{self.api.endpoint}/{self.repo_id}/discussions/{number}", new[found]) if found else None
                now = self.head()
                return self._committed(now) if now != base and self.holds(now) else None

            try:
                return self._do("the commit", action, done)
            except Exception as error:
                if status(error) not in (409, 412):
                    raise
                if parent is not None or not left:
                    raise self._moved(parent or base, self.head(), again) from None
                self.say("the commit: somebody else has made one in the meantime; looking at it and beginning anew")
        raise AssertionError("unreachable")

    def _committed(self, oid: str) -> Pushed:
        return Pushed(f"{self.api.endpoint}/{self.repo_id}/commit/{oid}", oid)

    def _pulls(self) -> dict[str, str]:
        def action() -> Any:
            return self.api.list_repo_refs(self.repo_id, include_pull_requests=True)

        found = self._do("listing the pull requests", action)
        return {ref.ref: ref.target_commit for ref in found.pull_requests or []}

    def _moved(self, parent: str, head: str, again: str) -> HubConflictError:
        try:
            last = next(iter(self.api.list_repo_commits(self.repo_id, revision=head)))
            what = f" ({last.title!r}, by {listing(last.authors)}, {last.created_at:%Y-%m-%d %H:%M} UTC)"
        except Exception:  # what the commit is called is a help only
            what = ""
        return HubConflictError(
            f"{self.repo_id!r} has moved: the delta was to go onto the commit {parent[:12]} of {self.branch!r}, and the last "
            f"one there is {head[:12]} now{what}. Nothing was changed there and nothing here. Look at what is new, then push "
            f"onto it: {again} parent_commit={head}"
        )

    def read_back(self, commit: str, advice: str) -> None:
        """Download every file of the commit and compare its digest; twice where bytes differ, as a download may fail."""
        wrong: list[str] = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as copy:
                self._download(commit, Path(copy))
                found = {name: Path(copy, name) for name in self.files}
                wrong = [n for n, p in found.items() if not p.exists() or file_sha256(p) != self.files[n].sha256]
            if not wrong:
                return
            self.say(f"reading back: {listing(wrong)} came back with other bytes than were sent; reading once more")
        raise HubError(
            f"What {self.repo_id!r} holds now is not what was pushed: {listing(wrong)} in the commit {commit[:12]} came back "
            f"with other bytes, twice. Who loads it is refused. {advice}"
        )

    def _download(self, commit: str, folder: Path) -> None:
        from huggingface_hub import snapshot_download

        def action() -> None:
            snapshot_download(
                self.repo_id,
                revision=commit,
                token=self.api.token,
                local_dir=folder,
                allow_patterns=[glob.escape(name) for name in self.files],
            )

        self._do("reading back", action)

    def set_tag(self, tag: str, commit: str) -> None:
        """Name the commit; a tag that names the same delta already is left as it is."""
        if tag not in self._tags():
            self._do(
                "setting the tag",
                lambda: self.api.create_tag(self.repo_id, tag=tag, revision=commit),
                lambda: True if self._tags().get(tag) == commit else None,
            )
