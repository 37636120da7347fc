"""Where an adapter's folder is: on this machine, or in a repository of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from surgery.errors import refuse

_TAKEN = ("cache_dir", "force_download", "local_files_only", "revision", "token", "user_agent")
_FILES = ("*.json", "*.safetensors", "*.peft")


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some options that are about the hub."""
    return {name: value for name, value in options.items() if name in _TAKEN}


def folder_of(
    reference: str | Path, subfolder: str | None = None, options: Mapping[str, Any] | None = None
) -> Path:
    """The folder of a path, or of a repository of the hub, once it is here.

    options: as `huggingface_hub.snapshot_download` has them. Raises ArtifactError (E504) where
    neither is there.
    """
    path = Path(reference)
    if path.is_dir():
        return path / (subfolder or "")
    try:
        import huggingface_hub

        hub: Any = huggingface_hub  # whose types are not complete
        inside = f"{subfolder}/" if subfolder else ""
        wanted = [inside + name for name in _FILES]
        found = hub.snapshot_download(
            str(reference), allow_patterns=wanted, **hub_options(options or {})
        )
    except Exception as error:  # the hub's errors, those of its transport and of the file system
        refuse(
            "E504",
            f"`{reference}` is no folder here, and cannot be had from the hub: {error}",
            hint="give a folder with an adapter_config.json, or a hub id such as `owner/name`",
        )
    return Path(cast(str, found)) / (subfolder or "")
