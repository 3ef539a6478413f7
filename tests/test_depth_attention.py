"""The operator against fla's reference and a float64 formula, in value and gradient."""

import pytest
import torch
from fla.ops.attnres import naive_attnres

from modeling_attnres import depth_attention


EPS = 1e-6


def inputs(num_sources, dtype=torch.float32, shape=(2, 5, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    key_norm = 1 + 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    # Sources of very different size, as in a trained model
    sources = [10.0**i * torch.randn(shape, generator=generator, dtype=torch.float64) for i in range(num_sources)]
    return [tensor.to(dtype).requires_grad_() for tensor in (query, key_norm, *sources)]


def formula(query, key_norm, *sources, scale):
    """DESIGN §1, written out in float64."""
    query, key_norm, *sources = (tensor.double() for tensor in (query, key_norm, *sources))
    logits = [(query * key_norm * v / (v.pow(2).mean(-1, keepdim=True) + EPS).sqrt()).sum(-1) for v in sources]
    exponentials = [(logit - torch.stack(logits).amax(0)).exp() for logit in logits]
    weights = [e / sum(exponentials) for e in exponentials]
    s = len(sources) if scale == "sum" else 1
    return s * sum(w.unsqueeze(-1) * v for w, v in zip(weights, sources))


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("num_sources", [1, 2, 5])
def test_values_and_gradients_are_those_of_fla(num_sources, scale):
    ours, theirs = inputs(num_sources), inputs(num_sources)
    output = depth_attention(ours[0], ours[1], tuple(ours[2:]), scale, EPS)
    expected = naive_attnres(theirs[0], theirs[2:], theirs[1], rms_eps=EPS)
    if scale == "sum":
        expected = expected * num_sources
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)

    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.backward(direction)
    expected.backward(direction)
    for ours_tensor, theirs_tensor in zip(ours, theirs):
        size = theirs_tensor.grad.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(ours_tensor.grad / size, theirs_tensor.grad / size, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_values_and_gradients_are_those_of_the_float64_formula(scale):
    tensors = inputs(4)
    expected_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = depth_attention(tensors[0], tensors[1], tuple(tensors[2:]), scale, EPS)
    expected = formula(*expected_tensors, scale=scale)
    assert (output - expected).abs().max() < 1e-6 * expected.abs().max()

    output.sum().backward()
    expected.sum().backward()
    for tensor, expected_tensor in zip(tensors, expected_tensors):
        assert (tensor.grad - expected_tensor.grad).abs().max() < 1e-5 * expected_tensor.grad.abs().max()


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_float64_is_kept_and_passes_gradcheck(scale):
    tensors = inputs(3, torch.float64, shape=(2, 6))
    query, key_norm, *sources = tensors
    output = depth_attention(query, key_norm, tuple(sources), scale, EPS)
    torch.testing.assert_close(output, formula(*tensors, scale=scale), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda q, k, *v: depth_attention(q, k, v, scale, EPS), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    tensors = [tensor.detach() for tensor in inputs(4, dtype, seed=3)]
    output = depth_attention(tensors[0], tensors[1], tuple(tensors[2:]), "sum", EPS)
    expected = formula(*tensors, scale="sum")
    assert output.dtype == dtype
    # Half a unit in the last place, and float32's own rounding
    tolerance = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-5 * expected.abs().max()
    assert ((output.double() - expected).abs() <= tolerance).all()


@torch.no_grad()
def test_autocast_changes_nothing():
    query, key_norm, *sources = inputs(5)
    expected = depth_attention(query, key_norm, tuple(sources), "sum", EPS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(depth_attention(query, key_norm, tuple(sources), "sum", EPS), expected)


def test_zero_query_gives_the_plain_sum():
    """What makes a retrofit exact: weights of 1, whatever the number of sources, the norm and its eps."""
    for num_sources in range(1, 200):
        weights = torch.zeros(num_sources).softmax(0) * num_sources
        assert torch.equal(weights, torch.ones(num_sources)) or (weights - 1).abs().max() < 1.2e-7
    _, key_norm, *sources = (tensor.detach() for tensor in inputs(7))
    output = depth_attention(torch.zeros(16), key_norm, tuple(sources), "sum", 1.0)
    torch.testing.assert_close(output, sum(sources), rtol=2e-7, atol=0)


def test_zero_query_gets_its_full_gradient():
    query, key_norm, *sources = inputs(3)
    query = torch.zeros_like(query, requires_grad=True)
    depth_attention(query, key_norm, tuple(sources), "sum", EPS).sum().backward()
    assert query.grad.abs().min() > 0
    # The key norm has none while the query is zero: it only scales the query
    assert key_norm.grad.abs().max() == 0
