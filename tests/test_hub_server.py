"""The tests' Hub against the real client: what the other Hub tests rest on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_fixtures import READ_TOKEN, STRANGER_TOKEN, TOKEN, HubClient, hub_env, patch_client
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "DeltaHub/tiny-lora"
CARD = "---\nlicense: mit\nlibrary_name: deltaexp\ntags: [delta, lora]\nbase_model: org/tiny\n---\n# A delta\n"
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A delta on disk: a card, a configuration, weights, and a file in a subfolder."""
    path = tmp_path / "delta"
    (path / "sub").mkdir(parents=True)
    (path / "README.md").write_text(CARD)
    (path / "config.json").write_text('{"lora_r": 4}')
    (path / "delta.safetensors").write_bytes(WEIGHTS)
    (path / "sub" / "notes.txt").write_text("notes")
    return path


@pytest.fixture
def pushed(hub_client: HubClient, folder: Path) -> Any:
    """The commit that put `folder` into a public repository."""
    hub_client.api.create_repo(REPO)
    return hub_client.api.upload_folder(repo_id=REPO, folder_path=folder)


def add(path: str, content: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, content)]


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


# --- who one is -------------------------------------------------------------------------------------------------------


def test_whoami(hub: HubServer, hub_client: HubClient) -> None:
    me = hub_client.api.whoami()
    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("ada", ["DeltaHub"])
    assert me["auth"]["accessToken"]["role"] == "write"
    assert huggingface_hub.whoami()["name"] == "ada"  # the module's functions talk to the Hub of the test too
    hub_client.login(READ_TOKEN)
    assert hub_client.api.whoami()["auth"]["accessToken"]["role"] == "read"
    assert hub.requests == [("GET", "/api/whoami-v2", 200)] * 3


def test_whoami_without_a_valid_token(hub_client: HubClient) -> None:
    hub_client.logout()
    with pytest.raises(LocalTokenNotFoundError):
        hub_client.api.whoami()
    hub_client.login("hf_nobody")
    with pytest.raises(HfHubHTTPError) as error:
        hub_client.api.whoami()
    assert status_of(error) == 401


# --- repositories -----------------------------------------------------------------------------------------------------


def test_create_repo(hub_client: HubClient) -> None:
    url = hub_client.api.create_repo(REPO)
    assert (str(url), url.repo_id) == (f"{hub_client.hub.endpoint}/{REPO}", REPO)
    assert hub_client.api.create_repo(REPO, exist_ok=True) == url
    assert hub_client.api.create_repo("mine").repo_id == "ada/mine"
    assert hub_client.api.list_repo_files(REPO) == [".gitattributes"]
    with pytest.raises(HfHubHTTPError) as error:
        hub_client.api.create_repo(REPO)
    assert status_of(error) == 409
    hub_client.api.delete_repo(REPO)
    assert not hub_client.api.repo_exists(REPO)


@pytest.mark.parametrize(("token", "status"), [(None, 401), (READ_TOKEN, 403), (STRANGER_TOKEN, 403)])
def test_create_repo_needs_permission(hub_client: HubClient, token: str | None, status: int) -> None:
    hub_client.login(token) if token else hub_client.logout()
    with pytest.raises(HfHubHTTPError) as error:
        hub_client.api.create_repo(REPO)
    assert status_of(error) == status
    assert hub_client.hub.repos == {}


def test_private_repo(hub_client: HubClient, folder: Path) -> None:
    hub_client.api.create_repo(REPO, private=True)
    hub_client.api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub_client.api.model_info(REPO).private
    assert [model.id for model in hub_client.api.list_models()] == [REPO]
    hub_client.login(READ_TOKEN)
    assert Path(hub_client.api.hf_hub_download(REPO, "delta.safetensors")).read_bytes() == WEIGHTS
    for token, status in ((None, 401), (STRANGER_TOKEN, 404)):
        hub_client.login(token) if token else hub_client.logout()
        with pytest.raises(RepositoryNotFoundError) as error:
            hub_client.api.model_info(REPO)
        assert status_of(error) == status
        with pytest.raises(RepositoryNotFoundError):
            hub_client.api.hf_hub_download(REPO, "config.json")
        assert list(hub_client.api.list_models()) == []


def test_missing_repo(hub_client: HubClient) -> None:
    for leave in (lambda: None, hub_client.logout):
        leave()
        with pytest.raises(RepositoryNotFoundError):
            hub_client.api.snapshot_download("DeltaHub/absent")


def test_dataset_repo(hub_client: HubClient) -> None:
    api = hub_client.api
    url = api.create_repo("DeltaHub/data", repo_type="dataset")
    assert url.repo_type == "dataset"
    api.create_commit("DeltaHub/data", add("x.parquet", b"rows"), commit_message="rows", repo_type="dataset")
    assert Path(api.hf_hub_download("DeltaHub/data", "x.parquet", repo_type="dataset")).read_bytes() == b"rows"
    assert [info.id for info in api.list_datasets(author="DeltaHub")] == ["DeltaHub/data"]
    assert not api.repo_exists("DeltaHub/data")  # not as a model


# --- uploads ----------------------------------------------------------------------------------------------------------


def test_upload_folder(hub: HubServer, hub_client: HubClient, folder: Path, pushed: Any) -> None:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    stored = hub.read(REPO)
    assert {path: data for path, data in stored.items() if path != ".gitattributes"} == files
    assert pushed.repo_url.repo_id == REPO
    assert hub_client.api.model_info(REPO).sha == pushed.oid
    assert len(pushed.oid) == 40
    assert [line.method for line in hub.uploads()] == ["PUT", "POST"]  # the weights through LFS, then one commit
    assert set(hub.repos["model", REPO].lfs) == {hub.repos["model", REPO].resolve("main").files["delta.safetensors"][1]}


def test_upload_of_what_is_there_is_no_commit(hub: HubServer, hub_client: HubClient, folder: Path, pushed: Any) -> None:
    before = hub.uploads()
    assert hub_client.api.upload_folder(repo_id=REPO, folder_path=folder).oid == pushed.oid
    assert hub.uploads() == before
    (folder / "copy.safetensors").write_bytes(WEIGHTS)  # a content that the repository has is not sent again
    hub_client.api.upload_folder(repo_id=REPO, folder_path=folder)
    assert [line.method for line in hub.uploads()] == ["PUT", "POST", "POST"]


def test_commits_are_snapshots(hub: HubServer, hub_client: HubClient, pushed: Any) -> None:
    operations = [*add("config.json", b"{}"), CommitOperationDelete("sub/")]
    second = hub_client.api.create_commit(REPO, operations, commit_message="shrink", commit_description="why")
    assert hub.read(REPO)["config.json"] == b"{}"
    assert "sub/notes.txt" not in hub.read(REPO)
    assert hub.read(REPO, pushed.oid)["sub/notes.txt"] == b"notes"
    history = hub_client.api.list_repo_commits(REPO)
    assert [commit.commit_id for commit in history][:2] == [second.oid, pushed.oid]
    assert [commit.title for commit in history] == ["shrink", "Upload folder using huggingface_hub", "initial commit"]
    with pytest.raises(EntryNotFoundError):
        hub_client.api.delete_file("absent.txt", REPO)


def test_parent_commit_guards(hub_client: HubClient, pushed: Any) -> None:
    api = hub_client.api
    api.create_commit(REPO, add("a.txt", b"a"), commit_message="a", parent_commit=pushed.oid)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(REPO, add("b.txt", b"b"), commit_message="b", parent_commit=pushed.oid)
    assert status_of(error) == 412
    assert "b.txt" not in hub_client.hub.read(REPO)


def test_pull_request(hub_client: HubClient, folder: Path, pushed: Any) -> None:
    hub_client.login(STRANGER_TOKEN)
    (folder / "delta.safetensors").write_bytes(WEIGHTS[::-1])
    pull = hub_client.api.upload_folder(repo_id=REPO, folder_path=folder, create_pr=True)
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    assert hub_client.hub.read(REPO)["delta.safetensors"] == WEIGHTS
    path = hub_client.api.hf_hub_download(REPO, "delta.safetensors", revision="refs/pr/1")
    assert Path(path).read_bytes() == WEIGHTS[::-1]
    refs = hub_client.api.list_repo_refs(REPO, include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests or []] == [("refs/pr/1", pull.oid)]


@pytest.mark.parametrize(("token", "status"), [(None, 401), (READ_TOKEN, 403), (STRANGER_TOKEN, 403)])
def test_writing_needs_permission(
    hub: HubServer, hub_client: HubClient, folder: Path, pushed: Any, token: str | None, status: int
) -> None:
    before = hub.uploads()
    hub_client.login(token) if token else hub_client.logout()
    (folder / "config.json").write_text("{}")
    calls = [
        lambda: hub_client.api.upload_folder(repo_id=REPO, folder_path=folder),
        lambda: hub_client.api.create_tag(REPO, tag="v1"),
        lambda: hub_client.api.create_branch(REPO, branch="dev"),
        lambda: hub_client.api.delete_repo(REPO),
    ]
    for call in calls:
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert status_of(error) == status
    assert hub.uploads() == before
    assert hub.repos["model", REPO].tags == {}


def test_a_commit_cannot_claim_what_was_not_uploaded(hub: HubServer, hub_client: HubClient, pushed: Any) -> None:
    """Not even the content of another repository, of which one happens to know the digest."""
    hub_client.api.create_repo("ada/other")
    digest = next(iter(hub.repos["model", REPO].lfs))
    value = {"path": "stolen.safetensors", "algo": "sha256", "oid": digest, "size": len(WEIGHTS)}
    lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "lfsFile", "value": value}]
    body = "\n".join(map(json.dumps, lines)).encode()
    assert fetch(hub, "/api/models/ada/other/commit/main", body, TOKEN)[0] == 400
    value["path"] = "../up.safetensors"
    body = "\n".join(map(json.dumps, lines)).encode()
    assert fetch(hub, f"/api/models/{REPO}/commit/main", body, TOKEN)[0] == 400


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_nobody", 401), (READ_TOKEN, 403), (STRANGER_TOKEN, 403)])
def test_every_step_of_an_upload_needs_permission(hub: HubServer, pushed: Any, token: str | None, status: int) -> None:
    """Also the later ones, which the client does not reach when the first is refused."""
    bodies = {
        f"/api/models/{REPO}/preupload/main": {"files": []},
        f"/{REPO}.git/info/lfs/objects/batch": {"objects": [], "ref": {"name": "main"}},
        f"/api/models/{REPO}/commit/main": {"key": "header", "value": {"summary": "s"}},
    }
    asked = {path: fetch(hub, path, json.dumps(body).encode(), token)[0] for path, body in bodies.items()}
    assert asked == dict.fromkeys(bodies, status)
    assert hub.repos["model", REPO].branches["main"] == pushed.oid


def test_an_unknown_token_is_refused_even_where_none_is_needed(hub: HubServer, pushed: Any) -> None:
    assert fetch(hub, f"/api/models/{REPO}")[0] == 200
    assert fetch(hub, f"/api/models/{REPO}", token="hf_nobody")[0] == 401


# --- cards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (CARD.replace("org/tiny", "/home/ada/tiny"), "base_model"),
        (CARD.replace("org/tiny", "./tiny"), "base_model"),
        (CARD.replace("mit", "mine"), "license"),
    ],
)
@pytest.mark.parametrize("token", [TOKEN, None])
def test_wrong_card(hub_client: HubClient, folder: Path, token: str | None, card: str, message: str) -> None:
    hub_client.api.create_repo(REPO)
    (folder / "README.md").write_text(card)
    with pytest.raises(ValueError, match=message):
        hub_client.api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub_client.hub.uploads() == []
    hub_client.login(token) if token else hub_client.logout()
    with pytest.raises(ValueError, match=message):
        ModelCard(card).validate()
    ModelCard(CARD).validate()


def test_card_without_metadata_is_warned_of(hub_client: HubClient) -> None:
    hub_client.api.create_repo(REPO)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        hub_client.api.create_commit(REPO, add("README.md", b"# A delta"), commit_message="card")


# --- lists, branches, tags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [TOKEN, None])
def test_list_models(hub: HubServer, hub_client: HubClient, token: str | None) -> None:
    api = hub_client.api
    for index in range(5):
        api.create_repo(f"DeltaHub/model-{index}")
    api.create_repo("ada/secret", private=True)
    api.create_commit("DeltaHub/model-3", add("README.md", CARD.encode()), commit_message="card")
    hub_client.login(token) if token else hub_client.logout()
    hub.page_size = 2
    names = [f"DeltaHub/model-{index}" for index in range(5)]
    assert [model.id for model in api.list_models()] == names + (["ada/secret"] if token else [])
    assert [model.id for model in api.list_models(author="DeltaHub", limit=3)] == names[:3]
    assert [model.id for model in api.list_models(search="EL-3")] == [names[3]]
    assert [model.id for model in api.list_models(filter=["delta", "lora"])] == [names[3]]
    assert [model.id for model in api.list_models(filter="base_model:org/tiny")] == [names[3]]
    assert list(api.list_models(filter=["delta", "adapter"])) == []
    model = next(iter(api.list_models(filter="lora", full=True, cardData=True)))
    assert (model.library_name, model.card_data.base_model) == ("deltaexp", "org/tiny")
    assert {file.rfilename for file in model.siblings or []} == {".gitattributes", "README.md"}
    assert next(iter(api.list_models())).siblings is None


def test_tree_and_info(hub: HubServer, hub_client: HubClient, pushed: Any) -> None:
    hub_client.logout()
    hub.page_size = 2
    api = hub_client.api
    everything = {"README.md", ".gitattributes", "config.json", "delta.safetensors", "sub", "sub/notes.txt"}
    assert {entry.path for entry in api.list_repo_tree(REPO, recursive=True)} == everything
    assert {entry.path for entry in api.list_repo_tree(REPO)} == everything - {"sub/notes.txt"}
    assert [entry.path for entry in api.list_repo_tree(REPO, "sub")] == ["sub/notes.txt"]
    (weights,) = api.get_paths_info(REPO, ["delta.safetensors", "absent"])
    assert weights.lfs is not None
    assert (weights.size, weights.lfs.size) == (len(WEIGHTS), len(WEIGHTS))
    siblings = {file.rfilename: file for file in api.model_info(REPO, files_metadata=True).siblings or []}
    assert siblings["delta.safetensors"].lfs == weights.lfs
    assert siblings["config.json"].size == len('{"lora_r": 4}')
    assert api.model_info(REPO).card_data.tags == ["delta", "lora"]
    assert "license:mit" in api.model_info(REPO).tags
    assert api.verify_repo_checksums(REPO, local_dir=api.snapshot_download(REPO)).mismatches == []


def test_branches_and_tags(hub_client: HubClient, pushed: Any) -> None:
    api = hub_client.api
    api.create_tag(REPO, tag="v1", tag_message="first")
    api.create_tag(REPO, tag="v1", exist_ok=True)
    api.create_branch(REPO, branch="exp/dev", revision="v1")
    api.create_branch(REPO, branch="exp/dev", exist_ok=True)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(REPO, tag="v1")
    assert status_of(error) == 409
    api.create_commit(REPO, add("config.json", b"{}"), commit_message="dev", revision="exp/dev")
    hub_client.logout()
    paths = {name: api.hf_hub_download(REPO, "config.json", revision=name) for name in ("v1", "exp/dev", "main")}
    assert {name: Path(path).read_text() for name, path in paths.items()} == {
        "v1": '{"lora_r": 4}',
        "exp/dev": "{}",
        "main": '{"lora_r": 4}',
    }
    refs = api.list_repo_refs(REPO)
    assert [ref.name for ref in refs.branches] == ["main", "exp/dev"]
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", pushed.oid)]
    hub_client.login()
    with pytest.raises(HfHubHTTPError, match="not a branch"):
        api.create_commit(REPO, add("x.txt", b"x"), commit_message="x", revision="v1")
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="exp/dev")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="exp/dev")
    with pytest.raises(HfHubHTTPError):
        api.delete_branch(REPO, branch="main")


# --- downloads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [TOKEN, None])
@pytest.mark.parametrize("redirect", [True, False])
def test_downloads(hub: HubServer, hub_client: HubClient, folder: Path, pushed: Any, token: str | None, redirect: bool) -> None:
    hub_client.login(token) if token else hub_client.logout()
    hub.redirect = redirect
    path = Path(hub_client.api.hf_hub_download(REPO, "delta.safetensors"))
    assert path.read_bytes() == WEIGHTS
    assert path.is_relative_to(hub_client.cache)
    assert path.parent.name == pushed.oid
    assert path.resolve().name in hub.repos["model", REPO].lfs  # its name in the cache is the digest
    assert any(line.path.startswith("/storage/") and line.method == "GET" for line in hub.requests) == redirect
    snapshot = Path(hub_client.api.snapshot_download(REPO, revision=pushed.oid[:10], allow_patterns=["*.json", "sub/*"]))
    assert {str(file.relative_to(snapshot)) for file in snapshot.rglob("*.*")} == {
        "config.json",
        "delta.safetensors",
        "sub/notes.txt",
    }
    assert hub.leaks == []


@pytest.mark.parametrize("token", [TOKEN, None])
def test_missing_entries(hub_client: HubClient, pushed: Any, token: str | None) -> None:
    hub_client.login(token) if token else hub_client.logout()
    with pytest.raises(EntryNotFoundError):
        hub_client.api.hf_hub_download(REPO, "absent.json")
    with pytest.raises(RevisionNotFoundError):
        hub_client.api.hf_hub_download(REPO, "config.json", revision="absent")
    with pytest.raises(RevisionNotFoundError):
        hub_client.api.snapshot_download(REPO, revision="absent")
    assert not hub_client.api.file_exists(REPO, "absent.json")


def fetch(
    hub: HubServer,
    path: str,
    body: bytes | None = None,
    token: str | None = None,
    method: str | None = None,
    **headers: str,
) -> tuple[int, bytes]:
    """A request by hand, for what the client does not send: a GET, or with a body a POST."""
    if token:
        headers["Authorization"] = f"Bearer {token}"
    url = path if path.startswith("http") else hub.endpoint + path
    request = urllib.request.Request(url, data=body, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.mark.parametrize(
    ("asked", "status", "wanted"),
    [
        ("bytes=0-3", 206, WEIGHTS[:4]),
        ("bytes=10000-", 206, WEIGHTS[10000:]),
        ("bytes=-5", 206, WEIGHTS[-5:]),
        ("bytes=5-999999", 206, WEIGHTS[5:]),
        (f"bytes={len(WEIGHTS)}-", 416, b""),
        ("lines=1-2", 200, WEIGHTS),
    ],
)
def test_ranges(hub: HubServer, pushed: Any, asked: str, status: int, wanted: bytes) -> None:
    assert fetch(hub, f"/{REPO}/resolve/main/delta.safetensors", Range=asked) == (status, wanted)


def test_signed_links(hub: HubServer, hub_client: HubClient, pushed: Any) -> None:
    url = huggingface_hub.hf_hub_url(REPO, "delta.safetensors")
    link = huggingface_hub.get_hf_file_metadata(url).location
    assert link.startswith(hub.storage)
    assert fetch(hub, link) == (200, WEIGHTS)
    assert fetch(hub, link.replace(hub.storage, hub.endpoint))[0] == 404
    assert fetch(hub, f"{hub.storage}/storage/{'0' * 32}/delta.safetensors")[0] == 403
    assert fetch(hub, link, b"other content", method="PUT")[0] == 403  # a link to read is none to write
    assert fetch(hub, f"{hub.storage}/api/models")[0] == 404
    assert fetch(hub, link, token=TOKEN)[0] == 400
    assert [line.split(" ")[0] for line in hub.leaks] == ["GET"]
    hub.leaks.clear()


def test_leaks_are_noticed() -> None:
    with HubServer({TOKEN: ("ada", [])}) as hub:
        fetch(hub, "/api/models", token=TOKEN)
        assert hub.leaks == []
        fetch(hub, f"/api/models?search={TOKEN}")
        fetch(hub, "/api/validate-yaml", json.dumps({"content": TOKEN}).encode())
        fetch(hub, "/api/models", Cookie=TOKEN)
        assert len(hub.leaks) == 3


# --- faults -----------------------------------------------------------------------------------------------------------


def test_unknown_fault(hub: HubServer) -> None:
    with pytest.raises(ValueError, match="lose_answer"):
        hub.faults.add("explode")


def test_fault_status(hub: HubServer, hub_client: HubClient, folder: Path) -> None:
    hub_client.api.create_repo(REPO)
    upload = hub.faults.add("status", method="PUT", path_regex="^/storage/", headers={"Retry-After": "0"})
    commit = hub.faults.add("status", path_regex="/commit/", status=503)
    with pytest.raises(HfHubHTTPError) as error:  # the upload is tried again, the commit is not
        hub_client.api.upload_folder(repo_id=REPO, folder_path=folder)
    assert status_of(error) == 503
    assert (upload.hits, commit.hits) == (1, 1)
    assert [line.status for line in hub.uploads()] == [500, 200, 503]
    assert list(hub.read(REPO)) == [".gitattributes"]
    hub_client.api.upload_folder(repo_id=REPO, folder_path=folder)
    assert [line.status for line in hub.uploads()] == [500, 200, 503, 200]


def test_fault_status_skip_and_times(hub: HubServer) -> None:
    fault = hub.faults.add("status", path_regex="whoami", status=429, skip=1, times=2, headers={"Retry-After": "3"})
    assert [fetch(hub, "/api/whoami-v2", token=TOKEN)[0] for _ in range(4)] == [200, 429, 429, 200]
    assert fault.hits == 2
    hub.faults.add("status", times=None)
    assert [fetch(hub, "/api/models")[0] for _ in range(3)] == [500, 500, 500]
    hub.faults.clear()
    assert fetch(hub, "/api/models")[0] == 200


def test_fault_drop(hub: HubServer, hub_client: HubClient, folder: Path) -> None:
    hub_client.api.create_repo(REPO)
    fault = hub.faults.add("drop", method="PUT")
    hub_client.api.upload_folder(repo_id=REPO, folder_path=folder)
    assert fault.hits == 1
    assert [line.status for line in hub.uploads()] == [0, 200, 200]
    assert hub.read(REPO)["delta.safetensors"] == WEIGHTS


def test_fault_lose_answer(hub: HubServer, hub_client: HubClient, folder: Path) -> None:
    hub_client.api.create_repo(REPO)
    hub.faults.add("lose_answer", path_regex="/commit/main")
    with pytest.raises(Exception, match="disconnected"):
        hub_client.api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.read(REPO)["delta.safetensors"] == WEIGHTS
    head = hub.repos["model", REPO].branches["main"]
    assert hub_client.api.upload_folder(repo_id=REPO, folder_path=folder).oid == head
    assert [line.status for line in hub.uploads()] == [200, 0]


def test_fault_cut(hub: HubServer, hub_client: HubClient, pushed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # the client forgets the part of a chunk (10 MiB)
    fault = hub.faults.add("cut", method="GET", path_regex=r"delta\.safetensors")
    path = hub_client.api.hf_hub_download(REPO, "delta.safetensors")
    assert fault.hits == 1
    assert Path(path).read_bytes() == WEIGHTS
    assert [line.status for line in hub.requests if line.path.startswith("/storage/")][1:] == [200, 206]


def test_fault_corrupt(hub: HubServer, hub_client: HubClient, pushed: Any) -> None:
    hub_client.logout()
    fault = hub.faults.add("corrupt", method="GET", path_regex=r"delta\.safetensors")
    wrong = Path(hub_client.api.hf_hub_download(REPO, "delta.safetensors")).read_bytes()
    assert fault.hits == 1
    assert len(wrong) == len(WEIGHTS)
    assert [index for index, (a, b) in enumerate(zip(wrong, WEIGHTS, strict=True)) if a != b] == [len(WEIGHTS) // 2]
    # The client does not notice, and keeps it until it is told to fetch again.
    assert Path(hub_client.api.hf_hub_download(REPO, "delta.safetensors")).read_bytes() == wrong
    path = hub_client.api.hf_hub_download(REPO, "delta.safetensors", force_download=True)
    assert Path(path).read_bytes() == WEIGHTS


def test_hub_goes_down_and_comes_back(hub: HubServer, hub_client: HubClient, pushed: Any) -> None:
    endpoint = hub.endpoint
    snapshot = hub_client.api.snapshot_download(REPO)
    hub.stop()
    assert hub_client.api.snapshot_download(REPO) == snapshot  # the cached one, silently
    with pytest.raises(LocalEntryNotFoundError):
        hub_client.api.snapshot_download("DeltaHub/other")
    hub.start()
    assert hub.endpoint == endpoint
    assert hub_client.api.model_info(REPO).sha == pushed.oid


def test_silent_clients_do_not_hold_it_up() -> None:
    with HubServer() as hub:
        host, port = hub.endpoint.removeprefix("http://").split(":")
        half = b"POST /api/validate-yaml HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"
        with socket.create_connection((host, int(port))), socket.create_connection((host, int(port))) as talking:
            talking.sendall(half)
            assert fetch(hub, "/api/models") == (200, b"[]")
            began = time.monotonic()
            hub.stop()
            assert time.monotonic() - began < 2
        hub.stop()  # stopping twice is harmless


def test_chunked_bodies_and_unknown_paths(hub: HubServer) -> None:
    content = json.dumps({"content": CARD}).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (content[:9], content[9:])) + b"0\r\n\r\n"
    head = b"POST /api/validate-yaml HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    host, port = hub.endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head + chunks)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    assert fetch(hub, "/api/absent")[0] == 404
    assert fetch(hub, "/api/validate-yaml", b"{")[0] == 400


# --- the fixtures -----------------------------------------------------------------------------------------------------


def test_patch_is_undone(tmp_path: Path) -> None:
    before = (constants.ENDPOINT, constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH, huggingface_hub.HfApi().endpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch_client(patch, "http://127.0.0.1:9", tmp_path)
        assert huggingface_hub.HfApi().endpoint == "http://127.0.0.1:9"
    after = (constants.ENDPOINT, constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH, huggingface_hub.HfApi().endpoint)
    assert after == before


def run_script(script: str, *args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *args], env=env, capture_output=True, text=True, timeout=60)


ROUND_TRIP = f"""
import sys
from huggingface_hub import HfApi, ModelCard, snapshot_download, whoami
api = HfApi()
api.create_repo({REPO!r})
api.upload_folder(repo_id={REPO!r}, folder_path=sys.argv[1])
ModelCard.load({REPO!r}).validate()
print(whoami()["name"], snapshot_download({REPO!r}))
"""


@pytest.mark.parametrize("xet", [False, True])
def test_subprocess(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, xet: bool) -> None:
    """The environment alone is enough; with xet on the Hub has to take every file as a regular one."""
    monkeypatch.setenv("HF_TOKEN", "of-the-parent")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with HubServer({TOKEN: ("ada", ["DeltaHub"])}, lfs=not xet) as hub:
        env = hub_env(hub, tmp_path, TOKEN) | {"HF_HUB_DISABLE_XET": str(int(not xet))}
        done = run_script(ROUND_TRIP, str(folder), env=env)
        assert done.returncode == 0, done.stderr
        name, snapshot = done.stdout.split()
        assert name == "ada"
        assert Path(snapshot).is_relative_to(tmp_path)
        assert (Path(snapshot) / "delta.safetensors").read_bytes() == WEIGHTS
        assert bool(hub.repos["model", REPO].lfs) != xet
        assert {line.status for line in hub.requests} <= {200, 302}
        assert (hub.errors, hub.leaks) == ([], [])


def test_subprocess_anonymous(hub: HubServer, pushed: Any, tmp_path: Path) -> None:
    hub.requests.clear()
    script = f"from huggingface_hub import *\nprint(snapshot_download({REPO!r}))\ncreate_repo('x')"
    done = run_script(script, env=hub_env(hub, tmp_path / "other"))
    assert (Path(done.stdout.strip()) / "delta.safetensors").read_bytes() == WEIGHTS
    assert "401" in done.stderr
    assert "HF_TOKEN" not in hub_env(hub, tmp_path)
    assert os.environ["HF_TOKEN"] == TOKEN  # of the client in this process, which the subprocess did not get
