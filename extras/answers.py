"""The letter or the number in an answer in words.

letter_in, last_number   rules of our own
STEEL                    how Steel-LLM asks and reads (eval/ of its repository; the rules are those of Qwen for C-Eval
                         and of CMMLU's authors), so that percentages can be compared with its own: --score steel
"""

import re
from decimal import Decimal
from typing import Callable, NamedTuple

LETTERS = "ABCD"


def letter_in(text):
    """The letter that an answer in words names, or None: after 答案 or "answer", else the first that is a word."""
    return first_group(
        text, r"(?:答案|[Aa]nswer)[^A-Z\n]{0,10}([A-D])(?![A-Za-z])", r"(?<![A-Za-z])([A-D])(?![A-Za-z])"
    )


def last_number(text):
    """The last number of a text, without commas and trailing zeros, or None: 1,200.50 -> 1200.5."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return format(Decimal(numbers[-1].replace(",", "")).normalize(), "f") if numbers else None


def first_group(text, *patterns):
    """The group of the first pattern that the text matches anywhere, or None."""
    return next((found[1] for pattern in patterns if (found := re.search(pattern, text))), None)


# ----------------------------------------------------------------------------------------------------------------------
# Steel-LLM's C-Eval

SOME = "[^ABCD]"  # anything but a letter of an option
IS = "(?:[是选为：:】])"
RIGHT = "(?:正确|对[的，。：]|符合)"
END = "(?:选项)?(?:[A-D。.．，,、：:)）]|$)"
CEVAL_RULES = (
    # 选A。 答案是A。 选项为A。 but not 答案不是A
    rf"(?:选[择定]?[：:]?\s*"
    rf"|(?:答案|选项)(?!{SOME}{{0,10}}?[不非]{SOME}{{0,10}}?{IS}){SOME}{{0,10}}?{IS}{SOME}{{0,10}}?)([A-D]){END}",
    # A项正确, A符合题意, but not A不正确
    rf"([A-D])(?:选?项)?(?!{SOME}{{0,4}}?[不非]{SOME}{{0,4}}?{RIGHT}){SOME}{{0,4}}?{RIGHT}",
    r"^[(（]?([A-D])(?:[。.．，,：:)）]|$)",
    rf"最终答案是{SOME}{{0,10}}?([A-D]){END}",
    r"(?<![a-zA-Z])([A-D])(?![a-zA-Z=])",
)


def ceval_letter(text, question):
    """Stem and options that an answer repeats become 答案是 and letters. No letter: that of the most similar option."""
    stem = question.text.rstrip("。").split("。")[-1].split("_")
    for part, becomes in ((stem[0], "答案是"), (stem[-1], "")):
        if len(part.strip()) > 4:
            text = text.replace(part, becomes)
    for letter, option in sorted(zip(LETTERS, question.options), key=lambda pair: len(pair[1]), reverse=True):
        text = text.replace(option.rstrip("。"), letter)
    return first_group(text, *CEVAL_RULES) or LETTERS[most_similar(text, question.options)]


def most_similar(text, options):
    """The index of the option that is most similar to a text, by thefuzz, as in the original."""
    try:
        from thefuzz import process
    except ImportError:
        raise ValueError("--score steel compares answers with options by thefuzz: pip install thefuzz") from None
    return options.index(process.extractOne(text, options)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Steel-LLM's CMMLU

CMMLU_RULES = (
    r"^([A-D])",
    r"答案(?:选项)?[是为]：? ?([A-D])",
    r"答案[是为]选项 ?([A-D])",
    r"选择?：? ?([A-D])",
    r"([A-D]) ?选?项[是为]?正确",
    r"正确的?选项[是为] ?([A-D])",
    r"答案应该[是为]([A-D])",
    r"选项 ?([A-D]) ?[是为]?正确",
    r"选择答案 ?([A-D])",
    r"答案?：?([A-D])",
    r"([A-D])(?:选?项)?是?符合题意",
    r"答案选项：? ?([A-D])",
    r"答案(?:选项)?为.*?([A-D])",
    r"([A-D])[^A-D]*?当选",  # the last letter before the first 当选
    r"([A-D])[^A-D]*?正确",
    r"[^不]是：? ?([A-D])",
    r"^[^A-D]*([A-D])[^A-D]*$",  # the only letter
)


def cmmlu_letter(text, question):
    """The letter in an answer, or None. (The original then draws one at random.)"""
    return first_group(text.replace("\n", ""), *CMMLU_RULES)


class Steel(NamedTuple):
    """How Steel-LLM asks and reads one benchmark."""

    gap: tuple  # (a gap in a question, what stands there instead)
    new_tokens: int  # the most tokens of an answer
    letter: Callable  # (answer, Question) -> letter or None


STEEL = {"ceval": Steel(("____。", "( )"), 1024, ceval_letter), "cmmlu": Steel(("____", ""), 64, cmmlu_letter)}
