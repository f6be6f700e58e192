"""The expansion against dense Jacobians of the model itself, and as a well-behaved module."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.errors import UnsupportedModel
from curvlab.nn import Linearized, linearize, ntk_mlp

# torch compiles its forward-mode derivatives by torch.jit the first time that one is used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


class Tied(nn.Module):
    """An embedding that is also the output layer, a bare parameter and a residual."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.embedding = nn.Embedding(6, 4)
        self.hidden = nn.Sequential(nn.Linear(4, 4))
        self.output = nn.Linear(4, 6, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        h = self.embedding(tokens).mean(1)
        return self.output(h + self.scale * torch.tanh(self.hidden(h)))


class Structured(nn.Module):
    """Outputs in a dictionary of tensors and tuples; a keyword argument."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 2)

    def forward(self, x, *, power=1):
        z = self.body(x) ** power
        return {"z": z, "pair": (z.exp(), z[:, 0])}


def convolutional() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.ReLU(), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 2))


MODELS = {
    "mlp": (lambda: ntk_mlp((3, 8, 8, 2), "tanh", bias_std=0.3), lambda: torch.randn(5, 3)),
    "tied": (Tied, lambda: torch.randint(6, (5, 3))),
    "convolutional": (convolutional, lambda: torch.randn(4, 2, 6, 6)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        lambda: torch.randn(3, 5, 4),
    ),
}


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=MODELS)
def case(request):
    build, data = MODELS[request.param]
    return build().eval(), data()


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def jacobian(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        return jacrev(lambda theta: functional_call(model, theta, (x,)))(parameters(model))


def moved(model: Linearized) -> Linearized:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_names_values_and_storage(case):
    model, x = case
    before = copy.deepcopy(model.state_dict())
    linear = linearize(model)
    assert [name for name, _ in linear.named_parameters()] == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(linear(x), model(x), rtol=1e-12, atol=1e-12)
    moved(linear)
    linear(x).sum().backward()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    shared = {t.data_ptr() for t in model.state_dict().values()} & {
        t.data_ptr() for part in (linear, linear.base) for t in [*part.parameters(), *part.buffers()]
    }
    assert not shared


def test_value_and_gradients_agree_with_the_dense_jacobian(case):
    model, x = case
    linear = moved(linearize(model))
    J = jacobian(model, x)
    step = {name: value - parameters(model)[name] for name, value in parameters(linear).items()}
    change = sum(torch.tensordot(J[name], step[name], dims=step[name].ndim) for name in J)
    outputs = linear(x)
    torch.testing.assert_close(outputs, model(x) + change, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(outputs)
    outputs.backward(cotangent)
    for name, parameter in linear.named_parameters():
        expected = torch.tensordot(cotangent, J[name], dims=cotangent.ndim)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-10, msg=name)


def test_jacobian_does_not_depend_on_the_parameters(case):
    model, x = case
    linear = linearize(model)
    origin, elsewhere = jacobian(linear, x), jacobian(moved(linear), x)
    for name, J in jacobian(model, x).items():
        torch.testing.assert_close(origin[name], J, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(elsewhere[name], J, rtol=1e-9, atol=1e-11)


def test_error_of_the_expansion_is_of_second_order():
    model = ntk_mlp((3, 16, 16, 1), "tanh")
    x, linear = torch.randn(4, 3), linearize(model)
    direction = {name: torch.randn_like(value) for name, value in parameters(model).items()}
    errors = []
    for size in (1e-2, 1e-3):
        there = {name: value + size * direction[name] for name, value in parameters(model).items()}
        error = functional_call(model, there, (x,)) - functional_call(linear, there, (x,))
        errors.append(error.norm().item())
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2)


def test_output_structure_and_keywords_are_kept():
    model, x = Structured(), torch.randn(4, 3)
    outputs, expected = linearize(model)(x, power=2), model(x, power=2)
    assert outputs.keys() == expected.keys()
    assert isinstance(outputs["pair"], tuple)
    torch.testing.assert_close(outputs, expected)


def test_frozen_parameters_stay_frozen():
    model = ntk_mlp((3, 4, 2))
    model[0].weight.requires_grad_(False)
    linear = linearize(model)
    assert {name: p.requires_grad for name, p in linear.named_parameters()} == {
        "0.weight": False,
        "2.weight": True,
    }
    assert not any(p.requires_grad for p in linear.base.parameters())
    assert model[2].weight.requires_grad


def test_state_dict_carries_parameters_origin_and_buffers(case, tmp_path):
    model, x = case
    linear = moved(linearize(model))
    torch.save(linear.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*other.parameters(), *(b for b in other.buffers() if b.is_floating_point())]:
            tensor.add_(1.0)
    restored = linearize(other)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(restored(x), linear(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_independent(case, duplicate):
    model, x = case
    linear = moved(linearize(model))
    expected, twin = linear(x), duplicate(linear)
    torch.testing.assert_close(twin(x), expected, rtol=0.0, atol=0.0)
    moved(twin)
    with torch.no_grad():
        next(twin.base.parameters()).add_(1.0)
    torch.testing.assert_close(linear(x), expected, rtol=0.0, atol=0.0)


def test_to_moves_parameters_and_origin():
    linear = moved(linearize(ntk_mlp((3, 8, 2))))
    x = torch.randn(4, 3)
    expected = linear(x)
    assert linear.float() is linear
    assert {p.dtype for part in (linear, linear.base) for p in part.parameters()} == {torch.float32}
    torch.testing.assert_close(linear(x.float()), expected.float(), rtol=1e-4, atol=1e-5)


def test_training_mode_of_the_expansion_does_not_reach_the_model():
    model, x = convolutional().eval(), torch.randn(4, 2, 6, 6)
    linear = linearize(model)
    expected = linear(x)
    assert torch.equal(linear.train()(x), expected)
    assert not linear.base.training


@pytest.mark.parametrize(
    ("model", "culprit"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "1 in training mode"),
        (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), "1 in training mode"),
        (
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1),
            "self_attn, dropout, dropout1, dropout2 in training",
        ),
        (nn.Dropout1d(0.2), "Dropout1d in training mode"),
    ],
)
def test_noisy_models_are_refused_with_the_remedy(model, culprit):
    with pytest.raises(UnsupportedModel, match=rf"{culprit}.*Call model.eval\(\) first"):
        linearize(model)
    linearize(model.eval())


def test_dropout_without_effect_is_accepted():
    assert len(list(linearize(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0))).parameters())) == 2


def test_a_part_called_base_is_refused():
    model = nn.Module()
    model.base = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModel, match="'base'"):
        linearize(model)


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Linear(2, 2)
    model.cached = model.weight * 2
    with pytest.raises(UnsupportedModel, match="Linear cannot be copied"):
        linearize(model)


def test_attention_settings_are_restored():
    before = torch.backends.mha.get_fastpath_enabled()
    linearize(nn.Linear(2, 2))(torch.randn(1, 2))
    with pytest.raises(RuntimeError):
        linearize(nn.Linear(2, 2))(torch.randn(1, 3))
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_repr_shows_the_model():
    assert repr(linearize(nn.Linear(2, 1))) == "Linearized(Linear(in_features=2, out_features=1, bias=True))"
