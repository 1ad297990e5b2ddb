"""A stream of ids as text, with its forks; on strings, whatever the tokenizer."""

from npllm.testing.forms.common import Choice

__all__ = ["detokenize"]

BROKEN = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


def detokenize(inputs: dict, choice: Choice) -> list[str]:
    """Return the pieces of text that a stream shows, one for each token and one at the end.

        ours: decode(ids[:n]) minus what was shown before; held back while it ends in U+FFFD

    Parameters
    ----------
    inputs : dict
        "prefixes": decode(ids[:n]) for n = 1 ... n_token;  "tokens": decode([id]) for each id.
    choice : mapping
        "C20": "token by token" or "incomplete shown".

    Returns
    -------
    pieces : list of str
    """
    if choice.get("C20") == "token by token":
        return [*map(str, inputs["tokens"]), ""]
    pieces, shown = [], ""
    for prefix in map(str, inputs["prefixes"]):
        is_held = prefix.endswith(BROKEN) and choice.get("C20") != "incomplete shown"
        pieces.append("" if is_held else _rest(prefix, shown))
        shown = shown if is_held else prefix
    last = str(inputs["prefixes"][-1]) if len(inputs["prefixes"]) else ""
    return [*pieces, _rest(last, shown)]


def _rest(prefix: str, shown: str) -> str:
    return prefix[len(shown) :]
