"""`hl.load` and what an engine does for one user: generate, stream, sample, cancel, interrupt, refuse."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import hybridlab as hl
from hybridlab.engine import executor
from hybridlab.engine.sampling import draw
from hybridlab.errors import ConfigError, HybridlabError, MemoryBudgetError, RequestError, StrategyError
from hybridlab.plans import LaneKind, PlacementPlan, StepPlan, Tier
from hybridlab.request import Sampling, Status
from hybridlab.strategies.placement.all_host import AllHost

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_fp8_128"
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def engine():
    with hl.load(ORACLE, precision="exact", quiet=True, kv_tokens=512) as engine:
        yield engine


def test_generate_and_stream_agree(engine):
    tokens = engine.generate(PROMPT, max_tokens=12)
    assert isinstance(tokens, list) and all(type(t) is int for t in tokens) and len(tokens) == 12
    assert list(engine.stream(PROMPT, max_tokens=12)) == tokens


def test_packed_weights_give_the_same_logits():
    prompt = list(range(5, 45))
    with (
        hl.load(ORACLE, quiet=True, kv_tokens=512) as rows,
        hl.load(ORACLE, quiet=True, kv_tokens=512, weight_layout="tiles") as tiles,
    ):
        assert "weights (packed)" in str(tiles.memory) and "weights (mapped)" in str(rows.memory)
        np.testing.assert_array_equal(tiles.logits(prompt), rows.logits(prompt))
        assert tiles.generate(prompt, max_tokens=12) == rows.generate(prompt, max_tokens=12)


def test_sampling_is_seeded_and_does_not_depend_on_the_batch(engine):
    options = {"max_tokens": 16, "temperature": 1.3, "top_p": 0.9}
    one = engine.generate(PROMPT, seed=1, **options)
    assert one == engine.generate(PROMPT, seed=1, **options)
    assert one != engine.generate(PROMPT, seed=2, **options)
    requests = [hl.Request(str(s), tuple(PROMPT), 16, 0.0, hl.Sampling(1.3, 0.9, s)) for s in range(4)]
    served = engine.serve(requests, "chunked_prefill")
    assert served.records[1].output == one


def test_drawing_follows_the_distribution_and_top_p():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    draws = [draw(logits, Sampling(1.0, 1.0, seed), position=3) for seed in range(4000)]
    assert np.abs(np.bincount(draws, minlength=4) / 4000 - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    cut = [draw(logits, Sampling(1.0, 0.7, seed), position=3) for seed in range(2000)]
    assert set(cut) == {0, 1}
    assert abs(np.mean(np.array(cut) == 0) - 0.5 / 0.8) < 0.04
    assert draw(logits, Sampling(), 0) == 0
    assert draw(logits, Sampling(1e-9, 1.0, 5), 0) == 0
    assert draw(logits, Sampling(1e-310, 1.0, 5), 0) == 0


def test_text_in_text_out(engine, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "with_tokenizer"
    shutil.copytree(ORACLE, folder)
    vocab = {f"w{i}": i for i in range(engine.spec.vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    with hl.load(folder, precision="exact", quiet=True, kv_tokens=512) as speaking:
        text = speaking.generate("w5 w6 w7 w8", max_tokens=6)
        assert text == " ".join(f"w{t}" for t in engine.generate(PROMPT, max_tokens=6))
        assert "".join(map(str, speaking.stream("w5 w6 w7 w8", max_tokens=6))) == text
    with pytest.raises(RequestError, match=r"tokenizer\.json: not found"):
        engine.generate("hello")


def test_closing_a_stream_cancels_it_and_an_open_one_is_named(engine):
    stream = engine.stream(PROMPT, max_tokens=200)
    next(stream)
    with pytest.raises(HybridlabError, match="busy with another run"):
        engine.generate(PROMPT, max_tokens=1)
    stream.close()
    assert len(engine.generate(PROMPT, max_tokens=1)) == 1


def test_cancel_from_a_callback(engine):
    requests = [hl.Request("a", tuple(PROMPT), 200), hl.Request("b", tuple(PROMPT), 8)]

    def on_event(record, token):
        if record.request.id == "a" and len(record.output) == 3:
            assert engine.cancel("a")

    records = {r.request.id: r for r in engine.serve(requests, on_event=on_event).records}
    assert records["a"].status is Status.CANCELLED and len(records["a"].output) < 10
    assert records["b"].status is Status.FINISHED and len(records["b"].output) == 8
    assert not engine.cancel("a")


def test_an_interrupt_leaves_the_engine_usable(engine):
    timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            engine.generate(PROMPT, max_tokens=400)
    timer.join()
    assert len(engine.generate(PROMPT, max_tokens=3)) == 3


def test_an_arrival_is_not_served_early(engine):
    start = time.perf_counter()
    requests = [hl.Request("now", (1,), 2), hl.Request("later", (1,), 2, arrival_s=0.4)]
    records = engine.serve(requests).records
    assert time.perf_counter() - start >= 0.4
    assert records[1].first_scheduled_s >= 0.4 > records[0].finished_s


def test_the_spans_of_a_run_are_the_ops_of_its_programs(engine):
    served = engine.serve([hl.Request("a", tuple(PROMPT), 3)])
    kinds = [span.op.kind for span in served.spans]
    assert kinds.count("head") == served.num_steps == 3
    assert kinds.count("experts") == 3 * len(engine.spec.moe_layers)
    assert all(a.end_s <= b.start_s + 1e-9 for a, b in zip(served.spans, served.spans[1:], strict=False))
    assert {span.op.lane.kind for span in served.spans} == {LaneKind.CPU}
    assert "1 of 1 requests finished" in served._repr_html_()


def test_a_users_placement_and_overlap_run(engine):
    class Dual:
        def num_microbatches(self, step):
            return 2

        def arrange(self, ops):
            return sorted(ops, key=lambda op: (2 * op.layer + op.microbatch + 1.5 * (op.kind == "combine"), op.id))

    class SomeResident(AllHost):
        def place(self, model, hardware, routing):
            return PlacementPlan(tier_of={(layer, 0): Tier.RESIDENT for layer in model.moe_layers})

    requests = [hl.Request(str(i), tuple(PROMPT[: i + 1]), 9) for i in range(4)]
    plain = engine.serve(requests)
    with hl.load(
        ORACLE, precision="exact", quiet=True, placement=SomeResident(), overlap=Dual(), kv_tokens=512
    ) as dual:
        served = dual.serve(requests)
    assert [r.output for r in served.records] == [r.output for r in plain.records]
    assert {span.op.microbatch for span in served.spans} == {0, 1}


class Streams(AllHost):
    def place(self, model, hardware, routing):
        return PlacementPlan(default_tier=Tier.STREAMED, ring_slots=2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"precision": "fp4"}, ConfigError, "precision is 'fp4'"),
        ({"weight_layout": "columns"}, ConfigError, "weight_layout is 'columns', expected 'rows' or 'tiles'"),
        ({"device": "tpu"}, ConfigError, "device 'tpu' is not available"),
        ({"threads": 0}, ConfigError, "threads is 0"),
        ({"token_budget": -1}, ConfigError, "token_budget is -1"),
        ({"kv_tokens": 1.5}, ConfigError, "kv_tokens is 1.5"),
        ({"threads": "2"}, ConfigError, "threads is '2'"),
        ({"memory_gb": "4"}, ConfigError, "memory_gb is '4'"),
        ({"memory_gb": float("nan")}, ConfigError, "memory_gb is nan"),
        ({"memory_gb": 0.01}, MemoryBudgetError, "MiB of memory needed, 10.24 MiB in the budget .*; raise memory_gb"),
        ({"kv_tokens": 10**12}, MemoryBudgetError, "GiB of memory needed, .*; lower kv_tokens"),
        ({"placement": "nowhere"}, StrategyError, "unknown placement 'nowhere'"),
        ({"placement": Streams()}, StrategyError, "default_tier is streamed"),
        ({"overlap": "dual"}, StrategyError, "unknown overlap 'dual'"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_impossible_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        hl.load(ORACLE, quiet=True, **options)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "prompt is empty"),
        ([1, 10**6], {}, "prompt token 1000000 is out of range"),
        (["one"], {}, "prompt token 'one' is not an int"),
        ([1.7], {}, "prompt token 1.7 is not an int"),
        (b"abc", {}, "expected a sequence of token ids"),
        ([1], {"max_tokens": "3"}, "max_tokens is '3'"),
        ([1], {"stop_token_ids": 5}, "stop_token_ids is 5"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
        ([1] * 500, {"max_tokens": 50}, "need 549 KV tokens, the cache holds 512"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_impossible_requests_are_named(engine, prompt, options, words):
    with pytest.raises(RequestError, match=words):
        engine.generate(prompt, **options)


def test_a_scheduler_that_breaks_its_contract_is_named_and_the_engine_stays_usable(engine):
    class Greedy:
        def schedule(self, queue):
            return StepPlan("prefill", {r.id: 10**6 for r in queue.waiting})

    with pytest.raises(StrategyError, match="scheduler Greedy: request 'a' gets 1000000 tokens"):
        engine.serve([hl.Request("a", (1,), 1)], Greedy())

    class Sleeper:
        def schedule(self, queue):
            return None

    with pytest.raises(StrategyError, match="scheduler Sleeper waits, but nothing runs"):
        engine.serve([hl.Request("a", (1,), 1)], Sleeper())
    assert len(engine.generate([1], max_tokens=2)) == 2


def test_a_step_that_fails_inside_the_model_fails_its_requests_only(engine, monkeypatch):
    model = engine.runtime._executor._model
    real = model.attention

    def fails_for_long_prompts(layer, x, batch):
        if len(x) > 20:
            raise RuntimeError("planted")
        return real(layer, x, batch)

    monkeypatch.setattr(model, "attention", fails_for_long_prompts)
    requests = [hl.Request("long", (1,) * 30, 2), hl.Request("short", (1,), 2, arrival_s=0.2)]
    records = engine.serve(requests).records
    assert records[0].status is Status.FAILED and "planted" in records[0].error
    assert records[1].status is Status.FINISHED


def test_a_stream_of_a_closed_engine_ends_with_an_error():
    engine = hl.load(ORACLE, quiet=True, kv_tokens=64)
    stream = engine.stream(PROMPT, 20)
    next(stream)
    engine.close()
    with pytest.raises(HybridlabError, match="closed"):
        list(stream)


def test_a_token_budget_of_a_run_is_checked(engine):
    with pytest.raises(ConfigError, match="token_budget is -5"):
        engine.serve([], token_budget=-5)


def test_a_closed_engine_says_so():
    engine = hl.load(ORACLE, quiet=True, kv_tokens=64)
    engine.close()
    engine.close()
    with pytest.raises(HybridlabError, match="is closed"):
        engine.generate([1])


def test_the_memory_plan_is_printed_before_anything_is_allocated(capsys):
    with pytest.raises(MemoryBudgetError):
        hl.load(ORACLE, kv_tokens=10**12)
    assert "memory plan" not in capsys.readouterr().err
    with hl.load(ORACLE, kv_tokens=64) as engine:
        assert "memory plan (GiB): weights (mapped)" in capsys.readouterr().err
        assert "budget" in engine._repr_html_() and "kv" not in repr(engine)


def test_errors_are_one_line_in_notebooks():
    assert RequestError("prompt is empty")._render_traceback_() == ["RequestError: prompt is empty"]


def test_logits_of_a_long_prompt_are_computed_piece_by_piece(monkeypatch):
    """So that they take no more of a device than the memory plan says."""
    prompt = list(range(50))
    with hl.load(ORACLE, precision="exact", quiet=True, kv_tokens=64, worker="thread") as engine:
        model = engine.runtime._executor._model  # type: ignore[union-attr]
        expected, head, rows = engine.logits(prompt), model.head, []
        monkeypatch.setattr(executor, "HEAD_ROWS", 16)
        monkeypatch.setattr(model, "head", lambda x_RH: (rows.append(len(x_RH)), head(x_RH))[1])
        np.testing.assert_allclose(engine.logits(prompt), expected, rtol=0, atol=1e-6)
    assert rows == [16, 16, 16, 2]
