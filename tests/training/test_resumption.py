import pytest
import torch
from torch import nn

from bdfast.training.resumption import Checkpoints, fingerprint


def test_a_damaged_checkpoint_is_refused_and_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, "run")
    checkpoints.save("stage", {"epoch": 1})

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save("stage", {"epoch": 2})
    assert checkpoints.load("stage") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["stage.pt"]
    (tmp_path / "stage.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"workdir: expected a checkpoint of bdfast in .*stage.pt, got a file"):
        checkpoints.load("stage")


def test_fingerprint_depends_on_weights_and_description():
    model = nn.Linear(2, 2)
    first = fingerprint(model, "a")
    assert first == fingerprint(model, "a")
    assert first != fingerprint(model, "b")
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert first != fingerprint(model, "a")
