"""Description of the machine that runs a measurement."""

import os
import platform

import torch


def describe() -> str:
    """Return one line with the number of cores, their bfloat16 support, and the versions of Python and PyTorch."""
    formats = [
        name
        for name, has in (
            ("AVX512-BF16", torch.cpu._is_avx512_bf16_supported()),
            ("AMX", torch.cpu._is_amx_tile_supported()),
        )
        if has
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cores} cores ({', '.join(formats) or 'no bfloat16'}), {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
