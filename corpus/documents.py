"""Document: a text, a program or a conversation. And how a row of a corpus becomes one, by the fields that it has.

The corpora are those that Steel-LLM (arXiv 2502.06635, section 2) was trained on, as their publishers ship them, and
the usual forms of chat.

    document = document_of({"messages": [{"role": "user", "content": "你好"}, ...]})
    document = document.map(str.strip)              # of a chat: each message
    document == Document.from_json(document.to_json())
"""

import hashlib
import json
import re
from typing import NamedTuple

MIN_UPVOTES = 100  # of an answer of Zhihu
JSON = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one at each call


class Document(NamedTuple):
    """A text, a program or a conversation.

    content      the text, or the messages of a chat: [{"role": system, user or assistant, "content": text}, ...]
    kind         text, code or chat
    format       the known corpus that the row is from: it becomes part of the source's name
    dropped_by   why it is dropped before any operator sees it
    problem      why the row is malformed; content is then what was read
    """

    content: str | list
    kind: str = "text"
    format: str = ""
    dropped_by: str = ""
    problem: str = ""

    @property
    def text(self):
        """The document as one string, without roles: what filters and fingerprints see."""
        return self.content if isinstance(self.content, str) else "\n".join(m["content"] for m in self.content)

    @property
    def roles(self):
        """The set of roles that speak. Text and code are the assistant's: a model learns to write all of them."""
        if isinstance(self.content, str):
            return {"assistant"}
        return {message["role"] for message in self.content}

    def map(self, function):
        """The document with function (str -> str) applied to each of its texts."""
        if isinstance(self.content, str):
            return Document(function(self.content), *self[1:])
        return Document([message | {"content": function(message["content"])} for message in self.content], *self[1:])

    def merge_turns(self):
        """A chat without empty messages, consecutive ones of one role joined. Text and code stay as they are."""
        if isinstance(self.content, str):
            return self
        return Document(messages_of((message["role"], message["content"]) for message in self.content), *self[1:])

    def source(self, name):
        """The name of its source, given that of the input: a known corpus is a source of its own."""
        return f"{name}-{self.format}" if self.format else name

    def digest(self):
        """sha256 of the text, or of a chat's messages as JSON, 32 bytes: equal for equal documents."""
        content = self.content if isinstance(self.content, str) else JSON.encode(self.content)
        return hashlib.sha256(content.encode("utf-8")).digest()

    def to_json(self):
        """The document on one line."""
        return JSON.encode([self.kind, self.format, self.content])

    @classmethod
    def from_json(cls, line):
        """The document that to_json wrote."""
        kind, format, content = json.loads(line)
        return cls(content, kind, format)


# ----------------------------------------------------------------------------------------------------------------------
# Rows: (a dict, the name of its file's folder) -> Document


def document_of(row, folder=""):
    """A row of .jsonl, .json or .parquet, a dict or a str -> Document.

    folder: the name of the file's folder, which is the language of StarCoder's programs. A malformed row raises
    ValueError, TypeError, KeyError or AttributeError.
    """
    if isinstance(row, str):
        return Document(row)
    if not isinstance(row, dict):
        raise ValueError(f"no text in a row of type {type(row).__name__}")
    for fields, read_row in ROW_READERS:
        if fields <= row.keys():
            return read_row(row, folder)
    expected = "expected text, content, messages or those of a known corpus"
    raise ValueError(f"no text in fields {', '.join(map(str, row))}; {expected}")


def wanjuan_exam(row, folder):
    options = [f"{letter.upper()}. {row[key]}" for letter in "abcde" if row.get(key := f"option_{letter}")]
    labels = (("标准答案：", "std_ans"), ("解析：", "answer_detail"))
    answers = [label + row[key] for label, key in labels if row.get(key)]
    return Document(join_lines(row["q_main"], *options, *answers), format="wanjuan_exam")


def baike(row, folder):
    sections = [part for section in row["sections"] or [] for part in (section["title"], section["content"])]
    return Document(join_lines(row["title"], row.get("summary"), *sections), format="baike")


def baidu_qa(row, folder):
    title, details = join_lines(row["title"]).strip(), join_lines(row.get("desc")).strip()
    question = join_lines(title, details)
    if title in details or details in title:
        question = max(title, details, key=len)
    return Document(exchange(question, row["answer"]), "chat", "baidu_qa")


def zhihu(row, folder):
    unpopular = "upvotes" if upvotes(row.get("METADATA")) < MIN_UPVOTES else ""
    return Document(exchange(row["INSTRUCTION"], row["RESPONSE"]), "chat", "zhihu", unpopular)


def instruction(row, folder):
    question = join_lines(row["instruction"], row.get("input"))
    return Document(exchange(question, row["output"]), "chat", "instruction")


def firefly(row, folder):
    return Document(exchange(row["input"], row["target"]), "chat", "firefly")


def sharegpt(row, folder):
    turns = ((turn["from"], turn["value"]) for turn in row["conversations"])
    return Document(messages_of(turns), "chat", "conversations")


def moss(row, folder):
    pairs = ((side, turn.get(side)) for turn in row["conversation"] for side in ("human", "assistant"))
    return Document(messages_of(pair for pair in pairs if pair[1] is not None), "chat", "moss")


def openai_messages(row, folder):
    turns = ((turn["role"], turn["content"]) for turn in row["messages"])
    return Document(messages_of(turns), "chat", "messages")


def wikipedia(row, folder):
    return Document(join_lines(row["completion"]), format="wikipedia")


def starcoder_or_text(row, folder):
    content = join_lines(row["content"])
    code = STARCODER_TAGS.sub("", content)
    if len(code) < len(content) or any(name.startswith("max_stars") for name in row):
        return Document(code, "code", f"starcoder-{folder}")
    return Document(content)


def plain_text(row, folder):
    return Document(join_lines(row["text"]))


# A row is read by the first of these whose fields it has.
ROW_READERS = [
    ({"q_main"}, wanjuan_exam),
    ({"title", "sections"}, baike),
    ({"title", "answer"}, baidu_qa),
    ({"INSTRUCTION", "RESPONSE"}, zhihu),
    ({"instruction", "output"}, instruction),
    ({"kind", "input", "target"}, firefly),
    ({"conversations"}, sharegpt),
    ({"conversation"}, moss),
    ({"messages"}, openai_messages),
    ({"completion", "source"}, wikipedia),
    ({"content"}, starcoder_or_text),
    ({"text"}, plain_text),
]
STARCODER_TAGS = re.compile(r"\A(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?")
ROLES = {  # names of roles -> ours
    "human": "user",
    "user": "user",
    "system": "system",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def join_lines(*texts):
    """The texts that are not empty or None, one a line. ValueError for anything else."""
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"expected text, found {json.dumps(text, ensure_ascii=False)[:40]}")
    return "\n".join(text for text in texts if text)


def exchange(question, answer):
    """The messages of one question and its answer."""
    return messages_of([("user", question), ("assistant", answer)])


def messages_of(pairs):
    """(role, text) pairs -> messages. Consecutive texts of one role become one message, empty ones are dropped.

    Roles may have any of the names in ROLES; ValueError for another.
    """
    turns = []  # [role, its texts]
    for name, text in pairs:
        role = ROLES.get(str(name).lower())
        if role is None:
            raise ValueError(f"a turn of {name!r}, expected one of {', '.join(ROLES)}")
        if join_lines(text):
            if not turns or turns[-1][0] != role:
                turns.append((role, []))
            turns[-1][1].append(text)
    return [{"role": role, "content": join_lines(*texts)} for role, texts in turns]


def upvotes(metadata):
    """The number in Zhihu's METADATA, JSON with "upvotes": 123, "赞同 123", "赞同 1.5 万", or "赞同" for none."""
    fields = json.loads(metadata) if isinstance(metadata, str) else metadata or {}
    number = re.search(r"([\d.,]+)\s*([万kK]?)", str(fields.get("upvotes", "")))
    if not number:
        return 0
    return float(number[1].replace(",", "")) * {"": 1, "万": 10_000}.get(number[2], 1000)
