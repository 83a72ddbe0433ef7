"""The server of the page answers one browser of this machine, and stops by itself."""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deltaexp.errors import ConfigError, DeltaExpError
from deltaexp.lab.picker.server import LARGEST, Patience, Server

JSON = {"Content-Type": "application/json"}


class Running:
    """A server in a thread, and a browser as simple as can be."""

    def __init__(self, patience: Patience | None = None) -> None:
        self.server = Server(0, patience)
        self.why = ""
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        def refuse(_: Any) -> dict:
            raise ConfigError("lora_r is 0; it must be at least 1.")

        answers = {"/echo": lambda question: {"said": question["say"]}, "/refuse": refuse, "/done": lambda question: question}
        self.why = self.server.serve(answers)

    def ask(
        self, method: str, path: str, body: bytes | None = None, host: str = "", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
        connection.request(method, path, body, {"Host": host or f"127.0.0.1:{self.server.port}", **headers})
        response = connection.getresponse()
        answer = response.status, dict(response.headers), response.read()
        connection.close()
        return answer

    def open(self) -> str:
        """Use the token and return the cookie."""
        status, headers, _ = self.ask("GET", self.path)
        assert status == 200
        return headers["Set-Cookie"].partition(";")[0]

    @property
    def path(self) -> str:
        return self.server.address.partition(str(self.server.port))[2]

    def post(self, path: str, question: Any, cookie: str, host: str = "", **more: str) -> tuple[int, Any]:
        headers = {**JSON, "Cookie": cookie, **{name.replace("_", "-"): value for name, value in more.items()}}
        status, _, text = self.ask("POST", path, json.dumps(question).encode(), host, **headers)
        return status, json.loads(text) if text.startswith(b"{") else text.decode()

    def stopped(self) -> str:
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()
        return self.why


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """A function that starts a server."""
    running: list[Running] = []

    def started(**patience: float) -> Running:
        running.append(Running(Patience(**patience)))
        return running[-1]

    yield started
    for one in running:
        one.server.end("test")
        one.stopped()


def test_the_token_is_good_once_and_the_cookie_after_it(start: Callable[..., Running]) -> None:
    picker = start()
    assert picker.server.http.server_address[0] == "127.0.0.1"
    assert picker.ask("GET", "/")[0] == 403
    assert picker.ask("GET", "/?token=guess")[0] == 403
    status, headers, page = picker.ask("GET", picker.path)
    assert status == 200
    assert b"Choose modules" in page
    name, _, rest = headers["Set-Cookie"].partition("=")
    assert name == f"deltaexp_pick_{picker.server.port}"
    assert {"HttpOnly", "SameSite=Strict"} <= set(rest.split("; "))
    assert picker.server.token not in page.decode() + rest
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Content-Security-Policy"].startswith("default-src 'none';")
    status, _, text = picker.ask("GET", picker.path)
    assert (status, b"used already" in text) == (403, True)
    cookie = headers["Set-Cookie"].partition(";")[0]
    assert picker.ask("GET", "/", Cookie=cookie)[0] == 200  # loading the page again
    assert picker.ask("GET", "/other", Cookie=cookie)[0] == 404
    assert picker.post("/echo", {"say": "ä"}, cookie) == (200, {"said": "ä"})


def test_everybody_else_is_refused(start: Callable[..., Running]) -> None:
    picker = start()
    question = json.dumps({"say": "x"}).encode()
    # A site whose name means this machine does not even use the token up.
    assert picker.ask("GET", picker.path, host="evil.example")[0] == 403
    cookie = picker.open()
    here = f"http://127.0.0.1:{picker.server.port}"
    assert picker.post("/echo", {"say": "x"}, cookie, Origin=here)[0] == 200
    assert picker.ask("POST", "/echo", question, **JSON)[0] == 403
    for wrong in ("", "nonsense", f"deltaexp_pick_{picker.server.port}=guess", "\x01=;;", cookie.replace("_pick_", "_pick_1")):
        assert picker.post("/echo", {"say": "x"}, wrong)[0] == 403
    for host in ("evil.example", f"evil.example:{picker.server.port}", "127.0.0.1.evil.example", "[::1]"):
        assert picker.post("/echo", {"say": "x"}, cookie, host=host)[0] == 403
        assert picker.ask("GET", "/", host=host, Cookie=cookie)[0] == 403
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null", here.replace("http", "https")):
        assert picker.post("/echo", {"say": "x"}, cookie, Origin=origin)[0] == 403
    assert picker.ask("POST", "/echo", question, **{"Content-Type": "text/plain", "Cookie": cookie})[0] == 403
    for method in ("OPTIONS", "PUT", "DELETE", "PATCH", "HEAD"):
        assert picker.ask(method, "/", Cookie=cookie)[0] == 403


def test_another_port_of_a_tunnel_is_let_through(start: Callable[..., Running]) -> None:
    picker = start()
    status, headers, _ = picker.ask("GET", picker.path, host="localhost:9000")
    assert status == 200
    cookie = headers["Set-Cookie"].partition(";")[0]
    assert picker.post("/echo", {"say": "x"}, cookie, host="localhost:9000", Origin="http://localhost:9000")[0] == 200


def test_bad_questions(start: Callable[..., Running]) -> None:
    picker = start()
    cookie = picker.open()
    assert picker.post("/refuse", {}, cookie) == (200, {"error": "lora_r is 0; it must be at least 1."})
    assert picker.post("/nothing", {}, cookie)[0] == 404
    assert picker.post("/echo", {"sing": "x"}, cookie)[0] == 400
    assert picker.post("/echo", [], cookie)[0] == 400
    assert picker.ask("POST", "/echo", b"{", **JSON, Cookie=cookie)[0] == 400
    assert picker.ask("POST", "/echo", b"{}", **JSON, **{"Cookie": cookie, "Content-Length": str(LARGEST + 1)})[0] == 413
    assert picker.post("/echo", {"say": "still here"}, cookie)[0] == 200


def test_it_ends_when_it_is_done_with(start: Callable[..., Running]) -> None:
    picker = start()
    cookie = picker.open()
    assert picker.post("/done", {"error": "not yet"}, cookie)[0] == 200
    assert picker.post("/done", {}, cookie) == (200, {})
    assert picker.stopped() == "done"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", picker.server.port), timeout=5)


def test_it_ends_when_the_page_is_closed_but_not_when_it_is_loaded_again(start: Callable[..., Running]) -> None:
    picker = start(closed=0.8)
    cookie = picker.open()
    assert picker.post("/closed", {}, cookie)[0] == 200
    assert "closed" in picker.server.limits
    assert picker.ask("GET", "/", Cookie=cookie)[0] == 200
    assert "closed" not in picker.server.limits
    assert picker.post("/closed", {}, cookie)[0] == 200
    assert picker.stopped() == "closed"


def test_it_ends_when_it_is_left_alone(start: Callable[..., Running]) -> None:
    unopened, lost, idle = start(opening=0.2), start(lost=0.2), start(idle=0.6)
    lost.open()
    cookie = idle.open()
    for _ in range(3):  # signs of life are no questions
        limit = idle.server.limits["idle"]
        assert idle.post("/alive", {}, cookie)[0] == 200
        assert idle.server.limits["idle"] == limit
    assert (unopened.stopped(), lost.stopped(), idle.stopped()) == ("unopened", "lost", "idle")


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DeltaExpError, match="cannot be had"):
            Server(taken.getsockname()[1])
