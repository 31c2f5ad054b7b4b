"""What an event is: its fields and their rules, as text and as values. Pure: no files, no clock.

The rules are those of docs/protocol.md, Frame. A frame's JSON is written once, by `encode`, and is
handed on as those bytes ever after; `Frame` is for those who want its fields.
"""

from __future__ import annotations

from xs import ids
from xs.errors import Invalid
from xs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Optional

    Patterns = Optional[frozenset[str]]  # exact topics and `prefix.*`; None: every topic

TOPIC_MAX = 255  # bytes
KEY_MAX = 255  # bytes of an idempotency key
PATTERNS_MAX = 100  # in one comma-separated list

RUNTIME_PREFIX = "xs."
APPENDABLE_RUNTIME_TOPICS = frozenset({"xs.store.add", "xs.store.remove"})
_ORDERS = frozenset({"spawn", "send", "terminate", "register", "unregister"})  # to the runtime

FOREVER = "forever"
EPHEMERAL = "ephemeral"

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TOPIC_START = frozenset(_LETTERS + "_")
_TOPIC_CHARACTERS = frozenset(_LETTERS + "0123456789_-.")
_NUMBER_MAX = 10**15  # of milliseconds or frames in a TTL: far above use, far below 64 bits


class Frame(NamedTuple):
    """One event. `meta` is the decoded JSON value; `hash` an integrity string or None.

    An integer in meta with more digits than `sys.get_int_max_str_digits()` is a `decimal.Decimal`.

    `timestamp` and `content` are there only when a read asked for them: RFC 3339 text, and str
    (UTF-8 text) or bytes.
    """

    topic: str
    id: str
    hash: Optional[str]
    meta: Any
    ttl: Optional[str]
    timestamp: Optional[str] = None
    content: Any = None

    @classmethod
    def from_json(cls, line: bytes | str) -> Frame:
        """The frame in one line of the API's answers."""
        import json  # here: most of what begins with this module has no need of it

        try:
            value = json.loads(line)
        except ValueError:  # an integer longer than CPython turns into an int
            value = json.loads(line, parse_int=_long_integer)
        content = value.get("content")
        if content is None and value.get("content_base64") is not None:
            from binascii import a2b_base64

            content = a2b_base64(value["content_base64"])
        return cls(
            value["topic"],
            value["id"],
            value.get("hash"),
            value.get("meta"),
            value.get("ttl"),
            value.get("timestamp"),
            content,
        )


class Entry(NamedTuple):
    """A frame on its way to who follows live. `line` is its JSON without a newline.

    `digest` and `content` are there for an ephemeral frame only; `first`, the id of a run's first
    frame, for one that continues it; of the first frame itself `begins` is true.
    """

    id: int
    topic: str
    line: bytes
    expires: Optional[int] = None
    digest: Optional[bytes] = None
    content: Optional[bytes] = None
    first: Optional[int] = None
    begins: bool = False

    def is_live(self, now: int) -> bool:
        """Whether it may still be delivered: not expired, and not removed (then it has no line)."""
        return bool(self.line) and (self.expires is None or self.expires > now)

    @property
    def size(self) -> int:
        return len(self.line) + len(self.content or b"")


def entries_of(topic: str, values: list[int], lines: list[bytes]) -> list[Entry]:
    """Entries of stored frames of one topic, made together: a third of what each costs."""
    from itertools import repeat

    none = repeat(None)
    fields = zip(values, repeat(topic), lines, none, none, none, none, repeat(False))
    return [*map(tuple.__new__, repeat(Entry), fields)]


def _long_integer(digits: str) -> Any:
    try:
        return int(digits)
    except ValueError:
        from decimal import Decimal

        return Decimal(digits)


def encode(topic: str, id_text: str, hash_: str | None, meta: str, ttl: str) -> str:
    """A frame as the JSON that is stored and sent. `meta` is JSON text ("null" for none)."""
    integrity = f'"{hash_}"' if hash_ else "null"
    return f'{{"topic":"{topic}","id":"{id_text}","hash":{integrity},"meta":{meta},"ttl":"{ttl}"}}'


def encode_alike(topic: str, id_texts: list[str], hashes: list[str], meta: str) -> list[str]:
    """As `encode`, for frames with content that are kept for ever: a tenth of the cost of each."""
    before, after = f'{{"topic":"{topic}","id":"', f'","meta":{meta},"ttl":"{FOREVER}"}}'
    return [f'{before}{id_}","hash":"{hash_}{after}' for id_, hash_ in zip(id_texts, hashes)]


_ID_KEY = b'","id":"'
_HASH_KEY = b'","hash":"'


def id_of(line: bytes) -> str:
    """The id of a frame that `encode` made, without decoding it: no topic has a quote in it."""
    start = line.index(_ID_KEY) + len(_ID_KEY)
    return line[start : start + ids.LENGTH].decode("ascii")


def topic_of(line: bytes) -> str:
    """The topic of a frame that `encode` made, without decoding it."""
    return line[10 : line.index(b'"', 10)].decode("ascii")


def hash_text(line: bytes) -> str | None:
    """The hash of a frame that `encode` made, without decoding it."""
    start = line.index(_ID_KEY) + len(_ID_KEY) + ids.LENGTH
    if not line.startswith(_HASH_KEY, start):
        return None
    start += len(_HASH_KEY)
    return line[start : line.index(b'"', start)].decode("ascii")


def ttl_of(line: bytes) -> str:
    """The TTL of a frame that `encode` made, without decoding it."""
    return line[line.rindex(b'"ttl":"') + 7 : -2].decode("ascii")


def meta_of(line: bytes) -> str:
    """The meta of a frame that `encode` made, as its text."""
    start = line.index(b',"meta":') + 8  # no topic, id or hash has such a comma
    return line[start : line.rindex(b',"ttl":"')].decode()


# Runs: content in pieces, a frame for each (docs/protocol.md, Chunked content)


def may_begin_run(line: bytes) -> bool:
    """Whether a frame that `encode` made may be the first of a run; if it is, the index knows."""
    return b'"more":true' in line


def begins_run(line: bytes) -> bool:
    """As `may_begin_run`, by its meta: an object that has `more`, and it is true."""
    if not may_begin_run(line):
        return False
    import json

    meta = json.loads(line, parse_int=float).get("meta")
    return isinstance(meta, dict) and meta.get("more") is True and "chunk" not in meta


def first_meta(meta: str) -> str:
    """The meta of a run's first frame: what was given, with `more`. Raises `Invalid`."""
    if meta in ("null", "{}"):
        return '{"more":true}'
    if meta[0] != "{":
        raise Invalid("the meta of a chunked append is an object, as more is put into it")
    members = _members(meta)
    for name in ("more", "chunk"):
        if name in members:
            raise Invalid(f"a chunked append says by itself what {name} is: leave it out of meta")
    return meta[:-1] + ',"more":true}'


def piece_meta(first: str, *, more: bool, error: str | None = None, cause: str = "") -> str:
    """The meta of a frame that continues the run whose first frame has that id.

    `cause` is more members, as JSON.
    """
    if error is not None:
        import json

        return f'{{"chunk":"{first}","more":false,"error":{json.dumps(error, ensure_ascii=False)}}}'
    comma = "," if cause else ""
    return f'{{"chunk":"{first}","more":{"true" if more else "false"}{comma}{cause}}}'


class Continuation(NamedTuple):
    """What meta says of a frame that continues a run: the id of its first frame, and so on."""

    first: str
    more: bool
    has_error: bool


def continuation_in(meta: str) -> Continuation | None:
    """What meta says of the run that a frame continues; None if it does not look like it.

    That it looks like it makes no frame part of a run: the index knows which are.
    """
    if '"chunk"' not in meta or meta[0] != "{":
        return None
    members = _members(meta)
    first, more = members.get("chunk"), members.get("more")
    if not isinstance(first, str) or not isinstance(more, bool) or not ids.is_id(first):
        return None
    return Continuation(first.lower(), more, "error" in members)


def _members(meta: str) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(meta, parse_int=float)
    return found


# Topics and patterns


def check_topic(topic: str) -> str:
    """`topic`, if it may name a stored frame. Raises `Invalid` otherwise."""
    if not topic:
        raise Invalid("the topic is empty: give one such as notes or notes.add")
    if len(topic) > TOPIC_MAX:
        raise Invalid(f"the topic is too long: at most {TOPIC_MAX} bytes")
    if (
        topic[0] not in _TOPIC_START
        or not _TOPIC_CHARACTERS.issuperset(topic)
        or topic[-1] == "."
        or ".." in topic
    ):
        raise Invalid(
            f"not a topic: {topic[:80]!r}: use a-z A-Z 0-9 _ - and single dots between words, "
            "and begin with a letter or _"
        )
    return topic


def check_client_topic(topic: str) -> str:
    """`check_topic`, and not one of the runtime's own names. Raises `Invalid` otherwise."""
    if topic.startswith(RUNTIME_PREFIX) and topic not in APPENDABLE_RUNTIME_TOPICS:
        raise Invalid(
            f"topic {topic[:80]!r} belongs to the runtime: choose one that isn't under xs."
        )
    return check_topic(topic)


def prefixes(topic: str) -> list[str]:
    """The wildcards that a topic falls under, `*` apart: `a.b.c` → `["a.*", "a.b.*"]`."""
    parts = topic.split(".")
    return [".".join(parts[:n]) + ".*" for n in range(1, len(parts))]


def runs_code(topic: str) -> bool:
    """Whether what is appended there is run, fed to what runs, ends it, or has a store served."""
    return topic in APPENDABLE_RUNTIME_TOPICS or topic.rpartition(".")[2] in _ORDERS


def parse_patterns(text: str) -> Patterns:
    """The patterns of a comma-separated list; None when one of them is `*`."""
    names = text.split(",")
    if len(names) > PATTERNS_MAX:
        raise Invalid(f"too many topic patterns: at most {PATTERNS_MAX}")
    for name in names:
        if name == "*":
            continue
        try:
            check_topic(name[:-2] if name.endswith(".*") else name)
        except Invalid:
            raise Invalid(
                f"not a topic pattern: {name[:80]!r}: use a topic, prefix.* or *, "
                "or several of them with commas between"
            ) from None
    return None if "*" in names else frozenset(names)


def matches(patterns: Patterns, topic: str) -> bool:
    """Whether a frame of `topic` is among those that `patterns` select."""
    if patterns is None or topic in patterns:
        return True
    return "." in topic and any(prefix in patterns for prefix in prefixes(topic))


# Time to live


def parse_ttl(value: object) -> str:
    """The one spelling of a TTL that a client gave as text, a number of milliseconds, or None."""
    if value is None or value == FOREVER:
        return FOREVER
    if value == EPHEMERAL:
        return EPHEMERAL
    if isinstance(value, int) and not isinstance(value, bool):
        kind, number = "time", str(value)
    elif isinstance(value, str):
        kind, _, number = value.rpartition(":")
        kind = kind or "time"
    else:
        kind, number = "", ""
    if kind in ("time", "last") and number.isascii() and number.isdigit():
        amount = int(number[:20])
        if 1 <= amount <= _NUMBER_MAX and len(number) <= 20:
            return f"{kind}:{amount}"
    raise Invalid(
        f"not a ttl: {str(value)[:64]!r}: use forever, ephemeral, "
        "time:<milliseconds> (or the number alone), or last:<number of frames>"
    )


def expiry(ttl: str, id_ms: int) -> int | None:
    """When a frame with that TTL and id is gone: milliseconds since 1970, or None for never."""
    return id_ms + int(ttl[5:]) if ttl.startswith("time:") else None


def kept(ttl: str) -> int | None:
    """The n of `last:n`, else None."""
    return int(ttl[5:]) if ttl.startswith("last:") else None


# Integrity strings (W3C Subresource Integrity): sha256- and standard base64 of the digest


def integrity(digest: bytes) -> str:
    """The hash string of a sha256 digest."""
    return "sha256-" + _base64(digest, newline=False).decode("ascii")


def _first_base64(data: bytes, *, newline: bool) -> bytes:
    """The base64 of the first digest (RFC 4648 §4), which may be the only one that a command needs.

    To load `binascii`, and zlib with it, takes a hundred times as long.
    """
    global _base64
    _base64 = _next_base64
    if len(data) != 32:  # of a damaged index
        return _next_base64(data, newline=newline)
    bits = int.from_bytes(data, "big") << 2  # 32 bytes are 42 digits, and 4 bits of the next
    digits = [_BASE64[bits >> shift & 63] for shift in range(252, -1, -6)]
    return "".join([*digits, "="]).encode("ascii")


def _next_base64(data: bytes, *, newline: bool) -> bytes:
    global _base64
    from binascii import b2a_base64

    _base64 = b2a_base64
    return b2a_base64(data, newline=newline)


_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_base64: Callable[..., bytes] = _first_base64


def parse_base64(text: object) -> bytes:
    """The bytes of a `content_base64`. Raises `Invalid` for what isn't text in base64."""
    from binascii import a2b_base64, b2a_base64

    if isinstance(text, str):
        try:
            data = a2b_base64(text)
            # That passes over what is no base64 at all; text that is, is made again from its bytes.
            if b2a_base64(data, newline=False).decode() == text:
                return data
        except ValueError:
            pass  # said below, as for what only looks like base64
    raise Invalid("content_base64 is not base64")


def parse_integrity(text: str) -> bytes:
    """The digest in a hash string. Raises `Invalid` if it is none, or not the canonical one."""
    if len(text) == 51 and text.isascii():
        from binascii import a2b_base64

        try:
            digest = a2b_base64(text[7:])
        except ValueError:
            digest = b""
        # Written again, it is the same: so nothing else stood among the digits of base64, and the
        # two bits that the last of them has to spare are 0.
        if len(digest) == 32 and integrity(digest) == text:
            return digest
    raise Invalid(f"not a hash: {text[:80]!r}: it is sha256- and the 44 characters of base64")
