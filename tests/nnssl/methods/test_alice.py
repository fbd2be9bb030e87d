"""Alice on Primus and on U-Nets: what the student sees, whom each loss reaches, CASA, and the formulas against loops."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nnssl.draws import sample_generators
from nnssl.errors import UserError
from nnssl.methods.alice import Alice, check_settings
from nnssl.methods.settings import resolve_stage
from nnssl.momentum import update_teacher
from nnssl.networks import recent_statistics
from nnssl.networks.backbone import build_network
from nnssl.networks.token_alignment import ConditionalAlignment
from nnssl.networks.token_encoders import UNetTokens
from nnssl.networks.tokens import cut_into_tokens
from nnssl.views.partners import PairedViews
from tests.nnssl.methods.tiny_configuration import make_configuration, planned
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

CHANNELS = 2
SMALL = ("projection_hidden=16", "projection_bottleneck=8", "projection_dimensions=12", "alignment_heads=2",
         "teacher_momentum=0.9")  # fmt: skip
PRIMUS = {
    "network_class_name": "nnssl.networks.primus.PlannedPrimus",
    "arch_kwargs": {
        "embed_dim": 36,
        "eva_depth": 2,
        "eva_numheads": 3,
        "patch_embed_size": [2, 4, 4],
        "input_shape": list(PATCHES[3]),
        "decoder_features": 8,
        "drop_path_rate": 0.5,
        "strides": [[1, 1, 1], [2, 4, 4]],
    },
    "_kw_requires_import": [],
}
NETWORKS = {
    "primus": (3, PRIMUS),
    "plain": (3, architecture(3, False, False)),
    "residual": (3, architecture(3, True, False)),
    "slices": (2, architecture(2, False, False)),
}
networks = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True)
def statistics_of_the_batch_alone(monkeypatch) -> None:
    """Tests of ``RecentStatistics`` cover its memory; here only the batch counts, so that a step can be repeated."""
    monkeypatch.setattr(recent_statistics, "MEMORY", 0)


def make_stage(name: str, *overrides: str) -> Alice:
    dim, network = NETWORKS[name]
    configuration = make_configuration(dim)
    if name == "primus":
        configuration = replace(configuration, tokens=replace(configuration.tokens, stage=None))
    settings, _ = resolve_stage(Alice, planned(configuration), "alice.alignment", (*SMALL, "batch_size=4", *overrides))
    built = build_network(network, CHANNELS, 3, seed=0)
    torch.manual_seed(0)
    method = Alice(built, settings, configuration)
    for _, teacher in method.momentum_pairs():  # a run's moving average differs from its student
        for parameter in teacher.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return method


def make_batch(name: str, batch: int = 4) -> torch.Tensor:
    shape = PATCHES[NETWORKS[name][0]]
    return torch.randn(batch, CHANNELS, *shape, generator=torch.Generator().manual_seed(1))


def generators(step: int = 0, batch: int = 4) -> list[torch.Generator]:
    return sample_generators(0, "test", step, range(batch))


def views_of(method: Alice, name: str) -> PairedViews:
    return method.make_views(make_batch(name), generators())


@networks
def test_tokens_are_the_voxels_of_their_place(name):
    """Token by token; in C order of the grid, channels first."""
    method = make_stage(name)
    batch = make_batch(name, 2)
    tokens = cut_into_tokens(batch, method.student.token_vox)
    grid, size = method.student.grid, method.student.token_vox
    assert tokens.shape == (2, math.prod(grid), CHANNELS * math.prod(size))
    for index in range(math.prod(grid)):
        place = torch.unravel_index(torch.tensor(index), grid)
        box = [slice(int(p) * s, (int(p) + 1) * s) for p, s in zip(place, size, strict=True)]
        assert torch.equal(tokens[:, index], batch[(slice(None), slice(None), *box)].flatten(1))
    assert method.student(batch).shape == (2, math.prod(grid), method.student.width)


@networks
def test_visible_tokens_say_nothing_of_masked_voxels(name):
    method = make_stage(name).eval()
    views = views_of(method, name)
    hidden = views.mask.unflatten(1, method.student.grid)
    for axis, size in enumerate(method.student.token_vox):
        hidden = hidden.repeat_interleave(size, dim=axis + 1)
    other = torch.where(hidden[:, None], torch.full_like(views.patches, 7.0), views.patches)
    assert not torch.equal(other, views.patches)
    assert torch.equal(method.student(views.patches, views.visible), method.student(other, views.visible))
    assert not torch.equal(method.student(views.patches), method.student(other))


@pytest.mark.parametrize("residual", [False, True])
def test_convolutions_do_not_spread_what_is_visible(residual):
    """After every stage what is masked is 0 again; so a lone visible token sees zeros around it whatever the network."""
    encoder = build_network(architecture(3, residual, False), CHANNELS, 3, seed=0).encoder
    tokens = UNetTokens(encoder, 1, PATCHES[3])
    seen = []
    for stage in encoder.stages[:2]:
        stage.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    tokens(make_batch("plain", 1), torch.tensor([[37]]))
    assert len(seen) == 2
    for features in seen:  # after the stem of a residual encoder, and after a stage
        assert (features != 0).any(dim=1).sum() == math.prod(tokens.token_vox)


@networks
def test_masks_and_partners(name):
    method = make_stage(name)
    views = views_of(method, name)
    tokens = math.prod(method.student.grid)
    assert (views.mask.sum(dim=1) == math.ceil(0.75 * tokens)).all()
    assert views.partner.tolist() == [1, 0, 3, 2]
    assert not torch.equal(views.mask[0], views.mask[1])
    assert not torch.equal(views.strong, views.patches)
    part = method.make_views(make_batch(name)[2:], generators()[2:])
    assert torch.equal(part.mask, views.mask[2:])
    torch.testing.assert_close(part.strong, views.strong[2:], atol=1e-5, rtol=1e-5)


@networks
def test_reconstruction_is_of_masked_tokens_only(name):
    method = make_stage(name)
    views = views_of(method, name)
    target = cut_into_tokens(views.patches, method.student.token_vox)
    target = (target - target.mean(dim=2, keepdim=True)) / (
        target.var(dim=2, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    with torch.no_grad():
        seen = method.student(views.patches, views.visible)
        predicted = method.decoder(seen, views.visible, method.positions)
    expected = (predicted - target).square().mean(dim=2)[views.mask].mean()
    assert method.losses(views, 0.0).losses["reconstruction"].item() == pytest.approx(float(expected), rel=1e-4)
    method.decoder.predict.forward = lambda tokens: torch.where(views.mask[..., None], target, 99.0)
    assert method.losses(views, 0.0).losses["reconstruction"].item() == pytest.approx(0.0, abs=1e-9)


def standardised(rows):
    """Return rows with mean 0 and standard deviation 1 in every column, one column after the other."""
    return torch.stack([(column - column.mean()) / column.var(unbiased=False).sqrt() for column in rows.T], dim=1)


@pytest.mark.parametrize("similarity", ["cosine", "info_nce"])
@networks
def test_losses_between_and_within_scans_against_loops(name, similarity):
    method = make_stage(name, f"similarity={similarity}")
    views = views_of(method, name)
    whole_output = method.losses(views, 0.0)
    output = whole_output.losses
    with torch.no_grad():
        seen = method.student(views.patches, views.visible)
        projected = method.projection(method.decoder.decode(seen, views.visible, method.positions))
        taught = method.teacher_projection(method.teacher(views.strong))
        whole, wanted = projected.mean(dim=1), standardised(taught.mean(dim=1))
        answers_of_all = standardised(method.inter_predictor(whole))
        between = []
        for index in range(4):
            said = answers_of_all[index]
            other = index + 1 if index % 2 == 0 else index - 1
            if similarity == "cosine":
                between.append(2 - 2 * float(F.cosine_similarity(said, wanted[other], dim=0)))
                continue
            # of the patch itself the teacher says the same place's vector, which is no negative
            logits = {i: float(F.cosine_similarity(said, wanted[i], dim=0)) / 0.2 for i in range(4) if i != index}
            between.append(math.log(sum(map(math.exp, logits.values()))) - logits[other])
        answers = torch.cat(list(method.alignment(seen, projected)))
        truths = torch.cat(list(method.teacher_alignment(seen, taught)))
        first, second = standardised(answers), standardised(truths)
        within = [
            2 - 2 * float(F.cosine_similarity(method.intra_predictor(a), b, dim=0))
            for a, b in zip(first, second, strict=True)
        ]
        directions = torch.stack([row / row.norm() for row in truths])
        spread = sum(float(column.std()) for column in directions.T) / 12 * math.sqrt(12)
    assert whole_output.monitors["teacher_answer_std"].item() == pytest.approx(spread, rel=1e-3)
    assert output["inter"].item() == pytest.approx(sum(between) / 4, rel=1e-4)
    assert output["intra"].item() == pytest.approx(sum(within) / len(within), rel=1e-3)


@networks
def test_partners_are_found_among_the_teacher_s_vectors(name):
    """``head_partner_first`` by a loop: what is said of a patch, and the standardised vectors of all other pairs."""
    method = make_stage(name, "batch_size=8")
    found, expected = [], []
    for seed in range(6):
        batch = torch.randn(8, CHANNELS, *PATCHES[NETWORKS[name][0]], generator=torch.Generator().manual_seed(seed))
        views = method.make_views(batch, generators(seed, 8))
        found.append(float(method.losses(views, 0.0).monitors["head_partner_first"]))
        with torch.no_grad():
            seen = method.student(views.patches, views.visible)
            whole = method.projection(method.decoder.decode(seen, views.visible, method.positions)).mean(dim=1)
            said = standardised(method.inter_predictor(whole))
            taught = standardised(method.teacher_projection(method.teacher(views.strong)).mean(dim=1))
        hits = 0
        for index in range(8):
            alike = [float(F.cosine_similarity(said[index], taught[other], dim=0)) for other in range(8)]
            own = alike[index ^ 1]
            hits += all(own > alike[other] for other in range(8) if other not in (index, index ^ 1))
        expected.append(hits / 8)
    assert found == pytest.approx(expected)
    assert 0 < sum(expected) < 6


def test_patches_of_the_same_place_are_no_negatives():
    """Three pairs of patches of 12 x 24 x 30 mm (see ``PATCHES``): the first two share a scan, and overlap there or not."""
    method = make_stage("primus", "similarity=info_nce", "batch_size=6")
    views = method.make_views(make_batch("primus", 6), generators(0, 6))
    patch = torch.tensor(PATCHES[3])
    lower = torch.zeros(6, 3, dtype=torch.long)
    cases = ["a", "b", "c", "a", "d", "e"]
    apart = lower.clone()
    apart[3] = torch.tensor([0, 0, int(patch[2])])  # next to the first patch
    assert torch.equal(
        method._of_other_places(method.placed(views, cases, apart), 6), method._of_other_places(views, 6)
    )
    near = apart.clone()
    near[3, 2] -= 1  # a common layer of voxels
    placed = method.placed(views, cases, near)
    others = method._of_other_places(placed, 6)
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[:4, 4:] = expected[4:, :4] = True
    assert torch.equal(others, expected)
    torch.testing.assert_close(
        placed.place_mm[3], torch.tensor([0.0, 0.0, (int(patch[2]) - 1) * method.configuration.spacing_mm[2]])
    )
    with torch.no_grad():
        seen = method.student(views.patches, views.visible)
        whole = method.projection(method.decoder.decode(seen, views.visible, method.positions)).mean(dim=1)
        said = standardised(method.inter_predictor(whole))
        taught = standardised(method.teacher_projection(method.teacher(views.strong)).mean(dim=1))
    total, hits = 0.0, 0
    for index in range(6):
        negatives = [4, 5] if index < 4 else [0, 1, 2, 3]
        alike = [float(F.cosine_similarity(said[index], taught[i], dim=0)) / 0.2 for i in range(6)]
        own = alike[index ^ 1]
        total += math.log(math.exp(own) + sum(math.exp(alike[i]) for i in negatives)) - own
        hits += all(own > alike[i] for i in negatives)
    output = method.losses(placed, 0.0)
    assert output.losses["inter"].item() == pytest.approx(total / 6, rel=1e-4)
    assert output.monitors["head_partner_first"].item() == pytest.approx(hits / 6)
    assert output.losses["inter"] < method.losses(views, 0.0).losses["inter"]


def test_pairs_of_one_place_compare_nothing():
    """Without a negative, InfoNCE and the share of partners found are 0 instead of a certain success."""
    method = make_stage("primus", "similarity=info_nce")
    views = method.placed(views_of(method, "primus"), ["a", "b", "a", "c"], torch.zeros(4, 3, dtype=torch.long))
    output = method.losses(views, 0.0)
    assert output.losses["inter"].item() == pytest.approx(0, abs=1e-6)
    assert output.monitors["head_partner_first"].item() == 0


@networks
def test_the_same_views_give_the_same_losses(name):
    """Also while training: nothing is left out at random, neither of the student nor of the teacher."""
    method = make_stage(name).train()
    views = views_of(method, name)
    first, again = (method.losses(views, 0.0) for _ in range(2))
    assert {k: float(v) for k, v in first.losses.items()} == {k: float(v) for k, v in again.losses.items()}


@networks
def test_every_teacher_follows_and_learns_nothing(name):
    method = make_stage(name)
    views = views_of(method, name)
    sum(method.losses(views, 0.0).losses.values()).backward()
    pairs = [
        (method.student, method.teacher),
        (method.projection, method.teacher_projection),
        (method.alignment, method.teacher_alignment),
    ]
    before = [[p.clone() for p in teacher.parameters()] for _, teacher in pairs]
    for student, teacher in method.momentum_pairs():
        update_teacher(student, teacher, 0.75)
    for (student, teacher), old in zip(pairs, before, strict=True):
        for own, now, then in zip(student.parameters(), teacher.parameters(), old, strict=True):
            assert now.grad is None
            assert not now.requires_grad
            torch.testing.assert_close(now, 0.75 * then + 0.25 * own)


@pytest.mark.parametrize("overrides", [(), ("reconstruction_weight=0",), ("inter_weight=0",), ("intra_weight=0",)])
@networks
def test_every_parameter_that_asks_for_a_gradient_gets_one(name, overrides):
    """Else a run on several processes ends at its second step."""
    method = make_stage(name, *overrides)
    sum(method.losses(views_of(method, name), 0.0).losses.values()).backward()
    missed = [key for key, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not missed


def test_alignment_listens_to_what_answers_and_not_to_its_order():
    torch.manual_seed(0)
    alignment = ConditionalAlignment(6, 10, 8, 2, 12)
    asking, answering = torch.randn(3, 5, 6), torch.randn(3, 9, 10)
    attention = alignment.attention(asking, answering)
    torch.testing.assert_close(attention.sum(dim=3), torch.ones(3, 2, 5))
    found = alignment(asking, answering)
    assert found.shape == (3, 5, 8)
    order = torch.randperm(9)
    torch.testing.assert_close(alignment(asking, answering[:, order]), found)
    asked = torch.randperm(5)
    torch.testing.assert_close(alignment(asking[:, asked], answering), found[:, asked])
    for batch in range(3):
        for row in range(5):
            query = alignment.query(alignment.norm_query(asking[batch, row]))
            parts = []
            for head in (slice(0, 4), slice(4, 8)):
                keys = [alignment.key(alignment.norm_answer(each))[head] for each in answering[batch]]
                values = [alignment.value(alignment.norm_answer(each))[head] for each in answering[batch]]
                weights = [math.exp(float(query[head] @ key) / 2) for key in keys]
                parts.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
            torch.testing.assert_close(found[batch, row], alignment.zeta(torch.cat(parts)), atol=1e-5, rtol=1e-4)


def test_the_same_tokens_and_the_same_alignment_agree():
    """Without a predictor, H = Y and equal copies of CASA cost nothing."""
    method = make_stage("primus", "predictor=false")
    method.teacher_alignment.load_state_dict(method.alignment.state_dict())
    seen, tokens = torch.randn(4, 7, 36), torch.randn(4, 30, 12)
    with torch.no_grad():
        loss, _ = method._within(method.alignment(seen, tokens), method.teacher_alignment(seen, tokens))
    assert float(loss) == pytest.approx(0.0, abs=1e-5)


@networks
def test_the_order_of_a_pair_does_not_matter(name):
    method = make_stage(name)
    views = views_of(method, name)
    swapped = PairedViews(*(getattr(views, field)[views.partner] for field in ("patches", "mask", "visible", "strong")),
                          views.partner, views.learnable[views.partner])  # fmt: skip
    first, second = method.losses(views, 0.0).losses, method.losses(swapped, 0.0).losses
    for part in first:
        torch.testing.assert_close(first[part], second[part], atol=1e-5, rtol=1e-4)


def test_the_loss_between_scans_reaches_each_patch_by_its_own_student_only():
    """The term of a patch has no gradient towards what the student sees of its partner, nor towards the teacher's view."""
    method = make_stage("primus")
    views = views_of(method, "primus")
    patches, strong = (each.clone().requires_grad_() for each in (views.patches, views.strong))
    views = replace(views, patches=patches, strong=strong)
    seen = method.student(patches, views.visible)
    whole = method.projection(method.decoder.decode(seen, views.visible, method.positions)).mean(dim=1)
    with torch.no_grad():
        taught = method.teacher_projection(method.teacher(strong)).mean(dim=1)
    others = method._of_other_places(views, 4)[:1]
    term = method._between(method.inter_predictor(whole[:1]), taught, taught, views.partner[:1], others)
    gradient, none = torch.autograd.grad(term, (patches, strong), allow_unused=True)
    assert none is None
    assert gradient[0].abs().max() > 0
    assert (gradient[1:] == 0).all()


@networks
def test_whom_each_loss_reaches(name):
    method = make_stage(name)
    parts = method.losses(views_of(method, name), 0.0).losses
    teachers = [p for _, module in method.momentum_pairs() for p in module.parameters()]
    assert not any(p.requires_grad for p in teachers)
    groups = {
        "encoder": [p for p in method.student.parameters() if p.requires_grad],
        "decoder": list(method.decoder.embed.parameters()),
        "voxels": list(method.decoder.predict.parameters()),
        "projection": list(method.projection.parameters()),
        "alignment": list(method.alignment.parameters()),
        "inter": list(method.inter_predictor.parameters()),
        "intra": list(method.intra_predictor.parameters()),
    }
    expected = {
        "reconstruction": {"encoder", "decoder", "voxels"},
        "inter": {"encoder", "decoder", "projection", "inter"},
        "intra": {"encoder", "decoder", "projection", "alignment", "intra"},
    }
    assert set(parts) == set(expected)
    for part, loss in parts.items():
        reached = set()
        for group, parameters in groups.items():
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            if any(g is not None and g.abs().max() > 0 for g in gradients):
                reached.add(group)
        assert reached == expected[part], part


@networks
def test_what_leaves_is_what_was_trained_of_the_network(name):
    dim, network = NETWORKS[name]
    configuration = make_configuration(dim)
    if name == "primus":
        configuration = replace(configuration, tokens=replace(configuration.tokens, stage=None))
    settings, _ = resolve_stage(Alice, planned(configuration), "alice.alignment", (*SMALL, "batch_size=4"))
    built = build_network(network, CHANNELS, 3, seed=0)
    method = Alice(built, settings, configuration)
    parts = method.losses(views_of(method, name), 0.0).losses
    sum(parts.values()).backward()
    for parameter_name, parameter in built.named_parameters():
        trained = parameter.grad is not None
        assert trained == parameter_name.startswith(method.exported().pretrained), parameter_name
    stages = {name for name in method.exported().pretrained if ".stages." in name}
    assert name == "primus" or stages == {
        f"{part}stages.{i}." for part in ("encoder.", "decoder.encoder.") for i in (0, 1)
    }


def test_masked_modelling_alone_has_no_teacher():
    method = make_stage("primus", "inter_weight=0", "intra_weight=0")
    assert method.momentum_pairs() == []
    assert not hasattr(method, "teacher")
    output = method.losses(views_of(method, "primus"), 0.0)
    assert set(output.losses) == {"reconstruction"}
    for weights, parts in (
        (("inter_weight=0",), {"reconstruction", "intra"}),
        (("intra_weight=0",), {"reconstruction", "inter"}),
    ):
        assert set(make_stage("primus", *weights).losses(views_of(method, "primus"), 0.0).losses) == parts


@pytest.mark.nightly
def test_it_does_not_collapse():
    """200 steps on smooth patches in pairs: partners are found (1/7 by chance), and voxels are recovered."""
    method = make_stage("primus", "batch_size=8")
    places = torch.randn(4, CHANNELS, 2, 3, 5, generator=torch.Generator().manual_seed(3))
    smooth = F.interpolate(places, PATCHES[3], mode="trilinear").repeat_interleave(2, dim=0)
    noise = torch.Generator().manual_seed(4)
    optimizer = torch.optim.AdamW([p for g in method.parameter_groups() for p in g.parameters], lr=1e-3)
    first, partners = None, []
    for step in range(200):
        volumes = smooth + 0.1 * torch.randn(smooth.shape, generator=noise)
        output = method.losses(method.make_views(volumes, generators(step, 8)), step / 200)
        optimizer.zero_grad()
        sum(output.losses.values()).backward()
        optimizer.step()
        for student, teacher in method.momentum_pairs():
            update_teacher(student, teacher, method.momentum(step / 200))
        method.after_step(output.carry)
        first = first or {k: float(v) for k, v in output.losses.items()}
        partners.append(float(output.monitors["head_partner_first"]))
    assert sum(partners[-40:]) / 40 > 0.5
    assert output.monitors["teacher_answer_std"] > 0.3
    assert output.losses["reconstruction"] < output.monitors["reconstruction_of_visible_mean"]
    assert output.losses["reconstruction"] < first["reconstruction"]


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (("reconstruction_weight=0", "inter_weight=0", "intra_weight=0"), 1, "must be above 0, got 0 for all"),
        (("batch_size=3",), 1, "set batch_size=2"),
        (("batch_size=6",), 2, "set batch_size=4"),
        (("batch_size=2", "similarity=info_nce"), 1, "set batch_size=4"),
    ],
)
def test_settings_that_do_not_fit(overrides, processes, message):
    settings, _ = resolve_stage(Alice, planned(make_configuration(3)), "alice.alignment", (*SMALL, *overrides))
    with pytest.raises(UserError, match=message):
        check_settings(settings, processes)
