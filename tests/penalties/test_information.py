"""The diagonal Fisher information, against Jacobians written out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from hfft.errors import InputError
from hfft.hooks.penalty import PenaltyCallback
from hfft.penalties.information import diagonal_fisher
from hfft.penalties.penalty import LabelledBatches

from ..families import FAMILIES
from .training import Gradients, assert_same, batch, elsewhere, gradients_of, make, train


class Net(nn.Module):
    """Two layers, with dropout and BatchNorm between them."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.drop, self.two = nn.Dropout(0.5), nn.Linear(5, classes)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.two(self.drop(self.norm(self.one(inputs)).tanh()))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


class Linear(nn.Module):
    """Softmax regression; positions where there are some."""

    def __init__(self, classes: int = 3, loss_type: str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 2, dtype=torch.float64))
        self.loss_type = loss_type

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        return {"logits": inputs @ self.weight.T}


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().double()


def examples(count: int = 6) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, 4, generator=random, dtype=torch.float64)
    return {"inputs": inputs, "labels": torch.arange(count) % 3}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(model: Any, whole: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    model = deepcopy(model).eval()
    total = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for n in range(len(whole["labels"])):
        model.zero_grad()
        log_p = model(whole["inputs"][n : n + 1]).logits.log_softmax(-1)[0, whole["labels"][n]]
        log_p.backward()
        for name in names:
            total[name] += model.get_parameter(name).grad.square() / len(whole["labels"])
    return total


def test_given_labels_give_the_mean_square_of_each_examples_gradient_at_the_source() -> None:
    model, source = net(), values(net(1))
    del source["one.bias"]
    at_source = net(1)
    at_source.one.bias.data.copy_(model.one.bias)
    whole = examples()
    expected = by_hand(at_source, whole, list(source))
    for batches in (
        [whole],
        [{n: v[:4] for n, v in whole.items()}, {n: v[4:] for n, v in whole.items()}],
    ):
        found = diagonal_fisher(model, source, batches, examples=100, labels="given")
        assert found.keys() == source.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def test_no_more_examples_are_used_than_were_asked_for() -> None:
    model, whole = net(), examples()
    found = diagonal_fisher(model, values(model), [whole] * 2, examples=4, labels="given")
    expected = by_hand(model, {n: v[:4] for n, v in whole.items()}, list(found))
    torch.testing.assert_close(found, expected)


def expectation(weight: Tensor, inputs: Tensor) -> Tensor:
    """The exact information of softmax regression: a sum over classes, (N, D) to (K, D)."""
    p = (inputs @ weight.T).softmax(-1)
    total = torch.zeros_like(weight)
    for label in range(len(weight)):
        gradient = (functional.one_hot(torch.tensor(label), len(weight)) - p)[..., None]
        total += (p[:, label, None, None] * (gradient * inputs[:, None]).square()).mean(0)
    return total


def assert_near(found: Tensor, expected: Any) -> None:
    """Within what some thousand draws leave to chance."""
    assert float((found - expected).norm() / expected.norm()) < 0.08


def test_sampled_labels_approach_the_sum_over_classes() -> None:
    torch.manual_seed(0)
    model = Linear()
    inputs = torch.randn(1, 2, dtype=torch.float64).repeat(3000, 1)
    found = diagonal_fisher(model, values(model), [{"inputs": inputs}], examples=3000)["weight"]
    assert_near(found, expectation(model.weight.detach(), inputs[:1]))


def test_of_tokens_those_with_a_label_count_and_their_log_probabilities_add_up() -> None:
    torch.manual_seed(0)
    model = Linear()
    inputs = torch.randn(1, 3, 2, dtype=torch.float64).repeat(3000, 1, 1)
    labels = torch.tensor([[0, -100, 2]]).repeat(3000, 1)
    batches = [{"inputs": inputs, "labels": labels}]
    found = diagonal_fisher(model, values(model), batches, examples=3000)["weight"]
    weight = model.weight.detach()
    # scores of different tokens are independent and have mean 0
    assert_near(found, sum(expectation(weight, inputs[0, n : n + 1]) for n in (0, 2)))


def test_a_causal_model_predicts_the_next_token() -> None:
    torch.manual_seed(0)
    model = Linear(loss_type="ForCausalLM")
    inputs = torch.randn(1, 3, 2, dtype=torch.float64).repeat(2000, 1, 1)
    labels = torch.tensor([[0, 1, -100]]).repeat(2000, 1)
    batches = [{"inputs": inputs, "labels": labels}]
    found = diagonal_fisher(model, values(model), batches, examples=2000)["weight"]
    assert_near(found, expectation(model.weight.detach(), inputs[0, :1]))


@pytest.mark.parametrize("labels", ["given", "sampled"])
def test_batches_with_a_loss_of_their_own_have_labels_aligned_with_the_logits(
    labels: Literal["given", "sampled"],
) -> None:
    """As tasks have; a causal model's own labels stand one place further on."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    model = GPT2LMHeadModel(config).eval()
    model.loss_type = "ForCausalLM"  # type: ignore[assignment]
    ids = torch.randint(11, (4, 6))
    whole = ids[:, 1:].clone()
    whole[:, :2] = -100
    native = [{"input_ids": ids, "labels": torch.cat([ids[:, :1] * 0 - 100, whole], 1)}]
    aligned = [{"input_ids": ids, "labels": torch.cat([whole, ids[:, :1] * 0 - 100], 1)}]

    def loss(outputs: Any, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())

    options: Any = {"examples": 4, "labels": labels, "names": ["transformer.h.0.ln_1.weight"]}
    expected = diagonal_fisher(model, values(model), native, **options)
    found = diagonal_fisher(model, values(model), LabelledBatches(aligned, loss), **options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_the_draws_are_the_same_every_time_and_the_labels_do_not_matter() -> None:
    model, whole = net(), examples()
    torch.manual_seed(1)
    one = diagonal_fisher(model, values(model), [whole], examples=6)
    torch.manual_seed(2)
    two = diagonal_fisher(model, values(model), [{"inputs": whole["inputs"]}], examples=6)
    assert all(torch.equal(one[name], two[name]) for name in one)


class Unusable(Exception):
    """What a broken batch raises."""


def broken() -> Iterator[dict[str, Tensor]]:
    yield examples()
    raise Unusable


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_left_as_it_was(breaks: bool) -> None:
    model = net().train()
    model.norm.eval()
    model.one.weight.requires_grad_(False)
    model.two.weight.grad = torch.ones_like(model.two.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    torch.manual_seed(5)
    random = torch.get_rng_state()
    source = values(net(1))
    kept = {name: value.clone() for name, value in source.items()}
    if breaks:
        with pytest.raises(Unusable):
            diagonal_fisher(model, source, broken(), examples=100)
    else:
        diagonal_fisher(model, source, [examples()], examples=100)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [m.training for m in (model, model.drop, model.norm)] == [True, True, False]
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]
    assert torch.equal(model.two.weight.grad, torch.ones_like(model.two.weight))
    assert model.one.bias.grad is None
    assert all(torch.equal(kept[name], value) for name, value in source.items())
    assert not any(value.requires_grad for value in source.values())


def test_a_source_in_half_precision_is_computed_with_in_the_models() -> None:
    model = make("bert")
    source = {name: value.bfloat16() for name, value in values(model).items()}
    found = diagonal_fisher(model, source, [batch("bert")], examples=2)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert found["classifier.weight"].isfinite().all()


@pytest.mark.parametrize("family", ["vit", "timm-resnet", "bert", "gpt2-words", "t5"])
def test_models_of_many_families_are_measured(family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family].make()
    inputs = FAMILIES[family].example()
    if family == "gpt2-words":
        inputs["labels"] = inputs["input_ids"]
    for labels in ("sampled", "given"):
        if "labels" not in inputs and labels == "given":
            continue
        found = diagonal_fisher(model, values(model), [inputs], examples=5, labels=labels)
        assert found.keys() == values(model).keys()
        assert all(value.isfinite().all() and (value >= 0).all() for value in found.values())


def test_without_examples_that_is_said() -> None:
    with pytest.raises(InputError, match="there are none; give batches"):
        PenaltyCallback(make("bert"), "fisher", 1.0)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ((2, 1), torch.zeros(2)),  # a regression
        ((2, 4), torch.zeros(2, 4)),  # several labels at once
        ((2, 4, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long)),  # classes of pixels
    ],
)
def test_what_has_no_class_to_draw_is_refused(logits: tuple[int, ...], labels: Tensor) -> None:
    model = nn.Linear(1, 1)
    model.forward = lambda inputs, labels: {"logits": inputs * model.weight.sum()}  # type: ignore
    batches = [{"inputs": torch.ones(logits), "labels": labels}]
    with pytest.raises(InputError, match="set labels: given"):
        diagonal_fisher(model, values(model), batches, examples=2)


def test_a_model_without_logits_loss_or_information_is_told_so() -> None:
    model, whole = net(), examples()
    with pytest.raises(InputError, match="no loss; give the batches labels"):
        diagonal_fisher(
            model, values(model), [{"inputs": whole["inputs"]}], examples=2, labels="given"
        )
    flat = Linear()
    with pytest.raises(InputError, match="all gradients on 2 examples are 0"):
        diagonal_fisher(flat, values(flat), [{"inputs": torch.zeros(2, 2).double()}], examples=2)


@contextmanager
def joined(rank: int, world: int, folder: str) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    yield
    dist.destroy_process_group()


def measure(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    with joined(rank, world, folder):
        assert dist.get_world_size() == world == 2
        model = net()
        found = diagonal_fisher(model, values(model), [examples(5)], examples=100)
        torch.save(found, f"{folder}/{rank}.pt")


def test_a_process_takes_every_nth_example(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    alone = diagonal_fisher(net(), values(net()), [examples(5)], examples=100)
    for rank in range(2):
        pretended = SimpleNamespace(
            is_initialized=lambda: True,
            get_world_size=lambda: 2,
            get_rank=lambda rank=rank: rank,
            get_backend=lambda: "gloo",
            all_reduce=lambda total: None,
        )
        monkeypatch.setattr("hfft.penalties.information.dist", pretended)
        parts.append(diagonal_fisher(net(), values(net()), [examples(5)], examples=100))
    for name, value in alone.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


@pytest.mark.slow
def test_processes_share_the_examples_and_all_get_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(measure, (2, str(tmp_path)), nprocs=2)
    alone = diagonal_fisher(net(), values(net()), [examples(5)], examples=100)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), alone)


@pytest.mark.parametrize("labels", ["sampled", "given"])
def test_fisher_in_training_adds_its_gradient_and_holds_what_matters(
    labels: str, tmp_path: Path
) -> None:
    model, other = make("bert"), make("bert")
    source = elsewhere(model)
    callback = PenaltyCallback(
        model, "fisher", 2.0, source=source, batches=[batch("bert")], labels=labels
    )
    information = diagonal_fisher(
        other,
        source,
        [batch("bert")],
        examples=256,
        labels=labels,  # type: ignore[arg-type]
    )
    r = torch.stack(
        [
            0.5 * (information[name] * (p - source[name]).square()).sum()
            for name, p in other.named_parameters()
        ]
    ).sum()
    expected = gradients_of(other(**batch("bert")).loss + 2 * r, other)
    seen = AtTheStep()
    log = train(model, "bert", tmp_path, callback, seen)
    assert log[0]["fisher"] > 0
    assert_same(seen.steps[0], expected)
    ends = []
    for strength in (0.0, 1e3, 1e5):
        model = make("bert")
        callback = PenaltyCallback(
            model, "fisher", strength, batches=[batch("bert")], labels=labels
        )
        ends.append(train(model, "bert", tmp_path, callback, max_steps=8)[-1]["fisher"])
    assert ends[0] > ends[1] > ends[2] > 0


class AtTheStep(Gradients):
    """Looks after the penalty on weights was added, which is inside the optimizer's step."""

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **kwargs: Any) -> None:
        pass

    def on_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        Gradients.on_pre_optimizer_step(self, *args, model=model, **kwargs)
