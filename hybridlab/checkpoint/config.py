"""config.json -> ModelSpec, for the families listed in `families.py`."""

from __future__ import annotations

from pathlib import Path

from hybridlab.checkpoint.families import FAMILIES
from hybridlab.checkpoint.files import locate
from hybridlab.checkpoint.jsonfile import Fields, read_object
from hybridlab.errors import CheckpointError
from hybridlab.spec import ModelSpec


def read_config(folder: Path | str) -> ModelSpec:
    """Read `config.json` (and `generation_config.json` if there) of a Hugging Face checkpoint folder.

    Both the Hub's dialect and the one that transformers 5 writes are understood. Raises CheckpointError
    naming the file and key of whatever is missing, impossible or not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'not a folder' if folder.exists() else 'folder not found'}")
    path = locate(folder, "config.json")
    return parse_config(read_object(path), str(path), _generation_eos(folder))


def parse_config(data: dict, where: str, eos_token_ids: tuple[int, ...] = ()) -> ModelSpec:
    """ModelSpec of a config.json already read; `where` names it in messages.

    `eos_token_ids` are those of generation_config.json, which win over the config's own.
    """
    config = Fields(where, data)
    family = FAMILIES.get(config.string("model_type"))
    if family is None:
        raise config.error("model_type", f"one of {', '.join(sorted(FAMILIES))}")
    return family.parse(config, eos_token_ids or config.integers("eos_token_id"))


def _generation_eos(folder: Path) -> tuple[int, ...]:
    path = locate(folder, "generation_config.json", required=False)
    return () if path is None else Fields(str(path), read_object(path)).integers("eos_token_id")
