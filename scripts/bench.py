#!/usr/bin/env python3
"""Measure npllm beside the peers that are installed, in one run.

    python scripts/bench.py COMMAND

    generate            100 new tokens from a 51-token chat prompt, with and without the KV cache
    first-token -m DIR  a new process up to the first token and the eighth, and its peak memory
    speed -m DIR        prefill and decoding of every installed engine, and the machine's limits;
                        -m FILE.gguf: of those that read it
    context -m DIR      a decode step at 128, 1k and 4k tokens of context, beside the bytes it reads
    batch -m DIR        tokens/s of decoding 1 ... 16 sequences at once
    checkouts A B       prefill and decoding of two checkouts of npllm
    lookup              20 prompts with and without prompt lookup
    contention          decoding beside 0, 1, 2 and 4 busy processes, and in two processes at once
    serve -m FILE.gguf  a server's tokens/s at 1, 4 and 16 clients, beside llama-cpp-python's
    attention           the definition, both schedules, a window, and torch, by sequence length

Every contender is a process of its own.  They run in turns (A B A B ...), so that a slow period of
the machine affects all of them.  The results are medians and ratios.  OPENBLAS_CORETYPE, which
fixes the kernels of OpenBLAS, is removed from the children's environment; the report names it.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from math import prod

import bench_contention
import bench_lookup
import bench_serve
import click
import contenders
import numpy as np

import npllm
from npllm import ops
from npllm.analysis import profiling as profile
from npllm.analysis.machine import peak_memory
from npllm.arrays import backend_namespace, to_numpy
from npllm.checkpoints.fetch import weights_folder
from npllm.checkpoints.phi3_layout import expected_shapes
from npllm.config.strict_json import read_json
from npllm.loading import checkpoint_folder

MESSAGES = [
    {"role": "user", "content": "Explain to a child, in a few simple words, why the sky is blue."}
]
N_PROMPT = 51


def npllm_contender(folder, dtype, ids=None, backend="numpy"):
    """Greedy decoding with npllm, stop ids ignored so that every run does the same work."""
    model = npllm.load(folder, dtype=dtype, backend=backend)
    prompt = prompt_ids(model) if ids is None else ids

    def run(n_new, use_cache):
        cache = model.new_cache() if use_cache else None
        ids = new = np.array([prompt])
        for _ in range(n_new):
            token = np.argmax(
                to_numpy(model(new if use_cache else ids, cache=cache, logits_to_keep=1))[:, -1],
                axis=-1,
            )
            new = token[:, None]
            ids = np.concatenate([ids, new], axis=1)
        return ids[0].tolist()

    return run


def transformers_contender(folder, dtype, ids=None, device="cpu"):
    """The same with Transformers' generate, on PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    ids = torch.tensor([prompt_ids(npllm.load(folder)) if ids is None else ids], device=device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    model.generation_config.eos_token_id = None

    def run(n_new, use_cache):
        with torch.no_grad():
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n_new,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=0,
            )[0].tolist()

    return run


CONTENDERS = {
    "npllm": npllm_contender,
    "npllm-cupy": functools.partial(npllm_contender, backend="cupy"),
    "transformers": transformers_contender,
    "transformers-cuda": functools.partial(transformers_contender, device="cuda"),
}


def prompt_ids(model):
    """A chat prompt of N_PROMPT tokens; random ids where the folder has no tokenizer."""
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(0, model.config.vocab_size, N_PROMPT).tolist()
    ids = model.tokenizer.encode_chat(MESSAGES)
    return (ids * (N_PROMPT // len(ids) + 1))[-N_PROMPT:]


class Child:
    """A contender in a process of its own, which answers one JSON line with another."""

    def __init__(self, name, folder, dtype):
        environment = {
            key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "child", name, str(folder), str(dtype or "")],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.version = self._read()["version"]

    def measure(self, **task):
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended early, with exit code {self.process.wait()}")
        return json.loads(line)


def attention_variant(name, n, n_head, d_head, window):
    """A function that runs one kind of attention once."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n_head, n, d_head), dtype=np.float32) for _ in range(3))
    causal, local = ops.mask.causal(), ops.mask.sliding_window(window)
    if name == "torch":
        import torch

        q, k, v = (torch.from_numpy(x)[None] for x in (q, k, v))
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return {
        "definition": lambda: ops.attention(q, k, v, mask=causal),
        "flash 1": lambda: ops.blockwise_attention(q, k, v, mask=causal, outer="keys"),
        "flash 2": lambda: ops.blockwise_attention(q, k, v, mask=causal),
        f"window {window}": lambda: ops.blockwise_attention(q, k, v, mask=local),
    }[name]


def installed(name):
    """Contenders of which every package can be imported, and that find a GPU if they need one."""
    if name.startswith("npllm"):
        return name == "npllm" or backend_namespace("auto").__name__ == "cupy"
    device = "; assert torch.cuda.is_available()" if name.endswith("cuda") else ""
    probe = subprocess.run(
        [sys.executable, "-c", f"import torch, transformers{device}"],
        capture_output=True,
        check=False,
    )
    return probe.returncode == 0


def machine():
    """Facts of the machine, as the children see them."""
    dropped = os.environ.pop("OPENBLAS_CORETYPE", None)
    command = [sys.executable, "-m", "npllm", "doctor", "--json"]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for place in (
        "weights_folder",
        "default_checkpoint",
    ):  # of no interest to whoever reads the figures
        facts.pop(place)
    return facts | {
        "cpu": cpu_name(),
        "removed from the environment": {"OPENBLAS_CORETYPE": dropped} if dropped else {},
    }


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return "unknown"


@click.group()
def main():
    """Measure npllm beside its peers."""


@main.command(hidden=True)
@click.argument("name")
@click.argument("folder")
@click.argument("dtype")
def child(name, folder, dtype):
    """Serve measurements: a JSON task a line on standard input, a JSON answer a line on standard
    output.
    """
    run = CONTENDERS[name](folder, dtype or None)
    version = (
        npllm.__version__
        if name.startswith("npllm")
        else __import__(name.partition("-")[0]).__version__
    )
    print(json.dumps({"version": version}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        start = time.perf_counter()
        ids = run(**task)
        print(
            json.dumps(
                {
                    "seconds": time.perf_counter() - start,
                    "ids": ids,
                    "peak_bytes": peak_memory(),
                }
            ),
            flush=True,
        )


@main.command(hidden=True)
@click.argument("name")
@click.argument("folder")
@click.argument("dtype")
@click.argument("n_prompt", type=int)
@click.argument("n_new", type=int)
def cold(name, folder, dtype, n_prompt, n_new):
    """Load and generate once; print the clock at the first token and at the last."""
    ids = np.random.default_rng(0).integers(0, 1000, n_prompt).tolist()
    run = CONTENDERS[name](folder, dtype or None, ids)
    loaded = time.time()
    run(n_new=1, use_cache=True)
    first = time.time()
    if n_new > 1:
        run(n_new=n_new, use_cache=True)
    print(
        json.dumps(
            {
                "loaded": loaded,
                "first": first,
                "last": time.time(),
                "peak_bytes": peak_memory(),
            }
        ),
        flush=True,
    )


@main.command(name="first-token")
@click.option("-m", "--model", "path", help="Checkpoint folder. [the default checkpoint]")
@click.option("-p", "--n-prompt", default=16, show_default=True)
@click.option("-n", "--n-new", default=8, show_default=True)
@click.option("-r", "--repeat", default=1, show_default=True)
def first_token(path, n_prompt, n_new, repeat):
    """Time a cold process up to its first token, the weights as stored and in the page cache."""
    folder = checkpoint_folder(path)
    n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtypes = {
        "npllm": "",
        "npllm-cupy": "",
        "transformers": "bfloat16",
        "transformers-cuda": "bfloat16",
    }
    click.echo(
        f"{folder.name}: {n_bytes / 1e9:.2f} GB; {n_prompt} tokens of prompt; {cpu_name()}\n"
    )
    click.echo(
        "| | s to loaded | s to first token | s for prompt + "
        f"{n_new} tokens again | peak GB | of the weights |\n|---|---|---|---|---|---|"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    for name in [name for name in CONTENDERS if installed(name)] * repeat:
        command = [
            sys.executable,
            __file__,
            "cold",
            name,
            str(folder),
            dtypes[name],
            str(n_prompt),
            str(n_new),
        ]
        start = time.time()
        output = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stdout
        clock = json.loads(output.splitlines()[-1])
        loaded, first, again = (
            clock["loaded"] - start,
            clock["first"] - start,
            clock["last"] - clock["first"],
        )
        click.echo(
            f"| {name} | {loaded:.2f} | {first:.2f} | {again:.2f} "
            f"| {clock['peak_bytes'] / 1e9:.2f} | {clock['peak_bytes'] / n_bytes:.2f} |"
        )


CHECKOUT = """
import json, sys, time
import numpy as np
import npllm
model, n_prompt, n_new = npllm.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ids = np.random.default_rng(0).integers(0, 1000, (1, n_prompt))
model(ids[:, :8], cache=model.new_cache(), logits_to_keep=1)
print(npllm.__file__, flush=True)
for _ in sys.stdin:
    cache, clock = model.new_cache(), [time.perf_counter()]
    model(ids, cache=cache, logits_to_keep=1)
    clock.append(time.perf_counter())
    for step in range(n_new):
        model(ids[:, step : step + 1], cache=cache)
        clock.append(time.perf_counter())
    steps = np.diff(clock)
    print(json.dumps({"prefill": steps[0], "decode": float(np.median(steps[1:]))}), flush=True)
"""


@main.command()
@click.argument("checkouts", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("-m", "--model", "path", help="Checkpoint folder. [the default checkpoint]")
@click.option("-p", "--n-prompt", default=256, show_default=True)
@click.option("-n", "--n-new", default=64, show_default=True)
@click.option("-r", "--repeat", default=9, show_default=True)
def checkouts(checkouts, path, n_prompt, n_new, repeat):
    """Time prefill and decoding of several checkouts of npllm, which take turns; only functions of
    `npllm` are used.
    """
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    command = [
        sys.executable,
        "-c",
        CHECKOUT,
        str(checkpoint_folder(path)),
        str(n_prompt),
        str(n_new),
    ]
    children = [
        subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=place,
        )
        for place in checkouts
    ]  # -c imports from the current folder first
    for place, contender in zip(checkouts, children, strict=True):
        if not contender.stdout.readline().startswith(os.path.abspath(place)):
            raise SystemExit(f"{place}: another npllm was imported")
    runs = [[] for _ in children]
    for _ in range(repeat + 1):
        for seconds, contender in zip(runs, children, strict=True):
            contender.stdin.write("\n")
            contender.stdin.flush()
            seconds.append(json.loads(contender.stdout.readline()))
    click.echo(
        f"| {n_prompt} tokens, then {n_new}; medians of {repeat} "
        "| prefill ms | ratio | decode ms | ratio |\n|---|---|---|---|---|"
    )
    medians = [
        {key: statistics.median(run[key] for run in seconds[1:]) for key in ("prefill", "decode")}
        for seconds in runs
    ]
    for place, median in zip(checkouts, medians, strict=True):
        cells = [
            f"{median[key] * 1e3:.2f} | {median[key] / medians[0][key]:.3f}"
            for key in ("prefill", "decode")
        ]
        click.echo(f"| {place} | {' | '.join(cells)} |")


@main.command()
@click.option("-m", "--model", "path", help="Checkpoint folder. [the default checkpoint]")
@click.option("-n", "--n-new", default=100, show_default=True)
@click.option("-r", "--repeat", default=3, show_default=True)
@click.option(
    "--engines",
    default=",".join(CONTENDERS),
    show_default=True,
    help="Of these, those that are installed run.",
)
@click.option("--json", "as_json", is_flag=True)
def generate(path, n_new, repeat, engines, as_json):
    """Time greedy generation from a 51-token chat prompt, with and without the KV cache."""
    folder = checkpoint_folder(path)
    dtypes = {
        "npllm": None,
        "npllm-cupy": None,
        "transformers": "float32",
        "transformers-cuda": "bfloat16",
    }
    children = {
        name: Child(name, folder, dtypes[name]) for name in engines.split(",") if installed(name)
    }
    if not children:
        raise SystemExit(f"none of {engines} is installed, or there is no device")
    seconds = {(name, cached): [] for name in children for cached in (True, False)}
    texts, peaks = {}, {}
    for contender in children.values():
        contender.measure(n_new=2, use_cache=True)  # warm up
    for _ in range(repeat):
        for cached in (True, False):
            for name, contender in children.items():
                answer = contender.measure(n_new=n_new, use_cache=cached)
                seconds[name, cached].append(answer["seconds"])
                texts[name, cached], peaks[name] = answer["ids"], answer["peak_bytes"]
    show(
        {
            "task": f"{n_new} new tokens after {N_PROMPT}, greedy",
            "repeat": repeat,
            "machine": machine(),
            "versions": {name: contender.version for name, contender in children.items()},
            "peak_bytes": peaks,
            "seconds": {
                f"{name} {'cached' if cached else 'uncached'}": runs
                for (name, cached), runs in seconds.items()
            },
            "same_tokens": len({tuple(ids) for ids in texts.values()}) == 1,
        },
        as_json,
    )


@main.command(hidden=True)
@click.argument("name")
@click.argument("folder")
def engine(name, folder):
    """Serve one contender: a JSON task a line on standard input, a list of seconds on standard
    output.
    """
    kind, _, dtype = name.partition(":")
    contender = contenders.CONTENDERS[kind](folder, dtype)
    rng = np.random.default_rng(0)
    print(json.dumps({"version": contender.version}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        ids = rng.integers(3, 1000, (task["n_batch"], task["n_prompt"] + task["n_new"]))
        contender.reset(task["n_batch"])
        seconds = [timed(contender.feed, ids[:, : task["n_prompt"]])]
        seconds += [
            timed(contender.feed, ids[:, at : at + 1])
            for at in range(task["n_prompt"], ids.shape[1])
        ]
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_memory()}), flush=True)


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


class Engine(Child):
    """A contender behind the `engine` command."""

    def __init__(self, name, folder, threads):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "engine", name, str(folder)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=pinned(threads),
        )
        self.version = self._read()["version"]

    def seconds(self, n_prompt, n_new=0, n_batch=1):
        answer = self.measure(n_prompt=n_prompt, n_new=n_new, n_batch=n_batch)
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"]


@main.command(hidden=True)
def limits():
    """Print the limits of the machine, as measured in a child's environment."""
    print(json.dumps(profile.machine_limits()))


def pinned(threads):
    """The environment of a child: as many threads as asked for, and BLAS free to choose its
    kernels.
    """
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    }
    return kept | dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads)
    )


def machine_limits(threads):
    command = [sys.executable, __file__, "limits"]
    return json.loads(
        subprocess.run(
            command, capture_output=True, text=True, check=True, env=pinned(threads)
        ).stdout
    )


def speed_options(command):
    """Options of the commands that measure engines."""
    for option in (
        click.option("-m", "--model", "path", help="Checkpoint folder. [the default checkpoint]"),
        click.option(
            "--config",
            type=click.Path(exists=True),
            help="Random weights in the shapes of this config.json.",
        ),
        click.option("--layers", type=int, help="With --config: fewer layers than it says."),
        click.option("-t", "--threads", default=len(os.sched_getaffinity(0)), show_default=True),
        click.option("-r", "--repeat", default=3, show_default=True),
        click.option(
            "--json",
            "json_path",
            type=click.Path(),
            help="Write every number into this file as well.",
        ),
    ):
        command = option(command)
    return command


def bench_folder(path, config, layers):
    """The checkpoint to measure: given, or with random weights."""
    if config is None:
        return checkpoint_folder(path)
    folder = (
        weights_folder()
        / f"bench-{os.path.basename(config).removesuffix('.json')}-{layers or 'all'}-layers"
    )
    if not (folder / "config.json").exists():
        from make_random_checkpoint import write_checkpoint

        write_checkpoint(read_json(config), folder, layers=layers)
    return folder


ENGINES = (
    "npllm:bfloat16",
    "npllm:float16",
    "npllm:float32",
    "npllm:int8",
    "npllm:int8+int16",
    "npllm:int8+int8",
    "npllm:bfloat16/tiled",
    "transformers:bfloat16",
    "transformers:float16",
    "transformers:float32",
    "llama.cpp:bfloat16",
    "llama.cpp:float16",
    "llama.cpp:float32",
    "llama.cpp:int8",
)
GGUF_ENGINES = "npllm:as stored", "llama.cpp:as stored"


@main.command()
@speed_options
@click.option(
    "--engines",
    help=f"Of a folder, or of --config: engine:dtype, which may be a type of GGUF files such as "
    f"q4_0, or npllm:dtype+activations; {','.join(ENGINES)}. "
    f"Of a GGUF file: {','.join(GGUF_ENGINES)}.",
)
@click.option("--prompts", default="256,1024", show_default=True)
@click.option("-n", "--n-new", default=16, show_default=True)
def speed(path, config, layers, threads, repeat, json_path, engines, prompts, n_new):
    """Time prefill and decoding of every engine that is installed, on the same weights and ids, in
    turns.
    """
    folder = bench_folder(path, config, layers)
    if engines is None:
        engines = ",".join(GGUF_ENGINES if folder.suffix == ".gguf" else ENGINES)
    names = [name for name in engines.split(",") if contenders.installed(name.partition(":")[0])]
    running = {name: Engine(name, folder, threads) for name in names}
    tasks = {f"prefill {n}": (int(n), 0) for n in prompts.split(",")} | {"decode": (64, n_new)}
    seconds = {name: {task: [] for task in tasks} for name in names}
    for engine_ in running.values():
        engine_.seconds(32, 2)  # warm up
    limits = []
    for _ in range(repeat):
        limits.append(machine_limits(threads))
        for task, (n_prompt, n_more) in tasks.items():
            for name, engine_ in running.items():
                times = engine_.seconds(n_prompt, n_more)
                seconds[name][task].append(statistics.median(times[1:]) if n_more else times[0])
    result = {
        "folder": folder.name,
        "parameters": matrix_parameters(folder),
        "bytes": {name: bytes_of_token(folder, name.partition(":")[2]) for name in names},
        "repeat": repeat,
        "threads": threads,
        "seconds": seconds,
        "versions": {name: engine_.version for name, engine_ in running.items()},
        "machine": machine(),
        "peak_bytes": {name: engine_.peak_bytes for name, engine_ in running.items()},
    }
    for engine_ in running.values():
        engine_.process.terminate()
    result["limits"] = best_limits(limits)
    write_json(json_path, result)
    click.echo("\n".join(speed_table(result)))


def best_limits(runs):
    """The limits of a machine that changes while it is measured: the best of all probes, of all
    rounds.
    """
    probes = {
        kind: {name: max(run[kind][name] for run in runs) for name in runs[0][kind]}
        for kind in ("read_probes", "sgemm")
    }
    return {
        "read": max(probes["read_probes"].values()),
        "flops": max(probes["sgemm"].values()),
        **probes,
    }


def matrix_parameters(folder):
    """Entries of the matrices that a token passes: of the layers, and of lm_head, which prefill
    uses for one row only.
    """
    if folder.suffix == ".gguf":
        config = npllm.load(folder).config
    else:
        config = npllm.Config.from_json(folder)
    shapes = expected_shapes(config)
    layers = sum(
        prod(shape) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2
    )
    return {"layers": layers, "lm_head": config.vocab_size * config.hidden_size}


BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "int8": 1 + 1 / 16,
}  # of a weight; int8 with the scale of its group


def bytes_of_token(folder, dtype):
    """Bytes of the matrices that a token passes."""
    dtype = dtype.partition("/")[0].partition("+")[0]
    if dtype in BYTES:
        return BYTES[dtype] * sum(matrix_parameters(folder).values())
    params = npllm.load(contenders.gguf_file(folder, dtype)).params
    matrices = [x for layer in params.layers for x in layer if x is not None and x.ndim == 2]
    return sum(x.nbytes for x in (*matrices, params.lm_head))


def speed_table(result):
    """Lines of a Markdown table: medians, the share of the machine's limit, and how npllm
    compares, in bfloat16 where that is measured.
    """
    n_read, n_layers = sum(result["parameters"].values()), result["parameters"]["layers"]
    read, sgemm = result["limits"]["read"], result["limits"]["flops"]
    medians = {
        name: {task: statistics.median(runs) for task, runs in tasks.items()}
        for name, tasks in result["seconds"].items()
    }
    tasks = [task for task in next(iter(medians.values())) if task != "decode"]
    facts, blas = result["machine"], result["machine"]["blas"]
    yield (
        f"{result['folder']}, {n_read / 1e6:.0f}e6 parameters read per token; {facts['cpu']}, "
        f"{result['threads']} threads, BLAS {blas['name']} {blas['version']} "
        f"({blas['kernels']} kernels); medians of {result['repeat']} alternating runs; limits: "
        f"{read / 1e9:.1f} GB/s read, {sgemm / 1e9:.0f} GFLOP/s float32 matrix product\n"
    )
    columns = " | ".join(f"{task}, tok/s | of the limit" for task in tasks)
    yield f"| engine | decode, ms/token | GB/s | of the limit | {columns} |"
    yield "|---" * (4 + 2 * len(tasks)) + "|"
    for name, row in medians.items():
        rate = result["bytes"][name] / row["decode"]
        cells = [name, f"{row['decode'] * 1e3:.1f}", f"{rate / 1e9:.1f}", f"{rate / read:.0%}"]
        for task in tasks:
            n = int(task.split()[1])
            cells += [f"{n / row[task]:.0f}", f"{2 * n_layers * n / row[task] / sgemm:.0%}"]
        yield "| " + " | ".join(cells) + " |"
    npllm_names = [name for name in medians if name.startswith("npllm:")]
    first = "npllm:bfloat16" if "npllm:bfloat16" in npllm_names else next(iter(npllm_names), "")
    ours = medians.get(first)
    for name, row in medians.items() if ours else ():
        if not name.startswith(first):
            ratios = ", ".join(
                f"{row[task] / ours[task]:.2f} times as fast in {task}" for task in row
            )
            yield f"\n{name}: {first} is {ratios}"


@main.command()
@speed_options
@click.option("--contexts", default="128,1024,4096", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
def context(path, config, layers, threads, repeat, json_path, contexts, dtype):
    """Time one token more by the length of the context, beside what its keys and values take to
    read.
    """
    folder = bench_folder(path, config, layers)
    engine_, settings = Engine(f"npllm:{dtype}", folder, threads), npllm.Config.from_json(folder)
    engine_.seconds(32, 2)
    rows = {n: step_seconds(engine_, repeat, n, 8) for n in map(int, contexts.split(","))}
    read, first = machine_limits(threads)["read"], min(rows)
    per_key = 8 * settings.num_key_value_heads * settings.head_dim * settings.num_hidden_layers
    write_json(
        json_path,
        {
            "folder": folder.name,
            "seconds": rows,
            "read": read,
            "bytes_per_key": per_key,
            "machine": machine(),
        },
    )
    click.echo(
        f"{folder.name}, {per_key} bytes of keys and values for each visible token; "
        f"{read / 1e9:.1f} GB/s; {cpu_name()}\n"
    )
    click.echo(
        "| context | ms/token | more than at the first | of which reading takes at the limit |\n"
        "|---|---|---|---|"
    )
    for n, value in rows.items():
        seen = min(n, settings.sliding_window or n) - min(first, settings.sliding_window or first)
        click.echo(
            f"| {n} | {value * 1e3:.2f} | {(value - rows[first]) * 1e3:.2f} "
            f"| {seen * per_key / read * 1e3:.2f} |"
        )


@main.command()
@speed_options
@click.option("--batches", default="1,2,4,8,16", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
def batch(path, config, layers, threads, repeat, json_path, batches, dtype):
    """Time decoding of several sequences at once, which share one read of the weights."""
    folder = bench_folder(path, config, layers)
    engine_ = Engine(f"npllm:{dtype}", folder, threads)
    engine_.seconds(32, 2)
    rows = {b: step_seconds(engine_, repeat, 32, 8, b) for b in map(int, batches.split(","))}
    write_json(json_path, {"folder": folder.name, "seconds": rows, "machine": machine()})
    click.echo(f"{folder.name}, {dtype}; {cpu_name()}, {threads} threads\n")
    click.echo("| sequences | ms/step | tokens/s | of one |\n|---|---|---|---|")
    for b, value in rows.items():
        click.echo(f"| {b} | {value * 1e3:.1f} | {b / value:.1f} | {b * rows[1] / value:.2f} |")


def step_seconds(engine_, repeat, *sizes):
    """Median time of one step of decoding, over several runs."""
    return statistics.median(statistics.median(engine_.seconds(*sizes)[1:]) for _ in range(repeat))


def write_json(path, result):
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


@main.command(hidden=True)
@click.argument("name")
@click.argument("sizes", type=int, nargs=4)
@click.argument("repeat", type=int)
def attend(name, sizes, repeat):
    """Run one kind of attention; print its seconds, and by how much memory grew."""
    run = attention_variant(name, *sizes)
    before, seconds = peak_memory(), []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(seconds), "bytes": peak_memory() - before}))


@main.command()
@click.option("--longest", default=32768, show_default=True)
@click.option("--n-head", default=2, show_default=True)
@click.option("--d-head", default=64, show_default=True)
@click.option("--window", default=2047, show_default=True)
@click.option(
    "--most",
    default=4.0,
    show_default=True,
    help="GiB of scores beyond which the definition is left out.",
)
@click.option("-r", "--repeat", default=3, show_default=True)
@click.option("--plot", type=click.Path(), help="Draw the table into this PNG.")
def attention(longest, n_head, d_head, window, most, repeat, plot):
    """Time causal self-attention in float32 by length, each kind and length in a process of its
    own.
    """
    names = ["definition", "flash 1", "flash 2", f"window {window}"] + ["torch"] * installed(
        "transformers"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    lengths = [n for n in (2**e for e in range(10, 31)) if n <= longest]
    rows = {name: {} for name in names}
    for n, name in ((n, name) for n in lengths for name in names):
        if name == "definition" and 4 * n_head * n * n > most * 2**30:
            continue
        sizes = map(str, (n, n_head, d_head, window))
        command = [
            sys.executable,
            __file__,
            "attend",
            name,
            *sizes,
            str(repeat if n < 16384 else 1),
        ]
        rows[name][n] = json.loads(
            subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            ).stdout
        )
    click.echo(
        f"causal attention, float32, {n_head} heads of {d_head}; "
        f"median seconds / MiB beyond the inputs; {cpu_name()}\n"
    )
    click.echo("| n | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for n in lengths:
        found = [rows[name].get(n) for name in names]
        cells = [
            f"{cell['seconds']:.3f} s / {cell['bytes'] / 2**20:.0f}" if cell else "-"
            for cell in found
        ]
        click.echo(f"| {n:,} | " + " | ".join(cells) + " |")
    if plot:
        draw_attention(plot, rows)


def draw_attention(path, rows):
    """Seconds and memory by length, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2))
    for number, (key, label, unit) in enumerate(
        (("seconds", "seconds", 1), ("bytes", "MiB beyond the inputs", 2**20)), 1
    ):
        axes = figure.add_subplot(1, 2, number)
        for name, cells in rows.items():
            axes.plot(
                list(cells),
                [max(cell[key] / unit, 1e-3) for cell in cells.values()],
                marker="o",
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("n")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def show(result, as_json):
    """Print the result as JSON, or as a Markdown table."""
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    medians = {name: statistics.median(runs) for name, runs in result["seconds"].items()}
    facts = result["machine"]
    click.echo(
        f"{result['task']}; median of {result['repeat']} alternating runs; {facts['cpu']}, "
        f"{facts['cores']} cores, BLAS {facts['blas']}, "
        f"same tokens from all: {result['same_tokens']}\n"
    )
    click.echo("| | seconds | min ... max | of transformers | peak MB |\n|---|---|---|---|---|")
    for name, median in medians.items():
        peer = medians.get("transformers " + name.split()[1])
        ratio = f"{median / peer:.2f}" if peer else "-"
        runs = result["seconds"][name]
        click.echo(
            f"| {name} | {median:.2f} | {min(runs):.2f} ... {max(runs):.2f} | {ratio} "
            f"| {result['peak_bytes'][name.split()[0]] / 1e6:.0f} |"
        )


main.add_command(bench_lookup.lookup)
main.add_command(bench_contention.contention)
main.add_command(bench_serve.serve)

if __name__ == "__main__":
    main()
