"""What is in a prepared folder: shares, lengths, perplexity, compression, and text that sources share.

    python -m extras.survey data/default --png survey.png

Documents and tokens are counted over the whole folder. All else is measured on --documents of each source, evenly
spaced. Perplexity is that of prepare.py --reference: a model of the 4-grams of characters, learned from every second
one of these documents of a reference source. All are judged without them.
"""

import argparse
import itertools
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import run_command
from corpus.ngrams import codes_of, mixed, ngram_hashes
from corpus.reference import NGram
from data import documents_of, read_manifest
from extras.plot import has_chinese_font, pyplot
from tokenizer import load_tokenizer

RUN = 24  # characters that two texts must have in common one after another
KEPT = 16  # one run in so many is looked at, chosen by its hash: the same ones of every source


@dataclass
class Source:
    """A source in one language; of its chosen documents the characters and perplexity of each, and runs by hash."""

    name: str
    shards: list
    texts: list = field(default_factory=list)
    perplexity: list = field(default_factory=list)
    runs: np.ndarray = None

    def total(self, what):
        return sum(shard[what] for shard in self.shards)

    @property
    def language(self):
        return self.shards[0]["language"]

    def lengths(self):
        return np.array([len(text) for text in self.texts])

    def compression(self):
        """Bytes of the texts for each that zlib makes of them."""
        content = "\n".join(self.texts).encode("utf-8")
        return len(content) / len(zlib.compress(content, 9))


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, help="a folder of prepare.py")
    add("--documents", type=int, default=5000, help="so many of each source are looked at")
    add("--reference", metavar="SOURCE", help="that perplexity refers to (default: the one with most text)")
    add("--png", type=Path, help="draw the tables into this file (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.documents < 2:
        parser.error(f"--documents {args.documents}: expected 2 or more")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def read_sources(folder, n):
    """-> a Source for each source and language of the folder, with n evenly spaced documents of it, or all."""
    manifest, tokenizer = read_manifest(folder), load_tokenizer(folder)
    sources = {}
    for shard in manifest["shards"]:
        name = f"{shard['source']} {shard['language']}"
        sources.setdefault(name, Source(name, [])).shards.append(shard)
    for source in sources.values():
        all_documents = source.total("documents")
        numbers = np.linspace(0, all_documents - 1, num=min(n, all_documents), dtype=int)
        first = 0
        for shard in source.shards:
            own = numbers[(numbers >= first) & (numbers < first + shard["documents"])] - first
            source.texts += texts_of(folder, shard, own, tokenizer)
            first += shard["documents"]
    return list(sources.values())


def texts_of(folder, shard, numbers, tokenizer):
    """The texts of some documents of a shard; of a chat what counts in the loss, the assistant's part."""
    for ids, mask in documents_of(folder, shard, numbers.tolist()):
        yield tokenizer.decode((ids if mask is None else ids[mask == 1]).tolist())


def measure_perplexity(sources, reference):
    """Fill in source.perplexity under a model of the reference -> its name. ValueError if no source has this name."""
    names = [source.shards[0]["source"] for source in sources]
    largest = max(sources, key=lambda source: source.total("bytes")).shards[0]["source"]
    if reference and reference not in names:
        raise ValueError(f"--reference {reference}: expected one of {', '.join(dict.fromkeys(names))}")
    model = NGram()
    for name, source in zip(names, sources):
        for text in source.texts[::2] if name == (reference or largest) else ():
            model.learn(text)
    for source in sources:
        source.perplexity = [model.perplexity(text) for text in source.texts[1::2]]
    return reference or largest


def shared_text(sources):
    """-> [n, n]: of the runs of RUN characters of a source, the share that another one has too; of its own, the share
    that it has more than once. It is 0 for a source without runs."""
    for source in sources:
        hashes = [mixed(ngram_hashes(codes_of(text), RUN)) for text in source.texts]
        hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *hashes])
        source.runs = hashes[hashes % KEPT == 0]
    shares = np.zeros((len(sources), len(sources)))
    for (i, one), (j, other) in itertools.product(enumerate(sources), repeat=2):
        runs, counts = np.unique(other.runs, return_counts=True)
        found = np.isin(one.runs, runs[counts > 1] if i == j else runs)
        shares[i, j] = found.mean() if len(found) else 0
    return shares


# ----------------------------------------------------------------------------------------------------------------------
# How it is shown


def print_survey(folder, sources, shares, reference):
    tokens, documents = (sum(source.total(what) for source in sources) for what in ("tokens", "documents"))
    print(f"{folder}: {tokens:,} tokens in {documents:,} documents")
    width = max(len(source.name) for source in sources)
    print(f"\n{'':{width}}    documents          tokens   share  bytes/token  characters: 10%     50%     90%", end="")
    print("  perplexity  compression")
    for source in sources:
        own = source.total("tokens")
        low, middle, high = np.percentile(source.lengths(), (10, 50, 90))
        print(f"{source.name:{width}}{source.total('documents'):>13,}{own:>16,}{own / tokens:>8.1%}", end="")
        print(f"{source.total('bytes') / own:>13.2f}{low:>17,.0f}{middle:>8,.0f}{high:>8,.0f}", end="")
        median = np.median(source.perplexity) if source.perplexity else np.nan
        print(f"{median:>12{',.0f' if median < 1e6 else '.0e'}}{source.compression():>13.2f}")
    print(f"(perplexity: the median of documents, a character, under a model of {reference}; compression: by zlib)")
    print()
    for language in dict.fromkeys(source.language for source in sources):
        own = sum(source.total("tokens") for source in sources if source.language == language)
        print(f"{language:{width}}{own / tokens:>8.1%} of the tokens")
    print(f"\nof the runs of {RUN} characters of a source (a line), how many another one has too (of its own: again)")
    print(f"{'':{width}}" + "".join(f"{source.name:>{len(source.name) + 2}}" for source in sources))
    for source, row in zip(sources, shares):
        cells = (f"{share:>{len(other.name) + 2}.2%}" for share, other in zip(row, sources))
        print(f"{source.name:{width}}" + "".join(cells))


def draw_survey(sources, shares, reference, path):
    plt = pyplot()
    names = [source.name for source in sources]
    if not has_chinese_font(plt) and not "".join(names).isascii():
        print("no Chinese font found: the picture numbers the sources")
        names = [f"{i}" for i in range(len(sources))]
    figure, axes = plt.subplots(2, 3, figsize=(16, 8))
    colours = [f"C{i % 10}" for i in range(len(sources))]
    tokens = np.array([source.total("tokens") for source in sources])
    axes[0, 0].barh(names, 100 * tokens / tokens.sum(), color=colours)
    axes[0, 0].set_title("share of the tokens, %")
    languages = {}
    for source, own in zip(sources, tokens):
        languages[source.language] = languages.get(source.language, 0) + own
    axes[1, 0].barh(list(languages), [100 * own / tokens.sum() for own in languages.values()], color="grey")
    axes[1, 0].set_title("share of the tokens by language, %")
    log_histograms(axes[0, 1], names, [source.lengths() for source in sources], "characters of a document")
    perplexity = [np.array(source.perplexity) for source in sources]
    log_histograms(axes[1, 1], names, perplexity, f"perplexity a character, under {reference}")
    axes[0, 2].barh(names, [source.compression() for source in sources], color=colours)
    axes[0, 2].set_title("bytes for each of zlib's")
    image = axes[1, 2].imshow(100 * shares)
    axes[1, 2].set(xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names)
    axes[1, 2].set_title(f"% of the runs of {RUN} characters (line)\nthat another source (column) has")
    axes[1, 2].tick_params("x", rotation=45)
    figure.colorbar(image, ax=axes[1, 2])
    figure.tight_layout()
    figure.savefig(path)
    print(f"drawn: {path}")


def log_histograms(axis, names, values, title):
    """The distribution of each source's values over a logarithmic axis, as shares of its documents."""
    values = [np.maximum(own, 1) for own in values]
    edges = np.geomspace(1, max(own.max() for own in values if len(own)) + 1, 40)
    for i, (name, own) in enumerate(zip(names, values)):
        shares = np.histogram(own, edges)[0] / max(len(own), 1)
        axis.stairs(100 * shares, edges, label=name, color=f"C{i % 10}")
    axis.set(xscale="log", title=f"{title}\n(% of the documents)")
    axis.legend()


def main(argv=None):
    args = get_args(argv)
    sources = read_sources(args.data, args.documents)
    reference = measure_perplexity(sources, args.reference)
    shares = shared_text(sources)
    print_survey(args.data, sources, shares, reference)
    if args.png:
        draw_survey(sources, shares, reference, args.png)


if __name__ == "__main__":
    run_command(main)
