"""Step 2 of prepare.py: what becomes of each cleaned document, seen beside all others."""

import functools
import hashlib

import numpy as np

from corpus import copies
from corpus.cleaning import read_documents, read_hashes
from corpus.copies import near_copies, near_pairs, pieces_of
from corpus.reference import MAX_PERPLEXITY, NGram
from corpus.work import code_digest, digest_of, progress
from data import documents_of, write_array
from tokenizer import load_tokenizer

OUTCOMES = ("train", "val", "duplicate", "near_duplicate", "perplexity")
TRAIN, VAL, DUPLICATE, NEAR_DUPLICATE, PERPLEXITY = range(len(OUTCOMES))
VAL_EVERY = 20  # one document in so many is held out
REFERENCE_CHARACTERS = 4_000_000  # of a reference source; its model has room for no more


def decide(cleaned, out, work, manifest, reference, near, run):
    """-> for each part an array [documents] of indices of OUTCOMES, and one of the originals of near copies.

    The shards that are there count as earlier text. An original is the number of a document: first those in the
    shards, then the new ones; -1 for what is no near copy. run: of prepare.py.
    """
    known = [
        np.load(out / f"{shard['name']}.hashes.npy", mmap_mode="r", allow_pickle=False) for shard in manifest["shards"]
    ]
    if any(rows.shape[1] != 4 for rows in known):
        fix = "choose another --out, or delete the folder and prepare all of its text again"
        raise ValueError(f"{out} was prepared by an older version, with other fingerprints: {fix}")
    sizes = [len(read_hashes(work, result)) for result in cleaned]
    hashes = np.empty((sum(map(len, known)) + sum(sizes), 4), dtype=np.uint64)
    at = 0
    for rows in (*known, *(read_hashes(work, result)[:, :4] for result in cleaned)):
        hashes[at : at + len(rows)] = rows
        at += len(rows)
    surprising = np.zeros(len(hashes), dtype=bool)
    if reference:
        model = learn_reference(work, cleaned, reference)
        score = functools.partial(score_part, work=work, reference=model)
        paths = run(score, cleaned, "scoring", sum(sizes), " documents")
        surprising[at - sum(sizes) :] = np.concatenate([np.load(path, allow_pickle=False) for path in paths])
    find_pairs = functools.partial(find_near_pairs, work=work, run=run)
    outcomes, originals = outcomes_of(hashes, at - sum(sizes), surprising, near, find_pairs)
    hold_something_out(outcomes, cleaned, sizes, manifest, work)
    ends = np.cumsum(sizes)[:-1]
    return np.split(outcomes, ends), np.split(originals, ends)


def outcomes_of(hashes, n_known, surprising, near, find_pairs=None):
    """Decide by hashes [n, 4] of the documents, of which the first n_known are in the shards; surprising: [n] bool.

    -> of the others [n - n_known] indices of OUTCOMES, and [n - n_known] originals of near copies: numbers among all
    documents, or -1. Of equal documents, and with `near` of near copies, the first stays. find_pairs: of near_copies.
    """
    outcomes = np.full(len(hashes), TRAIN, dtype=np.uint8)
    outcomes[surprising] = PERPLEXITY
    left = np.flatnonzero(outcomes == TRAIN)
    order = left[np.lexsort((hashes[left, 1], hashes[left, 0]))]  # stable: equal documents stay in order
    is_copy = (hashes[order[1:], :2] == hashes[order[:-1], :2]).all(1)
    outcomes[order[1:][is_copy]] = DUPLICATE
    del order, is_copy
    left = np.flatnonzero(outcomes == TRAIN)
    first = near_copies(hashes[left, 2:], find_pairs) if near else np.arange(len(left))
    is_copy = np.flatnonzero(first != np.arange(len(left)))
    outcomes[left[is_copy]] = NEAR_DUPLICATE
    originals = np.full(len(hashes), -1)
    originals[left[is_copy]] = left[first[is_copy]]
    outcomes = outcomes[n_known:]
    outcomes[(outcomes == TRAIN) & (hashes[n_known:, 0] % VAL_EVERY == 0)] = VAL
    return outcomes, originals[n_known:]


def find_near_pairs(prints, work, run):
    """near_pairs of all pieces; where there are many, by the workers, which read the prints from a file."""
    pieces = list(pieces_of(len(prints)))
    if len(prints) < copies.PIECE:
        return [near_pairs(piece, prints) for piece in pieces]
    path = work / f"{digest_of('prints', hashlib.sha256(prints).digest())}.prints.npy"
    if not path.exists():
        write_array(path, prints)
    find = functools.partial(find_near_pairs_of, work=work, path=path)
    return [np.load(found, allow_pickle=False) for found in run(find, pieces, "comparing", len(pieces), " pieces")]


def find_near_pairs_of(piece, work, path):
    """-> path of what near_pairs finds in a piece of the prints in a file."""
    found = work / f"{digest_of('near', code_digest(), piece, path.name)}.pairs.npy"
    if not found.exists():
        write_array(found, near_pairs(piece, np.load(path, mmap_mode="r", allow_pickle=False)))
    progress(1, 0)
    return found


def hold_something_out(outcomes, cleaned, sizes, manifest, work):
    """Of a source without anything held out, hold out the first document that is kept, if it is not the only one."""
    numbers = {}  # of the sources
    source_of = []  # for each part the number of each document's source
    for result in cleaned:
        part_sources = [numbers.setdefault(name, len(numbers)) for name in result["sources"]]
        source_of.append(np.array(part_sources, dtype=np.int32)[read_hashes(work, result)[:, 5].astype(int)])
    source_of = np.concatenate(source_of)
    for name, number in numbers.items():
        in_source = source_of == number
        held_out_before = name in manifest["ledger"] and manifest["ledger"][name]["val"][0] > 0
        held_out_now = (in_source & (outcomes == VAL)).any()
        kept = np.flatnonzero(in_source & (outcomes == TRAIN))
        if len(kept) > 1 and not (held_out_before or held_out_now):
            outcomes[kept[0]] = VAL


def learn_reference(work, cleaned, reference):
    """Train the model of a source on its cleaned documents, copies too -> path of its tables."""
    path = work / f"{digest_of('reference', reference, [result['key'] for result in cleaned])}.reference.npy"
    if path.exists():
        return path
    model = NGram()
    learned = 0  # characters
    sources = set()
    for source, document in (pair for result in cleaned for pair in read_documents(work, result)):
        sources.add(source)
        if source == reference:
            model.learn(document.text)
            learned += len(document.text)
            if learned >= REFERENCE_CHARACTERS:
                break
    if not learned:
        expected = f"expected one of {', '.join(sorted(sources))}"
        raise ValueError(f"--reference {reference}: no source of this name has text left after cleaning, {expected}")
    write_array(path, model.tables)
    return path


def score_part(result, work, reference):
    """-> path of a bool array [documents]: true for prose that is too surprising to the reference model."""
    path = work / f"{digest_of('score', result['key'], reference.name)}.scores.npy"
    if not path.exists():
        model = NGram(np.load(reference, mmap_mode="r", allow_pickle=False))
        scores = []
        for _, document in read_documents(work, result):
            scores.append(document.kind != "code" and model.perplexity(document.text) > MAX_PERPLEXITY)
        write_array(path, np.array(scores, dtype=bool))
        progress(len(scores), 0)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# --show-dropped: each near copy with its original


def print_near_copies(cleaned, originals, known, out, work, show):
    """Print up to `show` near copies of each source, each with the earlier document that it was taken for.

    originals: of decide. known: the manifest's entries of the shards that were there before.
    """
    ends = np.cumsum([shard["documents"] for shard in known], dtype=int)
    total = number = int(ends[-1]) if known else 0
    pairs = {}  # source: [(number, original), ...]
    for result, part_originals in zip(cleaned, originals):
        source_of = read_hashes(work, result)[:, 5]
        for i in np.flatnonzero(part_originals >= 0).tolist():
            of_source = pairs.setdefault(result["sources"][int(source_of[i])], [])
            if len(of_source) < show:
                of_source.append((number + i, int(part_originals[i])))
        number += len(part_originals)
    wanted = {number for of_source in pairs.values() for pair in of_source for number in pair}
    texts = {number: text_in_shards(number, ends, known, out) for number in wanted if number < total}
    new = (pair for result in cleaned for pair in read_documents(work, result))
    texts |= {i: document.text for i, (_, document) in enumerate(new if wanted else (), total) if i in wanted}
    for source, of_source in pairs.items():
        for number, original in of_source:
            print(f"{source}: near_duplicate dropped {texts[number]!r}\n    as a near copy of {texts[original]!r}")


def text_in_shards(number, ends, shards, out):
    """The text of a document in the shards, by its number; ends: the number after each shard's last document."""
    i = int(np.searchsorted(ends, number, side="right"))
    at = number - (int(ends[i - 1]) if i else 0)
    ((ids, _),) = documents_of(out, shards[i], [at])
    return load_tokenizer(out).decode(ids.tolist())
