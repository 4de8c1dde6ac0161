"""Background threads: results, order, limits, errors on either side, Ctrl-C, and no thread that keeps running."""

import gc
import os
import signal
import threading
import time
import weakref

import pytest

from emkd.background import BackgroundCall, BackgroundConsumer

LIMIT = 100


NAME = "emkd-test"


def consumer(take, size, limit):
    return BackgroundConsumer(take, size, limit, NAME)


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def gone() -> bool:
    return all(thread.name != NAME for thread in threading.enumerate())


def test_a_result_comes_from_another_thread():
    call = BackgroundCall(threading.current_thread, NAME)
    found = call.result()
    assert found is not threading.current_thread()
    assert found.name == NAME
    assert gone()


def test_nothing_is_a_result_too():
    assert BackgroundCall(lambda: None, NAME).result() is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_is_raised_once_in_the_thread_that_waits(error):
    def fail():
        raise error

    call = BackgroundCall(fail, NAME)
    assert call.wait()
    with pytest.raises(type(error)) as caught:
        call.result()
    assert caught.value is error
    with pytest.raises(ValueError, match="the result of the thread emkd-test was taken before"):
        call.result()
    assert gone()


def test_what_a_failed_call_held_goes_with_its_error():
    """Without a search for cycles: it may be most of the memory."""

    class Large:
        pass

    freed = threading.Event()

    def fail():
        large = Large()
        weakref.finalize(large, freed.set)
        raise RuntimeError("no memory")

    def run():
        call = BackgroundCall(fail, NAME)
        try:
            call.result()
        except RuntimeError:
            return

    gc.disable()
    try:
        run()
        assert freed.is_set()
    finally:
        gc.enable()


def test_waiting_ends_after_a_while():
    door = threading.Event()
    call = BackgroundCall(door.wait, NAME)
    assert not call.wait(timeout=0.01)
    door.set()
    assert call.wait(timeout=30)
    assert call.result() is True


def interrupt_soon():
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_is_heard_while_a_result_is_waited_for():
    """The call continues: the code that started it decides how to end it."""
    door = threading.Event()
    call, timer = BackgroundCall(door.wait, NAME), interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        call.result()
    assert not gone()
    door.set()
    assert call.result() is True
    timer.join()
    assert gone()


def test_ctrl_c_is_heard_while_there_is_no_room():
    door, taken = threading.Event(), []

    def take(item):
        taken.append(item)
        door.wait(30)

    def put_all():
        with consumer(take, lambda item: 1, 1) as consuming:
            consuming.put(1)
            timers.append(interrupt_soon())
            timers.append(threading.Timer(0.4, door.set))
            timers[-1].start()
            consuming.put(2)
            pytest.fail("there was no room for the second")

    timers = []
    with pytest.raises(KeyboardInterrupt):
        put_all()
    for timer in timers:
        timer.join()
    assert taken == [1]
    assert gone()


def test_nothing_is_put_once_the_block_is_left():
    with consumer(print, lambda item: 1, LIMIT) as consuming:
        pass
    with pytest.raises(ValueError, match="the thread emkd-test has ended: its block was left"):
        consuming.put(1)


def test_an_error_that_the_block_swallowed_does_not_end_well():
    def take(item):
        raise OSError("in the thread")

    def block():
        with consumer(take, lambda item: 1, 1) as consuming:
            consuming.put(1)
            with pytest.raises(OSError, match="in the thread"):
                consuming.put(2)

    with pytest.raises(ValueError, match="was taken before"):
        block()


def test_everything_is_taken_in_order_by_another_thread():
    taken, threads = [], set()

    def take(item):
        threads.add(threading.get_ident())
        taken.append(item)

    with consumer(take, lambda item: 1, LIMIT) as consuming:
        for item in range(1000):
            consuming.put(item)
    assert taken == list(range(1000))
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert gone()


def test_it_goes_on_while_the_other_does_something_else():
    taken = []
    with consumer(taken.append, lambda item: 1, LIMIT) as consuming:
        consuming.put("first")
        until(lambda: taken == ["first"])
        consuming.put("second")
    assert taken == ["first", "second"]


@pytest.mark.parametrize(("size", "most"), [(30, 3), (50, 2), (51, 1), (1000, 1)])
def test_no_more_is_held_than_there_is_room_for(size, most):
    """The item that is being taken counts, too. An item that exceeds the limit is accepted if it is alone."""
    door, counted = threading.Semaphore(0), threading.Lock()
    put = done = highest = 0

    def take(item):
        nonlocal done
        door.acquire()
        with counted:
            done += 1

    def maker():
        nonlocal put, highest
        with consumer(take, lambda item: size, LIMIT) as consuming:
            for _ in range(10):
                consuming.put(object())
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
        with consumer(take, lambda item: 1, 1) as consuming:
            for item in range(10_000):
                consuming.put(item)

    with pytest.raises(OSError, match="No space left") as caught:
        put_all()
    assert caught.value is error
    assert taken == [0, 1, 2, 3]
    assert gone()


def test_an_error_of_the_last_item_is_raised_at_the_end():
    def take(item):
        raise ValueError("the last one")

    with pytest.raises(ValueError, match="the last one"), consumer(take, lambda item: 1, LIMIT) as consuming:
        consuming.put(1)
    assert gone()


def test_an_error_frees_one_that_waits_for_room():
    door = threading.Event()

    def take(item):
        door.wait(30)
        raise MemoryError

    timer = threading.Timer(0.05, door.set)
    timer.start()

    def put_two():
        with consumer(take, lambda item: LIMIT, LIMIT) as consuming:
            consuming.put(1)
            consuming.put(2)
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
        with consumer(take, lambda item: 1, LIMIT) as consuming:
            for item in range(5):
                consuming.put(item)
            until(lambda: taken)
            threading.Timer(0.05, door.set).start()
            raise error

    with pytest.raises(type(error)) as caught:
        block()
    assert caught.value is error
    assert taken == [0], "the current item is finished, and no other one is started"
    assert gone()


def test_of_two_errors_it_is_the_one_of_the_block_that_is_raised():
    """An error that the interrupt caused must not hide the interrupt."""

    def take(item):
        raise ValueError("in the thread")

    def block():
        with consumer(take, lambda item: 1, LIMIT) as consuming:
            consuming.put(1)
            until(gone)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
