"""Fetching a delta from the Hub: no more than is needed, from the cache where it must, and never what is not what it says."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import pytest
from hub_fixtures import HubClient, naps
from huggingface_hub import constants
from models import FAMILIES, attach, slow_but
from test_hub import REPO, WEIGHTS, folder, original

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck, hub, hubclient, publishing
from deltaexp.errors import CheckpointError, DamagedFileError, HubError, MissingFileError, UnsafeFileError
from deltaexp.manifest import MANIFEST, dump, sealed

__all__ = ["folder", "naps", "original"]

BERT = FAMILIES["bert"]


@pytest.fixture
def pushed(hub_client: HubClient, folder: Path) -> str:
    """The commit of a delta on the Hub, of which nothing is in the cache."""
    commit = publishing.push(folder, REPO).commit
    hub_client.hub.requests.clear()
    return commit


def put(client: HubClient, files: dict[str, bytes], repo: str = REPO) -> str:
    """Make a commit that holds just these files, whatever their names: what a hostile Hub could answer."""
    if ("model", repo) not in client.hub.repos:
        client.api.create_repo(repo)
    held = client.hub.repos["model", repo]
    suffixes = (".safetensors", ".bin")
    blobs = {name: client.hub.put(data, lfs=name.endswith(suffixes)) for name, data in files.items()}
    held.branches["main"] = held.commit(held.resolve("main"), blobs, "by hand", "", "mallory").oid
    return held.branches["main"]


def fetched(client: HubClient) -> set[str]:
    """The names of the files whose content was asked for."""
    return {
        line.path.split("?")[0].rsplit("/", 1)[-1]
        for line in client.hub.requests
        if line.method == "GET" and ("/resolve/" in line.path or line.path.startswith("/storage/"))
    }


def cached_blob(found: Path, name: str) -> Path:
    return (found / name).resolve()


# --- what is fetched --------------------------------------------------------------------------------------------------


def test_only_what_is_needed(hub_client: HubClient, pushed: str) -> None:
    found = hub.fetch(REPO)
    assert found.name == pushed
    assert fetched(hub_client) == {"config.json", MANIFEST, WEIGHTS}
    assert {path.name for path in found.iterdir()} == {"config.json", MANIFEST, WEIGHTS}
    hub_client.hub.requests.clear()
    hub.fetch(REPO)
    assert fetched(hub_client) == set()


def test_a_config_needs_no_weights(hub_client: HubClient, pushed: str) -> None:
    found = hub.fetch(REPO, needs="config")
    assert fetched(hub_client) == {"config.json", MANIFEST}
    assert AutoDeltaConfig.from_finetuned(found).delta_type == "lora"


def test_all_of_it(hub_client: HubClient, pushed: str, original: dict[str, bytes]) -> None:
    found = hub.fetch(REPO, needs="all")
    assert {path.name: path.read_bytes() for path in found.iterdir()} == original


def test_a_pickle_beside_safe_tensors_is_left_there(hub_client: HubClient, original: dict[str, bytes]) -> None:
    put(hub_client, {**original, "pytorch_model.bin": b"a pickle", "adapter_model.bin": b"another"})
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build()).hash_check is HashCheck.MATCH
    assert fetched(hub_client) == {"config.json", MANIFEST, WEIGHTS}


def test_an_adapter_of_peft(hub_client: HubClient) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"tensors", "config.json": b"{}", "optimizer.bin": b"?"}
    put(hub_client, files)
    found = hub.fetch(REPO)
    assert {path.name for path in found.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "config.json"}
    del files["adapter_model.safetensors"]
    put(hub_client, {**files, "adapter_model.bin": b"a pickle"})
    with pytest.raises(MissingFileError, match=r"it has no adapter_model\.safetensors"):
        hub.fetch(REPO)


def test_opendelta(hub_client: HubClient) -> None:
    config = json.dumps({"delta_type": "lora", "opendelta_version": "0.3.2"}).encode()
    put(hub_client, {"config.json": config, "pytorch_model.bin": b"tensors", "README.md": b"# A delta"})
    assert {path.name for path in hub.fetch(REPO).iterdir()} == {"config.json", "pytorch_model.bin"}


# --- without the Hub --------------------------------------------------------------------------------------------------


def test_offline_by_wish(hub_client: HubClient, pushed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fetch(REPO)
    hub_client.hub.requests.clear()
    assert hub.fetch(REPO, local_files_only=True).name == pushed  # without a warning: it was asked for
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build()).hash_check is HashCheck.MATCH
    with pytest.raises(HubError, match="not in the cache"):
        hub.fetch("DeltaHub/other")
    assert hub_client.hub.requests == []


@pytest.mark.parametrize("status", [500, *(pytest.param(status, marks=pytest.mark.slow) for status in (503, 429))])
def test_a_stale_answer_is_said(hub_client: HubClient, pushed: str, original: dict[str, bytes], status: int) -> None:
    hub.fetch(REPO)
    newest = put(hub_client, {**original, "notes.md": b"new"})
    fault = hub_client.hub.faults.add("status", path_regex="/api/models/", times=None, status=status)
    with pytest.warns(
        UserWarning, match=rf"it answered {status}\), so the one in the cache is used: {pushed[:12]}, fetched on"
    ):
        assert hub.fetch(REPO).name == pushed
    assert fault.hits >= hub.ATTEMPTS
    hub_client.hub.faults.clear()
    assert hub.fetch(REPO).name == newest


@pytest.mark.parametrize("step", [f"/api/models/{REPO}$", "/tree/", "/resolve/", "^/storage/"])
@pytest.mark.parametrize("action", slow_but(["status", "drop"], ("drop",)))
def test_a_fault_that_passes_is_not_noticed(
    hub_client: HubClient, pushed: str, naps: list[float], step: str, action: str
) -> None:
    fault = hub_client.hub.faults.add(action, method="GET", path_regex=step)
    assert hub.fetch(REPO).name == pushed
    assert fault.hits == 1


def test_a_download_that_is_cut(hub_client: HubClient, pushed: str, naps: list[float]) -> None:
    fault = hub_client.hub.faults.add("cut", method="GET", path_regex="^/storage/")
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build()).hash_check is HashCheck.MATCH
    assert fault.hits == 1


def test_a_hub_that_says_nothing(hub_client: HubClient, pushed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubclient, "TIMEOUT", 0.3)
    hub_client.hub.faults.add("hang", method="GET", path_regex="/tree/")
    assert hub.fetch(REPO).name == pushed


def test_a_cache_that_an_older_client_made(hub_client: HubClient, pushed: str) -> None:
    """It keeps no list of what a commit holds."""
    found = hub.fetch(REPO)
    shutil.rmtree(found.parent.parent / "trees")
    assert hub.fetch(REPO, local_files_only=True) == found


def test_a_copy_that_is_half_there(hub_client: HubClient, pushed: str) -> None:
    """Only the config was fetched when the Hub went down."""
    hub.fetch(REPO, needs="config")
    hub_client.hub.stop()
    with (
        pytest.warns(UserWarning, match="may be stale"),
        pytest.raises((HubError, MissingFileError), match="DeltaHub|complete"),
    ):
        hub.fetch(REPO)


# --- a damaged cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", MANIFEST, WEIGHTS])
@pytest.mark.parametrize("damage", slow_but(["flipped", "truncated", "empty"], ("flipped",)))
def test_a_damaged_cache_is_healed(
    hub_client: HubClient, pushed: str, original: dict[str, bytes], name: str, damage: str
) -> None:
    found = hub.fetch(REPO)
    data = original[name]
    middle = len(data) // 2
    wrong = {"flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], "truncated": data[:-9], "empty": b""}
    cached_blob(found, name).write_bytes(wrong[damage])
    with pytest.raises(DamagedFileError, match="force_download=True"):
        hub.fetch(REPO, local_files_only=True)
    with pytest.warns(UserWarning, match=f"A file of '{REPO}' in the cache is damaged, so the delta is downloaded again"):
        assert hub.fetch(REPO) == found
    assert (found / name).read_bytes() == data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AutoDeltaModel.from_finetuned(REPO, BERT.build()).hash_check is HashCheck.MATCH


def test_a_damaged_cache_and_no_hub(hub_client: HubClient, pushed: str) -> None:
    found = hub.fetch(REPO)
    cached_blob(found, WEIGHTS).write_bytes(b"other bytes")
    hub_client.hub.stop()
    with pytest.warns(UserWarning, match="may be stale"), pytest.raises(DamagedFileError, match=WEIGHTS):
        hub.fetch(REPO)


def test_a_repository_that_is_damaged_itself(hub_client: HubClient, original: dict[str, bytes]) -> None:
    data = original[WEIGHTS]
    put(hub_client, {**original, WEIGHTS: data[:-1] + bytes([data[-1] ^ 1])})
    with pytest.warns(UserWarning, match="downloaded again"), pytest.raises(DamagedFileError, match=WEIGHTS):
        hub.fetch(REPO)


def test_a_damaged_adapter_of_peft_in_the_cache(hub_client: HubClient) -> None:
    """It has no manifest; that it is not what the Hub has is told by the cache's name for it."""
    put(hub_client, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"tensors"})
    found = hub.fetch(REPO)
    cached_blob(found, "adapter_model.safetensors").write_bytes(b"TENSORS")
    with pytest.warns(UserWarning, match="downloaded again"):
        hub.fetch(REPO)
    assert (found / "adapter_model.safetensors").read_bytes() == b"tensors"


# --- hostile repositories ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../evil.json", "a/../../evil.json", "/tmp/evil.json", "..\\evil.json", "C:evil.json", "~/evil"]
)
def test_names_that_lead_out_of_the_repository(hub_client: HubClient, original: dict[str, bytes], name: str) -> None:
    put(hub_client, {**original, name: b"evil"})
    with pytest.raises(UnsafeFileError, match="lists a file .* outside of its folder"):
        AutoDeltaModel.from_finetuned(REPO, BERT.build())
    assert not list(hub_client.home.rglob("evil*"))


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "..", "sub/x", "a\\b"])
@pytest.mark.parametrize("needs", ["delta", "all"])
def test_a_manifest_that_names_what_is_elsewhere(
    hub_client: HubClient, original: dict[str, bytes], tmp_path: Path, name: str, needs: str
) -> None:
    text = original[MANIFEST].decode()
    values = {key: value for key, value in json.loads(text).items() if key != "sha256"}
    values["files"][name] = hashlib.sha256(b"").hexdigest()
    put(hub_client, {**original, MANIFEST: sealed(values).encode()})
    assert dump(values) != text
    with pytest.raises(UnsafeFileError, match="plain names"):
        hub.fetch(REPO, needs=needs)


def test_a_cache_whose_links_lead_elsewhere(hub_client: HubClient, pushed: str, tmp_path: Path) -> None:
    found = hub.fetch(REPO)
    (tmp_path / "elsewhere").write_bytes((found / "config.json").read_bytes())
    (found / "config.json").unlink()
    (found / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="leads out of the cache"):
        hub.fetch(REPO, local_files_only=True)


@pytest.mark.parametrize("name", ["../x/y", "org/..", "a/b/c", "org/na me", "-org/x", "org/x--y", "org/x.git", "https://hub/x"])
def test_names_that_are_no_repository(
    hub_client: HubClient, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no name of a repository"):
        hub.fetch(name)
    assert hub_client.hub.requests == []


def test_the_probe_is_fetched_where_it_is_compared(hub_client: HubClient, tmp_path: Path) -> None:
    attach(BERT.build()).save_finetuned(tmp_path / "probed", probe=BERT.inputs())
    publishing.push(tmp_path / "probed", REPO)
    hub_client.hub.requests.clear()
    AutoDeltaModel.from_finetuned(REPO, BERT.build())
    assert "probe.safetensors" not in fetched(hub_client)
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build(), check_probe=True).hash_check is HashCheck.MATCH
    assert "probe.safetensors" in fetched(hub_client)
