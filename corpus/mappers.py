"""Mappers: operators that change a text, str -> str. pipelines.py says which ones a document goes through.

They are those of Steel-LLM (arXiv 2502.06635, tables 7 and 8), named as in Data-Juicer (arXiv 2309.02033). Theirs were
made for web pages in English; these also leave Chinese, code, tables, verse and section numbers as they are. "As
Steel-LLM does it" marks those that only its own settings use.

All take time linear in the length of the text, whatever it says.
"""

import functools
import html
import ipaddress
import re
import unicodedata

from corpus.filters import code_points


def any_of(characters):
    """A pattern that matches one of these characters."""
    return re.compile("[" + "".join(map(re.escape, sorted(characters))) + "]")


# ----------------------------------------------------------------------------------------------------------------------
# Before all others

# Control characters, byte order marks, and the noncharacters of Unicode, which are free for a program's own use
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f\ufeff\ufdd0-\ufdef\ufffe\uffff]")


def clean_text(text):
    """What comes before every pipeline. Line ends become \\n; control characters and trailing white space are removed.

    At most one blank line in a row stays. Lone surrogates, which JSON can hold and UTF-8 cannot, become "?". Control
    characters from U+0080 on stay for fix_unicode: they may be bytes of text that was decoded with the wrong encoding.
    """
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    text = CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "\n".join(map(str.rstrip, text.split("\n")))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


# ----------------------------------------------------------------------------------------------------------------------
# Code in prose: hidden from the mappers, since most of what they look for means something else in code

# A fence that is never closed goes on to the end, as in CommonMark. One that names a language may open after text in
# its line, as people write it in chats.
OPENING = r"(?:^[ \t>]*+(?P<fence>`{3,}+|~{3,}+)[^\n`]*|(?<!`)(?P<late>`{3,}+)[A-Za-z][\w+#.\-]*[ \t\r]*)$"
CLOSING = r"^[ \t>]*+(?:(?P=fence)|(?P=late))(?:(?<=`)`*+|(?<=~)~*+)[ \t\r]*$"
FENCE = rf"{OPENING}(?:(?s:.*?){CLOSING}|(?P<unclosed>(?s:.*)\Z))"
FENCES = re.compile(FENCE, re.MULTILINE | re.ASCII)
SPAN = r"(?<!`)(?P<ticks>`{1,3})(?!`)[^\n`]{1,200}(?P=ticks)(?!`)"
# A line that is code although no fence says so. One that begins with a tag or a backslash is HTML or LaTeX.
STATEMENT = r"""[ \t]*+(?![<\\])(?:
      \#[ ]?include\b[^\n]*+
    | (?:from[ ][\w.]++[ ])?import[ ][\w.*, ]++;?
    | (?:async[ ])?(?:def|class)[ ]\w+[^\n]*+(?<=[:{)])
    | (?:elif|if|for|while|with|try|except|else|switch|catch)\b[^\n]*+(?<=[:{])
    | (?:(?:const|let|var|int|char|float|auto)[ ])?[\w.]++(?:\[[^\n\]]*+\])?(?:[ ][-+*/|&%:]?=[ ]|=(?=[\w(\[]))[^\n]*+
    | [\w.]++\([^\n]*+(?<=[);])
    | [^\n<\\\u2e80-\uffff]*+(?<=[;{}])
    )[ \t]*$"""
STATEMENTS = rf"^{STATEMENT}(?:\n+{STATEMENT})*+"
CODE = re.compile(f"(?:{FENCE})|(?:{SPAN})|(?:{STATEMENTS})", re.MULTILINE | re.VERBOSE | re.ASCII)
HINT_OF_CODE = re.compile(r"[`~{}();=]|import |#include")

# A mark is a noncharacter and four hexadecimal digits, written as noncharacters, for the number of a piece of code.
DIGITS = {ord(f"{digit:x}"): 0xFDD1 + digit for digit in range(16)}
DIGITS_BACK = {mark: digit for digit, mark in DIGITS.items()}
MARK = re.compile("\ufdd0([\ufdd1-\ufde0]{4})")


def open_fence(text, fence=""):
    """The backticks or tildes of the fence that is open after a text, "" if none is; `fence` is open before it."""
    if "```" not in text and "~~~" not in text:
        return fence
    *_, last = (None, *FENCES.finditer(f"{fence}\n{text}"))
    return (last["fence"] or last["late"]) if last and last["unclosed"] is not None else ""


def hide_code(text):
    """-> (the text with a mark in place of each piece of code, the pieces).

    Code is a fence, a span in backticks, or lines of statements.
    """
    codes = []
    if not HINT_OF_CODE.search(text):
        return text, codes

    def hide(match):
        if len(codes) == 1 << 16:
            return match.group()
        codes.append(match.group())
        return "\ufdd0" + f"{len(codes) - 1:04x}".translate(DIGITS)

    return CODE.sub(hide, text), codes


def show_code(text, codes):
    """The text with the pieces of code in place of their marks."""
    return MARK.sub(lambda match: codes[int(match[1].translate(DIGITS_BACK), 16)], text) if codes else text


# ----------------------------------------------------------------------------------------------------------------------
# Characters

# Text of these characters alone needs no repair: none of them begins a UTF-8 sequence that was decoded with the wrong
# encoding, none combines with its neighbours, and without & there is no entity.
SOUND = re.compile("[\n\t -%'-~·—‘’“”…①-⑳□○●◎◇★☆\u3000-\u3011\u4e00-\u9fff\ufdd0-\ufde0\uff01-\uff5e]*+")
C1_CONTROLS = re.compile("[\x80-\x9f]")
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")


def fix_unicode(text):
    """Repair mojibake (with ftfy, if installed), decode entities, compose characters (NFC), unify line ends.

    Full-width punctuation stays: it is right in Chinese text.
    """
    if SOUND.fullmatch(text):
        return text
    try:
        import ftfy
    except ImportError:
        text = unicodedata.normalize("NFC", html.unescape(text)).replace("\r\n", "\n").replace("\r", "\n")
    else:
        kept = {"fix_character_width": False, "uncurl_quotes": False, "fix_latin_ligatures": False}
        fixed = ftfy.fix_text(text, normalization="NFC", **kept)
        if NONCHARACTERS.findall(fixed) == NONCHARACTERS.findall(text):  # else it has made marks of hidden code
            text = fixed
    return C1_CONTROLS.sub("", text)


@functools.cache
def opencc_converter():
    try:
        from opencc import OpenCC
    except ImportError:
        raise ValueError("chinese_convert needs opencc: pip install opencc") from None
    return OpenCC("t2s")


def chinese_convert(text):
    """Traditional characters become simplified ones, with opencc. ValueError if it is not installed."""
    return opencc_converter().convert(text)


# Steel-LLM's table makes Chinese punctuation half-width, and the digit １ a quotation mark.
WIDE, NARROW = "，。、„”“«»１」「《》´∶：？！（）；–～’━〈〉【】％►", ",.," + '"' * 10 + "'::?!();-~'-<>[]%-"
PUNCTUATION = str.maketrans(WIDE, NARROW) | str.maketrans({"—": " - ", "．": ". ", "…": "..."})


def punctuation_normalization(text):
    """As Steel-LLM does it: half-width punctuation."""
    return text.translate(PUNCTUATION)


DECORATION = "[◆●■►▼▲▴∆▻▷❖♡]"
DECORATED = re.compile(rf"^[ \t]*+{DECORATION}++[ \t]*+|(?<!{DECORATION}){DECORATION}++$", re.MULTILINE)


def remove_specific_chars(text):
    """Remove bullets and other decoration at the ends of lines.

    Within a line they may separate what belongs apart. □ stays: it stands for a lost character, or for a blank.
    """
    return DECORATED.sub("", text)


def remove_chars_and_bars(text):
    """As Steel-LLM does it: anywhere, and □ and "|" too, and with "|" every table."""
    return re.sub("[◆●■►▼▲▴∆▻▷❖♡□|]", "", text)


SPACES = code_points("0009 0020 0084 00A0 2000-200D 202F 205F 2060 3000 FFFC")
OTHER_SPACES = any_of(SPACES - {" ", "\t", "\u200b", "\u200c", "\u200d", "\u2060"})
INVISIBLE = any_of("\u200b\u2060")
ALL_SPACES = any_of(SPACES)


def whitespace_normalization(text):
    """Every kind of space becomes the plain one, and those without width are removed. Tabs and line ends stay.

    Joiners without width stay too: they are part of emoji and of some scripts.
    """
    return INVISIBLE.sub("", OTHER_SPACES.sub(" ", text.strip()))


def normalize_all_spaces(text):
    """As Steel-LLM does it: spaces without width and tabs become plain spaces too."""
    return ALL_SPACES.sub(" ", text.strip())


# ----------------------------------------------------------------------------------------------------------------------
# Addresses

# Of hosts without a scheme only these count: x@self.weight is a product, and Vue.js/React.js are two names.
DOMAINS = "com|cn|org|net|edu|gov|mil|io|hk|tw|jp|kr|sg|uk|us|eu|de|fr|nl|ca|au|ru|br|in|ch|se"
EMAIL = re.compile(
    rf"(?<![A-Za-z0-9.\-+_])[A-Za-z0-9.\-+_]++@(?i:[a-z0-9.\-+_]+\.(?:{DOMAINS}|info|biz|me|cc|name|ai|dev))"
    r"(?![A-Za-z0-9\[\-+_]|\.[A-Za-z0-9_]|\([!-~]|:[\w/])"
)


def clean_email(text):
    """Remove mail addresses. x@w.view(1, 2) and x@self.weight are products, git@github.com:a/b.git is a path."""
    return EMAIL.sub("", text) if "@" in text else text


OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
NO_VERSION = r"(?<![\w.\-/])(?<!version )(?<!版本)(?<!版本 )(?<!第)(?<!第 )(?=[0-9.]*[0-9]{3})"
NO_VERSION += r"(?!(?<=[a-z]{2} )[0-9]\.[0-9]\.)"  # OpenSSL 1.1.100.2
IP = re.compile(
    rf"{NO_VERSION}(?:{OCTET}\.){{3}}{OCTET}(?![\w\-]|\.\w|/[0-9])"
    r"|(?<![\w.:])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![\w.:])",
    re.IGNORECASE | re.ASCII,
)


def clean_ip(text):
    """Remove public IPv4 addresses, and IPv6 addresses written out in full.

    Private ones, masks, networks (10.0.0.0/8) and the like stay: they are nobody's. An address has a number of three
    digits, as nearly all have: 2.30.8.4 is a version, and 1.1.1.1 a section.
    """

    def unless_public(match):
        address = ipaddress.ip_address(match.group())
        return "" if address.is_global and not address.is_multicast else match.group()

    return IP.sub(unless_public, text) if text.count(".") >= 3 or text.count(":") >= 7 else text


CHINESE = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef"
MARKS = "\ufdd0-\ufde0"


def link_pattern(stop, host, domains):
    """A pattern for scheme://, www. or name.tld/ and what follows, up to white space or `stop`, brackets balanced.

    domains: a pattern of the tld.
    """
    body = rf"(?:[^\s()<>{stop}]++|\([^\s()<>{stop}]*+(?:\([^\s()<>{stop}]*+\)[^\s()<>{stop}]*+)*+\))++"
    scheme = r"[a-z][a-z0-9+]{0,15}://(?!localhost|127\.|0\.0\.0\.0)"
    start = rf"(?<![a-z0-9])(?:{scheme}|www[0-9]{{0,3}}\.)|(?<![a-z0-9.\-/@])[a-z0-9.\-]+\.(?-i:{domains})/"
    return re.compile(f"(?P<start>{start})(?:{host}(?:{body})?|{body})", re.IGNORECASE)


LINK = link_pattern("", "(?!)", "[A-Za-z]{2,4}")
# A host with Chinese in it: only where the name does not begin with a whole host in ASCII, as in "http://a.cn这里".
CHINESE_HOST = r"(?![a-z0-9\-]+(?:\.[a-z0-9\-]+)*\.[a-z]{2,6}(?![.\w])|[a-z0-9.\-]*\.[a-z]{2,6}[\u4e00-\u9fff])"
CHINESE_HOST += r"(?:[\w\-]{1,63}\.){1,5}(?:[a-z]{2,6}|中国|公司|网络|网址|集团|在线|中文网)(?![a-z0-9])"
LINK_IN_CHINESE = link_pattern(CHINESE + MARKS, CHINESE_HOST, DOMAINS)


def clean_links(text, pattern=LINK_IN_CHINESE):
    """Remove web addresses, but not the punctuation after them. An address ends where Chinese text begins.

    One of this machine (localhost) stays: it is part of an explanation.
    """

    def punctuation_after(match):
        link = match.group().rstrip("!([]{};:'\".,<>?«»“”‘’`")
        return match.group()[len(link) :] if len(link) > len(match["start"]) else match.group()

    return pattern.sub(punctuation_after, text) if "/" in text or "www" in text.lower() else text


def clean_all_links(text):
    """As Steel-LLM does it: an address includes the Chinese right after it."""
    return clean_links(text, LINK)


# ----------------------------------------------------------------------------------------------------------------------
# Markup

ELEMENTS = """
    a abbr address article aside audio b blockquote body br button caption center cite code col colgroup dd del details
    div dl dt em embed fieldset figcaption figure font footer form h[1-6] head header hr html i iframe img input ins kbd
    label legend li link main map mark meta nav noscript object ol optgroup option p param picture pre q s samp script
    section select small source span strong style sub summary sup table tbody td template textarea tfoot th thead time
    title tr tt u ul var video wbr
""".split()
FLAGS = """
    async autofocus autoplay checked controls defer disabled hidden loop multiple muted nowrap open readonly required
    selected
""".split()
ATTRIBUTES = rf"(?P<attributes>\s++(?:(?:{'|'.join(FLAGS)})\b|[^<>=]*+=)[^<>]*+)?+"
TAG = re.compile(
    rf"<(?P<end>/?)(?P<name>{'|'.join(ELEMENTS)}){ATTRIBUTES}\s*+/?>|<!doctype[^<>]*+>",
    re.IGNORECASE,
)
WITHOUT_END = set("br hr img input link meta wbr li p td tr th dt dd option body html head tbody doctype".split())
BREAKING = set(
    """
    address article aside blockquote br caption dd div dl dt figure footer form h1 h2 h3 h4 h5 h6 header hr li main nav
    ol option p pre section summary table tbody tfoot thead title tr ul
""".split()
)
HTML_COMMENT = re.compile("<!--.*?-->", re.DOTALL)
BREAK = "\ufde1"  # a noncharacter that is no mark of hidden code
BREAKS = re.compile(rf"(?<![\s{BREAK}])\s*+{BREAK}[\s{BREAK}]*+")
TABLE_ROW = re.compile(r"^[ \t]*+\|[^\n]*+$", re.MULTILINE)


def clean_html(text):
    """The text of HTML, with a line end where a tag breaks the line, a star before a list item, and entities decoded.

    A text without a real tag stays as it is: "a<b" is not one, nor is one without attributes that nothing closes, as
    in vector<object>.
    """
    if "<" not in text or not TAG.search(text):
        return text
    last = text.rfind("-->") + 3  # search for comments only up to here: each that begins has an end, so it stays linear
    text = HTML_COMMENT.sub("", text[:last]) + text[last:] if last > 2 else text
    closed = {match["name"].lower() for match in TAG.finditer(text) if match["end"]}

    def replace(match):
        name = (match["name"] or "doctype").lower()
        if not (match["end"] or match["attributes"]) and name not in closed and name not in WITHOUT_END:
            return match.group()
        if name == "li" and not match["end"]:
            return BREAK + "*"
        if name in BREAKING:
            return BREAK
        return " " if name in ("td", "th") else ""

    # In a row of a Markdown table a break cannot be a line end.
    text = TABLE_ROW.sub(lambda row: re.sub(r"<br\s*+/?>", " ", row.group(), flags=re.IGNORECASE), text)
    without_tags = TAG.sub(replace, text)
    if without_tags == text:
        return text
    return html.unescape(BREAKS.sub("\n", without_tags)).strip()


NEWCOMMAND = re.compile(r"^[ \t]*\\newcommand\*?\{?(\\[A-Za-z]+)\}?\{(.*)\}[ \t]*(?:\n|\Z)", re.MULTILINE)
DEF = re.compile(r"^[ \t]*\\def\s*(\\[A-Za-z]+)\{(.*)\}[ \t]*(?:\n|\Z)", re.MULTILINE)
MACRO = re.compile(r"\\[A-Za-z]++(?![0-9])")


def expand_macro(text):
    """Replace LaTeX macros without arguments (\\newcommand, \\def) by their definitions, and take these out.

    A macro that is not used keeps its definition. Nothing changes if a macro is defined anew (\\renewcommand), or if
    the text would grow beyond twice its length plus 10,000 characters: then it is an attack, or not LaTeX.
    """
    if "\\renewcommand" in text:
        return text
    for name, pattern in (("\\newcommand", NEWCOMMAND), ("\\def", DEF)):
        macros = dict(pattern.findall(text)) if name in text else {}
        if macros:
            body = pattern.sub("", text)
            used = [macro for macro in MACRO.findall(body) if macro in macros]
            if sum(len(macros[macro]) for macro in used) <= 2 * len(text) + 10_000:
                used = set(used)
                text = pattern.sub(lambda match: "" if match[1] in used else match.group(), text)
                text = MACRO.sub(lambda match: macros[match.group()] if match.group() in used else match.group(), text)
    return text


# ----------------------------------------------------------------------------------------------------------------------
# What says nothing

LEADING = re.compile(r"""
    \s*+(?:
        (?P<kept>\#![^\n]*\n | \#[^\n]*coding[:=][^\n]*\n | <\?php\b[^\n]*\n)
      | /\*.*?\*/[ \t]*\n?
      | (?:[ \t]*(?://|--|\#(?![!\w]))[^\n]*(?:\n|\Z))++
    )""", re.VERBOSE | re.DOTALL)  # fmt: skip
COPYRIGHT = re.compile(
    r"copyright|\(c\) ?[0-9]{4}|©|all rights reserved|spdx-license|licensed (?:under|to)|permission is hereby granted"
    r"|redistribution and use|(?:under|see) the [^.]{0,60}licen[cs]e|general public licen[cs]e|版权|许可证",
    re.IGNORECASE,
)


def clean_copyright(text):
    """Remove the comments at the beginning of a program that state a copyright or a licence, each as a whole.

    Comments that say something else stay, and so does a line that names the interpreter or the encoding.
    """
    kept, at = "", 0
    while match := LEADING.match(text, at):
        at = match.end()
        if match["kept"] or not COPYRIGHT.search(match.group()):
            kept += match.group()
    return kept + text[at:]


SENTENCE_END = re.compile(r"""[。！？!?…]+[”’」』）)》】"']*+|\.(?![A-Za-z0-9])[”’)"']*+|\n""")
PAIRS = ("“”", "‘’", "「」", "『』", "（）", "()", "《》", "【】", "[]", '""')
SHORT_SENTENCE = 12  # characters, signs included: what is shorter is never a repeat
SHORT_LINE = 40  # characters: what is shorter may be a line of verse, or a title
ITEM = re.compile(r"\s*(?:[|>#]|[-*+•·]\s|[(（]?(?:\d{1,3}|[一二三四五六七八九十]{1,3})[.、．)）])")


def remove_repeat_sentences(text):
    """Of equal sentences in paragraphs, only the first stays: spam repeats itself.

    Not looked at are short sentences, items, rows of tables, code (hide_code), sentences with one half of a pair of
    quotes or brackets, and short lines, as verse has refrains; but no verse repeats more than half of itself. Lines are
    never joined; one that is left empty goes.
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text)] + [len(text)]
    sentences = [text[start:end].strip() for start, end in zip([0, *ends], ends)]
    sentences = [sentence for sentence in sentences if len(sentence) >= SHORT_SENTENCE]
    if len(set(sentences)) == len(sentences):
        return text
    lines = text.split("\n")
    shortest = SHORT_LINE if 2 * sum(map(len, set(lines))) >= sum(map(len, lines)) else SHORT_SENTENCE
    seen, kept = set(), []
    for line in lines:
        left = line
        if len(line) >= shortest and not ITEM.match(line) and "\ufdd0" not in line:
            left = "" if line in seen else without_seen_sentences(line, seen)
            seen.add(line)
        if left.strip() or not line.strip():
            kept.append(left)
    return "\n".join(kept)


def without_seen_sentences(line, seen):
    """The line without the sentences that are in `seen`, to which its own are added."""
    ends = [match.end() for match in SENTENCE_END.finditer(line)] + [len(line)]
    kept = []
    for start, end in zip([0, *ends], ends):
        sentence = line[start:end]
        key = sentence.strip()
        if len(key) < SHORT_SENTENCE or key not in seen or not is_balanced(key):
            kept.append(sentence)
            seen.add(key)
    return "".join(kept)


def is_balanced(sentence):
    """Whether each kind of quote or bracket opens as often as it closes."""
    return all(
        sentence.count(left) % 2 == 0 if left == right else sentence.count(left) == sentence.count(right)
        for left, right in PAIRS
    )
