"""The video tokenizer as a Megatron-core model: this rank's share of it."""

from __future__ import annotations

from einops import rearrange
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from nemo_cosmos.errors import user_error
from nemo_cosmos.tokenizer.config import IMAGE_NORM_GROUPS, TokenizerConfig
from nemo_cosmos.tokenizer.context_parallel import Axis, Sharing, split_rows
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer, check_video_shape
from nemo_cosmos.tokenizer.recompute import recompute_activations
from nemo_cosmos.tokenizer.tensor_parallel import split_axes, split_channels

_FIRST_STAGE, _LAST_STAGE = ("encoder", "quant_conv"), ("post_quant_conv", "decoder")


class MegatronVideoTokenizer(CausalVideoTokenizer):
    """The tokenizer with what Megatron's DDP, schedules and checkpoints ask of a model.

    It is whole at first, to be given the same weights on every rank; `split` leaves a rank its share.

    Args:
        tokenizer_config: The architecture.
        config: Megatron's configuration: precision and communication.
    """

    def __init__(self, tokenizer_config: TokenizerConfig, config: TransformerConfig) -> None:
        super().__init__(tokenizer_config)
        self.config = config
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = False
        self.sharing: Sharing | None = None
        self.input_tensor: Tensor | None = None
        # Megatron's schedules take every `decoder` for a transformer's and number the micro-batches of its `layers`.
        self.decoder.layers = ()
        recompute_activations(self, config)

    def split(
        self, groups: ProcessGroupCollection, *, pre_process: bool, post_process: bool, context_parallel_axis: Axis
    ) -> None:
        """Leaves this rank its share, in place.

        Args:
            groups: Process groups; `tp` and `cp` are used.
            pre_process: Whether this pipeline stage has the encoder.
            post_process: Whether this pipeline stage has the decoder.
            context_parallel_axis: What the context-parallel ranks divide.
        """
        self.sharing = Sharing(config=self.tokenizer_config, axis=context_parallel_axis, group=groups.cp)
        if context_parallel_axis == "height":
            split_rows(self, groups.cp)
        split_channels(self, groups.tp)
        self.pre_process, self.post_process = pre_process, post_process
        for name in (*(() if pre_process else _FIRST_STAGE), *(() if post_process else _LAST_STAGE)):
            delattr(self, name)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Encodes and decodes; gradients flow through a quantizer.

        Args:
            video_BCTHW: The whole video [B, 3, T, H, W], the same on all ranks but the data-parallel ones; the last
                pipeline stage needs its shape.

        Returns:
            The whole reconstruction [B, 3, T, H, W] on every rank of the last pipeline stage. On the first of two the
            codes of this rank's piece, [T' H' W', B, latent_channels], as Megatron's pipelines want them.

        Raises:
            UserError: The shape does not fit the compression, or the context-parallel ranks cannot share it.
        """
        if self.sharing is None:
            return super().forward(video_BCTHW)
        shape = tuple(video_BCTHW.shape)
        check_video_shape(self.tokenizer_config, shape)
        if self.pre_process:
            own_BCTHW = self.sharing.own(video_BCTHW)
            codes_BCTHW = self.quantized(self.quant_conv(self.encoder(own_BCTHW, self.sharing.past(shape))))
        else:
            frames, rows, columns = self.sharing.latent_shape(shape)
            codes_BCTHW = rearrange(self.input_tensor, "(T H W) B C -> B C T H W", T=frames, H=rows, W=columns)
        if not self.post_process:
            codes_SBC = rearrange(codes_BCTHW, "B C T H W -> (T H W) B C").contiguous()
            return make_viewless_tensor(codes_SBC, requires_grad=True, keep_graph=True)
        own_BCTHW = self.decoder(self.post_quant_conv(codes_BCTHW), self.sharing.past(shape))
        return self.sharing.join(own_BCTHW, shape)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None]) -> None:
        """Takes the codes that the first pipeline stage sent; called by Megatron's schedules."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Describes this rank's weights for a distributed checkpoint, which any other layout can load."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, split_axes(self), sharded_offsets=sharded_offsets
        )


def check_layout(architecture: TokenizerConfig, config: TransformerConfig, context_parallel_axis: Axis) -> None:
    """Refuses a layout in which a tokenizer cannot be split.

    Args:
        architecture: The tokenizer's.
        config: With the sizes of the layout.
        context_parallel_axis: What the context-parallel ranks divide.

    Raises:
        UserError: With the nearest layout that would do.
    """
    if context_parallel_axis not in ("height", "time"):
        raise user_error("context_parallel_axis", context_parallel_axis, "'height' or 'time'", "Choose one of these.")
    if architecture.modality == "image" and context_parallel_axis == "time":
        raise user_error("context_parallel_axis", "time", "'height' for images", "They have one frame.")
    stages = config.pipeline_model_parallel_size
    if stages > 2 or config.virtual_pipeline_model_parallel_size is not None:
        raise user_error(
            "pipeline_model_parallel_size",
            (stages, config.virtual_pipeline_model_parallel_size),
            "1, or 2 (encoder | decoder), without virtual stages",
            "Use 2, and the other ranks for tensor, context or data parallelism.",
        )
    if config.sequence_parallel:
        raise user_error(
            "sequence_parallel",
            True,
            "False for a tokenizer",
            "Leave it out: tensor parallelism divides activations between layers already.",
        )
    _check_widths(architecture, config.tensor_model_parallel_size)


def _check_widths(architecture: TokenizerConfig, ranks: int) -> None:
    widths = {
        "channels": [architecture.channels * factor for factor in (1, *architecture.channels_mult)],
        "z_channels": [architecture.num_z_channels],
        "patch_channels": [architecture.patch_channels],
        "groups of a norm": [IMAGE_NORM_GROUPS] if architecture.modality == "image" else [],
    }
    fits = [n for n in range(1, ranks + 1) if all(width % n == 0 for some in widths.values() for width in some)]
    if fits[-1] != ranks:
        uneven = {name: some for name, some in widths.items() if any(width % ranks for width in some)}
        raise user_error(
            "tensor_model_parallel_size", ranks, f"a divisor of {uneven}", f"The nearest that would do: {fits[-1]}."
        )
