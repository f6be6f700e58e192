"""Whatever rows cannot be formed exactly is refused, naming what, where and the remedy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import CLASSES, architecture, chain, freeze, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.errors import StateError, UnsupportedModel
from curvlab.nn import HalfSquaredError, linearize
from curvlab.optim import Preconditioner
from curvlab.rows import jacobian, sqrt_fisher
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import DenseRows
from curvlab.spectrum import Hessian
from curvlab.testing.oracle import assert_close, dense_jacobian

LABELS = torch.tensor([0, 1, 2, 0])


def model_and_inputs() -> tuple[nn.Module, Tensor]:
    return architecture("mlp").make(N=4)


class Wrapped(nn.Module):
    """A model with one layer, applied by a function."""

    def __init__(self, layer: nn.Module, forward: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.apply_layer = layer, forward

    def forward(self, x: Tensor) -> Any:
        return self.apply_layer(self.layer, x)


class TestLayers:
    @pytest.mark.parametrize(
        ("layer", "use", "message"),
        [
            (nn.LazyLinear(2), nn.Module.__call__, r"layer\.weight, layer\.bias have no shape yet: call the model"),
            (nn.EmbeddingBag(4, 2, mode="max"), nn.Module.__call__, "EmbeddingBag 'layer' has mode 'max'.*Use 'sum'"),
            (nn.EmbeddingBag(4, 2, max_norm=1.0), nn.Module.__call__, "EmbeddingBag 'layer' uses max_norm"),
            (
                nn.EmbeddingBag(4, 2),
                lambda layer, x: layer(x[:, 0], torch.arange(len(x))),
                r"'layer' was called on one axis with offsets.*indices \[N, T\]",
            ),
            (nn.LSTM(1, 2), lambda layer, x: layer(x.flatten()[:, None] / 3)[0], "LSTM was called on .* sample axis"),
            (nn.RNNCell(2, 2), lambda layer, x: layer(x[0] / 3)[None], r"RNNCell was called .* \[N, features\]"),
            (
                nn.MultiheadAttention(2, 1),
                lambda layer, x: layer(x / 3, x / 3, x / 3)[0],
                r"MultiheadAttention was called on an input without a sample axis.*\[N, T, E\]",
            ),
            (
                nn.MultiheadAttention(2, 1),
                lambda layer, x: layer(*3 * [x[None] / 3], is_causal=True)[0],
                "is_causal=True without attn_mask.*with its mask",
            ),
        ],
    )
    def test_what_a_layer_does_not_cover(
        self, layer: nn.Module, use: Callable[[nn.Module, Tensor], Any], message: str
    ) -> None:
        with pytest.raises(UnsupportedModel, match=message):
            jacobian(Wrapped(layer, use), torch.randint(4, (2, 2)))

    @pytest.mark.parametrize(
        "layer",
        [nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2]), nn.SyncBatchNorm(4).eval()],
        ids=lambda layer: type(layer).__name__,
    )
    def test_layers_without_a_rule_get_dense_rows(self, layer: nn.Module) -> None:
        def use(layer: nn.Module, x: Tensor) -> Tensor:
            return layer.log_prob(x) if isinstance(layer, nn.AdaptiveLogSoftmaxWithLoss) else layer(x)

        model, x = Wrapped(layer, use).double(), torch.randn(3, 4, dtype=torch.float64)
        rows = jacobian(model, x)
        assert {type(found) for found in rows.layers} <= {DenseRows, KroneckerRows}
        assert_close(rows.dense(), dense_jacobian(model, x))

    def test_nothing_to_analyse(self) -> None:
        model, x = model_and_inputs()
        with pytest.raises(UnsupportedModel, match="no trainable parameter: set requires_grad"):
            jacobian(model.requires_grad_(False), x)

    @pytest.mark.parametrize(
        "layer",
        [
            nn.BatchNorm1d(4),
            nn.BatchNorm1d(4, affine=False),
            nn.InstanceNorm1d(3, track_running_stats=True),
            nn.Dropout(0.5),
            nn.RReLU(),
            nn.GRU(4, 4, num_layers=2, dropout=0.2),
            nn.MultiheadAttention(4, 2, dropout=0.2),
            nn.utils.spectral_norm(nn.Linear(4, 4)),
        ],
        ids=lambda layer: type(layer).__name__,
    )
    def test_training_mode(self, layer: nn.Module) -> None:
        model = chain(nn.Linear(4, 4), layer, nn.Linear(4, 2))
        with pytest.raises(UnsupportedModel, match=rf"{type(layer).__name__} '1' is in training mode.*model.eval\(\)"):
            jacobian(model, torch.randn(3, 4))
        if not isinstance(layer, nn.GRU | nn.MultiheadAttention):
            assert jacobian(model.eval(), torch.randn(3, 4)).R == 6

    def test_parametrisations_in_training_mode(self) -> None:
        model = chain(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
        u = model[0].parametrizations.weight[0]._u.clone()
        with pytest.raises(UnsupportedModel, match=r"_SpectralNorm .* power iteration\. Call model\.eval\(\)"):
            jacobian(model, torch.randn(3, 4))
        assert torch.equal(model[0].parametrizations.weight[0]._u, u)

    def test_dropout_of_nothing_may_train(self) -> None:
        assert jacobian(chain(nn.Linear(4, 4), nn.Dropout(0.0)), torch.randn(3, 4)).P == 20

    def test_batch_norm_without_statistics(self) -> None:
        model = chain(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
        with pytest.raises(UnsupportedModel, match=r"BatchNorm1d '1' has no running statistics.*track_running_stats"):
            jacobian(model, torch.randn(3, 4))

    @pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
    def test_embedding_options(self, option: dict[str, Any]) -> None:
        model = chain(nn.Embedding(4, 2, **option), nn.Flatten())
        with pytest.raises(UnsupportedModel, match=f"Embedding '0' uses {next(iter(option))}"):
            jacobian(model, torch.randint(4, (3, 2)))

    def test_backpack_where_it_does_not_apply(self) -> None:
        for name, reason in {
            "residual": "Residual '' is not in BackPACK's chain rules",
            "in-place-chain": "ReLU '1' works in place",
            "conv2d-same": "Conv2d '0' pads by 'zeros', 'same'",
            "conv2d-circular": "Conv2d '0' pads by 'circular'",
            "batchnorm-plain": "BatchNorm1d '1' has no scale and shift",
            "function-output": "output= picks",
        }.items():
            case = architecture(name)
            model, x = case.make(N=2)
            with pytest.raises(UnsupportedModel, match=f"{reason}.*Use engine='autograd'"):
                jacobian(model, x, engine="backpack", output=case.output)
        layer = nn.Linear(3, 3)
        with pytest.raises(UnsupportedModel, match="Linear '1' is used more than once"):
            jacobian(chain(layer, layer), torch.randn(2, 3), engine="backpack")
        one, two = nn.Linear(3, 3), nn.Linear(3, 3)
        two.weight = one.weight
        with pytest.raises(UnsupportedModel, match="parameters are tied"):
            jacobian(chain(one, two), torch.randn(2, 3), engine="backpack")


class TestSamples:
    """The check of the first sweep finds layers whose rows do not follow from their own inputs; the model decides."""

    @pytest.mark.parametrize(
        ("layer", "use"),
        [
            (nn.Linear(4, 3), lambda layer, x: layer(x.transpose(0, 1)).mean(0)),
            (nn.Embedding(6, 3), lambda layer, x: (layer(torch.arange(5)).t().t() * x[..., :1]).sum(1)),
            (nn.Linear(4, 4, bias=False), lambda layer, x: layer(torch.tanh(F.linear(x, layer.weight))).mean(1)),
        ],
        ids=["sequence-first", "positions-shared-by-all", "used-outside-its-layer"],
    )
    @pytest.mark.parametrize("N", [2, 5])
    def test_layers_without_a_sample_axis_of_their_own(
        self, layer: nn.Module, use: Callable[[nn.Module, Tensor], Tensor], N: int
    ) -> None:
        """Also where another axis has by chance as many entries as there are samples."""
        model, x = Wrapped(layer, use).double(), torch.randn(N, 5, 4, dtype=torch.float64)
        for _ in range(2):
            rows = jacobian(model, x)
            assert isinstance(rows.layers[0], DenseRows)
            assert_close(rows.dense(), dense_jacobian(model, x))

    @pytest.mark.parametrize("mix", [lambda h: h - h.mean(0), lambda h: h.flip(0), lambda h: h.softmax(0)])
    def test_interacting_samples(self, mix: Callable[[Tensor], Tensor]) -> None:
        model = Wrapped(nn.Linear(4, 3), lambda layer, x: mix(torch.tanh(layer(x))))
        with pytest.raises(UnsupportedModel, match=r"gradient of layer\.weight, layer\.bias.*samples interact"):
            jacobian(model, torch.randn(5, 4))

    def test_interacting_samples_with_bare_parameters(self) -> None:
        class Centred(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.randn(4))

            def forward(self, x: Tensor) -> Tensor:
                return torch.tanh(x * self.scale) - torch.tanh(x * self.scale).mean(0)

        with pytest.raises(UnsupportedModel, match=r"gradient of scale\. Either samples interact"):
            jacobian(Centred(), torch.randn(5, 4))

    def test_a_random_model(self) -> None:
        model = Wrapped(nn.Linear(4, 3), lambda layer, x: layer(x) * torch.rand(()))
        with pytest.raises(UnsupportedModel, match="the model is random"):
            jacobian(model, torch.randn(5, 4))

    def test_a_batch_without_any_gradient_proves_nothing(self) -> None:
        model = Wrapped(nn.Linear(4, 3), lambda layer, x: layer(x).flip(0))
        x = torch.randn(2, 4)
        loss = nn.MSELoss()
        assert not sqrt_fisher(model, loss, x, model(x).detach(), "empirical").dense().any()
        with pytest.raises(UnsupportedModel, match="samples interact"):
            sqrt_fisher(model, loss, x, torch.zeros(2, 3), "empirical")

    def test_gradients_that_cancel_are_no_error(self) -> None:
        """A shift of all logits has no gradient: what is left on both sides is round-off."""
        for dtype in (torch.float32, torch.float64):
            model = chain(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
            x = torch.randn(2, 3, 3, dtype=dtype)
            rows = sqrt_fisher(model, nn.CrossEntropyLoss(), x, torch.tensor([[0, 1], [2, 0]]), "empirical")
            assert rows.P == 26
            freeze(model, "0.weight", "0.bias", "2.weight")
            assert sqrt_fisher(model, nn.CrossEntropyLoss(), x, torch.zeros(2, 2).long(), "empirical").P == 2

    def test_a_refused_model_is_refused_again(self) -> None:
        model = Wrapped(nn.Linear(4, 3), lambda layer, x: layer(x).flip(0))
        for _ in range(2):
            with pytest.raises(UnsupportedModel, match="samples interact"):
                jacobian(model, torch.randn(5, 4))

    def test_the_check_covers_every_shape(self) -> None:
        model = Wrapped(nn.Linear(4, 3), lambda layer, x: layer(x).flip(0))
        assert jacobian(model, torch.randn(1, 4)).R == 3
        with pytest.raises(UnsupportedModel, match="samples interact"):
            jacobian(model, torch.randn(2, 4))

    def test_models_that_torch_func_cannot_vectorise(self) -> None:
        class Branching(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(4))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.scale if x.sum() > 0 else x * self.scale**2

        model = Branching()
        x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
        assert_close(jacobian(model, x).dense(), torch.cat([row.diag() for row in x])[[0, 4, 1, 5, 2, 6, 3, 7]])
        with pytest.raises(UnsupportedModel, match=r"gradient of scale\. Either samples interact"):
            jacobian(model, torch.cat([x, -x]).requires_grad_(False))

    def test_models_that_cannot_be_called_on_single_samples(self) -> None:
        class Whole(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(4))

            def forward(self, x: Tensor) -> Tensor:
                return x.view(5, 4) * self.scale

        with pytest.raises(UnsupportedModel, match=r"The parameters scale have no factored rows.*single samples"):
            jacobian(Whole(), torch.randn(5, 4))


class TestOutputs:
    def test_no_samples(self) -> None:
        for engine in ("backpack", "autograd"):
            with pytest.raises(ValueError, match="zero samples"):
                jacobian(mlp(), torch.zeros(0, 4), engine=engine)

    def test_non_finite_outputs(self) -> None:
        model, x = model_and_inputs()
        x[2, 1], x[3, 0] = torch.nan, torch.inf
        for engine in ("backpack", "autograd"):
            with pytest.raises(ValueError, match="output is not finite, first at sample 2"):
                jacobian(model, x, engine=engine)

    def test_non_finite_derivatives(self) -> None:
        model = Wrapped(nn.Linear(1, 1, bias=False), lambda layer, x: layer(x).abs().sqrt())
        with pytest.raises(ValueError, match="derivative at layer 'layer' is not finite, first at sample 1"):
            jacobian(model, torch.tensor([[1.0], [0.0], [2.0]]))

    def test_non_finite_inputs_that_do_not_reach_the_output(self) -> None:
        model = Wrapped(nn.Linear(2, 2), lambda layer, x: layer(x).sigmoid())
        with pytest.raises(ValueError, match="derivative at layer 'layer' is not finite, first at sample 0"):
            jacobian(model, torch.tensor([[torch.inf, 0.0], [1.0, 1.0]]))

    def test_one_dimensional_output(self) -> None:
        model = Wrapped(nn.Linear(4, 1), lambda layer, x: layer(x)[:, 0])
        with pytest.raises(UnsupportedModel, match=r"output has shape \(5,\).*output=lambda z: z\[:, None\]"):
            jacobian(model, torch.randn(5, 4))
        assert jacobian(model, torch.randn(5, 4), output=lambda z: z[:, None]).R == 5

    def test_integer_output(self) -> None:
        model = Wrapped(nn.Linear(4, 3), lambda layer, x: layer(x).long())
        with pytest.raises(UnsupportedModel, match=r"output is torch\.int64; .* floating-point"):
            jacobian(model, torch.randn(5, 4))

    @pytest.mark.parametrize(("form", "kind"), [("dict", "dict"), ("named", "Answer"), ("tuple", "tuple")])
    def test_structured_output(self, form: str, kind: str) -> None:
        model, x = architecture(f"{form}-output").make()
        with pytest.raises(UnsupportedModel, match=f"returned a {kind}; say with output= which tensor"):
            jacobian(model, x)

    @pytest.mark.parametrize(
        ("form", "pick", "held"),
        [("dict", "logit", " with hidden, logits"), ("dict", 0, ""), ("named", "logit", ""), ("tuple", 2, "")],
    )
    def test_picks_that_find_nothing(self, form: str, pick: Any, held: str) -> None:
        model, x = architecture(f"{form}-output").make()
        with pytest.raises(ValueError, match=rf"output={pick!r} does not pick anything from the \w+{held}"):
            jacobian(model, x, output=pick)


class TestOptions:
    @pytest.mark.usefixtures("unchecked_types")
    def test_unknown_names_suggest_the_nearest(self) -> None:
        model, x = model_and_inputs()
        with pytest.raises(ValueError, match=r"Unknown engine 'backpac'\. Did you mean 'backpack'\? Known: auto"):
            jacobian(model, x, engine="backpac")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"Unknown kind 'emprical'\. Did you mean 'empirical'\?"):
            sqrt_fisher(model, nn.CrossEntropyLoss(), x, LABELS, kind="emprical")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"Unknown kind 'full'\. Known: exact, ggn, mc, empirical"):
            sqrt_fisher(model, nn.CrossEntropyLoss(), x, LABELS, kind="full")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"Unknown rows 'samples'\. Did you mean 'sample'\?"):
            sqrt_fisher(model, nn.CrossEntropyLoss(), x, LABELS, rows="samples")  # type: ignore[arg-type]

    def test_monte_carlo_needs_a_generator(self) -> None:
        model, x = model_and_inputs()
        with pytest.raises(ValueError, match=r"kind='mc' draws at random: pass generator="):
            sqrt_fisher(model, nn.CrossEntropyLoss(), x, LABELS, kind="mc")

    def test_options_of_monte_carlo_elsewhere(self) -> None:
        model, x = model_and_inputs()
        with pytest.raises(
            ValueError, match="draws=3 has a meaning for kind='mc' and for rows='signs' only, not for 'exact'"
        ):
            sqrt_fisher(model, nn.CrossEntropyLoss(), x, LABELS, draws=3)
        with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
            sqrt_fisher(model, nn.CrossEntropyLoss(), x, LABELS, "mc", draws=0, generator=torch.Generator())

    @pytest.mark.parametrize("kind", ["mc", "empirical"])
    def test_the_jacobian_of_a_partial_sweep(self, kind: Any) -> None:
        model, x = model_and_inputs()
        options: dict[str, Any] = {"generator": torch.Generator()} if kind == "mc" else {}
        rows = sqrt_fisher(model, nn.CrossEntropyLoss(), x, LABELS, kind, **options)
        with pytest.raises(StateError, match=rf"kind '{kind}' do not hold the Jacobian; call curvlab\.jacobian"):
            rows.jacobian()


class TestLosses:
    def refuse(self, error: type[Exception], message: str, loss: nn.Module, targets: Tensor) -> None:
        model, x = model_and_inputs()
        for kind in ("exact", "empirical"):
            with pytest.raises(error, match=message):
                sqrt_fisher(model, loss, x, targets, kind)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("loss", "remedy"),
        [
            (nn.L1Loss(), "Use HuberLoss or SmoothL1Loss"),
            (nn.GaussianNLLLoss(), r"Use curvlab\.nn\.GaussianNLL\(variance=…\)"),
            (nn.NLLLoss(), "Leave out the model's log-softmax and use CrossEntropyLoss on its logits"),
            (nn.KLDivLoss(), "use CrossEntropyLoss on its logits, with class probabilities as targets"),
            (nn.CTCLoss(), r"Use curvlab\.nn\.PerSample"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_losses_without_rows(self, loss: nn.Module, remedy: str) -> None:
        self.refuse(UnsupportedModel, f"{type(loss).__name__} has no rows.*{remedy}", loss, torch.zeros(4, CLASSES))

    def test_no_reduction(self) -> None:
        message = "CrossEntropyLoss has reduction='none'; a Fisher matrix needs 'mean' or 'sum'"
        self.refuse(UnsupportedModel, message, nn.CrossEntropyLoss(reduction="none"), LABELS)

    @pytest.mark.parametrize("loss", [nn.MSELoss(), HalfSquaredError(), nn.BCEWithLogitsLoss()])
    def test_target_shapes(self, loss: nn.Module) -> None:
        message = rf"{type(loss).__name__} needs targets of the output's shape \(4, 3\), got \(4,\)"
        self.refuse(ValueError, message, loss, torch.zeros(4))

    def test_label_shapes(self) -> None:
        message = r"class indices of shape \(4,\), got \(4, 1\)"
        self.refuse(ValueError, message, nn.CrossEntropyLoss(), LABELS[:, None])

    def test_class_probabilities(self) -> None:
        message = r"class probabilities of the output's shape \(4, 3\), got \(4,\), or class indices as integers"
        self.refuse(ValueError, message, nn.CrossEntropyLoss(), torch.ones(4))
        negative = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.2, -0.2, 0.0], [0.5, 0.5, 0.0]])
        self.refuse(ValueError, "at least 0, which sample 2 has not", nn.CrossEntropyLoss(), negative)

    @pytest.mark.parametrize("label", [3, -1])
    def test_labels_out_of_range(self, label: int) -> None:
        message = f"Target {label} of sample 2 is neither one of the 3 classes nor ignore_index"
        self.refuse(ValueError, message, nn.CrossEntropyLoss(), torch.tensor([0, 1, label, 0]))

    def test_all_targets_ignored(self) -> None:
        self.refuse(ValueError, "No target carries weight", nn.CrossEntropyLoss(), torch.full((4,), -100))
        zero = nn.CrossEntropyLoss(torch.tensor([0.0, 1, 1]))
        self.refuse(ValueError, "No target carries weight", zero, torch.zeros(4, dtype=torch.int64))

    def test_a_sum_over_ignored_targets_is_zero(self) -> None:
        model, x = model_and_inputs()
        rows = sqrt_fisher(model, nn.CrossEntropyLoss(reduction="sum"), x, torch.full((4,), -100))
        assert not rows.dense().any()

    def test_negative_weights(self) -> None:
        message = "has negative weights"
        self.refuse(ValueError, message, nn.CrossEntropyLoss(torch.tensor([1.0, -1.0, 1.0])), LABELS)
        self.refuse(ValueError, message, nn.BCEWithLogitsLoss(torch.tensor([1.0, -1.0, 1.0])), torch.ones(4, 3))

    def test_binary_targets_out_of_range(self) -> None:
        self.refuse(ValueError, "targets between 0 and 1", nn.BCEWithLogitsLoss(), torch.full((4, CLASSES), 2.0))

    @pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss()])
    def test_non_finite_targets(self, loss: nn.Module) -> None:
        targets = torch.zeros(4, CLASSES)
        targets[1, 2] = torch.nan
        self.refuse(ValueError, "targets are not finite, first at sample 1", loss, targets)


def test_backpack_folds_no_positions_into_the_first_axis() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5), nn.Flatten(0, 1))
    with pytest.raises(UnsupportedModel, match=r"Flatten '2' may fold positions.*Use engine='autograd'"):
        jacobian(model, torch.randint(5, (3, 4)), engine="backpack")


def test_vectors_of_another_type_than_the_rows() -> None:
    model, x = model_and_inputs()
    rows = jacobian(model, x)
    with pytest.raises(ValueError, match=r"The coefficients: torch.float32, the rows: torch.float64"):
        rows.rmatvec(torch.ones(rows.R, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"The vector at .*: torch.float32, the rows: torch.float64"):
        rows.matvec(torch.ones(rows.P, dtype=torch.float32))


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 2, dtype=torch.complex64), r"weight, bias are complex.*view_as_real"),
        (lambda: nn.Linear(3, 2, device="meta"), r"weight, bias are on the meta device.*to_empty"),
        (
            lambda: nn.Sequential(torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3))),
            r"0 is scripted or traced.*in Python",
        ),
    ],
    ids=["complex", "meta", "traced"],
)
def test_parameters_of_which_there_is_no_curvature(make: Callable[[], nn.Module], message: str) -> None:
    model, x, y, loss = make(), torch.ones(4, 3), torch.zeros(4, 2), nn.MSELoss()
    with pytest.raises(UnsupportedModel, match=message):
        jacobian(model, x)
    with pytest.raises(UnsupportedModel, match=message):
        Hessian(model, loss, (x, y))
    if "traced" in message:
        with pytest.raises(UnsupportedModel, match=message):
            linearize(model)
    with pytest.raises(UnsupportedModel, match=message):
        Preconditioner(model, loss, kl_clip=None)
