"""Pictures of runs, from their metrics.jsonl.

    python -m extras.plot out/a out/b                  # the losses, as a chart in the terminal
    python -m extras.plot out/a out/b --png runs.png   # loss, bits per byte, rate, gradient and speed, with matplotlib

pyplot() imports matplotlib, for every program that draws.
"""

import argparse
import json
from pathlib import Path

from common import run_command

CHARTS = {  # what is drawn: title, fields of metrics.jsonl
    "loss, nats per token": ("loss", "val_loss"),
    "bits per byte": ("bpb", "val_bpb"),
    "learning rate": ("lr",),
    "norm of the gradient": ("norm",),
    "tokens per second": ("tokens_per_second",),
}
WIDTH, HEIGHT = 76, 18  # of the chart in the terminal, in characters
MARKS = "*o+x#@%&"


def pyplot():
    """matplotlib.pyplot without a screen. ValueError if matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install matplotlib") from None
    return matplotlib.pyplot


CHINESE_FONTS = """
    Noto Sans CJK SC, Noto Sans CJK JP, Source Han Sans CN, WenQuanYi Micro Hei, SimHei, PingFang SC
    """.strip().split(", ")


def has_chinese_font(plt):
    """Whether there is a font with Chinese characters; then pictures are drawn with it."""
    from matplotlib.font_manager import fontManager

    fonts = sorted(set(CHINESE_FONTS) & {font.name for font in fontManager.ttflist})
    if fonts:
        plt.rcParams["font.sans-serif"] = fonts
    return bool(fonts)


def read_run(run):
    """metrics.jsonl of a run -> {field: {step: value}}. ValueError if there is none, or nothing in it."""
    path = Path(run) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{run} is no run: it has no metrics.jsonl") from None
    fields = {}
    for line in lines:
        try:
            values = json.loads(line)
            step = values["step"]
        except (ValueError, KeyError, TypeError):  # a run at work may be in the middle of its last line
            continue
        for name, value in values.items():
            if isinstance(value, (int, float)):  # NaN and inf are null there
                fields.setdefault(name, {})[step] = value
    if not fields.keys() & {"loss", "val_loss"}:
        raise ValueError(f"{path} has no loss yet: let the run log a step")
    return fields


def draw(runs, path):
    """runs {name: fields}: one picture for each of CHARTS that has values, into one PNG."""
    plt = pyplot()
    has_chinese_font(plt)
    charts = {title: names for title, names in CHARTS.items() if any(runs[run].keys() & set(names) for run in runs)}
    figure, axes = plt.subplots(len(charts), 1, figsize=(9, 2.6 * len(charts)), sharex=True, squeeze=False)
    for axis, (title, names) in zip(axes[:, 0], charts.items()):
        for i, (run, fields) in enumerate(runs.items()):
            for name in names:
                if points := sorted(fields.get(name, {}).items()):
                    held_out = name.startswith("val_")
                    label = f"{run}, held out" if held_out else run
                    style = {"marker": "o", "markersize": 3} if held_out else {"alpha": 0.5, "linewidth": 1}
                    axis.plot(*zip(*points), color=f"C{i % 10}", label=label, **style)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
    print(f"drawn: {path}")


def print_chart(runs):
    """The loss of each run over its steps, and what was held out, as characters; a mark for each run."""
    curves = {}
    for run, fields in runs.items():
        curves[run] = sorted((fields.get("loss") or fields["val_loss"]).items())
    steps = [step for points in curves.values() for step, _ in points]
    losses = [loss for points in curves.values() for _, loss in points]
    (first, last), (low, high) = (min(steps), max(steps)), (min(losses), max(losses))
    rows = [[" "] * WIDTH for _ in range(HEIGHT)]
    for mark, points in zip(MARKS * len(curves), curves.values()):
        for step, loss in points:
            column = round((WIDTH - 1) * (step - first) / max(last - first, 1))
            row = round((HEIGHT - 1) * (high - loss) / ((high - low) or 1))
            rows[row][column] = mark
    for i, row in enumerate(rows):
        value = high - (high - low) * i / (HEIGHT - 1)
        print(f"{value:8.3f} |{''.join(row)}".rstrip())
    print(" " * 9 + "+" + "-" * WIDTH)
    print(f"{'':10}{first:<{WIDTH // 2},}{last:>{WIDTH - WIDTH // 2},}")
    for mark, (run, fields) in zip(MARKS * len(runs), runs.items()):
        held_out = list(fields.get("val_loss", {}).items())
        last_one = f", held out {held_out[-1][1]:.4f} at step {held_out[-1][0]:,}" if held_out else ""
        print(f"{mark} {run}: loss {curves[run][-1][1]:.4f} at step {curves[run][-1][0]:,}{last_one}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m extras.plot", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--png", metavar="FILE", help="draw all into this file, instead of a chart in the terminal")
    args = parser.parse_args(argv)
    runs = {run: read_run(run) for run in args.runs}
    if args.png:
        draw(runs, args.png)
    else:
        print_chart(runs)


if __name__ == "__main__":
    run_command(main)
