"""Published models are told by their shapes, without reading a value."""

from __future__ import annotations

import pytest
import torch

from nemo_cosmos.diffusion.config import PRESETS, DiTConfig, diffusion_tiny
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.published import config_of_reference, is_reference
from nemo_cosmos.diffusion.state_dict import entering, leaving, weight_table
from nemo_cosmos.errors import UserError
from nemo_cosmos.weight_files.stored_tensor import Weights, stored


def reference_weights(config: DiTConfig) -> Weights:
    """Shapes alone."""
    with torch.device("meta"):
        state = CosmosDiT(config).state_dict()
    return leaving(stored({name: w for name, w in state.items() if w is not None}), config, "reference")


@pytest.mark.parametrize(("name", "video2world"), [("diffusion_7b", False), ("diffusion_14b", True)])
def test_the_released_sizes_are_found(one_rank: torch.device, name: str, video2world: bool) -> None:
    expected = PRESETS[name](concat_condition_mask=video2world, backend="torch")
    weights = reference_weights(expected)
    assert is_reference(weights)
    found = config_of_reference(weights)
    for field in ("num_layers", "hidden_size", "rope_ratio", "concat_condition_mask", "max_latent_size"):
        assert getattr(found, field) == getattr(expected, field)
    assert entering(weights, found, "reference").keys() == {row.ours for row in weight_table(expected)}


def test_post_trained_actions_are_found(one_rank: torch.device) -> None:
    # The published action model takes one action of a whole clip.
    config = diffusion_tiny(action_dim=7, action_frames_per_latent=1, backend="torch")
    found = config_of_reference(reference_weights(config), "diffusion_tiny")
    assert (found.action_dim, found.action_frames_per_latent) == (7, 1)


def test_other_sizes_need_a_name_or_a_card(one_rank: torch.device) -> None:
    weights = reference_weights(diffusion_tiny(backend="torch"))
    with pytest.raises(UserError, match=r"'hidden_size': 192.*expected the shapes of diffusion_7b or diffusion_14b"):
        config_of_reference(weights)
    assert config_of_reference(weights, "diffusion_tiny").hidden_size == 192
    with pytest.raises(UserError, match="expected the shapes of diffusion_7b"):
        config_of_reference(weights, "diffusion_7b")


def test_networks_of_other_conditions_and_broken_files_are_refused(one_rank: torch.device) -> None:
    weights = dict(reference_weights(diffusion_tiny(backend="torch")))
    patches = "net.x_embedder.proj.1.weight"
    wide = {**weights, **stored({patches: torch.empty(192, 4 * 24, device="meta")})}
    with pytest.raises(UserError, match="24 channels into patches for 16 out of them"):
        config_of_reference(wide)
    flat = {**weights, **stored({patches: torch.empty(192, device="meta")})}
    with pytest.raises(UserError, match=r"proj\.1\.weight: got \[192\], expected 2 axes"):
        config_of_reference(flat)
    del weights["net.blocks.block0.blocks.2.block.layer1.weight"]
    with pytest.raises(UserError, match=r"block\.layer1\.weight is missing"):
        config_of_reference(weights)
