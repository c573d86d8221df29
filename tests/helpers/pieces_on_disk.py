"""A checkpoint of what ranks have built, written without a run: tensors, configuration and manifest."""

from pathlib import Path

from tests.helpers.assembled import Built


def write(built: Built, folder: Path, num_updates: int = 0, num_writers: int = 2) -> None:
    """Write this rank's pieces and, on rank 0, what makes the folder a checkpoint. Called by every rank."""
    from k25_train.checkpoint.agreement import on_every_rank, on_first_rank
    from k25_train.checkpoint.files.writer import write_rank
    from k25_train.checkpoint.integrity import entry_of
    from k25_train.checkpoint.manifest import MANIFEST, Manifest
    from k25_train.checkpoint.pieces import pieces
    from k25_train.compose.resolve import to_yaml

    parts = [(piece.part, piece.tensor) for piece in pieces(built.modules, built.optimizer)]
    on_first_rank(lambda: folder.mkdir(parents=True))
    by_rank = on_every_rank(lambda: write_rank(folder, built.topology.rank, parts, num_writers))

    def finish() -> None:
        (folder / "config.yaml").write_text(to_yaml(built.config))
        files = {name: entry for written in by_rank for name, entry in written.items()}
        files["config.yaml"] = entry_of(folder / "config.yaml")
        step = int(folder.name.split("_")[1])
        manifest = Manifest(step=step, files=files, facts={}, num_updates=num_updates)
        (folder / MANIFEST).write_text(manifest.to_text())

    on_first_rank(finish)
