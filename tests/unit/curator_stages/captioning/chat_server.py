"""A local server with OpenAI's chat interface that fails and answers out of order as it is told."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

Reply = Callable[[list[np.ndarray], str], tuple[int, str]]
"""Pictures and prompt of a request -> HTTP status and answer."""


@contextmanager
def serving(reply: Reply, *, model: str = "eye") -> Iterator[str]:
    """Serves in a thread; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(
                200, {"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": ""}]}
            )

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            (message,) = asked["messages"]
            *pictures, text = message["content"]
            status, answer = reply([_pixels(part["image_url"]["url"]) for part in pictures], text["text"])
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
            whole = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice]}
            self._send(status, whole if status == 200 else {"error": {"message": answer}})

        def _send(self, status: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _pixels(address: str) -> np.ndarray:
    data = base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
