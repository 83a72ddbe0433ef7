"""Everything that a Hub can do to a push: it ends in a complete commit that was read back, or in an error with nothing lost."""

from __future__ import annotations

import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_fixtures import TOKEN, HubClient, hub_env, naps
from hub_server import HubServer
from models import FAMILIES, attach, slow_but
from test_hub import REPO, WEIGHTS, content, folder, original, refused_push

from deltaexp import AutoDeltaModel, HashCheck, checkpoint, hub, hubclient, publishing
from deltaexp.errors import CardError, HubConflictError, HubError, MissingFileError, UnsafeFileError
from deltaexp.lab import pushing

__all__ = ["folder", "naps", "original"]

BERT = FAMILIES["bert"]
STEPS = {
    "the card": ("POST", "/api/validate-yaml"),
    "the repository": ("POST", "/api/repos/create"),
    "the head": ("GET", f"/api/models/{REPO}/revision/main"),
    "the list of files": ("GET", f"/api/models/{REPO}/tree/"),
    "what to upload": ("POST", "/preupload/"),
    "where to upload": ("POST", "/info/lfs/objects/batch"),
    "the commit": ("POST", "/commit/"),
    "the way back": ("GET", "/resolve/"),
    "the weights' way back": ("GET", "^/storage/"),
}


class Said(list):
    """What a push says while it waits."""

    def __call__(self, text: str) -> None:
        self.append(text)

    def __str__(self) -> str:
        return "\n".join(self)


@pytest.fixture
def said() -> Said:
    return Said()


def held(client: HubClient, revision: str = "main") -> dict[str, bytes]:
    files = client.hub.read(REPO, revision)
    files.pop(".gitattributes", None)
    return files


def commits(client: HubClient) -> int:
    return len(client.hub.repos["model", REPO].commits)


def complete(client: HubClient, original: dict[str, bytes]) -> None:
    """The delta is there, in one commit onto the first, and loads."""
    assert held(client) == original
    assert commits(client) == 2
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build()).hash_check is HashCheck.MATCH


# --- what passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step", slow_but(STEPS, ("the repository", "the head", "what to upload", "the commit", "the way back"))
)
@pytest.mark.parametrize("status", [500, pytest.param(429, marks=pytest.mark.slow)])
def test_an_error_that_passes(
    hub_client: HubClient, folder: Path, original: dict[str, bytes], said: Said, naps: list[float], step: str, status: int
) -> None:
    method, path = STEPS[step]
    fault = hub_client.hub.faults.add("status", method=method, path_regex=path, status=status, headers={"Retry-After": "7"})
    publishing.push(folder, REPO, say=said)
    assert fault.hits == 1
    assert max(naps) >= 7  # no sooner than the Hub asks
    complete(hub_client, original)


@pytest.mark.parametrize("step", slow_but(STEPS, ("the repository", "the commit", "the weights' way back")))
def test_a_connection_that_breaks(
    hub_client: HubClient, folder: Path, original: dict[str, bytes], said: Said, naps: list[float], step: str
) -> None:
    method, path = STEPS[step]
    fault = hub_client.hub.faults.add("drop", method=method, path_regex=path)
    publishing.push(folder, REPO, say=said)
    assert fault.hits == 1
    complete(hub_client, original)


@pytest.mark.parametrize("what", ["drop", "lose_answer"])
def test_a_connection_that_breaks_in_the_middle_of_the_weights(
    hub_client: HubClient, folder: Path, original: dict[str, bytes], said: Said, naps: list[float], what: str
) -> None:
    fault = hub_client.hub.faults.add(what, method="PUT")
    publishing.push(folder, REPO, say=said)
    assert fault.hits == 1
    complete(hub_client, original)


def test_what_is_said_while_waiting(hub_client: HubClient, folder: Path, said: Said, naps: list[float]) -> None:
    faults = hub_client.hub.faults
    faults.add("status", path_regex="/commit/", status=429, headers={"Retry-After": "7"})
    faults.add("status", path_regex="/commit/", status=503, times=2)
    publishing.push(folder, REPO, say=said)
    assert said == [
        "the commit: the Hub answered 429, too many requests, and asks to wait 7 s; trying again in 7 s (attempt 2 of 5)",
        "the commit: the Hub answered 503; trying again in 0.02 s (attempt 3 of 5)",
        "the commit: the Hub answered 503; trying again in 0.04 s (attempt 4 of 5)",
    ]
    assert naps == [7, 0.02, 0.04]


def test_the_waiting_is_real(hub_client: HubClient, folder: Path, said: Said) -> None:
    hub_client.hub.faults.add("status", path_regex="/commit/", status=429, headers={"Retry-After": "1"})
    began = time.monotonic()
    publishing.push(folder, REPO, say=said)
    assert time.monotonic() - began > 1


@pytest.mark.parametrize("wait", ["3600", formatdate(time.time() + 3600, usegmt=True)], ids=["seconds", "date"])
def test_who_asks_for_an_hour_is_not_waited_for(hub_client: HubClient, folder: Path, naps: list[float], wait: str) -> None:
    hub_client.hub.faults.add("status", path_regex="/commit/", times=None, status=429, headers={"Retry-After": wait})
    text = refused_push(folder)
    assert "the Hub takes no more requests for now and asks to wait 3" in text
    assert naps == []
    assert held(hub_client) == {}


def test_an_answer_lost_after_the_commit(hub_client: HubClient, folder: Path, original: dict[str, bytes], said: Said) -> None:
    fault = hub_client.hub.faults.add("lose_answer", path_regex="/commit/")
    pushed = publishing.push(folder, REPO, say=said)
    assert fault.hits == 1
    assert said == ["the commit: the answer of the Hub was lost, and what was asked for is done"]
    assert pushed.commit == hub_client.hub.repos["model", REPO].branches["main"]
    complete(hub_client, original)


def test_an_answer_lost_after_the_commit_and_a_hub_that_fails_then(
    hub_client: HubClient, folder: Path, original: dict[str, bytes], said: Said
) -> None:
    """It cannot be found out at once whether the commit is there, so it is sent again, which changes nothing."""
    faults = hub_client.hub.faults
    lost = faults.add("lose_answer", path_regex="/commit/")
    down = faults.add("status", path_regex="/revision/main", skip=1, times=5, status=502)
    publishing.push(folder, REPO, say=said)
    assert (lost.hits, down.hits) == (1, 5)
    complete(hub_client, original)


def test_a_hub_that_says_nothing(
    hub_client: HubClient, folder: Path, original: dict[str, bytes], said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubclient, "TIMEOUT", 0.5)
    fault = hub_client.hub.faults.add("hang", path_regex="/commit/")
    publishing.push(folder, REPO, say=said)
    assert fault.hits == 1
    assert "the connection failed (ReadTimeout); trying again in 0.01 s" in str(said)
    complete(hub_client, original)
    hooks = huggingface_hub.get_session().event_hooks["request"]
    assert not [hook for hook in hooks if hook.__module__.startswith("deltaexp")]  # the client is as it was


# --- what does not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", slow_but(STEPS, ("the card", "the commit")))
@pytest.mark.parametrize("action", ["status", "drop"])
def test_a_fault_that_stays(
    hub_client: HubClient, folder: Path, original: dict[str, bytes], naps: list[float], step: str, action: str
) -> None:
    method, path = STEPS[step]
    hub_client.hub.faults.add(action, method=method, path_regex=path, times=None)
    refused_push(folder)
    assert sum(naps) < 120
    hub_client.hub.faults.clear()
    if "way back" not in step:
        # Nothing that loads is there.
        assert not hub_client.hub.repos or held(hub_client) == {}
        with pytest.raises((HubError, checkpoint.CheckpointError)):
            hub.fetch(REPO)
    publishing.push(folder, REPO)  # what was advised
    complete(hub_client, original)


@pytest.mark.parametrize("action", ["status", "drop"])
def test_weights_that_cannot_be_uploaded(
    hub_client: HubClient, folder: Path, original: dict[str, bytes], naps: list[float], action: str
) -> None:
    hub_client.hub.faults.add(action, method="PUT", times=None)
    refused_push(folder)
    assert held(hub_client) == {}
    hub_client.hub.faults.clear()
    publishing.push(folder, REPO)
    complete(hub_client, original)


def test_the_advice_has_all_options(hub_client: HubClient, folder: Path) -> None:
    hub_client.hub.faults.add("status", path_regex="/commit/", times=None, status=403)
    with pytest.raises(HubError) as caught:
        publishing.push(folder, REPO, private=True, revision="seed-1", tag="v1", message="The first one")
    assert (
        f"push it later with: python -m deltaexp push {folder} {REPO} private=true revision=seed-1 tag=v1 "
        "'message=The first one'" in str(caught.value)
    )


def test_a_repository_that_is_half_there_is_not_loaded(hub_client: HubClient, folder: Path) -> None:
    """What no push of deltaexp's leaves: somebody has deleted the weights."""
    publishing.push(folder, REPO)
    hub_client.api.delete_file(WEIGHTS, REPO)
    with pytest.raises(MissingFileError, match=rf"not complete: it has no {WEIGHTS}"):
        AutoDeltaModel.from_finetuned(REPO, BERT.build())


# --- others at the same time ------------------------------------------------------------------------------------------


def other_commit(client: HubClient, name: str = "notes.md", text: bytes = b"something else") -> Any:
    from huggingface_hub import CommitOperationAdd

    return lambda: client.api.create_commit(REPO, [CommitOperationAdd(name, text)], commit_message="By somebody else")


def test_a_commit_in_between_is_looked_at_and_built_upon(
    hub_client: HubClient, folder: Path, original: dict[str, bytes], said: Said
) -> None:
    fault = hub_client.hub.faults.add("first", path_regex="/preupload/", effect=other_commit(hub_client))
    # The client asks, commits, and the other one was faster: the Hub answers 412, and both are kept.
    publishing.push(folder, REPO, say=said)
    assert fault.hits == 1
    assert "somebody else has made one in the meantime" in str(said)
    assert held(hub_client) == {**original, "notes.md": b"something else"}


def test_commits_in_between_without_end(hub_client: HubClient, folder: Path, said: Said) -> None:
    hub_client.hub.faults.add("status", path_regex="/commit/", times=None, status=412)
    before = content(folder)
    with pytest.raises(HubConflictError, match=rf"'{REPO}' has moved"):
        publishing.push(folder, REPO, say=said)
    assert content(folder) == before
    assert held(hub_client) == {}


def test_parent_commit(hub_client: HubClient, folder: Path, original: dict[str, bytes]) -> None:
    hub_client.api.create_repo(REPO)
    first = hub_client.hub.repos["model", REPO].branches["main"]
    moved = other_commit(hub_client)().oid
    before = content(folder)
    with pytest.raises(HubConflictError) as caught:
        publishing.push(folder, REPO, parent_commit=first[:8])
    text = str(caught.value)
    assert f"was to go onto the commit {first[:8]} of 'main', and the last one there is {moved[:12]} now" in text
    assert "'By somebody else', by ada" in text
    assert text.endswith(f"python -m deltaexp push {folder} {REPO} parent_commit={moved}")
    assert content(folder) == before
    assert hub_client.hub.uploads() == [line for line in hub_client.hub.uploads() if line.path.endswith("/commit/main")][:1]
    publishing.push(folder, REPO, parent_commit=moved)
    assert set(held(hub_client)) == {*original, "notes.md"}


def test_parent_commit_that_moves_at_the_last_moment(hub_client: HubClient, folder: Path) -> None:
    hub_client.api.create_repo(REPO)
    first = hub_client.hub.repos["model", REPO].branches["main"]
    hub_client.hub.faults.add("first", path_regex="/preupload/", effect=other_commit(hub_client))
    with pytest.raises(HubConflictError, match="has moved"):
        publishing.push(folder, REPO, parent_commit=first)
    assert set(held(hub_client)) == {"notes.md"}


def test_a_new_delta_takes_the_place_of_an_old_one(hub_client: HubClient, folder: Path, tmp_path: Path) -> None:
    publishing.push(folder, REPO)
    other_commit(hub_client, "LICENSE", b"mine")()
    new = tmp_path / "new"
    attach(BERT.build()).save_finetuned(new)
    publishing.push(new, REPO)
    # results.json belonged to the old one and is no part of the new one; LICENSE is nobody's.
    assert set(held(hub_client)) == {path.name for path in new.iterdir()} | {"LICENSE"}
    assert commits(hub_client) == 4
    AutoDeltaModel.from_finetuned(REPO, BERT.build())


# --- options ----------------------------------------------------------------------------------------------------------


def test_a_tag(hub_client: HubClient, folder: Path, original: dict[str, bytes]) -> None:
    lost = hub_client.hub.faults.add("lose_answer", path_regex="/tag/")
    pushed = publishing.push(folder, REPO, tag="v1", say=Said())
    assert lost.hits == 1
    assert hub_client.hub.repos["model", REPO].tags == {"v1": pushed.commit}
    assert publishing.push(folder, REPO, tag="v1") == pushed  # again, which changes nothing
    other_commit(hub_client)()
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build(), revision="v1").hash_check is HashCheck.MATCH


def test_a_tag_that_is_taken(hub_client: HubClient, folder: Path) -> None:
    hub_client.api.create_repo(REPO)
    hub_client.api.create_tag(REPO, tag="v1")
    with pytest.raises(HubConflictError, match=r"The tag 'v1' .* names another delta already.*Nothing was uploaded"):
        publishing.push(folder, REPO, tag="v1")
    assert hub_client.hub.uploads() == []


@pytest.mark.parametrize("lost", [False, True])
def test_a_pull_request(hub_client: HubClient, folder: Path, original: dict[str, bytes], said: Said, lost: bool) -> None:
    hub_client.api.create_repo(REPO)
    if lost:
        hub_client.hub.faults.add("lose_answer", path_regex="/commit/")
    pushed = publishing.push(folder, REPO, create_pr=True, say=said)
    assert pushed.url == f"{hub_client.hub.endpoint}/{REPO}/discussions/1"
    assert held(hub_client) == {}
    assert held(hub_client, "refs/pr/1") == original
    assert list(hub_client.hub.repos["model", REPO].pulls) == ["refs/pr/1"]
    assert AutoDeltaModel.from_finetuned(REPO, BERT.build(), revision="refs/pr/1").hash_check is HashCheck.MATCH


@pytest.mark.parametrize(("is_private", "word"), [(True, "private"), (False, "public")])
def test_what_is_there_is_not_as_private_as_was_asked_for(
    hub_client: HubClient, folder: Path, is_private: bool, word: str
) -> None:
    hub_client.api.create_repo(REPO, private=is_private)
    with pytest.raises(HubConflictError, match=f"is there already and is {word}"):
        publishing.push(folder, REPO, private=not is_private)
    assert hub_client.hub.uploads() == []
    publishing.push(folder, REPO, private=is_private)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"revision": "a b"}, "revision is 'a b'"),
        ({"tag": "../x"}, r"tag is '\.\./x'"),
        ({"create_pr": True, "revision": "seed-1"}, "against the main branch"),
        ({"create_pr": True, "tag": "v1"}, "only proposes"),
        ({"parent_commit": "main"}, "parent_commit is 'main'"),
    ],
)
def test_options_that_cannot_be(hub_client: HubClient, folder: Path, options: dict[str, Any], what: str) -> None:
    with pytest.raises(hubclient.ConfigError, match=what):
        publishing.push(folder, REPO, **options)
    assert hub_client.hub.requests == []


# --- the card and the files -------------------------------------------------------------------------------------------


def test_the_hub_has_the_last_word_on_the_card(hub_client: HubClient, folder: Path) -> None:
    """A licence that we know and this Hub does not: nothing is made, nothing uploaded."""
    card = (folder / "README.md").read_text().replace("library_name:", "license: llama3.3\nlibrary_name:")
    checkpoint.add_files(folder, {"README.md": card})
    with pytest.raises(CardError, match="The Hub refuses the model card: .*llama3.3"):
        publishing.push(folder, REPO)
    assert hub_client.hub.repos == {}


def test_a_card_that_cannot_be(hub_client: HubClient, folder: Path) -> None:
    card = (folder / "README.md").read_text().replace("library_name:", "base_model: /home/ada/t5\nlibrary_name:")
    checkpoint.add_files(folder, {"README.md": card})
    with pytest.raises(CardError, match="base_model in the model card is '/home/ada/t5'"):
        publishing.push(folder, REPO)
    assert hub_client.hub.requests == []


def test_links_that_lead_out_of_the_folder(hub_client: HubClient, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_bytes((folder / "results.json").read_bytes())
    (folder / "results.json").unlink()
    (folder / "results.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UnsafeFileError, match=r"results\.json' is a link that leads out of the folder"):
        publishing.push(folder, REPO)
    assert hub_client.hub.requests == []


def test_a_link_within_the_folder(hub_client: HubClient, folder: Path, original: dict[str, bytes]) -> None:
    (folder / "kept").mkdir()
    (folder / "results.json").rename(folder / "kept" / "results.json")
    (folder / "results.json").symlink_to(Path("kept") / "results.json")
    publishing.push(folder, REPO)
    assert held(hub_client) == original


def test_the_home_folder_stays_at_home(hub_client: HubClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/geheim")
    checkpoint.add_files(folder, {"results.json": '{"data": "/home/geheim/reviews"}\n'})
    with pytest.raises(UnsafeFileError, match="names your home folder"):
        publishing.push(folder, REPO)
    assert hub_client.hub.requests == []


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "status"), [("the commit", 400), ("the repository", 403), ("the way back", 404), ("the card", 500)]
)
def test_a_hub_that_repeats_the_token(
    hub_client: HubClient, folder: Path, tmp_path: Path, naps: list[float], caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str], step: str, status: int,
) -> None:  # fmt: skip
    import traceback

    method, path = STEPS[step]
    body = f"bad token {TOKEN} in Authorization: Bearer {TOKEN} at https://ada:{TOKEN}@hub"
    headers = {"X-Error-Message": body}
    hub_client.hub.faults.add("status", method=method, path_regex=path, times=None, status=status, headers=headers, body=body)
    said = Said()
    with pytest.raises(HubError) as caught:
        pushing.push(folder, REPO, {}, say=said)
    assert "bad token [hidden]" in str(caught.value) or status == 404
    printed = "".join(traceback.format_exception(caught.value)) + str(said) + caplog.text + "".join(capfd.readouterr())
    assert TOKEN not in printed
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file


# --- the other way to upload ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("regular", [True, False])
def test_a_client_with_xet(folder: Path, original: dict[str, bytes], tmp_path: Path, regular: bool) -> None:
    """It is one commit with xet, too; a Hub that has no such storage leaves the repository empty, and the command says so."""
    with HubServer({TOKEN: ("ada", ["DeltaHub"])}, lfs=not regular) as server:
        env = hub_env(server, tmp_path, TOKEN) | {"HF_HUB_DISABLE_XET": "0"}
        words = [sys.executable, "-m", "deltaexp", "push", str(folder), REPO]
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        files = server.read(REPO)
        del files[".gitattributes"]
        if regular:
            assert done.returncode == 0, done.stderr
            assert (files, len(server.repos["model", REPO].commits)) == (original, 2)
        else:
            assert done.returncode == 1
            assert files == {}
            assert f"push it later with: python -m deltaexp push {folder} {REPO}" in done.stderr
        assert (server.errors, server.leaks) == ([], [])
