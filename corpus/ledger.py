"""The ledger: every document that was read is kept, or counted under what dropped it.

For each source, in documents and in characters:
read = malformed + empty + filtered (by operator) + duplicate + near_duplicate + kept; val is a part of kept.

Besides, what each mapper removed from the documents that cleaning left.
"""

import sys
from collections import Counter

MAX_MALFORMED = 0.01  # share of the documents of an input (a file or folder of the command line); more is an error
MAX_NAMED = 10  # malformed documents of a part that are named
MAX_LOST = 0.1  # share of the characters of a source; where cleaning takes more, the source is named


def new_count():
    """For one source: [documents, characters as read] of each outcome; filtered: a dict by operator.

    removed: a dict by mapper of [texts that it changed, characters less]; written: [characters, tokens] of what is
    kept.
    """
    names = "read malformed empty filtered duplicate near_duplicate kept val removed written".split()
    return {name: {} if name in ("filtered", "removed") else [0, 0] for name in names}


def count(ledger, source, outcome, characters):
    """Add a document to the ledger, {source: new_count()}. An outcome that is not one of its names is an operator."""
    counts = ledger.setdefault(source, new_count())
    cell = counts[outcome] if outcome in counts else counts["filtered"].setdefault(outcome, [0, 0])
    cell[0] += 1
    cell[1] += characters


def count_removed(ledger, source, changes):
    """Add what mappers did to a document: changes is a list of (mapper, characters less)."""
    removed = ledger[source]["removed"]
    for mapper, characters in changes:
        cell = removed.setdefault(mapper, [0, 0])
        cell[0] += 1
        cell[1] += characters


def add_counts(one, other):
    """The sum of two ledgers, or of any nested dicts with lists of numbers."""
    if isinstance(one, list):
        return [a + b for a, b in zip(one, other)]
    both = one.keys() & other.keys()
    return {key: add_counts(one[key], other[key]) if key in both else value for key, value in (one | other).items()}


TITLES = "source,read,characters,malformed,empty,filtered,copies,near,kept,,val,tokens,bytes/token".split(",")


def print_ledger(manifest, out):
    """Print the ledger as a table, with the operators that drop and remove most, and the tokens of each split."""
    rows = [TITLES]
    for source, counts in manifest["ledger"].items():
        rows.append(ledger_row(source, counts, [shard for shard in manifest["shards"] if shard["source"] == source]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row, counts in zip(rows, [new_count(), *manifest["ledger"].values()]):
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
        most = sorted(counts["filtered"].items(), key=lambda item: -item[1][0])[:5]
        if most:
            print("    dropped most by " + ", ".join(f"{name} {documents:,}" for name, (documents, _) in most))
        removed = largest(counts["removed"])
        if removed:
            print("    characters removed by " + ", ".join(f"{name} {characters:,}" for name, characters in removed))
    tokens = Counter()
    for shard in manifest["shards"]:
        tokens[shard["split"]] += shard["tokens"]
    print(f"{out}: {tokens['train']:,} tokens to train on, {tokens['val']:,} held out")
    for source, counts in manifest["ledger"].items():
        name_large_losses(source, counts)


def largest(cells):
    """{name: [number, characters]} -> the up to five largest (name, characters), those above 0."""
    by_characters = sorted(((name, cell[1]) for name, cell in cells.items() if cell[1] > 0), key=lambda item: -item[1])
    return by_characters[:5]


def name_large_losses(source, counts):
    """Name a source of which filters dropped, or mappers removed, more than MAX_LOST of the characters."""
    for name, done, flag in (("filtered", "dropped", "--show-dropped"), ("removed", "removed", "--show-changed")):
        lost = sum(cell[1] for cell in counts[name].values())
        if lost > MAX_LOST * counts["read"][1]:
            share = lost / counts["read"][1]
            most = largest(counts[name])[0][0]
            print(f"{source}: {share:.0%} of the characters were {done}, most by {most}: look at them with {flag} 5")


def ledger_row(source, counts, shards):
    """The cells of a source, under TITLES."""
    tokens, text_bytes = (sum(shard[key] for shard in shards) for key in ("tokens", "bytes"))
    filtered = sum(documents for documents, _ in counts["filtered"].values())
    n = {name: cell[0] for name, cell in counts.items() if isinstance(cell, list)}  # documents
    numbers = [n["read"], counts["read"][1], n["malformed"], n["empty"], filtered]
    numbers += [n["duplicate"], n["near_duplicate"], n["kept"]]
    share = f"{100 * n['kept'] / max(n['read'], 1):.1f} %"
    cells = [f"{number:,}" for number in numbers]
    return [source, *cells, share, f"{n['val']:,}", f"{tokens:,}", f"{text_bytes / max(tokens, 1):.2f}"]


def refuse_malformed(parts, cleaned):
    """Name malformed documents on stderr; ValueError if they are more than MAX_MALFORMED of an input.

    A malformed row has no format, so it counts for its input, not for one of the corpora in it.
    """
    totals, first = {}, {}  # by input
    for part, result in zip(parts, cleaned):
        total = totals.setdefault(part.source, [0, 0])
        total[0] += result["malformed"]
        total[1] += result["documents"]
        for problem in result["problems"]:
            print(f"malformed: {problem}", file=sys.stderr)
            first.setdefault(part.source, problem)
        if result["malformed"] > MAX_NAMED:
            print(f"malformed: {part.name}: {result['malformed'] - MAX_NAMED:,} more", file=sys.stderr)
    for source, (malformed, read) in totals.items():
        if malformed > MAX_MALFORMED * read:
            raise ValueError(
                f"{source}: {malformed:,} of {read:,} documents are malformed, more than {MAX_MALFORMED:.0%}, "
                f"the first is {first[source]}. Fix or remove them, then run the same command again"
            )
