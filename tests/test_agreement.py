"""With one process; two of them talk in tests/test_trainer.py."""

from hybrid_dit.agreement import gathered


def test_one_process_hears_itself():
    assert gathered("ä{}") == ["ä{}"]
