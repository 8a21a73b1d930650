"""One training in execution: its stages one after the other, then its scores."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hfft.adapters import inject, merge, save_adapter, unmoved
from hfft.arguments import training_arguments
from hfft.average_scores import write_average
from hfft.checkpoints import SealCallback, seconds_of, step_of, write_json
from hfft.contrastive_task import ContrastiveTask
from hfft.encoding import Examples
from hfft.errors import RunFailedError
from hfft.examples import ExampleDataset
from hfft.features.stored import StoredExamples
from hfft.folder import RunFolder
from hfft.hooks import (
    EmaCallback,
    EpochCallback,
    LogCallback,
    LogitScaleCallback,
    MixoutCallback,
    PenaltyCallback,
    ProgressCallback,
    ReplicasCallback,
    StochNormCallback,
)
from hfft.hooks.freeze import kept_in_eval
from hfft.hooks.log import drop_unfinished
from hfft.optim import OptimizerState
from hfft.penalties.penalty import LabelledBatches
from hfft.penalty_plan import PlannedPenalty
from hfft.plan import Plan, PlannedStage, Trial
from hfft.processes import join_processes
from hfft.retention import Retention
from hfft.run_average import RunAverage
from hfft.sections import EmaAverage
from hfft.stage_data import StageData
from hfft.stage_models import StageModels
from hfft.subject import Subject
from hfft.table import write_csv
from hfft.task import Split
from hfft.trainer import NonFiniteLossError, StageTrainer

logger = logging.getLogger("hfft")

_TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class TrialRun:
    """A trial in execution, from its start or from where a stopped run left it.

    Args:
        plan: the run it belongs to.
        trial: which of the run's trials.
        folder: where its checkpoints, and the main trial's model, are kept.
        retention: what the trained model is to be scored by too; None: nothing.
    """

    def __init__(
        self, plan: Plan, trial: Trial, folder: RunFolder, retention: Retention | None = None
    ) -> None:
        self.plan, self.trial, self.folder = plan, trial, folder
        self.retention = retention
        self.processes = join_processes()
        self.spent_before = 0.0  # seconds, by earlier processes
        self._data = StageData(plan, trial)
        self._models = StageModels(plan, trial, folder)

    def result(self) -> dict[str, Any]:
        """Return the trial's stages and scores, from where an earlier process left off."""
        path = self.folder.trial_result(self.trial.name)
        if path.exists():
            done: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.spent_before += sum(stage["seconds"] for stage in done["stages"])
            return done
        finished = self._finished_stages()
        self.spent_before += sum(stage["seconds"] for stage in finished)
        model, state = self._models.entered(len(finished))
        trainer: StageTrainer | None = None
        for number in range(len(finished), len(self.trial.stages)):
            if trainer is not None:
                trainer.release()
                self._data.close()
                del trainer
                gc.collect()  # the old distributed wrapper's hooks go with it
                model, state = self._models.handed_on(number, model, state)
            trainer, stage = self._run_stage(number, model, state)
            names = {name for name, _ in model.named_parameters()}  # without a merged adapter's
            state = {n: s for n, s in trainer.optimizer_state().items() if n in names}
            finished.append(stage)
            if self.processes.is_main_process:
                self._models.checkpoints(number).finish(
                    model,
                    state,
                    stage,
                    self._models.untouched(number),
                    keep_checkpoints=self._models.are_members(number),
                )
                if number > 0 and not self._models.are_wanted(number - 1, number + 1):
                    self._models.checkpoints(number - 1).forget_weights()
            self.processes.wait_for_everyone()
        if trainer is None:  # stopped between the last stage and its scores
            number = len(finished) - 1
            self._freeze(number, model)
            args = self._arguments(number)
            self._data.open(number, model, args)
            trainer = self._trainer(number, model, args, OptimizerState(), spent=0.0, holds=())
        result = {"stages": finished, **self._score(trainer, model)}
        trainer.release()
        self._data.close()
        if self.retention is not None:
            result["retention"] = self.retention.score(model)
        if self.processes.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result)
        self.processes.wait_for_everyone()
        return result

    def _finished_stages(self) -> list[dict[str, Any]]:
        """Return what the stages that earlier processes finished came to."""
        finished: list[dict[str, Any]] = []
        for number in range(len(self.trial.stages)):
            result = self._models.checkpoints(number).result()
            if result is None:
                break
            finished.append(result)
        return finished

    def _run_stage(
        self, number: int, model: PreTrainedModel, state: OptimizerState
    ) -> tuple[StageTrainer, dict[str, Any]]:
        """Train one stage, from its newest checkpoint where there is one."""
        planned, checkpoints = self.trial.stages[number], self._models.checkpoints(number)
        stage = planned.stage
        if stage.lora is not None:
            head, seed = planned.subject.groups.head.parameters, self.plan.config.seed + number
            inject(model, stage.lora, head, seed=seed)
        self._freeze(number, model)
        newest = checkpoints.newest()
        first_step, spent = (step_of(newest), seconds_of(newest)) if newest else (0, 0.0)
        self.spent_before += spent
        carried = state if stage.carry_optimizer_state else OptimizerState()
        started = time.monotonic()
        args = self._arguments(number)
        workers = args.dataloader_num_workers
        self._data.open(number, model, args)
        trainer = self._trainer(number, model, args, carried, spent, self._holds(number, model))
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            checkpoints.discard_partial()
            drop_unfinished(self.folder.log, first_step, trial=self.trial.name, stage=stage.name)
        self.processes.wait_for_everyone()
        logger.info(
            "%s, stage %d of %d, %s: %d steps, %s of %s parameters learn%s",
            self.trial.name,
            number + 1,
            len(self.trial.stages),
            stage.name,
            planned.steps,
            f"{planned.trainable_parameters:,}",
            f"{planned.total_parameters:,}",
            f"; goes on from {newest.name}" if newest else "",
        )
        try:
            with kept_in_eval(model, adapted=stage.lora is not None):
                trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        except NonFiniteLossError as error:
            raise RunFailedError(self._what_is_left(error, number)) from error
        seconds = time.monotonic() - started
        train = planned.subject.examples["train"]
        examples = trainer.examples_trained() * len(train.split.encoded) / len(train)
        result = {
            "name": stage.name,
            **({} if planned.subject is self.plan.subject else {"task": planned.subject.task.name}),
            "epochs": round(trainer.state.epoch or 0.0, 4),
            "steps": trainer.state.global_step,
            "trainable_parameters": planned.trainable_parameters,
            "total_parameters": planned.total_parameters,
            "seconds": round(spent + seconds, 3),
            "examples_per_second": round(examples / seconds, 2),
            "feature_cache": self._data.report,
            "eval": self._eval_of(trainer),
        }
        if stage.lora is not None:
            self._data.forget_features()  # they enter the adapted model
            args.dataloader_num_workers = workers
            self._merge(model, planned, keep=not stage.lora.get("merge", False))
        return trainer, result

    def _merge(self, model: PreTrainedModel, planned: PlannedStage, *, keep: bool) -> None:
        """Add a stage's adapter to the weights; keep it apart too, if asked."""
        if still := unmoved(model):
            logger.warning(
                f"{planned.stage.name}: {len(still)} adapted layers did not learn, first "
                f"{still[0]}: the model uses their weights in another way than by calling them"
            )
        if keep and self.processes.is_main_process:
            source, folder = self.plan.config.model, self.folder.adapter
            partial = folder.with_name("adapter.partial")
            shutil.rmtree(partial, ignore_errors=True)
            head = planned.subject.groups.head.parameters
            save_adapter(model, partial, base=source.name, revision=source.revision, head=head)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        merge(model)

    def _what_is_left(self, error: Exception, number: int) -> str:
        """Say what broke, and which state is the last good one."""
        newest = self._models.checkpoints(number).newest()
        if newest is None and number > 0:
            newest = self._models.checkpoints(number - 1).finished
        left = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return (
            f"stage {self.trial.stages[number].stage.name}: {error}; {left}. Lower the stage's "
            f"learning_rate, or set training.max_grad_norm; the data may also hold values that "
            f"are no numbers"
        )

    def _eval_of(self, trainer: StageTrainer) -> dict[str, float]:
        """Return the scores on validation of the weights as they are now."""
        last = next((e for e in reversed(trainer.state.log_history) if "eval_loss" in e), None)
        fresh = last is not None and last["step"] == trainer.state.global_step
        if last is None or not fresh or trainer.args.load_best_model_at_end:
            last = trainer.evaluate()
        return _scores(last, "eval_")

    def _score(self, trainer: StageTrainer, model: PreTrainedModel) -> dict[str, Any]:
        """Score the trained model on validation and test; the main trial leaves its pictures."""
        result: dict[str, Any] = {"test": None}
        if self.trial.name == "main" and self.plan.config.average is not None:
            result["average"] = self._average(trainer, model)
        splits = self._data.splits
        predictions: Any = None
        for name, split in (("eval", "validation"), ("test", "test")):
            if split in splits:
                predictions = trainer.predict(splits[split], metric_key_prefix="eval")
                result[name] = _scores(predictions.metrics, "eval_")
        if self.trial.name == "main" and self.processes.is_main_process:
            self._save_model(model)
            self._write_details(predictions.predictions, predictions.label_ids, trainer.scored)
        return result

    def _average(self, trainer: StageTrainer, model: PreTrainedModel) -> dict[str, Any]:
        """Put the average that the run asks for in the place of the trained weights."""

        def score(split: str) -> dict[str, float] | None:
            data = self._data.splits.get(split)
            if data is None:
                return None
            return _scores(trainer.predict(data, metric_key_prefix="eval").metrics or {}, "eval_")

        average = RunAverage(self.plan, self._models, model, score, self.retention)
        last = len(self.trial.stages) - 1
        if average.changes(self.trial.stages[last].features.frozen):
            self._data.forget_features()  # they are of other weights
        found = average.run()
        if self.processes.is_main_process:
            write_average(self.folder.path, found)
        return found

    def _save_model(self, model: PreTrainedModel) -> None:
        partial = self.folder.path / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        # what from_pretrained and transformers.pipeline load
        model.save_pretrained(partial, safe_serialization=True)
        self.plan.subject.processor.save_pretrained(partial)
        shutil.rmtree(self.folder.model, ignore_errors=True)
        partial.rename(self.folder.model)

    def _write_details(self, predictions: Any, labels: np.ndarray, split: Split) -> None:
        self.plan.task.draw(self.folder.path, predictions, labels, split)
        rows = self.plan.task.scores_by_label(predictions, labels, split)
        if rows:
            write_csv(self.folder.path / "per_class.csv", rows)

    def _freeze(self, number: int, model: PreTrainedModel) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in self.trial.stages[number].frozen)

    def _arguments(self, number: int) -> TrainingArguments:
        config, planned = self.plan.config, self.trial.stages[number]
        folder = self._models.checkpoints(number).folder
        return training_arguments(config, planned, folder, seed=config.seed + number)

    def _holds(self, number: int, model: PreTrainedModel) -> list[TrainerCallback]:
        """Return what holds the weights to the source, read again for it, or averages them."""
        planned = self.trial.stages[number]
        stage, found = planned.stage, list[TrainerCallback]()
        if planned.penalties:  # some measure the source, which is to be fast
            model.to(self.processes.device)
        wanted = {penalty.config.source for penalty in planned.penalties}
        wanted |= {"original"} if stage.mixout else set()
        sources = {which: self._models.source(number, which) for which in wanted}
        for penalty in planned.penalties:
            of_hfft = {"kind", "strength", "source"}
            options = penalty.config.model_dump(exclude=of_hfft, exclude_unset=True)
            found.append(
                PenaltyCallback(
                    model,
                    penalty.config.kind,
                    penalty.config.strength,
                    source=sources[penalty.config.source],
                    batches=self._sample(planned.subject, penalty),
                    **options,
                )
            )
        if stage.mixout is not None:
            found.append(MixoutCallback(model, stage.mixout, sources["original"]))
        if stage.stochnorm is not None:
            found.append(StochNormCallback(model, stage.stochnorm))
        average = self.plan.config.average
        if isinstance(average, EmaAverage) and self._models.is_smoothed(number):
            found.append(EmaCallback(model, average.decay, warmup=average.warmup))
        return found

    def _sample(self, subject: Subject, penalty: PlannedPenalty) -> LabelledBatches:
        """Return examples in a seeded order, for penalties that measure the source on them."""
        examples: Examples = subject.examples["train"] if penalty.data is None else penalty.data
        loader = DataLoader(
            ExampleDataset(examples.rows, subject.transforms["evaluation"]),
            batch_size=8,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.plan.config.seed),
            collate_fn=subject.collate,
        )
        return LabelledBatches(loader, subject.task.loss)

    def _trainer(
        self,
        number: int,
        model: PreTrainedModel,
        args: TrainingArguments,
        carried: OptimizerState,
        spent: float,
        holds: Iterable[TrainerCallback],
    ) -> StageTrainer:
        config, planned = self.plan.config, self.trial.stages[number]
        stage, task = planned.stage, planned.subject.task
        labels = {"trial": self.trial.name, "stage": stage.name}
        title = f"{self.trial.name}: {stage.name}"
        steps = [s.steps for s in self.trial.stages]
        data = self._data.splits
        train: Any = data["train"]
        if isinstance(train, StoredExamples) and train.is_quick:
            args.dataloader_num_workers, args.dataloader_persistent_workers = 0, False
            args.dataloader_prefetch_factor = None
        return StageTrainer(
            task=task,
            lengths=planned.subject.examples["train"].lengths,
            batch_tokens=config.batch_tokens,
            chunk=stage.contrastive.chunk if stage.contrastive is not None else None,
            rates=planned.rates,
            carried=carried,
            span=(sum(steps[:number]), sum(steps)) if config.schedule == "run" else None,
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=data["validation"],
            data_collator=self._data.collate,
            callbacks=[
                *holds,
                *([LogitScaleCallback(model)] if isinstance(task, ContrastiveTask) else ()),
                EpochCallback(train),
                ReplicasCallback(),
                SealCallback(spent),
                LogCallback(self.folder.log, **labels),
                ProgressCallback(title, task.metric),
            ],
        )


def _scores(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return dict(_named(metrics, prefix))


def _named(metrics: dict[str, float], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in metrics.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name not in _TIMINGS:
            yield name, float(value)
