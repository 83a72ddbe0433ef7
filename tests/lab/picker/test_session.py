"""``deltaexp pick`` from the terminal's side."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from deltaexp.__main__ import main
from deltaexp.lab.picker import session
from deltaexp.lab.picker.picking import Picker
from deltaexp.lab.picker.server import Patience, Server


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["port=many"], "port is 'many'; it must be a whole number from 1 to 65535"),
        (["port=70000"], "port is '70000'"),
        (["open=perhaps"], "open is 'perhaps'; it must be true or false."),
        (["lora_rank=4"], "There is no key 'lora_rank'. Did you mean 'lora_r'?"),
        (["--config-dir", ".", "out=here"], "leave out=... out"),
        (["backbone=tiny"], "There is no backbone 'tiny'. Did you mean 'tiny_t5'?"),
    ],
)
def test_mistakes_are_said_first(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pick", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_taken_port_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code = "import sys; from deltaexp.__main__ import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
        words = [sys.executable, "-c", code, "pick", f"port={taken.getsockname()[1]}"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "1 False\n"
    assert "cannot be had" in done.stderr


@pytest.mark.parametrize("graphical", [True, False])
def test_the_address_and_what_was_chosen_last(
    graphical: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) is None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if graphical:
        monkeypatch.setenv("DISPLAY", ":0")
    else:
        monkeypatch.delenv("DISPLAY", raising=False)
    server = Server(0, Patience(opening=0.1))
    picker = Picker(["lora_r=4", "modified_modules=[attn.q,'[r]layer\\.0.*k']"], tmp_path)
    code = session.run(server, picker, opens=True)
    said = capsys.readouterr()
    assert code == 1
    assert opened == ([server.address] if graphical else [])
    assert f"http://127.0.0.1:{server.port}/?token=" in said.err
    assert (f"ssh -L {server.port}:127.0.0.1:{server.port}" in said.err) is not graphical
    assert "The page was not opened. What was chosen last:" in said.err
    modules = shlex.quote(r"modified_modules=[attn.q,'[r]layer\.0.*k']")
    assert said.out.splitlines() == [modules, f"python -m deltaexp delta_type=lora lora_r=4 {modules}"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there are no such signals")
def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "deltaexp", "pick", "open=false"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    timer = threading.Timer(120, process.kill)
    timer.start()
    lines: list[str] = []
    while not (found := re.search(r"http://\S+", lines[-1] if lines else "")):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    with urllib.request.urlopen(found.group()) as page:
        assert b"Choose modules" in page.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    timer.cancel()
    assert process.stdout.read() == ""
    assert "stopped by the keyboard" in process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    assert list(tmp_path.iterdir()) == []
