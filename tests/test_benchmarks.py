"""Benchmarks: files and prompts to the letter, likelihoods against transformers and against full forwards, the tables, the command."""

import csv
import json
import math
import random
import statistics

import pytest
import torch
from conftest import TINY, call, refused
from test_model import CAUSAL_KINDS, small

import tasks
from eval import data_of
from model import Config, Decoder
from sample import generate
from sources import fetch_qwen
from tasks import TASKS, Question, Subject, answer_in, ask, continue_greedily, last_number, letter_ids, letter_in, log_likelihoods, pose, read_subjects
from tokenizer import load_tokenizer, train_sentencepiece
from weights import hugging_face_tensors

HEADERS = {"ceval": ["id", "question", *"ABCD", "answer"], "cmmlu": ["", "Question", *"ABCD", "Answer"], "mmlu": None}
ROWS = [["字的偏旁，\n何者为水？", "江", "None", "NA", "null", "A"], ["1+1=?", "1", "0.50", "2", '"二", 两', "C"]]


def write_csv(path, task, rows, header=None):
    """rows of question, A, B, C, D, answer in the official layout of a task."""
    header = header or HEADERS[task]
    rows = rows if task == "mmlu" else [[i, *row] for i, row in enumerate(rows)]
    if task == "ceval" and path.parent.name == "dev":
        header, rows = [*header, "explanation"], [[*row, "因为"] for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)


def folder_of(tmp_path, task, subject, rows=ROWS, examples=ROWS):
    split = TASKS[task].split
    for part, some in (("dev", examples), (split, rows)):
        write_csv(tmp_path / part / (f"{subject}.csv" if task == "cmmlu" else f"{subject}_{part}.csv"), task, some)
    if task == "ceval":
        (tmp_path / "subject_mapping.json").write_text(json.dumps({subject: ["Logic", "逻辑学", "Humanities"]}), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(fetch_qwen())


# --- questions and prompts

PROMPTS = {
    "ceval": "以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n\n"
    "字的偏旁，\n何者为水？\nA. 江\nB. None\nC. NA\nD. null\n答案：A\n\n"
    '1+1=?\nA. 1\nB. 0.50\nC. 2\nD. "二", 两\n答案：',
    "cmmlu": "以下是关于逻辑学的单项选择题，请直接给出正确答案的选项。\n\n"
    "题目：字的偏旁，\n何者为水？\nA. 江\nB. None\nC. NA\nD. null\n答案是：A\n\n"
    '题目：1+1=?\nA. 1\nB. 0.50\nC. 2\nD. "二", 两\n答案是：',
    "mmlu": "The following are multiple choice questions (with answers) about formal logic.\n\n"
    "字的偏旁，\n何者为水？\nA. 江\nB. None\nC. NA\nD. null\nAnswer: A\n\n"
    '1+1=?\nA. 1\nB. 0.50\nC. 2\nD. "二", 两\nAnswer:',
}


@pytest.mark.parametrize("task, name", [("ceval", "logic"), ("cmmlu", "logical"), ("mmlu", "formal_logic")])
def test_a_published_folder_becomes_the_prompt_to_the_letter(task, name, qwen, tmp_path):
    folder = folder_of(tmp_path, task, name)
    subject = read_subjects(task, folder, TASKS[task].split, 1)[name]
    assert subject.categories == ["Humanities"] and [q.answer for q in subject.questions] == ["A", "C"]
    _, (_, ids, shown, letters) = pose(qwen, TASKS[task], "letter", subject, 2048, [qwen.eos_id])
    assert qwen.decode(ids[1:]) == PROMPTS[task] and ids[0] == qwen.eos_id and shown == 1
    assert [qwen.decode(letter) for letter in letters] == [TASKS[task].space + letter for letter in "ABCD"]
    _, (_, ids, _, options) = pose(qwen, TASKS[task], "continuation", subject, 2048, [qwen.eos_id])  # the same without the options
    expected = PROMPTS[task].replace("\nA. 江\nB. None\nC. NA\nD. null", "").replace('\nA. 1\nB. 0.50\nC. 2\nD. "二", 两', "")
    opening, space = TASKS[task].opening, TASKS[task].space
    assert qwen.decode(ids[1:]) == expected.replace(f"{opening}{space}A", f"{opening}{space}江")
    assert [qwen.decode(option) for option in options] == [space + option for option in ROWS[1][1:5]]
    _, (_, ids, _, _) = pose(qwen, TASKS[task], "chat", Subject(*subject[:3], []), 2048, [])
    user = '以下是一道单选题:\n1+1=?\n\nA. 1\nB. 0.50\nC. 2\nD. "二", 两\n请给出答案。\n'
    assert ids == qwen.encode_chat([{"role": "user", "content": user}], open_turn=True)[0]


def test_gsm8k_and_folders_like_cmmlu(qwen, tmp_path):
    lines = [
        {"question": "How many?", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"},
        {"question": "And now?", "answer": "One less.\n#### -1.50"},
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    subject = read_subjects("gsm8k", tmp_path, "test", 1)["gsm8k"]
    assert [q.answer for q in subject.questions] == ["1200", "-1.5"]
    _, (_, ids, _, _) = pose(qwen, TASKS["gsm8k"], "generate", subject, 2048, [qwen.eos_id])
    assert qwen.decode(ids[1:]) == f"Question: How many?\nAnswer: {lines[0]['answer']}\n\nQuestion: And now?\nAnswer:"
    for part in ("dev", "test"):  # ACLUE: the file's name is the subject's, and there is no index
        write_csv(tmp_path / part / "古音学.csv", "mmlu", ROWS, ["Question", *"ABCD", "Answer"])
    assert read_subjects("cmmlu", tmp_path, "test", 1)["古音学"].name == "古音学"


def test_names_and_categories_of_ceval_are_those_of_its_mapping(tmp_path):
    mapping = {"college_physics": ["College Physics", "大学物理", "STEM"], "clinical_medicine": ["Clinical Medicine", "临床医学"]}  # as published
    (tmp_path / "subject_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    assert tasks.names_of("ceval", tmp_path, list(mapping)) == {"college_physics": ("大学物理", ["STEM", "Hard"]), "clinical_medicine": ("临床医学", [])}


def test_the_average_of_a_benchmark_is_its_authors():
    records = [{"subject": subject, "answer": "A", "predicted": {"letter": letter}} for subject, letter in (("a", "A"), ("b", "A"), ("b", "B"), ("b", "B"))]
    means = {name: tasks.averages(records, task.macro)["letter"][0] for name, task in TASKS.items()}
    assert means == pytest.approx({"ceval": 200 / 3, "cmmlu": 200 / 3, "mmlu": 50, "gsm8k": 50})


def test_the_tables_of_subjects_are_whole():
    subjects = {task: [item for listed in tasks.SUBJECTS[task].values() for item in listed.split()] for task in ("cmmlu", "mmlu")}
    assert [len(set(subjects[task])) for task in ("cmmlu", "mmlu")] == [67, 57]
    assert sum(item.endswith("*") for item in subjects["cmmlu"]) == 15
    assert len({item.partition("/")[2] for item in subjects["cmmlu"]}) == 67


def test_too_long_a_prompt_drops_the_first_shots(qwen, tmp_path):
    examples = [[f"第{i}问", *"甲乙丙丁", "B"] for i in range(3)]
    subject = read_subjects("cmmlu", folder_of(tmp_path, "cmmlu", "arts", ROWS, examples), "test", 3)["arts"]
    whole = pose(qwen, TASKS["cmmlu"], "letter", subject, 2048, [qwen.eos_id])
    for room, shots in ((len(whole[1][1]), 3), (len(whole[1][1]) - 1, 2), (60, 0), (20, None)):
        _, ids, shown, _ = pose(qwen, TASKS["cmmlu"], "letter", subject, room, [qwen.eos_id])[1]
        assert shown == shots and (ids is None or len(ids) <= room)
    text = qwen.decode(pose(qwen, TASKS["cmmlu"], "letter", subject, len(whole[1][1]) - 1, [qwen.eos_id])[1][1][1:])
    header = "以下是关于艺术学的单项选择题，请直接给出正确答案的选项。\n\n"
    assert text.startswith(header + "题目：第1问") and "题目：第2问" in text


def test_letters_of_several_tokens_are_refused(tmp_path):
    train_sentencepiece(["答案 A，" * 500 + "甲B乙C丙D" * 50], 274, tmp_path / "tokenizer.model")  # " A" is a token, " B" is two
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(SystemExit, match="the letters behind 'Answer:' are not one token each: use --score continuation"):
        letter_ids(tokenizer, TASKS["mmlu"])
    assert [tokenizer.decode([i]) for i in letter_ids(tokenizer, TASKS["ceval"])] == list("ABCD")


def test_damaged_folders_are_refused_in_one_line(tmp_path):
    run = lambda task, *flags: call("eval.py", "--task", task, "--questions", tmp_path, *flags, ok=False)
    refused(run("cmmlu"), "test: no .csv files")
    path = tmp_path / "test" / "arts.csv"
    good = folder_of(tmp_path, "cmmlu", "arts")
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
    refused(run("cmmlu", "--shots", 3), good / "dev" / "arts.csv", "has 2 questions, --shots 3")
    path.rename(path.with_name("painting.csv"))
    refused(run("cmmlu"), "no name for painting", "subject_mapping.json")
    (tmp_path / "subject_mapping.json").write_text("[1]", encoding="utf-8")
    refused(run("cmmlu"), "subject_mapping.json: expected {subject: [English name")
    (tmp_path / "test.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n{"question": "?", "answer": "none"}\n', encoding="utf-8")
    refused(run("gsm8k", "--shots", 0), "test.jsonl, line 2: expected")
    refused(run("gsm8k", "--score", "letter"), "--score letter: expected generate or chat for gsm8k")
    refused(run("cmmlu", "--score", "chat", "--shots", 2), "none with --score chat")
    refused(call("eval.py", "--task", "cmmlu", ok=False), "--task cmmlu needs --questions")
    refused(call("eval.py", "--out", "x.jsonl", ok=False), "--out goes with --task")


# --- scores


def alone(model, prompt, option):
    """log p(option | prompt) from one full forward."""
    log_p = model(torch.tensor([prompt + option]))[0].double().log_softmax(-1)
    return sum(log_p[len(prompt) + k - 1, i].item() for k, i in enumerate(option)) if option else -math.inf


@torch.no_grad()
def test_log_likelihoods_are_those_of_transformers(small_data, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = load_tokenizer(small_data)
    config = Config(n_layer=2, d_model=32, n_head=4, n_kv_head=2, vocab_size=tokenizer.vocab_size, block_size=256, ffn="dense")
    theirs = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=config.vocab_size, hidden_size=32, intermediate_size=config.d_dense, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rope_theta=10_000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
        initializer_range=0.2,
    )).eval()  # fmt: skip
    ours, weights = Decoder(config), theirs.state_dict()
    for name, parameter in hugging_face_tensors(ours):
        parameter.copy_(weights.pop(name))
    assert not weights
    rows = [[f"第{i}题，何者为{'大' * i}？", "江", "河水", f"{i}", "山高水长", "ABCD"[i % 4]] for i in range(7)]
    subject = read_subjects("cmmlu", folder_of(tmp_path, "cmmlu", "arts", rows, rows[:2]), "test", 2)["arts"]
    for score in ("letter", "continuation"):
        prompts, options = zip(*((ids, options) for _, ids, _, options in pose(tokenizer, TASKS["cmmlu"], score, subject, 256, [])))
        for prompt, choices, nats in zip(prompts, options, log_likelihoods(ours, prompts, options), strict=True):
            for option, value in zip(choices, nats, strict=True):
                assert value == pytest.approx(alone(lambda ids: theirs(ids).logits, prompt, option), abs=1e-4)


@pytest.mark.parametrize("changes", [*CAUSAL_KINDS[::2], dict(reset_id=3)], ids=str)
@torch.no_grad()
def test_a_batch_with_a_shared_beginning_is_every_option_alone(changes, monkeypatch):
    draw = lambda n: torch.randint(50, (n,)).tolist()
    for begin in ([], [5], [*draw(4), 3, *draw(6)]):  # 3 may begin a document
        prompts = [begin + [i, *draw(n)] for i, n in enumerate((5, 0, 9, 2))]
        options = [[draw(1), draw(4), []], [draw(2)], [[7], [8], [9]], [draw(3), draw(1)]]
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            model = small(dtype, **changes)
            expected = [[alone(model, prompt, option) for option in choices] for prompt, choices in zip(prompts, options)]
            for n, batch_tokens in ((4, 1), (4, 50), (4, 1000), (1, 1000)):
                monkeypatch.setattr(tasks, "BATCH_TOKENS", batch_tokens)
                got = log_likelihoods(model, prompts[-n:], options[-n:])
                assert sum(got, []) == pytest.approx(sum(expected[-n:], []), abs=tolerance)


def test_greedy_answers_in_a_batch_are_those_alone(small_data):
    tokenizer = load_tokenizer(small_data)
    for dispatch in ("sequence", "causal"):
        model = small(dispatch=dispatch, vocab_size=tokenizer.vocab_size)
        prompts = [[tokenizer.eos_id, *tokenizer.encode(text)] for text in ("却说曹操", "话说天下大势，分久必合", "玄德")]
        together = list(continue_greedily(model, tokenizer, prompts, 12))
        alone = [text for prompt in prompts for text in continue_greedily(model, tokenizer, [prompt], 12)]
        assert together == alone and len(set(alone)) == 3 and all(alone)
    ids = [i.item() for i in generate(model, torch.tensor(prompts[:1]), 12, tokenizer.vocab_size, temperature=0)]
    tokenizer.chat_end_id = next(i for i in ids if i != ids[0])
    assert next(continue_greedily(model, tokenizer, prompts[:1], 12)) == tokenizer.decode(ids[: ids.index(tokenizer.chat_end_id)]) != alone[0]


def test_letters_and_numbers_are_found_in_answers():
    for text, letter in (
        ("B", "B"), ("答案是C。", "C"), ("A和B都不对，所以答案：D", "D"), ("选 B，因为 A 不对", "B"), ("The answer is: C", "C"),
        ("应选（A）", "A"), ("Apple", None), ("", None), ("我不知道", None),
    ):  # fmt: skip
        assert letter_in(text) == letter, text
    for text, number in (
        ("18", "18"), ("#### 1,200", "1200"), ("3 apples and $4.50.", "4.5"), ("-7 left", "-7"), ("none", None), ("100.00", "100"),
    ):  # fmt: skip
        assert last_number(text) == number, text
    question = Question(1, "?", (), "5", "")
    assert answer_in(" 2 + 3 = 5\n\nQuestion: and 7?", TASKS["gsm8k"], question) == "5"
    assert answer_in("答案：D", TASKS["cmmlu"], question._replace(options=tuple("甲乙丙丁"))) == "D"


@torch.no_grad()
def test_continuations_are_chosen_as_they_are_per_character_and_per_byte(small_data):
    tokenizer = load_tokenizer(small_data)
    model, rng, differ = small(torch.float32, vocab_size=tokenizer.vocab_size), random.Random(0), set()
    for _ in range(20):
        options = ["".join(rng.choice("abcdef却说曹操") for _ in range(rng.randrange(1, 9))) for _ in range(4)]
        question = Question(1, "何者？", tuple(options), "A", options[0])
        ((_, _, predicted, _),) = ask(model, tokenizer, TASKS["cmmlu"], "continuation", Subject("艺术学", [], [question], []), [])
        prompt = tokenizer.encode("以下是关于艺术学的单项选择题，请直接给出正确答案的选项。\n\n题目：何者？\n答案是：")
        nats = [alone(model, prompt, tokenizer.encode(option)) for option in options]
        best = lambda lengths: "ABCD"[max(range(4), key=lambda j: nats[j] / lengths[j])]
        expected = (best([1] * 4), best([len(o) for o in options]), best([len(o.encode()) for o in options]))
        assert tuple(predicted.values()) == expected and list(predicted) == ["plain", "per character", "per byte"]
        differ.add(len(set(expected)))
    assert max(differ) > 1


# --- tables


@torch.no_grad()
def test_a_model_that_always_says_a(small_data, tmp_path, capsys):
    tokenizer = load_tokenizer(small_data)
    model = Decoder(Config(n_layer=1, d_model=32, vocab_size=tokenizer.vocab_size, block_size=2048))  # a new block is the identity
    a = tokenizer.encode("答案是：A")[-1]
    model.head[a] = 100 * model.embedding[tokenizer.encode("答案是：")[-1]]
    answers = {"arts": "AABC", "virology": "AD", "logical": "BCCCCC"}
    for subject, letters in answers.items():
        folder_of(tmp_path, "cmmlu", subject, [[f"{i}", "一", "一一", "一", "一", letter] for i, letter in enumerate(letters)])
    subjects = read_subjects("cmmlu", tmp_path, "test", 2)
    records = [
        {"subject": name, "answer": question.answer, "shots": shots, "predicted": predicted}
        for name, subject in subjects.items() for question, shots, predicted, _ in ask(model, tokenizer, TASKS["cmmlu"], "letter", subject, [])
    ]  # fmt: skip
    tasks.print_report(records, subjects)
    printed = capsys.readouterr().out.splitlines()
    cells = {line.split(" (")[0]: line.split(")")[1].split() for line in printed if "±" in line}
    shown = {label: (float(mean), float(error)) for label, (mean, _, error) in cells.items()}
    right = {name: [letter == "A" for letter in letters] for name, letters in answers.items()}
    error = lambda group: (statistics.pvariance(group) / len(group)) ** 0.5  # of the mean of n draws
    flat = [x for group in right.values() for x in group]
    assert shown["all, mean of questions"] == pytest.approx((100 * statistics.mean(flat), 100 * error(flat)), abs=0.006)
    macro = statistics.mean(map(statistics.mean, right.values()))
    macro_error = sum(error(group) ** 2 for group in right.values()) ** 0.5 / 3
    assert shown["all, mean of subjects"] == pytest.approx((100 * macro, 100 * macro_error), abs=0.006)
    assert shown["STEM"] == pytest.approx((50, 100 * 0.5 / 2**0.5), abs=0.006)
    assert shown["Humanities"][0] == pytest.approx(25)
    given = {line.split()[1]: float(line.split()[-1]) for line in printed if line.startswith(("answered", "no answer"))}
    assert given == {"A": 100, "B": 0, "C": 0, "D": 0, "answer": 0}


def test_the_command(small_data, tmp_path):
    longer = (*TINY, "--block-size", 256, "--batch-tokens", 512, "--steps", 2, "--save-every", 1)
    call("train.py", "--data", small_data, "--out", tmp_path / "run", *longer)
    steps = sorted((tmp_path / "run").glob("step-*"))
    rows = [[f"第{i}题，谁是{'蜀' * i}主？", "曹操", "刘备", "孙权", "诸葛孔明", "B"] for i in range(5)]
    rows.append(["长" * 300, *"甲乙丙丁", "C"])
    for subject in ("arts", "chinese_history"):
        folder_of(tmp_path / "cmmlu", "cmmlu", subject, rows, rows[:2])
    out, png = tmp_path / "answers.jsonl", tmp_path / "curve.png"
    flags = ("--task", "cmmlu", "--questions", tmp_path / "cmmlu", "--shots", 2)
    shown = call("eval.py", *steps, *flags, "--out", out, "--png", png).stdout
    assert shown.count("cmmlu test, --score letter --shots 2\n") == 2 and shown.count("\n2 questions are too long for the context") == 2
    assert "China specific (6)" in shown and png.read_bytes().startswith(b"\x89PNG")
    table = shown.splitlines()[-4:]
    assert table[0].split()[:3] == ["mean", "of", "subjects"] and [line.split()[0] for line in table[1:3]] == list(map(str, steps))
    assert "always B" in table[0] and table[1].count("83.33") == 1  # five of six, by saying B
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 24 and {r["checkpoint"] for r in records} == {str(step) for step in steps}
    for record in records:
        assert record["predicted"]["longest option"] == ("A" if record["row"] == 7 else "D")
        assert record["predicted"]["letter"] == (None if record["row"] == 7 else "ABCD"[record["nats"].index(max(record["nats"]))])
        assert record["shots"] == (None if record["row"] == 7 else 2)
    assert "room for fewer" not in shown
    model, tokenizer = Decoder.load(steps[0]), load_tokenizer(small_data)  # its training had an end of text in front of every document
    subject = read_subjects("cmmlu", tmp_path / "cmmlu", "test", 2)["arts"]
    _, ids, _, letters = pose(tokenizer, TASKS["cmmlu"], "letter", subject, 256, [tokenizer.eos_id])[0]
    assert records[0]["nats"] == pytest.approx(log_likelihoods(model, [ids], [letters])[0], abs=1e-4)
    shown = call("eval.py", steps[0], *flags, "--score", "continuation").stdout
    assert all(measure in shown for measure in ("plain", "per character", "per byte"))
    assert "no answer" in call("eval.py", steps[0], *flags[:-2], "--score", "chat").stdout
    (tmp_path / "test.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n', encoding="utf-8")
    shown = call("eval.py", steps[0], "--task", "gsm8k", "--questions", tmp_path, "--shots", 0).stdout
    assert "gsm8k test, --score generate --shots 0\n" in shown
    call("train.py", "--data", small_data, "--out", tmp_path / "seq", *TINY, "--steps", 1, "--dispatch", "sequence")
    refused(call("eval.py", tmp_path / "seq", *flags, ok=False), "dispatch = sequence", "--score chat")
    with pytest.raises(SystemExit, match="has no state.json.*--data, --text or --task"):
        data_of(tmp_path)
