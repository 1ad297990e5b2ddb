"""Text to token ids and back: a thin wrapper of the `tokenizers` library, and the chat template."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from operator import index
from typing import Any, NamedTuple, Self, SupportsIndex

import numpy as np
from tokenizers import Tokenizer as Backend

from npllm.arguments import check_path
from npllm.config.regular_file import is_present
from npllm.config.strict_json import printable, quote, read_json
from npllm.errors import NpllmError, NpllmOSError, NpllmTypeError, NpllmValueError
from npllm.progress import warn
from npllm.text.chat_template import read_chat_template, render
from npllm.text.conversation import check_messages, check_tools, find_left_out
from npllm.text.padding import pad_left
from npllm.text.special_tokens import add_tokens, read_special_tokens
from npllm.text.template_process import Allowance
from npllm.text.tokenizer_checks import read_tokenizer_json

__all__ = ["TokenizedText", "Tokenizer"]

Array = Any


class TokenizedText(NamedTuple):
    """What a call of a tokenizer returns, under Transformers' names."""

    input_ids: Array  # int64 [n_batch, n_seq], padded on the left
    attention_mask: Array  # int64 [n_batch, n_seq]: 1 for a token, 0 for padding


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

    def __init__(
        self,
        backend: Backend,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        self.backend = backend
        self.chat_template = chat_template
        self.special_tokens = special_tokens or {}
        self.add_bos_token = add_bos_token
        self._bos = backend.token_to_id(self.special_tokens.get("bos_token", ""))
        if add_bos_token and self._bos is None:
            raise NpllmValueError(
                "add_bos_token=True needs a bos_token in tokenizer_config.json, and there is none"
            )

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], *, add_bos_token: bool | None = None
    ) -> Self:
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
        folder = check_path("path", path)
        file = folder / "tokenizer.json"
        if not is_present(file):
            raise NpllmOSError(
                f"{file}: no such file; without it only token ids can be used, not text"
            )
        text = read_tokenizer_json(file)
        unreadable = f"{file}: is not a tokenizer that the tokenizers library can read"
        with _library_errors(NpllmValueError, unreadable):
            backend = Backend.from_str(text)
        file = folder / "tokenizer_config.json"
        settings = read_json(file) if is_present(file) else {}
        tokens = read_special_tokens(folder, settings, backend)
        add_tokens(backend, tokens, file)
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, read_chat_template(folder, settings), tokens.named, add_bos_token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
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
        add_special_tokens = _as_bool("add_special_tokens", add_special_tokens)
        with _library_errors(NpllmValueError, "tokenizer.json cannot encode this text"):
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        ids = encoding.ids
        if not add_special_tokens or self._bos is None:
            return ids
        by_post_processor = encoding.special_tokens_mask[:1] == [1]
        added = by_post_processor and ids[:1] == [self._bos]
        ids = ids[1:] if added else ids
        wanted = added if self.add_bos_token is None else self.add_bos_token
        return [self._bos, *ids] if wanted and ids[:1] != [self._bos] else ids

    def __call__(
        self, text: str | Sequence[str], *, return_tensors: str | None = "np"
    ) -> TokenizedText:
        """Turn one text or several into arrays that a model takes.

        Parameters
        ----------
        text : str or list of str
            Each is encoded as by `encode`; shorter ones are padded on the left.
        return_tensors : str, optional
            "np", NumPy arrays: all that there is.

        Returns
        -------
        tokenized : TokenizedText
            With `input_ids` and `attention_mask`, both [n_batch, n_seq].

        Raises
        ------
        NpllmTypeError
            When `text` is no text and no list of texts.
        NpllmValueError
            For other tensors than "np", and where a text has no tokens.

        Notes
        -----
        Unlike Transformers', the result holds arrays also where `return_tensors` is not given.

        Source: `PreTrainedTokenizerBase.__call__` in Transformers.
        """
        if return_tensors not in (None, "np"):
            raise NpllmValueError(
                f'return_tensors must be "np", got {quote(return_tensors)}: npllm computes with '
                "NumPy arrays; leave the argument out"
            )
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts:
            raise NpllmTypeError(f"text must be a str or a list of str, got {quote(text)}")
        rows = [self.encode(one) for one in texts]
        if not all(rows):
            raise NpllmValueError("each text must hold at least one token, got an empty one")
        pad = self.backend.token_to_id(self.special_tokens.get("pad_token", ""))
        ids, valid = pad_left(rows, pad or 0)
        return TokenizedText(ids, valid.astype(np.int64))

    def __repr__(self) -> str:
        n = self.backend.get_vocab_size()
        first = "".join(f", begins with {self.token_text(i)!r}" for i in self.encode("")[:1])
        chat = "chat template" if self.chat_template else "no chat template"
        return f"<npllm.Tokenizer {n:,} tokens{first}, {chat}>"

    def decode(
        self, ids: SupportsIndex | Iterable[SupportsIndex], *, skip_special_tokens: bool = True
    ) -> str:
        """Turn token ids, or one id, into text.  Ids that have no token decode to nothing.

        Raises
        ------
        NpllmTypeError
            When `ids` is no non-negative integer and no sequence of them.
        """
        try:
            tokens = [index(i) for i in _as_sequence(ids)]
            if not all(0 <= i < 2**32 for i in tokens):
                raise ValueError(f"got {min(tokens)} ... {max(tokens)}")
        except (TypeError, ValueError, OverflowError) as error:
            raise NpllmTypeError(
                f"ids must be a sequence of token ids, integers from 0 ({error})"
            ) from None
        skip = _as_bool("skip_special_tokens", skip_special_tokens)
        with _library_errors(NpllmValueError, "tokenizer.json cannot decode these ids"):
            return self.backend.decode(tokens, skip_special_tokens=skip)

    def apply_chat_template(
        self,
        messages: Any,
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Write a conversation as the text the model was trained on.

        Parameters
        ----------
        messages : list of dict
            Each {"role": "system" | "user" | "assistant" | "tool", "content": str}.  An assistant's
            message may have "tool_calls" and no content.
        tools : list of dict, optional
            What the model may call: JSON schemas, as the template expects them.
        add_generation_prompt : bool
            End with the opening of the assistant's next turn.

        Returns
        -------
        text : str
            To be encoded with `add_special_tokens=False`: the template writes the special tokens
            itself.

        Raises
        ------
        NpllmTypeError
            When messages or tools are of the wrong type, or hold what JSON cannot.
        NpllmValueError
            When the folder has no chat template, a message is malformed, or the template fails or
            refuses.

        Warns
        -----
        UserWarning
            When the template leaves out the tools, or a message that is not the assistant's:
            Phi-3-medium's leaves out system messages.

        Notes
        -----
        The template comes with the checkpoint and is not trusted: it runs in a sandbox, within the
        limits of `npllm.text.template_process`.

        Source: `apply_chat_template` in Transformers.
        """
        if not self.chat_template:
            raise NpllmValueError(
                "this checkpoint has no chat template; give the prompt as plain text"
            )
        check_messages(messages)
        check_tools(tools)
        names = {
            **self.special_tokens,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        allowance = Allowance()
        text = render(self.chat_template, messages, names, allowance)
        for left_out in find_left_out(self.chat_template, messages, names, text, allowance):
            warn(
                f"this checkpoint's chat template leaves out {left_out}: the model does not see it"
            )
        return text

    def encode_chat(self, messages: Any, *, tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Turn a conversation into token ids, ready for the assistant's answer."""
        text = self.apply_chat_template(messages, tools=tools)
        return self.encode(text, add_special_tokens=False)

    def token_text(self, token: SupportsIndex) -> str:
        """Text of one token by itself, for tables; special tokens under their name, and ids without
        a token as <id>.
        """
        text = self.decode([token], skip_special_tokens=False)
        return text or self.backend.id_to_token(index(token)) or f"<{index(token)}>"


def _as_sequence(ids: Any) -> Iterable[SupportsIndex]:
    """One id as a list of it; a sequence as it is."""
    is_one = isinstance(ids, int | np.integer) or getattr(ids, "ndim", None) == 0
    return [ids] if is_one else ids


def _as_bool(name: str, value: Any) -> bool:
    """Return a Python bool, also of NumPy's."""
    if not isinstance(value, bool | np.bool_):
        raise NpllmTypeError(f"{name} must be True or False, got {quote(value)}")
    return bool(value)


@contextlib.contextmanager
def _library_errors(kind: type[NpllmError], message: str) -> Iterator[None]:
    """Raise an error of npllm for whatever the tokenizers library raises: bare Exceptions, and
    panics, which are none.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{message} ({printable(str(error)[:300])})") from None
