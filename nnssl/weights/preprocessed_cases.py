"""The preprocessed cases of a data set that pretrained weights can be applied to."""

import numpy as np

from nnssl.checkpoint import Provenance
from nnssl.data.case_store import CaseStore
from nnssl.errors import UserError
from nnssl.log import logger
from nnssl.networks.backbone import planned_configuration
from nnssl.paths import Folders
from nnssl.plan import existing_plan, read_plan
from nnssl.weights.opened_checkpoint import plan_of_pretraining

SPACING_TOLERANCE = 1e-3
"""Relative difference of spacings that is attributed to rounding."""


def open_cases(provenance: Provenance, dataset_name: str, folders: Folders) -> CaseStore:
    """Return the preprocessed cases of a data set.

    Args:
        provenance: Provenance of the weights.
        dataset_name: Name ``DatasetXXX_Name``, which may differ from the pretraining data set.
        folders: nnU-Net's folders.

    Raises:
        UserError: If the data set has no plan of the same name with this configuration, its plan normalises or transposes
            images differently, or none of its cases is preprocessed.
    """
    name = provenance.configuration
    own = plan_of_pretraining(provenance, f"weights of {provenance.stage}")
    path = existing_plan(folders, dataset_name, provenance.plans_name)
    plan = read_plan(path)
    pretext = plan.configuration(name)
    before, here = (
        (planned_configuration(each.nnunet, name)["normalization_schemes"], each.nnunet["transpose_forward"])
        for each in (own, plan)
    )
    if before != here:
        raise UserError(
            f"{path}: its normalization_schemes and transpose_forward {here} differ from those of the weights, {before}; "
            "use a data set of the same modality"
        )
    spacing_mm = own.configuration(name).spacing_mm
    if not np.allclose(spacing_mm, pretext.spacing_mm, rtol=SPACING_TOLERANCE):
        logger.info(
            f"Warning: pretrained at a spacing of {spacing_mm} mm, but the cases of {dataset_name} have {pretext.spacing_mm} mm"
        )
    return CaseStore(folders.preprocessed / dataset_name / pretext.case_folder)
