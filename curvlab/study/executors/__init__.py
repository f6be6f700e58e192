"""Executors by name: where the cells of a run are measured.

--executor local                                            processes of this machine
--executor ray --executor-options address=auto              a Ray cluster
--executor slurm --executor-options partition=gpu time=60   Slurm
--executor dask.distributed:Client                          anything with ``submit``, or what makes it
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

from curvlab.study.executors.interface import Executor, Future, Lost, Machines
from curvlab.study.executors.local import Local
from curvlab.study.executors.ray_tasks import Ray
from curvlab.study.executors.slurm_jobs import Slurm
from curvlab.study.executors.submitting import Submitted
from curvlab.study.faults import UsageError
from curvlab.tools.registry import Registry

__all__ = ["EXECUTORS", "Executor", "Future", "Lost", "Machines", "machines"]

EXECUTORS: Registry[Callable[..., Executor | Machines] | Executor] = Registry(
    "executor",
    "curvlab.executors",
    {"local": Local, "ray": Ray, "slurm": Slurm},
    form="a class or function that returns an object with submit",
    fits=lambda thing: callable(thing) or hasattr(thing, "submit"),
)
"""What ``--executor`` names; a package adds to it by an entry point of the group ``curvlab.executors``."""


def machines(name: str, settings: Mapping[str, Any]) -> Machines:
    """The machines that an executor and its settings stand for.

    Raises:
        UsageError: a setting that it does not have, or a package that it needs.
        UnknownName: no executor has this name.
        BrokenPlugin: its module cannot be imported.
    """
    thing = EXECUTORS[name]
    if not isinstance(thing, type) and isinstance(thing, Executor):
        if settings:
            raise UsageError(f"--executor {name} is there already, and takes no --executor-options")
        return Submitted(name, thing)

    def make() -> Executor | Machines:
        try:
            return cast("Callable[..., Executor | Machines]", thing)(**settings)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--executor {name} cannot be started with these --executor-options: {error}") from error

    made = make()
    if isinstance(made, Machines):
        return made
    if not isinstance(made, Executor):
        raise UsageError(f"--executor {name} gives {type(made).__name__}, which has no submit")
    return Submitted(name, made, cast("Callable[[], Executor]", make))
