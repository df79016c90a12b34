"""The tasks of lm-evaluation-harness (`lm_eval`, github.com/EleutherAI/lm-evaluation-harness) for whatever we measure.

lm_eval asks and judges; `scorer.py` answers in the target's own runtime, and `model.py` stands between the two.
`tasks/` holds task files for data sets that a user has as they were published, and `data.py` reads these; they ask as
lm_eval's own tasks of the same names do.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.tokenizer_files import reason
from tpvc.compiler.progress import Progress, silent

TASKS = Path(__file__).with_name("tasks")
"""The task files for data in a folder: what lm_eval calls an include path."""

RANDOM_SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234
"""Those of lm_eval's own command line, so that the same examples are asked."""


def check_lm_eval() -> None:
    """TpvcError where it is not installed."""
    if find_spec("lm_eval") is None:
        raise TpvcError(
            "lm-evaluation-harness, which knows the tasks, is not installed; install it with: "
            "pip install 'tpvc[harness]'"
        )


def evaluate_tasks(
    target: str | Path,
    tasks: Sequence[str],
    *,
    task_data: str | Path | None = None,
    limit: int | None = None,
    against: str | Path | None = None,
    threads: int | None = None,
    adapter: str | None = None,
    task: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What `target` scores in tasks of lm_eval; `target`, `against`, `adapter` and `task` are those of tpvc.measure.

    tasks      names of tasks or groups, or task files (.yaml) in lm_eval's format, which may run code
    task_data  a folder: names are those in TASKS then, whose data is read from it and from nowhere else. Without one
               they are lm_eval's own, whose data its `datasets` fetches or has
    limit      only the first so many examples of every task

    {"target", "scores": [{"task", "metric", "filter", "value", "stderr", "examples"}], "cut"}, what else was given by
    its name, and with an original "against": {"target", "scores", "cut"}, its scores in the same order. The standard
    error is lm_eval's, over examples; nan where it has none. cut: questions that were too long for the model's context
    and lost their beginning. TpvcError without lm_eval, for what cannot be loaded, and for what a target cannot do.
    """
    check_lm_eval()
    if not tasks or (limit is not None and limit < 1):
        raise TpvcError(f"{len(tasks)} tasks and a limit of {limit} were given; expected at least 1 of each")
    with _quiet():
        found = _scores(tasks, task_data, limit, progress, str(target), adapter, task, threads)
        if against is not None:
            found["against"] = _scores(tasks, task_data, limit, progress, str(against), None, None, threads)
    given = {"limit": limit, "task_data": task_data and str(task_data), "adapter": adapter, "task": task}
    return {**{key: value for key, value in given.items() if value is not None}, **found}


def _scores(
    tasks: Sequence[str],
    task_data: str | Path | None,
    limit: int | None,
    progress: Progress,
    target: str,
    *chosen: Any,
) -> dict[str, Any]:
    """{"target", "scores", "cut"} of one target. The tasks come first: it is their data that most often is missing."""
    import numpy
    from lm_eval.evaluator import evaluate

    from tpvc.compiler.harness.model import TpvcLM

    random.seed(RANDOM_SEED)  # some tasks shuffle choices with these when they are loaded, and when they are asked
    numpy.random.seed(NUMPY_SEED)
    loaded = _load(tasks, task_data)
    for one in loaded["tasks"].values():
        one.set_fewshot_seed(FEWSHOT_SEED)
    model = TpvcLM(target, *chosen, progress=progress)
    found = evaluate(model, loaded, limit=limit, log_samples=False)
    scores = []
    for name, values in found["results"].items():
        examples = found["n-samples"].get(name, {}).get("effective")  # a group has none
        for key, value in values.items():
            metric, _, way = key.partition(",")
            if way and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{way}")
                error = float(error) if isinstance(error, int | float) else math.nan
                row = {"task": name, "metric": metric, "filter": way, "value": float(value), "stderr": error}
                scores.append({**row, "examples": examples})
    return {"target": target, "scores": scores, "cut": model.cut}


def _load(tasks: Sequence[str], task_data: str | Path | None) -> Any:
    """lm_eval's tasks and groups with their data. TpvcError for what there is not."""
    from lm_eval.tasks import TaskManager

    if task_data is None:
        manager = TaskManager()
        known = "`lm_eval ls tasks` lists them, and --task-data makes it look in a folder"
    elif Path(task_data).is_dir():
        manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"task_data": str(task_data)})
        known = f"with --task-data there are {', '.join(manager.all_tasks)}"
    else:
        raise TpvcError(f"there is no folder {task_data}; expected the one that holds the data of the tasks")
    for name in tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise TpvcError(f"there is neither a task nor a task file '{name}'; {known}")
    try:
        return manager.load(list(tasks))
    except TpvcError:
        raise
    except Exception as error:  # a task's file, its functions, its data: whatever lm_eval and `datasets` raise for them
        raise TpvcError(f"lm_eval cannot load these tasks ({type(error).__name__}: {reason(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval without its remarks."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
