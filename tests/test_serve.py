"""extras.serve, by OpenAI's own client, by raw connections, and under load."""

import http.client
import json
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest
import torch
from conftest import ROOT, TINY, call

from checkpoint import load
from extras import completions
from extras.completions import Text, experts_of, generate_texts, serve_texts
from extras.serve import Server
from sample import chat_ids, generate

TURN = [{"role": "user", "content": "却说曹操如何？"}]


@pytest.fixture(scope="module")
def run_folder(small_data, tmp_path_factory):
    """A run with a context of 256 tokens."""
    out = tmp_path_factory.mktemp("serve") / "run"
    call(
        "train.py", "--data", small_data, "--out", out, *TINY, "--block-size", 256, "--batch-tokens", 512, "--steps", 3
    )
    return out


@pytest.fixture
def start(run_folder):
    """start(**flags) starts a server in this process -> it, with .client(), an official client of it."""
    servers = []
    model, tokenizer, info = load(run_folder)
    for p in model.parameters():  # far from uniform, so that greedy text does not hang on rounding
        torch.nn.init.normal_(p, std=0.3)

    def start(generates=True, **flags):
        args = {"host": "127.0.0.1", "port": 0, "api_key": "", "batch": 8, "queue": 64, "timeout": 60} | flags
        server = Server(SimpleNamespace(**args), model.eval(), tokenizer, info)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if generates:
            threading.Thread(target=serve_texts, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.client = lambda key="none": openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def greedy(server, ids, n):
    """What sample.py's generate adds to a prompt, up to a stop id -> ids."""
    found = []
    for new in generate(server.model, torch.tensor([ids]), n, server.tokenizer.vocab_size, temperature=0):
        if new.item() in (server.tokenizer.eos_id, server.tokenizer.chat_end_id):
            break
        found.append(new.item())
    return found


def test_chats_and_texts_are_those_of_the_sampler_streamed_and_whole(start):
    server = start()
    client, tokenizer = server.client(), server.tokenizer
    assert [model.id for model in client.models.list()] == ["run"]
    prompt = chat_ids(tokenizer, TURN, [tokenizer.eos_id])
    expected = greedy(server, prompt, 40)
    flags = {"model": "run", "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(messages=TURN, **flags)
    assert whole.choices[0].message.content == tokenizer.decode(expected)
    assert whole.choices[0].finish_reason == ("length" if len(expected) == 40 else "stop")
    counts = (len(prompt), len(expected), len(prompt) + len(expected))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == counts
    stream = list(
        client.chat.completions.create(messages=TURN, stream=True, stream_options={"include_usage": True}, **flags)
    )
    said = "".join(event.choices[0].delta.content or "" for event in stream if event.choices)
    assert said == whole.choices[0].message.content and stream[-1].usage == whole.usage
    assert (
        stream[0].choices[0].delta.role == "assistant"
        and stream[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    )

    prompts = ["却说", "玄德曰：", ""]
    texts = client.completions.create(prompt=prompts, **flags)
    for text, choice in zip(prompts, texts.choices, strict=True):
        ids = greedy(server, [tokenizer.eos_id, *tokenizer.encode(text)], 40)
        assert choice.text == tokenizer.decode(ids)
    pieces = client.completions.create(prompt=prompts[0], stream=True, **flags)
    assert "".join(event.choices[0].text for event in pieces) == texts.choices[0].text


def test_stop_strings_seeds_and_the_end_of_the_context(start):
    client = start().client()
    flags = {"model": "run", "temperature": 0, "prompt": "却说"}
    whole = client.completions.create(max_tokens=30, **flags).choices[0].text
    stop = whole[10:12]
    stopped = client.completions.create(max_tokens=30, stop=[stop, "没有"], **flags).choices[0]
    assert stopped.text == whole[: whole.index(stop)] and stopped.finish_reason == "stop"
    full = client.completions.create(max_tokens=5000, **flags)
    assert full.usage.total_tokens == 257 or full.choices[0].finish_reason == "stop"  # the last token is never read
    drawn = [client.completions.create(model="run", prompt="却说", seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    parts = [{"role": "user", "content": [{"type": "text", "text": "却说曹操"}, {"type": "text", "text": "如何？"}]}]
    chats = [client.chat.completions.create(model="run", messages=m, seed=0, max_tokens=9) for m in (parts, TURN)]
    assert chats[0].choices[0].message.content == chats[1].choices[0].message.content


def text_of(server, prompt, **changes):
    """A Text that waits."""
    ids = [server.tokenizer.eos_id, *server.tokenizer.encode(prompt)]
    settings = {"max_tokens": 20, "temperature": 0.9, "top_p": 0.9, "seed": 5, "stops": [], "experts": False}
    return Text(ids, deadline=time.monotonic() + 60, **settings | changes)


def news_of(text):
    """What the thread of the model said of a text that is done: (id, expert)s."""
    news = [text.news.get_nowait() for _ in range(text.news.qsize())]
    assert news[-1] in ("length", "stop")
    return news[:-1]


def test_a_text_does_not_depend_on_those_beside_it(start):
    server = start(generates=False)
    prompts, changes = ("却说", "玄德曰：汝等", "次日"), ({}, {"temperature": 0}, {"max_tokens": 7})
    together = [text_of(server, *pair[:1], **pair[1]) for pair in zip(prompts, changes)]
    generate_texts(server, together)
    for prompt, change, text in zip(prompts, changes, together):
        alone = text_of(server, prompt, **change)
        generate_texts(server, [alone])
        assert news_of(text) == news_of(alone) != []


def test_the_expert_of_a_token_is_the_one_with_the_largest_share(start):
    server = start(generates=False)
    text = text_of(server, "却说", experts=True)
    generate_texts(server, [text])
    news = news_of(text)
    ids = torch.tensor([text.prompt + [i for i, _ in news]])
    shares = []
    hooks = [
        block.ffn.register_forward_pre_hook(lambda ffn, inputs: shares.append(ffn.router_logits(inputs[0]).softmax(-1)))
        for block in server.model.blocks
    ]
    with torch.no_grad():
        server.model(ids)
    for hook in hooks:
        hook.remove()
    largest = sum(shares)[0].argmax(-1).tolist()[len(text.prompt) :]
    assert [expert for _, expert in news] == [*largest[:-1], None]  # the last one is never read
    with experts_of(server.model) as found:
        assert found == []


REFUSED = [  # a change to a good request, the status, words of the message
    ({"n": 2}, 400, "n = 2 is not supported here"),
    ({"logprobs": True}, 400, "logprobs = true is not supported here"),
    ({"tools": [{"type": "function"}]}, 400, "tools = "),
    ({"wings": 2}, 400, "wings is not supported here"),
    ({"wi\nngs": 2}, 400, "wi ngs is not supported here"),
    ({"\ud800": 2}, 400, "? is not supported here"),  # half a character of UTF-16, which JSON can hold
    ({"temperature": 3}, 400, "temperature: expected int or float from 0 to 2"),
    ({"temperature": "hot"}, 400, "temperature: expected int or float"),
    ({"temperature": 1e-45}, 400, "temperature: expected 0, or 0.001 or more"),  # 0 / 0 would fail the whole batch
    ({"max_tokens": 0}, 400, "max_tokens: expected int from 1"),
    ({"stream": "yes"}, 400, "stream: expected bool"),
    ({"stream_options": True}, 400, "stream_options: expected dict"),
    ({"stop": [""]}, 400, "stop: expected at most 16 texts"),
    ({"messages": []}, 400, "messages: expected a list"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages: expected role system, user or assistant"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, 400, "messages: expected role system, user or assistant"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages: expected role"),
    ({"messages": [{"role": "user", "content": "曹操" * 300}]}, 400, "the model's context is 256"),
    ({"model": "gpt-5"}, 404, 'there is no model "gpt-5", only run'),
]


def ask(server, body, path="/v1/chat/completions", **headers):
    """POST -> status, the body of the answer."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    content = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8")
    connection.request("POST", path, content, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_what_cannot_be_done_is_refused_in_one_line(start):
    server = start(queue=1, generates=False, api_key="密 key")
    key = {"Authorization": "Bearer 密 key".encode("utf-8").decode("latin-1")}
    good = {"model": "run", "messages": TURN, "max_tokens": 3}
    for change, status, words in REFUSED:
        found, answer = ask(server, good | change, **key)
        assert found == status and words in answer["error"]["message"], (change, answer)
        assert "\n" not in answer["error"]["message"] and set(answer["error"]) == {"message", "type", "param", "code"}
    for body, status, words in (
        (b"{", 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (b"[" * 100_000, 400, "not JSON"),
        (b" " * (1 << 20) + b" ", 413, "1,048,577 bytes"),
    ):
        found, answer = ask(server, body, **key)
        assert found == status and words in answer["error"]["message"]
    assert ask(server, good, **key | {"Content-Type": "text/plain"})[0] == 415
    assert ask(server, good, path="/v1/embeddings", **key)[0] == 404
    assert ask(server, good)[0] == 401 and ask(server, good, Authorization="Bearer wrong")[0] == 401
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    found, answer = ask(server, {"prompt": ["却说", "次日"]}, path="/v1/completions", **key)
    assert found == 400 and "prompt: 2 texts, at most 1" in answer["error"]["message"]  # the queue never has room
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    connection.request("PUT", "/v1/models")
    refusal = connection.getresponse()
    assert refusal.status == 501 and "not support" in json.loads(refusal.read())["error"]["message"]
    server.waiting.put("one that waits")
    assert ask(server, good, **key)[0] == 429
    server.waiting.get()


@pytest.mark.parametrize("flows", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_work(start, stream, flows):
    """flows: while token follows token; a whole answer writes nothing by which the server could notice."""
    server = start(generates=False)
    body = json.dumps({"prompt": "却说", "max_tokens": 200, "stream": stream}).encode("utf-8")
    head = f"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(server.server_address) as connection:
        connection.sendall(head.encode() + body)
        text = server.waiting.get(timeout=10)
        assert not text.is_given_up
    deadline = time.monotonic() + 20
    while not text.is_given_up:
        assert time.monotonic() < deadline
        if flows:
            text.news.put((5, None))
        time.sleep(0.005)
    text.news = queue.SimpleQueue()
    generate_texts(server, [text])
    assert news_of(text) == []  # not one token


def test_a_request_takes_no_longer_than_its_time(start):
    server = start(timeout=0.3)
    late = server.client().completions.create(model="run", prompt="却说", max_tokens=250, temperature=0)
    assert late.choices[0].finish_reason == "length" and late.usage.completion_tokens <= 250
    text = text_of(server, "却说")
    text.deadline = time.monotonic() - 1
    generate_texts(server, [text])
    assert news_of(text) == []


def test_a_failure_is_answered_and_the_server_goes_on(start, monkeypatch, capsys):
    server = start()

    def fail(*args, **kwargs):
        raise RuntimeError("out\nof memory")

    monkeypatch.setattr(completions, "generate", fail)
    with pytest.raises(openai.InternalServerError, match="RuntimeError: out of memory") as failure:
        server.client().completions.create(model="run", prompt="却说")
    assert failure.value.type == "server_error" and "RuntimeError: out\nof memory" in capsys.readouterr().err
    monkeypatch.undo()
    assert server.client().completions.create(model="run", prompt="却说", max_tokens=3).usage.completion_tokens <= 3


def test_thirty_two_clients_lose_nothing(start):
    server = start(queue=16)
    expected = {
        n: server.client().completions.create(model="run", prompt="却说" * n, max_tokens=8, temperature=0)
        for n in (1, 2, 3)
    }

    def one(i):
        n = i % 3 + 1
        for _ in range(1000):
            try:
                answer = server.client().completions.create(model="run", prompt="却说" * n, max_tokens=8, temperature=0)
                return answer.choices[0].text == expected[n].choices[0].text
            except openai.RateLimitError:
                refused.append(i)
                time.sleep(0.02)
        return None

    refused = []
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(one, range(200)))
    assert answers == [True] * 200


@pytest.fixture
def process(run_folder):
    """A server in a process of its own, as run_command() sets it up -> it, with the port."""
    command = [sys.executable, "-m", "extras.serve", str(run_folder), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process, int(re.search(r"http://[\d.]+:(\d+)/v1", process.stdout.readline())[1])
    process.kill()
    process.communicate()


def started_stream(port):
    """A connection with the first of 250 tokens on it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"prompt": "却说", "max_tokens": 250, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    return connection, answer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at_work", [False, True])
def test_ctrl_c_ends_it_cleanly(process, number, at_work):
    server, port = process
    connections = [started_stream(port) for _ in range(4 * at_work)]
    server.send_signal(number)
    assert server.wait(timeout=2) == 0 and server.stderr.read() == ""
    for connection, answer in connections:
        answer.close()
        connection.close()


def test_clients_that_leave_end_no_server(process):
    server, port = process
    for _ in range(10):
        connection, answer = started_stream(port)
        answer.close()
        connection.close()
        with socket.create_connection(("127.0.0.1", port)) as half:  # a refusal that nobody reads: SIGPIPE
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n")
            half.sendall(b"Content-Length: 9\r\n\r\n{")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/")
    page = connection.getresponse().read().decode("utf-8")
    assert page == (ROOT / "extras" / "serve.html").read_text(encoding="utf-8")
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=2) == 0 and server.stderr.read() == ""


@pytest.mark.slow
def test_the_page_in_a_browser(start, tmp_path):
    """Needs playwright and Chromium: pip install playwright, apt install chromium."""
    import shutil

    from playwright.sync_api import sync_playwright

    server = start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(address)
        page.get_by_label("temperature").fill("0")
        page.get_by_label("tokens").fill("20")
        page.get_by_label("experts").check()
        page.locator("#prompt").fill("却说<b>曹操</b>")
        page.get_by_role("button", name="send").click()
        page.get_by_text("tokens/s").wait_for()
        said = page.locator("#log .assistant").inner_text()
        colours = page.locator("#log.coloured .assistant span").evaluate_all(
            "spans => spans.map(span => span.style.getPropertyValue('--hue'))"
        )
        page.get_by_label("chat").check()
        page.locator("#prompt").fill("你好")
        page.locator("#prompt").press("Enter")
        page.locator("#log .user").wait_for()
        page.get_by_role("button", name="send").wait_for()
        long = [name * 40 for name in ("却说", "玄德", "次日")]  # they do not fit the context together
        for question in (*long, "曹操" * 300, "再问"):
            page.locator("#prompt").fill(question)
            page.locator("#prompt").press("Enter")
            page.get_by_role("button", name="send").wait_for()
        refused = page.locator("#log .error").all_inner_texts()
        asked_last = page.locator("#log .user").last.inner_text()
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    tokenizer = server.tokenizer
    ids = [tokenizer.eos_id, *tokenizer.encode("却说<b>曹操</b>")]
    assert said == "却说<b>曹操</b>" + tokenizer.decode(greedy(server, ids, 20))  # as text: nothing of it is markup
    assert len(set(colours) - {""}) > 1 and errors == []
    assert len(refused) == 1 and "the model's context is 256" in refused[0] and asked_last == "再问"
    assert {url.removeprefix(address) for url in asked} <= {
        "",
        "v1/models",
        "v1/completions",
        "v1/chat/completions",
        "favicon.ico",
    }
