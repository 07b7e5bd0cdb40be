"""Lightning data modules with Megatron's batching: deterministic across world sizes, resumable in mid-epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.lightning.data import WrappedDataLoader
from nemo.utils import logging
from torch.utils.data import DataLoader, Dataset

from nemo_cosmos.contracts import CheckpointCard, LatentCacheCard, Split
from nemo_cosmos.data.clips import ClipDataset
from nemo_cosmos.data.latent_cache import LatentDataset, read_cache_card, require_continuous
from nemo_cosmos.data.shuffle import AlternatingBatches, PictureSamples, ShuffledEpochs
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel.data_sampler import CosmosDataSampler
from nemo_cosmos.tokenizer.statistics import LatentStatistics, Numbers


class _MegatronDataModule(pl.LightningDataModule):
    """What both data modules share: batching, and the count of consumed samples in checkpoints."""

    def __init__(
        self, *, seq_length: int, micro_batch_size: int, global_batch_size: int, seed: int, num_workers: int
    ) -> None:
        super().__init__()
        if global_batch_size % micro_batch_size:
            raise user_error(
                "global_batch_size",
                global_batch_size,
                f"a multiple of micro_batch_size={micro_batch_size}",
                "Change one.",
            )
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.data_sampler = CosmosDataSampler(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def dataset(self, split: Split) -> Dataset:
        """The finite data set of one split."""
        raise NotImplementedError

    def card_fields(self) -> dict[str, Any]:
        """What a checkpoint's card says of the data."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Shuffled training samples, as many as the trainer's `max_steps` asks for."""
        # Not steps x batch: a resumed run may have begun with another global batch size.
        steps_left = self.trainer.max_steps - self.trainer.global_step
        num_samples = self.data_sampler.init_consumed_samples + steps_left * self.global_batch_size
        return self._loader(self.training_samples(num_samples), mode="train")

    def training_samples(self, num_samples: int) -> Dataset:
        """The training samples in the order in which they are seen."""
        return ShuffledEpochs(self.dataset("train"), num_samples=num_samples, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """Held-out samples in an order that never changes."""
        batches = self.trainer.limit_val_batches
        num_samples = self.global_batch_size * (batches if isinstance(batches, int) else 1)
        held_out = ShuffledEpochs(self.dataset("heldout"), num_samples=num_samples, seed=0)
        return self._loader(held_out, mode="validation")

    def _loader(self, dataset: Dataset, mode: str) -> DataLoader:
        return WrappedDataLoader(
            mode=mode, dataset=dataset, num_workers=self.num_workers, persistent_workers=self.num_workers > 0
        )

    def state_dict(self) -> dict[str, Any]:
        """How many samples were consumed."""
        consumed = self.data_sampler.compute_consumed_samples(
            self.trainer.global_step - self.data_sampler.init_global_step
        )
        return {"consumed_samples": consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the samples that were consumed."""
        consumed = state_dict["consumed_samples"]
        self.data_sampler.init_consumed_samples = consumed
        self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.if_first_step = 1
        logging.info(f"Resuming the data after {consumed} samples.")


class LatentDataModule(_MegatronDataModule):
    """Batches of a latent cache, for the diffusion WFM.

    Args:
        path: Folder that `nemo-cosmos tokenize` wrote.
        with_actions: Only samples that carry actions, and give them.
        sources: Only these domains.
        statistics_of: Card of the checkpoint that is post-trained; its latent statistics are used, and its tokenizer
            must be the cache's.
        micro_batch_size: Samples per forward pass and data-parallel rank.
        global_batch_size: Samples per optimizer step.
        patch_spatial: Latent pixels per token and axis; sets the token count that pipeline stages exchange.
        seed: Of the sample order.
        num_workers: Loader processes.
    """

    def __init__(
        self,
        path: str,
        *,
        with_actions: bool = False,
        sources: tuple[str, ...] | None = None,
        statistics_of: str | None = None,
        micro_batch_size: int = 16,
        global_batch_size: int = 16,
        patch_spatial: int = 2,
        seed: int = 1234,
        num_workers: int = 0,
    ) -> None:
        self.path = Path(path)
        self.with_actions = with_actions
        self.sources = sources
        card = read_cache_card(path)
        require_continuous(card)
        self.cache_card = card
        self.samples = card.num_samples["train"]
        self.tokenizer_fingerprint = card.tokenizer_fingerprint
        self._known = _statistics(card, statistics_of)
        _, frames, height, width = card.latent_shape
        super().__init__(
            seq_length=frames * (height // patch_spatial) * (width // patch_spatial),
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            num_workers=num_workers,
        )

    def card_fields(self) -> dict[str, Any]:
        """Where the data came from, and what its latents mean."""
        return {
            "data": f"latents of {self.samples} windows",
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            **self._known.card_fields(),
            "text_encoder": self.cache_card.text_encoder,
        }

    @property
    def statistics(self) -> tuple[Numbers, Numbers]:
        """Mean and standard deviation that latents of the cache's length are normalised by."""
        known = self._known.of(self.cache_card.latent_shape[1])
        assert known is not None
        return known

    def dataset(self, split: Split) -> Dataset:
        """Latent samples of one split."""
        return LatentDataset(
            self.path,
            split=split,
            sources=self.sources,
            with_actions=self.with_actions,
            statistics=self.statistics,
        )


def _statistics(cache: LatentCacheCard, base_card: str | None) -> LatentStatistics:
    if base_card is None:
        return LatentStatistics(mean=cache.latent_mean, std=cache.latent_std)
    base = CheckpointCard.from_dict(read_json(base_card))
    found = LatentStatistics.of_card(base)
    if found.mean is None or found.std is None:
        raise user_error("statistics_of", base_card, "the card of a diffusion WFM", "Give its card.json.")
    if base.tokenizer_fingerprint != cache.tokenizer_fingerprint:
        raise UserError(
            f"{base_card}: this model was trained on latents of tokenizer {base.tokenizer_fingerprint}, but the cache "
            f"was written by {cache.tokenizer_fingerprint}. Tokenize again with the model's tokenizer."
        )
    return found


class VideoClipDataModule(_MegatronDataModule):
    """Batches of pixel windows, for the tokenizer; with pictures between them where these are asked for.

    Windows of one frame are pictures, which is what a tokenizer of images takes.

    Pictures are every `stride`-th frame of every clip, also of clips that are too short for a window, and so of one
    frame. Validation sees videos only.

    Args:
        path: Folder that `nemo-cosmos curate` wrote.
        num_frames: Frames per window.
        height: Pixels.
        width: Pixels.
        stride: Frames between the starts of two windows of a clip.
        crop_from: Bring a clip to this height first, keeping its aspect, and cut each window out of it at random;
            None resizes the whole frame to height x width.
        pictures_every: Of so many global batches the last one holds pictures; 2 alternates, None is videos only.
        pictures_per_sample: Pictures that stand for one window in such a batch.
        micro_batch_size: Windows per forward pass and data-parallel rank.
        global_batch_size: Windows per optimizer step.
        seed: Of the window order, and of what is cut out.
        num_workers: Loader processes.

    Raises:
        UserError: A size is out of range.
    """

    def __init__(
        self,
        path: str,
        *,
        num_frames: int = 17,
        height: int = 128,
        width: int = 128,
        stride: int = 8,
        crop_from: int | None = None,
        pictures_every: int | None = None,
        pictures_per_sample: int = 1,
        micro_batch_size: int = 4,
        global_batch_size: int = 4,
        seed: int = 1234,
        num_workers: int = 0,
    ) -> None:
        if pictures_every is not None and pictures_every < 2:
            raise user_error("pictures_every", pictures_every, "at least 2, or None for videos only", "Raise it.")
        if pictures_per_sample < 1:
            raise user_error("pictures_per_sample", pictures_per_sample, "at least 1", "Raise it.")
        self.path = Path(path)
        self.window = {"num_frames": num_frames, "height": height, "width": width, "stride": stride}
        self.crop_from = crop_from
        self.pictures_every, self.pictures_per_sample = pictures_every, pictures_per_sample
        super().__init__(
            seq_length=num_frames,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            num_workers=num_workers,
        )

    def card_fields(self) -> dict[str, Any]:
        """What the windows are."""
        text = "curated clips in windows of {num_frames} frames of {height}x{width}".format(**self.window)
        if self.crop_from is not None:
            text += f", cut out of {self.crop_from} lines"
        if self.pictures_every is not None:
            text += f"; one batch in {self.pictures_every} of single frames, {self.pictures_per_sample} a sample"
        return {"data": text}

    def sample_sizes(self) -> list[tuple[int, int, int]]:
        """(frames, height, width) of all that training will see."""
        num_frames, height, width = (self.window[name] for name in ("num_frames", "height", "width"))
        lengths = [num_frames] if self.pictures_every is None else [num_frames, 1]
        return [(length, height, width) for length in lengths]

    def dataset(self, split: Split) -> Dataset:
        """Pixel windows of one split."""
        return self._windows(split, self.window["num_frames"])

    def training_samples(self, num_samples: int) -> Dataset:
        """Windows, and pictures between them."""
        videos = super().training_samples(num_samples)
        if self.pictures_every is None:
            return videos
        pictures = PictureSamples(self._windows("train", 1), num_pictures=self.pictures_per_sample)
        return AlternatingBatches(
            videos,
            ShuffledEpochs(pictures, num_samples=num_samples, seed=self.seed),
            every=self.pictures_every,
            global_batch_size=self.global_batch_size,
            first_item=self.data_sampler.init_consumed_samples,
            first_step=self.trainer.global_step,
        )

    def _windows(self, split: Split, num_frames: int) -> ClipDataset:
        window = {**self.window, "num_frames": num_frames}
        return ClipDataset(self.path, split=split, crop_from=self.crop_from, **window)
