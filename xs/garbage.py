"""`xs gc`: contents that no frame names are removed, once they are old enough.

They were put there by POST /cas, which pins them, or were left by a process that was killed before
it had stored their frame. So are claims, those of writers that were killed before they wrote.
"""

from __future__ import annotations

from xs import claim, fault
from xs.work import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xs.commit import Commit
    from xs.store import Store

AGE_SECONDS = 7 * 86_400  # how old a pin must be before gc takes it, unless asked otherwise


def collect(store: Store, age_seconds: float) -> tuple[int, int]:
    """Removes contents older than `age_seconds` that no frame names; how many, and their bytes.

    What somebody holds, as a backup does, stays until the next time, and does not count.
    """
    before = max(0, store.clock() - int(age_seconds * 1000))
    removed, size, files = store.run(UnpinWork(before))
    fault.at("gc.unpinned")
    for digest, found in files:
        if not store.cas.has(digest):
            removed += 1
            size += found
    for digest in store.cas.digests():
        if store.cas.age(digest) >= age_seconds and not store.index.names_file(
            digest, store.clock()
        ):
            found = store.run(RemoveOrphanWork(digest))
            if found and not store.cas.has(digest):
                removed += 1
                size += found
    fault.at("gc.orphans-removed")
    store.cas.remove_stale()
    claim.remove_stale(store.folder)
    fault.at("gc.done")
    return removed, size


class UnpinWork(Work):
    """Takes away pins made before a time; the result is that of `Commit.unpin`."""

    __slots__ = ("before",)

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before = before

    def apply(self, commit: Commit) -> tuple[int, int, list[tuple[bytes, int]]]:
        return commit.unpin(self.before)


class RemoveOrphanWork(Work):
    """Removes a content file that no frame names; the result is its size in bytes."""

    __slots__ = ("digest",)

    def __init__(self, digest: bytes) -> None:
        super().__init__()
        self.digest = digest

    def apply(self, commit: Commit) -> int:
        return commit.remove_orphan(self.digest)
