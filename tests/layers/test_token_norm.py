"""TokenNorm on a CPU and, with tensors without values, the types that it has on a GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from transkd.layers.token_norm import TokenNorm
from transkd.layers.upsampling import add_upsampled
from transkd.models import FrozenTeacher


class Conversions(TorchDispatchMode):
    """Collects the shapes of all tensors that are converted to another type."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """A CUDA device whose tensors have shapes and types but no values, with autocast on: no GPU is needed."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # autograd asks for the device
            yield torch.device("cuda")
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


def norm_on(device: torch.device) -> TokenNorm:
    norm = TokenNorm(8)
    for name, parameter in list(norm.named_parameters()):
        setattr(norm, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_layer_norm(dtype):
    torch.manual_seed(0)
    norm, plain = TokenNorm(8, eps=1e-6).to(dtype), nn.LayerNorm(8, eps=1e-6).to(dtype)
    nn.init.normal_(norm.weight)
    plain.load_state_dict(norm.state_dict())
    tokens = torch.randn(2, 5, 8, dtype=dtype)
    assert torch.equal(norm(tokens), plain(tokens))


@pytest.mark.parametrize(
    ("autocast", "given", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),  # autocast's own rule
    ],
)
def test_type_of_its_output_on_a_gpu(gpu, autocast, given, expected):
    torch.set_autocast_dtype("cuda", autocast)
    assert norm_on(gpu)(torch.empty(2, 5, 8, dtype=given, device=gpu)).dtype == expected


def test_on_a_gpu_only_its_weights_are_converted(gpu):
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    norm, tokens = norm_on(gpu), torch.empty(2, 5, 8, dtype=torch.bfloat16, device=gpu)
    with Conversions() as found:
        norm(tokens)
    assert found.shapes == [(8,), (8,)]
    with Conversions() as found:
        nn.LayerNorm.forward(norm, tokens)
    assert (2, 5, 8) in found.shapes  # what autocast alone does


def test_under_autocast_on_a_cpu_the_output_has_the_input_s_type():
    with torch.autocast("cpu", torch.bfloat16):
        assert TokenNorm(8)(torch.zeros(2, 5, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_maps_that_are_added_on_a_gpu_keep_their_type(gpu):
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    total, maps = (torch.empty(1, 4, n, n, dtype=torch.bfloat16, device=gpu) for n in (8, 4))
    with Conversions() as found:
        add_upsampled(total, maps)
    assert found.shapes == []


class Stage(nn.Module):
    """A network of one norm."""

    def __init__(self, norm: TokenNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, image: torch.Tensor, needs: object) -> torch.Tensor:
        return self.norm(image)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_on_a_gpu_a_teacher_s_norms_are_converted_once(gpu):
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    teacher = FrozenTeacher(Stage(norm_on(gpu)))
    counts = []
    for _ in range(3):
        with Conversions() as found:
            teacher(torch.empty(2, 5, 8, dtype=torch.bfloat16, device=gpu))
        counts.append(len(found.shapes))
    assert counts == [2, 0, 0]
