"""The command line as a person or a shell meets it: what it prints, leaves behind and exits with."""

import errno
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import rich
from PIL import Image, ImageDraw

from masafusion_lab import InputError, cli, config, keys, loading, manual, phases, progress, request
from masafusion_lab.lockstep import NotFinite

MAIN = "from masafusion_lab.cli import main; main()"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command in this process; its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["masafusion", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def given(tmp_path, tiny_root):
    """The words of a small edit of a picture."""
    picture, sketch = Image.new("RGB", (64, 64), "green"), Image.new("L", (64, 64))
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill="red")
    ImageDraw.Draw(sketch).ellipse((16, 16, 48, 48), outline=255)
    picture.save(tmp_path / "pic.png")
    sketch.save(tmp_path / "sketch.png")
    words = ["image=pic.png", "sketch=sketch.png", "box=16,16,48,48", "source=a cat: on ${HOME}", "target=a dog, {x}"]
    return [*words, f"model.path={tiny_root}", "steps=2", "tracking.mode=off"]


def test_an_edit_leaves_a_folder_and_says_where_and_how_long(run, given, tmp_path):
    code, out, _ = run("edit", *given)
    folder, facts = out.splitlines()
    assert code == 0
    assert re.fullmatch(r"runs/\d{8}-\d{6}-[0-9a-f]{4}", folder)
    assert re.match(r"pic: .*denoise \d+\.\d s.*; 20 UNet rows; reconstruction", facts)
    for name in ("source.png", "target.png", "config.yaml", "result.json", "run.log"):
        assert (tmp_path / folder / name).is_file()
    assert json.loads((tmp_path / folder / "state.json").read_text())["state"] == "done"


def test_a_saved_configuration_gives_the_same_prompts_and_picture(run, given, tmp_path):
    assert run("edit", *given, "out=a")[0] == 0
    code, _, err = run("edit", "--config", "a/config.yaml", "out=b")
    assert code == 0
    assert "found in the store" in err
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in "ab")
    assert one["prompts"] == two["prompts"] == {
        "source": "a cat: on ${HOME}",
        "target": "a dog, {x}",
        "instruction": "",
    }  # fmt: skip
    assert one["key"] == two["key"]
    assert (tmp_path / "a/target.png").read_bytes() == (tmp_path / "b/target.png").read_bytes()


def test_the_same_command_again_finds_it_done_and_another_is_refused(run, given):
    assert run("edit", *given, "out=a")[0] == 0
    assert "done already" in run("edit", *given, "out=a")[2]
    code, _, err = run("edit", *given, "out=a", "seed=1")
    assert code == 2
    assert "seed" in err
    assert run("edit", *given, "out=a", "seed=1", "force=true")[0] == 0


def test_the_whole_configuration_is_printed_and_nothing_done(run, given, tmp_path):
    code, out, _ = run("edit", *given, "--print-config")
    (tmp_path / "printed.yaml").write_text(out)
    assert code == 0
    assert config.load(["printed.yaml"]) == config.load(words=given)
    assert not (tmp_path / "runs").exists()


def test_all_that_is_wrong_is_said_at_once_and_leaves_nothing(run, tmp_path):
    words = ["image=none.png", "inversion.nme=x", "steps=0", "cat", "mask=m.png", "box=1,2,3,4", "model.path=./none"]
    code, out, err = run("edit", *words)
    assert code == 2
    assert out == ""
    for said in ("8 problems", "image=none.png: no such file", "inversion.name?", "1 to 999", "'cat'", "mask=m.png",
                 "one region", "target: missing", "model.path=./none"):  # fmt: skip
        assert said in err
    assert list(tmp_path.iterdir()) == []


BENCH = "bench bench.count=1 bench.sessions=0"
KNOWN = {
    "edit trainer.max_epochs=abc": ["masafusion: trainer.max_epochs=abc: must be whole number | null\n"],
    "edit steps=1000 out=file/a": ["2 problems", "steps=1000: must be 1 to 999", "out=file/a: cannot be written to"],
    f"edit out={'x' * 300}": ["File name too long"],
    f"edit out=a/{'x' * 300}/b": ["File name too long"],
    "edit out=/proc/x": ["out=/proc/x: cannot be written to"],
    "edit store=file": ["store=file: cannot be written to (Not a directory"],
    "edit model.adapter.pose=./none model.unet=/none": ["2 problems", "model.adapter.pose=./none: no such folder"],
    "sweep": ["nothing is varied; give axes"],
    "sweep steps=0 axes.method.guidance=x,3": ["2 problems", "steps=0", "axes.method.guidance=x: must be number"],
    "sweep axes.seed=1,2 sweep.objective=dnoe sweep.rows=0": ["2 problems", "sweep.rows=0", "did you mean done?"],
    "bench": ["2 problems", "bench.rows: missing", "bench.count, bench.sessions"],
    "bench bench.data=folder bench.rows.a=seed=1": ["bench.root=: no such folder"],
    f"{BENCH} bench.rows.a=method.name=plian": ["row 'a': method.name=plian"],
    f"{BENCH} bench.rows.a=target=x": ["row 'a': target=x: holds for all rows"],
    f"{BENCH} bench.rows.a=seed=1 target=x": ["target=x: is not read by a benchmark"],
    f"{BENCH} bench.rows.ours=seed=1 bench.only=our bench.encoders.clp=x bench.kinds=poze":
        ["3 problems", "did you mean ours?", "did you mean clip?", "did you mean pose?"],
}  # fmt: skip


@pytest.mark.parametrize("command", KNOWN)
def test_what_the_settings_tell_is_said_before_torch_is_imported(command, tmp_path):
    (tmp_path / "file").write_text("")
    argv = ["masafusion", *command.split()]
    code = f"import sys; sys.argv = {argv}\ntry: {MAIN}\nfinally: print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "False\n")
    assert all(part in ended.stderr for part in KNOWN[command]), ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_only_read_need_not_be_writable(run, given):
    assert run("edit", *given, "store=/proc", "--print-config")[0] == 0
    words = ["bench.count=1", "bench.sessions=0", "bench.rows.a=seed=1", "out=/proc"]
    assert run("bench", *words)[0] == 2
    assert run("bench", *words, "--status")[0] == 0


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("steps=20", "steps=20: must lie between 1 and 19"),
        ("trainer.devices=2", "trainer.devices=2: one run has one device"),
        ("trainer.accelerator=abacus", "abacus"),
    ],
)
def test_what_the_model_or_lightning_does_not_allow_is_refused_before_weights_are_read(
    run, given, tmp_path, monkeypatch, word, said
):
    model = tmp_path / "model"
    shutil.copytree(next(word for word in given if word.startswith("model.path=")).partition("=")[2], model)
    noise = model / "scheduler/scheduler_config.json"
    noise.write_text(json.dumps(json.loads(noise.read_text()) | {"num_train_timesteps": 20}))
    monkeypatch.setattr(loading, "weights", lambda *args: pytest.fail("weights are read"))
    code, _, err = run("edit", *given, f"model.path={model}", word)
    assert code == 2
    assert said in err


def test_what_turns_out_wrong_with_the_model_leaves_no_folder_either(run, given, tmp_path):
    code, _, err = run("edit", *given, "size=60", "out=a")
    assert code == 2
    assert "60" in err
    assert "Traceback" not in err
    assert not (tmp_path / "a").exists()


def test_an_unforeseen_error_is_one_line_and_its_traceback_in_the_run(run, given, tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "edit", lambda *args, **options: {}["gone"])
    code, _, err = run("edit", *given, "out=a")
    assert code == 1
    assert err.splitlines()[-1] == "masafusion: KeyError: 'gone'; see a/run.log"
    assert "Traceback" in (tmp_path / "a/run.log").read_text()
    assert json.loads((tmp_path / "a/state.json").read_text())["state"] == "failed"


def test_a_prediction_that_is_not_finite_fails(run, given, monkeypatch):
    def edit(*args, **options):
        raise NotFinite("editing pic: not finite at step 3")

    monkeypatch.setattr(phases, "edit", edit)
    code, _, err = run("edit", *given, "out=a")
    assert code == 1
    assert "masafusion: editing pic: not finite at step 3" in err


@pytest.mark.parametrize(
    ("name", "phase", "words"),
    [
        ("SIGTERM", "null-text", ["inversion.name=null_text"]),
        ("SIGINT", "editing", []),
        ("SIGHUP", "DDIM inversion", []),
    ],
)
def test_a_signal_ends_a_run_in_good_order(name, phase, words, run, given, tmp_path):
    signum, log, checkpoint = getattr(signal, name), tmp_path / "a/run.log", tmp_path / "store/progress"

    def send():
        for _ in range(2000):
            begun = (
                list(checkpoint.rglob("*.ckpt")) if phase == "null-text" else log.exists() and phase in log.read_text()
            )
            if begun:
                os.kill(os.getpid(), signum)
                return
            time.sleep(0.05)

    before = signal.getsignal(signum)
    thread = threading.Thread(target=send)
    thread.start()
    code, _, err = run("edit", *given, "steps=60", *words, "out=a", "store=store")
    thread.join()
    assert code == 128 + signum
    assert name in err
    assert "out=a goes on from here" in err
    assert json.loads((tmp_path / "a/state.json").read_text())["state"] == "interrupted"
    assert not (tmp_path / "a/result.json").exists()
    assert signal.getsignal(signum) == before


def test_no_picture_is_the_built_in_example(run, given, tmp_path, monkeypatch):
    (tmp_path / "examples").mkdir()
    for name in ("pic.png", "sketch.png"):
        (tmp_path / name).rename(tmp_path / "examples" / name)
    example = tmp_path / "examples/example.yaml"
    monkeypatch.setattr(request, "EXAMPLE", example)
    code, _, err = run("edit")
    assert code == 2
    assert str(example) in err
    example.write_text("image: pic.png\nsketch: sketch.png\nmask: pic.png\nsource: a cat\ntarget: 'a: dog'\n")
    code, out, _ = run("edit", "target=a cow", "--print-config")
    (tmp_path / "printed.yaml").write_text(out)
    experiment = config.load(["printed.yaml"])
    assert code == 0
    assert experiment.image == str(tmp_path / "examples/pic.png")
    assert (experiment.source, experiment.target) == ("a cat", "a cow")


def test_hints_and_region_can_be_drawn(run, given, tmp_path):
    before = Image.new("L", (64, 64))
    ImageDraw.Draw(before).ellipse((20, 10, 40, 40), outline=255)
    before.save(tmp_path / "before.png")
    os.chdir(tmp_path)
    words = [word for word in given if not word.startswith("box=")]
    words += ["mask=auto", "source_sketch=before.png", "canny=auto"]
    (case,) = request.cases_of(config.load(words=words))
    assert case.mask.size == case.hints["canny"].size == (64, 64)
    assert case.hints["sketch"] == Path("sketch.png")
    assert case.target == "a dog, {x}"
    sizes = []
    for more in ("region.margin=2", "region.margin=6", "region.hull=true"):
        (other,) = request.cases_of(config.load(words=[*words, more]))
        sizes.append(sum(other.mask.histogram()[128:]))
    usual = sum(case.mask.histogram()[128:])
    assert usual < sizes[0] < sizes[1]
    assert usual < sizes[2], "what is between lines that moved is in it"


def test_pictures_are_inverted_once_and_their_records_listed_verified_and_pruned(run, given):
    words = [*given, "store=store"]
    assert "pic: inverted" in run("invert", *words)[1]
    assert "pic: was in the store" in run("invert", *words)[1]
    code, out, _ = run("cache", "ls", "--store", "store")
    assert code == 0
    assert "direct" in out
    assert "a cat: on ${HOME}" in out
    assert run("cache", "verify", "--store", "store")[:2] == (0, "1 whole, 0 set aside as *.corrupt\n")
    (record,) = Path("store").glob("*.safetensors")
    record.write_bytes(record.read_bytes()[:-1] + b"\0")
    assert run("cache", "verify", "--store", "store")[:2] == (1, "0 whole, 1 set aside as *.corrupt\n")
    assert "MB freed; 0.0 MB" in run("cache", "prune", "--gb", "0", "--store", "store")[1]


def test_a_name_that_is_no_text_is_a_name_all_the_same(run, given, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("masafusion_lab"), "propagate", False)  # pytest-xdist's reports are UTF-8
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "pic.png").rename(tmp_path / name)
    code, out, _ = run("edit", *given[1:], f"image={name}", "out=a")
    assert code == 0
    assert "caf\\udce9: " in out


def test_a_name_is_no_markup_of_a_bar(monkeypatch):
    monkeypatch.setattr(progress, "console", progress.Voice(file=io.StringIO(), force_terminal=True))
    assert list(progress.bar([1], "editing a[/b] [red]")) == [1]
    assert "editing a[/b] [red]" in progress.console.file.getvalue()


class Gone(io.StringIO):
    """A terminal that was closed, or a pipe that nobody reads."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), BrokenPipeError()])
def test_a_run_goes_on_when_nobody_listens_any_more(run, monkeypatch, error):
    run("cache", "ls")
    assert isinstance(rich.get_console(), progress.Voice)  # that Lightning's bar speaks through
    monkeypatch.setattr(progress, "console", progress.Voice(file=Gone(error), force_terminal=True))
    assert list(progress.bar([1, 2], "editing")) == [1, 2]
    progress.Spoken().handle(logging.makeLogRecord({"msg": "resumes", "levelno": logging.INFO}))


def test_what_is_said_beside_a_set_of_cases_is_not_silently_left_out(run, tmp_path):
    (tmp_path / "set").mkdir()
    code, _, err = run("edit", "cases=set", "target=a dog", "box=1,2,3,4")
    assert code == 2
    assert "box=1,2,3,4: is not read beside cases=set; say it there, in a manifest" in err
    assert "target=" not in err
    assert (
        "target=a dog: is not read beside cases=picturebook:2" in run("edit", "cases=picturebook:2", "target=a dog")[2]
    )


def test_prompts_beside_a_set_of_cases_are_those_of_cases_that_have_none(run, tmp_path, given):
    (tmp_path / "set").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "set" / name).write_bytes((tmp_path / "pic.png").read_bytes())
    (tmp_path / "set/a.txt").write_text("a red cat\n")
    words = [
        word for word in given if word.partition("=")[0] in ("source", "target", "model.path", "steps", "tracking.mode")
    ]
    code, _, err = run("edit", *words, "cases=set", "method.name=plain", "out=a")
    assert code == 0, err
    told = {
        facts["case"]: facts["prompts"]
        for facts in map(json.loads, (p.read_text() for p in Path("a").rglob("result.json")))
    }
    assert [told[case]["source"] for case in "ab"] == ["a red cat", "a cat: on ${HOME}"]
    assert [told[case]["target"] for case in "ab"] == ["a dog, {x}", "a dog, {x}"]


def test_a_picture_that_cannot_be_used_stops_no_other(run, tmp_path, given):
    (tmp_path / "set").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "set" / f"{name}.png").write_bytes((tmp_path / "pic.png").read_bytes())
    (tmp_path / "set/b.png").write_bytes((tmp_path / "pic.png").read_bytes()[:60])
    words = [word for word in given if word.partition("=")[0] in ("model.path", "steps", "tracking.mode")]
    code, out, err = run("invert", *words, "cases=set", "store=store", "out=a")
    assert code == 1
    assert "a: inverted" in out
    assert "c: was in the store" in out, "it is the same picture"
    assert re.search(r"b: \S*b\.png: is damaged or cut short .*; copy it again", err)
    assert "1 of 3 cases could not be used: b" in err
    assert json.loads((tmp_path / "a/state.json").read_text())["state"] == "done"


def test_a_case_that_a_setting_does_not_fit_stops_no_other(run, tmp_path, given):
    (tmp_path / "cases.csv").write_text("id,image,source,target\na,pic.png,a cat,a dog\nb,pic.png,a horse,a dog\n")
    words = [word for word in given if word.partition("=")[0] in ("model.path", "steps", "tracking.mode")]
    words += ["method.name=prompt_to_prompt", "method.blend_target=[dog]", "out=a"]
    code, out, err = run("edit", *words, "cases=cases.csv", "method.blend_source=[cat]")
    assert code == 1, err
    assert out.splitlines()[1].startswith("a: ")
    assert re.search("warning: b: .*cat", err)
    assert "1 of 2 cases could not be used: b" in err
    (failed,) = Path("a").rglob("error.json")
    assert "cat" in json.loads(failed.read_text())["error"]
    assert len(list(Path("a").rglob("result.json"))) == 1
    code, _, err = run("edit", *words[:-1], "out=b", "cases=cases.csv", "method.blend_source=[snow]")
    assert code == 2
    assert "none of the 2 cases can be edited:" in err
    assert not Path("b").exists()


def test_help_lists_every_key_without_loading_anything_heavy():
    code = f"import sys; sys.argv = ['masafusion', 'edit', '--help']\ntry: {MAIN}\n" + (
        "finally: print([name for name in ('torch', 'lightning', 'diffusers', 'numpy', 'PIL') if name in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    assert shown.stdout.splitlines()[-1] == "[]"
    for listed in keys.tables().values():
        for key in listed:
            assert f"{key.name}." in shown.stdout or f"{key.name}={keys.written(key.default)}" in shown.stdout
    assert "masafusion edit steps=20" in shown.stdout


def test_every_example_of_the_help_is_understood():
    for command in manual.EXAMPLES.values():
        _, name, *words = shlex.split(command.replace("--print-config", "").replace("--config ", "--config="))
        assert name in ("edit", "attend", "sweep")
        files = [Path(__file__).parents[1] / word.partition("=")[2] for word in words if word.startswith("--config=")]
        config.load(files, [word for word in words if not word.startswith("--")])


def complete(**protocol):
    """What the program answers a shell that asks for completions."""
    env = os.environ | {key: str(value) for key, value in protocol.items()}
    code = f"import sys; sys.argv = ['masafusion']; {MAIN}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout


def test_bash_completes_keys_and_their_values():
    def bash(words, at):
        return complete(_MASAFUSION_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=at).split()

    assert bash("masafusion edit ste", 2) == ["steps=", "steps=50"]
    assert bash("masafusion edit inversion.name = ", 4) == ["direct", "ddim", "null_text", "npi", "edit_friendly"]
    assert bash("masafusion edit inversion.name = null_text inversion.pres", 5)[0] == "inversion.preset="


def test_zsh_completes_keys_with_their_meaning():
    shown = complete(_MASAFUSION_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="masafusion edit seed=1 model.dt")
    assert "model.dtype=" in shown
    assert "float16 on CUDA" in shown
    shown = complete(_MASAFUSION_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="masafusion edit method.name=r")
    assert "method.name=reconstruction" in shown


def test_a_command_that_does_not_exist_is_refused_with_the_one_that_was_meant(run):
    code, _, err = run("edi")
    assert code == 2
    assert "edit" in err


def test_a_warning_is_said_once_and_those_of_libraries_are_for_the_runs_log(capsys, tmp_path, monkeypatch):
    def warned(experiment):
        with cli.recorded(experiment) as folder:
            for _ in range(3):
                cli.log.warning("the mask is thin")
                warnings.warn(f"{tmp_path}/font.ttf: no glyph", UserWarning, stacklevel=1)
                logging.getLogger("somebody").warning("%s/somewhere is slow", tmp_path)
                library = logging.getLogger(f"library of {tmp_path}")
                library.propagate = False
                library.addHandler(logging.StreamHandler())
                library.setLevel(logging.DEBUG)
                library.warning("somewhere else is slow")
                library.debug("somewhere is something")
        assert (folder / "run.log").read_text().count("font.ttf") >= 1
        for said, times in {"somewhere is slow": 3, "somewhere else is slow": 3, "somewhere is something": 0}.items():
            assert (folder / "run.log").read_text().count(said) == times
        raise InputError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "read", lambda *args, **options: config.load(words=[f"out={tmp_path}/out"]))
    monkeypatch.setattr(cli, "cases_of", warned)
    monkeypatch.setattr(sys, "argv", ["masafusion", "edit"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.count("the mask is thin") == 1
    assert "font.ttf" not in said
    assert "somewhere" not in said


@pytest.mark.parametrize("command", ["edit", "attend", "invert", "sweep axes.seed=1,2"])
def test_only_where_the_example_runs_it_is_said_to_be_the_example(run, monkeypatch, command):
    def begun(experiment):
        raise InputError("it runs")

    monkeypatch.setattr(cli, "cases_of", begun)
    said = "this is the built-in example"
    for words, of_example in {
        "": True,
        "cases=picturebook:2": False,
        "steps=x": False,
        "--print-config": False,
    }.items():
        err = run(*command.split(), *words.split())[2]
        assert (said in err) is of_example, words
        assert ("it runs" in err) is (words in ("", "cases=picturebook:2"))
