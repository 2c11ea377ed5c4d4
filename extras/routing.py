"""Show what the Soft MoE does with a text: python eval.py --routing --prompt TEXT

Shapes: L layers, T tokens, W window, S slots.
"""

import colorsys
import sys
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F

from extras.plot import has_chinese_font, pyplot


@torch.no_grad()
def routing(model, ids):
    """ids [1, T] -> of every layer the combine weights [L, T, S] and window weights, nearest first, [L, W, T, S]."""
    combine, window = [], []

    def record(ffn, inputs):
        x, place = inputs[:2]
        logits = ffn.router_logits(x)
        combine.append(logits[0].softmax(-1))
        weights = torch.ones_like(logits)[None]
        if ffn.window > 1:
            padded = F.pad(logits, (0, 0, ffn.window - 1, 0))
            weights = ffn.window_weights(padded, place.absent, logits.dtype).flatten(3)  # [W, B, T, S]
        window.append(weights[:, 0].flip(0))

    hooks = [block.ffn.register_forward_pre_hook(record) for block in model.blocks]
    model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(combine), torch.stack(window)


def characters(ids, token_bytes):
    """A label for each token: all characters it has bytes of, so that each part of a rare character shows all of it."""
    text = b"".join(token_bytes[i] for i in ids)
    ends = np.cumsum([len(token_bytes[i]) for i in ids]).tolist()

    def is_inside(at):
        """Whether the byte at this place continues a character of UTF-8."""
        return at < len(text) and text[at] & 0xC0 == 0x80

    labels = []
    for start, end in zip([0, *ends], ends):
        while start < end and is_inside(start):
            start -= 1
        while is_inside(end):
            end += 1
        labels.append(text[start:end].decode("utf-8", "replace").replace("\n", "⏎").replace("\t", "⇥"))
    return labels


def width_of(label):
    """Columns in a terminal: Chinese characters take two."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in label)


def print_routing(model, tokenizer, path, prompt, png):
    """Print a table for each layer, and draw it into png unless that is None. ValueError without a causal Soft MoE."""
    config = model.config
    if config.ffn != "soft_moe" or config.reads_ahead:
        found = f"(ffn {config.ffn}, dispatch {config.dispatch})"
        raise ValueError(f"--routing: {path} has no causal Soft MoE {found}")
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    if len(ids) > config.block_size:
        problem = f"the prompt has {len(ids)} tokens, the model's context is {config.block_size}"
        raise ValueError(f"{problem}: shorten it")
    combine, window = routing(model, torch.tensor([ids], device=model.embedding.device))
    back = (window * torch.arange(window.shape[1], device=window.device)[:, None, None]).sum(1)  # [L, T, S]
    labels = ["□", *characters(ids[1:], tokenizer.token_bytes)]
    print("For every token: the share of each expert's slots in its output, in percent, and how many tokens the slot")
    print("looks back on average. The largest share is marked; □ is the beginning.")
    for layer in range(config.n_layer):
        print_layer(layer, combine[layer], back[layer], labels, config.slots_per_expert)
    if png:
        draw_routing(combine.unflatten(-1, (config.n_expert, -1)).sum(-1), back, labels, png)


def print_layer(layer, combine, back, labels, P):
    """combine [T, S], back [T, S], and P slots per expert -> a row for each token, a column for each slot."""
    S = combine.shape[-1]
    margin = max(map(width_of, [*labels, "mean"]))
    names = [f"{j // P}" if P == 1 else f"{j // P}.{j % P}" for j in range(S)]
    print(f"\nlayer {layer}\n" + " " * margin + "".join(f"{name:>11}" for name in names))
    for label, shares, distances in zip([*labels, "mean"], [*combine, combine.mean(0)], [*back, back.mean(0)]):
        line = label + " " * (margin - width_of(label))
        for j, (share, distance) in enumerate(zip(shares.tolist(), distances.tolist())):
            cell = f"{100 * share:.0f} ←{distance:.1f}"
            largest = share == shares.max().item()
            if largest and sys.stdout.isatty():  # each expert has its own colour
                line += " " * (11 - len(cell)) + coloured(cell, j // P * P / S)
            else:
                line += f"{'*' * largest + cell:>11}"
        print(line)


def coloured(text, hue):
    red, green, blue = (round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.5, 0.95))
    return f"\033[30;48;2;{red};{green};{blue}m{text}\033[0m"


def draw_routing(shares, distance, labels, path):
    """Two pictures a layer: the share of each expert in each token, and how many tokens each slot looks back there."""
    plt = pyplot()
    if not has_chinese_font(plt):
        print("no Chinese font found: the picture numbers the tokens")
        labels = list(map(str, range(len(labels))))
    n_layer, n_tokens = shares.shape[:2]
    figure, axes = plt.subplots(2 * n_layer, 1, figsize=(2 + 0.3 * n_tokens, 3 * n_layer), squeeze=False)
    for layer in range(n_layer):
        pictures = (("expert, share", shares[layer]), ("slot, tokens back", distance[layer]))
        for axis, (name, values) in zip(axes[2 * layer :, 0], pictures):
            figure.colorbar(axis.imshow(values.T.cpu().numpy(), aspect="auto"), ax=axis)
            axis.set(ylabel=f"layer {layer}\n{name}", xticks=range(n_tokens), xticklabels=labels)
    figure.tight_layout()
    figure.savefig(path)
    print(f"drawn: {path}")
