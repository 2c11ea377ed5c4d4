"""train.py --report: the lines of metrics.jsonl, mirrored to TensorBoard, wandb or SwanLab.

A thread does it, so that a slow or failing reporter neither stops nor slows the run: what does not fit its queue is
dropped, and the first failure is one line on stderr. metrics.jsonl has everything in any case.
"""

import queue
import sys
import threading

WAIT = 15  # seconds that the end of a run waits for what is not yet reported


def tensorboard(run, settings, first_step):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)  # a resumed run has its steps once

    def write(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def wandb(run, settings, first_step):
    import wandb

    name = run.resolve().name
    own = wandb.init(project="nanosteel", name=name, id=name, resume="allow", dir=str(run), config=settings)
    return lambda step, values: own.log(values, step=step), own.finish


def swanlab(run, settings, first_step):
    import swanlab

    name = run.resolve().name
    swanlab.init(project="nanosteel", experiment_name=name, logdir=str(run / "swanlab"), config=settings)
    return lambda step, values: swanlab.log(values, step=step), swanlab.finish


REPORTERS = {"tensorboard": tensorboard, "wandb": wandb, "swanlab": swanlab}


class Mirror:
    """add(values) for each line, close() at the end; neither raises anything."""

    def __init__(self, kind, run, settings, first_step):
        self.kind, self.lines, self.dropped = kind, queue.Queue(10_000), 0
        self.thread = threading.Thread(target=self.work, args=(run, settings, first_step), daemon=True)
        self.thread.start()

    def add(self, values):
        try:
            self.lines.put_nowait(values)
        except queue.Full:
            self.dropped += 1

    def close(self):
        self.add(None)
        self.thread.join(WAIT)
        late = self.thread.is_alive()
        if late or self.dropped:
            missing = "not all was sent in time" if late else f"{self.dropped} lines were dropped"
            print(f"warning: --report {self.kind}: {missing}; metrics.jsonl has them", file=sys.stderr)

    def work(self, run, settings, first_step):
        try:
            write, end = REPORTERS[self.kind](run, settings, first_step)
            while (values := self.lines.get()) is not None:
                numbers = {name: value for name, value in values.items() if name != "step" and value is not None}
                write(values["step"], numbers)
            end()
        except BaseException as error:  # also what a package raises to end the process
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(f"warning: --report {self.kind} failed, the run goes on ({problem})", file=sys.stderr)
            while self.lines.get() is not None:
                pass
