"""The contract of every pretext stage: one test over METHODS, which includes every method that is listed there."""

import json

import pytest
import torch

from nnssl.draws import sample_generators
from nnssl.methods import METHODS, Stage
from nnssl.methods.protocol import PretextMethod
from tests.trainers.conftest import NAME
from tests.trainers.finetuning.runs import CPU
from trainers.nnunet_ext import nnssl_trainers
from trainers.pretraining import pretext
from trainers.pretraining.pretrain_trainer import PretrainTrainer

CASES = [
    pytest.param(stage, configuration, id=f"{stage.name}-{configuration}")
    for method in METHODS.values()
    for stage in method.stages
    if stage.name.startswith(f"{method.name}.")
    for configuration in method.configurations
    if stage.runs_in(configuration) == configuration
]


@pytest.mark.parametrize("stage", {stage.name: stage for m in METHODS.values() for stage in m.stages}.values())
def test_every_stage_has_a_trainer_that_nnunet_finds(stage: Stage):
    assert issubclass(stage.load(), PretextMethod)
    trainer = getattr(pretext, stage.trainer)
    assert issubclass(trainer, PretrainTrainer)
    assert trainer.stage == stage.name
    assert getattr(nnssl_trainers, stage.trainer) is trainer
    assert stage.trainer in nnssl_trainers.__all__
    assert stage.trainer in pretext.__dict__


def make_trainer(toy, stage: Stage, configuration: str) -> PretrainTrainer:
    folder = toy.preprocessed / NAME
    plans = json.loads((folder / "nnsslPlans.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads((folder / "dataset.json").read_text())
    trainer = getattr(pretext, stage.trainer)(plans, configuration, "all", dataset_json, CPU)
    trainer.options = type(trainer.options)(alone=True)
    trainer.initialize()
    return trainer


@pytest.mark.parametrize(("stage", "configuration"), CASES)
def test_what_a_stage_declares_is_what_it_does(toy, stage: Stage, configuration: str):
    """Gradients reach exactly the optimizer's parameters, exported names exist, and a step depends on its draws only."""
    trainer = make_trainer(toy, stage, configuration)
    method = trainer.method
    trained = [parameter for group in method.parameter_groups() for parameter in group.parameters]
    assert len({id(parameter) for parameter in trained}) == len(trained)
    assert {id(p) for p in trained} == {id(p) for p in method.parameters() if p.requires_grad}
    students, teachers = ([pair[side] for pair in method.momentum_pairs()] for side in (0, 1))
    for student, teacher in zip(students, teachers, strict=True):
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        named = dict(student.named_parameters())
        assert all(value.shape == named[name].shape for name, value in teacher.named_parameters())
    if teachers:
        assert 0 <= method.momentum(0.0) <= method.momentum(1.0) <= 1
    exported = method.exported()
    names = [name for name, _ in trainer.network.named_parameters(remove_duplicate=False)]
    assert all(any(name.startswith(prefix) for name in names) for prefix in exported.pretrained)
    assert set(exported.fixed) <= set(names)

    generator = torch.Generator().manual_seed(1)
    volumes = torch.randn(4, 1, *trainer.configuration.patch_size, generator=generator)
    before = volumes.clone()
    state = torch.random.get_rng_state()

    begun = {name: value.clone() for name, value in method.named_buffers()}

    def losses() -> dict[str, torch.Tensor]:
        for name, value in begun.items():  # heads remember vectors of earlier steps
            method.get_buffer(name).data = value.clone()
        with torch.no_grad():
            views = method.make_views(volumes, sample_generators(0, stage.name, 0, [0, 1, 2, 3]))
            if method.supervoxel_edges_mm():
                parts = torch.arange(volumes[0, 0].numel(), dtype=torch.int32) % 9 + 1
                views = method.partitioned(views, parts.view(1, *volumes.shape[2:]).expand(4, *volumes.shape[2:]))
        return method.losses(views, 0.5).losses

    parts, again = losses(), losses()
    assert parts
    assert torch.equal(volumes, before), "make_views changes the patches"
    assert all(torch.equal(parts[name], again[name]) for name in parts)
    assert torch.equal(state, torch.random.get_rng_state()), "a step draws from torch's global random state"
    torch.stack([part.float() for part in parts.values()]).sum().backward()
    without = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "parameters that the optimizer gets and no loss reaches"
    assert all(torch.isfinite(p.grad).all() for p in trained)
