import os
import signal
import socket

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}

import pytest
import torch

torch.set_num_threads(1)
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
