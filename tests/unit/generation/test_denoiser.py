import torch

from nemo_cosmos.diffusion.conditioning import condition_mask
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.generation.denoiser import VideoDenoiser


class NotingNetwork(torch.nn.Module):
    """Keeps what enters it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, _, text, *, condition_mask_B1THW, **__):
        self.seen.append((x, text, condition_mask_B1THW))
        return x


def _denoiser(**options):
    shape = torch.Size([1, 4, 3, 2, 2])
    return VideoDenoiser(
        network=NotingNetwork(),
        edm=EDM(),
        text_emb=torch.ones(1, 2, 3),
        negative_text_emb=torch.zeros(1, 2, 3),
        fps=torch.tensor([10.0]),
        given=torch.full(shape, 0.25),
        mask=condition_mask(torch.tensor([1]), shape),
        augment_noise=torch.zeros(shape),
        video2world=True,
        **options,
    )


def test_the_branch_without_conditions_sees_zeros_for_given_frames():
    denoiser, sigma = _denoiser(guidance=2.0), torch.tensor(3.0)
    noisy = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    result = denoiser(noisy, sigma)
    (x, text, mask), (free_x, free_text, free_mask) = denoiser.network.seen
    scaled = noisy * denoiser.edm.c_in(sigma)
    torch.testing.assert_close(x[:, :, 1:], scaled[:, :, 1:])
    torch.testing.assert_close(x[:, :, 0], (denoiser.given * denoiser.edm.c_in(torch.tensor(0.001)))[:, :, 0])
    assert torch.equal(free_x[:, :, 0], torch.zeros(1, 4, 2, 2))
    assert torch.equal(free_x[:, :, 1:], x[:, :, 1:])
    assert mask[:, :, 0].eq(1).all() and mask[:, :, 1:].eq(0).all() and free_mask.eq(0).all()
    assert text.eq(1).all() and free_text.eq(0).all()
    assert torch.equal(result[:, :, 0], denoiser.given[:, :, 0])


def test_without_guidance_one_branch_runs():
    denoiser = _denoiser()
    denoiser(torch.zeros(1, 4, 3, 2, 2), torch.tensor(1.0))
    assert len(denoiser.network.seen) == 1
