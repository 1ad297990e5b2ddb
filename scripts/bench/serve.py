"""`scripts/bench.py serve`: tokens/s of a server at 1, 4 and 16 clients, beside llama-cpp-python's.

Each server is a process of its own, on loopback, with the same GGUF file where both run.  Every
client sends one completion after another, of a prompt of its own.  llama-cpp-python's server holds
a lock around its model: it answers one request at a time and does not batch.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from npllm.loading import checkpoint_folder

N_PROMPT = 51
READY = 120.0  # seconds for a server to start


@contextlib.contextmanager
def server(words: list[str]) -> Iterator[str]:
    """Run a server, whose port is appended to the command; its URL.

    Raises
    ------
    RuntimeError
        When it ends before it is ready: names its exit code.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {name: x for name, x in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    command = [sys.executable, *words, "--port", str(port)]
    process = subprocess.Popen(
        command, env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        wait_until_ready(process, url)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(process: subprocess.Popen, url: str) -> None:
    """Wait for the list of models."""
    import httpx  # here, so that the other measurements need none

    end = time.monotonic() + READY
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"ended with exit code {process.returncode}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/models").status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"was not ready after {READY:g} s")


async def rate(url: str, n_clients: int, n_new: int, n_each: int) -> float:
    """Tokens/s of all clients together, prompts not counted."""
    import httpx

    async with httpx.AsyncClient(timeout=600) as http:
        model = (await http.get(f"{url}/models")).json()["data"][0]["id"]

        async def ask(client: int) -> int:
            n = 0
            for turn in range(n_each):
                words = " ".join(str(client * 1000 + turn * 37 + i) for i in range(N_PROMPT // 4))
                body = {"model": model, "prompt": words, "max_tokens": n_new, "temperature": 0}
                answer = await http.post(f"{url}/completions", json=body)
                n += answer.raise_for_status().json()["usage"]["completion_tokens"]
            return n

        start = time.perf_counter()
        counts = await asyncio.gather(*map(ask, range(n_clients)))
        return sum(counts) / (time.perf_counter() - start)


def measure(words: list[str], clients: list[int], n_new: int, n_each: int) -> dict[str, float]:
    """Rates of a server by the number of clients, after a warm-up."""
    with server(words) as url:
        asyncio.run(rate(url, max(clients), 4, 1))
        return {str(n): asyncio.run(rate(url, n, n_new, n_each)) for n in clients}


@click.command()
@click.option("-m", "--model", "path", help="Folder or GGUF file. [the default checkpoint]")
@click.option("--clients", default="1,4,16", show_default=True)
@click.option("-n", "--n-new", default=48, show_default=True)
@click.option("-r", "--repeat", default=2, show_default=True, help="Requests of each client.")
def serve(path: str | None, clients: str, n_new: int, repeat: int) -> None:
    """Measure tokens/s of servers by the number of clients."""
    import httpx

    file, counts = str(checkpoint_folder(path)), [int(n) for n in clients.split(",")]
    servers = {"npllm": ["-m", "npllm", "serve", "-m", file]}
    if file.endswith(".gguf"):
        own = str(Path(__file__).with_name("llama_server.py"))
        servers["llama-cpp-python"] = [own, "--model", file, "--n_ctx", "2048"]
    facts = {"model": file, "n_new": n_new, "tokens_per_second": {}}
    for name, words in servers.items():
        try:
            facts["tokens_per_second"][name] = measure(words, counts, n_new, repeat)
        except (RuntimeError, httpx.HTTPError) as error:
            facts["tokens_per_second"][name] = f"{type(error).__name__}: {error}"
    click.echo(json.dumps(facts, indent=2))
