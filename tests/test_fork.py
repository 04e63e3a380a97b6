"""Rule 9: after `os.fork()` a child has usable sources, whatever the parent's threads were doing at that moment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this platform")

PRELUDE = """
import asyncio, os, sys, threading, time
from interceptors import CallableTokenSource, FileStore, MemoryStore, RefreshingTokenSource, Session, Token, TokenSource

def session(name, lifetime=3600.0):
    now = time.time()
    return Session(access_token=name, issued_at=now, expires_at=now + lifetime, refresh_token="r-" + name)

def in_child(work):
    '''Runs `work` in a forked child, which must end in time, and returns whether it returned true.'''
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    sys.exit("the child hangs")

def loops(source):
    async def main():
        tokens = await asyncio.gather(*(source.token_async(timeout=20) for _ in range(20)))
        return {token.value for token in tokens}
    return asyncio.run(main())
"""


def run_program(text, *arguments):
    program = textwrap.dedent(PRELUDE) + textwrap.dedent(text)
    finished = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert (finished.returncode, finished.stderr) == (0, ""), finished.stderr
    return finished.stdout


def test_a_child_of_a_process_with_a_running_source_refreshes_by_itself():
    run_program("""
        names = iter(range(1, 100))
        source = RefreshingTokenSource(MemoryStore(session("t0")), lambda _: session(f"t{next(names)}"))
        source.reject(source.token())
        assert source.token(timeout=20).value == "t1"  # the thread runs

        def work():
            assert source.peek().value == "t1"
            source.accept(source.peek())
            source.reject(source.peek())
            assert source.token(timeout=20).value == "t2"
            assert loops(source) == {"t2"}
            source.close()
            return True

        assert in_child(work)
        assert source.peek().value == "t1"  # the parent goes on as before
        source.accept(source.peek())
        source.reject(source.peek())
        assert source.token(timeout=20).value == "t2"
    """)


def test_a_child_that_is_forked_during_a_refresh_takes_its_result_from_the_store(tmp_path):
    run_program(
        """
        store = FileStore(sys.argv[1])
        store.save(session("old", lifetime=-1.0))
        begun, go_on, asked = threading.Event(), threading.Event(), []

        def refresh(old):
            asked.append(old)
            begun.set()
            assert go_on.wait(20)
            return session("new")

        source = RefreshingTokenSource(store, refresh)
        waiting = threading.Thread(target=lambda: source.token(timeout=20))
        waiting.start()
        assert begun.wait(20)

        def work():
            go_on.set()  # the child's own copy
            return source.token(timeout=20).value == "new" and len(asked) == 1  # 1: inherited from the parent

        threading.Timer(0.5, go_on.set).start()
        assert in_child(work)
        waiting.join(20)
        assert source.token().value == "new"
        assert len(asked) == 1
        """,
        tmp_path / "session",
    )


def test_a_child_that_is_forked_before_a_saved_session_is_in_use_takes_it_from_the_store(tmp_path):
    run_program(
        """
        store = FileStore(sys.argv[1])
        store.save(session("old", lifetime=-1.0))
        asked, saved, go_on = [], threading.Event(), threading.Event()
        parent = os.getpid()

        def refresh(old):
            asked.append(old.access_token)
            return session("new")

        def jitter():  # is asked for when a session is put to use
            if asked and os.getpid() == parent:
                saved.set()
                assert go_on.wait(20)
            return 0.0

        source = RefreshingTokenSource(store, refresh, jitter=jitter)
        source._hold(store.load())  # the old one is in use
        source._seen = store.load()
        waiting = threading.Thread(target=lambda: source.token(timeout=20))
        waiting.start()
        assert saved.wait(20)
        # The parent still holds the lock: the child waits for it.
        threading.Timer(0.5, go_on.set).start()
        assert in_child(lambda: source.token(timeout=20).value == "new" and asked == ["old"])
        waiting.join(20)
        """,
        tmp_path / "session",
    )


def test_a_child_that_is_forked_during_a_refresh_of_a_session_in_memory_refreshes_by_itself():
    run_program("""
        begun, go_on = threading.Event(), threading.Event()

        def refresh(old):
            begun.set()
            assert go_on.wait(20)
            return session("new")

        source = RefreshingTokenSource(MemoryStore(session("old", lifetime=-1.0)), refresh)
        waiting = threading.Thread(target=lambda: source.token(timeout=20))
        waiting.start()
        assert begun.wait(20)

        def work():
            try:
                source.token(timeout=0.05)
            except TimeoutError:
                pass
            go_on.set()
            return source.token(timeout=20).value == "new"

        assert in_child(work)
        go_on.set()
        waiting.join(20)
        assert source.token().value == "new"
    """)


@pytest.mark.parametrize(
    "held", ["source._lock", "store._lock", "source._token_waiter._condition", "alarms._condition"]
)
def test_a_child_that_is_forked_while_a_thread_holds_a_lock_is_not_stuck(held):
    run_program(f"""
        from interceptors.waiting import alarms, waiter_of
        store = MemoryStore(session("old"))
        names = iter(range(1, 100))
        source = RefreshingTokenSource(store, lambda _: session(f"t{{next(names)}}"))
        waiter_of(source).request(timeout=20).result(20)
        locked, go_on = threading.Event(), threading.Event()

        def hold():
            with {held}:
                locked.set()
                go_on.wait(20)

        threading.Thread(target=hold).start()
        assert locked.wait(20)

        def work():
            source.reject(source.token(timeout=20))
            assert waiter_of(source).request(timeout=20).result(20).value == "t1"
            source.reject(Token("t1"))
            return source.token(timeout=20) and loops(source)

        assert in_child(work)
        go_on.set()
    """)


def test_a_child_that_is_forked_while_a_callable_source_is_inside_its_function_is_not_stuck():
    run_program("""
        begun, go_on = threading.Event(), threading.Event()
        parent = os.getpid()

        def fn(force_refresh):
            begun.set()
            if os.getpid() == parent:
                assert go_on.wait(20)
            return "forced" if force_refresh else "abc"

        source = CallableTokenSource(fn)
        threads = [threading.Thread(target=lambda: source.token(timeout=t)) for t in (None, 20)]
        for thread in threads:
            thread.start()
        assert begun.wait(20)

        def work():
            first = source.token(timeout=20)
            source.reject(first)
            return source.token().value == source.token(timeout=20).value == "forced" and loops(source)

        assert in_child(work)
        go_on.set()
    """)


def test_children_of_children_and_many_children_are_served():
    run_program("""
        names = iter(range(1, 1000))
        source = RefreshingTokenSource(MemoryStore(session("t0")), lambda _: session(f"t{next(names)}"))
        source.token(timeout=20)

        def refreshes():
            source.reject(source.token(timeout=20))
            return source.token(timeout=20)

        assert all(in_child(refreshes) for _ in range(5))
        assert in_child(lambda: refreshes() and in_child(refreshes))
    """)


def test_a_child_that_ends_normally_does_not_wait_for_the_parents_threads():
    run_program("""
        source = RefreshingTokenSource(MemoryStore(session("t0")), lambda _: session("t1"))
        source.reject(source.token(timeout=20))
        source.token(timeout=20)

        child = os.fork()
        if child == 0:
            sys.exit(0)  # runs atexit, which closes sources
        begin = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert time.monotonic() - begin < 20
    """)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_worker_processes_can_use_a_source_however_they_are_started(method, tmp_path):
    if method == "fork":
        program = """
            import multiprocessing
            source = RefreshingTokenSource(MemoryStore(session("t0")), lambda _: session("t1"))
            source.reject(source.token(timeout=20))

            def work(_):
                return source.token(timeout=20).value

            with multiprocessing.get_context("fork").Pool(2) as pool:
                assert set(pool.map(work, range(10))) == {"t1"}
        """
        run_program(program)
    else:
        module = tmp_path / "worker_module.py"
        module.write_text(
            "from interceptors import FileStore, RefreshingTokenSource\n"
            "def work(path):\n"
            "    with RefreshingTokenSource(FileStore(path), print) as source:\n"
            "        return source.token(timeout=20).value\n"
        )
        run_program(
            f"""
            import multiprocessing
            if __name__ == "__main__":
                sys.path.insert(0, {str(tmp_path)!r})
                import worker_module
                FileStore(sys.argv[1]).save(session("t0"))
                with multiprocessing.get_context({method!r}).Pool(2) as pool:
                    assert set(pool.map(worker_module.work, [sys.argv[1]] * 4)) == {{"t0"}}
            """,
            tmp_path / "session",
        )
