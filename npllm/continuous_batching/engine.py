"""The engine: a thread that alone touches the model, and takes requests in and out between steps.

A step is one token of every row whose prompt was read.  Between two steps at most one piece of a
prompt is read, so that a long prompt does not stop the others.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from npllm.arrays import to_numpy
from npllm.continuous_batching.errors import EndedError, ExpiredError, QueueFullError
from npllm.continuous_batching.job import Event, Job
from npllm.continuous_batching.metrics import Metrics
from npllm.continuous_batching.prefix_cache import KeptCaches, copied_prefix, n_held
from npllm.continuous_batching.running_sequence import Row
from npllm.kernels import FEW_ROWS

__all__ = ["MAX_BATCH", "Engine"]

MAX_BATCH = FEW_ROWS
"""The largest batch in which the bits of a row do not depend on the other rows."""


class Engine:
    """Continuous batching of jobs on one model.

    Parameters
    ----------
    model : Model
    max_batch : int
        Rows of a step, at most MAX_BATCH.
    max_queue : int
        Jobs that may wait for a row.
    cache_bytes : int
        Keys and values of earlier prompts that are kept.
    timeout : float
        Seconds for an answer, for messages.
    metrics : Metrics, optional

    Notes
    -----
    Each row has a cache of its own, so that joining and leaving copy nothing; a step is
    `CausalLM.logits_of_rows`.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch: int = MAX_BATCH,
        max_queue: int = 256,
        cache_bytes: int = 2**30,
        timeout: float = 600,
        metrics: Metrics | None = None,
    ):
        self.model, self.max_batch, self.max_queue = model, max_batch, max_queue
        self.timeout, self.metrics = timeout, metrics or Metrics()
        self.kept = KeptCaches(cache_bytes)
        self._queue: deque[Job] = deque()
        self._rows: list[Row] = []
        self._wake = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="npllm engine", daemon=True)

    def start(self) -> "Engine":
        """Start the thread."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Refuse the waiting and the running jobs, and end the thread."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for rows, all of them or none.

        Raises
        ------
        QueueFullError
            When too many wait already.
        EndedError
        """
        with self._wake:
            if self._is_stopping:
                raise EndedError()
            n_free = self.max_batch - len(self._rows)
            self._queue = deque(job for job in self._queue if not job.is_cancelled)
            n_waiting = len(self._queue) + len(jobs) - n_free
            if n_waiting > self.max_queue:
                raise QueueFullError(len(self._queue), self._seconds_to_wait(n_waiting))
            self._queue.extend(jobs)
            self._wake.notify()

    def gauges(self) -> dict[str, float]:
        """Count the running and the waiting jobs, and the bytes of kept caches."""
        return {
            "npllm_running": len(self._rows),
            "npllm_waiting": len(self._queue),
            "npllm_kept_cache_bytes": self.kept.n_bytes,
        }

    @property
    def n_running(self) -> int:
        """Count the running rows."""
        return len(self._rows)

    @property
    def n_waiting(self) -> int:
        """Count the jobs that wait for a row."""
        return len(self._queue)

    def _seconds_to_wait(self, n_waiting: int) -> int:
        """When to try again: when about half of the queue is done; 1 to 30 s."""
        seconds = self.metrics.mean_seconds() * n_waiting / self.max_batch / 2
        return int(min(max(seconds, 1), 30))

    def _run(self) -> None:
        while self._next_jobs():
            self._drop()
            self._read()
            self._step()
        with self._wake:
            left = [row.job for row in self._rows] + list(self._queue)
            self._rows, self._queue = [], deque()
        for job in left:
            job.deliver(Event(error=EndedError()))

    def _next_jobs(self) -> bool:
        """Wait for work and give free rows to it; False at the end."""
        with self._wake:
            while not (self._rows or self._queue or self._is_stopping):
                self._wake.wait()
            jobs: list[Job] = []
            while self._queue and len(self._rows) + len(jobs) < self.max_batch:
                job = self._queue.popleft()
                if not job.is_cancelled:
                    jobs.append(job)
        for job in jobs:
            try:
                self._rows.append(Row(self.model, job))
            except Exception as error:
                job.deliver(Event(error=error))
        return not self._is_stopping

    def _drop(self) -> None:
        """End what was given up and what took too long, in rows and in the queue."""
        with self._wake:
            late = [job for job in self._queue if job.is_expired]
            gone = (job for job in self._queue if not (job.is_expired or job.is_cancelled))
            self._queue = deque(gone)
        late += [row.job for row in self._rows if row.job.is_expired]
        for job in late:
            job.cancel()
            job.deliver(Event(error=ExpiredError(self.timeout)))
        for row in [row for row in self._rows if row.job.is_cancelled]:
            self._release(row)

    def _read(self) -> None:
        """Read a piece of the prompt that has waited longest."""
        row = next((row for row in self._rows if not row.is_read), None)
        if row is None:
            return
        try:
            if row.can_reuse:
                self._reuse(row)
            event = row.read_piece()
        except Exception as error:
            self._fail(row, error)
            return
        if event is not None:
            self._tell(row, event)

    def _reuse(self, row: Row) -> None:
        """Give a row what a kept cache, or that of another row, holds of its prompt."""
        ids, owner = row.sequences.ids[0], row.cache.owner
        cache, n = self.kept.best(ids, owner)
        for other in self._rows:
            if not other.cache.owner.has_weights_of(owner):
                continue
            n_other = n_held(other.cache, ids, other.n_kept)
            if n_other > n:
                cache, n = other.cache, n_other
        if cache is not None:
            row.begin(copied_prefix(cache, n), n)

    def _step(self) -> None:
        """Compute one token of every row whose prompt was read."""
        rows = [row for row in self._rows if row.is_read]
        if not rows:
            return
        start = time.perf_counter()
        tokens = np.array([row.last_token for row in rows])
        try:
            caches = [row.cache for row in rows]
            logits = to_numpy(self.model.logits_of_rows(tokens, caches))
        except Exception as error:
            for row in rows:
                self._fail(row, error)
            return
        for b, row in enumerate(rows):
            try:
                event = row.take(logits[b : b + 1])
            except Exception as error:
                self._fail(row, error)
                continue
            self._tell(row, event)
        self.metrics.observe_step(len(rows), time.perf_counter() - start)

    def _tell(self, row: Row, event: Event) -> None:
        self.metrics.count_event(event, len(row.job.ids))
        if row.is_done:
            self._release(row)
        row.job.deliver(event)

    def _fail(self, row: Row, error: Exception) -> None:
        self._release(row)
        row.job.deliver(Event(error=error))

    def _release(self, row: Row) -> None:
        """Free a row; keep its cache."""
        self._rows.remove(row)
        self.kept.add(row.cache, row.n_kept)
