"""Run by test_compiled.py: compiles every kernel without a GPU and prints as JSON what came out.

A process of its own, as Triton compiles nothing once it was imported for interpreting.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bdfast.kernels import SIGNATURES
from bdfast.kernels.tables import OPTIONS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", re.MULTILINE)


def tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def compile_one(job):
    file, index, architecture = job
    signature = SIGNATURES[file][index]
    # What a launch finds out by itself: memory of tensors begins at multiples of 16 bytes.
    pointers = [i for i, kind in enumerate(signature.arguments.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=signature.kernel,
        signature=dict(signature.arguments),
        constexprs=dict(signature.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=OPTIONS)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "-res-usage", cubin.name)
        instructions = Counter(INSTRUCTION.findall(tool("nvdisasm", "-c", cubin.name)))

    def count(pattern):
        return sum(n for name, n in instructions.items() if re.fullmatch(pattern, name))

    return {
        "file": file,
        "name": signature.name,
        "architecture": architecture,
        "dtype": str(signature.constants.get("DTYPE", "")),
        "reads_lists": signature.reads_lists,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "wide_loads": count(r"LDG.*\.128.*"),
        "wide_stores": count(r"STG.*\.128.*"),
        "single_loads": count(r"LDG\.E(\.U16)?(\.CONSTANT)?"),
        "local": count(r"(LDL|STL).*"),
        "flushing": len(re.findall(r"\.ftz", compiled.asm["ptx"])),
        "float_atomics": len(re.findall(r"(?:atom|red)\.[\w.]*\.f\d+", compiled.asm["ptx"])),
    }


if __name__ == "__main__":
    files = sys.argv[1:] or list(SIGNATURES)
    jobs = [(f, i, a) for f in files for i in range(len(SIGNATURES[f])) for a in ARCHITECTURES]
    with ProcessPoolExecutor(2) as pool:
        sys.stdout.write(json.dumps(list(pool.map(compile_one, jobs))))
