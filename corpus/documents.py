"""Document: a text, a program, a conversation or a pair of answers.

document = Document([{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}], "chat")
document = document.map(str.strip)              # of a chat: each message
document == Document.from_json(document.to_json())
"""

import hashlib
import json
from typing import NamedTuple

import numpy as np

MAX_NAME = 200  # bytes of the name of a source; a shard's name adds up to 40
JSON = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one at each call


class Document(NamedTuple):
    """A text, a program, a conversation or a pair of answers.

    content      the text, or the messages of a chat: [{"role": system, user or assistant, "content": text}, ...]; those
                 of a pair end with two answers to the same, of the roles chosen and rejected
    kind         text, code, chat, pair, or exam (a question that rows.exam_as makes a text or a chat)
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

    def asked_and_said(self):
        """What near copies have in common, and what may differ a little: "" and the text, or of a chat what it answers
        (all but the assistant's messages) and the answers."""
        if isinstance(self.content, str):
            return "", self.content
        parts = {False: [], True: []}
        for message in self.content:
            parts[message["role"] in ("assistant", "chosen", "rejected")].append(message["content"])
        return tuple("\n".join(texts) for texts in parts.values())

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
        pairs = ((message["role"], message["content"]) for message in self.content)
        return Document(messages_of(pairs, dict(zip(OURS, OURS))), *self[1:])

    def answered(self, role):
        """Of a pair, the chat that ends with its answer of a role, chosen or rejected."""
        *prompt, chosen, rejected = self.content
        return [*prompt, (chosen if role == "chosen" else rejected) | {"role": "assistant"}]

    def encode(self, tokenizer):
        """-> ids [n] uint32 and, but for text and code, which of them count in the loss [n] uint8, else None.

        A pair is two chats with an end of document between them; of each the last answer counts.
        """
        if isinstance(self.content, str):
            return tokenizer.encode_array(self.content), None
        if self.kind == "pair":
            n = len(tokenizer.encode_chat(self.content[:-2])[0])  # tokens of what is answered
            sides = [tokenizer.encode_chat(self.answered(role)) for role in ("chosen", "rejected")]
            (ids, mask), (other_ids, other_mask) = ((ids, [0] * n + mask[n:]) for ids, mask in sides)
            ids, mask = [*ids, tokenizer.eos_id, *other_ids], [*mask, 0, *other_mask]
        else:
            ids, mask = tokenizer.encode_chat(self.content)
        return np.array(ids, dtype=np.uint32), np.array(mask, dtype=np.uint8)

    def source(self, name):
        """The name of its source, given that of the input: a known corpus is a source of its own.

        It goes into names of files, which hold 255 bytes: a long one is cut, and ends with a hash of the whole.
        """
        name = f"{name}-{self.format}" if self.format else name
        content = name.encode("utf-8")
        if len(content) <= MAX_NAME:
            return name
        return content[: MAX_NAME - 9].decode("utf-8", errors="ignore") + "-" + hashlib.sha256(content).hexdigest()[:8]

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


OURS = ("system", "user", "assistant", "chosen", "rejected")
ROLES = {  # names of roles in a chat -> ours
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


def messages_of(pairs, roles=ROLES):
    """(role, text) pairs -> messages. Consecutive texts of one role become one message, empty ones are dropped.

    roles: names -> ours; ValueError for another name.
    """
    turns = []  # [role, its texts]
    for name, text in pairs:
        role = roles.get(str(name).lower())
        if role is None:
            raise ValueError(f"a turn of {name!r}, expected one of {', '.join(roles)}: leave such conversations out")
        if join_lines(text):
            if not turns or turns[-1][0] != role:
                turns.append((role, []))
            turns[-1][1].append(text)
    return [{"role": role, "content": join_lines(*texts)} for role, texts in turns]


def join_lines(*texts):
    """The texts that are not empty or None, one a line. ValueError for anything else."""
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"expected text, found {str(text)[:40]}")
    return "\n".join(text for text in texts if text)
