#!/usr/bin/env python3
"""Write tests/golden/tokenizer_family.json and tests/golden/tokenizers: what Transformers makes of
many strings and chats.

    python scripts/make_golden_tokenizers.py FOLDER

FOLDER holds the tokenizers of the family, one folder each (FAMILY in tests/nasty.py, which has the
strings as well).  Beside the ids, each tokenizer.json is written again with only those tokens and
merges that can matter for the strings, under their own ids, so that the ids can be checked
anywhere.  Needs transformers.
"""

import json
import sys
import tempfile
from pathlib import Path

import tokenizers
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from nasty import FAMILY, MESSAGES, make_folder, strings

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def trim(content, texts):
    """Leave out every token that is no part of any text, and its merges: on those texts BPE then
    takes the same steps.
    """
    model, added = (
        content["model"],
        {token["content"]: token["id"] for token in content["added_tokens"]},
    )
    if model["byte_fallback"]:
        texts = [text.replace(" ", "▁") for text in texts]
        single, first = [f"<0x{n:02X}>" for n in range(256)], "▁"
    else:
        letters = _byte_letters()
        texts = ["".join(letters[byte] for byte in text.encode()) for text in texts]
        single, first = list(letters.values()), ""
    whole = "\n".join(texts)
    kept = {
        token: i
        for token, i in model["vocab"].items()
        if token in single
        or token in whole
        or (first and token.startswith(first) and token[1:] in whole)
        or token in added
    }
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    model = model | {
        "vocab": kept | added,
        "merges": [pair for pair in pairs if "".join(pair) in kept],
    }
    return content | {"model": model}


def _byte_letters():
    """Return the letter that stands for each byte in byte-level vocabularies: printable ones for
    themselves.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }


def write_json(path, content):
    path.write_text(
        json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )


def golden(theirs, texts):
    """What Transformers makes of all texts and conversations; a decoded text only where it is not
    the text itself.
    """
    ids = [theirs(text).input_ids for text in texts]
    decoded = [theirs.decode(row) for row in ids]
    chat = {
        key: [
            theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=end)
            for end in (True, False)
        ]
        for key, messages in MESSAGES.items()
    }
    return {
        "ids": ids,
        "decoded": {
            n: got for n, (got, text) in enumerate(zip(decoded, texts, strict=True)) if got != text
        },
        "chat": chat,
        "chat ids": {
            key: [theirs(text, add_special_tokens=False).input_ids for text in two]
            for key, two in chat.items()
        },
    }


def main(family):
    texts = strings()
    content = {
        "made by": "scripts/make_golden_tokenizers.py",
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "strings": texts,
        "messages": MESSAGES,
        "tokenizer": {},
    }
    for name in FAMILY:
        target = GOLDEN / "tokenizers" / name
        with tempfile.TemporaryDirectory() as work:
            folder = make_folder(Path(work) / name, family, name)
            found = content["tokenizer"][name] = golden(
                transformers.AutoTokenizer.from_pretrained(folder), texts
            )
            target.mkdir(parents=True, exist_ok=True)
            for file in folder.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
        chats = [text for two in found["chat"].values() for text in two]
        whole = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
        write_json(target / "tokenizer.json", trim(whole, texts + chats))
        again = tokenizers.Tokenizer.from_file(str(target / "tokenizer.json"))
        if [again.encode(text).ids for text in texts] != found["ids"]:
            raise SystemExit(f"{name}: the trimmed tokenizer differs from the whole one")
    write_json(GOLDEN / "tokenizer_family.json", content)
    print(f"{len(texts)} strings, {len(MESSAGES)} conversations, {len(FAMILY)} tokenizers")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
