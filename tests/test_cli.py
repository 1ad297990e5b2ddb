"""The npllm command: results on stdout, the rest on stderr, exit codes 0, 1 and 2, and no traceback
whatever happens.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

import npllm
from npllm.analysis.speed import generate_timed
from npllm.checkpoints.fetch import DEFAULT_MODEL
from npllm.kernels import compilation, fastest_ops, product_forms

CliRunner = pytest.importorskip("click.testing").CliRunner
cli = pytest.importorskip("npllm.cli.commands")
ROOT = Path(__file__).resolve().parents[1]
CHAT = {"eos_token_id": [], "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint that never ends an answer by itself."""
    return tiny.write_text_folder(
        tmp_path_factory.mktemp("checkpoints") / "tiny",
        max_position_embeddings=100_000,
        original_max_position_embeddings=100_000,
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The same without tokenizer."""
    return tiny.write_folder(tmp_path_factory.mktemp("checkpoints") / "bare")


@pytest.fixture
def call(folder):
    """Function (command, *arguments) -> result; runs with the tiny checkpoint."""

    def run(command, *arguments, model=folder, **options):
        path = [] if model is None or command in ("fetch", "doctor") else ["-m", str(model)]
        return CliRunner().invoke(cli.main, [command, *path, *map(str, arguments)], **options)

    return run


def start(command, *arguments, env=None, **options):
    """A process of its own; a model runs on the definitions, so that no kernels are loaded."""
    runs = ("--ops", "reference") if command in ("chat", "generate", "topk") else ()
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    } | options
    return subprocess.Popen(
        [sys.executable, "-m", "npllm", command, *runs, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | (env or {}),
        preexec_fn=_hear_ctrl_c,
        **pipes,
    )


def _hear_ctrl_c():
    """A job in the background of a shell ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def finish(process, given=b""):
    """Exit code and output, without the lines that say what a busy machine is at."""
    out, err = process.communicate(given, timeout=120)
    err = err.decode().replace(f"npllm: {compilation.MESSAGE}\n", "")
    return process.returncode, out, re.sub("npllm: reading a prompt .* so far\n", "", err)


def failed(result, *words):
    """One line on stderr, nothing on stdout, exit code 1."""
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("npllm: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


# ----------------------------------------------------------------------------------------------------------- each command


def test_the_dtype_of_the_cache_is_passed_on(call):
    result = call("generate", "hello", "-n", "2", "--dtype", "float64", "--cache-dtype", "bfloat16")
    assert result.exit_code == 1 and "computes in float64" in result.stderr
    assert call("generate", "hello", "-n", "2", "--cache-dtype", "bfloat16").exit_code == 0


def test_generate_streams_the_prompt_and_the_answer(call, folder):
    expected = npllm.load(folder).generate("hello", max_new_tokens=5)  # has compiled the kernels
    result = call("generate", "hello", "-n", 5)
    assert result.exit_code == 0
    assert result.stdout == "hello" + expected + "\n"
    assert re.fullmatch(
        r"prompt 1 token, [\d.]+ tokens/s; generation 5 tokens, [\d.]+ tokens/s; peak memory \d+ MB\n",
        result.stderr,
    )


def test_the_prompt_is_written_when_the_answer_begins(folder):
    """A line on stderr, that kernels are compiled, does not come in the middle of it."""
    written, before = [], []

    def processor(_, logits):
        before.append(len(written))
        return logits

    model = npllm.load(folder)
    stats = generate_timed(
        model, "hello", written.append, echo=True, max_new_tokens=2, logits_processors=[processor]
    )
    assert before[0] == 0 and "".join(written).startswith("hello")
    assert stats["new_tokens"] == 2


def test_generate_json_holds_the_new_text(call, folder):
    result = call("generate", "hello", "-n", 5, "--json")
    facts = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert facts["text"] == npllm.load(folder).generate("hello", max_new_tokens=5)
    assert (facts["prompt_tokens"], facts["new_tokens"]) == (1, 5)
    assert facts["peak_bytes"] > 10**7


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 5, "seed": 3},
        {"top_p": 0.5, "seed": 4},
        {"min_p": 0.1, "seed": 1},
        {"temperature": 0},
        {"repetition_penalty": 1.5},
        {"use_cache": False},
        {"stop": ["e"]},
        {"do_sample": True, "seed": 5},
    ],
)
def test_generate_takes_the_options_of_the_library(call, folder, options):
    """Every option arrives."""
    written = {
        "use_cache": ["--no-use-cache"],
        "do_sample": ["--do-sample"],
        "stop": ["--stop", "e"],
    }
    arguments = [
        word
        for name, value in options.items()
        for word in written.get(name, [f"--{name.replace('_', '-')}", value])
    ]
    got = json.loads(call("generate", "hello", "-n", 12, "--json", *arguments).stdout)["text"]
    assert got == npllm.load(folder).generate("hello", max_new_tokens=12, **options)


def test_generate_reads_the_prompt_from_standard_input(call):
    given = call("generate", "-", "-n", 3, input="hello").stdout
    assert (
        given
        == call("generate", "hello", "-n", 3).stdout
        == call("generate", "-n", 3, input="hello").stdout
    )


def test_generate_chat_answers_a_message_and_does_not_echo_it(call, folder):
    messages = [{"role": "user", "content": "hello"}]
    model = npllm.load(folder)
    assert (
        call("generate", "--chat", "hello", "-n", 4).stdout
        == model.generate(messages, max_new_tokens=4) + "\n"
    )
    facts = json.loads(call("generate", "--chat", "--json", "-n", 1, input="hello").stdout)
    assert facts["prompt_tokens"] == len(model.tokenizer.encode_chat(messages))


def test_chat_keeps_a_conversation_until_it_is_told_to_forget(call, folder):
    """Each answer sees all messages so far; /reset begins anew, /exit leaves."""
    model = npllm.load(folder)
    first = [{"role": "user", "content": "hello"}]
    one = model.generate(first, max_new_tokens=3)
    two = model.generate([*first, {"role": "assistant", "content": one}, *first], max_new_tokens=3)
    assert one != two
    result = call("chat", "-n", 3, input="hello\n\nhello\n/reset\nhello\n/exit\nhello\n")
    assert (result.exit_code, result.stdout) == (0, f"{one}\n{two}\n{one}\n")
    assert result.stderr.count("prompt ") == 3
    assert call("chat", "-n", 3, input="hello").stdout == f"{one}\n", (
        "the end of the input leaves as well"
    )


def test_chat_begins_with_a_system_message(call, folder):
    messages = [{"role": "system", "content": "hell"}, {"role": "user", "content": "hello"}]
    answer = npllm.load(folder).generate(messages, max_new_tokens=3)
    assert (
        call("chat", "--system", "hell", "-n", 3, input="hello\n/reset\nhello").stdout
        == f"{answer}\n{answer}\n"
    )


def test_chat_goes_on_where_a_message_does_not_fit(call, tmp_path):
    backend = tiny.byte_level()
    small = tiny.write_folder(
        tmp_path,
        tokenizer=backend,
        settings=tiny.SETTINGS,
        generation=CHAT,
        vocab_size=backend.get_vocab_size(),
    )
    result = call("chat", "-n", 2, input=f"{'x' * 100}\nhello\n", model=small)
    assert result.exit_code == 0
    assert "context length" in result.stderr
    assert "/reset starts a new conversation" in result.stderr
    assert (
        result.stdout
        == npllm.load(small).generate([{"role": "user", "content": "hello"}], max_new_tokens=2)
        + "\n"
    )


def test_topk_lists_the_likeliest_tokens(call):
    rows = json.loads(call("topk", "hello", "-k", 4, "--json").stdout)
    assert [set(row) for row in rows] == [{"id", "text", "logit", "probability"}] * 4
    assert rows == sorted(rows, key=lambda row: -row["probability"])
    assert json.loads(call("topk", "hello", "-k", 10**6, "--json").stdout)[0] == rows[0]
    assert sum(
        row["probability"]
        for row in json.loads(call("topk", "hello", "-k", 10**6, "--json").stdout)
    ) == pytest.approx(1, abs=1e-4)
    lines = call("topk", "hello", "-k", 4).stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == [row["id"] for row in rows]
    assert "█" in lines[0]


def test_tokens_shows_the_cuts(call):
    assert json.loads(call("tokens", "hello w", "--json").stdout) == [
        {"id": 265, "text": "hello"},
        {"id": 266, "text": " w"},
    ]
    result = call("tokens", input="hello w")
    assert (result.stdout, result.stderr) == ("    265  'hello'\n    266  ' w'\n", "2 tokens\n")
    assert call("tokens", "--chat", "hello").stdout.startswith("      3  '<|user|>'\n")


def test_inspect_counts_without_reading_weights(call, bare):
    facts = json.loads(call("inspect", "--json").stdout)
    assert (
        facts["parameters"]
        == sum(facts["parameters_by_part"].values())
        == sum(
            x.size
            for x in tiny.weights(
                tiny.config_dict(
                    vocab_size=tiny.byte_level().get_vocab_size(), max_position_embeddings=100_000
                )
            ).values()
        )
    )
    assert (facts["bytes"], facts["dtypes"], facts["files"]) == (
        4 * facts["parameters"],
        ["float32"],
        1,
    )
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    text = call("inspect", model=bare).stdout
    assert text.startswith("Phi3ForCausalLM(")
    assert "KV cache" in text


def test_fetch_prints_the_folder_and_passes_its_options_on(call, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "npllm.cli.checkpoints.fetch_checkpoint",
        lambda name, **options: asked.append((name, options)) or Path("here"),
    )
    assert call("fetch", "a/b", "--revision", "main", "--token", "x").stdout == "here\n"
    assert call("fetch", "c/d", "--include", "*.gguf", env={"HF_TOKEN": "y"}).exit_code == 0
    assert call("fetch", env={"HF_TOKEN": "y"}).exit_code == 0
    assert asked == [
        ("a/b", {"revision": "main", "token": "x", "include": ()}),
        ("c/d", {"revision": None, "token": "y", "include": ("*.gguf",)}),
        (DEFAULT_MODEL, {"revision": None, "token": None, "include": ()}),
    ]


def test_fetch_prepares_the_kernels_of_the_checkpoint(call, tmp_path, monkeypatch):
    monkeypatch.setenv("NPLLM_WEIGHTS", str(tmp_path))
    tiny.write_folder(tmp_path / DEFAULT_MODEL)
    steps = []
    monkeypatch.setattr("npllm.cli.checkpoints.compiled_ops", lambda: True)
    monkeypatch.setattr(npllm.Model, "__call__", lambda _, ids, **__: steps.append(ids.shape))
    assert call("fetch", "--no-prepare").exit_code == 0
    assert steps == []
    assert call("fetch").exit_code == 0
    assert [n > 16 for _, n in steps] == [True, False]


def test_fetch_of_what_is_there_does_nothing(call, tmp_path, monkeypatch):
    monkeypatch.setenv("NPLLM_WEIGHTS", str(tmp_path))
    there = tiny.write_folder(tmp_path / DEFAULT_MODEL)
    result = call("fetch", "--no-prepare")
    assert (result.exit_code, result.stdout) == (0, f"{there}\n")


def test_bench_measures_with_cache_and_without(call):
    sizes = ("-p", 3, "-n", 2, "-r", 1)
    facts = json.loads(call("bench", *sizes, "--json").stdout)
    assert set(facts["tokens_per_second"]) == {"prefill", "decode_cached", "decode_uncached"}
    assert (facts["n_prompt"], facts["n_new"], facts["repeat"]) == (3, 2, 1)
    assert facts["machine"]["npllm"] == npllm.__version__
    result = call("bench", *sizes)
    assert result.stdout.count("tokens/s") == 3
    assert result.stderr.startswith("median of 1 runs")


def test_bench_profiles_every_operation(call, monkeypatch):
    monkeypatch.setattr(
        "npllm.analysis.profiling.machine_limits", lambda: {"read": 1e9, "flops": 1e10}
    )
    sizes = ("--profile", "-p", 3, "-n", 2, "-r", 1)
    facts = json.loads(call("bench", *sizes, "--json").stdout)
    assert {"prefill", "decode", "limits", "machine"} <= set(facts)
    lines = call("bench", *sizes).stdout
    assert (
        "limits: 1.0 GB/s read, 10 GFLOP/s" in lines
        and "prefill of 3 tokens" in lines
        and lines.count("between the ops") == 2
    )


def test_bench_compares_sets_of_operations(call):
    sizes = ("-p", 3, "-n", 2, "-r", 1, "--against", "blockwise", "--against", "reference")
    facts = json.loads(call("bench", *sizes, "--json").stdout)
    names = [one["ops"] for one in facts["sets"]]
    assert (
        names == [fastest_ops().name, "blockwise", "reference"]
        and list(facts["speedup"]) == names[1:]
    )
    for one in facts["sets"][1:]:
        for what, ratio in facts["speedup"][one["ops"]].items():
            own = facts["sets"][0]["tokens_per_second"][what]
            assert ratio == own / one["tokens_per_second"][what]
    lines = call("bench", *sizes).stdout
    assert lines.count("tokens/s") == 9 and f"{names[0]} over reference: prefill" in lines
    assert call("bench", *sizes, "--profile").exit_code == 2


@pytest.mark.parametrize("name", ["blockwise", "reference", "fast"])
def test_a_set_of_operations_is_chosen_by_name(call, name):
    facts = json.loads(call("bench", "-p", 2, "-n", 1, "-r", 1, "--ops", name, "--json").stdout)
    assert facts["ops"] == (fastest_ops().name if name == "fast" else name)


def test_the_cuda_kernels_need_cupy(call):
    result = call("bench", "-p", 2, "-n", 1, "-r", 1, "--ops", "cuda")
    assert result.exit_code == 1
    assert (
        'ops="cuda" runs on CuPy arrays and needs backend="cupy", got backend="numpy"'
        in result.stderr
    )


def test_doctor_describes_the_machine(call):
    facts = json.loads(call("doctor", "--json").stdout)
    assert {"npllm", "python", "cores", "packages", "blas", "gpu", "weights_folder"} <= set(facts)
    assert facts["gpu"]["found"] or facts["gpu"]["why"]
    assert len(product_forms()) == 2
    assert product_forms().items() <= facts["kernels"].items()
    assert call("doctor").stdout.startswith("npllm")


def test_doctor_warns_of_a_fixed_blas(call):
    assert (
        "OPENBLAS_CORETYPE fixes the kernels"
        in call("doctor", env={"OPENBLAS_CORETYPE": "Haswell"}).stderr
    )


@pytest.mark.parametrize("command", ["generate", "chat", "topk", "tokens", "inspect", "bench"])
def test_model_is_chosen_by_path_or_by_name(command, call, folder, monkeypatch):
    """-m takes a folder, or the name of one among the fetched."""
    arguments = {
        "generate": ("hi", "-n", "1"),
        "topk": ("hi",),
        "tokens": ("hi",),
        "bench": ("-p", "2", "-n", "1", "-r", "1"),
    }.get(command, ())
    monkeypatch.setenv("NPLLM_WEIGHTS", str(folder.parent))
    assert call(command, *arguments, input="").exit_code == 0
    assert call(command, *arguments, input="", model="tiny").exit_code == 0
    failed(
        call(command, *arguments, input="", model="/nonexistent"),
        "/nonexistent: is neither a folder nor a fetched checkpoint",
    )


@pytest.mark.parametrize(
    "options", [("--dtype", "float64"), ("--ops", "reference"), ("--backend", "numpy")]
)
def test_model_options(options, call):
    plain, other = (
        json.loads(call("topk", "hello", "--json", *words).stdout) for words in ((), options)
    )
    assert [row["id"] for row in other] == [row["id"] for row in plain]
    assert [row["logit"] for row in other] == pytest.approx(
        [row["logit"] for row in plain], rel=1e-4
    )


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("generate", "hello", "--no-do-sample", "--temp", "0.5"),
            ("do_sample=False contradicts", "temperature=0.5"),
        ),
        (("chat", "--no-do-sample", "--top-k", "5"), ("do_sample=False contradicts", "top_k=5")),
        (("generate", "hello", "--top-p", "1.5"), ("top_p must be a number in 0 ... 1, got 1.5",)),
        (("generate", "hello", "--temp", "nan"), ("temperature must be a number",)),
        (("generate", "hello", "--seed", "-1"), ("seed must be an integer",)),
        (("generate", "hello", "--stop", ""), ("stop must be strings, none of them empty",)),
        (("generate", ""), ("the prompt is empty",)),
        (("generate", "a" * 100_001), ("the prompt has 100001 tokens", "100000")),
        (("topk", ""), ("the prompt is empty",)),
        (("bench", "-p", "100001"), ("100000",)),
    ],
)
def test_what_cannot_be_is_said_in_one_line(call, arguments, words):
    failed(call(*arguments, input="hello\n"), *words)


def test_without_a_tokenizer_text_is_refused_and_ids_work(call, bare):
    for command in (("generate", "x"), ("chat",), ("topk", "x"), ("tokens", "x")):
        failed(call(*command, input="x", model=bare), "tokenizer.json")
    assert call("bench", "-p", 2, "-n", 1, "-r", 1, model=bare).exit_code == 0


def test_without_a_chat_template_chat_is_refused_at_once(call, tmp_path):
    backend = tiny.byte_level()
    plain = tiny.write_folder(tmp_path, tokenizer=backend, vocab_size=backend.get_vocab_size())
    failed(call("chat", input="hello\n", model=plain), "no chat template")
    failed(call("generate", "--chat", "hello", model=plain), "no chat template")


def test_an_empty_folder_is_refused(call, tmp_path):
    for command in ("generate", "topk", "inspect", "bench", "chat"):
        failed(call(command, input="x", model=tmp_path), "config.json")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("generate", "a", "b"),
        ("generate", "--nonsense"),
        ("topk", "x", "-k", "0"),
        ("generate", "-n", "many"),
        ("generate", "x", "--backend", "abacus"),
        ("bench", "-r", "0"),
        ("tokens", "x", "-m"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    result = CliRunner().invoke(cli.main, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage:" in result.stderr or "Error:" in result.stderr


@pytest.mark.parametrize("command", ["", *cli.main.commands])
def test_help_is_exit_code_0(command):
    for option in ("-h", "--help"):
        result = CliRunner().invoke(cli.main, [*command.split(), option])
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith("Usage:")


def test_version():
    assert CliRunner().invoke(cli.main, ["--version"]).stdout.strip().endswith(npllm.__version__)


# ----------------------------------------------------------------------------------------- processes, signals and encodings


def test_a_process_fails_in_one_line(folder):
    code, out, err = finish(start("generate", "x", "-m", folder, "--top-p", "7"))
    assert (code, out, err.count("\n"), err[:7]) == (1, b"", 1, "npllm: ")


@pytest.mark.slow
def test_a_warning_is_one_line_on_stderr(tmp_path):
    backend = tiny.byte_level()
    odd = tiny.write_folder(tmp_path, tokenizer=backend, vocab_size=backend.get_vocab_size())
    tiny.write_json(
        odd / "config.json",
        tiny.config_dict(vocab_size=backend.get_vocab_size(), an_unheard_of_key=1),
    )
    code, out, err = finish(start("topk", "hello", "-k", 1, "-m", odd))
    assert (code, out.count(b"\n")) == (0, 1)
    assert err.startswith("npllm: warning: ")
    assert (err.count("\n"), "an_unheard_of_key" in err) == (1, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "hello", "-n", "2000"),
        pytest.param(("topk", "hello", "-k", "100"), marks=pytest.mark.slow),
        pytest.param(("inspect",), marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_leaves_early_causes_no_traceback(arguments, folder):
    """As in `npllm topk PROMPT | head -1`."""
    with start(*arguments, "-m", folder) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        process.stdin.close()
        err = process.stderr.read().decode()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


@pytest.mark.parametrize(
    ("command", "encoding"),
    [
        ("generate", "latin-1"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("topk", "latin-1"),
                ("tokens", "latin-1"),
                *((name, "ascii") for name in ("topk", "tokens", "generate")),
            )
        ),
    ],
)
def test_text_that_the_terminal_cannot_show_becomes_question_marks(folder, command, encoding):
    more = ("-n", "20") if command == "generate" else ()
    code, out, err = finish(
        start(command, "é日", *more, "-m", folder, env={"PYTHONIOENCODING": encoding})
    )
    assert (code, "Traceback" in err) == (0, False)
    assert encoding == "ascii" or b"?" in out


@pytest.mark.slow
def test_json_on_a_plain_terminal_loses_nothing(call, folder):
    """What ASCII cannot show is escaped."""
    words = ("tokens", "é日", "--json")
    plain = finish(start(*words, "-m", folder, env={"PYTHONIOENCODING": "ascii"}))[1]
    wide = call(*words).stdout
    assert plain.isascii()
    assert not wide.isascii()
    assert json.loads(plain) == json.loads(wide)


@pytest.mark.parametrize(
    "command",
    [
        ("tokens",),
        pytest.param(("chat", "-n", "1"), marks=pytest.mark.slow),
        pytest.param(("generate", "-n", "1"), marks=pytest.mark.slow),
    ],
)
def test_standard_input_that_is_no_text_is_refused(command, folder):
    code, out, err = finish(
        start(*command, "-m", folder, env={"PYTHONIOENCODING": "utf-8"}), b"\xff\xfe\n"
    )
    assert (code, out, err.count("\n")) == (1, b"", 1)
    assert "standard input is not valid utf-8 text" in err


@pytest.mark.slow
def test_an_argument_that_is_no_text_is_refused(folder):
    code, out, err = finish(start("tokens", "-m", folder, os.fsdecode(b"\xff")))
    assert (code, out, err.count("\n"), "Unicode" in err) == (1, b"", 1, True)


def read_some(process, wanted=1):
    """Wait for bytes on stdout."""
    got, until = b"", time.monotonic() + 30
    while len(got) < wanted and time.monotonic() < until:
        if select.select([process.stdout], [], [], 0.1)[0]:
            got += os.read(process.stdout.fileno(), 65536)
    return got


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_stops_the_answer_and_not_the_program(folder):
    """The conversation goes on with what was said so far; at the prompt Ctrl-C does nothing."""
    process = start("chat", "-m", folder, "-n", 90_000)
    try:
        for _ in range(2):
            process.stdin.write(b"hello\n")
            process.stdin.flush()
            out = read_some(process, 5)
            assert out, "an answer has begun"
            process.send_signal(signal.SIGINT)
            until = time.monotonic() + 30
            while b" [stopped]\n" not in out and time.monotonic() < until:
                out += read_some(process)
            assert out.endswith(b" [stopped]\n")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)  # at the prompt
        time.sleep(0.3)
        assert process.poll() is None
        code, _, err = finish(process, b"/exit\n")
        assert (code, err) == (0, "")
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_ends_generate_without_traceback(folder):
    process = start("generate", "hello", "-m", folder, "-n", 90_000)
    assert read_some(process, 10)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, "Traceback" in err, "Aborted" in err) == (1, False, True)


def test_tokens_answers_without_loading_weights(call, folder, tmp_path):
    """`npllm tokens` needs the tokenizer only."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    result = call("tokens", "hello", model=tmp_path)
    assert (result.exit_code, result.stdout) == (0, "    265  'hello'\n")
    assert result.stderr == "1 token\n"


def test_inspect_names_the_tensors_that_are_not_finite(call, tmp_path):
    tensors = tiny.weights()
    tensors["model.norm.weight"][3] = np.nan
    broken = tiny.write_folder(tmp_path / "broken", tensors=tensors)
    assert call("inspect", "--check-finite").exit_code == 0
    result = call("inspect", "-m", str(broken), "--check-finite")
    assert result.exit_code == 1
    assert "model.norm.weight: 1 NaN, 0 infinities" in result.stdout
