"""What the tests' Hub answers: one function for each endpoint, from a request to an answer."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from hub_state import REPO_ID, Answer, Blob, Commit, Grant, Hub, HubError, Repo, Request, read_card, reply

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".onnx", ".parquet", ".zip")
MAX_REGULAR_BYTES = 10 * 2**20
_REF_NAME = re.compile(r"(?!refs/)\w[\w./-]*")
_LIST_FIELDS = ["_id", "id", "modelId", "private", "downloads", "likes", "tags", "createdAt"]
_LIST_FIELDS += ["pipeline_tag", "library_name"]

_Handler = Callable[..., Answer]
_ROUTES: list[tuple[str, re.Pattern[str], _Handler]] = []
_REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"


def route(methods: str, pattern: str) -> Callable[[_Handler], _Handler]:
    """Registers `handler(hub, request, **groups)`; the groups of the pattern arrive unquoted."""

    def register(handler: _Handler) -> _Handler:
        _ROUTES.extend((method, re.compile(pattern), handler) for method in methods.split())
        return handler

    return register


def dispatch(hub: Hub, request: Request) -> Answer:
    """The answer of the endpoint that the request is for."""
    path = urlsplit(request.path).path
    for method, pattern, handler in _ROUTES:
        if method == request.method and (match := pattern.fullmatch(path)):
            return handler(hub, request, **{name: unquote(value or "") for name, value in match.groupdict().items()})
    raise HubError(404, f"this Hub has no {request.method} {path}")


def _page(hub: Hub, request: Request, items: Sequence[Any], size: int | None = None) -> Answer:
    """One page of a list, and the link to the next one."""
    start, size = int(request.one("cursor", "0")), min(size or hub.page_size, hub.page_size)
    query = urlencode({**request.query, "cursor": [str(start + size)]}, doseq=True)
    link = f'<{hub.endpoint}{urlsplit(request.path).path}?{query}>; rel="next"'
    return reply(items[start : start + size], headers={"Link": link} if start + size < len(items) else None)


def _content(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """A file, or the part of it that a Range header asks for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    match = re.fullmatch(r"bytes=(?!-$)(\d*)-(\d*)", request.headers.get("Range", ""))
    if not match:
        return Answer(200, data, headers)
    first = int(match[1]) if match[1] else max(0, len(data) - int(match[2]))
    last = min(int(match[2]), len(data) - 1) if match[1] and match[2] else len(data) - 1
    if first > last:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


def _info(hub: Hub, repo: Repo, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    """All that the Hub tells of a repository; lists show a part of it."""
    readme = commit.files.get("README.md")
    card = read_card(hub.objects[readme.sha256].decode())[0] if readme else {}
    bases, library = card.get("base_model") or [], card.get("library_name")
    bases = [bases] if isinstance(bases, str) else bases
    relation = card.get("base_model_relation") or ("adapter" if library == "peft" else None)
    tags = [*([library] if library else []), *(card.get("tags") or []), *(f"base_model:{base}" for base in bases)]
    tags += [f"base_model:{relation}:{base}" for base in bases if relation]
    tags += [f"license:{card['license']}"] if "license" in card else []
    tags += [f"dataset:{name}" for name in card.get("datasets") or []] + list(card.get("language") or [])
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in commit.files) else []
    siblings: list[dict[str, Any]] = []
    for path, blob in sorted(commit.files.items()):
        lfs = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.lfs["pointerSize"]} if blob.lfs else None
        siblings.append({"rfilename": path, **({"size": blob.size, "blobId": blob.oid, "lfs": lfs} if blobs else {})})
    info: dict[str, Any] = {"id": repo.id, "modelId": repo.id, "_id": hashlib.md5(repo.id.encode()).hexdigest()[:24]}
    info |= {"author": repo.namespace, "sha": commit.oid, "createdAt": repo.created, "cardData": card}
    info |= {"tags": list(dict.fromkeys(tags)), "library_name": library, "pipeline_tag": card.get("pipeline_tag")}
    info |= {"model-index": card["model-index"]} if "model-index" in card else {}
    info |= {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
    return {**info, "lastModified": repo.resolve("main").date, "siblings": siblings}


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    return {"type": "file", "path": path, "oid": blob.oid, "size": blob.size, **({"lfs": blob.lfs} if blob.lfs else {})}


@route("GET", "/api/agent-harnesses")
def _harnesses(hub: Hub, request: Request) -> Answer:
    return reply({"standardEnvVars": [], "harnesses": {}})


@route("GET", "/api/whoami-v2")
def _whoami(hub: Hub, request: Request) -> Answer:
    if (user := request.user) is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": user.role} for org in user.orgs]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
    return reply({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": token})


@route("POST DELETE", "/api/repos/(create|delete)")
def _repos(hub: Hub, request: Request) -> Answer:
    asked, user = request.json(), hub.writer(request)
    kind, repo_id = asked.get("type") or "model", f"{asked.get('organization') or user.name}/{asked['name']}"
    if request.method == "DELETE":
        hub.repo(request, kind, repo_id, write=True)
        del hub.repos[kind, repo_id]
        return reply({})
    url = f"{hub.endpoint}/{repo_id if kind == 'model' else f'{kind}s/{repo_id}'}"
    namespace = repo_id.split("/")[0]
    if not user.member_of(namespace):
        raise HubError(403, f"You don't have the rights to create a {kind} under the namespace {namespace!r}")
    if not REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id:
        raise ValueError(f"invalid repository name {repo_id!r}")
    if (kind, repo_id) in hub.repos:
        raise HubError(409, f"You already created this {kind} repo", url=url)
    repo = hub.repos[kind, repo_id] = Repo(kind, repo_id, asked.get("visibility") == "private")
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
    first = repo.commit(None, {".gitattributes": hub.put(attributes.encode())}, "initial commit", "", user.name)
    repo.branches["main"] = first.oid
    return reply({"url": url, "name": repo_id})


@route("POST", "/api/validate-yaml")
def _validate_yaml(hub: Hub, request: Request) -> Answer:
    _, errors, warnings = read_card(request.json()["content"])
    status = 400 if errors else 200
    if request.headers.get("Accept") == "text/plain":
        return reply("\n".join(errors), status)
    listed = {"errors": errors, "warnings": warnings}
    return reply({key: [{"message": text} for text in texts] for key, texts in listed.items()}, status)


@route("GET", "/api/(?P<kind>model|dataset|space)s")
def _list(hub: Hub, request: Request, kind: str) -> Answer:
    """Repositories that the user may see: by default a few fields of each, as the Hub does."""
    wanted = {tag for value in request.query.get("filter", []) for tag in value.split(",")}
    author, search = request.one("author"), request.one("search").lower()
    fields = set(request.query.get("expand", _LIST_FIELDS)) | {"_id", "id"}
    if request.flag("full"):
        fields |= {"siblings", "author", "sha", "lastModified", "gated", "disabled"}
    if request.flag("cardData"):
        fields.add("cardData")
    found = []
    for repo in hub.repos.values():
        if repo.kind != kind or not hub.visible(repo, request.user):
            continue
        info = _info(hub, repo, repo.resolve("main"))
        if wanted <= set(info["tags"]) and author in ("", repo.namespace) and search in repo.id.lower():
            found.append(info)
    if sort := request.one("sort"):
        found.sort(key=lambda info: str(info.get(sort, "")), reverse=True)
    shown = [{key: value for key, value in info.items() if key in fields} for info in found]
    return _page(hub, request, shown, int(request.one("limit", "0")))


@route("GET", _REPO + "(/revision/(?P<rev>[^/]+))?")
def _repo_info(hub: Hub, request: Request, kind: str, repo_id: str, rev: str) -> Answer:
    repo = hub.repo(request, kind, repo_id)
    info = _info(hub, repo, repo.resolve(rev or "main"), blobs=request.flag("blobs"))
    wanted = request.query.get("expand")
    return reply({key: info[key] for key in info if not wanted or key in ("_id", "id", *wanted)})


@route("GET", _REPO + "/tree/(?P<rev>[^/]+)(/(?P<folder>.+))?")
def _tree(hub: Hub, request: Request, kind: str, repo_id: str, rev: str, folder: str) -> Answer:
    files, root = hub.repo(request, kind, repo_id).resolve(rev).files, f"{folder.rstrip('/')}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in files.items():
        if path.startswith(root):
            parts = path[len(root) :].split("/")
            for depth in range(1, len(parts)):
                name = root + "/".join(parts[:depth])
                oid = hashlib.sha1(name.encode()).hexdigest()
                entries[name] = {"type": "directory", "path": name, "oid": oid, "size": 0}
            entries[path] = _entry(path, blob)
    if not request.flag("recursive"):
        entries = {path: entry for path, entry in entries.items() if "/" not in path[len(root) :]}
    if root and not entries:
        raise HubError(404, f"{folder} does not exist on {rev}", "EntryNotFound")
    return _page(hub, request, [entries[path] for path in sorted(entries)])


@route("POST", _REPO + "/paths-info/(?P<rev>[^/]+)")
def _paths_info(hub: Hub, request: Request, kind: str, repo_id: str, rev: str) -> Answer:
    files = hub.repo(request, kind, repo_id).resolve(rev).files
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return reply([_entry(path, files[path]) for path in wanted if path in files])


@route("GET", _REPO + "/commits/(?P<rev>[^/]+)")
def _commits(hub: Hub, request: Request, kind: str, repo_id: str, rev: str) -> Answer:
    repo = hub.repo(request, kind, repo_id)
    oid: str | None = repo.resolve(rev).oid
    history = []
    while oid:
        commit = repo.commits[oid]
        entry = {"id": oid, "title": commit.title, "message": commit.message, "date": commit.date}
        history.append({**entry, "authors": [{"user": commit.author}]})
        oid = commit.parent
    return _page(hub, request, history)


@route("GET", _REPO + "/refs")
def _refs(hub: Hub, request: Request, kind: str, repo_id: str) -> Answer:
    repo = hub.repo(request, kind, repo_id)

    def listed(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]

    names = {"branches": listed(repo.branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/")}
    return reply({**names, "converts": [], "pullRequests": listed(repo.pulls, "")})


@route("POST DELETE", _REPO + "/(?P<what>branch|tag)/(?P<name>[^/]+)")
def _ref(hub: Hub, request: Request, kind: str, repo_id: str, what: str, name: str) -> Answer:
    """Branches name themselves in the URL; a new tag has its revision there and its name in the body."""
    repo, asked = hub.repo(request, kind, repo_id, write=True), request.json()
    refs, start = (repo.branches, asked.get("startingPoint") or "main") if what == "branch" else (repo.tags, name)
    if request.method == "DELETE":
        if name not in refs:
            raise HubError(404, f"there is no {what} {name}", "RevisionNotFound")
        if (what, name) == ("branch", "main"):
            raise ValueError("the default branch cannot be deleted")
        del refs[name]
        return reply({})
    name = name if what == "branch" else str(asked["tag"])
    if name in refs:
        raise HubError(409, f"The {what} {name} exists already")
    if not _REF_NAME.fullmatch(name):
        raise ValueError(f"invalid {what} name {name!r}")
    refs[name] = repo.resolve(start).oid
    return reply({})


@route("POST", _REPO + "/preupload/(?P<rev>[^/]+)")
def _preupload(hub: Hub, request: Request, kind: str, repo_id: str, rev: str) -> Answer:
    hub.writer(request)
    present, files = hub.repo(request, kind, repo_id, write=not request.flag("create_pr")).resolve(rev).files, []
    for file in request.json()["files"]:
        path, blob = file["path"], present.get(file["path"])
        large = hub.lfs and (path.endswith(LFS_SUFFIXES) or file["size"] > MAX_REGULAR_BYTES)
        oid = blob and (blob.sha256 if blob.lfs else blob.oid)
        files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
    return reply({"files": files})


@route("POST", r"/((?P<kind>dataset|space)s/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/(?P<what>batch|verify)")
def _lfs(hub: Hub, request: Request, kind: str, repo_id: str, what: str) -> Answer:
    """Where to upload what the repository lacks (without a `ref` it is for a pull request), or whether it arrived."""
    asked = request.json()
    hub.writer(request)
    repo = hub.repo(request, kind or "model", repo_id, write=what == "batch" and "ref" in asked)
    if what == "verify":
        if asked["oid"] not in repo.lfs or len(hub.objects[asked["oid"]]) != asked["size"]:
            raise HubError(404, "the object was not uploaded")
        return reply({})
    objects = []
    for item in asked["objects"]:
        upload = {"href": hub.signed(Grant("PUT", repo, item["oid"], item["size"]), item["oid"])}
        actions = {"upload": upload, "verify": {"href": f"{hub.endpoint}/{repo.url_path}.git/info/lfs/objects/verify"}}
        known = {"oid": item["oid"], "size": item["size"]}
        objects.append(known if item["oid"] in repo.lfs else {**known, "actions": actions})
    return reply({"transfer": "basic", "objects": objects})


@route("GET PUT", "/storage/(?P<key>[0-9a-f]{32})/(?P<name>.+)")
def _storage(hub: Hub, request: Request, key: str, name: str) -> Answer:
    grant = hub.grants.get(key)
    if grant is None or grant.method != request.method:
        raise HubError(403, "SignatureDoesNotMatch")
    if request.method == "GET":
        return _content(request, hub.objects[grant.sha256], {"ETag": f'"{grant.sha256}"'})
    if (hashlib.sha256(request.body).hexdigest(), len(request.body)) != (grant.sha256, grant.size):
        raise HubError(400, "the content does not match the digest that was announced")
    hub.objects[grant.sha256] = request.body
    grant.repo.lfs.add(grant.sha256)
    return reply("")


@route("POST", _REPO + "/commit/(?P<rev>[^/]+)")
def _commit(hub: Hub, request: Request, kind: str, repo_id: str, rev: str) -> Answer:
    create_pr, user = request.flag("create_pr"), hub.writer(request)
    repo = hub.repo(request, kind, repo_id, write=not create_pr)
    (_, header), *operations = ((line["key"], line["value"]) for line in map(json.loads, request.body.splitlines()))
    parent, expected = repo.resolve(rev), header.get("parentCommit")
    if create_pr and expected:
        parent = repo.resolve(expected)
    elif expected and not parent.oid.startswith(expected):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    refs = repo.pulls if create_pr or rev in repo.pulls else repo.branches
    name = f"refs/pr/{len(repo.pulls) + 1}" if create_pr else rev
    if not create_pr and name not in refs:
        raise ValueError(f"{rev} is not a branch")
    files = dict(parent.files)
    for key, value in operations:
        _apply(hub, repo, files, key, value)
    refs[name] = repo.commit(parent, files, header["summary"], header.get("description", ""), user.name).oid
    url = f"{hub.endpoint}/{repo.url_path}"
    pull = f"{url}/discussions/{name.rsplit('/', 1)[-1]}" if create_pr else None
    return reply({"commitOid": refs[name], "commitUrl": f"{url}/commit/{refs[name]}", "pullRequestUrl": pull})


def _apply(hub: Hub, repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    """One operation of a commit."""
    path = value["path"]
    if key in ("deletedFile", "deletedFolder"):
        inside = path.rstrip("/") + "/"
        gone = [name for name in files if (name.startswith(inside) if key == "deletedFolder" else name == path)]
        if not gone:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        for name in gone:
            del files[name]
        return
    if not path or path.startswith("/") or {"", ".", "..", ".git"} & set(path.split("/")):
        raise ValueError(f"invalid path {path!r}")
    if key == "lfsFile":
        if value["oid"] not in repo.lfs:
            raise ValueError(f"the LFS pointer of {path} points at an object that was not uploaded")
        files[path] = Blob.of(value["oid"], hub.objects[value["oid"]], lfs=True)
        return
    data = base64.b64decode(value["content"], validate=True)
    if len(data) > MAX_REGULAR_BYTES or (hub.lfs and path.endswith(LFS_SUFFIXES) and data):
        raise ValueError(f"{path} must be uploaded with LFS")
    if path == "README.md" and (errors := read_card(data.decode())[1]):
        raise ValueError(f"invalid metadata in README.md: {'; '.join(errors)}")
    files[path] = hub.put(data)


@route("GET HEAD", r"/((?P<kind>dataset|space)s/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
def _resolve(hub: Hub, request: Request, kind: str, repo_id: str, rev: str, path: str) -> Answer:
    repo = hub.repo(request, kind or "model", repo_id)
    commit = repo.resolve(rev)
    headers = {"X-Repo-Commit": commit.oid}
    if (blob := commit.files.get(path)) is None:
        missing = HubError(404, "Entry not found", "EntryNotFound").answer
        return missing._replace(headers=missing.headers | headers)
    if not blob.lfs:
        return _content(request, hub.objects[blob.sha256], {"ETag": f'"{blob.oid}"', **headers})
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
    if not hub.redirect:
        return _content(request, hub.objects[blob.sha256], {"ETag": f'"{blob.sha256}"', **headers})
    link = hub.signed(Grant("GET", repo, blob.sha256, blob.size), path.rsplit("/", 1)[-1])
    return reply(f"Found. Redirecting to {link}", 302, {"Location": link, **headers})
