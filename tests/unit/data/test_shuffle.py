import torch

from nemo_cosmos.data.shuffle import ShuffledEpochs


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"value": torch.tensor(index)}


def _values(data, start, stop):
    return [int(data[i]["value"]) for i in range(start, stop)]


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own():
    data = ShuffledEpochs(Numbers(), num_samples=30, seed=1)
    epochs = [_values(data, 10 * e, 10 * e + 10) for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_an_item_depends_on_its_number_and_the_seed_only():
    data = ShuffledEpochs(Numbers(), num_samples=30, seed=1)
    fresh = ShuffledEpochs(Numbers(), num_samples=99, seed=1)
    assert _values(fresh, 17, 30) == _values(data, 17, 30)
    assert _values(ShuffledEpochs(Numbers(), num_samples=30, seed=2), 0, 30) != _values(data, 0, 30)
    assert data[17]["draw_id"] == 17
