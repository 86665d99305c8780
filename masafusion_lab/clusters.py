"""Workers on clusters: as tasks of Ray, and as jobs of SLURM. Every machine sees the same folders."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masafusion_lab import InputError
from masafusion_lab.axes import AGAIN, Launch

if TYPE_CHECKING:
    from masafusion_lab.launch import Worker

log = logging.getLogger(__name__)

TIMES = 1000
"""That a SLURM job which was out of time is queued again."""


def by_ray(them: Sequence[Worker], how: Launch, folder: Path) -> Generator[None, None, None]:
    """Workers as Ray tasks, of a cluster that is there, or of one on this machine that ends with them.

    Ray starts a worker again that died; one that raises is not, as it would again.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not how.address:  # else Ray listens on every interface, whatever address its node is given
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        raise InputError("launch.by=ray: Ray is not installed; pip install 'masafusion-lab[ray]'") from None
    reach(how.address)
    cores = them[0].threads
    own: dict[str, Any] = {"address": "local", "include_dashboard": False, "num_cpus": cores * len(them)}
    own["object_store_memory"] = 100 * 2**20  # bytes; little passes through it
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, **({"address": how.address} if how.address else own))
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"launch.address={how.address}: {why}; is RAY_AUTH_MODE the cluster's?") from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # which Ray has taken
        gpus = int(them[0].device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
        task = ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=AGAIN)(work)
        left = {task.remote(worker, os.getcwd()): worker for worker in them}
        while left:
            for done in ray.wait(list(left), timeout=0.2)[0]:
                worker = left.pop(done)
                try:
                    ray.get(done)
                except ray.exceptions.RayError as error:
                    why = str(error).strip().splitlines()[-1]
                    log.warning("worker %d ended: %s; its log is %s", worker.n, why, worker.log.name)
            yield
    finally:
        ray.shutdown()


def reach(address: str) -> None:
    """Raise InputError if nobody answers at HOST:PORT: Ray itself tries on for many minutes, deaf to signals."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"launch.address={address}: {error}; give that of a Ray cluster, or none") from error


def work(worker: Worker, place: str) -> None:
    """Be the worker, in the working directory of whoever launched it: Ray's own is another."""
    os.chdir(place)
    worker()


def by_submitit(them: Sequence[Worker], how: Launch, folder: Path) -> Generator[None, None, None]:
    """Workers as an array of SLURM jobs, queued again when they are preempted, out of time, or die.

    Without SLURM they are submitit's local jobs, on this machine. One that raises is not queued again.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("launch.by=submitit: it is not installed; pip install 'masafusion-lab[submitit]'") from None
    executor = submitit.AutoExecutor(Path(folder) / "slurm", slurm_max_num_timeout=TIMES)
    if executor.cluster != "slurm":
        log.warning("launch.by=submitit: SLURM's srun is not on the PATH: the jobs run on this machine")
    executor.update_parameters(timeout_min=how.minutes, cpus_per_task=them[0].threads)
    executor.update_parameters(slurm_array_parallelism=len(them))
    if how.partition:
        executor.update_parameters(slurm_partition=how.partition)
    if them[0].device != "cpu":
        executor.update_parameters(gpus_per_node=1)
    left, jobs = [AGAIN] * len(them), dict[int, Any]()
    try:
        with executor.batch():
            jobs |= {n: executor.submit(worker) for n, worker in enumerate(them)}
        while jobs:
            for n, job in list(jobs.items()):
                if not job.done():
                    continue
                del jobs[n]
                try:
                    job.result()
                except submitit.core.utils.FailedJobError as error:
                    why = str(error).strip().splitlines()[-1]
                    log.warning("worker %d ended: %s; its log is %s", n, why, them[n].log.name)
                except submitit.core.utils.UncompletedJobError:
                    log.warning("worker %d died, job %s; its log is %s", n, job.job_id, them[n].log.name)
                    if left[n]:
                        left[n] -= 1
                        jobs[n] = executor.submit(them[n])
            yield
            time.sleep(0.2)
    finally:
        for job in jobs.values():
            job.cancel(check=False)
