"""Masked mean squared error against loops written from RepRec 4.2 and MAE, and what must not enter it."""

import pytest
import torch

from nnssl.losses.reconstruction import masked_token_mse, standardise_tokens, visible_mean_baseline


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
