"""What does a Triton kernel compile to on a GPU that is not here?

`compile_kernel` runs Triton's own compiler and NVIDIA's assembler, which need no GPU, and reads back what decides
whether the kernel is any good there: shared memory, registers, and what did not fit into registers. What came out is
remembered, by the source of the kernel and all it was compiled with.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# Bytes of shared memory that one block of threads may use, by 10 * major + minor of the compute capability.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What came out; `None` where the disassembler was not found."""

    size: int  # bytes of machine code and what comes with it
    shared: int  # bytes a block
    registers: int | None  # a thread, 255 at most
    stack: int | None  # bytes a thread: spilled registers, or arrays that were indexed
    spill_stores: int | None  # instructions that store to the stack, anywhere in the kernel
    spill_loads: int | None
    product_loop_spills: int | None  # of both, those inside the innermost loop around a matrix instruction
    matrix_instructions: list[str] | None  # "HGMMA", "HMMA", ...; none for products by scalar instructions

    def __str__(self) -> str:
        return (
            f"{self.size} bytes, shared {self.shared}, registers {self.registers}, stack {self.stack}, "
            f"spills {self.spill_stores} stores and {self.spill_loads} loads "
            f"({self.product_loop_spills} in the product loop), "
            f"matrix instructions {', '.join(self.matrix_instructions or ()) or 'none'}"
        )


def compile_kernel(
    kernel: Any,
    arguments: Mapping[str, Any],
    capability: int,
    *,
    warps: int,
    stages: int = 3,
    folder: Path,
) -> Compiled:
    """Compile a `@triton.jit` function as a launch would, or remember what came out last time.

    Args:
        arguments: per argument either a type ("*bf16", "i64", "fp32"; "*bf16:16" and "i32:16" for a pointer or a number
            that is a multiple of 16, as a launch finds out by itself; "tensordesc<bf16[128, 64]>" for a descriptor of
            blocks) or a value, which is compiled in (1 for a stride of one).
        capability: 10 * major + minor, 90 for an H100.
        folder: where results are remembered.
    """
    import triton

    parts = [triton.__version__, kernel.cache_key, repr(sorted(arguments.items())), capability, warps, stages]
    parts.append(Path(__file__).read_text(encoding="utf-8"))
    remembered = folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"
    if remembered.is_file():
        return Compiled(**json.loads(remembered.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as scratch:
        compiled = _compile(kernel, arguments, capability, warps, stages, Path(scratch))
    remembered.write_text(json.dumps(asdict(compiled)), encoding="utf-8")
    return compiled


def _compile(
    kernel: Any, arguments: Mapping[str, Any], capability: int, warps: int, stages: int, folder: Path
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    if missing := set(names) ^ set(arguments):
        raise ValueError(f"compile_kernel: {kernel.__name__} takes {names}; {sorted(missing)} do not match")
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = arguments[name]
        if isinstance(value, str):
            signature[name], _, multiple = value.partition(":")
            if multiple:
                attributes[(index,)] = [["tt.divisibility", int(multiple)]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder / "triton-cache")
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
        )
    cubin = compiled.asm["cubin"]
    if not cubin.startswith(b"\x7fELF"):
        raise ValueError(f"compile_kernel: {kernel.__name__} became {cubin[:16]!r}...; expected an ELF file")
    return Compiled(size=len(cubin), shared=compiled.metadata.shared, **_disassembled(cubin, folder))


def _disassembled(cubin: bytes, folder: Path) -> dict[str, Any]:
    """Registers, stack and spill instructions, by the `cuobjdump` that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        return dict.fromkeys(field.name for field in fields(Compiled) if field.name not in ("size", "shared"))
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)

    def dump(option: str) -> str:
        # The listing of instructions needs nvdisasm, which lies beside it.
        environment = {"PATH": f"{tool.parent}:/usr/bin:/bin"}
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True, env=environment).stdout

    usage = dump("-res-usage")
    # "/*0b40*/  @!P0 BRA 0x5d0 ;" becomes (0xb40, "BRA", 0x5d0), any other instruction has no third.
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?(\w+)[^;\n]*?(?:\b0x([0-9a-f]+)\s*)?;"
    found = re.findall(pattern, dump("-sass"))
    listing = [(int(at, 16), name, int(to, 16) if name == "BRA" and to else None) for at, name, to in found]
    products = [(at, name) for at, name, _ in listing if name.endswith("MMA")]
    spills = [at for at, name, _ in listing if name in ("STL", "LDL")]
    loops = [(to, at) for at, _, to in listing if to is not None and to < at]
    innermost = {
        min((loop for loop in loops if loop[0] <= at <= loop[1]), key=lambda loop: loop[1] - loop[0], default=(at, at))
        for at, _ in products
    }
    return {
        "registers": _number(r"\bREG:(\d+)", usage),
        "stack": _number(r"\bSTACK:(\d+)", usage),
        "spill_stores": sum(name == "STL" for _, name, _ in listing),
        "spill_loads": sum(name == "LDL" for _, name, _ in listing),
        "product_loop_spills": sum(first <= at <= last for at in spills for first, last in innermost),
        "matrix_instructions": sorted({name for _, name in products}),
    }


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"cuobjdump: expected {pattern!r} in its output, which is {text!r}")
    return int(match[1])
