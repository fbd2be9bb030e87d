"""Voxels that may not be learned from: they change no loss, points do not lie there, and patches without others are harmless."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nnssl.methods import METHODS
from nnssl.networks.tokens import cut_into_tokens
from nnssl.views.points import place_of
from nnssl.views.spatial import map_points
from tests.nnssl.methods import test_alice, test_regions
from tests.nnssl.methods.test_pieces import STAGES

RESTORING = {
    "mae.recovery": "recovery",
    "models_genesis.restoration": "restoration",
    "volume_fusion.segmentation": "cross_entropy",
    "reprec.generative": "recovery",
    "pcrl.contexts": "reconstruction_h",
    "alice.alignment": "reconstruction",
}
AT_POINTS = ("pix2rep.dense", "pixelglobal.distillation", "sam.embedding", "regions.prototypes")


def make(name: str, *overrides: str) -> tuple[Any, torch.Tensor]:
    build, batch = STAGES[name]
    made = build(*overrides)
    return (made[1] if isinstance(made, tuple) else made).train(), batch


def make_mask(batch: torch.Tensor) -> torch.Tensor:
    """The patches count everywhere, in an off-centre half, in random voxels, and nowhere."""
    mask = torch.rand(len(batch), *batch.shape[2:], generator=torch.Generator().manual_seed(5)) < 0.6
    mask[0] = True
    mask[1] = False
    mask[1, ..., : batch.shape[-1] // 2 + 1] = True
    mask[3] = False
    return mask


def views_of(method: Any, batch: torch.Tensor, mask: torch.Tensor | None) -> Any:
    views = method.make_views(batch, test_alice.generators(batch=len(batch)), mask)
    if method.supervoxel_edges_mm():
        views = method.partitioned(views, test_regions.make_supervoxels(batch.ndim - 2, len(batch)))
    return views


def changed_where_excluded(name: str, method: Any, views: Any) -> Any:
    """The views with other targets wherever these do not count."""

    def other(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return torch.where(kept[:, None], values, 100 * torch.randn_like(values) - 50)

    if name == "mae.recovery":
        return views._replace(target=other(views.target, views.learnable))
    if name == "models_genesis.restoration":
        return views._replace(clean=other(views.clean, views.learnable))
    if name == "volume_fusion.segmentation":
        return views._replace(classes=torch.where(views.learnable, views.classes, (views.classes + 2) % 5))
    if name == "pcrl.contexts":
        clean_o, clean_m = other(views.clean_o, views.learnable_o), other(views.clean_m, views.learnable_m)
        return replace(views, clean_o=clean_o, clean_m=clean_m)
    assert name == "alice.alignment"  # the student sees the voxels of visible tokens, so only others are changed
    hidden = views.mask.unflatten(1, method.student.grid)
    for axis, size in enumerate(method.student.token_vox, start=1):
        hidden = hidden.repeat_interleave(size, dim=axis)
    return replace(views, patches=other(views.patches, views.learnable | ~hidden))


@pytest.mark.parametrize("name", [name for name in RESTORING if name != "reprec.generative"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_targets_that_do_not_count_change_no_loss(name, pieces):
    method, batch = make(name, f"pieces={pieces}")
    views = views_of(method, batch, make_mask(batch))
    state = {key: value.clone() for key, value in method.named_buffers()}
    first = method.losses(views, 0.3).losses
    for key, value in state.items():
        method.get_buffer(key).data = value.clone()
    changed = changed_where_excluded(name, method, views)
    second = method.losses(changed, 0.3).losses
    assert RESTORING[name] in first
    assert all(torch.equal(first[part], second[part]) for part in first)
    assert first[RESTORING[name]] > 0
    everywhere = method.losses(views_of(method, batch, None), 0.3).losses[RESTORING[name]]
    assert not torch.equal(everywhere, first[RESTORING[name]])


@pytest.mark.parametrize("name", RESTORING)
def test_pieces_with_different_numbers_of_voxels_give_the_mean_over_all_that_count(name):
    values = []
    for pieces in (1, 2, 3):
        method, batch = make(name, f"pieces={pieces}")
        output = method.losses(views_of(method, batch, make_mask(batch)), 0.3)
        output.losses[RESTORING[name]].backward()
        gradient = torch.cat([each.grad.flatten() for each in method.parameters() if each.grad is not None])
        values.append((output.losses[RESTORING[name]], gradient))
    for loss, gradient in values[1:]:
        torch.testing.assert_close(loss, values[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, values[0][1], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_models_genesis_averages_over_the_voxels_that_count():
    method, batch = make("models_genesis.restoration")
    views, seen = views_of(method, batch, make_mask(batch)), []
    handle = method.output.register_forward_hook(lambda *call: seen.append(call[2]))
    loss = method.losses(views, 0.3).losses["restoration"]
    handle.remove()
    seen[0].retain_grad()
    loss.backward()
    kept = views.learnable[:, None].expand_as(views.clean)
    expected = (seen[0] - views.clean)[kept].double().square().mean()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    assert torch.equal(seen[0].grad != 0, kept)


def test_mae_averages_over_the_masked_voxels_that_count():
    method, batch = make("mae.recovery")
    views = views_of(method, batch, make_mask(batch))
    with torch.no_grad():
        recovered = method.recover(views.patches, views.mask, views.visible)
        loss = method.losses(views, 0.3).losses["recovery"]
    counted = cut_into_tokens(views.learnable[:, None].expand_as(views.target), method.cell_vox) & views.mask[..., None]
    wanted = cut_into_tokens(views.target, method.cell_vox)
    torch.testing.assert_close(loss, (recovered - wanted)[counted].double().square().mean().float(), rtol=1e-5, atol=0)
    for sample, kept in enumerate(views.learnable[:3]):  # statistics are those of the voxels that count
        values = views.patches[sample, :, kept].double()
        expected = (values - values.mean(1, keepdim=True)) / values.std(1, correction=0, keepdim=True)
        torch.testing.assert_close(views.target[sample, :, kept].double(), expected, atol=1e-4, rtol=1e-4)


def test_reprec_averages_over_the_masked_tokens_that_count():
    """The error of each token is that of a step in which no other counts."""
    method, batch = make("reprec.generative")
    views = views_of(method, batch, make_mask(batch))
    assert views.counted[0].all()
    assert not views.counted[3].any()
    assert 0 < int(views.counted[1].sum()) < views.counted.shape[1]
    errors = []
    with torch.no_grad():
        loss = method.losses(views, 0.3).losses["recovery"]
        for sample, token in (views.counted & views.mask).nonzero().tolist():
            alone = torch.zeros_like(views.counted)
            alone[sample, token] = True
            errors.append(float(method.losses(replace(views, counted=alone), 0.3).losses["recovery"]))
    assert float(loss) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@pytest.mark.parametrize("name", STAGES)
def test_a_batch_that_counts_nowhere_is_harmless(name):
    method, batch = make(name)
    output = method.losses(views_of(method, batch, torch.zeros(len(batch), *batch.shape[2:], dtype=torch.bool)), 0.3)
    assert all(loss.isfinite() for loss in output.losses.values())
    assert all(value.isfinite().all() for value in output.monitors.values())
    if name in RESTORING:
        assert output.losses[RESTORING[name]] == 0
    if name in ("sam.embedding", "regions.prototypes"):
        assert all(loss == 0 for loss in output.losses.values())
    if name == "pixelglobal.distillation":
        assert output.losses["local"] == 0
    torch.stack([loss.float() for loss in output.losses.values()]).sum().backward()
    assert all(each.grad.isfinite().all() for each in method.parameters() if each.grad is not None)


def test_stages_that_compare_whole_patches_read_no_mask():
    stages = {stage.name: stage.load() for method in METHODS.values() for stage in method.stages}
    without = {name for name, stage in stages.items() if not stage.learns_at_voxels}
    assert without == {"simclr.contrast", "reprec.contrastive"}


def in_patch(points_vox: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mask at the voxels nearest to points of the patch; unused points may lie outside."""
    last = torch.tensor(mask.shape[1:]) - 1
    return mask.flatten(1).gather(1, place_of(points_vox.round().long().clamp_min(0).minimum(last), mask.shape[1:]))


def kept_points(name: str, views: Any, mask: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each kind of points: whether each lies where the patch may be learned from, and whether it takes part."""
    if name == "pix2rep.dense":
        inside = in_patch(views.points_before, mask)
        return [(inside, torch.ones_like(inside))]
    if name == "regions.prototypes":
        return [
            (in_patch(views.in_reference, mask), views.regions.reference >= 0),
            (in_patch(views.query_in_patch, mask), views.regions.query >= 0),
        ]
    assert name == "sam.embedding"
    return [
        (in_patch(map_points(drawn[view].here, views.params[view], "to_input"), mask), drawn[view].valid > 0)
        for drawn in (views.fine, views.coarse)
        for view in (0, 1)
    ]


@pytest.mark.parametrize("name", ["pix2rep.dense", "regions.prototypes", "sam.embedding"])
def test_points_lie_where_the_patch_may_be_learned_from(name):
    method, batch = make(name, *(("points_per_image=40",) if name == "pix2rep.dense" else ()))
    mask = make_mask(batch)
    free = kept_points(name, views_of(method, batch, None), mask)
    for (inside, used), (free_inside, _) in zip(
        kept_points(name, views_of(method, batch, mask), mask), free, strict=True
    ):
        assert not free_inside[1].all()  # without the mask, points would lie elsewhere too
        assert inside[:3][used[:3]].all()
        assert used[:3].any(dim=1).all()
        if name != "pix2rep.dense":
            assert not used[3].any()


def test_pix2rep_repeats_points_where_few_voxels_may_be_learned_from():
    """A view without any such voxel, which has no points to repeat, keeps all valid ones."""
    method, batch = make("pix2rep.dense", "points_per_image=40", "crop_fraction=1,1", "rotation_deg=0,0,0")
    mask = make_mask(batch)
    mask[2] = False
    mask[2, 0, 0, :20] = True
    free, bound = (views_of(method, batch, each) for each in (None, mask))
    for sample, same in enumerate((True, False, False, True)):
        assert torch.equal(free.points_warped[sample], bound.points_warped[sample]) == same
    assert in_patch(bound.points_before, mask)[:3].all()
    assert len(bound.points_before[2].unique(dim=0)) == 20


@pytest.mark.parametrize("stabilizer", ["none", "literal"])
def test_pixelglobal_compares_the_same_points_of_both_images_with_a_stabilizer(stabilizer):
    still = ("intensity_views=", "crop_fraction=1,1", "flip_probability=0", "least_overlap=1", "rotation_deg=0,0,0")
    method, batch = make("pixelglobal.distillation", f"stabilizer={stabilizer}", *still)
    mask = make_mask(batch)
    mask[3] = mask[2].roll(1, dims=-1)
    views = views_of(method, batch, mask)
    assert in_patch(views.points_student, mask).all()
    assert views.valid.all()
    same = torch.equal(views.points_student[::2], views.points_student[1::2])
    assert same == (stabilizer == "literal")
