"""A batch of jobs is taken apart before it is understood: no job is lost for another's sake."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.queue.jobs import TakenJob, split_jobs

GOOD = b'{"id": "good", "input": {"prompt": "[{\\"]},"}}'
BAD = {
    # From Python 3.12 on some thousand are read.
    "nested for ever": (b'{"id": "bad", "input": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "is nested too deeply"),
    "a long number": (b'{"input": {"seed": ' + b"9" * 5000 + b'}, "id": "bad"}', "can't be read: Exceeds the limit"),
    "no JSON": (b'{"id": "bad", "input": {"a": tru}}', "can't be read: Expecting value"),
}


def test_jobs_as_they_usually_come() -> None:
    assert split_jobs(GOOD) == [TakenJob("good", {"prompt": '[{"]},'})]
    assert split_jobs(b"[" + GOOD + b',{"id": "2"}]') == [TakenJob("good", {"prompt": '[{"]},'}), TakenJob("2", {})]


@pytest.mark.parametrize("body", [b"", b"null", b"[]"])
def test_no_jobs(body: bytes) -> None:
    assert split_jobs(body) == []


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("before", [True, False])
def test_one_that_can_not_be_read_fails_alone(name: str, before: bool) -> None:
    bad, why = BAD[name]
    good = GOOD.replace(b'"good"', b'"first"')
    jobs = split_jobs(b"[" + b", ".join([good, bad, GOOD] if before else [bad, good, GOOD]) + b"]\n")
    found = {job.job_id: job for job in jobs if job is not None}
    assert len(found) == len(jobs)
    assert found["good"].content == found["first"].content == {"prompt": '[{"]},'}
    assert found["bad"].error is not None
    assert why in found["bad"].error.message
    assert found["bad"].error.status == 400
    (alone,) = split_jobs(bad)
    assert alone is not None
    assert alone == TakenJob("bad", error=alone.error)


def test_half_a_surrogate_pair_is_read() -> None:
    for body in (b'[{"id": "1", "input": "\\ud83d"}]', b'[{"id": "1", "input": "\xed\xa0\xbd"}]'):
        (job,) = split_jobs(body)
        assert job is not None
        assert (job.job_id, job.error) == ("1", None)


@pytest.mark.parametrize(
    "job",
    [b"5", b'"text"', b'{"input": 1}', b'{"id": 7}', b'{"id": "two\\nlines"}', b'{"id": ""}', b'{"id": "\\ud800"}'],
)
def test_of_one_without_a_usable_id_nobody_can_be_told(job: bytes) -> None:
    assert split_jobs(b"[" + job + b"," + GOOD + b"]") == [None, TakenJob("good", {"prompt": '[{"]},'})]
    assert split_jobs(job) == [None]


@pytest.mark.parametrize(
    "body", [b"{", b"[", b"]", b'["', b"[" * 50_000, b'{"id": "1", "input": ', b"\xff\xfe", b"x,y"]
)
def test_what_is_no_json_at_all(body: bytes) -> None:
    jobs = split_jobs(body)
    assert jobs
    assert all(job is None or job.error is not None for job in jobs)


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(JSON_VALUES, max_size=4),
    st.integers(0, 4),
    st.sampled_from(["nested for ever", "a long number", "no JSON"]),
    st.booleans(),
)
def test_whatever_stands_beside_one_is_read(inputs: list[Any], at: int, name: str, spaced: bool) -> None:
    texts = [
        json.dumps({"id": str(number), "input": content}, indent=1 if spaced else None).encode()
        for number, content in enumerate(inputs)
    ]
    texts.insert(at, BAD[name][0])
    jobs = split_jobs(b"[" + b",".join(texts) + b"]")
    assert len(jobs) == len(texts)
    assert [(job.job_id, job.content) for job in jobs if job is not None and job.error is None] == [
        (str(number), content) for number, content in enumerate(inputs)
    ]
