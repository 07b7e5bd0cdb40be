"""Video2World with actions: from the first frame and what the body does, what the camera will see.

Source: Cosmos report (arXiv 2501.03575), section 6.2; the published model predicts one frame at a time from the
relative motion of a gripper, ours a whole clip, eight actions to a latent frame.
"""

from __future__ import annotations

from nemo_cosmos.contracts import ACTION_DIM
from nemo_cosmos.diffusion.conditioning import ConditioningConfig
from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.errors import user_error


def action_conditioned(
    config: DiTConfig,
    *,
    edm: EDM | None = None,
    init_from: str | None = None,
    num_condition_frames: int = 1,
    seed: int = 1234,
) -> DiffusionModel:
    """The model and its training, for post-training with actions.

    Args:
        config: The network; `action_dim` must be 7 and `concat_condition_mask` set.
        edm: Preconditioning and law of the noise levels; the published ones when absent.
        init_from: Safetensors file of the base's whole weights, which may lack the action layers; to start from a
            NeMo checkpoint give `base` to `nemo_cosmos.training.api.finetune` instead.
        num_condition_frames: Latent frames given.
        seed: Of all random draws.

    Returns:
        The LightningModule.

    Raises:
        UserError: The network takes no actions or no frames.
    """
    if config.action_dim != ACTION_DIM:
        raise user_error("action_dim", config.action_dim, str(ACTION_DIM), "Set it in the model's configuration.")
    if not config.concat_condition_mask:
        raise user_error("concat_condition_mask", False, "True", "Start from a Video2World model.")
    conditioning = ConditioningConfig(
        min_condition_frames=num_condition_frames, max_condition_frames=num_condition_frames
    )
    return DiffusionModel(config, edm=edm, conditioning=conditioning, init_from=init_from, seed=seed)
