"""Which model a checkpoint is of, and whether it has all of its tensors."""

from pathlib import Path

from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.manifest import Kind, read_manifest
from k25_train.compose.command_line import load_saved
from k25_train.compose.conf_files import group_values
from k25_train.compose.resolve import describe
from k25_train.compose.sections import build_section
from k25_train.compose.trainable import check_trainable, planned_alone
from k25_train.config.model import ModelConfig
from k25_train.config.vision import VisionPart
from k25_train.errors import CheckpointError, ConfigError
from k25_train.export.listing import Contents, released_tensors
from k25_train.export.released import shown
from k25_train.export.stream import MASTER, source_name

CONFIG, MODEL = "config.yaml", "model.yaml"


def model_of(folder: Path) -> ModelConfig:
    """The model of a run's checkpoint, or of an import, which says it in a file of its own.

    Raises `CheckpointError` if the folder has no language model to export, ConfigError if a file breaks a
    rule.
    """
    if (folder / MODEL).is_file():
        model, problems = build_section(group_values("model", folder / MODEL), ModelConfig, "model")
        if not problems:
            problems = [each.under("model") for each in [*model.problems(), *planned_alone(model)]]
        if problems:
            raise ConfigError(describe(problems, str(folder / MODEL)))
        built: ModelConfig = model
        return built
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder / CONFIG} is missing: name a checkpoint, step_N in a run's checkpoints or an import"
        )
    if read_manifest(folder).kind is Kind.WEIGHTS:
        raise CheckpointError(f"{folder} is an import without a language model, which is not a whole model")
    config = load_saved(folder / CONFIG)
    check_trainable(config)
    return config.model


def source_of(checkpoint: StoredCheckpoint) -> Path | None:
    """The Hugging Face folder that a checkpoint was imported from, if that is still there."""
    source = checkpoint.manifest.facts.get("import.source", "")
    return Path(source) if source and (Path(source) / "config.json").is_file() else None


def contents_of(checkpoint: StoredCheckpoint) -> Contents:
    """Whether it has a vision part; an import of a text model has none."""
    has_vision = any(VisionPart.of(name) is not None for name in checkpoint.tensors)
    return Contents.all if has_vision else Contents.text


def check_tensors(
    checkpoint: StoredCheckpoint, model: ModelConfig, contents: Contents, *, from_masters: bool
) -> None:
    """Raise `CheckpointError` unless a checkpoint has all tensors of an export, in their shapes."""
    tensors = released_tensors(model, contents)
    sources = {
        source_name(each, checkpoint, from_masters=from_masters): each.source_shape for each in tensors
    }
    if from_masters and not any(name.startswith(MASTER) for name in sources):
        raise CheckpointError(
            f"{checkpoint.folder}: has no masters, as an import has none; export it without --from-masters"
        )
    missing = []
    for name, shape in sources.items():
        info = checkpoint.tensors.get(name)
        if info is None or info.shape != shape:
            missing.append(name if info is None else f"{name} {list(shape)} (it has {list(info.shape)})")
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: is not of the model of its {CONFIG}, it lacks {shown(missing)}"
        )
