"""Expert popularity: what the curves ask for, and what a made model's routers then do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hybridlab.checkpoint import make_checkpoint, preset_spec
from hybridlab.checkpoint.initial import BIAS_CHANNEL
from hybridlab.checkpoint.routing import (
    MAX_INCLUSION,
    expert_inclusion,
    fit_bias,
    inclusion,
    recorded_curves,
    top_k_mask,
)
from hybridlab.errors import CheckpointError


def hottest_quarter(share: np.ndarray) -> float:
    """Part of all routes that goes to the hottest quarter of the experts."""
    return float(np.sort(share)[::-1][: len(share) // 4].sum() / share.sum())


def test_recorded_curves_span_flat_and_skewed() -> None:
    olmoe, mixtral = recorded_curves("olmoe"), recorded_curves("mixtral")
    assert {len(c) for c in olmoe.values()} == {64} and {len(c) for c in mixtral.values()} == {8}
    assert list(olmoe) == list(mixtral) == [0, 7 / 15, 1]
    assert min(c[0] for c in olmoe.values()) > 4 and max(c[0] for c in mixtral.values()) < 1.4
    with pytest.raises(CheckpointError, match="routing 'uniform' is not recorded"):
        recorded_curves("uniform")


@pytest.mark.parametrize("routing", ["uniform", "olmoe", "mixtral"])
@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (128, 8), (16, 4), (8, 2), (3, 2), (4, 4), (1, 1), (256, 1)])
def test_inclusion_sums_to_top_k(routing: str, experts: int, top_k: int) -> None:
    for depth in (0, 0.4, 1):
        share = inclusion(routing, experts, top_k, depth)
        assert share.shape == (experts,) and share.sum() == pytest.approx(top_k)
        assert (np.diff(share) <= 1e-12).all() and share[-1] > 0
        assert share[0] <= max(MAX_INCLUSION, top_k / experts) + 1e-12


def test_same_number_of_experts_keeps_the_recorded_curve() -> None:
    share = inclusion("olmoe", 64, 8, 0.0)
    np.testing.assert_allclose(share / share.mean(), recorded_curves("olmoe")[0.0], rtol=1e-9)


@pytest.mark.parametrize("routing", ["olmoe", "mixtral"])
@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (16, 4)])
def test_fitted_bias_gives_the_share(routing: str, experts: int, top_k: int) -> None:
    share = inclusion(routing, experts, top_k, 1.0)
    noise = np.random.default_rng(5).standard_normal((20_000, experts))
    chosen = top_k_mask(noise + fit_bias(share, top_k), top_k).mean(axis=0)
    np.testing.assert_allclose(chosen, share, atol=0.02)


def test_layers_differ_in_which_experts_are_hot() -> None:
    targets = expert_inclusion(preset_spec("qwen3-7b-a1b"), "olmoe", seed=3)
    assert len({int(share.argmax()) for share in targets.values()}) > 12
    again = expert_inclusion(preset_spec("qwen3-7b-a1b"), "olmoe", seed=3)
    assert all((targets[layer] == again[layer]).all() for layer in targets)


@pytest.mark.parametrize("routing", ["uniform", "olmoe", "mixtral"])
def test_made_model_routes_as_asked(tmp_path: Path, routing: str) -> None:
    """Measured with transformers on 1,152 random tokens: experts within 0.12, hottest quarter within 0.05."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    checkpoint = make_checkpoint(tmp_path / "m", "tiny", dtype="bf16", routing=routing, progress=False)
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    tokens = torch.randint(0, 2048, (48, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(tokens, output_router_logits=True, output_hidden_states=True)
    if routing != "uniform":
        # The last hidden state has been through the final norm; the others are the residual stream.
        assert all((h[..., BIAS_CHANNEL] == 1).all() for h in out.hidden_states[:-1])
    targets = expert_inclusion(checkpoint.spec, routing)
    for layer, logits in zip(checkpoint.spec.moe_layers, out.router_logits, strict=True):
        chosen = top_k_mask(logits.numpy(), checkpoint.spec.top_k).mean(axis=0)
        assert np.abs(chosen - targets[layer]).max() < 0.12
        assert hottest_quarter(chosen) == pytest.approx(hottest_quarter(targets[layer]), abs=0.05)
        hot = targets[layer].argmax()
        if routing == "olmoe":
            assert chosen[hot] == pytest.approx(targets[layer][hot], abs=0.03)
