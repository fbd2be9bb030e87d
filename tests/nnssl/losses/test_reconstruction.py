"""Masked mean squared error against loops written from RepRec 4.2 and MAE, and what must not enter it."""

import pytest
import torch

from nnssl.losses.reconstruction import (
    counted_mse,
    counted_share,
    masked_token_mse,
    standardise_tokens,
    visible_mean_baseline,
)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 2, 5, 3, generator=generator)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]]).bool()
    return prediction, target, mask


def test_loss_is_the_mean_over_masked_tokens(tokens):
    prediction, target, mask = tokens
    errors = []
    for sample in range(2):
        for token in range(5):
            if mask[sample, token]:
                errors.append(sum(float(e) ** 2 for e in prediction[sample, token] - target[sample, token]) / 3)
    assert masked_token_mse(prediction, target, mask).item() == pytest.approx(sum(errors) / 6, rel=1e-5)


def test_visible_tokens_enter_neither_loss_nor_gradient(tokens):
    prediction, target, mask = tokens
    reference = masked_token_mse(prediction, target, mask)
    spoiled = torch.where(mask[..., None], prediction, torch.inf).requires_grad_()
    loss = masked_token_mse(spoiled, torch.where(mask[..., None], target, 1e6), mask)
    loss.backward()
    assert torch.equal(loss, reference)
    assert (spoiled.grad[~mask] == 0).all()
    torch.testing.assert_close(spoiled.grad[mask], 2 * (prediction - target)[mask] / 18)


def test_perfect_prediction_costs_nothing_and_the_target_gets_no_gradient(tokens):
    _, target, mask = tokens
    target.requires_grad_()
    prediction = target.detach().clone().requires_grad_()
    loss = masked_token_mse(prediction, target, mask)
    loss.backward()
    assert loss.item() == 0
    assert target.grad is None


def test_loss_is_float32_under_mixed_precision(tokens):
    prediction, target, mask = tokens
    coarse = prediction.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_token_mse(coarse, target, mask)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, masked_token_mse(coarse.float(), target, mask))


def test_standardised_tokens(tokens):
    target = tokens[1] * 40 + 7
    wanted = (target - target.mean(dim=2, keepdim=True)) / target.std(dim=2, keepdim=True, unbiased=False)
    torch.testing.assert_close(standardise_tokens(target), wanted)
    assert standardise_tokens(target.bfloat16()).dtype == torch.float32


def test_baseline_predicts_the_mean_of_each_samples_visible_tokens(tokens):
    _, target, mask = tokens
    errors = []
    for sample in range(2):
        mean = target[sample][~mask[sample]].mean(dim=0)
        errors += [((token - mean) ** 2).mean() for token in target[sample][mask[sample]]]
    assert visible_mean_baseline(target, mask).item() == pytest.approx(float(sum(errors) / len(errors)), rel=1e-5)


def test_values_that_do_not_count_enter_neither_loss_nor_gradient(tokens):
    prediction, target, mask = tokens
    counted = torch.rand(prediction.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    compared = counted & mask[..., None]
    spoiled = torch.where(compared, prediction, torch.inf).requires_grad_()
    share = counted_share(counted, mask[..., None].expand_as(counted))
    loss = masked_token_mse(spoiled, torch.where(counted, target, torch.nan), mask, counted) / share
    loss.backward()
    torch.testing.assert_close(loss, (prediction - target)[compared].square().mean())
    torch.testing.assert_close(spoiled.grad[compared], 2 * (prediction - target)[compared] / int(compared.sum()))
    assert (spoiled.grad[~compared] == 0).all()


def test_voxels_that_do_not_count_enter_neither_loss_nor_gradient():
    generator = torch.Generator().manual_seed(2)
    prediction, target = torch.randn(2, 3, 2, 5, 4, generator=generator)
    counted = torch.rand(3, 5, 4, generator=generator) < 0.5
    kept = counted[:, None].expand_as(target)
    spoiled = torch.where(kept, prediction, torch.nan).requires_grad_()
    loss = counted_mse(spoiled, torch.where(kept, target, torch.inf), counted) / counted_share(counted)
    loss.backward()
    torch.testing.assert_close(loss, (prediction - target)[kept].square().mean())
    assert (spoiled.grad[~kept] == 0).all()
    assert (spoiled.grad[kept] != 0).all()


def test_losses_are_the_same_to_the_bit_where_everything_counts(tokens):
    prediction, target, mask = tokens
    everything = torch.ones_like(target, dtype=torch.bool)
    assert counted_share(everything) == counted_share(everything, mask[..., None].expand_as(everything)) == 1
    plain, counted = (
        masked_token_mse(prediction, standardise_tokens(target, each), mask, each) for each in (None, everything)
    )
    assert torch.equal(plain, counted)
    volumes, others = torch.randn(2, 2, 3, 17, 19, generator=torch.Generator().manual_seed(3))
    mean = torch.nn.functional.mse_loss(volumes, others)
    assert torch.equal(counted_mse(volumes, others, everything.new_ones(2, 17, 19)), mean)


def test_nothing_that_counts_costs_nothing(tokens):
    prediction, target, mask = tokens
    prediction.requires_grad_()
    nothing = torch.zeros_like(target, dtype=torch.bool)
    (
        masked_token_mse(prediction, standardise_tokens(target, nothing), mask, nothing) / counted_share(nothing)
    ).backward()
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_statistics_of_a_token_are_those_of_the_values_that_count(tokens):
    _, target, _ = tokens
    target = 5 + 3 * target.repeat(1, 1, 4)
    counted = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    counted[0, 0] = False
    found = standardise_tokens(torch.where(counted, target, torch.inf), counted)
    for sample in range(2):
        for token in range(5):
            kept = counted[sample, token]
            values = target[sample, token, kept].double()
            expected = (values - values.mean()) / (values.var(correction=0) + 1e-6 / kept.double().mean()).sqrt()
            torch.testing.assert_close(found[sample, token, kept].double(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[0, 0], torch.zeros(12))
