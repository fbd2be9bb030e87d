"""Self-configuring self-supervised pretraining for nnU-Net.

The commands are functions with short names, here and in notebooks::

    import nnssl

    nnssl.plan_and_preprocess(501, nnssl.PlanSettings(preset="cpu"))
    weights = nnssl.pretrain("pix2rep", 501)
    pretrained, scratch = nnssl.finetune(4, weights, nnssl.FinetuneSettings(labels=5, scratch=True))

``import nnssl`` imports nothing heavy: a name is imported when it is used first. In a script, calls belong below
``if __name__ == "__main__":``, because worker processes import the script again.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nnssl.version import __version__

if TYPE_CHECKING:
    from nnssl.errors import UserError as UserError
    from nnssl.evaluation.classify import ClassifySettings as ClassifySettings
    from nnssl.evaluation.classify import classify as classify
    from nnssl.evaluation.evaluate import evaluate as evaluate
    from nnssl.imports.dataset import import_dataset as import_dataset
    from nnssl.methods import METHODS as METHODS
    from nnssl.paths import Folders as Folders
    from nnssl.paths import resolve_folders as resolve_folders
    from nnssl.plan import Plan as Plan
    from nnssl.plan import read_plan as read_plan
    from nnssl.propagation.propagate import PropagateSettings as PropagateSettings
    from nnssl.propagation.propagate import propagate as propagate
    from nnssl.study.select import SelectSettings as SelectSettings
    from nnssl.study.select import select as select
    from nnssl.weights.export import export as export
    from nnssl.weights.export_settings import ExportSettings as ExportSettings
    from planners.plan_and_preprocess import plan_and_preprocess as plan_and_preprocess
    from planners.settings import PlanSettings as PlanSettings
    from trainers.benchmark.benchmark import benchmark as benchmark
    from trainers.benchmark.benchmark import preview as preview
    from trainers.benchmark.settings import StudySettings as StudySettings
    from trainers.finetuning.finetune import finetune as finetune
    from trainers.finetuning.segment import segment as segment
    from trainers.finetuning.settings import FinetuneSettings as FinetuneSettings
    from trainers.pretraining.pretrain import pretrain as pretrain
    from trainers.pretraining.settings import PretrainSettings as PretrainSettings

_MODULES = {
    "ClassifySettings": "nnssl.evaluation.classify",
    "ExportSettings": "nnssl.weights.export_settings",
    "FinetuneSettings": "trainers.finetuning.settings",
    "Folders": "nnssl.paths",
    "METHODS": "nnssl.methods",
    "Plan": "nnssl.plan",
    "PlanSettings": "planners.settings",
    "PretrainSettings": "trainers.pretraining.settings",
    "PropagateSettings": "nnssl.propagation.propagate",
    "SelectSettings": "nnssl.study.select",
    "StudySettings": "trainers.benchmark.settings",
    "UserError": "nnssl.errors",
    "benchmark": "trainers.benchmark.benchmark",
    "classify": "nnssl.evaluation.classify",
    "evaluate": "nnssl.evaluation.evaluate",
    "export": "nnssl.weights.export",
    "finetune": "trainers.finetuning.finetune",
    "import_dataset": "nnssl.imports.dataset",
    "plan_and_preprocess": "planners.plan_and_preprocess",
    "pretrain": "trainers.pretraining.pretrain",
    "preview": "trainers.benchmark.benchmark",
    "propagate": "nnssl.propagation.propagate",
    "read_plan": "nnssl.plan",
    "resolve_folders": "nnssl.paths",
    "select": "nnssl.study.select",
    "segment": "trainers.finetuning.segment",
}
"""The module of every public name."""

__all__ = ["__version__", *_MODULES]  # noqa: PLE0604  the names of a dictionary are strings


def __getattr__(name: str) -> Any:
    """Import a public name when it is used first."""
    if name not in _MODULES:
        raise AttributeError(f"module 'nnssl' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, for completion."""
    return sorted({*globals(), *_MODULES})
