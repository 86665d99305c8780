"""Past one process: workers that each take the next unfinished item, as processes of this machine or of clusters.

A worker is a process of its own, with a model of its own. An item is claimed by a lock that dies with its process, so
what a worker leaves undone another takes up; results are written whole, where those of one process would be.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from filelock import FileLock, Timeout

from masafusion_lab import InputError, interrupt
from masafusion_lab.axes import AGAIN, Launch
from masafusion_lab.clusters import by_ray, by_submitit
from masafusion_lab.inversion import Track, silent
from masafusion_lab.runs import explained

if TYPE_CHECKING:
    from masafusion_lab.data.case import Case

log = logging.getLogger(__name__)

Task: TypeAlias = Literal["bench", "sweep", "invert"]

SPOKEN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""What a line of a worker's log says."""


@dataclass(frozen=True)
class Worker:
    """What a worker is told: the task, the run folder whose config.yaml it reads, its device, threads and number."""

    task: Task
    folder: str
    device: str
    threads: int
    n: int = 0

    def __call__(self) -> None:
        """Take the next item that nobody has, until all are settled; what a worker died of comes after all others."""
        import torch

        logging.basicConfig(filename=self.log, level=logging.INFO, format=SPOKEN)
        torch.set_num_threads(self.threads)
        waiting = dict(TASKS[self.task](Path(self.folder), self.device))
        claims = Path(self.folder) / "claims"
        (begun := claims / "begun").mkdir(parents=True, exist_ok=True)  # a file for each item, of a byte for each time
        tries = dict.fromkeys(waiting, 0) | {file.name: file.stat().st_size for file in begun.iterdir()}
        log.info("worker %d begins, process %d: %d items", self.n, os.getpid(), len(waiting))
        while waiting:
            before = len(waiting)
            for name in sorted(waiting, key=tries.__getitem__):
                with claimed(claims / f"{name}.lock") as mine:
                    if mine:
                        run, mark = waiting.pop(name), settled(self.folder) / name
                        if not mark.exists():
                            with explained(begun), open(begun / name, "ab") as file:
                                file.write(b".")
                            run()
                            mark.touch()
                interrupt.check()
            if len(waiting) == before:
                time.sleep(0.2)  # others are at them, and may die

    @property
    def log(self) -> Path:
        """The file that its words go to."""
        return Path(self.folder) / f"worker-{self.n}.log"

    def checkpoint(self, *args: Any, **options: Any) -> Any:
        """What submitit queues when the job is preempted or out of time: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _bench(folder: Path, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """The parts of a benchmark by name."""
    from masafusion_lab import bench
    from masafusion_lab.runs import case_folder

    _, made = bench.read([folder / "config.yaml"], [f"model.device={device}", f"out={folder}"])
    labs = bench.labs_of_rows()
    for n, part in enumerate(made.parts()):
        yield f"{case_folder(Path(), *part.rows)}-{n}", partial(bench.edit, part, labs=labs)


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


TASKS = {"bench": _bench, "sweep": _sweep, "invert": _invert}
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


def settled(folder: Path | str) -> Path:
    """The folder with an empty file for each item that the workers of a launch have settled."""
    place = Path(folder) / "claims" / "settled"
    place.mkdir(parents=True, exist_ok=True)
    return place


def launch(
    task: Task, folder: Path, how: Launch, device: str = "auto", *, items: int = 0, track: Track = silent
) -> None:
    """Run the items of a run folder, so many, by several workers. Raises InputError if a launcher is not installed.

    Whether all was done is for the caller to see: workers may have died.
    """
    shutil.rmtree(settled(folder))
    them = workers(task, folder, how, device)
    with closing(LAUNCHERS[how.by](them, how, folder)) as looks:
        for n in track(range(items), f"{task}: launch.by={how.by}, {len(them)} workers"):
            for _ in looks:
                interrupt.check()
                if len(os.listdir(settled(folder))) > n:
                    break
        for _ in looks:
            interrupt.check()


def workers(task: Task, folder: Path, how: Launch, device: str) -> list[Worker]:
    """One for each device, or as many as are asked for, which share the devices and the cores."""
    import torch

    away = how.by in ("ray", "submitit")  # another machine, which sees for itself what it has
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if device == "auto" and not away else []
    devices = gpus or [device]
    count, cores = how.workers or len(devices), torch.get_num_threads()
    share = cores if how.by == "submitit" or how.address else max(1, cores // count)
    place = str(Path(folder).absolute())
    return [Worker(task, place, devices[n % len(devices)], how.cpus or share, n) for n in range(count)]


def local(them: Sequence[Worker], how: Launch, folder: Path) -> Generator[None, None, None]:
    """Workers as processes of this machine; one that dies is started again, but not for what cannot be used."""
    running: dict[int, subprocess.Popen[str]] = {}
    left = dict.fromkeys(range(len(them)), 1 + AGAIN)
    try:
        while left:
            for n in list(left):
                if n in running and running[n].poll() is None:
                    continue
                if n in running and running[n].returncode in (0, 2):
                    if running[n].returncode:
                        log.warning("worker %d cannot go on; why is the last line of %s", n, them[n].log.name)
                    del left[n]
                    continue
                if n in running:
                    log.warning("worker %d died (%s); its log is %s", n, running[n].returncode, them[n].log.name)
                if left[n] == 0:
                    del left[n]
                    continue
                left[n] -= 1
                running[n] = start(them[n])
            yield
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def start(worker: Worker) -> subprocess.Popen[str]:
    """A worker's process, whose words go to a file of its own."""
    threads = {name: str(worker.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with open(worker.log, "a", encoding="utf-8") as file:
        command = [sys.executable, "-m", "masafusion_lab.launch", json.dumps(asdict(worker))]
        return subprocess.Popen(command, env=os.environ | threads, stdout=file, stderr=file, text=True)


LAUNCHERS: dict[str, Callable[[Sequence[Worker], Launch, Path], Generator[None, None, None]]] = {
    "local": local,
    "ray": by_ray,
    "submitit": by_submitit,
}
"""By name who starts workers and waits for them; each yields now and then until they have ended."""


def main(told: str) -> None:
    """Be a worker; exit status 2 for what cannot be used, which trying again does not change."""
    logging.basicConfig(level=logging.INFO, format=SPOKEN)
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
