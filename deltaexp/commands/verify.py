"""``verify DIR_OR_REPO``: everything that can be checked of a saved delta, with its backbone where one is named.

  deltaexp verify outputs/.../delta                             files, tensors and the recorded hash
  deltaexp verify outputs/.../delta backbone=tiny_t5            ... and every tensor of the backbone
  deltaexp verify DeltaHub/name backbone=t5_base probe=true     ... and the logits on the stored probe batch
  deltaexp verify FOLDER backbone=local backbone.source=FOLDER  a backbone of your own

It ends with 0 if all is as it was saved, with 1 if something is not or cannot be known. revision=... names a revision of a
repository; the backbone's own is backbone.revision=...
"""

from __future__ import annotations

from deltaexp.commands import check_place, parted, switch
from deltaexp.errors import ConfigError
from deltaexp.lazy import imports

USAGE = "verify DIR_OR_REPO [backbone=...]    check files, digests and hash of a delta; with its backbone, all of it"
OWN = ("probe", "revision")


def main(words: list[str]) -> int:
    """Print what was checked; 0 if all is as it was saved, 1 if something is not or cannot be told."""
    overrides = [word for word in words if "=" in word and word.split("=", 1)[0] not in OWN]
    places, options = parted([word for word in words if word not in overrides], "verify", OWN, "DIR_OR_REPO")
    probe = bool(switch(options, "probe"))
    named = any(word.split("=", 1)[0].split(".")[0] == "backbone" for word in overrides)
    config = None
    if named:
        from deltaexp.lab import schema

        config, _ = schema.composed(overrides)
    elif overrides:
        raise ConfigError(
            f"verify compares with a backbone where one is named, and {overrides[0]!r} names none: add backbone=..."
        )
    elif probe:
        raise ConfigError("probe=true computes with the backbone, and none is named: add backbone=...")
    check_place(places[0])
    with imports():
        from deltaexp.lab.verifying import verify

    return verify(places[0], config, probe=probe, revision=options.get("revision"))
