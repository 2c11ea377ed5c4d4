"""What a run says of itself: its configuration, a line now and then, scores on held-out text and samples."""

import copy
import math
import platform
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from common import flops_per_token, peak_flops
from data import evenly_spaced, inputs_and_targets
from dpo import score_pairs
from eval import evaluate
from order import next_phase, source_histories
from sample import generate

MAX_EPOCHS = 4  # of a source, above which it is named
COUNTED_TARGETS = 1 << 16  # of the training data, to estimate the bytes of a token


def describe_machine(args, device, compiled, ranks):
    """What must stay the same for a resumed run to give the same bits."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "world": ranks.world,
        "shard": args.shard,
        "compile": compiled,
        "device": device,
        "bf16": args.bf16,
        "cpu": platform.machine(),
    }


def describe_run(args, model, data, n_micro, machine, state, ranks):
    """Print the resolved configuration, and what a step and an epoch break down to."""
    B, T, config = args.micro_batch, data.block_size, model.config
    for values in (asdict(config), vars(args)):
        ranks.say("  ".join(f"{key}={value}" for key, value in values.items()))
    ranks.say(f"{model.n_params():,} parameters, {flops_per_token(model, T) / 1e6:.1f} MFLOP a token; {machine}")
    product = f"micro-batch {B} x block {T} x {n_micro} micro-batches x {ranks.world} ranks"
    ranks.say(f"a step: {args.batch_tokens:,} tokens = {product}")
    steps = len(data) / (n_micro * B * ranks.world)
    ranks.say(f"an epoch: {len(data):,} samples = {len(data) * T:,} tokens = {steps:.1f} steps")
    for line in describe_mix(args, state, n_micro * B * ranks.world, T):
        ranks.say(line)
    if packed := data.packed():
        ranks.say(packed)
    if config.reads_ahead:
        ranks.say('warning: dispatch = "sequence" reads the tokens that it is to predict: its losses mean nothing')
    if machine["compile"]:
        ranks.say("compiling: the first step takes up to a minute")


def describe_mix(args, state, step_samples, T):
    """Lines: what a run serves of each source in all its phases, or a round of the mix where it ends with the time."""
    phases = copy.deepcopy(state.phases)
    samples = phases[-1]["samples"]
    if args.steps:
        phases[-1]["served"] += max(0, args.steps - state.step) * step_samples
    else:
        phases = next_phase([], samples, phases[-1]["places"])
        phases[-1]["served"] = sum(phases[-1]["places"].values())
    served = {source: sum(n for _, n in history) for source, history in source_histories(phases).items()}
    epochs = {source: served.get(source, 0) / n for source, n in samples.items() if n}
    total = max(1, sum(served.values()))
    if len(samples) > 1:
        served_by = "the run" if args.steps else "a round"
        yield f"{served_by} serves  {'tokens':>15}{'epochs':>8}{'share':>8}{'in the data':>13}"
        for source, n in epochs.items():
            own = served.get(source, 0)
            yield f"    {source:<18}{own * T:>15,}{n:>8.2f}{own / total:>8.1%}{samples[source] * T:>13,}"
    if often := [source for source, n in epochs.items() if n > MAX_EPOCHS]:
        yield f"warning: {', '.join(often)}: above {MAX_EPOCHS} epochs repeats teach less and less (arXiv 2305.16264)"


def bytes_per_token(data, tokenizer):
    """The mean over some of the training targets, for the bits per byte of a log line."""
    targets = np.concatenate([inputs_and_targets(data, i)[1] for i in evenly_spaced(data, COUNTED_TARGETS)])
    return np.mean([len(tokenizer.token_bytes[i]) for i in targets[targets >= 0]] or [1])


def in_words(values):
    return " | ".join(f"{name} {value:.3f}" for name, value in values.items())


class Reporter:
    """Prints log lines and writes the same numbers to metrics.jsonl. log: a checkpoint.Log on rank 0, else None."""

    def __init__(self, args, model, objective, data, tokenizer, log, ranks, state):
        self.args, self.model, self.tokenizer, self.log, self.ranks = args, model, tokenizer, log, ranks
        self.objective = objective
        self.scored = ("loss", *(objective.NAMES or ("bpb",)))  # what score finds and prints
        self.device = model.embedding.device.type
        self.block_size = model.config.block_size
        self.flops = flops_per_token(model, self.block_size)
        self.peak = peak_flops(self.device, args.bf16)
        self.bytes_per_token = bytes_per_token(data, tokenizer)
        self.step, self.seconds = state.step, state.seconds  # at the last line
        if log and args.report:
            log.report(args.report, Path(args.out), vars(args) | {"model": asdict(model.config)}, state.step)

    def line(self, state, sums, norm, lr):
        """The step that has just been made; time and speed are means since the last line.

        sums: of the objective over the step. Where nothing counts (questions whose answers are elsewhere), there is no
        loss.
        """
        total, count, *others = sums
        loss = total / count if count else math.nan
        others = {name: other / max(count, 1) for name, other in zip(self.objective.NAMES, others)}
        args, done, skipped = self.args, state.progress(self.args), state.skipped.item()
        took = (state.seconds - self.seconds) / (state.step - self.step)
        self.step, self.seconds = state.step, state.seconds
        speed = args.batch_tokens / took
        others = others or {"bpb": loss / math.log(2) / self.bytes_per_token}
        parts = [
            f"step {state.step:>5}/{args.steps or int(state.step / done):<5} {100 * done:5.1f}%",
            f"loss {loss:.4f} | {in_words(others)} | lr {lr:.1e} | norm {norm:.2f}"
            if count
            else "no answers to learn from",
            f"{1000 * took:4.0f} ms | {speed / 1000:.2f}k tok/s",
            f"mfu {100 * self.flops * speed / (self.peak * self.ranks.world):3.0f}%" if self.peak else "",
            f"eta {(state.seconds / done - state.seconds) / 60:.0f}m",
            f"skipped {skipped}" if skipped else "",
        ]
        self.ranks.say(" | ".join(part for part in parts if part))
        if self.log:
            self.log.add(
                step=state.step,
                loss=loss,
                **others,
                lr=lr,
                norm=norm,
                ms=1000 * took,
                seconds=state.seconds,
                skipped=skipped,
                tokens_per_second=speed,
                tokens=state.samples * self.block_size,
            )

    def score(self, state, val, max_tokens, stop):
        """Evaluate on held-out samples, and show a sample -> the scores by name; None if a signal came."""
        if self.objective.NAMES:
            batch = self.args.micro_batch
            result = score_pairs(self.model, val, self.objective, batch, max_tokens, self.ranks, stop.on_any_rank)
        else:
            result = evaluate(
                self.model,
                val,
                self.tokenizer.token_bytes,
                device=self.device,
                batch_tokens=self.args.micro_batch * self.block_size,
                max_tokens=max_tokens,
                rank=self.ranks.rank,
                world=self.ranks.world,
                stopping=stop.on_any_rank,
            )
        if result is None:
            return None
        counted = f"{result['pairs']:,} pairs" if self.objective.NAMES else f"{result['tokens']:,} tokens"
        self.ranks.say(f"step {state.step:>5} | {self.scores(result, ' | ')} | {counted}")
        if self.log and state.evaluated < state.step:
            parts = {"": result} | {f"/{source}": part for source, part in result.get("by", {}).items()}
            values = {f"val_{name}{of}": part[name] for of, part in parts.items() for name in self.scored}
            self.log.add(step=state.step, **values)
        state.evaluated = state.step
        if self.ranks.rank == 0 and not self.args.shard:  # a sharded model runs on all ranks or on none
            self.sample(val, state.step)
        return result

    def scores(self, result, between):
        """What score found, in words."""
        if not (result.get("tokens") or result.get("pairs")):
            return "no answers in the held-out samples"
        return between.join(f"val {name} {result[name]:.4f}" for name in self.scored)

    def sample(self, val, seed):
        """64 tokens that continue the first 8 of the held-out text, or of a chat what comes before its first answer."""
        counted = val.counted(0)
        first = 8 if counted is None or not counted.any() else int(counted.argmax()) + 1
        prompt = val[0][: min(first, max(8, self.block_size - 64))].tolist()
        ids = torch.tensor([prompt], device=self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        vocab_size = self.tokenizer.vocab_size
        with torch.compiler.set_stance("force_eager"):  # compiled, every length would need code of its own
            steps = generate(self.model, ids, 64, vocab_size, temperature=0.8, top_p=0.95, generator=generator)
            new = [row.item() for row in steps]
        text = self.tokenizer.decode(prompt) + " | " + self.tokenizer.decode(new)
        self.ranks.say("    " + text.replace("\n", " "))

    def end(self, state, result, whole):
        """The last lines: of a finished run (result: its last evaluation), or of one that was stopped and saved."""
        run = self.args.out
        if result:
            tokens = state.samples * self.block_size
            scores = self.scores(result, ", ")
            self.ranks.say(f"done: step {state.step}, {scores}, tokens {tokens}, {state.seconds:.0f} s")
            run = shlex.quote(str(run))
            self.ranks.say(f"next: python sample.py {run}    python eval.py {run}")
        elif whole:
            self.ranks.say(f"stopped at step {state.step}; python train.py --resume --out {run} continues")
