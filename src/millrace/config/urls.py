"""URLs in a recipe. It is kept in the run's folder and shown by trackers, so no password may stand in one."""

from __future__ import annotations

from urllib.parse import urlsplit


def http_problem(url: str) -> str | None:
    """Why the URL is none that a client of HTTP can ask, as a clause behind its key; None where it is one."""
    import httpx  # at the top it would cost every command a tenth of a second

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        return f"is {url!r}, which is not a URL: {error}"
    if parsed.scheme not in ("http", "https") or not parsed.host:
        return f"is {url!r}, which is not a URL such as http://node7:8000/v1"
    return None


def holds_credentials(url: str) -> bool:
    """Whether a password stands in the URL, or in one of HTTP a user's name, which may be a token."""
    try:
        parsed = urlsplit(url)
    except ValueError:  # brackets that hold no address
        return False
    return bool(parsed.password) or (parsed.scheme in ("http", "https") and "@" in parsed.netloc)
