"""VBench and VBench-2.0: which videos they expect, and the table of what they found. Neither runs here."""
