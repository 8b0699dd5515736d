"""The kernels' machine code is what it is meant to be: read, not run (scripts/machine_code.py)."""

import importlib.util
import json
from pathlib import Path

import pytest

import torchmargin
from torchmargin._extension import BINARIES

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("machine_code", ROOT / "scripts/machine_code.py")
machine_code = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(machine_code)

pytestmark = [
    pytest.mark.skipif(not torchmargin.config.cuda_architectures(), reason="the library has no CUDA kernels"),
    pytest.mark.skipif(
        machine_code.tool("cuobjdump") is None or machine_code.tool("nvdisasm") is None,
        reason="there is no cuobjdump or no nvdisasm",
    ),
]


@pytest.fixture(scope="module")
def read():
    library = str(BINARIES / "lib/libtorchmargin.so")
    kernels = machine_code.kernels(library)
    architectures = sorted({each.architecture for each in kernels})
    return kernels, [loop for one in architectures for loop in machine_code.hot_loops(library, one)]


def test_nothing_is_spilled_and_hot_loops_are_short(read):
    kernels, loops = read
    assert len(kernels) > 40 and loops
    assert machine_code.faults(kernels, loops) == []


def test_what_rots_is_said(read):
    kernels, loops = read
    worse = loops[0]._replace(instructions=1000 * loops[0].logits, loads=["LDG.E"])
    spilled = kernels[0]._replace(name="some_kernel", local=8)
    said = "; ".join(machine_code.faults([*kernels, spilled], [worse, *loops[1:]]))
    assert "1000.0 instructions a logit, more than" in said and "16 bytes alone, but got LDG.E" in said
    assert "some_kernel" in said and "keeps 8 bytes" in said
    assert "is not in the library" in "; ".join(machine_code.faults(kernels, loops[1:]))


@pytest.fixture(scope="module")
def fused():
    found = machine_code.fused_kernels(str(BINARIES / "lib/libtorchmargin.so"))
    if not found:
        pytest.skip("the library is not for Hopper")
    return found


def test_the_fused_kernel_multiplies_by_warpgroups_and_waits_for_memory_twice(fused):
    assert len(fused) == 16 and machine_code.fused_faults(fused) == []


def test_what_rots_in_the_fused_kernel_is_said(fused):
    weighs = next(each for each in fused if ", true, false" in each.kernel)
    worse = weighs._replace(instructions=128 * 40, products=0, fences=3, stores=["STG.E.64"])
    said = "; ".join(machine_code.fused_faults([worse]))
    assert "40.0 instructions a logit, more than" in said and "0 products by warpgroups" in said
    assert "3 fences of all memory" in said and "16 bytes alone, but got STG.E.64" in said


def test_the_documents_have_the_fused_kernels_figures(read, fused):
    note = json.loads((BINARIES / "lib/libtorchmargin.json").read_text())
    if not note["cuda"].startswith("13.0"):
        pytest.skip(f"compiled by nvcc {note['cuda']}")
    document = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    for line in machine_code.fused_table(read[0], fused).splitlines():
        assert line in document


def test_the_documents_have_its_figures(read):
    """docs/gpu.md; of the compiler and the architectures that it names."""
    note = json.loads((BINARIES / "lib/libtorchmargin.json").read_text())
    if not note["cuda"].startswith("13.0"):
        pytest.skip(f"compiled by nvcc {note['cuda']}")
    document = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    for line in machine_code.table(*read).splitlines():
        if "sm_80" in line or "sm_90" in line:
            assert line in document
