"""Past one process: workers that each take the next unfinished item, and who starts them: this machine, Ray, SLURM.

A worker is a process of its own, with a model of its own. An item is claimed by a lock that dies with its process, so
what a worker leaves undone another takes up; results are written whole, where those of one process would be.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from masafusion_lab import InputError, interrupt
from masafusion_lab.axes import Launch

if TYPE_CHECKING:
    from masafusion_lab.data.case import Case

log = logging.getLogger(__name__)

AGAIN = 3
"""Times that a worker which died is started again."""


@dataclass(frozen=True)
class Worker:
    """What a worker is told: the task, the run folder whose config.yaml it reads, its device, and its threads."""

    task: Literal["sweep", "invert"]
    folder: str
    device: str
    threads: int

    def __call__(self) -> None:
        """Take the next item that nobody has, until all are settled."""
        import torch

        torch.set_num_threads(self.threads)
        waiting = dict(TASKS[self.task](Path(self.folder), self.device))
        while waiting:
            before = len(waiting)
            for name in list(waiting):
                with claimed(Path(self.folder) / "claims" / f"{name}.lock") as mine:
                    if mine:
                        waiting.pop(name)()
                interrupt.check()
            if len(waiting) == before:
                time.sleep(0.2)  # others are at them, and may die

    def checkpoint(self, *args: Any, **options: Any) -> Any:
        """What submitit queues when the job is preempted or out of time: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _sweep(folder: Path, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """The items of a sweep by name."""
    from masafusion_lab import config, lab, survey
    from masafusion_lab.request import cases_of
    from masafusion_lab.runner import Runner
    from masafusion_lab.runs import case_folder, read_json

    experiment = config.load([folder / "config.yaml"], [f"model.device={device}"])
    surveyed = survey.read(experiment, cases_of(experiment), folder)
    runner = Runner(surveyed, lab.build(experiment), rows=read_json(folder / "plan.json")["rows"])
    for n, (case, points) in enumerate(surveyed.items()):
        yield f"{case_folder(Path(), case.id)}-{n}", partial(runner.run, case, points)


def _invert(folder: Path, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """The inversions by case."""
    from masafusion_lab import config, phases
    from masafusion_lab.request import cases_of
    from masafusion_lab.runs import case_folder

    experiment = config.load([folder / "config.yaml"], [f"model.device={device}"])
    lab = phases.build(experiment)

    def one(case: Case) -> None:
        for _ in phases.invert(lab, [case], lost=lambda *_: None):  # whoever started it tells
            pass

    for case in cases_of(experiment):
        yield str(case_folder(Path(), case.id)), partial(one, case)


TASKS = {"sweep": _sweep, "invert": _invert}
"""By name the items of a run folder, each with what runs it; an item that is done runs in no time."""


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone has the claim in here; nobody has it of a process that died."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def launch(task: Literal["sweep", "invert"], folder: Path, how: Launch, device: str = "auto") -> None:
    """Run the items of a run folder by several workers. Raises InputError if a launcher is not installed.

    Whether all was done is for the caller to see: workers may have died.
    """
    LAUNCHERS[how.by](workers(task, folder, how, device), how, folder)


def workers(task: Literal["sweep", "invert"], folder: Path, how: Launch, device: str) -> list[Worker]:
    """One for each device, or as many as are asked for, which share the devices and the cores."""
    import torch

    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if device == "auto" else []
    if how.by in ("ray", "submitit"):
        gpus = [device]  # of another machine: it sees for itself
    devices = gpus or [device]
    count = how.workers or len(devices)
    threads = torch.get_num_threads() if how.by in ("ray", "submitit") else max(1, torch.get_num_threads() // count)
    return [Worker(task, str(Path(folder).absolute()), devices[n % len(devices)], threads) for n in range(count)]


def local(them: Sequence[Worker], how: Launch, folder: Path) -> None:
    """Workers as processes of this machine; one that dies is started again, but not for what cannot be used."""
    running: dict[int, subprocess.Popen[str]] = {}
    left = dict.fromkeys(range(len(them)), 1 + AGAIN)
    try:
        while left:
            for n in list(left):
                if n in running and running[n].poll() is None:
                    continue
                if n in running and running[n].returncode in (0, 2):
                    del left[n]
                    continue
                if n in running:
                    log.warning("worker %d died (%s); its log is worker-%d.log", n, running[n].returncode, n)
                if left[n] == 0:
                    del left[n]
                    continue
                left[n] -= 1
                running[n] = start(them[n], n, folder)
            interrupt.check()
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def start(worker: Worker, n: int, folder: Path) -> subprocess.Popen[str]:
    """A worker's process, whose words go to a file of its own."""
    threads = {name: str(worker.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with open(Path(folder) / f"worker-{n}.log", "a", encoding="utf-8") as file:
        command = [sys.executable, "-m", "masafusion_lab.launch", json.dumps(asdict(worker))]
        return subprocess.Popen(command, env=os.environ | threads, stdout=file, stderr=file, text=True)


def by_ray(them: Sequence[Worker], how: Launch, folder: Path) -> None:
    """Workers as Ray tasks, of a cluster that sees the same folders, or of one on this machine."""
    try:
        import ray
    except ImportError:
        raise InputError("launch.by=ray: Ray is not installed; pip install 'masafusion-lab[ray]'") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    ray.init(log_to_driver=False, **({"address": how.address} if how.address else own))
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=AGAIN)(work)
        for done in [task.remote(worker) for worker in them]:
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                log.warning("a worker died: %s", str(error).splitlines()[-1])
    finally:
        ray.shutdown()


def work(worker: Worker) -> None:
    """Be the worker: what Ray is given, which wants a function."""
    worker()


def by_submitit(them: Sequence[Worker], how: Launch, folder: Path) -> None:
    """Workers as an array of SLURM jobs, queued again when they are preempted; waits for them."""
    try:
        import submitit
    except ImportError:
        raise InputError("launch.by=submitit: it is not installed; pip install 'masafusion-lab[submitit]'") from None
    executor = submitit.AutoExecutor(folder=str(Path(folder) / "slurm"))
    executor.update_parameters(timeout_min=how.minutes, slurm_array_parallelism=len(them))
    if how.partition:
        executor.update_parameters(slurm_partition=how.partition)
    if them[0].device != "cpu":
        executor.update_parameters(gpus_per_node=1)
    with executor.batch():
        jobs = [executor.submit(worker) for worker in them]
    for job in jobs:
        try:
            job.result()
        except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
            log.warning("job %s failed: %s", job.job_id, str(error).splitlines()[-1])


LAUNCHERS: dict[str, Callable[[Sequence[Worker], Launch, Path], None]] = {
    "local": local,
    "ray": by_ray,
    "submitit": by_submitit,
}


def main(told: str) -> None:
    """Be a worker; exit status 2 for what cannot be used, which trying again does not change."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        with interrupt.handled():
            Worker(**json.loads(told))()
    except InputError as error:
        log.error("%s", error)
        sys.exit(2)
    except interrupt.Interrupted as stop:
        sys.exit(stop.code)


if __name__ == "__main__":
    main(sys.argv[1])
