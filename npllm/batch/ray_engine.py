"""The same on a Ray cluster: actors that load the model once, each batch a shard on disk."""

from collections.abc import Callable
from typing import Any

from npllm.batch.answers import answers
from npllm.batch.results import Results
from npllm.batch.settings import difference
from npllm.batch.tasks import Item, Task, make_task
from npllm.checkpoints.extras import import_extra

__all__ = ["ray_runner"]


class Worker:
    """An actor: loads the model once, and answers batches of items.

    Parameters
    ----------
    load : function () -> Model or Encoder
    name : str
        Of the task.
    options : dict
    out : Path
        The output file; its folder is the same on every machine.
    settings : dict
        `Task.settings` of the process that asks.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        name: str,
        options: dict[str, Any],
        out: Any,
        settings: dict[str, Any],
    ):
        self._task = make_task(name, load(), **options)
        self._results = Results(out)
        self._others = difference(settings, self._task.settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer a batch and write its answers to a shard; return what failed."""
        pairs = zip(batch["key"], batch["ids"], strict=True)
        items = [Item(str(key), [int(i) for i in ids]) for key, ids in pairs]
        if self._others:
            problem = (
                "a worker has another model than the one that was given to batch: "
                f"{', '.join(self._others)} differ; let load return the same one everywhere"
            )
            return {"key": [item.key for item in items], "error": [problem] * len(items)}
        found = dict(answers(self._task, items))
        errors = [found[item.key].get("error", "") for item in items]
        good = {key: answer for key, answer in found.items() if "error" not in answer}
        self._results.add_shard(good.items())
        return {"key": [item.key for item in items], "error": errors}


def ray_runner(
    load: Callable[[], Any], *, n_workers: int = 1, batch_size: int = 64, n_cpus: float = 1
) -> Callable[..., None]:
    """Make a runner for `npllm.batch.run.batch` that answers on Ray Data.

    Parameters
    ----------
    load : function () -> Model or Encoder
        Is called once in each worker; must be picklable.  Where it gives another model than that of
        `batch` (by `npllm.batch.settings`), the worker's rows fail, with an error that says so.
    n_workers : int
        Actors.
    batch_size : int
        Rows of a shard; what is lost, and done again, where a worker is killed.
    n_cpus : float
        Cores that Ray reserves for an actor.

    Returns
    -------
    run : function

    Raises
    ------
    MissingExtraError
        When Ray is not installed.
    """
    ray = import_extra("ray", "npllm batch --engine ray", "ray")
    data = import_extra("ray.data", "npllm batch --engine ray", "ray")

    def run(task: Task, items: list[Item], results: Results, advance: Callable[..., None]) -> None:
        if not items:
            return
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        asked = task.name, task.options, results.out.absolute(), task.settings
        ordered = sorted(items, key=lambda item: -len(item.ids))
        rows = data.from_items([{"key": item.key, "ids": item.ids} for item in ordered])
        done = rows.map_batches(
            Worker,
            fn_constructor_args=(load, *asked),
            batch_size=batch_size,
            batch_format="numpy",
            compute=data.ActorPoolStrategy(size=n_workers),
            num_cpus=n_cpus,
        )
        failed = {}
        for row in done.iter_rows():
            advance(1)
            if row["error"]:
                failed[row["key"]] = {"error": row["error"]}
        results.read_shards()
        results.found.update(failed)

    return run
