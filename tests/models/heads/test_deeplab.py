import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from transkd.errors import UserError
from transkd.models import DeepLabV3PlusHead, create_segmenter

CHANNELS = (8, 16, 24, 32)
RATES = (6, 12, 18)


def drawn(head, shallow, deep, rates):
    """DeepLabV3+'s figure 2 in plain functions on the head's tensors, BatchNorm by its running statistics."""
    values = head.state_dict()

    def layer(name, x, batch_norm=None, dilation=1):
        weight = values[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        x = F.conv2d(x, weight, padding=padding, dilation=dilation)
        name = batch_norm or name.removesuffix("0") + "1"
        mean, var, scale, shift = (
            values[f"{name}.{kind}"][:, None, None] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).relu()

    def upsample(x, size):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    parts = [layer("aspp.convs.0.0", deep)]
    parts += [layer(f"aspp.convs.{i}.0", deep, dilation=rate) for i, rate in enumerate(rates, start=1)]
    last = len(rates) + 1
    pooled = layer(f"aspp.convs.{last}.1", deep.mean((2, 3), keepdim=True), f"aspp.convs.{last}.2")
    parts.append(pooled.expand(-1, -1, *deep.shape[-2:]))
    context = upsample(layer("aspp.project.0", torch.cat(parts, dim=1)), shallow.shape[-2:])
    x = torch.cat([layer("reduce.0", shallow), context], dim=1)
    x = layer("decode.1.0", layer("decode.0.0", x))
    return F.conv2d(x, values["classifier.weight"], values["classifier.bias"])


def make(channels=CHANNELS, width=12, num_classes=5, **kwargs):
    torch.manual_seed(0)
    head = DeepLabV3PlusHead(channels, width, num_classes, **kwargs).double().eval()
    for name, tensor in head.state_dict().items():  # nothing stays 0 or 1
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.3)
    return head


def make_features(size, strides=(4, 8, 16, 16), batch=2):
    generator = torch.Generator().manual_seed(1)
    grids = [[-(-side // stride) for side in size] for stride in strides]
    return [torch.randn(batch, c, *grid, generator=generator).double() for c, grid in zip(CHANNELS, grids, strict=True)]


@pytest.mark.parametrize("rates", [RATES, (1, 2, 3), (2,)], ids=str)
@pytest.mark.parametrize("size", [(320, 400), (77, 50)], ids=str)
def test_is_the_drawing(size, rates):
    # at 320×400 pixels the deepest map has 20×25, wider than the widest rate
    head, features = make(rates=rates), make_features(size)
    logits, expected = head(features), drawn(head, features[0], features[-1], rates)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert logits.shape == (2, 5, *features[0].shape[-2:])
    assert logits.std() > 1e-3


def test_the_rates_are_the_papers():
    head, features = make(), make_features((320, 400))
    assert torch.equal(head(features), make(rates=RATES)(features))
    assert [c.dilation for c in head.aspp.modules() if isinstance(c, nn.Conv2d) and c.kernel_size == (3, 3)] == [
        (rate, rate) for rate in RATES
    ]


def test_the_stages_between_are_not_read():
    head, features = make(), make_features((64, 96))
    assert torch.equal(head(features), head([features[0], features[-1]]))


def test_aspp_is_torchvisions():
    head, features = make(), make_features((320, 400))
    theirs = ASPP(32, RATES, 12).double().eval()
    theirs.load_state_dict(head.aspp.state_dict(), strict=True)
    seen = []
    head.aspp.register_forward_hook(lambda *args: seen.append(args[-1]))
    head(features)
    assert torch.equal(seen[0], theirs(features[-1]))


def test_training_reaches_every_parameter_and_every_statistic():
    head, features = make().train(), make_features((64, 96))
    before = {name: tensor.clone() for name, tensor in head.named_buffers()}
    head(features).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.any(), name
    for name, buffer in head.named_buffers():
        assert not torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("size", [(64, 96), (16, 16)], ids=str)
def test_one_image_alone_is_refused_in_training(size):
    head, features = make(), make_features(size, batch=1)
    together = [feature.repeat(2, 1, 1, 1) for feature in features]
    torch.testing.assert_close(head(features), head(together)[:1], rtol=1e-9, atol=1e-9)
    head.train()
    with pytest.raises(UserError, match=r"cannot train on a batch of one image.*use two or more"):
        head(features)
    assert head(together).isfinite().all()


@pytest.mark.parametrize("output_stride", [16, 32])
def test_on_a_resnet(output_stride):
    network = create_segmenter("resnet18", 5, head="deeplabv3plus", width=8, encoder={"output_stride": output_stride})
    output = network(torch.zeros(2, 3, 77, 50))
    assert output.logits.shape == (2, 5, 20, 13)
    deepest = (77 + output_stride - 1) // output_stride, (50 + output_stride - 1) // output_stride
    assert output.features[-1].shape == (2, 512, *deepest)


def test_size():
    with torch.device("meta"):
        head = DeepLabV3PlusHead((256, 512, 1024, 2048), 256, 19)
    aspp = 2048 * 256 + 3 * 2048 * 256 * 9 + 2048 * 256 + 5 * 256 * 256
    decoder = 256 * 48 + (48 + 256) * 256 * 9 + 256 * 256 * 9
    norms = 2 * (5 * 256 + 256 + 48 + 256 + 256)
    classifier = 256 * 19 + 19
    assert sum(p.numel() for p in head.parameters()) == aspp + decoder + norms + classifier
