"""Pipelines: which operators clean a document, in which order and with which bounds.

    document, dropped_by = clean(document, "auto")     # dropped_by: the filter that drops it, or None

A pipeline keeps a document if low <= filter(text) <= high for all of its filters.
"""

from math import inf
from typing import NamedTuple

from corpus import operators as op


class Pipeline(NamedTuple):
    mappers: list  # str -> str, applied in this order
    filters: list  # (str -> number, low, high)

    def operators(self):
        """All functions of it."""
        return [*self.mappers, *(measure for measure, _, _ in self.filters)]


def prose(min_average_line):
    """The pipeline of a language. A line of Chinese says as much in fewer characters."""
    return Pipeline(
        mappers=[
            op.clean_html,
            op.fix_unicode,
            op.expand_macro,
            op.clean_links,
            op.clean_email,
            op.clean_ip,
            op.remove_specific_chars,
            op.remove_repeat_sentences,
            op.whitespace_normalization,
        ],
        filters=[
            (op.text_length, 10, 100_000),
            (op.words_num, 5, 100_000),
            (op.average_line_length, min_average_line, inf),
            (op.maximum_line_length, 0, 20_000),
            (op.alphanumeric, 0.5, 1),
            (op.special_characters, 0, 0.5),
            (op.character_repetition, 0, 0.4),
            (op.word_repetition, 0, 0.5),
        ],
    )


PIPELINES = {
    "zh": prose(min_average_line=4),
    "en": prose(min_average_line=10),
    "code": Pipeline(
        mappers=[op.clean_copyright, op.clean_email, op.clean_ip],
        filters=[  # 96,714 and 0.546 are Steel-LLM's bounds for code (tables 7 and 8)
            (op.text_length, 10, 96_714),
            (op.words_num, 5, 20_000),
            (op.average_line_length, 5, 150),
            (op.maximum_line_length, 0, 1000),
            (op.letters_per_word, 0.546, 30),
            (op.character_repetition, 0, 0.5),
            (op.word_repetition, 0, 0.5),
        ],
    ),
    # Steel-LLM's own settings, for comparison: they drop or damage most Chinese text.
    "published": Pipeline(
        mappers=[
            op.chinese_convert,
            op.clean_email,
            op.clean_html,
            op.clean_ip,
            op.clean_all_links,
            op.fix_unicode,
            op.punctuation_normalization,
            op.remove_repeat_sentences,
            op.remove_chars_and_bars,
            op.whitespace_normalization,
        ],
        filters=[
            (op.alphanumeric, 0, 0.9),
            (op.average_line_length, 10, 150),
            (op.maximum_line_length, 0, 1000),
            (op.character_repetition, 0, 0.4),
            (op.spaced_word_repetition, 0, 0.5),
            (op.all_special_characters, 0, 0.25),
            (op.text_length, 10, 100_000),
        ],
    ),
    "none": Pipeline(mappers=[], filters=[]),
}
CHINESE = 0.2  # "auto" takes a text for Chinese if this share of its letters is


def clean(document, pipeline="auto"):
    """Clean a document and judge it -> (document, what drops it, or None if it is kept).

    Each message of a chat is cleaned by itself; filters see all of them together. pipeline: one of PIPELINES;
    "auto": code, zh or en, by the document; "none": drop only what is malformed or empty.
    """
    if document.problem:
        return document, "malformed"
    if document.dropped_by:
        return document, document.dropped_by
    cleaned = document.map(op.clean_text)
    if not cleaned.text:
        return cleaned, "empty"
    if pipeline == "auto":
        pipeline = "code" if document.kind == "code" else language(cleaned.text)
    cleaned = cleaned.map(lambda text: apply_mappers(text, pipeline)).merge_turns()
    if cleaned.roles != document.roles or "assistant" not in cleaned.roles:
        return cleaned, "empty"  # cleaning has left nothing of what one side says, or nobody answers
    return cleaned, filtered_by(cleaned.text, pipeline)


def language(text):
    """zh if enough of the letters are Chinese, else en."""
    return "zh" if op.share_of(op.CJK, text) >= max(CHINESE * op.share_of(op.LETTER, text), 1e-9) else "en"


def apply_mappers(text, pipeline):
    """The text after all mappers of a pipeline."""
    for mapper in PIPELINES[pipeline].mappers:
        text = mapper(text)
    return text


def filtered_by(text, pipeline):
    """The name of the first filter that drops the text; None if it is kept."""
    for measure, low, high in PIPELINES[pipeline].filters:
        if not low <= measure(text) <= high:
            return measure.__name__
    return None
