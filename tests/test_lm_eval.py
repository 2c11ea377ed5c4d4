"""lm-evaluation-harness scores an exported folder as eval.py --task scores the checkpoint, question by question."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, call
from test_model import randomized

from extras.huggingface import export_folder
from extras.transformers_tokenizer import transformers_files
from model import Config, Decoder
from tokenizer import load_tokenizer

QUESTIONS = ROOT / "tests" / "lm_eval"


@pytest.mark.parametrize("changes", [{}, {"ffn": "dense", "qk_norm": True}], ids=["own code", "qwen3"])
def test_log_likelihoods_of_c_eval_are_those_of_lm_eval(changes, small_data, tmp_path):
    tokenizer = load_tokenizer(small_data)
    shape = {"n_layer": 2, "d_model": 32, "block_size": 512, "vocab_size": tokenizer.vocab_size}
    model = randomized(Decoder(Config(**shape, **changes)), std=0.2)
    files = {name: text.encode("utf-8") for name, text in transformers_files(tokenizer).items()}
    files[tokenizer.FILE] = tokenizer.content
    export_folder(model, tmp_path / "hf", files, {"eos_token_id": tokenizer.eos_id}, eos_first=True)

    flags = ["--task", "ceval", "--questions", QUESTIONS, "--shots", 2, "--out", tmp_path / "ours.jsonl"]
    said = call("eval.py", tmp_path / "hf", *flags).stdout
    ours = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(ours) == 8 and all(record["shots"] == 2 for record in ours), said

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = (QUESTIONS / "nanosteel_ceval.yaml").read_text(encoding="utf-8").replace("FOLDER", str(QUESTIONS))
    (tasks / "nanosteel_ceval.yaml").write_text(task, encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "3"]
    command += ["--model_args", f"pretrained={tmp_path / 'hf'},trust_remote_code=True,dtype=float32"]
    command += ["--tasks", "nanosteel_ceval", "--include_path", tasks, "--log_samples", "--output_path", tmp_path]
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = os.environ | offline
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    samples = next(tmp_path.rglob("samples_nanosteel_ceval_*.jsonl")).read_text(encoding="utf-8").splitlines()
    theirs = {}
    for sample in map(json.loads, samples):
        theirs[sample["doc"]["id"]] = [response[0] for response in sample["filtered_resps"]]
    for record in ours:
        got = [float(value) for value in theirs[record["row"] - 2]]  # the first question is in row 2
        assert got == pytest.approx(record["nats"], abs=1e-4)
