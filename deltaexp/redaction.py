"""Secrets, kept out of what is printed and written: access tokens, API keys, passwords in addresses."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
"""Environment variables whose values are secret."""
HIDDEN = "[hidden]"
"""What stands in the place of a secret."""
SHORTEST = 6
"""Characters that a value must have to be taken for a secret: a shorter one occurs in words."""
SHAPES = re.compile(
    r"\bhf_(?:oauth_|jwt_|app_)?[A-Za-z0-9]{16,}\b"  # Hugging Face; hf_hub_download is no token
    r"|\bapi_org_[A-Za-z0-9]{16,}\b"
    r"|\bwandb_v\d_[A-Za-z0-9_-]{16,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}\b|\bgithub_pat_\w{20,}\b"
    r"|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"  # a JSON web token
)
"""What tokens look like, whoever they belong to."""
ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
"""The name and password, or the token, in an address."""
SIGNED = re.compile(
    r"(?i)([?&](?:x-amz-[a-z-]+|(?:x-goog-)?signature|sig|policy|key-pair-id|token|access_token|api_key)=)[^&\s'\"]+"
)
"""What lets whoever has a link of a storage use it."""
BEARER = re.compile(r"(?i)(\bbearer\s+)[^\s'\",}]+")


def secrets() -> list[str]:
    """Return the secrets that this process can know: those in its environment and the one that ``hf auth login`` saved."""
    found = [os.environ.get(name, "").strip() for name in VARIABLES]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    with contextlib.suppress(OSError, ValueError):  # where nobody has logged in
        found.append(Path(os.environ.get("HF_TOKEN_PATH") or home / "token").read_text(encoding="utf-8").strip())
    # The longest first: one may be the beginning of another.
    return sorted({secret for secret in found if len(secret) >= SHORTEST}, key=len, reverse=True)


def redact(text: str, more: Iterable[str | None] = ()) -> str:
    """Return a text in which every secret is replaced by `HIDDEN`.

    Args:
        text: What is to be printed or written.
        more: Secrets that the environment does not tell, such as a token that was passed to a function.
    """
    for secret in (*(one for one in more if isinstance(one, str) and len(one) >= SHORTEST), *secrets()):
        text = text.replace(secret, HIDDEN)
    for pattern, instead in ((SHAPES, HIDDEN), (ADDRESS, HIDDEN), (SIGNED, rf"\1{HIDDEN}"), (BEARER, rf"\1{HIDDEN}")):
        text = pattern.sub(instead, text)
    return text


def is_secret(value: object) -> bool:
    """Say whether a value holds a secret, in a list or a mapping of values too."""
    if isinstance(value, dict):
        return any(is_secret(one) for pair in value.items() for one in pair)
    if isinstance(value, (list, tuple, set)):
        return any(is_secret(one) for one in value)
    return isinstance(value, str) and redact(value) != value


class _Redacting(logging.Filter):
    """Hides secrets in what a handler writes; also in what other libraries log, such as the links that they use."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        return True


def guard_logs() -> None:
    """Let the handlers of the log that there are now hide secrets, those of the Hub's client too."""
    for name in (None, "huggingface_hub"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(one, _Redacting) for one in handler.filters):
                handler.addFilter(_Redacting())
