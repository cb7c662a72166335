import copy

import golden
import pytest
import torch
from timm.layers.drop import DropPath
from torch import nn

from transkd.errors import UserError
from transkd.models import (
    MixTransformer,
    SegformerHead,
    Segmenter,
    Tapped,
    create_segmenter,
    load_segmenter,
    save_segmenter,
    start_from_teacher,
)
from transkd.models.lora import LoRALinear, add_lora, fold_lora, merge_lora

WIDTHS = (8, 16, 24, 32)
IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
MIT = ["attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def mit(depths=(1, 2, 1, 1), drop_path_rate=0.1):
    torch.manual_seed(0)
    encoder = MixTransformer(WIDTHS, depths, (1, 2, 3, 4), drop_path_rate=drop_path_rate, num_classes=0)
    return Segmenter(encoder, SegformerHead(WIDTHS, 12, 5), 5)


def randomise(network):
    """Low-rank terms that are no longer 0."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, LoRALinear):
            module.lora_b.data = torch.randn(module.lora_b.shape, generator=generator, dtype=module.lora_b.dtype) / 4


def trained(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def golden_layer(name, parts):
    weight, bias = (golden.load("wecolora", f"frozen.{name}.{part}")[""] for part in ("weight", "bias"))
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    linear.weight.data, linear.bias.data = weight, bias
    layer = LoRALinear(linear, rank=3, parts=len(parts))
    factors = {
        letter: torch.stack([golden.load("wecolora", f"param.{part}.{letter}")[""] for part in parts])
        for letter in "AB"
    }
    layer.lora_a.data, layer.lora_b.data = factors["A"], factors["B"]
    return layer


@pytest.mark.parametrize(("name", "parts"), [("fc", ["fc"]), ("qkv", ["q", "k", "v"])])
def test_golden(name, parts):
    layer, x = golden_layer(name, parts), golden.load("wecolora", "x")[""].requires_grad_()
    out = layer(x)
    torch.testing.assert_close(out, golden.load("wecolora", f"expected.out.{name}")[""], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.merge()(x), out, rtol=1e-9, atol=1e-12)
    value = (out - golden.load("wecolora", f"target_{name}")[""]).abs().mean()
    torch.testing.assert_close(value, golden.load("wecolora", f"expected.loss.mae_{name}")[""], rtol=1e-9, atol=0)
    value.backward()
    for i, part in enumerate(parts):
        for letter, factor in (("A", layer.lora_a), ("B", layer.lora_b)):
            expected = golden.load("wecolora", f"expected.grad.mae_{name}.param.{part}.{letter}")[""]
            torch.testing.assert_close(factor.grad[i], expected, rtol=1e-8, atol=1e-12)
    expected = golden.load("wecolora", f"expected.grad.mae_{name}.x")[""]
    torch.testing.assert_close(x.grad, expected, rtol=1e-8, atol=1e-12)
    assert layer.weight.grad is None
    assert layer.bias.grad is None


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_starts_as_it_was(bias):
    linear, x = nn.Linear(16, 12, bias=bias), torch.randn(2, 5, 16)
    expected = linear(x)
    layer = LoRALinear(linear, rank=64, parts=2)
    assert torch.equal(layer(x), expected)
    assert layer.lora_a.abs().max() <= 1 / 4  # 1/√16
    assert layer.lora_a.std().item() == pytest.approx(1 / 4 / 3**0.5, rel=0.1)  # of a uniform distribution
    layer(x).square().sum().backward()
    assert not layer.lora_a.grad.any()
    assert layer.lora_b.grad.abs().sum() > 0
    assert (layer.merge().bias is None) == (not bias)


def test_other_dimensions_and_types():
    layer = LoRALinear(nn.Linear(8, 6), rank=2, parts=3)
    assert layer(torch.rand(8)).shape == (6,)
    assert layer(torch.rand(0, 4, 8)).shape == (0, 4, 6)
    assert layer.double()(torch.rand(3, 8, dtype=torch.float64)).dtype == torch.float64
    assert LoRALinear(nn.Linear(8, 6).bfloat16(), rank=2).merge().weight.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(torch.rand(3, 8)).dtype == torch.bfloat16


def test_layers_of_mit():
    network = mit()
    with torch.no_grad():
        expected = network.eval()(IMAGE)
    add_lora(network, rank=3)
    blocks = ["block1.0", "block2.0", "block2.1", "block3.0", "block4.0"]
    adapted = {name: m for name, m in network.named_modules() if isinstance(m, LoRALinear)}
    assert set(adapted) == {f"encoder.{block}.{layer}" for block in blocks for layer in MIT}
    assert trained(network) == {f"{name}.lora_{factor}" for name in adapted for factor in "ab"}
    assert adapted["encoder.block2.1.attn.kv"].lora_b.shape == (2, 16, 3)
    assert adapted["encoder.block2.1.mlp.fc1"].lora_b.shape == (1, 64, 3)
    with torch.no_grad():
        got = network.eval()(IMAGE)
    assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "vit"])
def test_other_transformers(name):
    if name == "vit":
        network = nn.Module()
        network.encoder = nn.Module()
        network.encoder.attn = nn.Module()
        network.encoder.attn.qkv = nn.Linear(8, 24)
        layers = {"encoder.attn.qkv": 3}
    else:
        network = create_segmenter(name, num_classes=5)
        stages = [f"encoder.body.stages_{i}.blocks.{j}" for i in range(4) for j in range(2)]
        layers = {f"{block}.{layer}": 1 + (layer == "attn.kv") for block in stages for layer in MIT}
    add_lora(network, rank=2)
    adapted = {n: len(m.lora_a) for n, m in network.named_modules() if isinstance(m, LoRALinear)}
    assert adapted == layers


def test_merging_gives_the_plain_network(tmp_path):
    network = mit()
    plain = copy.deepcopy(network).state_dict()
    add_lora(network, rank=3)
    randomise(network)
    with torch.no_grad():
        expected = network.eval()(IMAGE)
    going_on = network
    network = copy.deepcopy(network)
    merge_lora(network)
    assert list(network.state_dict()) == list(plain)
    assert {name: t.shape for name, t in network.state_dict().items()} == {name: t.shape for name, t in plain.items()}
    assert not any(isinstance(module, LoRALinear) for module in network.modules())
    assert trained(network) == {name for name, _ in network.named_parameters()}
    assert not network.encoder.block1[0].attn.q.training
    with torch.no_grad():
        for got, wanted in zip(network(IMAGE).features, expected.features, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"{name}.weight" for name, m in going_on.named_modules() if isinstance(m, LoRALinear)}
    with torch.no_grad():
        assert torch.equal(going_on(IMAGE).logits, expected.logits)
    mit().load_state_dict(network.state_dict(), strict=True)


def test_a_merged_network_is_saved_and_loaded(tmp_path):
    network = create_segmenter("segformer_b0", num_classes=5)
    add_lora(network, rank=2)
    randomise(network)
    merge_lora(network)
    save_segmenter(network, tmp_path / "student.safetensors")
    loaded, _ = load_segmenter(tmp_path / "student.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in network.state_dict().items())


def test_tensors_are_folded_as_modules_are_merged():
    """Bit for bit, without touching what was given; a plain network's tensors stay."""
    network = mit()
    add_lora(network, rank=3)
    randomise(network)
    tensors = network.state_dict()
    folded = fold_lora(tensors)
    assert len(tensors) == len(network.state_dict())
    merge_lora(network)
    assert list(folded) == list(network.state_dict())
    assert all(torch.equal(folded[name], tensor) for name, tensor in network.state_dict().items())
    assert all(fold_lora(folded)[name] is tensor for name, tensor in folded.items())


def test_a_file_with_the_terms_loads_as_the_merged_network(tmp_path):
    network = create_segmenter("segformer_b0", num_classes=5)
    add_lora(network, rank=2)
    randomise(network)
    save_segmenter(network, tmp_path / "adapted.safetensors")
    loaded, _ = load_segmenter(tmp_path / "adapted.safetensors")
    merge_lora(network)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in network.state_dict().items())


def test_merging_a_plain_network_changes_nothing():
    network = mit()
    network.head.requires_grad_(False)
    before = trained(network)
    merge_lora(network)
    assert trained(network) == before


def test_only_the_terms_are_trained():
    teacher, network = mit((2, 2, 2, 2)), mit().double()
    start_from_teacher(network, teacher)
    add_lora(network, rank=2)
    before = copy.deepcopy(network.state_dict())
    optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        network(IMAGE.double()).features[3].sin().sum().backward()
        optimiser.step()
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    assert changed - statistics == trained(network)


def test_what_is_trained_beside_them():
    network = mit()
    add_lora(network, rank=2, train=("head",))
    others = {name for name in trained(network) if "lora" not in name}
    assert others == {f"head.{name}" for name, _ in network.head.named_parameters()}


def test_stochastic_depth_is_off_unless_asked():
    for keep in (False, True):
        network = mit(drop_path_rate=0.4)
        add_lora(network, rank=2, keep_drop_path=keep)
        rates = [module.drop_prob for module in network.modules() if isinstance(module, DropPath)]
        assert (max(rates) > 0) == keep
        assert len(rates) == 5


def test_plain_weights_load_beside_the_terms():
    network, other = mit(), mit()
    for parameter in other.parameters():
        parameter.data = parameter.data + 0.01
    add_lora(network, rank=2)
    missing, unexpected = network.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected
    assert all("lora_" in name for name in missing)
    with torch.no_grad():
        assert torch.equal(network.eval()(IMAGE).logits, other.eval()(IMAGE).logits)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("segformer_b0", {"rank": 0}, "rank of a low-rank term must be 1 or more; got 0"),
        ("segformer_b0", {"rank": 2, "train": ("decoder",)}, "no module 'decoder' in the network"),
        ("resnet18", {"rank": 2}, r"TimmEncoder has no linear layers .* choose a transformer"),
    ],
)
def test_what_cannot_be_adapted_stays_as_it_is(name, settings, message):
    network = create_segmenter(name, num_classes=5)
    names = list(network.state_dict())
    with pytest.raises(UserError, match=message) as caught:
        add_lora(network, **settings)
    assert "\n" not in str(caught.value)
    assert list(network.state_dict()) == names
    assert trained(network) == {name for name, _ in network.named_parameters()}


def test_a_network_without_an_encoder():
    with pytest.raises(UserError, match=r"Tapped has no linear layers .* in an encoder"):
        add_lora(Tapped(nn.Conv2d(3, 5, 1)), rank=2)


def test_terms_are_not_added_twice():
    network = mit()
    add_lora(network, rank=2)
    with pytest.raises(UserError, match="has low-rank terms already"):
        add_lora(network, rank=2)
    with pytest.raises(UserError, match="6 outputs does not hold 4 matrices"):
        LoRALinear(nn.Linear(4, 6), rank=2, parts=4)
