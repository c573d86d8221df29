"""Which model a checkpoint is of, and whether it has all of its tensors."""

from pathlib import Path

from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.compose.command_line import load_saved
from k25_train.config.model import ModelConfig
from k25_train.config.vision import VisionPart
from k25_train.errors import CheckpointError
from k25_train.export.listing import Contents, released_tensors
from k25_train.export.released import shown
from k25_train.export.stream import MASTER, source_name

CONFIG = "config.yaml"


def model_of(folder: Path) -> ModelConfig:
    """The model that a checkpoint's configuration describes.

    Raises `CheckpointError` if it has none, ConfigError if that breaks a rule.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder / CONFIG} is missing: name a checkpoint, step_N in a run's checkpoints or an import"
        )
    return load_saved(folder / CONFIG).model


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
