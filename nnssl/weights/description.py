"""What somebody who loads exported weights has to know of them."""

import json
from typing import Any

import nnssl
from nnssl.methods import METHODS
from nnssl.weights.opened_checkpoint import OpenedCheckpoint
from nnssl.weights.target import TargetNetwork

ELSEWHERE = "elsewhere"
"""Method and data set of weights that were not made here."""

NNSSL_CITATION = "Self-configuring self-supervised pretraining for nnU-Net."


def describe(source: OpenedCheckpoint, target: TargetNetwork, licence: str) -> dict[str, Any]:
    """Return what somebody who loads the weights has to know, as JSON takes it."""
    made = source.provenance
    return {
        "library": f"nnssl {nnssl.__version__}",
        "method": made.method if made else ELSEWHERE,
        "stage": made.stage if made else ELSEWHERE,
        "steps": made.step if made and made.method != ELSEWHERE else None,
        "settings": made.settings if made else {},
        "pretraining_data": made.dataset_name if made else ELSEWHERE,
        "pretraining_cases": len(made.cases) if made and made.cases is not None else None,
        "pretraining": source.pretraining,
        "plans": target.plans["plans_name"],
        "configuration": target.configuration,
        # of a trainer's own network the plan says nothing
        "architecture": None if target.trainer else json.loads(json.dumps(target.architecture)),
        "num_inputs": target.num_inputs,
        "num_classes": target.num_classes,
        "channel_names": None if target.channel_names is None else list(target.channel_names),
        "normalization": target.settings["normalization_schemes"],
        "patch_size": list(target.patch_vox),
        "spacing_mm": list(target.spacing_mm),
        "license": licence,
    }


def citations(source: OpenedCheckpoint) -> list[dict[str, Any]]:
    """Return what to cite, in the form that nnU-Net prints when training starts: the file's own, the method, nnssl."""
    listed = [dict(each) for each in source.citations]
    if source.provenance is not None and source.provenance.method in METHODS:
        method = METHODS[source.provenance.method]
        listed.append({"type": "Method", "name": method.title, "apa_citations": [method.source]})
    listed.append({"type": "Framework", "name": "nnssl", "apa_citations": [NNSSL_CITATION]})
    return [each for place, each in enumerate(listed) if each not in listed[:place]]
