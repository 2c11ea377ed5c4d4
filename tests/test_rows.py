"""Rows: those of every corpus as its publisher ships it, the usual forms of chat, and what malformed ones get."""

import json

import pytest

from corpus.documents import Document
from corpus.rows import FIELDS, document_of, exam_as


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


def exam(*texts):
    roles = ("question", "options", "answer", "explanation")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return Document(messages, "exam", "wanjuan_exam")


ROWS = {
    "plain": ({"text": "天地玄黄"}, Document("天地玄黄")),
    "skypile with more fields": ({"text": "天地玄黄", "meta": {"url": "u"}}, Document("天地玄黄")),
    "a string": ("天地玄黄", Document("天地玄黄")),
    "wanjuan": ({"id": "BkQQ", "content": "天地玄黄"}, Document("天地玄黄")),
    "wanjuan exam": (
        EXAM,
        exam("一加一等于几？", "A. 1\nB. 2\nC. 3\nD. 4", "B", "算术。"),
    ),
    "wanjuan exam without options": (
        {"q_main": "何谓道？", "option_a": None, "option_b": "", "std_ans": "不可说", "answer_detail": None},
        exam("何谓道？", "", "不可说", ""),
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
    ({"prompt": "问", "chosen": "答", "rejected": "答"}, "chosen and rejected are equal"),
    ({"prompt": "问", "chosen": "答", "rejected": ""}, "rejected is empty: a pair needs two answers"),
    ({"prompt": "问", "chosen": [], "rejected": "答"}, "chosen is empty: a pair needs two answers"),
    ({"chosen": "答", "rejected": "不"}, "expected a prompt before the answers"),
    ({"chosen": [USER, ANSWER], "rejected": [USER]}, "rejected: expected an answer at its end"),
    (
        {"chosen": [USER, ANSWER], "rejected": [USER | {"content": "别的"}, ANSWER | {"content": "不"}]},
        "chosen and rejected answer different prompts",
    ),
    (
        {"prompt": "另问", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "不"}]},
        "chosen does not begin with the prompt of its row",
    ),
    ({"prompt": "问", "chosen": "答", "rejected": "不", "tools": "[{}]"}, "tools: the chat template has no place"),
    ({"prompt": "问", "chosen": 3, "rejected": "不"}, "chosen: expected a list of turns, found 3"),
]


SIDES = [{"role": "chosen", "content": "好"}, {"role": "rejected", "content": "坏"}]
GOOD, BAD = ANSWER | {"content": "好"}, ANSWER | {"content": "坏"}
PAIRS = {
    "minimind, UltraFeedback": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "a prompt and texts": {"prompt": USER["content"], "chosen": "好", "rejected": "坏"},
    "a prompt and whole lists": {
        "prompt": USER["content"],
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
        "score": 1,
    },
    "turns and lists": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "opencsg": {"instruction": USER["content"], "chosen_response": "好", "rejected_response": "坏"},
    "an instruction": {"instruction": USER["content"], "input": "", "chosen": "好", "rejected": "坏"},
    "orca": {"question": USER["content"], "system": "", "chosen": "好", "rejected": "坏"},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": USER["content"]}],
        "chosen": {"from": "gpt", "value": "好"},
        "rejected": {"from": "gpt", "value": "坏"},
    },
}


@pytest.mark.quick
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_answers_in_the_forms_that_people_publish(name):
    assert document_of(PAIRS[name]) == Document([USER, *SIDES], "pair", "pairs")


@pytest.mark.quick
def test_a_pair_keeps_its_system_turn_its_history_and_earlier_turns():
    row = {"instruction": "二", "history": [["一", "1"]], "system": "短", "chosen": "好", "rejected": "坏"}
    turns = [("system", "短"), ("user", "一"), ("assistant", "1"), ("user", "二"), ("chosen", "好"), ("rejected", "坏")]
    pair = document_of(row)
    assert [(message["role"], message["content"]) for message in pair.content] == turns
    assert pair.answered("rejected") == [*pair.content[:-2], {"role": "assistant", "content": "坏"}]
    assert pair.merge_turns() == pair == Document.from_json(pair.to_json())
    long = {"chosen": [*pair.content[:-2], GOOD], "rejected": [*pair.content[:-2], BAD]}
    assert document_of(long) == pair


@pytest.mark.quick
def test_exams_as_texts_and_as_chats_in_the_template_of_steel_llm():
    full, bare = exam("一加一？", "A. 1\nB. 2", "B", "算术。"), exam("何谓道？", "", "不可说", "")
    text = Document("一加一？\nA. 1\nB. 2\n标准答案：B\n解析：算术。", format="wanjuan_exam")
    assert exam_as(full, "text") == text and exam_as(bare, "text").content == "何谓道？\n标准答案：不可说"
    said = {form: [message["content"] for message in exam_as(full, form).content] for form in ("chat", "reasoning")}
    assert said["chat"] == ["以下是一道单选题:\n一加一？\nA. 1\nB. 2\n请给出答案。", "B。算术。"]
    assert said["reasoning"] == ["以下是一道单选题:\n一加一？\nA. 1\nB. 2\n请先给出解释再给出答案。", "算术。答案为B"]
    assert exam_as(bare, "reasoning").content[1]["content"] == "不可说。"
    assert exam_as(exam("何谓道？", "", "", "深。"), "chat").kind == "text"


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
@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name][1].kind != "exam"])
def test_a_document_survives_json_and_a_map_reaches_each_of_its_texts(name):
    document = ROWS[name][1]._replace(dropped_by="")
    line = document.to_json()
    assert "\n" not in line and Document.from_json(line) == document
    assert document.map(lambda text: text) == document == document.merge_turns()
    emptied = document.map(lambda text: "")
    assert emptied.text.strip("\n") == "" and emptied.merge_turns().content in ("", [])
    assert document.map(str.swapcase).text == document.text.swapcase()
