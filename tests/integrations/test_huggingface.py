"""Training by the Trainer of Hugging Face against the same training in a plain loop, and its losses against the library's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchrun
from integration_cases import BATCH, OPTIMISERS, digits, flat, network, plain
from torch import Tensor, nn

from curvlab.optim import NaturalGradient, Preconditioner

BATCHES = 6
pytestmark = pytest.mark.filterwarnings("ignore")  # the library warns of pinned memory, loaders and deprecations


@pytest.fixture(scope="module")
def trainers(transformers: Any) -> Any:
    from curvlab.integrations import huggingface

    return huggingface


class Classifier(nn.Module):
    """A model that takes keywords and returns a dictionary, as those of the library do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # noqa: ARG002 - by which the trainer keeps them
        return {"logits": self.net(x)}


def arguments(transformers: Any, folder: Path, **options: Any) -> Any:
    plainly = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    sizes = {"per_device_train_batch_size": BATCH, "num_train_epochs": 1, "logging_steps": 1}
    return transformers.TrainingArguments(folder, **plainly | quiet | sizes | options)


def trainer(trainers: Any, transformers: Any, folder: Path, optimiser: str, **options: Any) -> Any:
    model, data = Classifier(), [{"x": x, "labels": y} for x, y in digits(BATCHES)]
    made = OPTIMISERS[optimiser](model, nn.CrossEntropyLoss())
    return trainers.NaturalTrainer(
        model, arguments(transformers, folder, **options), train_dataset=data, optimizers=(made, None)
    )


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_training_is_the_plain_loop(
    optimiser: str, accumulate: int, trainers: Any, transformers: Any, tmp_path: Path
) -> None:
    made = trainer(trainers, transformers, tmp_path, optimiser, gradient_accumulation_steps=accumulate)
    made.train()
    model, of_batches = plain(optimiser, BATCHES, accumulate)
    torch.testing.assert_close(flat(made.model), flat(model), rtol=1e-9, atol=1e-10)
    expected = torch.tensor(of_batches).view(-1, accumulate).mean(1).tolist()
    assert losses(made) == pytest.approx(expected, rel=1e-3)
    assert losses(made)[-1] < 0.95 * losses(made)[0]
    assert made.state.log_history[0]["curvature/damping"] == 0.05
    assert not made.model._forward_pre_hooks


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_run_from_a_checkpoint_is_the_uninterrupted_one_bit_for_bit(
    optimiser: str, trainers: Any, transformers: Any, tmp_path: Path
) -> None:
    whole, resumed = (
        trainer(trainers, transformers, tmp_path, optimiser, save_strategy="steps", save_steps=3, num_train_epochs=2)
        for _ in range(2)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(flat(resumed.model), flat(whole.model))
    assert resumed.preconditioner.steps == whole.preconditioner.steps == 2 * BATCHES


# --- models of the library -----------------------------------------------------------------------------------------------

DAMPING = 1e8
VOCABULARY = 18  # values of pixels from 0 to 16, and padding


def pixels(padded: bool = True) -> list[dict[str, Tensor]]:
    """Handwritten digits as sequences of pixels, the latter ones of every second image padding."""
    made = []
    for number, image in enumerate(digits(2).tensors[0]):
        tokens = (16 * image[16:40]).round().long()
        length = 15 if padded and number % 2 else len(tokens)
        tokens[length:] = 17
        made.append(
            {
                "input_ids": tokens,
                "attention_mask": (tokens != 17).long(),
                "labels": tokens.masked_fill(tokens == 17, -100),
            }
        )
    return made


def with_labels(labels: Tensor) -> list[dict[str, Tensor]]:
    return [{**inputs, "labels": of_image} for inputs, of_image in zip(pixels(), labels, strict=True)]


def gpt2(library: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return library.GPT2LMHeadModel(library.GPT2Config(**sizes, **off))


def bert(library: Any, kind: str, labels: int, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    off = {"num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return getattr(library, f"BertFor{kind}")(library.BertConfig(**sizes, **off, num_labels=labels, **options))


def t5(library: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    more = {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 17, "tie_word_embeddings": True}
    return library.T5ForConditionalGeneration(library.T5Config(**sizes, **more))


IMAGES = digits(2).tensors
CASES: dict[str, Any] = {
    "causal language model": (gpt2, pixels, nn.CrossEntropyLoss(), {}),
    "smoothed labels": (gpt2, pixels, nn.CrossEntropyLoss(label_smoothing=0.2), {"label_smoothing_factor": 0.2}),
    "sums": (gpt2, pixels, nn.CrossEntropyLoss(reduction="sum"), {}),
    "masked language model": (lambda lib: bert(lib, "MaskedLM", 2), pixels, nn.CrossEntropyLoss(), {}),
    "encoder and decoder": (t5, pixels, nn.CrossEntropyLoss(), {}),
    "classes": (
        lambda lib: bert(lib, "SequenceClassification", 10),
        lambda: with_labels(IMAGES[1]),
        nn.CrossEntropyLoss(),
        {},
    ),
    "regression": (
        lambda lib: bert(lib, "SequenceClassification", 1),
        lambda: with_labels(IMAGES[1].float()),
        nn.MSELoss(),
        {},
    ),
    "several labels": (
        lambda lib: bert(lib, "SequenceClassification", 3, problem_type="multi_label_classification"),
        lambda: with_labels(torch.stack([IMAGES[1] > 2, IMAGES[1] > 5, IMAGES[1] % 2 == 0], 1).float()),
        nn.BCEWithLogitsLoss(),
        {},
    ),
}


def of_the_library(library: Any, model: nn.Module, batch: dict[str, Tensor], smoothing: float) -> Tensor:
    if not smoothing:
        return model(**batch).loss
    smoother = library.trainer_pt_utils.LabelSmoother(smoothing)
    return smoother(model(**batch), batch["labels"], shift_labels=True)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_steps_are_those_of_the_librarys_own_loss(
    case: str, accumulate: int, trainers: Any, transformers: Any, tmp_path: Path
) -> None:
    """Also where batches that accumulate have different numbers of labels; under so large a damping, a step is its gradient."""
    make, data, loss, options = CASES[case]
    smoothing = options.get("label_smoothing_factor", 0.0)
    unequal = sorted(data(), key=lambda sample: int(sample["attention_mask"].sum()))
    batch = transformers.default_data_collator(unequal)
    model, twin = make(transformers), make(transformers)
    args = arguments(
        transformers,
        tmp_path,
        gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=len(unequal) // accumulate,
        per_device_eval_batch_size=len(unequal),
        optim="sgd",
        learning_rate=0.1 * DAMPING,
        **options,
    )
    pre = Preconditioner(model, loss, "diagonal", damping=DAMPING)
    made = trainers.NaturalTrainer(model, args, train_dataset=unequal, preconditioner=pre)
    made.train()
    expected = of_the_library(transformers, twin, batch, smoothing)
    expected.backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert losses(made) == pytest.approx([float(expected)], rel=1e-3)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-4, atol=1e-6)
    after = float(of_the_library(transformers, twin, batch, smoothing))
    assert made.evaluate(unequal)["eval_loss"] == pytest.approx(after, rel=1e-4)
    assert after < expected


def test_a_language_model_with_padding_and_accumulation_trains_as_in_a_plain_loop(
    trainers: Any, transformers: Any, tmp_path: Path
) -> None:
    loss, unequal = nn.CrossEntropyLoss(), sorted(pixels(), key=lambda sample: int(sample["attention_mask"].sum()))
    model, twin = gpt2(transformers).double(), gpt2(transformers).double()
    args = arguments(
        transformers, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=32, num_train_epochs=8
    )
    natural, plainly = (NaturalGradient(m, loss, lr=0.3, kl_clip=0.1, damping=0.05) for m in (model, twin))
    made = trainers.NaturalTrainer(model, args, train_dataset=unequal, optimizers=(natural, None))
    made.train()
    batches = [transformers.default_data_collator(part) for part in (unequal[:32], unequal[32:])]
    targets = [batch.pop("labels")[:, 1:].flatten() for batch in batches]
    tokens = sum((y != -100).sum() for y in targets)
    for _ in range(8):
        plainly.zero_grad()
        for batch, y in zip(batches, targets, strict=True):
            with plainly.preconditioner.collect():
                (loss(twin(**batch).logits[:, :-1].flatten(0, 1), y) * (y != -100).sum() / tokens).backward()
        plainly.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-5, atol=1e-7)
    assert losses(made)[-1] < 0.95 * losses(made)[0]


# --- what is refused -----------------------------------------------------------------------------------------------------


def test_a_trainer_without_a_preconditioner_is_refused(trainers: Any, transformers: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"NaturalTrainer needs optimizers=\(optimizer, None\).*or preconditioner="):
        trainers.NaturalTrainer(Classifier(), arguments(transformers, tmp_path))


def test_another_label_smoothing_than_that_of_the_loss_is_refused(
    trainers: Any, transformers: Any, tmp_path: Path
) -> None:
    pre = Preconditioner(model := gpt2(transformers), nn.CrossEntropyLoss())
    args = arguments(transformers, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(
        ValueError, match=r"label_smoothing_factor=0\.1, and the CrossEntropyLoss .* smoothing of 0: give"
    ):
        trainers.NaturalTrainer(model, args, preconditioner=pre)


def test_a_batch_without_labels_is_refused(trainers: Any, transformers: Any, tmp_path: Path) -> None:
    made = trainer(trainers, transformers, tmp_path, "natural gradient")
    made.train_dataset = [{"x": sample["x"]} for sample in made.train_dataset]
    with pytest.raises(ValueError, match=r'The batch has no "labels": name the targets so, or give compute_loss_func='):
        made.train()
    assert not made.model._forward_pre_hooks


def test_a_loss_function_of_the_users_own_is_called(trainers: Any, transformers: Any, tmp_path: Path) -> None:
    model, loss = Classifier(), nn.CrossEntropyLoss()
    made = trainers.NaturalTrainer(
        model,
        arguments(transformers, tmp_path),
        train_dataset=[{"x": x, "labels": y} for x, y in digits(BATCHES)],
        optimizers=(NaturalGradient(model, loss, lr=0.3, momentum=0.5, damping=0.05, seed=4), None),
        compute_loss_func=lambda outputs, labels, num_items_in_batch: loss(outputs["logits"], labels),
    )
    made.train()
    torch.testing.assert_close(flat(model), flat(plain("natural gradient", BATCHES)[0]), rtol=1e-9, atol=1e-10)


@pytest.mark.study
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_two_processes_are_the_plain_loop(optimiser: str, trainers: Any, tmp_path: Path) -> None:
    script = Path(__file__).with_name("huggingface_training.py")
    model, _ = plain(optimiser, BATCHES)
    for found in torchrun.run(script, 2, tmp_path / "found", optimiser):
        torch.testing.assert_close(found, flat(model), rtol=1e-5, atol=1e-8)  # Adam divides what is rounded by itself
