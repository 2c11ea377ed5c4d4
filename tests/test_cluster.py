"""prepare.py --cluster: a scheduler and two workers of dask.distributed on this machine, and kills."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import MANY_PARTS, ROOT, RUN, call, contents, free_port, python, refused

from corpus.cluster import run_task
from corpus.work import surroundings

# What a worker does first: shards of the same size, and a log of the parts that it cleans, each of which takes a while
PRELOAD = """
import os, sys, time
sys.path.insert(0, ROOT)
import prepare
from corpus import cleaning
prepare.SHARD_TOKENS = 20_000
if "TESTED" not in os.environ:
    os.environ["TESTED"] = "1"
    cleaned_documents = cleaning.cleaned_documents  # called for parts that are not found among the work files
    def slowly(part, *args):
        with open(LOG, "a") as log:
            print(os.getpid(), part.start, part.paths, file=log)
        time.sleep(0.7)
        return cleaned_documents(part, *args)
    cleaning.cleaned_documents = slowly
""".replace("ROOT", repr(str(ROOT)))


class Cluster:
    """A scheduler and workers in processes of their own."""

    def __init__(self, folder, workers, **environment):
        self.folder, self.environment = folder, {**os.environ, **environment}
        self.port, self.processes = free_port(), []
        self.address, self.log = f"tcp://127.0.0.1:{self.port}", folder / "log"
        (folder / "preload.py").write_text(PRELOAD.replace("LOG", repr(str(self.log))), encoding="utf-8")
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", self.port, until="Scheduler at")
        for _ in range(workers):
            flags = ["--nthreads", 1, "--no-nanny", "--preload", folder / "preload.py", "--local-directory", folder]
            self.start("worker", self.address, *flags, until="Registered to")

    def start(self, kind, *flags, until):
        command = [sys.executable, "-m", "dask", kind, *map(str, flags), "--no-dashboard"]
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.processes.append(process)
        for line in process.stderr:
            if until in line:
                return process
        raise RuntimeError(f"dask {kind} did not start")

    def prepare(self, raw, out):
        """Start prepare.py on this cluster; it compares 1,200 texts in six ranges of keys."""
        command = [sys.executable, "-c", RUN, raw, "--out", out, *MANY_PARTS, "--cluster", self.address]
        environment = {**self.environment, "PIECE": "200"}
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def begun(self):
        """[pid of the worker, the part] for each that was begun to be cleaned, in order."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return [line.split(" ", 1) for line in lines]

    def wait_for(self, parts):
        deadline = time.monotonic() + 60
        while len(self.begun()) < parts:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path):
    """cluster(workers, NAME=value of the environment) starts one."""
    started = []

    def start(workers, **environment):
        started.append(Cluster(tmp_path, workers, **environment))
        return started[-1]

    yield start
    for own in started:
        own.close()


def test_a_killed_worker_costs_its_part_and_the_bytes_are_those_of_one_process(raw, undisturbed, cluster, tmp_path):
    cluster, out = cluster(workers=2), tmp_path / "out"
    process = cluster.prepare(raw, out)
    cluster.wait_for(3)
    pid = cluster.begun()[-1][0]
    os.kill(int(pid), signal.SIGSTOP)
    part = [own for worker, own in cluster.begun() if worker == pid][-1]  # which it is at
    os.kill(int(pid), signal.SIGKILL)
    assert process.poll() is None
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    assert contents(out) == contents(undisturbed) and not (out / ".work").exists()
    begun = [own for _, own in cluster.begun()]
    assert len(set(begun)) == 18
    assert [own for own, n in Counter(begun).items() if n > 1] in ([part], [])  # []: it had just ended that one


def test_without_its_scheduler_a_run_ends_with_a_line_and_continues_on_another(raw, undisturbed, cluster, tmp_path):
    first, out = cluster(workers=2, DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT="2s"), tmp_path / "out"
    process = first.prepare(raw, out)
    first.wait_for(5)
    first.scheduler.kill()
    error = process.communicate(timeout=120)[1]
    refused(subprocess.CompletedProcess([], process.returncode, "", error), "cleaning: the scheduler is gone", "again")
    done = len(list((out / ".work").glob("*.jsonl")))
    first.close()
    first.log.unlink()
    second = cluster(workers=2)
    process = second.prepare(raw, out)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    assert contents(out) == contents(undisturbed) and 1 <= done < 18


def test_a_part_that_kills_its_workers_is_named(raw, cluster, tmp_path):
    cluster = cluster(workers=1, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
    process = cluster.prepare(raw, tmp_path / "out")
    cluster.wait_for(1)
    os.kill(int(cluster.begun()[0][0]), signal.SIGKILL)
    error = process.communicate(timeout=120)[1]
    result = subprocess.CompletedProcess([], process.returncode, "", error)
    refused(result, "cleaning: the same part killed several workers", "fewer --nworkers")


def test_bad_input_and_a_cluster_that_is_none_get_one_line(raw, cluster, tmp_path):
    out = tmp_path / "out"
    address = f"tcp://127.0.0.1:{free_port()}"
    nobody = call("prepare.py", raw, "--out", out, "--cluster", address, ok=False)
    refused(nobody, f"--cluster {address}: no scheduler answers", "dask scheduler")
    refused(
        call("prepare.py", raw, "--out", out, "--cluster", "here", ok=False), "--cluster here: no scheduler answers"
    )
    idle = cluster(workers=0)
    refused(
        python("prepare.py", raw, "--out", out, "--cluster", idle.address, ok=False), "the scheduler has no workers"
    )
    assert not out.exists()
    idle.close()
    damaged = tmp_path / "a.jsonl.gz"
    damaged.write_bytes(b"\x1f\x8b\x08\x00 this is no gzip")
    result = python("prepare.py", damaged, "--out", out, "--cluster", cluster(workers=1).address, ok=False)
    refused(result, f"{damaged}: damaged after line 1")


@pytest.mark.quick
def test_a_worker_elsewhere_or_with_other_packages_is_refused(tmp_path):
    own = {"folder": str(ROOT), "work": str(tmp_path), "root": str(ROOT), "surroundings": surroundings()}
    task = pickle.dumps((len, "four"))
    assert run_task(task, "a", **own) == 4
    with pytest.raises(ValueError, match="has another numpy than prepare.py .*not 1.0.*: restart it"):
        run_task(task, "a", **{**own, "surroundings": {**surroundings(), "numpy": "1.0"}})
    with pytest.raises(ValueError, match="has another code than prepare.py"):
        run_task(task, "a", **{**own, "surroundings": {**surroundings(), "code": "0"}})
    with pytest.raises(ValueError, match="does not see .*nowhere: .* all share"):
        run_task(task, "a", **{**own, "work": str(tmp_path / "nowhere")})
