"""``pick backbone=... delta_type=...``: choose by eye the modules that a delta goes on.

  deltaexp pick backbone=llama3.2_1b delta_type=lora   opens a page with the backbone's module tree; it needs no weights
  deltaexp pick ... open=false port=8123               prints the page's address only, on a port of your choice
  deltaexp pick ... out=FOLDER                         where experiments are saved: FOLDER/experiment/NAME.yaml (picked)
  deltaexp pick --config-dir FOLDER ...                with your own groups, among which experiments are saved then

It takes every key of a run; an encoder wants a task that it can do, such as task=sst2. The page shows what patterns match,
names what is clicked by the shortest patterns, and counts what the delta would train. Done prints the override and the command.

Only this machine can open the page, once; from another one: ssh -L PORT:127.0.0.1:PORT HOST. It ends with Done, when the page
is closed, with Ctrl-C, or when it is left alone for an hour.
"""

from __future__ import annotations

from deltaexp.commands import searched, switch
from deltaexp.errors import ConfigError

USAGE = "pick KEY=VALUE ...    choose modules by eye, on a local page with the module tree of a backbone"
OWN = ("open", "out", "port")


def main(words: list[str]) -> int:
    """Serve the page until it is done with, and print what was chosen; every key of a run may be given."""
    from pathlib import Path

    from deltaexp.lab import schema

    options = dict(word.split("=", 1) for word in words if "=" in word and word.split("=", 1)[0] in OWN)
    opens, port = switch(options, "open"), options.get("port", "0")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"port is {port!r}; it must be a whole number from 1 to 65535, or left out to take a free port.")
    overrides, folders = searched([word for word in words if word.split("=", 1)[0] not in OWN])
    if folders and "out" in options:
        raise ConfigError("With --config-dir the experiments are saved there, where they are found again: leave out=... out.")
    schema.composed(overrides, folders)
    from deltaexp.lab.picker.server import Server

    server = Server(int(port))
    try:
        from deltaexp.lab.picker import session
        from deltaexp.lab.picker.picking import Picker

        picker = Picker(overrides, Path(folders[0] if folders else options.get("out") or "picked"), folders)
        return session.run(server, picker, opens is not False)
    finally:
        server.close()
