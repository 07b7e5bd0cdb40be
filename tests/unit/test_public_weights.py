import hashlib
from pathlib import Path

import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.public_weights import public_weights

CONTENT = b"weights"
NAME = f"net-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch hub's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_a_file_is_fetched_once(hub: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    url = (tmp_path / NAME).as_uri()
    assert public_weights(url) == hub / NAME
    (tmp_path / NAME).unlink()
    assert public_weights(url).read_bytes() == CONTENT


def test_a_file_that_is_not_what_it_says_is_refused(hub: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"others")
    with pytest.raises(UserError, match="its SHA-256 does not start with"):
        public_weights((tmp_path / NAME).as_uri())


def test_what_cannot_be_fetched_says_where_to_put_it(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot be fetched .* put it at {hub / NAME}"):
        public_weights((tmp_path / NAME).as_uri())


def test_offline_nothing_is_fetched(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        public_weights((tmp_path / NAME).as_uri())
    hub.mkdir(parents=True)
    (hub / NAME).write_bytes(CONTENT)
    assert public_weights((tmp_path / NAME).as_uri()) == hub / NAME
