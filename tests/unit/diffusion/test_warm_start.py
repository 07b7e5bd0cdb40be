import pytest
import torch
from safetensors.torch import save_file

from nemo_cosmos.diffusion.config import diffusion_tiny
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel.startup import initialize


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with initialize():
        model = CosmosDiT(diffusion_tiny(num_layers=2))
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.1, generator=generator)
        path = tmp_path_factory.mktemp("base") / "base.safetensors"
        state = {name: tensor.clone() for name, tensor in model.global_tensors()}
        save_file(state, path)
        yield model, path, state


def _inputs():
    generator = torch.Generator().manual_seed(1)
    latent, text = torch.randn(1, 16, 3, 8, 8, generator=generator), torch.randn(1, 5, 384, generator=generator)
    return latent, torch.tensor([0.1]), text


def test_an_action_model_starts_as_its_base_whatever_the_actions(base):
    model, path, _ = base
    started = DiffusionModel(diffusion_tiny(num_layers=2, action_dim=7), init_from=str(path))
    started.configure_model()
    with torch.no_grad():
        expected = model(*_inputs(), fps=10.0)
        output = started.module(*_inputs(), fps=10.0, actions_BTA=torch.randn(1, 3, 56))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_missing_and_misshapen_weights_are_named(base, tmp_path):
    _, _, state = base
    name = "blocks.1.mlp.linear_fc1.weight"
    for broken, message in (
        (
            {k: v for k, v in state.items() if k != name},
            rf"weight {name} is missing, expected \[768, 192\].*Give weights of the same",
        ),
        ({**state, name: torch.zeros(3, 3)}, f"weight {name} has shape"),
    ):
        save_file(broken, tmp_path / "broken.safetensors")
        model = DiffusionModel(diffusion_tiny(num_layers=2), init_from=str(tmp_path / "broken.safetensors"))
        with pytest.raises(UserError, match=message):
            model.configure_model()
    with pytest.raises(UserError, match="no such file"):
        DiffusionModel(diffusion_tiny(num_layers=2), init_from="nowhere.safetensors").configure_model()
