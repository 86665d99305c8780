"""Signals, sent to real processes, and to a fit of Lightning's that is under way."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from masafusion_lab import interrupt
from masafusion_lab.interrupt import Interrupted, check, handled
from masafusion_lab.null_text import NullText

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 138}
SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from masafusion_lab.interrupt import Interrupted, check, handled
try:
    with handled():
        print("ready", flush=True)
        for _ in range(3000):
            time.sleep(0.01)
            {step}
except Interrupted as e:
    sys.exit(e.code)
"""


def started(step, **options):
    """A process that is in the midst of its loop."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.format(step=step)], stdout=subprocess.PIPE, **options)
    assert process.stdout.readline() == b"ready\n"
    return process


def handlers():
    return [signal.getsignal(s) for s in interrupt.SIGNALS]


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_a_signal_ends_the_process_after_its_step_with_the_status_that_shells_expect(name, code):
    with started("check()") as process:
        process.send_signal(getattr(signal, name))
        assert process.wait(20) == code


def test_a_second_sigint_quits_at_once():
    with started("pass  # a step that takes for ever") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == -signal.SIGINT


def test_a_second_sigint_quits_at_once_though_a_trainer_put_the_handler_back():
    with started("signal.signal(signal.SIGINT, __import__('masafusion_lab.interrupt').interrupt._ask)") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == -signal.SIGINT


def test_a_process_under_nohup_outlives_its_terminal():
    with started("check()", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143


def test_handlers_and_flag_are_as_before_after_any_end():
    before = handlers()

    def work():
        assert handlers() != before
        os.kill(os.getpid(), signal.SIGTERM)
        with handled():
            pass  # an inner one neither forgets the signal nor gives the handlers back
        check()

    with pytest.raises(Interrupted, match="SIGTERM") as caught, handled():
        work()
    assert (caught.value.signum, caught.value.code) == (signal.SIGTERM, 143)
    assert handlers() == before
    check()


def test_off_the_main_thread_it_does_nothing():
    before, seen = handlers(), []

    def work():
        with handled():
            seen.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_wish_to_stop_reaches_its_own_thread_alone_and_is_gone_afterwards():
    stop = threading.Event()
    stop.set()
    with interrupt.heeding(stop):
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(check).result()
        with pytest.raises(interrupt.Cancelled, match="cancelled"):
            check()
    check()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_fit_is_left_with_its_progress_kept(tiny, tmp_path, name):
    """Lightning alone would exit 0 on SIGTERM."""
    x0 = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = x0, tiny.embed(["a cat"]), tiny.embed([""]), tiny.schedule(3)
    calls = iter(range(100))

    def sent():
        if next(calls) == 4:
            os.kill(os.getpid(), getattr(signal, name))
        check()

    before = handlers()
    with pytest.raises(Interrupted) as caught, handled():
        NullText(inner_steps=2).invert(tiny, *batch, folder=tmp_path, check=sent)
    assert caught.value.code == CODES[name]
    assert handlers() == before
    assert list(tmp_path.iterdir()), "nothing to resume from"
