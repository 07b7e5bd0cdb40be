"""What is trained: a tokenizer's architecture, its loss and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.lightning import io
from torch import Tensor

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.parallel.startup import run_seed
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.context_parallel import Axis, check_shareable
from nemo_cosmos.tokenizer.initialization import initialize
from nemo_cosmos.tokenizer.load import load
from nemo_cosmos.tokenizer.losses import LossConfig, check_terms
from nemo_cosmos.tokenizer.megatron_model import (
    MegatronImageTokenizer,
    MegatronVideoTokenizer,
    build_megatron_tokenizer,
    check_layout,
)
from nemo_cosmos.tokenizer.model import LATENT_MAKERS, check_image_shape, check_video_shape
from nemo_cosmos.tokenizer.weights import load_default


@dataclass(kw_only=True)
class TokenizerModelConfig(TransformerConfig, io.IOMixin):
    """How a tokenizer is trained. Megatron's transformer fields have no meaning here and hold placeholders.

    Its parallel sizes have: tensor-parallel ranks divide channels, context-parallel ones the video, and of two pipeline
    stages the first has the encoder.
    Of its fields for recomputation `recompute_granularity="full"` counts, see `recompute.recompute_activations`.
    """

    architecture: TokenizerConfig = field(default_factory=TokenizerConfig)
    """What is built; `nemo_cosmos.tokenizer.config.PRESETS` has the published ones."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the loss terms."""
    init_from: str | None = None
    """Weights to start from: any place that `nemo_cosmos.tokenizer.load.load` takes, or `default` for the embedded
    ones; None starts anew."""
    freeze_encoder: bool = False
    """Train the decoder alone; latents, and all that was trained on them, stay valid."""
    context_parallel_axis: Axis = "height"
    """What context-parallel ranks divide: rows of the picture, or frames, which needs longer videos."""
    num_layers: int = 1
    hidden_size: int = 1
    num_attention_heads: int = 1
    moe_token_dispatcher_type: str = "alltoall"
    variable_seq_lengths: bool = True
    """Pipeline stages tell each other the size of what they send, for it follows the videos."""

    def __post_init__(self) -> None:
        """Makes the checks of Megatron, whose placeholders must divide by the layout's sizes; NeMo calls it again.

        Raises:
            UserError: A term of the loss does not suit the architecture.
        """
        self.num_layers = self.pipeline_model_parallel_size
        self.hidden_size = self.num_attention_heads = self.num_query_groups = self.tensor_model_parallel_size
        super().__post_init__()
        check_terms(self.loss, self.architecture)

    def configure_model(self) -> MegatronVideoTokenizer | MegatronImageTokenizer:
        """Builds the tokenizer of this rank.

        Raises:
            UserError: The model cannot be split in this layout, or the initial weights do not fit the architecture.
        """
        self._check()
        # One seed for all ranks, which cut the same whole weights.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run_seed())
            tokenizer = build_megatron_tokenizer(self.architecture, self)
            if self.init_from is not None:
                tokenizer.load_state_dict(self._initial_weights(self.init_from))
            elif isinstance(tokenizer, MegatronVideoTokenizer):
                initialize(tokenizer)
            # Images keep torch's own first weights, as the reference's networks do: each of the many groups of their
            # norms would take the strength out of the few signals that `initialize` puts into it.
        if self.freeze_encoder:
            for name, parameter in tokenizer.named_parameters():
                parameter.requires_grad_(not name.startswith(LATENT_MAKERS))
        if self._is_split:
            groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
            tokenizer.split(groups, **stage_ends(None), context_parallel_axis=self.context_parallel_axis)
        return tokenizer

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Refuses pictures that cannot be trained on in this layout, before anything is built.

        Args:
            num_frames: Frames of a sample; 1 for pictures.
            height: Pixels.
            width: Pixels.

        Raises:
            UserError: The size does not fit the compression, or is too small for the context-parallel ranks; or the
                layout is impossible at any size.
        """
        self._check()
        channels = self.architecture.in_channels
        if self.architecture.modality == "image":
            if num_frames != 1:
                raise user_error("num_frames", num_frames, "1 for a tokenizer of images", "Set data.num_frames=1.")
            shape: tuple[int, ...] = (1, channels, height, width)
            check_image_shape(self.architecture, shape)
        else:
            shape = (1, channels, num_frames, height, width)
            check_video_shape(self.architecture, shape)
        axis, ranks = self.context_parallel_axis, self.context_parallel_size
        check_shareable(self.architecture, axis, ranks, shape)
        if self.loss.will_code_windows(num_frames):
            windows = (1, channels, self.loss.consistency_frames, height, width)
            check_shareable(self.architecture, axis, ranks, windows)

    @property
    def _is_split(self) -> bool:
        sizes = (self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size)
        return max(sizes) > 1

    def _check(self) -> None:
        check_layout(self.architecture, self, self.context_parallel_axis)
        if self.freeze_encoder and self.pipeline_model_parallel_size > 1:
            raise user_error(
                "freeze_encoder", True, "False with two pipeline stages", "Use one: the first learns nothing."
            )

    def _initial_weights(self, place: str) -> dict[str, Tensor]:
        start = load_default() if place == "default" else load(place).model
        if start.tokenizer_config != self.architecture:
            raise user_error(
                "init_from", start.tokenizer_config, f"weights of {self.architecture}", "Choose its architecture."
            )
        return start.state_dict()
