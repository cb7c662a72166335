"""Compiled runs are the eager runs, whatever the training step contains; traced by PyTorch, no code is generated."""

from collections import Counter

import pytest
import torch
from runs import composed, results, run_until_killed, student
from torch import nn

from transkd.run import run
from transkd.training import device

SHORT = [
    "pictures=0",
    "trainer.precision=32-true",
    "distill=transkd_cwd",
    "term=[pea,cwd]",
    "trainer.limit_train_batches=2",
]
SHORT += ["+student.network.encoder.depths=[2,1,1,1]", "+teacher.network.encoder.depths=[1,1,1,1]"]
SHORT += ["student.network.encoder.drop_path_rate=0"]
ENDS = "+criterion.terms.pea.schedule={_target_:transkd.losses.Schedule,end:1,unit:epoch}"
CASES = {
    "regions and accumulation": ["compile_regions=true", "trainer.accumulate_grad_batches=2"],
    "automatic weight and schedule": ['criterion.terms.cwd.weight="auto(0.3)"', "gradients_every=2", ENDS],
    "LoRA": ["distill=wecolora", "term=[wecolora]", "++teacher.network.encoder.depths=[2,1,1,1]"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def compiled(monkeypatch):
    """Trace and differentiate as torch.compile does, generate no code; count what is compiled by class."""
    plain, parts = nn.Module.compile, Counter()

    def trace(module, mode, dynamic):
        parts[type(module).__name__] += 1
        plain(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", trace)
    monkeypatch.setattr(device, "check_compiler", lambda *given: None)
    yield parts
    torch.compiler.reset()


def assert_equal(root, one, other):
    eager, traced = student(root, one), student(root, other)
    assert eager.keys() == traced.keys()
    # Adam's first steps move a weight by the rate whatever its gradient's size: rounding turns a few around
    far = [((traced[name] - tensor).abs() > 1e-3 + 1e-2 * tensor.abs()).flatten() for name, tensor in eager.items()]
    assert torch.cat(far).double().mean() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_run_is_the_eager_run(root, compiled, case):
    run(composed(root, f"eager {case}", *SHORT, *CASES[case], "compile=false"))
    assert not compiled
    run(composed(root, f"compiled {case}", *SHORT, *CASES[case], "compile=true"))
    assert compiled["Block" if "regions" in case else "Segmenter"] > 1
    assert_equal(root, f"eager {case}", f"compiled {case}")
    terms = [results(root, f"{way} {case}")["terms"] for way in ("eager", "compiled")]
    assert terms[1] == pytest.approx(terms[0], rel=1e-2)


@pytest.mark.slow
def test_a_compiled_run_resumes_and_is_the_eager_run(root, compiled, monkeypatch):
    run(composed(root, "undisturbed", *SHORT, "name=resumes", "compile=false"))
    run_until_killed(composed(root, "killed", *SHORT, "name=resumes", "compile=true"), 1, monkeypatch)
    last = root / "killed/checkpoints/last.ckpt"
    run(composed(root, "resumed", *SHORT, "name=resumes", "compile=true", f"ckpt_path={last}"))
    assert_equal(root, "undisturbed", "resumed")
