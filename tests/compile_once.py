"""Workers of pytest-xdist compile each kernel once: whoever comes second waits, and loads the code."""

import contextlib
import hashlib
import time
from pathlib import Path

LONGEST_WAIT = (
    60.0  # seconds; a kernel takes up to ten, and one that does not compile frees no lock
)
PLACE = Path(__file__).parent / "__pycache__" / "compiling"  # one file for each lock


def share_compilations():
    """Let `DiskCache` lock what it does not find until it has been compiled and written."""
    try:
        import fcntl

        from npllm.kernels.cpu.numba_internals import DiskCache
    except ImportError:  # no such locks here, or no Numba
        return
    make, load, save = DiskCache.__init__, DiskCache.load_overload, DiskCache.save_overload
    held = {}
    PLACE.mkdir(parents=True, exist_ok=True)

    def __init__(self, function):
        make(self, function)
        self.function = f"{function.__module__}.{function.__qualname__}"

    def key_of(self, signature):
        text = f"{self.cache_path} {self.function} {signature}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def load_overload(self, signature, context):
        found, key = load(self, signature, context), key_of(self, signature)
        if found is not None or key in held:
            return found
        held[key] = open(PLACE / key, "w")
        until = time.monotonic() + LONGEST_WAIT
        while time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(held[key], fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        found = load(self, signature, context)
        if found is not None:
            held.pop(key).close()
        return found

    def save_overload(self, signature, data):
        save(self, signature, data)
        key = key_of(self, signature)
        if key in held:
            held.pop(key).close()

    DiskCache.__init__ = __init__
    DiskCache.load_overload, DiskCache.save_overload = load_overload, save_overload
