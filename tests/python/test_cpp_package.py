"""The package as a C++ program meets it: find_package, one target, the modules, the same bits as Python."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchmargin

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = torchmargin._extension.BINARIES
TORCH = Path(torch.__file__).parent
THREADS = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}

pytestmark = [
    pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake"),
    pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="programs would want sanitizers too"),
]


def _run(*command, **environment):
    ran = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    return ran.returncode, ran.stdout + ran.stderr


def _configure(build, *arguments, prefix=torchmargin.utils.cmake_prefix_path, **environment):
    # Reading the compiler's own facts takes seconds, and optimising what only calls the library half a minute a file:
    # what is under test here is the package.
    known = ("-DCMAKE_CXX_COMPILER_WORKS=ON", "-DCMAKE_BUILD_TYPE=")
    source = ROOT / "tests/consumer"
    return _run("cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", *known, *arguments, **environment)


@pytest.fixture(scope="session")
def consumer(tmp_path_factory):
    """The folder of the programs of tests/consumer, built against the installed package."""
    build = tmp_path_factory.mktemp("consumer")
    status, text = _configure(build)
    assert status == 0, text
    assert f"Found TorchMargin {torchmargin.__version__}: torch {torch.__version__.split('+')[0]}" in text
    status, text = _run("cmake", "--build", build, "-j", "2")
    assert status == 0, text
    return build


def test_ops_are_registered_although_no_symbol_is_used(consumer):
    status, text = _run(consumer / "dispatcher_only")
    assert status == 0 and text.startswith("-0.479426"), text


def test_each_public_header_stands_by_itself(consumer):
    status, text = _run("cmake", "--build", consumer, "--target", "headers", "-j", "2")
    assert status == 0, text
    assert len(list(consumer.glob("header_*.cpp"))) == len(list((ROOT / "csrc/include/torchmargin").glob("*.h")))


def test_the_program_of_the_documentation_runs(tmp_path):
    """docs/cpp.md's two files as they stand there, with its command."""
    text = (ROOT / "docs/cpp.md").read_text()
    for name, language in (("CMakeLists.txt", "cmake"), ("app.cpp", "cpp")):
        (tmp_path / name).write_text(text.split(f"```{language}\n")[1].split("```")[0])
    prefix = f"-DCMAKE_PREFIX_PATH={torchmargin.utils.cmake_prefix_path}"
    for command in (["-S", tmp_path, "-B", tmp_path / "build", prefix], ["--build", tmp_path / "build"]):
        status, output = _run("cmake", *command)
        assert status == 0, output
    ran = subprocess.run([tmp_path / "build/app"], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    losses = [float(line.split(",")[0]) for line in ran.stdout.splitlines()]
    assert len(losses) == 5 and losses[-1] < losses[0] and (tmp_path / "loss.pt").exists()


@pytest.mark.parametrize(("probes", "entries", "k"), [(5, 30, 3), (1, 9000, 4), (4100, 9, 9), (4100, 4097, 2)])
def test_the_examples_search_of_a_gallery_is_pythons(consumer, tmp_path, probes, entries, k):
    """In one block, and in several of probes and of entries."""
    from torchmargin.evaluation import top_k

    rows = [torch.nn.functional.normalize(torch.randn(count, 8)) for count in (probes, entries)]
    torch.save({"probes": rows[0], "gallery": rows[1]}, tmp_path / "inputs.pt")
    status, text = _run(consumer / "search_gallery", tmp_path / "inputs.pt", k)
    assert status == 0, text
    found = torch.tensor([[int(word) for word in line.split()] for line in text.splitlines()[1:]])
    cosines = rows[0].double() @ rows[1].double().T
    # Entries whose cosines differ by less than a product of 8 terms rounds may change places.
    best = top_k(rows[0].double(), rows[1].double(), k)[0]
    assert found.shape == (probes, k) and (cosines.gather(1, found) - best).abs().max() < 2 * 12 * 2.0**-24
    assert all(len(set(row)) == k for row in found.tolist())


@pytest.mark.parametrize(
    ("sizes", "k", "message"),
    [
        ([(2, 8), (3, 8)], 4, "expected k in [1, 3], the size of the gallery, but got 4"),
        ([(2, 8), (3, 8)], 0, "expected k in [1, 3], the size of the gallery, but got 0"),
        ([(2, 8), (0, 8)], 1, "expected k in [1, 0], the size of the gallery, but got 1"),
        ([(2, 8), (3, 7)], 1, "expected probes [P, D] and a gallery [G, D], but got [2, 8] and [3, 7]"),
    ],
)
def test_the_examples_search_refuses(consumer, tmp_path, sizes, k, message):
    torch.save({name: torch.ones(size) for name, size in zip(("probes", "gallery"), sizes)}, tmp_path / "inputs.pt")
    status, text = _run(consumer / "search_gallery", tmp_path / "inputs.pt", k)
    assert status != 0 and f"search_gallery: {message}" in text


def test_the_examples_verification_is_pythons(consumer, tmp_path):
    from torchmargin.evaluation import pairs, verification

    # 16 signs times a power of two: cosines are multiples of 1/8, exact in every order, and many are equal.
    signs = lambda *shape, minus: torch.where(torch.rand(*shape) < minus, -1.0, 1.0)  # noqa: E731
    labels = torch.randint(0, 6, (60,))
    embeddings = signs(6, 16, minus=0.5)[labels] * signs(60, 16, minus=0.25) * 2.0 ** torch.randint(-3, 4, (60, 1))
    torch.save({"embeddings": embeddings.double(), "labels": labels}, tmp_path / "inputs.pt")
    status, text = _run(consumer / "verification", tmp_path / "inputs.pt")
    assert status == 0, text
    first, second, same = pairs.all_pairs(labels)
    true = verification.verify(pairs.pair_scores(embeddings.double(), first, second), same, far=(0.05,))
    auc, eer, tar, same_pairs, different = (float(word) for word in text.split())
    assert (same_pairs, same_pairs + different) == (true.same_pairs, true.pairs)
    # Twelve decimals are printed: half a unit, and some hundred u for what is made of counts at 17 thresholds.
    printed = 0.5e-12 + 500 * 2**-53
    assert (auc, eer, tar) == pytest.approx((true.auc, true.eer, true.tar[0.05]), abs=printed)
    assert 0.5 < true.auc < 1 and 0 < true.tar[0.05] < 1


# The losses, and the numbers of each that are saved with the weight.
LOSSES = {
    "SoftmaxLoss": ["scale"],
    "ModifiedSoftmaxLoss": ["scale"],
    "NormalizedSoftmaxLoss": ["scale"],
    "SphereFaceLoss": ["scale", "margin", "lambda_base", "lambda_gamma", "lambda_min"],
    "LargeMarginSoftmaxLoss": ["scale", "margin", "lambda_base", "lambda_gamma", "lambda_min"],
    "CosFaceLoss": ["scale", "margin"],
    "ArcFaceLoss": ["scale", "margin"],
    "CombinedMarginLoss": ["scale", "m1", "m2", "m3"],
    "AdaFaceLoss": ["scale", "margin", "h", "momentum"],
    "MagFaceLoss": ["scale", "a_min", "a_max", "m_min", "m_max", "regularizer"],
    "ElasticFaceLoss": ["scale", "margin", "deviation"],
    "SubCenterArcFaceLoss": ["scale", "margin"],
    "CurricularFaceLoss": ["scale", "margin", "momentum"],
    "MVSoftmaxLoss": ["scale", "margin", "t"],
    "InterTopKArcFaceLoss": ["scale", "margin", "hardest_margin"],
    "SphereFace2Loss": ["scale", "margin", "t", "positive_weight"],
    "UniFaceLoss": ["scale", "margin"],
}

# Python's half of tests/consumer/main.cpp, in a process of its own with the same threads; an exchange a line.
TRAIN = """
import json, sys, torch, torchmargin

def train(name, inputs, state, results, changed):
    inputs = torch.load(inputs)
    x = inputs["embeddings"].clone().requires_grad_()
    loss = getattr(torchmargin, name)(8, 30).to(x.dtype)
    loss.load_state_dict(torch.load(state))
    optimiser = torch.optim.SGD(loss.parameters(), lr=0.1)
    found = {}
    for step in range(2):
        value, statistics = loss(x, inputs["labels"], return_statistics=True)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        found |= {f"loss{step}": value.detach(), f"accuracy{step}": statistics.accuracy}
    found |= {"grad_embeddings": x.grad, "logits": loss.logits(x).detach()}
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    loss.load_state_dict(torch.load(changed))
    loss.eval()
    with torch.no_grad():
        again = {"loss": loss(x, inputs["labels"]), "logits": loss.logits(x)}
    torch.save({"results": found, "state": state, "changed": again}, results)

for line in sys.stdin:
    train(*json.loads(line))
    print("trained", flush=True)
"""


@pytest.fixture(scope="module")
def train_in_python(tmp_path_factory):
    """train(name, inputs, state, results, changed): as TRAIN does it, in one process for all tests."""
    errors = tmp_path_factory.mktemp("train") / "errors"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", TRAIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **THREADS},
        )

    def train(name, *paths):
        assert process.poll() is None, errors.read_text()
        process.stdin.write(json.dumps([name, *map(str, paths)]) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "trained\n", errors.read_text()

    with process:
        yield train
        process.stdin.close()


def _exchange(consumer, train_in_python, tmp_path, name, loss, dtype):
    """The loss's state goes to C++, both train two steps, C++'s state comes back: every bit is the same. Then C++
    changes every number, and its state gives Python the same loss again."""
    inputs = {"embeddings": 3 * torch.randn(40, 8, dtype=dtype), "labels": torch.randint(0, 30, (40,))}
    inputs["labels"][3] = -100
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.save(dict(loss.state_dict()), tmp_path / "state.pt")
    paths = [tmp_path / "inputs.pt", tmp_path / "state.pt"]
    status, text = _run(consumer / "consumer", name, *paths, tmp_path / "cpp.pt", **THREADS)
    assert status == 0, text
    assert f"{name}Impl(in_features=8, num_classes=30" in text
    # A wrong shape is a c10::Error with the op's text.
    assert "linear_margin_cross_entropy: expected weight to have shape [C, 7], but got [30, 8]" in text
    paths += [tmp_path / "python.pt", tmp_path / "cpp.pt.changed_state"]
    train_in_python(name, *paths)
    python = torch.load(tmp_path / "python.pt")
    for part, file in (("results", "cpp.pt"), ("changed", "cpp.pt.changed")):
        got = torch.load(tmp_path / file, weights_only=False)  # torch::pickle_save wrote it
        assert set(got) == set(python[part])
        for key, value in python[part].items():
            assert got[key].dtype == value.dtype
            assert torch.equal(got[key], value), (part, key)
    state = torch.load(tmp_path / "cpp.pt.state")
    assert set(state) == set(python["state"])
    for key, value in python["state"].items():
        assert torch.equal(state[key], value), key
    loss.load_state_dict(state)  # strict: the same names and shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_modules_give_pythons_bits_and_exchange_weights_and_numbers(consumer, train_in_python, tmp_path, name, dtype):
    options = {"deviation": 0.0} if name == "ElasticFaceLoss" else {}
    loss = getattr(torchmargin, name)(8, 30, **options).to(dtype)
    for number in LOSSES[name]:
        setattr(loss, number, 0.9 * float(getattr(loss, number)))
    _exchange(consumer, train_in_python, tmp_path, name, loss, dtype)


@pytest.mark.parametrize("name", ["ArcFaceLoss", "CosFaceLoss"])
def test_margins_of_classes_are_exchanged(consumer, train_in_python, tmp_path, name):
    loss = getattr(torchmargin, name)(8, 30, margin=0.5 * torch.rand(30))
    _exchange(consumer, train_in_python, tmp_path, name, loss, torch.float32)


def test_a_state_dict_without_numbers_keeps_the_programs(consumer, tmp_path):
    torch.save(
        {"embeddings": torch.randn(4, 8), "labels": torch.arange(4)},
        tmp_path / "inputs.pt",
    )
    torch.save({"weight": torch.randn(30, 8)}, tmp_path / "state.pt")
    paths = [tmp_path / name for name in ("inputs.pt", "state.pt", "cpp.pt")]
    status, text = _run(consumer / "consumer", "ArcFaceLoss", *paths)
    assert status == 0 and "scale=64, m1=1, m2=0.5" in text, text


def test_an_ordered_state_dict_is_refused_with_the_remedy(consumer, tmp_path):
    loss = torchmargin.ArcFaceLoss(8, 30)
    torch.save({"embeddings": torch.randn(4, 8), "labels": torch.zeros(4, dtype=torch.int64)}, tmp_path / "inputs.pt")
    torch.save(loss.state_dict(), tmp_path / "state.pt")
    paths = [tmp_path / name for name in ("inputs.pt", "state.pt", "cpp.pt")]
    status, text = _run(consumer / "consumer", "ArcFaceLoss", *paths)
    assert status != 0 and "in Python write it with torch.save(dict(module.state_dict()), path)" in text


# What find_package says of a package or a LibTorch that does not fit. The package's file is copied and changed.


@pytest.fixture
def package(tmp_path):
    """A copy of the installed package's CMake files in a tree of its own: change(old, new) edits it."""
    copy = tmp_path / "prefix"
    shutil.copytree(PACKAGE / "share", copy / "share")
    (copy / "lib").symlink_to(PACKAGE / "lib")
    (copy / "include").symlink_to(PACKAGE / "include")
    config = copy / "share/cmake/TorchMargin/TorchMarginConfig.cmake"

    def change(name, value):
        lines = config.read_text().splitlines()
        changed = [f'set({name} "{value}")' if line.startswith(f"set({name} ") else line for line in lines]
        assert changed != lines
        config.write_text("\n".join(changed) + "\n")

    change.prefix = copy
    return change


def _refusal(tmp_path, package, *arguments, torch_dir=TORCH):
    prefix = f"{package.prefix};{torch_dir}"
    status, text = _configure(tmp_path / "build", *arguments, prefix=prefix)
    return status != 0, " ".join(text.split())


def test_a_relocated_package_is_found(tmp_path, package):
    refused, text = _refusal(tmp_path, package)
    assert not refused, text


def test_another_torch_version_is_named(tmp_path, package):
    package("TorchMargin_TORCH_VERSION", "1.13.0")
    refused, text = _refusal(tmp_path, package)
    assert refused and "this TorchMargin was built for torch 1.13.0, but LibTorch in" in text
    assert f"build TorchMargin for torch {'.'.join(torch.__version__.split('.')[:2])}, or use torch 1.13." in text


def test_no_libtorch_is_named(tmp_path, package):
    refused, text = _refusal(tmp_path, package, torch_dir=tmp_path)
    assert refused and "and there is none: add its folder to CMAKE_PREFIX_PATH or set Torch_DIR" in text


def test_torch_dir_is_understood(tmp_path, package):
    refused, text = _refusal(tmp_path, package, f"-DTorch_DIR={TORCH}/share/cmake/Torch", torch_dir=tmp_path)
    assert not refused, text


def test_a_cpu_only_libtorch_is_named(tmp_path, package):
    libtorch = tmp_path / "libtorch"
    (libtorch / "lib").mkdir(parents=True)
    (libtorch / "lib/libtorch_cpu.so").symlink_to(TORCH / "lib/libtorch_cpu.so")
    (libtorch / "share").symlink_to(TORCH / "share")
    package("TorchMargin_CUDA_ARCHITECTURES", "9.0")
    refused, text = _refusal(tmp_path, package, torch_dir=libtorch)
    assert refused and "this TorchMargin has CUDA kernels, but LibTorch in" in text


def test_the_component_cuda(tmp_path, package):
    package("TorchMargin_CUDA_ARCHITECTURES", "")
    refused, text = _refusal(tmp_path, package, "-DCONSUMER_COMPONENTS=CUDA")
    assert refused and "this TorchMargin is a CPU-only build, but the component CUDA is required" in text
    refused, text = _refusal(tmp_path, package, "-DCONSUMER_COMPONENTS=TPU")
    assert refused and "there is no component 'TPU', the only one is CUDA" in text
    if (TORCH / "lib/libc10_cuda.so").exists():
        package("TorchMargin_CUDA_ARCHITECTURES", "9.0")
        refused, text = _refusal(tmp_path, package, "-DCONSUMER_COMPONENTS=CUDA")
        assert not refused, text


@pytest.mark.parametrize("flag", ["-D_GLIBCXX_USE_CXX11_ABI=0", "-D_GLIBCXX_DEBUG"])
def test_another_layout_of_cpp_objects_is_named(tmp_path, package, flag):
    refused, text = _refusal(tmp_path, package, f"-DCMAKE_CXX_FLAGS={flag}")
    assert refused and "with which C++ objects have another layout" in text


@pytest.mark.parametrize("layout", ["_GLIBCXX_USE_CXX11_ABI=0", "_GLIBCXX_DEBUG"])
def test_another_layout_is_named_wherever_it_is_defined(tmp_path, package, layout):
    for where, command in (
        ("directory", f"add_compile_definitions({layout})"),
        ("option", f"add_compile_options(-D{layout})"),
    ):
        project = tmp_path / where
        project.mkdir()
        lines = [
            "cmake_minimum_required(VERSION 3.18)",
            "project(p CXX)",
            command,
            "find_package(TorchMargin CONFIG REQUIRED)",
        ]
        (project / "CMakeLists.txt").write_text("\n".join(lines) + "\n")
        arguments = (f"-DCMAKE_PREFIX_PATH={package.prefix};{TORCH}", "-DCMAKE_CXX_COMPILER_WORKS=ON")
        status, text = _run("cmake", "-S", project, "-B", tmp_path / f"{where}-build", *arguments)
        assert status != 0 and "with which C++ objects have another layout" in " ".join(text.split())
    # What comes after find_package, or with one target: the header says it.
    (tmp_path / "one.cpp").write_text("#include <torchmargin/export.h>\n")
    compiler = os.environ.get("CXX", "c++")
    include = [f"-I{PACKAGE / 'include'}", "-fsyntax-only", tmp_path / "one.cpp"]
    assert _run(compiler, *include)[0] == 0
    status, text = _run(compiler, f"-D{layout}", *include)
    assert status != 0 and "another layout than in LibTorch and torchmargin" in text


def test_a_debug_program_links_the_library(tmp_path, package):
    refused, text = _refusal(tmp_path, package, "-DCMAKE_BUILD_TYPE=Debug")
    assert not refused, text


def test_a_sanitized_library_is_named(tmp_path, package):
    package("TorchMargin_SANITIZERS", "address")
    refused, text = _refusal(tmp_path, package)
    assert refused and "this TorchMargin was built with -fsanitize=address" in text


def test_versions_are_compared(tmp_path, package):
    project = tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(p CXX)\nfind_package(TorchMargin 99.1 CONFIG REQUIRED)\n"
    )
    arguments = (f"-DCMAKE_PREFIX_PATH={package.prefix};{TORCH}", "-DCMAKE_CXX_COMPILER_WORKS=ON")
    status, text = _run("cmake", "-S", project, "-B", tmp_path / "build", *arguments)
    assert status != 0 and "99.1" in text
