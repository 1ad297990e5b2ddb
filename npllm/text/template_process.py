"""The process that renders chat templates: started once, reused, ended at a limit.

A template is a program from a stranger.  Jinja's sandbox keeps it away from Python's internals, not
from work without end, and no check inside one process can interrupt a single call of Python
(`7**26000000`).  So templates run in a process of their own, which is killed after DEADLINE seconds
of wall-clock time, and whose memory the operating system limits to LARGEST_MEMORY bytes.

On Windows and macOS, where the system offers no such limit, time alone is limited.
"""

import atexit
import importlib.resources
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npllm.errors import MissingExtraError, NpllmOSError, NpllmRuntimeError, NpllmValueError

__all__ = ["Allowance", "TemplateProcess"]

DEADLINE = 5.0  # seconds
LARGEST_MEMORY = 256 * 10**6  # bytes
LARGEST_ANSWER = 2**27  # bytes
LONGEST_START = 60.0  # seconds; the program that starts is ours
OUT_OF_MEMORY = 3  # exit code, as in template_worker


@dataclass
class Allowance:
    """Seconds that renderings may still take together, without the time that they wait."""

    left: float = DEADLINE


class _EndedError(NpllmValueError):
    """The process ended by itself."""


class TemplateProcess:
    """A process that answers one request at a time.

    Whichever way a request ends, the next one finds a process that works: one that was killed, has
    ended, or was interrupted is replaced.  A request at which a process ends that served others
    before is repeated in a new one, so that no result depends on earlier requests.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Any = None

    @property
    def pid(self) -> int | None:
        """The id of the process that answered last; None where there is none."""
        return None if self._process is None else self._process.pid

    def ask(self, request: str, allowance: Allowance) -> dict[str, str]:
        """Send a request and wait for the answer.

        Parameters
        ----------
        request : str
            JSON on one line; see `npllm.text.template_worker`.
        allowance : Allowance
            The time that this takes is subtracted.

        Returns
        -------
        answer : dict

        Raises
        ------
        NpllmValueError
            When it takes too much time or memory.
        MissingExtraError
            When Jinja is not installed.
        NpllmOSError, NpllmRuntimeError
            When no process can be started.
        """
        line = request.encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            if allowance.left <= 0:  # a process with a request is killed a moment later than that
                raise _too_long()
            if self._process is not None:
                try:
                    return self._exchange(line, allowance)
                except _EndedError:
                    pass
            self._start()
            return self._exchange(line, allowance)

    def stop(self, grace: float = 0.0) -> int | None:
        """End the process, where there is one; return its exit code.

        Parameters
        ----------
        grace : float
            Seconds to wait for a process that ends by itself.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        process.stdin.close()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        return process.returncode

    def forget(self) -> None:
        """Leave the process to the parent of this one; for a process that has been forked."""
        if self._process is not None:
            self._process.returncode = 0  # is waited for by the parent
            self._process.stdin.close()
            self._process.stdout.close()
        self.__init__()  # type: ignore[misc]  # the lock may be held by a thread of the parent

    def _start(self) -> None:
        command = _command()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for this process alone
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise NpllmOSError(
                f"cannot start the process that renders chat templates: {command[0]} ({error})"
            ) from None
        try:
            self._exchange(b"", Allowance(LONGEST_START))
        except NpllmValueError as error:
            raise NpllmRuntimeError(
                f"the process that renders chat templates does not start: {command[0]} ({error})"
            ) from None

    def _exchange(self, line: bytes, allowance: Allowance) -> dict[str, str]:
        """Write a request, read its answer; kill the process when the time is over."""
        process, expired = self._process, threading.Event()
        start, seconds = time.monotonic(), max(allowance.left, 0)

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        try:
            timer.start()
            answer = _transfer(line, process.stdin, process.stdout)
        except BaseException:  # Ctrl-C: the answer is not read, and would be taken for the next one
            self.stop()
            raise
        finally:
            timer.cancel()
            timer.join()
            allowance.left -= time.monotonic() - start
        if answer.endswith(b"\n"):
            return json.loads(answer)
        raise self._failure(expired.is_set())

    def _failure(self, expired: bool) -> NpllmValueError:
        """Say why there is no answer."""
        code = self.stop(grace=1)
        if expired:
            return _too_long()
        if code == OUT_OF_MEMORY:
            return _EndedError(
                f"it needs more than the {LARGEST_MEMORY // 10**6} MB of memory that a chat "
                "template may use"
            )
        return _EndedError(f"the process that renders it ended with exit code {code}")


def _too_long() -> NpllmValueError:
    return NpllmValueError(
        f"it takes more than the {DEADLINE:g} seconds that a chat template may take"
    )


def _transfer(line: bytes, stdin: Any, stdout: Any) -> bytes:
    """Write a line and read one; what is read is no whole line where the process has ended.

    The pipes have no buffers: a fork would copy what they hold, and their locks.
    """
    rest, pieces, n_bytes = memoryview(line), [b""], 0
    try:
        while rest:
            rest = rest[stdin.write(rest) :]
        while n_bytes < LARGEST_ANSWER and not pieces[-1].endswith(b"\n"):
            pieces.append(stdout.read(2**16))
            n_bytes += len(pieces[-1])
            if not pieces[-1]:
                break
    except OSError:  # a broken pipe
        return b""
    return b"".join(pieces)


def _command() -> list[str]:
    """The command line of the process: the interpreter of this program, without its site."""
    source = importlib.resources.files(__package__).joinpath("template_worker.py")
    program = f"import sys\nsys.path += {_jinja_path()!a}\n{source.read_text(encoding='utf-8')}"
    return [_interpreter(), "-S", "-P", "-c", program, str(DEADLINE), str(LARGEST_MEMORY)]


def _jinja_path() -> list[str]:
    """Folders that Jinja and what it needs are imported from."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise MissingExtraError(
                f"a chat template needs Jinja, and there is no package {name}; pip install "
                "jinja2, or give the prompt as plain text or token ids"
            ) from ModuleNotFoundError(name=name)
        folders.append(str(Path(spec.origin).parent.parent))
    return folders


def _interpreter() -> str:
    """Path of a Python interpreter; a frozen application has none but what it names itself."""
    from multiprocessing.spawn import get_executable

    executable = os.fsdecode(get_executable() or "")
    frozen = getattr(sys, "frozen", False) and executable == sys.executable
    if frozen or not executable:
        raise NpllmRuntimeError(
            "a chat template is rendered by a Python interpreter in a process of its own, and this "
            f"program has none (sys.executable is {sys.executable!r}); name one with "
            "multiprocessing.set_executable, or give the prompt as plain text or token ids"
        )
    return executable


process = TemplateProcess()
atexit.register(process.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process.forget)
