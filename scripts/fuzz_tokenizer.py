"""Cases for `fuzz.py --mode tokenizer`: components of a tokenizer.json."""

import base64
import contextlib
import json
import random
from pathlib import Path
from typing import Any

import fuzz
from fuzz_cases import checked, to_json
from tokenizers import Tokenizer, models

import npllm

TEXTS = [
    "this <|end|> hi\n🙂 the 12 ",
    "a" * 300,
    "The quick brown fox, 1234 and ＡＢＣ ﷺ ½ é e\u0301 日本語\u200b! " * 4,
    "  \t\n \r\n   x" * 10,
    "",
]
REGEXES = [
    "a",
    "",
    "a*",
    ".",
    r"\s+",
    "(a+)+$",
    r"(\w+\s?)+$",
    "(?:",
    "[",
    r"\p{L}+| ?\d{1,3}",
    "(?=a)",
    "^",
    "$",
    "a{5}{9}",
    r"\w*\w*\w*!",
    "(a|a)*b",
    r"\b",
    "(?i)A",
    "x" * 5000,
    r"[^\r\n\p{L}\p{N}]?\p{Lu}*\p{Ll}+|\s+(?!\S)|\s+",
    r"\X",
    "(?<=a)b",
]
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
        REPLACE,
        REPLACE,
        simple("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel", "x"),
        with_fields("Prepend", prepend=SHORT),
        with_fields("Strip", strip_left=FLAG, strip_right=FLAG),
        with_fields("Precompiled", precompiled_charsmap=table),
        with_fields(
            "BertNormalizer",
            clean_text=FLAG,
            handle_chinese_chars=FLAG,
            strip_accents=FLAG,
            lowercase=FLAG,
        ),
    ],
    "pre_tokenizer": [
        with_fields("Split", pattern=pattern, behavior=BEHAVIOURS, invert=FLAG),
        BYTE_LEVEL,
        METASPACE,
        simple("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts", "x"),
        with_fields("Punctuation", behavior=BEHAVIOURS),
        with_fields("Digits", individual_digits=FLAG),
        with_fields("CharDelimiterSplit", delimiter=SHORT),
        with_fields("FixedLength", length=COUNTS),
    ],
    "post_processor": [
        lambda rng: {"type": "TemplateProcessing", **template(rng)},
        BYTE_LEVEL,
        with_fields("BertProcessing", sep=[["a", 1], ["a", 2**32], [], 5], cls=[["a", 1], "x"]),
        with_fields(
            "RobertaProcessing",
            sep=[["a", 1]],
            cls=[["a", 1]],
            trim_offsets=FLAG,
            add_prefix_space=FLAG,
        ),
    ],
    "decoder": [
        REPLACE,
        REPLACE,
        BYTE_LEVEL,
        METASPACE,
        simple("ByteFallback", "Fuse", "x"),
        with_fields("Strip", content=SHORT, start=COUNTS, stop=COUNTS),
        with_fields("WordPiece", prefix=SHORT, cleanup=FLAG),
        with_fields("BPEDecoder", suffix=SHORT),
        with_fields("CTC", pad_token=SHORT, word_delimiter_token=SHORT, cleanup=FLAG),
    ],
}
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
