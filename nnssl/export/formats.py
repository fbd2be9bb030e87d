"""What an export leaves on disk: one file for nnU-Net, a folder for a model hub, or a bare encoder.

Every file is tried before it has its name: nnU-Net's own loader has to find in it what was put there.
"""

import copy
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nnssl
from nnssl.checkpoint import Provenance, write_checkpoint
from nnssl.errors import UserError
from nnssl.export.adaptation_plan import KEY, write_adaptation_plan
from nnssl.export.fit import ENCODER, SEGMENTATION, FitReport
from nnssl.export.model_card import write_model_card
from nnssl.export.source import SourceWeights, names_by_tensor
from nnssl.export.target import TargetNetwork
from nnssl.files import write_atomically, write_json
from nnssl.methods import METHODS

ELSEWHERE = "elsewhere"
"""Method and data set of weights that were not made here."""

NNSSL_CITATION = "Self-configuring self-supervised pretraining for nnU-Net."


def write_for_nnunet(path: Path, source: SourceWeights, target: TargetNetwork, report: FitReport) -> str:
    """Write one file that ``nnUNetv2_train -pretrained_weights`` takes, with adaptation plan and citations.

    Args:
        path: the file; its folder is made.
        source: the weights.
        target: the network that was filled with them.
        report: of the filling; written beside the file, as ``<name>.json``.

    Returns:
        A remark on the adaptation plan, empty where there is nothing to say.

    Raises:
        UserError: nnU-Net's loader does not find in the file what was put there, or it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "network_weights": target.network.state_dict(),
        "citations": citations(source),
    }
    remark = ""
    if target.trainer is None:
        content[KEY], remark = write_adaptation_plan(
            target.architecture, target.configuration, target.patch_vox, target.spacing_mm, target.num_channels
        )
    else:
        remark = f"without an adaptation plan: the network is that of {target.trainer}, which plans do not name"
    untested = path.with_name(f".{path.name}.{os.getpid()}.untested")
    try:
        write_checkpoint(untested, content, _provenance(source, target, report), {})
        check_loads(target.network, untested)
        os.replace(untested, path)
    finally:
        untested.unlink(missing_ok=True)
    write_json(path.with_suffix(".json"), report.plain())
    return remark


def write_for_hub(
    folder: Path,
    source: SourceWeights,
    target: TargetNetwork,
    report: FitReport,
    licence: str,
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write a folder that can be uploaded to a model hub as it is.

    It holds ``checkpoint_final.pth`` (as ``write_for_nnunet``), ``adaptation_plan.json``, ``config.json`` and a model card.

    Args:
        folder: made here; it must not hold anything yet.
        source: the weights.
        target: the network that was filled with them.
        report: of the filling.
        licence: of the weights, an SPDX name.
        results: of fine-tuning, for the card: data set, labels, steps and Dice of each.

    Returns:
        A remark, as ``write_for_nnunet``.

    Raises:
        UserError: as ``write_for_nnunet``; or the folder holds something.
    """
    _start_folder(folder)
    checkpoint = folder / "checkpoint_final.pth"
    remark = write_for_nnunet(checkpoint, source, target, report)
    adaptation = torch.load(checkpoint, weights_only=True)
    if KEY in adaptation:
        write_json(folder / "adaptation_plan.json", adaptation[KEY])
    write_json(folder / "config.json", describe(source, target, licence))
    card = write_model_card(describe(source, target, licence), report.table(), citations(source), results, remark)
    write_atomically(folder / "README.md", lambda file: file.write(card.encode()))
    return remark


def write_encoder(folder: Path, source: SourceWeights, target: TargetNetwork, licence: str) -> int:
    """Write the encoder alone, for use outside nnU-Net: ``encoder.safetensors``, ``encoder.json`` and ``load_encoder.py``.

    Args:
        folder: made here; it must not hold anything yet.
        source: the weights.
        target: the network that was filled with them.
        licence: of the weights, an SPDX name.

    Returns:
        How many parameters the file holds, each of them once.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    from safetensors.torch import save

    _start_folder(folder)
    tensors = encoder_tensors(target.network)
    write_atomically(folder / "encoder.safetensors", lambda file: file.write(save(tensors)))
    spec = describe(source, target, licence)
    spec["deep_supervision"] = True
    spec["num_classes"] = _classes(target)
    write_json(folder / "encoder.json", spec)
    example = (Path(__file__).parent / "load_encoder.py").read_bytes()
    write_atomically(folder / "load_encoder.py", lambda file: file.write(example))
    return sum(tensor.numel() for tensor in tensors.values())


def encoder_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a network's encoder, each under one name."""
    state = network.state_dict()
    chosen = [names[0] for names in names_by_tensor(state) if names[0].startswith(ENCODER)]
    return {name: state[name].detach().contiguous() for name in chosen}


def check_loads(network: nn.Module, path: Path) -> None:
    """Load a file with nnU-Net's own loader into a copy of a network, and compare what arrived.

    Raises:
        UserError: the loader refuses the file, or a tensor did not arrive.
    """
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights  # slow to import

    other = copy.deepcopy(network)
    with torch.no_grad():
        for value in other.state_dict().values():
            if value.is_floating_point():
                value.fill_(float("nan"))
    try:
        with redirect_stdout(io.StringIO()):
            load_pretrained_weights(other, str(path), verbose=False)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"{path}: nnU-Net's loader refuses it ({str(error).splitlines()[0]}); report this") from error
    arrived = other.state_dict()
    for name, value in network.state_dict().items():
        if SEGMENTATION not in f".{name}" and not torch.equal(arrived[name], value):
            raise UserError(f"{path}: nnU-Net's loader does not bring {name} back as it was written; report this")


def describe(source: SourceWeights, target: TargetNetwork, licence: str) -> dict[str, Any]:
    """Return what somebody who loads the weights has to know, as JSON takes it."""
    origin = source.provenance
    return {
        "library": f"nnssl {nnssl.__version__}",
        "method": origin.method if origin else ELSEWHERE,
        "stage": origin.stage if origin else ELSEWHERE,
        "steps": origin.step if origin else None,
        "settings": origin.settings if origin else {},
        "pretraining_data": origin.dataset_name if origin else ELSEWHERE,
        "pretraining_cases": len(origin.cases) if origin and origin.cases is not None else None,
        "pretraining_spacing_mm": None if source.spacing_mm is None else list(source.spacing_mm),
        "pretraining_channels": None if source.channel_names is None else list(source.channel_names),
        "plans": target.plans["plans_name"],
        "configuration": target.configuration,
        "trainer": target.trainer,
        "architecture": json.loads(json.dumps(target.architecture)),
        "num_channels": target.num_channels,
        "channel_names": None if target.channel_names is None else list(target.channel_names),
        "normalization": target.settings["normalization_schemes"],
        "patch_size": list(target.patch_vox),
        "spacing_mm": list(target.spacing_mm),
        "license": licence,
    }


def citations(source: SourceWeights) -> list[dict[str, Any]]:
    """Return what to cite, in the form that nnU-Net prints when training starts."""
    listed = [{"type": "Framework", "name": "nnssl", "apa_citations": [NNSSL_CITATION]}]
    if source.provenance is not None and source.provenance.method in METHODS:
        method = METHODS[source.provenance.method]
        listed.insert(0, {"type": "Method", "name": method.title, "apa_citations": [method.source]})
    return listed


def _provenance(source: SourceWeights, target: TargetNetwork, report: FitReport) -> Provenance:
    """Return the provenance of an exported file: the weights' own, with the network that they were made for."""
    taken = tuple(each.name for each in report.tensors if each.status in ("transferred", "adapted"))
    plans = {key: value for key, value in target.plans.items() if key != "pretext"}
    if source.provenance is not None:
        return replace(
            source.provenance,
            plans_name=plans["plans_name"],
            configuration=target.configuration,
            plans=plans,
            dataset_json=target.dataset_json,
            pretrained=taken,
        )
    return Provenance(
        nnssl_version=nnssl.__version__,
        method=ELSEWHERE,
        stage=ELSEWHERE,
        dataset_name=ELSEWHERE,
        plans_name=plans["plans_name"],
        configuration=target.configuration,
        plans=plans,
        dataset_json=target.dataset_json,
        settings={},
        seed=0,
        step=0,
        total_steps=0,
        finished=True,
        pretrained=taken,
        init=str(source.path),
    )


def _start_folder(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds something already; name a new folder with -o")
    folder.mkdir(parents=True, exist_ok=True)


def _classes(target: TargetNetwork) -> int:
    return len(target.dataset_json["labels"])
