"""Generate text from a checkpoint.

    python sample.py                                          # the newest checkpoint: a chat if it was trained on
                                                              # conversations, else text from the start of a document
    python sample.py out/demo --prompt 却说曹操 --num-samples 3
    python sample.py --prompt 却说曹操 --prompt 话说天下大势    # several prompts, generated as one batch
    echo 却说曹操 | python sample.py --temperature 0           # greedy
    python sample.py --chat --system 你是诗人。                # Ctrl-C ends an answer, Ctrl-D the session

Text is printed while it is generated, whole characters at a time; of several texts, each one after the one before.

Shapes: B batch, T time, V vocabulary.
"""

import argparse
import contextlib
import itertools
import operator
import signal
import sys
import time
from pathlib import Path

from common import can_compile, choose_device, read_text, run_command


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    checkpoint_help = "a step, a run or a Hugging Face folder (default: the newest run under out)"
    prompt_help = "text to continue, in a chat a question; repeatable (default: standard input, if it is no terminal)"
    file_help = "a prompt from a UTF-8 file, without its last line break; repeatable"
    compile_help = "compile the step of one token: takes 10 to 20 s at the first text, some 5 s once it is cached"
    add("checkpoint", nargs="?", default="out", metavar="CHECKPOINT", help=checkpoint_help)
    add("--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help=prompt_help)
    add("--file", dest="prompts", action="append", type=Path, metavar="FILE", help=file_help)
    add("--chat", action=argparse.BooleanOptionalAction, help="answer, or continue (default: as the model was trained)")
    add("--system", metavar="TEXT", help="the system turn of a chat")
    add("--num-samples", type=int, default=1, help="texts for each prompt (default %(default)s)")
    add("--max-new-tokens", type=int, default=200, help="default %(default)s")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default %(default)s)")
    add("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all (default %(default)s)")
    add("--top-p", type=float, default=0.95, help="only the smallest set this probable (default %(default)s)")
    add("--min-p", type=float, default=0.0, help="only tokens this probable relative to the likeliest (%(default)s)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: what the text has is less likely (%(default)s)")
    add(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable ($'\\n': newline)"
    )
    add("--seed", type=int, default=0, help="same seed and prompts: same texts (default %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--compile", action="store_true", help=compile_help)
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


if __name__ == "__main__":
    get_args()  # before torch, whose import takes seconds: -h and a wrong flag answer at once

import torch  # noqa: E402

from checkpoint import load  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# Logits -> logits, [B, V]


def penalize_repeats(logits, ids, penalty):
    """Make the tokens in ids [B, T] (-1: padding) less likely, once each (CTRL, arXiv 1909.05858, section 4.1)."""
    if penalty == 1:
        return logits
    B, V = logits.shape
    columns = ids.masked_fill((ids < 0) | (ids >= V), V)
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=logits.device).scatter_(1, columns, True)[:, :V]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits, k):
    """Keep the k largest; all if k is 0."""
    if not 0 < k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def keep_top_p(logits, p):
    """Keep the smallest set with probability p or more, at least one token (nucleus, arXiv 1904.09751, section 3.1)."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), -torch.inf)


def keep_min_p(logits, p):
    """Keep tokens at least p times as likely as the likeliest (arXiv 2407.01082, section 3)."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Ids


def compile_step(model):
    """Compile model.step(): code for the first length, then for every length; a padded batch has code of its own."""
    model.step = torch.compile(model.next_logits, options={"size_asserts": False})  # guards check sizes already: 6 %


@torch.no_grad()
def generate(
    model,
    ids,
    max_new_tokens,
    vocab_size,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    generator=None,
    min_p=0.0,
    repetition_penalty=1.0,
    choose=None,
):
    """Yield [B] new ids, at most max_new_tokens times, and stop when every row's context is full.

    ids [B, T]: prompts of unequal length have left padding of -1. A row whose context is full before the others' yields
    -1 from then on. Ids from vocab_size on (padding of the embedding) are never picked. A model without a cache
    (dispatch = "sequence") reads the whole text for every token. ValueError if that one gets padding. choose: logits
    [B, V] -> ids [B], instead of pick.
    """
    if not model.has_cache and (ids < 0).any():
        raise ValueError('dispatch = "sequence" reads padding too: give it prompts of one length')
    room = model.config.block_size + 1 - (ids >= 0).sum(1)  # + 1: the last token is never read
    max_new_tokens = min(max_new_tokens, room.max().item())
    least_room = room.min().item()
    cache = model.new_cache(len(ids), ids.shape[1] + max_new_tokens) if model.has_cache else None
    unread = ids
    for n in range(max_new_tokens):
        logits = model.next_logits(unread, cache) if n == 0 or cache is None else model.step(unread, cache)
        logits = penalize_repeats(logits[:, :vocab_size], ids, repetition_penalty)
        new = choose(logits) if choose else pick(logits, temperature, top_k, top_p, generator, min_p)
        yield new if n < least_room else torch.where(n < room, new, -1)
        ids = torch.cat([ids, new[:, None]], dim=1)
        unread = ids if cache is None else new[:, None]


def prompt_prefix(tokenizer, info):
    """The ids before every prompt: an eos where documents began after one in training, else none."""
    return [tokenizer.eos_id] if info.eos_first else []


def before_stop_id(ids, stop_ids, taken):
    """Yield ids up to the first of stop_ids, and append each to the list taken."""
    for i in ids:
        if i in stop_ids:
            return
        taken.append(i)
        yield i


# ----------------------------------------------------------------------------------------------------------------------
# Text


def before_stop(pieces, stops):
    """Yield the text of pieces up to the first complete stop string. Text that may become one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        spans = [(held.index(stop) + len(stop), held.index(stop)) for stop in stops if stop in held]
        if spans:  # the stop string that ends first; of several that end there, the longest
            _, start = min(spans)
            yield held[:start]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


def continuations(model, tokenizer, prompts, args, generator):
    """For each prompt (a list of ids) a pair: an iterator over its new text, and the list of its new ids so far.

    The prompts are one batch, decoded lazily: it advances when any row's text is consumed, so that every row streams.
    """
    if not model.has_cache and len(prompts) > 1:  # such a model reads padding: a batch for each prompt
        return [pair for prompt in prompts for pair in continuations(model, tokenizer, [prompt], args, generator)]
    T = max(map(len, prompts))
    ids = torch.tensor([[-1] * (T - len(prompt)) + prompt for prompt in prompts], device=model.embedding.device)
    new_ids = generate(
        model,
        ids,
        args.max_new_tokens,
        tokenizer.vocab_size,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        generator=generator,
    )
    steps = (row.tolist() for row in new_ids)
    stop_ids = {tokenizer.eos_id, tokenizer.chat_end_id, -1}  # -1: the row's context is full
    pairs = []
    for row, own_steps in enumerate(itertools.tee(steps, len(prompts))):  # tee keeps what a row has yet to read
        taken = []
        new_ids = before_stop_id(map(operator.itemgetter(row), own_steps), stop_ids, taken)
        pairs.append((before_stop(tokenizer.stream(new_ids), args.stop), taken))
    return pairs


def show(model, tokenizer, prompts, heads, args, generator):
    """Print each prompt's head, then its text while it is generated, at the end tokens/s. Returns the last text.

    Where Ctrl-C raises KeyboardInterrupt, as in a chat, it ends only the text.
    """
    start, count = time.perf_counter(), 0
    texts = continuations(model, tokenizer, prompts, args, generator)
    for prompt, head, (pieces, taken) in zip(prompts, heads, texts):
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


# ----------------------------------------------------------------------------------------------------------------------
# Chat


def chat_ids(tokenizer, messages, prefix):
    """The ids of a conversation up to where the answer begins."""
    return prefix + tokenizer.encode_chat(messages, open_turn=True)[0]


def trim_chat(tokenizer, messages, prefix, limit):
    """Drop the oldest pairs of question and answer until the messages, a question last, have at most limit tokens.

    The system turn and the last question always stay.
    """
    first = int(messages[0]["role"] == "system")
    while len(chat_ids(tokenizer, messages, prefix)) > limit and len(messages) > first + 1:
        messages = messages[:first] + messages[first + 2 :]
    return messages


def converse(model, tokenizer, info, messages, args, generator):
    """Chat at the terminal, from messages on. Ctrl-C ends an answer, and at the prompt the chat, as Ctrl-D does."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives input() line editing
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.reconfigure(errors="replace")
    context, prefix = model.config.block_size, prompt_prefix(tokenizer, info)
    print(f"{info.path}: Ctrl-C ends an answer, Ctrl-D the chat")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            question = input("> ")
            if not question.strip():
                continue
            asked = [*messages, {"role": "user", "content": question}]
            kept = trim_chat(tokenizer, asked, prefix, context - min(args.max_new_tokens, context // 2))
            ids = chat_ids(tokenizer, kept, prefix)
            if len(ids) > context:
                problem = f"with this question there are {len(ids)} tokens, the model's context is {context}"
                print(f"({problem}: shorten it)", file=sys.stderr)
                continue
            if len(kept) < len(asked):
                print("(the beginning of the chat no longer fits the context and is left out)", file=sys.stderr)
            answer = show(model, tokenizer, [ids], [""], args, generator)
            messages = [*kept, {"role": "assistant", "content": answer}]
    print()


# ----------------------------------------------------------------------------------------------------------------------


def read_prompt(path):
    """A file's text without its last line break; 0 is standard input."""
    return read_text(path).removesuffix("\n")


def main(argv=None):
    args = get_args(argv)
    texts = [read_prompt(given) if isinstance(given, Path) else given for given in args.prompts]
    device = choose_device(args.device)
    if args.compile and not can_compile(device):
        needs = "CUDA, or a CPU with a C++ compiler and Python's headers: apt install g++ python3-dev"
        raise ValueError(f"--compile needs {needs}")
    model, tokenizer, info = load(args.checkpoint)
    model.to(device).eval()
    if args.compile and not model.has_cache:
        raise ValueError('--compile: dispatch = "sequence" reads the whole text for every token: leave it out')
    if args.compile:
        compile_step(model)
    generator = torch.Generator(device).manual_seed(args.seed)
    chat = info.chat if args.chat is None else args.chat
    if args.system is not None and not chat:
        raise ValueError(f"--system {args.system}: {info.path} continues text, which has no such turn: add --chat")
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    if not texts and sys.stdin and not sys.stdin.isatty():
        texts = [read_prompt(0)]
    if chat and not texts:
        return converse(model, tokenizer, info, system, args, generator)
    prefix = prompt_prefix(tokenizer, info)
    if chat:
        prompts = [chat_ids(tokenizer, [*system, {"role": "user", "content": text}], prefix) for text in texts]
    else:
        prompts = [(prefix + tokenizer.encode(text)) or [tokenizer.eos_id] for text in texts or [""]]
    if (longest := max(map(len, prompts))) > model.config.block_size:
        context = model.config.block_size
        raise ValueError(f"the prompt has {longest} tokens, the model's context is {context}: shorten it")
    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    heads = [f"--- {info.path}\n" + ("" if chat else tokenizer.decode(prompt)) for prompt in prompts]
    show(model, tokenizer, prompts, heads, args, generator)


if __name__ == "__main__":
    run_command(main)
