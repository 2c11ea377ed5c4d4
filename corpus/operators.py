"""Operators that clean a document: what Steel-LLM cleans with (arXiv 2502.06635, tables 7 and 8), named as in Data-Juicer
(arXiv 2309.02033), in settings that suit Chinese, English and code.

    text = clean_text(text)
    text = mapped(text, language(text))                # changed by the pipeline's mappers
    dropped_by = filtered_by(text, language(text))     # the filter that drops it, or None

Mappers give a text. Filters give a number, and a pipeline keeps a document iff low <= number <= high; of an empty text every
number is 0. All take time linear in the text, whatever it says.
"""

import functools
import html
import itertools
import math
import re
import unicodedata

import numpy as np

# ---------------------------------------------------------------------------------------------------------------
# Every setting. What is done to a document, in this order: a mapper, or a filter with its bounds.

ANY = math.inf
MAPPERS = [
    "clean_html", "fix_unicode", "expand_macro", "clean_links", "clean_email", "clean_ip", "remove_specific_chars",
    "remove_repeat_sentences", "whitespace_normalization",
]  # fmt: skip
PIPELINES = {
    "zh": [
        *MAPPERS,
        ("text_length", 10, 100_000), ("words_num", 5, 100_000), ("average_line_length", 4, ANY), ("maximum_line_length", 0, 20_000),
        ("alphanumeric", 0.5, 1), ("special_characters", 0, 0.5), ("character_repetition", 0, 0.4), ("word_repetition", 0, 0.5),
    ],
    "en": [
        *MAPPERS,
        ("text_length", 10, 100_000), ("words_num", 5, 100_000), ("average_line_length", 10, ANY), ("maximum_line_length", 0, 20_000),
        ("alphanumeric", 0.5, 1), ("special_characters", 0, 0.5), ("character_repetition", 0, 0.4), ("word_repetition", 0, 0.5),
    ],
    "code": [
        "clean_copyright", "clean_email", "clean_ip",
        ("text_length", 10, 96_714), ("words_num", 5, 20_000), ("average_line_length", 5, 150), ("maximum_line_length", 0, 1000),
        ("letters_per_word", 0.546, 30), ("character_repetition", 0, 0.5), ("word_repetition", 0, 0.5),
    ],
    # Steel-LLM's settings, for comparison: on Chinese they drop or damage most of what they meet.
    "published": [
        "chinese_convert", "clean_email", "clean_html", "clean_ip", "clean_all_links", "fix_unicode", "punctuation_normalization",
        "remove_repeat_sentences", "remove_chars_and_bars", "whitespace_normalization",
        ("alphanumeric", 0, 0.9), ("average_line_length", 10, 150), ("maximum_line_length", 0, 1000),
        ("character_repetition", 0, 0.4), ("spaced_word_repetition", 0, 0.5), ("all_special_characters", 0, 0.25),
        ("text_length", 10, 100_000),
    ],
}  # fmt: skip
MAX_PERPLEXITY = 1500  # per character, of prose under a model of a reference source (prepare.py --reference)
REPEATED = 10  # length of the n-grams, of characters or words, whose repetition is measured
CHINESE = 0.2  # share of Chinese among the letters of a text that --pipeline auto takes for zh
SHINGLE, MAX_DISTANCE = 6, 4  # near copies: characters in a shingle, bits in which two fingerprints may differ


def mapped(text, pipeline):
    """The text after the pipeline's mappers."""
    for step in PIPELINES.get(pipeline, ()):
        if isinstance(step, str):
            text = globals()[step](text)
    return text


def filtered_by(text, pipeline):
    """The name of the first filter that drops the text; None: it is kept."""
    for step in PIPELINES.get(pipeline, ()):
        if not isinstance(step, str) and not step[1] <= globals()[step[0]](text) <= step[2]:
            return step[0]
    return None


def language(text):
    """zh where enough of the letters are Chinese, else en."""
    return "zh" if share_of(CJK, text) >= max(CHINESE * share_of(LETTER, text), 1e-9) else "en"


# ---------------------------------------------------------------------------------------------------------------
# Characters


def code_points(ranges):
    """Ranges in hexadecimal to a set of characters: 0041-0043 0061 are A, B, C and a."""
    pairs = (part.partition("-") for part in ranges.split())
    return {chr(code) for low, _, high in pairs for code in range(int(low, 16), int(high or low, 16) + 1)}


SPACES = code_points("0009 0020 0084 00A0 2000 2001 2002 2003 2004 2005 2006 2007 2008 2009 200A 200B 200C 200D 202F 205F 2060 3000 FFFC")
# Of the special characters, Data-Juicer's lists (Apache-2.0), which go back to BigScience's; ASCII's digits are among them.
SPECIAL = code_points(
    "0009-000D 0020-0040 005B-0060 007B-007E 0081-0085 0091-0093 0095-0099 009C-009D 00A1-00AB 00AD-00B4 00B7-00BF 00D7 "
    "00F7-00F8 0131 026A 02BA-02BC 02C8 02CC 02D0 02D8 02DA 02DC 03C0 0413 060C 0647 066A 066C 06E9 093E 0940 0947 094D "
    "097D 09BE 0E51 2002-2003 2005 2008-200B 2010-2011 2013-2016 2018-201A 201C-2020 2022 2024 2026 202F-2030 2032-2033 "
    "2039-203A 203C 203F 2043-2044 2049 20A8 20AA 20AC 2103 2122 2139 2190-2199 21A9-21AA 21D3 2206 2208 2212 221A "
    "221E-221F 223C 2248 2256 2264-2265 2295 22C5 231A-231B 2328 23CF 23E9-23F3 23F8-23FA 24C2 2550 25A0 25AA-25AC 25B2 "
    "25B4 25B6-25B7 25BA-25BC 25C0 25C6 25CF 25E6 25FB-25FE 2600-2606 260E 2611 2614-2615 2618 261B 261D 2620 2622-2623 "
    "2626 262A 262E-262F 2638-263B 2640 2642 2648-2653 265F-2661 2663 2665-2666 2668 266B 267B 267E-267F 2692-2697 2699 "
    "269B-269C 26A0-26A1 26A7 26AA-26AB 26B0-26B1 26BD-26BE 26C4-26C5 26C8 26CE-26CF 26D1 26D3-26D4 26E9-26EA 26F0-26F5 "
    "26F7-26FA 26FD 2702 2705 2708-270D 270F 2712-2714 2716 271D 2721 2726 2728 2731 2733-2734 2744 2747 274C 274E "
    "2753-2757 2763-2764 2795-2797 27A1 27A4 27A9 27B0 27BF 2800 2934-2935 2B05-2B07 2B1B-2B1C 2B50 2B55 3000-3002 "
    "300A-300D 3010-3011 3030 303D 309C 30B7 30C3-30C4 30F3 30FB-30FC 3297 3299 4E00 4E0A 58EB FD3E-FD3F FEFF FF01 "
    "FF08-FF09 FF0C FF0E FF11 FF1A-FF1B FF1F FF3E FF5E FFFC-FFFD 1F004 1F0CF 1F170-1F171 1F17E-1F17F 1F18E 1F191-1F19A "
    "1F201-1F202 1F21A 1F22F 1F232-1F23A 1F250-1F251 1F300-1F321 1F324-1F393 1F396-1F397 1F399-1F39B 1F39E-1F3F0 "
    "1F3F3-1F3F5 1F3F7-1F4FD 1F4FF-1F53D 1F549-1F54E 1F550-1F567 1F56F-1F570 1F573-1F57A 1F587 1F58A-1F58D 1F590 "
    "1F595-1F596 1F5A4-1F5A5 1F5A8 1F5B1-1F5B2 1F5BC 1F5C2-1F5C4 1F5D1-1F5D3 1F5DC-1F5DE 1F5E1 1F5E3 1F5E8 1F5EF 1F5F3 "
    "1F5FA-1F64F 1F680-1F6C5 1F6CB-1F6D2 1F6D5-1F6D7 1F6DC-1F6E5 1F6E9 1F6EB-1F6EC 1F6F0 1F6F3-1F6FC 1F7E0-1F7EB 1F7F0 "
    "1F90C-1F93A 1F93C-1F945 1F947-1F9FF 1FA70-1FA7C 1FA80-1FA88 1FA90-1FABD 1FABF-1FAC5 1FACE-1FADB 1FAE0-1FAE8 "
    "1FAF0-1FAF8 "
)
DECORATION = "◆●■►▼▲▴∆▻▷❖♡□"
SIGNS = {c for c in SPECIAL if not c.isalpha()}  # 一, 上, 士 and strokes of kana are on the lists
CJK_RANGES = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3134F))
LETTER, ALNUM, CJK, SIGN, LISTED, SPACE = (1 << i for i in range(6))


def any_of(characters):
    """A pattern for one of these characters."""
    return re.compile("[" + "".join(map(re.escape, sorted(characters))) + "]")


@functools.cache
def class_table():
    """[0x110000] bits of every code point: LETTER and ALNUM of any script, CJK, SIGN, LISTED (in SPECIAL), SPACE."""
    table = np.zeros(0x110000, dtype=np.uint8)
    every = list(map(chr, range(0x110000)))
    for bit, test in ((LETTER, str.isalpha), (ALNUM, str.isalnum), (SPACE, str.isspace), (SIGN, SIGNS.__contains__), (LISTED, SPECIAL.__contains__)):
        table |= np.fromiter(map(test, every), dtype=bool, count=len(every)) * np.uint8(bit)
    for low, high in CJK_RANGES:
        table[low : high + 1] |= CJK
    return table


@functools.lru_cache(maxsize=2)  # several filters look at one text
def codes_of(text):
    """Its code points, uint32."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


@functools.lru_cache(maxsize=2)
def classes_of(text):
    return class_table()[codes_of(text)]


def share_of(bit, text):
    return float(np.count_nonzero(classes_of(text) & bit) / max(len(text), 1))


# ---------------------------------------------------------------------------------------------------------------
# Before every pipeline

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f\ufeff\ufffe\uffff]")


def clean_text(text):
    """Line ends become \\n, control characters go, trailing white space goes, at most one blank line in a row stays.

    Lone surrogates, which JSON can hold and UTF-8 cannot, become "?". The control characters from U+0080 on stay for fix_unicode:
    they may be bytes of text that was read in the wrong encoding.
    """
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    text = CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "\n".join(map(str.rstrip, text.split("\n")))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


# ---------------------------------------------------------------------------------------------------------------
# Mappers

# Text of these characters alone has nothing to repair: they neither begin a byte sequence of UTF-8 that was read in another
# encoding, nor compose with one another; and without & there is no entity.
C1_CONTROLS = re.compile("[\x80-\x9f]")
SOUND = re.compile("[\n\t -%'-~·—‘’“”…①-⑳□○●◎◇★☆\u3000-\u3011\u4e00-\u9fff\uff01-\uff5e]*+")


def fix_unicode(text):
    """Mojibake repaired, with ftfy where it is installed; entities decoded, characters composed (NFC), line ends of one kind.

    Full-width punctuation stays: in Chinese text it is right.
    """
    if SOUND.fullmatch(text):
        return text
    try:
        import ftfy

        text = ftfy.fix_text(text, normalization="NFC", fix_character_width=False, uncurl_quotes=False, fix_latin_ligatures=False)
    except ImportError:
        text = unicodedata.normalize("NFC", html.unescape(text)).replace("\r\n", "\n").replace("\r", "\n")
    return C1_CONTROLS.sub("", text)


@functools.cache
def opencc_converter():
    try:
        from opencc import OpenCC
    except ImportError:
        raise SystemExit("chinese_convert needs opencc: pip install opencc")
    return OpenCC("t2s")


def chinese_convert(text):
    """Traditional characters to simplified ones, with opencc."""
    return opencc_converter().convert(text)


EMAIL = re.compile(r"(?<![A-Za-z0-9.\-+_])[A-Za-z0-9.\-+_]++@[a-z0-9.\-+_]+\.[a-z]+")


def clean_email(text):
    return EMAIL.sub("", text) if "@" in text else text


OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
IP = re.compile(rf"(?:{OCTET}\.){{3}}{OCTET}|(?:[0-9A-Fa-f]{{1,4}}:){{7}}[0-9A-Fa-f]{{1,4}}")


def clean_ip(text):
    """IPv4 addresses and IPv6 ones written out in full."""
    return IP.sub("", text) if text.count(".") >= 3 or text.count(":") >= 7 else text


def link_pattern(stop):
    """scheme://, www. or name.tld/ and what follows, up to white space or stop; brackets in it are balanced."""
    body = rf"(?:[^\s()<>{stop}]++|\([^\s()<>{stop}]*+(?:\([^\s()<>{stop}]*+\)[^\s()<>{stop}]*+)*+\))++"
    start = r"(?<![a-z0-9])(?:[a-z][a-z0-9+]{0,15}://|www[0-9]{0,3}\.)|(?<![a-z0-9.\-])[a-z0-9.\-]+\.[a-z]{2,4}/"
    return re.compile(f"(?P<start>{start}){body}", re.IGNORECASE)


LINK, LINK_IN_CHINESE = link_pattern(""), link_pattern("\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef")


def clean_links(text, pattern=LINK_IN_CHINESE):
    """Web addresses, without the punctuation behind them. In Chinese they end where Chinese begins."""

    def rest(match):
        link = match.group().rstrip("!([]{};:'\".,<>?«»“”‘’`")
        return match.group()[len(link) :] if len(link) > len(match["start"]) else match.group()

    return pattern.sub(rest, text) if "/" in text or "www" in text.lower() else text


def clean_all_links(text):
    """As published: an address goes on into the Chinese behind it."""
    return clean_links(text, LINK)


ELEMENTS = (
    "a|abbr|address|article|aside|audio|b|blockquote|body|br|button|caption|center|cite|code|col|colgroup|dd|del|details|div|dl|dt|"
    "em|embed|fieldset|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|kbd|label|legend|li|link|"
    "main|map|mark|meta|nav|noscript|object|ol|optgroup|option|p|param|picture|pre|q|s|samp|script|section|select|small|source|span|"
    "strong|style|sub|summary|sup|table|tbody|td|template|textarea|tfoot|th|thead|time|title|tr|tt|u|ul|var|video|wbr"
)
ALONE = "async|autofocus|autoplay|checked|controls|defer|disabled|hidden|loop|multiple|muted|nowrap|open|readonly|required|selected"
TAG = re.compile(rf"</?(?:{ELEMENTS})(?:\s++(?:(?:{ALONE})\b|[^<>=]*+=)[^<>]*+)?+\s*+/?>|<!doctype[^<>]*+>", re.IGNORECASE)
NOTE = re.compile("<!--.*?-->", re.DOTALL)


def clean_html(text):
    """The text of HTML: list items on lines of their own with a star, all other tags dropped, entities decoded.

    Only where there is a real tag: "a<b" is none.
    """
    if "<" not in text or not TAG.search(text):
        return text
    last = text.rfind("-->") + 3  # every note that begins before it has an end, so none is looked for in vain
    text = NOTE.sub("", text[:last]) + text[last:] if last > 2 else text
    for tag in ("<li>", "<ol>"):
        text = text.replace(tag, "\n*")
    for tag in ("</li>", "</ol>"):
        text = text.replace(tag, "")
    return html.unescape(TAG.sub("", text)).lstrip()


COMMENT = re.compile(r"//|--|#(?:[\s#]|$)")  # not #include, and not #!/bin/sh
COPYRIGHT = re.compile("copyright|licen[cs]e|©|版权", re.IGNORECASE)


def clean_copyright(text):
    """The first /* */ goes if it speaks of copyright; if there is none, the comment lines at the beginning do if they do."""
    start = text.find("/*")
    end = text.find("*/", start + 2) + 2 if start >= 0 else 1
    if end > 1:
        return text[:start] + text[end:] if "copyright" in text[start:end].lower() else text
    lines = text.split("\n")
    n = next((i for i, line in enumerate(lines) if not COMMENT.match(line)), len(lines))
    return "\n".join(lines[n:]) if COPYRIGHT.search("\n".join(lines[:n])) else text


NEWCOMMAND = re.compile(r"^[ \t]*\\newcommand\*?\{?(\\[A-Za-z]+)\}?\{(.*)\}[ \t]*$", re.MULTILINE)
DEF = re.compile(r"^[ \t]*\\def\s*(\\[A-Za-z]+)\{(.*)\}[ \t]*$", re.MULTILINE)
MACRO = re.compile(r"\\[A-Za-z]++(?![0-9])")


def expand_macro(text):
    """LaTeX: what \\newcommand and \\def without arguments define, written out where it is used.

    Not where the text would grow beyond twice its length and 10,000 characters: that is an attack, or no LaTeX.
    """
    for name, pattern in (("\\newcommand", NEWCOMMAND), ("\\def", DEF)):
        macros = dict(pattern.findall(text)) if name in text else {}
        if macros:
            used = [macros[macro] for macro in MACRO.findall(text) if macro in macros]
            if sum(map(len, used)) <= 2 * len(text) + 10_000:
                text = MACRO.sub(lambda match: macros.get(match.group(), match.group()), text)
    return text


# Steel-LLM's map makes Chinese punctuation half-width, and the figure １ a quotation mark.
PUNCTUATION = str.maketrans(
    "，。、„”“«»１」「《》´∶：？！（）；–～’━〈〉【】％►",
    ",.,\"\"\"\"\"\"\"\"\"\"'::?!();-~'-<>[]%-",
) | {ord(wide): text for wide, text in [["—", " - "], ["．", ". "], ["…", "..."]]}


def punctuation_normalization(text):
    return text.translate(PUNCTUATION)


# A point inside of a number or a name ends nothing: 3.25 is no sentence and a half.
ENDING = re.compile(r"[。！？!?\n]|\.(?![A-Za-z0-9])")
NO_KEY = re.compile(r"\W+")


def remove_repeat_sentences(text):
    """Only the first of equal sentences stays. Shorter than 2 characters, signs not counted, all stay."""
    ends = [match.end() for match in ENDING.finditer(text)] + [len(text)]
    sentences = [text[start:end] for start, end in zip([0, *ends], ends)]
    seen, kept = set(), []
    for sentence in sentences:
        key = NO_KEY.sub("", sentence)
        if len(key) < 2 or key not in seen:
            kept.append(sentence)
            seen.add(key)
    return "".join(kept)


DECORATIONS = any_of(DECORATION)


def remove_specific_chars(text):
    return DECORATIONS.sub("", text)


def remove_chars_and_bars(text):
    """As published: "|" goes too, and with it every table."""
    return remove_specific_chars(text).replace("|", "")


NO_PLAIN_SPACE = any_of(SPACES - {" "})


def whitespace_normalization(text):
    """Every kind of space becomes the plain one; line ends stay."""
    return NO_PLAIN_SPACE.sub(" ", text.strip())


# ---------------------------------------------------------------------------------------------------------------
# Filters


def text_length(text):
    return len(text)


def alphanumeric(text):
    """Share of letters and digits of any script."""
    return share_of(ALNUM, text)


def letters_per_word(text):
    """Letters and digits per word: of code, what `alphanumeric` bounds in Data-Juicer's recipes."""
    return np.count_nonzero(classes_of(text) & ALNUM) / max(len(text.split()), 1)


def average_line_length(text):
    """Characters per line, line ends counted."""
    return len(text) / max(len(text.splitlines()), 1)


def maximum_line_length(text):
    return max(map(len, text.splitlines()), default=0)


def special_characters(text):
    """Share of signs, emoji, digits and spaces."""
    return share_of(SIGN, text)


def all_special_characters(text):
    """As published, with a few Chinese characters on the list."""
    return share_of(LISTED, text)


def ngram_hashes(codes, n):
    """64-bit hashes of all runs of n numbers, [len - n + 1]: polynomials, put together as powers are by squaring."""
    base = np.uint64(0x9E3779B97F4A7C15)
    hashes = codes = codes.astype(np.uint64)
    size = 1
    for bit in bin(n)[3:]:
        hashes = hashes[: max(len(hashes) - size, 0)] * np.power(base, np.uint64(size)) + hashes[size:]
        size *= 2
        if bit == "1":
            hashes = hashes[: max(len(hashes) - 1, 0)] * base + codes[size:]
            size += 1
    return hashes


def ngram_counts(codes, n):
    """How often each n-gram of an array of numbers occurs, most often first."""
    hashes = np.sort(ngram_hashes(codes, n))
    new = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    starts = np.flatnonzero(new)
    return np.sort(np.append(starts[1:], len(hashes))[: len(starts)] - starts)[::-1]


def character_repetition(text, n=REPEATED):
    """Share of the most frequent n-grams of characters: of the root of their number, if so many occur more than once."""
    counts = ngram_counts(codes_of(text), n)
    top = min(int(len(counts) ** 0.5), np.count_nonzero(counts > 1))
    return float(counts[:top].sum() / max(counts.sum(), 1))


@functools.lru_cache(maxsize=2)
def word_codes(text):
    """A number for each word. A Chinese character is a word: there are no spaces between them. The others are what white
    space and Chinese part, lower-cased, without signs at their ends."""
    text = text.lower()
    classes = classes_of(text)
    outside = classes & (CJK | SPACE) > 0
    letters = np.flatnonzero(~outside & (classes & SIGN == 0))
    stretch = np.cumsum(outside)[letters]
    change = stretch[1:] != stretch[:-1]
    starts, ends = letters[np.append(True, change)[: len(letters)]], letters[np.append(change, True)[: len(letters)]] + 1
    numbers, known = np.where(classes & CJK, codes_of(text), 0), {}
    words = (text[start:end] for start, end in zip(starts.tolist(), ends.tolist()))  # from the first letter of a stretch to its last
    numbers[starts] = [known.setdefault(word, 0x110000 + len(known)) for word in words]
    return numbers[numbers > 0]


def words_num(text):
    return len(word_codes(text))


def repetition(codes, n=REPEATED):
    counts = ngram_counts(codes, n)
    return float(counts[counts > 1].sum() / max(counts.sum(), 1))


def word_repetition(text):
    """Share of 10-grams of words that occur more than once."""
    return repetition(word_codes(text))


def spaced_word_repetition(text):
    """As published: only white space parts words, which makes one of a whole clause of Chinese."""
    known, words = {}, []
    for word in text.lower().split():
        start, end = 0, len(word)
        while start < end and word[start] in SIGNS:
            start += 1
        while start < end and word[end - 1] in SIGNS:
            end -= 1
        if start < end:
            words.append(known.setdefault(word[start:end], len(known)))
    return repetition(np.array(words))


# ---------------------------------------------------------------------------------------------------------------
# Perplexity


def mixed(numbers):
    """A hash of uint64 whose upper bits depend on all (the finaliser of splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class NGram:
    """How surprising a text is to somebody who knows nothing but a reference: a model of 4-grams of characters.

    p_n(c | n - 1 characters before) = (count(n-gram) + k p_{n-1}(c | n - 2 before)) / (count(context) + k), and p_0 = 1 / 2^16:
    Dirichlet smoothing towards the next shorter context (MacKay and Peto 1995). Counts lie in tables addressed by hash, and no
    n-gram is taken to be more frequent than its context: so both must collide with others before a new one looks known.
    """

    ORDER, STRENGTH, BITS = 4, 5.0, 23

    def __init__(self, tables=None):
        """tables [ORDER, 2, 2^BITS], uint32: of each order, how often each n-gram and each context of one was seen."""
        self.tables = np.zeros((self.ORDER, 2, 1 << self.BITS), dtype=np.uint32) if tables is None else tables

    def cells(self, text):
        """For n = 1 .. ORDER, where the n-gram that ends at each character is counted, and its context; a text begins behind newlines."""
        codes = np.concatenate([np.full(self.ORDER, ord("\n"), dtype=np.uint32), codes_of(text)])
        hashes = [np.zeros(len(codes), dtype=np.uint64)] + [ngram_hashes(codes, n) for n in range(1, self.ORDER + 1)]
        cells = [mixed(h) >> np.uint64(64 - self.BITS) for h in hashes]
        return [(cells[n][-len(text) :], cells[n - 1][-len(text) - 1 : -1]) for n in range(1, self.ORDER + 1)]

    def learn(self, text):
        for tables, cells in zip(self.tables, self.cells(text) if text else ()):
            for table, at in zip(tables, cells):
                np.add.at(table, at, 1)

    def perplexity(self, text):
        """exp of the mean surprise of a character, in nats; 0 of an empty text."""
        if not text:
            return 0.0
        p = 1 / 65_536
        for (grams, contexts), (gram, context) in zip(self.tables, self.cells(text)):
            seen = contexts[context]
            p = (np.minimum(grams[gram], seen) + self.STRENGTH * p) / (seen + self.STRENGTH)
        return float(np.exp(-np.log(p).mean()))


# ---------------------------------------------------------------------------------------------------------------
# Near copies: document_simhash (Charikar 2002; Manku et al. 2007)

MD5_ADD = [np.uint32(abs(math.sin(i + 1)) * 2**32) for i in range(64)]
MD5_TURN = [7, 12, 17, 22] * 4 + [5, 9, 14, 20] * 4 + [4, 11, 16, 23] * 4 + [6, 10, 15, 21] * 4


def md5_first_half(words, sizes):
    """The first 8 bytes of the MD5 (RFC 1321) of many messages of at most 27 bytes at once: hashlib would take longer by far.

    words [7, n] uint32, the messages with the byte 0x80 behind them, zeros behind that; sizes [n] in bytes -> [n, 8] uint8.
    """
    message = [*words, *[np.uint32(0)] * 7, (sizes * 8).astype(np.uint32), np.uint32(0)]
    start = [np.full_like(words[0], value) for value in (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)]
    a, b, c, d = start
    for i in range(64):
        if i < 16:
            mix, k = d ^ (b & (c ^ d)), i
        elif i < 32:
            mix, k = c ^ (d & (b ^ c)), 5 * i + 1
        elif i < 48:
            mix, k = b ^ c ^ d, 3 * i + 5
        else:
            mix, k = c ^ (b | ~d), 7 * i
        mix += a
        mix += message[k % 16] + MD5_ADD[i]
        turned = mix << np.uint32(MD5_TURN[i])
        turned |= mix >> np.uint32(32 - MD5_TURN[i])
        turned += b
        a, b, c, d = d, turned, b, c
    return np.stack([a + start[0], b + start[1]], axis=1).astype("<u4").view(np.uint8)


def fingerprints(texts):
    """A 64-bit SimHash of each text, over shingles of 6 characters -> [len(texts)] uint64.

    A shingle's hash is the first 8 bytes of its MD5, big endian; a bit of the fingerprint is 1 iff it is in more than half of
    them. A text shorter than a shingle is one. White space is left out: the indentation of programs would make them all alike.
    """
    ones, counts = np.zeros((len(texts), 64), dtype=np.int64), np.zeros(len(texts), dtype=np.int64)
    pieces, size = [], 0

    def flush():  # many together: a short text alone would be all overhead
        owners = [owner for owner, _ in pieces]
        for total, own in zip((ones, counts), bits_of_shingles([piece for _, piece in pieces])):
            np.add.at(total, owners, own)
        pieces.clear()

    for i, text in enumerate(texts):
        text = "".join(text.split()) or "\n"
        for start in range(0, max(len(text) - SHINGLE + 1, 1), 20_000):  # pieces that share no shingle
            pieces.append((i, text[start : start + 20_000 + SHINGLE - 1]))
            size += len(pieces[-1][1])
            if size > 20_000:
                flush()
                size = 0
    if pieces:
        flush()
    return np.packbits(2 * ones > counts[:, None], axis=1).view(">u8").astype(np.uint64)[:, 0]


BEFORE = (np.tri(28, 28, -1) * 255).astype(np.uint8)  # row n: the first n bytes of a block; MARK: the one behind them
MARK = np.eye(28, dtype=np.uint8) * 0x80


def bits_of_shingles(texts):
    """Of each text, in how many of its shingles' hashes each bit is one, and how many shingles there are -> [n, 64], [n]."""
    lengths = np.array([len(text) for text in texts])
    content = np.frombuffer("".join(texts).encode("utf-8") + bytes(28), dtype=np.uint8)
    at = np.append(np.flatnonzero((content[:-28] & 0xC0) != 0x80), len(content) - 28)  # where each character begins, and the end
    counts = np.maximum(lengths - SHINGLE + 1, 1)
    begins = np.cumsum(counts) - counts
    first = np.arange(counts.sum()) + np.repeat(np.cumsum(lengths) - lengths - begins, counts)
    sizes = at[first + np.repeat(np.minimum(lengths, SHINGLE), counts)] - at[first]
    blocks = np.lib.stride_tricks.sliding_window_view(content, 28)[at[first]]
    blocks &= BEFORE[sizes]
    blocks |= MARK[sizes]
    bits = np.unpackbits(md5_first_half(np.ascontiguousarray(blocks.view("<u4").T), sizes), axis=1)
    # Summed in bytes, which is fast and goes up to 255 rows; then these sums.
    pieces = -(-counts // 255)
    firsts = np.cumsum(pieces) - pieces
    starts = np.repeat(begins, pieces) + 255 * (np.arange(pieces.sum()) - np.repeat(firsts, pieces))
    ones = np.add.reduceat(bits, starts, axis=0, dtype=np.uint8)
    return np.add.reduceat(ones, firsts, axis=0, dtype=np.int64), counts


def near_copies(prints, distance=MAX_DISTANCE):
    """prints [n] uint64 -> [n]: for each the first that it is a near copy of, directly or through others; else itself.

    All pairs within the distance are found: cut into distance + 2 blocks of bits, two such prints agree in two blocks at
    least, so they meet where all are sorted by these two. 10 million random prints take 2 GB.
    """
    values, first, back = np.unique(prints, return_index=True, return_inverse=True)
    order = np.argsort(first)  # distinct prints in the order of their first appearance
    values, place = values[order], np.argsort(order)
    root = np.arange(len(values))
    edges = np.linspace(0, 64, distance + 3).astype(int)
    blocks = [((values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1), high - low) for low, high in zip(edges, edges[1:])]
    for (one, _), (other, bits) in itertools.combinations(blocks, 2):
        # Key and index in one number: to sort numbers is ten times as fast as to sort an order.
        keyed = np.sort((one << np.uint64(bits) | other) << np.uint64(32) | np.arange(len(values), dtype=np.uint64))
        index, key = (keyed & np.uint64(0xFFFFFFFF)).astype(np.int64), keyed >> np.uint64(32)
        left = np.arange(len(values))
        for step in itertools.count(1):
            left = left[: np.searchsorted(left, len(values) - step)]
            left = left[key[left] == key[left + step]]  # a run's members that still have one so many places on
            if not len(left):
                break
            near = np.bitwise_count(values[index[left]] ^ values[index[left + step]]) <= distance
            join(root, index[left[near]], index[left[near] + step])
    while (root != root[root]).any():
        root = root[root]
    return first[order][root[place[back]]]


def join(root, a, b):
    """Make a[i] and b[i] of one group, for all i: root[i] <= i leads to the first member of the group of i."""
    while len(a):
        a, b = root[a], root[b]
        while (root[a] != a).any() or (root[b] != b).any():
            a, b = root[a], root[b]
        a, b = np.minimum(a, b), np.maximum(a, b)
        a, b = a[a != b], b[a != b]
        np.minimum.at(root, b, a)
