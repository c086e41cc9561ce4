"""An OpenAI-compatible chat server on loopback that says, or fails to say, whatever a test wants."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | int | bytes | tuple[int, bytes] | None  # words, a status, a raw body, both, or a dropped connection


def digest(messages: list[dict[str, Any]]) -> str:
    """What tells two chats apart: every word and every pixel of them."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


class ChatServer:
    """Serves `answer(body)` in a thread of its own a request; `with` starts and stops it."""

    def __init__(self, answer: Callable[[dict[str, Any]], Reply], port: int = 0) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.requests.append(body)
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                reply = outer.answer(body)
                if reply is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                if isinstance(reply, int):
                    self._send(reply, json.dumps({"error": {"message": f"made up {reply}"}}).encode())
                elif isinstance(reply, tuple):
                    self._send(*reply)
                elif isinstance(reply, bytes):
                    self._send(200, reply)
                else:
                    choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
                    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
                    answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
                    self._send(200, json.dumps({**answer, "choices": [choice], "usage": usage}).encode())

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.send_header("retry-after-ms", "5")  # so that tests need not wait
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *args: Any) -> None:
                pass  # clients that hang up are part of some tests

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()
