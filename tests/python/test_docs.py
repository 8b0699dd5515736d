"""The blocks of README.md and docs: Python runs as it stands, with small stand-ins for what the reader has; C++ and
CMake are one program, shell is parsed; links and paths lead somewhere.

A line `name = ...` stands for the reader's own: it is left out, and STAND_INS has the name.
"""

import ast
import gc
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import torchmargin

from rounding import LinearRounding, assert_within

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "recipes").rglob("README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOT_RUN = {
    "fully_shard(part)": "wants ranks: test_distributed.py does the same with two",
    "10_000_000": "20 GB of weights",
}


def _fenced(language):
    """Of every page: path, line and text of the blocks in this language."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            yield path, text.count("\n", 0, match.start()) + 2, match[1]


def _indented():
    """Of every page: path, line and text of the indented blocks; what is fenced is left out."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"^```.*?^```", lambda block: "-\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
        for match in re.finditer(r"(?<=\n\n)(?: {4,}\S.*\n|\n(?= {4}))+", text):
            yield path, text.count("\n", 0, match.start()) + 1, textwrap.dedent(match[0])


def _is_python(code):
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def _blocks():
    """Indented blocks do not say their language: those that parse are Python."""
    for path, line, code in [*_fenced("python"), *(block for block in _indented() if _is_python(block[2]))]:
        marks = [pytest.mark.skip(reason=reason) for text, reason in NOT_RUN.items() if text in code]
        yield pytest.param(path, line, code, id=f"{path.relative_to(ROOT)}:{line}", marks=marks)


def _images(classes, each=2):
    """[N, 512] and labels: a batch of "images" that the network below takes."""
    return torch.randn(classes * each, 512), torch.arange(classes).repeat(each)


def _readme(folder):
    return {"network": nn.Linear(512, 512), "loader": [_images(3)]}


def _losses(folder):
    embeddings, labels = _images(7)
    return {"num_classes": 7, "embeddings": embeddings, "labels": labels}


def _evaluation(folder):
    image = pytest.importorskip("PIL.Image", reason="ImageFolder needs Pillow")
    pytest.importorskip("torchvision", reason="a block uses its ImageFolder")
    (folder / "lfw").mkdir()
    people = [f"Abel_{k}\t1\t2\nAbel_{k}\t1\tDean_{k}\t3" for k in range(5)]
    (folder / "lfw/pairs.txt").write_text("5\t1\n" + "\n".join(people))
    for k in range(6):
        (folder / f"faces/{k // 3}").mkdir(parents=True, exist_ok=True)
        image.new("L", (4, 4), k).save(folder / f"faces/{k // 3}/{k}.png")
    embeddings, labels = _images(2, 3)
    return {
        "folder": folder,
        "load": lambda path: torch.randn(1, 512),
        "network": nn.Linear(512, 512).requires_grad_(False),
        "embeddings": embeddings,
        "probes": embeddings,
        "probe_labels": labels.index_fill(0, torch.tensor([0]), 77),  # one stranger
        "gallery": embeddings + 0.1,
        "gallery_labels": labels,
    }


def _migrating(folder):
    from pytorch_metric_learning import losses

    embeddings, labels = _images(20)
    labels[3] = -1
    (folder / "work_dir").mkdir()
    for rank, classes in enumerate((13, 7)):
        shard = {"state_dict_softmax_fc": {"weight": torch.randn(classes, 512)}}
        torch.save(shard, folder / f"work_dir/checkpoint_gpu_{rank}.pt")
    torch.save({"projection.weight": torch.randn(60, 256)}, folder / "model_149.pt")
    return {
        "their_loss": losses.ArcFaceLoss(10575, 512),
        "world_size": 2,
        "num_classes": 20,
        "embeddings": embeddings.requires_grad_(),
        "labels": labels,
        "loss": torchmargin.compat.insightface_arcface(512, 20),
    }


def _distributed(folder):
    """One rank, a group of its own: tests/python/distributed has more."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    for rank in range(4):
        shard = {"state_dict_softmax_fc": {"weight": torch.randn(250, 64)}}
        torch.save(shard, folder / f"checkpoint_gpu_{rank}.pt")
    head = torchmargin.distributed.ClassParallel(torchmargin.ArcFaceLoss(64, 1000, device="meta"), mesh)
    network = nn.Linear(512, 64)
    return {
        "dist": dist,
        "gc": gc,
        "mesh": mesh,
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
        "head": head,
        "head_optimizer": torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9),
        "ClassParallel": torchmargin.distributed.ClassParallel,
    }


def _choosing(folder):
    return {**_losses(folder), "num_classes": 10}


def _training(folder):
    """What the page's first block makes, and what later ones go on with."""
    network = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16))
    loss = torchmargin.ArcFaceLoss(16, 8, scale=16.0)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.loss = network, loss

        def forward(self, images):
            return self.loss.logits(self.network(images))

    return {
        "network": network,
        "loss": loss,
        "images": torch.randn(12, 20),
        "labels": torch.randint(0, 8, (12,)),
        "optimizer": torch.optim.SGD([*network.parameters(), *loss.parameters()], lr=0.1),
        "classifier": Classifier().eval(),
    }


def _start(folder):
    return {"network": nn.Linear(20, 32), "loss": torchmargin.ArcFaceLoss(32, 8)}


def _recipe(folder):
    """Two drawn people as train.rec and lfw.bin, and a photograph with its landmarks."""
    image = pytest.importorskip("PIL.Image", reason="the recipe needs Pillow")
    from recipes.face import alignment, pack

    for person in "ab":
        (folder / "faces" / person).mkdir(parents=True)
        image.new("RGB", (112, 112)).save(folder / "faces" / person / "1.png")
    (folder / "pairs.csv").write_text("faces/a/1.png,faces/b/1.png,0\n")
    pack.pack_folder(folder / "faces", folder / "train.rec")
    pack.pack_pairs(folder / "pairs.csv", folder / "lfw.bin")
    return {"photograph": image.new("RGB", (200, 200)), "landmarks": 1.5 * alignment.template()}


STAND_INS = {
    "docs/start.md": _start,
    "recipes/face/README.md": _recipe,
    "docs/choosing.md": _choosing,
    "docs/training.md": _training,
    "docs/distributed.md": _distributed,
    "README.md": _readme,
    "docs/losses.md": _losses,
    "docs/evaluation.md": _evaluation,
    "docs/migrating.md": _migrating,
}


def _is_readers_own(statement):
    return (
        isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Constant)
        and statement.value.value is Ellipsis
    )


def _run(path, line, code, folder):
    names = {"torch": torch, "torchmargin": torchmargin}
    names.update(STAND_INS.get(str(path.relative_to(ROOT)), lambda folder: {})(folder))
    tree = ast.parse(code, filename=str(path))
    tree.body = [statement for statement in tree.body if not _is_readers_own(statement)]
    exec(compile(ast.increment_lineno(tree, line - 1), str(path), "exec"), names)
    return names


@pytest.mark.parametrize(("path", "line", "code"), list(_blocks()))
def test_a_block_runs_as_it_stands(path, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "torch.onnx" in code:
        pytest.importorskip("onnxscript")
    try:
        with (
            warnings.catch_warnings(),
            torchmargin.workspace_limit(torchmargin.get_workspace_limit()),
        ):  # a block sets them
            _run(path, line, code, tmp_path)
    finally:
        if torch.distributed.is_initialized():
            gc.collect()  # what holds a process group has to go before it
            torch.distributed.destroy_process_group()


def test_the_loss_of_your_own_leaves_ignored_rows_out(tmp_path):
    """docs/losses.md: the margins [C] are looked up by label, and the label of an ignored row is -100."""
    block = next(block for block in _blocks() if "CurriculumArcFace" in block.values[2])
    recipe = _run(*block.values, tmp_path)["CurriculumArcFace"]
    loss = recipe(512, torch.tensor([10.0, 40.0, 20.0])).double()
    embeddings, labels = _images(3)
    embeddings = embeddings.double()
    labels[[1, 4]] = -100
    known = labels >= 0
    expected = [loss(embeddings[row][None], labels[row][None]) for row in known.nonzero()[:, 0]]
    rounding = LinearRounding(embeddings[known], loss.weight, labels[known], scale=64.0, m2=0.5)  # its largest margin
    assert_within(loss(embeddings, labels), torch.stack(expected).mean(), rounding.loss(0.0, known.sum()))
    plain = torchmargin.MarginLoss(512, 3, scale=64.0, extension="monotonic").double()
    plain.load_state_dict(loss.state_dict(), strict=False)
    assert loss(embeddings, labels) > plain(embeddings, labels)  # there is a margin


# ---- C++, CMake, shell ----------------------------------------------------------------------------------------------

# What the fragments' reader has. A block with a main() of its own is a whole program.
CPP_STAND_INS = """
#include <torch/torch.h>
#include <torchmargin/torchmargin.h>
#include <iostream>
[[maybe_unused]] const at::Tensor embeddings = torch::randn({4, 512}), labels = torch::arange(4);
[[maybe_unused]] const at::Tensor shard = torch::randn({10, 512}), weight = torch::randn({10, 512});
[[maybe_unused]] const int64_t first_class = 0, num_classes = 10, ranks = 1;
[[maybe_unused]] const std::string group_name = "0";
[[maybe_unused]] torchmargin::nn::ArcFaceLoss loss(512, 10);
"""
CPP_NOT_RUN = {"group_name": "wants ranks: test_cpp_examples.py has two"}


def _namespace(path, line):
    return re.sub(r"\W", "_", f"{path.relative_to(ROOT)}_{line}")


def _as_functions(blocks):
    """Every block as a function in a namespace of its own, with the includes of all in front."""
    includes, functions = [CPP_STAND_INS], []
    for path, line, code in blocks:
        includes += re.findall(r"^#include .*$", code, re.MULTILINE)
        body = re.sub(r"^#include .*$", "", code, flags=re.MULTILINE)
        whole = re.search(r"^int main\(\) \{$", body, re.MULTILINE)
        body = body.replace("int main() {", "void run() {") if whole else f"void run() {{\n{body}\n}}"
        functions.append(f'namespace {_namespace(path, line)} {{\n#line {line} "{path}"\n{body}\n}}')
    return "\n".join([*includes, *functions])


@pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="programs would want sanitizers too")
def test_the_cpp_blocks_are_a_program_and_the_first_page_trains(tmp_path):
    """All compile, built by docs/start.md's CMake file and its commands, and run, docs/start.md's program last."""
    blocks = sorted(_fenced("cpp"), key=lambda block: block[0].name == "start.md")
    run = [block for block in blocks if not any(text in block[2] for text in CPP_NOT_RUN)]
    save = 'torchmargin::save_state_dict(*loss, "loss.pt");'  # a block reads it
    calls = " ".join(f"{save} {_namespace(*block[:2])}::run();" for block in run)
    program = f"{_as_functions(blocks)}\nint main() {{ torch::manual_seed(0); {calls} }}\n"
    (tmp_path / "app.cpp").write_text(program)
    (cmake,) = (code for path, _, code in _fenced("cmake") if path.name == "start.md")
    (tmp_path / "CMakeLists.txt").write_text(cmake)
    (commands,) = (code for path, _, code in _fenced("bash") if path.name == "start.md")
    with_python = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(["bash", "-euc", commands], cwd=tmp_path, capture_output=True, text=True, env=with_python)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    assert int(re.search(r"(\d+) of 64 are right", ran.stdout)[1]) > 32, ran.stdout


# An indented block that begins so is shell.
COMMAND = re.compile(
    r"([A-Z_]+=\S* )*(auditwheel|build/\S+|cibuildwheel|cmake|make|pip|python|scripts/\S+|torchrun)( |$)"
)


def test_shell_blocks_can_be_parsed_and_the_recipe_takes_its_commands():
    from recipes.face.__main__ import parser

    shell = [*_fenced("bash"), *(block for block in _indented() if COMMAND.match(block[2]))]
    for path, line, code in shell:
        code = re.sub(r"<(\w+)>", r"\1", code)  # a placeholder
        ran = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
        assert ran.returncode == 0, f"{path}:{line}: {ran.stderr}"
        for command in re.findall(r"-m recipes\.face (.*)", code):
            arguments = shlex.split(command, comments=True)
            if arguments[-1] != "...":
                parser().parse_args(arguments)  # SystemExit and usage where it does not take them


def test_every_block_is_in_a_language_that_is_tested():
    known = {"python", "cpp", "cmake", "bash", "bibtex", "{toctree}", "{eval-rst}", "{doxygennamespace}", ""}
    for path in PAGES:
        fences = re.findall(r"^```(\S*)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences) <= known, path


def test_targets_of_make_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", text, re.MULTILINE)
        assert set(named) <= targets, f"{path}: {set(named) - targets}"


def test_paths_in_code_are_in_the_tree():
    """`scripts/x.sh`, `examples/...`: what pages name by its whole path."""
    inside = r"`[^`\n]*`|^    .*$"
    name = re.compile(r"(?<![\w/.-])(?:examples|scripts|benchmarks|tests|csrc|cuda|cmake|requirements)/[\w./-]*\w")
    for path in PAGES:
        for code in re.findall(inside, path.read_text(encoding="utf-8"), re.MULTILINE):
            for found in name.findall(code):
                globbed = "X.Y" in found or re.search(re.escape(found) + r"\S*[*{<]", code)
                assert globbed or (ROOT / found).exists() or found.startswith("tests/cpp/torchmargin_"), (
                    f"{path}: {found}"
                )


# ---- links ----------------------------------------------------------------------------------------------------------


def _anchor(heading):
    """GitHub's and MyST's name of a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if "_generated" in target.parts:
            assert target.name in (ROOT / "docs/conf.py").read_text(encoding="utf-8"), link
            continue
        assert target.exists(), f"{path}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_anchor, headings), f"{path}: {link}"


def test_every_page_is_in_the_site():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = {line for block in re.findall(r"^```{toctree}\n(.*?)^```", index, re.M | re.S) for line in block.split()}
    pages = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index"} <= listed
