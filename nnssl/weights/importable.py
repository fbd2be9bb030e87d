"""Which classes a file of weights may have imported: plans name the class of a network and of its layers."""

import pydoc
from pathlib import Path
from typing import Any

from torch import nn

from nnssl.checkpoint import ACCEPTED
from nnssl.errors import UserError

NETWORKS = ("dynamic_network_architectures.", "nnssl.networks.")
"""Packages whose networks are built."""

LAYERS = ("torch.nn.", "dynamic_network_architectures.")
"""Packages whose layers a plan may name."""


def check_plans(path: Path, plans: dict[str, Any]) -> None:
    """Check the architectures of all configurations of a plan that comes with a file.

    Raises:
        UserError: As ``check_architecture``.
    """
    for configuration in plans.get("configurations", {}).values():
        if isinstance(configuration, dict) and "architecture" in configuration:
            check_architecture(path, configuration["architecture"])


def check_architecture(path: Path, architecture: Any) -> None:
    """Check that building an architecture imports nothing but networks and layers of nnU-Net, nnssl and torch.

    Args:
        path: File that names the architecture.
        architecture: As in a plan: ``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import``.

    Raises:
        UserError: If a class is anything else, or the architecture is incomplete.
    """
    try:
        name = str(architecture["network_class_name"])
        arguments = architecture["arch_kwargs"]
        layers = [arguments[key] for key in architecture["_kw_requires_import"] if arguments.get(key) is not None]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: its plans describe no network ({error!r}); {ACCEPTED}") from error
    for each, packages in ((name, NETWORKS), *((str(layer), LAYERS) for layer in layers)):
        if not _is_module_of(each, packages):
            raise UserError(
                f"{path}: was trained with {each}, which is not a network or layer of "
                f"{' or '.join(package.rstrip('.') for package in packages)}, from which alone it may come, because a file must "
                f"not choose what is imported; {ACCEPTED}"
            )


def _is_module_of(name: str, packages: tuple[str, ...]) -> bool:
    """Return whether a dotted name is that of a class of torch modules which one of the packages defines."""
    if not name.startswith(packages):
        return False
    found = pydoc.locate(name)
    return isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(packages)
