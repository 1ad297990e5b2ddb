"""Cases for `fuzz.py --mode hub`: answers of the hub, over HTTP on loopback."""

import contextlib
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzz
from fuzz_cases import INTEGERS, checked, to_json

from npllm.checkpoints import hub, hub_listing
from npllm.checkpoints.fetch import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "phi3"}',
    "model.safetensors": bytes(range(256)) * 8,
    "tokenizer.json": b"{}",
    "README.md": b"# x",
}
STATUSES = [
    200,
    201,
    204,
    206,
    301,
    302,
    304,
    307,
    400,
    401,
    403,
    404,
    408,
    410,
    416,
    429,
    500,
    503,
]
PLACES = [
    "",
    "/",
    "/cdn/config.json",
    "//x.invalid/",
    "file:///etc/passwd",
    "http://[",
    "\\",
    "/a" * 500,
]
LEADING_AWAY = ["/../../x", "../victim", "..", "a" * 300, COMMIT + "/..", "%2e%2e", "x\0y", ""]


class HubCases:
    """A hub on loopback that lies, and a fetch from it."""

    def __init__(self, seed: int, scratch: Path) -> None:
        self.seed, self.scratch = seed, scratch
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        os.environ |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(scratch / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NPLLM_WEIGHTS": str(scratch / "weights"),
        }
        os.environ.pop("HF_TOKEN", None)
        hub.time = SimpleNamespace(sleep=lambda _: None)
        hub.TRIES, hub.TIMEOUT, hub_listing.TIMEOUT = 2, 1.0, 1.0
        (scratch / "victim").mkdir()
        (scratch / "victim" / "config.json").write_bytes(b"mine")
        self.server.lies = {}
        if self.outcome() != "loads and runs":
            raise SystemExit(f"the hub is meant to be valid: {self.outcome()}")

    def run(self, number: int) -> str:
        self.server.lies = draw_lies(random.Random(f"{self.seed} {number}"))
        return self.outcome()

    def outcome(self) -> str:
        """Fetch, and check that nothing else was written."""
        weights = self.scratch / "weights"
        try:
            outcome = checked(lambda: fetch("owner/name", progress=False))
            found = [p for p in weights.iterdir() if not p.name.startswith(".")]
            names = [p.name for p in found]
            if any(not re.fullmatch(r"owner--name(\.partial-[0-9a-f]{12})?", n) for n in names):
                raise RuntimeError(f"unexpected folders: {names}")
            if (outcome == "loads and runs") != ("owner--name" in names):
                raise RuntimeError(f"{outcome}, but the folders are {names}")
            written = sum(p.stat().st_size for p in weights.rglob("*") if p.is_file())
            if written > 2**20 + announced(self.server.lies.get("listing", b"")):
                raise RuntimeError("more was written than announced")
            victim = (self.scratch / "victim" / "config.json").read_bytes()
            others = {p.name for p in self.scratch.iterdir()} - {"weights", "victim", "home"}
            if victim != b"mine" or others:
                raise RuntimeError(f"written outside the weights folder: {others}")
            return outcome
        finally:
            shutil.rmtree(weights, ignore_errors=True)


def listing() -> dict[str, Any]:
    """Describe the repository as the hub does."""
    siblings = []
    for name, content in FILES.items():
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"rfilename": name, "size": len(content), "blobId": blob}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        siblings.append(entry)
    return {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "private": False}


def announced(raw: bytes) -> int:
    """Add up the sizes that a listing announces; 0 where it does not parse."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sizes = [entry.get("size") for entry in json.loads(raw)["siblings"]]
        return sum(size for size in sizes if isinstance(size, int) and size > 0)
    return 0


def draw_lies(rng: random.Random) -> dict[str, Any]:
    """Draw how the hub misbehaves: place ("" for the listing, or a file) -> what differs."""
    lies: dict[str, Any] = {}
    if rng.random() < 0.65:
        lies["listing"] = draw_listing(rng)
    for _ in range(rng.choice([0, 1, 1, 2]) if lies else rng.choice([1, 2])):
        lies[rng.choice(["", *list(FILES)[:3]])] = draw_response(rng)
    return lies


def draw_listing(rng: random.Random) -> bytes:
    """Change what the hub says of the repository."""
    data = listing()
    kind = rng.random()
    if kind < 0.2:
        data["sha"] = rng.choice([*LEADING_AWAY, fuzz.nasty(rng)])
    elif kind < 0.6:
        entry = rng.choice(data["siblings"])
        key = rng.choice(["rfilename", "size", "blobId", "lfs", "novelty"])
        entry[key] = rng.choice([*LEADING_AWAY, *INTEGERS, fuzz.nasty(rng), fuzz.nasty(rng)])
    elif kind < 0.85:
        data = fuzz.mutate_json(data, rng)
    raw = to_json(data)
    return fuzz.mutate_bytes(raw, rng) if kind > 0.85 else raw


def draw_response(rng: random.Random) -> dict[str, Any]:
    """Draw what differs in one answer."""
    lie: dict[str, Any] = {}
    kind = rng.randrange(6)
    if kind == 0:
        lie["status"] = rng.choice(STATUSES)
    elif kind == 1:
        lie["status"], lie["headers"] = (
            rng.choice([301, 302, 307]),
            {"Location": rng.choice(PLACES)},
        )
    elif kind == 2:
        name = rng.choice(
            ["X-Error-Code", "Content-Encoding", "Content-Range", "ETag", "Retry-After"]
        )
        lie["headers"] = {
            name: rng.choice(["GatedRepo", "gzip", "bytes 0-9/5", "RepoNotFound", "9"])
        }
        lie["status"] = rng.choice([200, 206, 401, 404])
    elif kind == 3:
        lie["length"] = rng.choice([0, 1, 100, 10**6, -1, "x", 2**63, None])
    else:
        lie["body"] = rng.choice(
            [b"", b"x", b"<html>", bytes(3000), bytes(2**21), rng.randbytes(2048)]
        )
        lie["length"] = rng.choice([None, len(lie["body"])])
    return lie


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers as the lies of the server say, else as the hub would."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        lies = self.server.lies
        name = "" if "/api/" in self.path else self.path.rsplit("/", 1)[-1]
        content = lies.get("listing", b"") or json.dumps(listing()).encode()
        content = FILES.get(name, b"") if name else content
        with contextlib.suppress(OSError):
            self.answer(content, lies.get(name, {}))

    def answer(self, content: bytes, lie: dict[str, Any]) -> None:
        body, given = (
            lie.get("body", content),
            re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""),
        )
        status = 206 if given else 200
        body = body[int(given[1]) :] if given else body
        length = lie.get("length", len(body))
        self.send_response_only(lie.get("status", status))
        for key, value in lie.get("headers", {}).items():
            self.send_header(key, value)
        if length is not None:  # else: until the connection closes
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True
