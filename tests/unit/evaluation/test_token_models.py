import numpy as np
import pytest

from nemo_cosmos.evaluation import token_models
from nemo_cosmos.evaluation.token_models import BIGRAM, PREVIOUS_FRAME, UNIGRAM, BigramModel, UnigramModel

VOCABULARY = 5
FIRST = np.array([[[0, 1], [2, 3]], [[1, 1], [2, 4]], [[1, 0], [2, 4]]])
"""[T, H, W]."""


def _counted(videos):
    return token_models.count_token_models(lambda: videos, vocab_size=VOCABULARY)


def test_a_unigram_model_adds_one_to_every_count():
    bits = _counted([FIRST])[UNIGRAM](FIRST)
    # Of the eight tokens after the given frame: 0 once, 1 three times, 2 twice, 3 never, 4 twice.
    np.testing.assert_allclose(2**-bits, np.array([[[4, 4], [3, 3]], [[4, 2], [3, 3]]]) / 13)


def test_bigrams_look_at_the_token_before_and_at_the_frame_before():
    models = _counted([FIRST])
    unigram = np.array([2, 4, 3, 1, 3]) / 13
    # Pairs of the token before: (3, 1), (1, 1), (1, 2), (2, 4), (4, 1), (1, 0), (0, 2), (2, 4); once seven times but
    # for (2, 4), so D = 6 / (6 + 2).
    once, after_one = 1 - 0.75, 3
    expected = {
        (0, 0, 0): once + 0.75 * unigram[1],  # 3 was followed by 1 alone
        (0, 0, 1): once / after_one + 0.75 * 3 / after_one * unigram[1],
        (0, 1, 1): (2 - 0.75) / 2 + 0.75 / 2 * unigram[4],
    }
    bits = models[BIGRAM](FIRST)
    for place, probability in expected.items():
        assert 2 ** -bits[place] == pytest.approx(probability)
    # At the same place: (0, 1), (1, 1), (2, 2), (3, 4), (1, 1), (1, 0), (2, 2), (4, 4); twice (1, 1) and (2, 2).
    discount = 4 / (4 + 2 * 2)
    bits = models[PREVIOUS_FRAME](FIRST)
    assert 2 ** -bits[0, 0, 1] == pytest.approx((2 - discount) / 3 + discount * 2 / 3 * unigram[1])
    assert 2 ** -bits[1, 1, 0] == pytest.approx((2 - discount) / 2 + discount / 2 * unigram[2])


@pytest.mark.parametrize("pairs", [[], [([0, 0, 0, 1, 1], [1, 1, 2, 3, 3])], [([0, 1], [1, 2])]])
def test_probabilities_add_up_to_one_after_every_token(pairs):
    unigram = UnigramModel([np.array([0, 1, 1])], vocab_size=VOCABULARY)
    model = BigramModel([(np.array(a), np.array(b)) for a, b in pairs], unigram=unigram)
    contexts, tokens = np.meshgrid(np.arange(VOCABULARY), np.arange(VOCABULARY), indexing="ij")
    np.testing.assert_allclose((2 ** -model.bits(contexts, tokens)).sum(1), 1)


def test_counts_do_not_depend_on_how_pairs_are_gathered(monkeypatch):
    videos = list(np.random.default_rng(0).integers(0, VOCABULARY, (7, 3, 2, 2)))
    whole = {name: bits(FIRST) for name, bits in _counted(videos).items()}
    monkeypatch.setattr(token_models, "_PAIRS_HELD", 10)
    for name, bits in _counted(videos).items():
        np.testing.assert_array_equal(bits(FIRST), whole[name])


def test_bigrams_find_what_depends_on_their_context():
    """Still frames have no news; a run along the rows is told by the token before."""
    generator = np.random.default_rng(1)
    still = [np.repeat(generator.integers(0, VOCABULARY, (1, 4, 4)), 3, axis=0) for _ in range(200)]
    found = {name: bits(still[0]).mean() for name, bits in _counted(still[1:]).items()}
    assert found[PREVIOUS_FRAME] < 0.01 and found[UNIGRAM] > 2.2 and found[BIGRAM] > 2.2
    runs = [(np.arange(48).reshape(3, 4, 4) + i) % VOCABULARY for i in range(200)]
    assert _counted(runs[1:])[BIGRAM](runs[0]).mean() < 0.01
