"""The one pass writes the same bytes however it is cut short, and leaves nothing broken."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hfft.examples import ExampleDataset
from hfft.features.analysis import find_cut
from hfft.features.cut import NoCutError
from hfft.features.fill import Target, fill, rows_per_chunk
from hfft.features.prepare import prepare
from hfft.features.replay import FEATURE, capture
from hfft.features.room import cache_root, list_entries
from hfft.features.store import open_entry
from hfft.features.stored import Layout
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import find_layer_groups

from .cases import freeze
from .training import collate, examples_of, new_model, setting, wanted

COUNT = 23


def one_process(index: int = 0, of: int = 1) -> Any:
    device = torch.device("cpu")
    return SimpleNamespace(process_index=index, num_processes=of, device=device)


def targets(
    root: Path, family: str, depths: Sequence[int], examples: ExampleDataset, rows: int = 5
) -> tuple[Any, list[Target]]:
    model = new_model(family, 1)
    groups, found = find_layer_groups(model), []
    probe = collate([examples.version(n, 0) for n in (0, 1)])
    for depth in depths:
        with kept_in_eval(freeze(model, groups.frozen(depth))):
            cut = find_cut(model, probe)
        layout = Layout.of(cut, examples, None)
        entry = open_entry(
            root,
            f"{depth:08d}",
            examples=len(examples) * (examples.views or 1),
            columns=layout.columns,
            rows_per_chunk=rows,
            description={},
        )
        found.append(Target(entry, layout))
    return model.eval(), found


def filled(model: Any, some: list[Target], examples: ExampleDataset, **changes: Any) -> None:
    options: dict[str, Any] = {
        "batch_size": 2,
        "autocast": nullcontext,
        "processes": one_process(),
        **changes,
    }
    lacking = [(target, target.entry.missing()) for target in some]
    fill(model, lacking, examples, collate, **options)


def files(target: Target) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(target.entry.folder.glob("chunk*"))}


@pytest.mark.parametrize("family", ["bert", "timm-resnet"])
def test_all_rows_are_there_whatever_the_counts(family: str, tmp_path: Path) -> None:
    examples = examples_of(family, COUNT)  # in chunks of 5, in batches of 2
    model, [target] = targets(tmp_path, family, [2], examples)
    filled(model, [target], examples)
    assert target.entry.missing() == []
    rows = target.entry.read()
    assert len(rows) == COUNT
    for n in range(COUNT):
        example = examples.version(n, 0)
        found = target.layout.example(rows[n])
        [[alone]] = capture(model, [target.layout.cut], collate([example]))
        assert found[FEATURE.format(0)].shape == alone[0].shape  # no padding
        torch.testing.assert_close(found[FEATURE.format(0)], alone[0])
        assert found["labels"] == example["labels"]
        assert found.get("input_ids") == example.get("input_ids")


def test_a_pass_cut_short_and_processes_that_share_it_write_the_same_bytes(tmp_path: Path) -> None:
    examples = examples_of("bert", COUNT)
    wholes, resumed, shared = (tmp_path / name for name in ("whole", "resumed", "shared"))
    model, [whole] = targets(wholes, "bert", [2], examples)
    filled(model, [whole], examples)
    model, [part] = targets(resumed, "bert", [2], examples)
    filled(model, [part], examples)
    for chunk in (0, 3):
        (part.entry.folder / f"chunk-{chunk:05d}.safetensors").unlink()
    (part.entry.folder / "chunk-00002.safetensors").write_bytes(b"cut short")
    assert part.entry.missing() == [0, 2, 3]
    kept = {name: (part.entry.folder / name).stat().st_mtime_ns for name in files(part)}
    filled(model, [part], examples)
    assert files(part) == files(whole)
    for name in ("chunk-00001.safetensors", "chunk-00004.safetensors"):
        assert (part.entry.folder / name).stat().st_mtime_ns == kept[name]
    model, [one] = targets(shared, "bert", [2], examples)
    for rank in (2, 0, 1):
        before = set(one.entry.missing())
        other = targets(shared, "bert", [2], examples)[1][0]
        if rank == 2:  # all see the same rows missing
            missing = other.entry.missing()
        other.entry.missing = lambda: missing  # type: ignore[method-assign] # noqa: B023
        filled(model, [other], examples, processes=one_process(rank, 3))
        assert before - set(one.entry.missing()) == set(missing[rank::3])
    assert files(one) == files(whole)


def test_workers_decode_the_same(tmp_path: Path) -> None:
    examples = examples_of("bert", COUNT)
    model, [one] = targets(tmp_path / "one", "bert", [2], examples)
    filled(model, [one], examples)
    model, [other] = targets(tmp_path / "other", "bert", [2], examples)
    filled(model, [other], examples, workers=2)
    assert files(one) == files(other)


def test_boundaries_share_a_pass(tmp_path: Path) -> None:
    examples = examples_of("bert", COUNT)
    model, [low, high] = targets(tmp_path, "bert", [1, 3], examples)
    seen: list[int] = []
    model.bert.embeddings.register_forward_hook(lambda *_: seen.append(1))
    filled(model, [low, high], examples)
    assert len(seen) == 4 * 3 + 2  # batches of the four chunks of 5 rows, and of the one of 3
    assert low.entry.missing() == high.entry.missing() == []


def test_every_view_is_stored(tmp_path: Path) -> None:
    plain = examples_of("timm-resnet", 7)

    def noisy(row: Any) -> dict[str, Any]:
        found = plain.transform(row)
        return found | {"pixel_values": found["pixel_values"] + torch.rand(())}

    examples = ExampleDataset(plain.rows, noisy, seed=1, views=3)
    model, [target] = targets(tmp_path, "timm-resnet", [3], examples)
    filled(model, [target], examples)
    rows = target.entry.read()
    assert len(rows) == 21
    for view, n in ((0, 3), (1, 3), (2, 6)):
        batch = collate([examples.version(n, view)])
        [[alone]] = capture(model, [target.layout.cut], batch)
        torch.testing.assert_close(rows[view * 7 + n][FEATURE.format(0)], alone[0])


def test_nothing_missing_is_no_pass(tmp_path: Path) -> None:
    examples = examples_of("bert", 7)
    model, [target] = targets(tmp_path, "bert", [2], examples)
    filled(model, [target], examples)

    def never(_: Any) -> Any:
        raise AssertionError("read")

    filled(model, [target], ExampleDataset(examples.rows, never))


def test_chunks_are_small_at_first_and_bounded() -> None:
    assert [rows_per_chunk(n) for n in (1, 32, 1000, 32_000)] == [32] * 4
    assert rows_per_chunk(32_001) == 64
    assert rows_per_chunk(10**7) == 256


# Examples unlike the others


def unlike(family: str, change: Any, at: int = 8) -> ExampleDataset:
    plain = examples_of(family, COUNT)

    def other(row: Any) -> dict[str, Any]:
        found = plain.transform(row)
        return change(found) if row["number"] == at else found

    return ExampleDataset(plain.rows, other)


def test_pictures_of_unequal_size_are_refused_and_nothing_is_left() -> None:
    """A ResNet would take them, one by one; its features would not be of one shape."""
    examples = unlike("timm-resnet", lambda one: one | {"pixel_values": torch.rand(3, 64, 64)})
    model = new_model("timm-resnet", 3)
    with kept_in_eval(model):
        made = prepare(model, wanted(model), [], {"train": examples}, setting(batch_size=1))
        assert made.cut is None
        assert made.datasets["train"] is examples
    assert list_entries(cache_root()) == []


def test_unequal_pictures_are_refused_by_name(tmp_path: Path) -> None:
    examples = unlike("timm-resnet", lambda one: one | {"pixel_values": torch.rand(3, 64, 64)})
    model, [target] = targets(tmp_path, "timm-resnet", [3], examples)
    with pytest.raises(NoCutError, match="pixel_values has not the same shape"):
        filled(model, [target], examples, batch_size=1)
    assert 1 in target.entry.missing()  # the chunk it stands in
    assert target.entry.missing() == [1, 2, 3, 4]
    assert not list(target.entry.folder.glob("*.partial"))


def test_an_example_with_another_input_is_refused(tmp_path: Path) -> None:
    examples = unlike("bert", lambda one: {n: v for n, v in one.items() if n != "labels"})
    model, [target] = targets(tmp_path, "bert", [2], examples)
    with pytest.raises((NoCutError, KeyError)):
        filled(model, [target], examples, batch_size=1)


def test_labels_of_unequal_kind_are_refused_and_training_goes_on_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    examples = unlike("bert", lambda one: one | {"labels": [1, 0]})
    model = new_model("bert", 2)
    with kept_in_eval(model):
        made = prepare(model, wanted(model), [], {"train": examples}, setting(batch_size=1))
    assert made.cut is None
    assert "computed in every epoch: input.labels has not the same shape" in caplog.text


def test_what_is_no_tensor_in_a_batch_goes_along() -> None:
    """As `return_loss=True`, without which CLIP answers no loss."""
    model = new_model("clip", (1, 3))
    own = setting(collate=lambda rows: {**collate(rows), "return_loss": True})
    with kept_in_eval(model):
        made = prepare(model, wanted(model), [], {"train": examples_of("clip")}, own)
    assert made.cut is not None
    batch = made.collate([made.datasets["train"][n] for n in range(3)])
    assert batch["return_loss"] is True
    made.close()


def test_padding_that_is_read_is_found_though_the_first_examples_have_none() -> None:
    """A BERT whose texts are padded on the left looks at the first padding, not at [CLS]."""
    lengths = [4, 4, 6, 3, 6]
    rows = [{"number": n} for n in range(len(lengths))]

    def words(row: Any) -> dict[str, Any]:
        return {"input_ids": [3 + row["number"]] * lengths[row["number"]], "labels": 0}

    def padded(some: Any) -> dict[str, Any]:
        flipped = collate([one | {"input_ids": one["input_ids"][::-1]} for one in some])
        return {name: v.flip(1) if v.dim() == 2 else v for name, v in flipped.items()}

    model = new_model("bert", 2)
    examples = {"train": ExampleDataset(rows, words)}
    with kept_in_eval(model):
        made = prepare(model, wanted(model), [], examples, setting(collate=padded))
    assert made.cut is None
