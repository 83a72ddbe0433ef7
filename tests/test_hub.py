"""Pushing a delta to the Hub and loading it from there, with all that goes wrong on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_fixtures import READ_TOKEN, STRANGER_TOKEN, HubClient
from models import FAMILIES, attach, logits, snapshot

import deltaexp
from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck, checkpoint, hub, hubclient, publishing
from deltaexp.errors import CheckpointError, ConfigError, DamagedFileError, HubError, MissingFileError

BERT = FAMILIES["bert"]
REPO = "DeltaHub/tiny-lora"
WEIGHTS = "delta_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a delta, results included."""
    folder = tmp_path_factory.mktemp("hub") / "delta"
    attach(BERT.build()).save_finetuned(folder)
    checkpoint.add_files(folder, {"results.json": '{"accuracy": 1.0}\n'})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(original: dict[str, bytes], tmp_path: Path) -> Path:
    """A copy of them, beside a file that is no part of the delta."""
    path = tmp_path / "delta"
    path.mkdir()
    for name, data in original.items():
        (path / name).write_bytes(data)
    (path / "private.txt").write_text("not for the Hub")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused_push(folder: Path, repo: str = REPO, **options: str) -> str:
    """Push, which must fail and leave the folder as it was, and return what is said."""
    before = content(folder)
    with pytest.raises(HubError) as caught:
        publishing.push(folder, repo, **options)
    assert content(folder) == before
    assert repo in str(caught.value)
    assert f"The delta is safe in {str(folder)!r}" in str(caught.value)
    assert f"deltaexp push {folder} {repo}" in str(caught.value)
    return str(caught.value)


def test_push_and_load(hub_client: HubClient, folder: Path, original: dict[str, bytes]) -> None:
    before = content(folder)
    pushed = publishing.push(folder, REPO)
    assert content(folder) == before
    held = hub_client.hub.read(REPO)
    assert {name: data for name, data in held.items() if name != ".gitattributes"} == original
    commit = hub_client.api.list_repo_commits(REPO)[0]
    assert pushed == publishing.Pushed(f"{hub_client.hub.endpoint}/{REPO}/commit/{commit.commit_id}", commit.commit_id)
    assert commit.title == "Add a lora delta trained with deltaexp"
    # Every file was read back from the Hub, at that commit.
    fetched = [line.path for line in hub_client.hub.requests if line.method == "GET" and line.status == 200]
    assert [path for path in fetched if path.startswith("/storage/")]  # where the client reads the weights
    for name in set(original) - {WEIGHTS}:
        assert any(commit.commit_id in path and path.endswith(name) for path in fetched), name
    assert hub_client.api.model_info(REPO).card_data.library_name == "deltaexp"

    local, backbone = BERT.build(), BERT.build()
    AutoDeltaModel.from_finetuned(folder, local)
    loaded = AutoDeltaModel.from_finetuned(REPO, backbone)
    assert loaded.hash_check is HashCheck.MATCH
    assert torch.equal(logits(backbone, BERT.inputs()), logits(local, BERT.inputs()))
    assert AutoDeltaConfig.from_finetuned(REPO) == loaded.config
    assert deltaexp.LoraModel.from_finetuned(REPO, BERT.build()).hash_check is HashCheck.MATCH


def test_pushing_again_makes_no_mess(hub_client: HubClient, folder: Path, original: dict[str, bytes]) -> None:
    publishing.push(folder, REPO)
    publishing.push(folder, REPO, message="Once more")
    held = hub_client.hub.read(REPO)
    assert {name: data for name, data in held.items() if name != ".gitattributes"} == original


def test_a_revision(hub_client: HubClient, folder: Path) -> None:
    publishing.push(folder, REPO, revision="seed-1", message="Seed 1")
    assert set(hub_client.hub.read(REPO)) == {".gitattributes"}
    assert WEIGHTS in hub_client.hub.read(REPO, "seed-1")
    assert hub_client.api.list_repo_commits(REPO, revision="seed-1")[0].title == "Seed 1"
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build(), revision="seed-1").hash_check is HashCheck.MATCH
    with pytest.raises(CheckpointError, match=rf"'{REPO}' holds no config\.json.*name it with revision"):
        AutoDeltaModel.from_finetuned(REPO, BERT.build())
    with pytest.raises(HubError, match="no such revision"):
        AutoDeltaModel.from_finetuned(REPO, BERT.build(), revision="seed-2")


def test_a_private_repository(hub_client: HubClient, folder: Path) -> None:
    publishing.push(folder, REPO, private=True)
    assert hub_client.api.model_info(REPO).private
    hub_client.logout()
    with pytest.raises(HubError, match="your token may not see it"):
        AutoDeltaModel.from_finetuned(REPO, BERT.build())
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build(), token=READ_TOKEN).hash_check is HashCheck.MATCH


# --- read back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (WEIGHTS, r"/storage/"),
        ("manifest.json", r"/resolve/.*manifest\.json"),
        *(
            pytest.param(name, rf"/resolve/.*{name}", marks=pytest.mark.slow)
            for name in ("config.json", "README.md", "results.json")
        ),
    ],
)
def test_other_bytes_on_reading_back(hub_client: HubClient, folder: Path, name: str, path: str) -> None:
    publishing.push(folder, REPO)
    hub_client.hub.repos.clear()
    once = hub_client.hub.faults.add("corrupt", method="GET", path_regex=path)
    publishing.push(folder, REPO)  # it was the way back that was bad: reading once more tells
    assert once.hits == 1
    hub_client.hub.repos.clear()
    always = hub_client.hub.faults.add("corrupt", method="GET", path_regex=path, times=None)
    said = refused_push(folder)
    assert always.hits == 2
    assert f"is not what was pushed: {name} in the commit" in said


def test_no_answer_on_reading_back(hub_client: HubClient, folder: Path) -> None:
    fault = hub_client.hub.faults.add("status", method="GET", path_regex=r"/resolve/", times=None, status=404)
    assert "could not be read back" in refused_push(folder)
    assert fault.hits


def test_other_bytes_on_loading(hub_client: HubClient, folder: Path) -> None:
    publishing.push(folder, REPO)
    hub_client.hub.faults.add("corrupt", method="GET", path_regex="/storage/")
    backbone = BERT.build()
    before = snapshot(backbone)
    hub_client.hub.faults.add("corrupt", method="GET", path_regex="/storage/")
    with (
        pytest.warns(UserWarning, match=f"'{REPO}' in the cache is damaged, so the delta is downloaded again.*{WEIGHTS}"),
        pytest.raises(DamagedFileError, match=WEIGHTS),
    ):
        AutoDeltaModel.from_finetuned(REPO, backbone)
    assert snapshot(backbone) == before
    # The damaged copy lies in the cache now. Offline it is refused; as soon as the Hub is asked, it is replaced.
    with pytest.raises(DamagedFileError, match="force_download=True"):
        AutoDeltaModel.from_finetuned(REPO, BERT.build(), local_files_only=True)
    with pytest.warns(UserWarning, match="is damaged, so the delta is downloaded again"):
        assert AutoDeltaModel.from_finetuned(REPO, BERT.build()).hash_check is HashCheck.MATCH
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build(), local_files_only=True).hash_check is HashCheck.MATCH


# --- what the Hub refuses ---------------------------------------------------------------------------------------------


def test_no_token(hub_client: HubClient, folder: Path) -> None:
    hub_client.logout()
    said = refused_push(folder)
    assert "hf auth login" in said
    assert "HF_TOKEN" in said
    assert hub_client.hub.repos == {}


@pytest.mark.parametrize("token", [READ_TOKEN, STRANGER_TOKEN])
def test_a_token_that_may_not_write(hub_client: HubClient, folder: Path, token: str) -> None:
    assert "your token may not write there" in refused_push(folder, token=token)
    assert hub_client.hub.repos == {}


def test_a_token_that_is_none(hub_client: HubClient, folder: Path) -> None:
    said = refused_push(folder, token="hf_nobody")
    assert "hf auth login" in said
    assert "hf_nobody" not in said


def test_the_hub_fails_at_the_commit(hub_client: HubClient, folder: Path) -> None:
    fault = hub_client.hub.faults.add("status", method="POST", path_regex="/commit/", times=None, status=500)
    said = refused_push(folder)
    assert fault.hits == hubclient.ATTEMPTS
    assert "the Hub answered with an error" in said
    assert "500" in said
    assert set(hub_client.hub.read(REPO)) == {".gitattributes"}
    hub_client.hub.faults.clear()
    publishing.push(folder, REPO)  # what was advised works
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build()).hash_check is HashCheck.MATCH


def test_the_hub_is_down(hub_client: HubClient, folder: Path) -> None:
    hub_client.hub.stop()
    assert "the Hub cannot be reached" in refused_push(folder)
    with pytest.raises(HubError, match=r"cannot be reached") as caught:
        AutoDeltaModel.from_finetuned(REPO, BERT.build())
    assert REPO in str(caught.value)


def test_what_was_fetched_once_loads_without_the_hub(hub_client: HubClient, folder: Path) -> None:
    publishing.push(folder, REPO)
    AutoDeltaModel.from_finetuned(REPO, BERT.build())
    commit = hub_client.api.model_info(REPO).sha
    hub_client.hub.stop()
    with pytest.warns(UserWarning, match=f"the one in the cache is used: {commit[:12]}.*It may be stale"):
        assert AutoDeltaModel.from_finetuned(REPO, BERT.build()).hash_check is HashCheck.MATCH
    # Who names a commit, or asks for no network, is told nothing: there is nothing to doubt.
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build(), revision=commit).hash_check is HashCheck.MATCH
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build(), local_files_only=True).hash_check is HashCheck.MATCH


def test_a_repository_that_does_not_exist(hub_client: HubClient) -> None:
    with pytest.raises(HubError, match="no such repository"):
        AutoDeltaModel.from_finetuned("DeltaHub/nothing", BERT.build())


# --- what is not even tried -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "README.md", "results.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_delta_is_not_pushed(hub_client: HubClient, folder: Path, name: str, damage: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    if damage == "missing":
        (folder / name).unlink()
    with pytest.raises((DamagedFileError, MissingFileError), match=name):
        publishing.push(folder, REPO)
    assert hub_client.hub.requests == []


def test_what_is_no_delta_is_not_pushed(hub_client: HubClient, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        publishing.push(tmp_path / "empty", REPO)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        publishing.push(folder, REPO)
    assert hub_client.hub.requests == []


@pytest.mark.parametrize("name", ["tiny-lora", "a/b/c", "", "a b/c"])
def test_names_that_no_repository_has(hub_client: HubClient, folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no name of a repository"):
        publishing.push(folder, name)
    if name:
        with pytest.raises(CheckpointError, match="no folder"):
            hub.fetch(name)
    assert hub_client.hub.requests == []


def test_a_folder_goes_before_a_repository_of_its_name(
    hub_client: HubClient, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / "there")
    (tmp_path / "DeltaHub").mkdir()
    (tmp_path / "there").rename(tmp_path / REPO)
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build()).hash_check is HashCheck.MATCH
    assert hub_client.hub.requests == []
