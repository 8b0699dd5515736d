"""What a release is made of: wheels (scripts/check_wheel.py), the pages that pip finds them by, workflows, metadata."""

import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
VERSION = re.search(r'VERSION "(.*)"', (ROOT / "csrc/include/torchmargin/version.h").read_text())[1]
PYTHON = f"cp3{sys.version_info.minor}"
needs_workflows = pytest.mark.skipif(not WORKFLOWS, reason="a source distribution has no workflows")


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_wheel, find_links = _script("check_wheel"), _script("find_links")


# ---- wheels ------------------------------------------------------------------------------------------------


def _pack(files, folder, tag, name="torchmargin", version=None):
    """A wheel of these files ({name: bytes}), with the RECORD that they have."""
    version = version or VERSION
    info = f"{name}-{version}.dist-info"
    rows = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for path, data in files.items()
    ]
    wheel = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,", ""]))
    return wheel


@pytest.fixture(scope="module")
def installed():
    """The files of the wheel that the installed package came from, its version and its tag."""
    package = importlib.metadata.distribution("torchmargin")
    if not any(str(file) == check_wheel.LIBRARY for file in package.files or ()):
        pytest.skip("the installed package is an editable one")
    if package.version.partition("+")[0] != VERSION:
        pytest.skip(f"version {package.version} is installed, this is {VERSION}: make install")
    left = ("/RECORD", "/INSTALLER", "/REQUESTED", "/direct_url.json", ".pyc")
    files = {str(f): Path(f.locate()).read_bytes() for f in package.files if not str(f).endswith(left)}
    tag = re.search(r"^Tag: (.*)$", package.read_text("WHEEL"), re.MULTILINE)[1]
    return files, package.version, tag


@pytest.fixture
def faults(installed, tmp_path):
    """faults(change): what check_wheel says of the installed package's wheel once change(files) has damaged it."""
    if not shutil.which("readelf"):
        pytest.skip("there is no readelf")

    def check(change=lambda files: None, tag=None):
        files, version, own_tag = installed
        files = dict(files)
        change(files)
        return check_wheel.check(_pack(files, tmp_path, tag or own_tag, version=version))[1]

    return check


def test_the_wheel_of_the_installed_package_is_fit_for_publishing(faults):
    assert faults() == []


def _without(name):
    return lambda files: files.pop(name)


def _with(name, data=b""):
    return lambda files: files.update({name: data})


def _replaced(ending, old, new):
    def change(files):
        (name,) = (name for name in files if name.endswith(ending))
        assert old in files[name].decode()
        files[name] = files[name].decode().replace(old, new).encode()

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            _without("torchmargin/include/torchmargin/modules.h"),
            "there is no torchmargin/include/torchmargin/modules.h",
        ),
        (_without(check_wheel.FACTS), f"there is no {check_wheel.FACTS}"),
        (_with("torchmargin.libs/libgomp-1234abcd.so.1"), "is outside the package"),
        (_with("torchmargin/lib/libc10.so"), "torchmargin/lib/libc10.so is a library of others"),
        (_with("tests/test_ops.py"), "tests/test_ops.py is outside the package"),
        (_with("torchmargin/__pycache__/utils.cpython-310.pyc"), "is not for publishing"),
        (_replaced("/METADATA", "Requires-Dist: torch==", "Requires-Dist: torch>="), "it requires ['torch>="),
        (_replaced("/METADATA", "License-Expression: Apache-2.0\n", ""), "its License-Expression is None"),
        (_replaced("/METADATA", "Project-URL: Issues", "Project-URL: Other"), "it has no address of Issues"),
        (_replaced("libtorchmargin.json", '"torch": "', '"torch": "1.'), "its library is of {"),
        (_replaced("libtorchmargin.json", '"cuda": "', '"cuda": "9'), "its library has kernels for CUDA '9"),
    ],
)
def test_a_damaged_wheel_is_found_out(faults, change, fault):
    found = faults(change)
    assert any(fault in text for text in found), found


def test_the_platform_tag_is_held_to_the_symbol_versions(faults, installed):
    python = installed[2].rpartition("-")[0]
    assert faults(tag=f"{python}-manylinux_2_99_x86_64") == []
    found = faults(tag=f"{python}-manylinux_2_5_x86_64.manylinux_2_99_x86_64")
    assert any("needs GLIBC_2." in text and "has GLIBC_2.5" in text for text in found), found
    assert "its name is not" in faults(tag="py3-none-any.zip")[0]


def test_a_library_is_held_to_what_torch_brings():
    needed = {"libtorch_cpu.so", "libc10.so", "libc10_cuda.so", "libcudart.so.13", "libgomp.so.1", "libc.so.6"}
    run_path = ("$ORIGIN/../../torch/lib", "$ORIGIN/../../nvidia/cu13/lib")

    def found(needed, run_path=run_path, build="cu130", **versions):
        binary = check_wheel.Binary(frozenset(needed), run_path, versions)
        return check_wheel.binary_faults("torchmargin/lib/libtorchmargin.so", binary, build, "manylinux_2_28_x86_64")

    name = "torchmargin/lib/libtorchmargin.so"
    assert found(needed, GLIBC="2.28", GLIBCXX="3.4.24") == []
    assert found(needed | {"libcublas.so.13"}) == [f"{name} needs libcublas.so.13"]
    assert found(needed, build="cpu") == [f"{name} needs libc10_cuda.so", f"{name} needs libcudart.so.13"]
    assert f"{name} needs libcudart.so.13" in found(needed, build="cu128")
    assert found(needed - {"libtorch_cpu.so"}) == [f"{name} does not need libtorch_cpu.so"]
    assert found(needed, GLIBC="2.32") == [f"{name} needs GLIBC_2.32, and manylinux_2_28_x86_64 has GLIBC_2.28"]
    assert found(needed, GLIBCXX="3.4.29") == [
        f"{name} needs GLIBCXX_3.4.29, and manylinux_2_28_x86_64 has GLIBCXX_3.4.24"
    ]
    assert found(needed, run_path=(*run_path, "/home/me/torch/lib")) == [
        f"{name} looks for libraries in '/home/me/torch/lib'"
    ]
    assert found(needed, run_path=()) == [f"{name} does not look for libraries in '$ORIGIN/../../torch/lib'"]


# ---- the pages that pip reads ------------------------------------------------------------------------------


def _tiny_wheel(folder, local, python=PYTHON):
    """A wheel with a name of ours and nothing in it."""
    version, tag = f"{VERSION}+{local}", f"{python}-{python}-{sysconfig.get_platform().replace('-', '_')}"
    info = f"torchmargin-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torchmargin\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return _pack(files, folder, tag, version=version)


def _download(page, out):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    command = ["pip", "download", "--no-deps", "--no-index", "--no-cache-dir", "--disable-pip-version-check"]
    return subprocess.run(
        [sys.executable, "-m", *command, "-f", page.as_uri(), "-d", str(out), "torchmargin"],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.fixture
def wheels(tmp_path):
    """Two builds for this Python and one for another, in a folder whose name wants quotes."""
    folder = tmp_path / "v1 & <more>"
    wheels = [_tiny_wheel(folder, "pt211cu130"), _tiny_wheel(folder, "pt211cpu")]
    return folder, [*wheels, _tiny_wheel(folder, "pt211cpu", python="cp39")]


def test_pip_finds_the_wheel_of_each_page(wheels, tmp_path):
    folder, (cuda, cpu, _) = wheels
    written = find_links.write_pages(folder, tmp_path / "whl")
    assert [page.name for page in written] == ["torch-2.11+cpu.html", "torch-2.11+cu130.html", "index.html"]
    for page, wheel in zip(written, (cpu, cuda)):
        ran = _download(page, tmp_path / page.stem)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert [path.name for path in (tmp_path / page.stem).iterdir()] == [wheel.name]
        assert (tmp_path / page.stem / wheel.name).read_bytes() == wheel.read_bytes()


def test_pip_refuses_a_wheel_that_is_not_what_the_page_says(wheels, tmp_path):
    folder, (cuda, *_) = wheels
    pages = find_links.write_pages(folder, tmp_path / "whl")
    with zipfile.ZipFile(cuda, "a") as archive:
        archive.writestr("torchmargin/added.py", "")
    ran = _download(pages[1], tmp_path / "got")
    assert ran.returncode != 0 and "DO NOT MATCH" in ran.stderr, ran.stderr


def test_pages_are_sorted_and_escaped_and_repeat_themselves(wheels, tmp_path):
    folder, (_, cpu, older) = wheels
    written = find_links.write_pages(folder, tmp_path / "whl")
    before = [page.read_bytes() for page in written]
    text = written[0].read_text()
    digest = hashlib.sha256(cpu.read_bytes()).hexdigest()
    assert f"v1%20%26%20%3Cmore%3E/{cpu.name.replace('+', '%2B')}#sha256={digest}" in text
    names = re.findall(r">(torchmargin-.*?)</a>", text)
    assert names == sorted([cpu.name, older.name])
    assert 'href="torch-2.11%2Bcu130.html"' in written[-1].read_text()
    find_links.write_pages(folder, tmp_path / "whl")
    assert [page.read_bytes() for page in written] == before


def test_sums_stand_for_wheels_that_lie_elsewhere(wheels, tmp_path):
    """As the docs workflow has them: SHA256SUMS of each release in a folder of its tag."""
    folder, (cuda, *_) = wheels
    sums = tmp_path / "sums/v9"
    sums.mkdir(parents=True)
    (sums / "SHA256SUMS").write_text(f"{'a' * 64}  {cuda.name}\n{'b' * 64}  torchmargin-{VERSION}.tar.gz\n")
    pages = find_links.write_pages(tmp_path / "sums", tmp_path / "whl", "https://example.org/download/")
    assert [page.name for page in pages] == ["torch-2.11+cu130.html", "index.html"]
    address = f"https://example.org/download/v9/{cuda.name.replace('+', '%2B')}#sha256={'a' * 64}"
    assert f'href="{address}"' in pages[0].read_text()
    assert [page.name for page in find_links.write_pages(tmp_path / "sums", tmp_path / "none")] == ["index.html"]


# ---- workflows, metadata -----------------------------------------------------------------------------------


def _load(path):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _commands(workflow):
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@needs_workflows
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_asks_for_little_and_calls_what_there_is(path):
    workflow = _load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow["concurrency"]) == {"group", "cancel-in-progress"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 180, name
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "actions/none@v1")), step
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in _commands(workflow):
        for target in re.findall(r"\bmake ([a-z-]+)", command):
            assert target in targets, f"make {target}"
        for script in re.findall(r"\bscripts/[\w./-]+", command):
            assert (ROOT / script).is_file(), script
        assert "${{" not in command, "a run takes values from its environment: in the text they are code"


@needs_workflows
def test_the_workflows_know_the_torch_versions_and_the_pythons():
    versions = {path.stem.removeprefix("torch-"): path.read_text() for path in ROOT.glob("requirements/torch-*.txt")}
    tests = _load(ROOT / ".github/workflows/tests.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert set(tests["torch"]) == set(versions)
    wheels = _load(ROOT / ".github/workflows/wheels.yml")["jobs"]["wheel"]["strategy"]["matrix"]
    assert {entry["target"] for entry in wheels["include"]} == set(wheels["target"])
    for entry in wheels["include"]:
        short, build = re.fullmatch(r"torch-(\d+\.\d+)-(cpu|cu\d+)", entry["target"]).groups()
        assert f"torch=={entry['torch']}\n" in versions[short]
        assert entry["kernels"] == ("OFF" if build == "cpu" else "ON") and ("index" in entry) == (build == "cpu")
        assert build == "cpu" or entry["cuda_home"] == f"/usr/local/cuda-{build[2:-1]}.{build[-1]}"
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    built = {name.removesuffix("-manylinux_x86_64") for name in project["tool"]["cibuildwheel"]["build"]}
    classified = re.findall(r"Python :: 3\.(\d+)'", str(project["project"]["classifiers"]))
    assert built == set(wheels["python"]) == {f"cp3{minor}" for minor in classified}


@needs_workflows
def test_the_wheels_settings_call_what_there_is():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    paths = re.findall(r"\{project\}/([\w./-]+)", str(settings))
    assert len(paths) == 4 and all((ROOT / path).is_file() for path in paths), paths
    repair = settings["repair-wheel-command"][0]
    patterns = re.findall(r"--exclude '?([^ ']+)", repair)
    for library in check_wheel.TORCH | check_wheel.TORCH_CUDA | {"libcudart.so.13"}:
        assert any(Path(library).match(pattern) for pattern in patterns), library
    step = _load(ROOT / ".github/workflows/wheels.yml")["jobs"]["wheel"]["steps"][3]
    passed = set(settings["linux"]["environment-pass"])
    assert {name for name in step["env"] if not name.startswith("CIBW_")} <= passed


def test_a_fresh_wheel_is_tried_by_a_program_that_runs(tmp_path):
    ran = subprocess.run(
        [sys.executable, str(ROOT / "scripts/try_wheel.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "TORCHMARGIN_CUDA"},
    )
    assert ran.returncode == 0 and "beside torch" in ran.stdout, ran.stderr


def test_version_and_addresses_are_the_same_everywhere():
    citation = _load(ROOT / "CITATION.cff")
    released, date = re.search(r"^## ([\d.]+) \((.*)\)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert citation["version"] == released == VERSION
    assert citation["date-released"] == date
    address = citation["repository-code"]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'Homepage = "{address}"' in project and f'Issues = "{address}/issues"' in project
    assert f"now {VERSION.rpartition('.')[0]}." in (ROOT / "SECURITY.md").read_text()
