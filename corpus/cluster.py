"""prepare.py --cluster: its parts done by workers of dask.distributed, on as many machines as there are.

    dask scheduler                                              # on one machine
    dask worker tcp://HOST:8786 --nworkers 16 --nthreads 1      # on each machine
    python prepare.py raw/ --out data/mine --cluster tcp://HOST:8786

All machines see this folder, the inputs and --out on a shared disk, at the same paths. What is passed between them are
the tasks; what these find is in the work files of --out, as without a cluster. Whoever reaches the port of a dask
scheduler can run code on its workers: keep it in a network of your own.
"""

import contextlib
import functools
import logging
import math
import os
import pickle
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from common import track
from corpus.work import in_parallel, surroundings

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def worker_processes(workers, cluster, work):
    """Give run(function, tasks, what, total, unit), which is [function(task) for task in tasks] in several processes.

    They are `workers` new ones, or those of a cluster, by the address of its scheduler.
    """
    if not cluster:
        yield functools.partial(in_parallel, workers)
        return
    with connected(cluster) as client:
        yield functools.partial(on_cluster, client, work)


@contextlib.contextmanager
def connected(address):
    """Give a client of the scheduler at tcp://HOST:PORT. ValueError if there is none, or if it has no workers."""
    try:
        import distributed
    except ImportError:
        raise ValueError("--cluster needs dask.distributed: pip install distributed") from None
    fix = "start them: dask scheduler, and on each machine dask worker tcp://HOST:8786 --nworkers 16 --nthreads 1"
    logging.disable(logging.CRITICAL)  # what goes wrong is said in one line here
    try:
        url = urlsplit(address)
        socket.create_connection((url.hostname, url.port), timeout=10).close()  # dask itself would wait for it
        client = distributed.Client(address, timeout=10)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--cluster {address}: no scheduler answers ({error}); {fix}") from None
    with client:
        if not client.scheduler_info()["workers"]:
            raise ValueError(f"--cluster {address}: the scheduler has no workers; {fix}")
        yield client


def on_cluster(client, work, function, tasks, what, *_):
    """[function(task) for task in tasks] by the workers, which do what a killed one leaves. ValueError if none can."""
    import cloudpickle
    import distributed

    # The scheduler, and workers before they run it, cannot import this module: dask gets run_task's code, which it
    # sends only of functions that it cannot find by name, such as a lambda.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    run = lambda *args, **kwargs: run_task(*args, **kwargs)  # noqa: E731
    here = {"folder": os.getcwd(), "work": str(work.resolve()), "root": str(ROOT), "surroundings": surroundings()}
    # As bytes: dask itself would unpickle them before run_task has found the modules that they name.
    pickled = [cloudpickle.dumps((function, task)) for task in tasks]
    futures = client.map(run, pickled, [f"{what}-{i}" for i in range(len(tasks))], pure=False, **here)
    try:
        for future in track(distributed.as_completed(futures), what, "tasks", total=len(tasks)):
            if future.status == "error":
                break  # raised below
        return client.gather(futures)
    except distributed.scheduler.KilledWorker:
        fix = "give dask worker fewer --nworkers, and run the same command again"
        raise ValueError(f"{what}: the same part killed several workers, perhaps as memory ran out: {fix}") from None
    except (distributed.client.FutureCancelledError, distributed.comm.CommClosedError, TimeoutError):
        raise ValueError(f"{what}: the scheduler is gone: start it and run the same command again") from None
    finally:
        client.cancel(futures)


def run_task(pickled, name, folder, work, root, surroundings):
    """On a worker: unpickle (function, task) and call it, in the folder in which prepare.py was started."""
    host = socket.gethostname()
    for path in (folder, work, root):
        if not Path(path).is_dir():
            fix = "the checkout, the inputs and --out must be on a disk that all share, at the same paths"
            raise ValueError(f"the worker on {host} does not see {path}: {fix}")
    os.chdir(folder)
    if root not in sys.path:
        sys.path.insert(0, root)
    from common import lock_file
    from corpus import work as work_files

    own = work_files.surroundings()
    for key in own:
        if own[key] != surroundings[key]:
            differs = f"has another {key} than prepare.py ({own[key]}, not {surroundings[key]})"
            raise ValueError(f"the worker on {host} {differs}: restart it in the same environment")
    # A worker that was given up, or whose run was killed, may still be at the same part.
    with open(Path(work, f"{name}.lock"), "w", encoding="utf-8") as file:
        lock_file(file, wait=math.inf)
        function, task = pickle.loads(pickled)
        return function(task)
