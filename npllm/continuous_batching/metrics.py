"""Counts of what the server does, in the text form of Prometheus."""

import threading
from collections import Counter
from collections.abc import Mapping

from npllm.continuous_batching.job import Event

__all__ = ["Metrics"]

HELP = {
    "npllm_requests_total": ("counter", "Requests answered, by path and status."),
    "npllm_prompt_tokens_total": ("counter", "Tokens of prompts that were read or reused."),
    "npllm_reused_tokens_total": ("counter", "Tokens of prompts taken from a kept cache."),
    "npllm_generated_tokens_total": ("counter", "Tokens generated."),
    "npllm_steps_total": ("counter", "Decoding steps."),
    "npllm_step_rows_total": ("counter", "Rows of all decoding steps."),
    "npllm_step_seconds_total": ("counter", "Seconds of all decoding steps."),
    "npllm_running": ("gauge", "Sequences at work."),
    "npllm_waiting": ("gauge", "Sequences that wait for a row."),
    "npllm_kept_cache_bytes": ("gauge", "Keys and values kept for later prompts."),
}


class Metrics:
    """Counters that several threads add to."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._seconds, self._n_answers = 0.0, 0

    def add(self, name: str, n: float = 1) -> None:
        """Add to a counter; its name may carry labels."""
        with self._lock:
            self._counts[name] += n  # type: ignore[assignment]

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count an answer of the server."""
        self.add(f'npllm_requests_total{{path="{path}",status="{status}"}}')
        if status == 200 and path.startswith("/v1/"):
            with self._lock:
                self._seconds, self._n_answers = self._seconds + seconds, self._n_answers + 1

    def count_event(self, event: Event, n_prompt: int) -> None:
        """Count the tokens of a job at its end, and each that is generated."""
        self.add("npllm_generated_tokens_total", len(event.tokens))
        if event.finish_reason is not None:
            self.add("npllm_prompt_tokens_total", n_prompt)
            self.add("npllm_reused_tokens_total", event.n_reused)

    def observe_step(self, n_rows: int, seconds: float) -> None:
        """Count a decoding step."""
        self.add("npllm_steps_total")
        self.add("npllm_step_rows_total", n_rows)
        self.add("npllm_step_seconds_total", seconds)

    def mean_seconds(self) -> float:
        """The mean time of an answer so far; 1 where there was none."""
        with self._lock:
            return self._seconds / self._n_answers if self._n_answers else 1.0

    def text(self, gauges: Mapping[str, float]) -> str:
        """Write all counters and the given gauges."""
        with self._lock:
            values = dict(self._counts) | dict(gauges)
        lines = []
        for name, (kind, explanation) in HELP.items():
            lines += [f"# HELP {name} {explanation}", f"# TYPE {name} {kind}"]
            found = {key: x for key, x in values.items() if key.partition("{")[0] == name}
            lines += [
                f"{key} {x:g}"
                for key, x in sorted((found or {name: 0}).items())
                if found or "requests" not in name
            ]
        return "\n".join(lines) + "\n"
