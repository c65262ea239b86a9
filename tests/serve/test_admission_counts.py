"""Admission and deadlines: counts and clocks alone, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack, suppress

import pytest

from multi_token.serve.admission import Admission, Deadline
from multi_token.serve.errors import ServeError


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stops the clock; the result moves it on by some seconds."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def refused(admission: Admission, num_choices: int = 1, tenant: str = "") -> ServeError:
    with pytest.raises(ServeError) as caught, admission.admit(num_choices, tenant):
        raise AssertionError("it was admitted")
    return caught.value


def answer(admission: Admission, pass_time: Callable[[float], None], seconds: float) -> None:
    with admission.admit():
        pass_time(seconds)


def test_running_and_waiting_requests_are_bounded() -> None:
    admission = Admission(2, 1)
    with admission.admit(2):
        assert refused(admission, 2).code == "queue_full"
        with admission.admit():
            assert admission.num_admitted == 3
            assert refused(admission).code == "queue_full"
        with admission.admit():
            pass
    assert admission.num_admitted == 0


def test_a_request_needs_one_generation_by_default() -> None:
    admission = Admission(1, 0)
    admission.check_capacity()
    with admission.admit():
        assert admission.num_admitted == 1
        with pytest.raises(ServeError):
            admission.check_capacity()


def test_one_request_may_use_the_complete_capacity_and_no_more() -> None:
    admission = Admission(2, 1)
    with admission.admit(3):
        assert admission.num_admitted == 3
    error = refused(admission, 4)
    assert (error.status, error.code, error.param) == (400, "invalid_value", "n")


def test_a_failed_request_frees_its_capacity() -> None:
    admission = Admission(1, 0)
    for _ in range(3):
        with pytest.raises(RuntimeError), admission.admit():
            raise RuntimeError
    assert admission.num_admitted == 0


def test_no_request_is_admitted_while_draining_and_the_last_one_ends_it() -> None:
    async def drain() -> None:
        admission = Admission(2, 0)
        assert await admission.wait_until_empty(10)  # no request yet
        first, second = admission.admit(), admission.admit()
        with first:
            with second:
                admission.drain()
                error = refused(admission)
                assert (error.status, error.code, error.retry) == (503, "shutting_down", True)
            assert not await admission.wait_until_empty(0.01)
            waiting = asyncio.ensure_future(admission.wait_until_empty(10))
            await asyncio.sleep(0)
        assert await waiting

    asyncio.run(drain())


def test_the_estimated_wait_follows_the_mean_service_time(
    pass_time: Callable[[float], None],
) -> None:
    admission = Admission(2, 10)
    assert admission.estimated_wait_s() == 2  # the initial value
    answer(admission, pass_time, 12)
    assert admission.estimated_wait_s() == 4  # a fifth of the way from 2 to 12
    answer(admission, pass_time, 14)
    assert admission.estimated_wait_s() == 6


def test_a_failed_request_does_not_change_the_mean_service_time(
    pass_time: Callable[[float], None],
) -> None:
    admission = Admission(2, 10)
    with pytest.raises(RuntimeError), admission.admit():
        pass_time(1000)
        raise RuntimeError
    assert admission.estimated_wait_s() == 2


def test_the_estimated_wait_grows_by_one_service_time_for_each_waiting_batch() -> None:
    admission = Admission(2, 100)
    estimates = []
    with ExitStack() as inside:
        for num_more in (1, 1, 1, 1, 2, 6):
            inside.enter_context(admission.admit(num_more))
            estimates.append(admission.estimated_wait_s())
    assert estimates == [2, 2, 3, 4, 6, 12]


def test_retry_after_is_from_one_second_to_a_minute(
    pass_time: Callable[[float], None],
) -> None:
    quick, slow = Admission(1, 0), Admission(1, 0)
    for _ in range(20):
        answer(quick, pass_time, 0)
        answer(slow, pass_time, 1000)
    for admission, seconds in ((Admission(1, 0), 2), (quick, 1), (slow, 60)):
        with admission.admit():
            error = refused(admission)
        assert (error.status, error.code, error.retry_after) == (429, "queue_full", seconds)


def num_admitted_of(admission: Admission, inside: ExitStack, tenants: str) -> dict[str, int]:
    """Tenant -> number of its requests that are admitted, if all tenants go on asking in turn."""
    counts = dict.fromkeys(tenants, 0)
    for tenant in tenants * admission.capacity:
        with suppress(ServeError):
            inside.enter_context(admission.admit(tenant=tenant))
            counts[tenant] += 1
    return counts


def test_a_tenant_alone_leaves_a_quarter_of_the_capacity_to_others() -> None:
    admission = Admission(8, 32, is_shared=True)
    with ExitStack() as inside:
        assert num_admitted_of(admission, inside, "a") == {"a": 30}
        error = refused(admission, tenant="a")
        assert (error.status, error.code) == (429, "queue_full")
        assert "30 requests of this API key" in str(error)
        assert num_admitted_of(admission, inside, "b") == {"b": 7}
        # as many tenants as are left still get a place each
        assert num_admitted_of(admission, inside, "cde") == dict.fromkeys("cde", 1)
        assert "40 requests run or wait" in str(refused(admission, tenant="f"))
    assert admission.num_admitted == 0 and not admission._num_by_tenant


def test_the_message_names_the_tenant_s_requests_while_a_place_is_left_and_all_after() -> None:
    admission = Admission(8, 0, is_shared=True)
    with ExitStack() as inside:
        for tenant in ("first",) * 4 + ("second",) * 3:
            inside.enter_context(admission.admit(tenant=tenant))
        assert "3 requests of this API key" in str(refused(admission, tenant="second"))
        inside.enter_context(admission.admit(tenant="third"))
        assert "8 requests" in str(refused(admission, tenant="fourth"))


def test_tenants_that_ask_for_more_than_there_is_get_equal_shares() -> None:
    admission = Admission(8, 32, is_shared=True)
    with ExitStack() as inside:
        counts = num_admitted_of(admission, inside, "abc")
        assert max(counts.values()) - min(counts.values()) <= 1
        with admission.admit(tenant="d"):
            pass


def test_a_single_key_may_use_the_complete_capacity() -> None:
    admission = Admission(2, 1)
    with ExitStack() as inside:
        assert num_admitted_of(admission, inside, "a") == {"a": 3}


def test_a_small_shared_server_admits_the_first_request_of_each_tenant() -> None:
    admission = Admission(1, 1, is_shared=True)
    with ExitStack() as inside:
        assert num_admitted_of(admission, inside, "a") == {"a": 1}
        assert num_admitted_of(admission, inside, "b") == {"b": 1}


@pytest.mark.parametrize("header", ["soon", "0", "-1", "nan", "inf", "", "1e999"])
def test_a_deadline_is_a_number_of_seconds(header: str) -> None:
    with pytest.raises(ServeError, match="X-Request-Timeout") as caught:
        Deadline.of(header, 300)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_value", "X-Request-Timeout")


def test_a_client_can_only_lower_the_deadline() -> None:
    assert Deadline.of(None, 300).seconds == 300
    assert Deadline.of("1.5", 300).seconds == 1.5
    assert Deadline.of("0.5", 300).seconds == 0.5
    assert Deadline.of("1e9", 300).seconds == 300


def test_the_remaining_time_of_a_deadline_ends_at_zero(
    pass_time: Callable[[float], None],
) -> None:
    deadline = Deadline(3)
    assert deadline.remaining_s == 3
    pass_time(2.5)
    assert deadline.remaining_s == 0.5
    pass_time(10)
    assert deadline.remaining_s == 0


def test_a_request_that_took_too_long_should_not_be_sent_again() -> None:
    error = Deadline(1.5).error()
    assert (error.status, error.code, error.retry) == (504, "deadline_exceeded", False)
    assert "longer than 1.5 s" in str(error)
