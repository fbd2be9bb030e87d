"""Rates of every recipe step by step, what is trained in which phase, and the defaults and refusals of recipes."""

import pytest
import torch
from torch import nn

from nnssl.errors import ArgumentError
from nnssl.networks.backbone import build_network
from tests.nnssl.networks.test_hybrid import architecture as unet_architecture
from tests.nnssl.networks.test_primus import SHAPE as PRIMUS_SHAPE
from tests.nnssl.networks.test_primus import build as primus
from tests.trainers.finetuning.runs import killed_and_resumed, trainer_of
from trainers.finetuning.optimisation import StepSchedule, choose_parameters, make_optimizer
from trainers.finetuning.recipes import Choices, make_schedule, network_kind
from trainers.finetuning.schedule import FinetuneSchedule, rate_share


def schedule(
    epochs=1, steps=20, recipe="sawtooth", warmup=4, new=6, rate=0.1, head=0.4, optimizer="sgd", trained="everything"
):
    return FinetuneSchedule(epochs, steps, recipe, warmup, new, rate, head, None, optimizer, trained)


def shares(of: FinetuneSchedule) -> list[float]:
    return [rate_share(step, of) for step in range(of.total_steps)]


# rates


def test_nnunet_is_its_polynomial_decay_at_the_first_step_of_every_epoch():
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    own = schedule(epochs=13, steps=7, recipe="nnunet", warmup=0, new=0)
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = PolyLRScheduler(theirs, 1.0, 13)
    for epoch in range(13):
        scheduler.step(epoch)
        assert rate_share(7 * epoch, own) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
    found = shares(own)
    assert found[0] == 1
    assert all(after < before for before, after in zip(found, found[1:], strict=False))


def test_warmup_is_nnunets_rise_and_decay_with_steps_in_place_of_epochs():
    from nnunetv2.training.lr_scheduler.warmup import Lin_incr_LRScheduler, PolyLRScheduler_offset

    own = schedule(epochs=1, steps=13, recipe="warmup", new=0)
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rising, falling = Lin_incr_LRScheduler(theirs, 1.0, 4), PolyLRScheduler_offset(theirs, 1.0, 13, 4)
    for step, share in enumerate(shares(own)):
        (rising if step < 4 else falling).step(step)
        assert share == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)


def test_sawtooth_has_two_teeth():
    """Six steps for new layers (three up, three down), four steps up for all, ten steps down: every value by hand."""
    found = shares(schedule())
    new = [1 / 3, 2 / 3, 1, 1, (2 / 3) ** 0.9, (1 / 3) ** 0.9]
    rise = [0.25, 0.5, 0.75, 1]
    fall = [(1 - i / 10) ** 0.9 for i in range(10)]
    assert found == pytest.approx([*new, *rise, *fall], rel=1e-12)


@pytest.mark.parametrize("recipe", ["nnunet", "warmup", "sawtooth"])
def test_a_short_run_has_the_shape_of_a_long_one(recipe):
    """100 steps and 5,000: the rates of a short run's step lie among those of the fifty steps in its place in the long run."""
    short, long = (make_schedule("finetune", Choices(1, steps, recipe)) for steps in (100, 5000))
    for step in range(100):
        among = [rate_share(50 * step + each, long) for each in range(50)]
        assert min(among) - 1e-9 <= rate_share(step, short) <= max(among) + 1e-9


def test_lengths_of_the_sources():
    """15 of 150 and 50 of 1,000 epochs of warm-up; as much again for the first phase of sawtooth, half of it rising."""
    for epochs, warmup in ((150, 15), (1000, 50)):
        assert make_schedule("finetune", Choices(epochs)).warmup_steps == 250 * warmup
        both = make_schedule("finetune", Choices(epochs, recipe="sawtooth"))
        assert (both.new_steps, both.warmup_steps) == (250 * warmup, 250 * warmup)


def test_warmup_is_a_share_or_a_number_of_steps():
    for given, steps in ((None, 10), (0.25, 25), (7, 7), (0, 0), (0.001, 1)):
        assert make_schedule("finetune", Choices(1, 100, warmup=given)).warmup_steps == steps


# parameters


class Toy(nn.Module):
    """Names like those of nnU-Net's U-Net: the encoder has a second name below the decoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"stages": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        self.decoder = nn.ModuleDict(
            {"encoder": self.encoder, "stages": nn.Linear(2, 2), "seg_layers": nn.Linear(2, 2)}
        )

    def forward(self, x):
        for layer in (*self.encoder["stages"], self.decoder["stages"], self.decoder["seg_layers"]):
            x = layer(x)
        return x


def names(network: nn.Module, parameters) -> set[str]:
    own = {parameter: name for name, parameter in network.named_parameters()}
    return {own[parameter].removesuffix(".weight") for parameter in parameters if own[parameter].endswith("weight")}


ENCODER = {"encoder.stages.0", "encoder.stages.1"}


@pytest.mark.parametrize(
    ("prefixes", "trained", "old", "new"),
    [
        (("encoder.",), "everything", ENCODER, {"decoder.stages", "decoder.seg_layers"}),
        (("decoder.encoder.", "decoder."), "everything", ENCODER | {"decoder.stages"}, {"decoder.seg_layers"}),
        (("encoder.stages.0.",), "new", set(), {"encoder.stages.1", "decoder.stages", "decoder.seg_layers"}),
        (("encoder.",), "decoder", set(), {"decoder.stages", "decoder.seg_layers"}),
        (("encoder.", "decoder."), "decoder", {"decoder.stages"}, {"decoder.seg_layers"}),
        (("encoder.", "decoder."), "head", set(), {"decoder.seg_layers"}),
        ((), "everything", set(), ENCODER | {"decoder.stages", "decoder.seg_layers"}),
    ],
)
def test_pretrained_new_and_frozen(prefixes, trained, old, new):
    network = Toy()
    found = choose_parameters(network, prefixes, trained)
    assert (names(network, found.pretrained), names(network, found.new)) == (old, new)
    asked = {
        name.removesuffix(".weight") for name, p in network.named_parameters() if p.requires_grad and "weight" in name
    }
    assert asked == old | new


def real_network(kind: str) -> tuple[nn.Module, tuple[str, ...], set[str]]:
    """A tiny network of a kind, what a method pretrains of it, and the parts that are then new."""
    if kind == "primus":
        return primus(deep_supervision=True), ("down_projection.", "eva."), {"up_projection", "decoder.seg_layers"}
    dim, residual, hybrid = {"plain": (3, False, False), "residual": (2, True, False), "hybrid": (3, False, True)}[kind]
    network = build_network(unet_architecture(dim, residual, hybrid), 2, 3, seed=0)
    pretrained = ("encoder.", "decoder.encoder.", *(("transformer.",) if hybrid else ()))
    return network, pretrained, {"decoder.transpconvs", "decoder.stages", "decoder.seg_layers"}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("kind", ["plain", "residual", "hybrid", "primus"])
def test_every_network_has_its_two_phases(kind, optimizer):
    """One step in each phase of a sawtooth: new layers alone move in the first, and pretrained ones in the second."""
    network, pretrained, new = real_network(kind)
    own = schedule(steps=10, warmup=2, new=4, rate=1e-3, head=1e-2, optimizer=optimizer)
    rates = StepSchedule(make_optimizer(choose_parameters(network, pretrained, "everything"), own, 3e-5), own)
    shape = {"plain": (8, 16, 16), "residual": (16, 16), "hybrid": (8, 16, 16), "primus": PRIMUS_SHAPE}[kind]
    for step in (0, 4):
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        rates.set_step(step)
        rates.optimizer.zero_grad(set_to_none=True)
        outputs = network(torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(step)))
        sum(each.square().mean() for each in (outputs if isinstance(outputs, list) else [outputs])).backward()
        rates.optimizer.step()
        moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
        expected = tuple(f"{part}." for part in new)
        if step == 0:
            assert moved
            assert all(name.startswith(expected) for name in moved)
        else:
            assert any(name.startswith(pretrained) for name in moved)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_only_new_layers_move_in_the_first_phase_and_then_all(optimizer):
    torch.manual_seed(0)
    network, own = Toy(), schedule(optimizer=optimizer)
    optim = make_optimizer(choose_parameters(network, ("encoder.", "decoder.stages."), "everything"), own, 3e-5)
    rates = StepSchedule(optim, own)
    for step in range(own.total_steps):
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        rates.set_step(step)
        assert [group["lr"] for group in optim.param_groups] == pytest.approx(
            [highest * rate_share(step, own) for highest in (0.1, 0.4)]
        )
        optim.zero_grad(set_to_none=True)
        network(torch.ones(3, 2) + step).square().sum().backward()
        optim.step()
        moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
        assert moved == ({"decoder.seg_layers.weight", "decoder.seg_layers.bias"} if step < 6 else set(before))


@pytest.mark.parametrize("trained", ["new", "decoder", "head"])
def test_frozen_parts_of_nnunets_network_stay_to_the_bit(run, tmp_path, trained):
    trainer = trainer_of(run, tmp_path / "model", trained=trained, pretrained=("encoder.", "decoder.transpconvs."))
    trainer.initialize()
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.run_training()
    moved = {name for name, p in trainer.network.named_parameters() if not torch.equal(p, before[name])}
    groups = {"encoder", "decoder.transpconvs", "decoder.stages", "decoder.seg_layers"}
    found = {group for group in groups if any(name.startswith(group) for name in moved)}
    assert (
        found
        == {
            "new": {"decoder.stages", "decoder.seg_layers"},
            "decoder": {"decoder.transpconvs", "decoder.stages", "decoder.seg_layers"},
            "head": {"decoder.seg_layers"},
        }[trained]
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_sawtooth_resumes_within_its_first_phase_to_the_bit(run, tmp_path, optimizer):
    """Killed after two of three steps of the first phase; the momentum of new layers is there, that of others begins later."""

    def make(folder, resume=False):
        return trainer_of(
            run, folder, resume, epochs=4, recipe="sawtooth", new_steps=3, warmup_steps=1, optimizer=optimizer,
            learning_rate=0.001, head_learning_rate=0.01, pretrained=("encoder.",),
        )  # fmt: skip

    whole = make(tmp_path / "whole")
    whole.run_training()
    _, _, resumed = killed_and_resumed(make, tmp_path / "killed")
    for found, expected in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


# defaults and refusals


def test_defaults_of_networks_and_starts():
    def chosen(kind, pretrained, mode="finetune", **given):
        own = make_schedule(mode, Choices(10, 5, **given), kind, pretrained)
        return own.recipe, own.optimizer, own.learning_rate

    assert chosen("unet", False) == ("nnunet", "sgd", 1e-2)
    assert chosen("primus", False) == ("nnunet", "adamw", 3e-4)
    assert chosen("primus", True) == ("warmup", "adamw", 1e-4)
    assert chosen("hybrid", True) == ("warmup", "adam", 3e-3)
    assert chosen("hybrid", False) == ("nnunet", "adam", 3e-3)
    assert chosen("primus", True, optimizer="adam") == ("warmup", "adam", 1e-4)
    assert chosen("unet", True)[:2] == chosen("unet", True, "mean_teacher")[:2] == ("sawtooth", "sgd")
    assert chosen("unet", True, optimizer="adam") == ("sawtooth", "adam", 3e-3)
    assert chosen("primus", True, optimizer="sgd", learning_rate=0.5) == ("warmup", "sgd", 0.5)
    assert chosen("unet", False, recipe="sawtooth", scratch_recipe="warmup")[0] == "warmup"
    for pretrained in (True, False):
        assert chosen("primus", pretrained, "linear") == ("nnunet", "adam", 1e-2)


def test_the_arm_from_scratch_trains_everything_at_one_rate():
    own = make_schedule("finetune", Choices(10, 5, head_learning_rate=0.5, trained="head"), pretrained=False)
    assert (own.trained, own.head_learning_rate) == ("everything", own.learning_rate)


def test_a_warmup_may_be_that_of_scratch_alone():
    choices = Choices(1, 100, recipe="nnunet", scratch_recipe="warmup", warmup=0.2)
    assert [make_schedule("finetune", choices, pretrained=each).warmup_steps for each in (True, False)] == [0, 20]


def test_kinds_of_networks():
    assert network_kind("dynamic_network_architectures.architectures.unet.PlainConvUNet") == "unet"
    assert network_kind("nnssl.networks.hybrid.HybridUNet") == "hybrid"
    assert network_kind("nnssl.networks.primus.PlannedPrimus") == "primus"


@pytest.mark.parametrize(
    ("mode", "given", "reason"),
    [
        ("finetune", {"warmup": 50}, "warmup must be less than"),
        ("finetune", {"recipe": "sawtooth", "warmup": 0.95}, "warmup must be less than"),
        ("finetune", {"recipe": "nnunet", "warmup": 3}, "must not be given with recipe nnunet"),
        ("finetune", {"warmup": 2.5}, "a share of the run below 1, or a whole number"),
        ("finetune", {"head_learning_rate": 0.0}, "head_learning_rate must be above 0"),
        ("linear", {"recipe": "sawtooth"}, "recipe cannot be given with mode linear"),
        ("linear", {"trained": "head"}, "trained cannot be given with mode linear"),
        ("linear", {"optimizer": "sgd"}, "optimizer must be adam in mode linear"),
        ("best", {}, "mode must be one of"),
        ("finetune", {"recipe": "sawtoth"}, "recipe must be one of nnunet, warmup, sawtooth, got sawtoth"),
        ("finetune", {"trained": "encoder"}, "trained must be one of everything, new, decoder, head, got encoder"),
    ],
)
def test_what_does_not_fit_is_refused(mode, given, reason):
    with pytest.raises(ArgumentError, match=reason):
        make_schedule(mode, Choices(10, 5, **given))
