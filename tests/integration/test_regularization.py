"""Each lever does what its paper says, on a case where it must matter."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback

from deploykit.errors import ArtifactError, UsageError
from deploykit.runtime.tokenizer import Encoded
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.fitting import EncodedTexts, fit
from deploykit.tasks.classification.losses import divergence, summed_loss
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.training.regularization import count_layers, depth_of, optimizers, regularization_callbacks

OPTIONS = ClassificationOptions(model="m", train="x.csv", learning_rate=1e-2, weight_decay=0.0)
TASK = Classification(("a", "b"), 8, 0)


@pytest.fixture
def model(make_tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(make_tiny_checkpoint(tmp_path / "model"))


def _train(model: Any, tmp_path: Path, steps: int = 3, **levers: Any) -> dict[str, torch.Tensor]:
    """Train for some steps, and return the weights from before."""
    from transformers import Trainer, TrainingArguments

    options = dataclasses.replace(OPTIONS, **levers)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": torch.tensor([2, 4 + i, 5, 3]), "labels": torch.tensor(i % 2)} for i in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            model=model, train_dataset=rows, callbacks=regularization_callbacks(options), optimizers=optimizers(model, options),
            args=TrainingArguments(
                output_dir=str(tmp_path / "out"), max_steps=steps, learning_rate=options.learning_rate, use_cpu=True,
                weight_decay=0.0, lr_scheduler_type="constant", report_to="none", save_strategy="no", disable_tqdm=True,
            ),
        ).train()  # fmt: skip
    return before


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("bert.embeddings.word_embeddings.weight", 0),
        ("bert.encoder.layer.0.attention.self.query.weight", 1),
        ("distilbert.transformer.layer.1.ffn.lin1.weight", 2),
        ("model.layers.3.mlp.up_proj.weight", 4),
        ("transformer.h.2.mlp.c_fc.weight", 3),
        ("transformer.wte.weight", 0),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", 2),
        ("shared.weight", 0),
        ("bert.pooler.dense.weight", 7),
        ("classifier.bias", 7),
    ],
)
def test_depths_of_several_families(name: str, depth: int) -> None:
    assert depth_of(name, 6) == depth


def test_frozen_layers_stay_as_they_are(model: Any, tmp_path: Path) -> None:
    before = _train(model, tmp_path, freeze_layers=1)
    changed = {depth_of(name, 2) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {2, 3}, "embeddings and the lowest layer are frozen"
    with pytest.raises(UsageError, match="the model has 2 layers"):
        _train(model, tmp_path, freeze_layers=3)


def test_layers_are_unfrozen_from_the_top(model: Any) -> None:
    (callback,) = regularization_callbacks(dataclasses.replace(OPTIONS, gradual_unfreezing=0.5))
    state = SimpleNamespace(global_step=0, max_steps=60)
    callback.on_train_begin(None, state, None, model=model)
    learning = []
    for state.global_step in (0, 9, 10, 20, 30, 59):
        callback.on_step_begin(None, state, None, model=model)
        learning.append(
            {depth_of(name, count_layers(model)) for name, p in model.named_parameters() if p.requires_grad}
        )
    assert learning == [{3}, {3}, {2, 3}, {1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}]


def test_lower_layers_learn_more_slowly(model: Any, tmp_path: Path) -> None:
    before = _train(model, tmp_path, steps=1, layerwise_lr_decay=0.5)
    # Adam's first step is as long as the learning rate, whatever the gradient.
    largest = dict.fromkeys(range(4), 0.0)
    for name, parameter in model.named_parameters():
        depth = depth_of(name, 2)
        largest[depth] = max(largest[depth], float((parameter.detach() - before[name]).abs().max()))
    assert [largest[d] for d in (3, 2, 1, 0)] == pytest.approx([1e-2, 5e-3, 2.5e-3, 1.25e-3], rel=0.01)


def test_l1_gives_zeros_and_l2_small_weights(model: Any, tmp_path: Path) -> None:
    def weights() -> torch.Tensor:
        return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if ".layer." in name and "norm" not in
                          name.lower() and "bias" not in name])  # fmt: skip

    plain = weights()
    _train(model, tmp_path, steps=5, l1=2.0)
    assert (weights() == 0).float().mean() > 0.1, "exactly zero"
    assert (plain == 0).float().mean() == 0
    size = float(weights().norm())
    _train(model, tmp_path, steps=5, l2=10.0)
    assert float(weights().norm()) < 0.95 * size


def test_focal_loss_is_cross_entropy_times_the_power_of_what_is_missing() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.5, 1.0], [-3.0, 3.0]]), torch.tensor([0, 0, 1])
    p = logits.softmax(dim=1)[torch.arange(3), labels]
    focal = summed_loss(TASK, logits, labels, dataclasses.replace(OPTIONS, focal_gamma=2.0), None)
    assert float(focal) == pytest.approx(float((-((1 - p) ** 2) * p.log()).sum()))
    assert float(summed_loss(TASK, logits, labels, OPTIONS, None)) == pytest.approx(float(-p.log().sum()))
    several = dataclasses.replace(TASK, multi_label=True)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    right = torch.where(targets > 0.5, logits, -logits).sigmoid()
    focal = summed_loss(several, logits, targets, dataclasses.replace(OPTIONS, focal_gamma=1.0), None)
    assert float(focal) == pytest.approx(float((-(1 - right) * right.log()).sum()))


def test_the_divergence_of_two_passes_is_kullback_leibler_both_ways() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(5, 2), torch.randn(5, 2)
    a, b = first.log_softmax(1), second.log_softmax(1)
    both = functional.kl_div(a, b, log_target=True, reduction="sum") + functional.kl_div(
        b, a, log_target=True, reduction="sum"
    )
    assert float(divergence(TASK, first, second)) == pytest.approx(0.5 * float(both), rel=1e-5)
    assert float(divergence(TASK, first, first)) == 0
    several = dataclasses.replace(TASK, multi_label=True)
    p, q = first.sigmoid(), second.sigmoid()
    expected = 0.5 * ((p - q) * (first - second)).sum()
    assert float(divergence(several, first, second)) == pytest.approx(float(expected), rel=1e-4)


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """The weights after each step, those that are evaluated, and those of the first step of the next run."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.evaluated: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append(_head(model))


def _head(model: Any) -> torch.Tensor:
    return model.classifier.weight.detach().clone()


@pytest.mark.parametrize(
    ("levers", "kept"),
    [
        ({"ema_decay": 0.6}, [0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15]),
        ({"swa_start": 0.5}, [0, 0, 0, 1 / 2, 2 / 3, 3 / 4]),
    ],
)
def test_averages_are_evaluated_kept_and_continued(
    levers: dict[str, float], kept: list[float], model: Any, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    first, before = copy.deepcopy(model), _head(model)
    rows = [{"input_ids": torch.tensor([2, 4 + i, 5, 3]), "labels": torch.tensor(i % 2)} for i in range(8)]

    def train(model: Any, folder: str, stop: int | None = None, resume: bool = False) -> _Recorder:
        recorder = _Recorder()
        # The recorder comes first, so that it sees the weights of the step.
        callbacks = [recorder, *regularization_callbacks(dataclasses.replace(OPTIONS, **levers))]

        def measure(prediction: Any) -> dict[str, float]:
            recorder.evaluated.append(_head(trainer.model))
            if len(recorder.evaluated) == stop:
                raise KeyboardInterrupt
            return {"selection": float(trainer.state.global_step)}  # the last evaluation is the best

        trainer = Trainer(
            model=model, train_dataset=rows, eval_dataset=rows, compute_metrics=measure, callbacks=callbacks,
            args=TrainingArguments(
                output_dir=str(tmp_path / folder), max_steps=6, learning_rate=1e-2, use_cpu=True, report_to="none",
                lr_scheduler_type="constant", eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, seed=1,
                load_best_model_at_end=True, metric_for_best_model="selection", greater_is_better=True, disable_tqdm=True,
            ),
        )  # fmt: skip
        try:
            trainer.train(resume_from_checkpoint=resume or None)
        except KeyboardInterrupt:
            assert stop
        return recorder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = train(model, "whole")
        expected, averages = before, []
        for weights, share in zip(whole.steps, kept):
            expected = share * expected + (1 - share) * weights
            averages.append(expected)
        assert len(whole.steps) == 6
        for evaluated, step in zip(whole.evaluated, (2, 4, 6)):
            assert torch.allclose(evaluated, averages[step - 1], atol=1e-6)
        assert torch.allclose(_head(model), averages[-1], atol=1e-6)
        assert not torch.allclose(_head(model), whole.steps[-1], atol=1e-6)
        train(first, "killed", stop=3)
        train(first, "killed", resume=True)
    assert torch.equal(_head(first), _head(model)), "a killed run ends the same"


Fitted = Callable[..., tuple[Any, list[str]]]


@pytest.fixture
def fitted(model: Any, tmp_path: Path) -> Fitted:
    """Train a copy of the model on token ids with their labels. Returns it, and what the run says."""

    def fit_rows(
        rows: list[tuple[int, int]], validation: Sequence[tuple[int, int]] = (), **levers: Any
    ) -> tuple[Any, list[str]]:
        options = dataclasses.replace(
            OPTIONS, **{"max_steps": 60, "per_device_train_batch_size": len(rows), "num_train_epochs": 1.0, "warmup_ratio": 0.0,
                        "lr_scheduler_type": "constant", "validation_fraction": 0.1 if validation else 0.0, **levers}
        )  # fmt: skip
        sets = [
            EncodedTexts(
                Encoded([[2, token, 3] for token, _ in part], [[0, 0, 0]] * len(part)),
                np.eye(2)[[label for _, label in part]], TASK,
            ) if part else None
            for part in (rows, validation)
        ]  # fmt: skip
        said: list[str] = []
        torch.manual_seed(0)
        work = tmp_path / f"fit{len(list(tmp_path.glob('fit*')))}"
        return fit(copy.deepcopy(model), sets[0], sets[1], options, work, said.append), said

    return fit_rows


def _probability(model: Any, token: int) -> float:
    """Return the probability of the second label."""
    with torch.inference_mode():
        return float(model(torch.tensor([[2, token, 3]])).logits.softmax(-1)[0, 1])


def test_class_weights_undo_the_imbalance(fitted: Fitted) -> None:
    rows = [(5, int(i == 0)) for i in range(10)]  # one text, of which one row in ten has the second label
    assert _probability(fitted(rows)[0], 5) == pytest.approx(0.1, abs=0.03)
    assert _probability(fitted(rows, class_weights="balanced")[0], 5) == pytest.approx(0.5, abs=0.05)


def test_label_smoothing_keeps_its_share_from_the_label(fitted: Fitted) -> None:
    rows = [(5, 0), (6, 1)]
    assert _probability(fitted(rows)[0], 6) > 0.98
    assert _probability(fitted(rows, label_smoothing_factor=0.2)[0], 6) == pytest.approx(0.9, abs=0.02)


def test_training_stops_early_where_the_validation_gets_worse(fitted: Fitted) -> None:
    rows, wrong = [(5, 0), (6, 1)], [(5, 1), (6, 0)]
    _, said = fitted(rows, wrong, eval_steps=5, early_stopping_patience=2)
    assert any(line.startswith("step 15 of 60") for line in said)
    assert not any(line.startswith("step 30 of 60") for line in said)
    _, said = fitted(rows, wrong, eval_steps=5)
    assert any(line.startswith("step 60 of 60") for line in said)


def test_decoupled_decay_takes_a_share_and_coupled_a_step(fitted: Fitted, model: Any) -> None:
    """The embedding of a token that no row has gets no gradient of its own: only the penalties move it (Loshchilov and
    Hutter, ICLR 2019)."""
    before = model.bert.embeddings.word_embeddings.weight[9].detach()

    def after(**levers: float) -> torch.Tensor:
        trained, _ = fitted([(5, 0), (6, 1)], max_steps=5, **levers)
        found: torch.Tensor = trained.bert.embeddings.word_embeddings.weight[9].detach()
        return found

    assert torch.equal(after(), before)
    assert torch.allclose(after(weight_decay=0.5), before * (1 - 1e-2 * 0.5) ** 5, rtol=1e-5)
    large = before.abs() > 0.1  # Adam's steps are as long as the rate, however small the weight is
    assert torch.allclose((before - after(l2=1e-2))[large], 5e-2 * before.sign()[large], rtol=0.05)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "classifier_dropout"])
def test_each_dropout_drops_while_training_alone(name: str, model: Any) -> None:
    def passes(**given: float) -> list[torch.Tensor]:
        changed = dataclasses.replace(OPTIONS, **given).dropout_config(model.config)
        config = type(model.config)(**{**model.config.to_dict(), **changed})
        again = type(model)(config)
        again.load_state_dict(model.state_dict())
        inputs = torch.tensor([[2, 5, 6, 7, 3]])
        return [again.train()(inputs).logits, again(inputs).logits, again.eval()(inputs).logits]

    torch.manual_seed(0)
    first, second, measured = passes(**{name: 0.5})
    assert not torch.allclose(first, second)
    plain, _, _ = passes(**{name: 0.0})
    assert torch.allclose(measured, plain, atol=1e-6), "nothing is dropped when it answers"


def test_passes_agree_more_after_r_drop(fitted: Fitted, model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    rows = [(token, token % 2) for token in range(4, 20)]

    def apart(trained: Any) -> float:
        torch.manual_seed(1)
        inputs = torch.tensor([[2, token, 3] for token, _ in rows] * 20)
        with torch.no_grad():
            return float(divergence(TASK, *(trained.train()(inputs).logits for _ in range(2)))) / len(inputs)

    assert apart(fitted(rows, learning_rate=2e-3, r_drop=5.0)[0]) < 0.5 * apart(fitted(rows, learning_rate=2e-3)[0])


@pytest.mark.parametrize("levers", [{"layerwise_lr_decay": 0.8}, {"gradual_unfreezing": 0.5}, {"freeze_layers": 1}])
def test_levers_by_layer_are_refused_where_layers_are_not_known(levers: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(vocab_size=20, embedding_size=8, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(UsageError, match="deploykit does not know the layers of a albert"):
        _train(AlbertForSequenceClassification(config), tmp_path, **levers)


def test_dropouts_go_by_the_names_of_the_configuration() -> None:
    from transformers import AlbertConfig, DebertaV2Config, ModernBertConfig, XLNetConfig

    options = dataclasses.replace(OPTIONS, dropout=0.3, classifier_dropout=0.5)
    assert options.dropout_config(AlbertConfig())["classifier_dropout_prob"] == 0.5
    assert options.dropout_config(DebertaV2Config(cls_dropout=0.1))["cls_dropout"] == 0.5
    assert options.dropout_config(ModernBertConfig())["mlp_dropout"] == 0.3
    with pytest.raises(UsageError, match="--classifier-dropout: a xlnet has no such dropout"):
        options.dropout_config(XLNetConfig())


def test_an_average_that_was_not_saved_before_a_kill_is_missed(tmp_path: Path) -> None:
    (averaging,) = regularization_callbacks(dataclasses.replace(OPTIONS, ema_decay=0.9))
    state, arguments = SimpleNamespace(global_step=4), SimpleNamespace(output_dir=str(tmp_path))
    with pytest.raises(ArtifactError, match="checkpoint-4: has no average of the weights"):
        averaging.on_train_begin(arguments, state, None, model=torch.nn.Linear(1, 1))
