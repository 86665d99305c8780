"""One computation at a time: turns, pace, and calling off."""

import threading
import time

import pytest

from masafusion_lab import InputError, interrupt
from masafusion_lab.interrupt import Cancelled
from masafusion_lab.web.desk import Desk


@pytest.fixture
def desk():
    desk = Desk(room=3)
    yield desk
    desk.close()


def steps(began, count=2000):
    """A computation of many steps that heeds wishes to stop after each."""

    def work(job):
        for _ in job.track(range(count), "stepping"):
            began.set()
            time.sleep(0.005)
            interrupt.check()

    return work


def test_one_after_another_in_the_order_of_coming(desk):
    gate, order = threading.Event(), []
    first = desk.submit("a", lambda job: gate.wait(10) and order.append("a"))
    others = [desk.submit(name, lambda job, name=name: order.append(name)) for name in "bc"]
    assert [len(desk.before(job)) for job in (first, *others)] == [0, 1, 2]
    gate.set()
    others[-1].future.result(10)
    assert order == ["a", "b", "c"]


def test_one_thing_of_each_owner_and_not_too_many_in_all(desk):
    gate = threading.Event()
    first = desk.submit("a", lambda job: gate.wait(10))
    with pytest.raises(InputError, match="your last run"):
        desk.submit("a", lambda job: None)
    for name in "bc":
        desk.submit(name, lambda job: None)
    with pytest.raises(InputError, match="3 runs wait already"):
        desk.submit("d", lambda job: None)
    gate.set()
    first.future.result(10)
    desk.submit("a", lambda job: None).future.result(10)


def test_calling_off_ends_ones_own_computation_within_a_step_and_no_other(desk):
    began = threading.Event()
    running, waiting = desk.submit("a", steps(began)), desk.submit("b", lambda job: "done")
    assert began.wait(10)
    assert not desk.cancel("nobody")
    assert desk.cancel("a")
    assert isinstance(running.future.exception(10), Cancelled)
    assert running.done < 200
    assert waiting.future.result(10) == "done"
    interrupt.check()  # nothing of it is left for others


def test_what_waits_and_is_called_off_never_begins(desk):
    gate, ran = threading.Event(), []
    desk.submit("a", lambda job: gate.wait(10))
    waiting = desk.submit("b", lambda job: ran.append(1))
    assert desk.cancel("b")
    gate.set()
    assert waiting.future.cancelled()
    assert desk.submit("b", lambda job: "again").future.result(10) == "again"
    assert ran == []


def test_the_remaining_time_follows_from_the_pace(desk):
    began = threading.Event()
    job = desk.submit("a", steps(began))
    assert job.left is None or job.left > 0
    while job.done < 10:
        time.sleep(0.01)
    assert (job.what, job.total) == ("stepping", 2000)
    assert 5 < job.left < 600


def test_closing_ends_everything():
    desk, began = Desk(), threading.Event()
    running, waiting = desk.submit("a", steps(began)), desk.submit("b", lambda job: None)
    assert began.wait(10)
    desk.close()
    assert isinstance(running.future.exception(0), Cancelled)
    assert waiting.future.cancelled()
