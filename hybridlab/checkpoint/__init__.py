"""Checkpoints: config.json + safetensors -> ModelSpec + zero-copy weight views; random checkpoints."""

from hybridlab.checkpoint.config import read_config
from hybridlab.checkpoint.reader import Checkpoint, LinearWeights, open_checkpoint

__all__ = ["Checkpoint", "LinearWeights", "open_checkpoint", "read_config"]
