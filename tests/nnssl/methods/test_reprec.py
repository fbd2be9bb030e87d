"""Properties of RepRec (methods 1.11 of the specification) on tiny networks, in 2D and in anisotropic 3D with two channels."""

import copy
import math

import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.methods import reprec
from nnssl.methods.reprec import MaskedViews, RepRecContrastive, RepRecGenerative
from nnssl.methods.settings import resolve_stage
from nnssl.momentum import update_teacher
from nnssl.networks.backbone import build_network
from nnssl.networks.tokens import map_to_tokens
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2


def make_stage(stage: str, dim: int, *overrides: str, residual: bool = False):
    implementation = {"contrastive": RepRecContrastive, "generative": RepRecGenerative}[stage]
    configuration = make_configuration(dim)
    settings, _ = resolve_stage(implementation, planned(configuration), f"reprec.{stage}", overrides)
    network = build_network(architecture(dim, residual, True), CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    return network, implementation(network, settings, configuration)


def make_batch(dim: int, batch: int = 4) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, CHANNELS, *PATCHES[dim])


def make_waves(batch: int) -> torch.Tensor:
    """Return 2D patches that differ in the wavelength and direction of their stripes, which a crop does not hide."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(20.0), indexing="ij")
    waves = [torch.sin((0.4 + 0.4 * i) * (x if i % 2 else y)) for i in range(batch)]
    return torch.stack(waves)[:, None].repeat(1, CHANNELS, 1, 1)


def generators(step: int = 0, batch: int = 4) -> list[torch.Generator]:
    return sample_generators(0, "test", step, range(batch))


dims = pytest.mark.parametrize("dim", [2, 3])


# stage 1


@dims
def test_views_are_two_different_crops_that_replay(dim):
    _, method = make_stage("contrastive", dim)
    batch = make_batch(dim)
    kept = batch.clone()
    query, key = method.make_views(batch, generators())
    again = method.make_views(batch, generators())
    assert torch.equal(batch, kept)
    assert torch.equal(query, again[0])
    assert torch.equal(key, again[1])
    assert query.shape == key.shape == batch.shape
    assert not torch.allclose(query, key)
    assert not torch.allclose(query, method.make_views(batch, generators(step=1))[0])


@dims
def test_a_sample_is_the_same_in_any_batch(dim):
    _, method = make_stage("contrastive", dim)
    batch = make_batch(dim)
    whole = method.make_views(batch, generators())
    part = method.make_views(batch[2:], sample_generators(0, "test", 0, [2, 3]))
    for all_views, part_views in zip(whole, part, strict=True):
        assert torch.allclose(all_views[2:], part_views, atol=1e-6)


@pytest.mark.parametrize("negatives", ["both", "queue", "batch"])
def test_loss_is_the_formula(negatives):
    """MoCo's equation 1 written out, on the embeddings of the method's own encoders."""
    _, method = make_stage("contrastive", 3, f"negatives={negatives}", "temperature=0.5")
    update_teacher(method.encoder, method.key_encoder, 0.0)
    query_volumes, key_volumes = method.make_views(make_batch(3), generators())
    loss = method.losses((query_volumes, key_volumes), 0.0).losses["contrast"].item()
    queries = method.head(method.encoder(query_volumes)[1]).tolist()  # of the stage of the tokens
    keys = method.key_head(method.key_encoder(key_volumes)[1]).tolist()
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    total = 0.0
    for i, query in enumerate(queries):
        others = method.queue.keys.tolist() if negatives != "batch" else []
        others += [k for j, k in enumerate(keys) if j != i] if negatives != "queue" else []
        logits = [dot(query, keys[i]) / 0.5] + [dot(query, other) / 0.5 for other in others]
        top = max(logits)
        total -= logits[0] - top - math.log(sum(math.exp(x - top) for x in logits))
    assert loss == pytest.approx(total / len(queries), rel=1e-4)


@pytest.mark.parametrize(
    ("negatives", "expected"), [("queue", math.log(1 + 10)), ("batch", math.log(4)), ("both", math.log(4 + 10))]
)
def test_collapsed_embeddings_cost_what_theory_says(negatives, expected):
    _, method = make_stage("contrastive", 2, f"negatives={negatives}")
    for head in (method.head, method.key_head):
        for parameter in head.parameters():
            parameter.data.zero_()
        head.project.bias.data.fill_(1.0)
    if negatives != "batch":
        method.queue.keys.fill_(1 / math.sqrt(method.queue.keys.shape[1]))
    views = method.make_views(make_batch(2), generators())
    assert method.losses(views, 0.0).losses["contrast"].item() == pytest.approx(expected, abs=1e-4)


@dims
def test_gradient_reaches_encoder_and_head_and_nothing_else(dim):
    network, method = make_stage("contrastive", dim)
    method.losses(method.make_views(make_batch(dim), generators()), 0.0).losses["contrast"].backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached
    assert all(name.startswith(("encoder.", "head.")) for name in reached)
    given = {id(p) for group in method.parameter_groups() for p in group.parameters}
    stages = network.encoder.stages[: network.token_stage + 1]  # the deeper one has no part in the loss
    wanted = {id(p) for p in [*stages.parameters(), *method.head.parameters()]}
    assert given == wanted
    assert all(p.grad is None for p in [*network.decoder.seg_layers.parameters(), *network.transformer.parameters()])
    # biases before a norm have no effect; every kernel and every head weight has
    for name, _ in method.named_parameters():
        if name.startswith(("encoder.stages.0.", "encoder.stages.1.", "head.")) and name.endswith("weight"):
            assert name in reached, name


def test_queue_takes_the_keys_and_only_after_the_step():
    _, method = make_stage("contrastive", 2, "negatives=queue")
    before = method.queue.keys.clone()
    output = method.losses(method.make_views(make_batch(2), generators()), 0.0)
    assert torch.equal(method.queue.keys, before)
    method.after_step(output.carry)
    assert torch.allclose(method.queue.keys[:4], output.carry)
    assert torch.equal(method.queue.keys[4:], before[4:])
    assert int(method.queue.pointer) == 4


def test_teacher_starts_equal_and_averages():
    _, method = make_stage("contrastive", 2)
    for student, teacher in method.momentum_pairs():
        for mine, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() != theirs.data_ptr()
            assert not theirs.requires_grad
    assert method.momentum(0.0) == pytest.approx(0.9)
    _, short = make_stage("contrastive", 2, "epochs=5")
    assert short.momentum(0.0) == pytest.approx(1 - 20 / 50)


def test_training_separates_patches():
    """Some steps on one batch bring every query nearer to its own key than to the others."""
    _, method = make_stage("contrastive", 2, "negatives=batch", "temperature=0.2")
    views = method.make_views(make_waves(6), generators(batch=6))
    optimizer = torch.optim.AdamW([p for group in method.parameter_groups() for p in group.parameters], lr=3e-3)
    first = None
    for _ in range(100):
        loss = method.losses(views, 0.0).losses["contrast"]
        first = first if first is not None else loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for student, teacher in method.momentum_pairs():
            update_teacher(student, teacher, 0.5)
    assert loss.item() < 0.5 * first


# stage 2


@dims
def test_frozen_encoder_is_bit_identical_after_training(dim):
    network, method = make_stage("generative", dim)
    before = copy.deepcopy(network.encoder.state_dict())
    optimizer = torch.optim.AdamW(
        [p for group in method.parameter_groups() for p in group.parameters], lr=1e-2, weight_decay=0.5
    )
    method.train()
    assert not network.encoder.training
    for step in range(3):
        output = method.losses(method.make_views(make_batch(dim), generators(step)), 0.0)
        optimizer.zero_grad()
        output.losses["recovery"].backward()
        optimizer.step()
    after = network.encoder.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in network.encoder.parameters())


@dims
def test_masks_have_the_exact_count_and_differ(dim):
    _, method = make_stage("generative", dim)
    tokens = math.prod(method.configuration.tokens.grid)
    first = method.make_views(make_batch(dim), generators(0))
    second = method.make_views(make_batch(dim), generators(1))
    assert first.mask.sum(dim=1).tolist() == [math.ceil(0.75 * tokens)] * 4
    assert first.visible.shape == (4, tokens - math.ceil(0.75 * tokens))
    for sample in range(4):
        assert not first.mask[sample][first.visible[sample]].any()
    assert not torch.equal(first.mask[0], first.mask[1])
    assert not torch.equal(first.mask, second.mask)


@dims
def test_transformer_sees_visible_tokens_only(dim, monkeypatch):
    """Masked feature tokens replaced by 1e6 change neither the encoded tokens nor the recovered ones."""
    network, method = make_stage("generative", dim)
    views = method.make_views(make_batch(dim), generators())
    features = network.encoder(views.volumes)
    seen = {}
    encode = method.transformer.encode

    def watch(tokens, positions):
        seen["count"] = tokens.shape[1]
        seen["encoded"] = encode(tokens, positions)
        return seen["encoded"]

    monkeypatch.setattr(method.transformer, "encode", watch)

    monkeypatch.setattr(reprec, "maps_up_to", lambda encoder, volumes, last: features[: last + 1])
    method.losses(views, 0.0)
    clean, count = seen["encoded"], seen["count"]
    assert count == views.visible.shape[1]
    spoiled = list(features)
    tokens = map_to_tokens(features[1]).clone()
    tokens[views.mask] = 1e6
    spoiled[1] = tokens.transpose(1, 2).unflatten(2, features[1].shape[2:])
    monkeypatch.setattr(reprec, "maps_up_to", lambda encoder, volumes, last: spoiled[: last + 1])
    method.losses(views, 0.0)
    assert torch.equal(seen["encoded"], clean)


@dims
def test_recovery_loss_is_the_formula(dim):
    """MSE over masked tokens between prediction and layer-normalised feature, in loops."""
    network, method = make_stage("generative", dim)
    views = method.make_views(make_batch(dim), generators())
    captured = {}
    method.decoder.register_forward_hook(lambda module, args, output: captured.update(prediction=output))
    output = method.losses(views, 0.0)
    features = map_to_tokens(network.encoder(views.volumes)[1])
    total, count, baseline = 0.0, 0, 0.0
    for sample in range(4):
        standard = []
        for token in features[sample].tolist():
            mean = sum(token) / len(token)
            variance = sum((x - mean) ** 2 for x in token) / len(token)
            standard.append([(x - mean) / math.sqrt(variance + 1e-5) for x in token])
        visible = [t for t, masked in zip(standard, views.mask[sample].tolist(), strict=True) if not masked]
        mean_visible = [sum(column) / len(visible) for column in zip(*visible, strict=True)]
        for index, masked in enumerate(views.mask[sample].tolist()):
            if masked:
                prediction = captured["prediction"][sample, index].tolist()
                count += 1
                for p, t, v in zip(prediction, standard[index], mean_visible, strict=True):
                    total += (p - t) ** 2 / len(prediction)
                    baseline += (v - t) ** 2 / len(prediction)
    assert output.losses["recovery"].item() == pytest.approx(total / count, rel=1e-3)
    assert output.monitors["recovery_of_visible_mean"].item() == pytest.approx(baseline / count, rel=1e-3)


@dims
def test_gradient_reaches_transformer_and_decoder(dim):
    network, method = make_stage("generative", dim)
    method.losses(method.make_views(make_batch(dim), generators()), 0.0).losses["recovery"].backward()
    given = [p for group in method.parameter_groups() for p in group.parameters]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in given)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {f"transformer.{n}" for n, _ in network.transformer.named_parameters()} - {
        "transformer.project.weight",
        "transformer.project.bias",
        "transformer.gate",
    }
    assert {id(p) for p in given} == {id(p) for p in method.parameters() if p.requires_grad}


@pytest.mark.nightly
def test_overfits_one_batch_below_the_trivial_baseline():
    _, method = make_stage("generative", 2)
    views = method.make_views(make_waves(4), generators())
    optimizer = torch.optim.AdamW([p for group in method.parameter_groups() for p in group.parameters], lr=1e-2)
    baseline = method.losses(views, 0.0).monitors["recovery_of_visible_mean"]
    assert method.losses(views, 0.0).losses["recovery"] > baseline
    for _ in range(60):
        output = method.losses(views, 0.0)
        optimizer.zero_grad()
        output.losses["recovery"].backward()
        optimizer.step()
    assert output.losses["recovery"] < 0.9 * baseline


def test_what_leaves():
    network, contrastive = make_stage("contrastive", 3)
    assert network.token_stage == 1
    assert contrastive.exported().pretrained == (
        "encoder.stages.0.", "encoder.stages.1.", "decoder.encoder.stages.0.", "decoder.encoder.stages.1.",
    )  # fmt: skip
    network, generative = make_stage("generative", 3)
    exported = generative.exported()
    names = list(network.state_dict())
    for prefix in exported.pretrained:
        assert any(name.startswith(prefix) for name in names), prefix
    assert set(exported.fixed) <= set(names)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert all(name.startswith(exported.pretrained) for name in trained)
    _, residual = make_stage("contrastive", 3, residual=True)
    assert "encoder.stem." in residual.exported().pretrained
    # what pretraining alone needs has no name in the network
    assert not any(name.startswith(("decoder.mask_token", "head.", "queue.", "key_")) for name in names)


def test_padding_of_the_views_dataclass_is_checked():
    """The mask must cover exactly the tokens of the plan's grid: another grid is refused, not silently broadcast."""
    _, method = make_stage("generative", 2)
    views = method.make_views(make_batch(2), generators())
    with pytest.raises(Exception):  # noqa: B017, PT011  whichever layer notices first
        method.losses(MaskedViews(views.volumes, views.mask[:, :-1], views.visible, views.counted), 0.0)
