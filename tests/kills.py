"""Runs that are killed, and must go on as if they had not been."""

import multiprocessing
import os
import random
import shutil

KILLS = int(os.environ.get("MASAFUSION_KILLS", "20"))
fork = multiprocessing.get_context("fork")


def survive(run, folder, seconds, ended):
    """Kill a run (of so many seconds, into the folder) at KILLS random moments; anew from nothing whenever it ends.

    What was finished when it was killed is never written again; `ended` looks at what a whole run has left.
    """
    moments, kills, done = random.Random(0), 0, {}
    while kills < KILLS:
        process = fork.Process(target=run)
        process.start()
        process.join(moments.uniform(0.05, 0.6) * seconds)
        was_cut = process.is_alive()
        process.kill()
        process.join()
        now = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
        assert done.items() <= now.items()
        kills, done = kills + was_cut, now
        if not was_cut:
            ended()
            shutil.rmtree(folder)
            done = {}
    run()
    ended()
