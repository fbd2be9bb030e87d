"""Random numbers that depend on their purpose, not on the process that draws them.

Every draw of a pretraining run comes from a generator that is seeded by (seed, stage, step, sample). The draws are therefore
the same for any number of worker processes and ranks, and after a restart. Samples are counted over the global batch.
"""

import hashlib
from collections.abc import Sequence

import torch


def draw_seed(*key: int | str) -> int:
    """Return a 63-bit seed for a key; equal keys give equal seeds on every machine."""
    digest = hashlib.blake2b("/".join(str(part) for part in key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a key, e.g. ``make_generator(seed, "reprec.contrastive", step, sample)``."""
    return torch.Generator().manual_seed(draw_seed(*key))


def sample_generators(seed: int, purpose: str, step: int, samples: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per sample of a step.

    Args:
        seed: Random seed of the run.
        purpose: Purpose of the draws, e.g. ``"reprec.contrastive/views"``.
        step: Training step, counted from 0 over the whole stage.
        samples: Indices of the samples in the global batch.
    """
    return [make_generator(seed, purpose, step, sample) for sample in samples]
