"""How well a checkpoint predicts text it has not seen, and whether it peeks.

    python eval.py                                    # newest checkpoint, on the held-out split of its data
    python eval.py out/demo/step-00000500 out/other   # several, a line each
    python eval.py --text my.txt                      # on a file of one's own
    python eval.py --leak                             # the same tokens scored in three ways: do they agree?
    python eval.py --noise                            # train on noise, which only a layer that peeks can predict
    python eval.py --routing --prompt 却说曹操         # which experts a text goes to, and how far back they look
    python eval.py --task cmmlu --questions cmmlu     # a benchmark from its published folder: see tasks.py

loss         nats per token
perplexity   exp(loss)
bpb          bits per byte of text: comparable between models with different tokenizers
"""

import argparse
import colorsys
import json
import math
import signal
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import tasks
from model import Config, Decoder, choose_device, cross_entropy
from prepare import TokenData, inputs_and_targets
from tokenizer import load_tokenizer, read_text

TASK_FLAGS = ("questions", "split", "shots", "score", "out")
MAX_TOKENS = 1 << 20  # enough for bits per byte to be sure in the third decimal


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "checkpoints", nargs="*", default=["out"], metavar="CHECKPOINT",
        help="steps, runs or Hugging Face folders (default: the newest run under out)",
    )  # fmt: skip
    scored = parser.add_mutually_exclusive_group()
    scored.add_argument("--data", help="a prepared folder, instead of the one the checkpoint was trained on")
    scored.add_argument("--text", help="a UTF-8 file to score instead")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--leak", action="store_true", help="teacher-forced against honest against cached loss")
    what.add_argument("--noise", action="store_true", help="no checkpoint: what each dispatch learns from random tokens")
    what.add_argument("--routing", action="store_true", help="show the Soft MoE at work on --prompt")
    what.add_argument("--task", choices=tasks.TASKS, help="score a benchmark")
    parser.add_argument("--questions", help="folder of the --task, as published")
    parser.add_argument("--split", help="of the --task (default: val for ceval, whose test has no answers, else test)")
    parser.add_argument("--shots", type=int, help="examples before each question of the --task (default: 5; chat: none)")
    parser.add_argument("--score", choices=("letter", "continuation", "chat", "generate"), help="how a --task is answered: see tasks.py")
    parser.add_argument("--out", help="with --task: write every answer into this .jsonl")
    parser.add_argument("--prompt", help="text for --routing")
    parser.add_argument("--png", help="with --routing or --task: draw it into this file too (needs matplotlib)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = parser.parse_args(argv)
    if (args.routing or args.task) and (args.data or args.text):
        parser.error("--routing shows --prompt, --task asks its --questions: leave --data and --text out")
    if args.noise and (args.data or args.text or args.checkpoints != ["out"] or args.device != "auto"):
        parser.error("--noise draws its own tokens and trains its own models on the CPU: leave everything else out")
    for name, modes in (("prompt", ("routing",)), ("png", ("routing", "task")), *((name, ("task",)) for name in TASK_FLAGS)):
        if getattr(args, name) is not None and not any(getattr(args, mode) for mode in modes):
            parser.error(f"--{name} goes with " + " or ".join(f"--{mode}" for mode in modes))
    for name, suffix in (("png", ".png"), ("out", ".jsonl")):
        path = getattr(args, name)
        if path and not (Path(path).suffix == suffix and Path(path).absolute().parent.is_dir()):
            parser.error(f"--{name} {path}: expected a name ending in {suffix} in a folder that exists")
    if args.task:
        scores = ("generate", "chat") if args.task == "gsm8k" else ("letter", "continuation", "chat")
        args.score = args.score or scores[0]
        if args.questions is None:
            parser.error(f"--task {args.task} needs --questions: the folder with its files")
        if args.score not in scores:
            parser.error(f"--score {args.score}: expected {' or '.join(scores)} for {args.task}")
        if args.shots is None:
            args.shots = 0 if args.score == "chat" else 5
        if args.shots < 0 or args.shots and args.score == "chat":
            parser.error(f"--shots {args.shots}: expected 0 or more, and none with --score chat")
    return args


def evenly_spaced(blocks, max_tokens):
    """Numbers of evenly spaced blocks, as many as max_tokens hold, one at least."""
    n = min(len(blocks), max(1, max_tokens // (len(blocks[0]) - 1)))
    return np.linspace(0, len(blocks) - 1, num=n, dtype=np.int64)


@torch.no_grad()
def evaluate(model, blocks, token_bytes, device="cpu", batch_tokens=4096, max_tokens=MAX_TOKENS, rank=0, world=1, stopping=lambda: False):
    """Score blocks of T + 1 ids (-1 after the end of a text: not counted) -> {"loss", "perplexity", "bpb", "tokens"}.

    Of more than max_tokens, evenly spaced blocks are taken. bpb divides by the bytes of the counted targets; special
    ids have none, but their nats count. All forwards of a call are of one shape, for which compiled code is made once. With world > 1
    every rank scores its share, in as many forwards as the others (a model that is cut over the ranks needs that), and all get the same
    result. None if stopping() comes true, which is asked before each forward.
    """
    T = len(blocks[0]) - 1
    chosen = evenly_spaced(blocks, max_tokens)
    batch = max(1, min(batch_tokens // T, -(-len(chosen) // world)))
    chosen = np.pad(chosen, (0, -len(chosen) % (world * batch)), constant_values=-1)[rank::world]
    byte_lengths = np.array([len(b) for b in token_bytes])
    nats, tokens, text_bytes = 0.0, 0, 0
    training = model.training
    model.eval()
    for start in range(0, len(chosen), batch):
        if stopping():
            model.train(training)
            return None
        numbers = chosen[start : start + batch]
        ids, targets = (np.stack(rows) for rows in zip(*(inputs_and_targets(blocks, max(i, 0)) for i in numbers)))
        targets[numbers < 0] = -1
        counted = targets[targets >= 0]
        ids, targets = (torch.from_numpy(a).to(device) for a in (ids, targets))
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            nats += model(ids, targets).item() * len(counted)
        tokens += len(counted)
        text_bytes += int(byte_lengths[counted].sum())
    model.train(training)
    if world > 1:
        sums = torch.tensor([nats, tokens, text_bytes], dtype=torch.float64)
        torch.distributed.all_reduce(sums)
        nats, tokens, text_bytes = sums.tolist()
    loss, bpb = nats / tokens if tokens else math.nan, nats / math.log(2) / max(text_bytes, 1)
    return {"loss": loss, "perplexity": math.exp(loss), "bpb": bpb, "tokens": int(tokens)}


def text_blocks(path, tokenizer, T):
    """A file as blocks of T + 1 ids that begin with eos and overlap by one; the last is filled up with -1."""
    ids = [tokenizer.eos_id, *tokenizer.encode(read_text(path))]
    if len(ids) == 1:
        raise SystemExit(f"{path} is empty: nothing to score")
    n = math.ceil((len(ids) - 1) / T)
    padded = np.full(n * T + 1, -1, dtype=np.int64)
    padded[: len(ids)] = ids
    return [padded[i * T : i * T + T + 1] for i in range(n)]


# ---------------------------------------------------------------------------------------------------------------
# The leak


@torch.no_grad()
def leak(model, ids):
    """The mean nats of the same targets, ids [B, T + 1] (-1: not counted), scored in three ways.

    teacher-forced   one forward over the text, as in training
    honest           every target from a forward over the tokens before it, and nothing else
    cached           token by token with the cache, as in sampling; None where the model has no cache
    """
    B, T = ids.shape[0], ids.shape[1] - 1
    count = (ids[:, 1:] >= 0).sum().item()

    def nats(inputs, targets, cache=None):
        return model(inputs, targets, cache=cache).item() * (targets >= 0).sum().item()

    result = {"teacher-forced": nats(ids[:, :-1], ids[:, 1:]) / count}
    result["honest"] = 0.0
    for t in range(1, T + 1):
        targets = ids[:, t]
        loss = cross_entropy(model.hidden(ids[:, :t])[:, -1], model.head_weight, targets)
        result["honest"] += loss.item() * (targets >= 0).sum().item() / count
    result["cached"] = None
    if model.has_cache:
        cache = model.new_cache(B, T)
        result["cached"] = sum(nats(ids[:, t : t + 1], ids[:, t + 1 : t + 2], cache) for t in range(T)) / count
    return result


def some_of(blocks, device):
    """About 4,096 tokens of them, [B, T + 1]: every position will be a forward."""
    return torch.from_numpy(np.stack([blocks[i] for i in evenly_spaced(blocks, 4096)])).to(device)


def print_leak(model, blocks, token_bytes, device):
    ids = some_of(blocks, device)
    counted = ids[:, 1:][ids[:, 1:] >= 0].tolist()
    bits_per_nat = len(counted) / math.log(2) / max(1, sum(len(token_bytes[i]) for i in counted))
    result = leak(model, ids)
    print(f"{model.checkpoint}, {len(counted):,} tokens\n{'scored':<16}{'nats/token':>12}{'bits/byte':>12}")
    for way, nats in result.items():
        print(f"{way:<16}" + (f"{nats:>12.5f}{nats * bits_per_nat:>12.5f}" if nats is not None else "   it has no cache"))
    gap = max(abs(nats - result["honest"]) for nats in result.values() if nats is not None)
    print(f"they agree to {gap:.1e} nats" if gap < 1e-4 else f"they differ by {gap:.4f} nats")
    if model.config.reads_ahead:
        print("dispatch = sequence reads what it is to predict: only the honest loss is one")


def noise_loss(config, steps=400, batch_tokens=1536, seed=0):
    """Train a Soft MoE on independent uniform tokens; the loss on fresh ones. One that cannot peek stays at ln V or above."""
    torch.manual_seed(seed)
    model = Decoder(config)
    for block in model.blocks:  # a start without the zero matrices and with a sharp router: a minute is short
        torch.nn.init.normal_(block.attention.out, std=config.d_model**-0.5)
        torch.nn.init.normal_(block.ffn.w_out, std=config.expert_width**-0.5)
        torch.nn.init.constant_(block.ffn.scale, 8.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    draw = lambda: torch.randint(config.vocab_size, (max(1, batch_tokens // config.block_size), config.block_size + 1))
    for _ in range(steps):
        ids = draw()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(np.mean([model(ids[:, :-1], ids[:, 1:]).item() for ids in (draw() for _ in range(20))]))


def print_noise():
    V = 6
    print(f"loss on fresh uniform noise of {V} tokens; ln {V} = {math.log(V):.4f}, which no honest model can beat.\n"
          "After 400 steps of 1,536 tokens (2,048 at T = 2048); what was read by then is a lower bound of what can be.")  # fmt: skip
    print(f"{'dispatch':<10}{'slots':>7}{'T':>7}{'slots/T':>9}{'loss':>9}{'read, nats':>12}")
    runs = [("token", 4, 4, 12), ("causal", 4, 4, 12)]  # dispatch, experts, slots of each, T
    runs += [("sequence", E, P, T) for T in (12, 48, 192) for E, P in ((4, 4), (4, 1), (1, 1))] + [("sequence", 6, 1, 2048)]
    for dispatch, E, P, T in runs:
        config = Config(
            n_layer=2, d_model=64, n_head=4, n_kv_head=4, vocab_size=V, block_size=T, dispatch=dispatch, n_expert=E, slots_per_expert=P
        )
        loss, slots = noise_loss(config), E * P
        print(f"{dispatch:<10}{slots:>7}{T:>7}{slots / T:>9.4f}{loss:>9.4f}{math.log(V) - loss:>12.4f}", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Routing


@torch.no_grad()
def routing(model, ids):
    """What the Soft MoE layers do with ids [1, T] -> combine [L, T, S] and look-back weights [L, W, T, S]."""
    combine, window = [], []

    def look(ffn, inputs):
        x, place = inputs[:2]
        logits = ffn.router_logits(x)
        combine.append(logits[0].softmax(-1))
        if ffn.window > 1:
            weights = ffn.window_weights(F.pad(logits, (0, 0, ffn.window - 1, 0)), place.absent)
        else:
            weights = torch.ones_like(logits)[None]
        window.append(weights[:, 0].flip(0))

    hooks = [block.ffn.register_forward_pre_hook(look) for block in model.blocks]
    model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(combine), torch.stack(window)


def characters(ids, token_bytes):
    """The characters that each token is a part of: a rare one may be spread over several tokens, and each of them shows it."""
    text, ends = b"".join(token_bytes[i] for i in ids), np.cumsum([len(token_bytes[i]) for i in ids]).tolist()
    inside = lambda at: at < len(text) and text[at] & 0xC0 == 0x80  # in the middle of a character of UTF-8
    labels = []
    for start, end in zip([0, *ends], ends):
        while start < end and inside(start):
            start -= 1
        while inside(end):
            end += 1
        labels.append(text[start:end].decode("utf-8", "replace").replace("\n", "⏎").replace("\t", "⇥"))
    return labels


def print_routing(model, tokenizer, prompt, png):
    config = model.config
    if config.ffn != "soft_moe" or config.reads_ahead:
        raise SystemExit(f"--routing: {model.checkpoint} has no causal Soft MoE (ffn {config.ffn}, dispatch {config.dispatch})")
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    if len(ids) > config.block_size:
        raise SystemExit(f"the prompt has {len(ids)} tokens, the model's context is {config.block_size}: shorten it")
    combine, window = routing(model, torch.tensor([ids], device=model.embedding.device))
    back = (window * torch.arange(window.shape[1], device=window.device)[:, None, None]).sum(1)  # [L, T, S]
    labels = ["□", *characters(ids[1:], tokenizer.token_bytes)]
    wide = lambda label: sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in label)
    margin, P = max(map(wide, [*labels, "mean"])), config.slots_per_expert
    print("For every token: its share of each expert's slots, in percent, and how many tokens the slot looks back there on\n"
          "average. The largest share is marked; □ is the beginning.")  # fmt: skip
    for layer in range(config.n_layer):
        names = [f"{j // P}" if P == 1 else f"{j // P}.{j % P}" for j in range(combine.shape[-1])]
        print(f"\nlayer {layer}\n" + " " * margin + "".join(f"{name:>11}" for name in names))
        rows = zip([*labels, "mean"], [*combine[layer], combine[layer].mean(0)], [*back[layer], back[layer].mean(0)])
        for label, shares, distances in rows:
            line = label + " " * (margin - wide(label))
            for j, (share, distance) in enumerate(zip(shares.tolist(), distances.tolist())):
                cell = f"{100 * share:.0f} ←{distance:.1f}"
                if share == shares.max() and sys.stdout.isatty():  # a colour for every expert
                    red, green, blue = (round(255 * v) for v in colorsys.hsv_to_rgb(j // P / config.n_expert, 0.5, 0.95))
                    line += f"{'':{11 - len(cell)}}\033[30;48;2;{red};{green};{blue}m{cell}\033[0m"
                else:
                    line += f"{'*' * (share == shares.max()) + cell:>11}"
            print(line)
    if png:
        draw_routing(combine.unflatten(-1, (config.n_expert, -1)).sum(-1), back, labels, png)


def draw_routing(shares, distance, pieces, path):
    """Two pictures a layer: the share of each expert in each token, and how many tokens each slot looks back there."""
    plt = tasks.pyplot()
    from matplotlib.font_manager import fontManager

    chinese = {"Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans CN", "WenQuanYi Micro Hei", "SimHei", "PingFang SC"}
    fonts = sorted(chinese & {font.name for font in fontManager.ttflist})
    if fonts:
        plt.rcParams["font.sans-serif"] = fonts
    else:
        print("no Chinese font found: the picture numbers the tokens")
        pieces = list(map(str, range(len(pieces))))
    figure, axes = plt.subplots(2 * len(shares), 1, figsize=(2 + 0.3 * len(pieces), 3 * len(shares)), squeeze=False)
    for layer in range(len(shares)):
        for row, values, name in ((0, shares[layer], "expert, share"), (1, distance[layer], "slot, tokens back")):
            axis = axes[2 * layer + row, 0]
            figure.colorbar(axis.imshow(values.T.cpu().numpy(), aspect="auto"), ax=axis)
            axis.set(ylabel=f"layer {layer}\n{name}", xticks=range(len(pieces)), xticklabels=pieces)
    figure.tight_layout()
    figure.savefig(path)
    print(f"drawn: {path}")


def data_of(checkpoint):
    """The prepared folder that a checkpoint was trained on, as its state.json says."""
    try:
        return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["args"]["data"]
    except FileNotFoundError:
        raise SystemExit(f"{checkpoint} has no state.json, which names the data it was trained on: give --data, --text or --task")


def main(argv=None):
    args = get_args(argv)
    device = choose_device(args.device)
    if args.noise:
        return print_noise()
    if args.task:
        return tasks.run(args, device)
    for i, given in enumerate(args.checkpoints):
        model = Decoder.load(given).to(device)
        path, config = model.checkpoint, model.config
        tokenizer, T = load_tokenizer(path, config.vocab_size), config.block_size
        if not (path / "state.json").exists():  # the contexts of Hugging Face's models are far longer than what a text is scored in
            T = min(T, 2048)
        if args.routing:
            print_routing(model, tokenizer, args.prompt or "却说曹操引兵渡河，正遇关公。", args.png)
            continue
        if args.text:
            blocks = text_blocks(args.text, tokenizer, T)
        else:
            blocks = TokenData(args.data or data_of(path), "val", T)
            if load_tokenizer(blocks.path).content != tokenizer.content:
                raise SystemExit(f"{blocks.path} was prepared with another tokenizer than {path}: score its text with --text")
        if args.leak:
            print_leak(model, blocks, tokenizer.token_bytes, device)
            continue
        result = evaluate(model, blocks, tokenizer.token_bytes, device)
        if i == 0:
            print(f"{'checkpoint':<32}{'loss':>9}{'perplexity':>12}{'bpb':>9}{'tokens':>11}")
        leaky = f"  leaky: it reads what it predicts; honest {leak(model, some_of(blocks, device))['honest']:.4f}" if config.reads_ahead else ""
        print(f"{str(path):<32}{result['loss']:>9.4f}{result['perplexity']:>12.2f}{result['bpb']:>9.4f}"
              f"{result['tokens']:>11,}{leaky}")  # fmt: skip


if __name__ == "__main__":
    for name in ("SIGINT", "SIGPIPE"):  # Ctrl-C, and a reader like `head` that has enough, end it without a traceback
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    main()
