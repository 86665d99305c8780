"""The annotation lab over the wire: what is served, what goes through, and attacks."""

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from masafusion_lab import app, cli
from masafusion_lab.web import form, handlers
from masafusion_lab.web.gate import Gate
from masafusion_lab.web.page import names_file
from tests.edits import sent


@pytest.fixture
def served(studio):
    demo = app.launch(studio)
    yield demo
    demo.close(verbose=False)


def ask(url, data=None, **headers):
    """The status and text of an answer; the path goes as it is written."""
    try:
        asked = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def call(url, name, *data, session="s"):
    """What an endpoint gives: its last event and that one's data."""
    body = json.dumps({"data": data, "session_hash": session}).encode()
    status, text = ask(f"{url}gradio_api/call/{name}", body, **{"Content-Type": "application/json"})
    assert status == 200, text
    _, text = ask(f"{url}gradio_api/call/{name}/{json.loads(text)['event_id']}")
    event, _, data = text.strip().rpartition("event: ")[2].partition("\ndata: ")
    return event, data


def test_the_page_is_served_to_this_machine_with_nothing_from_elsewhere(served):
    url = served.local_url
    assert url.startswith("http://127.0.0.1:")
    status, page = ask(url)
    assert status == 200
    assert "fonts.googleapis" not in page
    assert json.loads(ask(f"{url}config")[1])["analytics_enabled"] is False


def test_no_file_is_served_but_what_the_lab_made_for_it(served, studio, tmp_path):
    url, kept = served.local_url, tmp_path / "kept"
    secret = kept / "secret.txt"
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("secret")
    outside = ["/etc/passwd", "%2Fetc%2Fpasswd", "../../etc/passwd", str(secret), str(kept), "~/.bashrc"]
    outside += [f"{studio.served}/x/../../secret.txt", f"{studio.served}/..%2fsecret.txt", "http://example.org/"]
    for path in outside:
        assert ask(f"{url}gradio_api/file={path}")[0] == 403, path
    for path in ("upload", "proxy=http://example.org/", "stream/x", "component_server", "run/arrive", "api/arrive",
                 "vibe-code", "process_recording", "file/etc/passwd", "custom_component/1/client/x/y"):  # fmt: skip
        assert ask(f"{url}gradio_api/{path}")[0] == 403, path
        assert ask(f"{url}gradio_api/{path}", b"x")[0] == 403, path
    assert ask(f"{url}monitoring")[0] == 403


def test_a_file_that_a_request_names_is_neither_opened_nor_fetched(served, monkeypatch):
    fetched = []
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_get", lambda url: fetched.append(url))
    for path in ("/etc/passwd", "http://example.org/x.png"):
        file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
        for named in (file, {"uploads": [file]}, {"uploads": [{"name": "x", "data": file}]}):
            assert call(served.local_url, "bring", "token", named)[0] == "error"
    assert fetched == []
    assert not names_file({"region": "x", "uploads": [{"name": "y", "data": "z"}]})


def test_requests_that_are_too_large_or_do_not_say_so_are_refused_unread():
    gate, host = Gate(None, Path("/served")), (b"host", b"127.0.0.1:7860")
    post = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join"}
    assert gate.refusal({**post, "headers": [host, (b"content-length", b"50000000")]}) == 413
    assert gate.refusal({**post, "headers": [host]}) == 411
    assert gate.refusal({**post, "headers": [host, (b"content-length", b"500")]}) == 0
    lying = [host, (b"content-length", b"500"), (b"transfer-encoding", b"chunked")]  # its body may be of any length
    assert gate.refusal({**post, "headers": lying}) == 411
    assert gate.refusal({"path": "/gradio_api/file=a\0b", "method": "GET", "headers": [host]}) == 403


@pytest.mark.parametrize("path", ["", "config", "gradio_api/queue/join", "gradio_api/queue/data?session_hash=s"])
def test_no_other_site_reaches_the_lab(served, path):
    url = f"{served.local_url}{path}"
    port = url.split(":")[2].split("/")[0]
    data = b"{}" if path.endswith("join") else None
    own = f"http://127.0.0.1:{port}"
    for headers in (
        {"Host": "evil.com"},
        {"Host": f"evil.com:{port}"},
        {"Host": "127.0.0.1.evil.com"},
        {"Host": "[evil"},
        {"Origin": "http://evil.com"},
        {"Origin": "null"},
        {"Origin": "http://[evil"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": f"{own}.evil.com"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    ):
        assert ask(url, data, **headers)[0] == 403, headers
    if path in ("", "config"):
        for headers in ({"Origin": own}, {"Host": f"localhost:{port}"}, {"Sec-Fetch-Site": "same-origin"}):
            assert ask(url, data, **headers)[0] == 200, headers
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert ask(url, data, **link)[0] == 200


def test_no_websocket_is_opened():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Gate(None, Path("/served"))({"type": "websocket", "path": "/gradio_api/queue/data"}, None, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize("host", ["evil.com", ""])
def test_no_other_site_may_ask_whether_it_may(served, host):
    own = served.local_url.split("/")[2]
    asked = http.client.HTTPConnection(own, timeout=60)
    headers = {"Host": host or own, "Origin": "http://evil.com", "Access-Control-Request-Method": "POST"}
    asked.request("OPTIONS", "/gradio_api/queue/join", headers=headers)
    with asked.getresponse() as answer:
        assert answer.status == 403
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]
        assert b"--host" in answer.read()
    asked.close()


@pytest.mark.parametrize("path", ["", "config", "nowhere"])
def test_every_answer_says_that_no_page_may_frame_read_or_guess_it(served, path):
    request = urllib.request.Request(f"{served.local_url}{path}", headers={"Origin": served.local_url[:-1]})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        headers = {name.lower(): value for name, value in answer.headers.items()}
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert not [name for name in headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("host", "asked", "ours"),
    [
        ("127.0.0.1", "lab.example:7860", False),
        ("lab.example", "LAB.example:7860", True),
        ("lab.example", "evil.com", False),
        ("0.0.0.0", "192.168.1.20:7860", True),
        ("0.0.0.0", "[fe80::1]:7860", True),
        ("0.0.0.0", "evil.com", False),
        ("127.0.0.1", "[::1]:7860", True),
        ("127.0.0.1", "", False),
    ],
)
def test_the_lab_goes_by_the_names_that_it_was_given(host, asked, ours):
    assert Gate(None, Path("/served"), host).is_ours(asked) == ours


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "99999999"], "--port 99999999: must be 1 to 65535"),
        (["--host", "203.0.113.7"], "--host 203.0.113.7: is no address of this machine"),
        (["--host", "no such host"], "--host no such host: is no address of this machine"),
        (["--port", "{taken}"], "--port {taken}: something is served there already"),
    ],
)
def test_where_nothing_can_be_served_is_said_at_once(monkeypatch, capsys, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)  # it is not even looked for
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["masafusion", "app", *(word.format(taken=taken) for word in words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 2
    assert said.format(taken=taken) in (err := capsys.readouterr().err)
    assert err.count("\n") == 1


def test_an_edit_goes_over_the_wire(served, studio):
    fields = [field.value for field in form.fields(studio.experiment)]
    event, data = call(served.local_url, "arrive", "")
    token = json.loads(data)[0]
    event, data = call(served.local_url, "run", token, sent(), "sketch", "a cat", "a red dog", "", *typed(fields))
    assert event == "complete", data
    (past,) = studio.past(token)
    assert past.result["prompts"]["target"] == "a red dog"


def typed(values):
    """Values of the form as the page sends them: numbers and ticks as such."""
    return [{"true": True, "false": False}.get(v, int(v) if v.lstrip("-").isdigit() else v) for v in values]


@pytest.mark.slow
def test_fifty_requests_at_once_are_all_answered_and_those_too_many_are_refused(served, studio):
    url, gate, tokens = served.local_url, threading.Event(), [f"token{k}" for k in range(50)]
    fields = typed([field.value for field in form.fields(studio.experiment)])
    studio.load().future.result()
    studio.desk.submit("busy", lambda job: gate.wait(100))

    def come_and_run(token):
        call(url, "arrive", token, session=token)
        return call(url, "run", token, sent(), "sketch", "a cat", "a dog", "", *fields, session=token)

    with ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(come_and_run, token) for token in tokens]
        end = time.monotonic() + 60
        while sum(job.done() for job in asked) < 31 and time.monotonic() < end:
            time.sleep(0.1)
        refused = [job.result() for job in asked if job.done()]
        for token in tokens:
            handlers.cancel(studio, token)
        gate.set()
        answers = [job.result(60) for job in asked]
    assert len(refused) == 31  # twenty may wait, and one of them is the busy one
    assert all("20 runs wait already" in data for _, data in refused)
    assert all(event == "complete" for event, _ in answers)
    assert ask(url)[0] == 200


@pytest.mark.slow
def test_killed_in_mid_run_nothing_is_half_written_and_a_signal_ends_it_with_the_run_marked(studio, tmp_path):
    words = [word for word in studio.words if not word.startswith("steps=")]
    command = [sys.executable, "-c", "from masafusion_lab.cli import main; main()", "app", *words, "steps=999"]
    for number, code, state in ((signal.SIGKILL, -signal.SIGKILL, "killed"), (signal.SIGTERM, 143, "interrupted")):
        with subprocess.Popen([*command, f"out={tmp_path / 'kept'}"], stdout=subprocess.PIPE, text=True) as process:
            url = process.stdout.readline().split()[0]
            call(url, "arrive", "me")
            fields = typed([field.value for field in form.fields(studio.experiment)])
            fields[[field.key.name for field in form.fields(studio.experiment)].index("steps")] = 999
            begun = len(studio.past("me"))
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(call, url, "run", "me", sent(), "sketch", "a cat", "a dog", "", *fields)
                while len(studio.past("me")) == begun and not answer.done():
                    time.sleep(0.1)
                time.sleep(0.5)
                process.send_signal(number)
                assert process.wait(60) == code
        past = studio.past("me")[0]
        assert not past.done
        assert ("killed" if past.killed else past.state["state"]) == state
        assert not [path for path in past.folder.glob("*.png") if not Image.open(path).load()]
