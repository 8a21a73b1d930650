"""Mixout: what is computed with is mixed, what is trained and saved is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hfft.errors import InputError
from hfft.hooks.freeze import FreezeCallback
from hfft.hooks.mixout import MixoutCallback, mixed, mixed_out

from ..families import FAMILIES, bert, vit


def trainer(
    model: Any, family: str, folder: Path, *callbacks: TrainerCallback, **changes: Any
) -> Trainer:
    inputs = FAMILIES[family].example()
    data: Any = [
        {name: value[number] for name, value in inputs.items()} | {"labels": torch.tensor(number)}
        for number in range(2)
    ]
    arguments: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "save_strategy": "no",
        **changes,
    }
    fixed: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings = TrainingArguments(
        output_dir=str(folder), dataloader_pin_memory=False, **fixed, **arguments
    )
    return Trainer(model=model, args=settings, train_dataset=data, callbacks=[*callbacks])


def copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def far(model: nn.Module) -> dict[str, Tensor]:
    """A source that no weight is near to."""
    return {name: torch.full_like(value, 5.0) for name, value in model.state_dict().items()}


def untouched(model: nn.Module) -> bool:
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "weight" in vars(module)
        for module in model.modules()
    )


def kept(shape: Any, p: float, seed: int) -> Tensor:
    """The mask, 1 where the weight itself is used, that a seed gives."""
    torch.manual_seed(seed)
    return functional.dropout(torch.ones(shape, dtype=torch.float64), p).sign()


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_mixed_weight_is_the_papers_formula_and_its_gradient_the_formulas() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    source, outer = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = 1 - kept(weight.shape, 0.7, seed=1)
    assert 0 < mask.sum() < 20
    torch.manual_seed(1)
    result = mixed(weight, source, 0.7)
    expected = (mask * source + (1 - mask) * weight - 0.7 * source) / (1 - 0.7)
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result, weight, outer)
    torch.testing.assert_close(gradient, outer * (1 - mask) / (1 - 0.7))


def test_expectation_of_the_mixed_weight_is_the_weight() -> None:
    torch.manual_seed(0)
    weight, source = torch.randn(2, 8, 8, dtype=torch.float64)
    draws, p = 4000, 0.8
    mean = torch.stack([mixed(weight, source, p) for _ in range(draws)]).mean(0)
    deviation = (weight - source).abs() * (p / (1 - p) / draws) ** 0.5  # of the mean
    assert ((mean - weight).abs() < 4.5 * deviation).all()


def test_where_nothing_was_learned_the_source_is_used_exactly() -> None:
    source = torch.randn(8, 8)
    assert torch.equal(mixed(source.clone(), source, 0.9), source)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(3, 4), (2, 3)),
        (lambda: Conv1D(4, 3), (2, 3)),
        (lambda: nn.Conv2d(3, 4, 2), (2, 3, 5, 5)),
        (lambda: nn.ConvTranspose1d(3, 4, 2), (2, 3, 5)),
    ],
)
def test_layers_compute_with_the_mixed_weight_and_learn_through_it(
    make: Callable[[], Any], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = make().double()
    inputs = torch.randn(shape, dtype=torch.float64)
    source = torch.randn_like(layer.weight)
    plain = deepcopy(layer)
    keep = kept(layer.weight.shape, 0.5, seed=1)
    with torch.no_grad():
        plain.weight.copy_(source + keep * (layer.weight - source) / 0.5)
    with mixed_out(layer, {"weight": source}, 0.5):
        torch.manual_seed(1)
        output = layer(inputs)
        output.square().sum().backward()
    expected = plain(inputs)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad * keep / 0.5)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_evaluation_is_with_the_weights_as_they_are_and_draws_nothing() -> None:
    model, inputs = nn.Linear(3, 3), torch.randn(2, 3)
    expected = model(inputs)
    with mixed_out(model, far(model), 0.5):
        model.eval()
        before = torch.get_rng_state()
        assert torch.equal(model(inputs), expected)
        assert torch.equal(torch.get_rng_state(), before)


def test_frozen_matrices_and_those_without_a_source_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    source = far(model)
    del source["1.weight"]
    seen: list[Tensor] = []
    for layer in model:
        layer.register_forward_hook(lambda layer, *_: seen.append(layer.weight))
    with mixed_out(model, source, 0.5):
        model(torch.randn(2, 3))
    assert [a is b.weight for a, b in zip(seen, model, strict=True)] == [True, True, False]


def test_biases_norms_and_embeddings_are_left_alone() -> None:
    model = bert()
    with mixed_out(model, far(model), 0.5):
        hooked = {type(module) for module in model.modules() if module._forward_pre_hooks}
    assert hooked == {nn.Linear}


def test_a_tied_matrix_is_mixed_in_each_layer_with_one_copy_of_its_source() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[1].weight = model[0].weight
    inputs = torch.randn(2, 3, dtype=torch.float64)
    source = {"1.weight": torch.randn(3, 3)}  # by its second name, in another dtype
    torch.manual_seed(1)
    one, two = (functional.dropout(torch.ones(3, 3).double(), 0.5) for _ in range(2))
    assert not torch.equal(one, two)
    base, weight = source["1.weight"].double(), model[0].weight
    expected = inputs @ (base + one * (weight - base)).T @ (base + two * (weight - base)).T
    (gradient,) = torch.autograd.grad(expected.sum(), weight)
    with mixed_out(model, source, 0.5):
        hooks = [next(iter(layer._forward_pre_hooks.values())) for layer in model]
        assert hooks[0].args[0] is hooks[1].args[0]  # type: ignore[attr-defined]
        torch.manual_seed(1)
        output = model(inputs)
        output.sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(model[0].weight.grad, gradient)


def test_words_tied_to_the_output_are_mixed_at_the_output_only() -> None:
    model = FAMILIES["gpt2-words"].make()
    with mixed_out(model, far(model), 0.5):
        assert model.lm_head._forward_pre_hooks
        assert not model.transformer.wte._forward_pre_hooks


def test_the_models_own_state_dict_is_a_source_that_training_does_not_move() -> None:
    model = nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()
    with mixed_out(model, model.state_dict(), 0.5):
        with torch.no_grad():
            model.weight += 1
        used = model(torch.eye(4)).T - before
    assert set(used.round().unique().tolist()) == {0, 2}


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_under_checkpointing_sees_the_same_mask(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 6)).double()
    inputs = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    gradients: list[list[Any]] = []
    with mixed_out(model, far(model), 0.5):
        for recompute in (False, True):
            torch.manual_seed(1)
            output = (
                checkpoint(model, inputs, use_reentrant=reentrant) if recompute else model(inputs)
            )
            torch.rand(3)  # something else draws before the recomputation
            model.zero_grad()
            output.sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
            assert not any("weight" in vars(layer) for layer in model)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_forward_that_raises_leaves_nothing_laid_over() -> None:
    model = nn.Linear(3, 3)
    with mixed_out(model, far(model), 0.5):
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(2, 7))
        assert "weight" not in vars(model)
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(2, 7))
    assert untouched(model)


def test_an_interrupt_in_a_forward_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 3)

    def interrupted(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt), mixed_out(model, far(model), 0.5):
        model(torch.randn(2, 3))
    assert untouched(model)


def test_state_dict_is_that_of_the_plain_model_even_inside_a_forward() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before, seen = copy(model), []
    model[0].register_forward_hook(lambda *_: seen.append(copy(model)))
    with mixed_out(model, far(model), 0.5):
        model(torch.randn(2, 3))
    assert same(seen[0], before)


def test_weights_under_autocast_are_mixed_in_their_own_precision() -> None:
    model = nn.Linear(3, 3)
    seen: list[Tensor] = []
    model.register_forward_hook(lambda layer, *_: seen.append(layer.weight), prepend=True)
    with mixed_out(model, far(model), 0.5), torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 3))
    assert (output.dtype, seen[0].dtype) == (torch.bfloat16, torch.float32)


def test_distributed_data_parallel_reduces_the_gradients_of_mixed_weights(
    process_group: None,
) -> None:
    model, inputs = nn.Linear(3, 3), torch.randn(2, 3)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with mixed_out(model, far(model), 0.5):
        for forward in (model, wrapped):
            model.zero_grad()
            torch.manual_seed(1)
            forward(inputs).square().sum().backward()
            gradient = model.weight.grad
            assert gradient is not None
            if forward is model:
                alone = gradient.clone()
    torch.testing.assert_close(gradient, alone)


@pytest.mark.parametrize(("family", "make"), [("vit", vit), ("bert", bert)])
def test_training_is_plain_with_p_0_and_mixed_above(
    family: str, make: Callable[[], Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    start = make()
    ends = []
    for p in (None, 0.0, 0.8):
        model = deepcopy(start)
        callback = None if p is None else MixoutCallback(model, p)
        run = trainer(model, family, tmp_path, *([callback] if callback else []))
        run.train()
        assert untouched(model)
        ends.append(copy(model))
    plain, none, mixes = ends
    assert same(plain, none)
    assert plain.keys() == mixes.keys()
    assert not same(plain, mixes)


@pytest.mark.parametrize("reentrant", [True, False])
def test_training_with_gradient_checkpointing_ends_with_the_same_weights(
    reentrant: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    start = bert(hidden_dropout_prob=0.1)
    ends, calls = [], []
    for recompute in (False, True):
        model = deepcopy(start)
        counted: list[int] = []
        layer = model.bert.encoder.layer[0].attention.self.query
        layer.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        run = trainer(
            model,
            "bert",
            tmp_path,
            MixoutCallback(model, 0.5),
            gradient_checkpointing=recompute,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        run.train()
        ends.append(copy(model))
        calls.append(len(counted))
    assert calls == [3, 6]  # it was recomputed
    assert same(*ends)


def test_a_resumed_training_goes_on_with_the_first_source(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = bert()
    ends = []
    for resumed in (False, True):
        model = deepcopy(start)
        saves: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        run = trainer(model, "bert", tmp_path, MixoutCallback(model, 0.5), **saves)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        ends.append(copy(model))
    assert same(*ends)


def test_the_callback_mixes_once_after_a_training_that_broke_off(tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("broke off")

    model = vit()
    callback = MixoutCallback(model, 0.5)
    with pytest.raises(RuntimeError, match="broke off"):
        trainer(model, "vit", tmp_path, callback, Breaks()).train()
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda *_: seen.append(len(model.classifier._forward_pre_hooks))
    )
    trainer(model, "vit", tmp_path, callback).train()
    handle.remove()
    assert seen == [1, 1, 1]
    assert untouched(model)


def test_a_source_for_the_body_leaves_the_head_plain(tmp_path: Path) -> None:
    model = vit()
    body = {name: value for name, value in copy(model).items() if "classifier" not in name}
    callback = MixoutCallback(model, 0.5, body)
    seen: list[bool] = []
    model.classifier.register_forward_hook(
        lambda head, *_: seen.append("weight" in vars(head)), prepend=True
    )
    trainer(model, "vit", tmp_path, callback).train()
    assert seen == [False] * 3


def test_what_the_freeze_callback_freezes_is_not_copied() -> None:
    model = bert()
    FreezeCallback(model, "backbone")
    callback = MixoutCallback(model, 0.5)
    assert callback._source.keys() == {"classifier.weight"}


@pytest.mark.parametrize("p", [-0.1, 1.0, 7, float("nan")])
def test_p_out_of_range_is_found_before_training(p: float) -> None:
    with pytest.raises(InputError, match=r"mixout: p is .*; give a number from 0 "):
        MixoutCallback(vit(), p)


def test_a_model_of_which_no_matrix_learns_is_found_before_training() -> None:
    with pytest.raises(InputError, match="learns in ViTForImageClassification; thaw some"):
        MixoutCallback(vit().requires_grad_(False), 0.5)


def test_a_source_with_other_names_is_told_the_nearest() -> None:
    with pytest.raises(InputError, match=r"such as 'weight'; did you mean 'weights'\?"):
        MixoutCallback(nn.Linear(2, 2), 0.5, {"weights": torch.ones(2, 2)})


def test_sources_of_another_shape_are_named_all_at_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    source = {"0.weight": torch.ones(2, 1), "1.weight": torch.ones(1)}
    with pytest.raises(InputError) as caught:
        MixoutCallback(model, 0.5, source)
    assert [message[:38] for message in caught.value.messages] == [
        "mixout: '0.weight' is (2, 1) in the so",
        "mixout: '1.weight' is (1,) in the sour",
    ]


def test_sharded_parameters_are_refused(process_group: None) -> None:
    model = nn.Linear(2, 2)
    mesh = init_device_mesh("cpu", (1,))
    shards = DTensor.from_local(model.weight.detach(), mesh, [Replicate()])
    model.weight = nn.Parameter(shards)
    with pytest.raises(InputError, match=r"sharded .*; launch with DDP"):
        MixoutCallback(model, 0.5)
