"""What a run needs before its processes start: the checkpoint that all of them read."""

from __future__ import annotations

from pathlib import Path

from slime_async.config import Config, ConfigError


def prepare_model(config: Config, run_directory: Path) -> Config:
    """A configuration whose ``model.path`` is a checkpoint directory, made now if the path names a function.

    Raises ``ConfigError`` when there is no checkpoint.
    """
    if ":" in config.model.path:
        from slime_async.objects import load_callable

        checkpoint = run_directory / "checkpoints" / "initial"
        load_callable(config.model.path, "model.path")(checkpoint, config.run.seed)
    else:
        checkpoint = Path(config.model.path)
    if not (checkpoint / "config.json").is_file():
        raise ConfigError(
            f"model.path = {config.model.path!r}: {checkpoint} has no config.json; give the directory of a Hugging "
            "Face checkpoint, or module:function (directory, seed) that writes one"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(checkpoint.resolve())})})
