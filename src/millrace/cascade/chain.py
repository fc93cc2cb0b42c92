"""The type of a ledger's entries, under the name that cascade's modules know; `observe.chain` proves them."""

from millrace.observe.chain import Entry

__all__ = ["Entry"]
