import pytest
from stand import Stand


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path / "bin")
