"""What it looks like when memory runs out."""

import torch

_SAID = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""By the CUDA runtime outside torch's allocator, by torch on a CPU, by cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that there was not enough memory; torch has no one type for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(said in text for said in _SAID)
