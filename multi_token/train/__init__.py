"""Training: a recipe -> a trained run folder.

    prepare.py      model, rows, caches -> Run        (consumed by run.py and plan/run_plan.py)
    stage.py        Run, stage -> trainer -> result
    trainer.py      transformers' Trainer with an Objective and a BatchPlan

This package decides no order of rows (data/), and computes no score of a trained model (evaluate/).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multi_token.train.plan.run_plan import plan_run
    from multi_token.train.run import train

_HOMES = {"plan_run": "multi_token.train.plan.run_plan", "train": "multi_token.train.run"}

__all__ = ["plan_run", "train"]


def __getattr__(name: str) -> Any:
    """Import public names when asked for: the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'multi_token.train' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _CallablePackage(ModuleType):
    """This package as a module that can be called: `multi_token.train(recipe)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `multi_token.train.run.train`."""
        return import_module("multi_token.train.run").train(*args, **kwargs)


# `from multi_token import train` must give the function, but importing any module of this package
# binds `multi_token.train` to the package, in whatever order imports happen. So the package itself
# is callable. A data descriptor on `multi_token` would break `import multi_token.train.run as run`.
sys.modules[__name__].__class__ = _CallablePackage
