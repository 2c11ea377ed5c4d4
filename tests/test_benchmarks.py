"""Benchmarks: files and official prompts, likelihoods against transformers and full forwards, tables, the command."""

import csv
import json
import math
import random
import statistics

import pytest
import torch
from conftest import TINY, call, refused
from test_model import CAUSAL_KINDS, small

from checkpoint import load
from corpus.default import fetch_qwen
from extras import benchmarks
from extras.answers import STEEL, last_number, letter_in
from extras.benchmarks import (
    SUBJECTS,
    TASKS,
    Question,
    Subject,
    answer_in,
    ask,
    averages,
    build_prompts,
    continue_greedily,
    letter_ids,
    log_likelihoods,
    print_report,
    read_subjects,
    subject_names,
    user_turn,
)
from extras.huggingface import architecture, hugging_face_tensors
from model import Config, Decoder
from sample import generate
from tokenizer import load_tokenizer, train_sentencepiece

HEADERS = {"ceval": ["id", "question", *"ABCD", "answer"], "cmmlu": ["", "Question", *"ABCD", "Answer"], "mmlu": None}
ROWS = [["字的偏旁，\n何者为水？", "江", "None", "NA", "null", "A"], ["1+1=?", "1", "0.50", "2", '"二", 两', "C"]]


def write_csv(path, task, rows, header=None):
    """Write rows of question, A, B, C, D, answer in the official layout of a task."""
    header = header or HEADERS[task]
    rows = rows if task == "mmlu" else [[i, *row] for i, row in enumerate(rows)]
    if task == "ceval" and path.parent.name == "dev":
        header, rows = [*header, "explanation"], [[*row, "因为"] for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)


def write_folder(folder, task, subject, rows=ROWS, examples=ROWS):
    """Write one subject as published; returns the folder."""
    split = TASKS[task].split
    for part, some in (("dev", examples), (split, rows)):
        write_csv(folder / part / (f"{subject}.csv" if task == "cmmlu" else f"{subject}_{part}.csv"), task, some)
    if task == "ceval":
        mapping = json.dumps({subject: ["Logic", "逻辑学", "Humanities"]})
        (folder / "subject_mapping.json").write_text(mapping, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(fetch_qwen())


# ----------------------------------------------------------------------------------------------------------------------
# Questions and prompts

PROMPTS = {
    "ceval": "以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n\n"
    "字的偏旁，\n何者为水？\nA. 江\nB. None\nC. NA\nD. null\n答案：A\n\n"
    '1+1=?\nA. 1\nB. 0.50\nC. 2\nD. "二", 两\n答案：',
    "cmmlu": "以下是关于逻辑学的单项选择题，请直接给出正确答案的选项。\n\n"
    "题目：字的偏旁，\n何者为水？\nA. 江\nB. None\nC. NA\nD. null\n答案是：A\n\n"
    '题目：1+1=?\nA. 1\nB. 0.50\nC. 2\nD. "二", 两\n答案是：',
    "mmlu": "The following are multiple choice questions (with answers) about  formal logic.\n\n"
    "字的偏旁，\n何者为水？\nA. 江\nB. None\nC. NA\nD. null\nAnswer: A\n\n"
    '1+1=?\nA. 1\nB. 0.50\nC. 2\nD. "二", 两\nAnswer:',
}


@pytest.mark.parametrize("task, name", [("ceval", "logic"), ("cmmlu", "logical"), ("mmlu", "formal_logic")])
def test_a_published_folder_becomes_the_official_prompt(task, name, qwen, tmp_path):
    folder = write_folder(tmp_path, task, name)
    subject = read_subjects(task, folder, TASKS[task].split, 1)[name]
    assert subject.categories == ["Humanities"] and [q.answer for q in subject.questions] == ["A", "C"]
    opening, space = TASKS[task].opening, TASKS[task].space

    prompt = build_prompts(qwen, TASKS[task], "letter", subject, 2048, [qwen.eos_id])[1]
    assert qwen.decode(prompt.ids[1:]) == PROMPTS[task] and prompt.ids[0] == qwen.eos_id and prompt.shots == 1
    assert [qwen.decode(ids) for ids in prompt.options] == [space + letter for letter in "ABCD"]

    prompt = build_prompts(qwen, TASKS[task], "continuation", subject, 2048, [qwen.eos_id])[1]
    expected = PROMPTS[task]
    for options in ("\nA. 江\nB. None\nC. NA\nD. null", '\nA. 1\nB. 0.50\nC. 2\nD. "二", 两'):
        expected = expected.replace(options, "")
    assert qwen.decode(prompt.ids[1:]) == expected.replace(f"{opening}{space}A", f"{opening}{space}江")
    assert [qwen.decode(ids) for ids in prompt.options] == [space + option for option in ROWS[1][1:5]]

    prompt = build_prompts(qwen, TASKS[task], "chat", subject._replace(examples=[]), 2048, [])[1]
    user = '以下是一道单选题:\n1+1=?\n\nA. 1\nB. 0.50\nC. 2\nD. "二", 两\n请给出答案。\n'
    assert prompt.ids == qwen.encode_chat([{"role": "user", "content": user}], open_turn=True)[0]


def test_gsm8k_and_folders_like_cmmlu(qwen, tmp_path):
    lines = [
        {"question": "How many?", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"},
        {"question": "And now?", "answer": "One less.\n#### -1.50"},
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    subject = read_subjects("gsm8k", tmp_path, "test", 1)["gsm8k"]
    assert [q.answer for q in subject.questions] == ["1200", "-1.5"]
    prompt = build_prompts(qwen, TASKS["gsm8k"], "generate", subject, 2048, [qwen.eos_id])[1]
    shot = f"Question: How many?\nAnswer: {lines[0]['answer']}\n\n"
    assert qwen.decode(prompt.ids[1:]) == f"{shot}Question: And now?\nAnswer:"
    for part in ("dev", "test"):  # ACLUE: the file's name is the subject's, and there is no index column
        write_csv(tmp_path / part / "古音学.csv", "mmlu", ROWS, ["Question", *"ABCD", "Answer"])
    assert read_subjects("cmmlu", tmp_path, "test", 1)["古音学"].name == "古音学"


@pytest.mark.quick
def test_names_and_categories_of_ceval_come_from_its_mapping(tmp_path):
    mapping = {  # as published
        "college_physics": ["College Physics", "大学物理", "STEM"],
        "clinical_medicine": ["Clinical Medicine", "临床医学"],
    }
    (tmp_path / "subject_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    assert subject_names("ceval", tmp_path, list(mapping)) == {
        "college_physics": ("大学物理", ["STEM", "Hard"]),
        "clinical_medicine": ("临床医学", []),
    }


@pytest.mark.quick
def test_each_benchmark_is_averaged_as_by_its_authors():
    answers = (("a", "A"), ("b", "A"), ("b", "B"), ("b", "B"))
    records = [{"subject": name, "answer": "A", "predicted": {"letter": letter}} for name, letter in answers]
    means = {name: averages(records, task.macro)["letter"][0] for name, task in TASKS.items()}
    assert means == pytest.approx({"ceval": 200 / 3, "cmmlu": 200 / 3, "mmlu": 50, "gsm8k": 50})


@pytest.mark.quick
def test_the_tables_of_subjects_are_complete():
    subjects = {
        task: [item for listed in categories.values() for item in listed.split()]
        for task, categories in SUBJECTS.items()
    }
    assert [len(set(subjects[task])) for task in ("cmmlu", "mmlu")] == [67, 57]
    assert sum(item.endswith("*") for item in subjects["cmmlu"]) == 15
    assert len({item.partition("/")[2] for item in subjects["cmmlu"]}) == 67


def test_a_prompt_that_is_too_long_drops_its_first_shots(qwen, tmp_path):
    examples = [[f"第{i}问", *"甲乙丙丁", "B"] for i in range(3)]
    subject = read_subjects("cmmlu", write_folder(tmp_path, "cmmlu", "arts", ROWS, examples), "test", 3)["arts"]

    def second_prompt(context):
        return build_prompts(qwen, TASKS["cmmlu"], "letter", subject, context, [qwen.eos_id])[1]

    length = len(second_prompt(2048).ids)
    for context, shots in ((length, 3), (length - 1, 2), (60, 0), (20, None)):
        prompt = second_prompt(context)
        assert prompt.shots == shots and (prompt.ids is None or len(prompt.ids) <= context)
    text = qwen.decode(second_prompt(length - 1).ids[1:])
    header = "以下是关于艺术学的单项选择题，请直接给出正确答案的选项。\n\n"
    assert text.startswith(header + "题目：第1问") and "题目：第2问" in text


def test_letters_of_several_tokens_are_refused(tmp_path):
    # " A" becomes one token, " B" two
    train_sentencepiece(["答案 A，" * 500 + "甲B乙C丙D" * 50], 274, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="letters after 'Answer:' are not one token each: use --score continuation"):
        letter_ids(tokenizer, TASKS["mmlu"])
    assert [tokenizer.decode([i]) for i in letter_ids(tokenizer, TASKS["ceval"])] == list("ABCD")


@pytest.mark.quick
@pytest.mark.quick
def test_what_spreadsheets_and_macos_leave_in_a_folder_is_passed_over(tmp_path):
    folder = write_folder(tmp_path, "cmmlu", "anatomy")
    expected = read_subjects("cmmlu", folder, "test", 2)
    for part in ("dev", "test"):
        path = folder / part / "anatomy.csv"
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        lines = [line + "," * 3 if line.endswith((",A", ",C")) else line for line in lines]  # the last cells of rows
        path.write_text("\n".join(lines) + "\n,,,,,,\n\n,,,,,,,,,\n", encoding="utf-8")
        (folder / part / "._anatomy.csv").write_bytes(b"\x00\x05\x16\x07")
    assert read_subjects("cmmlu", folder, "test", 2) == expected
    line = '{"question": "?", "answer": "#### 1"}\n'
    (tmp_path / "test.jsonl").write_text(line + "\n" + line + " \n\n", encoding="utf-8")
    assert [question.row for question in read_subjects("gsm8k", tmp_path, "test", 0)["gsm8k"].questions] == [1, 3]


def test_damaged_folders_are_refused_in_one_line(tmp_path):
    def run(task, *flags):
        return call("eval.py", "--task", task, "--questions", tmp_path, *flags, ok=False)

    refused(run("cmmlu"), "test: no .csv files")
    path = tmp_path / "test" / "arts.csv"
    folder = write_folder(tmp_path, "cmmlu", "arts")
    for rows, words in (
        ([*ROWS, ["?", *"甲乙丙丁", "E"]], "row 4: the answer is 'E', expected one of A, B, C, D"),
        ([ROWS[0], ["?", *"甲乙丙", "A"]], "row 3: 6 columns, expected 7"),
        ([], "has no questions"),
    ):
        write_csv(path, "cmmlu", rows)
        refused(run("cmmlu", "--shots", 0), path, words)
    write_csv(path, "cmmlu", ROWS, ["", "Question", *"ABCD"])
    refused(run("cmmlu"), path, "no column answer", "--split")
    path.write_bytes(b"\xff\xfe")
    refused(run("cmmlu"), path, "is not a csv file in UTF-8")
    write_csv(path, "cmmlu", ROWS)
    refused(run("cmmlu", "--shots", 3), folder / "dev" / "arts.csv", "has 2 questions, --shots 3")
    path.rename(path.with_name("painting.csv"))
    refused(run("cmmlu"), "no name for painting", "subject_mapping.json")
    (tmp_path / "subject_mapping.json").write_text("[1]", encoding="utf-8")
    refused(run("cmmlu"), "subject_mapping.json: expected {subject: [English name")
    lines = '{"question": "?", "answer": "#### 1"}\n{"question": "?", "answer": "none"}\n'
    (tmp_path / "test.jsonl").write_text(lines, encoding="utf-8")
    refused(run("gsm8k", "--shots", 0), "test.jsonl, line 2: expected")
    refused(run("gsm8k", "--score", "letter"), "--score letter: expected generate or chat for gsm8k")
    refused(run("cmmlu", "--score", "chat", "--shots", 2), "none with --score chat")
    refused(run("mmlu", "--score", "steel"), "--score steel: expected letter or continuation or chat for mmlu")
    refused(call("eval.py", "--task", "cmmlu", ok=False), "--task cmmlu needs --questions")


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def log_likelihood(model, prompt, option):
    """log p(option | prompt) from one full forward."""
    log_p = model(torch.tensor([prompt + option]))[0].double().log_softmax(-1)
    return sum(log_p[len(prompt) + k - 1, i].item() for k, i in enumerate(option)) if option else -math.inf


@torch.no_grad()
def test_log_likelihoods_equal_those_of_transformers(small_data, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = load_tokenizer(small_data)
    sizes = dict(n_layer=2, d_model=32, n_head=4, n_kv_head=2, vocab_size=tokenizer.vocab_size, block_size=256)
    config = Config(**sizes, ffn="dense")
    reference = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=32,
            intermediate_size=config.d_dense,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_theta=10_000.0,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    ).eval()
    model, weights = Decoder(config), reference.state_dict()
    for name, parameter in hugging_face_tensors(model, architecture(config)):
        parameter.copy_(weights.pop(name))
    assert not weights

    rows = [[f"第{i}题，何者为{'大' * i}？", "江", "河水", f"{i}", "山高水长", "ABCD"[i % 4]] for i in range(7)]
    subject = read_subjects("cmmlu", write_folder(tmp_path, "cmmlu", "arts", rows, rows[:2]), "test", 2)["arts"]
    for score in ("letter", "continuation"):
        _, prompts, _, options = zip(*build_prompts(tokenizer, TASKS["cmmlu"], score, subject, 256, []))
        for prompt, choices, nats in zip(prompts, options, log_likelihoods(model, prompts, options), strict=True):
            for option, value in zip(choices, nats, strict=True):
                expected = log_likelihood(lambda ids: reference(ids).logits, prompt, option)
                assert value == pytest.approx(expected, abs=1e-4)


def draw(n):
    return torch.randint(50, (n,)).tolist()


@pytest.mark.parametrize("changes", [*CAUSAL_KINDS[::2], dict(reset_id=3)], ids=str)
@torch.no_grad()
def test_a_batch_with_a_shared_prefix_equals_single_options(changes, monkeypatch):
    for begin in ([], [5], [*draw(4), 3, *draw(6)]):  # 3 may begin a document
        prompts = [begin + [i, *draw(n)] for i, n in enumerate((5, 0, 9, 2))]
        options = [[draw(1), draw(4), []], [draw(2)], [[7], [8], [9]], [draw(3), draw(1)]]
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            model = small(dtype, **changes)
            expected = [
                [log_likelihood(model, prompt, option) for option in choices]
                for prompt, choices in zip(prompts, options)
            ]
            for n, batch_tokens in ((4, 1), (4, 50), (4, 1000), (1, 1000)):
                monkeypatch.setattr(benchmarks, "BATCH_TOKENS", batch_tokens)
                got = log_likelihoods(model, prompts[-n:], options[-n:])
                assert sum(got, []) == pytest.approx(sum(expected[-n:], []), abs=tolerance)


def test_greedy_answers_in_a_batch_equal_single_ones(small_data):
    tokenizer = load_tokenizer(small_data)
    for dispatch in ("sequence", "causal"):
        model = small(dispatch=dispatch, vocab_size=tokenizer.vocab_size)
        prompts = [[tokenizer.eos_id, *tokenizer.encode(t)] for t in ("却说曹操", "话说天下大势，分久必合", "玄德")]
        together = list(continue_greedily(model, tokenizer, prompts, 12))
        single = [text for prompt in prompts for text in continue_greedily(model, tokenizer, [prompt], 12)]
        assert together == single and len(set(single)) == 3 and all(single)
    steps = generate(model, torch.tensor(prompts[:1]), 12, tokenizer.vocab_size, temperature=0)
    ids = [new.item() for new in steps]
    tokenizer.chat_end_id = next(i for i in ids if i != ids[0])
    shorter = next(continue_greedily(model, tokenizer, prompts[:1], 12))
    assert shorter == tokenizer.decode(ids[: ids.index(tokenizer.chat_end_id)]) != single[0]


@pytest.mark.quick
def test_letters_and_numbers_are_found_in_answers():
    letters = {
        "B": "B",
        "答案是C。": "C",
        "A和B都不对，所以答案：D": "D",
        "选 B，因为 A 不对": "B",
        "The answer is: C": "C",
        "应选（A）": "A",
        "Apple": None,
        "": None,
        "我不知道": None,
    }
    assert {text: letter_in(text) for text in letters} == letters
    numbers = {
        "18": "18",
        "#### 1,200": "1200",
        "3 apples and $4.50.": "4.5",
        "-7 left": "-7",
        "none": None,
        "100.00": "100",
    }
    assert {text: last_number(text) for text in numbers} == numbers
    question = Question(1, "?", (), "5", "")
    assert answer_in(" 2 + 3 = 5\n\nQuestion: and 7?", TASKS["gsm8k"], "chat", question) == "5"
    assert answer_in("答案：D", TASKS["cmmlu"], "chat", question._replace(options=tuple("甲乙丙丁"))) == "D"


@pytest.mark.quick
def test_answers_read_as_steel_llm_reads_them():
    """Each rule of its two programs by an example, and where they and ours differ."""
    options = ("可靠，按序", "可靠", "不可靠。", "既不可靠，也不按序")
    question = Question(1, "网络有几层。传输层的服务的特性是____。", options, "A", options[0])
    ceval = {
        "B。因为A不对": "B",
        "选C。": "C",
        "选择：D，": "D",
        "答案应为B。": "B",
        "A选项不正确，B选项正确": "B",
        "C符合题意": "C",
        "（D）": "D",
        "传输层的服务的特性是可靠": "B",  # the stem becomes 答案是, an option its letter
        "我想是既不可靠，也不按序。": "D",
        "按序，可 靠": "A",  # no letter: the most similar option
        "x=A=1, B": "B",
    }
    assert {text: answer_in(text, TASKS["ceval"], "steel", question) for text in ceval} == ceval
    cmmlu = {
        "B。因为A不对": "B",
        "本题答案是：C": "C",
        "应选择 D": "D",
        "所以 A 选项正确，B 不对": "A",
        "正确选项为 B": "B",
        "C项符合题意": "C",
        "答案选项：D": "D",
        "答案选项为第三个即C": "C",
        "看A，看B，D当选": "D",
        "看A，看B，C\n才正确": "C",
        "会是：B": "B",
        "我看 D": "D",
        "我看 A 或 D": None,
        "我不知道": None,
    }
    assert {text: answer_in(text, TASKS["cmmlu"], "steel", question) for text in cmmlu} == cmmlu
    ours = [letter_in(text) for text in ("A选项不正确，B选项正确", "我看 A 或 D", "我想是既不可靠，也不按序。")]
    assert ours == ["A", "A", None]


@pytest.mark.quick
def test_gaps_in_questions_become_what_steel_llm_writes():
    question = Question(1, "水由____和____。", tuple("甲乙丙丁"), "A", "甲")
    asked = [user_turn(question, *gap).splitlines()[1] for gap in ([], [STEEL["ceval"].gap], [STEEL["cmmlu"].gap])]
    assert asked == ["水由____和____。", "水由____和( )", "水由和。"]


@torch.no_grad()
def test_options_are_compared_by_likelihood_per_character_and_per_byte(small_data):
    tokenizer = load_tokenizer(small_data)
    model, rng, differ = small(torch.float32, vocab_size=tokenizer.vocab_size), random.Random(0), set()

    def likeliest(nats, lengths):
        return "ABCD"[max(range(4), key=lambda j: nats[j] / lengths[j])]

    for _ in range(20):
        options = ["".join(rng.choice("abcdef却说曹操") for _ in range(rng.randrange(1, 9))) for _ in range(4)]
        subject = Subject("艺术学", [], [Question(1, "何者？", tuple(options), "A", options[0])], [])
        ((_, _, predicted, _),) = ask(model, tokenizer, TASKS["cmmlu"], "continuation", subject, [])
        text = "以下是关于艺术学的单项选择题，请直接给出正确答案的选项。\n\n题目：何者？\n答案是："
        nats = [log_likelihood(model, tokenizer.encode(text), tokenizer.encode(option)) for option in options]
        expected = {
            "plain": likeliest(nats, [1] * 4),
            "per character": likeliest(nats, [len(option) for option in options]),
            "per byte": likeliest(nats, [len(option.encode()) for option in options]),
        }
        assert list(predicted.items()) == list(expected.items())
        differ.add(len(set(expected.values())))
    assert max(differ) > 1


# ----------------------------------------------------------------------------------------------------------------------
# Tables and the command


@torch.no_grad()
def test_the_report_on_a_model_that_always_says_a(small_data, tmp_path, capsys):
    tokenizer = load_tokenizer(small_data)
    # A new layer is the identity, so the head alone makes the model answer A.
    model = Decoder(Config(n_layer=1, d_model=32, vocab_size=tokenizer.vocab_size, block_size=2048))
    a = tokenizer.encode("答案是：A")[-1]
    model.head[a] = 100 * model.embedding[tokenizer.encode("答案是：")[-1]]
    answers = {"arts": "AABC", "virology": "AD", "logical": "BCCCCC"}
    for subject, letters in answers.items():
        rows = [[f"{i}", "一", "一一", "一", "一", letter] for i, letter in enumerate(letters)]
        write_folder(tmp_path, "cmmlu", subject, rows)
    subjects, records = read_subjects("cmmlu", tmp_path, "test", 2), []
    for name, subject in subjects.items():
        for question, shots, predicted, _ in ask(model, tokenizer, TASKS["cmmlu"], "letter", subject, []):
            records.append({"subject": name, "answer": question.answer, "shots": shots, "predicted": predicted})
    print_report(records, subjects)
    printed = capsys.readouterr().out.splitlines()

    cells = {line.split(" (")[0]: line.split(")")[1].split() for line in printed if "±" in line}
    shown = {label: (float(mean), float(error)) for label, (mean, _, error) in cells.items()}
    right = {name: [letter == "A" for letter in letters] for name, letters in answers.items()}

    def error(group):
        """Of the mean of len(group) draws."""
        return (statistics.pvariance(group) / len(group)) ** 0.5

    flat = [x for group in right.values() for x in group]
    expected = 100 * statistics.mean(flat), 100 * error(flat)
    assert shown["all, mean of questions"] == pytest.approx(expected, abs=0.006)
    macro = statistics.mean(map(statistics.mean, right.values()))
    macro_error = sum(error(group) ** 2 for group in right.values()) ** 0.5 / 3
    assert shown["all, mean of subjects"] == pytest.approx((100 * macro, 100 * macro_error), abs=0.006)
    assert shown["STEM"] == pytest.approx((50, 100 * 0.5 / 2**0.5), abs=0.006)
    assert shown["Humanities"][0] == pytest.approx(25)
    given = [line.split() for line in printed if line.startswith(("answered", "no answer"))]
    given = {cells[1]: float(cells[-1]) for cells in given}
    assert given == {"A": 100, "B": 0, "C": 0, "D": 0, "answer": 0}


def test_the_command(small_data, tmp_path):
    longer = (*TINY, "--block-size", 256, "--batch-tokens", 512, "--steps", 2, "--save-every", 1)
    call("train.py", "--data", small_data, "--out", tmp_path / "run", *longer)
    steps = sorted((tmp_path / "run").glob("step-*"))
    rows = [[f"第{i}题，谁是{'蜀' * i}主？", "曹操", "刘备", "孙权", "诸葛孔明", "B"] for i in range(5)]
    rows.append(["长" * 300, *"甲乙丙丁", "C"])
    for subject in ("arts", "chinese_history"):
        write_folder(tmp_path / "cmmlu", "cmmlu", subject, rows, rows[:2])
    out, png = tmp_path / "answers.jsonl", tmp_path / "curve.png"
    flags = ("--task", "cmmlu", "--questions", tmp_path / "cmmlu", "--shots", 2)

    shown = call("eval.py", *steps, *flags, "--out", out, "--png", png).stdout
    assert shown.count("cmmlu test, --score letter --shots 2\n") == 2
    assert shown.count("\n2 questions are too long for the context") == 2
    assert "China specific (6)" in shown and png.read_bytes().startswith(b"\x89PNG")
    table = shown.splitlines()[-4:]
    assert table[0].split()[:3] == ["mean", "of", "subjects"]
    assert [line.split()[0] for line in table[1:3]] == list(map(str, steps))
    assert "always B" in table[0] and table[1].endswith("83.33 ± 10.76")  # always B has five of six right
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 24 and {r["checkpoint"] for r in records} == {str(step) for step in steps}
    for record in records:
        too_long = record["row"] == 7
        assert record["predicted"]["longest option"] == ("A" if too_long else "D")
        likeliest = None if too_long else "ABCD"[record["nats"].index(max(record["nats"]))]
        assert record["predicted"]["letter"] == likeliest
        assert record["shots"] == (None if too_long else 2)
    assert "room for fewer" not in shown

    # In training, an eos came before every document, so it comes before every prompt.
    model, tokenizer, _ = load(steps[0])
    subject = read_subjects("cmmlu", tmp_path / "cmmlu", "test", 2)["arts"]
    prompt = build_prompts(tokenizer, TASKS["cmmlu"], "letter", subject, 256, [tokenizer.eos_id])[0]
    nats = log_likelihoods(model, [prompt.ids], [prompt.options])[0]
    assert records[0]["nats"] == pytest.approx(nats, abs=1e-4)

    shown = call("eval.py", steps[0], *flags, "--score", "continuation").stdout
    assert all(measure in shown for measure in ("plain", "per character", "per byte"))
    for score in ("chat", "steel"):
        assert "no answer" in call("eval.py", steps[0], *flags[:-2], "--score", score).stdout
    (tmp_path / "test.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n', encoding="utf-8")
    shown = call("eval.py", steps[0], "--task", "gsm8k", "--questions", tmp_path, "--shots", 0).stdout
    assert "gsm8k test, --score generate --shots 0\n" in shown
    call("train.py", "--data", small_data, "--out", tmp_path / "seq", *TINY, "--steps", 1, "--dispatch", "sequence")
    refused(call("eval.py", tmp_path / "seq", *flags, ok=False), "dispatch = sequence", "--score chat")
