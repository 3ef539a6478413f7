"""The implementations of depth attention against fla's reference and a float64 formula, in value and derivatives."""

import shutil

import pytest
import reference
import torch
from fla.ops.attnres import naive_attnres

from modeling_attnres import AttnResConfig, DepthAttention
from modeling_attnres.depth_attention import ATTN_RES_IMPLEMENTATIONS


EPS = 1e-6
both_scales = pytest.mark.parametrize("scale", ["sum", "mean"])
each_implementation = pytest.mark.parametrize("attend", [ATTN_RES_IMPLEMENTATIONS[n] for n in ("eager", "streaming")])


def inputs(num_sources, dtype=torch.float32, shape=(2, 5, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    key_norm = 1 + 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    # Sources of very different size, as in a trained model
    sources = [10.0**i * torch.randn(shape, generator=generator, dtype=torch.float64) for i in range(num_sources)]
    # As in a model: half precision is for the sources, not for the parameters
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    parameters = [tensor.to(parameter_dtype) for tensor in (query, key_norm)]
    return [tensor.requires_grad_() for tensor in (*parameters, *(source.to(dtype) for source in sources))]


def formula(query, key_norm, *sources, scale):
    return reference.depth_attention(query, key_norm, sources, scale, EPS)


def assert_gradients_are_the_formulas(output, tensors, scale, tolerance=1e-5):
    exact_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    ours = torch.autograd.grad(output, tensors, direction)
    exact = torch.autograd.grad(formula(*exact_tensors, scale=scale), exact_tensors, direction.double())
    for gradient, tensor, expected in zip(ours, tensors, exact):
        assert gradient.dtype == tensor.dtype
        rounding = torch.finfo(tensor.dtype).eps / 2 * expected.abs()
        # The gradients of query and key norm are zero if there is a single source, the third tensor
        largest = expected.abs().max().clamp(min=1e-3 if len(tensors) == 3 else 0)
        assert ((gradient.double() - expected).abs() <= rounding + tolerance * largest).all()


@pytest.mark.parametrize("num_sources", [1, 2, 5])
def test_values_and_gradients_of_the_formula_are_those_of_fla(num_sources):
    tensors = inputs(num_sources)
    output = naive_attnres(tensors[0], tensors[2:], tensors[1], rms_eps=EPS)
    torch.testing.assert_close(output.double(), formula(*tensors, scale="mean"), rtol=1e-5, atol=1e-5)
    assert_gradients_are_the_formulas(output, tensors, "mean")


SOURCES = [(1, torch.float32), (2, torch.float32), (5, torch.float32), (4, torch.bfloat16), (4, torch.float16)]


@both_scales
@pytest.mark.parametrize("num_sources, dtype", SOURCES)
@each_implementation
def test_values_and_gradients_are_the_formula_s_rounded_once(num_sources, dtype, scale, attend):
    tensors = inputs(num_sources, dtype)
    output = attend(tensors[0], tensors[1], tuple(tensors[2:]), scale, EPS)
    exact = formula(*tensors, scale=scale)
    assert output.dtype == dtype
    # Half a unit in the last place, and float32's own rounding
    tolerance = torch.finfo(dtype).eps / 2 * exact.abs() + 2e-6 * exact.abs().max()
    assert ((output.double() - exact).abs() <= tolerance).all()
    assert_gradients_are_the_formulas(output, tensors, scale)


@both_scales
@each_implementation
def test_float64_is_kept_and_passes_gradcheck(scale, attend):
    tensors = inputs(3, torch.float64, shape=(2, 6))
    output = attend(tensors[0], tensors[1], tuple(tensors[2:]), scale, EPS)
    torch.testing.assert_close(output, formula(*tensors, scale=scale), rtol=1e-12, atol=1e-12)
    operator = lambda query, key_norm, *sources: attend(query, key_norm, sources, scale, EPS)  # noqa: E731
    assert torch.autograd.gradcheck(operator, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(operator, tensors, check_fwd_over_rev=True, check_rev_over_rev=True)


# Ways to derivatives of a loss of a tuple of tensors that `gradcheck` does not try
def second_derivatives_by_backward_of_some_inputs(loss, tensors):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    gradients = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    sum(gradient.square().sum() for gradient in gradients).backward(inputs=tensors[1:3])
    return [tensor.grad for tensor in tensors[1:3]]


def second_derivatives_by_functional_gradients(loss, tensors):
    all_of_them = tuple(range(len(tensors)))
    gradients = torch.func.grad(loss, all_of_them)
    return torch.func.grad(lambda *tensors: sum(g.square().sum() for g in gradients(*tensors)), all_of_them)(*tensors)


def gradients_of_each_example(loss, tensors):
    query, key_norm, *sources = tensors
    examples = [torch.stack([source, -source]) for source in sources]
    in_dims = (None, None, *(0 for _ in sources))
    return torch.func.vmap(torch.func.grad(loss, tuple(range(len(tensors)))), in_dims)(query, key_norm, *examples)


def gradients_for_each_query(loss, tensors):
    query, *others = tensors
    in_dims = (0, *(None for _ in others))
    return torch.func.vmap(torch.func.grad(loss), in_dims)(torch.stack([query, -query]), *others)


def forward_mode_twice(loss, tensors):
    query, *others = tensors
    first = lambda query: torch.func.jvp(lambda query: loss(query, *others), (query,), (query,))[1]  # noqa: E731
    return torch.func.jvp(first, (query,), (query,))[1]


def as_tuple(tensors):
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)


WAYS = [
    second_derivatives_by_backward_of_some_inputs,
    second_derivatives_by_functional_gradients,
    gradients_of_each_example,
    gradients_for_each_query,
    forward_mode_twice,
]


@pytest.mark.parametrize("tokens", [2, 2800], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("derivatives", WAYS)
def test_derivatives_of_every_order_and_mode_are_right_at_every_size(derivatives, tokens):
    tensors = [tensor.detach() for tensor in inputs(3, torch.float64, shape=(tokens, 64))]
    module = DepthAttention(AttnResConfig(hidden_size=64)).double()

    def loss(query, key_norm, *sources):
        parameters = {"query": query, "key_norm": key_norm}
        return torch.func.functional_call(module, parameters, sources).square().mean()

    ours = derivatives(loss, tensors)
    expected = derivatives(lambda *tensors: formula(*tensors, scale="sum").square().mean(), tensors)
    for result, exact in zip(as_tuple(ours), as_tuple(expected), strict=True):
        assert (result - exact).abs().max() <= 1e-9 * exact.abs().max()


@each_implementation
def test_autocast_changes_nothing(attend):
    def value_and_gradients():
        query, key_norm, *sources = tensors = inputs(5)
        output = attend(query, key_norm, tuple(sources), "sum", EPS)
        output.square().sum().backward()
        return output, *(tensor.grad for tensor in tensors)

    expected = value_and_gradients()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(value_and_gradients(), expected))


@each_implementation
def test_zero_query_gives_the_plain_sum(attend):
    """A retrofit is exact because the weights are 1, for any norm and any eps."""
    _, key_norm, *sources = (tensor.detach() for tensor in inputs(7))
    output = attend(torch.zeros(16), key_norm, tuple(sources), "sum", 1.0)
    torch.testing.assert_close(output, sum(sources), rtol=2e-7, atol=0)


@both_scales
@pytest.mark.parametrize("tokens", [1, 1400], ids=["few tokens", "many tokens"])
def test_the_module_computes_the_formula_at_its_temperature(tokens, scale):
    query, key_norm, *sources = inputs(3, torch.bfloat16, shape=(2, tokens, 64))
    module = DepthAttention(AttnResConfig(hidden_size=64, attn_res_scale=scale, attn_res_temperature=3.0))
    module.load_state_dict({"query": query, "key_norm": key_norm})
    expected = formula(query / 3, key_norm, *sources, scale=scale)
    tolerance = 2e-6 * expected.abs().max().item()
    torch.testing.assert_close(module(*sources).double(), expected, rtol=2**-8, atol=tolerance)
    weights = module.attention_weights(*sources)
    assert weights.shape == (2, tokens, 3) and weights.dtype == torch.float32
    of_weights = torch.einsum("bts,sbth->bth", weights.double(), torch.stack(sources).double())
    s = 3 if scale == "sum" else 1
    torch.testing.assert_close(s * of_weights, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@each_implementation
def test_compiles_for_any_number_of_tokens(attend, gradients):
    """As vLLM compiles, once for all: without gradients, the number of tokens a symbol. And a training step."""
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        query, key_norm, *sources = tensors = inputs(3, torch.bfloat16, shape=(1, length, 16))
        with gradients(), torch.autocast("cpu", torch.bfloat16):
            output = compiled(query, key_norm, tuple(sources), "sum", EPS)
        expected = formula(*tensors, scale="sum")
        torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=2e-6 * expected.abs().max().item())
        if output.requires_grad:
            assert_gradients_are_the_formulas(output, tensors, "sum")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles by a C++ compiler")
def test_compiled_computes_the_formula(monkeypatch):
    """For more numbers of sources than torch compiles by itself, and for another number of tokens."""
    module = DepthAttention(AttnResConfig(hidden_size=64, attn_res_implementation="compiled"))
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    for count, tokens in [*((count, 8) for count in range(2, 11)), (3, 9)]:
        query, key_norm, *sources = tensors = inputs(count, shape=(2, tokens, 64))
        module.query, module.key_norm = torch.nn.Parameter(query.detach()), torch.nn.Parameter(key_norm.detach())
        output, expected = module(*sources), formula(*tensors, scale="sum")
        assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
        assert_gradients_are_the_formulas(output, [module.query, module.key_norm, *sources], "sum", tolerance=1e-4)
