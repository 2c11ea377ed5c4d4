"""Benchmarks from their published folders: C-Eval (arXiv 2305.08322), CMMLU (2306.09212) and others of its shape, MMLU (2009.03300),
GSM8K (2110.14168).

    python eval.py out/demo --task cmmlu --questions cmmlu               # a folder with dev/*.csv and test/*.csv
    python eval.py out/demo --task ceval --questions ceval --score continuation
    python eval.py out/demo --task gsm8k --questions gsm8k               # test.jsonl, and train.jsonl for the shots
    python eval.py out/demo/step-* --task cmmlu --questions cmmlu --out answers.jsonl --png curve.png

--score letter         the likeliest of the four letters behind question and options
        continuation   the likeliest option behind the question, which does not list them and whose shots do not either
                       (the cloze form of arXiv 2406.08446): plain, per character and per byte
        chat           the letter (GSM8K: the last number) in a greedy answer to a user's turn, asked as Steel-LLM does (arXiv
                       2502.06635); it reads answers by rules of its own, so that its percentages are not comparable to the last digit
        generate       GSM8K: the last number in a greedy continuation of question and shots
"""

import csv
import itertools
import json
import math
import os
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import Decoder
from sample import chat_ids, generate, what_stands_in_front
from sources import write_atomically
from tokenizer import load_tokenizer

LETTERS = "ABCD"
BATCH_TOKENS = 16_384  # of a batch, the shots that its rows share included


class Task(NamedTuple):
    split: str  # scored by default
    header: str  # {}: the subject's name
    before: str  # stands before the question
    opening: str  # the answer follows it, behind space
    space: str
    macro: bool  # whether its authors average over subjects, not over questions
    new_tokens: int  # how long an answer in words may be


TASKS = {
    "ceval": Task("val", "以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n", "", "答案：", "", True, 64),
    "cmmlu": Task("test", "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n", "题目：", "答案是：", "", True, 64),
    "mmlu": Task("test", "The following are multiple choice questions (with answers) about {}.\n\n", "", "Answer:", " ", False, 64),
    "gsm8k": Task("test", "", "Question: ", "Answer:", " ", False, 256),
}

# Subjects and their categories as in the repositories haonan-li/CMMLU and hendrycks/test: subject/name in the prompt; * is China specific.
SUBJECTS = {
    "cmmlu": {
        "STEM":
            "anatomy/解剖学 astronomy/天文学 college_actuarial_science/大学精算学 college_engineering_hydrology/大学工程水文学 college_mathematics/大学数学 "
            "college_medical_statistics/大学医学统计 conceptual_physics/概念物理学 electrical_engineering/电气工程 elementary_mathematics/初等数学 "
            "genetics/遗传学 high_school_biology/高中生物 high_school_chemistry/高中化学 computer_science/计算机科学 high_school_mathematics/高中数学 "
            "high_school_physics/高中物理学 machine_learning/机器学习 virology/病毒学",
        "Humanities":
            "arts/艺术学 chinese_history/中国历史* chinese_literature/中国文学* college_law/大学法律 global_facts/全球事实 international_law/国际法学 "
            "jurisprudence/法理学 logical/逻辑学 marxist_theory/马克思主义理论 philosophy/哲学 professional_law/专业法学 world_history/世界历史 "
            "world_religions/世界宗教",
        "Social Science":
            "ancient_chinese/古汉语* business_ethics/商业伦理 chinese_civil_service_exam/中国公务员考试* chinese_food_culture/中国饮食文化* "
            "chinese_foreign_policy/中国外交政策* chinese_teacher_qualification/中国教师资格* college_education/大学教育学 economics/经济学 education/教育学 "
            "elementary_chinese/小学语文* ethnology/民族学* high_school_geography/高中地理 high_school_politics/高中政治* journalism/新闻学 management/管理学 "
            "marketing/市场营销 modern_chinese/现代汉语* professional_accounting/专业会计 professional_psychology/专业心理学 public_relations/公共关系 "
            "security_study/安全研究 sociology/社会学",
        "Other":
            "agronomy/农学 chinese_driving_rule/中国驾驶规则* clinical_knowledge/临床知识 college_medicine/大学医学 computer_security/计算机安全 "
            "construction_project_management/建设工程管理* elementary_commonsense/小学常识* elementary_information_and_technology/小学信息技术 "
            "food_science/食品科学 human_sexuality/人类性行为 legal_and_moral_basis/法律与道德基础 nutrition/营养学 professional_medicine/专业医学 "
            "sports_science/体育学 traditional_chinese_medicine/中医中药*",
    },
    "mmlu": {
        "STEM":
            "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics college_physics "
            "computer_security conceptual_physics electrical_engineering elementary_mathematics high_school_biology high_school_chemistry "
            "high_school_computer_science high_school_mathematics high_school_physics high_school_statistics machine_learning",
        "Humanities":
            "formal_logic high_school_european_history high_school_us_history high_school_world_history international_law jurisprudence "
            "logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law world_religions",
        "Social Science":
            "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_microeconomics "
            "high_school_psychology human_sexuality professional_psychology public_relations security_studies sociology us_foreign_policy",
        "Other":
            "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing medical_genetics "
            "miscellaneous nutrition professional_accounting professional_medicine virology",
    },
}  # fmt: skip
MAPPING = "{subject: [English name, Chinese name, category]}, for C-Eval that of github.com/hkust-nlp/ceval"
CEVAL_HARD = (
    "advanced_mathematics discrete_mathematics probability_and_statistics college_physics college_chemistry "
    "high_school_mathematics high_school_physics high_school_chemistry"
).split()


# ---------------------------------------------------------------------------------------------------------------
# Questions


class Question(NamedTuple):
    row: int  # in its file, from 1; a header counts
    text: str
    options: tuple  # none for GSM8K
    answer: str  # the letter; GSM8K: the number
    solution: str  # the right option in words; GSM8K: the worked answer


class Subject(NamedTuple):
    name: str  # in the prompt
    categories: list
    questions: list
    examples: list  # to be shown before each question


def read_csv(path, has_header):
    """The questions of one official file. Cells are taken as they stand: an option may say None, NA or null."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file: expected the folder as published")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path} is not a csv file in UTF-8 ({error}): download it again")
    wanted = ["question", *LETTERS.lower(), "answer"]
    columns = [name.strip().lower() for name in rows[0]] if has_header and rows else wanted
    if missing := [name for name in wanted if name not in columns]:
        raise SystemExit(f"{path}, row 1: no column {', '.join(missing)} (a split without answers? choose another with --split)")
    questions = []
    for number, row in enumerate(rows, 1):
        if not row or has_header and number == 1:
            continue
        if len(row) != len(columns):
            raise SystemExit(f"{path}, row {number}: {len(row)} columns, expected {len(columns)}")
        text, *options, answer = (row[columns.index(name)] for name in wanted)
        answer = answer.strip()
        if answer not in tuple(LETTERS):
            raise SystemExit(f"{path}, row {number}: the answer is {answer!r}, expected one of A, B, C, D")
        questions.append(Question(number, text, tuple(options), answer, options[LETTERS.index(answer)]))
    return questions


def read_gsm8k(path):
    """The questions of a .jsonl file."""
    questions, number = [], 1
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                answer = last_number(row["answer"].rpartition("####")[2])
                if answer is None:
                    raise ValueError
                questions.append(Question(number, str(row["question"]), (), answer, row["answer"]))
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file: expected GSM8K's test.jsonl, and train.jsonl unless --shots 0")
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        raise SystemExit(f'{path}, line {number}: expected {{"question": ..., "answer": "... #### N"}}')
    return questions


def names_of(task, folder, subjects):
    """{subject: (name in the prompt, [categories])}."""
    known = {}
    for category, listed in SUBJECTS.get(task, {}).items():
        for subject, _, name in (item.partition("/") for item in listed.split()):
            known[subject] = (name.rstrip("*") or subject.replace("_", " "), [category] + ["China specific"] * name.endswith("*"))
    path = folder / "subject_mapping.json"
    if task != "mmlu" and path.exists():
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            known = {subject: (entry[1], entry[2:] + ["Hard"] * (subject in CEVAL_HARD)) for subject, entry in entries.items()}
        except (ValueError, AttributeError, TypeError, LookupError):
            raise SystemExit(f"{path}: expected {MAPPING}")
    known |= {subject: (subject, []) for subject in subjects if not subject.isascii()}  # ACLUE's files have Chinese names
    if missing := [subject for subject in subjects if subject not in known]:
        some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        raise SystemExit(f"no name for {some}, which the prompt needs: expected {path} with {MAPPING}")
    return known


def read_subjects(task, folder, split, shots):
    """{subject: Subject} of a folder as published, with the first so many questions of dev (GSM8K: train) as examples."""
    folder = Path(folder)
    if task == "gsm8k":
        files = {"gsm8k": (folder / f"{split}.jsonl", folder / "train.jsonl")}
        names, read = {"gsm8k": ("", [])}, read_gsm8k
    else:
        files = {}
        for path in sorted((folder / split).glob("*.csv")):
            subject = path.stem.removesuffix(f"_{split}")
            files[subject] = (path, folder / "dev" / path.name.replace(f"_{split}.csv", "_dev.csv"))
        if not files:
            raise SystemExit(f"{folder / split}: no .csv files: expected the folders dev and {split} of {task} as published")
        names, read = names_of(task, folder, files), lambda path: read_csv(path, task != "mmlu")
    subjects = {}
    for subject, (path, examples) in files.items():
        subjects[subject] = Subject(*names[subject], read(path), read(examples)[:shots] if shots else [])
        if not subjects[subject].questions:
            raise SystemExit(f"{path} has no questions: download it again")
        if len(subjects[subject].examples) < shots:
            raise SystemExit(f"{examples} has {len(subjects[subject].examples)} questions, --shots {shots} asks for more")
    return subjects


# ---------------------------------------------------------------------------------------------------------------
# Prompts


def render(task, question, listed=True, answer=None):
    """One question as text; with an answer it is a shot. listed: its options stand below it."""
    options = [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options)] if listed else []
    text = "\n".join([task.before + question.text, *options, task.opening])
    return text if answer is None else f"{text}{task.space}{answer}\n\n"


def user_turn(question):
    """What a user asks in the chat form of Steel-LLM."""
    if not question.options:
        return question.text
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, question.options))
    return f"以下是一道单选题:\n{question.text}\n\n{options}\n请给出答案。\n"


def fit(encode, header, shots, question, room):
    """-> (ids, number of shots): the first shots are dropped until the prompt has at most room ids; (None, None) if none of it helps."""
    for first in range(len(shots) + 1):
        ids = encode(header + "".join(shots[first:]) + question)
        if len(ids) <= room:
            return ids, len(shots) - first
    return None, None


def letter_ids(tokenizer, task):
    """The ids of the four letters behind a prompt, where they differ in the last token only."""
    spelled = [tokenizer.encode(task.opening + task.space + letter) for letter in LETTERS]
    if len({tuple(ids[:-1]) for ids in spelled}) > 1:
        raise SystemExit(f"{tokenizer.path}: the letters behind {task.opening!r} are not one token each: use --score continuation")
    return [ids[-1] for ids in spelled]


# ---------------------------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def last_states(model, rows, counts):
    """Yield the normed states of the last counts[i] ids of rows[i], [counts[i], D].

    What all rows begin with, the shots of a subject, is read once into a cache and repeated. The rests are padded on the
    right, where no position that is asked for can see it.
    """
    device, shared = model.embedding.device, os.path.commonprefix(rows)
    shared = shared[: min(len(row) - count for row, count in zip(rows, counts))]
    prefix = model.new_cache(1, len(shared))
    if shared:
        model.hidden(torch.tensor([shared], device=device), prefix)
    batch = max(1, BATCH_TOKENS // max(map(len, rows)))
    for start in range(0, len(rows), batch):
        rests = [torch.tensor(row[len(shared) :]) for row in rows[start : start + batch]]
        ids = torch.nn.utils.rnn.pad_sequence(rests, batch_first=True).to(device)
        states = model.hidden(ids, prefix.repeat(len(rests), len(shared) + ids.shape[1]))
        for i, rest in enumerate(rests):
            yield states[i, len(rest) - counts[start + i] : len(rest)]


@torch.no_grad()
def log_likelihoods(model, prompts, options):
    """log p(option | prompt) in nats: prompts are lists of ids, options[i] the lists of ids that may follow -> as options."""
    places = {}  # of one input row and what is asked of its end: options of one token share a row
    for i, (prompt, choices) in enumerate(zip(prompts, options)):
        for j, option in enumerate(choices):
            if option:
                places.setdefault((tuple(prompt + option[:-1]), len(option)), []).append((i, j))
    nats = [[-math.inf] * len(choices) for choices in options]  # of an empty option: it is never chosen
    for states, where in zip(last_states(model, *zip(*places)) if places else (), places.values()):
        log_p = F.linear(states, model.head_weight).log_softmax(-1)
        for i, j in where:
            nats[i][j] = log_p.gather(1, torch.tensor(options[i][j], device=log_p.device)[:, None]).sum().item()
    return nats


def continue_greedily(model, tokenizer, prompts, max_new_tokens):
    """Yield the text that follows each prompt, a list of ids."""
    device, stops = model.embedding.device, (tokenizer.eos_id, tokenizer.chat_end_id, -1)  # -1: the context is full
    batch = max(1, BATCH_TOKENS // (max(map(len, prompts)) + max_new_tokens)) if model.has_cache else 1
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        width = max(map(len, some))
        ids = torch.tensor([[-1] * (width - len(prompt)) + prompt for prompt in some], device=device)
        new, ended = [], torch.zeros(len(some), dtype=torch.bool, device=device)
        for step in generate(model, ids, max_new_tokens, tokenizer.vocab_size, temperature=0):
            new.append(step)
            ended |= torch.isin(step, torch.tensor(stops, device=device))
            if ended.all():
                break
        for row in torch.stack(new, dim=1).tolist():
            yield tokenizer.decode(itertools.takewhile(lambda i: i not in stops, row))


def letter_in(text):
    """The letter that an answer in words names: the one behind 答案 or "answer", else the first that stands alone, else None."""
    found = re.search(r"(?:答案|[Aa]nswer)[^A-Z\n]{0,10}([A-D])(?![A-Za-z])", text) or re.search(r"(?<![A-Za-z])([A-D])(?![A-Za-z])", text)
    return found and found[1]


def last_number(text):
    """The last number of a text, without commas and zeros at its end, or None: 1,200.50 -> 1200.5."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return format(Decimal(numbers[-1].replace(",", "")).normalize(), "f") if numbers else None


def answer_in(text, task, question):
    """The letter or number that a greedy continuation gives; what it goes on to ask itself does not count."""
    return letter_in(text) if question.options else last_number(text.split(task.before)[0])


def pose(tokenizer, task, score, subject, context, front):
    """-> [(question, ids of its prompt, number of shots, options as ids)] of a Subject, for a model with a context of so many tokens.

    front: ids in front of every prompt. One that does not fit in without shots is None, and so is its number of shots.
    """
    encode = {
        "letter": lambda text: front + tokenizer.encode(text + task.space + "A")[:-1],
        "chat": lambda text: chat_ids(tokenizer, [{"role": "user", "content": text}], front),
    }.get(score, lambda text: front + tokenizer.encode(text))
    header, listed = "" if score == "chat" else task.header.format(subject.name), score != "continuation"
    shots = [render(task, q, listed, q.answer if score == "letter" else q.solution) for q in subject.examples]
    letters = letter_ids(tokenizer, task) if score == "letter" else []
    posed = []
    for question in subject.questions:
        options = [[i] for i in letters] if listed else [tokenizer.encode(task.space + option) for option in question.options]
        room = context - (max(map(len, options)) - 1 if options else new_tokens(task, context))
        asked = user_turn(question) if score == "chat" else render(task, question, listed)
        posed.append((question, *fit(encode, header, shots, asked, room), options))
    return posed


def new_tokens(task, context):
    """How long an answer in words may be: most of the context is for the question."""
    return min(task.new_tokens, context // 4)


def ask(model, tokenizer, task, score, subject, front):
    """Yield (question, number of shots, {measure: answer or None}, {"nats" or "text": what it rests on}) for the questions of a Subject."""
    measures = ("plain", "per character", "per byte") if score == "continuation" else (score,)
    groups = {}  # by the number of shots: prompts with equally many begin alike
    for posed in pose(tokenizer, task, score, subject, model.config.block_size, front):
        groups.setdefault(posed[2], []).append(posed)
    for shown, group in groups.items():
        questions, prompts, _, options = zip(*group)
        if shown is None:
            yield from ((question, None, dict.fromkeys(measures), {}) for question in questions)
        elif score in ("letter", "continuation"):
            for question, nats in zip(questions, log_likelihoods(model, prompts, options)):
                lengths = ([1] * 4, [len(o) for o in question.options], [len(o.encode("utf-8")) for o in question.options])
                best = [max(range(4), key=lambda j: nats[j] / max(1, by[j])) for by in lengths]
                known = [n if n > -math.inf else None for n in nats]
                yield question, shown, {measure: LETTERS[j] for measure, j in zip(measures, best)}, {"nats": known}
        else:
            for question, text in zip(questions, continue_greedily(model, tokenizer, prompts, new_tokens(task, model.config.block_size))):
                yield question, shown, {score: answer_in(text, task, question)}, {"text": text}


# ---------------------------------------------------------------------------------------------------------------
# Tables


def mean_and_error(groups):
    """The mean over groups of the share of each that is true, and its standard error, both in percent."""
    shares = [sum(group) / len(group) for group in groups]
    variance = sum(share * (1 - share) / len(group) for share, group in zip(shares, groups)) / len(groups) ** 2
    return 100 * sum(shares) / len(groups), 100 * math.sqrt(variance)


def averages(records, macro):
    """{measure: (mean, standard error)} in percent of right answers: over subjects where macro, else over questions."""
    result = {}
    for measure in records[0]["predicted"]:
        groups = {}
        for record in records:
            groups.setdefault(macro and record["subject"], []).append(record["predicted"][measure] == record["answer"])
        result[measure] = mean_and_error(list(groups.values()))
    return result


def print_row(label, cells):
    print((f"{label:<32}" + "".join(f"{cell:>17}" for cell in cells)).rstrip())


def print_report(records, subjects):
    """Right answers by category and over all, and what was answered, in percent."""

    def show(label, some, macro):
        print_row(f"{label} ({len(some):,})", (f"{mean:.2f} ± {error:5.2f}" for mean, error in averages(some, macro).values()))

    print_row("right, in percent (questions)", records[0]["predicted"])
    for category in dict.fromkeys(name for subject in subjects.values() for name in subject.categories):
        show(category, [record for record in records if category in subjects[record["subject"]].categories], True)
    if len(subjects) > 1:
        show("all, mean of subjects", records, True)
    show("all, mean of questions", records, False)
    given = [Counter(record["predicted"][measure] for record in records) for measure in records[0]["predicted"]]
    for answer in [*LETTERS, None] if records[0]["answer"] in LETTERS else [None]:
        label = f"answered {answer}" if answer else "no answer"
        print_row(label, (f"{100 * counts[answer] / len(records):.2f}        " for counts in given))
    too_long = sum(record["shots"] is None for record in records)
    most = max(len(subject.examples) for subject in subjects.values())
    fewer = sum(record["shots"] < most for record in records if record["shots"] is not None)
    if fewer:
        print(f"{fewer:,} prompts had room for fewer than {most} shots")
    if too_long:
        print(f"{too_long:,} questions are too long for the context: counted as wrong")


def draw(plt, results, path):
    """The averages of several checkpoints: results [(path, {measure: (mean, error)})]."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for measure in results[0][1]:
        means, errors = zip(*(row[measure] for _, row in results))
        axis.errorbar(range(len(results)), means, errors, label=measure, marker="o", capsize=3)
    axis.set(ylabel="right, in percent", xticks=range(len(results)))
    axis.set_xticklabels([checkpoint.name for checkpoint, _ in results], rotation=30, ha="right")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    print(f"drawn: {path}")


def pyplot():
    """matplotlib without a screen."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot
    except ImportError:
        raise SystemExit("--png needs matplotlib: pip install matplotlib")
    return matplotlib.pyplot


def run(args, device):
    """eval.py --task."""
    task = TASKS[args.task]
    split = args.split or task.split
    subjects = read_subjects(args.task, args.questions, split, args.shots)
    questions = [question for subject in subjects.values() for question in subject.questions]
    constant = Counter(question.answer for question in questions).most_common(1)[0][0]
    plt = pyplot() if args.png else None  # before the work, not behind it
    records, results = [], []
    for given in args.checkpoints:
        model = Decoder.load(given).to(device).eval()
        tokenizer = load_tokenizer(model.checkpoint, model.config.vocab_size)
        if not model.has_cache and args.score in ("letter", "continuation"):
            raise SystemExit(f"{model.checkpoint}: dispatch = sequence reads what it is to predict: no likelihoods, use --score chat")
        mine = []
        with tqdm(total=len(questions), desc=args.task, unit="question", disable=None) as bar:
            for name, subject in subjects.items():
                for question, shots, predicted, why in ask(model, tokenizer, task, args.score, subject, what_stands_in_front(model, tokenizer)):
                    if question.options:
                        longest = LETTERS[max(range(4), key=lambda j: len(question.options[j]))]
                        predicted |= {"longest option": longest, f"always {constant}": constant}
                    mine.append({"checkpoint": str(model.checkpoint), "subject": name, "row": question.row, "answer": question.answer,
                                 "shots": shots, "predicted": predicted, **why})  # fmt: skip
                    bar.update()
        print(f"{model.checkpoint}: {args.task} {split}, --score {args.score} --shots {args.shots}")
        print_report(mine, subjects)
        results.append((model.checkpoint, averages(mine, task.macro)))
        records += mine
        if args.out:  # what is done is kept, whatever becomes of the next
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_atomically(Path(args.out), "".join(lines).encode("utf-8"))
    if len(results) > 1:
        print_row("mean of subjects" if task.macro else "mean of questions", results[0][1])
        for checkpoint, row in results:
            print_row(str(checkpoint), (f"{mean:.2f} ± {error:5.2f}" for mean, error in row.values()))
    if args.png:
        draw(plt, results, args.png)
