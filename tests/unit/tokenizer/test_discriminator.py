import pytest
import torch
import torch.nn.functional as F

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.adversary import Adversary
from nemo_cosmos.tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator3d, SpectralConv3d
from nemo_cosmos.tokenizer.losses import WeightSchedule

SMALL = DiscriminatorConfig(channels=4, num_levels=3)


def videos(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def discriminator(config: DiscriminatorConfig = SMALL) -> PatchDiscriminator3d:
    torch.manual_seed(0)
    return PatchDiscriminator3d(config)


@pytest.mark.parametrize(
    ("size", "logits"), [((1, 32, 32), (1, 4, 4)), ((9, 32, 48), (3, 4, 6)), ((17, 64, 64), (5, 8, 8))]
)
def test_logits_of_pictures_and_videos_of_any_size(size: tuple[int, ...], logits: tuple[int, ...]) -> None:
    assert discriminator()(videos(2, 3, *size)).shape == (2, 1, *logits)


def test_a_picture_is_a_video_that_stands_still() -> None:
    picture = videos(1, 3, 1, 32, 32)
    still = discriminator()(picture.expand(1, 3, 9, 32, 32))
    # float32 sums of kernels over equal frames.
    torch.testing.assert_close(still, discriminator()(picture).expand_as(still), rtol=0, atol=1e-6)


def test_it_looks_back_and_ahead() -> None:
    video = videos(1, 3, 9, 32, 32).requires_grad_()
    discriminator()(video)[:, :, 1].sum().backward()
    seen = video.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert seen.all()


def test_a_logit_sees_54_pixels_and_25_frames() -> None:
    video = videos(1, 3, 65, 128, 128).requires_grad_()
    discriminator()(video)[0, 0, 8, 8, 8].backward()
    for axis, length in ((0, 25), (1, 54), (2, 54)):
        others = [i for i in range(3) if i != axis]
        assert int((video.grad[0].abs().amax(0).amax(dim=others) > 0).sum()) == length


def test_each_layer_stretches_nothing() -> None:
    convolution = SpectralConv3d(8, 16, (3, 3, 3), stride=(1, 1, 1))
    for _ in range(50):
        convolution.iterate_power()
    matrix = convolution.weight.detach().flatten(1)
    x = videos(1, 8, 3, 3, 3)
    expected = F.conv3d(F.pad(x, (1, 1, 1, 1, 0, 0)), (convolution.weight / torch.linalg.svdvals(matrix)[0]).detach())
    y = convolution(x)[:, :, 1:2] - convolution.bias.detach().view(1, -1, 1, 1, 1)
    # The power iteration has come within float32 rounding after 50 steps.
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-5)


def test_a_forward_pass_changes_nothing() -> None:
    network = discriminator()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(videos(1, 3, 1, 16, 16))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    network.iterate_power()
    assert not torch.equal(before["head.left"], network.state_dict()["head.left"]) or network.head.out_channels == 1
    assert not torch.equal(before["conv.left"], network.state_dict()["conv.left"])


def adversary(**settings: object) -> Adversary:
    return Adversary(SMALL, **{"weight": 0.5, "num_frames": 5, **settings})


def test_hinge_losses() -> None:
    judge = adversary()
    fake, real = videos(2, 3, 5, 32, 32).requires_grad_(), videos(2, 3, 5, 32, 32, seed=1)
    term, loss = judge.losses(fake, real, step=0)
    with torch.no_grad():
        of_fake, of_real = judge.discriminator(fake), judge.discriminator(real)
    assert term.item() == pytest.approx(-0.5 * of_fake.mean().item())
    expected = (torch.relu(1 - of_real).mean() + torch.relu(1 + of_fake).mean()) / 2
    assert loss.item() == pytest.approx(expected.item())


def test_neither_learns_from_the_others_loss() -> None:
    judge = adversary()
    fake, real = videos(1, 3, 5, 32, 32).requires_grad_(), videos(1, 3, 5, 32, 32, seed=1)
    term, _ = judge.losses(fake, real, step=0)
    assert fake.grad is None
    before = [parameter.grad.clone() for parameter in judge.discriminator.parameters()]
    assert before[0].abs().sum() > 0
    term.backward()
    assert fake.grad.abs().sum() > 0
    assert all(torch.equal(a, p.grad) for a, p in zip(before, judge.discriminator.parameters(), strict=True))


def test_a_warm_start_costs_the_tokenizer_nothing_and_teaches_the_discriminator() -> None:
    judge = adversary(weight=WeightSchedule(values=(0.0, 1.0), boundaries=(10,)))
    fake, real = videos(1, 3, 5, 32, 32).requires_grad_(), videos(1, 3, 5, 32, 32, seed=1)
    term, _ = judge.losses(fake, real, step=9)
    assert term == 0
    assert not term.requires_grad
    assert all(parameter.grad is not None for parameter in judge.discriminator.parameters())
    assert judge.losses(fake, real, step=10)[0].requires_grad


def test_it_sees_the_same_consecutive_frames_in_every_micro_batch() -> None:
    judge = adversary(num_frames=3)
    spans = []
    for seed in (1, 1, 2, 3, 4, 5):
        torch.manual_seed(seed)
        torch.rand(len(spans))
        fake = videos(1, 3, 9, 32, 32).requires_grad_()
        judge.losses(fake, fake.detach(), step=0)[0].backward()
        spans.append((fake.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).nonzero().flatten().tolist())
    assert spans[0] == spans[1]
    assert all(span == list(range(span[0], span[0] + 3)) for span in spans)
    assert len({span[0] for span in spans}) > 2


def test_two_discriminators_start_alike_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = adversary().discriminator.state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)  # and leave torch's own generator as it was
    second = adversary().discriminator.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["in_channels", "channels", "num_levels"])
def test_sizes_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: got 0"):
        DiscriminatorConfig(**{name: 0})
