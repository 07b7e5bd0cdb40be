"""Random access to the members of a tar shard."""

from __future__ import annotations

import tarfile
from pathlib import Path

from nemo_cosmos.errors import UserError


class TarShard:
    """An index of one tar; members are read by offset, so that forked or spawned readers share nothing.

    Args:
        path: The tar.

    Raises:
        UserError: The file is not a readable tar.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with tarfile.open(path, "r:") as tar:
                self._members = {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}
        except (tarfile.TarError, OSError) as error:
            raise UserError(
                f"{path}: not a readable tar shard ({error}). Delete it and run the step that wrote it."
            ) from error

    @property
    def keys(self) -> list[str]:
        """Sample keys in file order: member names without their last suffix, once each."""
        return list(dict.fromkeys(name.rsplit(".", 1)[0] for name in self._members))

    def __contains__(self, name: str) -> bool:
        """Whether the shard has a member of this name."""
        return name in self._members

    def read(self, name: str) -> bytes:
        """Returns a member's bytes.

        Raises:
            UserError: There is no such member.
        """
        if name not in self._members:
            raise UserError(f"{self.path}: has no member {name}. The shard is incomplete; write it again.")
        offset, size = self._members[name]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)
