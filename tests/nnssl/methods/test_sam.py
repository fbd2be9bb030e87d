"""SAM: where queries and positives lie, which cells are negatives, whom the losses reach, and the formulas against loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from nnssl.data.case_store import CaseProperties, CaseStore, SourceFile, write_case
from nnssl.data.phantoms import make_phantom
from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.losses.contrastive import info_nce_with_negatives
from nnssl.losses.negatives import draw_hard_negatives
from nnssl.matching.body_box import BodyBoxMatcher
from nnssl.matching.embedded import EmbeddingMatcher
from nnssl.methods.sam import SAM, check_settings, read_unit_vectors
from nnssl.methods.settings import resolve_stage
from nnssl.networks.backbone import build_network
from nnssl.views.cells import far_enough, place_cells
from nnssl.views.points import cell_centres_vox
from nnssl.views.spatial import map_points, pick
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2
SMALL = ("dimensions=8", "fine_queries=12", "fine_pool=40", "fine_negatives=20", "coarse_queries=5", "coarse_pool=8",
         "coarse_negatives=6", "other_negatives=7")  # fmt: skip
encoders = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])


def make_stage(*overrides: str, residual: bool = False, batch: int = 3) -> SAM:
    configuration = make_configuration(3)
    settings, _ = resolve_stage(
        SAM, planned(configuration), "sam.embedding", (*SMALL, f"batch_size={batch}", *overrides)
    )
    network = build_network(architecture(3, residual, False), CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    return SAM(network, settings, configuration)


def make_batch(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *PATCHES[3], generator=torch.Generator().manual_seed(1))


def generators(step: int = 0, batch: int = 3) -> list[torch.Generator]:
    return sample_generators(0, "test", step, range(batch))


def test_grids_are_those_of_the_maps():
    method = make_stage()
    maps = method.embedding(make_batch())
    grids = method.embedding.grids(PATCHES[3])
    assert {"fine": tuple(maps.fine.shape[2:]), "coarse": tuple(maps.coarse.shape[2:])} == grids
    for each in maps:
        torch.testing.assert_close(each.norm(dim=1), torch.ones_like(each[:, 0]), atol=1e-5, rtol=0)
        assert each.dtype == torch.float32


@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_a_query_and_its_positive_are_one_place_of_the_patch(kind):
    """In mm of the patch, in both directions; queries are centres of cells, and distinct while there are enough."""
    method = make_stage()
    views = method.make_views(make_batch(), generators())
    centres = cell_centres_vox(method.embedding.grids(PATCHES[3])[kind], PATCHES[3])
    spacing = torch.tensor(method.configuration.spacing_mm)
    for view in (0, 1):
        here, there, valid = getattr(views, kind)[view]
        assert valid.bool().all()
        own, other = views.params[view], views.params[1 - view]
        places = [map_points(p, q, "to_input") for p, q in ((here, own), (there, other))]
        torch.testing.assert_close(places[0] * spacing, places[1] * spacing, atol=1e-3, rtol=0)
        last = torch.tensor(PATCHES[3]) - 1
        for points in (here, there, places[0]):
            assert ((points >= -1e-3) & (points <= last + 1e-3)).all()
        for sample in here:
            distance = torch.cdist(sample, centres)
            assert distance.amin(dim=1).max() < 1e-4
    (first, second) = (views.fine[0].here, views.fine[1].here)
    assert not torch.equal(first, second)


def test_nothing_is_flipped_and_no_more_turned_than_allowed():
    method = make_stage()
    for step in range(20):
        for params in method.make_views(make_batch(), generators(step)).params:
            assert (torch.linalg.det(params.linear) > 0).all()
            zoom = torch.linalg.det(params.linear) ** (1 / 3)
            cosine = (torch.diagonal(params.linear / zoom[:, None, None], dim1=1, dim2=2)).amin()
            assert cosine > math.cos(math.radians(10)) - 1e-6
            assert zoom.min() > 0.3 ** (1 / 3) - 1e-6


def allowed_cells(views, here: torch.Tensor, view: int, sample: int, grid: tuple[int, ...]) -> torch.Tensor:
    crops = [pick(each, torch.tensor([sample])) for each in views.params]
    return far_enough(here, crops[view], place_cells(crops, grid, PATCHES[3], here.device))


def test_negatives_lie_a_cell_away_in_mm_and_in_the_patch():
    """Every cell is looked at one by one."""
    method = make_stage("rotation_deg=10,10,10")
    views = method.make_views(make_batch(), generators())
    spacing = torch.tensor(method.configuration.spacing_mm)
    for kind, grid in method.embedding.grids(PATCHES[3]).items():
        queries = getattr(views, kind)[1]
        allowed = allowed_cells(views, queries.here[2], 1, 2, grid)
        cell_mm = max(float(mm) * n / c for mm, n, c in zip(spacing, PATCHES[3], grid, strict=True))
        params = [pick(each, torch.tensor([2])) for each in views.params]
        column = 0
        for each in params:
            for centre in cell_centres_vox(grid, PATCHES[3]):
                place = map_points(centre[None, None], each, "to_input")[0, 0]
                inside = bool(((place >= 0) & (place <= torch.tensor(PATCHES[3]) - 1)).all())
                for row, query in enumerate(queries.here[2]):
                    origin = map_points(query[None, None], params[1], "to_input")[0, 0]
                    distance = float(((place - origin) * spacing).norm())
                    if abs(distance - cell_mm) > 1e-3:
                        assert bool(allowed[row, column]) is (inside and distance > cell_mm)
                column += 1
        assert allowed.any()
        assert not allowed.all()


def test_hard_negatives_against_a_loop():
    generator = torch.Generator().manual_seed(3)
    ranking, allowed = torch.randn(6, 50, generator=generator) - 2, torch.rand(6, 50, generator=generator) < 0.5
    allowed[5] = False
    allowed[5, :4] = True
    chosen, present = draw_hard_negatives(ranking, allowed, 12, 7, torch.Generator().manual_seed(0))
    again, _ = draw_hard_negatives(ranking, allowed, 12, 7, torch.Generator().manual_seed(0))
    other, _ = draw_hard_negatives(ranking, allowed, 12, 7, torch.Generator().manual_seed(1))
    assert torch.equal(chosen, again)
    assert not torch.equal(chosen, other)
    for row in range(6):
        hardest = sorted((i for i in range(50) if allowed[row, i]), key=lambda i: -float(ranking[row, i]))[:12]
        kept = chosen[row][present[row]].tolist()
        assert len(kept) == len(set(kept)) == min(7, len(hardest))
        assert set(kept) <= set(hardest)
    wide, present = draw_hard_negatives(ranking, allowed, 99, 99, torch.Generator().manual_seed(0))
    assert wide.shape == (6, 50)
    assert present.sum(dim=1).tolist() == allowed.sum(dim=1).tolist()


def test_info_nce_with_negatives_against_a_loop():
    vectors = torch.nn.functional.normalize(torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    queries, positives, negatives = vectors[:, 0], vectors[:, 1], vectors[:, 2:]
    present = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0] * 5, [1] * 5], dtype=torch.bool)
    found = info_nce_with_negatives(queries, positives, negatives, present, 0.5)
    for row in range(4):
        weights = [math.exp(float(queries[row] @ positives[row]) / 0.5)]
        weights += [
            math.exp(float(queries[row] @ n) / 0.5) for n, p in zip(negatives[row], present[row], strict=True) if p
        ]
        assert float(found[row]) == pytest.approx(-math.log(weights[0] / sum(weights)), abs=1e-5)


def test_equal_embeddings_cost_the_log_of_the_candidates(monkeypatch):
    """log 501 with SAM's numbers, where there are so many cells."""
    method = make_stage("fine_pool=100", "fine_negatives=50")
    original = method.embedding.forward

    def constant(volumes):
        return type(original(volumes))(*(torch.full_like(each, 8**-0.5) for each in original(volumes)))

    monkeypatch.setattr(method.embedding, "forward", constant)
    losses = method.losses(method.make_views(make_batch(), generators()), 0.0).losses
    assert float(losses["fine"]) == pytest.approx(math.log(51), rel=1e-4)
    assert float(losses["coarse"]) == pytest.approx(math.log(1 + 6 + 7), rel=1e-4)


@encoders
def test_losses_and_gradients_against_a_loop(residual):
    """Every query of every view by itself: what it is compared with, from the maps and the drawn indices."""
    method = make_stage(residual=residual)
    views = method.make_views(make_batch(), generators())
    output = method.losses(views, 0.0)
    maps = method.embedding(torch.cat([views.first, views.second]))
    expected = {"fine": [], "coarse": []}
    for kind in expected:
        pair = getattr(maps, kind).split(3)
        for sample in range(3):
            cells = torch.cat([each[sample].flatten(1) for each in pair], dim=1).T
            foreign = [
                torch.cat([each[other].flatten(1) for each in maps.coarse.split(3)], dim=1).T
                for other in range(3)
                if other != sample
            ]
            foreign = torch.cat(foreign)
            for view in (0, 1):
                here, there, _ = (each[sample : sample + 1] for each in getattr(views, kind)[view])
                query = read_unit_vectors(pair[view][sample : sample + 1], here, PATCHES[3])
                positive = read_unit_vectors(pair[1 - view][sample : sample + 1], there, PATCHES[3])
                generator = torch.Generator().manual_seed(views.seeds[sample] + 2 * view + (kind == "coarse"))
                allowed = allowed_cells(views, here[0], view, sample, pair[0].shape[2:])
                ranking = query @ cells.T
                if kind == "fine":
                    split = [maps.coarse[:3], maps.coarse[3:]]
                    own = read_unit_vectors(split[view][sample : sample + 1], here, PATCHES[3])
                    wide = [
                        torch.nn.functional.interpolate(
                            torch.stack([q @ each[sample].flatten(1) for q in own]).view(1, -1, *each.shape[2:]),
                            pair[0].shape[2:],
                            mode="trilinear",
                        )
                        for each in split
                    ]
                    ranking = ranking + torch.cat([each[0].flatten(1) for each in wide], dim=1)
                pool, count = (40, 20) if kind == "fine" else (8, 6)
                chosen, present = draw_hard_negatives(ranking, allowed, pool, count, generator)
                others = foreign[torch.rand(len(foreign), generator=generator).argsort()[:7]]
                for row in range(len(query)):
                    against = list(cells[chosen[row]][present[row]]) + ([] if kind == "fine" else list(others))
                    logits = torch.stack([query[row] @ each for each in (positive[row], *against)]) / 0.5
                    expected[kind].append(logits.exp().sum().log() - logits[0])
    trained = [each for each in method.parameters() if each.requires_grad]
    for kind, values in expected.items():
        wanted = torch.stack(values).mean()
        assert output.losses[kind].item() == pytest.approx(wanted.item(), rel=1e-4)
        found, own = (
            torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True)
            for loss in (output.losses[kind], wanted)
        )
        for one, other in zip(found, own, strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-3, atol=1e-5 * max(1.0, float(max(g.abs().max() for g in own)))
            )


@encoders
def test_whom_each_loss_reaches(residual):
    method = make_stage(residual=residual)
    parts = method.losses(method.make_views(make_batch(), generators()), 0.0).losses
    encoder = list(method.network.encoder.parameters())
    shared = set(map(id, encoder))
    decoder = dict(method.network.decoder.named_parameters())
    last = len(method.network.decoder.stages) - 1
    groups = {
        "encoder": encoder,
        "decoder": [p for n, p in decoder.items() if id(p) not in shared and p.requires_grad],
        "fine": list(method.embedding.fine.parameters()),
        "coarse": list(method.embedding.coarse.parameters()),
    }
    assert groups["decoder"]
    assert not any(p.requires_grad for n, p in decoder.items() if n.startswith((f"stages.{last}.", "seg_layers.")))
    expected = {"fine": {"encoder", "decoder", "fine"}, "coarse": {"encoder", "coarse"}}
    for name, loss in parts.items():
        reached = set()
        for group, parameters in groups.items():
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            if any(g is not None and g.abs().max() > 0 for g in gradients):
                reached.add(group)
        assert reached == expected[name], name
    trained = {id(p) for g in method.parameter_groups() for p in g.parameters}
    assert trained == {id(p) for parameters in groups.values() for p in parameters}
    exported = method.exported().pretrained
    for name, parameter in method.network.named_parameters():
        assert name.startswith(exported) is parameter.requires_grad, name


def test_a_sample_is_the_same_in_any_batch():
    method = make_stage()
    batch = make_batch()
    whole, part = method.make_views(batch, generators()), method.make_views(batch[2:], generators()[2:])
    assert torch.allclose(whole.first[2:], part.first, atol=1e-5)
    assert torch.equal(whole.fine[0].here[2:], part.fine[0].here)
    assert whole.seeds[2] == part.seeds[0]


@pytest.mark.nightly
def test_places_are_learned():
    """Of 12 queries most find their place first among 20 hard others, on views that are drawn anew."""
    method = make_stage("dimensions=16", "intensity_views=")
    ramp = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in PATCHES[3]], indexing="ij"))
    smooth = torch.nn.functional.interpolate(make_batch(3)[..., ::2, ::3, ::4], PATCHES[3], mode="trilinear")
    volumes = smooth + ramp[1:]
    optimizer = torch.optim.Adam([p for g in method.parameter_groups() for p in g.parameters], lr=3e-3)
    tops = []
    for step in range(80):
        output = method.losses(method.make_views(volumes, generators(step)), 0.0)
        optimizer.zero_grad()
        sum(output.losses.values()).backward()
        optimizer.step()
        tops.append(float(output.monitors["head_fine_top1"]))
    assert sum(tops[:5]) / 5 < sum(tops[-5:]) / 5
    assert sum(tops[-5:]) / 5 > 0.3


@pytest.mark.nightly
def test_a_known_displacement_is_found(tmp_path):
    """A phantom and the same one deformed by a known field: matches lie within a cell, nearer than by the body's box."""
    shape, spacing, patch = (24, 48, 48), (2.0, 1.5, 1.5), (16, 32, 32)
    volume, labels = make_phantom(3, shape, spacing, "CT")
    volume = (volume - volume.mean()) / volume.std()
    z, y, x = grid = np.stack(np.meshgrid(*[np.arange(n, dtype=float) for n in shape], indexing="ij"))
    moved = grid + np.stack([1.5 * np.sin(y / 8), 4 * np.sin(x / 9 + 1), 4 * np.cos(z / 7)])
    deformed = map_coordinates(volume, moved, order=1, mode="nearest").astype(np.float32)
    body = np.argwhere(map_coordinates(labels, moved, order=0, mode="nearest") > 0)
    for name, image, inside in (("still", volume, np.argwhere(labels > 0)), ("moved", deformed, body)):
        properties = CaseProperties(2, shape, 1, spacing, (SourceFile("a", 1, 1),), "digest", 0.5, 1.0, None)
        write_case(tmp_path, name, image[None], inside.astype(np.int16), properties, patch)
    store = CaseStore(tmp_path)
    configuration = replace(
        make_configuration(3), patch_size=patch, spacing_mm=spacing, thick_axis=None, rotation_deg=(10.0,) * 3
    )
    overrides = ("dimensions=32", "fine_queries=40", "fine_pool=200", "fine_negatives=100", "coarse_queries=12",
                 "coarse_pool=60", "coarse_negatives=40", "other_negatives=30", "temperature=0.2")  # fmt: skip
    settings, _ = resolve_stage(SAM, planned(configuration), "sam.embedding", (*overrides, "batch_size=2"))
    method = SAM(build_network(architecture(3, False, False), 1, 3, seed=0), settings, configuration)
    optimizer = torch.optim.AdamW([p for g in method.parameter_groups() for p in g.parameters], lr=3e-3)
    rng = np.random.default_rng(0)
    for step in range(40):
        corners = rng.integers(0, np.array(shape) - patch + 1, size=(2, 3)).tolist()
        boxes = [store.case(store.names[i % 2]).read_box(low, patch) for i, low in enumerate(corners)]
        volumes = torch.from_numpy(np.stack(boxes))
        losses = method.losses(method.make_views(volumes, generators(step, 2)), 0.0).losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    points = body[rng.integers(len(body), size=300)]
    truth = moved[(slice(None), *points.T)].T
    points, truth = (each[((truth >= 0) & (truth <= np.array(shape) - 1)).all(axis=1)] for each in (points, truth))
    matcher = EmbeddingMatcher(method.embedding.eval(), store, patch, torch.device("cpu"))
    learned, box = (
        np.linalg.norm(
            each.match_points("moved", points * np.array(spacing), "still").points_mm - truth * spacing, axis=1
        )
        for each in (matcher, BodyBoxMatcher(store))
    )
    assert np.median(learned) < 3.0  # a cell is 2 x 3 x 3 mm
    assert np.median(learned) < 0.8 * np.median(box)


def test_settings_that_do_not_fit():
    with pytest.raises(UserError, match="batch_size must be at least 2, got 1: .*set batch_size=2"):
        make_stage(batch=1)
    make_stage("other_negatives=0", batch=1)
    with pytest.raises(UserError, match="coarse_stage must be at most 2, .* got 3"):
        make_stage("coarse_stage=3")
    with pytest.raises(UserError, match="fine_stage must be below coarse_stage=2, got 2"):
        check_settings(replace(make_stage().settings, fine_stage=2), 3)
