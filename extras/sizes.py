"""Loss against compute: the same variants of extras.study at several sizes, a folder for each.

    python -m extras.study --only dense causal --steps 140 --out out/small
    python -m extras.study --only dense causal --steps 500 --flags="--n-layer 7 --d-model 256 --lr 3e-3" --out out/large
    python -m extras.sizes out/small out/large --png sizes.png

Compute is FLOPs as common.flops_per_token() counts them, not time.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np

from common import run_command
from extras.plot import pyplot


def get_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m extras.sizes", description=__doc__.split("\n\n")[0])
    parser.add_argument("studies", nargs="+", type=Path, metavar="DIR", help="--out of extras.study, one for each size")
    parser.add_argument("--png", type=Path, help="draw the curves there: needs matplotlib")
    return parser.parse_args(argv)


def read_curves(folders):
    """-> {variant: [result of all its seeds at one size, ...], the least compute first}.

    A result has the means of its seeds, and in "losses" each seed's. ValueError for a folder without results.
    """
    curves = {}
    for folder in folders:
        seeds = {}
        for path in sorted(folder.glob("*-*/result.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            seeds.setdefault(path.parent.name.rpartition("-")[0], []).append(result)
        if not seeds:
            raise ValueError(f"{folder} has no results of extras.study: give its --out")
        for name, results in seeds.items():
            if any("flops" not in result for result in results):
                raise ValueError(f"{folder} is of an earlier version of extras.study: run it again in another --out")
            mean = {key: statistics.mean(r[key] for r in results) for key in ("parameters", "trained", "flops", "loss")}
            curves.setdefault(name, []).append(mean | {"losses": [result["loss"] for result in results]})
    return {name: sorted(curve, key=lambda point: point["flops"]) for name, curve in curves.items()}


def describe(name, curve):
    """A variant's name and b of loss = a compute^-b, the straight line through the logarithms of its points."""
    x, y = (np.log([point[key] for point in curve]) for key in ("flops", "loss"))
    return f"{name}: compute^{np.polyfit(x, y, 1)[0]:.4f}" if len(set(x)) > 1 else f"{name}: one size"


HEADER = """\
| variant | parameters | trained on, M tokens | PFLOP | seeds | loss, second half | spread |
|---|---|---|---|---|---|---|"""


def print_table(curves):
    print(HEADER)
    for name, curve in curves.items():
        for point in curve:
            losses = point["losses"]
            cells = [
                name,
                f"{point['parameters']:,.0f}",
                f"{point['trained'] / 1e6:.3f}",
                f"{point['flops'] / 1e15:.3f}",
                f"{len(losses)}",
                f"{point['loss']:.4f}",
                f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "",
            ]
            print(f"| {' | '.join(cells)} |")
    for name, curve in curves.items():
        print(describe(name, curve))


def draw(curves, path):
    """A curve for each variant, and a dot for each seed."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for color, (name, curve) in enumerate(curves.items()):
        flops, losses = ([point[key] for point in curve] for key in ("flops", "loss"))
        axis.loglog(flops, losses, color=f"C{color}", label=describe(name, curve))
        for point in curve:
            axis.plot([point["flops"]] * len(point["losses"]), point["losses"], ".", color=f"C{color}")
    axis.set_xlabel("FLOPs of training")
    axis.set_ylabel("loss, second half of the held-out text")
    axis.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")
    print(f"drawn: {path}")


def main(argv=None):
    args = get_args(argv)
    curves = read_curves(args.studies)
    print_table(curves)
    if args.png:
        draw(curves, args.png)


if __name__ == "__main__":
    run_command(main)
