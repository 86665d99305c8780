import os
import shutil
import signal
import socket
from importlib.util import find_spec

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}

import pytest
import torch

torch.set_num_threads(1)
collect_ignore = [] if find_spec("gradio") else ["test_app.py", "test_app_wire.py", "test_app_browser.py"]
for number in (signal.SIGINT, signal.SIGHUP):  # what is started in the background is told to ignore these
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def quiet_home(tmp_path_factory, monkeypatch):
    """A home of its own, and no way out but loopback."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MASAFUSION_HOME", str(home / "masafusion"))
    connect = socket.socket.connect

    def loopback_only(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"no network in tests: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", loopback_only)


@pytest.fixture
def realdata():
    """The folder of photographs and small weights that MASAFUSION_REALDATA names; the test skips without it."""
    from pathlib import Path

    folder = os.environ.get("MASAFUSION_REALDATA", "")
    if not Path(folder, "images").is_dir():
        pytest.skip("set MASAFUSION_REALDATA to the folder with images/ and weights/")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """A folder that holds a tiny random model of Stable Diffusion's structure, with sketch and pose adapters."""
    from tests.tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_networks(tmp_path_factory):
    """The folder of such a model with the UNets of other input channels beside its own: instruct, hive, inpaint."""
    from tests.tiny import tiny_folder, tiny_network

    root = tiny_folder(tmp_path_factory.mktemp("networks"))
    for kind, channels in (("instruct", 8), ("hive", 8), ("inpaint", 9)):
        tiny_network(root, kind, channels, seed=channels)
    return root


@pytest.fixture
def tiny(tiny_root):
    """That model, loaded."""
    from masafusion_lab.model import StableDiffusion

    return StableDiffusion.load(str(tiny_root))


@pytest.fixture
def studio(tmp_path, tiny_root):
    """What an annotation lab with the tiny model shares, opened on a small picture of a cat."""
    from masafusion_lab import request
    from masafusion_lab.web.studio import Studio
    from tests.edits import drawn

    drawn().save(tmp_path / "cat.png")
    words = [f"image={tmp_path / 'cat.png'}", "source=a cat on grass", "target=a red dog on grass", "box=6,6,26,26"]
    words += [f"model.path={tiny_root}", "model.device=cpu", f"store={tmp_path / 'store'}", "size=48x32", "steps=2"]
    words += ["tracking.mode=off"]
    made = Studio(request.read(words, []), words, [], tmp_path / "kept")
    yield made
    made.desk.close()


@pytest.fixture
def chromium():
    """A page in the machine's Chromium. At the end nothing went wrong on it, and it asked for nothing outside."""
    sync = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e '.[dev]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    sync.expect.set_options(timeout=60_000)
    errors, asked = [], []

    def refuse(dialog):
        errors.append(dialog.message)
        dialog.dismiss()

    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("dialog", refuse)
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        yield page
        browser.close()
    ours = ("http://127.0.0.1:", "ws://127.0.0.1:", "file:", "data:", "blob:", "about:")
    assert (errors, [url for url in asked if not url.startswith(ours)]) == ([], [])


@pytest.fixture
def two_cases(tmp_path, tiny_root):
    """A sweep over two cases of a manifest, by further words."""
    from masafusion_lab import config
    from tests.edits import drawn

    for n, shift in enumerate((0, 4)):
        drawn(shift=shift).save(tmp_path / f"{n}.png")
        drawn("L", shift, fill=255).save(tmp_path / f"mask{n}.png")
        drawn("L", shift, outline=255).save(tmp_path / f"sketch{n}.png")
    lines = [f"{n},{n}.png,mask{n}.png,sketch{n}.png,a cat on grass,a red dog" for n in (0, 1)]
    (tmp_path / "cases.csv").write_text("\n".join(["id,image,mask,sketch,source,target", *lines]))

    def experiment(*words):
        usual = f"model.path={tiny_root} model.device=cpu store={tmp_path}/store cases={tmp_path}/cases.csv size=48x32"
        return config.load(words=[*usual.split(), "steps=3", "axes.seed=0,1", "sweep.rows=8", *words])

    return experiment
