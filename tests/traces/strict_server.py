"""A chat server as hosted ones are: it knows the documented fields and refuses a request with any other.

python tests/traces/strict_server.py PORT [FIELD ...]      FIELDs are refused too, as `seed` is by some
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KNOWN = {
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "n",
    "logprobs",
    "top_logprobs",
}
REPLY = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "\\boxed{2}"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 3},
}


class StrictServer:
    """The server in a thread of its own; as a context manager it gives itself.

    Args:
      refused: documented fields that this one does not take.
      status, headers, body: what it answers to every request instead, if `body` is given.
      good: after how many requests with that answer it answers well.
      models: what it lists, and with which status.
    """

    def __init__(
        self,
        refused: tuple[str, ...] = (),
        *,
        status: int = 400,
        headers: dict[str, str] | None = None,
        body: Any = None,
        good: int | None = None,
        models: Any = None,
        models_status: int = 200,
        port: int = 0,
    ):
        self.known = KNOWN - set(refused)
        self.status, self.headers, self.body, self.good = status, headers or {}, body, good
        self.models = {"object": "list", "data": [{"id": "m", "object": "model"}]} if models is None else models
        self.models_status = models_status
        self.asked: list[dict[str, Any]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> StrictServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()

    def serve(self) -> None:
        self._http.serve_forever()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of the reply to one request."""
        self.asked.append(body)
        if self.body is not None and (self.good is None or len(self.asked) <= self.good):
            return self.status, self.headers, self.body
        if extra := sorted(set(body) - self.known):
            message = f"Unsupported parameter: '{extra[0]}' is not supported with this model."
            if extra[0] == "max_tokens":
                message += " Use 'max_completion_tokens' instead."
            return 400, {}, {"error": {"message": message, "type": "invalid_request_error", "param": extra[0]}}
        return 200, {}, REPLY

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

            def _give(self, status: int, headers: dict[str, str], body: Any) -> None:
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self._give(ours.models_status, {}, ours.models)

            def do_POST(self) -> None:
                self._give(*ours.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        return Handler


if __name__ == "__main__":
    StrictServer(tuple(sys.argv[2:]), port=int(sys.argv[1])).serve()
