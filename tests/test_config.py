"""What a person writes is what an experiment holds; what cannot be is said at once, and all of it."""

import random
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from masafusion_lab import InputError, config
from masafusion_lab.configfile import dump, read_yaml
from masafusion_lab.methods import MaSaFusion
from masafusion_lab.null_text import NullText

PROMPTS = [
    "a cat: on a mat",
    "yes",
    "null",
    "007",
    "1e3",
    "~",
    "",
    "${HOME}",
    "${oc.env:HOME}",
    "${",
    "{x}",
    "{a: b}",
    "[1, 2",
    "- a",
    "-x",
    "= a=b",
    "#no comment",
    "a # b",
    "a 'quoted' \"cat\"",
    "back\\slash \\n",
    "*alias &anchor !tag %x @y `z`",
    "two\nlines\n",
    "\n  indented\n\n\ttab ",
    " spaces ",
    "emoji \U0001f408\u200d\u2b1b, café, 猫",
    "\u2028\u2029\x85\ufeff\x07\x1b\x7f\r\n",
    "word " * 300,
]


def again(experiment, folder):
    """The experiment that its saved configuration gives."""
    saved = folder / "config.yaml"
    saved.write_bytes(config.to_yaml(experiment).encode())
    return config.load([saved])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_verbatim_from_the_word_to_the_saved_configuration_and_back(prompt, tmp_path):
    first = config.load(words=[f"source={prompt}", f"target={prompt}", f"image={prompt}"])
    assert (first.source, first.target, first.image) == (prompt, prompt, prompt)
    second = again(first, tmp_path)
    assert second == first


def test_any_text_at_all_is_verbatim(tmp_path):
    letters = random.Random(0)
    alphabet = "ab :#-'\"\\\n\t{}[]$,&*!|>%@`?~=\x01\x7f\x85\u2028é猫\U0001f408\ufeff"
    prompts = {f"k{n}": "".join(letters.choices(alphabet, k=letters.randrange(1, 12))) for n in range(300)}
    (tmp_path / "a.yaml").write_bytes(dump(prompts).encode())
    assert {key: text for key, (_, text) in read_yaml(tmp_path / "a.yaml").items()} == prompts


def test_a_file_holds_prompts_as_they_are_written_there(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("source: yes\ntarget: 007\ninstruction: ${oc.env:HOME}\nsteps: 1_0\n")
    experiment = config.load([file])
    assert (experiment.source, experiment.target, experiment.steps) == ("yes", "007", 10)
    assert experiment.instruction == "${oc.env:HOME}"


def test_later_files_win_and_words_over_all(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 10\nseed: 1\nmodel: {device: cpu, adapter: {sketch: here}}\n")
    (tmp_path / "b.yaml").write_text("steps: 20\nmodel.dtype: float32\n")
    experiment = config.load([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["steps=30", "model.adapter.pose=there"])
    assert (experiment.steps, experiment.seed, experiment.model.device) == (30, 1, "cpu")
    assert experiment.model.dtype == "float32"
    assert experiment.model.adapter == {"sketch": "here", "pose": "there"}


def test_another_inversion_forgets_the_settings_of_the_former(tmp_path):
    first = config.load(words=["inversion.name=null_text", "inversion.inner_steps=3"])
    (tmp_path / "a.yaml").write_text(config.to_yaml(first))
    assert config.load([tmp_path / "a.yaml"]).inversion["inner_steps"] == 3
    assert config.load([tmp_path / "a.yaml"], ["inversion.name=direct"]).inversion["name"] == "direct"


def test_inversion_and_method_become_the_classes_with_their_settings():
    words = ["inversion.name=null_text", "inversion.lr=1e-2", "method.preserve_steps=[0,25]", "method.preserve=kv"]
    experiment = config.load(words=words)
    assert config.inversion(experiment) == NullText(lr=1e-2)
    assert config.method(experiment) == MaSaFusion(preserve_steps=(0, 25), preserve="kv")
    assert config.method(config.Experiment()) == MaSaFusion()
    with pytest.raises(InputError, match=r"method\.name=masafusoin.*did you mean masafusion\?"):
        config.method(config.Experiment(method={"name": "masafusoin"}))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("inversion.nme=direct", "inversion.nme: unknown key; did you mean inversion.name?"),
        ("method.guidence=3", "method.guidence: unknown key; did you mean method.guidance?"),
        ("method.name=masafusoin", "did you mean masafusion?"),
        ("method.name=masfusion", "did you mean masafusion?"),
        ("method.name=MasaCtrl", "did you mean masactrl?"),
        ("inversion.name=nulltext", "did you mean null_text?"),
        ("inversion.lr=1e-3", "is a key of inversion.name=null_text"),
        ("method.reweight={dog: 2}", "is a key of method.name=prompt_to_prompt, not of the method that is chosen"),
        ("method.reweight.dog=2", "is a key of method.name=prompt_to_prompt, not of the method that is chosen"),
        ("model=x", "model: is a table"),
        ("model.adapter=FOLDER", "is a table; give its entries one by one, as model.adapter.sketch=FOLDER"),
        ("bench.rows=X", "is a table; give its entries one by one, as bench.rows.plain=method.name=plain"),
        ("bench.encoders={'dino': 'here'}", "is a table; give its entries one by one, as bench.encoders.dino=here"),
        ("trainer=x", "is a table; give its entries one by one, as trainer.precision=16-mixed"),
        ("axes=3", "is a table; give its entries one by one, as axes.seed=1,2,3"),
        ("model.dtype=fp16", "did you mean float16?"),
        ("model.dtype=bf16", "did you mean bfloat16?"),
        ("model.dtype=float61", "auto | float32 | float16 | bfloat16; did you mean float16?"),
        ("steps=many", "steps=many: must be whole number"),
        ("steps=0", "1 to 999"),
        ("steps=-1", "1 to 999"),
        ("steps=1000", "1 to 999"),
        ("batch=0", "at least 1"),
        ("dilate=-1", "at least 0"),
        ("launch.workers=-1", "at least 0"),
        ("launch.minutes=0", "at least 1"),
        ("region.threshold=1", "below 1"),
        ("region.feather=-1", "at least 0"),
        ("region.downsample=min", "max | area | nearest"),
        ("size=big", "768x512"),
        ("size=0x0", "768x512"),
        ("box=1,2,3", "x0,y0,x1,y1"),
        ("box=3,2,1,4", "x0 < x1"),
        ("method.preserve_steps=[25,0]", "0 <= a < b"),
        ("method.edit_steps=[50,60]", "a < steps=50"),
        ("method.guidance=inf", "finite"),
        ("model.device=cpu0", "auto, cpu, cuda"),
        ("trainer.precison=16", "did you mean trainer.precision?"),
        ("trainer.max_epochs=abc", "trainer.max_epochs=abc: must be whole number | null"),
        ("trainer.precision=16-true", "set model.dtype"),
        ("trainer.precision=64", "set model.dtype"),
        ("model.path=${oc.env:SECRET}", "nothing is filled in"),
        ("tracking.name=${oc.env:SECRET}", "nothing is filled in"),
        ("trainer.precision=${oc.env:SECRET}", "nothing is filled in"),
        ("source=a\0b", "null byte"),
        ("source=a\udc80b", "UTF-8"),
        ("cat", "'cat': not key=value; quotes keep a text together"),
        ("a.yaml", "--config a.yaml"),
        ("=x", "not key=value"),
    ],
)
def test_what_cannot_be_is_refused_with_what_is_allowed(word, said, monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    with pytest.raises(InputError) as refusal:
        config.load(words=[word])
    assert said in str(refusal.value)
    assert "hidden" not in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["{dog: 2}", '{"dog":2}', "{dog: 2, red: 3}"])
def test_a_table_that_is_given_as_one_value_is_said_by_its_entries(text):
    with pytest.raises(InputError, match=r"method\.reweight: is a table; .* as method\.reweight\.dog=2$"):
        config.load(words=["method.name=prompt_to_prompt", f"method.reweight={text}"])


def test_a_key_of_other_methods_names_them_all():
    with pytest.raises(
        InputError, match=r"is a key of method\.name=masafusion \| masactrl \| t2i_only, not of the method"
    ):
        config.load(words=["method.name=plain", "method.hint_until=3"])


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: x\nmodel:\n  pth: y\n")
    words = ["steps=0", "inversion.nme=x", "method.name=masafusoin", "method.preserve_steps=[5,2]", "cat"]
    with pytest.raises(InputError) as refusal:
        config.load([tmp_path / "a.yaml"], words, needs=lambda e: ["target: missing"])
    said = str(refusal.value)
    assert said.startswith("8 problems:")
    for part in ("a.yaml:1: seed=x", "a.yaml:3: model.pth", "steps=0", "inversion.name?", "masafusion?", "[5,2]"):
        assert part in said
    assert "'cat'" in said
    assert "target: missing" in said


HOSTILE = {
    "python tag": "source: !!python/object/apply:os.system ['touch marker']\n",
    "own tag": "source: !x y\n",
    "alias bomb": "a: &a [x]\n" + "\n".join(f"b{i}: &b{i} [*a, *a, *a, *a]" for i in range(30)),
    "recursive alias": "trainer: &a {devices: *a}\n",
    "duplicate keys": "steps: 1\nsteps: 2\n",
    "duplicate keys, one dotted": "model: {path: a}\nmodel.path: b\n",
    "deep flow": "trainer: " + "[" * 2000 + "]" * 2000,
    "deep mapping": "trainer: " + "{a: " * 2000 + "1" + "}" * 2000,
    "deep block": "\n".join(" " * i + "a:" for i in range(300)),
    "large": "source: " + "a" * 100_000_000,
    "binary": bytes(range(256)).decode("latin-1"),
    "no table": "- steps\n- 1\n",
    "a word": "steps",
    "two documents": "steps: 1\n---\nsteps: 2\n",
    "half": "model: {path: 'a",
    "complex key": "? [a, b]\n: c\n",
    "null byte": 'source: "a\\0b"\n',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.yaml"
    file.write_bytes(HOSTILE[name].encode("latin-1"))
    start = time.process_time()
    with pytest.raises(InputError) as refusal:
        config.load([file])
    assert time.process_time() - start < 1
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 500
    assert "a.yaml" in str(refusal.value)
    assert not (tmp_path / "marker").exists()


def test_a_file_that_is_none_is_refused(tmp_path):
    for path, said in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "not a file")):
        with pytest.raises(InputError, match=said):
            config.load([path])
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}


def test_force_is_not_saved():
    assert "force" not in config.to_yaml(config.load(words=["force=true"]))
    assert asdict(config.load(words=["force=true"]))["force"]


def test_every_shipped_configuration_loads():
    files = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert files
    for file in files:
        experiment = config.load([file])
        config.method(experiment)
        config.inversion(experiment)
        commands = tuple(f"# masafusion {command}" for command in ("edit", "bench", "sweep"))
        assert file.read_text().startswith(commands), "the command comes first"
