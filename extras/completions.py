"""What extras/serve.py generates: a request's JSON -> Texts, and the thread that generates them in batches."""

import contextlib
import json
import queue
import time
import traceback
import uuid
from dataclasses import dataclass, field

import torch

from sample import chat_ids, generate, pick, prompt_prefix

TEXT_TOKENS = 16  # of /v1/completions without max_tokens, as OpenAI's


class Refusal(Exception):
    """An answer with a status other than 200: OpenAI's error object, its message in one line."""

    def __init__(self, status, message, code=None, param=None):
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
        kind, message = kinds.get(status, "invalid_request_error"), " ".join(message.split())
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ----------------------------------------------------------------------------------------------------------------------
# What is asked


@dataclass
class Text:
    """One text to generate. The thread of the model puts into `news` (id, expert), and at the end a finish reason."""

    prompt: list  # of ids
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stops: list
    experts: bool  # whether to say which expert each token went to most
    deadline: float
    news: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    is_given_up: bool = False  # by its client


def take(body, name, kinds, default, low=None, high=None):
    """A field of the request, of a type and in a range; null is the default."""
    value = body.get(name)
    value = default if value is None else value
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if type(value) not in kinds or low is not None and not low <= value <= high:
        within = f" from {low} to {high}" if low is not None else ""
        raise Refusal(400, f"{name}: expected {wanted}{within}", param=name)
    return value


KNOWN = (
    "model messages prompt max_tokens max_completion_tokens temperature top_p seed stop stream stream_options experts"
)
IGNORED = "user metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls"  # change no text
# What other servers can do and this one cannot: fine where it asks for nothing.
NOT_HERE = {"n": (1,), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logprobs": (False,)}
NOT_HERE |= {"response_format": ({"type": "text"},), "echo": (False,), "logit_bias": ({},), "tools": ([],)}


def texts_asked(body, is_chat, server):
    """The body of a request -> a list of Text. Refusal, which names the field, for what cannot be done."""
    for name, value in body.items():
        if name in NOT_HERE and value is not None and value not in NOT_HERE[name]:
            raise Refusal(400, f"{name} = {json.dumps(value)[:50]} is not supported here", param=name)
        if name not in {*KNOWN.split(), *IGNORED.split(), *NOT_HERE}:
            raise Refusal(400, f"{name} is not supported here", param=name)
    if body.get("model") not in (None, server.name):
        problem = f"there is no model {json.dumps(body['model'])[:100]}, only {server.name}"
        raise Refusal(404, problem, "model_not_found", "model")
    prefix, tokenizer = prompt_prefix(server.tokenizer, server.info), server.tokenizer
    if is_chat:
        try:
            prompts = [chat_ids(tokenizer, messages_of(body.get("messages")), prefix)]
        except ValueError as error:  # of a folder's own chat template
            raise Refusal(400, str(error), param="messages") from None
    else:
        given = take(body, "prompt", (str, list), "")
        given = [given] if isinstance(given, str) else given
        if not given or not all(isinstance(text, str) for text in given):
            raise Refusal(400, "prompt: expected a text or a list of texts", param="prompt")
        if len(given) > server.waiting.maxsize:
            problem = f"prompt: {len(given)} texts, at most {server.waiting.maxsize} can wait together"
            raise Refusal(400, problem, param="prompt")
        prompts = [(prefix + tokenizer.encode(text)) or [tokenizer.eos_id] for text in given]
    take(body, "stream_options", (dict,), {})
    if take(body, "stream", (bool,), False) and len(prompts) > 1:
        raise Refusal(400, "prompt: a stream has one text, ask for several without stream", param="prompt")
    context = server.model.config.block_size
    longest = max(map(len, prompts))
    if longest > context:
        problem = f"the prompt has {longest} tokens, the model's context is {context}"
        raise Refusal(400, problem, "context_length_exceeded", "messages" if is_chat else "prompt")
    stops = take(body, "stop", (str, list), [])
    stops = [stops] if isinstance(stops, str) else stops
    if not all(isinstance(stop, str) and stop for stop in stops) or len(stops) > 16:
        raise Refusal(400, "stop: expected at most 16 texts that are not empty", param="stop")
    temperature = take(body, "temperature", (int, float), 1.0, 0, 2)
    if 0 < temperature < 0.001:  # logits / 1e-45 are infinite, which fails every text of the batch
        raise Refusal(400, "temperature: expected 0, or 0.001 or more", param="temperature")
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    settings = {
        "max_tokens": take(body, limit, (int,), context if is_chat else TEXT_TOKENS, 1, 1 << 20),
        "temperature": temperature,
        "top_p": take(body, "top_p", (int, float), 1.0, 0.001, 1),
        "stops": stops,
        "experts": take(body, "experts", (bool,), False) and server.names_experts,
        "deadline": time.monotonic() + server.timeout_s,
    }
    seed = take(body, "seed", (int,), uuid.uuid4().int % (1 << 62), 0, (1 << 63) - 1)
    return [Text(prompt, seed=seed + i, **settings) for i, prompt in enumerate(prompts)]


def messages_of(given):
    """The messages of a chat with text alone, in the roles of the chat template."""
    if not isinstance(given, list) or not given:
        raise Refusal(400, "messages: expected a list of {role, content}", param="messages")
    messages = []
    for message in given:
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise Refusal(400, "messages: expected role system, user or assistant, and a text", param="messages")
        messages.append({"role": role, "content": content})
    return messages


# ----------------------------------------------------------------------------------------------------------------------
# The thread that owns the model


def serve_texts(server):
    """Generate what waits, in batches, for ever."""
    while True:
        texts = [server.waiting.get()]
        with contextlib.suppress(queue.Empty):
            while len(texts) < (server.batch if server.model.has_cache else 1):
                texts.append(server.waiting.get_nowait())
        texts = [text for text in texts if not text.is_given_up]
        try:
            if texts:
                generate_texts(server, texts)
        except Exception as error:  # a failure must not end the server, nor leave a client waiting
            traceback.print_exc()
            for text in texts:
                text.news.put(f"error: {type(error).__name__}: {error}")


@torch.no_grad()
def generate_texts(server, texts):
    """Generate a batch. A row that is done, given up or late is computed on, and nobody reads it."""
    model, tokenizer = server.model, server.tokenizer
    T, device = max(len(text.prompt) for text in texts), model.embedding.device
    ids = torch.tensor([[-1] * (T - len(text.prompt)) + text.prompt for text in texts], device=device)
    generators = [torch.Generator(device).manual_seed(text.seed) for text in texts]
    waits = [None] * len(texts)  # the last token of each, whose expert is known when it is read
    is_done, taken = [False] * len(texts), [0] * len(texts)
    stop_ids = (tokenizer.eos_id, tokenizer.chat_end_id)

    def choose(logits):  # each row as if it were alone
        rows = zip(logits.split(1), texts, generators)
        return torch.cat([pick(row, text.temperature, 0, text.top_p, own) for row, text, own in rows])

    def end(row, reason):
        is_done[row] = True
        if waits[row] is not None:
            texts[row].news.put((waits[row], None))
        texts[row].news.put(reason)

    longest = max(text.max_tokens for text in texts)
    with experts_of(model) if any(text.experts for text in texts) else contextlib.nullcontext() as experts:
        for new in generate(model, ids, longest, tokenizer.vocab_size, choose=choose):
            of_last = experts.pop() if experts else [None] * len(texts)
            for row, (text, i) in enumerate(zip(texts, new.tolist())):
                if is_done[row]:
                    continue
                if waits[row] is not None:
                    text.news.put((waits[row], of_last[row]))
                    waits[row] = None
                if text.is_given_up or time.monotonic() > text.deadline or i == -1:  # -1: its context is full
                    end(row, "length")
                elif i in stop_ids:
                    end(row, "stop")
                else:
                    taken[row] += 1
                    waits[row] = i if text.experts else None
                    if not text.experts:
                        text.news.put((i, None))
                    if taken[row] == text.max_tokens:
                        end(row, "length")
            if all(is_done):
                return
    for row in range(len(texts)):
        if not is_done[row]:
            end(row, "length")


@contextlib.contextmanager
def experts_of(model):
    """Give a list to which every forward appends the expert that the last token of each row went to most, all layers
    together, [B]."""
    found, sums = [], []

    def record(ffn, inputs):
        shares = ffn.router_logits(inputs[0][:, -1:])[:, 0].softmax(-1)
        sums.append(shares.unflatten(-1, (ffn.n_expert, -1)).sum(-1))
        if len(sums) == len(model.blocks):
            found.append(sum(sums).argmax(-1).tolist())
            sums.clear()

    hooks = [block.ffn.register_forward_pre_hook(record) for block in model.blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
