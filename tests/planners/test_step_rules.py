"""The cost of a step: what the backward pass keeps, counted by torch, and multiply-adds."""

import math
from dataclasses import replace

import pytest
import torch

from nnssl.methods import METHODS, find_stage
from nnssl.networks.backbone import build_network
from nnssl.plan import TokenGrid, TransformerSize
from planners.step_rules import (
    BACKWARD_FACTOR,
    cost_of_step,
    measure_network,
    multiply_adds_of_finetuning,
    values_of_patch,
)
from tests.nnssl.networks.test_hybrid import PATCHES, architecture

STAGES = list(dict.fromkeys(stage for method in METHODS.values() for stage in method.stages))
TOKENS = TokenGrid(stage=2, grid=(4, 5, 5), size_vox=(8, 8, 8), size_mm=(8.0,) * 3, width=40, mask_block=(1, 1, 1))
SIZE = TransformerSize(width=40, depth=8, heads=2, decoder_depth=2)


def kept_bytes(function, parameters) -> int:
    """Return the bytes that the backward pass of a function keeps, without weights."""
    storages = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    del output
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_the_backward_pass_keeps_two_tensors_of_every_value(residual, dim):
    planned = architecture(dim, residual, hybrid=False)
    patch = tuple(4 * n for n in PATCHES[dim])
    network = build_network(planned, 1, 2, 0).train()
    cost = measure_network(planned, patch, 1)
    volumes = torch.zeros(1, 1, *patch)
    skips = [skip.detach().requires_grad_() for skip in network.encoder(volumes)]
    for part, values, function in (
        (network.encoder, cost.encoder_values, lambda: network.encoder(volumes)),
        (network.decoder, cost.decoder_values, lambda: network.decoder(skips)),
    ):
        kept = kept_bytes(function, part.parameters())
        assert kept == pytest.approx(values * math.prod(patch) * 2 * 4, rel=0.2)
    assert cost.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert cost.widest == network.encoder.output_channels[0]


def test_multiply_adds_are_those_of_the_convolutions():
    planned = architecture(3, residual=False, hybrid=False)
    patch = tuple(2 * n for n in PATCHES[3])
    network = build_network(planned, 1, 2, 0)
    counted = {"encoder": 0, "decoder": 0}

    def count(part):
        def hook(layer, inputs, output):
            transposed = isinstance(layer, torch.nn.ConvTranspose3d)
            positions = math.prod((inputs[0] if transposed else output).shape[2:])
            counted[part] += positions * layer.in_channels * layer.out_channels * math.prod(layer.kernel_size)

        return hook

    for part in counted:
        for layer in network.get_submodule(part).modules():
            if isinstance(layer, (torch.nn.Conv3d, torch.nn.ConvTranspose3d)):
                layer.register_forward_hook(count(part))
    # the decoder holds the encoder as well
    with torch.no_grad():
        skips = network.encoder(torch.zeros(1, 1, *patch))
        counted["decoder"] = 0
        encoder = counted["encoder"]
        network.decoder(skips)
    cost = measure_network(planned, patch, 1)
    assert cost.encoder_multiply_adds * math.prod(patch) == pytest.approx(encoder, rel=1e-6)
    assert cost.decoder_multiply_adds * math.prod(patch) == pytest.approx(counted["decoder"], rel=1e-6)
    planned_unet = {
        "patch_size": list(patch), "batch_size": 3, "architecture": planned, "normalization_schemes": ["ZScoreNormalization"],
    }  # fmt: skip
    nnunet = {"dataset_name": "Dataset501_Toy", "configurations": {"3d_fullres": planned_unet}}
    of_step = 3 * 3 * (encoder + counted["decoder"])  # three patches, forward and twice as much backward
    assert multiply_adds_of_finetuning(nnunet, "3d_fullres") == pytest.approx(of_step, rel=1e-6)


COST = replace(
    measure_network(architecture(3, residual=False, hybrid=False), PATCHES[3], 1),
    encoder_values=10.0,
    decoder_values=3.0,
    encoder_multiply_adds=100.0,
    decoder_multiply_adds=30.0,
    widest=1,
)


@pytest.mark.parametrize(
    ("stage", "tokens", "transformer", "values"),
    [
        # a quarter of the encoder's blocks, the decoder's blocks on all tokens, values per token
        ("alice.alignment", TOKENS, SIZE, 100 * 9 * 40 * (8 / 4 + 2) + 100 * 8_000),
        ("alice.alignment", TOKENS, None, 1e4 + 100 * 8_000),
        ("reprec.generative", TOKENS, SIZE, 100 * 9 * 40 * (8 / 4 + 2)),
        ("sam.embedding", None, None, 2 * 1e4 + 3e3),
        ("pix2rep.dense", None, None, 2 * 1e4 + 2 * 3e3),
    ],
)
def test_values_follow_from_the_passes_of_a_stage(stage, tokens, transformer, values):
    assert values_of_patch(find_stage(stage)[1], COST, 1000, tokens, transformer) == pytest.approx(values)


@pytest.mark.parametrize("stage", STAGES, ids=[stage.name for stage in STAGES])
def test_cost_grows_with_the_batch_and_shrinks_with_pieces(stage):
    tokens = TOKENS if stage.reads_tokens else None
    size = SIZE if stage.name == "reprec.generative" else None

    def cost(batch, pieces=1, checkpointing=False, on_gpu=False):
        return cost_of_step(stage, COST, 10**6, batch, tokens, size, 0.0, on_gpu, pieces, checkpointing)

    assert cost(8).memory_gb > cost(4).memory_gb > cost(4, pieces=2).memory_gb > cost(4, pieces=4).memory_gb
    # where the encoder has no graph, its maps take most of the memory, which checkpointing leaves as it is
    assert cost(4, pieces=2, checkpointing=True).memory_gb <= cost(4, pieces=2).memory_gb
    assert cost(4, on_gpu=True).memory_gb < cost(4).memory_gb
    assert cost(8).multiply_adds == pytest.approx(2 * cost(4).multiply_adds, rel=0.01)
    # what is computed again costs one more pass
    assert cost(4).multiply_adds < cost(4, pieces=2).multiply_adds == cost(4, checkpointing=True).multiply_adds


def test_multiply_adds_of_a_dense_step():
    stage = find_stage("pix2rep.dense")[1]
    found = cost_of_step(stage, COST, 1000, 8, None, None, 0.0, False).multiply_adds
    assert found == pytest.approx(8 * BACKWARD_FACTOR * (2 * 100.0 + 2 * 30.0) * 1000, rel=0.01)
