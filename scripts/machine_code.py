"""What the compiler made of the kernels: registers, spills, and the hot loops counted instruction by instruction.

    python scripts/machine_code.py build/torch-2.11/libtorchmargin.so

Reads the machine code in the library by NVIDIA's cuobjdump and nvdisasm (on PATH, or from PyPI's nvidia-cuda-cuobjdump
and nvidia-cuda-nvdisasm). Prints a table and ends non-zero if what is meant is no longer so: nothing spilled to memory,
16-byte loads and stores and no others in the hot loops, and at most so many instructions a logit. Nothing runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# The hot loops: of which kernel, how many instructions a logit at most, whether the loop writes.
HOT = {
    "accumulate_interior_kernel<false>": (10.0, False),
    "accumulate_interior_kernel<true>": (10.0, False),
    "softmax_interior_kernel<c10::Half, false>": (12.0, True),
    "softmax_interior_kernel<c10::Half, true>": (14.0, True),
    "softmax_interior_kernel<c10::BFloat16, false>": (12.0, True),
    "softmax_interior_kernel<c10::BFloat16, true>": (14.0, True),
}
MOST_REGISTERS = 64  # of the hot kernels: 1,024 threads on a processor


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    stack: int  # bytes
    local: int


class Loop(NamedTuple):
    """The innermost loop with exponentials. Its rare branches are counted too, as if all were taken."""

    kernel: str
    architecture: str
    instructions: int
    logits: int
    loads: list[str]
    stores: list[str]

    @property
    def a_logit(self) -> float:
        return self.instructions / self.logits


def tool(name: str) -> str | None:
    """Where one of NVIDIA's programs is."""
    found = shutil.which(name)
    if found:
        return found
    package = find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        for path in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(path)
    return None


def _run(*command: str) -> str:
    folders = {os.path.dirname(path) for path in map(tool, ("cuobjdump", "nvdisasm")) if path}
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if ran.returncode:
        raise RuntimeError(f"{command[0]}: {ran.stderr.strip() or ran.stdout.strip()}")
    return ran.stdout


def _short(symbols: list[str]) -> list[str]:
    """Names without namespaces and arguments."""
    names = _run("c++filt", *symbols).splitlines() if symbols else []
    short = []
    for name in names:
        name = re.sub(r"\(anonymous namespace\)::|torchmargin::device::|^void ", "", name)
        short.append(re.sub(r"\(.*", "", name.replace("void ", "")))
    return short


def kernels(library: str) -> list[Kernel]:
    text = _run(str(tool("cuobjdump")), "--dump-resource-usage", library)
    found, architecture = [], ""
    for line, after in zip(text.splitlines(), [*text.splitlines()[1:], ""]):
        if match := re.search(r"arch = (sm_\d+)|\.(sm_\d+)\.cubin", line):
            architecture = match[1] or match[2]
        if match := re.match(r" *Function (\S+):", line):
            numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", after)}
            found.append(Kernel(match[1], architecture, numbers["REG"], numbers["STACK"], numbers["LOCAL"]))
    names = _short([each.name for each in found])
    return [each._replace(name=name) for each, name in zip(found, names)]


def hot_loops(library: str, architecture: str) -> list[Loop]:
    text = _run(str(tool("cuobjdump")), "-arch", architecture, "-sass", library)
    parts = re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, re.DOTALL)
    found = []
    for name, (_, body) in zip(_short([symbol for symbol, _ in parts]), parts):
        if name not in HOT:
            continue
        code = [(int(a, 16), t) for a, t in re.findall(r"/\*([0-9a-f]{4,})\*/ +(\S.*?) *;", body)]
        loops = []
        for address, text_of in code:
            back = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text_of)
            if back and int(back[1], 16) <= address:
                inside = [each for place, each in code if int(back[1], 16) <= place <= address]
                logits = sum("MUFU.EX2" in each for each in inside)
                if logits:
                    access = [re.search(r"\b(LDG|STG)\S*", each) for each in inside]
                    kinds = [match[0] for match in access if match]
                    loads = [kind for kind in kinds if kind.startswith("LDG")]
                    stores = [kind for kind in kinds if kind.startswith("STG")]
                    loops.append(Loop(name, architecture, len(inside), logits, loads, stores))
        found.append(min(loops, key=lambda loop: loop.instructions))
    return found


class Fused(NamedTuple):
    """A kernel that makes a tile's products and what becomes of them (cuda/hopper): counted as a whole."""

    kernel: str
    instructions: int  # of a thread that multiplies, all branches and the copying thread's with them
    products: int  # HGMMA
    fences: int  # that wait for all memory
    stores: list[str]

    @property
    def a_logit(self) -> float:
        return self.instructions / 128  # a thread has so many of a tile's


def fused_kernels(library: str) -> list[Fused]:
    """None where the library is not for Hopper."""
    if not any("fused_tile_kernel" in each.name for each in kernels(library)):
        return []
    text = _run(str(tool("cuobjdump")), "-arch", "sm_90a", "-sass", library)
    parts = re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, re.DOTALL)
    found = []
    for name, (_, body) in zip(_short([symbol for symbol, _ in parts]), parts):
        if "fused_tile_kernel" not in name:
            continue
        code = [each for each in re.findall(r"/\*[0-9a-f]{4,}\*/ +(\S.*?) *;", body) if "NOP" not in each]
        stores = [match[0] for each in code if (match := re.search(r"\bSTG\S*", each))]
        products = sum("HGMMA" in each for each in code)
        fences = sum(re.search(r"MEMBAR\S*GPU", each) is not None for each in code)
        found.append(Fused(name.replace("torchmargin::hopper::", ""), len(code), products, fences, stores))
    return found


# Of the fused kernels, all branches and what a launch needs once with them.
MOST_FUSED = 30.0  # instructions a logit


def fused_faults(found: list[Fused]) -> list[str]:
    said = []
    for each in found:
        writes = each.kernel.split(", ")[1] == "true"  # <Operand, weighs, factors, cluster>
        if each.a_logit > MOST_FUSED:
            said.append(f"{each.kernel}: {each.a_logit:.1f} instructions a logit, more than {MOST_FUSED:g}")
        if each.products < 4:
            said.append(f"{each.kernel}: {each.products} products by warpgroups")
        if each.fences > 2:  # those of the cluster's first and last meeting; one in the loop halves the speed
            said.append(f"{each.kernel}: {each.fences} fences of all memory")
        if writes and any(".128" not in kind for kind in each.stores):
            said.append(f"{each.kernel}: expected stores of 16 bytes alone, but got {', '.join(each.stores)}")
    return said


def faults(all_kernels: list[Kernel], loops: list[Loop]) -> list[str]:
    """What is not as it is meant."""
    said = [
        f"{each.name} ({each.architecture}) keeps {each.local or each.stack} bytes of a thread in memory"
        for each in all_kernels
        # Double-precision sines and cosines have a table of 40 bytes on the stack, for angles that none here is.
        if each.local or (each.stack and (each.name in HOT or each.stack > 80))
    ]
    for loop in loops:
        where = f"{loop.kernel} ({loop.architecture})"
        most, writes = HOT[loop.kernel]
        if loop.a_logit > most:
            said.append(f"{where}: {loop.a_logit:.1f} instructions a logit, more than {most:g}")
        accesses = loop.loads + loop.stores
        if not loop.loads or bool(loop.stores) != writes or any(".128" not in each for each in accesses):
            said.append(f"{where}: expected accesses of 16 bytes alone, but got {', '.join(accesses)}")
    for each in all_kernels:
        if each.name in HOT and each.registers > MOST_REGISTERS:
            said.append(f"{each.name} ({each.architecture}): {each.registers} registers, more than {MOST_REGISTERS}")
    architectures = {each.architecture for each in all_kernels}
    missing = {(name, one) for name in HOT for one in architectures} - {
        (loop.kernel, loop.architecture) for loop in loops
    }
    return said + [f"{name} ({one}) is not in the library" for name, one in sorted(missing)]


def table(all_kernels: list[Kernel], loops: list[Loop]) -> str:
    registers = {(each.name, each.architecture): each.registers for each in all_kernels}
    lines = [
        "| hot loop | architecture | registers | instructions a logit, rare branches with it |",
        "|---|---|---|---|",
    ]
    for loop in loops:
        of_kernel = registers[loop.kernel, loop.architecture]
        lines.append(f"| `{loop.kernel}` | {loop.architecture} | {of_kernel} | {loop.a_logit:.1f} |")
    return "\n".join(lines)


def fused_table(all_kernels: list[Kernel], found: list[Fused]) -> str:
    registers = {each.name.replace("torchmargin::hopper::", ""): each.registers for each in all_kernels}
    lines = ["| fused kernel (sm_90a) | registers at its start | instructions a logit, all branches with them |"]
    lines += ["|---|---|---|"]
    lines += [f"| `{each.kernel}` | {registers[each.kernel]} | {each.a_logit:.1f} |" for each in found]
    return "\n".join(lines)


def main() -> None:
    library = sys.argv[1]
    for name in ("cuobjdump", "nvdisasm"):
        if tool(name) is None:
            raise SystemExit(f"there is no {name}: pip install nvidia-cuda-{name}")
    all_kernels = kernels(library)
    architectures = sorted({each.architecture for each in all_kernels})
    loops = [loop for architecture in architectures for loop in hot_loops(library, architecture)]
    print(table(all_kernels, loops))
    fused = fused_kernels(library)
    print("\n" + fused_table(all_kernels, fused))
    wrong = faults(all_kernels, loops) + fused_faults(fused)
    print("\n".join(wrong) if wrong else f"{len(all_kernels)} kernels: nothing spilled")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
