"""Monitors of collapse on embeddings whose values are known."""

import math

import pytest
import torch

from nnssl.collapse import collapse_warning, effective_rank, feature_std, retrieval_top1


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_std_of_directions():
    assert feature_std(normal(20_000, 16)).item() == pytest.approx(1 / math.sqrt(16), rel=0.02)
    constant = normal(1, 16).expand(50, -1) * torch.rand(50, 1)
    assert feature_std(constant).item() == pytest.approx(0, abs=1e-6)
    two = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [0.5, 0.0], [-2.0, 0.0]])
    assert feature_std(two).item() == pytest.approx(0.5)


def test_effective_rank():
    basis = torch.linalg.qr(normal(40, 5))[0]
    basis = basis - basis.mean(dim=0)
    wanted = torch.linalg.qr(basis)[0]  # columns with zero mean stay so
    scales = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0])
    share = [0.5, 0.25, 0.125, 0.125]
    entropy = -sum(p * math.log(p) for p in share)
    assert effective_rank(wanted * scales + 3).item() == pytest.approx(math.exp(entropy), rel=1e-4)
    line = torch.linspace(-1, 2, 30)[:, None] * normal(1, 8) + normal(1, 8)
    assert effective_rank(line).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(normal(1, 8).expand(33, -1)).item() == 0
    assert effective_rank(normal(20_000, 6)).item() == pytest.approx(6, rel=1e-3)


def test_retrieval():
    a = normal(40, 8)
    assert retrieval_top1(a, 3 * a).item() == 1
    assert retrieval_top1(a, a.roll(1, dims=0)).item() == 0
    half = torch.cat([a[:20], a[20:].roll(1, dims=0)])
    assert retrieval_top1(a, half).item() == 0.5
    same = normal(1, 8).expand(40, -1)
    assert retrieval_top1(same, same).item() == pytest.approx(1 / 40)
    valid = torch.arange(40) % 3 != 1
    assert retrieval_top1(a, half, valid) == retrieval_top1(a[valid], half[valid])
    assert retrieval_top1(same, same, valid).item() == pytest.approx(1 / int(valid.sum()))
    assert retrieval_top1(a, a, torch.zeros(40, dtype=torch.bool)) == 0


def test_warning_of_equal_and_of_all_but_equal_embeddings():
    """Noise around one direction has a high rank, which is why the spread counts too."""

    def warned(rows: torch.Tensor) -> str | None:
        return collapse_warning(float(feature_std(rows)), float(effective_rank(rows)), rows.shape[1])

    assert warned(normal(500, 16)) is None
    wide = normal(60, 900)  # of directions in 900 dimensions each number is small: a thirtieth
    assert feature_std(wide) < 0.05
    assert warned(wide) is None
    assert "effective rank 0.00" in (warned(normal(1, 16).expand(500, -1)) or "")
    nearly = normal(1, 16) + 1e-3 * normal(500, 16, seed=1)
    assert effective_rank(nearly) > 10
    assert "has collapsed" in (warned(nearly) or "")
    line = normal(500, 1) * normal(1, 16)
    assert "effective rank 1.0" in (warned(line) or "")


def test_retrieval_among_none_is_zero():
    assert retrieval_top1(torch.zeros(0, 4), torch.zeros(0, 4)) == 0
