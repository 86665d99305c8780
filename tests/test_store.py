"""Records on disk: what was put is what is got, by several processes, on full and on failing disks."""

import json
import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from masafusion_lab import InputError
from masafusion_lab.interrupt import Interrupted, handled
from masafusion_lab.inversion import Inversion
from masafusion_lab.store import Store

fork = multiprocessing.get_context("fork")


def record(seed=0, null=True, cells=4):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(5, 1, 4, cells, cells, generator=generator)
    return Inversion(states, torch.randn(4, 1, 3, 8, generator=generator).bfloat16() if null else None)


def same(a, b):
    nulls = (a.null is None) == (b.null is None) and (a.null is None or torch.equal(a.null, b.null))
    return torch.equal(a.states, b.states) and nulls


def put(store, seed, **options):
    facts = {"picture": seed, "steps": 4}
    key = store.key(facts)
    store.put(key, record(seed, **options), facts)
    return key


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "inversions")


def path_of(store, key):
    return store.root / f"{key}.safetensors"


@pytest.mark.parametrize("null", [True, False])
def test_what_was_put_is_got_bit_for_bit(store, null):
    assert store.get("0" * 64) is None
    key = put(store, 3, null=null)
    assert same(store.get(key), record(3, null=null))
    assert same(Store(store.root).get(key), record(3, null=null))


def test_the_seconds_that_a_record_took_are_kept_with_it_and_old_ones_have_none(store):
    facts = {"picture": 0}
    key = store.key(facts)
    assert store.seconds(key) is None
    store.put(key, record(0), facts)
    assert store.seconds(key) is None
    store.put(key, record(0), facts, 12.5)
    assert store.seconds(key) == 12.5
    assert same(store.get(key), record(0))
    flip(path_of(store, key), path_of(store, key).read_bytes().index(b"12.5"))
    assert store.get(key) is None


def test_a_part_of_a_batch_can_be_put(store):
    batch = Inversion.stack([record(0), record(1)])
    for number, part in enumerate(batch.split()):
        store.put(store.key({"n": number}), part, {"n": number})
        assert same(store.get(store.key({"n": number})), record(number))


def test_a_key_follows_the_facts_and_not_their_order(store, monkeypatch):
    key = store.key({"steps": 50, "lr": 2e-4, "prompt": "a: 🦄 ${b}"})
    assert key == store.key({"prompt": "a: 🦄 ${b}", "lr": 0.0002, "steps": 50})
    assert key != store.key({"steps": 50, "lr": 2e-4, "prompt": "a: 🦄 ${b} "})
    monkeypatch.setattr("masafusion_lab.store.FORMAT", 2)
    assert key != store.key({"steps": 50, "lr": 2e-4, "prompt": "a: 🦄 ${b}"})


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def reword(path):
    """Another fact in the header, of the same length."""
    path.write_bytes(path.read_bytes().replace(b'steps\\":4', b'steps\\":5'))


def of_another_program(path):
    save_file({"weight": torch.zeros(3)}, path)


def without_states(path):
    with safe_open(path, "pt") as file:
        save_file({"null": file.get_tensor("null")}, path, file.metadata())


DAMAGE = {
    "truncated": lambda path: os.truncate(path, 1000),
    "cut to nothing": lambda path: os.truncate(path, 0),
    "one bit rotten": flip,
    "another fact": reword,
    "a huge header": lambda path: path.write_bytes((2**40).to_bytes(8, "little") + b"{}"),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "foreign": of_another_program,
    "without states": without_states,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_foreign_entry_is_set_aside_with_one_warning(store, caplog, damage):
    key, whole = put(store, 0), put(store, 1)
    damage(path_of(store, key))
    assert store.get(key) is None
    assert [key in message and "set aside" in message for message in caplog.messages] == [True]
    assert store.get(key) is None
    assert len(caplog.messages) == 1
    assert not path_of(store, key).exists()
    assert (store.root / f"{key}.corrupt").exists()
    assert put(store, 0) == key
    assert same(store.get(key), record(0))
    assert same(store.get(whole), record(1))


def test_two_swapped_entries_are_both_set_aside(store, caplog):
    a, b = put(store, 0), put(store, 1)
    path_of(store, a).rename(store.root / "c")
    path_of(store, b).rename(path_of(store, a))
    (store.root / "c").rename(path_of(store, b))
    assert store.get(a) is None
    assert store.get(b) is None
    assert sum("holds another record" in message for message in caplog.messages) == 2


def test_an_entry_of_an_old_format_is_set_aside(store, caplog, monkeypatch):
    key = put(store, 0)
    monkeypatch.setattr("masafusion_lab.store.FORMAT", 2)
    assert store.get(key) is None
    assert "is of format 1, not 2" in caplog.text


def test_verify_finds_what_is_damaged(store):
    a, b = put(store, 0), put(store, 1)
    assert store.verify() == []
    flip(path_of(store, a))
    assert store.verify() == [a]
    assert [entry.key for entry in store.entries()] == [b]


def work(root, done):
    store = Store(root)
    for seed in range(20):
        facts = {"picture": seed, "steps": 4}
        key = store.key(facts)
        if store.get(key) is None:
            with store.claim(key):
                if store.get(key) is None:
                    time.sleep(0.005)
                    with done.open("a") as file:
                        file.write(f"{seed}\n")
                    store.put(key, record(seed), facts)


def test_four_processes_compute_each_record_once(store, tmp_path):
    done = tmp_path / "done"
    processes = [fork.Process(target=work, args=(store.root, done)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(map(int, done.read_text().split())) == list(range(20))
    assert len(store.entries()) == 20


def hold(root, key, entered):
    with Store(root).claim(key):
        entered.set()
        time.sleep(60)


@pytest.fixture
def holder(store):
    """A process that has claimed a key."""
    entered = fork.Event()
    process = fork.Process(target=hold, args=(store.root, store.key({}), entered))
    process.start()
    assert entered.wait(20)
    yield process
    process.kill()
    process.join()


def test_the_claim_of_a_dead_process_is_taken_over(store, holder):
    holder.kill()
    with store.claim(store.key({})):
        pass


def test_waiting_for_a_claim_can_be_interrupted(store, holder):
    def wait():
        with store.claim(store.key({})):
            raise AssertionError("it was claimed")

    with handled():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            wait()


def overwrite(root):
    store = Store(root)
    for number in range(10_000):
        store.put("k", record(number, cells=64), {})


def test_a_kill_in_the_middle_of_a_put_leaves_a_whole_record(store, caplog):
    store.put("k", record(), {})
    for pause in range(1, 11):
        process = fork.Process(target=overwrite, args=(store.root,))
        process.start()
        time.sleep(pause / 150)
        process.kill()
        process.join()
        assert store.get("k") is not None
    assert not caplog.messages
    assert [entry.key for entry in store.entries()] == ["k"]


def test_a_full_disk_leaves_the_others_intact_and_says_the_remedy(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        store = Store(tmp_path)
        key = put(store, 0)
        with pytest.raises(InputError, match=r"disk is full.*MB free.*MASAFUSION_HOME=FOLDER") as caught:
            put(store, 1, cells=256)
        assert "\n" not in str(caught.value)
        assert os.listdir(tmp_path) == [f"{key}.safetensors"]
        assert same(store.get(key), record(0))
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        assert same(store.get(key), record(0))
        for write in (store.progress, lambda key: store.claim(key).__enter__()):
            with pytest.raises(InputError, match=r"Read-only.*MASAFUSION_HOME=FOLDER"):
                write(key)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_root_that_cannot_be_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (put, lambda store, _: store.progress("k"), lambda store, _: store.claim("k").__enter__()):
        with pytest.raises(InputError, match="MASAFUSION_HOME=FOLDER"):
            write(Store(tmp_path / "file" / "store"), 0)
    assert Store(tmp_path / "file" / "store").get("k") is None


def test_the_least_recently_used_go_first(store):
    keys = [put(store, seed) for seed in range(4)]
    for age, key in enumerate(keys):
        os.utime(path_of(store, key), (1000 + age, 1000 + age))
    assert store.get(keys[0]) is not None
    entries = store.entries()
    assert [entry.key for entry in entries] == [*keys[1:], keys[0]]
    assert entries[0].facts == {"picture": 1, "steps": 4}
    assert store.size() == sum(entry.bytes for entry in entries)
    assert store.prune(store.size()) == 0
    assert store.prune(store.size() - 1) == entries[0].bytes
    assert [entry.key for entry in store.entries()] == [keys[2], keys[3], keys[0]]


def test_prune_removes_all_that_is_left_of_others_but_nothing_claimed(store, holder):
    key = put(store, 0)
    flip(path_of(store, key))
    assert store.get(key) is None
    (store.progress("unfinished") / "null_text.ckpt").write_bytes(bytes(1000))
    (store.progress(store.key({})) / "null_text.ckpt").write_bytes(bytes(100))
    store.prune(0)
    assert store.size() == 100
    assert store.progress(store.key({})).is_dir()
    assert store.entries() == []


def test_the_default_root_is_below_masafusion_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MASAFUSION_HOME", str(tmp_path))
    assert Store().root == tmp_path / "inversions"
    monkeypatch.delenv("MASAFUSION_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert Store().root == tmp_path / "me" / ".cache" / "masafusion" / "inversions"
    assert Store().entries() == []
    assert Store().size() == Store().prune(0) == 0
    assert not (tmp_path / "me").exists(), "looking makes no folder"


def test_the_header_tells_what_a_record_depends_on(store):
    with safe_open(path_of(store, put(store, 7)), "pt") as file:
        assert json.loads(file.metadata()["facts"]) == {"picture": 7, "steps": 4}
