"""Recorded routing: what `hl.record_routing` keeps, saves and replays."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import hybridlab as hl
from hybridlab.errors import ConfigError, RequestError, StrategyError

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_fp8_128"
PROMPTS = [[5, 6, 7, 8, 9], [1, 2], [5, 6, 7, 8, 30, 31, 32]]


@pytest.fixture(scope="module")
def engine():
    with hl.load(ORACLE, precision="exact", quiet=True, kv_tokens=512, token_budget=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def stats(engine) -> hl.RoutingStats:
    return hl.record_routing(engine, PROMPTS, max_tokens=6, progress=False)


def test_a_recording_has_every_token_of_every_layer(engine, stats):
    spec = engine.spec
    assert [tokens.shape for tokens in stats.chosen] == [
        (len(prompt) + 5, len(spec.moe_layers), spec.top_k) for prompt in PROMPTS
    ]
    for row in stats.counts:
        assert sum(row) == stats.num_tokens * spec.top_k and len(row) == spec.num_experts
    for tokens in stats.chosen:
        assert all(len(set(ids)) == spec.top_k for token in tokens.tolist() for ids in token)
    # Equal beginnings route alike, whatever shared their batch.
    assert np.array_equal(stats.chosen[0][:4], stats.chosen[2][:4])
    frame = stats.frame
    assert frame.groupby("layer")["share"].sum().tolist() == pytest.approx([1.0] * len(spec.moe_layers))


def test_the_oracle_routes_alike(engine):
    with safe_open(ORACLE / "expected.safetensors", "np") as file:
        keys = [key for key in file.keys() if key.startswith("router_idx")]  # noqa: SIM118
        expected = {tuple(int(part) for part in key.split(".")[1:]): file.get_tensor(key) for key in keys}
    requests = json.loads((ORACLE / "expected.json").read_text())["requests"]
    recorded = hl.record_routing(engine, [r["prompt"] for r in requests], progress=False)
    for (layer, number), ids in expected.items():
        mine = recorded.chosen[number][:, recorded.layers.index(layer)]
        assert np.array_equal(np.sort(mine), np.sort(ids)), (layer, number)


def test_saved_statistics_come_back(stats, tmp_path):
    loaded = hl.RoutingStats.load(stats.save(tmp_path / "new" / "routing.safetensors"))
    assert loaded == stats and loaded.source == stats.source
    assert all(np.array_equal(a, b) and a.dtype == np.int16 for a, b in zip(loaded.chosen, stats.chosen, strict=True))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["routing.safetensors"]
    assert "recorded" in loaded._repr_html_()


def test_a_replay_makes_tokens_choose_as_recorded(engine, stats):
    requests = [hl.Request(f"x{i}", tuple(prompt), 6) for i, prompt in enumerate(PROMPTS)]
    plain = [record.output for record in engine.serve(requests).records]
    same = [record.output for record in engine.serve(requests, on_route=stats.replay(engine.spec)).records]
    assert same == plain
    turned = hl.RoutingStats.of_tokens(
        [(tokens + 1) % engine.spec.num_experts for tokens in stats.chosen], stats.layers, engine.spec.num_experts, "x"
    )
    seen = {}

    def recording(layer, entries, expert_ids):
        replaced = turned.replay(engine.spec)(layer, entries, expert_ids)
        seen[layer, entries[0].id, entries[0].start] = (expert_ids, replaced)
        return replaced

    other = [record.output for record in engine.serve(requests[:1], on_route=recording).records]
    assert other != plain[:1]
    own, replaced = seen[stats.layers[0], "x0", 0]
    assert np.array_equal(replaced, (own + 1) % engine.spec.num_experts)


def test_placements_are_given_the_recording(stats):
    from hybridlab.strategies.placement.all_host import AllHost

    class Asks(AllHost):
        def place(self, model, hardware, routing):
            given.append(routing)
            return super().place(model, hardware, routing)

    given = []
    hl.load(ORACLE, placement=Asks(), routing=stats, quiet=True, kv_tokens=64, token_budget=64).close()
    assert given == [stats]


def test_bad_prompts_are_refused_before_anything_runs(engine):
    with pytest.raises(RequestError, match="token 999999 is out of range"):
        hl.record_routing(engine, [[1], [999999]], progress=False)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _foreign(path: Path) -> None:
    shutil.copy(ORACLE / "expected.safetensors", path)


def _not_a_file(path: Path) -> None:
    path.unlink()


def _wrong_expert(path: Path) -> None:
    stats = hl.RoutingStats.load(path)
    stats.chosen[1][0, 0, 0] = 1000
    stats.save(path)


def _wrong_layers(path: Path) -> None:
    stats = hl.RoutingStats.load(path)
    object.__setattr__(stats, "layers", (*stats.layers, 7))
    object.__setattr__(stats, "counts", (*stats.counts, stats.counts[0]))
    stats.save(path)


def _no_source(path: Path) -> None:
    save_file({"counts": np.zeros((0, 0), np.int64)}, path, {"format": "hybridlab-routing/1", "layers": "[]"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_cut, "cannot be read as routing statistics"),
        (_foreign, "expected routing statistics with format"),
        (_not_a_file, "cannot be read as routing statistics"),
        (_wrong_expert, r"tensor 'chosen\.1' .* does not fit"),
        (_wrong_layers, r"tensor 'chosen\.0' .* does not fit"),
        (_no_source, "cannot be read as routing statistics"),
    ],
)
def test_a_bad_file_is_one_line(stats, tmp_path, spoil, words):
    path = stats.save(tmp_path / "r.safetensors")
    spoil(path)
    with pytest.raises(ConfigError, match=words) as caught:
        hl.RoutingStats.load(path)
    assert "r.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_what_does_not_fit_cannot_be_replayed(engine, stats):
    with pytest.raises(ConfigError, match="hold no recorded tokens"):
        hl.RoutingStats(((1, 2),), "prior", (0,)).replay(engine.spec)
    other = dataclasses.replace(engine.spec, num_experts=8)
    with pytest.raises(ConfigError, match=r"replay: experts 3 were recorded .*, the model has 8"):
        stats.replay(other)


def test_statistics_without_tokens_come_back_too(tmp_path):
    for stats in (hl.RoutingStats(), hl.RoutingStats(((1, 2), (3, 4)), "prior", (1, 2))):
        assert hl.RoutingStats.load(stats.save(tmp_path / "r.safetensors")) == stats
        assert len(stats.frame) == sum(map(len, stats.counts))
    with pytest.raises(ConfigError, match="2 rows of counts for 1 layers"):
        hl.RoutingStats(((1, 2), (3, 4)), "prior", (1,))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (np.zeros((1, 2), np.int32), r"returned int32 \[1, 2\], expected int32 \[5, 2\]"),
        (np.zeros((5, 2), np.int64), r"returned int64 \[5, 2\]"),
        (np.full((5, 2), 3, np.int32), "returned experts 3 to 3, expected 0 to 2"),
        (np.full((5, 2), -1, np.int32), "returned experts -1 to -1"),
        ("0", "returned str"),
    ],
    ids=["shape", "dtype", "above", "below", "text"],
)
def test_a_hook_that_returns_what_cannot_be_ends_the_run_in_one_line(engine, returned, words):
    with pytest.raises(StrategyError, match=words):
        engine.serve([hl.Request("a", tuple(PROMPTS[0]), 2)], on_route=lambda *_: returned)
    assert len(engine.generate([1, 2], 2)) == 2


def test_a_hook_cannot_write_into_the_choice(engine):
    def writes(layer, entries, expert_ids):
        expert_ids.fill(0)

    (record,) = engine.serve([hl.Request("a", (1, 2), 2)], on_route=writes).records
    assert record.status == "failed" and "read-only" in record.error


@pytest.mark.parametrize("prompts", ["w5w6", [], None], ids=repr)
def test_prompts_must_be_a_list(engine, prompts):
    with pytest.raises(RequestError, match="expected a list with at least one prompt"):
        hl.record_routing(engine, prompts, progress=False)


def test_no_prompt_runs_if_one_cannot_be_served(engine):
    steps = []
    engine.runtime._executor.run, run = (lambda *a: steps.append(a)), engine.runtime._executor.run
    try:
        with pytest.raises(RequestError, match="need 549 KV tokens"):
            hl.record_routing(engine, [[1, 2], [3] * 500], max_tokens=50, progress=False)
    finally:
        engine.runtime._executor.run = run
    assert steps == []
