"""More than a thousand texts that tell tokenizers apart, and what a tokenizer makes of one."""

import random
import unicodedata
from functools import cache
from pathlib import Path

from nasty import SPACES, SPECIAL, strings

from npllm.text.stream import Detokenizer

SPEECHES = Path(__file__).parent / "data" / "american-speeches.txt"
WORDS = ["x", "The", "naïve", "don't", "HTTPServer", "1984", "3.14", "Ω", "日本", "a_b", "--", "é"]
TAILS = ["'s", "'S", "'t", "'re", "'VE", "'m", "'ll", "'D", "’s", "'", "''", "'x"]
CODE = [
    *"()[]{}:;,.=+-*/<>!&|#@\"'\\",
    "def",
    "return",
    "self",
    "if",
    "for",
    "0x1F",
    "!=",
    "->",
    "//",
]
CODE += ["i", "foo_bar", "camelCase", "CONST", "1e-5", "None", "/*", "*/", "</div>", "#include"]
GAPS = ["", " ", "\n", "\n    ", "\t", "\r\n", "  "]
EMOJI = ["🙂", "👍", "👩", "💻", "❤", "🏳", "🌈", "🇫", "🇷", "☃", "⌚", "🧑", "🚀", "1"]
JOINERS = ["", "", "\u200d", "\ufe0f", "🏽", "🏿", "\u20e3", " "]
RIGHT_TO_LEFT = [
    "שלום",
    "עוֹלָם",
    "مرحبا",
    "بِسْمِ",
    "۱۲۳",
    "٤٥",
    "\u200f",
    "\u202b",
    "\u202c",
    "abc",
    "،",
    "؟",
]
CONTROLS = [chr(n) for n in (*range(32), *range(0x7F, 0xA1), 0xAD, 0x200B, 0x2028, 0xFEFF)]
CHATS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|end|>", "user\n", "assistant\n", " ", "\n\n"]
MORE_SPECIAL = ["<repo_name>", "<file_sep>", "<empty_output>", "<filename>", "<jupyter_code>"]


def joined(rng, pieces, gaps=("",), most=8):
    """Draw some pieces, with gaps between them."""
    drawn = rng.choices(pieces, k=rng.randint(1, most))
    return "".join(piece + rng.choice(gaps) for piece in drawn)


@cache
def by_category():
    """All characters but surrogates, by general category of Unicode."""
    found = {}
    for n in (*range(0xD800), *range(0xE000, 0x30000), *range(0xE0000, 0xE0200)):
        found.setdefault(unicodedata.category(chr(n)), []).append(chr(n))
    return found


def of_category(rng, name):
    """Draw a text of a category, alone and among letters and digits."""
    drawn = "".join(rng.choices(by_category()[name], k=rng.randint(1, 6)))
    return rng.choice([drawn, f"x{drawn}1 {drawn}", f" {drawn}\n{drawn}"])


def digits(rng):
    """Draw numbers in digits of several scripts."""
    script = rng.choice([list("0123456789")] * 3 + [by_category()["Nd"], by_category()["No"]])
    return joined(rng, script, ["", "", "", ".", ",", " ", "-"], 14)


def speech(rng, lines):
    """Draw a stretch of English text, cut anywhere."""
    line = rng.choice(lines)
    start = rng.randrange(len(line))
    return line[start : start + rng.randint(1, 80)]


def garbled(rng, texts):
    """Draw a text whose UTF-8 bytes were taken for Latin-1."""
    return rng.choice(texts)[:40].encode().decode("latin-1")


@cache
def sweep():
    """Return the strings of nasty.py and drawn ones: all different, the same in every run."""
    rng, base = random.Random(21), strings()
    lines = SPEECHES.read_text(encoding="utf-8").split("\n\n")
    kinds = [
        lambda: joined(rng, WORDS, SPACES),
        lambda: joined(rng, SPACES, most=6) + rng.choice(WORDS),
        lambda: joined(rng, WORDS, TAILS, 4),
        lambda: digits(rng),
        lambda: joined(rng, CODE, GAPS, 16),
        lambda: joined(rng, EMOJI, JOINERS),
        lambda: joined(rng, RIGHT_TO_LEFT, ["", " ", "!", "1"]),
        lambda: joined(rng, [*CONTROLS, "a", " "]),
        lambda: joined(rng, [*SPECIAL, *MORE_SPECIAL], [*SPACES, *WORDS], 4),
        lambda: joined(rng, CHATS, WORDS),
        lambda: speech(rng, lines),
        lambda: garbled(rng, base),
        lambda: joined(rng, base, GAPS, 4)[:200],
        *(lambda name=name: of_category(rng, name) for name in sorted(by_category()) * 2),
    ]
    drawn = [kind() for kind in kinds[:13] for _ in range(50)] + [kind() for kind in kinds[13:]]
    return list(dict.fromkeys([*base, *drawn]))


def views(tokenizer, text):
    """All that a tokenizer makes of a text: its ids, and their text at once and piece by piece."""
    ids = tokenizer.encode(text)
    stream = Detokenizer(tokenizer)
    return {
        "ids": ids,
        "ids without special tokens": tokenizer.encode(text, add_special_tokens=False),
        "text": tokenizer.decode(ids),
        "text with special tokens": tokenizer.decode(ids, skip_special_tokens=False),
        "pieces": [*map(stream.push, ids), stream.flush()],
    }


def differing(ours, theirs, texts):
    """List (text, what differs, ours, theirs) for the texts on which two tokenizers disagree."""
    pairs = ((text, views(ours, text), views(theirs, text)) for text in texts)
    return [
        (text, name, mine[name], other[name])
        for text, mine, other in pairs
        for name in mine
        if mine[name] != other[name]
    ]
