"""Text to token ids and back: a thin wrapper of the `tokenizers` library, the chat template, and a detokeniser for streams."""

from pathlib import Path

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as _Tokenizer

from npllm.config import read_json
from npllm.errors import NpllmError, NpllmOSError, NpllmTypeError, NpllmValueError

__all__ = ["Detokenizer", "Tokenizer"]

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
    chat_template : str or None
        Jinja source.
    special_tokens : dict of str to str
        Text of bos_token, eos_token, pad_token and unk_token, as far as the folder names them.

    Notes
    -----
    Source: `PreTrainedTokenizerFast` in Transformers.
    """

    def __init__(self, backend, chat_template=None, special_tokens=None):
        self.backend, self.chat_template, self.special_tokens = backend, chat_template, special_tokens or {}

    @classmethod
    def from_folder(cls, path):
        """Read tokenizer.json, and tokenizer_config.json and chat_template.jinja where they are present.

        Raises
        ------
        NpllmOSError
            When tokenizer.json is missing.
        NpllmValueError
            When a file cannot be understood.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise NpllmOSError(f"{file}: no such file; without it only token ids can be used, not text")
        try:
            backend = _Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise NpllmValueError(f"{file}: is not a tokenizer that the tokenizers library can read ({error})") from None
        backend.no_truncation()
        backend.no_padding()
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        tokens = {name: _content(settings.get(name)) for name in SPECIAL_TOKENS}
        return cls(backend, _chat_template(folder, settings), {name: token for name, token in tokens.items() if token})

    def encode(self, text, *, add_special_tokens=True):
        """Turn text into token ids.

        Parameters
        ----------
        text : str
            Special strings in it (`<|end|>`) become their ids.
        add_special_tokens : bool
            Let the tokenizer add what its post-processor adds (a beginning-of-sequence token, for some).

        Returns
        -------
        ids : list of int

        Raises
        ------
        NpllmTypeError
            When `text` is no string, or holds half a surrogate pair.
        """
        if not isinstance(text, str):
            raise NpllmTypeError(f"text must be a str, got {type(text).__name__}")
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise NpllmTypeError(f"text must be valid Unicode, which can be written as UTF-8 ({error})") from None

    def decode(self, ids, *, skip_special_tokens=True):
        """Turn token ids into text.  Ids that have no token decode to nothing.

        Raises
        ------
        NpllmTypeError
            When `ids` is no sequence of non-negative integers.
        """
        try:
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        except (TypeError, ValueError, OverflowError) as error:
            raise NpllmTypeError(f"ids must be a sequence of token ids, integers from 0 ({error})") from None

    def apply_chat_template(self, messages, *, add_generation_prompt=True):
        """Write a conversation as the text the model was trained on.

        Parameters
        ----------
        messages : list of dict
            Each {"role": "system" | "user" | "assistant", "content": str}.
        add_generation_prompt : bool
            End with the opening of the assistant's next turn.

        Returns
        -------
        text : str
            To be encoded with `add_special_tokens=False`: the template writes the special tokens itself.

        Raises
        ------
        NpllmValueError
            When the folder has no chat template, a message is malformed, or the template fails or refuses.

        Notes
        -----
        The template comes with the checkpoint and is not trusted: it runs in Jinja's sandbox.

        Source: `apply_chat_template` in Transformers (trim_blocks, lstrip_blocks).
        """
        if not self.chat_template:
            raise NpllmValueError("this checkpoint has no chat template; give the prompt as plain text")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise NpllmValueError(f'a message must be {{"role": ..., "content": ...}}, got {str(message)[:100]}')
        try:
            return _environment().from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.special_tokens)
        except NpllmError:
            raise
        except Exception as error:  # whatever the template does wrong
            raise NpllmValueError(f"the chat template failed: {type(error).__name__}: {str(error)[:300]}") from None

    def encode_chat(self, messages):
        """Turn a conversation into token ids, ready for the assistant's answer."""
        return self.encode(self.apply_chat_template(messages), add_special_tokens=False)

    def token_text(self, token):
        """Text of one token by itself, for tables; special tokens under their name, and ids without a token as <id>."""
        text = self.decode([token], skip_special_tokens=False)
        return text or self.backend.id_to_token(int(token)) or f"<{int(token)}>"


class Detokenizer:
    """Text of a growing sequence of ids, piece by piece: joined, the pieces are the decoded whole.

    A piece is what the new ids add to the text; while the end is half a character, it is held back.

    Notes
    -----
    Decoding token by token would lose spaces, since a decoder strips the first one of every call.  The difference is taken
    between two decodes that begin at the last piece, so that the work does not grow with the length of the text.
    """

    def __init__(self, tokenizer):
        self._tokenizer, self._ids, self._begin, self._end = tokenizer, [], 0, 0

    def push(self, token):
        """Add an id; return the text that is now certain."""
        self._ids.append(int(token))
        return self._emit(hold=True)

    def flush(self):
        """Return what was held back."""
        return self._emit(hold=False)

    def _emit(self, hold):
        known = self._tokenizer.decode(self._ids[self._begin : self._end])
        text = self._tokenizer.decode(self._ids[self._begin :])
        if len(text) <= len(known) or (hold and text.endswith("\ufffd")):
            return ""
        self._begin, self._end = self._end, len(self._ids)
        return text[len(known) :]


def _content(token):
    """Text of a special token, written as a string or as {"content": ...}."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _chat_template(folder, settings):
    """The chat template: a file of its own, or an entry of tokenizer_config.json (a string, or a list of named ones)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise NpllmOSError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}.get("default")
    if template is not None and not isinstance(template, str):
        raise NpllmValueError(f"{folder / 'tokenizer_config.json'}: chat_template must be a string, got {type(template).__name__}")
    return template


def _environment():
    """Jinja's sandbox, set up as Transformers does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(message):
    raise jinja2.TemplateError(message)
