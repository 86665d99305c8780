"""Files that are whole or not there, and folders that one process at a time writes."""

import errno
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from contextlib import suppress
from functools import reduce

import pytest
import torch
from PIL import Image
from pyarrow import parquet

from masafusion_lab import InputError, config
from masafusion_lab.interrupt import Interrupted
from masafusion_lab.recorded import recorded
from masafusion_lab.results import begin_case, finish_case, is_done
from masafusion_lab.runs import (
    Run,
    case_folder,
    read_json,
    replacing,
    write_json,
    write_parquet,
    write_picture,
    write_text,
)

fork = multiprocessing.get_context("fork")
CONFIG = "seed: 0\nsource: 'a cat: on ${HOME}'\nmethod:\n  name: masafusion\nout: there\nforce: false\nbatch: 1\n"


def state(folder):
    return read_json(folder / "state.json")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "before")

    def half(partial):
        assert partial.suffix == ".txt"
        partial.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        half(partial)
    assert path.read_text() == "before"
    with replacing(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_full_disk_leaves_no_half_file_and_says_the_remedy(small_disk):
    write_text(small_disk / "kept.txt", "whole")
    noise = Image.effect_noise((1500, 1500), 90)
    with pytest.raises(InputError, match=r"disk is full .*1\.0 MB free\): make room, or .*out=FOLDER") as caught:
        write_picture(small_disk / "large.png", noise)
    assert "\n" not in str(caught.value)
    assert os.listdir(small_disk) == ["kept.txt"]
    assert (small_disk / "kept.txt").read_text() == "whole"


def fill(disk):
    """Fill it, then fail."""
    with suppress(OSError):
        for number in range(100):
            (disk / f"ballast{number}").write_bytes(bytes(20_000))
    logging.getLogger("masafusion_lab").warning("a" * 9_000)
    raise ZeroDivisionError


def test_a_run_on_a_full_disk_fails_with_its_own_error(small_disk):
    with pytest.raises(ZeroDivisionError), Run(small_disk / "run", CONFIG):
        fill(small_disk)
    with pytest.raises(InputError, match="disk is full"), Run(small_disk / "run2", CONFIG):
        pass


def test_a_log_that_cannot_be_written_hides_no_error_and_says_nothing(small_disk, capsys):
    others = logging.FileHandler(small_disk / "debug.log")  # as W&B's
    logging.getLogger("masafusion_lab").addHandler(others)
    with pytest.raises(ZeroDivisionError), recorded(config.load(words=[f"out={small_disk}/run"])):
        fill(small_disk)
    logging.getLogger("masafusion_lab").removeHandler(others)
    with suppress(OSError):
        others.close()
    assert "No space left" not in capsys.readouterr().err
    assert logging.raiseExceptions


def test_a_file_above_the_process_limit_is_explained(tmp_path):
    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            write_text(tmp_path / "a.txt", "x" * 20_000)
        except InputError as error:
            os._exit(7 if "ulimit" in str(error) and not os.listdir(tmp_path) else 1)
        os._exit(2)

    process = fork.Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == 7


def test_what_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be made .*out=FOLDER"):
        write_text(tmp_path / "file" / "a.txt", "")
    with pytest.raises(InputError, match="cannot be made"):
        write_text(tmp_path / ("a" * 300) / "a.txt", "")


def test_what_may_not_be_written_says_so(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(InputError, match=r"cannot be written \(Read-only"):
        write_text(small_disk / "a.txt", "")
    with pytest.raises(InputError, match="Read-only"), Run(small_disk / "run", CONFIG):
        pass


def test_other_errors_are_left_as_they_are(tmp_path):
    with pytest.raises(OSError, match="Input/output"), replacing(tmp_path / "a") as _:
        raise OSError(errno.EIO, "Input/output error")


def overwrite(path):
    for letter in "abcdefgh" * 10_000:
        with replacing(path) as partial, partial.open("wb") as file:
            for _ in range(200):
                file.write(letter.encode() * 1000)


def test_a_kill_in_the_middle_of_a_write_leaves_a_whole_file(tmp_path):
    path, moments = tmp_path / "a.bin", random.Random(0)
    write_text(path, "z" * 200_000)
    found = 0
    for _ in range(20):
        process = fork.Process(target=overwrite, args=(path,))
        process.start()
        time.sleep(moments.uniform(0.01, 0.06))
        process.kill()
        process.join()
        content = path.read_text()
        assert len(content) == 200_000
        assert len(set(content)) == 1
        found = max(found, len(os.listdir(tmp_path)) - 1)
    assert found, "no write was hit"
    with Run(tmp_path, CONFIG, force=True):
        assert sorted(os.listdir(tmp_path)) == [".lock", "a.bin", "config.yaml", "state.json"]


def test_json_is_strict_and_keeps_every_text(tmp_path):
    path = tmp_path / "a.json"
    texts = ["a: b", "${HOME}", "\ud800", "🦄\n\0", "</script>"]
    numbers = {"psnr": float("inf"), "loss": torch.tensor(float("nan")), 1: torch.tensor(2), "at": tmp_path}
    write_json(path, {"texts": texts, **numbers, "pair": (1, -float("inf"))})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    read = json.loads(path.read_bytes().decode(), parse_constant=refuse)
    assert read == {"texts": texts, "psnr": "inf", "loss": "nan", "1": 2, "at": str(tmp_path), "pair": [1, "-inf"]}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_reads_as_nothing(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "missing") == {}


def test_a_table_of_records_is_the_same_bytes_and_holds_what_some_lack_and_texts_among_numbers(tmp_path):
    records = [{"layers": "\udcff", "l1": 0.5}, {"layers": 3.0, "steps": 2}, {"layers": 3.0, "steps": 2.5}]
    for name in "ab":
        write_parquet(tmp_path / name, records)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert parquet.read_table(tmp_path / "a").to_pydict() == {
        "layers": ["\\udcff", "3.0", "3.0"],
        "l1": [0.5, None, None],
        "steps": [None, 2.0, 2.5],
    }


def test_pictures_are_written_to_the_nearest_of_256_levels(tmp_path):
    levels = torch.arange(256.0).reshape(1, 16, 16) / 255
    write_picture(tmp_path / "grey.png", levels)
    write_picture(tmp_path / "colour.png", levels.repeat(3, 1, 1) + 1e-3)
    grey, colour = Image.open(tmp_path / "grey.png"), Image.open(tmp_path / "colour.png")
    assert (grey.mode, colour.mode) == ("L", "RGB")
    assert grey.tobytes() == colour.convert("L").tobytes() == bytes(range(256))


def test_a_picture_that_is_not_finite_is_never_written(tmp_path):
    with pytest.raises(ArithmeticError, match="not finite"):
        write_picture(tmp_path / "a.png", torch.full((3, 4, 4), torch.nan))
    assert not os.listdir(tmp_path)


HOSTILE = [
    "../../x",
    "/etc/passwd",
    "CON",
    "x" * 300,
    "a\0b",
    "",
    "..",
    ".",
    "~",
    "a/b",
    "a-b",
    "A-B",
    "é",
    "ü",
    "\ud800",
]


def test_a_case_stays_in_its_own_folder_whatever_its_id(tmp_path):
    folders = [case_folder(tmp_path, name) for name in [*HOSTILE, "x" * 301, " ", "-"]]
    for folder in folders:
        folder.mkdir()
        assert folder.resolve().parent == tmp_path.resolve()
        assert len(folder.name) < 64
        assert folder.name.isascii()
        assert not folder.name.startswith((".", "-"))
    assert len({folder.name.casefold() for folder in folders}) == len(folders)
    assert case_folder(tmp_path, "horse 1").name.startswith("horse-1-")


def test_a_case_is_done_only_under_its_key_and_with_its_files(tmp_path):
    folder = case_folder(tmp_path, "horse")
    begin_case(folder)
    with pytest.raises(FileNotFoundError, match=r"target\.png"):
        finish_case(folder, {"key": "k", "files": ["target.png"]})
    assert not is_done(folder, "k")
    write_picture(folder / "target.png", torch.zeros(3, 4, 4))
    finish_case(folder, {"key": "k", "files": ["target.png"]})
    assert is_done(folder, "k")
    assert not is_done(folder, "another")
    (folder / "target.png").rename(folder / "elsewhere.png")
    assert not is_done(folder, "k")
    (folder / "elsewhere.png").rename(folder / "target.png")
    begin_case(folder)
    assert not is_done(folder, "k"), "its pictures may be replaced from here on"
    (folder / "result.json").write_text('{"key": "k"')
    assert not is_done(folder, "k")


def test_a_run_says_how_it_ended(tmp_path):
    with Run(tmp_path / "a", CONFIG) as run:
        assert state(run.folder)["state"] == "running"
        assert state(run.folder)["pid"] == os.getpid()
        assert (run.folder / "config.yaml").read_text() == CONFIG
    assert state(tmp_path / "a")["state"] == "done"
    assert state(tmp_path / "a")["ended"] >= state(tmp_path / "a")["started"]
    for error, said in [
        (Interrupted(15), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (OSError("x"), "failed"),
    ]:
        with pytest.raises(type(error)), Run(tmp_path / "a", CONFIG):
            raise error
        assert state(tmp_path / "a")["state"] == said
    assert state(tmp_path / "a")["error"] == "OSError: x"


def test_another_configuration_is_refused_by_its_differing_keys(tmp_path):
    with Run(tmp_path, CONFIG):
        pass
    indifferent = {"there": "elsewhere", "force: false": "force: true", "batch: 1": "batch: 4"}
    with Run(tmp_path, reduce(lambda text, change: text.replace(*change), indifferent.items(), CONFIG)):
        pass
    other = CONFIG.replace("seed: 0", "seed: 1").replace("masafusion", "p2p")
    with pytest.raises(InputError, match=r"seed: 0 there, 1 now; method\.name: masafusion there, p2p now\): .*force"):
        Run(tmp_path, other).__enter__()
    assert state(tmp_path)["state"] == "done"
    with Run(tmp_path, other, force=True):
        assert (tmp_path / "config.yaml").read_text() == other


def test_results_of_other_weights_are_not_replaced_without_a_word(tmp_path):
    old, new = {"model": "1", "vae/a": "2"}, {"model": "1", "vae/a": "3"}
    with Run(tmp_path, CONFIG, weights=old):
        pass
    with Run(tmp_path, CONFIG, weights=new):  # nothing was made
        write_json(tmp_path / "result.json", {})
    for weights in (new, None, new):
        with Run(tmp_path, CONFIG, weights=weights):
            pass
    with pytest.raises(InputError, match=r"other weights.*\(vae/a\).*out=FOLDER, or force=true"):
        Run(tmp_path, CONFIG, weights=old).__enter__()
    with Run(tmp_path, CONFIG, force=True, weights=old):
        pass
    write_json(tmp_path / "state.json", {"weights": "0"})  # as earlier versions said it
    with pytest.raises(InputError, match=r"other weights.*\(model\)"):
        Run(tmp_path, CONFIG, weights=old).__enter__()


@pytest.mark.parametrize("broken", [b"\xff\0", b"a: &a [*a]", b"[" * 3000, b"!!python/object:os.system {}", b""])
def test_a_configuration_that_cannot_be_read_is_another(tmp_path, broken):
    (tmp_path / "config.yaml").write_bytes(broken)
    with pytest.raises(InputError, match="another configuration"):
        Run(tmp_path, CONFIG).__enter__()
    with Run(tmp_path, CONFIG, force=True):
        pass


def test_a_folder_with_other_peoples_files_is_not_written_into(tmp_path):
    write_text(tmp_path / "target.png", "precious")
    with pytest.raises(InputError, match=r"holds target\.png, which no run wrote"), Run(tmp_path, CONFIG):
        pass
    with Run(tmp_path, CONFIG, force=True):
        pass


def hold(folder, entered):
    with Run(folder, CONFIG):
        entered.set()
        time.sleep(60)


def test_two_runs_never_write_one_folder_and_a_dead_one_is_taken_over(tmp_path, caplog):
    entered = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path, entered))
    process.start()
    assert entered.wait(20)
    with pytest.raises(InputError, match=rf"is being written by process {process.pid}; .*out=FOLDER") as caught:
        Run(tmp_path, CONFIG).__enter__()
    assert "\n" not in str(caught.value)
    process.kill()
    process.join()
    assert state(tmp_path)["state"] == "running"
    with Run(tmp_path, CONFIG):
        assert state(tmp_path)["pid"] == os.getpid()
    assert [f"process {process.pid} died" in message for message in caplog.messages] == [True]
