"""A checkpoint behind OpenAI's HTTP interface, and a page to try it.

    python -m extras.serve out/demo                       # http://127.0.0.1:8000/v1, and a page at /
    python -m extras.serve out/demo --api-key SECRET --host 0.0.0.0

POST /v1/chat/completions and /v1/completions, whole or streamed; GET /v1/models, /health. Requests that wait together
are generated as one batch (extras/completions.py). One thread owns the model; each connection has a thread that turns
its ids into text.
"""

import argparse
import contextlib
import hmac
import itertools
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from checkpoint import load
from common import choose_device, run_command
from extras.completions import Refusal, serve_texts, texts_asked
from sample import before_stop

MAX_BODY = 1 << 20  # bytes of a request


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", default="out", help="a step, a run (its newest) or a Hugging Face folder")
    add("--host", default="127.0.0.1", help="0.0.0.0: other machines may connect; then set --api-key")
    add("--port", type=int, default=8000, help="0: a free one")
    add("--api-key", default="", help="refuse requests without it")
    add("--batch", type=int, default=8, help="texts that are generated together, at most")
    add("--queue", type=int, default=64, help="requests that may wait; others get the status 429")
    add("--timeout", type=float, default=300, help="seconds that a request may take, waiting included")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = parser.parse_args(argv)
    for name, low in (("batch", 1), ("queue", 1), ("timeout", 0.1)):
        if not getattr(args, name) >= low:
            parser.error(f"--{name} {getattr(args, name)}: expected {low} or more")
    return args


def to_json(content):
    """Bytes of UTF-8. A request's JSON can hold half a character of UTF-16, which has none: it becomes "?"."""
    return json.dumps(content, ensure_ascii=False).encode("utf-8", errors="replace")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, args, model, tokenizer, info):
        self.model, self.tokenizer, self.info = model, tokenizer, info
        self.name = info.name
        self.api_key, self.batch, self.timeout_s = args.api_key.encode("utf-8"), args.batch, args.timeout
        self.waiting = queue.Queue(args.queue)
        self.names_experts = model.config.ffn == "soft_moe" and not model.config.reads_ahead
        self.started = int(time.time())
        super().__init__((args.host, args.port), Handler)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):  # a client that went away is no error
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for a request to arrive
    error_content_type = "application/json"  # of what http.server refuses itself, like an unknown method
    error_message_format = json.dumps(Refusal(501, "%(explain)s").body)

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        server = self.server
        if self.path == "/":
            return self.send(200, (Path(__file__).parent / "serve.html").read_bytes(), "text/html; charset=utf-8")
        if self.path == "/health":
            return self.send_json(200, {"status": "ok"})
        with self.refusals():
            self.check_key()
            if self.path != "/v1/models":
                raise Refusal(404, f"no {self.path[:100]} here", "not_found")
            model = {"id": server.name, "object": "model", "created": server.started, "owned_by": "nanosteel"}
            shape = {"chat": server.info.chat, "experts": server.model.config.n_expert if server.names_experts else 0}
            self.send_json(200, {"object": "list", "data": [model | shape]})

    def do_POST(self):
        self.close_connection = True  # a body that is refused unread must not be taken for the next request
        with self.refusals():
            self.check_key()
            if self.path not in ("/v1/chat/completions", "/v1/completions"):
                raise Refusal(404, f"no {self.path[:100]} here", "not_found")
            body = self.read_body()
            self.is_chat, self.id = self.path == "/v1/chat/completions", f"cmpl-{uuid.uuid4().hex}"
            texts = texts_asked(body, self.is_chat, self.server)
            if len(texts) > self.server.waiting.maxsize - self.server.waiting.qsize():
                raise Refusal(429, "too many requests are waiting: try again in a second", "rate_limit_exceeded")
            try:
                for text in texts:
                    self.enqueue(text)
                (self.stream if body.get("stream") else self.answer)(texts, body)
            finally:
                for text in texts:
                    text.is_given_up = True

    @contextlib.contextmanager
    def refusals(self):
        try:
            yield
        except Refusal as refusal:
            self.close_connection = True
            self.send_json(refusal.status, refusal.body)

    def enqueue(self, text):
        try:
            self.server.waiting.put_nowait(text)
        except queue.Full:
            raise Refusal(429, "too many requests are waiting: try again in a second", "rate_limit_exceeded") from None

    def check_key(self):
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").encode("latin-1", errors="replace")
        if self.server.api_key and not hmac.compare_digest(given, self.server.api_key):
            raise Refusal(401, "wrong or missing API key", "invalid_api_key")

    def read_body(self):
        """The request's JSON object."""
        if not self.headers.get("Content-Type", "").startswith("application/json"):  # pages of other sites send others
            raise Refusal(415, "expected Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refusal(411, "expected a Content-Length")
        if int(length) > MAX_BODY:
            raise Refusal(413, f"the request has {int(length):,} bytes, at most {MAX_BODY:,} are read")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the request is not JSON ({error})") from None
        if not isinstance(body, dict):
            raise Refusal(400, "the request is not a JSON object")
        return body

    def news_of(self, text, counted, experts):
        """Yield a text's ids as they come. counted: they are appended; experts: of each of them. ValueError: failed."""
        while True:
            try:
                news = text.news.get(timeout=0.5)
            except queue.Empty:
                news = "length" if time.monotonic() > text.deadline + 5 else None
            if self.client_is_gone():  # looked at for every token: a whole answer writes nothing until its end
                raise ConnectionError
            if news is None:
                continue
            if isinstance(news, str):
                if news.startswith("error"):
                    raise ValueError(news)
                self.reason = news
                return
            counted.append(news[0])
            experts.append(news[1])
            yield news[0]

    def client_is_gone(self):
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def pieces(self, text, counted, experts):
        """Yield a text as it grows, up to the first of its stop strings; self.reason is then why it ended."""
        self.reason = "stop"  # by a stop string, unless news_of says otherwise
        yield from before_stop(self.server.tokenizer.stream(self.news_of(text, counted, experts)), text.stops)

    def answer(self, texts, body):
        choices, n_prompt, n_new = [], 0, 0
        for i, text in enumerate(texts):
            counted = []
            try:
                whole = "".join(self.pieces(text, counted, []))
            except ValueError as error:
                raise Refusal(500, str(error)) from None
            said = {"message": {"role": "assistant", "content": whole}} if self.is_chat else {"text": whole}
            choices.append({"index": i, "finish_reason": self.reason, "logprobs": None, **said})
            n_prompt, n_new = n_prompt + len(text.prompt), n_new + len(counted)
        self.send_json(200, self.envelope(choices, False) | {"usage": usage(n_prompt, n_new)})

    def stream(self, texts, body):
        (text,), counted, experts = texts, [], []
        pieces = self.pieces(text, counted, experts)
        self.send_response(200)
        for header in (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-store")):
            self.send_header(*header)
        self.end_headers()
        role = {"role": "assistant"} if self.is_chat else {}
        try:
            for piece in itertools.chain([""] if self.is_chat else [], pieces):
                extra = {"expert": experts[-1]} if text.experts and experts else {}
                said = {"delta": role | {"content": piece}} if self.is_chat else {"text": piece}
                self.event(self.envelope([{"index": 0, "finish_reason": None, **said, **extra}], True))
                role = {}
        except ValueError as error:
            self.event(Refusal(500, str(error)).body)
            return
        last = {"delta": {}} if self.is_chat else {"text": ""}
        self.event(self.envelope([{"index": 0, "finish_reason": self.reason, **last}], True))
        if (body.get("stream_options") or {}).get("include_usage"):
            self.event(self.envelope([], True) | {"usage": usage(len(text.prompt), len(counted))})
        self.wfile.write(b"data: [DONE]\n\n")

    def envelope(self, choices, is_chunk):
        kind = ("chat.completion" + ".chunk" * is_chunk) if self.is_chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": int(time.time()), "model": self.server.name}
        return head | {"choices": choices}

    def event(self, content):
        self.wfile.write(b"data: " + to_json(content) + b"\n\n")
        self.wfile.flush()

    def send_json(self, status, content):
        self.send(status, to_json(content), "application/json; charset=utf-8")

    def send(self, status, content, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


def usage(n_prompt, n_new):
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def main(argv=None):
    args = get_args(argv)
    device = choose_device(args.device)
    model, tokenizer, info = load(args.checkpoint)
    model.to(device).eval()
    try:
        server = Server(args, model, tokenizer, info)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--host {args.host} --port {args.port}: {reason}: choose others") from None
    for number in (signal.SIGINT, signal.SIGTERM):  # in a thread: shutdown() waits until serve_forever() has returned
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # run_command's default ends the process: one client left
    threading.Thread(target=serve_texts, args=(server,), daemon=True).start()
    host, port = server.server_address[:2]
    print(f"{info.path}: http://{host}:{port}/v1, a page at http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever(poll_interval=0.1)
    os._exit(0)  # at once: where a thread is in torch, Python's own end aborts


if __name__ == "__main__":
    run_command(main)
