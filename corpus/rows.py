"""Rows of .jsonl, .json and .parquet -> documents, by the fields that have a value.

    document = document_of({"messages": [{"role": "user", "content": "你好"}, ...]})

Known are the corpora that Steel-LLM (arXiv 2502.06635, section 2) was trained on, as their publishers ship them, and
the usual forms of chat and of pairs of answers. What belongs to a conversation is taken over or refused by name, never
left out in silence.
"""

import json
import re

from corpus.documents import ROLES, Document, join_lines, messages_of

MIN_UPVOTES = 100  # of an answer of Zhihu
SYSTEM = ("system", "system_prompt", "meta_instruction")  # fields of a row that hold a system turn
NOT_IN_TEMPLATE = ("tools", "tool_calls", "functions", "function_call", "reasoning_content")
OF_CHATS = {*SYSTEM, *NOT_IN_TEMPLATE, "history"}  # fields that any row of a chat may have


def document_of(row, folder=""):
    """A row, a dict or a str -> Document. ValueError for a malformed one.

    A field that is null or empty is as absent. folder: the name of the file's folder, which is the language of
    StarCoder's programs.
    """
    if isinstance(row, str):
        return Document(row)
    if not isinstance(row, dict):
        raise ValueError(f"no text in a row of type {type(row).__name__}")
    found = with_value(row)
    for chosen, rejected in ANSWERS:
        if (chosen in found) != (rejected in found) and {chosen, rejected} <= row.keys():
            raise ValueError(f"{chosen if chosen not in found else rejected} is empty: a pair needs two answers")
    for needed, optional, read_row in ROW_READERS:
        if needed <= found.keys():
            return read_row({name: found[name] for name in needed | optional if name in found}, folder)
    if any(needed <= row.keys() for needed, _, _ in ROW_READERS):
        return Document("")
    if row and all(isinstance(value, dict) for value in row.values()):
        raise ValueError("an object whose values are rows: expected an array of rows, or a row a line")
    raise ValueError(no_text_in(row))


def no_text_in(names):
    """What is said of a row, or of a table, whose fields are all unknown."""
    names = [short(name) for name in names]
    fields = ", ".join(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")
    return f"no text in fields {fields or '(none)'}; expected text, content, messages or those of a known corpus"


def with_value(row):
    """The fields that are neither null nor empty, also not as JSON."""
    return {name: value for name, value in row.items() if value not in (None, "", [], {}, "[]", "{}", "null")}


def short(value):
    """A value as it is quoted in a message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


# ----------------------------------------------------------------------------------------------------------------------
# Conversations


def chat(row, turns, format, dropped_by=""):
    """The conversation of a row: its system turn, its history, then turns, (role, text) pairs."""
    refuse_what_no_template_holds(row)
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f"history: expected [[question, answer], ...], found {short(history)}")
    turns = [*((role, text) for pair in history for role, text in zip(("user", "assistant"), pair)), *turns]
    for name in SYSTEM:
        if name in row:
            others = [text for role, text in turns if ROLES.get(str(role).lower()) == "system"]
            if others not in ([], [row[name]]):
                raise ValueError(f"{name} is not what the system turn says: keep one of them")
            turns = turns if others else [("system", row[name]), *turns]
    return Document(messages_of(turns), "chat", format, dropped_by)


def refuse_what_no_template_holds(fields):
    for name in NOT_IN_TEMPLATE:
        if name in fields:
            raise ValueError(f"{name}: the chat template has no place for it; remove the field to read the rest")


def turns_of(row, name):
    """The turns in a field, a list or its JSON -> (role, text) pairs."""
    turns = row[name]
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError:
            raise ValueError(f"{name}: expected a list of turns or its JSON, found {short(turns)}") from None
    if not isinstance(turns, list):
        raise ValueError(f"{name}: expected a list of turns, found {short(turns)}")
    return [pair for turn in turns for pair in pairs_of(turn, name)]


def pairs_of(turn, name):
    """{role, content} or {from, value} -> its (role, text); {human, assistant}, which are two turns -> both."""
    if isinstance(turn, dict):
        refuse_what_no_template_holds(with_value(turn))
        for role, content in (("role", "content"), ("from", "value")):
            if turn.get(role) and content in turn:
                return [(turn[role], text_of(turn[content]))]
        sides = [(side, text_of(turn[side])) for side in ("system", "human", "user", "assistant") if side in turn]
        if sides:
            return sides
    raise ValueError(f"{name}: expected turns as {{role, content}} or {{from, value}}, found {short(turn)}")


def text_of(content):
    """The content of a turn: a text, or parts of type text, one a line."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a part of type {short(kind)}: expected parts of type text only")
    return join_lines(*(part.get("text") for part in content))


# ----------------------------------------------------------------------------------------------------------------------
# Pairs of answers

PROMPTS = ("conversations", "prompt", "question", "instruction")  # fields that hold what is answered


def pair_in(*answers):
    """A reader of a prompt and two answers, each a text or turns; the turns of an answer may begin with the prompt."""

    def read(row, folder):
        name = next((name for name in PROMPTS if name in row), None)
        if name is None:
            prompt = []
        elif isinstance(row[name], list) or name == "conversations":
            prompt = turns_of(row, name)
        else:
            prompt = [("user", join_lines(row[name], row.get("input")))]
        sides = [chat(row, answered(prompt, row, name), "").content for name in answers]
        return pair_of(*sides)

    return read


def answered(prompt, row, name):
    """The turns of a prompt and of the answer in a field. ValueError where the field has another prompt."""
    if isinstance(row[name], str):
        return [*prompt, ("assistant", row[name])]
    turns = pairs_of(row[name], name) if isinstance(row[name], dict) else turns_of(row, name)
    whole = messages_of(turns)
    if all(message["role"] == "assistant" for message in whole):
        return [*prompt, *turns]
    if any(message not in whole for message in messages_of(prompt)):
        raise ValueError(f"{name} does not begin with the prompt of its row")
    return turns


def pair_of(chosen, rejected):
    """Two chats that differ in their last answer -> the Document of their pair. ValueError for any others."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"{name}: expected an answer at its end")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected answer different prompts")
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal")
    if all(message["role"] != "user" for message in chosen):
        raise ValueError("chosen and rejected: expected a prompt before the answers")
    answers = [messages[-1] | {"role": role} for role, messages in (("chosen", chosen), ("rejected", rejected))]
    return Document([*chosen[:-1], *answers], "pair", "pairs")


# ----------------------------------------------------------------------------------------------------------------------
# A reader for each form: (the fields that have a value, folder) -> Document


def turns_in(name, format):
    """A reader of chats whose turns are in one field."""
    return lambda row, folder: chat(row, turns_of(row, name), format)


def exchange(question, answer, format, more=None):
    """A reader of one question and its answer, each a text or a list of turns. more: a field added to the question."""

    def read(row, folder):
        turns = []
        for role, name in (("user", question), ("assistant", answer)):
            turns += turns_of(row, name) if isinstance(row[name], list) else [(role, row[name])]
        if more in row:
            turns[0] = ("user", join_lines(turns[0][1], row[more]))
        return chat(row, turns, format)

    return read


def wanjuan_exam(row, folder):
    options = [f"{letter.upper()}. {row[key]}" for letter in "abcde" if (key := f"option_{letter}") in row]
    fields = (row["q_main"], join_lines(*options), row.get("std_ans"), row.get("answer_detail"))
    fields = [join_lines(field) for field in fields]
    return Document([{"role": role, "content": text} for role, text in zip(EXAM, fields)], "exam", "wanjuan_exam")


EXAM = ("question", "options", "answer", "explanation")  # roles of an exam's messages
EXAM_FORMS = ("text", "chat", "reasoning")


def exam_as(document, form):
    """The Document of an exam question in a form: a text, or a chat in Steel-LLM's template (its sft/convert scripts).

    chat answers and then explains; reasoning explains and then answers. Without an explanation both only answer.
    """
    question, options, answer, explanation = (message["content"] for message in document.content)
    labels = ("标准答案：" + answer if answer else "", "解析：" + explanation if explanation else "")
    if form == "text" or not answer:
        return Document(join_lines(question, options, *labels), format=document.format)
    explains_first = form == "reasoning" and explanation
    request = "请先给出解释再给出答案。" if explains_first else "请给出答案。"
    asked = join_lines("以下是一道单选题:" if options else "以下是一道题:", question, options, request)
    said = f"{explanation}答案为{answer}" if explains_first else f"{answer}。{explanation}"
    return Document(messages_of([("user", asked), ("assistant", said)]), "chat", document.format)


def baike(row, folder):
    parts = [row["title"], row.get("summary")]
    for section in row.get("sections", []):
        if not isinstance(section, dict):
            raise ValueError(f"sections: expected {{title, content}}, found {short(section)}")
        parts += [section.get("title"), section.get("content")]
    return Document(join_lines(*parts), format="baike")


def baidu_qa(row, folder):
    title, details = join_lines(row["title"]).strip(), join_lines(row.get("desc")).strip()
    question = join_lines(title, details)
    if title in details or details in title:
        question = max(title, details, key=len)
    return chat(row, [("user", question), ("assistant", row["answer"])], "baidu_qa")


def zhihu(row, folder):
    unpopular = "upvotes" if upvotes(row.get("METADATA")) < MIN_UPVOTES else ""
    return chat(row, [("user", row["INSTRUCTION"]), ("assistant", row["RESPONSE"])], "zhihu", unpopular)


def upvotes(metadata):
    """The number in Zhihu's METADATA, JSON with "upvotes": 123, "赞同 123", "赞同 1.5 万", or "赞同" for none."""
    try:
        fields = json.loads(metadata) if isinstance(metadata, str) else metadata or {}
        number = re.search(r"([\d.,]+)\s*([万kK]?)", str(fields.get("upvotes", "")))
        return float(number[1].replace(",", "")) * {"": 1, "万": 10_000}.get(number[2], 1000) if number else 0
    except (ValueError, AttributeError):
        raise ValueError(f'METADATA: expected JSON with "upvotes", found {short(metadata)}') from None


def code_or_text(row, folder):
    content = join_lines(row["content"])
    code = STARCODER_TAGS.sub("", content)
    if len(code) < len(content) or STARS & row.keys():
        return Document(code, "code", f"starcoder-{folder}")
    refuse_what_no_template_holds(row)
    return Document(content)


STARCODER_TAGS = re.compile(r"\A(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?")
OPTIONS = {f"option_{letter}" for letter in "abcde"}
ANSWERS = [("chosen", "rejected"), ("chosen_response", "rejected_response")]
STARS = {"max_stars_repo_name", "max_stars_repo_path", "max_stars_count"}

# (fields that must have a value, fields that may have one, reader). The first whose fields have values reads the row;
# it sees no other fields, and of a .parquet file no other columns are read.
ROW_READERS = [
    *(({*answers}, {*PROMPTS, "input", *OF_CHATS}, pair_in(*answers)) for answers in ANSWERS),
    ({"q_main"}, {*OPTIONS, "std_ans", "answer_detail"}, wanjuan_exam),
    ({"title", "sections"}, {"summary"}, baike),
    ({"question", "answer"}, OF_CHATS, exchange("question", "answer", "qa")),
    ({"title", "answer"}, {"desc", *OF_CHATS}, baidu_qa),
    ({"INSTRUCTION", "RESPONSE"}, {"METADATA"}, zhihu),
    ({"instruction", "output"}, {"input", *OF_CHATS}, exchange("instruction", "output", "instruction", "input")),
    (
        {"instruction", "response"},
        {"context", *OF_CHATS},
        exchange("instruction", "response", "instruction", "context"),
    ),
    ({"input", "output"}, OF_CHATS, exchange("input", "output", "instruction")),
    ({"kind", "input", "target"}, OF_CHATS, exchange("input", "target", "firefly")),
    ({"messages"}, OF_CHATS, turns_in("messages", "messages")),
    ({"conversations"}, OF_CHATS, turns_in("conversations", "conversations")),
    ({"conversation"}, OF_CHATS, turns_in("conversation", "moss")),
    ({"query", "response"}, OF_CHATS, exchange("query", "response", "qa")),
    ({"prompt", "response"}, OF_CHATS, exchange("prompt", "response", "qa")),
    ({"prompt", "completion"}, OF_CHATS, exchange("prompt", "completion", "qa")),
    ({"completion", "source"}, set(), lambda row, folder: Document(join_lines(row["completion"]), format="wikipedia")),
    ({"content"}, {*STARS, "reasoning_content"}, code_or_text),
    ({"text"}, set(), lambda row, folder: Document(join_lines(row["text"]))),
    ({"title", "summary"}, set(), baike),
]
FIELDS = set().union(*(needed | optional for needed, optional, _ in ROW_READERS))
