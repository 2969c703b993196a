"""Loss and hits for images [B, K], tokens [B, T, K] and pairs [B, B], and a purification of the latter two."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast import task

QUICK = {"amp": False, "batch_size": 16, "epochs": 1, "lr": 0.01, "augment": None}


def test_images():
    logits, targets = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1])
    assert [int(x) for x in task.hits(logits, targets)] == [2, 3]
    torch.testing.assert_close(task.cross_entropy(logits, targets), F.cross_entropy(logits, targets))
    loss, hits, total = task.measured(logits.sum(), logits, targets)
    assert (float(loss), int(hits), int(total)) == (7.0, 2, 3)


def test_tokens_and_those_that_do_not_count():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    targets = torch.randint(7, (3, 5), generator=generator)
    targets[:, 3:] = task.IGNORED
    hits, total = task.hits(logits, targets)
    assert int(total) == 9
    assert int(hits) == int((logits[:, :3].argmax(-1) == targets[:, :3]).sum())
    by_hand = F.cross_entropy(logits[:, :3].reshape(-1, 7), targets[:, :3].reshape(-1), label_smoothing=0.1)
    torch.testing.assert_close(task.cross_entropy(logits, targets, label_smoothing=0.1), by_hand)


class Tagger(nn.Module):
    """Tokens [B, T] -> logits [B, T, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(6, 8), nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(self.embedding(tokens)))


@pytest.mark.parametrize("method", ["ft", "ft_sam", "tsbd"])
def test_a_tagger_is_purified_and_evaluated(method):
    torch.manual_seed(0)
    tokens = torch.randint(6, (48, 5))
    tags = torch.where(tokens == 5, task.IGNORED, tokens % 3)
    data = TensorDataset(tokens, tags)
    options = {"tsbd": {"n": 0.1, "unlearn_lr": 0.05, "overlay": 0.0}, "ft_sam": {"rho": 0.1, "overlay": 0.0}}
    result = bdfast.purify(Tagger(), data, method=method, **options.get(method, {}), **QUICK)
    metrics = bdfast.evaluate(result.model, data)
    counted = tags != task.IGNORED
    right = result.model.eval()(tokens).argmax(-1)[counted] == tags[counted]
    assert metrics.acc == pytest.approx(float(right.float().mean()))
    assert 0 <= result.history[-1].accuracy <= 1


def test_pairs_are_purified():
    """Two encoders; the class of an image is the place of its caption in the batch."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"image": nn.Linear(4, 8), "text": nn.Linear(3, 8)})
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 3))

    def forward(model, batch):
        images, captions = batch
        logits = model["image"](images) @ model["text"](captions).T
        return logits, torch.arange(len(images))

    result = bdfast.purify(model, data, method="ft", forward=forward, **QUICK)
    assert result.history[-1].loss > 0
    assert not torch.equal(result.model["image"].weight, model["image"].weight)


def test_labels_that_do_not_fit_are_explained():
    tokens = torch.zeros(4, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"clean: batch 0: expected labels \[4, 5\] for logits \[4, 5, 3\], got \[4\]"):
        bdfast.evaluate(Tagger(), TensorDataset(tokens, tokens[:, 0]))
    with pytest.raises(ValueError, match=r"clean: batch 0: expected labels 0..2, .* got 0..3"):
        bdfast.evaluate(Tagger(), TensorDataset(tokens, torch.arange(20).view(4, 5) % 4))
