"""PCRL: views and targets, the shared decoder, whom each loss reaches, and the formulas against slow loops."""

import math
from dataclasses import replace

import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.methods.pcrl import MODELS, PCRL, ContextViews, mix, reconstruction_targets
from nnssl.methods.settings import resolve_stage
from nnssl.momentum import update_teacher
from nnssl.networks.attention import TransformationAttention
from nnssl.networks.backbone import build_network
from nnssl.networks.dense import ENCODER, ENCODER_AND_DECODER, decode
from nnssl.views.boxes import intersection_over_union, to_mm
from nnssl.views.corruption import painted_mask
from nnssl.views.spatial import crop_boxes
from nnssl.views.turns import apply_turns, no_turns, turn_code, undo_turns
from tests.nnssl.methods.tiny_configuration import make_configuration
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2
dims = pytest.mark.parametrize("dim", [2, 3])
encoders = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])


def make_stage(dim: int, *overrides: str, residual: bool = False) -> PCRL:
    configuration = make_configuration(dim)
    settings, _ = resolve_stage(PCRL, configuration, "pcrl.contexts", overrides)
    network = build_network(architecture(dim, residual, False), CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    return PCRL(network, settings, configuration)


def make_batch(dim: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *PATCHES[dim], generator=torch.Generator().manual_seed(1))


def generators(step: int = 0, batch: int = 4) -> list[torch.Generator]:
    return sample_generators(0, "test", step, range(batch))


def features_of(method: PCRL, views: ContextViews) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    with torch.no_grad():
        return method.network.encoder(views.seen_o), method.teacher(views.seen_m)


# views and targets


@dims
def test_targets_are_the_clean_crops_turned(dim, monkeypatch):
    """To the bit, and different from what the encoders see wherever something was painted."""
    import nnssl.methods.pcrl as module

    drawn = []
    original = module.draw_corruption
    monkeypatch.setattr(module, "draw_corruption", lambda *a, **k: drawn.append(original(*a, **k)) or drawn[-1])
    method = make_stage(dim, "blur_probability=0", "shuffle_probability=0", "paint_probability=1")
    views = method.make_views(make_batch(dim), generators())
    targets = reconstruction_targets(views, "mixed_then_turned")
    assert tuple(targets) == MODELS
    for model, clean, seen, painting in zip(
        "om", (views.clean_o, views.clean_m), (views.seen_o, views.seen_m), drawn, strict=True
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
    import nnssl.methods.pcrl as module

    drawn = []
    original = module.draw_overlapping
    monkeypatch.setattr(module, "draw_overlapping", lambda *a: drawn.append(original(*a)) or drawn[-1])
    method = make_stage(dim, "crop_fraction=0.1,0.6", "rotation_deg=" + ",".join(["0"] * (1 if dim == 2 else 3)))
    for step in range(10):
        method.make_views(make_batch(dim, 100), generators(step, 100))
    spacing = method.configuration.spacing_mm
    overlaps = torch.cat(
        [intersection_over_union(*(to_mm(crop_boxes(each), spacing) for each in pair)) for pair in drawn]
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
    views = replace(views, mixing=torch.full((4,), share), turns=turns)
    features, taught = features_of(method, views)
    for first, second in zip(features, taught, strict=True):
        assert torch.equal(mix(first, second, views.mixing), {"o": first, "m": second}[model])
    outputs = method.reconstruct(features, taught, views)
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
    torch.testing.assert_close(method.reconstruct(features, taught, views)["h"], expected, atol=1e-4, rtol=1e-4)


@dims
def test_without_skips_the_bottleneck_alone_decides(dim):
    for skips, equal in (("true", False), ("false", True)):
        method = make_stage(dim, f"skips={skips}")
        views = method.make_views(make_batch(dim), generators())
        features, taught = features_of(method, views)
        other = [torch.randn_like(each) for each in features[:-1]]
        first = method.reconstruct(features, taught, views)["o"]
        second = method.reconstruct([*other, features[-1]], taught, views)["o"]
        assert torch.allclose(first, second, atol=1e-5) is equal


@dims
def test_the_code_changes_the_reconstruction_and_not_the_embedding(dim):
    method = make_stage(dim)
    views = method.make_views(make_batch(dim), generators())
    other = replace(views, turns={**views.turns, "o": no_turns(4, dim, views.turns["o"].plane)})
    assert not torch.equal(turn_code(other.turns["o"]), turn_code(views.turns["o"]))
    features, taught = features_of(method, views)
    before, after = (method.reconstruct(features, taught, each) for each in (views, other))
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
    gates = attention.gates(feature_map, code)
    assert gates.min() >= (0.5 if kind == "outer" else 0.0)
    assert gates.max() < 1
    if kind == "gate":
        assert (gates < 0.5).any()
        expected = torch.stack([feature_map[b, c] * gates[b, c] for b in range(5) for c in range(6)])
        torch.testing.assert_close(attention(feature_map, code), expected.view_as(feature_map))
        return
    for sample in range(5):
        of_code = attention.of_code(code[sample])
        of_map = attention.of_map(torch.stack([channel.mean() for channel in feature_map[sample]]))
        product = [of_code[i] * of_map[j] for i in range(3) for j in range(3)]
        weighed = attention.weigh(torch.stack(product))
        expected = [1 / (1 + math.exp(-max(0.0, each))) for each in weighed.tolist()]
        torch.testing.assert_close(gates[sample], torch.tensor(expected))


def test_the_convolution_of_the_attention_respects_thick_slices():
    assert make_stage(3).attention.mix.kernel_size == (3, 3, 3)
    network = architecture(3, False, False)
    network["arch_kwargs"]["kernel_sizes"] = [[1, 3, 3]] * 3
    configuration = make_configuration(3)
    settings, _ = resolve_stage(PCRL, configuration, "pcrl.contexts", ())
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
        reconstructed = method.reconstruct(features, taught, views)
    candidates = {"queue": method.queue.keys if negatives != "batch" else None, "batch": None, "both": None}[negatives]
    total = 0.0
    for index, query in enumerate(queries):
        others = [] if negatives == "queue" else [keys[j] for j in range(4) if j != index]
        others += [] if negatives == "batch" else list(method.queue.keys)
        logits = [math.exp(float(query @ each) / 0.2) for each in [keys[index], *others]]
        total -= math.log(logits[0] / sum(logits)) / 4
    assert candidates is None or len(candidates) == 7
    assert output.losses["contrast"].item() == pytest.approx(0.5 * total, rel=1e-4)
    targets = reconstruction_targets(views, "mixed_then_turned")
    for model in MODELS:
        squares = [
            (float(a) - float(b)) ** 2
            for a, b in zip(reconstructed[model].flatten(), targets[model].flatten(), strict=True)
        ]
        assert output.losses[f"reconstruction_{model}"].item() == pytest.approx(
            0.5 * sum(squares) / len(squares), rel=1e-3
        )


def test_equal_embeddings_cost_the_log_of_the_candidates(monkeypatch):
    method = make_stage(2, "queue_length=7", "contrast_weight=1")
    same = torch.nn.functional.normalize(torch.ones(1, 128), dim=1)
    method.queue.keys.copy_(same.expand(7, -1))
    monkeypatch.setattr(method.head, "forward", lambda _: same.expand(4, -1))
    monkeypatch.setattr(method.teacher_head, "forward", lambda _: same.expand(4, -1))
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
    method = make_stage(2, "queue_length=9")
    views = method.make_views(make_batch(2), generators())
    before = method.queue.keys.clone()
    output = method.losses(views, 0.0)
    assert torch.equal(method.queue.keys, before)
    with torch.no_grad():
        keys = method.teacher_head(method.teacher(views.seen_m)[-1])
    method.after_step(output.carry)
    torch.testing.assert_close(method.queue.keys[:4], keys)
    assert torch.equal(method.queue.keys[4:], before[4:])


@encoders
def test_a_batch_is_learned(residual):
    """Every reconstruction gets below answering with the mean of the image, and the contrast below chance."""
    method = make_stage(2, "negatives=batch", "paint_probability=0", "shuffle_probability=0", residual=residual)
    chance = method.settings.contrast_weight * math.log(4)
    smooth = torch.nn.functional.interpolate(make_batch(2)[..., ::4, ::4], PATCHES[2], mode="bicubic")
    views = method.make_views(smooth, generators())
    optimizer = torch.optim.Adam([p for g in method.parameter_groups() for p in g.parameters], lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        output = method.losses(views, 0.0)
        sum(output.losses.values()).backward()
        optimizer.step()
        for student, teacher in method.momentum_pairs():
            update_teacher(student, teacher, 0.9)
    assert output.losses["contrast"] < 0.25 * chance
    for model in MODELS:
        assert output.losses[f"reconstruction_{model}"] < 0.5 * 0.5 * output.monitors["error_of_mean"], model


def test_what_the_plan_decides():
    configuration = make_configuration(3)
    settings, origins = resolve_stage(PCRL, configuration, "pcrl.contexts", ())
    assert settings.rotation_deg == (10.0, 0.0, 0.0)
    assert (settings.turn_plane, settings.quarter_turns, settings.attention_rank) == ((1, 2), False, 8)
    assert {origins[key] for key in ("turn_plane", "attention_rank", "queue_length", "crop_fraction")} == {"plan"}
    with pytest.raises(UserError, match="crop_fraction"):
        make_stage(2, "crop_fraction=0.9,0.2")
