"""A small Hugging Face Hub on 127.0.0.1, for the real `huggingface_hub` client (through `HF_ENDPOINT`).

It keeps repositories as immutable commits, checks every authorization, and stores large files with the LFS protocol
behind a second port: like the content network of the real Hub, that is another origin, which gets signed links and must
never see a token. `with HubServer(users={"token": ("ada", ["DeltaHub"])}) as hub:` starts it, the client talks to
`hub.endpoint`. This module holds the sockets and the faults, `hub_api` the endpoints, `hub_state` the content.
"""

from __future__ import annotations

import re
import socket
import socketserver
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from hub_api import dispatch
from hub_state import Answer, Hub, HubError, Request, reply


class Logged(NamedTuple):
    """A line of `HubServer.requests`. `status` is 0 where a fault left the client without an answer."""

    method: str
    path: str
    status: int


@dataclass
class Fault:
    """Something that goes wrong for the requests that match; see `Faults.add`."""

    action: str
    method: str | None
    path: re.Pattern[str]
    times: int | None
    skip: int
    status: int
    headers: dict[str, str]
    effect: Callable[[], object] | None = None
    body: str = "injected fault"
    hits: int = 0


class Faults:
    """The faults that wait for a matching request."""

    ACTIONS = ("status", "drop", "hang", "lose_answer", "cut", "corrupt", "first")

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(
        self,
        action: str,
        *,
        method: str | None = None,
        path_regex: str = "",
        times: int | None = 1,
        skip: int = 0,
        status: int = 500,
        headers: Mapping[str, str] | None = None,
        effect: Callable[[], object] | None = None,
        body: str = "injected fault",
    ) -> Fault:
        """Let the next `times` matching requests (None: all) fail, after `skip` that pass.

        - "status" answers `status` with `headers` and an error that says `body`, and does no work;
        - "drop" closes the connection in the middle of the request's body, and does no work;
        - "hang" takes the request and never answers: the client has to give up;
        - "first" calls `effect` before the work is done as always: something else happens in the meantime;
        - "lose_answer" does the work, then closes the connection without an answer;
        - "cut" closes the connection in the middle of the answer's body;
        - "corrupt" flips one bit of the answer's body, of which the length stays the same.

        "cut" and "corrupt" match only answers that have a body. `hits` of the result counts what happened.
        """
        if action not in self.ACTIONS:
            raise ValueError(f"unknown action {action!r}, choose one of {', '.join(self.ACTIONS)}")
        fault = Fault(action, method, re.compile(path_regex), times, skip, status, dict(headers or {}), effect, body)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, method: str, path: str, actions: Sequence[str]) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.action not in actions or fault.method not in (None, method) or not fault.path.search(path):
                    continue
                if fault.skip:
                    fault.skip -= 1
                elif fault.times is None or fault.hits < fault.times:
                    fault.hits += 1
                    return fault
        return None


class HubServer(Hub):
    """The running Hub. `requests`, `leaks` and `errors` are for assertions.

    `leaks` lists the requests that carried a token anywhere but in the header meant for it, `errors` the tracebacks of
    the server's own mistakes. `lfs=False` takes every file as a regular one (a client with xet on knows no other way to
    send large files); `redirect=False` serves LFS files without the storage. `stop()` and `start()` take the Hub down
    and up again, on the same ports.
    """

    def __init__(self, users: Mapping[str, Sequence[Any]] | None = None, *, lfs: bool = True, redirect: bool = True) -> None:
        super().__init__(users or {}, lfs=lfs, redirect=redirect)
        self.faults = Faults()
        self.requests: list[Logged] = []
        self.leaks: list[str] = []
        self.errors: list[str] = []
        self._lock = threading.RLock()
        self._ports = [0, 0]
        self._running: list[tuple[_Listener, threading.Thread]] = []

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        if self._running:
            raise RuntimeError("the Hub runs already")
        for index, port in enumerate(self._ports):
            listener = _Listener(self, port, storage=index == 1)
            self._ports[index] = listener.server_address[1]
            thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True, name=f"hub-{index}")
            self._running.append((listener, thread))
            thread.start()
        self.endpoint, self.storage = (f"http://127.0.0.1:{port}" for port in self._ports)

    def stop(self) -> None:
        while self._running:
            listener, thread = self._running.pop()
            listener.shutdown()
            listener.server_close()
            thread.join()

    def uploads(self) -> list[Logged]:
        """The requests that bring content: LFS uploads and commits."""
        return [line for line in self.requests if line.method == "PUT" or "/commit/" in line.path]

    def answer(self, request: Request, storage: bool) -> Answer:
        """Does the work; never raises."""
        try:
            if fault := self.faults.take(request.method, request.path, ["status"]):
                return reply({"error": fault.body}, fault.status, fault.headers)
            if (fault := self.faults.take(request.method, request.path, ["first"])) and fault.effect:
                fault.effect()
            if storage != request.path.startswith("/storage/"):
                raise HubError(404, "not on this host")
            if storage and "Authorization" in request.headers:
                raise HubError(400, "Only one auth mechanism allowed: a signed link takes no Authorization header")
            self.authenticate(request)
            with self._lock:
                return dispatch(self, request)
        except HubError as error:
            return error.answer
        except ValueError as error:  # malformed JSON and base64 among them
            return HubError(400, f"Bad request: {error}").answer
        except Exception:
            self.errors.append(traceback.format_exc())
            return HubError(500, "the test Hub has a bug, see HubServer.errors").answer


class _Listener(ThreadingHTTPServer):
    """One of the two ports. Its threads are joined on close, and a socket's timeout bounds each."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, hub: HubServer, port: int, storage: bool) -> None:
        self.hub, self.storage = hub, storage
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Connection)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without the name lookup of HTTPServer, which may wait for a DNS server

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for connection in list(self._open):  # or joining their threads would wait for silent clients
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.hub.errors.append(traceback.format_exc())


class _Connection(BaseHTTPRequestHandler):
    """One connection carries one request: a thread never waits for a second one that may not come."""

    server: _Listener
    protocol_version = "HTTP/1.1"
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client went away, or was silent for too long
            self._exchange(self.server.hub)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _exchange(self, hub: HubServer) -> None:
        log = partial(Logged, self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if hub.faults.take(self.command, self.path, ["drop"]):
            self.rfile.read(length // 2)
            hub.requests.append(log(0))
            return
        body = b"".join(self._chunks()) if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if hub.faults.take(self.command, self.path, ["hang"]):
            hub.requests.append(log(0))
            self.connection.settimeout(60)
            self.connection.recv(1)  # until the client goes away, or the Hub is stopped
            return
        carried = [value for name, value in self.headers.items() if name.lower() != "authorization" or self.server.storage]
        text = "\n".join([self.path, *carried, body.decode("latin-1")])
        if any(token in text for token in hub.users):
            hub.leaks.append(f"{self.command} {self.path}")
        answer = hub.answer(Request(self.command, self.path, self.headers, body), self.server.storage)
        payload = b"" if self.command == "HEAD" else answer.body
        fault = hub.faults.take(self.command, self.path, ["lose_answer", "cut", "corrupt"] if payload else ["lose_answer"])
        action = fault.action if fault else None
        # Logged before it is sent: whoever has the answer finds it in the log.
        hub.requests.append(log(0 if action == "lose_answer" else answer.status))
        if action == "lose_answer":
            return
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        middle = len(payload) // 2
        if action == "corrupt":
            payload = payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :]
        self.wfile.write(payload[:middle] if action == "cut" else payload)

    def _chunks(self) -> Iterable[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
