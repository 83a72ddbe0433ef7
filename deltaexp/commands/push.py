"""``push FOLDER [ORG/NAME]``: push the folder of a delta to the Hugging Face Hub.

The delta and its card are checked first, go in one commit, and are read back. The command may be repeated: what is there
already is found. Without ORG/NAME, name and options are those of the run's own config; what is typed wins.

    private=true|false    whether the repository is private; one that is there already must be as you say
    revision=BRANCH       the branch, made if it is not there
    tag=NAME              a name for the commit
    create_pr=true        propose the commit in a pull request
    parent_commit=COMMIT  push only if this is the last commit there
    message=TEXT          the commit message
    license=NAME          the licence on the card, such as apache-2.0

    deltaexp push outputs/.../delta DeltaHub/lora-dates private=true tag=v1
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from deltaexp.commands import parted, switch
from deltaexp.errors import ConfigError, did_you_mean
from deltaexp.hubclient import check_push
from deltaexp.redaction import is_secret, redact

USAGE = "push FOLDER [ORG/NAME] [key=value ...]    push a saved delta to the Hub [private=true tag=... ...]"
SWITCHES = ("private", "create_pr")
OPTIONS = (*SWITCHES, "revision", "tag", "parent_commit", "message", "license")


def main(words: list[str]) -> int:
    """Push, and print where the commit is. Without a name, the delta goes where the config of its run says."""
    # The keys are those of a run, with or without their section.
    words = [word.removeprefix("hub.") if "=" in word else word for word in words]
    bare = sum("=" not in word for word in words)
    places, options = parted(words, "push", OPTIONS, "FOLDER" if bare == 1 else "FOLDER ORG/NAME")
    folder = Path(places[0])
    wishes = {**_of_run(folder), **_typed(options)}
    if bare == 2:
        wishes["repo_id"] = places[1]
    if not wishes.get("repo_id"):
        raise ConfigError(
            f"Where to? The config of the run in {str(folder)!r} names no repository, so write: deltaexp push {folder} ORG/NAME"
        )
    repo_id = wishes.pop("repo_id")
    check_push(repo_id, **{key: wishes.get(key) for key in ("revision", "tag", "create_pr", "parent_commit")})
    from deltaexp.lab import pushing

    pushed = pushing.push(folder, repo_id, wishes, lambda text: print(redact(text), file=sys.stderr, flush=True))
    print(f"Pushed and verified: {pushed.url}")
    return 0


def _typed(options: dict[str, str]) -> dict[str, Any]:
    for key, value in options.items():
        if is_secret(value):
            raise ConfigError(f"{key} looks like an access token. Run `hf auth login` or set HF_TOKEN instead.")
    if "license" in options:
        from deltaexp.card import LICENSES

        if options["license"] not in LICENSES:
            hint = did_you_mean(options["license"], LICENSES)
            raise ConfigError(f"license is {options['license']!r}, which the Hub does not know.{hint}")
    values: dict[str, Any] = {key: value for key, value in options.items() if key not in SWITCHES}
    return values | {key: switch(options, key) for key in SWITCHES if key in options}


def _of_run(folder: Path) -> dict[str, Any]:
    """Return what the config of the run that saved a delta says of the Hub, its repository's name filled in."""
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {str(folder)!r} to push.{did_you_mean(folder.name, _beside(folder))}")
    try:
        run = json.loads((folder / "results.json").read_text(encoding="utf-8"))["config"]
        found = {key: value for key, value in run["hub"].items() if key in (*OPTIONS, "repo_id") and value is not None}
        if "repo_id" in found:
            from deltaexp.lab.public import repository

            names = (run["delta_type"], run["backbone"]["name"], run["task"]["name"], run["seed"])
            found["repo_id"] = repository(found["repo_id"], *names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # no run saved it; whether it is a delta at all is checked when it is pushed
    # A guard holds for one push.
    return {key: value for key, value in found.items() if key != "parent_commit"}


def _beside(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
