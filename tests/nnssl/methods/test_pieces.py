"""Every stage with a batch in pieces and with recomputed stages, compared with the step as it is; what the step keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnssl.errors import UserError
from nnssl.methods import METHODS
from nnssl.methods.protocol import PretextMethod, StepOutput
from tests.nnssl.methods import (
    test_alice,
    test_mae,
    test_models_genesis,
    test_pcrl,
    test_pix2rep,
    test_pixelglobal,
    test_regions,
    test_reprec,
    test_sam,
    test_simclr,
    test_volume_fusion,
)

BATCH = 4
Step = tuple[dict[str, torch.Tensor], StepOutput]
STAGES: dict[str, tuple[Callable[..., Any], torch.Tensor]] = {
    "reprec.contrastive": (lambda *o: test_reprec.make_stage("contrastive", 3, *o), test_reprec.make_batch(3)),
    "reprec.generative": (lambda *o: test_reprec.make_stage("generative", 2, *o), test_reprec.make_batch(2)),
    "pix2rep.dense": (lambda *o: test_pix2rep.make_stage("pix2rep", 3, *o), test_pix2rep.make_batch(3)),
    "pix2rep_v2.dense": (
        lambda *o: test_pix2rep.make_stage("pix2rep_v2", 2, "points_per_image=4", *o, residual=True),
        test_pix2rep.make_batch(2),
    ),
    "pcrl.contexts": (lambda *o: test_pcrl.make_stage(2, *o, residual=True), test_pcrl.make_batch(2)),
    "sam.embedding": (lambda *o: test_sam.make_stage(*o, batch=BATCH), test_sam.make_batch(BATCH)),
    "alice.alignment": (lambda *o: test_alice.make_stage("primus", *o), test_alice.make_batch("primus")),
    "pixelglobal.distillation": (lambda *o: test_pixelglobal.make_stage(3, *o), test_pixelglobal.make_batch(3)),
    "simclr.contrast": (lambda *o: test_simclr.make_stage(3, *o), test_simclr.patches(3)),
    "regions.prototypes": (lambda *o: test_regions.make_stage(3, *o), test_regions.make_batch(3)),
    "mae.recovery": (lambda *o: test_mae.make_stage("primus", *o), test_mae.make_batch("primus")),
    "models_genesis.restoration": (lambda *o: test_models_genesis.make_stage(3, *o), test_models_genesis.make_batch(3)),
    "volume_fusion.segmentation": (
        lambda *o: test_volume_fusion.make_stage(2, *o, residual=True),
        test_volume_fusion.make_batch(2),
    ),
}
VARIANTS: dict[str, tuple[Callable[..., Any], torch.Tensor]] = {
    "mae on a plain U-Net": (lambda *o: test_mae.make_stage("plain", *o), test_mae.make_batch("plain")),
    "mae, sparse": (lambda *o: test_mae.make_stage("residual", "sparse=true", *o), test_mae.make_batch("residual")),
    "alice on a plain U-Net": (lambda *o: test_alice.make_stage("plain", *o), test_alice.make_batch("plain")),
    "alice on a residual U-Net": (lambda *o: test_alice.make_stage("residual", *o), test_alice.make_batch("residual")),
    "pcrl in 3D": (lambda *o: test_pcrl.make_stage(3, "attention=none", "mixup=false", *o), test_pcrl.make_batch(3)),
    "sam, residual": (lambda *o: test_sam.make_stage(*o, residual=True, batch=BATCH), test_sam.make_batch(BATCH)),
}
STEPS = {**STAGES, **VARIANTS}
CHANGES = (("pieces=2",), ("pieces=3",), ("checkpointing=true",), ("pieces=2", "checkpointing=true"))


def losses_of(name: str, *overrides: str) -> tuple[PretextMethod, StepOutput]:
    make, batch = STEPS[name]
    made = make(*overrides)
    method = made[1] if isinstance(made, tuple) else made  # some modules return the network too
    method.train()
    views = method.make_views(batch, test_alice.generators(batch=len(batch)))
    if method.supervoxel_edges_mm():
        views = method.partitioned(views, test_regions.make_supervoxels(3, len(batch)))
    return method, method.losses(views, 0.3)


def step_of(name: str, *overrides: str) -> Step:
    """Gradients of all trained parameters, by name, and the output of the step."""
    method, output = losses_of(name, *overrides)
    torch.stack(list(output.losses.values())).sum().backward()
    return {name: each.grad for name, each in method.named_parameters() if each.requires_grad}, output


def kept_bytes(name: str, *overrides: str) -> int:
    """Bytes of different storages that the graph of a step keeps beside the parameters; those of views are not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method, output = losses_of(name, *overrides)
    for each in method.parameters():
        kept.pop(each.untyped_storage().data_ptr(), None)
    assert output.losses
    return sum(kept.values())


def test_every_stage_is_tested():
    assert set(STAGES) == {stage.name for method in METHODS.values() for stage in method.stages}


@pytest.mark.parametrize("name", STEPS)
def test_the_gradient_is_that_of_the_whole_batch(name):
    expected, whole = step_of(name)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in expected.values())
    # CPUs differ in how they round batches of different sizes: with AMX, Alice's gradients differ by 1.6e-5 of the largest one. A
    # piece that is left out changes them by a quarter.
    allowed = 1e-4 * max(float(gradient.abs().max()) for gradient in expected.values())
    for overrides in CHANGES:
        found, output = step_of(name, *overrides)
        assert set(found) == set(expected)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=allowed, msg=f"{overrides} {key}")
        for kind in ("losses", "monitors"):
            torch.testing.assert_close(getattr(output, kind), getattr(whole, kind), rtol=1e-4, atol=1e-5)
        # Standardised vectors enlarge the rounding of vectors that hardly differ.
        torch.testing.assert_close(output.embeddings, whole.embeddings, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(output.carry, whole.carry, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_less_is_kept(name):
    whole, pieces, recomputed = (kept_bytes(name, *each) for each in ((), ("pieces=2",), ("checkpointing=true",)))
    assert pieces < 0.5 * whole
    assert recomputed < 0.8 * whole


@pytest.mark.parametrize("name", STAGES)
def test_mixed_precision_is_that_of_the_first_pass(name):
    """The backward pass runs outside of autocast; recomputed in another format, torch would refuse the tensors."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, expected = losses_of(name)
        method, output = losses_of(name, "pieces=2", "checkpointing=true")
    torch.stack([each.float() for each in output.losses.values()]).sum().backward()
    assert all(each.grad is not None for each in method.parameters() if each.requires_grad)
    torch.testing.assert_close(output.losses, expected.losses, rtol=0.05, atol=0.01)


def test_more_pieces_than_patches_are_refused():
    with pytest.raises(UserError, match=r"^pieces must be at most the 4 patches of a process, got 5$"):
        losses_of("simclr.contrast", "pieces=5")
