"""`evaluate`: lm-eval's runner on a model."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npllm.arguments import check_path
from npllm.errors import MissingExtraError, NpllmError, NpllmOSError, NpllmValueError, install_extra
from npllm.model import Model

__all__ = ["evaluate", "result_table", "write_results"]


def evaluate(
    model: Model,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    batch_size: int = 8,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on tasks of lm-eval.

    Parameters
    ----------
    model : Model
    tasks : sequence of str
        Names of tasks or groups; files of tasks (task.yaml) as well.
    include_path : str or Path, optional
        A folder of further tasks.
    batch_size : int
        Prompts that are continued at a time.
    **options
        Of `lm_eval.simple_evaluate`: num_fewshot, limit, apply_chat_template, ...

    Returns
    -------
    results : dict
        As `lm_eval.simple_evaluate` returns them.

    Raises
    ------
    MissingExtraError
        When lm-eval is not installed.
    NpllmOSError
        When `include_path` is no folder.
    NpllmValueError
        For a task that lm-eval does not know, or cannot load.
    """
    folder = _folder_of_tasks(include_path)
    lm_eval, harness = _lm_eval(), importlib.import_module("npllm.evaluation.harness")
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=folder)
    wanted = harness.NpllmLM(model, batch_size=batch_size)
    try:
        return lm_eval.simple_evaluate(
            model=wanted, tasks=list(tasks), task_manager=manager, **options
        )
    except NpllmError:
        raise
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        raise NpllmValueError(
            f"lm-eval cannot run {', '.join(tasks)}: {str(error)[:500]}"
        ) from error


def _folder_of_tasks(include_path: Any) -> str | None:
    """The folder of further tasks, which lm-eval takes for an empty one where it is missing."""
    if include_path is None:
        return None
    folder = check_path("include_path", include_path)
    if not folder.is_dir():
        raise NpllmOSError(f"include_path must be a folder with tasks, but {folder} is none")
    return str(folder)


def _lm_eval() -> Any:
    """The package lm-eval, with `simple_evaluate`."""
    try:
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise MissingExtraError(
            f"evaluation needs lm-eval, which cannot be imported ({error}); {install_extra('eval')}"
        ) from None


def result_table(results: dict[str, Any]) -> str:
    """Write results as lm-eval's table."""
    make_table = importlib.import_module("lm_eval.utils").make_table
    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n".join([make_table(results), *groups])


def write_results(results: dict[str, Any], path: str | Path) -> Path:
    """Write results as JSON: to a file that ends with .json, else to results.json in a folder."""
    target = check_path("output_path", path)
    target = target if target.suffix == ".json" else target / "results.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(as_json(results), encoding="utf-8")
    except OSError as error:
        raise NpllmOSError(f"{target}: cannot be written ({error.strerror or error})") from None
    return target


def as_json(results: dict[str, Any]) -> str:
    """Results as JSON; what JSON has no form for is written as its text."""
    return json.dumps(results, indent=2, default=str, ensure_ascii=False)
