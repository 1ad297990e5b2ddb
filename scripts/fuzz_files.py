"""Cases for `fuzz.py --mode`: GGUF headers, answers of the hub, components of a tokenizer.json.

A case is a function of (seed, number).  `run` returns the name of the outcome; anything but an
NpllmError, and any broken promise, is raised.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzz
import numpy as np
from tokenizers import Tokenizer, models

import npllm
from npllm.checkpoints import convert_gguf, gguf_header, hub, hub_listing
from npllm.checkpoints.fetch import fetch

LIMITS = {"gguf": (10.0, 256 << 20), "hub": (10.0, 256 << 20), "tokenizer": (10.0, 256 << 20)}
INTEGERS = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    255,
    4096,
    2**16,
    10**6,
    2**31,
    2**32 - 1,
    2**40,
    2**63,
    2**64 - 1,
]


def to_json(data: Any) -> bytes:
    """Write JSON, half surrogate pairs and deep nesting included."""
    try:
        return json.dumps(data).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b'{"model": ' + b"[" * 5000


def checked(step: Any) -> str:
    """Run a step, and name the outcome; the message of an NpllmError must be printable."""
    error = fuzz.attempt(step)
    return fuzz.category(error)


# ------------------------------------------------------------------------------------------- GGUF


class GGUFCases:
    """A small Llama in GGUF with changed metadata, tensors or bytes, converted and loaded."""

    def __init__(self, seed: int, scratch: Path) -> None:
        self.seed, self.scratch = seed, scratch
        self.keys, self.tensors = valid_metadata(), valid_tensors()
        self.data = random.Random(1).randbytes(200_000)
        self.run(-1, change=False)

    def run(self, number: int, change: bool = True) -> str:
        rng = random.Random(f"{self.seed} {number}")
        path, out = self.scratch / "x.gguf", self.scratch / "out"
        path.write_bytes(self.content(rng) if change else self.content(None))
        try:
            outcome = checked(lambda: convert_gguf.gguf_to_phi3(path, out))
            if outcome == "loads and runs":
                use_folder(out)
            elif not change:
                raise SystemExit(f"the file is meant to be valid: {outcome}")
            if [p.name for p in self.scratch.iterdir() if p not in (path, out)]:
                raise RuntimeError("the conversion has left files")
            if outcome != "loads and runs" and out.exists():
                raise RuntimeError("a folder was published although the conversion failed")
            return outcome
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def content(self, rng: random.Random | None) -> bytes:
        """Make the bytes of a file."""
        keys, tensors = list(self.keys), list(self.tensors)
        kind = 0.0 if rng is None else rng.random()
        if rng is not None and kind < 0.45:
            for _ in range(rng.choice([1, 1, 2])):
                change_key(keys, rng)
        elif rng is not None and kind < 0.6:
            change_tensor(tensors, rng)
        writer = GGUFWriter(keys, tensors, self.data)
        if rng is not None and kind >= 0.6:
            for _ in range(rng.choice([1, 1, 2, 3])):
                writer.change_bytes(rng)
        return bytes(writer.out)


def valid_metadata() -> list[tuple[str, int, Any]]:
    """List (key, type, value) of a Llama of two layers."""
    tokens = ["<|a|>", "<|b|>", "<|c|>", "t", "h", "e", "Ġ", "1", "2", "th", "the", "Ġthe", "12"]
    text, u32, f32 = 8, 4, 6
    return [
        ("general.architecture", text, "llama"),
        ("general.alignment", u32, 32),
        ("general.name", text, "x"),
        ("llama.block_count", u32, 2),
        ("llama.context_length", u32, 64),
        ("llama.embedding_length", u32, 32),
        ("llama.feed_forward_length", u32, 32),
        ("llama.attention.head_count", u32, 4),
        ("llama.attention.head_count_kv", u32, 2),
        ("llama.attention.layer_norm_rms_epsilon", f32, 1e-5),
        ("llama.rope.freq_base", f32, 10000.0),
        ("llama.rope.dimension_count", u32, 8),
        ("llama.vocab_size", u32, len(tokens)),
        ("tokenizer.ggml.model", text, "gpt2"),
        ("tokenizer.ggml.pre", text, "smollm"),
        ("tokenizer.ggml.tokens", 9, (text, tokens)),
        ("tokenizer.ggml.token_type", 9, (5, [3, 3, 3] + [1] * 10)),
        ("tokenizer.ggml.merges", 9, (text, ["t h", "th e", "Ġ the", "1 2"])),
        ("tokenizer.ggml.bos_token_id", u32, 1),
        ("tokenizer.ggml.eos_token_id", u32, 2),
        ("tokenizer.ggml.eot_token_id", u32, 0),
        ("tokenizer.ggml.unknown_token_id", u32, 0),
        ("tokenizer.ggml.padding_token_id", u32, 2),
        ("tokenizer.chat_template", text, "{{ messages[0].content }}"),
    ]


def valid_tensors() -> list[tuple[str, tuple[int, ...], int, int]]:
    """List (name, shape with the fastest axis first, type, offset)."""
    shapes = {"token_embd.weight": (32, 13), "output_norm.weight": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{norm}.weight": (32,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {
            f"blk.{i}.attn_{x}.weight": (32, n) for x, n in zip("qkv", (32, 16, 16), strict=True)
        }
        others = ("attn_output", "ffn_gate", "ffn_up", "ffn_down")
        shapes |= {f"blk.{i}.{name}.weight": (32, 32) for name in others}
    tensors, offset = [], 0
    for name, shape in shapes.items():
        kind = 0 if len(shape) == 1 else 3 if "ffn" in name else 8 if "attn_q" in name else 1
        n = int(np.prod(shape))
        n_bytes = {0: 4 * n, 1: 2 * n, 3: n // 32 * 20, 8: n // 32 * 34}[kind]
        tensors.append((name, shape, kind, offset))
        offset += -(-n_bytes // 32) * 32
    return tensors


def change_key(keys: list[Any], rng: random.Random) -> None:
    """Change one metadata value, its type or its name; remove it; or write it twice."""
    at = rng.randrange(len(keys))
    key, kind, value = keys[at]
    change = rng.randrange(8)
    if change == 0:
        del keys[at]
    elif change == 1:
        keys.append(rng.choice(keys))
    elif change == 2:
        keys[at] = rng.choice([*fuzz.STRINGS, key + "x", "llama.rope.scaling.type"]), kind, value
    elif change == 3:
        keys[at] = key, rng.choice([*range(14), 99]), nasty_number(rng)
    elif isinstance(value, tuple):
        keys[at] = key, kind, change_list(*value, rng)
    elif kind == 8:
        keys[at] = key, kind, rng.choice([*fuzz.STRINGS, b"\xff", b"\xc3", "llama", "gpt2"])
    else:
        keys[at] = key, kind, nasty_number(rng)


def change_list(kind: int, items: list[Any], rng: random.Random) -> tuple[int, list[Any]]:
    """Change the type or the items of an array."""
    items, change = list(items), rng.randrange(6)
    at = rng.randrange(len(items))
    if change == 0:
        return rng.choice([*range(14), 99]), [nasty_number(rng) for _ in items]
    if change == 1:
        return 9, [(kind, items)] * rng.choice([1, 3])
    if change == 2:
        del items[at:]
    elif change == 3:
        items *= rng.choice([2, 100])
    elif change == 4:
        items[at] = rng.choice(items)
    else:
        items[at] = rng.choice([*fuzz.STRINGS, b"\xff"]) if kind == 8 else nasty_number(rng)
    return kind, items


def change_tensor(tensors: list[Any], rng: random.Random) -> None:
    """Change name, shape, type or offset of a tensor; remove it; or write it twice."""
    at, change = rng.randrange(len(tensors)), rng.randrange(6)
    name, shape, kind, offset = tensors[at]
    if change == 0:
        del tensors[at]
    elif change == 1:
        tensors.append(rng.choice(tensors))
    elif change == 2:
        name = rng.choice(
            [*fuzz.STRINGS, "output.weight", "blk.9.attn_q.weight", b"\xff", name + "."]
        )
    elif change == 3:
        shape = tuple(
            rng.choice([*shape, *INTEGERS]) for _ in range(rng.choice([0, 1, 2, 3, 5, 99]))
        )
    elif change == 4:
        kind = rng.choice([*range(42), 1000])
    else:
        offset = rng.choice([offset + 1, offset + 32, *INTEGERS])
    if change > 1:
        tensors[at] = name, shape, kind, offset


def nasty_number(rng: random.Random) -> float:
    """Draw a number."""
    return rng.choice([*INTEGERS, -1, -(2**31), 0.5, 1e-5, -1.0, 1e30, np.nan, np.inf, 1e308])


class GGUFWriter:
    """Writes a GGUF file, and remembers where its numbers are."""

    def __init__(self, keys: list[Any], tensors: list[Any], data: bytes) -> None:
        self.out, self.numbers = bytearray(b"GGUF"), []
        self.number("I", 3)
        self.number("Q", len(tensors))
        self.number("Q", len(keys))
        for key, kind, value in keys:
            self.text(key)
            self.number("I", kind)
            self.value(kind, value)
        for name, shape, kind, offset in tensors:
            self.text(name)
            self.number("I", len(shape))
            for n in shape:
                self.number("Q", n)
            self.number("I", kind)
            self.number("Q", offset)
        self.n_header = len(self.out)
        self.out += bytes(-len(self.out) % 32) + data

    def number(self, code: str, x: float) -> None:
        self.numbers.append((len(self.out), code))
        self.out += pack(code, x)

    def text(self, content: Any) -> None:
        raw = (
            content if isinstance(content, bytes) else str(content).encode("utf-8", "surrogatepass")
        )
        self.number("Q", len(raw))
        self.out += raw

    def value(self, kind: int, value: Any) -> None:
        if kind == 9:
            inner, items = value if isinstance(value, tuple) else (4, [])
            self.number("I", inner)
            self.number("Q", len(items))
            for item in items:
                self.value(inner, item)
        elif kind == 8:
            self.text(value)
        else:
            code = gguf_header.SCALARS.get(kind, "I")
            x = value if isinstance(value, int | float) else 0
            self.out += pack(code, x)

    def change_bytes(self, rng: random.Random) -> None:
        """Overwrite a number of the header, or change or cut bytes."""
        if rng.random() < 0.7:
            at, code = rng.choice(self.numbers)
            raw = pack(code, rng.choice(INTEGERS))
            self.out[at : at + len(raw)] = raw
        else:
            header = fuzz.mutate_bytes(bytes(self.out[: self.n_header]), rng)
            self.out = bytearray(header) + self.out[self.n_header :]


def pack(code: str, x: float) -> bytes:
    """Pack a number in any format, wrapped around where it does not fit."""
    if code in "fd":
        with contextlib.suppress(OverflowError):
            return struct.pack("<" + code, x)
        return struct.pack("<" + code, np.inf)
    whole = int(x) if np.isfinite(x) else 0
    n_bits = 8 * struct.calcsize("<" + code)
    return (whole % 2**n_bits).to_bytes(n_bits // 8, "little")


def use_folder(folder: Path) -> None:
    """Use a converted folder; nothing may come out."""
    model = npllm.load(folder, ops="reference")
    model(np.array([[model.config.vocab_size - 1]]))
    with contextlib.suppress(npllm.NpllmError):  # a template may be wrong
        model.tokenizer.encode_chat([{"role": "user", "content": "the 12"}])
    model.tokenizer.decode(model.tokenizer.encode("the 12<|c|>"))


# -------------------------------------------------------------------------------------------- hub

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
            if sum(p.stat().st_size for p in weights.rglob("*") if p.is_file()) > 2**20:
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


# -------------------------------------------------------------------------------------- tokenizer

TEXTS = [
    "this <|end|> hi\n🙂 the 12 ",
    "a" * 300,
    "The quick brown fox, 1234 and ＡＢＣ ﷺ ½ é e\u0301 日本語\u200b! " * 4,
    "  \t\n \r\n   x" * 10,
    "",
]
REGEXES = [
    "a", "", "a*", ".", r"\s+", "(a+)+$", r"(\w+\s?)+$", "(?:", "[", r"\p{L}+| ?\d{1,3}", "(?=a)", "^", "$", "a{5}{9}",
    r"\w*\w*\w*!", "(a|a)*b", r"\b", "(?i)A", "x" * 5000, r"[^\r\n\p{L}\p{N}]?\p{Lu}*\p{Ll}+|\s+(?!\S)|\s+", r"\X", "(?<=a)b",
]  # fmt: skip
SHORT = ["", "a", " ", "▁", "aa", "x" * 50, "x" * 3000, "x" * 20_000, "é", "\0", "##", "</s>"]
BEHAVIOURS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous", "x"]
COUNTS = [0, 1, 2, 100, 4096, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, -1, 0.5]


class TokenizerCases:
    """A tokenizer.json of drawn components, and texts and ids that go through it."""

    def __init__(self, seed: int, scratch: Path) -> None:
        self.seed, self.folder = seed, scratch
        self.bases = [json.loads(fuzz.tokenizer_json(n)) for n in range(2)]
        letters = [*"abcdefghijklmnopqrstuvwxyz ", "th", "##s", "<unk>", "▁"]
        words = models.WordPiece({x: i for i, x in enumerate(letters)}, unk_token="<unk>")
        self.bases.append(json.loads(Tokenizer(words).to_str()))
        pieces = models.Unigram([(x, -1.0 - i) for i, x in enumerate(letters)], unk_id=0)
        self.bases.append(json.loads(Tokenizer(pieces).to_str()))

    def run(self, number: int) -> str:
        rng = random.Random(f"{self.seed} {number}")
        data = json.loads(json.dumps(rng.choice(self.bases)))
        for _ in range(rng.choice([1, 1, 2, 3])):
            with contextlib.suppress(RecursionError):  # of the change itself
                change_part(data, rng)
        (self.folder / "tokenizer.json").write_bytes(to_json(data))
        made: list[npllm.Tokenizer] = []
        outcome = checked(lambda: made.append(npllm.Tokenizer.from_folder(self.folder)))
        return outcome if not made else self.use(made[0], rng)

    def use(self, tokenizer: npllm.Tokenizer, rng: random.Random) -> str:
        """Encode and decode."""
        text, outcomes = rng.choice(TEXTS), []
        ids: list[int] = []
        outcomes.append(checked(lambda: ids.extend(tokenizer.encode(text))))
        outcomes.append(checked(lambda: tokenizer.decode(ids[:2000])))
        outcomes.append(checked(lambda: tokenizer.decode(list(range(0, 330, 9)))))
        return max(outcomes, key=lambda outcome: outcome != "loads and runs")


def change_part(data: dict[str, Any], rng: random.Random) -> None:
    """Change one part of a tokenizer.json."""
    part = rng.choice([*MAKERS, "model", "added_tokens", "any"])
    if part in MAKERS:
        data[part] = component(part, rng, 0)
    elif part == "added_tokens":
        data[part] = [added_token(i, rng) for i in range(rng.choice([0, 1, 3, 50, 300]))]
    elif part == "model" and isinstance(data.get("model"), dict):
        key = rng.choice([*data["model"], "max_input_chars_per_word", "unk_id", "dropout"])
        data["model"][key] = rng.choice([*SHORT, *COUNTS, fuzz.nasty(rng)])
    else:
        fuzz.mutate_json(data, rng)


def added_token(i: int, rng: random.Random) -> Any:
    """Draw an added token."""
    flags = {
        k: rng.random() < 0.3 for k in ("single_word", "lstrip", "rstrip", "normalized", "special")
    }
    return {
        "id": rng.choice([500 + i, i, *COUNTS]),
        "content": rng.choice([*SHORT, f"<{i}>"]),
        **flags,
    }


def pattern(rng: random.Random) -> Any:
    """Draw a pattern."""
    return {rng.choice(["String", "Regex"]): rng.choice([*REGEXES, *SHORT])}


def table(rng: random.Random) -> Any:
    """Draw a normalization table: a trie, and replacements."""
    n = rng.choice([0, 4, 8, 64, 1024])
    trie = bytes(n) if rng.random() < 0.5 else rng.randbytes(n)
    size = rng.choice([n, n, n, n + 4, 2**32 - 4, 2**31, 3])
    rest = rng.choice([b"", b"a\0b\0", b"x" * 5000, bytes(99), b"\xff\xfe\0", rng.randbytes(300)])
    raw = size.to_bytes(4, "little") + trie + rest
    return rng.choice(
        [base64.b64encode(raw[: rng.choice([2, 9999])]).decode(), fuzz.nasty(rng), None]
    )


def piece(rng: random.Random) -> Any:
    """Draw a piece of a template."""
    kind = rng.choice(["Sequence", "Sequence", "SpecialToken"])
    return {
        kind: {"id": rng.choice(["A", "A", "B", "<s>", "x"]), "type_id": rng.choice([0, 1, 2**32])}
    }


def template(rng: random.Random) -> Any:
    """Draw a template of special tokens around a text."""
    ids = [1] * rng.choice([0, 1, 5, 3000])
    token = {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}
    single = [piece(rng) for _ in range(rng.choice([0, 1, 3, 100, 3000]))]
    return {"single": single, "pair": [piece(rng), piece(rng)], "special_tokens": {"<s>": token}}


def simple(*names: str) -> Any:
    """Components without fields."""
    return lambda rng: {"type": rng.choice(names)}


def with_fields(name: str, **fields: Any) -> Any:
    """Make a component whose fields are drawn from lists, or by functions."""

    def make(rng: random.Random) -> Any:
        drawn = {k: v(rng) if callable(v) else rng.choice(v) for k, v in fields.items()}
        return {"type": name, **drawn}

    return make


FLAG = [True, False]
REPLACE = with_fields("Replace", pattern=pattern, content=SHORT)
METASPACE = with_fields(
    "Metaspace", replacement=SHORT, prepend_scheme=["always", "never", "first", "x"], split=FLAG
)
BYTE_LEVEL = with_fields("ByteLevel", add_prefix_space=FLAG, trim_offsets=FLAG, use_regex=FLAG)
MAKERS = {
    "normalizer": [
        REPLACE, REPLACE, simple("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel", "x"),
        with_fields("Prepend", prepend=SHORT), with_fields("Strip", strip_left=FLAG, strip_right=FLAG),
        with_fields("Precompiled", precompiled_charsmap=table),
        with_fields("BertNormalizer", clean_text=FLAG, handle_chinese_chars=FLAG, strip_accents=FLAG, lowercase=FLAG),
    ],
    "pre_tokenizer": [
        with_fields("Split", pattern=pattern, behavior=BEHAVIOURS, invert=FLAG), BYTE_LEVEL, METASPACE,
        simple("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts", "x"),
        with_fields("Punctuation", behavior=BEHAVIOURS), with_fields("Digits", individual_digits=FLAG),
        with_fields("CharDelimiterSplit", delimiter=SHORT), with_fields("FixedLength", length=COUNTS),
    ],
    "post_processor": [
        lambda rng: {"type": "TemplateProcessing", **template(rng)}, BYTE_LEVEL,
        with_fields("BertProcessing", sep=[["a", 1], ["a", 2**32], [], 5], cls=[["a", 1], "x"]),
        with_fields("RobertaProcessing", sep=[["a", 1]], cls=[["a", 1]], trim_offsets=FLAG, add_prefix_space=FLAG),
    ],
    "decoder": [
        REPLACE, REPLACE, BYTE_LEVEL, METASPACE, simple("ByteFallback", "Fuse", "x"),
        with_fields("Strip", content=SHORT, start=COUNTS, stop=COUNTS), with_fields("WordPiece", prefix=SHORT, cleanup=FLAG),
        with_fields("BPEDecoder", suffix=SHORT), with_fields("CTC", pad_token=SHORT, word_delimiter_token=SHORT, cleanup=FLAG),
    ],
}  # fmt: skip
LISTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def component(part: str, rng: random.Random, depth: int) -> Any:
    """Draw a component, or a sequence of them."""
    if depth < 70 and rng.random() < (0.35 if depth < 3 else 0.1):
        n = rng.choice([0, 1, 2, 3, 20])
        inner = [component(part, rng, depth + 1) for _ in range(n)]
        return {"type": "Sequence", LISTS[part]: inner}
    if rng.random() < 0.02:
        return fuzz.nasty(rng)
    return rng.choice(MAKERS[part])(rng)


MODES = {"gguf": GGUFCases, "hub": HubCases, "tokenizer": TokenizerCases}
