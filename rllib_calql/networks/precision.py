"""The arithmetic of the networks' matrix products: what each setting of `precision` means, and where it is of use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("fp32", "medium", "bf16")


def product_dtype(precision: str) -> torch.dtype | None:
    """Type of the hidden layers' activations and products; None is that of the parameters."""
    return torch.bfloat16 if precision == "bf16" else None


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Sets how torch multiplies matrices in float32, and restores what was set before.

    With "medium" the factors are rounded, to TF32 on a GPU and to bfloat16 on a CPU, and the sums kept in float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_precision(precision: str, device: torch.device) -> str | None:
    """Checks a precision below "fp32" against the processor that is to compute in it.

    Args:
        precision: One of `PRECISIONS`.
        device: Of the learner.

    Returns:
        What there is to say if it brings nothing, else None.

    Raises:
        ValueError: If torch has no more than a scalar loop for it: about 50 times slower than "fp32".
    """
    if precision == "fp32" or (device.type == "cpu" and has_bfloat16_units()):
        return None
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return None
        name = torch.cuda.get_device_name(device)
        return f"{name} has no units for it, which came with compute capability 8.0: nothing is gained"
    if precision == "medium":
        return "this processor has no bfloat16 units (AVX512-BF16 or AMX): products remain in float32"
    if _has_onednn_bfloat16():
        return "this processor has no bfloat16 units (AVX512-BF16 or AMX): updates are slower than in float32"
    raise ValueError(
        'precision="bf16" would be about 50 times slower than "fp32" on this processor, which has no bfloat16 '
        'units and no AVX-512 to emulate them. Set precision="fp32", or train on a GPU (`num_gpus_per_learner=1`).'
    )


def has_bfloat16_units() -> bool:
    """Whether this machine's processor multiplies in bfloat16."""
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2", "AVX512"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return _has_onednn_bfloat16()


def _has_onednn_bfloat16() -> bool:
    is_available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(is_available and torch.ops.mkldnn._is_mkldnn_bf16_supported())
