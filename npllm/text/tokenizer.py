"""Text to token ids and back: a thin wrapper of the `tokenizers` library, the chat template, and a
detokeniser for streams.
"""

import contextlib
import importlib
import re
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from npllm.config.regular_file import is_present, read_text
from npllm.config.strict_json import LARGEST_JSON, printable, quote, read_json
from npllm.errors import MissingExtraError, NpllmOSError, NpllmTypeError, NpllmValueError
from npllm.progress import warn
from npllm.text.special_tokens import add_tokens, read_special_tokens
from npllm.text.tokenizer_checks import read_tokenizer_json

__all__ = ["Detokenizer", "Tokenizer"]

BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
    chat_template : str or None
        Jinja source.
    special_tokens : dict of str to str
        Text of bos_token, eos_token, unk_token, sep_token, pad_token, cls_token and mask_token, as
        far as the folder names them, and of those that it alone has (`image_token`).  The chat
        template sees them under these names.
    add_bos_token : bool, optional
        Whether `encode` begins with bos_token.  None: as the post-processor in tokenizer.json does.

    Raises
    ------
    NpllmValueError
        When bos_token is asked for and not known.

    Notes
    -----
    The entry `add_bos_token` of tokenizer_config.json is not heeded, as in Transformers 5.23: the
    post-processor decides (Phi-3 of April 2024 says true there and has none).  However bos_token
    comes to be added, it is not added to a text that begins with it; Transformers would write it
    twice.

    Source: `TokenizersBackend` in Transformers.
    """

    def __init__(self, backend, chat_template=None, special_tokens=None, add_bos_token=None):
        self.backend, self.chat_template, self.special_tokens = (
            backend,
            chat_template,
            special_tokens or {},
        )
        self.add_bos_token, self._bos = (
            add_bos_token,
            backend.token_to_id(self.special_tokens.get("bos_token", "")),
        )
        if add_bos_token and self._bos is None:
            raise NpllmValueError(
                "add_bos_token=True needs a bos_token in tokenizer_config.json, and there is none"
            )

    @classmethod
    def from_folder(cls, path, *, add_bos_token=None):
        """Read tokenizer.json, and where they are present tokenizer_config.json,
        chat_template.jinja and older files.

        Parameters
        ----------
        path : str or Path
        add_bos_token : bool, optional
            See `Tokenizer`.

        Raises
        ------
        NpllmOSError
            When tokenizer.json is missing.
        NpllmValueError
            When a file cannot be understood.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not is_present(file):
            raise NpllmOSError(
                f"{file}: no such file; without it only token ids can be used, not text"
            )
        text = read_tokenizer_json(file)
        with _library_errors(
            NpllmValueError, f"{file}: is not a tokenizer that the tokenizers library can read"
        ):
            backend = _Tokenizer.from_str(text)
        file = folder / "tokenizer_config.json"
        settings = read_json(file) if is_present(file) else {}
        tokens = read_special_tokens(folder, settings, backend)
        add_tokens(backend, tokens, file)
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, _chat_template(folder, settings), tokens.named, add_bos_token)

    def encode(self, text, *, add_special_tokens=True):
        """Turn text into token ids.

        Parameters
        ----------
        text : str
            Special strings in it (`<|end|>`) become their ids.
        add_special_tokens : bool
            Let the tokenizer add what its post-processor adds (a beginning-of-sequence token, for
            some).

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
            text.encode()
        except UnicodeEncodeError as error:
            raise NpllmTypeError(
                f"text must be valid Unicode, which can be written as UTF-8 ({error})"
            ) from None
        with _library_errors(NpllmValueError, "tokenizer.json cannot encode this text"):
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        ids = encoding.ids
        if not add_special_tokens or self._bos is None:
            return ids
        added = (
            ids[:1] == [self._bos] and encoding.special_tokens_mask[0] == 1
        )  # by the post-processor
        ids = ids[1:] if added else ids
        wanted = added if self.add_bos_token is None else self.add_bos_token
        return [self._bos, *ids] if wanted and ids[:1] != [self._bos] else ids

    def decode(self, ids, *, skip_special_tokens=True):
        """Turn token ids into text.  Ids that have no token decode to nothing.

        Raises
        ------
        NpllmTypeError
            When `ids` is no sequence of non-negative integers.
        """
        try:
            ids = [int(i) for i in ids]
            if not all(0 <= i < 2**32 for i in ids):
                raise ValueError(f"got {min(ids)} ... {max(ids)}")
        except (TypeError, ValueError, OverflowError) as error:
            raise NpllmTypeError(
                f"ids must be a sequence of token ids, integers from 0 ({error})"
            ) from None
        with _library_errors(NpllmValueError, "tokenizer.json cannot decode these ids"):
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

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
            To be encoded with `add_special_tokens=False`: the template writes the special tokens
            itself.

        Raises
        ------
        NpllmValueError
            When the folder has no chat template, a message is malformed, or the template fails or
            refuses.

        Warns
        -----
        UserWarning
            When the template leaves out a message that is not the assistant's: Phi-3-medium's has
            no system messages.

        Notes
        -----
        The template comes with the checkpoint and is not trusted: it runs in a sandbox, within the
        limits of `npllm.text.chat_template`.

        Source: `apply_chat_template` in Transformers.
        """
        if not self.chat_template:
            raise NpllmValueError(
                "this checkpoint has no chat template; give the prompt as plain text"
            )
        if not isinstance(messages, list | tuple):
            raise NpllmTypeError(f"messages must be a list of dicts, got {type(messages).__name__}")
        if not messages:
            raise NpllmValueError("messages must hold at least one message")
        for message in messages:
            if (
                not isinstance(message, dict)
                or not isinstance(message.get("role"), str)
                or "content" not in message
            ):
                raise NpllmValueError(
                    f'a message must be {{"role": ..., "content": ...}}, got {quote(message)}'
                )
        names = {
            **self.special_tokens,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        names.pop("messages", None)  # no name for a token
        text = _template().render(self.chat_template, messages, names)
        _warn_of_left_out(messages, text)
        return text

    def encode_chat(self, messages):
        """Turn a conversation into token ids, ready for the assistant's answer."""
        return self.encode(self.apply_chat_template(messages), add_special_tokens=False)

    def token_text(self, token):
        """Text of one token by itself, for tables; special tokens under their name, and ids without
        a token as <id>.
        """
        text = self.decode([token], skip_special_tokens=False)
        return text or self.backend.id_to_token(int(token)) or f"<{int(token)}>"


class Detokenizer:
    """Text of a growing sequence of ids, piece by piece: joined, the pieces are the decoded whole.

    A piece is what the new ids add to the text; while the end is half a character, it is held back.
    A run of byte tokens (`<0xE2>`) is held back until it ends: its bytes are decoded together, and
    one wrong byte turns all of them into U+FFFD.

    Notes
    -----
    Decoding token by token would lose spaces, since a decoder strips the first one of every call.
    The difference is taken between two decodes that begin at the last piece, so that the work does
    not grow with the length of the text.
    """

    def __init__(self, tokenizer):
        self._tokenizer, self._ids, self._begin, self._end, self._in_bytes = (
            tokenizer,
            [],
            0,
            0,
            False,
        )

    def push(self, token):
        """Add an id; return the text that is now certain."""
        token = int(token)
        self._ids.append(token)
        decode = self._tokenizer.decode
        if decode(
            [token, token]
        ):  # twice: of one space alone nothing would be left.  A skipped token does not end a run
            name = self._tokenizer.backend.id_to_token(token) or ""
            self._in_bytes = BYTE_TOKEN.fullmatch(name) is not None and decode([token]) != name
        return self._emit(hold=True)

    def flush(self):
        """Return what was held back."""
        return self._emit(hold=False)

    def _emit(self, hold):
        known = self._tokenizer.decode(self._ids[self._begin : self._end])
        text = self._tokenizer.decode(self._ids[self._begin :])
        if len(text) <= len(known) or (hold and (self._in_bytes or text.endswith("\ufffd"))):
            return ""
        self._begin, self._end = self._end, len(self._ids)
        return text[len(known) :]


@contextlib.contextmanager
def _library_errors(kind, message):
    """Raise an error of npllm for whatever the tokenizers library raises: bare Exceptions, and
    panics, which are none.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{message} ({printable(str(error)[:300])})") from None


def _template():
    """Import what renders chat templates: nothing else needs Jinja."""
    try:
        return importlib.import_module("npllm.text.chat_template")
    except ImportError as error:
        raise MissingExtraError(
            f"a chat template needs Jinja, which cannot be imported ({error}); pip install jinja2, "
            "or give the prompt as plain text or token ids"
        ) from error


def _warn_of_left_out(messages, text):
    """Warn where what someone said to the model does not reach it."""
    for message in messages:
        content = message["content"]
        if (
            message["role"] != "assistant"
            and isinstance(content, str)
            and content.strip() not in text
        ):
            warn(
                f"this checkpoint's chat template leaves out the {message['role']} message: the model does not see it",
                stacklevel=3,
            )


def _chat_template(folder, settings):
    """The chat template: a file of its own, or an entry of tokenizer_config.json (a string, or a
    list of named ones).
    """
    file = folder / "chat_template.jinja"
    if is_present(file):
        try:
            return read_text(file, LARGEST_JSON, "utf-8")
        except NpllmValueError as error:
            raise NpllmOSError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [
            entry
            for entry in template
            if isinstance(entry, dict) and entry.get("name") == "default"
        ]
        template = named[-1].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise NpllmValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string, got {type(template).__name__}"
        )
    return template
