"""Benchmarks from their published folders: C-Eval (arXiv 2305.08322), CMMLU (2306.09212) and others of its format,
MMLU (2009.03300), GSM8K (2110.14168).

    python eval.py out/demo --task cmmlu --questions cmmlu               # a folder with dev/*.csv and test/*.csv
    python eval.py out/demo --task ceval --questions ceval --score continuation
    python eval.py out/demo --task gsm8k --questions gsm8k               # test.jsonl, and train.jsonl for the shots
    python eval.py out/demo/step-* --task cmmlu --questions cmmlu --out answers.jsonl --png curve.png

--score letter         the likeliest of the four letters after question and options
        continuation   the likeliest option after the question, where neither it nor its shots list the options (cloze
                       form, arXiv 2406.08446): by log-likelihood, and the same per character and per byte
        chat           the letter (GSM8K: the last number) in a greedy answer to a user's turn, asked as Steel-LLM asks
                       (arXiv 2502.06635); the answer is found by rules of our own
        steel          the same, found by Steel-LLM's own rules for C-Eval and CMMLU, gaps in questions and the length
                       of answers as there, so that percentages can be compared with the paper's
        generate       GSM8K: the last number in a greedy continuation of shots and question
"""

import csv
import functools
import itertools
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from checkpoint import load
from common import track, write_atomically
from extras.answers import LETTERS, STEEL, Steel, last_number, letter_in
from extras.plot import pyplot
from extras.subjects import CEVAL_HARD, SUBJECTS
from sample import chat_ids, generate, prompt_prefix

CHAT = ("chat", "steel")  # scores that ask as a user does
BATCH_TOKENS = 16_384  # in a batch, counting the shots that its rows share


class Task(NamedTuple):
    header: str = ""  # first in the prompt; {} is the subject's name
    before: str = ""  # before each question
    opening: str = "Answer:"  # before each answer
    space: str = " "  # between the two
    split: str = "test"  # scored by default
    macro: bool = False  # whether its authors average over subjects, not over questions
    new_tokens: int = 64  # the most tokens of an answer in words
    steel: Steel | None = None  # for --score steel


CEVAL_HEADER = "以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n"
CMMLU_HEADER = "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n"
MMLU_HEADER = "The following are multiple choice questions (with answers) about  {}.\n\n"
TASKS = {
    "ceval": Task(CEVAL_HEADER, opening="答案：", space="", split="val", macro=True, steel=STEEL["ceval"]),
    "cmmlu": Task(CMMLU_HEADER, before="题目：", opening="答案是：", space="", macro=True, steel=STEEL["cmmlu"]),
    "mmlu": Task(MMLU_HEADER),
    "gsm8k": Task(before="Question: ", new_tokens=256),
}
MAPPING = "{subject: [English name, Chinese name, category]}, for C-Eval that of github.com/hkust-nlp/ceval"


# ----------------------------------------------------------------------------------------------------------------------
# Questions


class Question(NamedTuple):
    row: int  # in its file, from 1; a header counts
    text: str
    options: tuple  # empty for GSM8K
    answer: str  # the letter; GSM8K: the number
    solution: str  # the right option's text; GSM8K: the worked answer


class Subject(NamedTuple):
    name: str  # in the prompt
    categories: list
    questions: list
    examples: list  # shown before each question


def read_csv(path, has_header):
    """The questions of one official file. Cells are taken literally: an option may be "None", "NA" or "null"."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: expected the folder as published") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a csv file in UTF-8 ({error}): download it again") from None
    wanted = ["question", *LETTERS.lower(), "answer"]
    columns = [name.strip().lower() for name in rows[0]] if has_header and rows else wanted
    if missing := ", ".join(name for name in wanted if name not in columns):
        raise ValueError(f"{path}, row 1: no column {missing} (a split without answers? choose another with --split)")
    questions = []
    for number, row in enumerate(rows, 1):
        if not any(row) or has_header and number == 1:  # spreadsheets leave empty rows, and cells at the ends of others
            continue
        if not any(row[len(columns) :]):
            row = row[: len(columns)]
        if len(row) != len(columns):
            raise ValueError(f"{path}, row {number}: {len(row)} columns, expected {len(columns)}")
        text, *options, answer = (row[columns.index(name)] for name in wanted)
        if (answer := answer.strip()) not in tuple(LETTERS):
            raise ValueError(f"{path}, row {number}: the answer is {answer!r}, expected one of A, B, C, D")
        questions.append(Question(number, text, tuple(options), answer, options[LETTERS.index(answer)]))
    return questions


def read_gsm8k(path):
    """The questions of a .jsonl file."""
    questions, number = [], 1
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in ((n, line) for n, line in enumerate(file, 1) if line.strip()):
                row = json.loads(line)
                answer = last_number(row["answer"].rpartition("####")[2])
                if answer is None:
                    raise ValueError
                questions.append(Question(number, str(row["question"]), (), answer, row["answer"]))
    except FileNotFoundError:
        raise ValueError(f"{path}: expected GSM8K's test.jsonl, and train.jsonl unless --shots 0") from None
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        wanted = '{"question": ..., "answer": "... #### N"}'
        raise ValueError(f"{path}, line {number}: expected {wanted}") from None
    return questions


def subject_names(task, folder, subjects):
    """{subject: (name in the prompt, [categories])}, from SUBJECTS or the folder's subject_mapping.json."""
    known = {}
    for category, listed in SUBJECTS.get(task, {}).items():
        for subject, _, name in (item.partition("/") for item in listed.split()):
            categories = [category, "China specific"] if name.endswith("*") else [category]
            known[subject] = (name.rstrip("*") or subject.replace("_", " "), categories)
    path = folder / "subject_mapping.json"
    if task != "mmlu" and path.exists():
        known = {}
        try:
            for subject, entry in json.loads(path.read_text(encoding="utf-8")).items():
                known[subject] = (entry[1], entry[2:] + ["Hard"] * (subject in CEVAL_HARD))
        except (ValueError, AttributeError, TypeError, LookupError):
            raise ValueError(f"{path}: expected {MAPPING}") from None
    for subject in subjects:
        if not subject.isascii():  # ACLUE's files have Chinese names
            known[subject] = (subject, [])
    if missing := [subject for subject in subjects if subject not in known]:
        some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        raise ValueError(f"no name for {some}, which the prompt needs: expected {path} with {MAPPING}")
    return known


def read_subjects(task, folder, split, shots):
    """{subject: Subject} of a published folder. The examples are the first `shots` questions of dev (GSM8K: train)."""
    folder = Path(folder)
    if task == "gsm8k":
        files = {"gsm8k": (folder / f"{split}.jsonl", folder / "train.jsonl")}
        names, read = {"gsm8k": ("", [])}, read_gsm8k
    else:
        files = {}
        for path in sorted((folder / split).glob("[!.]*.csv")):  # macOS leaves a ._NAME.csv beside each
            subject = path.stem.removesuffix(f"_{split}")
            files[subject] = (path, folder / "dev" / path.name.replace(f"_{split}.csv", "_dev.csv"))
        if not files:
            raise ValueError(
                f"{folder / split}: no .csv files: expected folders dev and {split} of {task} as published"
            )
        names = subject_names(task, folder, files)
        read = functools.partial(read_csv, has_header=task != "mmlu")
    subjects = {}
    for subject, (path, examples_path) in files.items():
        questions, examples = read(path), read(examples_path)[:shots] if shots else []
        if not questions:
            raise ValueError(f"{path} has no questions: download it again")
        if len(examples) < shots:
            raise ValueError(f"{examples_path} has {len(examples)} questions, --shots {shots} asks for more")
        subjects[subject] = Subject(*names[subject], questions, examples)
    return subjects


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


class Prompt(NamedTuple):
    question: Question
    ids: list | None  # None: too long for the context even without shots
    shots: int | None  # how many it has
    options: list  # the ids of each answer that is scored by its likelihood


def render(task, question, listed=True, answer=None):
    """One question as text, with an answer a shot. listed: whether its options follow it."""
    options = [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options)] if listed else []
    text = "\n".join([task.before + question.text, *options, task.opening])
    return text if answer is None else f"{text}{task.space}{answer}\n\n"


def user_turn(question, gap=("", "")):
    """What a user asks in Steel-LLM's chat form, gap[0] in the question replaced by gap[1]."""
    if not question.options:
        return question.text
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, question.options))
    return f"以下是一道单选题:\n{question.text.replace(*gap)}\n\n{options}\n请给出答案。\n"


def letter_ids(tokenizer, task):
    """The ids of the four letters after a prompt. ValueError unless they are one token each."""
    spelled = [tokenizer.encode(task.opening + task.space + letter) for letter in LETTERS]
    if len({tuple(ids[:-1]) for ids in spelled}) > 1:
        problem = f"the letters after {task.opening!r} are not one token each"
        raise ValueError(f"{tokenizer.path}: {problem}: use --score continuation")
    return [ids[-1] for ids in spelled]


def encode_prompt(tokenizer, task, score, text, prefix):
    """The ids of a prompt up to where the answer begins."""
    if score in CHAT:
        return chat_ids(tokenizer, [{"role": "user", "content": text}], prefix)
    if score == "letter":  # encoded with a letter, as the space before it is part of the letter's token
        return prefix + tokenizer.encode(text + task.space + "A")[:-1]
    return prefix + tokenizer.encode(text)


def fit_shots(encode, header, shots, question, room):
    """Drop shots, the first one first, until a prompt has at most room ids -> (ids, shots left), or (None, None)."""
    for first in range(len(shots) + 1):
        ids = encode(header + "".join(shots[first:]) + question)
        if len(ids) <= room:
            return ids, len(shots) - first
    return None, None


def build_prompts(tokenizer, task, score, subject, context, prefix):
    """A Prompt for each question of a Subject, for a model whose context has so many tokens. prefix: the first ids."""
    header = "" if score in CHAT else task.header.format(subject.name)
    listed = score != "continuation"
    shots = [render(task, q, listed, q.answer if score == "letter" else q.solution) for q in subject.examples]
    letters = letter_ids(tokenizer, task) if score == "letter" else []
    gap = [task.steel.gap] if score == "steel" else []
    encode = functools.partial(encode_prompt, tokenizer, task, score, prefix=prefix)
    prompts = []
    for question in subject.questions:
        options = [[i] for i in letters]
        if not listed:
            options = [tokenizer.encode(task.space + option) for option in question.options]
        room = context - (max(map(len, options)) - 1 if options else new_tokens(task, score, context))
        text = user_turn(question, *gap) if score in CHAT else render(task, question, listed)
        prompts.append(Prompt(question, *fit_shots(encode, header, shots, text, room), options))
    return prompts


def new_tokens(task, score, context):
    """The most tokens of an answer in words: three quarters of the context are for the question."""
    return min(task.steel.new_tokens if score == "steel" else task.new_tokens, context // 4)


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def repeat_cache(model, cache, batch, max_len):
    """Copy a cache of one text for a batch of texts that begin with it, with room for max_len positions."""
    copy = model.new_cache(batch, max_len)
    copy.length, copy.bounded, copy.start = cache.length, cache.bounded, cache.start.repeat(batch, 1)
    for new, old in zip(copy.k + copy.v, cache.k + cache.v):
        new[:, :, : cache.length] = old[:, :, : cache.length]
    copy.recent = [[a.repeat(batch, 1, 1) for a in recent] for recent in cache.recent]
    return copy


@torch.no_grad()
def last_states(model, rows, counts):
    """Yield the final hidden states of the last counts[i] ids of rows[i], [counts[i], D].

    The common prefix of all rows (a subject's shots) is read once into a cache, which is repeated for each batch. The
    rest of each row has right padding, which no earlier position can see.
    """
    device = model.embedding.device
    shared = os.path.commonprefix(rows)
    shared = shared[: min(len(row) - count for row, count in zip(rows, counts))]
    prefix = model.new_cache(1, len(shared))
    if shared:
        model.hidden_states(torch.tensor([shared], device=device), prefix)
    batch = max(1, BATCH_TOKENS // max(map(len, rows)))
    for start in range(0, len(rows), batch):
        rests = [torch.tensor(row[len(shared) :]) for row in rows[start : start + batch]]
        ids = torch.nn.utils.rnn.pad_sequence(rests, batch_first=True).to(device)
        states = model.hidden_states(ids, repeat_cache(model, prefix, len(rests), len(shared) + ids.shape[1]))
        for i, rest in enumerate(rests):
            yield states[i, len(rest) - counts[start + i] : len(rest)]


@torch.no_grad()
def log_likelihoods(model, prompts, options):
    """log p(option | prompt) in nats: prompts are lists of ids, options[i] lists of ids to follow prompts[i].

    An empty option has -inf, so that it is never chosen. The result has the shape of options.
    """
    places = {}  # (input row, how many of its last states are needed) -> options: those of one token share a row
    for i, (prompt, choices) in enumerate(zip(prompts, options)):
        for j, option in enumerate(choices):
            if option:
                places.setdefault((tuple(prompt + option[:-1]), len(option)), []).append((i, j))
    nats = [[-math.inf] * len(choices) for choices in options]
    if not places:
        return nats
    for states, where in zip(last_states(model, *zip(*places)), places.values()):
        log_p = F.linear(states, model.head_weight).log_softmax(-1)
        for i, j in where:
            nats[i][j] = log_p.gather(1, torch.tensor(options[i][j], device=log_p.device)[:, None]).sum().item()
    return nats


def continue_greedily(model, tokenizer, prompts, max_new_tokens):
    """Yield the text that follows each prompt, a list of ids."""
    device = model.embedding.device
    stops = (tokenizer.eos_id, tokenizer.chat_end_id, -1)  # -1: the row's context is full
    batch = max(1, BATCH_TOKENS // (max(map(len, prompts)) + max_new_tokens)) if model.has_cache else 1
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        width = max(map(len, some))
        ids = torch.tensor([[-1] * (width - len(prompt)) + prompt for prompt in some], device=device)
        steps = []
        ended = torch.zeros(len(some), dtype=torch.bool, device=device)
        for new in generate(model, ids, max_new_tokens, tokenizer.vocab_size, temperature=0):
            steps.append(new)
            ended |= torch.isin(new, torch.tensor(stops, device=device))
            if ended.all():
                break
        for row in torch.stack(steps, dim=1).tolist():
            yield tokenizer.decode(itertools.takewhile(lambda i: i not in stops, row))


def answer_in(text, task, score, question):
    """The letter or number in a greedy continuation. What follows a further question that it asks itself is ignored."""
    if score == "steel":
        return task.steel.letter(text, question)
    return letter_in(text) if question.options else last_number(text.split(task.before)[0])


def likeliest(question, nats):
    """{measure: letter} from the log-likelihoods of a question's options."""
    lengths = {
        "plain": [1] * 4,
        "per character": [len(option) for option in question.options],
        "per byte": [len(option.encode("utf-8")) for option in question.options],
    }
    return {name: LETTERS[max(range(4), key=lambda j: nats[j] / max(1, by[j]))] for name, by in lengths.items()}


def ask(model, tokenizer, task, score, subject, prefix):
    """Yield (question, shots, {measure: answer or None}, {"nats" or "text": what it rests on}) for a Subject."""
    measures = ("plain", "per character", "per byte") if score == "continuation" else (score,)
    context = model.config.block_size
    groups = {}  # by the number of shots: prompts with equally many share their beginning
    for prompt in build_prompts(tokenizer, task, score, subject, context, prefix):
        groups.setdefault(prompt.shots, []).append(prompt)
    for shots, group in groups.items():
        questions, prompts, _, options = zip(*group)
        if shots is None:
            yield from ((question, None, dict.fromkeys(measures), {}) for question in questions)
        elif score in ("letter", "continuation"):
            for question, nats in zip(questions, log_likelihoods(model, prompts, options)):
                letters = likeliest(question, nats)
                predicted = letters if score == "continuation" else {score: letters["plain"]}
                yield question, shots, predicted, {"nats": [n if n > -math.inf else None for n in nats]}
        else:
            texts = continue_greedily(model, tokenizer, prompts, new_tokens(task, score, context))
            for question, text in zip(questions, texts):
                yield question, shots, {score: answer_in(text, task, score, question)}, {"text": text}


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def mean_and_error(groups):
    """The mean over groups of booleans of the share that is true, and its standard error, both in percent."""
    shares = [sum(group) / len(group) for group in groups]
    variance = sum(share * (1 - share) / len(group) for share, group in zip(shares, groups)) / len(groups) ** 2
    return 100 * sum(shares) / len(groups), 100 * math.sqrt(variance)


def averages(records, macro):
    """{measure: (mean, standard error)} in percent of right answers: over subjects if macro, else over questions."""
    result = {}
    for measure in records[0]["predicted"]:
        groups = {}
        for record in records:
            groups.setdefault(macro and record["subject"], []).append(record["predicted"][measure] == record["answer"])
        result[measure] = mean_and_error(list(groups.values()))
    return result


def print_row(label, cells):
    print((f"{label:<32}" + "".join(f"{cell:>17}" for cell in cells)).rstrip())


def print_averages(label, row):
    print_row(label, (f"{mean:.2f} ± {error:5.2f}" for mean, error in row.values()))


def print_report(records, subjects):
    """Right answers by category and over all, and how often each answer was given, in percent."""
    print_row("right, in percent (questions)", records[0]["predicted"])
    for category in dict.fromkeys(name for subject in subjects.values() for name in subject.categories):
        some = [record for record in records if category in subjects[record["subject"]].categories]
        print_averages(f"{category} ({len(some):,})", averages(some, True))
    if len(subjects) > 1:
        print_averages(f"all, mean of subjects ({len(records):,})", averages(records, True))
    print_averages(f"all, mean of questions ({len(records):,})", averages(records, False))
    answers = [Counter(record["predicted"][measure] for record in records) for measure in records[0]["predicted"]]
    for answer in [*LETTERS, None] if records[0]["answer"] in LETTERS else [None]:
        label = f"answered {answer}" if answer else "no answer"
        print_row(label, (f"{100 * counts[answer] / len(records):.2f}        " for counts in answers))
    most = max(len(subject.examples) for subject in subjects.values())
    if fewer := sum(record["shots"] < most for record in records if record["shots"] is not None):
        print(f"{fewer:,} prompts had room for fewer than {most} shots")
    if too_long := sum(record["shots"] is None for record in records):
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


# ----------------------------------------------------------------------------------------------------------------------


def score_checkpoint(args, checkpoint, subjects, device):
    """The checkpoint's path, and a record of every answer with those of two baselines: the longest, and always one."""
    model, tokenizer, info = load(checkpoint)
    model.to(device).eval()
    if not model.has_cache and args.score in ("letter", "continuation"):
        problem = "dispatch = sequence reads what it is to predict: no likelihoods"
        raise ValueError(f"{info.path}: {problem}, use --score chat")
    questions = [question for subject in subjects.values() for question in subject.questions]
    commonest = Counter(question.answer for question in questions).most_common(1)[0][0]
    records = []
    prefix = prompt_prefix(tokenizer, info)
    answers = (
        (name, *answer)
        for name, subject in subjects.items()
        for answer in ask(model, tokenizer, TASKS[args.task], args.score, subject, prefix)
    )
    for name, question, shots, predicted, basis in track(answers, args.task, "questions", total=len(questions)):
        if question.options:
            longest = LETTERS[max(range(4), key=lambda j: len(question.options[j]))]
            predicted |= {"longest option": longest, f"always {commonest}": commonest}
        record = {"checkpoint": str(info.path), "subject": name, "row": question.row, "answer": question.answer}
        records.append(record | {"shots": shots, "predicted": predicted, **basis})
    return info.path, records


def run(args, device):
    """python eval.py --task: score every checkpoint, print its report, write --out and --png."""
    task = TASKS[args.task]
    split = args.split or task.split
    subjects = read_subjects(args.task, args.questions, split, args.shots)
    plt = pyplot() if args.png else None  # now, so that a missing matplotlib is reported before the work
    records, results = [], []
    for checkpoint in args.checkpoints:
        path, new = score_checkpoint(args, checkpoint, subjects, device)
        print(f"{path}: {args.task} {split}, --score {args.score} --shots {args.shots}")
        print_report(new, subjects)
        results.append((path, averages(new, task.macro)))
        records += new
        if args.out:  # after each checkpoint, so that nothing is lost if a later one fails
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_atomically(Path(args.out), "".join(lines).encode("utf-8"))
    if len(results) > 1:
        print_row("mean of subjects" if task.macro else "mean of questions", results[0][1])
        for path, row in results:
            print_averages(str(path), row)
    if args.png:
        draw(plt, results, args.png)
