"""Our own architecture in transformers, by the code in its folder: in a process that knows nothing of nanoSteel."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import TINY, call
from test_huggingface import ours
from test_model import SMALL, randomized

from extras.huggingface import export_folder, load_folder
from extras.transformers_tokenizer import transformers_files
from model import Decoder
from sample import generate
from tokenizer import load_tokenizer

# Run elsewhere: sys.argv[1] is the folder, [2] a .pt file of what is asked; prints nothing, saves what is found
ELSEWHERE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
assert not any("nanosteel" in name.lower() for name in sys.modules)
folder, asked = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
"""
KINDS = [
    {},
    {"expert": "swiglu2", "slots_per_expert": 2, "tie_embeddings": True},
    {"dispatch": "token", "window": 1},
    {"qk_norm": True, "head_dim": 10},
    {"reset_id": 0},
    {"ffn": "dense", "head_dim": 10},
    {"value_embedding": True},
]


def elsewhere(code, folder, asked, tmp_path):
    """Run code after ELSEWHERE, in an empty folder without this repository -> what it saves as `found`."""
    torch.save(asked, tmp_path / "asked.pt")
    empty = tmp_path / "empty"
    empty.mkdir(exist_ok=True)
    command = [sys.executable, "-c", f"{ELSEWHERE}\n{code}\ntorch.save(found, '../found.pt')", folder, "../asked.pt"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return torch.load(tmp_path / "found.pt", weights_only=True)


def exported(tmp_path, **changes):
    """A random model of ours, and its folder; ids 48 and 49 are never sampled, so no text ends early."""
    model = ours(**changes)
    ends = {"bos_token_id": 49, "eos_token_id": [49], "pad_token_id": 49}
    export_folder(model, tmp_path / "out", {}, ends, (48, 49))
    return model, tmp_path / "out"


def greedy(model, ids, n):
    """[B, T] -> what our sampler adds, [B, n]."""
    return torch.stack(list(generate(model, ids, n, 48, temperature=0)), dim=1)


@pytest.mark.parametrize("changes", KINDS, ids=str)
@torch.no_grad()
def test_logits_loss_and_greedy_text_are_ours(changes, tmp_path):
    model, folder = exported(tmp_path, **changes)
    ids = torch.randint(1, 48, (2, 40))
    labels = ids.clone()
    labels[:, :7] = -100
    code = """
ids, labels = asked["ids"], asked["labels"]
prompt = {"input_ids": ids[:1, :5], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
found = {"logits": model(ids).logits, "last": model(ids, logits_to_keep=3).logits,
         "loss": model(ids, labels=labels).loss, "greedy": model.generate(**prompt, do_sample=False, max_new_tokens=55),
         "long": model.generate(**prompt, do_sample=False, max_new_tokens=150),
         "uncached": model.generate(**prompt, do_sample=False, max_new_tokens=150, use_cache=False)}
"""
    found = elsewhere(code, folder, {"ids": ids, "labels": labels}, tmp_path)
    logits = model(ids)
    close = {"rtol": 0, "atol": 1e-5 * logits.abs().max().item()}
    torch.testing.assert_close(found["logits"], logits, **close)
    torch.testing.assert_close(found["last"], logits[:, -3:], **close)
    targets = labels[:, 1:].masked_fill(labels[:, 1:] == -100, -1)
    torch.testing.assert_close(found["loss"], model(ids[:, :-1], targets), rtol=1e-5, atol=0)
    assert torch.equal(found["greedy"][:, 5:], greedy(model, ids[:1, :5], 55))
    assert torch.equal(found["long"], found["uncached"]) and found["long"].shape == (1, 155)  # past block_size = 64


@torch.no_grad()
def test_padded_batches_sampling_and_beams(tmp_path):
    """With the cache as without, row by row as alone; beams reorder the cache."""
    model, folder = exported(tmp_path)
    ids = torch.randint(1, 48, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = mask[2, :1] = 0
    code = """
batch = {"input_ids": asked["ids"], "attention_mask": asked["mask"]}
found = {"logits": model(**batch).logits}
for name, flags in {"greedy": {"do_sample": False}, "beams": {"num_beams": 4, "do_sample": False},
                    "sampled": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
                    "several": {"do_sample": True, "num_return_sequences": 2}}.items():
    for use_cache in (True, False):
        torch.manual_seed(0)
        found[name, use_cache] = model.generate(**batch, max_new_tokens=30, use_cache=use_cache, **flags)
right = asked["mask"].flip(1)
found["right"] = model(asked["ids"], attention_mask=right).logits
try:
    model(asked["ids"], attention_mask=right * asked["mask"])
except ValueError as error:
    found["refusal"] = str(error)
found = {str(name): value for name, value in found.items()}
"""
    found = elsewhere(code, folder, {"ids": ids, "mask": mask}, tmp_path)
    for row, own, logits in zip(ids, mask.bool(), found["logits"]):
        torch.testing.assert_close(logits[own], model(row[own][None])[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found["right"], model(ids), rtol=0, atol=1e-4)
    assert found["refusal"] == "attention_mask: expected zeros on one side of each text alone"
    padded = ids.masked_fill(mask == 0, -1)
    assert torch.equal(found["('greedy', True)"][:, 9:], greedy(model, padded, 30))
    for name in ("greedy", "beams", "sampled", "several"):
        assert torch.equal(found[f"('{name}', True)"], found[f"('{name}', False)"]), name
    assert not torch.equal(found["('beams', True)"], found["('greedy', True)"])
    assert not torch.equal(found["('sampled', True)"], found["('greedy', True)"])


def test_saved_again_in_bf16_and_with_gradient_checkpointing(tmp_path):
    model, folder = exported(tmp_path, expert="swiglu2", tie_embeddings=True)
    ids = torch.randint(1, 48, (2, 30))
    code = """
model.save_pretrained("../again")
again = AutoModelForCausalLM.from_pretrained("../again", trust_remote_code=True).eval()
half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True),
                                         trust_remote_code=True)
gradients = []
for model in (again, again):
    model.train().zero_grad()
    model(asked["ids"], labels=asked["ids"], use_cache=True).loss.backward()
    gradients.append([p.grad.clone() for p in model.parameters()])
    model.gradient_checkpointing_enable()
assert all(block.recompute for block in again.model.decoder.blocks) and again.is_gradient_checkpointing
again.gradient_checkpointing_disable()
assert not any(block.recompute for block in again.model.decoder.blocks)
from transformers import AutoModel
backbone = AutoModel.from_pretrained("../again", trust_remote_code=True).eval()
states = backbone(asked["ids"]).last_hidden_state
found = {"backbone": states @ again.get_output_embeddings().weight.T,
         "again": again.eval()(asked["ids"]).logits, "half": half(asked["ids"]).logits,
         "fresh": fresh(asked["ids"], labels=asked["ids"]).loss,
         "equal": all(torch.equal(a, b) for a, b in zip(*gradients)), "gradients": gradients[0]}
found = {name: value.detach() if torch.is_tensor(value) else value for name, value in found.items()}
"""
    found = elsewhere(code, folder, {"ids": ids}, tmp_path)
    model(ids[:, :-1], ids[:, 1:]).backward()
    assert found["equal"]
    for theirs, (name, p) in zip(found["gradients"], model.named_parameters(), strict=True):
        torch.testing.assert_close(theirs, p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item(), msg=name)
    with torch.no_grad():
        torch.testing.assert_close(found["again"], model(ids), rtol=0, atol=1e-4)
        torch.testing.assert_close(found["backbone"], model(ids), rtol=0, atol=1e-4)
        assert torch.equal(found["half"], model.bfloat16()(ids))
    assert abs(found["fresh"].item() - math.log(50)) < 0.1  # a new model, as we begin one
    back, _ = load_folder(tmp_path / "again")
    assert back.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), load_folder(folder)[0].parameters()))


@torch.no_grad()
def test_the_published_layer_runs_there_without_a_cache(tmp_path):
    model, folder = exported(tmp_path, dispatch="sequence")
    ids = torch.randint(1, 48, (1, 12))
    code = """
found = {"logits": model(asked["ids"]).logits, "text": model.generate(asked["ids"], do_sample=False, max_new_tokens=9)}
try:
    model(asked["ids"], attention_mask=torch.tensor([[0] + [1] * 11]))
except ValueError as error:
    found["refusal"] = str(error)
"""
    found = elsewhere(code, folder, {"ids": ids}, tmp_path)
    torch.testing.assert_close(found["logits"], model(ids), rtol=0, atol=1e-4)
    assert torch.equal(found["text"][:, 12:], greedy(model, ids, 9))
    assert found["refusal"] == 'dispatch = "sequence" reads padding too: give it texts of one length'


@pytest.mark.parametrize("flags", [[], ["--ffn", "dense", "--qk-norm"]], ids=["own code", "qwen3"])
def test_the_lines_of_the_model_card_run(flags, small_data, tmp_path):
    call("train.py", "--data", small_data, "--out", tmp_path / "run", *TINY, "--steps", 2, *flags)
    call("extras.export", tmp_path / "run", "--export", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert ("trust_remote_code" in card) == (not flags) and "512 tokens of `data`, in 2 steps" in card
    scores = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = next(record for record in reversed(scores) if "val_loss" in record)
    assert f"| all | {last['val_loss']:.4f} | {last['val_bpb']:.4f} |" in card
    lines = card.partition("```python\n")[2].partition("```")[0]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    lines = lines.replace('"FOLDER"', repr(str(tmp_path / "hf")))
    result = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0 and "却说" in result.stdout, result.stderr


TRAIN = """
import sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
before = [p.clone() for p in model.parameters()]
flags = dict(max_steps=1, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True, bf16=False)
args = SFTConfig(output_dir="trl", gradient_checkpointing=True, max_length=64, **flags)
texts = Dataset.from_list([{"text": text} for text in ["却说曹操引兵。", "玄德曰：善。", "次日", "且听下回分解。"]])
trainer = SFTTrainer(model=model, args=args, train_dataset=texts, processing_class=tokenizer)
found = {"loss": trainer.train().training_loss}
found["changed"] = sum(not torch.equal(p, q) for p, q in zip(before, model.parameters()))
torch.save(found, "found.pt")
"""


@torch.no_grad()
def test_a_step_of_trl_has_our_loss(small_data, tmp_path):
    tokenizer = load_tokenizer(small_data)
    model = randomized(Decoder(replace(SMALL, vocab_size=tokenizer.vocab_size)), std=0.1)
    files = {name: text.encode("utf-8") for name, text in transformers_files(tokenizer).items()}
    export_folder(model, tmp_path / "hf", files, {"eos_token_id": tokenizer.eos_id})
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", TRAIN, tmp_path / "hf"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    texts = ["却说曹操引兵。", "玄德曰：善。", "次日", "且听下回分解。"]
    rows = [torch.tensor([*tokenizer.encode(text), tokenizer.eos_id])[None] for text in texts]  # TRL adds the end
    nats = sum(model(ids[:, :-1], ids[:, 1:], reduction="sum").item() for ids in rows)
    assert found["loss"] == pytest.approx(nats / sum(ids.shape[1] - 1 for ids in rows), rel=1e-4)
    assert found["changed"] == len(list(model.parameters()))
