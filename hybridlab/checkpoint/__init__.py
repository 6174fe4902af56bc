"""Checkpoints: config.json + safetensors -> ModelSpec + zero-copy weight views; random checkpoints."""

from hybridlab.checkpoint.config import read_config
from hybridlab.checkpoint.presets import PRESETS, preset_spec
from hybridlab.checkpoint.reader import Checkpoint, LinearWeights, open_checkpoint
from hybridlab.checkpoint.writer import make_checkpoint

__all__ = [
    "PRESETS",
    "Checkpoint",
    "LinearWeights",
    "make_checkpoint",
    "open_checkpoint",
    "preset_spec",
    "read_config",
]
