"""The local server of the page: for one browser of this machine, for as long as its page is open.

Other programs of the machine, and pages of other sites in the same browser, can reach its port as well. So the address that is
printed has a token that is good once; who comes with it gets a cookie that no script can read, and without that cookie nothing
is answered. A site whose name was made to mean this machine (DNS rebinding) gives itself away in ``Host``, one on another port
of it in ``Origin``.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from deltaexp.errors import DeltaExpError

HERE = "127.0.0.1"
HOSTS = {"127.0.0.1", "localhost"}
"""Names by which a browser may call it; the port may be another one, behind a tunnel."""
PAGE = Path(__file__).with_name("page.html")
LARGEST = 1 << 20
"""Bytes that a question may have."""
STALE = "This address was used already, or is not the one that `deltaexp pick` printed. Start it again for a new one."

Answers = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]
"""For the path of a question what answers it."""


@dataclass(frozen=True)
class Patience:
    """After how many seconds the server stops by itself."""

    opening: float = 900.0
    """Without the page having been opened."""
    lost: float = 180.0
    """Without a sign of life; a browser lets a page in the background speak once a minute."""
    closed: float = 6.0
    """After the page was closed, unless it comes back: loading it again closes it, too."""
    idle: float = 3600.0
    """Without anything being asked, though the page is open."""


class Server:
    """Serves the page and answers its questions until it is done with, closed, or left alone.

    Args:
        port: The port; 0 takes a free one.
        patience: How long it waits.

    Raises:
        DeltaExpError: If the port cannot be had.
    """

    def __init__(self, port: int = 0, patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        self.token = secrets.token_urlsafe(32)
        self.cookie = secrets.token_urlsafe(32)
        self.answers: Answers = {}
        self.used = threading.Lock()
        """Held from when the token was used."""
        self.ended = threading.Event()
        self.why = ""
        """``done``, ``closed``, ``lost``, ``idle`` or ``unopened``, once it has ended."""
        self.limits = {"unopened": time.monotonic() + self.patience.opening}
        """When it ends unless something happens, and why."""
        try:
            self.http = ThreadingHTTPServer((HERE, port), _handler(self))
        except OSError as error:
            raise DeltaExpError(
                f"Port {port} of {HERE} cannot be had: {error.strerror or error}. Leave port=... out to take a free one."
            ) from error
        self.http.daemon_threads = True

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self.http.server_address[1]

    @property
    def address(self) -> str:
        """The address that opens the page, once."""
        return f"http://{HERE}:{self.port}/?token={self.token}"

    def serve(self, answers: Answers) -> str:
        """Answer until the page is done with; return why it ended.

        Args:
            answers: What answers the questions, by path; that of ``done`` ends it.
        """
        self.answers = answers
        thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            while not self.ended.wait(0.1):
                over = [why for why, limit in list(self.limits.items()) if time.monotonic() > limit]
                if over:
                    self.end(over[0])
        finally:
            self.http.shutdown()
            thread.join()
            self.close()
        return self.why

    def close(self) -> None:
        """Give the port back."""
        self.http.server_close()

    def end(self, why: str) -> None:
        """End it, once what is being answered has been sent."""
        self.why = self.why or why
        self.ended.set()

    def alive(self, asked: bool) -> None:
        """Take note of a sign of life, and whether something was asked."""
        now = time.monotonic()
        idle = now + self.patience.idle if asked else self.limits.get("idle", now + self.patience.idle)
        self.limits = {"lost": now + self.patience.lost, "idle": idle}

    def admit(self, token: str) -> bool:
        """Say whether a token is the one that opens the page; it is no more after that."""
        return hmac.compare_digest(token.encode(), self.token.encode()) and self.used.acquire(blocking=False)


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "deltaexp", ""
        timeout = 60

        def do_GET(self) -> None:
            place = urlsplit(self.path)
            token = parse_qs(place.query).get("token", [""])[0]
            if not self._is_local():
                self._refuse("This address is not that of a page on this machine.")
            elif not self._is_known() and not server.admit(token):
                self._refuse(STALE)
            elif place.path != "/":
                self._send(404, b"There is no such page.", "text/plain; charset=utf-8")
            else:
                server.alive(asked=True)
                self._send_page()

        def do_POST(self) -> None:
            place = urlsplit(self.path).path
            origin = self.headers.get("Origin")
            kind = self.headers.get("Content-Type", "").partition(";")[0]
            # A page on another port of this machine counts as the same site, so that the cookie alone does not tell it apart.
            own = origin in (None, f"http://{self.headers.get('Host')}") and kind == "application/json"
            if not (own and self._is_local() and self._is_known()):
                self.close_connection = True
                self._refuse("This is answered to the page alone.")
                return
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > LARGEST:
                self.close_connection = True
                self._answer(413, {"error": "The question is too long."})
                return
            body = self.rfile.read(int(length))
            server.alive(asked=place not in ("/alive", "/closed"))
            if place == "/alive":
                self._answer(200, {})
            elif place == "/closed":
                server.limits["closed"] = time.monotonic() + server.patience.closed
                self._answer(200, {})
            elif place in server.answers:
                self._ask(place, body)
            else:
                self._answer(404, {"error": "There is no such question."})

        def do_OPTIONS(self) -> None:
            self.close_connection = True
            self._refuse("This is not answered.")

        do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS

        def _ask(self, place: str, body: bytes) -> None:
            try:
                answer = server.answers[place](json.loads(body))
            except DeltaExpError as error:
                answer = {"error": str(error)}
            except (TypeError, ValueError, KeyError, IndexError) as error:
                self._answer(400, {"error": f"The question cannot be read: {error!r}."})
                return
            self._answer(200, answer)
            if place == "/done" and not answer.get("error"):
                server.end("done")

        def _is_local(self) -> bool:
            host = self.headers.get_all("Host") or []
            return len(host) == 1 and host[0].partition(":")[0] in HOSTS

        def _is_known(self) -> bool:
            try:
                found = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie_name())
            except CookieError:
                return False
            return found is not None and hmac.compare_digest(found.value.encode(), server.cookie.encode())

        def _cookie_name(self) -> str:
            return f"deltaexp_pick_{server.port}"  # cookies do not tell ports apart

        def _refuse(self, why: str) -> None:
            self._send(403, why.encode(), "text/plain; charset=utf-8")

        def _answer(self, status: int, answer: Mapping[str, Any]) -> None:
            self._send(status, json.dumps(answer).encode(), "application/json")

        def _send_page(self) -> None:
            nonce = secrets.token_urlsafe(16)
            text = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
            # Nothing is loaded from anywhere, and nobody else's script runs.
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
                "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
            cookie = f"{self._cookie_name()}={server.cookie}; HttpOnly; SameSite=Strict; Path=/"
            more = {"Content-Security-Policy": policy, "Set-Cookie": cookie}
            self._send(200, text.encode(), "text/html; charset=utf-8", more)

        def _send(self, status: int, body: bytes, kind: str, more: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            always = {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "Cross-Origin-Resource-Policy": "same-origin",
            }
            for name, value in {**always, **(more or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: the address holds the token."""

    return Handler
