"""Layers of every kind beside their equations: outputs, gradients, dtypes, first weights."""

import copy

import pytest
import torch
from torch.nn import functional

import hf_sparse_pathways as sp
from tests.sgatlin import oracles
from tests.sgatlin.cases import CONFIGS, D_MODEL, SGATLIN, layer_of

KINDS = pytest.mark.parametrize("name", CONFIGS)
ROUTERS = pytest.mark.parametrize("router", SGATLIN)


def _naive(layer, x):
    return getattr(oracles, layer.config.kind)(layer, x)


@KINDS
def test_the_output_is_the_equation_s(name):
    layer, x = layer_of(name)
    torch.testing.assert_close(layer(x), _naive(layer, x))
    assert layer(x).abs().max() > 0


@KINDS
def test_gradients_are_the_equation_s(name):
    layer, x = layer_of(name)
    other = copy.deepcopy(layer)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn_like(x)
    (layer(mine) * weight).sum().backward()
    (_naive(other, theirs) * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    pairs = zip(layer.named_parameters(), other.parameters(), strict=True)
    for (key, parameter), partner in pairs:
        torch.testing.assert_close(parameter.grad, partner.grad, msg=key)
        assert parameter.grad.abs().max() > 0, key


@KINDS
def test_gradcheck(name):
    layer, x = layer_of(name)
    names, values = zip(*layer.named_parameters(), strict=True)

    def compute(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    leaves = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(compute, (x.requires_grad_(), *leaves), fast_mode=True)


@pytest.mark.parametrize("router", SGATLIN)
def test_gradcheck_of_sgatlin_entry_by_entry(router):
    torch.manual_seed(0)
    config = sp.SgatlinConfig(n_experts=4, n_channels=2, top_k=2, d_key=2, router=router)
    layer = sp.SgatlinFFN(config, 3).double()
    leaves = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def compute(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compute, (x, *leaves))


@ROUTERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_route_is_the_top_k_of_all_scores(router, dtype, autocast):
    layer, _ = layer_of(f"sgatlin-{router}", dtype)
    x = torch.randn(200, D_MODEL, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        scores, index = layer.route(x)
        best = layer.all_scores(x).topk(layer.config.top_k)
        among = layer.router(x, torch.zeros(3, 25, dtype=torch.bool))
    assert index.shape == scores.shape == (200, 3, 4)
    for found in ((scores, index), among):
        assert torch.equal(found[0], best.values)
        assert torch.equal(found[1], best.indices)


@ROUTERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("even", [False, True])
def test_among_some_experts_the_best_are_those_of_their_scores(router, dtype, even, monkeypatch):
    layer, _ = layer_of(f"sgatlin-{router}", dtype)
    x = torch.randn(200, D_MODEL, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    removed = torch.rand(3, 25, generator=generator).argsort(1) < 18
    if not even:
        removed[0, removed[0].nonzero()[0]] = False
    scores = layer.all_scores(x).masked_fill(removed, -torch.inf)
    best = scores.topk(layer.config.top_k)
    for most in (1 << 24, 7 * 75):
        monkeypatch.setattr("hf_sparse_pathways.sgatlin.routers._MOST_SCORES", most)
        found, index = layer.router(x, removed)
        torch.testing.assert_close(found, best.values)
        if router != "dense" or dtype == torch.float32:  # which has equal scores
            assert torch.equal(index, best.indices)
        assert not removed.expand(200, 3, 25).gather(-1, index).any()


def test_scores_are_raw_and_signed():
    layer, x = layer_of("sgatlin-odd")
    assert (layer.route(x)[0] < 0).any()


@pytest.mark.parametrize("router", ["product_dense", "product_key"])
def test_a_product_router_chooses_as_much_as_its_tables_hold(router):
    torch.manual_seed(0)
    config = sp.SgatlinConfig(n_experts=16, n_channels=2, top_k=4, d_key=3, router=router)
    layer, x = sp.SgatlinFFN(config, 5), torch.randn(300, 5)
    best = layer.all_scores(x).topk(4)
    assert torch.equal(layer.route(x)[0], best.values)


def test_shapes_of_the_parameters():
    layer = sp.SgatlinFFN(sp.SgatlinConfig(), 32)
    assert layer.u.shape == layer.v.shape == (8, 1024, 32)
    assert {name for name, _ in layer.named_parameters()} == {
        "u",
        "v",
        "router.query.weight",
        "router.keys",
    }


@KINDS
@pytest.mark.parametrize("shape", [(1,), (0,), (2, 3), (2, 0), (1, 2, 2)])
def test_any_leading_shape(name, shape):
    layer, _ = layer_of(name, torch.float32)
    x = torch.randn(*shape, D_MODEL)
    expected = layer(x.reshape(-1, D_MODEL)).view(x.shape)
    assert torch.equal(layer(x), expected)
    if x.numel():
        alone = torch.stack([layer(row[None])[0] for row in x.reshape(-1, D_MODEL)])
        torch.testing.assert_close(alone.view(x.shape), expected)


@KINDS
def test_another_width_is_refused(name):
    layer, _ = layer_of(name, torch.float32)
    with pytest.raises(sp.PathwaysError, match=r"inputs \(\.\.\., 12\).*\(24, 6\)"):
        layer(torch.randn(24, 6))
    with pytest.raises(sp.PathwaysError, match="width of at least 1"):
        type(layer)(layer.config, 0)
    other = CONFIGS["mlp" if name != "mlp" else "peer"]
    with pytest.raises(sp.PathwaysError, match=f"made of a {type(layer.config).__name__}"):
        type(layer)(other, D_MODEL)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "moe"])
def test_shapes_are_found_on_meta(name):
    layer, x = layer_of(name, torch.float32)
    assert layer.to("meta")(x.to("meta")).shape == x.shape


@KINDS
def test_views_that_are_not_contiguous(name):
    layer, _ = layer_of(name, torch.float32)
    x = torch.randn(D_MODEL, 5, 2).permute(2, 1, 0)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    layer(x.requires_grad_()).sum().backward()


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_same_weights_in_double(name, dtype):
    layer, x = layer_of(name, dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    found = layer(x)
    errors = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert errors.median() < 0.05, "but for tokens whose experts are others by a rounding"
    assert found.dtype == dtype
    found.float().sum().backward()
    assert all(p.grad.dtype == dtype for p in layer.parameters())


@KINDS
def test_autocast(name):
    layer, x = layer_of(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
        found.float().square().sum().backward()
    assert found.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_nothing_of_the_size_of_the_gathered_rows_is_made():
    """A copy of the rows takes tokens x channels x top_k x d_model."""
    layer = sp.SgatlinFFN(sp.SgatlinConfig(n_experts=16, n_channels=4, top_k=4, d_key=4), 64)
    tokens = 256
    gathered = tokens * 4 * 4 * 64
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            outputs = made if isinstance(made, (tuple, list)) else (made,)
            sizes.extend(o.numel() for o in outputs if isinstance(o, torch.Tensor))
            return made

    with Watch():
        layer(torch.randn(tokens, 64, requires_grad=True)).sum().backward()
    assert len(sizes) > 20
    assert max(sizes) < gathered // 4


def test_experts_begin_with_a_variance_of_one_over_their_number():
    torch.manual_seed(0)
    layer = sp.SgatlinFFN(sp.SgatlinConfig(n_experts=256, n_channels=4, top_k=4, d_key=32), 64)
    for weight, fan_in in ((layer.u, 256), (layer.v, 256), (layer.router.query.weight, 64)):
        std = fan_in**-0.5
        assert abs(weight.std().item() / std - 1) < 0.03
        assert weight.abs().max() <= 2 * std / 0.8796 + 1e-6, "cut off at two of the normal's own"
        assert weight.abs().max() > 1.8 * std


@KINDS
def test_new_weights_are_drawn_in_place_and_by_the_seed(name):
    layer, x = layer_of(name, torch.float32)
    before = copy.deepcopy(layer.state_dict())
    torch.manual_seed(5)
    layer.reset_parameters()
    assert all(not torch.equal(layer.state_dict()[key], value) for key, value in before.items())
    torch.manual_seed(5)
    again = copy.deepcopy(layer)
    again.reset_parameters()
    assert torch.equal(layer(x), again(x))


@KINDS
def test_of_no_tokens_the_output_is_empty_and_has_gradients(name):
    layer, _ = layer_of(name)
    x = torch.randn(0, D_MODEL, dtype=next(layer.parameters()).dtype, requires_grad=True)
    output = layer(x)
    assert output.shape == x.shape
    output.sum().backward()
    assert x.grad.shape == x.shape


def test_losses_of_no_tokens_are_none():
    layer, _ = layer_of("moe")
    logits = torch.zeros(0, layer.config.n_experts)
    assert layer.losses(logits, torch.zeros(0, layer.config.top_k, dtype=torch.long)) == 0.0


@ROUTERS
@pytest.mark.parametrize("shape", [(3, D_MODEL - 1), (2, 3, D_MODEL), (D_MODEL,)])
def test_routers_say_which_shape_they_take(router, shape):
    layer, _ = layer_of(f"sgatlin-{router}")
    for call in (layer.route, layer.all_scores):
        with pytest.raises(sp.PathwaysError, match=rf"\(tokens, {D_MODEL}\), and was given"):
            call(torch.randn(shape))


def test_losses_of_a_mixture_are_the_papers():
    layer, x = layer_of("moe")
    logits = layer.router(x)
    index = logits.topk(2).indices
    shares = torch.stack([(index == e).sum() / index.numel() for e in range(5)]).double()
    balance = 5 * (shares * logits.softmax(-1).mean(0)).sum()
    z = (logits.exp().sum(-1).log() ** 2).mean()
    expected = 0.01 * balance + 0.001 * z
    torch.testing.assert_close(layer.losses(logits, index).double(), expected, rtol=1e-5, atol=0)
    even = torch.zeros(10, 5)
    every = functional.one_hot(torch.arange(10) % 5, 5).topk(2).indices
    assert layer.losses(even, every) == pytest.approx(0.01 + 0.001 * torch.tensor(5.0).log() ** 2)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "moe"])
def test_layers_compile_whole(name):
    layer, x = layer_of(name, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).sum().backward()
    for mine, parameter in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)
