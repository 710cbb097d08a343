"""An S3-like server on loopback that is slow and fails: moto behind a layer of faults."""

from __future__ import annotations

import io
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "caches"


@dataclass(slots=True, kw_only=True)
class Faults:
    """What happens to requests: seconds of delay, uniform between two bounds, the share that ends with an
    error, and for how long none is answered at all. May be changed while the server runs.

    Of the failing requests half are done before they fail: their answer is lost.
    """

    delay: tuple[float, float] = (0.0, 0.0)
    errors: float = 0.0
    down: bool = False
    seed: int = 0
    seen: Counter[str] = field(default_factory=Counter)


class _Layer:
    """A WSGI application around moto's. Requests reach moto one at a time: its check before a conditional
    write is not atomic, as that of S3 is."""

    def __init__(self, faults: Faults) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._faults = faults
        self._random = random.Random(faults.seed)
        self._one = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        faults = self._faults
        with self._one:
            delay = self._random.uniform(*faults.delay)
            failing = self._random.random() < faults.errors
            done = not failing or self._random.random() < 0.5
        time.sleep(delay)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        failing, done = failing or faults.down, done and not faults.down
        with self._one:
            answer = self._ask_moto(environ, body) if done else []
            faults.seen["requests"] += 1
            faults.seen["failed"] += failing
            faults.seen["answers lost"] += failing and done
        if failing:
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return []
        start_response(answer[0], answer[1])
        return [answer[2]]

    def _ask_moto(self, environ: dict[str, Any], body: bytes) -> list[Any]:
        """[status, headers, body] of moto's answer."""

        answer: list[Any] = []
        given = self._moto(
            environ | {"wsgi.input": io.BytesIO(body)},
            lambda status, headers, *_: answer.extend([status, headers]),
        )
        answer.append(b"".join(given))
        return answer


class _Silent(WSGIRequestHandler):
    def log_request(self, *arguments: Any) -> None:
        pass


@contextmanager
def rough_server(faults: Faults) -> Iterator[dict[str, Any]]:
    """Options for a bucket `s3://caches` of a server with these faults, which begin after it is made."""
    server = make_server("127.0.0.1", 0, _Layer(faults), threaded=True, request_handler=_Silent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{server.server_port}"}
    fsspec.filesystem("s3", **options).mkdir(BUCKET)
    try:
        yield options
    finally:
        server.shutdown()
        thread.join()
