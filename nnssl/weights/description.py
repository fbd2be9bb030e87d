"""Description and citations of exported weights for their users."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nnssl.methods import METHODS
from nnssl.version import __version__
from nnssl.weights.nnunet_training import SUPERVISED
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from nnssl.weights.target import TargetNetwork

ELSEWHERE = "elsewhere"
"""Method and data set of weights that were made elsewhere."""

NNSSL_CITATION = "Self-configuring self-supervised pretraining for nnU-Net."


def describe(source: OpenedCheckpoint, target: TargetNetwork, licence: str) -> dict[str, Any]:
    """Return a description of the weights for their users, as JSON-compatible values."""
    made, probe = source.provenance, source.choosing_probe
    pretrained = made is not None and made.method not in (ELSEWHERE, SUPERVISED)
    return {
        "library": f"nnssl {__version__}",
        "method": made.method if made else ELSEWHERE,
        "stage": made.stage if made else ELSEWHERE,
        "steps": made.step if made and pretrained else None,
        "minutes": _minutes(source.content.get("logging")) if pretrained else None,
        "settings": made.settings if made else {},
        "pretraining_data": made.dataset_name if made else ELSEWHERE,
        "pretraining_cases": len(made.cases) if made and made.cases is not None else None,
        "probe_data": probe["dataset_name"] if probe else None,
        "probe_cases": len(probe["train"]) + len(probe["test"]) if probe else None,
        "pretraining": source.pretraining,
        "plans": target.plans["plans_name"],
        "configuration": target.configuration,
        # The plan does not describe the network of a trainer that builds its own.
        "architecture": None if target.trainer else json.loads(json.dumps(target.architecture)),
        "num_inputs": target.num_inputs,
        "num_classes": target.num_classes,
        "channel_names": None if target.channel_names is None else list(target.channel_names),
        "normalization": target.settings["normalization_schemes"],
        "patch_size": list(target.patch_vox),
        "spacing_mm": list(target.spacing_mm),
        "license": licence,
    }


def _minutes(logged: Mapping[str, Sequence[float]] | None) -> float | None:
    """Return the minutes that the epochs of the file's stage took; None for a file without nnU-Net's log, such as an export."""
    if not logged:
        return None
    # A checkpoint inside an epoch has its start, but not its end.
    times = zip(logged["epoch_start_timestamps"], logged["epoch_end_timestamps"], strict=False)
    return round(sum(end - start for start, end in times) / 60, 1)


def citations(source: OpenedCheckpoint) -> list[dict[str, Any]]:
    """Return the citations of the file, the method and nnssl, in the form that nnU-Net prints when training starts."""
    listed = [dict(each) for each in source.citations]
    if source.provenance is not None and source.provenance.method in METHODS:
        method = METHODS[source.provenance.method]
        listed.append({"type": "Method", "name": method.title, "apa_citations": [method.source]})
    listed.append({"type": "Framework", "name": "nnssl", "apa_citations": [NNSSL_CITATION]})
    return [each for place, each in enumerate(listed) if each not in listed[:place]]
