"""Rows: those of every corpus as its publisher ships it, the usual forms of chat, and what malformed ones get."""

import json

import pytest

from corpus.documents import Document
from corpus.rows import FIELDS, document_of


def messages(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def chat(format, *contents, dropped_by="", first="user"):
    return Document(messages(*contents, first=first), "chat", format, dropped_by)


def zhihu(upvotes):
    return {"INSTRUCTION": "问", "RESPONSE": "答", "SOURCE": "Zhihu", "METADATA": json.dumps({"upvotes": upvotes})}


def conversation(*turns):
    return {"id": "16012449", "conversations": [{"from": side, "value": text} for side, text in turns]}


EXAM = {
    "id": "1",
    "q_type": "单选题",
    "q_main": "一加一等于几？",
    "option_a": "1",
    "option_b": "2",
    "option_c": "3",
    "option_d": "4",
    "option_e": None,
    "std_ans": "B",
    "answer_detail": "算术。",
    "grade": None,
}
SECTIONS = [{"title": "形态", "content": "红色。"}, {"title": "用途", "content": "入药。"}]
SYSTEM = {"role": "system", "content": "简短。"}
STARCODER = {
    "max_stars_repo_path": "a.py",
    "max_stars_repo_name": "u/r",
    "max_stars_count": 3,
    "id": "1",
    "content": "<reponame>u/r<filename>a.py\nimport os\n",
}

ROWS = {
    "plain": ({"text": "天地玄黄"}, Document("天地玄黄")),
    "skypile with more fields": ({"text": "天地玄黄", "meta": {"url": "u"}}, Document("天地玄黄")),
    "a string": ("天地玄黄", Document("天地玄黄")),
    "wanjuan": ({"id": "BkQQ", "content": "天地玄黄"}, Document("天地玄黄")),
    "wanjuan exam": (
        EXAM,
        Document("一加一等于几？\nA. 1\nB. 2\nC. 3\nD. 4\n标准答案：B\n解析：算术。", format="wanjuan_exam"),
    ),
    "wanjuan exam without options": (
        {"q_main": "何谓道？", "option_a": None, "option_b": "", "std_ans": "不可说", "answer_detail": None},
        Document("何谓道？\n标准答案：不可说", format="wanjuan_exam"),
    ),
    "wikipedia": (
        {"completion": "昭通机场是中国的机场。", "source": "wikipedia.zh2307"},
        Document("昭通机场是中国的机场。", format="wikipedia"),
    ),
    "baike": (
        {"title": "红花", "summary": "一种花。", "sections": SECTIONS, "tags": ["花"], "url": "http://a"},
        Document("红花\n一种花。\n形态\n红色。\n用途\n入药。", format="baike"),
    ),
    "baike without a summary": (  # Steel-LLM's converter loses such a page
        {"title": "红花", "summary": None, "sections": SECTIONS[:1], "tags": [], "url": "u"},
        Document("红花\n形态\n红色。", format="baike"),
    ),
    "baidu qa": (
        {
            "qid": "q1",
            "category": "教育",
            "title": "人站在地球上为什么没有头朝下的感觉？",
            "desc": "",
            "answer": "因为引力。",
        },
        chat("baidu_qa", "人站在地球上为什么没有头朝下的感觉？", "因为引力。"),
    ),
    "baidu qa with a description": (  # Steel-LLM's converter loses it
        {"qid": "q1", "title": "怎么办？", "desc": "电脑打不开了", "answer": "重启。"},
        chat("baidu_qa", "怎么办？\n电脑打不开了", "重启。"),
    ),
    "baidu qa with a description that says it all": (
        {"qid": "q1", "title": "怎么办？ ", "desc": " 电脑打不开了，怎么办？", "answer": "重启。"},
        chat("baidu_qa", "电脑打不开了，怎么办？", "重启。"),
    ),
    "baidu qa with a description that says no more": (
        {"qid": "q1", "title": "电脑打不开了怎么办？", "desc": "电脑打不开了", "answer": "重启。"},
        chat("baidu_qa", "电脑打不开了怎么办？", "重启。"),
    ),
    "zhihu": (zhihu("赞同 123"), chat("zhihu", "问", "答")),
    "zhihu, many votes": (
        zhihu("赞同 1.5 万"),
        chat("zhihu", "问", "答"),
    ),  # Steel-LLM's converter loses the best answers
    "zhihu, few votes": (zhihu("赞同 99"), chat("zhihu", "问", "答", dropped_by="upvotes")),
    "zhihu, no votes": (zhihu("赞同"), chat("zhihu", "问", "答", dropped_by="upvotes")),
    "belle 2M": (
        {"instruction": "翻译：", "input": "早上好", "output": "Good morning"},
        chat("instruction", "翻译：\n早上好", "Good morning"),
    ),
    "alpaca without input": (
        {"instruction": "写诗", "input": "", "output": "床前明月光"},
        chat("instruction", "写诗", "床前明月光"),
    ),
    "belle 3.5M": (
        conversation(("human", "你好"), ("assistant", "您好"), ("human", "再见")),
        chat("conversations", "你好", "您好", "再见"),
    ),
    "turns that do not alternate": (  # pairing by position would give the second question the first answer
        conversation(("human", "一"), ("human", "二"), ("assistant", "答")),
        chat("conversations", "一\n二", "答"),
    ),
    "sharegpt that begins with the answer": (
        conversation(("gpt", "答"), ("human", "问")),
        chat("conversations", "答", "问", first="assistant"),
    ),
    "firefly": ({"kind": "NER", "input": "找出地名", "target": "荆州。"}, chat("firefly", "找出地名", "荆州。")),
    "moss": (
        {
            "conversation_id": 1,
            "conversation": [{"human": "问一", "assistant": "答一"}, {"human": "问二", "assistant": "答二"}],
        },
        chat("moss", "问一", "答一", "问二", "答二"),
    ),
    "openai": (
        {"messages": [SYSTEM, *messages("问", "答")]},
        Document([SYSTEM, *messages("问", "答")], "chat", "messages"),
    ),
    "starcoder": (STARCODER, Document("import os\n", "code", "starcoder-python")),
    "starcoder with stars": (
        {"content": "<gh_stars>10-100\na < b > c"},
        Document("a < b > c", "code", "starcoder-python"),
    ),
    "an answer that ends in a mark keeps it": (
        {"instruction": "说", "output": "</s>好的</s>"},
        chat("instruction", "说", "</s>好的</s>"),
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_every_corpus(name):
    row, expected = ROWS[name]
    assert document_of(row, "python") == expected


CHATS = {  # each is the question 问 and its answer 答
    "messages": {"messages": messages("问", "答")},
    "messages with from and value": {"messages": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
    "messages as JSON": {"messages": json.dumps(messages("问", "答"))},
    "messages of parts": {"messages": messages([{"type": "text", "text": "问"}], [{"type": "text", "text": "答"}])},
    "messages and the text that they make": {"messages": messages("问", "答"), "text": "<user>问<assistant>答"},
    "conversations": {"conversations": messages("问", "答")},
    "conversations as JSON": {"conversations": json.dumps(messages("问", "答"), ensure_ascii=False)},
    "conversation": {"conversation": messages("问", "答")},
    "sides": {"conversation": [{"human": "问", "assistant": "答"}]},
    "question and answer": {"question": "问", "answer": "答", "id": 3},
    "question and answer with a title": {"title": "题", "question": "问", "answer": "答"},
    "query and response": {"query": "问", "response": "答"},
    "prompt and response": {"prompt": "问", "response": "答"},
    "prompt and completion": {"prompt": "问", "completion": "答"},
    "prompt and completion of turns": {"prompt": messages("问"), "completion": messages("答", first="assistant")},
    "instruction and response": {"instruction": "问", "context": "", "response": "答"},
    "fields without a value": {
        "messages": [],
        "text": None,
        "content": "",
        "tools": "[]",
        "instruction": "问",
        "output": "答",
    },
}


@pytest.mark.quick
@pytest.mark.parametrize("name", CHATS)
def test_every_form_of_a_chat(name):
    document = document_of(CHATS[name])
    assert (document.content, document.kind) == (messages("问", "答"), "chat")


@pytest.mark.quick
def test_what_belongs_to_a_conversation_is_taken_over():
    system = {"role": "system", "content": "简短。"}
    row = {"instruction": "问", "output": "答", "system": "简短。", "history": [["甲", "乙"], ["丙", "丁"]]}
    assert document_of(row).content == [system, *messages("甲", "乙", "丙", "丁", "问", "答")]
    for name in ("system", "system_prompt", "meta_instruction"):
        for turns in ({"conversations": messages("问", "答")}, {"conversation": [{"human": "问", "assistant": "答"}]}):
            assert document_of({name: "简短。", **turns}).content == [system, *messages("问", "答")]
    row = {"system": "简短。", "messages": [system, *messages("问", "答")]}
    assert document_of(row).content == [system, *messages("问", "答")]
    assert document_of({"instruction": "翻译", "context": "早", "response": "a"}).content == messages("翻译\n早", "a")


@pytest.mark.quick
def test_a_kind_is_told_from_values():
    for empty in (None, "", [], {}):
        for name in ("messages", "content", "q_main", "conversations", "conversation"):
            assert document_of({name: empty, "text": "正文"}) == Document("正文")
        assert document_of({"title": "题", "answer": empty, "text": "正文"}) == Document("正文")
        assert document_of({"content": "正文", "text": empty}) == Document("正文")
        assert document_of({"text": empty}) == document_of({"question": "问", "answer": empty}) == Document("")
    assert document_of({"title": "题", "summary": "提要", "sections": []}) == Document("题\n提要", format="baike")


USER, ANSWER = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
MALFORMED = [
    ({"title": "a", "body": "b"}, "no text in fields title, body; expected text, content, messages"),
    ({}, "no text in fields (none); expected"),
    ({f"field{i}": i for i in range(3000)}, "field7 and 2,992 more; expected text"),
    ({str(i): {"text": "一"} for i in range(3000)}, "an object whose values are rows: expected an array of rows"),
    ([1, 2], "no text in a row of type list"),
    ({"text": 7}, "expected text, found 7"),
    ({"text": b"x"}, "expected text, found b'x'"),
    ({"instruction": 3, "output": "答"}, "expected text, found 3"),
    ({"title": "题", "sections": ["文"]}, "sections: expected {title, content}, found 文"),
    ({"title": "题", "sections": [{"title": 3}]}, "expected text, found 3"),
    ({"INSTRUCTION": "问", "RESPONSE": "答", "METADATA": "赞同"}, 'METADATA: expected JSON with "upvotes", found 赞同'),
    ({"conversations": [{"from": "narrator", "value": "a"}]}, "a turn of 'narrator', expected one of human, user"),
    ({"messages": [USER, {"role": "tool", "content": "3"}, ANSWER]}, "a turn of 'tool', expected one of"),
    ({"messages": 3}, "messages: expected a list of turns, found 3"),
    ({"messages": "你好"}, "messages: expected a list of turns or its JSON, found 你好"),
    ({"messages": '{"role": "user"}'}, "messages: expected a list of turns, found {'role': 'user'}"),
    ({"conversations": ["问", "答"]}, "conversations: expected turns as {role, content} or {from, value}, found 问"),
    ({"messages": [{"role": "user", "text": "问"}]}, "expected turns as {role, content} or {from, value}"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "a part of type image_url: expected parts of",
    ),
    ({"messages": [{"role": "user", "content": ["问"]}]}, "a part of type 问: expected parts of type text only"),
    ({"messages": [{"role": "user", "content": 3}]}, "expected text, found 3"),
    (
        {"instruction": "问", "output": "答", "history": ["甲"]},
        "history: expected [[question, answer], ...], found ['甲']",
    ),
    ({"instruction": "问", "output": "答", "history": "甲"}, "history: expected [[question, answer], ...], found 甲"),
    (
        {"system": "短", "messages": [{"role": "system", "content": "长"}, USER]},
        "system is not what the system turn says",
    ),
    (
        {"messages": [USER, ANSWER | {"reasoning_content": "想"}]},
        "reasoning_content: the chat template has no place for it",
    ),
    ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, "tool_calls: the chat template has no place"),
    ({"input": "问", "reasoning_content": "想", "content": "答"}, "reasoning_content: the chat template has no place"),
    ({"conversations": [USER, ANSWER], "tools": '[{"name": "f"}]'}, "tools: the chat template has no place"),
    ({"prompt": "问", "chosen": "答", "rejected": "不"}, "chosen and rejected, a pair of answers: expected a text"),
]


@pytest.mark.quick
@pytest.mark.parametrize("row, words", MALFORMED)
def test_a_malformed_row_says_what_is_wrong(row, words):
    with pytest.raises(ValueError) as error:
        document_of(row)
    assert words in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.quick
def test_all_fields_that_rows_of_these_tests_need_are_columns_that_are_read():
    for row in [*CHATS.values(), *(row for row, _ in ROWS.values() if isinstance(row, dict))]:
        assert document_of({name: value for name, value in row.items() if name in FIELDS}, "a") == document_of(row, "a")


@pytest.mark.quick
def test_a_long_name_of_a_source_is_cut_and_stays_its_own():
    names = ["长" * 100 + end for end in ("甲", "乙")]
    cut = [Document("", format="starcoder-" + "文" * 80).source(name) for name in names]
    assert len(set(cut)) == 2 and all(150 < len(name.encode("utf-8")) <= 200 for name in cut)
    assert Document("", format="zhihu").source("长" * 60) == "长" * 60 + "-zhihu"


@pytest.mark.quick
@pytest.mark.parametrize("name", ROWS)
def test_a_document_survives_json_and_a_map_reaches_each_of_its_texts(name):
    document = ROWS[name][1]._replace(dropped_by="")
    line = document.to_json()
    assert "\n" not in line and Document.from_json(line) == document
    assert document.map(lambda text: text) == document == document.merge_turns()
    emptied = document.map(lambda text: "")
    assert emptied.text.strip("\n") == "" and emptied.merge_turns().content in ("", [])
    assert document.map(str.swapcase).text == document.text.swapcase()
