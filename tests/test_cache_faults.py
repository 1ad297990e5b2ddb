"""A call that raises, wherever it does, has either happened wholly or not at all: what follows has
the same bits as without it.
"""

import contextlib
import functools
import linecache
import signal
import sys
import time
from pathlib import Path

import family
import numpy as np
import pytest
import tiny
from close import close
from seeds import draws

import npllm
from npllm import ops
from npllm.decoding import start
from npllm.kernels import fastest_ops

PACKAGE = str(Path(npllm.__file__).parent)


class Fault(BaseException):
    """What is injected: neither an Exception nor anything that npllm knows."""


def ids(n_batch, n, seed=0):
    return tiny.random_ids(n_batch, n, seed, n_vocab=57)


def call(n_batch, n, seed=0, **options):
    """A step that sends new tokens through the model."""
    return lambda model, cache: model(ids(n_batch, n, seed), cache=cache, **options)


def reorder(*rows):
    return lambda _, cache: cache.reorder(rows)


PADDED = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
LONG = {"original_max_position_embeddings": 64, "max_position_embeddings": 200}
# kind -> config.json, sequences, tokens in a chunk, steps, and which of them the fault hits
SCENES = {
    "first call": (LONG, 2, 512, [call(2, 5), call(2, 2)], 0),
    "decode": (LONG, 1, 512, [call(1, 5), call(1, 1), call(1, 1)], 1),
    "growing": (LONG, 2, 512, [call(2, 63), call(2, 3), call(2, 1)], 1),
    "window": (LONG | {"sliding_window": 7}, 2, 512, [call(2, 60), call(2, 8), call(2, 1)], 1),
    "window and chunks": (
        LONG | {"sliding_window": 5},
        1,
        9,
        [call(1, 50), call(1, 31), call(1, 2)],
        1,
    ),
    "longrope": (family.longrope(), 1, 4, [call(1, 7), call(1, 3), call(1, 2)], 1),
    "longrope, one row of two": (
        family.longrope(),
        2,
        512,
        [call(2, 5, attention_mask=PADDED), call(2, 4), call(2, 1), call(2, 2)],
        1,
    ),
    "longrope and window": (
        family.longrope(sliding_window=3),
        2,
        3,
        [call(2, 6), call(2, 5), call(2, 1)],
        1,
    ),
    "padded": (LONG, 2, 2, [call(2, 5, attention_mask=PADDED), call(2, 3), call(2, 1)], 1),
    "chunks": (LONG, 2, 3, [call(2, 10), call(2, 7), call(2, 1)], 1),
    "tap": (LONG, 1, 512, [call(1, 5), call(1, 3, tap=lambda _, x: x), call(1, 1)], 1),
    "reorder": (LONG, 2, 512, [call(2, 5), reorder(1, 1, 0), call(3, 2)], 1),
    "after a reorder": (LONG, 2, 512, [call(2, 5), reorder(1, 1, 0), call(3, 2), call(3, 1)], 2),
}


def play(scene, model, cache, start=0, stop=None):
    """Take some steps of a scene; return what each gave."""
    _, _, chunk, steps, _ = SCENES[scene]
    with family.prefill_chunk(chunk):
        return [step(model, cache) for step in steps[start:stop]]


def made(scene, set_=ops.blockwise):
    return tiny.model(ops=set_, **({"num_hidden_layers": 3} | SCENES[scene][0]))


def check(scene, model, broken, want):
    """Let one step fail, then go on: with a shorter step in its place, and with what was left to
    do; return whether it failed.
    """
    _, n_batch, _, _, at = SCENES[scene]
    cache = model.new_cache(n_batch)
    play(scene, model, cache, 0, at)
    before = cache.state
    try:
        with broken() as other:
            play(scene, other, cache, at, at + 1)
        return False
    except Fault:
        done = cache.state is not before  # wholly, or not at all
    if not done:
        close(shorter(model, cache.copy()), want[-1], times=0)
    got = play(scene, model, cache, at + done)
    for one, other in zip(got, want[at + done : -1], strict=True):
        if one is not None:
            close(one, other, times=0)
    return True


def shorter(model, cache):
    """Send one token, of other ids than the scene's, through the model."""
    return model(ids(cache.n_batch, 1, seed=5), cache=cache)


def wanted(scene, model):
    """What every step gives where nothing fails, and the shorter one in the place of the step that
    will.
    """
    _, n_batch, _, _, at = SCENES[scene]
    instead = model.new_cache(n_batch)
    play(scene, model, instead, 0, at)
    return [*play(scene, model, model.new_cache(n_batch)), shorter(model, instead)]


@functools.cache
def is_with_line(file, line):
    return linecache.getline(file, line).lstrip().startswith("with ")


@contextlib.contextmanager
def at_line(number, model, lines):
    """Raise at the n-th line of the package that is reached; count them all where it is never
    reached.

    A `with` line is reached again when its block is left.  CPython takes no interrupt there, so
    nothing is injected.
    """
    entered = set()

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            place = frame, frame.f_lineno
            again = place in entered
            if is_with_line(frame.f_code.co_filename, frame.f_lineno):
                entered.add(place)
            if not again:
                lines.append(None)
                if len(lines) == number:
                    raise Fault
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield model
    finally:
        sys.settrace(before)


def fail_at_lines(scene, n_points, set_=ops.blockwise):
    """Raise at evenly spread lines of a scene's step; return how many were hit."""
    model, lines = made(scene, set_), []
    want = wanted(scene, model)
    assert not check(scene, model, lambda: at_line(-1, model, lines), want)
    points = sorted(
        {
            *range(1, len(lines) + 1, max(1, len(lines) // n_points)),
            *range(max(1, len(lines) - 8), len(lines) + 1),
        }
    )
    hits = [
        check(scene, model, lambda point=point: at_line(point, model, []), want) for point in points
    ]
    assert all(hits) or set_ is not ops.blockwise, (
        "a set with threads does not reach the same number of lines each time"
    )
    return sum(hits)


@pytest.mark.parametrize("scene", SCENES)
def test_a_fault_at_any_line(scene):
    assert fail_at_lines(scene, draws(3, 6)) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_a_fault_at_hundreds_of_lines(scene):
    fail_at_lines(scene, 400)


@pytest.mark.parametrize("scene", ["decode", "growing", "window", "longrope, one row of two"])
def test_a_fault_at_any_line_of_the_fastest_set(scene):
    """Which thread takes a tile is chance, and only this thread's lines are counted: of the 16
    points some may lie beyond the lines that a run has.
    """
    assert fail_at_lines(scene, 8, fastest_ops("numpy")) >= 4


@contextlib.contextmanager
def at_op(number, model, after, calls):
    """The same model, whose n-th operation raises: before it does anything, or when all is done."""

    def broken(op):
        def run(*args, **options):
            calls.append(None)
            if len(calls) == number and not after:
                raise Fault
            y = op(*args, **options)
            if len(calls) == number and after:
                raise Fault
            return y

        return run

    names = (
        "embed",
        "linear",
        "rms_norm",
        "rope_tables",
        "apply_rope",
        "attention",
        "swiglu",
        "add",
    )
    yield npllm.Model(
        model.config,
        model.params,
        ops=ops.blockwise.replace(**{name: broken(getattr(model.ops, name)) for name in names}),
    )


@pytest.mark.parametrize("n_points", [3, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("scene", [scene for scene in SCENES if scene != "reorder"])
def test_a_fault_in_any_operation(scene, after, n_points):
    """From the embedding to the product that gives the logits, in every layer and chunk, in rows
    that are computed anew.
    """
    model, calls = made(scene), []
    want = wanted(scene, model)
    assert not check(scene, model, lambda: at_op(-1, model, after, calls), want)
    for number in range(1, len(calls) + 1, max(1, len(calls) // n_points)):
        assert check(scene, model, lambda number=number: at_op(number, model, after, []), want)
    assert check(scene, model, lambda: at_op(len(calls), model, after, []), want), (
        "the last is lm_head"
    )


@pytest.mark.slow
def test_a_fault_in_a_tap():
    model, names = made("tap"), []
    want = wanted("tap", model)
    model(ids(1, 2), tap=lambda name, x: (names.append(name), x)[1])
    for name in names:
        cache = model.new_cache()
        play("tap", model, cache, 0, 1)

        def tap(seen, x, name=name):
            if seen == name:
                raise Fault
            return x

        with pytest.raises(Fault):
            model(ids(1, 3), cache=cache, tap=tap)
        for got, right in zip(play("tap", model, cache, 1), want[1:-1], strict=True):
            close(got, right, times=0)


def interrupted(scene, n_runs):
    """Send real interrupts at times spread over a step; return how many hit it."""
    model = made(scene)
    want, hits = wanted(scene, model), 0
    start = time.perf_counter()
    wanted(scene, model)
    whole = time.perf_counter() - start

    def ring(*_):
        raise Fault

    @contextlib.contextmanager
    def alarm(delay):
        signal.setitimer(signal.ITIMER_REAL, delay)
        try:
            yield model
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for run in range(n_runs):
            hits += check(
                scene, model, lambda run=run: alarm(max(1e-6, whole * (run + 0.5) / n_runs)), want
            )
    finally:
        signal.signal(signal.SIGALRM, before)
    return hits


needs_alarm = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="Windows has no interval timer"
)
in_a_finaliser = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # where an interrupt may fall


@needs_alarm
@in_a_finaliser
@pytest.mark.parametrize("scene", ["growing", "longrope", "chunks"])
def test_interrupts(scene):
    assert interrupted(scene, 40) > 0


@needs_alarm
@in_a_finaliser
@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_many_interrupts(scene):
    assert interrupted(scene, 400) > 0


# ------------------------------------------------------------------------------------------------------- fronts with a cache of their own


def text_model(**options):
    return tiny.model(ops=ops.blockwise, max_position_embeddings=128, **options)


def test_a_stream_left_half_way_changes_nothing():
    model = text_model()
    want = model.generate(ids(2, 5), max_new_tokens=8)
    left, other = (start(model, ids(2, 5), max_new_tokens=8) for _ in range(2))
    steps, steps_of_other = iter(left), iter(other)
    next(steps), next(steps_of_other), next(steps)
    steps.close()
    for _ in range(3):
        next(steps_of_other)
    assert np.array_equal(other.sequences.ids, want[:, :9]), "another one goes on"
    assert np.array_equal(model.generate(ids(2, 5), max_new_tokens=8), want)


@pytest.mark.parametrize(
    "run",
    [
        lambda m: m.generate(ids(2, 5), max_new_tokens=6),
        lambda m: m.beam_search(ids(2, 5), max_new_tokens=6).sequences,
    ],
    ids=["generate", "beams"],
)
def test_generation_that_fails_half_way_leaves_no_trace(run):
    model, calls = text_model(), []
    want = run(model)
    with at_op(-1, model, False, calls) as counted:
        run(counted)
    for number in range(1, len(calls) + 1, len(calls) // 20):
        with pytest.raises(Fault), at_op(number, model, False, []) as broken:
            run(broken)
        assert np.array_equal(run(model), want)
