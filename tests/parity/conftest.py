"""The oracle checkpoints and what `transformers` made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import hybridlab as hl
from hybridlab.checkpoint import open_checkpoint

ORACLES = Path(__file__).parents[1] / "data" / "oracles"
CASES = ("qwen3_bf16", "qwen3_fp8_128")


class Oracle:
    """A checkpoint, its prompts, and the logits and greedy tokens expected of them."""

    def __init__(self, case: str) -> None:
        self.folder = ORACLES / case
        self.expected = json.loads((self.folder / "expected.json").read_text())
        self.prompts = self.expected["requests"]
        self.spec = open_checkpoint(self.folder).spec
        self.greedy = [request["greedy"] for request in self.prompts]
        with safe_open(self.folder / "expected.safetensors", "np") as file:
            self.logits = [file.get_tensor(f"logits.{i}") for i in range(len(self.prompts))]

    def load(self, **options: Any) -> hl.Engine:
        return hl.load(self.folder, **{"quiet": True, "kv_tokens": 1024, **options})

    def requests(self) -> list[hl.Request]:
        """All prompts, which arrive together."""
        return [hl.Request(str(i), tuple(r["prompt"]), 24) for i, r in enumerate(self.prompts)]

    def check_logits(self, engine: hl.Engine) -> None:
        for request, expected in zip(self.prompts, self.logits, strict=True):
            got = engine.logits(request["prompt"])
            assert got.dtype == np.float32 and got.shape == expected.shape
            assert np.abs(got - expected).max() <= self.expected["tol_f32"]


@pytest.fixture(scope="session", params=CASES)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(request.param)
