"""A thread that takes what another makes: order, room, errors of either side, and nothing that runs on."""

import threading
import time

import pytest

from emkd.pipeline.behind import Behind

LIMIT = 100


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def gone() -> bool:
    return all(thread.name != "emkd-behind" for thread in threading.enumerate())


def test_everything_is_taken_in_order_by_another_thread():
    taken, threads = [], set()

    def take(item):
        threads.add(threading.get_ident())
        taken.append(item)

    with Behind(take, lambda item: 1, LIMIT) as behind:
        for item in range(1000):
            behind.put(item)
    assert taken == list(range(1000))
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert gone()


def test_it_goes_on_while_the_other_does_something_else():
    taken = []
    with Behind(taken.append, lambda item: 1, LIMIT) as behind:
        behind.put("first")
        until(lambda: taken == ["first"])
        behind.put("second")
    assert taken == ["first", "second"]


@pytest.mark.parametrize(("size", "most"), [(30, 3), (50, 2), (51, 1), (1000, 1)])
def test_no_more_is_held_than_there_is_room_for(size, most):
    """The one that is being taken is held, too. A larger one than the room is let in by itself."""
    door, counted = threading.Semaphore(0), threading.Lock()
    put = done = highest = 0

    def take(item):
        nonlocal done
        door.acquire()
        with counted:
            done += 1

    def maker():
        nonlocal put, highest
        with Behind(take, lambda item: size, LIMIT) as behind:
            for _ in range(10):
                behind.put(object())
                with counted:
                    put += 1
                    highest = max(highest, put - done)

    thread = threading.Thread(target=maker)
    thread.start()
    for _ in range(10):
        until(lambda: put == min(10, done + most))  # and then the next `put` waits
        before = done
        door.release()
        until(lambda before=before: done == before + 1)
    thread.join()
    assert (put, done) == (10, 10)
    # An item that is taken has left before its room is free: `done` may be ahead, and never behind.
    assert highest <= most
    assert gone()


def test_its_error_is_raised_as_it_is_and_nothing_more_is_taken():
    error, taken = OSError(28, "No space left on device"), []

    def take(item):
        taken.append(item)
        if item == 3:
            raise error

    def put_all():
        with Behind(take, lambda item: 1, 1) as behind:
            for item in range(10_000):
                behind.put(item)

    with pytest.raises(OSError, match="No space left") as caught:
        put_all()
    assert caught.value is error
    assert taken == [0, 1, 2, 3]
    assert gone()


def test_an_error_of_the_last_item_is_raised_at_the_end():
    def take(item):
        raise ValueError("the last one")

    with pytest.raises(ValueError, match="the last one"), Behind(take, lambda item: 1, LIMIT) as behind:
        behind.put(1)
    assert gone()


def test_an_error_frees_one_that_waits_for_room():
    door = threading.Event()

    def take(item):
        door.wait(30)
        raise MemoryError

    timer = threading.Timer(0.05, door.set)
    timer.start()

    def put_two():
        with Behind(take, lambda item: LIMIT, LIMIT) as behind:
            behind.put(1)
            behind.put(2)
            pytest.fail("there was no room for the second")

    with pytest.raises(MemoryError):
        put_two()
    timer.join()
    assert gone()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("CUDA error: an illegal memory access")])
def test_an_error_of_the_block_stops_it_and_drops_what_waits(error):
    door, taken = threading.Event(), []

    def take(item):
        taken.append(item)
        door.wait(30)

    def block():
        with Behind(take, lambda item: 1, LIMIT) as behind:
            for item in range(5):
                behind.put(item)
            until(lambda: taken)
            threading.Timer(0.05, door.set).start()
            raise error

    with pytest.raises(type(error)) as caught:
        block()
    assert caught.value is error
    assert taken == [0], "what is in hand is finished, and no other begun"
    assert gone()


def test_of_two_errors_it_is_the_one_of_the_block_that_is_raised():
    """An interrupt must not be hidden by what it made hopeless anyway."""

    def take(item):
        raise ValueError("in the thread")

    def block():
        with Behind(take, lambda item: 1, LIMIT) as behind:
            behind.put(1)
            until(gone)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
