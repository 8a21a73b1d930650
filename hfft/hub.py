"""The model card, and the push to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from hfft.average_scores import average_told
from hfft.errors import InputError, RunFailedError

if TYPE_CHECKING:
    from hfft.plan import Plan


def write_card(folder: Path, plan: Plan, metrics: dict[str, Any]) -> None:
    """Write the model folder's README.md from the run.

    Only what is on the Hub is named in the metadata: a local path there makes the Hub reject it.
    """
    data = plan.config.data.path
    sources = plan.config.model.names
    data_card = ModelCardData(
        library_name="transformers",
        pipeline_tag=plan.task.name,
        tags=["hfft"],
        base_model=[name for name in sources if not Path(name).exists()] or None,
        datasets=None if Path(data).exists() else [data],
        metrics=[plan.task.metric],
    )
    scores = metrics["test"] or metrics["eval"]
    lines = [
        f"# {Path(plan.config.output_dir).name}",
        f"{' + '.join(map(_name, sources))}, fine-tuned for {plan.task.name} on {_name(data)} "
        f"({_counts(plan)}).",
        "## Scores on " + ("test" if metrics["test"] else "validation"),
        _table([{"metric": name, "value": f"{value:.4f}"} for name, value in scores.items()]),
        "## Stages",
        _table(
            [
                {
                    "stage": stage["name"],
                    "steps": stage["steps"],
                    "learning parameters": f"{stage['trainable_parameters']:,}",
                    "scores": ", ".join(
                        f"{name} {value:.4f}"
                        for name, value in stage["eval"].items()
                        if name != "loss"
                    ),
                }
                for stage in metrics["stages"]
            ]
        ),
        *([average_told(metrics["average"])] if "average" in metrics else []),
        *_retention(metrics),
        *_adapters(plan),
        *_classes(plan),
    ]
    card = ModelCard(f"---\n{data_card.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n")
    card.save(folder / "README.md")


def push(run: Path, repo_id: str, *, private: bool, code: bool = False) -> str:
    """Upload a run's model folder; return its address.

    Args:
        run: a finished run folder.
        repo_id: `user/name`.
        private: create the repository private.
        code: whether Python code of the model's may go with it; others then run it on loading.

    Raises:
        InputError: the folder is no finished run, the name can't be one on the Hub, or the model
            needs code and may not have it.
        RunFailedError: the Hub can't be reached or refuses; says how to finish the job.
    """
    folder = run / "model"
    if not (folder / "config.json").is_file() or not (run / "metrics.json").is_file():
        raise InputError(f"{run}: is no finished run: it has no model and metrics to push")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"REPO_ID: {error}") from error
    if not code and (files := sorted(path.name for path in folder.glob("*.py"))):
        raise InputError(
            f"{run}: its model loads by code of its own ({', '.join(files)}), which is pushed only "
            f"if you say so: hfft push --with-code, or hub.code: true"
        )
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Add fine-tuned model"
        )
    except Exception as error:  # the client raises what its transport does
        raise RunFailedError(
            f"push: {repo_id}: {str(error).splitlines()[0] if str(error) else error!r}; the model "
            f"is intact in {folder}; when the cause is mended: hfft push {run} {repo_id}"
            f"{'' if private else ' --public'}{' --with-code' if code else ''}"
        ) from error
    return f"{api.endpoint}/{repo_id}"


def _retention(metrics: dict[str, Any]) -> list[str]:
    """Say what the source could do, and what is left of it."""
    if (found := metrics.get("retention")) is None:
        return []
    rows = [
        {"metric": name, "source": f"{value:.4f}", "fine-tuned": f"{found['after'][name]:.4f}"}
        for name, value in found["before"].items()
    ]
    return [f"## Retention: {found['task']} on {_name(found['data'])}", _table(rows)]


def _adapters(plan: Plan) -> list[str]:
    """Say which stages trained an adapter and with which options."""
    told = []
    for stage in (planned.stage for planned in plan.main.stages):
        if stage.lora is not None:
            options = {"r": 8, **stage.lora}  # peft's own default
            merged = options.pop("merge", False)
            given = ", ".join(f"{key}: {value}" for key, value in options.items())
            told.append(
                f"Stage {stage.name} trained LoRA ({given}) on the frozen network; it is merged "
                f"into the weights here{'' if merged else ', and kept apart in the run folder'}."
            )
    return told


def _counts(plan: Plan) -> str:
    examples = f"{len(plan.subject.data.splits['train'])} examples"
    return f"{examples}, {len(labels)} classes" if (labels := plan.subject.labels) else examples


def _classes(plan: Plan) -> list[str]:
    labels = plan.subject.labels
    shown = f"Classes: {', '.join(labels[:50])}{' …' if len(labels) > 50 else ''}"
    return [shown] if labels else []


def _name(reference: str) -> str:
    """Return a Hub id as it is, a local path without the folders above it."""
    return Path(reference).name if Path(reference).exists() else reference


def _table(rows: list[dict[str, Any]]) -> str:
    heads = list(rows[0])
    body = [" | ".join(str(row[head]) for head in heads) for row in rows]
    return "\n".join(
        f"| {line} |" for line in [" | ".join(heads), " | ".join("---" for _ in heads), *body]
    )
