"""Who waits for which answer: nothing is lost, however early, late, many or slow."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import DEADLINE
from stores import Gate, add, add_all, in_one_batch, remove

from xs import frame, ids
from xs.answers import (
    KEPT_BYTES,
    KEPT_FRAMES,
    Answers,
    Busy,
    Found,
    Gone,
    Lost,
    RequestWork,
    Stopped,
    Waiter,
)
from xs.bus import RING_FRAMES
from xs.commit import Append, Commit
from xs.content import INLINE_MAX, small
from xs.errors import Damaged, Invalid
from xs.runsteps import begin_run, extend_run
from xs.store import Store
from xs.work import AppendWork, Work


@pytest.fixture
def store(store_dir: str) -> Iterator[Store]:
    found = Store(store_dir, exclusive=True, create=True)
    yield found
    found.close()


@pytest.fixture
def answers(store: Store) -> Iterator[Answers]:
    found = Answers(store, 10)
    found.start()
    yield found
    found.stop()


def ask(store: Store, answers: Answers, **more: Any) -> Waiter:
    """A request, appended, and who waits for its answer."""
    waiter = answers.expect()
    store.submit(RequestWork(Append("http.request", **more), waiter))
    return waiter


def answer(waiter: Waiter, content: bytes = b"", ttl: str = "forever", **meta: Any) -> Append:
    if not {"request_id", "frame_id"} & set(meta):
        meta["request_id"] = waiter.request_id
    text = json.dumps(meta, separators=(",", ":"))
    return Append("http.response", small(content) if content else None, text, ttl)


def content_of(store: Store, found: Found) -> bytes:
    if found.content is not None:
        return found.content
    if found.stored is not None and found.hash is not None:
        return b"".join(store.stored_content(found.stored)[1])
    return b"".join(store.content_of(found.id)[1])


def all_of(store: Store, waiter: Waiter) -> list[bytes]:
    """The contents of an answer, up to its last frame."""
    contents = []
    while True:
        found = waiter.next(DEADLINE)
        contents.append(content_of(store, found))
        if not found.meta.get("more"):
            return contents


def run_of(waiter: Waiter, count: int, ttl: str = "forever", size: int = 0) -> list[Append]:
    """An answer of that many frames, the n-th of which has n as its content."""
    return [
        answer(waiter, str(n).zfill(size).encode(), ttl, more=n < count - 1) for n in range(count)
    ]


# Whose it is


@pytest.mark.parametrize("ttl", ["forever", "ephemeral", "time:100000"])
def test_an_answer_is_found_by_the_request_s_id_and_by_its_frame_s(
    store: Store, answers: Answers, ttl: str
) -> None:
    waiters = [ask(store, answers) for _ in range(3)]
    assert waiters[1].frame_id is not None
    store.append(answer(waiters[2], b"two", ttl))
    store.append(answer(waiters[0], b"zero", ttl, frame_id=waiters[0].frame_id))
    store.append(answer(waiters[1], b"one", ttl, frame_id=waiters[1].frame_id.upper()))
    for waiter, expected in zip(waiters, (b"zero", b"one", b"two")):
        assert all_of(store, waiter) == [expected]


def test_of_two_ids_the_request_s_counts(store: Store, answers: Answers) -> None:
    first, second = ask(store, answers), ask(store, answers)
    store.append(answer(first, b"x", request_id=second.request_id, frame_id=first.frame_id))
    assert all_of(store, second) == [b"x"]
    store.append(answer(first, b"y", request_id=None, frame_id=first.frame_id))
    assert all_of(store, first) == [b"y"], "null is none"


@pytest.mark.parametrize("request_id", ["of another", "", 7, False, [], {"a": 1}])
def test_an_answer_to_nobody_s_request_is_not_given_to_who_caused_it(
    store: Store, answers: Answers, request_id: Any
) -> None:
    gone, waiter = ask(store, answers), ask(store, answers)
    answers.forget(gone)
    for given in (request_id, gone.request_id):
        store.append(answer(waiter, b"another's", request_id=given, frame_id=waiter.frame_id))
    store.append(answer(waiter, b"yes", frame_id=waiter.frame_id))
    assert all_of(store, waiter) == [b"yes"]


def test_what_is_nobody_s_answer_disturbs_nobody(store: Store, answers: Answers) -> None:
    waiter = ask(store, answers)
    metas = ["null", "[]", '"x"', "1", "{}", '{"request_id":[1]}', '{"frame_id":{"a":1}}']
    metas += ['{"request_id":"nobody"}', '{"request_id":' + "9" * 6000 + "}"]
    for text in metas:
        store.append(Append("http.response", meta=text))
    own = json.dumps({"request_id": waiter.request_id})
    for topic in ("http.respons", "http.response.x", "http.request", "my.response", "a"):
        store.append(Append(topic, small(b"no"), own))
    with pytest.raises(TimeoutError):
        waiter.next(0.05)
    store.append(answer(waiter, b"yes"))
    assert all_of(store, waiter) == [b"yes"]


@pytest.mark.parametrize("read", ["at once", "late", "from the index"])
def test_what_continues_a_run_is_not_the_answer_to_who_caused_it(
    store: Store, answers: Answers, read: str
) -> None:
    """A piece names in `frame_id` what caused it; whose it is, its run's first frame says."""
    waiter = ask(store, answers)
    count = 0
    if read != "at once":
        count = KEPT_FRAMES + 50
        add_all(store, run_of(waiter, count + 1)[:-1])

    class Continued(Work):
        def apply(self, commit: Commit) -> None:
            begun = Append("http.response", small(b"a"), '{"request_id":"another","more":true}')
            line, _ = begin_run(commit, begun, "script-x.http.response")
            first, cause = ids.parse(frame.id_of(line)), f'"frame_id":"{waiter.frame_id}"'
            extend_run(commit, first, "script-x.http.response", [small(b"no")], cause)

    store.run(Continued())
    store.append(answer(waiter, b"yes"))
    other = ask(store, answers)
    store.append(answer(other))
    other.next(DEADLINE)  # what was before it was handed out, too
    if read == "from the index":
        add_all(store, [Append("a")] * (2 * RING_FRAMES))
    assert all_of(store, waiter) == [*(b"%d" % n for n in range(count)), b"yes"]


def test_request_ids_are_unlike_each_other(store: Store, answers: Answers) -> None:
    found = set()
    for _ in range(1000):
        waiter = answers.expect()
        found.add(waiter.request_id)
        answers.forget(waiter)
    assert len(found) == 1000


def test_an_answer_to_a_request_that_is_over_is_nobody_s(store: Store, answers: Answers) -> None:
    waiter, other = ask(store, answers), ask(store, answers)
    answers.forget(waiter)
    store.append(answer(waiter, b"late", frame_id=waiter.frame_id))
    store.append(answer(other, b"x"))
    assert all_of(store, other) == [b"x"]
    with pytest.raises(TimeoutError):
        waiter.next(0.0)


# Never too early


def test_a_request_that_is_over_before_it_is_appended_leaves_nothing(
    store: Store, answers: Answers
) -> None:
    gate = Gate()
    held = threading.Thread(target=store.run, args=(gate,))
    held.start()
    assert gate.entered.wait(DEADLINE)
    waiter = ask(store, answers)
    answers.forget(waiter)
    gate.opened.set()
    held.join(DEADLINE)
    store.append(Append("after"))
    assert waiter.frame_id is not None
    assert not answers._by_frame and not answers._by_request


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_answer_that_is_damaged_keeps_no_other_from_who_waits_for_it(
    store: Store, answers: Answers, place: int
) -> None:
    waiters = [ask(store, answers) for _ in range(3)]
    lines = in_one_batch(
        store, [AppendWork(answer(each, b"x" * 100)) for each in waiters] + [Damage(place)]
    )
    assert len(lines) == 4
    for n, waiter in enumerate(waiters):
        found = waiter.next(DEADLINE)
        if n == place:
            with pytest.raises(Damaged):
                content_of(store, found)
        else:
            assert content_of(store, found) == b"x" * 100


class Damage(Work):
    """Spoils what the disk has of one of the newest answers, before anybody can look."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self._place = place

    def apply(self, commit: Commit) -> None:
        commit.writer.flush()
        rows = "SELECT row FROM frame ORDER BY row DESC LIMIT 3"
        commit.writer.execute(
            f"UPDATE frame SET sum = sum + 1 WHERE row = (SELECT row FROM ({rows}) ORDER BY row "
            f"LIMIT 1 OFFSET {self._place})"
        )


def test_an_answer_that_is_there_before_anybody_looks_is_not_lost(
    store: Store, answers: Answers
) -> None:
    for _ in range(50):
        waiter = answers.expect()
        # The request, and its answer, in one and the same commit.
        line, _ = in_one_batch(store, [waited_for(waiter), _AnswerWork(waiter)])
        assert all_of(store, waiter) == [frame.id_of(line).encode()]
        answers.forget(waiter)


def waited_for(waiter: Waiter) -> RequestWork:
    """A request's work for who waits for the work itself."""
    work = RequestWork(Append("http.request"), waiter)
    work.done = None
    return work


class _AnswerWork(Work):
    """Answers by the frame's id as soon as there is one: before it is committed."""

    def __init__(self, waiter: Waiter) -> None:
        super().__init__()
        self.asks = waiter

    def apply(self, commit: Commit) -> bytes:
        assert self.asks.frame_id is not None
        meta = {"frame_id": self.asks.frame_id}
        text = self.asks.frame_id.encode()
        return commit.append(Append("http.response", small(text), json.dumps(meta)))


def test_a_request_whose_commit_is_done_again_is_found_by_its_second_id(
    store: Store, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Work):
        def apply(self, commit: Commit) -> None:
            raise RuntimeError("this work alone is to blame")

    waiter = answers.expect()
    first_ids = []
    named = answers.named
    answers.named = lambda who, id_text: (first_ids.append(id_text), named(who, id_text))[1]  # type: ignore[method-assign,func-returns-value]
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)  # where it is told with its place
    line, error = in_one_batch(store, [waited_for(waiter), Broken()])
    assert "to blame" in str(error) and len(told) == 1
    assert len(first_ids) == 2 and waiter.frame_id == first_ids[1] == frame.id_of(line)
    assert list(answers._by_frame) == [waiter.frame_id]
    store.append(answer(waiter, b"x", frame_id=waiter.frame_id))
    assert all_of(store, waiter) == [b"x"]


# Many, and slow readers


def test_frames_come_in_order_and_wake_who_waits_for_each(store: Store, answers: Answers) -> None:
    waiter = ask(store, answers)
    for n in range(20):
        store.append(answer(waiter, b"%d" % n, more=True))
        assert content_of(store, waiter.next(DEADLINE)) == b"%d" % n
    with pytest.raises(TimeoutError):
        waiter.next(0.01)


@pytest.mark.parametrize("moved_on", [False, True])
def test_a_frame_s_id_may_be_in_either_case_also_when_it_is_read_late(
    store: Store, answers: Answers, moved_on: bool
) -> None:
    waiter = ask(store, answers)
    assert waiter.frame_id is not None
    count = KEPT_FRAMES + 50
    ids = (waiter.frame_id, waiter.frame_id.upper())
    add_all(
        store,
        [answer(waiter, b"%d" % n, frame_id=ids[n % 2], more=n < count - 1) for n in range(count)],
    )
    if moved_on:
        add_all(store, [Append("a")] * (2 * RING_FRAMES))
    assert all_of(store, waiter) == [b"%d" % n for n in range(count)]


@pytest.mark.parametrize("ttl", ["forever", "ephemeral"])
@pytest.mark.parametrize("count", [KEPT_FRAMES, KEPT_FRAMES + 1, 3000, 5 * KEPT_FRAMES + 7])
def test_who_reads_late_gets_every_frame_in_order(
    store: Store, answers: Answers, ttl: str, count: int
) -> None:
    waiter, other = ask(store, answers), ask(store, answers)
    mixed = []
    for own, its in zip(run_of(waiter, count, ttl), run_of(other, count, ttl)):
        mixed += [own, its, Append("a")]
    add_all(store, mixed)
    expected = [str(n).encode() for n in range(count)]
    assert all_of(store, other) == expected
    assert all_of(store, waiter) == expected


def test_who_reads_after_the_ring_has_moved_on_gets_stored_frames_from_the_index(
    store: Store, answers: Answers
) -> None:
    waiter = ask(store, answers)
    large = small(b"x" * INLINE_MAX)
    add_all(store, run_of(waiter, 2000))
    store.append(Append("http.response", None, '{"request_id":"another\'s"}'))
    add_all(store, [Append("a")] * (2 * RING_FRAMES))
    add_all(store, [Append("b", large)] * 100)
    assert all_of(store, waiter) == [str(n).encode() for n in range(2000)]


def test_an_id_that_is_written_with_escapes_is_found_in_the_index_as_well(
    store: Store, answers: Answers
) -> None:
    waiter = ask(store, answers)
    escaped = "".join(rf"\u{ord(letter):04x}" for letter in waiter.request_id)
    run = [
        Append(each.topic, each.content, each.meta.replace(waiter.request_id, escaped), each.ttl)
        for each in run_of(waiter, 10 * KEPT_FRAMES)
    ]
    add_all(store, run)
    add_all(store, [Append("a")] * (2 * RING_FRAMES))
    assert all_of(store, waiter) == [str(n).encode() for n in range(len(run))]


def test_while_it_catches_up_more_may_come(store: Store, answers: Answers) -> None:
    waiter = ask(store, answers)
    run = run_of(waiter, 20_000)
    found = []
    for start in range(0, 20_000, 500):
        add_all(store, run[start : start + 500])
        for _ in range(100 if start < 15_000 else 17_000 // 10):
            found.append(content_of(store, waiter.next(DEADLINE)))
    while len(found) < 20_000:
        found.append(content_of(store, waiter.next(DEADLINE)))
    assert found == [str(n).encode() for n in range(20_000)]


def test_what_is_kept_for_a_slow_reader_is_bounded(store: Store, answers: Answers) -> None:
    waiter = ask(store, answers)
    add_all(store, run_of(waiter, 100, size=INLINE_MAX))
    add_all(store, run_of(waiter, 1000, size=1))
    last = ask(store, answers)
    store.append(answer(last))
    last.next(DEADLINE)  # what was before it was handed out, too
    kept = sum(each.size for each in waiter._found)
    assert len(waiter._found) <= KEPT_FRAMES
    assert kept <= KEPT_BYTES + INLINE_MAX + 1000


def test_ephemeral_frames_that_have_left_the_ring_end_the_answer(
    store: Store, answers: Answers
) -> None:
    waiter = ask(store, answers)
    add_all(store, run_of(waiter, KEPT_FRAMES + 10, "ephemeral"))
    add_all(store, [Append("a")] * (2 * RING_FRAMES))
    for n in range(KEPT_FRAMES):
        assert content_of(store, waiter.next(DEADLINE)) == b"%d" % n
    with pytest.raises(Lost):
        waiter.next(DEADLINE)


def test_frames_that_were_removed_before_they_were_read_end_the_answer(
    store: Store, answers: Answers
) -> None:
    waiter = ask(store, answers)
    lines = add_all(store, run_of(waiter, KEPT_FRAMES + 10))
    last = ask(store, answers)
    store.append(answer(last))
    last.next(DEADLINE)
    remove(store, frame.id_of(lines[KEPT_FRAMES + 5]))
    for _ in range(KEPT_FRAMES + 9):
        waiter.next(DEADLINE)
    with pytest.raises(Lost):
        waiter.next(DEADLINE)


@pytest.mark.parametrize("ttl", ["forever", "ephemeral"])
def test_an_answer_after_much_that_nobody_wanted_is_found(
    store: Store, answers: Answers, ttl: str
) -> None:
    waiter = ask(store, answers)
    add_all(store, [Append("a")] * (3 * RING_FRAMES))
    store.append(answer(waiter, b"x", ttl))
    assert all_of(store, waiter) == [b"x"]


def test_an_answer_in_a_batch_that_is_larger_than_the_ring_is_found(
    store: Store, answers: Answers
) -> None:
    waiter = ask(store, answers)
    many = [Append("a")] * (2 * RING_FRAMES)
    add_all(store, [*many, answer(waiter, b"1", more=True), *many, answer(waiter, b"2"), *many])
    assert all_of(store, waiter) == [b"1", b"2"]


def test_an_answer_is_found_amid_imports(store: Store, answers: Answers) -> None:
    from stores import import_all, imported

    waiter = ask(store, answers)
    store.append(answer(waiter, b"1", more=True))
    import_all(store, [imported(store.clock() << 80 | 5 << 60, "a")])
    store.append(answer(waiter, b"2"))
    assert all_of(store, waiter) == [b"1", b"2"]


# Bounds and ends


def test_above_the_bound_nobody_may_wait_until_an_answer_has_begun(store: Store) -> None:
    answers = Answers(store, 2)
    answers.start()
    first, second = ask(store, answers), ask(store, answers)
    assert answers.waiting == 2
    with pytest.raises(Busy):
        answers.expect()
    store.append(answer(first, more=True))
    first.next(DEADLINE)
    assert answers.waiting == 1, "a run that has begun is not among those who wait"
    third = ask(store, answers)
    with pytest.raises(Busy):
        answers.expect()
    for waiter in (first, second, third):
        answers.forget(waiter)
    assert answers.waiting == 0
    assert not answers._by_request and not answers._by_frame
    answers.stop()


def test_it_is_told_what_its_request_has_failed_with(store: Store, answers: Answers) -> None:
    waiter = answers.expect()
    content = store.cas.take([b"x" * (INLINE_MAX + 1)])
    store.submit(RequestWork(Append("http.request", content, ttl="ephemeral"), waiter))
    with pytest.raises(Invalid):
        waiter.next(DEADLINE)


def test_who_waits_is_told_that_its_client_has_gone(store: Store, answers: Answers) -> None:
    waiter = ask(store, answers)
    threading.Timer(0.05, lambda: waiter.fail(Gone())).start()
    with pytest.raises(Gone):
        waiter.next(DEADLINE)
    store.append(answer(waiter, b"x"))
    with pytest.raises(Gone):
        waiter.next(DEADLINE)


def test_who_waits_is_told_that_the_server_stops_after_what_has_come(store: Store) -> None:
    answers = Answers(store, 10)
    answers.start()
    waiter, other = ask(store, answers), ask(store, answers)
    store.append(answer(waiter, b"x", more=True))
    store.append(answer(other, b"y", more=True))
    assert content_of(store, other.next(DEADLINE)) == b"y"
    answers.stop()
    assert content_of(store, waiter.next(DEADLINE)) == b"x"
    for each in (waiter, other):
        with pytest.raises(Stopped):
            each.next(DEADLINE)


def test_it_waits_no_longer_than_it_was_told_to_whatever_wakes_it(
    store: Store, answers: Answers
) -> None:
    waiter = ask(store, answers)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.wait(0.01):
            waiter._wake()

    thread = threading.Thread(target=disturb)
    thread.start()
    with pytest.raises(TimeoutError):
        waiter.next(0.1)
    stop.set()
    thread.join()


def test_the_thread_of_answers_is_woken_by_answers_alone(store: Store, answers: Answers) -> None:
    woken = []
    wake = answers._watch.wake
    store.bus.unwatch(answers._watch)
    answers._watch = store.bus.watch(answers._watch.wants, lambda: (woken.append(1), wake())[1])
    waiter = ask(store, answers)
    for _ in range(100):
        add(store, "a")
        add(store, "http.request")
    assert not woken
    store.append(answer(waiter, b"x"))
    assert all_of(store, waiter) == [b"x"]
    assert len(woken) == 1
