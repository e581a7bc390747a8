"""A race between made-up contestants: turns, fresh data, and no speed for a wrong value."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch

from benchmarks import peers, race
from benchmarks.cases import Case, draw
from benchmarks.gate import expected_pii

CASE = Case(24, 16, "float32", least=4, most=4)


def contestant(name, *, factor=1.0, group=peers.OURS, log=None, seen=None, **more):
    def bind(vectors):
        def call():
            if log is not None:
                log.append(name)
            if seen is not None:
                seen.append(vectors.clone())
            return expected_pii(vectors) * factor

        return call

    return peers.Contestant(name, group, bind, float, **more)


def run(contestants, case=CASE, allowance_s=1e9):
    found = race.race(case, 1, contestants, allowance_s, race.Expected())
    return {measured.contestant: measured for measured in found}


def test_contestants_take_turns_in_alternating_order():
    log: list[str] = []
    found = run([contestant(name, log=log) for name in "abc"])
    # warming up first, then four rounds; calls of one visit count once
    assert squeezed(log) == squeezed("abc" + "abc" + "cba" + "bca" + "acb")
    assert all(measured.rounds == [0, 1, 2, 3] for measured in found.values())


def squeezed(names):
    return "".join(name for index, name in enumerate(names) if index == 0 or names[index - 1] != name)


def test_every_round_has_fresh_data_that_is_never_zero():
    seen: list[torch.Tensor] = []
    run([contestant("only", seen=seen)])
    distinct = {tuple(vectors.flatten().tolist()) for vectors in seen}
    assert len(distinct) == 4
    assert all((vectors.abs().sum(1) > 0).all() for vectors in seen)


def test_times_are_recorded_for_a_right_value():
    measured = run([contestant("right")])["right"]
    assert measured.status == race.TIMED
    assert len(measured.wall_s) == len(measured.cpu_s) == 4
    assert min(measured.wall_s) > 0
    assert measured.error == 0


@pytest.mark.parametrize("factor", [1 + 2e-6, 0.5, math.nan, math.inf])
def test_ours_with_a_wrong_value_fails_the_run_and_keeps_no_speed(factor):
    found = run([contestant("right"), contestant("wrong", factor=factor)])
    wrong = found["wrong"]
    assert wrong.status == race.FAILED
    assert not wrong.wall_s
    assert not wrong.cpu_s
    assert "no speed is reported" in wrong.reason
    assert [m.contestant for m in race.failures(list(found.values()))] == ["wrong"]
    assert found["right"].status == race.TIMED


def test_a_value_that_is_right_only_on_the_first_data_fails():
    first = expected_pii(draw(CASE, 0))
    stale = peers.Contestant("stale", peers.OURS, lambda vectors: lambda: first, float)
    found = run([stale])["stale"]
    assert found.status == race.FAILED
    assert not found.wall_s


def test_a_rival_may_be_inaccurate_but_its_error_is_recorded():
    found = run([contestant("rough", factor=1 + 1e-3, group=peers.RIVAL)])
    assert found["rough"].status == race.TIMED
    assert found["rough"].error == pytest.approx(1e-3, rel=1e-6)
    assert not race.failures(list(found.values()))


def test_a_rival_that_raises_is_left_with_its_reason():
    def bind(vectors):
        raise RuntimeError("no such thing\nsecond line")

    found = run([peers.Contestant("broken", peers.RIVAL, bind, float), contestant("right")])
    assert found["broken"].status == race.FAILED
    assert found["broken"].reason == "RuntimeError: no such thing"
    assert found["right"].status == race.TIMED


def test_huge_cases_are_gated_on_their_first_round():
    class Huge(Case):
        huge = True

    case = Huge(24, 16, "float32", least=1, most=1)
    found = run([contestant("right"), contestant("wrong", factor=1.01)], case)
    assert found["right"].error == 0
    assert found["wrong"].status == race.FAILED
    assert not found["wrong"].wall_s


def test_a_refusal_is_recorded_and_not_run():
    log: list[str] = []
    found = run([contestant("shy", log=log, refuses=lambda case: "not today"), contestant("right")])
    assert (found["shy"].status, found["shy"].reason) == (race.LEFT_OUT, "not today")
    assert not log


def test_surroundings_are_entered_around_every_call_and_left():
    inside: list[bool] = []
    depth = [0]

    @contextmanager
    def around(threads):
        depth[0] += 1
        yield
        depth[0] -= 1

    def bind(vectors):
        def call():
            inside.append(depth[0] == 1)
            return expected_pii(vectors)

        return call

    run([peers.Contestant("careful", peers.OURS, bind, float, around=around)])
    assert inside
    assert all(inside)
    assert depth == [0]


def test_threads_and_the_precision_setting_are_restored():
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()

    def fail_inside():
        with peers.medium_precision():
            assert torch.get_float32_matmul_precision() == "medium"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.get_float32_matmul_precision() == precision
    run([contestant("right")])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_contestants_pass_the_gate_on_a_small_case(dtype):
    case = Case(96, 64, dtype, least=1, most=1)
    field = [c for c in peers.field() if c.name != "naive_compiled"]
    found = run(field, case)
    wrong = {m.contestant: m.reason for m in found.values() if m.group != peers.RIVAL and m.status == race.FAILED}
    assert wrong == {}
    assert found["naive"].status == race.TIMED
    assert found["reference"].status == race.TIMED
    assert found["naive_inplace"].value == pytest.approx(found["naive"].value, rel=1e-2)
