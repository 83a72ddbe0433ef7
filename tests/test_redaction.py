"""Secrets are found and hidden, and what only looks a little like one stays."""

import logging

import pytest

from deltaexp.__main__ import main
from deltaexp.errors import HubConflictError, HubError
from deltaexp.redaction import HIDDEN, VARIABLES, guard_logs, is_secret, redact

TOKEN = "hf_" + "aB3" * 11 + "x"
SECRETS = [
    TOKEN,
    "api_org_" + "aB3" * 11,
    "wandb_v1_" + "aB3_" * 10,
    "ghp_" + "aB3" * 12,
    "github_pat_" + "aB3_" * 12,
    "sk-" + "aB3" * 12,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
]
HARMLESS = [
    "hf_hub_download", "hf_xet", "HF_TOKEN", "hf_transfer is off", "DeltaHub/sst2-t5-base", "bearer", "sk-learn", "a" * 40,
    "https://huggingface.co/t5-base", "git@github.com", "lora_r=8", "2026-11-23 16:30", "d41d8cd98f00b204e9800998ecf8427e",
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_token(secret: str) -> None:
    for form in ("{}", "token={}", "'{}', and more", "https://hub/{}/x", "Authorization: Bearer {}"):
        text = form.format(secret)
        assert secret not in redact(text)
        assert HIDDEN in redact(text)
        assert is_secret(text)
    assert is_secret({"a": [1, {"b": secret}]})
    assert is_secret({secret: 1})


@pytest.mark.parametrize("text", HARMLESS)
def test_what_does_not(text: str) -> None:
    assert redact(text) == text
    assert not is_secret(text)
    assert not is_secret({"a": [text, 1, None, 2.5]})


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_environment_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "plain-secret")
    assert redact("so plain-secret it is") == f"so {HIDDEN} it is"
    monkeypatch.setenv(name, "x")  # would be found in every word
    assert redact("extra") == "extra"


def test_what_was_saved_by_a_login(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert redact("saved-by-login") == "saved-by-login"
    (tmp_path / "token").write_text("saved-by-login\n")
    assert redact("saved-by-login") == HIDDEN
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "other"))
    assert redact("saved-by-login") == "saved-by-login"


def test_addresses_and_headers() -> None:
    assert redact("https://ada:pass@hub/x and https://ada@hub") == f"https://{HIDDEN}@hub/x and https://{HIDDEN}@hub"
    assert redact("authorization: bearer abc.def") == f"authorization: bearer {HIDDEN}"
    assert redact("one two", ["two", None, "one"]) == "one two"  # too short
    assert redact("the passed-one", ["passed-one"]) == f"the {HIDDEN}"


def test_links_that_anybody_may_use() -> None:
    link = "https://s3.hub/ab/cd?X-Amz-Algorithm=AWS4&X-Amz-Signature=0123abcd&X-Amz-Expires=900&response=inline&token=t0ken"
    hidden = f"X-Amz-Algorithm={HIDDEN}&X-Amz-Signature={HIDDEN}&X-Amz-Expires={HIDDEN}&response=inline&token={HIDDEN}"
    assert redact(link) == f"https://s3.hub/ab/cd?{hidden}"


def test_logs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.FileHandler(tmp_path / "log")
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    guard_logs()
    guard_logs()
    assert len(handler.filters) == 1
    logging.getLogger("httpx").error("HTTP Request: %s %s", "PUT", f"https://hub/x?sig=abc {TOKEN}")
    handler.close()
    assert (tmp_path / "log").read_text() == f"HTTP Request: PUT https://hub/x?sig={HIDDEN} {HIDDEN}\n"


def test_what_was_typed_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([f"lora_r={TOKEN}"], [TOKEN], ["push", "nowhere", f"{TOKEN}=1"], [f"hub.repo_id={TOKEN}"], [f"+x={TOKEN} y"]):
        assert main(words) == 2
        shown = capsys.readouterr()
        assert TOKEN not in shown.out + shown.err
        assert shown.err


@pytest.mark.parametrize("kind", [HubError, HubConflictError])
def test_an_error_of_the_hub_shows_none(kind: type[HubError]) -> None:
    assert TOKEN not in str(kind(f"The Hub said {TOKEN}."))
    assert TOKEN not in repr(kind(f"The Hub said {TOKEN}."))
