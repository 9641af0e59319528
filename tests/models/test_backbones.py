"""Grids, channels and dilations of the backbones; weights in both key layouts and in both kinds of file."""

import sys
import types

import pytest
import torch
from torch import nn

from fss_models import backbones, load_weights
from fss_models.backbones import VGG16, ResNet, Tiny

GRIDS = {473: (119, 60, 60, 30), 641: (161, 81, 81, 41), 417: (105, 53, 53, 27)}
CHANNELS = {"tiny": (32, 64, 64), "vgg16": (256, 512, 512), "vgg16_bn": (256, 512, 512)}


@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_grids_and_channels(name):
    with torch.device("meta"):
        backbone = backbones.create(name)
    channels = CHANNELS.get(name, (512, 1024, 2048))
    assert backbone.channels == channels
    for size, (layer1, stage2, deep, vgg_deep) in GRIDS.items():
        images = torch.empty(1, 3, size, size, device="meta")
        features = backbone(images)
        last = vgg_deep if name.startswith("vgg") else deep
        assert [tuple(f.shape[1:]) for f in features] == [
            (c, n, n) for c, n in zip(channels, (stage2, last, last), strict=True)
        ]
        if name.startswith("resnet"):
            assert backbone.layer1(backbone.layer0(images)).shape[2:] == (layer1, layer1)


def test_dilations_and_strides():
    """Every 3x3 of layers 3 and 4 is dilated; nothing after layer 2 has a stride."""
    with torch.device("meta"):
        backbone = ResNet(50)
    for layer, dilation in ((backbone.layer3, 2), (backbone.layer4, 4)):
        for block in layer:
            assert (block.conv2.dilation, block.conv2.padding) == ((dilation, dilation),) * 2
        assert all(m.stride == (1, 1) for m in layer.modules() if isinstance(m, nn.Conv2d))
    assert [backbone.layer2[0].conv2.stride, backbone.layer2[0].downsample[0].stride] == [(2, 2), (2, 2)]


def test_deep_stem():
    with torch.device("meta"):
        stem = ResNet(50, deep_stem=True).layer0
    convolutions = [(m.in_channels, m.out_channels, m.stride[0]) for m in stem if isinstance(m, nn.Conv2d)]
    assert convolutions == [(3, 64, 2), (64, 64, 1), (64, 128, 1)]


def test_parameter_counts():
    """Those of torchvision's models without their classifiers."""
    with torch.device("meta"):
        counts = {n: sum(p.numel() for p in backbones.create(n).parameters()) for n in backbones.BACKBONES}
    assert counts["resnet50"] == 25_557_032 - 2_049_000
    assert counts["resnet101"] == 44_549_160 - 2_049_000
    assert counts["vgg16"] == 138_357_544 - 123_642_856
    assert counts["vgg16_bn"] == 138_365_992 - 123_642_856


def literal_bottleneck(state, name, x, stride, dilation):
    def norm(n, y):
        mean, var, weight, bias = (state[f"{n}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return torch.nn.functional.batch_norm(y, mean, var, weight, bias)

    conv = torch.nn.functional.conv2d
    y = norm(f"{name}.bn1", conv(x, state[f"{name}.conv1.weight"])).relu()
    y = norm(f"{name}.bn2", conv(y, state[f"{name}.conv2.weight"], None, stride, dilation, dilation)).relu()
    y = norm(f"{name}.bn3", conv(y, state[f"{name}.conv3.weight"]))
    if f"{name}.downsample.0.weight" in state:
        x = norm(f"{name}.downsample.1", conv(x, state[f"{name}.downsample.0.weight"], None, stride))
    return (x + y).relu()


def test_resnet_values():
    """Layers 1 to 4 against functional code on the parameters."""
    torch.manual_seed(0)
    backbone = ResNet(50).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    state = backbone.state_dict()
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        x, expected = backbone.layer0(images), []
        for layer, blocks, stride, dilation in ((1, 3, 1, 1), (2, 4, 2, 1), (3, 6, 1, 2), (4, 3, 1, 4)):
            for block in range(blocks):
                x = literal_bottleneck(state, f"layer{layer}.{block}", x, stride if block == 0 else 1, dilation)
            expected.append(x)
        for got, want in zip(backbone(images), expected[1:], strict=True):
            torch.testing.assert_close(got, want)


def test_vgg_values():
    """Against one flat list of layers, cut after pools 3 and 4."""
    torch.manual_seed(0)
    backbone = VGG16(batch_norm=True).eval()
    flat = [m for i in range(5) for m in getattr(backbone, f"layer{i}")]
    x, pools, expected = torch.randn(1, 3, 37, 37), 0, []
    with torch.no_grad():
        got = backbone(x)
        for module in flat:
            x = nn.functional.max_pool2d(x, 2, 2, ceil_mode=True) if isinstance(module, nn.MaxPool2d) else module(x)
            pools += isinstance(module, nn.MaxPool2d)
            if isinstance(module, nn.MaxPool2d) and pools in (3, 4):
                expected.append(x)
    assert pools == 4
    for g, w in zip(got, [*expected, x], strict=True):
        torch.testing.assert_close(g, w)


# ---- weights --------------------------------------------------------------------------------------------------------


def torchvision_name(backbone, key: str) -> str:
    """The inverse of the mapping, by a table of another making."""
    layer, index, *rest = key.split(".")
    if isinstance(backbone, VGG16):
        bn = any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
        start = ((0, 7, 14, 24, 34) if bn else (0, 5, 10, 17, 24))[int(layer[-1])]
        return ".".join(["features", str(start + int(index)), *rest])
    if layer != "layer0":
        return key
    stem = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
    return ".".join([stem[index], *rest])


@pytest.fixture(scope="module", params=["resnet50", "resnet50_v2", "vgg16", "vgg16_bn"])
def source(request):
    """A backbone whose every tensor is different."""
    torch.manual_seed(0)
    backbone = backbones.create(request.param)
    for i, value in enumerate(backbone.state_dict().values()):
        value.fill_(i + 1)
    return request.param, backbone


@pytest.mark.parametrize("layout", ["torchvision", "pspnet"])
def test_layouts(source, layout, tmp_path):
    name, backbone = source
    state = backbone.state_dict()
    head = {"fc.weight": torch.ones(2), "classifier.0.bias": torch.ones(2)}
    if layout == "torchvision":
        state = {torchvision_name(backbone, k): v for k, v in state.items()} | head
    else:
        state = {"state_dict": {f"module.{k}": v for k, v in (state | head | {"ppm.x": torch.ones(1)}).items()}}
    torch.save(state, tmp_path / "weights.pth")
    loaded = backbones.create(name)
    report = load_weights(loaded, tmp_path / "weights.pth")
    assert report.complete and report.layout == layout and report.loaded == len(backbone.state_dict())
    assert set(report.ignored) >= set(head)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[key]), key


def test_first_torchvision_names():
    """Two names from torchvision's files, written by hand."""
    assert ResNet(50, deep_stem=True).own_name("bn3.running_mean") == "layer0.7.running_mean"
    assert VGG16(batch_norm=True).own_name("features.40.weight") == "layer4.6.weight"
    assert VGG16(batch_norm=False).own_name("features.28.bias") == "layer4.4.bias"


def test_missing_and_unexpected_are_named(tmp_path):
    backbone = Tiny(8)
    state = backbone.state_dict()
    del state["layer2.0.weight"]
    state["layer9.weight"] = torch.ones(1)
    state["layer1.0.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "weights.pth")
    before = {k: v.clone() for k, v in Tiny(8).state_dict().items()}
    target = Tiny(8)
    target.load_state_dict(before)
    with pytest.raises(ValueError) as error:
        load_weights(target, tmp_path / "weights.pth")
    for part in ("1 missing: layer2.0.weight", "1 unexpected: layer9.weight", "1 mismatched: layer1.0.weight: (3,)"):
        assert part in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    report = load_weights(target, tmp_path / "weights.pth", strict=False)
    assert (report.missing, report.unexpected) == (("layer2.0.weight",), ("layer9.weight",))
    assert report.loaded == len(before) - 2
    assert torch.equal(target.layer0[0].weight, backbone.layer0[0].weight)


def test_wrong_stem_is_said(tmp_path):
    torch.save(ResNet(50, deep_stem=True).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(ValueError, match="deep stem"):
        load_weights(ResNet(50), tmp_path / "deep.pth")


def test_counters_of_batches_may_be_missing(tmp_path):
    backbone = VGG16(batch_norm=True)
    state = {k: v for k, v in backbone.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert load_weights(backbone, tmp_path / "old.pth").complete


def test_safetensors(tmp_path, monkeypatch):
    """The file is read by the package, which is imported only then."""
    backbone, path = Tiny(8), tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"weights\.safetensors needs the package safetensors"):
        load_weights(backbone, path)
    package, module = types.ModuleType("safetensors"), types.ModuleType("safetensors.torch")
    module.load_file = lambda name: {k: torch.full_like(v, 2) for k, v in backbone.state_dict().items()}
    monkeypatch.setitem(sys.modules, "safetensors", package)
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    assert load_weights(backbone, path).complete
    assert (backbone.layer0[0].weight == 2).all()


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_weights(Tiny(8), tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no dictionary of tensors"):
        load_weights(Tiny(8), tmp_path / "list.pth")
    with pytest.raises(TypeError, match="backbone must be one of"):
        load_weights(nn.Conv2d(1, 1, 1), tmp_path / "list.pth")
    with pytest.raises(ValueError, match="depth must be one of 50, 101"):
        ResNet(18)
    with pytest.raises(ValueError, match="width must be"):
        Tiny(12)


def test_frozen_batch_norm():
    """Running statistics stay, in training as well; with the flag off they move."""
    from model_samples import episode, small

    for frozen in (True, False):
        model = small("dpcn", backbone=Normed(), frozen_bn=frozen).train()
        before = model.backbone.norm.running_mean.clone()
        model.loss(*episode())
        assert torch.equal(model.backbone.norm.running_mean, before) == frozen
        assert model.head.training and model.backbone.norm.training != frozen
        assert not model.eval().backbone.norm.training


class Normed(nn.Module):
    """A module of a user's own."""

    channels = (4, 4, 4)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 8, 1), nn.BatchNorm2d(4)

    def forward(self, images):
        x = self.norm(self.conv(images))
        return x, x + 1, x + 2
