"""What somebody may do with a store: everything, read, append on some topics. Pure."""

from __future__ import annotations

from xs import frame
from xs.errors import Forbidden
from xs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional


class Rights(NamedTuple):
    """`admin` is everything; `append` has patterns of topics (None: all of them).

    The methods raise `Forbidden` for what one may not do.
    """

    admin: bool = False
    read: bool = False
    append: frame.Patterns = frozenset()

    def check_admin(self, what: str) -> None:
        if not self.admin:
            raise Forbidden(f"this token may not {what}: that takes the owner's, or an admin's")

    def check_read(self) -> None:
        if not (self.read or self.admin):
            raise Forbidden("this token may not read: one made with --read may")

    def check_append(self, topic: Optional[str] = None, ttl: str = frame.FOREVER) -> None:
        """On that topic; on any, if it is None. With `last:n` an append removes other frames."""
        if self.admin:
            return
        if topic is not None and frame.runs_code(topic):
            self.check_admin(f"append to {topic[:80]}, by which programs are run")
        if self.append == frozenset() or not (topic is None or frame.matches(self.append, topic)):
            what = "append" if topic is None else f"append to {topic[:80]}"
            raise Forbidden(f"this token may not {what}: one made with --append for that may")
        if frame.kept(ttl) is not None:
            self.check_admin(f"append with {ttl[:32]}, which removes frames")


EVERYTHING = Rights(admin=True)
