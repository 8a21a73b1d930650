from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from hfft.contrastive.embeddings import Embeddings
from hfft.contrastive_step import ContrastiveStep
from hfft.registry import get
from tests.pair_models import SIDE, WORDS, clip, dual, siglip

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "clip": (clip, "softmax"),
    "siglip": (siglip, "sigmoid"),
    "dual": (dual, "softmax"),
}
PAIRS = 8


def task(loss: str) -> Any:
    kind = get("zero-shot-image-classification")
    return kind(kind.Options.model_validate({"loss": loss}))


def model_of(kind: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = MODELS[kind][0]()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
        elif name == "logit_scale":
            nn.init.constant_(parameter, 1.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model.train()


def batch(model: Any) -> dict[str, Tensor]:
    """Eight pairs; the first two have one image, the third and the last one text."""
    random = torch.Generator().manual_seed(1)
    image_keys, text_keys = torch.arange(PAIRS), torch.arange(PAIRS)
    image_keys[1], text_keys[7] = 0, 2
    ids = torch.randint(4, len(WORDS), (PAIRS, 7), generator=random)
    ids[:, 0], ids[:, -1] = 2, 3
    found = {
        "pixel_values": torch.randn(PAIRS, 3, SIDE, SIDE, generator=random),
        "input_ids": ids,
        "labels": torch.stack([image_keys, text_keys], dim=1),
    }
    if model.config.model_type != "siglip":
        found["attention_mask"] = torch.ones_like(ids)
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def stepped(
    kind: str, chunk: int | None, *, dropout: float = 0.0, mine: slice = slice(None)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of one step, and every parameter's gradient."""
    accelerator = Accelerator(cpu=True)
    bare = model_of(kind, dropout)
    model = accelerator.prepare_model(bare)
    inputs = {name: value[mine] for name, value in batch(bare).items()}
    torch.manual_seed(2)
    step = ContrastiveStep(task(MODELS[kind][1]), accelerator, chunk)
    loss = step(model, inputs, items=2 * PAIRS)
    return loss, gradients(bare)


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("chunk", [1, 3, 4])  # three leaves a smaller piece
def test_pieces_have_the_gradient_of_the_whole(kind: str, chunk: int) -> None:
    loss, expected = stepped(kind, None)
    in_pieces, found = stepped(kind, chunk)
    torch.testing.assert_close(in_pieces, loss, rtol=1e-5, atol=1e-6)
    close(found, expected)
    assert found["logit_scale"].abs() > 1e-4


def test_gradient_of_the_whole_is_that_of_autograd_through_the_logits() -> None:
    model = model_of("clip")
    inputs = batch(model)
    inputs["labels"] = torch.arange(PAIRS)[:, None].expand(-1, 2).contiguous()
    accelerator = Accelerator(cpu=True)
    ContrastiveStep(task("softmax"), accelerator, 2)(model, inputs, items=2 * PAIRS)
    found = gradients(model)
    model.zero_grad()
    labels = inputs.pop("labels")
    assert len(labels.unique()) == PAIRS
    model(**inputs, return_loss=True).loss.backward()  # of transformers
    close(found, gradients(model))


def test_a_piece_passes_with_the_dropout_of_the_first_time() -> None:
    """The embeddings that the loss is of are those that the second pass hands its gradient to."""
    model = model_of("dual", dropout=0.3)
    inputs = batch(model)
    labels = inputs.pop("labels")
    torch.manual_seed(2)
    pieces = [model(**{n: v[at : at + 2] for n, v in inputs.items()}) for at in range(0, PAIRS, 2)]
    parts = [Embeddings.of(piece, model, "image") for piece in pieces]
    whole = Embeddings(
        torch.cat([part.other for part in parts]),
        torch.cat([part.text for part in parts]),
        parts[0].scale,
        None,
    )
    own = task("softmax")
    (own.contrast(whole, labels, across=False) / (2 * PAIRS)).backward()
    expected = gradients(model)
    close(stepped("dual", 2, dropout=0.3)[1], expected)
    with pytest.raises(AssertionError):
        close(stepped("dual", 2)[1], expected)  # dropout does matter here


def test_training_goes_on_with_the_random_numbers_of_one_pass() -> None:
    after = []
    for chunk in (None, 4):
        stepped("dual", chunk, dropout=0.0)
        after.append(torch.rand(3))
    assert torch.equal(after[0], after[1])


def test_what_is_frozen_gets_no_gradient() -> None:
    accelerator = Accelerator(cpu=True)
    found = []
    for chunk in (None, 3):
        model = model_of("clip")
        model.vision_model.requires_grad_(False)
        inputs = batch(model)
        ContrastiveStep(task("softmax"), accelerator, chunk)(model, inputs, items=2 * PAIRS)
        found.append(gradients(model))
    assert not [name for name in found[0] if name.startswith("vision_model")]
    close(found[1], found[0])


def _one_of_two(expected: dict[str, Any]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process it is a fork of
    assert Accelerator(cpu=True).num_processes == dist.get_world_size() == 2
    rank = dist.get_rank()
    mine = slice(rank * PAIRS // 2, (rank + 1) * PAIRS // 2)
    for kind, (loss, one) in expected.items():
        for chunk in (None, 1, 2, 3):
            part, found = stepped(kind, chunk, mine=mine)
            close(found, one)
            dist.all_reduce(part)
            torch.testing.assert_close(part / 2, loss, rtol=1e-5, atol=1e-6)


def test_two_processes_have_the_gradient_of_one() -> None:
    """Of softmax and sigmoid losses, whole and in pieces; the temperature's too."""
    one = {kind: copy.deepcopy(stepped(kind, None)) for kind in MODELS}
    debug_launcher(_one_of_two, (one,), num_processes=2)
