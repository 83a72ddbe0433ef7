"""The Hugging Face Hub's client: its errors in whole sentences, patience with a Hub that fails, and what a push may ask for.

Nothing here imports torch, and the client itself is imported where it is used.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from deltaexp.errors import ConfigError, DeltaExpError, HubError
from deltaexp.redaction import redact

Result = TypeVar("Result")

REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
"""What the name of a repository looks like; see `is_repo_id` for the rest of the rules."""
COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit, whole: what it names never changes."""
ATTEMPTS = 5
"""How often a step is tried while the Hub fails in a way that may pass."""
FIRST_WAIT = 1.0
"""Seconds before the second attempt; they double from one attempt to the next."""
LONGEST_WAIT = 120.0
"""Seconds that a Hub may ask to wait (``Retry-After``); who asks for more is answered with an error that says so."""
PATIENCE = 300.0
"""Seconds after whose end a step is not tried again."""
TIMEOUT = 120.0
"""Seconds that the Hub may be silent in; the client itself would wait for ever."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Answers that may be other ones in a moment."""

log = logging.getLogger("deltaexp")


def is_repo_id(text: str) -> bool:
    """Say whether a text is the name of a repository, such as ``DeltaHub/sst2-t5-base``."""
    plain = REPO_ID.fullmatch(text) and "--" not in text and ".." not in text
    return bool(plain) and not text.endswith((".git", "-", ".")) and not text.split("/")[0].endswith(("-", "."))


def check_push(
    repo_id: str,
    *,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool | None = None,
    parent_commit: str | None = None,
) -> None:
    """Check what a push is asked for.

    Raises:
        ConfigError: If a name is none, or two wishes contradict one another.
    """
    if not is_repo_id(repo_id):
        raise ConfigError(
            f"{repo_id!r} is no name of a repository; it must look like 'DeltaHub/sst2-t5-base': letters, digits, '-', '_' and "
            "'.', with none of '--' and '..', and at most 96 of them after the '/'."
        )
    for key, name in (("revision", revision), ("tag", tag)):
        if name is not None and (not re.fullmatch(r"\w[\w./-]*", name) or ".." in name or name.endswith((".lock", "/", "."))):
            raise ConfigError(f"{key} is {name!r}; it must be a name such as 'seed-1': letters, digits, '-', '_', '.' and '/'.")
    if create_pr and revision not in (None, "main"):
        raise ConfigError(
            f"create_pr=true opens a pull request against the main branch, and revision={revision!r} was given. "
            "Leave one of them out."
        )
    if create_pr and tag is not None:
        raise ConfigError(
            f"create_pr=true only proposes a commit, so tag={tag!r} would name what nobody has accepted yet. "
            "Leave the tag out, and set it when the pull request is merged."
        )
    if parent_commit is not None and not re.fullmatch("[0-9a-f]{7,40}", parent_commit):
        raise ConfigError(f"parent_commit is {parent_commit!r}; it must be a commit, of which at least 7 digits are given.")


def status(error: BaseException) -> int | None:
    """Return the status of the answer that made an error; None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def asked_to_wait(error: BaseException) -> float | None:
    """Return the seconds that a ``Retry-After`` asks for; None where there is none."""
    value = (getattr(getattr(error, "response", None), "headers", None) or {}).get("Retry-After")
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None


def passing(error: BaseException | None, connect: bool = True) -> bool:
    """Say whether what went wrong may go well in a moment.

    Args:
        error: What was raised.
        connect: Whether that is so where no connection can be made at all.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return passing(error.__cause__, connect)  # the client looked into its cache because of what the Hub did
    if isinstance(error, (errors.LocalTokenNotFoundError, errors.OfflineModeIsEnabled)):
        return False
    code = status(error) if error else None
    if code is not None:
        return code in PASSING
    if not isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError)):
        return False
    return connect or not type(error).__name__.startswith("Connect")


def persistently(
    what: str,
    action: Callable[[], Result],
    *,
    done: Callable[[], Result | None] | None = None,
    say: Callable[[str], None] | None = None,
    attempts: int | None = None,
    connect: bool = True,
) -> Result:
    """Do a step that may be repeated, again and again while the Hub fails in a way that may pass.

    Args:
        what: The step in words, for what is said.
        action: The step; doing it twice must be the same as doing it once.
        done: Finds out after a failure whether the step was done all the same, and returns its result then: an answer may be
            lost on its way back.
        say: Takes the sentences that say what is waited for; the log where none is given.
        attempts: How often to try at most.
        connect: Whether to try again where no connection can be made at all.

    Raises:
        Exception: What the client raised last.
    """
    say = log.warning if say is None else say
    start, limit = time.monotonic(), attempts or ATTEMPTS
    for attempt in range(1, limit + 1):
        try:
            with _bounded():
                return action()
        except Exception as error:
            if done is not None:
                try:
                    found = done()
                except Exception:  # it cannot be found out now, so the step is simply repeated
                    found = None
                if found is not None:
                    say(f"{what}: the answer of the Hub was lost, and what was asked for is done")
                    return found
            asked = asked_to_wait(error) or 0.0
            seconds = max(FIRST_WAIT * 2 ** (attempt - 1), asked)
            over = attempt == limit or asked > LONGEST_WAIT or time.monotonic() - start + seconds > PATIENCE
            if over or not passing(error, connect):
                raise
            say(redact(f"{what}: {_briefly(error)}; trying again in {seconds:g} s (attempt {attempt + 1} of {limit})"))
            time.sleep(seconds)
    raise AssertionError("unreachable")


@contextmanager
def _bounded() -> Iterator[None]:
    """Let the client's requests end after `TIMEOUT` seconds of silence; one that has a limit of its own keeps it."""
    from huggingface_hub.utils import get_session

    def limit(request: Any) -> None:
        # The client sets no limit for most requests, and for some it asks that there be none.
        limits = request.extensions.get("timeout") or {}
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {k: TIMEOUT if limits.get(k) is None else limits[k] for k in kinds}

    session = get_session()
    before = session.event_hooks
    session.event_hooks = {**before, "request": [*before.get("request", []), limit]}
    try:
        yield
    finally:
        session.event_hooks = before


def _briefly(error: BaseException) -> str:
    code = status(error) or status(error.__cause__ or error)
    if code == 429:
        return "the Hub answered 429, too many requests" + (
            f", and asks to wait {asked_to_wait(error):g} s" if asked_to_wait(error) else ""
        )
    return f"the Hub answered {code}" if code else f"the connection failed ({type(error).__name__})"


@contextmanager
def explained(what: str, advice: str = "", token: str | None = None) -> Iterator[None]:
    """Turn the client's errors into one `HubError` that says what could not be done, why, and what to do.

    Args:
        what: What could not be done.
        advice: What to do.
        token: The token that was used, which the error must not show.
    """
    from huggingface_hub import errors

    reasons: list[tuple[Any, str]] = [
        (errors.LocalTokenNotFoundError, "there is no access token: run `hf auth login` or set HF_TOKEN"),
        (errors.GatedRepoError, "the repository is gated: ask for access on its page"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (
            errors.RepositoryNotFoundError,
            "there is no such repository, or your token may not see it (run `hf auth login` or set HF_TOKEN)",
        ),
        (errors.LocalEntryNotFoundError, "it is not in the cache, and the Hub cannot be reached"),
        (errors.OfflineModeIsEnabled, "offline mode is on (HF_HUB_OFFLINE)"),
        (errors.HfHubHTTPError, ""),
        (errors.HTTPError, "the Hub cannot be reached"),  # of httpx or httpx2, whichever this client uses
        (OSError, "the Hub cannot be reached"),
        (ValueError, "the Hub's client refuses it"),
        (RuntimeError, "the Hub's client could not upload or download a file"),
    ]
    kinds = tuple(kind for kind, _ in reasons)
    try:
        yield
    except DeltaExpError:
        raise
    except Exception as raised:
        # The client makes a RuntimeError of an upload that failed, after attempts of its own.
        error = raised.__cause__ if isinstance(raised, RuntimeError) and raised.__cause__ else raised
        if not isinstance(error, kinds):
            raise
        reason = next(text for kind, text in reasons if isinstance(error, kind))
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            reason = reason if isinstance(error, FileNotFoundError) else "this machine refuses to read or write a file"
        if not reason:
            reason = {
                401: "the access token is missing or not valid: run `hf auth login` or set HF_TOKEN",
                403: "your token may not write there: use one with write access",
                429: "the Hub takes no more requests for now"
                + (f" and asks to wait {asked_to_wait(error):g} s" if asked_to_wait(error) else ""),
            }.get(status(error) or 0, "the Hub answered with an error")
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        said = redact(f"{what}: {reason} ({' '.join(lines[:3])[:500]}). {advice}".strip(), [token])
        # What the Hub answered may hold the token, and a traceback prints the cause as well.
        clean = redact(str(error), [token]) == str(error)
        raise HubError(said) from (error if clean else None)
