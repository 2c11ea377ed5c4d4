"""Pipelines: which operators clean a document, in which order and with which bounds.

    document, dropped_by = clean(document, "auto")     # dropped_by: the filter that drops it, or None

A pipeline keeps a document if low <= filter(text) <= high for all of its filters.

"published" has Steel-LLM's own settings (arXiv 2502.06635, tables 7 and 8), for comparison: they drop or damage most
Chinese text. Its operators are Data-Juicer's. Those here differ in that

clean_email               asks for a known top-level domain, and no bracket or path after it
clean_html                makes line ends of tags that break a line; keeps what looks like a tag but is never closed
clean_ip                  keeps versions, section numbers and addresses that are not public
clean_all_links           keeps addresses of this machine
fix_unicode               keeps the width of characters, curly quotes and ligatures
remove_repeat_sentences   keeps short sentences, short lines, items and rows, and never joins lines

Its other mappers and all of its filters do as Data-Juicer's.
"""

from bisect import bisect
from math import inf
from typing import NamedTuple

from corpus import filters, mappers


class Pipeline(NamedTuple):
    mappers: list  # str -> str, applied in this order
    filters: list  # (str -> number, low, high)
    has_code: bool = False  # whether code in the text is hidden from the mappers
    longest: float = inf  # characters; a longer text is split

    def operators(self):
        """All functions of it."""
        return [*self.mappers, *(measure for measure, _, _ in self.filters)]


PROSE = [
    mappers.clean_html,
    mappers.fix_unicode,
    mappers.expand_macro,
    mappers.clean_links,
    mappers.clean_email,
    mappers.clean_ip,
    mappers.remove_specific_chars,
    mappers.whitespace_normalization,
]


def prose(min_average_line):
    """The pipeline of a language. A line of Chinese says as much in fewer characters."""
    return Pipeline(
        mappers=[*PROSE, mappers.remove_repeat_sentences],
        filters=[
            (filters.text_length, 10, inf),
            (filters.words_num, 5, inf),
            (filters.average_line_length, min_average_line, inf),
            (filters.special_characters, 0, 0.7),
            (filters.word_repetition, 0, 0.7),
        ],
        has_code=True,
        longest=100_000,
    )


PIPELINES = {
    "zh": prose(min_average_line=2.5),
    "en": prose(min_average_line=6),
    "code": Pipeline(
        mappers=[mappers.clean_copyright, mappers.clean_email],
        filters=[  # 0.546 is Steel-LLM's bound for code (table 8)
            (filters.text_length, 10, inf),
            (filters.words_num, 5, 20_000),
            (filters.average_line_length, 5, 150),
            (filters.maximum_line_length, 0, 1000),
            (filters.letters_per_word, 0.546, 30),
            (filters.word_repetition, 0, 0.75),
        ],
        longest=90_000,
    ),
    # Conversations are few and short, and say the same thing twice on purpose. So they are not judged as prose is:
    # one is dropped where a side says nothing or one thing over and over, or is too long.
    "chat": Pipeline(
        mappers=PROSE, filters=[(filters.text_length, 1, 100_000), (filters.sameness, 0, 0.9)], has_code=True
    ),
    "published": Pipeline(
        mappers=[
            mappers.chinese_convert,
            mappers.clean_email,
            mappers.clean_html,
            mappers.clean_ip,
            mappers.clean_all_links,
            mappers.fix_unicode,
            mappers.punctuation_normalization,
            mappers.remove_repeat_sentences,
            mappers.remove_chars_and_bars,
            mappers.normalize_all_spaces,
        ],
        filters=[
            (filters.alphanumeric, 0, 0.9),
            (filters.average_line_length, 10, 150),
            (filters.maximum_line_length, 0, 1000),
            (filters.character_repetition, 0, 0.4),
            (filters.spaced_word_repetition, 0, 0.5),
            (filters.all_special_characters, 0, 0.25),
            (filters.text_length, 10, 100_000),
        ],
    ),
    "none": Pipeline(mappers=[], filters=[]),
}
CHINESE = 0.2  # "auto" takes a text for Chinese if this share of its letters is


def pipeline_of(document, choice="auto"):
    """The name of the pipeline for a document: `choice`, but "auto" goes by the document, and a chat is not prose."""
    if isinstance(document.content, list) and choice in ("auto", "zh", "en"):
        return "chat"
    return language_of(document) if choice == "auto" else choice


def language_of(document):
    """code, zh or en."""
    return "code" if document.kind == "code" else language(document.text)


def language(text):
    """zh if enough of the letters are Chinese, else en."""
    return (
        "zh"
        if filters.share_of(filters.CJK, text) >= max(CHINESE * filters.share_of(filters.LETTER, text), 1e-9)
        else "en"
    )


def clean(document, pipeline="auto", judge_chats=False, watch=None):
    """Clean a document and judge it -> (document, what drops it, or None if it is kept).

    Each message of a chat is cleaned by itself; a pair whose answers are then equal is dropped. Of a chat, each side is
    judged by itself: all that the user says, and all that the assistant says; with judge_chats by the filters of its
    language too.
    pipeline: one of PIPELINES; "auto": code, chat, zh or en, by the document; "none": drop only what is malformed or
    empty. watch(mapper's name, before, after): called where a mapper changes a text.
    """
    if document.problem:
        return document, "malformed"
    if document.dropped_by:
        return document, document.dropped_by
    cleaned = document.map(lambda text: watched(mappers.clean_text, text, watch)).merge_turns()
    if not cleaned.text:
        return cleaned, "empty"
    name = pipeline_of(cleaned, pipeline)
    is_chat = isinstance(cleaned.content, list)

    def map_text(text):
        changes = []
        mapped = apply_mappers(text, name, watch and (lambda *change: changes.append(change)))
        if is_chat and not mapped and mappers.whitespace_normalization(text):
            return text  # nothing but a tag, a link or a heart: it is what the chat is about
        for change in changes:
            watch(*change)
        return mapped

    cleaned = cleaned.map(map_text).merge_turns()
    if cleaned.roles != document.roles or not cleaned.roles & {"assistant", "chosen"}:
        return cleaned, "empty"  # cleaning has left nothing of what one side says, or nobody answers
    if document.kind == "pair" and cleaned.answered("chosen") == cleaned.answered("rejected"):
        return cleaned, "equal_answers"
    if name != "chat":
        return cleaned, filtered_by(cleaned.text, name)
    for side in sides(cleaned):
        dropped_by = filtered_by(side, name) or (filtered_by(side, language(side)) if judge_chats else None)
        if dropped_by:
            return cleaned, dropped_by
    return cleaned, None


def sides(chat):
    """What the user says, and what the assistant says, one string each; of a chat without questions only the latter.

    What is said again in the same words counts once: "go on" may be said often. The chosen answer of a pair is the
    assistant's; the rejected one may be as bad as it likes.
    """
    said = {"user": "user", "assistant": "assistant", "chosen": "assistant"}
    sides = {"user": [], "assistant": []}
    for message in chat.content:
        if message["role"] in said:
            sides[said[message["role"]]].append(message["content"])
    return ["\n".join(dict.fromkeys(texts)) for texts in sides.values() if texts]


def apply_mappers(text, pipeline, watch=None):
    """The text after all mappers of a pipeline. watch: as in clean."""
    text, codes = mappers.hide_code(text) if PIPELINES[pipeline].has_code else (text, [])
    for mapper in PIPELINES[pipeline].mappers:
        text = watched(mapper, text, watch, codes)
    return mappers.show_code(text, codes)


def watched(mapper, text, watch, codes=()):
    """mapper(text); a change is reported to watch with the hidden pieces of code in their places."""
    mapped = mapper(text)
    if watch and mapped != text:
        watch(mapper.__name__, mappers.show_code(text, codes), mappers.show_code(mapped, codes))
    return mapped


def filtered_by(text, pipeline):
    """The name of the first filter that drops the text; None if it is kept."""
    for measure, low, high in PIPELINES[pipeline].filters:
        if not low <= measure(text) <= high:
            return measure.__name__
    return None


SPLIT_AT = ("\n\n", "\n", "\r", "。", "！", "？", ". ", " ")  # from the best place to the worst


def split_long(document, choice="auto"):
    """A text that is too long for its pipeline, as documents of about equal length cut at paragraphs or sentences."""
    text = document.content
    longest = inf if isinstance(text, list) else PIPELINES[pipeline_of(document, choice)].longest
    if document.problem or len(text) <= longest:
        return [document]
    size = len(text) // -(-len(text) // int(0.9 * longest))  # below the bound: the last piece gets what others leave
    fences = [match.span() for match in mappers.FENCES.finditer(text)]
    pieces, start = [], 0
    while len(text) - start > longest:
        end = start + size
        found = ((text.rfind(mark, start + size // 2, end), mark) for mark in SPLIT_AT)
        cut = next((at + len(mark) for at, mark in found if at > 0), end)
        opened, closed = fences[bisect(fences, (cut,)) - 1] if fences else (0, 0)
        line = text.rfind("\n", start, opened) + 1
        if start < line < cut < closed:  # not inside a fence, unless it is as long as a piece
            cut = line
        pieces.append(text[start:cut])
        start = cut
    return [document._replace(content=piece) for piece in [*pieces, text[start:]]]
