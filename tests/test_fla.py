"""flash-linear-attention's kernel: on a GPU, or else in Triton's interpreter, which runs its source on a CPU."""

import pytest
import torch
from helpers import attnres_of, both_types, run_python, tiny_base, trained
from interpreter import on_cuda
from test_depth_attention import EPS, assert_gradients_are_the_formulas, both_scales, formula, inputs

from modeling_attnres.depth_attention import fla_depth_attention


@pytest.fixture
def device():
    if torch.cuda.is_available():
        yield "cuda"
    else:
        with on_cuda():
            yield "cpu"


@both_scales
@pytest.mark.parametrize("num_sources, dtype", [(1, torch.float32), (9, torch.float32), (5, torch.bfloat16)])
def test_values_and_gradients_are_the_formula_s(num_sources, dtype, scale, device):
    tensors = [tensor.detach().to(device).requires_grad_() for tensor in inputs(num_sources, dtype)]
    output = fla_depth_attention(tensors[0], tensors[1], tuple(tensors[2:]), scale, EPS)
    expected = formula(*tensors, scale=scale)
    assert output.dtype == dtype
    assert (output - expected).abs().max() < max(1e-5, torch.finfo(dtype).eps) * expected.abs().max()
    assert_gradients_are_the_formulas(output, tensors, scale, tolerance=max(1e-4, torch.finfo(dtype).eps))


def test_second_derivatives_are_refused(device):
    query, key_norm, *sources = (tensor.detach().to(device).requires_grad_() for tensor in inputs(3))
    output = fla_depth_attention(query, key_norm, tuple(sources), "sum", EPS)
    with pytest.raises(NotImplementedError, match="'fla'.*choose 'streaming'"):
        torch.autograd.grad(output.square().sum(), query, create_graph=True)


@both_types
def test_a_model_takes_the_kernel_by_itself(attn_res, device):
    """Logits and gradients are those of the formula's implementation, and at zero queries the logits of the base."""
    base, input_ids = tiny_base("llama").to(device), torch.arange(1, 7, device=device).view(2, 3)
    expected = base(input_ids).logits
    torch.testing.assert_close(attnres_of(base, **attn_res)(input_ids).logits, expected, rtol=0, atol=1e-5)
    logits, gradients = [], []
    for implementation in ("auto", "eager"):
        model = trained(base, **attn_res, attn_res_implementation=implementation)
        output = model(input_ids, labels=input_ids)
        output.loss.backward()
        logits.append(output.logits)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert (logits[0] - expected).abs().max() > 0.1


def test_a_cpu_is_refused_with_what_to_do():
    query, key_norm, *sources = inputs(2)
    with pytest.raises(ValueError, match="`attn_res_implementation` is 'fla'.*torch.float32 on cpu: choose 'auto'"):
        fla_depth_attention(query, key_norm, tuple(sources), "sum", EPS)


WITHOUT_FLA = """
import sys
sys.modules["fla.ops.attnres"] = None  # as in an fla older than 0.6
import torch
from modeling_attnres.depth_attention import fla_depth_attention
fla_depth_attention(torch.zeros(8), torch.ones(8), [torch.ones(2, 8)], "sum", 1e-6)
"""


def test_the_missing_package_is_named():
    message = "ImportError: `attn_res_implementation` is 'fla'.*pip install -U flash-linear-attention"
    with pytest.raises(AssertionError, match=message):
        run_python(WITHOUT_FLA)
