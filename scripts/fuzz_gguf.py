"""Cases for `fuzz.py --mode gguf`: headers of GGUF files, loaded as they are, and converted."""

import contextlib
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
from fuzz_cases import INTEGERS, checked

import npllm
from npllm.checkpoints.gguf import convert as convert_gguf
from npllm.checkpoints.gguf import header as gguf_header

Type = tuple[int, int, int]  # GGUF's number of a type, entries and bytes of a block
F32, F16, Q4_1, Q5_0, Q8_0 = (0, 1, 4), (1, 1, 2), (3, 32, 20), (6, 32, 22), (8, 32, 34)
Q4_K, Q5_K, Q6_K = (12, 256, 144), (13, 256, 176), (14, 256, 210)


class GGUFCases:
    """A small Llama, or a Phi-3 in blocks of 256, in GGUF with changed metadata, tensors or bytes:
    loaded, the Llama converted as well.
    """

    def __init__(self, seed: int, scratch: Path) -> None:
        self.seed, self.scratch = seed, scratch
        self.data = data_of(phi3_tensors())
        self.files = {
            "llama": (valid_metadata(), valid_tensors()),
            "phi3": (phi3_metadata(), phi3_tensors()),
        }
        for number, name in enumerate(self.files):
            self.run(number - len(self.files), name)

    def run(self, number: int, valid: str = "") -> str:
        """Run a case; `valid` names a file that is left as it is."""
        rng, change = random.Random(f"{self.seed} {number}"), not valid
        name = valid or rng.choice([*self.files])
        self.keys, self.tensors = self.files[name]
        path, out = self.scratch / "x.gguf", self.scratch / "out"
        path.write_bytes(self.content(rng) if change else self.content(None))
        outcome = run_packed(path)
        if outcome != "loads and runs" and not change:
            raise SystemExit(f"the file is meant to run as it is: {outcome}")
        if name == "phi3":
            return outcome
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
    found = {}
    for name, shape in shapes.items():
        kind = Q4_1 if "ffn" in name else Q8_0 if "attn_q" in name else F16
        found[name] = (shape, F32 if len(shape) == 1 else kind)
    return placed(found)


def placed(found: dict[str, tuple[tuple[int, ...], Type]]) -> list[tuple[str, tuple, int, int]]:
    """List (name, shape, type, offset) of tensors that lie one behind the other."""
    tensors, offset = [], 0
    for name, (shape, (kind, n_entries, n_bytes)) in found.items():
        tensors.append((name, shape, kind, offset))
        offset += -(-int(np.prod(shape)) // n_entries * n_bytes // 32) * 32
    return tensors


def phi3_metadata() -> list[tuple[str, int, Any]]:
    """List (key, type, value) of a Phi-3 of one layer with longrope and SentencePiece's tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    pieces = ["\u2581", *"the12", "th", "the", "\u2581the", "12"]
    text, u32, f32 = 8, 4, 6
    return [
        ("general.architecture", text, "phi3"),
        ("general.alignment", u32, 32),
        ("phi3.block_count", u32, 1),
        ("phi3.context_length", u32, 64),
        ("phi3.embedding_length", u32, 256),
        ("phi3.feed_forward_length", u32, 256),
        ("phi3.attention.head_count", u32, 4),
        ("phi3.attention.head_count_kv", u32, 2),
        ("phi3.attention.layer_norm_rms_epsilon", f32, 1e-5),
        ("phi3.attention.sliding_window", u32, 32),
        ("phi3.rope.freq_base", f32, 10000.0),
        ("phi3.rope.dimension_count", u32, 64),
        ("phi3.rope.scaling.original_context_length", u32, 16),
        ("phi3.rope.scaling.attn_factor", f32, 1.25),
        ("tokenizer.ggml.model", text, "llama"),
        ("tokenizer.ggml.tokens", 9, (text, tokens + pieces)),
        ("tokenizer.ggml.scores", 9, (f32, [-float(n) for n in range(len(tokens + pieces))])),
        ("tokenizer.ggml.token_type", 9, (5, [2, 3, 3] + [6] * 256 + [1] * len(pieces))),
        ("tokenizer.ggml.bos_token_id", u32, 1),
        ("tokenizer.ggml.eos_token_id", u32, 2),
        ("tokenizer.ggml.unknown_token_id", u32, 0),
        ("tokenizer.chat_template", text, "{{ messages[0].content }}"),
    ]


def phi3_tensors() -> list[tuple[str, tuple[int, ...], int, int]]:
    """List (name, shape with the fastest axis first, type, offset)."""
    values = {key: value for key, _, value in phi3_metadata()}
    n_vocab = len(values["tokenizer.ggml.tokens"][1])
    found = {
        "token_embd.weight": ((256, n_vocab), Q6_K),
        "output.weight": ((256, n_vocab), Q5_0),
        "output_norm.weight": ((256,), F32),
        "rope_factors_long.weight": ((32,), F32),
        "rope_factors_short.weight": ((32,), F32),
        "blk.0.attn_norm.weight": ((256,), F32),
        "blk.0.ffn_norm.weight": ((256,), F32),
        "blk.0.attn_qkv.weight": ((256, 512), Q5_K),
        "blk.0.attn_output.weight": ((256, 256), Q4_K),
        "blk.0.ffn_up.weight": ((256, 512), Q4_K),
        "blk.0.ffn_down.weight": ((256, 256), Q6_K),
    }
    return placed(found)


def data_of(tensors: list[tuple[str, tuple[int, ...], int, int]]) -> bytes:
    """Random bytes for any tensors, positive numbers for factors of RoPE."""
    data = bytearray(random.Random(1).randbytes(500_000))
    for name, (n, *_), _, offset in tensors:
        if "rope" in name:
            data[offset : offset + 4 * n] = np.linspace(1, 2, n, dtype=np.float32).tobytes()
    return bytes(data)


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
    if not items:  # an earlier change may have left none
        return kind, [nasty_number(rng)]
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
    use_model(npllm.load(folder, ops="reference"))


def run_packed(path: Path) -> str:
    """Run a file as it is; return the outcome of loading it."""
    loaded: list[npllm.Model] = []
    outcome = checked(lambda: loaded.append(npllm.load(path, ops="reference")))
    for model in loaded:
        use_model(model)
    return outcome


def use_model(model: npllm.Model) -> None:
    """Run a model and its tokenizer; nothing may come out but refusals of text."""
    model(np.array([[model.config.vocab_size - 1]]))
    with contextlib.suppress(npllm.NpllmError):  # a template may be wrong
        model.tokenizer.encode_chat([{"role": "user", "content": "the 12"}])
    model.tokenizer.decode(model.tokenizer.encode("the 12<|c|>"))
