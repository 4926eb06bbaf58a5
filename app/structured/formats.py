"""String formats as regular expressions: what they let through every reader of the format takes.

So dates exist (no 30th of February, no year 0), and there are no leap seconds.
"""

from __future__ import annotations

_YEAR = r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_BY_FOUR = r"(?:0[48]|[2468][048]|[13579][26])"
_LEAP_DAY = rf"(?:[0-9]{{2}}{_BY_FOUR}|{_BY_FOUR}00)-02-29"
_DATE = rf"(?:{_YEAR}-{_DAY}|{_LEAP_DAY})"
_HOUR = r"(?:[01][0-9]|2[0-3])"
_TIME = rf"{_HOUR}:[0-5][0-9]:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_HOUR}:[0-5][0-9])"
_ATOM = r"[A-Za-z0-9_+-]{1,16}"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?"

PATTERNS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}T{_TIME}",
    "email": rf"{_ATOM}(?:\.{_ATOM}){{0,3}}@{_LABEL}(?:\.{_LABEL}){{1,4}}",
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,4}}",
    "uuid": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
} | {
    f"uuid{version}": (
        rf"[0-9a-f]{{8}}-[0-9a-f]{{4}}-{version}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}"
    )
    for version in (1, 3, 4, 5)
}
# Left to llguidance.
OTHERS = frozenset({"duration", "ipv4", "ipv6", "uri"})
# OpenAPI's hints about how a value is stored or shown: they constrain nothing.
HINTS = frozenset({"int32", "int64", "float", "double", "password", "binary", "byte"})
