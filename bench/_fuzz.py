"""The parsers of what strangers send, fuzzed by coverage: `tools/fuzz [SECONDS] [TARGET…]`.

tests/fuzz_targets.py says what must hold of any bytes. atheris (libFuzzer) looks for inputs that
take new ways through xs, and keeps them in .cache/fuzz/TARGET for the next run; what breaks a
promise is written to .cache/fuzz/found. Where atheris can't be installed, inputs are made by chance
from the same seeds, which finds less. A finding belongs into tests/test_fuzz.py, with its bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / ".cache" / "fuzz"
FOUND = CORPUS / "found"
SECONDS = 600.0
NAMES = ("request", "response", "frame", "meta", "query")
INPUT_MAX = 4000  # bytes
INSTRUMENTED = ["xs.http1", "xs.frame", "xs.meta", "xs.query", "xs.times", "xs.ids", "json"]

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--one"]:
        by_coverage(arguments[1], float(arguments[2]))
        return 0
    seconds = float(arguments.pop(0)) if arguments and arguments[0][0].isdigit() else SECONDS
    names = arguments or list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        print(f"fuzz: no target {unknown[0]!r}: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    covers = importlib.util.find_spec("atheris") is not None
    if not covers:
        print("fuzz: without atheris, by chance alone (it has wheels for CPython 3.11 to 3.13)")
    FOUND.mkdir(parents=True, exist_ok=True)
    status = 0
    for name in names:
        each = seconds / len(names)
        status |= run_atheris(name, each) if covers else by_chance(name, each)
    return status


def run_atheris(name: str, seconds: float) -> int:
    """One target in a process of its own: libFuzzer ends its process with what it finds."""
    log = CORPUS / f"{name}.log"
    with log.open("wb") as output:
        command = [sys.executable, __file__, "--one", name, str(seconds)]
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    said = log.read_text(errors="replace").splitlines()
    last = next((line for line in reversed(said) if "cov:" in line), "nothing was run")
    print(f"{name}: {'ok' if status == 0 else 'FOUND SOMETHING'}: {last.strip()}", flush=True)
    if status:
        print("\n".join(line[:300] for line in said[-30:]))
    return int(status != 0)


def by_coverage(name: str, seconds: float) -> None:
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=INSTRUMENTED):
        import fuzz_targets

    target = fuzz_targets.TARGETS[name]
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    words = corpus.with_suffix(".dict")
    words.write_text(
        "".join('"' + "".join(f"\\x{byte:02x}" for byte in each) + '"\n' for each in target.tokens)
    )
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={max(1, round(seconds))}",
            f"-max_len={INPUT_MAX}",
            f"-dict={words}",
            f"-artifact_prefix={FOUND}/{name}-",
            str(corpus),
        ],
        target.check,
    )
    atheris.Fuzz()


def by_chance(name: str, seconds: float) -> int:
    import fuzz_targets

    target = fuzz_targets.TARGETS[name]
    end = time.monotonic() + seconds
    seed = int.from_bytes(os.urandom(4), "big")
    count = 0
    while time.monotonic() < end:
        seed += 1
        for data in fuzz_targets.mutated(target, seed, 500):
            count += 1
            try:
                target.check(data)
            except Exception:
                path = FOUND / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
                path.write_bytes(data)
                print(f"{name}: FOUND SOMETHING: {path}\n{traceback.format_exc()}")
                return 1
    print(f"{name}: ok: {count} inputs, the last of seed {seed}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
