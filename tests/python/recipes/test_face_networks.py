"""IResNet beside its published sizes and names, and its forward beside functions on its state dict in float64."""

import sys

import pytest
import torch
from torch.nn import functional as TF

from recipes.face.networks import DEPTHS, NetworkError, iresnet, make_network


@pytest.mark.parametrize("name, millions", [("iresnet18", 24.03), ("iresnet50", 43.59), ("iresnet100", 65.16)])
def test_published_sizes(name, millions):
    with torch.device("meta"):
        net = iresnet(name)
    assert round(sum(each.numel() for each in net.parameters()) / 1e6, 2) == millions


def _names(blocks):
    """InsightFace's, in its order, with shapes."""
    norm = lambda name, size: {
        **{f"{name}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")},
        f"{name}.num_batches_tracked": (),
    }
    names = {"conv1.weight": (64, 3, 3, 3), **norm("bn1", 64), "prelu.weight": (64,)}
    before = 64
    for stage, count in enumerate(blocks):
        size = 64 * 2**stage
        for place in range(count):
            at = f"layer{stage + 1}.{place}"
            names |= {
                **norm(f"{at}.bn1", before),
                f"{at}.conv1.weight": (size, before, 3, 3),
                **norm(f"{at}.bn2", size),
            }
            names |= {
                f"{at}.prelu.weight": (size,),
                f"{at}.conv2.weight": (size, size, 3, 3),
                **norm(f"{at}.bn3", size),
            }
            if place == 0:
                names |= {f"{at}.downsample.0.weight": (size, before, 1, 1), **norm(f"{at}.downsample.1", size)}
            before = size
    return {**names, **norm("bn2", 512), "fc.weight": (512, 25088), "fc.bias": (512,), **norm("features", 512)}


@pytest.mark.parametrize("name", DEPTHS)
def test_insightfaces_names_and_shapes(name):
    with torch.device("meta"):
        found = iresnet(name).state_dict()
    assert {key: tuple(value.shape) for key, value in found.items()} == _names(DEPTHS[name])
    assert list(found) == list(_names(DEPTHS[name]))


def _by_functions(state, x, blocks, training=False):
    norm = lambda name, x: TF.batch_norm(
        x,
        state[f"{name}.running_mean"].clone(),
        state[f"{name}.running_var"].clone(),
        state[f"{name}.weight"],
        state[f"{name}.bias"],
        training,
        eps=1e-5,
    )
    prelu = lambda name, x: torch.where(x > 0, x, state[f"{name}.weight"][:, None, None] * x)
    x = prelu("prelu", norm("bn1", TF.conv2d(x, state["conv1.weight"], padding=1)))
    for stage, count in enumerate(blocks, 1):
        for place in range(count):
            at, stride = f"layer{stage}.{place}", 2 if place == 0 else 1
            y = TF.conv2d(norm(f"{at}.bn1", x), state[f"{at}.conv1.weight"], padding=1)
            y = TF.conv2d(
                prelu(f"{at}.prelu", norm(f"{at}.bn2", y)), state[f"{at}.conv2.weight"], padding=1, stride=stride
            )
            y = norm(f"{at}.bn3", y)
            if place == 0:
                x = norm(f"{at}.downsample.1", TF.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride))
            x = x + y
    x = norm("bn2", x).flatten(1) @ state["fc.weight"].T + state["fc.bias"]
    return norm("features", x)


@pytest.mark.parametrize("training", [False, True])
def test_beside_functions_in_float64(training):
    net = iresnet("iresnet18", features=24, size=48, width=8).double().train(training)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if value.is_floating_point() and not key.endswith("conv1.weight"):
                value.add_(0.1 * torch.rand_like(value))
    x = torch.randn(5, 3, 48, 48, dtype=torch.float64)
    expected = _by_functions(net.state_dict(), x, DEPTHS["iresnet18"], training)
    assert torch.allclose(net(x), expected, rtol=1e-10, atol=1e-10)


def test_how_it_begins():
    net = iresnet("iresnet18", width=16, size=32)
    assert not net.features.weight.requires_grad and bool((net.features.weight == 1).all())
    deviations = [
        m.weight.std().item() for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 2000
    ]
    assert len(deviations) > 8 and all(abs(each - 0.1) < 0.01 for each in deviations)


def test_the_last_layer_is_float32_under_autocast():
    net = iresnet("iresnet18", features=16, size=32, width=8)
    seen = []
    net.fc.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    net.layer4[0].conv1.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = net(torch.randn(4, 3, 32, 32))
    assert seen == [torch.bfloat16, (torch.float32, torch.float32)] and embedding.dtype == torch.float32


def test_checkpointing_changes_no_bit():
    x = torch.randn(4, 3, 32, 32)
    gradients, states = [], []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        net = iresnet("iresnet18", features=16, size=32, width=8, dropout=0.3, checkpointing=checkpointing)
        for _ in range(2):
            net(x).square().sum().backward()
        gradients.append([each.grad for each in net.parameters() if each.requires_grad])
        states.append(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    # Also what batch norms remember: torch's own checkpoint lets them see each batch twice.
    assert states[1]["layer2.1.bn1.num_batches_tracked"] == 2
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_exports():
    net = iresnet("iresnet18", features=16, size=32, width=8).eval()
    x = torch.randn(3, 3, 32, 32)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.allclose(exported.module()(x[:2]), net(x[:2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"name": "iresnet19"}, "expected one of iresnet18, .* but got 'iresnet19'"),
        ({"name": "iresnet18", "size": 100}, "expected size to be a multiple of 16, but got 100"),
        ({"name": "iresnet18", "width": 0}, "expected four stages of blocks"),
    ],
)
def test_what_is_wrong_is_said(arguments, said):
    with pytest.raises(ValueError, match=said):
        iresnet(**arguments)


def test_images_of_another_size():
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 32, 32\], but got \[2, 3, 112, 112\]"):
        iresnet("iresnet18", size=32, width=4)(torch.zeros(2, 3, 112, 112))


@pytest.mark.parametrize("name", ["resnet50", "timm:resnet18"])
def test_other_networks_end_in_a_batch_norm_in_float32(name):
    pytest.importorskip("timm" if name.startswith("timm") else "torchvision")
    net = make_network(name, features=24).eval()
    x = torch.randn(2, 3, 64, 64)
    found = net(x)
    assert found.shape == (2, 24) and not net.features.weight.requires_grad
    torch.testing.assert_close(found, net.features(net.trunk(x)))
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.float32


def test_networks_that_there_are_not(monkeypatch):
    for name in ("resnet51", "timm", ""):
        with pytest.raises(NetworkError, match="expected one of iresnet18, .*, resnet50 or timm:NAME, but got"):
            make_network(name)
    with pytest.raises(NetworkError, match="resnet50 takes no width, but got 32"):
        make_network("resnet50", width=32)
    with pytest.raises(NetworkError, match="resnet50 takes no checkpointing, but got True"):
        make_network("resnet50", checkpointing=True)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(NetworkError, match="pip install timm"):
        make_network("timm:resnet18")
