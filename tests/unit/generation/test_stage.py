import gc
import weakref

import numpy as np
import pytest
import torch

from nemo_cosmos.generation import open as opening
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.generation.stage import Stage
from nemo_cosmos.steps import generate as step


def test_a_stage_is_loaded_when_it_is_used_and_kept_only_where_told():
    loads = []

    def load():
        loads.append(torch.nn.Linear(2, 2))
        return loads[-1]

    kept, freed = Stage(load), Stage(load, keep=False)
    assert not loads
    assert kept.use(lambda part: part.weight.shape) == freed.use(lambda part: part.weight.shape) == (2, 2)
    kept.use(lambda part: None)
    assert len(loads) == 2
    freed.use(lambda part: None)
    assert len(loads) == 3
    assert Stage.of(loads[0]).use(lambda part: part) is loads[0]


def test_work_is_done_in_inference_mode_and_loading_is_not():
    modes = []
    Stage(lambda: modes.append(torch.is_inference_mode_enabled()) or 1).use(
        lambda part: modes.append(torch.is_inference_mode_enabled())
    )
    assert modes == [False, True]


class Residents:
    """Which parts are in memory at each load, by name."""

    def __init__(self):
        self._alive = {}
        self.seen = []

    def watching(self, name, load):
        """A loader that notes what is still in memory when it is called."""

        def loaded(*args, **kwargs):
            part = load(*args, **kwargs)
            gc.collect()
            self.seen.append((name, self.now()))
            self._alive.setdefault(name, []).append(weakref.ref(getattr(part, "model", part)))
            return part

        return loaded

    def now(self):
        return sorted({name for name, parts in self._alive.items() for part in parts if part() is not None})


@pytest.mark.parametrize("offload", [True, False])
def test_offloaded_parts_are_in_memory_one_at_a_time(tmp_path, monkeypatch, offload):
    pytest.importorskip("nudenet")
    residents = Residents()
    network, tokenizer, encoder = opening.StoredNetwork.load, opening.load_tokenizer, opening.load_text_encoder
    monkeypatch.setattr(opening.StoredNetwork, "load", residents.watching("network", network))
    monkeypatch.setattr(opening, "load_tokenizer", residents.watching("tokenizer", tokenizer))
    monkeypatch.setattr(opening, "load_text_encoder", residents.watching("text encoder", encoder))
    for guard in (step.PreGuard, step.PostGuard):
        monkeypatch.setattr(guard, "from_names", residents.watching("guard", guard.from_names))
    np.save(tmp_path / "actions.npy", np.zeros((16, 7), np.float32))
    record = step.generate(
        tmp_path / "a.mp4",
        prompt="A car drives along a street.",
        actions=tmp_path / "actions.npy",
        sampling=SamplingConfig(num_frames=17, height=32, width=32, chunk_frames=9, num_steps=1),
        guards=step.GuardConfig(prompt=("blocklist",), video=("content",)),
        offload=offload,
    )
    assert record.num_frames == 17
    names = [name for name, _ in residents.seen]
    if offload:
        # Fingerprint, then prompt, two chunks (the second is given the end of the first), each decoded.
        sampled = ["text encoder", "network", "tokenizer", "tokenizer", "network", "tokenizer"]
        assert names == ["guard", "tokenizer", *sampled, "guard"]
        assert [alive for _, alive in residents.seen] == [[]] * len(names)
    else:
        assert names == ["guard", "tokenizer", "text encoder", "network", "guard"]
        assert residents.seen[3] == ("network", ["text encoder", "tokenizer"])
        assert residents.seen[4] == ("guard", [])
    gc.collect()
    assert residents.now() == []
