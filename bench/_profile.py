"""Where a server's time goes under a load: `tools/profile LOAD [SECONDS]` (see there).

Three runs of the load, each on a server of its own in a process of its own:

bare     only what the kernel counts: processor time and context switches of each thread;
sample   a thread looks at all others every millisecond (`sys._current_frames`). It sees where
         threads wait; of what runs it sees more of those lines that give up the interpreter's lock
         than their share, since it needs that lock itself;
profile  cProfile in every thread, on the thread's own processor time. It counts calls exactly,
         and makes small Python functions look dearer than C.
"""

from __future__ import annotations

import collections
import cProfile
import linecache
import os
import pstats
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from _measure import (
    CONTENT,
    DEADLINE,
    ROOT,
    Client,
    Crowd,
    discard,
    folder,
    populate,
    rate_of_one,
    request,
)

from xs import threads

TOP = 30
INTERVAL = 0.001
WEB = ".web"  # the gateway's socket is beside the store


# The server's side


def serve(mode: str, path: str) -> None:
    from xs import gateway, server

    web = server.Web([path + WEB], gateway.Options())
    if mode == "sample":
        sampler = Sampler()
        server.serve(path, web=web)
        sampler.print()
    elif mode == "profile":
        profiles = profile_threads()
        server.serve(path, web=web)
        print_profiles(profiles)
    else:
        watcher = Watcher()
        server.serve(path, web=web)
        watcher.print()


class Watcher:
    """What the kernel knows of each thread, until it ended or the server did (Linux)."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._seen: dict[int, tuple[float, float, int, int]] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="(watcher)", daemon=True).start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self._look()

    def _look(self) -> None:
        for thread in threading.enumerate():
            self._names[thread.native_id or 0] = thread.name
        for name, number in list(threads.running.values()):
            self._names[number] = name
        tick = os.sysconf("SC_CLK_TCK")
        for task in Path("/proc/self/task").iterdir():
            try:
                stat = (task / "stat").read_text().rsplit(")", 1)[1].split()
                status = (task / "status").read_text()
            except OSError:
                continue  # it has ended
            switches = [
                int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line
            ]
            self._seen[int(task.name)] = (
                int(stat[11]) / tick,
                int(stat[12]) / tick,
                switches[0],
                switches[1],
            )

    def print(self) -> None:
        self._ended.set()
        found = collections.defaultdict(list)
        for number, seen in self._seen.items():
            name = self._names.get(number, "?")
            found[name].append(seen)
        print(
            f"{'thread':<24}{'how many':>9}{'user s':>9}{'system s':>10}{'waits':>10}{'forced':>9}"
        )
        for name, all_seen in sorted(found.items(), key=lambda item: -sum(s[0] for s in item[1])):
            user, system, waits, forced = (sum(column) for column in zip(*all_seen))
            print(f"{name:<24}{len(all_seen):>9}{user:>9.2f}{system:>10.2f}{waits:>10}{forced:>9}")


class Sampler:
    """Counts where threads are, line by line and function by function."""

    def __init__(self) -> None:
        self._lines: collections.Counter[tuple[str, str, int]] = collections.Counter()
        self._stacks: collections.Counter[tuple[str, ...]] = collections.Counter()
        self._samples = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="(sampler)", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ended.is_set():
            time.sleep(INTERVAL)
            names = {t.ident: t.name for t in threading.enumerate()}
            names.update((ident, name) for ident, (name, _) in list(threads.running.items()))
            self._samples += 1
            for number, frame in sys._current_frames().items():
                if number != self._thread.ident:
                    self._count(names.get(number, "?"), frame)

    def _count(self, thread: str, leaf: FrameType) -> None:
        code = leaf.f_code
        self._lines[thread, code.co_filename, leaf.f_lineno] += 1
        stack = []
        frame: Any = leaf
        while frame is not None and len(stack) < 6:
            if "/xs/" in frame.f_code.co_filename or not stack:
                stack.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
            frame = frame.f_back
        self._stacks[(thread, *reversed(stack))] += 1

    def print(self) -> None:
        self._ended.set()
        self._thread.join()
        print(f"{self._samples} samples; a thread's lines, in samples:")
        for (thread, path, line), count in self._lines.most_common(TOP):
            text = linecache.getline(path, line).strip()
            print(f"{count:>8}  {thread:<14}{Path(path).stem}:{line:<5} {text[:70]}")
        print("functions below each other:")
        for (thread, *stack), count in self._stacks.most_common(TOP // 2):
            print(f"{count:>8}  {thread:<14}{' > '.join(stack)}")


def profile_threads() -> list[cProfile.Profile]:
    """From now on every thread has a profile of its own, on its own processor time."""
    profiles: list[cProfile.Profile] = []
    run = threads.run

    def profiled(name: str, act: Callable[..., object], *args: object) -> None:
        profile = cProfile.Profile(time.thread_time)
        profiles.append(profile)
        try:
            profile.runcall(run, name, act, *args)
        except ValueError:  # CPython 3.12 and later have one profile at a time
            print(f"no profile of {name}: this Python has one at a time", file=sys.stderr)
            run(name, act, *args)

    threads.run = profiled
    return profiles


def print_profiles(profiles: list[cProfile.Profile]) -> None:
    stats = None
    for profile in profiles:
        profile.create_stats()
        if not profile.getstats():
            continue
        if stats is None:
            stats = pstats.Stats(profile)
        else:
            stats.add(profile)
    if stats is not None:
        stats.sort_stats("tottime").print_stats(TOP)


# The load's side


def append(clients: int) -> Callable[[str, float], str]:
    def load(path: str, length: float) -> str:
        data = request("POST", "/append/events", CONTENT)
        if clients == 1:
            one = Client(path)
            rate = rate_of_one(one, data, length)
            one.close()
        else:
            crowd = Crowd(path, clients)
            rate = crowd.rate(data, length)
            crowd.close()
        return f"{rate:,.0f} appends/s"

    return load


def batch(path: str, length: float) -> str:
    line = b'{"topic":"events","content":"%s"}\n' % CONTENT
    frames = 50_000
    data = request("POST", "/append", line * frames, "Content-Type: application/x-ndjson")
    return _repeat(frames, length, lambda: _post(path, data))


def _post(path: str, data: bytes) -> None:
    one = Client(path)
    one.ask(data)
    one.close()


def replay(path: str, length: float) -> str:
    data = request("GET", "/?topic=events", b"", "Connection: close")
    return _repeat(200_000, length, lambda: discard(path, data))


def lookup(path: str, length: float) -> str:
    one = Client(path)
    rate = rate_of_one(one, request("GET", "/last/events"), length)
    one.close()
    return f"{rate:,.0f} requests/s"


def follow(followers: int) -> Callable[[str, float], str]:
    import follow as bench

    class Where:
        def __init__(self, path: str) -> None:
            self.socket_path = path

    def load(path: str, length: float) -> str:
        where: Any = Where(path)
        readers = bench.follow(where, followers, lambda _: "events")
        latency = bench.Latency(where, readers, 20, followers)
        found = []
        until = time.perf_counter() + length
        while time.perf_counter() < until:
            found.append(latency.round(lambda _: "events"))
        latency.close()
        readers.close()
        return f"{sorted(found)[len(found) // 2]:.3f} ms until the last has it, p50"

    return load


def web(connections: int) -> Callable[[str, float], str]:
    import gateway as bench

    def load(path: str, length: float) -> str:
        data = request("GET", "/hello?a=1", b"", "User-Agent: bench", "Accept: */*")
        with bench.handler(path, "forever"):
            crowd = Crowd(os.path.dirname(path) + WEB, connections)
            rate = crowd.rate(data, length)
            crowd.close()
        return f"{rate:,.0f} requests/s"

    return load


def _repeat(frames: int, length: float, act: Callable[[], object]) -> str:
    count = 0
    started = time.perf_counter()
    while time.perf_counter() - started < length:
        act()
        count += frames
    return f"{count / (time.perf_counter() - started):,.0f} frames/s"


LOADS: dict[str, Callable[[], Callable[[str, float], str]]] = {
    "append1": lambda: append(1),
    "append8": lambda: append(8),
    "append50": lambda: append(50),
    "batch": lambda: batch,
    "replay": lambda: replay,
    "lookup": lambda: lookup,
    "follow1": lambda: follow(1),
    "follow100": lambda: follow(100),
    "follow1000": lambda: follow(1000),
    "web1": lambda: web(1),
    "web50": lambda: web(50),
}


def run(name: str, mode: str, length: float) -> None:
    load = LOADS[name]()
    with folder() as where:
        path = os.path.join(where, "store")
        if name in ("replay", "lookup"):
            populate(path, ("events" for _ in range(200_000)))
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", mode, path],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        assert process.stdout is not None
        try:
            process.stdout.readline()  # "serving …": from now on it answers
            print(f"== {name}, {mode}: {load(os.path.join(path, 'sock'), length)}", flush=True)
            process.send_signal(signal.SIGTERM)
            print(process.communicate(timeout=DEADLINE)[0], flush=True)
        finally:
            process.kill()  # of no effect when it has ended
            process.wait()


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--serve"]:
        serve(words[1], words[2])
        return
    if not words or words[0] not in LOADS:
        raise SystemExit(f"usage: tools/profile LOAD [SECONDS]: LOAD is one of {', '.join(LOADS)}")
    for mode in ("bare", "sample", "profile"):
        run(words[0], mode, float(words[1]) if len(words) > 1 else 5.0)


if __name__ == "__main__":
    main()
