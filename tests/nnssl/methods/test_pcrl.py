"""PCRL: views and targets, the shared decoder, whom each loss reaches, and the formulas against slow loops."""

import inspect
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.methods.pcrl import PCRL, errors_untold
from nnssl.methods.settings import resolve_stage
from nnssl.momentum import update_teacher
from nnssl.networks.attention import TransformationAttention
from nnssl.networks.backbone import build_network
from nnssl.networks.dense import ENCODER, ENCODER_AND_DECODER, decode
from nnssl.views.boxes import intersection_over_union, to_mm
from nnssl.views.contexts import MODELS, ContextViews, counted_targets, mix, reconstruction_targets
from nnssl.views.corruption import painted_mask
from nnssl.views.overlap import crop_boxes
from nnssl.views.spatial import map_points
from nnssl.views.turns import TurnParams, apply_turns, no_turns, turn_code, undo_turns
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2
dims = pytest.mark.parametrize("dim", [2, 3])
encoders = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])


SQUARE = {2: (12, 12), 3: (4, 12, 12)}


def make_stage(dim: int, *overrides: str, residual: bool = False, square: bool = False) -> PCRL:
    configuration = make_configuration(dim)
    if square:
        context = replace(configuration.context, quarter_turns=True)
        spacing = (6.0, 1.0, 1.0)[-dim:]
        configuration = replace(configuration, patch_size=SQUARE[dim], spacing_mm=spacing, context=context)
    settings, _ = resolve_stage(PCRL, planned(configuration), "pcrl.contexts", overrides)
    network = build_network(architecture(dim, residual, False), CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    method = PCRL(network, settings, configuration)
    for teacher in (method.teacher, method.teacher_head):  # a run's moving average differs from its student
        for parameter in teacher.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return method


def make_batch(dim: int, batch: int = 4, square: bool = False) -> torch.Tensor:
    shape = (SQUARE if square else PATCHES)[dim]
    return torch.randn(batch, CHANNELS, *shape, generator=torch.Generator().manual_seed(1))


def asked_for(views: ContextViews, turns: dict[str, TurnParams]) -> ContextViews:
    return replace(views, turns=turns, codes={model: turn_code(each) for model, each in turns.items()})


def capture(monkeypatch, name: str) -> list:
    """Calls of a function of the method's module: arguments by name, and what was returned."""
    import nnssl.methods.pcrl as module

    original, calls = getattr(module, name), []
    signature = inspect.signature(original)

    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append((signature.bind(*args, **kwargs).arguments, result))
        return result

    monkeypatch.setattr(module, name, wrapper)
    return calls


def generators(step: int = 0, batch: int = 4) -> list[torch.Generator]:
    return sample_generators(0, "test", step, range(batch))


def features_of(method: PCRL, views: ContextViews) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    with torch.no_grad():
        return method.network.encoder(views.seen_o), method.teacher(views.seen_m)


# views and targets


@dims
def test_targets_are_the_clean_crops_turned(dim, monkeypatch):
    """To the bit, and different from what the encoders see wherever something was painted."""
    calls = capture(monkeypatch, "draw_corruption")
    method = make_stage(dim, "blur_probability=0", "shuffle_probability=0", "paint_probability=1")
    views = method.make_views(make_batch(dim), generators())
    targets = reconstruction_targets(views, "mixed_then_turned")
    assert tuple(targets) == MODELS
    for model, clean, seen, (_, painting) in zip(
        "om", (views.clean_o, views.clean_m), (views.seen_o, views.seen_m), calls, strict=True
    ):
        assert torch.equal(undo_turns(targets[model], views.turns[model]), clean)
        painted = painted_mask(painting, torch.device("cpu"))
        assert painted.any()
        assert not painted.all()
        turned = apply_turns(seen, views.turns[model])
        where = apply_turns(painted[:, None].float(), views.turns[model]).bool().expand_as(turned)
        assert (turned[where] != targets[model][where]).all()
        assert torch.equal(turned[~where], targets[model][~where])
    mixed = torch.stack(
        [
            share * first + (1 - share) * second
            for share, first, second in zip(views.mixing, views.clean_o, views.clean_m, strict=True)
        ]
    )
    torch.testing.assert_close(undo_turns(targets["h"], views.turns["h"]), mixed)


@dims
def test_the_code_s_hybrid_target_mixes_what_was_turned(dim):
    views = make_stage(dim).make_views(make_batch(dim), generators())
    targets = reconstruction_targets(views, "turned_then_mixed")
    torch.testing.assert_close(targets["h"], mix(targets["o"], targets["m"], views.mixing))
    assert not torch.equal(targets["h"], reconstruction_targets(views, "mixed_then_turned")["h"])


@dims
def test_crops_overlap_in_mm(dim, monkeypatch):
    """1,000 pairs, small enough that chance alone often gives less."""
    calls = capture(monkeypatch, "draw_overlapping")
    method = make_stage(dim, "crop_fraction=0.1,0.6", "rotation_deg=" + ",".join(["0"] * (1 if dim == 2 else 3)))
    for step in range(10):
        method.make_views(make_batch(dim, 100), generators(step, 100))
    spacing = method.configuration.spacing_mm
    overlaps = torch.cat(
        [intersection_over_union(*(to_mm(crop_boxes(each), spacing) for each in pair)) for _, pair in calls]
    )
    assert len(overlaps) == 1000
    assert overlaps.min() >= method.settings.least_iou - 1e-9
    assert overlaps.min() < 0.3


@dims
def test_a_sample_is_the_same_in_any_batch_and_replays(dim):
    method = make_stage(dim)
    batch = make_batch(dim)
    kept = batch.clone()
    whole, part = method.make_views(batch, generators()), method.make_views(batch[2:], generators()[2:])
    again = method.make_views(batch, generators())
    assert torch.equal(batch, kept)
    for name in ("clean_o", "clean_m", "seen_o", "seen_m", "mixing"):
        torch.testing.assert_close(getattr(whole, name)[2:], getattr(part, name), atol=1e-5, rtol=1e-5)
        assert torch.equal(getattr(whole, name), getattr(again, name)), name
    for model in MODELS:
        assert torch.equal(turn_code(whole.turns[model])[2:], turn_code(part.turns[model]))
    assert not torch.equal(whole.clean_o, whole.clean_m)


@dims
def test_turned_crops_overlap_too(dim, monkeypatch):
    """Overlap counted on random points of the patch, for crops that are turned by up to 10 degrees and zoomed."""
    calls = capture(monkeypatch, "draw_overlapping")
    make_stage(dim, "crop_fraction=0.1,0.6").make_views(make_batch(dim, 100), generators(0, 100))
    (_, pair) = calls[0]
    points = torch.rand(20_000, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = points * torch.tensor(PATCHES[dim]) - 0.5
    inside = []
    for crop in pair:
        within = map_points(points.expand(100, -1, -1), crop, "to_output")
        inside.append(((within >= -0.5) & (within <= torch.tensor(PATCHES[dim]) - 0.5)).all(dim=2))
    overlaps = (inside[0] & inside[1]).sum(dim=1) / (inside[0] | inside[1]).sum(dim=1)
    assert overlaps.min() > 0.25 - 0.02
    assert overlaps.min() < 0.35


@dims
def test_what_views_are_drawn_from(dim, monkeypatch):
    names = ("draw_intensity", "apply_intensity", "draw_corruption", "apply_corruption", "draw_turns")
    calls = {name: capture(monkeypatch, name) for name in names}
    method = make_stage(dim, "inpainting_share=0.4", square=True)
    views = method.make_views(make_batch(dim, 200, square=True), generators(0, 200))
    spacing = method.configuration.spacing_mm
    for (arguments, _), (applied, blurred), (corrupted, _), seen in zip(
        calls["draw_intensity"],
        calls["apply_intensity"],
        calls["apply_corruption"],
        (views.seen_o, views.seen_m),
        strict=True,
    ):
        sigma_mm = [s * mm for s, mm in zip(arguments["ranges"].blur_vox[-dim:], spacing, strict=True)]
        assert sigma_mm == pytest.approx([2.0 * min(spacing)] * dim)
        assert set(applied["params"].changes) == {"blur"}
        assert blurred.var() < 0.7 * applied["volumes"].var()
        assert corrupted["volumes"] is blurred
        assert not torch.equal(seen, blurred)
    first, second = (drawn for _, drawn in calls["draw_corruption"])
    assert all(tuple(arguments["spacing_mm"]) == spacing for arguments, _ in calls["draw_corruption"])
    assert torch.equal(first.kind, second.kind)
    assert not torch.equal(first.lower_vox, second.lower_vox)
    painted = first.kind[first.kind > 0]
    assert (painted == 1).float().mean() == pytest.approx(0.4, abs=0.12)
    assert len(painted) / 200 == pytest.approx(0.9, abs=0.08)
    codes = torch.stack([views.codes[model] for model in MODELS])
    for one, other in itertools.combinations(codes, 2):
        assert (one == other).all(dim=1).float().mean() < 0.2
    assert (codes.mean(dim=(0, 1))[:dim] - 0.5).abs().max() < 0.1
    assert (codes.mean(dim=(0, 1))[dim:] - 0.25).abs().max() < 0.1
    assert views.mixing.std() == pytest.approx(1 / math.sqrt(12), abs=0.04)
    assert all(torch.equal(views.codes[model], turn_code(views.turns[model])) for model in MODELS)


@dims
@pytest.mark.parametrize("steps", ["none", "half", "quarter"])
def test_the_error_of_who_is_not_told_against_a_loop(dim, steps):
    """All versions that may be asked for, made one by one; the best common answer is their mean."""
    method = make_stage(dim, f"asked_turns={steps}", "asked_flips=" + str(dim - 1), square=True)
    views = method.make_views(make_batch(dim, 3, square=True), generators(0, 3))
    plane = views.turns["o"].plane
    turns = {"none": [0], "half": [0, 2], "quarter": [0, 1, 2, 3]}[steps]
    crops = {"o": views.clean_o, "m": views.clean_m, "h": mix(views.clean_o, views.clean_m, views.mixing)}
    found = errors_untold(views, method.settings)
    assert set(found) == set(MODELS)
    for model, clean in crops.items():
        versions = []
        for flip, turn in itertools.product([False, True], turns):
            flips = torch.zeros(3, dim, dtype=torch.bool)
            flips[:, dim - 1] = flip
            versions.append(apply_turns(clean, TurnParams(flips, torch.full((3,), turn), plane)))
        mean = torch.stack(versions).mean(dim=0)
        expected = torch.stack([(each - mean).square().flatten(1).mean(dim=1) for each in versions]).mean(dim=0)
        torch.testing.assert_close(found[model], expected)


@dims
def test_no_answer_of_who_is_not_told_is_better_where_voxels_do_not_count(dim):
    """Every version has its own voxels that count; the best common answer is their mean, voxel by voxel."""
    method = make_stage(dim, "asked_turns=quarter", "asked_flips=" + str(dim - 1), square=True)
    volumes = make_batch(dim, 3, square=True)
    learnable = torch.rand(3, *volumes.shape[2:], generator=torch.Generator().manual_seed(1)) < 0.4
    views = method.make_views(volumes, generators(0, 3), learnable)
    errors, numbers = [], []
    for flip, turn in itertools.product([False, True], range(4)):
        flips = torch.zeros(3, dim, dtype=torch.bool)
        flips[:, dim - 1] = flip
        turns = TurnParams(flips, torch.full((3,), turn), views.turns["o"].plane)
        errors.append(apply_turns(views.clean_o, turns))
        numbers.append(apply_turns(views.learnable_o[:, None], turns).float())
    versions, weights = torch.stack(errors), torch.stack(numbers)
    mean = (weights * versions).sum(dim=0) / weights.sum(dim=0).clamp_min(1)
    expected = (weights * (versions - mean).square()).mean(dim=0).flatten(1).mean(dim=1)
    torch.testing.assert_close(errors_untold(views, method.settings)["o"], expected)


def test_the_error_of_who_is_not_told_without_a_code_or_turned_apart():
    views = make_stage(2, "rotation_deg=0").make_views(make_batch(2), generators())
    assert views.learnable_m.all()
    plain = errors_untold(views, make_stage(2, "attention=none").settings)
    expected = [torch.stack([c.var(unbiased=False) for c in image]).mean() for image in views.clean_m]
    torch.testing.assert_close(plain["m"], torch.stack(expected))
    apart = errors_untold(views, make_stage(2, "hybrid_target=turned_then_mixed").settings)
    for sample, share in enumerate(views.mixing.tolist()):
        expected = share**2 * float(apart["o"][sample]) + (1 - share) ** 2 * float(apart["m"][sample])
        assert float(apart["h"][sample]) == pytest.approx(expected, rel=1e-4)


def test_a_decoder_without_attention_is_asked_for_the_crop_as_it_is():
    views = make_stage(2, "attention=none").make_views(make_batch(2), generators())
    assert torch.equal(reconstruction_targets(views, "mixed_then_turned")["o"], views.clean_o)
    assert "h" not in make_stage(2, "mixup=false").make_views(make_batch(2), generators()).turns


# networks


@dims
@pytest.mark.parametrize(("share", "model"), [(1.0, "o"), (0.0, "m")])
def test_a_hybrid_of_one_is_that_one(dim, share, model):
    """On every level, and so after the decoder if the code is the same."""
    method = make_stage(dim)
    views = method.make_views(make_batch(dim), generators())
    turns = dict.fromkeys(MODELS, views.turns["h"])
    views = replace(asked_for(views, turns), mixing=torch.full((4,), share))
    features, taught = features_of(method, views)
    for first, second in zip(features, taught, strict=True):
        assert torch.equal(mix(first, second, views.mixing), {"o": first, "m": second}[model])
    outputs = method.reconstruct(features, taught, views.codes, views.mixing)
    torch.testing.assert_close(outputs["h"], outputs[model], atol=1e-5, rtol=1e-4)


@dims
def test_hybrid_features_are_mixed_on_every_level(dim):
    """The decoder's output for h against a decoder that is given maps mixed in a loop."""
    method = make_stage(dim)
    views = method.make_views(make_batch(dim), generators())
    features, taught = features_of(method, views)
    mixed = [
        torch.stack([s * a + (1 - s) * b for s, a, b in zip(views.mixing, first, second, strict=True)])
        for first, second in zip(features, taught, strict=True)
    ]
    gated = method.attention(mixed[-1], turn_code(views.turns["h"]))
    expected = method.output(decode(method.network.decoder, [*mixed[:-1], gated])[-1])
    found = method.reconstruct(features, taught, views.codes, views.mixing)["h"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@dims
def test_the_code_s_hybrid_mixes_what_was_gated_apart(dim):
    method = make_stage(dim, "hybrid_target=turned_then_mixed")
    views = method.make_views(make_batch(dim), generators())
    features, taught = features_of(method, views)
    gated = [method.attention(maps[-1], views.codes[model]) for model, maps in (("o", features), ("m", taught))]
    mixed = [mix(first, second, views.mixing) for first, second in zip(features[:-1], taught[:-1], strict=True)]
    expected = method.output(decode(method.network.decoder, [*mixed, mix(*gated, views.mixing)])[-1])
    found = method.reconstruct(features, taught, views.codes, views.mixing)["h"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@dims
def test_without_skips_the_bottleneck_alone_decides(dim):
    for skips, equal in (("true", False), ("false", True)):
        method = make_stage(dim, f"skips={skips}")
        views = method.make_views(make_batch(dim), generators())
        features, taught = features_of(method, views)
        other = [torch.randn_like(each) for each in features[:-1]]
        first = method.reconstruct(features, taught, views.codes, views.mixing)["o"]
        second = method.reconstruct([*other, features[-1]], taught, views.codes, views.mixing)["o"]
        assert torch.allclose(first, second, atol=1e-5) is equal


@dims
def test_the_code_changes_the_reconstruction_and_not_the_embedding(dim):
    method = make_stage(dim)
    views = method.make_views(make_batch(dim), generators())
    other = asked_for(views, {**views.turns, "o": no_turns(4, dim, views.turns["o"].plane)})
    assert not torch.equal(turn_code(other.turns["o"]), turn_code(views.turns["o"]))
    features, taught = features_of(method, views)
    before, after = (method.reconstruct(features, taught, each.codes, each.mixing) for each in (views, other))
    changed = (turn_code(other.turns["o"]) != turn_code(views.turns["o"])).any(dim=1)
    assert (before["o"] - after["o"]).abs().flatten(1).amax(dim=1)[changed].min() > 1e-6
    assert torch.equal(before["m"], after["m"])
    assert torch.equal(method.losses(views, 0.0).embeddings, method.losses(other, 0.0).embeddings)


@pytest.mark.parametrize("kind", ["outer", "gate"])
@dims
def test_gates_against_a_loop(dim, kind):
    torch.manual_seed(0)
    attention = TransformationAttention(6, dim + 4, kind, 3, (1, 3, 3)[-dim:])
    feature_map, code = torch.randn(5, 6, *PATCHES[dim]), torch.randint(0, 2, (5, dim + 4)).float()
    attention.eval()
    gates = attention.gates(feature_map, code)
    assert gates.min() >= (0.5 if kind == "outer" else 0.0)
    assert gates.max() < 1
    if kind == "gate":
        assert (gates < 0.5).any()
        expected = torch.stack([feature_map[b, c] * gates[b, c] for b in range(5) for c in range(6)])
        torch.testing.assert_close(attention(feature_map, code), expected.view_as(feature_map))
        return
    gated = torch.stack([feature_map[b, c] * gates[b, c] for b in range(5) for c in range(6)]).view_as(feature_map)
    torch.testing.assert_close(attention(feature_map, code), attention.mix(gated))
    for sample in range(5):
        hidden = [attention.of_map(place).clamp_min(0) for place in feature_map[sample].flatten(1).T]
        factors = [attention.of_code(code[sample]), torch.stack(hidden).mean(dim=0)]
        of_code, of_map = ((each - each.mean()) / (each.var(unbiased=False) + 1e-5).sqrt() for each in factors)
        product = [of_code[i] * of_map[j] for i in range(3) for j in range(3)]
        weighed = attention.weigh(torch.stack(product))
        expected = [1 / (1 + math.exp(-max(0.0, each))) for each in weighed.tolist()]
        torch.testing.assert_close(gates[sample], torch.tensor(expected))


@pytest.mark.parametrize("kind", ["outer", "gate"])
def test_gates_hear_the_code_and_the_map_if_they_should(kind):
    """Maps as instance normalisation leaves them: with the same mean in every channel; images differ in which occur together."""
    torch.manual_seed(0)
    attention = TransformationAttention(32, 6, kind, 16, (3, 3))
    patterns = (torch.randn(8, 32, 3) @ torch.randn(8, 3, 240)).unflatten(2, (12, 20))
    maps = torch.nn.functional.leaky_relu(torch.nn.functional.instance_norm(patterns))
    maps.requires_grad_()
    codes = torch.randint(0, 2, (8, 6)).float()
    by_code = attention.gates(maps[:1].expand(8, -1, -1, -1), codes)
    assert by_code.std(dim=0).max() > 0.01
    by_map = attention.gates(maps, codes[:1].expand(8, -1))
    assert bool(by_map.std(dim=0).max() > 0.01) is (kind == "outer")
    (gradient,) = torch.autograd.grad(by_map.sum(), maps, allow_unused=True)
    assert (gradient is not None and bool(gradient.abs().max() > 0)) is (kind == "outer")


def test_the_convolution_of_the_attention_respects_thick_slices():
    assert make_stage(3).attention.mix.kernel_size == (3, 3, 3)
    network = architecture(3, False, False)
    network["arch_kwargs"]["kernel_sizes"] = [[1, 3, 3]] * 3
    configuration = make_configuration(3)
    settings, _ = resolve_stage(PCRL, planned(configuration), "pcrl.contexts", ())
    method = PCRL(build_network(network, CHANNELS, 3, seed=0), settings, configuration)
    assert method.attention.mix.kernel_size == (1, 3, 3)


# losses


@dims
@pytest.mark.parametrize("negatives", ["queue", "batch", "both"])
def test_losses_against_loops(dim, negatives):
    method = make_stage(dim, f"negatives={negatives}", "queue_length=7")
    views = method.make_views(make_batch(dim), generators())
    output = method.losses(views, 0.0)
    features, taught = features_of(method, views)
    with torch.no_grad():
        queries, keys = method.head(features[-1]), method.teacher_head(taught[-1])
        reconstructed = method.reconstruct(features, taught, views.codes, views.mixing)
    assert negatives == "batch" or len(method.queue.keys) == 7
    total = 0.0
    for index, query in enumerate(queries):
        others = [] if negatives == "queue" else [keys[j] for j in range(4) if j != index]
        others += [] if negatives == "batch" else list(method.queue.keys)
        logits = [math.exp(float(query @ each) / 0.2) for each in [keys[index], *others]]
        total -= math.log(logits[0] / sum(logits)) / 4
    assert output.losses["contrast"].item() == pytest.approx(0.5 * total, rel=1e-4)
    targets, counted = (each(views, "mixed_then_turned") for each in (reconstruction_targets, counted_targets))
    for model in MODELS:
        kept = counted[model][:, None].expand_as(
            targets[model]
        )  # crops are rotated, and their corners lie beyond the patch
        assert 0.5 < kept.float().mean() < 1
        squares = [
            (float(a) - float(b)) ** 2
            for a, b, counts in zip(
                *(each.flatten() for each in (reconstructed[model], targets[model], kept)), strict=True
            )
            if counts
        ]
        assert output.losses[f"reconstruction_{model}"].item() == pytest.approx(
            0.5 * sum(squares) / len(squares), rel=1e-3
        )


@dims
def test_reconstructions_of_the_unit_range_against_numpy(dim):
    """Targets by the percentiles of both clean crops, and a sigmoid after the output layer."""
    method, plain = (make_stage(dim, f"reconstruction_scale={scale}") for scale in ("unit", "z_score"))
    views = method.make_views(make_batch(dim), generators())
    output = method.losses(views, 0.0)
    features, taught = features_of(method, views)
    with torch.no_grad():
        logits = plain.reconstruct(features, taught, views.codes, views.mixing)
    clean_o, clean_m = views.clean_o.numpy().copy(), views.clean_m.numpy().copy()
    for sample, channel in itertools.product(range(4), range(CHANNELS)):
        both = np.stack([clean_o[sample, channel], clean_m[sample, channel]])
        low, high = np.percentile(both, [1, 99])
        for crop in (clean_o, clean_m):
            crop[sample, channel] = np.clip((crop[sample, channel] - low) / (high - low), 0, 1)
    share = views.mixing.numpy().reshape(-1, *(1,) * (dim + 1))
    crops = {"o": clean_o, "m": clean_m, "h": share * clean_o + (1 - share) * clean_m}
    scaled = replace(views, clean_o=torch.from_numpy(clean_o), clean_m=torch.from_numpy(clean_m))
    for model in MODELS:
        target = apply_turns(torch.from_numpy(crops[model]), views.turns[model]).numpy()
        answer = 1 / (1 + np.exp(-logits[model].numpy()))
        kept = counted_targets(views, "mixed_then_turned")[model][:, None].expand(target.shape).numpy()
        expected = 0.5 * float(((answer - target)[kept] ** 2).mean())
        assert output.losses[f"reconstruction_{model}"].item() == pytest.approx(expected, rel=1e-3)
        untold = 0.5 * float(errors_untold(scaled, method.settings)[model].mean()) / float(kept.mean())
        assert output.monitors[f"untold_{model}"].item() == pytest.approx(untold, rel=1e-3)
    assert torch.equal(output.losses["contrast"], plain.losses(views, 0.0).losses["contrast"])


def test_the_encoder_s_share_follows_alpha():
    shares = [
        make_stage(2, f"mixing_alpha={alpha}").make_views(make_batch(2, 64), generators(0, 64)).mixing
        for alpha in ("1", "20", "0.05")
    ]
    assert ((shares[0] - 0.5).abs() > 0.3).float().mean() == pytest.approx(0.4, abs=0.15)
    assert ((shares[1] - 0.5).abs() < 0.3).all()
    assert ((shares[2] - 0.5).abs() > 0.3).float().mean() > 0.8


def test_equal_embeddings_cost_the_log_of_the_candidates(monkeypatch):
    method = make_stage(2, "queue_length=7", "contrast_weight=1", "negatives=queue")
    same = torch.nn.functional.normalize(torch.ones(1, 128), dim=1)
    method.queue.keys.copy_(same.expand(7, -1))
    monkeypatch.setattr(method.head, "embed", lambda _: same.expand(4, -1))
    monkeypatch.setattr(method.teacher_head, "embed", lambda _: same.expand(4, -1))
    views = method.make_views(make_batch(2), generators())
    assert method.losses(views, 0.0).losses["contrast"].item() == pytest.approx(math.log(1 + 7))


@dims
@encoders
def test_whom_each_loss_reaches(dim, residual):
    method = make_stage(dim, residual=residual)
    views = method.make_views(make_batch(dim), generators())
    parts = method.losses(views, 0.0).losses
    teachers = [p for _, module in method.momentum_pairs() for p in module.parameters()]
    assert not any(p.requires_grad for p in teachers)
    encoder = set(map(id, method.network.encoder.parameters()))
    decoder = [
        p for n, p in method.network.decoder.named_parameters() if id(p) not in encoder and "seg_layers" not in n
    ]
    groups = {
        "encoder": list(method.network.encoder.parameters()),
        "decoder": decoder,
        "attention": list(method.attention.parameters()),
        "head": list(method.head.parameters()),
        "output": list(method.output.parameters()),
    }
    expected = {
        "contrast": {"encoder", "head"},
        "reconstruction_o": {"encoder", "decoder", "attention", "output"},
        "reconstruction_m": {"decoder", "attention", "output"},
        "reconstruction_h": {"encoder", "decoder", "attention", "output"},
    }
    assert set(parts) == set(expected)
    for name, loss in parts.items():
        reached = set()
        for group, parameters in groups.items():
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            if any(g is not None and g.abs().max() > 0 for g in gradients):
                reached.add(group)
        assert reached == expected[name], name
    trained = {id(p) for g in method.parameter_groups() for p in g.parameters}
    assert trained == {id(p) for parameters in groups.values() for p in parameters}


@dims
def test_contrast_alone_runs_and_trains_no_decoder(dim, monkeypatch):
    method = make_stage(dim, "reconstruction_weight=0")
    monkeypatch.setattr("nnssl.methods.pcrl.decode", lambda *a: pytest.fail("no decoder is needed"))
    output = method.losses(method.make_views(make_batch(dim), generators()), 0.0)
    assert set(output.losses) == {"contrast"}
    trained = {id(p) for g in method.parameter_groups() for p in g.parameters}
    assert trained == {id(p) for m in (method.network.encoder, method.head) for p in m.parameters()}
    assert method.exported().pretrained == ENCODER
    assert make_stage(dim).exported().pretrained == ENCODER_AND_DECODER


def test_the_queue_gets_the_keys_once_after_the_loss():
    method = make_stage(2, "queue_length=9", "negatives=queue")
    views = method.make_views(make_batch(2), generators())
    before = method.queue.keys.clone()
    output = method.losses(views, 0.0)
    assert torch.equal(method.queue.keys, before)
    with torch.no_grad():
        keys = method.teacher_head(method.teacher(views.seen_m)[-1])
    method.after_step(output.carry)
    torch.testing.assert_close(method.queue.keys[:4], keys)
    assert torch.equal(method.queue.keys[4:], before[4:])


@pytest.mark.parametrize("residual", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["plain", "residual"])
def test_a_batch_is_learned(residual):
    """Every reconstruction gets below answering with the mean of the image, and the contrast below chance."""
    method = make_stage(2, "negatives=batch", "paint_probability=0", "shuffle_probability=0", residual=residual)
    chance = method.settings.contrast_weight * math.log(4)
    smooth = torch.nn.functional.interpolate(make_batch(2)[..., ::4, ::4], PATCHES[2], mode="bicubic")
    views = method.make_views(smooth, generators())
    optimizer = torch.optim.Adam([p for g in method.parameter_groups() for p in g.parameters], lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        output = method.losses(views, 0.0)
        sum(output.losses.values()).backward()
        optimizer.step()
        for student, teacher in method.momentum_pairs():
            update_teacher(student, teacher, 0.9)
    assert output.losses["contrast"] < 0.25 * chance
    for model in MODELS:
        assert output.losses[f"reconstruction_{model}"] < 0.5 * output.monitors[f"untold_{model}"], model
    assert output.monitors["head_retrieval"] == 1


@pytest.mark.nightly
def test_the_right_code_is_heard():
    """After training on draws that never repeat, right codes beat the best that could be made without, and wrong ones do not."""
    clear = (
        "paint_probability=0",
        "shuffle_probability=0",
        "blur_probability=0",
        "crop_fraction=1,1",
        "rotation_deg=0",
    )
    method = make_stage(2, *clear, "flip_probability=0", "asked_turns=none", "asked_flips=1", "mixup=false")
    smooth = torch.nn.functional.interpolate(make_batch(2, 8)[..., ::6, ::10], PATCHES[2], mode="bicubic")
    optimizer = torch.optim.Adam([p for g in method.parameter_groups() for p in g.parameters], lr=3e-3)
    for step in range(200):
        optimizer.zero_grad()
        output = method.losses(method.make_views(smooth, generators(step, 8)), 0.0)
        sum(output.losses.values()).backward()
        optimizer.step()
    views = method.make_views(smooth, generators(999, 8))
    flipped = TurnParams(
        ~views.turns["o"].flips & torch.tensor([False, True]), *list(vars(views.turns["o"]).values())[1:]
    )
    target = reconstruction_targets(views, "mixed_then_turned")["o"]
    with torch.no_grad():
        features, taught = features_of(method, views)
        right, wrong = (
            float((method.reconstruct(features, taught, each.codes, each.mixing)["o"] - target).square().mean())
            for each in (views, asked_for(views, {**views.turns, "o": flipped}))
        )
    untold = float(errors_untold(views, method.settings)["o"].mean())
    assert right < untold < wrong


def test_the_moving_average_of_a_run():
    assert make_stage(2).momentum(0.5) == pytest.approx(0.9, abs=0.1)
    long = make_stage(2, "epochs=100", "iterations_per_epoch=1000", "teacher_momentum=0.99")
    assert long.momentum(0.0) == long.momentum(1.0) == 0.99


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("asked_turns=quarter",), "exchanges 12 voxels of 1 mm and 20 voxels of 1.5 mm; set asked_turns=half"),
        (("turn_plane=1,0",), r"turn_plane must be two ascending axes of 2, got \(1, 0\)"),
        (("asked_flips=0,2",), r"asked_flips must be axes from 0 to 1, got \(0, 2\)"),
        (("contrast_weight=0", "reconstruction_weight=0"), "must be above 0, got 0 for both"),
        (("mixing_alpha=0",), "mixing_alpha"),
        (("batch_size=1", "negatives=batch"), "set batch_size=2 or negatives=queue"),
    ],
)
def test_settings_that_do_not_fit(overrides, message):
    with pytest.raises(UserError, match=message):
        make_stage(2, *overrides)


def test_a_quarter_turn_would_distort_what_has_other_spacing():
    """As many voxels along both sides, of another size."""
    configuration = replace(make_configuration(2), patch_size=(12, 12), spacing_mm=(1.0, 1.5))
    settings, _ = resolve_stage(PCRL, planned(configuration), "pcrl.contexts", ("asked_turns=quarter",))
    with pytest.raises(UserError, match="12 voxels of 1 mm and 12 voxels of 1.5 mm"):
        PCRL(build_network(architecture(2, False, False), CHANNELS, 3, seed=0), settings, configuration)


def test_what_the_plan_decides():
    configuration = make_configuration(3)
    settings, origins = resolve_stage(PCRL, planned(configuration), "pcrl.contexts", ())
    assert settings.rotation_deg == (10.0, 0.0, 0.0)
    assert (settings.turn_plane, settings.asked_turns, settings.attention_rank) == ((1, 2), "half", 8)
    assert (settings.flip_axes, settings.asked_flips) == ((1, 2), (0, 1, 2))
    assert make_stage(3, square=True).settings.asked_turns == "quarter"
    # a patch that the user chose, without equal sides
    assert make_stage(3, "patch_size=4,12,16", square=True).settings.asked_turns == "half"
    assert {origins[key] for key in ("turn_plane", "attention_rank", "queue_length", "crop_fraction")} == {"plan"}
    with pytest.raises(UserError, match="crop_fraction"):
        make_stage(2, "crop_fraction=0.9,0.2")
