"""Step 1 of prepare.py: read and clean one part of the input. What is left goes to work files, with hashes."""

import os

import numpy as np

from corpus.copies import fingerprints
from corpus.documents import Document
from corpus.examples import keep_changed, keep_dropped
from corpus.ledger import MAX_NAMED, count, count_removed
from corpus.pipelines import clean, split_long
from corpus.rows import exam_as
from corpus.work import code_digest, digest_of, progress, read_work, write_work
from data import write_array

BATCH_CHARACTERS = 200_000  # of documents whose fingerprints are made at once: numpy needs long arrays


def clean_part(part, work, pipeline="auto", exams="text", judge_chats=False, show_dropped=0, show_changed=0):
    """Read and clean one part -> a dict that says what was found, with the KEY of two files in .work.

    KEY.jsonl has the documents that are left, KEY.hashes.npy [documents, 6] uint64 of each: two halves of its hash, two
    words of its fingerprint, its characters as read, the index of its source in the dict's "sources".
    """
    identity = [part.source, part.sha256, part.start, part.stop, list(map(str, part.paths))]
    choices = [pipeline, exams, judge_chats, show_dropped, show_changed]
    key = digest_of("clean", code_digest(), identity, choices)
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
        "changed": {},
    }
    hashes = [np.zeros((0, 6), dtype=np.uint64)]
    temporary = work / f"{key}.jsonl.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        for batch in batches_of(cleaned_documents(part, result, *choices)):
            hashes.append(hashes_of(batch, result["sources"]))
            file.writelines(document.to_json() + "\n" for document, _, _ in batch)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, work / f"{key}.jsonl")
    write_array(work / f"{key}.hashes.npy", np.concatenate(hashes))
    return write_work(work, key, result)


def cleaned_documents(part, result, pipeline, exams, judge_chats, show_dropped, show_changed):
    """Yield (document, source, characters as read) of the documents that cleaning keeps; count all in `result`."""
    position = 0
    for where, document in split_documents(part, pipeline, exams):
        characters = len(document.text)
        source = document.source(part.source)
        count(result["ledger"], source, "read", characters)
        if source not in result["sources"]:
            result["sources"].append(source)
        if document.problem:
            result["malformed"] += 1
            if result["malformed"] <= MAX_NAMED:
                result["problems"].append(f"{where}: {document.problem}")
        changes = []

        def watch(mapper, before, after, source=source, changes=changes):
            changes.append((mapper, len(before) - len(after)))
            if show_changed:
                keep_changed(result["changed"], f"{source}: {mapper}", before, after, show_changed)

        document, dropped_by = clean(document, pipeline, judge_chats, watch)
        if not dropped_by:
            count_removed(result["ledger"], source, changes)
            yield document, source, characters
        else:
            count(result["ledger"], source, dropped_by, characters)
            if dropped_by not in ("malformed", "empty"):
                keep_dropped(result["dropped"], f"{source}: {dropped_by}", document.text, show_dropped)
        result["documents"] += 1
        if result["documents"] % 100 == 0:
            progress(100, part.position - position)
            position = part.position
    progress(result["documents"] % 100, part.size - position)


def split_documents(part, pipeline, exams):
    """Yield (where, document) of a part, with exams in their form and each text that is too long in pieces."""
    for where, document in part.documents():
        document = exam_as(document, exams) if document.kind == "exam" else document
        for piece in split_long(document, pipeline):
            yield where, piece


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
    """The rows of KEY.hashes.npy, [documents, 6] uint64."""
    rows = np.zeros((len(batch), 6), dtype=np.uint64)
    asked, said = zip(*(document.asked_and_said() for document, _, _ in batch))
    rows[:, 2:4] = fingerprints(said, asked)
    for row, (document, source, characters) in zip(rows, batch):
        row[:2] = np.frombuffer(document.digest()[:16], dtype=">u8")
        row[4:] = characters, sources.index(source)
    return rows


def read_hashes(work, result):
    """The rows that hashes_of made of all documents that clean_part left."""
    return np.load(work / f"{result['key']}.hashes.npy", mmap_mode="r", allow_pickle=False)


def read_documents(work, result):
    """Yield (source, document) of what clean_part left; result is what it returned."""
    with open(work / f"{result['key']}.jsonl", encoding="utf-8") as file:
        for line in file:
            document = Document.from_json(line)
            yield document.source(result["source"]), document
