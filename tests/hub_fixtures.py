"""Fixtures around the tests' Hub: the running server, an environment for a subprocess, and the client in this process.

`conftest.py` imports `hub` and `hub_client`; `hub_env` is a plain function.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hub_server import HubServer

from deltaexp import hubclient

TOKEN = "hf_ada_may_write"
READ_TOKEN = "hf_ada_may_read"
STRANGER_TOKEN = "hf_bob_may_write_elsewhere"
USERS = {
    TOKEN: ("ada", ["DeltaHub"]),
    READ_TOKEN: ("ada", ["DeltaHub"], "read"),
    STRANGER_TOKEN: ("bob", []),
}

_PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}


def _foreign(name: str) -> bool:
    """Whether an environment variable of the parent may change what the client does."""
    prefixes = ("HF_", "HUGGING", "TRANSFORMERS_", "OAUTH_")
    return name.startswith(prefixes) or name.lower() in _PROXIES or name in ("DISABLE_TELEMETRY", "DO_NOT_TRACK")


def _settings(home: Path, token: str | None) -> dict[str, str]:
    """The variables that decide where the client goes, where it keeps files, and who it is."""
    settings = {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return settings | ({"HF_TOKEN": token} if token else {})


def hub_env(hub: HubServer, tmp_path: Path, token: str | None = None) -> dict[str, str]:
    """The environment of a subprocess whose client talks to `hub`, without a token as an anonymous one."""
    kept = {name: value for name, value in os.environ.items() if not _foreign(name)}
    return {**kept, **_settings(tmp_path / "hf_home", token), "HF_ENDPOINT": hub.endpoint}


@dataclass
class HubClient:
    """The real client in this process. `api` sends the token of `login`, or none after `logout`."""

    hub: HubServer
    home: Path
    _patch: pytest.MonkeyPatch

    @property
    def api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi()

    @property
    def cache(self) -> Path:
        return self.home / "hub"

    def login(self, token: str = TOKEN) -> None:
        self._patch.setenv("HF_TOKEN", token)

    def logout(self) -> None:
        self._patch.delenv("HF_TOKEN", raising=False)


def _module(name: str) -> ModuleType:
    """A module of the client. Not through attributes: `huggingface_hub.utils.tqdm` is the class there."""
    importlib.import_module(f"huggingface_hub.{name}")
    return sys.modules[f"huggingface_hub.{name}"]


def patch_client(patch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Points the client in this process at `endpoint`, with its cache and its token file below `home`.

    Most of the client reads `constants.NAME` when it is called, so patching `constants` does. The names patched apart
    from that are copies made when a module was imported.
    """
    constants = _module("constants")
    values: dict[str, Any] = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": getattr(constants, "HF_URL_HOSTS", frozenset()) | {"127.0.0.1"},
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HUGGINGFACE_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "CHECK_FOR_UPDATE_DONE_PATH": str(home / ".check_for_update_done"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in values.items():
        patch.setattr(constants, name, value, raising=False)  # other versions of the client know fewer names

    hf_api = _module("hf_api")
    # `huggingface_hub.whoami` and its siblings are methods of one object that was made at import.
    patch.setattr(hf_api.api, "endpoint", endpoint)
    patch.setattr(hf_api.api, "_whoami_cache", {}, raising=False)
    patch.setattr(_module("utils._git_credential"), "ENDPOINT", endpoint)
    patch.setattr(_module("utils._cache_manager"), "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(_module("utils._cache_assets"), "HF_ASSETS_CACHE", str(home / "assets"))
    patch.setattr(_module("utils.tqdm"), "HF_HUB_DISABLE_PROGRESS_BARS", True)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A running Hub: ada writes to her own namespace and to DeltaHub (`TOKEN`), bob to his own (`STRANGER_TOKEN`)."""
    with HubServer(USERS) as server:
        yield server
    assert server.errors == []
    assert server.leaks == []


@pytest.fixture
def hub_client(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubClient]:
    """The client in this process: logged in as ada, with a home of its own that only this test sees."""
    home = tmp_path / "hf_home"
    for name in [name for name in os.environ if _foreign(name)]:
        monkeypatch.delenv(name)
    for name, value in _settings(home, TOKEN).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)  # for the subprocesses of a test
    patch_client(monkeypatch, hub.endpoint, home)
    monkeypatch.setattr(hubclient, "FIRST_WAIT", 0.01)  # the waiting itself is tested where it matters
    from huggingface_hub import close_session

    close_session()  # the shared connections of another test may know a proxy, or a server that is gone
    with warnings.catch_warnings():
        # The client uploads LFS files with httpx's older `data=`, which warns, and here warnings are errors.
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        yield HubClient(hub, home, monkeypatch)
    close_session()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is slept, instead of sleeping it: deltaexp's waiting and the client's own."""
    slept: list[float] = []

    clock = SimpleNamespace(**{**vars(time), "sleep": slept.append})
    for module in (hubclient, "huggingface_hub.utils._http", "huggingface_hub.file_download"):
        module = importlib.import_module(module) if isinstance(module, str) else module
        monkeypatch.setattr(module, "time", clock)
    return slept
