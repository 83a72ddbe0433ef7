"""One use of the page, from the terminal's side: its address, the questions it may ask, what it ends with."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from typing import Any

from deltaexp.lab.picker.picking import Choice, Picker, State
from deltaexp.lab.picker.server import Server
from deltaexp.registry import checked

ENDINGS = {
    "closed": "The page was closed.",
    "lost": "The page is gone.",
    "idle": "Nothing was asked for an hour.",
    "unopened": "The page was not opened.",
}
"""What is said where it ends without Done."""


def run(server: Server, picker: Picker, opens: bool) -> int:
    """Serve the page until it is done with, and print what was chosen: the override and the command on standard output.

    Args:
        server: The server, which has its port already.
        picker: What answers its questions.
        opens: Whether to open a browser.

    Returns:
        The exit code: 0, or 1 where the page ended without Done.
    """
    chosen = [picker.choice(picker.start)]

    def state(question: dict[str, Any]) -> State:
        return State(**checked(State, question["state"], "the page's state"))

    def show(question: dict[str, Any]) -> dict[str, Any]:
        answer = picker.show(state(question), question.get("toggle"))
        if not answer["error"]:
            chosen[0] = Choice(answer["override"], answer["command"])
        return answer

    def save(question: dict[str, Any]) -> dict[str, Any]:
        answer = picker.save(state(question), str(question["name"]), question.get("replace") is True)
        if "path" in answer:
            _say(f"saved {answer['path']}")
        return answer

    answers = {
        "/about": lambda _: picker.about(),
        "/show": show,
        "/preview": lambda question: picker.preview(state(question), str(question["pattern"])),
        "/file": lambda question: {"text": picker.file(state(question))},
        "/save": save,
        "/done": show,
    }
    _say(f"Choose the modules of {picker.config.backbone.name} here: {server.address}")
    if not (opens and _is_graphical() and webbrowser.open(server.address)):
        _say(f"From another machine: ssh -L {server.port}:127.0.0.1:{server.port} {socket.gethostname()}, then open it there.")
    why = server.serve(answers)
    if why != "done":
        _say(f"{ENDINGS[why]} What was chosen last:")
    print(chosen[0].override or "The default modules are taken: there is nothing to override.")
    print(chosen[0].command, flush=True)
    return 0 if why == "done" else 1


def _say(text: str) -> None:
    """Tell the user something that is no result."""
    print(text, file=sys.stderr, flush=True)


def _is_graphical() -> bool:
    """Say whether a browser would open in a window: in a terminal it would take the terminal's place."""
    return sys.platform in ("win32", "darwin") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
