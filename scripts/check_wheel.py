"""Checks wheels before they are published; prints what each one needs, and every fault. Status 1 if there is one.

    python scripts/check_wheel.py WHEEL...

Files: the package, the headers, the CMake package, the two libraries and no other. Libraries: what they need, where
they look for it, and the symbol versions that the platform tag allows. Metadata: torch's minor, the licence, the
addresses. Needs readelf (binutils).
"""

import base64
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

LIBRARY = "torchmargin/lib/libtorchmargin.so"
FACTS = "torchmargin/lib/libtorchmargin.json"
FILES = (
    *(f"torchmargin/{name}" for name in ("__init__.py", "py.typed", "_C.pyi", "functional.py", "losses/__init__.py")),
    *(f"torchmargin/include/torchmargin/{name}.h" for name in ("torchmargin", "functional", "modules", "version")),
    *(
        f"torchmargin/share/cmake/TorchMargin/{name}.cmake"
        for name in ("TorchMarginConfig", "TorchMarginConfigVersion", "ImportLibTorch")
    ),
    LIBRARY,
    FACTS,
)
FILE_NAME = re.compile(
    r"torchmargin-(?P<version>[^-+]+)\+pt(?P<major>\d)(?P<minor>\d+)(?P<build>cpu|cu\d+)"
    r"-(?P<python>cp3\d+)-(?P<abi>cp3\d+)-(?P<platform>[^-]+)\.whl"
)
SYSTEM = {
    f"lib{name}" for name in ("stdc++.so.6", "m.so.6", "gcc_s.so.1", "c.so.6", "dl.so.2", "pthread.so.0", "rt.so.1")
}
SYSTEM.add("ld-linux-x86-64.so.2")
# torch brings these: a second copy in the wheel would be a second registry of ops, or a second pool of threads.
TORCH = {"libtorch.so", "libtorch_cpu.so", "libc10.so", "libgomp.so.1"}
TORCH_CUDA = {"libtorch_cuda.so", "libc10_cuda.so"}  # and libcudart.so of torch's CUDA major
RUN_PATHS = {LIBRARY: "$ORIGIN/../../torch/lib", "_C": "$ORIGIN/lib"}
# What glibc's tag says of the compiler's own libraries (auditwheel's policy).
COMPILER_VERSIONS = {
    "2.28": {"GLIBCXX": "3.4.24", "CXXABI": "1.3.11"},
    "2.34": {"GLIBCXX": "3.4.29", "CXXABI": "1.3.13"},
}
URLS = {"Homepage", "Documentation", "Changelog", "Issues"}


@dataclass(frozen=True)
class Binary:
    """What the loader reads of a shared library."""

    needed: frozenset[str]
    run_path: tuple[str, ...]
    versions: dict[str, str]  # the highest of each: {"GLIBC": "2.28", ...}


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def read_binary(path: Path) -> Binary:
    command = ["readelf", "--dynamic", "--version-info", "--wide", str(path)]
    environment = {**os.environ, "LC_ALL": "C"}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    needed = frozenset(re.findall(r"\(NEEDED\)\s+Shared library: \[(.*)\]", text))
    run_path = [part for found in re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", text) for part in found.split(":")]
    versions: dict[str, str] = {}
    for name, version in re.findall(
        r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)\s", text.partition("Version needs section")[2]
    ):
        versions[name] = max(versions.get(name, "0"), version, key=number)
    return Binary(needed, tuple(run_path), versions)


def file_faults(names: list[str], python: str) -> list[str]:
    faults = [f"there is no {name}" for name in FILES if name not in names]
    module = re.compile(rf"torchmargin/_C\.{python.replace('cp', 'cpython-')}-[\w-]+\.so")
    if not any(map(module.fullmatch, names)):
        faults.append(f"there is no torchmargin/_C for {python}")
    for name in names:
        folder = name.partition("/")[0]
        if folder != "torchmargin" and not re.fullmatch(r"torchmargin-[^/]+\.dist-info", folder):
            faults.append(f"{name} is outside the package")
        elif ".so" in Path(name).name and name != LIBRARY and not module.fullmatch(name):
            faults.append(f"{name} is a library of others")
        elif name.endswith((".pyc", ".cpp", ".cu", ".o")):
            faults.append(f"{name} is not for publishing")
    return faults


def binary_faults(name: str, binary: Binary, build: str, platform: str) -> list[str]:
    cudart = f"libcudart.so.{build.removeprefix('cu')[:-1]}"  # cu130: 13
    allowed = SYSTEM | TORCH | (set() if build == "cpu" else TORCH_CUDA | {cudart})
    required, run_path = {"libtorch_cpu.so", "libc10.so"}, RUN_PATHS[LIBRARY]
    if build != "cpu":
        required |= {"libc10_cuda.so", cudart}
    if name != LIBRARY:
        allowed, required, run_path = allowed | {"libtorchmargin.so"}, {"libtorchmargin.so"}, RUN_PATHS["_C"]
    faults = [f"{name} needs {library}" for library in sorted(binary.needed - allowed)]
    faults += [f"{name} does not need {library}" for library in sorted(required - binary.needed)]
    faults += [f"{name} looks for libraries in '{part}'" for part in binary.run_path if not part.startswith("$ORIGIN/")]
    if run_path not in binary.run_path:
        faults.append(f"{name} does not look for libraries in '{run_path}'")
    glibcs = [f"{major}.{minor}" for major, minor in re.findall(r"manylinux_(\d+)_(\d+)_x86_64", platform)]
    if glibcs:  # a tag may be several: the oldest counts
        glibc = min(glibcs, key=number)
        for kind, limit in {"GLIBC": glibc, **COMPILER_VERSIONS.get(glibc, {})}.items():
            if number(binary.versions.get(kind, "0")) > number(limit):
                faults.append(f"{name} needs {kind}_{binary.versions[kind]}, and {platform} has {kind}_{limit}")
    return faults


def metadata_faults(metadata: Message, tag: re.Match[str], facts: dict[str, str]) -> list[str]:
    torch = f"{tag['major']}.{tag['minor']}"
    local = f"{tag['version']}+pt{tag['major']}{tag['minor']}{tag['build']}"
    cuda = "" if tag["build"] == "cpu" else f"{tag['build'][2:-1]}.{tag['build'][-1]}"
    faults = []
    for name, value in (("Name", "torchmargin"), ("Version", local), ("License-Expression", "Apache-2.0")):
        if metadata[name] != value:
            faults.append(f"its {name} is {metadata[name]}, not {value}")
    needs = [need for need in metadata.get_all("Requires-Dist", []) if re.match(r"torch\b(?!.*;)", need)]
    if needs != [f"torch=={torch}.*"]:
        faults.append(f"it requires {needs}, not torch=={torch}.*")
    if not (metadata["Requires-Python"] or "").startswith(">="):
        faults.append("it says no oldest Python")
    urls = {url.partition(",")[0] for url in metadata.get_all("Project-URL", [])}
    faults += [f"it has no address of {name}" for name in sorted(URLS - urls)]
    if len(metadata.get_payload()) < 1000:
        faults.append("it has no description")
    if facts.get("version") != tag["version"] or ".".join(facts.get("torch", "").split(".")[:2]) != torch:
        faults.append(f"its library is of {facts}, its name says {local}")
    if facts.get("cuda") != cuda:
        faults.append(f"its library has kernels for CUDA '{facts.get('cuda')}', its name says '{cuda}'")
    return faults


def record_faults(archive: zipfile.ZipFile, folder: str) -> list[str]:
    """What pip verifies when it installs."""
    rows = csv.reader(io.StringIO(archive.read(f"{folder}/RECORD").decode()))
    digests = {row[0]: row[1] for row in rows if row}
    faults = []
    for name in archive.namelist():
        digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
        if not name.endswith(("/", "/RECORD")) and digests.get(name) != f"sha256={digest}":
            faults.append(f"{name} is not what RECORD says")
    return faults


def check(path: Path) -> tuple[list[str], list[str]]:
    """What the libraries need, in words, and the faults."""
    tag = FILE_NAME.fullmatch(path.name)
    if tag is None:
        return [], ["its name is not torchmargin-VERSION+ptXY{cpu,cuNNN}-cp3X-cp3X-PLATFORM.whl"]
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        faults = file_faults(names, tag["python"])
        about: list[str] = []
        for name in names:
            if name == LIBRARY or re.fullmatch(r"torchmargin/_C\..*\.so", name):
                binary = read_binary(Path(archive.extract(name, folder)))
                faults += binary_faults(name, binary, tag["build"], tag["platform"])
                versions = ", ".join(f"{kind} {version}" for kind, version in sorted(binary.versions.items()))
                about.append(f"{name}: {versions}; {' '.join(sorted(binary.needed))}")
        info = path.name.split("-cp3")[0] + ".dist-info"
        missing = [
            name for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE") if f"{info}/{name}" not in names
        ]
        faults += [f"there is no {info}/{name}" for name in missing]
        if not missing:
            facts = json.loads(archive.read(FACTS)) if FACTS in names else {}
            faults += metadata_faults(HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode()), tag, facts)
            faults += record_faults(archive, info)
    return about, faults


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    status = 0
    for path in map(Path, paths):
        about, faults = check(path)
        print(path.name, *about, sep="\n  ")
        for fault in faults:
            print(f"  FAULT: {fault}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
