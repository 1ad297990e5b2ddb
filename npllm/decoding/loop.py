"""The loop: prefill, decode, stop.  An iterator of token ids, and what turns it into text."""

import secrets
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from npllm import ops
from npllm.arrays import array_namespace, is_array, to_numpy, widen
from npllm.config.regular_file import is_present
from npllm.config.strict_json import is_token, quote, read_json
from npllm.decision import FROM_MODEL, check_scores
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.progress import warn
from npllm.text.stream import TextStream

__all__ = [
    "GenerationConfig",
    "Sampling",
    "TextStream",
    "choose",
    "filter_logits",
    "generate_tokens",
    "next_token_distribution",
    "prepare",
    "stream_batch",
]

# Entries of generation_config.json that would change the text, and the values of them that do not.
NEUTRAL = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (None, 0),
    "typical_p": (1, None),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (None,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1),
    "min_length": (0,),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "exponential_decay_length_penalty": (None,),
    "stop_strings": (None,),
    "watermarking_config": (None,),
    "dola_layers": (None,),
}

# The order of the filters.  Engines agree on what each does, not on when.
FILTER_ORDERS = {
    "transformers": ("repetition_penalty", "temperature", "top_k", "top_p", "min_p"),
    "llama.cpp": ("repetition_penalty", "top_k", "top_p", "min_p", "temperature"),
}
NO_FILTER = {
    "repetition_penalty": 1,
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
}  # the values that change nothing


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily, or drawn after the filters.  None switches a filter
    off.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class GenerationConfig:
    """What generation_config.json says of a checkpoint."""

    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    sampling: Sampling = Sampling()
    unsupported: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder, config):
        """Read generation_config.json; what it leaves out comes from config.json.

        Raises
        ------
        NpllmValueError
            When a value is of the wrong type.
        """
        path = Path(folder) / "generation_config.json"
        data = read_json(path) if is_present(path) else {}
        eos = data.get("eos_token_id", list(config.eos_token_id))
        eos = eos if isinstance(eos, list) else [eos] if eos is not None else []
        pad = data.get("pad_token_id", config.pad_token_id)
        if not all(map(is_token, eos)) or not (
            pad is None or (is_token(pad) and pad < config.vocab_size)
        ):
            raise NpllmValueError(
                f"{path}: eos_token_id must be token ids, and pad_token_id one below vocab_size = "
                f"{config.vocab_size}, got {quote(eos)} and {quote(pad)}"
            )
        do_sample = data.get("do_sample")
        if not isinstance(do_sample, bool | None):
            raise NpllmValueError(
                f"{path}: do_sample must be true or false, got {quote(do_sample)}"
            )
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        sampling = Sampling(bool(do_sample), **{name: data.get(name) for name in names})
        check_sampling(sampling, str(path) + ": ")
        unsupported = tuple(
            f"{name}={quote(data[name])}"
            for name, neutral in NEUTRAL.items()
            if data.get(name) not in (None, *neutral)
        )
        return cls(tuple(eos), pad, sampling, unsupported)


def resolve_sampling(defaults, *, do_sample=None, repetition_penalty=None, **filters):
    """Combine the caller's options with those of the checkpoint.

    Parameters
    ----------
    defaults : Sampling
        From generation_config.json.
    do_sample : bool, optional
        None: True where a filter is given, else as the checkpoint says.
    repetition_penalty : float, optional
    **filters
        temperature, top_k, top_p, min_p; None: as the checkpoint says, else off.  temperature=0
        means greedy.

    Returns
    -------
    sampling : Sampling

    Raises
    ------
    NpllmValueError
        For contradictory options, and for values out of range.
    """
    given = {name: value for name, value in filters.items() if value is not None}
    greedy = given.get("temperature") == 0
    if do_sample is False and given and not greedy:
        raise NpllmValueError(
            f"do_sample=False contradicts {', '.join(f'{k}={v}' for k, v in given.items())}: greedy decoding "
            "uses no sampling options; leave them out, or set do_sample=True"
        )
    penalty = defaults.repetition_penalty if repetition_penalty is None else repetition_penalty
    if do_sample is None:
        do_sample = bool(given) or defaults.do_sample
    if greedy or not do_sample:
        sampling = Sampling(repetition_penalty=penalty)
    else:
        sampling = replace(defaults, do_sample=True, repetition_penalty=penalty, **given)
    check_sampling(sampling)
    return sampling


def check_sampling(sampling, where=""):
    """Raise for values out of range, before any work is done."""
    ranges = {
        "temperature": ("a number of at least 0", lambda x: 0 <= x < 1e30),
        "top_k": ("an integer of at least 0", lambda x: 0 <= x < 2**63),
        "top_p": ("a number in 0 ... 1", lambda x: 0 <= x <= 1),
        "min_p": ("a number in 0 ... 1", lambda x: 0 <= x <= 1),
        "repetition_penalty": ("a number above 0", lambda x: 0 < x < 1e30),
    }
    for name, (wanted, holds) in ranges.items():
        value = getattr(sampling, name)
        kinds = int if name == "top_k" else (int, float)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, kinds) or not holds(value)
        ):
            raise NpllmValueError(f"{where}{name} must be {wanted}, got {quote(value)}")


def choose(logits, sampling, seen=None, u=None):
    """Choose the next token of each row.

    Parameters
    ----------
    logits : array [n_batch, n_vocab]
    sampling : Sampling
    seen : bool array [n_batch, n_vocab], optional
        Tokens of the prompt and of the answer so far, for the repetition penalty.
    u : array [n_batch], optional
        Uniform random numbers in [0, 1), for sampling.

    Returns
    -------
    token : integer array [n_batch]

    Notes
    -----
    Source: `GenerationMixin._sample` in Transformers, whose order of the filters it follows.
    """
    if not sampling.do_sample:
        return ops.greedy(
            filter_logits(logits, Sampling(repetition_penalty=sampling.repetition_penalty), seen)
        )
    return ops.sample(filter_logits(logits, sampling, seen), u)


def filter_logits(logits, sampling, seen=None, order="transformers"):
    """Apply the filters that are switched on, one after another.

        transformers:  repetition_penalty, temperature, top_k, top_p, min_p
        llama.cpp:     repetition_penalty, top_k, top_p, min_p, temperature

    Parameters
    ----------
    logits : array [..., n_vocab]
    sampling : Sampling
    seen : bool array [..., n_vocab], optional
        Tokens of the prompt and of the answer so far; needed for the repetition penalty.
    order : str
        "transformers" or "llama.cpp".

    Returns
    -------
    logits : array [..., n_vocab]
        -inf where a token is excluded.

    Raises
    ------
    NpllmValueError
        For another order, for a repetition penalty without `seen`, and where a filter leaves a row
        on the host that is no distribution: names the filter.

    Notes
    -----
    With the temperature last, top_p and min_p see the model's own probabilities, so that a high
    temperature lets no further tokens in.  The orders agree at temperature 1, and where only top_k
    is used.  Two things of llama.cpp are not followed: it cuts ties with the k-th largest logit
    arbitrarily, and its penalty looks at the last 64 tokens only (give `seen` accordingly).

    Source: `GenerationMixin._get_logits_processor` in Transformers;
    `common_params_sampling.samplers` in llama.cpp's common/common.h: penalties, dry, top_n_sigma,
    top_k, typ_p, top_p, min_p, xtc, temperature, of which the default leaves those that are not
    named here switched off.
    """
    if order not in FILTER_ORDERS:
        raise NpllmValueError(f"order must be one of {', '.join(FILTER_ORDERS)}, got {order!r}")
    check_scores(logits, "logits")
    for name in FILTER_ORDERS[order]:
        value = getattr(sampling, name)
        if value is None or value == NO_FILTER[name]:
            continue
        if name == "repetition_penalty" and seen is None:
            raise NpllmValueError(
                f"repetition_penalty = {value} needs `seen`, the tokens so far as a bool array of the shape "
                f"{list(logits.shape)} of the logits; got None"
            )
        with np.errstate(over="ignore", invalid="ignore"):  # the check says what became of it
            logits = getattr(ops, name)(
                logits, *([seen] if name == "repetition_penalty" else []), value
            )
        check_scores(logits, f"logits after {name} = {value}", f"give another {name}")
    return logits


def next_token_distribution(
    logits,
    *,
    order="transformers",
    seen=None,
    temperature=None,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=None,
):
    """Give the exact distribution that the next token is drawn from, after all filters.

        p = softmax(filter_logits(logits))

    Parameters
    ----------
    logits : array [..., n_vocab]
    order : str
        "transformers" or "llama.cpp": the order of the filters, see `filter_logits`.
    seen : bool array [..., n_vocab], optional
        Tokens so far; needed for the repetition penalty.
    temperature, top_k, top_p, min_p, repetition_penalty : number, optional
        None: off.  temperature=0 is greedy.

    Returns
    -------
    p : array [..., n_vocab]
        float64; every row sums to 1.  Greedy: 1 at the token that is chosen.

    Raises
    ------
    NpllmValueError
        For values out of range, another order, for a repetition penalty without `seen`, and for
        logits of which a row is no distribution (NaN, +inf, nothing but -inf), before the filters
        or after one.

    Notes
    -----
    It is the distribution that `ops.sample` inverts: token i is drawn for a part p[i] of all u.

    Source: `GenerationMixin._sample` in Transformers; `llama_sampler_dist` in llama.cpp.
    """
    xp = array_namespace(logits)
    sampling = Sampling(True, temperature, top_k, top_p, min_p, repetition_penalty)
    check_sampling(sampling)
    check_scores(logits, "logits", wait=True)
    if temperature != 0:
        filtered = check_scores(
            filter_logits(logits, sampling, seen, order), "logits after the filters", wait=True
        )
        return ops.softmax(widen(filtered, xp.float64))
    penalised = filter_logits(logits, Sampling(repetition_penalty=repetition_penalty), seen, order)
    chosen = ops.greedy(check_scores(penalised, "logits after the filters", wait=True))
    return xp.astype(xp.arange(logits.shape[-1]) == chosen[..., None], xp.float64)


def uniforms(seed, n_batch, step):
    """Draw one uniform number in [0, 1) for each sequence: a function of (seed, sequence, step) and
    of nothing else.

    Notes
    -----
    Source: "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et al. 2011), Philox 4x64; a
    counter-based generator replays the same numbers for any batch and backend.
    """
    keys = [
        np.array([seed, sequence], dtype=np.uint64) for sequence in range(n_batch)
    ]  # a list would go through float64
    return np.array(
        [
            np.random.Generator(np.random.Philox(key=key, counter=[0, step, 0, 0])).random()
            for key in keys
        ]
    )


def generate_tokens(
    model,
    input_ids,
    valid=None,
    *,
    max_new_tokens=50,
    sampling=Sampling(),
    seed=None,
    use_cache=True,
):
    """Continue a batch of prompts, token by token.

    Parameters
    ----------
    model : Model
    input_ids : integer array [n_batch, n_prompt]
        NumPy; padded on the left where the prompts differ in length.
    valid : bool array [n_batch, n_prompt], optional
        NumPy; False where `input_ids` is padding.
    max_new_tokens : int
    sampling : Sampling
    seed : int, optional
        The same seed draws the same numbers; None draws fresh ones.
    use_cache : bool
        False computes the whole sequence again for every token.

    Yields
    ------
    token : integer array [n_batch]
        The next token of each row.  The caller says when to stop.

    Warns
    -----
    UserWarning
        When the context ends before `max_new_tokens`.
    """
    n_batch, n_prompt = input_ids.shape
    ids, valid = input_ids, np.ones(input_ids.shape, dtype=bool) if valid is None else valid
    n_new = room_for(model.config, n_prompt, max_new_tokens)
    cache = model.new_cache(n_batch) if use_cache else None
    seed = secrets.randbits(64) if seed is None else seed
    seen = seen_tokens(ids, valid, model.config.vocab_size)
    for step in range(n_new):
        new = ids if step == 0 or not use_cache else ids[:, -1:]
        logits = last_logits(model, new, attention_mask=valid, cache=cache)
        u = uniforms(seed, n_batch, step) if sampling.do_sample else None
        token = choose(logits, sampling, seen, u)
        yield token
        seen[np.arange(n_batch), token] = True
        ids = np.concatenate([ids, token[:, None]], axis=1)
        valid = np.concatenate([valid, np.ones((n_batch, 1), dtype=bool)], axis=1)


def last_logits(model, ids, **options):
    """Send new tokens through the model; NumPy logits [n_batch, n_vocab] after the last one, of
    which each row is a distribution.

    Raises
    ------
    NpllmValueError
        When a row is none: NaN, +inf, or nothing but -inf.
    """
    logits = to_numpy(model(ids, logits_to_keep=1, **options))[:, -1, :]
    return check_scores(logits, "the model's logits", FROM_MODEL)


def stream_batch(model, input_ids, valid, streams, **options):
    """Continue a batch until every answer has ended.

    Parameters
    ----------
    streams : list of TextStream
        One for each row; says when the row ends.
    **options
        As in `generate_tokens`.

    Yields
    ------
    token : integer array [n_batch]
        Rows that have ended hold the pad id, else the first stop id.
    pieces : list of str
        What each row's text gained.
    """
    fill = fill_id(model.generation_config)
    for token in generate_tokens(model, input_ids, valid, **options):
        ended = np.array([stream.ended for stream in streams])
        token = np.where(ended, fill, token)
        yield (
            token,
            [
                "" if stream.ended else stream.push(t)
                for stream, t in zip(streams, token, strict=True)
            ],
        )
        if all(stream.ended for stream in streams):
            return


def fill_id(settings):
    """What stands behind the end of a shorter answer: the pad id, else the first stop id, else 0."""
    return (
        settings.pad_token_id
        if settings.pad_token_id is not None
        else (settings.eos_token_id or (0,))[0]
    )


def prepare(
    model,
    prompt,
    attention_mask=None,
    *,
    stop=None,
    max_new_tokens=50,
    seed=None,
    use_cache=True,
    **choice,
):
    """Check everything a caller may ask for, before any work is done.

    Parameters
    ----------
    prompt : str, list of str, list of messages, or integer array [n_batch, n_prompt]

    Returns
    -------
    ids, valid : integer and bool array [n_batch, n_prompt]
    streams : list of TextStream
    options : dict
        For `generate_tokens`.

    Raises
    ------
    NpllmTypeError, NpllmValueError
        Naming the option, and both numbers where the prompt does not fit the context.
    """
    settings = model.generation_config
    if model.config.head != "lm":
        raise NpllmValueError(
            f"{model.config.architectures[0]} scores classes and cannot generate text; call the model with ids"
        )
    if settings.unsupported:
        raise NpllmValueError(
            f"generation_config.json asks for what is not implemented: {', '.join(settings.unsupported)}"
        )
    for name, value, largest in (
        ("max_new_tokens", max_new_tokens, 2**31),
        ("seed", seed, 2**64 - 1),
    ):
        if name == "seed" and value is None:
            continue
        if isinstance(value, bool) or not (
            isinstance(value, int | np.integer) and 0 <= value <= largest
        ):
            raise NpllmValueError(f"{name} must be an integer in 0 ... {largest}, got {value!r}")
    sampling = resolve_sampling(settings.sampling, **choice)
    stop = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(stop, list | tuple) or not all(
        isinstance(text, str) and text for text in stop
    ):
        raise NpllmTypeError(f"stop must be strings, none of them empty, got {stop!r}")
    ids, valid = _prompt_ids(model, prompt, attention_mask)
    model.check_ids(ids)
    if ids.shape[1] >= model.config.context_length:
        raise NpllmValueError(
            f"the prompt has {ids.shape[1]} tokens, but the context length (max_position_embeddings) is "
            f"{model.config.context_length}, and the answer must fit in as well; shorten the prompt"
        )
    tokenizer = model.require_tokenizer() if stop or not is_array(prompt) else None
    streams = [TextStream(tokenizer, settings.eos_token_id, stop) for _ in ids]
    return (
        ids,
        valid,
        streams,
        {
            "max_new_tokens": int(max_new_tokens),
            "sampling": sampling,
            "seed": seed,
            "use_cache": use_cache,
        },
    )


def _prompt_ids(model, prompt, attention_mask):
    """Token ids of any kind of prompt, left-padded, and which of them are no padding."""
    if is_array(prompt):
        ids = model.check_ids(prompt)
        valid = model.check_attention_mask(attention_mask, ids.shape, 0)
        if not valid[:, -1].all():
            raise NpllmValueError(
                "attention_mask must be 1 in its last column: prompts are padded on the left, the answer follows "
                "the last token"
            )
        return ids.astype(np.int64), valid
    if attention_mask is not None:
        raise NpllmTypeError(
            "attention_mask goes with an array of token ids; texts are padded and masked by themselves"
        )
    tokenizer = model.require_tokenizer()
    if isinstance(prompt, str):
        rows = [tokenizer.encode(prompt)]
    elif is_chat(prompt):
        rows = [tokenizer.encode_chat(prompt)]
    elif isinstance(prompt, list | tuple) and prompt:
        rows = [tokenizer.encode(text) for text in prompt]
    else:
        raise NpllmTypeError(
            "prompt must be a str, a list of str, a list of messages or an integer array [n_batch, n_prompt], "
            f"got {str(prompt)[:80]!r}"
        )
    if not all(rows):
        raise NpllmValueError("the prompt is empty: it must hold at least one token")
    return _pad_left(rows, model.generation_config.pad_token_id or 0)


def _pad_left(rows, pad):
    """Put lists of ids of different lengths into one array, padded on the left."""
    n_prompt = max(map(len, rows))
    ids = np.full((len(rows), n_prompt), pad, dtype=np.int64)
    valid = np.zeros(ids.shape, dtype=bool)
    for row, tokens in enumerate(rows):
        ids[row, n_prompt - len(tokens) :] = tokens
        valid[row, n_prompt - len(tokens) :] = True
    return ids, valid


def is_chat(prompt):
    """Tell whether a prompt is a list of messages."""
    return (
        isinstance(prompt, list | tuple)
        and len(prompt) > 0
        and all(isinstance(message, dict) for message in prompt)
    )


def room_for(config, n_prompt, max_new_tokens):
    """How many tokens may follow a prompt; warns where the context ends before max_new_tokens."""
    room = config.context_length - n_prompt
    if room < max_new_tokens:
        warn(
            f"the context length (max_position_embeddings) is {config.context_length}: after {n_prompt} tokens "
            f"of prompt there is room for {room} new tokens, not {max_new_tokens}",
            stacklevel=4,
        )
    return min(room, max_new_tokens)


def seen_tokens(ids, valid, n_vocab):
    """Mark the tokens of each prompt, padding left out."""
    seen = np.zeros((ids.shape[0], n_vocab), dtype=bool)
    rows, columns = np.nonzero(valid)
    seen[rows, ids[rows, columns]] = True
    return seen
