"""Recorded routing: what `hl.record_routing` keeps, saves and replays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import hybridlab as hl
from hybridlab.errors import ConfigError, RequestError

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
    same = [record.output for record in engine.serve(requests, on_route=stats.replay()).records]
    assert same == plain
    turned = hl.RoutingStats.of_tokens(
        [(tokens + 1) % engine.spec.num_experts for tokens in stats.chosen], stats.layers, engine.spec.num_experts, "x"
    )
    seen = {}

    def recording(layer, entries, expert_ids):
        replaced = turned.replay()(layer, entries, expert_ids)
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
    hl.RoutingStats(stats.counts, "x", stats.layers[:-1], stats.chosen).save(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_cut, "cannot be read as routing statistics"),
        (_foreign, "expected routing statistics with format"),
        (_not_a_file, "cannot be read as routing statistics"),
        (_wrong_expert, r"tensor 'chosen\.1' .* does not fit"),
        (_wrong_layers, "tensor 'counts' .* does not fit"),
    ],
)
def test_a_bad_file_is_one_line(stats, tmp_path, spoil, words):
    path = stats.save(tmp_path / "r.safetensors")
    spoil(path)
    with pytest.raises(ConfigError, match=words) as caught:
        hl.RoutingStats.load(path)
    assert "r.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_counts_alone_cannot_be_replayed():
    with pytest.raises(ConfigError, match="hold counts alone"):
        hl.RoutingStats(((1, 2),), "prior", (0,)).replay()
