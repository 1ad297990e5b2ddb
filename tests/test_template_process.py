"""npllm.text.template_process: one process is reused, replaced when it ends, and leaves nothing."""

import contextlib
import json
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
from npllm.errors import NpllmOSError, NpllmRuntimeError, NpllmValueError
from npllm.text import template_worker
from npllm.text.template_process import Allowance, TemplateProcess, process

ROOT = Path(__file__).resolve().parents[1]
ENDLESS = "{{ 7**26000000 }}"
posix = pytest.mark.skipif(os.name != "posix", reason="signals and /proc")


@pytest.fixture
def own():
    """A process of this test alone."""
    process = TemplateProcess()
    yield process
    process.stop()


def ask(process, source, seconds=5.0, **names):
    request = {"source": source, "messages": [], "names": names, "n_more": 1000}
    return process.ask(json.dumps(request), Allowance(seconds))


def run(program, **options):
    """Run a program that uses npllm in a new interpreter; return what it prints."""
    options = {"capture_output": True, "text": True, "check": True, "timeout": 120} | options
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, **options).stdout


def gone(pid, seconds=20):
    """Whether a process ends within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with contextlib.suppress(OSError):  # its new parent may never ask for a zombie's exit code
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.05)
    return False


def test_one_process_serves_many_requests(own):
    assert ask(own, "a{{ x }}", x=1) == {"text": "a1"}
    first = own.pid
    assert ask(own, "a{{ x }}", x=2) == {"text": "a2"}
    assert ask(own, "{{ 1 / 0 }}")["error"] == "ZeroDivisionError: division by zero"
    assert ask(own, "b") == {"text": "b"}
    assert own.pid == first


def test_a_process_that_has_ended_is_replaced(own):
    ask(own, "a")
    first = own.pid
    os.kill(first, signal.SIGTERM)
    assert gone(first)
    assert ask(own, "b") == {"text": "b"}
    assert own.pid != first


@posix
def test_a_process_at_its_limit_of_time_is_gone(own):
    ask(own, "a")
    first, start = own.pid, time.monotonic()
    with pytest.raises(NpllmValueError, match="it takes more than the 5 seconds"):
        ask(own, ENDLESS, seconds=0.3)
    assert time.monotonic() - start < 5
    with pytest.raises(ProcessLookupError):  # not even a zombie
        os.kill(first, 0)
    assert ask(own, "b") == {"text": "b"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_no_result_depends_on_earlier_requests(own):
    """What fits into a new process fits into a used one, and what does not, into neither."""
    large = "{% set x = 'a' * (n * 1000000) %}{{ x|length }}"
    for n in (200, 150, 200, 300, 200, 210):
        if n > 256:
            with pytest.raises(NpllmValueError, match="it needs more than the 256 MB of memory"):
                ask(own, large, n=n)
        else:
            assert ask(own, large, n=n) == {"text": f"{n}000000"}


def test_time_is_shared_between_renderings(own):
    allowance = Allowance(1.0)
    request = json.dumps({"source": "a", "messages": [], "names": {}, "n_more": 9})
    own.ask(request, allowance)
    assert 0 < allowance.left < 1.0
    allowance.left = -1.0
    with pytest.raises(NpllmValueError, match="seconds"):
        own.ask(request, allowance)


def test_threads_get_their_own_answers(own):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask(own, "{{ i }}", i=i)["text"], range(200)))
    assert answers == [str(i) for i in range(200)]


@pytest.mark.slow
def test_waiting_for_another_thread_costs_no_time(own):
    ask(own, "a")

    def endless():
        with pytest.raises(NpllmValueError):
            ask(own, ENDLESS, seconds=1.5)

    thread = threading.Thread(target=endless)
    thread.start()
    time.sleep(0.2)
    assert ask(own, "b", seconds=1.0) == {"text": "b"}
    thread.join()


@posix
def test_an_interrupted_request_leaves_no_answer_behind(own):
    ask(own, "a")
    first = own.pid
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            ask(own, ENDLESS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert ask(own, "b") == {"text": "b"}


@posix
def test_ctrl_c_is_for_the_program_alone(own):
    """A terminal sends it to the whole group of processes."""
    ask(own, "a")
    assert os.getpgid(own.pid) != os.getpgid(0)


FORKS = """
import os, threading
from npllm.text.template_process import process, Allowance
import json
def ask(i):
    request = {"source": "{{ i }}", "messages": [], "names": {"i": i}, "n_more": 9}
    return process.ask(json.dumps(request), Allowance())["text"]
assert ask(1) == "1"
first = process.pid
process._lock.acquire()  # as a thread that renders while another forks
child = os.fork()
if child == 0:
    answers = [ask(i) for i in range(20)]
    good = answers == [str(i) for i in range(20)] and process.pid != first
    process.stop()
    os._exit(0 if good else 1)
process._lock.release()
for i in range(20):
    assert ask(i) == str(i)
assert process.pid == first
assert os.waitpid(child, 0)[1] == 0
os.kill(first, 0)
process.stop()
print("good")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_starts_its_own():
    assert run(FORKS) == "good\n"


FORKS_MEANWHILE = """
import gc, json, os, threading, time
from npllm.text.template_process import process, Allowance
def ask(source):
    request = {"source": source, "messages": [], "names": {}, "n_more": 9}
    return process.ask(json.dumps(request), Allowance(1.0))["text"]
ask("a")
failed = []
def endless():
    try:
        ask("{{ 7**26000000 }}")
    except ValueError as error:
        failed.append(error)
thread = threading.Thread(target=endless)
thread.start()
time.sleep(0.3)  # it waits for the answer
child = os.fork()
if child == 0:
    gc.collect()
    good = ask("b") == "b"
    process.stop()
    os._exit(0 if good else 1)
assert os.waitpid(child, 0)[1] == 0
thread.join()
assert len(failed) == 1 and ask("c") == "c"
process.stop()
print("good")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_forked_while_a_thread_renders():
    assert run(FORKS_MEANWHILE, timeout=40) == "good\n"


PRINTS = """
import sys
from npllm.text.template_process import process
from npllm.text.chat_template import render
text = render("{{ messages[0].content }}", [{"role": "user", "content": "é"}], {})
assert text == "é" and "jinja2" not in sys.modules
with open(sys.argv[1], "w") as file:
    print(process.pid, file=file)
"""


@posix
def test_nothing_is_left_when_the_program_ends(tmp_path):
    """Neither a process nor a word; and nothing imports Jinja into the program."""
    file = tmp_path / "pid"
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", PRINTS, str(file)]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert gone(int(file.read_text()))


@posix
def test_a_thread_that_still_renders_does_not_keep_the_process(tmp_path):
    program = """
import sys, threading, time
from npllm.text.template_process import process
from npllm.text.chat_template import render
render("x", [], {})
threading.Thread(target=render, args=("{{ 7**26000000 }}", [], {}), daemon=True).start()
time.sleep(0.5)
with open(sys.argv[1], "w") as file:
    print(process.pid, file=file)
"""
    file = tmp_path / "pid"
    subprocess.run([sys.executable, "-c", program, str(file)], cwd=ROOT, timeout=120, check=True)
    assert gone(int(file.read_text()), seconds=1)


@posix
def test_nothing_is_left_when_the_program_is_killed(tmp_path):
    file = tmp_path / "pid"
    program = PRINTS + "\nimport os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", program, str(file)], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert gone(int(file.read_text()))


@posix
def test_standard_streams_may_be_closed(tmp_path):
    file = tmp_path / "pid"
    command = [sys.executable, "-c", PRINTS, str(file)]
    done = subprocess.run(
        ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command], cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0
    assert gone(int(file.read_text()))


def test_descriptors_and_processes_do_not_pile_up(own):
    def n_open():
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    ask(own, "a")
    before = n_open()
    for _ in range(5):
        own.stop()
        ask(own, "a")
    assert n_open() == before


# ------------------------------------------------------------------------------ interpreters


@pytest.fixture
def interpreter():
    """Set the interpreter that multiprocessing names, and put it back."""
    before = multiprocessing.spawn.get_executable()
    yield multiprocessing.spawn.set_executable
    multiprocessing.spawn.set_executable(before)


def test_a_frozen_program_needs_an_interpreter(own, interpreter, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(NpllmRuntimeError, match=r"multiprocessing\.set_executable"):
        ask(own, "a")
    python = sys.executable
    monkeypatch.setattr(sys, "executable", "/app")
    interpreter(python)
    assert ask(own, "a") == {"text": "a"}


def test_a_program_that_is_no_interpreter_is_named(own, interpreter, tmp_path):
    interpreter(str(tmp_path / "none"))
    with pytest.raises(NpllmOSError, match="cannot start the process that renders chat templates"):
        ask(own, "a")
    if os.path.exists("/bin/true"):
        interpreter("/bin/true")
        with pytest.raises(NpllmRuntimeError, match=r"does not start: /bin/true"):
            ask(own, "a")
    interpreter(sys.executable)
    assert ask(own, "a") == {"text": "a"}


def test_the_environment_of_the_program_does_not_matter(own, monkeypatch, tmp_path, capfd):
    """Neither modules beside it nor options of the interpreter; and nothing is printed."""
    (tmp_path / "json.py").write_text("raise SystemExit")
    (tmp_path / "jinja2.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONINSPECT", "PYTHONVERBOSE", "PYTHONUNBUFFERED", "PYTHONOPTIMIZE"):
        monkeypatch.setenv(name, "1")
    assert ask(own, "é{{ [1]|tojson }}") == {"text": "é[1]"}
    own.stop()
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------ the program itself


def test_the_program_needs_no_limits_of_the_system(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    template_worker.set_limit("RLIMIT_AS", 1)
    template_worker.limit_memory(1)
    template_worker.limit_processor_time(0)


@posix
def test_limits_do_not_exceed_those_of_the_program():
    program = """
import resource
from npllm.text.template_worker import set_limit
resource.setrlimit(resource.RLIMIT_CPU, (500, 1000))
set_limit("RLIMIT_CPU", 5000)
print(resource.getrlimit(resource.RLIMIT_CPU))
set_limit("RLIMIT_CPU", 5)
print(resource.getrlimit(resource.RLIMIT_CPU))
set_limit("RLIMIT_NONE", 5)
"""
    assert run(program) == "(1000, 1000)\n(5, 1000)\n"


@pytest.mark.slow
@posix
def test_processor_time_is_limited_where_nobody_is_left_to_end_it():
    program = """
from npllm.text.template_worker import limit_processor_time
limit_processor_time(-1)  # one second is always added
while True:
    pass
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGXCPU


def test_the_command_line_stays_short():
    """Windows allows 32,767 characters."""
    assert len(Path(template_worker.__file__).read_text(encoding="utf-8")) < 20_000


def test_the_process_that_everybody_shares_works():
    assert ask(process, "{{ 1 + 1 }}") == {"text": "2"}
