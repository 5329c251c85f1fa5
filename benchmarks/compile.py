"""Compile every shipped configuration of every kernel ahead of time, without a GPU.

    python benchmarks/compile.py                          sm_80 and sm_90, a table of resources
    python benchmarks/compile.py --only sketch --arch 90  the kernels whose name holds `sketch`
    python benchmarks/compile.py --summary FILE           and a line per kernel file, in FILE

A configuration fails where it does not compile, spills registers to local memory, or asks for more
shared memory than a block may have. Exit status 1 if one does.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from curate.kernels.launch import IS_INTERPRETED, Variant

ARCHITECTURES = (80, 90)
# Bytes a block may have: compute capabilities table of the CUDA C++ programming guide.
SHARED = {80: 163 << 10, 90: 227 << 10}
_KERNELS = Path(__file__).parents[1] / "kernels"
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Resources:
    """What the compiler says of one configuration; `local` bytes of a thread are spills."""

    registers: int
    stack: int
    local: int
    shared: int

    def fault(self, architecture: int) -> str | None:
        if self.stack or self.local:
            return f"spills: {self.stack} bytes of stack, {self.local} local"
        if self.shared > SHARED[architecture]:
            return f"{self.shared} bytes of shared memory, {SHARED[architecture]} are there"
        return None


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the name of the kernels to compile")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--summary", type=Path, help="write a line per kernel file there")
    args = parser.parse_args()
    if IS_INTERPRETED:
        parser.error(
            "unset TRITON_INTERPRET and CURATE_KERNELS: interpreted kernels do not compile"
        )
    jobs = [
        (module, arch, name)
        for arch in args.arch or ARCHITECTURES
        for module, name in shipped(arch)
        if args.only in f"{module}.{name}"
    ]
    print(f"{'kernel':64}{'arch':>5}{'regs':>6}{'shared':>8}")
    failed, found = 0, []
    with ProcessPoolExecutor(2) as pool:
        for (module, arch, name), result in zip(jobs, pool.map(_compiled, jobs), strict=True):
            fault = result if isinstance(result, str) else result.fault(arch)
            failed += fault is not None
            found.append((module, arch, result, fault))
            numbers = "" if isinstance(result, str) else f"{result.registers:6}{result.shared:8}"
            print(f"{f'{module}.{name}':64}{arch:5}{numbers}  {fault or ''}".rstrip(), flush=True)
    print(f"{len(jobs)} configurations, {failed} failed")
    if args.summary:
        args.summary.write_text("\n".join(_summary(found)) + "\n")
    return int(failed > 0 or not jobs)


def _summary(found: list[tuple[str, int, "Resources | str", str | None]]) -> Iterator[str]:
    """Yield what the compiler was, and the most that a file's configurations take of a block."""
    yield f"triton {triton.__version__}, {time.strftime('%Y-%m-%d')}"
    yield f"{'file':24}{'arch':>5}{'configurations':>16}{'failed':>8}{'regs':>6}{'shared':>8}"
    for module, arch in sorted({(module, arch) for module, arch, _, _ in found}):
        mine = [(r, fault) for m, a, r, fault in found if (m, a) == (module, arch)]
        made = [r for r, _ in mine if isinstance(r, Resources)]
        registers = max((r.registers for r in made), default=0)
        shared = max((r.shared for r in made), default=0)
        failed = sum(fault is not None for _, fault in mine)
        yield f"{module:24}{arch:5}{len(mine):16}{failed:8}{registers:6}{shared:8}"


def shipped(architecture: int) -> Iterator[tuple[str, str]]:
    """Return (module, name) of every configuration that may be launched on an architecture."""
    for path in sorted(_KERNELS.glob("*.py")):
        for variant in variants(path.stem, architecture):
            yield path.stem, variant.name


def variants(module: str, architecture: int) -> list[Variant]:
    """Return the configurations of one kernel file; none where it has no Triton kernel."""
    found = importlib.import_module(f"curate.kernels.{module}")
    return list(found.variants(architecture)) if hasattr(found, "variants") else []


def _compiled(job: tuple[str, int, str]) -> Resources | str:
    module, architecture, name = job
    variant = next(v for v in variants(module, architecture) if v.name == name)
    try:
        return resources(variant, architecture)
    except Exception as error:  # whatever the compiler raises is the answer
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def resources(variant: Variant, architecture: int) -> Resources:
    """Compile a configuration and read its resources off the cubin."""
    names = variant.kernel.arg_names
    missing = set(names) ^ {*variant.types, *variant.constants}
    assert not missing, f"{variant.name}: arguments and variant disagree on {sorted(missing)}"
    signature = {n: variant.types.get(n, "constexpr") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, dict(variant.constants), aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(used["REG"], used["STACK"], used["LOCAL"], compiled.metadata.shared)


if __name__ == "__main__":
    sys.exit(main())
