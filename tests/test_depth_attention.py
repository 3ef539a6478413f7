"""The operators against fla's reference and a float64 formula, in value and gradient."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import fla.ops.attnres
import pytest
import torch
from fla.ops.attnres import naive_attnres
from torch.autograd.graph import saved_tensors_hooks

from modeling_attnres import AttnResConfig, DepthAttention
from modeling_attnres.depth_attention import choose_implementation, depth_attention
from modeling_attnres.fused_depth_attention import fused_depth_attention, fused_kernel
from modeling_attnres.streaming_depth_attention import streaming_depth_attention


EPS = 1e-6
each_operator = pytest.mark.parametrize("attend", [depth_attention, streaming_depth_attention])


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
@each_operator
def test_values_and_gradients_are_those_of_fla(num_sources, scale, attend):
    ours, theirs = inputs(num_sources), inputs(num_sources)
    output = attend(ours[0], ours[1], tuple(ours[2:]), scale, EPS)
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
@each_operator
def test_values_and_gradients_are_those_of_the_float64_formula(scale, attend):
    tensors = inputs(4)
    expected_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = attend(tensors[0], tensors[1], tuple(tensors[2:]), scale, EPS)
    expected = formula(*expected_tensors, scale=scale)
    assert (output - expected).abs().max() < 2e-6 * expected.abs().max()

    output.sum().backward()
    expected.sum().backward()
    for tensor, expected_tensor in zip(tensors, expected_tensors):
        assert (tensor.grad - expected_tensor.grad).abs().max() < 1e-5 * expected_tensor.grad.abs().max()


@pytest.mark.parametrize("scale", ["sum", "mean"])
@each_operator
def test_float64_is_kept_and_passes_gradcheck(scale, attend):
    tensors = inputs(3, torch.float64, shape=(2, 6))
    query, key_norm, *sources = tensors
    output = attend(query, key_norm, tuple(sources), scale, EPS)
    torch.testing.assert_close(output, formula(*tensors, scale=scale), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda q, k, *v: attend(q, k, v, scale, EPS), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_operator
def test_half_precision_is_rounded_once_at_the_end(dtype, attend):
    tensors = [tensor.detach() for tensor in inputs(4, dtype, seed=3)]
    output = attend(tensors[0], tensors[1], tuple(tensors[2:]), "sum", EPS)
    expected = formula(*tensors, scale="sum")
    assert output.dtype == dtype
    # Half a unit in the last place, and float32's own rounding
    tolerance = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-5 * expected.abs().max()
    assert ((output.double() - expected).abs() <= tolerance).all()


@each_operator
def test_autocast_changes_nothing(attend):
    def value_and_gradients():
        query, key_norm, *sources = tensors = inputs(5)
        output = attend(query, key_norm, tuple(sources), "sum", EPS)
        output.square().sum().backward()
        return output, *(tensor.grad for tensor in tensors)

    expected = value_and_gradients()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(value_and_gradients(), expected))


@each_operator
def test_zero_query_gives_the_plain_sum(attend):
    """What makes a retrofit exact: weights of 1, whatever the number of sources, the norm and its eps."""
    for num_sources in range(1, 200):
        weights = torch.zeros(num_sources).softmax(0) * num_sources
        assert torch.equal(weights, torch.ones(num_sources)) or (weights - 1).abs().max() < 1.2e-7
    _, key_norm, *sources = (tensor.detach() for tensor in inputs(7))
    output = attend(torch.zeros(16), key_norm, tuple(sources), "sum", 1.0)
    torch.testing.assert_close(output, sum(sources), rtol=2e-7, atol=0)


@each_operator
def test_zero_query_gets_its_full_gradient(attend):
    query, key_norm, *sources = inputs(3)
    query = torch.zeros_like(query, requires_grad=True)
    attend(query, key_norm, tuple(sources), "sum", EPS).sum().backward()
    assert query.grad.abs().min() > 0
    # The key norm has none while the query is zero: it only scales the query
    assert key_norm.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_are_rounded_once_at_the_end(dtype):
    tensors = inputs(4, dtype, seed=3)
    exact_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    streaming_depth_attention(tensors[0], tensors[1], tuple(tensors[2:]), "sum", EPS).backward(
        torch.ones(2, 5, 16, dtype=dtype)
    )
    formula(*exact_tensors, scale="sum").sum().backward()
    for tensor, exact in zip(tensors, exact_tensors):
        assert tensor.grad.dtype == dtype
        tolerance = torch.finfo(dtype).eps / 2 * exact.grad.abs() + 1e-4 * exact.grad.abs().max()
        assert ((tensor.grad.double() - exact.grad).abs() <= tolerance).all()


def test_streaming_keeps_no_copy_of_the_sources():
    query, key_norm, *sources = inputs(6, shape=(4, 32, 64))
    kept = {}
    with saved_tensors_hooks(lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor):
        streaming_depth_attention(query, key_norm, tuple(sources), "sum", EPS)
    own = {tensor.data_ptr() for tensor in (query, key_norm, *sources)}
    # Two numbers for each token and source
    assert sum(tensor.numel() for pointer, tensor in kept.items() if pointer not in own) == 2 * 6 * 4 * 32


def test_streaming_is_differentiable_once():
    query, key_norm, *sources = inputs(3)
    output = streaming_depth_attention(query, key_norm, tuple(sources), "sum", EPS)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def formula_as_operator(query, key_norm, sources, scale, eps):
    return formula(query, key_norm, *sources, scale=scale)


def test_streaming_takes_functional_gradients():
    tensors = [tensor.detach() for tensor in inputs(3)]

    def loss(attend, *tensors):
        return attend(tensors[0], tensors[1], tensors[2:], "mean", EPS).square().sum()

    ours = torch.func.grad(loss, argnums=1)(streaming_depth_attention, *tensors)
    expected = torch.func.grad(loss, argnums=1)(formula_as_operator, *tensors)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 700, 64)], ids=["few tokens", "many tokens"])
def test_the_module_computes_the_formula_for_few_and_for_many_tokens(shape, scale):
    query, key_norm, *sources = inputs(3, shape=shape)
    module = DepthAttention(AttnResConfig(hidden_size=64, attn_res_scale=scale))
    module.load_state_dict({"query": query, "key_norm": key_norm})
    expected = formula(query, key_norm, *sources, scale=scale)
    output = module(*sources)
    assert (output - expected).abs().max() < 2e-6 * expected.abs().max()
    # A prefill and a training step go from source to source, a decoding step makes the fewest calls
    assert ("StreamingDepthAttention" in str(output.grad_fn.next_functions)) == (shape[1] == 700)


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@each_operator
def test_compiles_for_any_number_of_tokens(attend, gradients):
    """As vLLM compiles, once for all: without gradients, the number of tokens a symbol."""
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        query, key_norm, *sources = inputs(3, shape=(1, length, 16))
        with gradients():
            output = compiled(query, key_norm, tuple(sources), "sum", EPS)
        expected = formula(query, key_norm, *sources, scale="sum")
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.fixture
def fla_is_imported_anew():
    fused_kernel.cache_clear()
    yield
    fused_kernel.cache_clear()


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_fused_asks_fla_for_the_same(scale, fla_is_imported_anew, monkeypatch):
    """The kernel runs on CUDA only; fla's own reference takes the same arguments and stands in for it."""
    monkeypatch.setattr(fla.ops.attnres, "fused_attnres", naive_attnres)
    query, key_norm, *sources = inputs(3)
    output = fused_depth_attention(query, key_norm, tuple(sources), scale, EPS)
    torch.testing.assert_close(
        output, formula(query, key_norm, *sources, scale=scale), rtol=1e-5, atol=1e-5, check_dtype=False
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fla's kernel runs on a CUDA device")
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_fused_on_cuda(scale):
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in inputs(5, shape=(2, 50, 64))]
    expected_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    module = DepthAttention(AttnResConfig(hidden_size=64, attn_res_scale=scale, attn_res_implementation="fused")).cuda()
    module.query, module.key_norm = (torch.nn.Parameter(tensor) for tensor in tensors[:2])
    output, expected = module(*tensors[2:]), formula(*expected_tensors, scale=scale)
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
    output.sum().backward()
    expected.sum().backward()
    for tensor, expected_tensor in zip((module.query, module.key_norm, *tensors[2:]), expected_tensors):
        assert (tensor.grad - expected_tensor.grad).abs().max() < 1e-4 * expected_tensor.grad.abs().max()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles by a C++ compiler")
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_fused_on_a_cpu(scale, monkeypatch):
    """By torch's compiler; for more numbers of sources than it takes by itself, and for another number of tokens."""
    monkeypatch.setattr(sys.modules[DepthAttention.__module__], "STREAMING_SIZE", 0)
    module = DepthAttention(AttnResConfig(hidden_size=64, attn_res_scale=scale, attn_res_implementation="fused"))
    counts = [*((count, 8) for count in range(2, 11)), (3, 9)]
    torch._dynamo.reset()
    for count, tokens in counts:
        tensors = inputs(count, shape=(2, tokens, 64))
        expected_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
        module.query, module.key_norm = (torch.nn.Parameter(tensor.detach()) for tensor in tensors[:2])
        output, expected = module(*tensors[2:]), formula(*expected_tensors, scale=scale)
        assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
        output.sum().backward()
        expected.sum().backward()
        for tensor, expected_tensor in zip((module.query, module.key_norm, *tensors[2:]), expected_tensors):
            assert (tensor.grad - expected_tensor.grad).abs().max() < 1e-4 * expected_tensor.grad.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= len(counts), "each of them is compiled"
    half = [tensor.detach() for tensor in inputs(4, torch.bfloat16, shape=(2, 8, 64))[2:]]
    expected = formula(module.query.detach(), module.key_norm.detach(), *half, scale=scale)
    torch.testing.assert_close(module(*half), expected.bfloat16(), rtol=2**-7, atol=1e-5)


def test_fused_on_a_cpu_without_a_compiler_says_what_is_missing(tmp_path):
    code = """
import torch
from modeling_attnres.fused_depth_attention import compiled_depth_attention
compiled_depth_attention(torch.zeros(8), torch.ones(8), [torch.ones(2, 8), torch.ones(2, 8)], "sum", 1e-6)
"""
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    message = process.stderr.splitlines()[-1]
    assert message.startswith("ImportError: `attn_res_implementation` is 'fused'") and "choose 'eager'" in message


def test_fused_without_fla_says_what_is_missing(fla_is_imported_anew, monkeypatch):
    query, key_norm, *sources = inputs(2)
    monkeypatch.setitem(sys.modules, "fla.ops.attnres", None)  # as in an fla older than 0.6
    with pytest.raises(
        ImportError, match="`attn_res_implementation` is 'fused'.*pip install -U flash-linear-attention"
    ):
        fused_depth_attention(query, key_norm, tuple(sources), "sum", EPS)
    on_cuda = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, numel=lambda: 64)
    assert choose_implementation("auto", on_cuda) is depth_attention
