"""What would fail at the end of a purification is tried before its first update."""

from __future__ import annotations

from itertools import islice

from torch import nn

from bdfast.data.batches import Batches
from bdfast.task import Forward, cross_entropy
from bdfast.training.copies import copy_of

TRIED = 2
"""Batches of the trial."""


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be trained or holds damaged weights.

    Raises:
        ValueError: Nothing can be trained, or a weight is NaN or infinite. Buffers may be infinite, as masks are.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model: expected parameters that can be trained, got a model that is frozen throughout; call "
            "model.requires_grad_(True) first."
        )
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        damaged = ~value.isfinite() if value.requires_grad else value.isnan()
        if bool(damaged.any()):
            raise ValueError(
                f"model: expected finite weights, got NaN or infinity in {name}; load a checkpoint that is not damaged."
            )


def try_training(model: nn.Module, batches: Batches, forward: Forward) -> None:
    """One forward and backward pass in training mode on two batches, on a copy that is thrown away.

    Raises:
        ValueError: The model cannot be copied, or a pass fails; the message says in which way.
    """
    try:
        trial = copy_of(model)
    except Exception as error:  # a class of the user's may raise anything when it is copied
        raise ValueError(
            f"model: expected a network that copy.deepcopy can copy, got {type(model).__name__}, where it fails "
            f"({error}); remove what cannot be copied, or give the class a __deepcopy__."
        ) from error
    trial.train()
    for batch in islice(batches.shuffled(0), TRIED):
        try:
            logits, targets = forward(trial, batch)[:2]
            cross_entropy(logits, targets).backward()
            _check_dense(trial)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise  # ours, such as that of a sparse gradient
            raise ValueError(
                f"batch_size: expected at least 2 for a network with BatchNorm, got batches of one sample ({error}); "
                "raise batch_size, or that of the DataLoader."
            ) from error
        except (RuntimeError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
            raise ValueError(
                "model: expected a network that can be trained on these batches, got an error in training mode: "
                f"{error}; check the dtype of model and images, or pass forward=."
            ) from error


def _check_dense(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise ValueError(
                f"model: expected dense gradients, got sparse ones for {name}, which weight decay and momentum do not "
                "take; make its layer with sparse=False."
            )
