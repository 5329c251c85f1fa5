"""Every shipped kernel configuration compiles for the GPUs we name, without spills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from curate.kernels.launch import HAS_TRITON

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile.py"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton on this platform")
def test_every_configuration_compiles_for_sm_80_and_sm_90_without_spills() -> None:
    """In a process of its own: kernels that are interpreted, as here, cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CURATE_KERNELS")}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 80 " in done.stdout and " 90 " in done.stdout, "no configuration was compiled"
