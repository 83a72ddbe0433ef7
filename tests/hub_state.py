"""What the tests' Hub holds and who may touch it: users, repositories, commits, grants. No sockets here."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

import yaml

LICENSES = {
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "gpl-3.0",
    "llama3",
    "gemma",
    "openrail",
    "other",
    "unknown",
}
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class HubError(Exception):
    """An error answer. `code` becomes `X-Error-Code`, from which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message.replace("\n", " ")} | ({"X-Error-Code": code} if code else {})
        self.answer = reply({"error": message, **extra}, status, headers)


class Answer(NamedTuple):
    """What goes back to the client."""

    status: int
    body: bytes
    headers: dict[str, str]


def reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """`content` as JSON, or as plain text if it is a string."""
    text = isinstance(content, str)
    kind = "text/plain" if text else "application/json"
    return Answer(status, (content if text else json.dumps(content)).encode(), {"Content-Type": kind, **(headers or {})})


class User(NamedTuple):
    """Whom a token belongs to. `role` is "write" or "read"."""

    name: str
    orgs: Sequence[str] = ()
    role: str = "write"

    def member_of(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass
class Request:
    """One request. `path` is still quoted, `user` is None for an anonymous one."""

    method: str
    path: str
    headers: Message
    body: bytes
    user: User | None = None

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    def flag(self, name: str) -> bool:
        """Whether a parameter is set; the client writes `1`, `true` or `True`."""
        return self.one(name).lower() in ("1", "true")

    def one(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[-1]

    def json(self) -> dict[str, Any]:
        content = json.loads(self.body or b"{}")
        if not isinstance(content, dict):
            raise ValueError("the body must be a JSON object")
        return content


class Blob(NamedTuple):
    """One file of a commit. `oid` is its git id, for an LFS file that of the pointer which git keeps in its place."""

    oid: str
    sha256: str
    size: int
    lfs: dict[str, Any] | None

    @classmethod
    def of(cls, sha256: str, data: bytes, lfs: bool) -> Blob:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        kept = pointer if lfs else data
        oid = hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()
        return cls(oid, sha256, len(data), {"oid": sha256, "size": len(data), "pointerSize": len(pointer)} if lfs else None)


class Commit(NamedTuple):
    """An immutable snapshot of all files."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A repository: commits, and the names that point at them."""

    kind: str
    id: str
    private: bool
    created: str = field(default_factory=_now)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def url_path(self) -> str:
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    def resolve(self, revision: str) -> Commit:
        """The commit behind a branch, a tag, a `refs/...` name, or the id of a commit (7 digits or more)."""
        for names, prefix in ((self.branches, "refs/heads/"), (self.tags, "refs/tags/"), (self.pulls, "")):
            if oid := names.get(revision) or names.get(revision.removeprefix(prefix)):
                return self.commits[oid]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for oid, commit in self.commits.items():
                if oid.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, parent: Commit | None, files: dict[str, Blob], title: str, message: str, author: str) -> Commit:
        tree = sorted((path, blob.oid) for path, blob in files.items())
        identity = repr((self.kind, self.id, len(self.commits), parent and parent.oid, tree, title, message, author))
        oid = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent and parent.oid, title, message, author, _now(), dict(files))
        return self.commits[oid]


def read_card(text: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """The metadata of a README, what the Hub refuses in it, and what it only warns of."""
    front = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if not front:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(front[1]) or {}
    except yaml.YAMLError as error:
        return {}, [f"Invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return {}, ["YAML metadata must be a mapping"], []
    values = {key: value if isinstance(value, list) else [value] for key, value in data.items() if value is not None}
    errors = [
        f'"license" must be one of the known licenses, not {name!r}'
        for name in values.get("license", [])
        if name not in LICENSES
    ]
    for key in ("base_model", "datasets"):
        wrong = [name for name in values.get(key, []) if not (isinstance(name, str) and REPO_ID.fullmatch(name))]
        errors += [f'"{key}" with value {name!r} is not valid. Use an id from the Hub.' for name in wrong]
    errors += [f'"tags" must be strings, not {tag!r}' for tag in values.get("tags", []) if not isinstance(tag, str)]
    return data, errors, []


class Grant(NamedTuple):
    """What a signed link of the storage allows."""

    method: str
    repo: Repo
    sha256: str
    size: int


class Hub:
    """The content, and the rules of access. `users` maps a token to `(name, organisations[, role])`."""

    def __init__(self, users: Mapping[str, Sequence[Any]], *, lfs: bool = True, redirect: bool = True) -> None:
        self.users = {token: User(*user) for token, user in users.items()}
        self.lfs, self.redirect, self.page_size = lfs, redirect, 1000
        self.objects: dict[str, bytes] = {}  # contents by their sha256
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind ("model", "dataset", "space") and id
        self.grants: dict[str, Grant] = {}
        self.endpoint = self.storage = ""

    def authenticate(self, request: Request) -> None:
        """Sets the request's user; an unknown token is refused even where none is needed."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        request.user = self.users.get(token)

    def writer(self, request: Request) -> User:
        """The user, if the token may write at all."""
        if request.user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if request.user.role != "write":
            raise HubError(403, "This token has no write permission: use a token with the role write")
        return request.user

    def visible(self, repo: Repo, user: User | None) -> bool:
        return not repo.private or (user is not None and user.member_of(repo.namespace))

    def repo(self, request: Request, kind: str, repo_id: str, write: bool = False) -> Repo:
        """The repository, if the request may read it (and write to it). What one may not see does not exist."""
        repo = self.repos.get((kind, repo_id))
        if repo is None or not self.visible(repo, request.user):
            anonymous = request.user is None
            message = "Invalid username or password." if anonymous else "Repository not found"
            raise HubError(401 if anonymous else 404, message, "RepoNotFound")
        if write and not self.writer(request).member_of(repo.namespace):
            raise HubError(403, f"You have no write access to {repo_id}")
        return repo

    def put(self, data: bytes, lfs: bool = False) -> Blob:
        digest = hashlib.sha256(data).hexdigest()
        self.objects[digest] = data
        return Blob.of(digest, data, lfs)

    def signed(self, grant: Grant, name: str) -> str:
        """A link of the storage, which needs no token."""
        key = secrets.token_hex(16)
        self.grants[key] = grant
        return f"{self.storage}/storage/{key}/{quote(name)}"

    def read(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """All files of a revision, for assertions: no request, no authorization."""
        files = self.repos[kind, repo_id].resolve(revision).files
        return {path: self.objects[blob.sha256] for path, blob in files.items()}
