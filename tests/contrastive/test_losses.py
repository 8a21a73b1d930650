from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import debug_launcher
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfft.contrastive.losses import Kind, contrastive_loss
from hfft.text.inputs import IGNORED
from tests.families import SMALL, WORDS, clip

KINDS: list[Kind] = ["softmax", "sigmoid"]
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@dataclass
class Given:
    """What a loss is given, and may learn."""

    first: Tensor
    second: Tensor
    scale: Tensor
    bias: Tensor | None
    keys: Tensor

    def learning(self) -> list[Tensor]:
        numbers = (self.first, self.second, self.scale, self.bias)
        return [t.requires_grad_() for t in numbers if t is not None]

    def part(self, mine: slice) -> Given:
        """Return copies, with some of the pairs."""
        bias = None if self.bias is None else self.bias.detach().clone()
        first, second = self.first[mine].detach().clone(), self.second[mine].detach().clone()
        return Given(first, second, self.scale.detach().clone(), bias, self.keys[mine])

    def loss(self, kind: Kind, **options: Any) -> Tensor:
        numbers = (self.first, self.second, self.scale, self.bias)
        return contrastive_loss(kind, *numbers, self.keys, **options)


def given(kind: Kind, n: int, repeats: Sequence[tuple[int, int, int]] = ()) -> Given:
    """Return n pairs in float64; of repeats (i, j, k), pair i has the image or text of pair j."""
    random = torch.Generator().manual_seed(n)
    first = torch.randn(n, 6, dtype=torch.float64, generator=random)
    second = first + torch.randn(n, 6, dtype=torch.float64, generator=random)
    keys = torch.stack([torch.randperm(n, generator=random), torch.randperm(n, generator=random)])
    for i, j, k in repeats:
        keys[k, i] = keys[k, j]
    return Given(
        functional.normalize(first, dim=1),
        functional.normalize(second, dim=1),
        torch.tensor(7.0, dtype=torch.float64),
        torch.tensor(-2.0, dtype=torch.float64) if kind == "sigmoid" else None,
        keys.T,
    )


# three of one image, two of one text, a pair that shares its text with a third
REPEATS = [(3, 1, 0), (8, 1, 0), (5, 12, 1), (9, 8, 1)]


def plain(kind: Kind, this: Given) -> Tensor:
    """Return the loss by the formula, through a matrix of all pairs."""
    counts = (this.keys != IGNORED).all(1)
    keys = this.keys[counts]
    logits = this.scale * this.first[counts] @ this.second[counts].T
    own = torch.eye(len(keys), dtype=torch.bool)
    same = (keys[:, None] == keys).any(-1) & ~own
    if kind == "sigmoid":
        assert this.bias is not None
        y = torch.where(own, 1.0, -1.0)
        return -2 * functional.logsigmoid(y * (logits + this.bias))[~same].sum()
    logits = logits.masked_fill(same, -torch.inf)
    places = torch.arange(len(keys))
    ways = (functional.cross_entropy(z, places, reduction="sum") for z in (logits, logits.T))
    return sum(ways, torch.zeros(()))


def assert_plain(kind: Kind, this: Given, **options: Any) -> None:
    learning = this.learning()
    expected, found = plain(kind, this), this.loss(kind, **options)
    torch.testing.assert_close(found, expected, **EXACT)
    by_autograd = torch.autograd.grad(expected, learning)
    (3 * found).backward()
    for tensor, gradient in zip(learning, by_autograd, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * gradient, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 8, 16, 512])
def test_it_is_the_plain_formula_and_its_gradient(kind: Kind, rows: int) -> None:
    assert_plain(kind, given(kind, 16), rows=rows)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_one_image_or_one_text_are_no_negatives(kind: Kind) -> None:
    this = given(kind, 16, REPEATS)
    assert_plain(kind, this, rows=5)
    apart = Given(this.first, this.second, this.scale, this.bias, given(kind, 16).keys)
    assert this.loss(kind) < apart.loss(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_that_are_all_the_same_leave_each_its_own(kind: Kind) -> None:
    this = given(kind, 4)
    this.keys = torch.zeros(4, 2, dtype=torch.int64)
    assert_plain(kind, this)


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_pairs_count_nothing(kind: Kind) -> None:
    this = given(kind, 16, REPEATS)
    this.keys[[0, 7, 15]] = IGNORED
    assert_plain(kind, this, rows=5)
    assert not this.first.grad[[0, 7, 15]].any()  # type: ignore[index]
    kept = [n for n in range(16) if n not in (0, 7, 15)]
    fewer = Given(this.first[kept], this.second[kept], this.scale, this.bias, this.keys[kept])
    torch.testing.assert_close(fewer.loss(kind), this.loss(kind), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_ignored_pairs_is_nothing_with_a_gradient_of_zeros(kind: Kind) -> None:
    this = given(kind, 3)
    this.keys[:] = IGNORED
    learning = this.learning()
    loss = this.loss(kind)
    assert loss == 0
    loss.backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in learning if t.grad is not None)
    assert None not in [t.grad for t in learning]


@pytest.mark.parametrize("kind", KINDS)
def test_one_pair_has_no_negatives(kind: Kind) -> None:
    assert_plain(kind, given(kind, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learns", ["first", "second", "scale"])
def test_gradients_do_not_depend_on_what_else_learns(kind: Kind, learns: str) -> None:
    this, alone = given(kind, 16, REPEATS), given(kind, 16, REPEATS)
    this.learning()
    this.loss(kind).backward()
    tensor = getattr(alone, learns).requires_grad_()
    alone.loss(kind, rows=5).backward()
    torch.testing.assert_close(tensor.grad, getattr(this, learns).grad, **EXACT)


def test_the_scale_learns_under_either_tower_locked() -> None:
    whole = given("softmax", 16)
    whole.learning()
    whole.loss("softmax").backward()
    for locked in ("first", "second"):
        this = given("softmax", 16)
        this.learning()
        getattr(this, locked).requires_grad_(False)
        this.loss("softmax").backward()
        torch.testing.assert_close(this.scale.grad, whole.scale.grad, **EXACT)
        assert getattr(this, locked).grad is None


def test_numbers_in_a_list_of_one_keep_their_shape() -> None:
    this, listed = given("sigmoid", 4), given("sigmoid", 4)
    assert this.bias is not None
    assert listed.bias is not None
    listed.scale, listed.bias = listed.scale[None], listed.bias[None]  # as SigLIP's are
    for one in (this, listed):
        one.learning()
        one.loss("sigmoid").backward()
    assert listed.bias.grad is not None
    assert listed.scale.grad is not None
    assert torch.equal(listed.bias.grad.squeeze(), this.bias.grad)  # type: ignore[arg-type]
    assert torch.equal(listed.scale.grad.squeeze(), this.scale.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_scale_overflows_nowhere(kind: Kind) -> None:
    this = given(kind, 16)
    this.second = -this.second  # own pairs are the furthest apart
    this.scale = torch.tensor(1000.0, dtype=torch.float64)
    single = Given(this.first.float(), this.second.float(), this.scale.float(), None, this.keys)
    single.bias = None if this.bias is None else this.bias.float()
    expected, by_autograd = plain(kind, this), single.learning()
    found = single.loss(kind, rows=5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found.backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in by_autograd)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_embeddings_are_computed_with_in_float32(
    kind: Kind, dtype: torch.dtype
) -> None:
    this = given(kind, 16, REPEATS)
    this.scale = this.scale.float()
    this.first, this.second = this.first.to(dtype), this.second.to(dtype)
    wide = this.part(slice(None))
    wide.first, wide.second = wide.first.float(), wide.second.float()
    narrow, full = this.learning(), wide.learning()
    found, expected = this.loss(kind), wide.loss(kind)
    assert torch.equal(found, expected)
    assert found.dtype is torch.float32
    found.backward()
    expected.backward()
    for tensor, right in zip(narrow, full, strict=True):
        assert tensor.grad is not None
        assert right.grad is not None
        assert tensor.grad.dtype is tensor.dtype
        assert torch.equal(tensor.grad, right.grad.to(tensor.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind: Kind) -> None:
    this, cast = given(kind, 16), given(kind, 16)
    for one in (this, cast):
        one.first, one.second = one.first.float(), one.second.float()
        one.learning()
    expected = this.loss(kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert (cast.first @ cast.second.T).dtype is torch.bfloat16
        found = cast.loss(kind)
        found.backward()
    expected.backward()
    assert torch.equal(found, expected)
    assert torch.equal(cast.first.grad, this.first.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_may_lie_in_memory_as_they_like(kind: Kind) -> None:
    this = given(kind, 16, REPEATS)
    wide = torch.stack([this.first, this.second], 2)
    this.first, this.second = wide[..., 0], wide[..., 1].T.contiguous().T
    this.keys = this.keys.T.contiguous().T
    assert not this.first.is_contiguous()
    assert_plain(kind, this, rows=5)


class Watch(TorchDispatchMode):
    """Sees the size of every tensor made, in numbers, and how many matrix products there are."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        sizes = [
            t.untyped_storage().nbytes() // t.element_size()
            for t in tree_leaves(made)
            if isinstance(t, Tensor)
        ]
        self.largest = max([self.largest, *sizes])
        return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeats", [[], REPEATS])
def test_no_tensor_is_larger_than_the_rows_that_are_looked_at(
    kind: Kind, repeats: list[tuple[int, int, int]]
) -> None:
    this = given(kind, 400, repeats)
    this.learning()
    with Watch() as watch:
        this.loss(kind, rows=20).backward()
    assert watch.largest == 20 * 400


@pytest.mark.parametrize(("kind", "products"), [("softmax", 4 * 3 - 1), ("sigmoid", 3 * 3)])
def test_logits_are_made_twice_at_most_and_once_without_a_gradient(
    kind: Kind, products: int
) -> None:
    this = given(kind, 12)
    this.learning()
    with Watch() as learning:
        this.loss(kind, rows=4).backward()
    assert learning.products == products  # the last logits serve twice
    with Watch() as evaluating, torch.no_grad():
        this.loss(kind, rows=4)
    assert evaluating.products == 3


def test_it_is_the_loss_of_transformers_clip() -> None:
    torch.manual_seed(0)
    assert_model_loss("softmax", clip().double().eval())


def test_it_is_the_loss_of_transformers_siglip() -> None:
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        text_config={**WORDS, **SMALL, "max_position_embeddings": 16, "num_hidden_layers": 1},
        vision_config={"image_size": 32, "patch_size": 8, **SMALL, "num_hidden_layers": 1},
    )
    assert_model_loss("sigmoid", transformers.SiglipModel(config).double().eval())


def assert_model_loss(kind: Kind, model: Any) -> None:
    outputs = model(
        input_ids=torch.randint(3, 20, (5, 7)),
        pixel_values=torch.randn(5, 3, 32, 32, dtype=torch.float64),
        return_loss=True,
    )
    keys = torch.arange(5)[:, None].expand(5, 2)
    numbers = model.logit_scale.exp(), model.logit_bias if kind == "sigmoid" else None
    found = contrastive_loss(kind, outputs.image_embeds, outputs.text_embeds, *numbers, keys) / 10
    torch.testing.assert_close(found, outputs.loss, **EXACT)
    learning = list(model.parameters())
    expected = torch.autograd.grad(outputs.loss, learning, retain_graph=True, allow_unused=True)
    own = torch.autograd.grad(found, learning, allow_unused=True)
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_it_is_the_loss_of_open_clip() -> None:
    this = given("softmax", 16)
    per_image = this.scale * this.first @ this.second.T
    per_text = this.scale * this.second @ this.first.T
    places = torch.arange(16)
    expected = functional.cross_entropy(per_image, places) + functional.cross_entropy(
        per_text, places
    )
    torch.testing.assert_close(this.loss("softmax") / 32, expected / 2, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_across_one_process_is_within_it(kind: Kind) -> None:
    this = given(kind, 16, REPEATS)
    assert torch.equal(this.loss(kind, across=True), this.loss(kind))


def compare(kind: Kind) -> None:
    """Compare two processes to the whole batch in one; they have the first and the other pairs."""
    assert dist.get_world_size() == 2
    cuts = [(0, 8, 16), (0, 11, 16), (0, 16, 16), (0, 0, 16), (0, 0, 0)]
    for repeats in ([], REPEATS):
        for cut in cuts:
            whole = given(kind, 16, repeats).part(slice(cut[-1]))
            compare_parts(kind, whole, list(pairwise(cut)), locked=None)
    whole = given(kind, 16, REPEATS)
    whole.keys[[0, 1, 15]] = IGNORED
    for locked in (None, "first", "second"):
        compare_parts(kind, whole, [(0, 8), (8, 16)], locked)


def compare_parts(
    kind: Kind, whole: Given, parts: list[tuple[int, int]], locked: str | None
) -> None:
    mine = slice(*parts[dist.get_rank()])
    own, reference = whole.part(mine), whole.part(slice(None))
    own.learning()
    reference.learning()
    if locked:
        getattr(own, locked).requires_grad_(False)
    loss = own.loss(kind, across=True, rows=3)
    loss.backward()
    expected = plain(kind, reference)
    expected.backward()
    shares = [loss.detach(), own.scale.grad, None if own.bias is None else own.bias.grad]
    reference_bias = None if reference.bias is None else reference.bias.grad
    for share, total in zip(
        shares, [expected.detach(), reference.scale.grad, reference_bias], strict=True
    ):
        if share is not None:
            dist.all_reduce(share)
            torch.testing.assert_close(share, total, **EXACT)
    for name in ("first", "second"):
        gradient = getattr(own, name).grad
        if name == locked:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, getattr(reference, name).grad[mine], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_loss_and_the_gradient_of_one(kind: Kind) -> None:
    debug_launcher(compare, (kind,), num_processes=2)
