"""README.md of an exported folder: what the model is, its data, its numbers and its limits."""

from pathlib import Path

from extras.huggingface import OWN
from extras.plot import read_run
from order import counts_at

FRONT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [nanosteel]
---

# {name}

{what} with {parameters} parameters, trained with nanoSteel.
Context: {context:,} tokens. Vocabulary: {vocabulary:,} ids.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
ids = {prompt}
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```
"""
EOS = "tokenizer.eos_token + "  # a document begins after one, if the model was trained so
TEXT_PROMPT = f'tokenizer({EOS}"却说", return_tensors="pt")'
CHAT_PROMPT = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "你好"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
CODE_NOTE = """
`trust_remote_code=True` runs `modeling_nanosteel.py` and `model.py` of this folder: read them first.
"""
LIMITS = """
## Limits

- {tuned}
- It repeats what its data say, also where that is wrong, old or offensive. nanoSteel filters nothing for safety.
- The numbers above are all that was measured here. Nothing is claimed about other languages, tasks or lengths.
"""


def model_card(model, tokenizer, info, kind):
    """-> text. What a Hugging Face folder was trained on is not known here, and the card says so."""
    config = model.config
    layer = "dense SwiGLU" if config.ffn == "dense" else f"{config.dispatch} Soft MoE of {config.n_expert} experts"
    text = FRONT.format(
        name=info.name,
        what=f"A decoder of {config.n_layer} layers of width {config.d_model} ({layer})",
        parameters=f"{model.n_params():,}",
        context=config.block_size,
        vocabulary=tokenizer.vocab_size,
        trust=", trust_remote_code=True" if kind == OWN else "",
        prompt=CHAT_PROMPT if info.chat else TEXT_PROMPT if info.eos_first else TEXT_PROMPT.replace(EOS, ""),
    )
    text += CODE_NOTE if kind == OWN else ""
    text += data_of(info.state, config.block_size) if info.state else "\n## Data\n\nNot recorded in the folder.\n"
    text += numbers_of(info)
    tuned = "It continues text: it was not tuned to answer, and not to refuse."
    return text + LIMITS.format(tuned="It was tuned on conversations, and not to refuse." if info.chat else tuned)


def data_of(state, T):
    """What a run was trained on: tokens of each source in all of its phases."""
    served = {}
    for phase in state["phases"]:
        for source, n in counts_at(phase, phase["served"]).items():
            served[source] = served.get(source, 0) + n * T
    total = sum(served.values())
    started = state["args"]["init_from"]
    lines = [
        "",
        "## Data",
        "",
        f"{total:,} tokens of `{Path(state['args']['data']).name}`, in {state['step']:,} steps:",
        "",
    ]
    lines += [f"- `{source}`: {n:,} tokens, {n / total:.1%}" for source, n in served.items() if n]
    lines += ["", f"It began with the weights of `{Path(started).name}`."] if started else []
    return "\n".join(lines) + "\n"


def numbers_of(info):
    """The last evaluation of the run up to this step, if its log is there."""
    try:
        fields = read_run(info.path.parent) if info.state else {}
    except ValueError:  # no log, or nothing in it
        return ""
    step = max((step for step in fields.get("val_loss", {}) if step <= info.state["step"]), default=None)
    if step is None:
        return ""
    rows = []
    for name, values in fields.items():
        if name.startswith("val_loss") and step in values:
            bpb = fields.get(name.replace("loss", "bpb", 1), {}).get(step)
            rows.append(f"| {name[9:] or 'all'} | {values[step]:.4f} | {'' if bpb is None else f'{bpb:.4f}'} |")
    head = [
        "",
        f"## Held-out text, step {step:,}",
        "",
        "| | nats per token | bits per byte |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"
