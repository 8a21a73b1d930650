"""A stage's features: found in the store, or computed in one pass, or left to every epoch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hfft.examples import ExampleDataset, unlike
from hfft.features.analysis import find_cut
from hfft.features.cut import Autocast, Cut, NoCutError, frozen_for_now, model_inputs, trimmed
from hfft.features.fill import Target, fill, idling, on_device, rows_per_chunk
from hfft.features.keys import digest, inputs_digest, model_identity, weights_digest
from hfft.features.replay import capture, replayed
from hfft.features.room import cache_root, default_limit, locked, make_room, remove
from hfft.features.seen import in_eval, near
from hfft.features.store import Entry, open_entry
from hfft.features.stored import Collate, Layout, StoredCollator, StoredExamples

logger = logging.getLogger("hfft")


@dataclass(frozen=True)
class Wanted:
    """What a stage wants stored.

    Attributes:
        frozen: names of the parameters below the cut, and of those frozen above it.
        splits: which data.
    """

    frozen: frozenset[str]
    splits: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """What the features of a run have in common.

    Attributes:
        identity: all that decides how examples become inputs, such as the processor's settings.
        fingerprints: of the data, by split.
        description: for `hfft cache ls`.
        collate: the task's.
        batch_size: examples that run together in the pass.
        autocast: the precision to compute in, and its name.
        dtype: of what is stored; None: as computed.
        limit: of the cache folder, in bytes; None: what it has, and half of the free disk.
        workers: processes that decode ahead.
        processes: that share the work.
    """

    identity: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    description: Mapping[str, Any]
    collate: Collate
    batch_size: int
    autocast: tuple[str, Autocast]
    dtype: torch.dtype | None
    limit: int | None
    workers: int
    processes: PartialState


@dataclass
class StageFeatures:
    """What the Trainer of a stage is given.

    Attributes:
        datasets: by split; stored ones for those that are.
        collate: of both kinds.
        cut: of the model; None: nothing is stored.
        report: what metrics.json says: bytes, seconds, and whether all had been there.
    """

    datasets: dict[str, Dataset[Any]]
    collate: Collate
    cut: Cut | None = None
    report: dict[str, Any] | None = None
    entries: list[Entry] = field(default_factory=list)

    def replayed(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Let the model take stored examples for the length of the context."""
        return nullcontext() if self.cut is None else replayed(model, self.cut)

    def close(self) -> None:
        """Let others remove the entries."""
        for entry in self.entries:
            entry.close()


def plain(examples: Mapping[str, ExampleDataset], collate: Collate) -> StageFeatures:
    """Return the features of a stage that stores none."""
    return StageFeatures(dict(examples), collate)


def prepare(
    model: PreTrainedModel,
    own: Wanted,
    later: Sequence[Wanted],
    examples: Mapping[str, ExampleDataset],
    setting: Setting,
    proved: dict[frozenset[str], Cut] | None = None,
) -> StageFeatures:
    """Have a stage's features in the store, and let its data be read from there.

    Whatever stands in the way (a model that can't be cut, a full disk) is said in one line, and the
    stage computes its frozen part in every epoch.

    Args:
        model: on its device, `requires_grad` set, frozen modules held in eval mode.
        own: what this stage wants.
        later: what stages after it want, whose frozen part is as it is now: the pass that is made
            for this stage serves them too.
        examples: all splits, the stored ones' transforms without chance (see
            ExampleDataset.views).
        setting: the rest.
        proved: cuts of this model by what is frozen below them, if any are known; new ones are
            added.
    """
    started = time.monotonic()
    work = _Preparation(model, examples, setting, {} if proved is None else proved)
    with torch.random.fork_rng():
        why = work.agreed(lambda: work.cut(own, later))
        why = why or work.agreed(work.open) or work.difference()
        new = not why and work.lacks_rows()
        if new:
            work.share()
            why = work.agreed(work.make_room) or work.agreed(work.fill)
        if new and not why and work.lacks_rows():
            why = "some files are missing; do all processes share the folder HFFT_CACHE?"
        data: dict[str, Dataset[Any]] = dict(examples)
        why = why or work.agreed(lambda: data.update(work.stored()))
    if why:
        work.agreed(work.close)
        logger.warning(f"the frozen layers are computed in every epoch: {why} ({work.root})")
        return plain(examples, setting.collate)
    layout = next(iter(work.own.values())).layout
    report = {
        "bytes": sum(target.entry.bytes for target in work.own.values()),
        "seconds": round(time.monotonic() - started, 3),
        "reused": not new,
    }
    logger.info(
        f"features {layout.cut.place}: {report['bytes'] / 1e6:.1f} MB, "
        + (f"computed in {report['seconds']:.1f} s" if new else "found in the cache")
    )
    collate = StoredCollator(setting.collate, layout)
    return StageFeatures(data, collate, layout.cut, report, [t.entry for t in work.targets])


class _Preparation:
    """The steps, each taken on all processes before the next."""

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Mapping[str, ExampleDataset],
        setting: Setting,
        proved: dict[frozenset[str], Cut],
    ) -> None:
        self.model, self.examples, self.setting = model, examples, setting
        self.proved = proved
        self.processes = setting.processes
        self.root = cache_root()
        self.cuts: list[tuple[Wanted, Layout]] = []
        self.targets: list[Target] = []
        self.own: dict[str, Target] = {}
        self.passes: dict[tuple[str, frozenset[str]], list[Target]] = {}  # by split and parts
        self.probe: list[dict[str, Any]] = []
        self.row_bytes: list[float] = []
        self.missing: dict[int, list[int]] = {}  # by target

    def agreed(self, step: Callable[[], None]) -> str:
        """Take a step; return what went wrong with it on any process."""
        error = ""
        try:
            step()
        except Exception as raised:
            # of CUDA, of a loader's workers, of a file: none is worth a run
            logger.debug("features", exc_info=True)
            expected = isinstance(raised, NoCutError | OSError)
            error = str(raised) if expected else f"{type(raised).__name__}: {raised}"
        errors = gather_object([error]) if self.processes.num_processes > 1 else [error]
        return next(filter(None, errors), "")

    def cut(self, own: Wanted, later: Sequence[Wanted]) -> None:
        """Cut the model for this stage, and for later ones where that can be done."""
        first = self.examples[own.splits[0]]
        if inputs_digest([first.version(0, 0)]) != inputs_digest([first.version(0, 0)]):
            raise NoCutError("the same example becomes other inputs each time")
        self.probe = unlike(first)
        batch = trimmed(self._batch(self.probe))
        autocast = self.setting.autocast[1]
        for wanted in (own, *later):
            try:
                if wanted.frozen not in self.proved:
                    with frozen_for_now(self.model, wanted.frozen):
                        self.proved[wanted.frozen] = find_cut(self.model, batch, autocast)
                layout = Layout.of(self.proved[wanted.frozen], first, self.setting.dtype)
                self._check(layout, self.examples[wanted.splits[0]].only(layout.parts))
                self.cuts.append((wanted, layout))
            except NoCutError:
                if wanted is own:
                    raise

    def _check(self, layout: Layout, below: ExampleDataset) -> None:
        """Raise NoCutError where what would be stored is random, or depends on other parts."""
        if below.views is None and _is_random(below):
            raise NoCutError("the training transform is random; set feature_cache.views")
        if not layout.above:
            return
        mixed = [
            {**one, **{name: other[name] for name in layout.above}}
            for one, other in zip(self.probe, self.probe[::-1], strict=True)
        ]
        with in_eval(self.model), self.setting.autocast[1]():
            [found], [again] = (
                capture(self.model, [layout.cut], idling(self._batch(examples), [layout]))
                for examples in (self.probe, mixed)
            )
        if not all(map(near, found, again)):
            raise NoCutError("what is frozen reads inputs that are not the frozen tower's")

    def open(self) -> None:
        """Open the entries of every split at every cut."""
        tokens = [len(example.get("input_ids", ())) for example in self.probe]
        opened: dict[str, Target] = {}
        inputs: dict[tuple[str, frozenset[str]], str] = {}
        model = model_identity(self.model)
        known: dict[str, str] = {}
        for number, (wanted, layout) in enumerate(self.cuts):
            stored = layout.bytes(sum(tokens) / len(tokens))
            below = weights_digest(self.model, wanted.frozen, known)
            for split in wanted.splits:
                examples = self.examples[split].only(layout.parts)
                if (split, layout.parts) not in inputs:
                    inputs[split, layout.parts] = inputs_digest(unlike(examples))
                decided = {"inputs": inputs[split, layout.parts], "model": model, "weights": below}
                key = self._key(split, examples, layout, **decided)
                if key in opened:  # the same cut, of a stage that differs above it
                    continue
                opened[key] = self._open(key, split, examples, layout)
                self.targets.append(opened[key])
                self.row_bytes.append(stored)
                self.passes.setdefault((split, layout.parts), []).append(opened[key])
                if number == 0:
                    self.own[split] = opened[key]

    def difference(self) -> str:
        """Return why processes can't share the entries, which their keys tell."""
        keys = "".join(target.entry.folder.name for target in self.targets)
        same = self.processes.num_processes == 1 or len(set(gather_object([keys]))) == 1
        return "" if same else "processes do not agree on the weights, the data or the cut"

    def lacks_rows(self) -> bool:
        """Whether any process misses rows of this stage."""
        lacking = any(target.entry.missing() for target in self.own.values())
        return any(gather_object([lacking])) if self.processes.num_processes > 1 else lacking

    def _open(self, key: str, split: str, examples: ExampleDataset, layout: Layout) -> Target:
        count = len(examples) * (examples.views or 1)
        described = {**self.setting.description, "split": split, "boundary": layout.cut.place}
        entry = open_entry(
            self.root,
            key,
            examples=count,
            columns=layout.columns,
            rows_per_chunk=rows_per_chunk(count),
            description=described,
        )
        return Target(entry, layout)

    def share(self) -> None:
        """Agree on what is missing, so that processes can share it out."""
        missing = [[target.entry.missing() for target in self.targets]]
        if self.processes.num_processes > 1:
            broadcast_object_list(missing)
        self.missing = dict(zip((id(t) for t in self.targets), missing[0], strict=True))

    def stored(self) -> dict[str, StoredExamples]:
        """Return the stored examples of this stage."""
        return {
            split: StoredExamples(self.examples[split], target.entry.read(), target.layout)
            for split, target in self.own.items()
        }

    def make_room(self) -> None:
        """Remove what was not used for longest, on the main process."""
        if not self.processes.is_main_process:
            return
        needed = sum(
            row_bytes * sum(len(target.entry.rows(chunk)) for chunk in self.missing[id(target)])
            for target, row_bytes in zip(self.targets, self.row_bytes, strict=True)
        )
        limit = self.setting.limit or default_limit(self.root)
        keep = {target.entry.folder.name for target in self.targets}
        make_room(self.root, int(needed), limit, keep)

    def fill(self) -> None:
        """Write what is missing."""
        setting = self.setting
        with in_eval(self.model):
            for (split, parts), targets in self.passes.items():
                fill(
                    self.model,
                    [(target, self.missing[id(target)]) for target in targets],
                    self.examples[split].with_stand_ins(parts),
                    setting.collate,
                    batch_size=setting.batch_size,
                    autocast=setting.autocast[1],
                    processes=self.processes,
                    workers=setting.workers,
                )

    def close(self) -> None:
        """Let go of the entries; those that can't be completed go from the disk."""
        unfinished = [t.entry.folder for t in self.targets if t.entry.missing()]
        for target in self.targets:
            target.entry.close()
        self.processes.wait_for_everyone()
        if self.processes.is_local_main_process and unfinished:
            with locked(self.root):
                for folder in unfinished:
                    remove(folder)

    def _key(self, split: str, examples: ExampleDataset, layout: Layout, **decided: Any) -> str:
        setting = self.setting
        return digest(
            {
                "identity": setting.identity,
                "data": [setting.fingerprints[split], len(examples)],
                "views": (examples.views, examples.seed) if examples.views else None,
                **decided,
                "slots": repr(layout.cut.slots),
                "columns": repr(layout.columns),
                "precision": setting.autocast[0],
            }
        )

    def _batch(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return on_device(model_inputs(self.setting.collate(examples)), self.model.device)


def _is_random(examples: ExampleDataset) -> bool:
    return inputs_digest([examples.version(0, 0)]) != inputs_digest([examples.version(0, 1)])
