"""`report.html`: one self-contained page about a surgery, made from its workdir alone."""

from hybrid_dit.report.page import MAX_BYTES, NAME, check_size, is_current, write_report

__all__ = ["MAX_BYTES", "NAME", "check_size", "is_current", "write_report"]
