"""Output formats of an export: one file for nnU-Net, a folder for a model hub, or only the encoder.

A file gets its final name only after nnU-Net's own loader has read back what was written.
"""

import copy
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.checkpoint import Provenance, load_tensors, to_plain, write_checkpoint
from nnssl.errors import UserError
from nnssl.files import whole_folder, write_atomically, write_json
from nnssl.version import __version__
from nnssl.weights.adaptation_plan import KEY, write_adaptation_plan
from nnssl.weights.description import ELSEWHERE, citations, describe
from nnssl.weights.fit_report import ENCODER_PARTS, KEPT, FitReport
from nnssl.weights.model_card import write_model_card
from nnssl.weights.opened_checkpoint import EXPORT_KEY, OpenedCheckpoint
from nnssl.weights.target import TargetNetwork
from nnssl.weights.tensor_names import SEGMENTATION, names_by_tensor


def write_for_nnunet(path: Path, source: OpenedCheckpoint, target: TargetNetwork, report: FitReport) -> str:
    """Write one file that ``nnUNetv2_train -pretrained_weights`` takes, with adaptation plan and citations.

    Args:
        path: File to write, whose name ends in .pth. Its folder is created, and an earlier export is replaced.
        source: Checkpoint with the weights.
        target: Network that was filled with them.
        report: Record of the filling, written beside the file as ``<name>.pth.table.json``.

    Returns:
        A remark on the adaptation plan; empty if there is none.

    Raises:
        UserError: If nnU-Net's loader does not read back what was written, another file has the name, or the file cannot be
            written.
    """
    check_output(path, source)
    content: dict[str, Any] = {"network_weights": target.network.state_dict(), "citations": citations(source)}
    remark = ""
    if target.trainer is not None:
        # No plan describes this network, so programs that read plans must not mistake the file for one that has a plan.
        content[EXPORT_KEY] = {
            "trainer": target.trainer,
            "checkpoint": str(source.path),
            **describe(source, target, "unknown"),
        }
        remark = f"none, because no plan describes the network of {target.trainer}; the file is for nnU-Net only"
    else:
        try:
            content[KEY], remark = write_adaptation_plan(
                target.architecture,
                target.configuration,
                target.patch_vox,
                _spacing_mm(source, target),
                target.num_inputs,
                target.plans,
                target.settings,
            )
        except ValueError as error:
            remark = f"none, because {error}"
    make_folder(path.parent)
    untested = path.with_name(f".{path.name}.{os.getpid()}.untested")
    try:
        if target.trainer is None:
            probe = source.choosing_probe
            state = {} if probe is None else {"probe": probe}
            write_checkpoint(untested, content, _provenance(source, target, report), state)
        else:
            plain = to_plain(content)
            write_atomically(untested, lambda file: torch.save(plain, file))
        check_loads(target.network, untested, path)
        os.replace(untested, path)
    finally:
        untested.unlink(missing_ok=True)
    write_json(table_of(path), report.plain())
    return remark


def table_of(path: Path) -> Path:
    """Return the file beside an export with the record of each tensor."""
    return path.with_name(f"{path.name}.table.json")


def check_output(path: Path, source: OpenedCheckpoint) -> None:
    """Check that an export may be written to a path.

    Raises:
        UserError: If the name does not end in .pth, or another file than an earlier export has it.
    """
    if path.suffix not in (".pth", ".pt"):
        raise UserError(f"{path}: the output for nnU-Net needs a name that ends in .pth")
    other = path.is_dir() or path.resolve() == source.path.resolve()
    if path.exists() and (other or "citations" not in load_tensors(path)):
        raise UserError(f"{path}: exists already and is not an earlier export; choose another name for the output")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        UserError: If it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be created ({error.strerror or error}); choose another folder for the output"
        ) from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name. It gets its final name when it is complete.

    Raises:
        UserError: If the name is taken or the folder cannot be created.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already and is not an empty folder; choose a new folder for the output")
    make_folder(folder.parent)
    with whole_folder(folder) as temporary:
        yield temporary


def write_for_hub(
    folder: Path,
    source: OpenedCheckpoint,
    target: TargetNetwork,
    report: FitReport,
    licence: str,
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write a folder that can be uploaded to a model hub unchanged. It is written completely or not at all.

    The folder holds ``checkpoint_final.pth`` (as ``write_for_nnunet``), ``adaptation_plan.json``, ``config.json``, the plans and
    ``dataset.json`` of the target, and a model card.

    Args:
        folder: Folder to create; it must not exist or be empty.
        source: Checkpoint with the weights.
        target: Network that was filled with them.
        report: Record of the filling.
        licence: SPDX name of the licence of the weights.
        results: Results of fine-tuning for the card: ``dataset``, ``arm``, ``labels``, ``steps`` and ``dice`` of each.

    Returns:
        A remark, as ``write_for_nnunet``.

    Raises:
        UserError: As ``write_for_nnunet``; or if the folder is not empty.
    """
    with new_folder(folder) as temporary:
        checkpoint = temporary / "checkpoint_final.pth"
        remark = write_for_nnunet(checkpoint, source, target, report)
        content = load_tensors(checkpoint)
        if KEY in content:
            write_json(temporary / "adaptation_plan.json", content[KEY])
        write_json(temporary / f"{target.plans['plans_name']}.json", _without_pretext(target.plans))
        write_json(temporary / "dataset.json", target.dataset_json)
        spec = describe(source, target, licence)
        write_json(temporary / "config.json", spec)
        card = write_model_card(spec, report.table(), citations(source), results, remark)
        write_atomically(temporary / "README.md", lambda file: file.write(card.encode()))
    return remark


def write_encoder(
    folder: Path, source: OpenedCheckpoint, target: TargetNetwork, report: FitReport, licence: str
) -> int:
    """Write only the encoder, for use outside nnU-Net. The folder is written completely or not at all.

    The folder holds ``encoder.safetensors``, ``encoder.json``, ``load_encoder.py``, and the record of each tensor.

    Args:
        folder: Folder to create; it must not exist or be empty.
        source: Checkpoint with the weights.
        target: Network that was filled with them.
        report: Record of the filling.
        licence: SPDX name of the licence of the weights.

    Returns:
        The number of parameters in the file, each counted once.

    Raises:
        UserError: If the folder is not empty or cannot be written.
    """
    from safetensors.torch import save

    tensors = encoder_tensors(target.network)
    example = (Path(__file__).parent / "load_encoder.py").read_bytes()
    with new_folder(folder) as temporary:
        weights = temporary / "encoder.safetensors"
        write_atomically(weights, lambda file: file.write(save(tensors)))
        write_json(temporary / "encoder.json", describe(source, target, licence))
        write_json(table_of(weights), report.plain())
        write_atomically(temporary / "load_encoder.py", lambda file: file.write(example))
    return sum(tensor.numel() for tensor in tensors.values())


def encoder_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a network's encoder, each under a single name."""
    state = network.state_dict()
    chosen = [names[0] for names in names_by_tensor(state) if names[0].startswith(ENCODER_PARTS)]
    return {name: state[name].detach().contiguous() for name in chosen}


def check_loads(network: nn.Module, path: Path, name: Path) -> None:
    """Load a file with nnU-Net's own loader into a copy of a network and compare the two.

    Args:
        network: Network that was written.
        path: The file.
        name: Final name of the file, for error messages.

    Raises:
        UserError: If the loader rejects the file, or a tensor differs.
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
        raise UserError(
            f"{name}: nnU-Net's loader rejects the file ({str(error).splitlines()[0]}); report this as a bug"
        ) from error
    arrived = other.state_dict()
    for key, value in network.state_dict().items():
        if SEGMENTATION not in f".{key}" and not torch.equal(arrived[key], value):
            raise UserError(f"{name}: nnU-Net's loader reads back another {key} than was written; report this as a bug")


def _spacing_mm(source: OpenedCheckpoint, target: TargetNetwork) -> Sequence[float]:
    """Return the spacing of the pretraining, or the target's if that is unknown or has another number of axes."""
    known = source.pretraining["spacing_mm"]
    return known if known is not None and len(known) == len(target.spacing_mm) else target.spacing_mm


def _without_pretext(plans: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plans.items() if key != "pretext"}


def _provenance(source: OpenedCheckpoint, target: TargetNetwork, report: FitReport) -> Provenance:
    """Return the provenance of an exported file: that of the weights, with the network that they were fitted to."""
    taken = tuple(
        each.name for each in report.tensors if each.status in ("transferred", "adapted") or each.reason == KEPT
    )
    plans = _without_pretext(target.plans)
    if source.provenance is not None:
        return replace(
            source.provenance,
            plans_name=plans["plans_name"],
            configuration=target.configuration,
            plans=plans,
            dataset_json=target.dataset_json,
            pretrained=taken,
            origin=source.pretraining,
        )
    return Provenance(
        nnssl_version=__version__,
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
        origin=source.pretraining,
    )
