"""Text from a checkpoint.

    python sample.py                                          # newest checkpoint: a chat if it was trained on conversations,
                                                              # else text from the beginning of a document
    python sample.py out/demo --prompt 却说曹操 --num-samples 3
    python sample.py --prompt 却说曹操 --prompt 话说天下大势    # several, as one batch
    echo 却说曹操 | python sample.py --temperature 0           # greedy
    python sample.py --chat --system 你是诗人。                # Ctrl-C ends an answer, Ctrl-D the session

Text streams as it is made, whole characters at a time. Of several texts the second streams when the first is done.
"""

import argparse
import contextlib
import itertools
import operator
import signal
import sys
import time

from tokenizer import load_tokenizer, read_text


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", default="out", metavar="CHECKPOINT", help="a step, a run or a Hugging Face folder (default: the newest run under out)")
    add("--prompt", dest="prompts", action="append", default=[], metavar="TEXT",
        help="text to continue, in a chat a question; any number of times (default: standard input, if it is no terminal)")  # fmt: skip
    add("--file", dest="prompts", action="append", type=read_prompt, metavar="FILE",
        help="the same from a UTF-8 file, one prompt a file, without its last line break; any number of times")  # fmt: skip
    add("--chat", action=argparse.BooleanOptionalAction, help="answer, or continue (default: what the model was trained for)")
    add("--system", metavar="TEXT", help="the system turn of a chat")
    add("--num-samples", type=int, default=1, help="texts for each prompt (default %(default)s)")
    add("--max-new-tokens", type=int, default=200, help="default %(default)s")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default %(default)s)")
    add("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all (default %(default)s)")
    add("--top-p", type=float, default=0.95, help="only the smallest set with this probability (default %(default)s)")
    add("--min-p", type=float, default=0.0, help="only tokens this likely, relative to the likeliest (default %(default)s)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: what is in the text becomes less likely (default %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; any number of times; $'\\n' is a line break")
    add("--seed", type=int, default=0, help="the same seed and prompts give the same texts (default %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--compile", action="store_true", help="compile the step of one token: 10 to 20 s at the first text, which its tok/s count, and some 5 s where the cache on disk has it")
    args = parser.parse_args(argv)
    for name, ok, expected in (
        ("num_samples", args.num_samples >= 1, "1 or more"),
        ("max_new_tokens", args.max_new_tokens >= 1, "1 or more"),
        ("temperature", args.temperature == 0 or args.temperature >= 0.001, "0, or 0.001 or more"),
        ("top_k", args.top_k >= 0, "0 or more"),
        ("top_p", 0 < args.top_p <= 1, "more than 0, at most 1"),
        ("min_p", 0 <= args.min_p <= 1, "0 to 1"),
        ("repetition_penalty", 0 < args.repetition_penalty < float("inf"), "more than 0"),
        ("stop", all(args.stop), "texts that are not empty"),
        ("seed", 0 <= args.seed < 1 << 63, "0 or more, below 2^63"),
    ):
        if not ok:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}")
    return args


def read_prompt(path):
    return read_text(path).removesuffix("\n").removesuffix("\r")


if __name__ == "__main__":
    given = get_args()  # a wrong flag, or -h, need not wait for torch

import torch  # noqa: E402

from checkpoint import description  # noqa: E402
from model import Decoder, can_compile, choose_device  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------
# Logits -> logits, [B, V]


def penalize_repeats(logits, ids, penalty):
    """Tokens that are in ids [B, T] (-1: padding) become less likely, once each (CTRL, arXiv 1909.05858, section 4.1)."""
    if penalty == 1:
        return logits
    B, V = logits.shape
    columns = ids.masked_fill((ids < 0) | (ids >= V), V)
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=logits.device).scatter_(1, columns, True)[:, :V]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits, k):
    """The k largest; all where k is 0."""
    if not 0 < k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def keep_top_p(logits, p):
    """The smallest set whose probability is at least p, one token or more (arXiv 1904.09751, section 3.1)."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), -torch.inf)


def keep_min_p(logits, p):
    """Tokens at least p times as likely as the likeliest (arXiv 2407.01082, section 3)."""
    if p == 0:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def pick(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None, min_p=0.0):
    """[B, V] -> [B] ids: the likeliest at temperature 0, else drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = keep_min_p(keep_top_p(keep_top_k(logits.float() / temperature, top_k), top_p), min_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------
# Ids


@torch.no_grad()
def generate(
    model, ids, max_new_tokens, vocab_size, temperature=1.0, top_k=0, top_p=1.0, generator=None, min_p=0.0, repetition_penalty=1.0
):  # fmt: skip
    """Yield [B] ids, max_new_tokens times at most, ending early where the context of the model ends.

    ids [B, T], padded on the left with -1 where prompts are of unequal length; a row whose context is full before that of
    the others yields -1 from there on. Ids from vocab_size on (padding of the embedding) are never picked. A model with
    dispatch = "sequence" has no cache and reads the whole text every time.
    """
    if not model.has_cache and (ids < 0).any():
        raise ValueError('dispatch = "sequence" reads padding too: give it prompts of one length')
    room = model.config.block_size + 1 - (ids >= 0).sum(1)  # the last token needs no forward
    max_new_tokens = min(max_new_tokens, room.max().item())
    least_room = room.min().item()
    cache = model.new_cache(len(ids), ids.shape[1] + max_new_tokens) if model.has_cache else None
    unread = ids
    for n in range(max_new_tokens):
        logits = model.step(unread, cache) if n and cache is not None else model.next_logits(unread, cache)
        new = pick(penalize_repeats(logits[:, :vocab_size], ids, repetition_penalty), temperature, top_k, top_p, generator, min_p)
        yield new if n < least_room else torch.where(n < room, new, -1)
        ids = torch.cat([ids, new[:, None]], dim=1)
        unread = ids if cache is None else new[:, None]


def what_stands_in_front(model, tokenizer):
    """Of a prompt: in our training a document begins behind the end of another. Other programs put nothing in front of a text."""
    about = description(model.checkpoint)
    return [tokenizer.eos_id] if "step" in about or about.get("architectures") == ["NanoSteelForCausalLM"] else []


def until(ids, stop_ids, taken):
    """The ids before the first of stop_ids; each is noted in the list taken."""
    for i in ids:
        if i in stop_ids:
            return
        taken.append(i)
        yield i


# ---------------------------------------------------------------------------------------------------------------
# Text


def before_stop(pieces, stops):
    """The text of pieces up to the first of the strings in stops that is whole; what may become one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        ends = [(held.index(stop) + len(stop), -len(stop)) for stop in stops if stop in held]
        if ends:  # the one that is whole first; of those that end there the longest
            yield held[: sum(min(ends))]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


def continuations(model, tokenizer, prompts, args, generator):
    """prompts, lists of ids -> for each (an iterator of its text, the list of its ids, which fills as the text is read).

    They are one batch, which goes on as far as the text that is being read needs it: also the second one read streams.
    """
    if not model.has_cache and len(prompts) > 1:  # it would read the padding
        return [pair for prompt in prompts for pair in continuations(model, tokenizer, [prompt], args, generator)]
    T = max(map(len, prompts))
    ids = torch.tensor([[-1] * (T - len(prompt)) + prompt for prompt in prompts], device=model.embedding.device)
    steps = generate(
        model, ids, args.max_new_tokens, tokenizer.vocab_size, args.temperature, args.top_k, args.top_p, generator,
        args.min_p, args.repetition_penalty,
    )  # fmt: skip
    stop_ids, pairs = {tokenizer.eos_id, tokenizer.chat_end_id, -1}, []
    for row, own_steps in enumerate(itertools.tee((new.tolist() for new in steps), len(prompts))):
        taken = []
        new_ids = until(map(operator.itemgetter(row), own_steps), stop_ids, taken)
        pairs.append((before_stop(tokenizer.stream(new_ids), args.stop), taken))
    return pairs


def show(model, tokenizer, prompts, heads, args, generator):
    """Print each prompt's head and what follows it, as it comes; then tokens/s. -> the text of the last one.

    Ctrl-C ends a text where it is an exception, as in a chat.
    """
    start, count = time.perf_counter(), 0
    for prompt, head, (pieces, taken) in zip(prompts, heads, continuations(model, tokenizer, prompts, args, generator)):
        print(head, end="", flush=True)
        text = ""
        with contextlib.suppress(KeyboardInterrupt):
            for piece in pieces:
                text += piece
                print(piece, end="", flush=True)
        print(flush=True)
        count += len(taken)
        if len(prompt) + len(taken) > model.config.block_size:
            print(f"(the context of {model.config.block_size} tokens is full)", file=sys.stderr)
    print(f"({count} tokens, {count / (time.perf_counter() - start):.0f} tok/s)", file=sys.stderr)
    return text


# ---------------------------------------------------------------------------------------------------------------
# Chat


def trained_to_chat(checkpoint):
    """Whether train.py noted that what it read was mostly conversations. Weights from elsewhere have no such note."""
    return description(checkpoint).get("chat", False)


def chat_ids(tokenizer, messages, front):
    """The ids of a conversation up to the answer."""
    return front + tokenizer.encode_chat(messages, open_turn=True)[0]


def fit(tokenizer, messages, front, limit):
    """Messages, of which the last is a question, without as many of the oldest pairs as it takes to get to limit tokens.

    The system turn and the last question stay in any case.
    """
    first = int(messages[0]["role"] == "system")
    while len(chat_ids(tokenizer, messages, front)) > limit and len(messages) > first + 1:
        messages = messages[:first] + messages[first + 2 :]
    return messages


def converse(model, tokenizer, messages, args, generator):
    """Go on with a conversation at the terminal. Ctrl-C ends an answer; where a question is awaited it ends all, like Ctrl-D."""
    with contextlib.suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401  keys to edit the line of input() with
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.reconfigure(errors="replace")
    context, front = model.config.block_size, what_stands_in_front(model, tokenizer)
    print(f"{model.checkpoint}: Ctrl-C ends an answer, Ctrl-D the chat")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            question = input("> ")
            if not question.strip():
                continue
            asked = [*messages, {"role": "user", "content": question}]
            kept = fit(tokenizer, asked, front, context - min(args.max_new_tokens, context // 2))
            ids = chat_ids(tokenizer, kept, front)
            if len(ids) > context:
                print(f"(with this question there are {len(ids)} tokens, the model's context is {context}: shorten it)", file=sys.stderr)
                continue
            if len(kept) < len(asked):
                print("(the beginning of the chat no longer fits the context and is left out)", file=sys.stderr)
            messages = [*kept, {"role": "assistant", "content": show(model, tokenizer, [ids], [""], args, generator)}]
    print()


# ---------------------------------------------------------------------------------------------------------------


def main(argv=None, args=None):
    args = args or get_args(argv)
    device = choose_device(args.device)
    if args.compile and not can_compile(device):
        raise SystemExit("--compile needs CUDA, or a CPU with a C++ compiler and Python's headers: apt install g++ python3-dev")
    model = Decoder.load(args.checkpoint).to(device).eval()
    if args.compile and not model.has_cache:
        raise SystemExit('--compile: a model with dispatch = "sequence" reads the whole text for every token: leave it out')
    if args.compile:
        model.compile_step()
    tokenizer = load_tokenizer(model.checkpoint, model.config.vocab_size)
    generator = torch.Generator(device).manual_seed(args.seed)
    chat = trained_to_chat(model.checkpoint) if args.chat is None else args.chat
    if args.system is not None and not chat:
        raise SystemExit(f"--system {args.system}: {model.checkpoint} continues text, which has no such turn: add --chat")
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    texts, front = args.prompts, what_stands_in_front(model, tokenizer)
    if not texts and sys.stdin and not sys.stdin.isatty():
        texts = [read_prompt(0)]
    if chat and not texts:
        return converse(model, tokenizer, system, args, generator)
    if chat:
        prompts = [chat_ids(tokenizer, [*system, {"role": "user", "content": text}], front) for text in texts]
    else:
        prompts = [front + tokenizer.encode(text) or [tokenizer.eos_id] for text in texts or [""]]
    if (longest := max(map(len, prompts))) > model.config.block_size:
        raise SystemExit(f"the prompt has {longest} tokens, the model's context is {model.config.block_size}: shorten it")
    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    heads = [f"--- {model.checkpoint}\n" + ("" if chat else tokenizer.decode(prompt)) for prompt in prompts]
    show(model, tokenizer, prompts, heads, args, generator)


if __name__ == "__main__":
    for name in ("SIGINT", "SIGPIPE"):  # Ctrl-C, and a reader like `head` that has enough, end it without a traceback
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    main(args=given)
