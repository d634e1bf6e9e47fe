"""Measurements behind the figures of the README: `sid bench ...`, or `python -m benchmarks.<name>`."""

import os

import torch

# faiss's wheels carry an OpenBLAS of 2021. On a processor it does not know by name it multiplies as if there were only
# the registers of 2004, several times slower than it can. For a fair comparison the variable that names the kernels is
# set before it is loaded.
_KERNELS = {"AVX512": "SKYLAKEX", "AVX2": "HASWELL"}
_known = _KERNELS.get(torch.backends.cpu.get_cpu_capability())
if _known and "OPENBLAS_CORETYPE" not in os.environ:
    os.environ["OPENBLAS_CORETYPE"] = _known
    import faiss  # noqa: F401

    del os.environ["OPENBLAS_CORETYPE"]  # NumPy's and SciPy's are newer, and choose for themselves
