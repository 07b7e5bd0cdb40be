"""The published perceptual distance. `SparsePerceptual` is tested in test_losses.py."""

import pytest
import torch

from nemo_cosmos.tokenizer.perceptual import LAYER_WEIGHTS, VggPerceptual, gram_matrix


class Pyramid(torch.nn.Module):
    """Two stages: the pixels, and twice their sum over colours at half the size."""

    name = "pyramid"

    def forward(self, x_NCHW: torch.Tensor) -> list[torch.Tensor]:
        self.num_seen = x_NCHW.shape[0]
        return [x_NCHW, 2 * torch.nn.functional.avg_pool2d(x_NCHW, 2).sum(1, keepdim=True)]


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two videos [2, 3, 4, 8, 8]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 3, 4, 8, 8, generator=generator) * 2 - 1 for _ in range(2))


def distance(**settings: object) -> VggPerceptual:
    return VggPerceptual(Pyramid(), layer_weights=(0.5, 3.0), **settings)


def test_features_are_compared_as_they_are_and_weighted_by_stage() -> None:
    x, y = pair()
    frames_x, frames_y = (video.transpose(1, 2).flatten(0, 1) for video in (x, y))
    first = (frames_x - frames_y).abs().mean()
    second = (Pyramid()(frames_x)[1] - Pyramid()(frames_y)[1]).abs().mean()
    assert distance()(x, y).item() == pytest.approx((0.5 * first + 3 * second).item(), rel=1e-6)
    assert distance()(x, x) == 0


def test_gram_matrices_are_over_all_positions_of_a_video() -> None:
    x, y = pair()
    perceptual, gram = distance().with_gram(x, y)
    expected = 0.0
    for stage, weight in ((0, 0.5), (1, 3.0)):
        products = []
        for video in (x, y):
            maps = torch.stack([Pyramid()(clip.transpose(0, 1))[stage] for clip in video])  # B T K H W
            products.append(torch.einsum("btihw,btjhw->bij", maps, maps) / maps[0, :, 0].numel())
        expected += weight * (products[0] - products[1]).square().mean()
    assert gram.item() == pytest.approx(expected.item(), rel=1e-5)
    assert perceptual == distance()(x, y)


def test_gram_matrices_forget_where_things_are_and_when() -> None:
    x_BTKHW = pair()[0].transpose(1, 2)
    # float32 sums in another order.
    torch.testing.assert_close(gram_matrix(x_BTKHW.flip(1, 4)), gram_matrix(x_BTKHW), rtol=1e-5, atol=1e-6)


def test_few_frames_are_drawn_by_the_steps_seed() -> None:
    x, y = pair()
    measure = distance(num_frames=1)
    values = []
    for seed in (1, 1, 2, 3, 4, 5):
        torch.manual_seed(seed)
        torch.rand(len(values))
        values.append(measure(x, y).item())
    assert values[0] == values[1]
    assert len(set(values)) > 2
    assert measure._features.num_seen == 2


def test_the_published_weights_of_the_stages() -> None:
    assert pytest.approx((0.384615, 0.208333, 0.270270, 0.178571, 6.666667), rel=1e-5) == LAYER_WEIGHTS
