"""`watch`, and `train --watch`: the page runs in its own process, and no training run waits for it or depends on it."""

import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import flags

from llm.commands.look import watch
from llm.errors import UserError
from llm.export import html
from llm.record.metrics import read_record
from llm.report import write_html

for package in ("starlette", "uvicorn", "plotly"):
    pytest.importorskip(package)
ROOT = Path(__file__).parent.parent
DEADLINE = 20  # seconds, of what takes one


def opened(address):
    """Open an address without a proxy."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=DEADLINE)


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "llm.page.server", raising=False)
    with pytest.raises(UserError, match=r"uvicorn.*losscurve\[dashboard\]"):
        watch.main([str(tmp_path)])


def test_watch_refuses_a_file_and_a_port_out_of_range(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: not a state_dict saved by torch\.save"):
        watch.main([str(tmp_path / "file")])
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match=r"mamba/config\.json: model_type = 'mamba': losscurve has no such"):
        watch.main([str(tmp_path / "mamba")])
    with pytest.raises(UserError, match="port"):
        watch.main(["--port", "70000"])


@pytest.mark.parametrize("mark", [html.MARK, write_html.MARK])
def test_watch_says_where_a_page_that_we_wrote_opens(tmp_path, mark):
    (tmp_path / "page.html").write_text(f"{mark}<html></html>")
    with pytest.raises(UserError, match=r"page\.html: is a page that losscurve wrote; open it in a browser$"):
        watch.main([str(tmp_path / "page.html")])


def test_a_folder_without_a_run_is_a_warning(tmp_path):
    command = [sys.executable, "-m", "llm", "watch", str(tmp_path / "rum")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    with process:
        assert process.stdout.readline().startswith(b"watching ")
        process.send_signal(signal.SIGINT)
        assert b"rum: no run there yet; the page waits for one" in process.stderr.read()
    assert process.returncode == 0


@pytest.fixture
def server(tmp_path):
    """Start the command on a folder without a run; yield its process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llm", "watch", "--until_eof", "--", str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    address = re.search(r"http://\S+", process.stdout.readline().decode())[0]
    yield process, address
    process.stdin.close()
    process.wait(DEADLINE)
    process.stdout.close()


def events_of(address, seen):
    """Read server-sent events into `seen` until the server ends them."""
    with opened(address + "events") as stream:
        seen.extend(line.decode().strip() for line in stream if line.startswith(b"event"))


def test_it_listens_on_loopback_only_and_notifies_open_pages_at_its_end(server):
    process, address = server
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", address)
    port = int(address.split(":")[2].split("/")[0])
    listening = Path("/proc/net/tcp")
    if listening.exists():
        rows = [line.split() for line in listening.read_text().splitlines()[1:]]
        local = {row[1] for row in rows if row[3] == "0A"}  # sockets that listen
        assert {place for place in local if place.endswith(f":{port:04X}")} == {f"0100007F:{port:04X}"}
    seen = []
    viewer = threading.Thread(target=events_of, args=(address, seen))
    viewer.start()
    end = time.monotonic() + DEADLINE
    while "event: run" not in seen:
        assert time.monotonic() < end
        time.sleep(0.02)
    process.stdin.close()
    began = time.monotonic()
    assert process.wait(DEADLINE) == 0
    assert time.monotonic() - began < 15  # it does not wait for the open pages, which never end by themselves
    viewer.join(DEADLINE)
    assert seen[-1] == "event: ended"


def test_it_has_a_lower_priority_than_a_training_run(server):
    status = Path(f"/proc/{server[0].pid}")
    if not status.exists():
        pytest.skip("no /proc here")
    assert int((status / "stat").read_text().rpartition(")")[2].split()[16]) >= 10  # nice
    assert (status / "oom_score_adj").read_text().strip() == "1000"


def test_ctrl_c_ends_it(server):
    server[0].send_signal(signal.SIGINT)
    assert server[0].wait(DEADLINE) == 0


def test_train_watch_prints_the_address_and_ends_the_page_with_the_run(here, losscurve):
    code, out, err = losscurve(f"train --text text.txt {flags()} --watch")
    assert code == 0, err
    address = re.search(r"watching checkpoints at (http://127\.0\.0\.1:\d+/\S+/)", out)[1]
    assert out.index(address) < out.index("step     0")
    assert out.splitlines()[-1] == "saved checkpoints/model.pt"
    with pytest.raises(OSError, match="refused"):
        opened(address)


@pytest.mark.parametrize(
    "command", [["-c", "import sys; sys.exit('boom')"], ["-c", "print('error: the page needs uvicorn')"]]
)
def test_a_page_that_cannot_start_is_one_warning_and_the_run_is_the_same(here, losscurve, monkeypatch, command):
    real = subprocess.Popen

    def broken(words, **more):
        return real([words[0], *command] if "watch" in words else words, **more)

    monkeypatch.setattr(subprocess, "Popen", broken)
    code, _, err = losscurve(f"train --text text.txt {flags()} --watch")
    assert code == 0
    assert len([line for line in err.splitlines() if line.startswith("warning: no page: ")]) == 1
    assert read_record(here / "checkpoints")[-1]["step"] == 12


def test_a_run_trains_without_a_page_if_no_process_can_be_started(here, capsys, monkeypatch):
    def full(*words, **more):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    with watch.beside(here) as tell_address:
        tell_address()
    assert "no page: Resource temporarily unavailable; training goes on" in capsys.readouterr().err


def test_a_page_that_prints_nothing_is_a_warning_after_a_time_limit(here, capsys, monkeypatch):
    real = subprocess.Popen

    def silent(words, **more):
        return real([words[0], "-c", "import sys; sys.stdin.read()"], **more)

    monkeypatch.setattr(subprocess, "Popen", silent)
    monkeypatch.setattr(watch, "PATIENCE", 0.2)
    with watch.beside(here) as tell_address:
        tell_address()
    assert "printed nothing" in capsys.readouterr().err


def test_the_page_ends_if_the_training_is_killed(here):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom llm.commands.look.watch import beside\n"
        "with beside(Path('run')) as tell_address:\n    tell_address()\n    time.sleep(60)\n"
    )
    training = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    address = re.search(r"http://\S+", training.stdout.readline().decode())[0]
    with opened(address) as page:
        assert b"losscurve" in page.read()
    training.kill()
    training.wait()
    end = time.monotonic() + DEADLINE
    while True:
        try:
            opened(address).close()
        except OSError:
            break
        assert time.monotonic() < end
        time.sleep(0.05)
    training.stdout.close()
