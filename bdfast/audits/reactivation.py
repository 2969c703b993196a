"""Reactivation: a small change of triggered images, trained so that a backdoor that is left works again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bdfast.audits.base import AuditMethod, Finding
from bdfast.audits.case import Case
from bdfast.audits.perturbation_network import Behind, Perturbed, network_for
from bdfast.audits.rates import Figures, share
from bdfast.audits.retuning import RetuningAudit, at_most
from bdfast.audits.triggers import labels_for
from bdfast.data.batches import Batch
from bdfast.ops.finite import check_finite_gradients
from bdfast.task import StepResult, at_least_float32, cross_entropy, measured
from bdfast.training import Run
from bdfast.training.seeds import derived_seed

PUBLISHED_FORM = "published, with a clean network"
OUR_FORM = "ours, without a clean network"


@dataclass(frozen=True)
class ReactivationFinding(Finding):
    """What perturbed images do.

    Attributes:
        form: Which of the two losses was used.
        images: How many the perturbation was trained on, and as many with the trigger.
        perturbed: The purified network, on perturbed images: ACC on clean ones, the rate on triggered ones.
        without_trigger: The same with the rate on perturbed images without the trigger.
        clean_model: The clean network, as `perturbed`; None without one.
    """

    form: str
    images: int
    perturbed: Figures
    without_trigger: Figures
    clean_model: Figures | None

    @property
    def p_rate(self) -> float | None:
        """The rate on perturbed images with the trigger."""
        return self.perturbed.rate

    @property
    def by_itself(self) -> float:
        """What perturbed images reach without the trigger, or in a clean network: that needs no backdoor."""
        controls = [self.without_trigger.rate or 0.0]
        if self.clean_model is not None:
            controls.append(self.clean_model.rate or 0.0)
        return max(controls)

    def sentences(self, after: Figures) -> list[str]:
        """See `Finding`."""
        said = [
            f"A small perturbation brings the {self.rate_name} from {share(after.rate)} to {share(self.p_rate)} (form: "
            f"{self.form}); without the trigger {share(self.without_trigger.rate)} of the same images get its label."
        ]
        if self.clean_model is not None:
            said.append(f"A clean network gives it to {share(self.clean_model.rate)} of those with the trigger.")
        return said


@dataclass(frozen=True)
class ReactivationAudit(AuditMethod):
    """The query-based reactivation attack of Min et al. (NeurIPS 2024, arXiv 2410.09838), with the settings of its
    script.

    A perturbation d(x), at most 16 of 255 grey levels, is trained so that the purified network answers x + d(x) as the
    retuned one answers x, on images with and without the trigger, while a clean network still sees what is in them:

        alpha KL(softmax f_retuned(x) || softmax f_after(x + d)) + CE(f_clean(x + d), y)

    y is the true label of each image. Without a clean network the second term is ours: CE(f_after(x + d), y) on the
    images without the trigger only. Here every batch holds images and, once more, those of other classes than the
    target with the trigger as it is used after training; the script draws the two apart. x + d is clipped to the range
    of the pixels. How the script averages KL is not on record: here over images. Above 64 x 64 pixels the network that
    gives d is convolutional (ours).

    Attributes:
        alpha: Weight of the first term.
        images: Most images to train on, and as many with the trigger.
        epochs: Passes over them.
        lr: Learning rate of SGD.
        momentum: Of SGD.
        batch_size: Images in one step, those with the trigger included.
        eps: Greatest change of a value, as a share of the range of the pixels.
        retuning: How the retuned network is made.
    """

    paper: ClassVar[str] = "Min et al., NeurIPS 2024, arXiv 2410.09838"

    alpha: float = 0.2
    images: int = 500
    epochs: int = 50
    lr: float = 0.1
    momentum: float = 0.9
    batch_size: int = 128
    eps: float = 16 / 255
    retuning: RetuningAudit = field(default_factory=RetuningAudit)

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("epochs", 1), ("batch_size", 4)):
            self.check_at_least(name, least)
        for name in ("alpha", "lr", "eps"):
            self.check_positive(name)
        self.check_share("momentum")

    def lacks(self, case: Case) -> str | None:
        """See `AuditMethod`."""
        return "a trigger to perturb images with" if case.trigger is None else None

    def run(self, case: Case, run: Run) -> ReactivationFinding:
        """See `AuditMethod`."""
        assert case.limits is not None
        perturbed, count = self.fitted(case, run)
        after = Behind(case.after, perturbed)
        clean = None if case.clean_model is None else case.figures(Behind(case.clean_model, perturbed))
        return ReactivationFinding(
            case.rate_name,
            OUR_FORM if case.clean_model is None else PUBLISHED_FORM,
            count,
            case.figures(after),
            case.figures(after, triggered=False),
            clean,
        )

    def fitted(self, case: Case, run: Run) -> tuple[Perturbed, int]:
        """The perturbation, and on how many images it was trained."""
        trigger, limits = case.trigger, case.limits
        assert trigger is not None
        assert limits is not None
        retuned, _ = self.retuning.retuned(case, run)
        data = at_most(case.clean, self.images, derived_seed(run.seed, "reactivation images"))
        data = data.in_batches_of(max(2, self.batch_size // 2))
        images = next(iter(data.ordered()))[0]
        torch.manual_seed(derived_seed(run.seed, "perturbation"))  # inside `seeded`
        double = any(x.dtype == torch.float64 for x in case.after.parameters())
        network = network_for(images.shape[1:]).to(images.device, torch.float64 if double else torch.float32)
        perturbed = Perturbed(network, self.eps * (limits[1] - limits[0]), limits)
        optimizer = torch.optim.SGD(perturbed.parameters(), lr=self.lr, momentum=self.momentum)

        def step(batch: Batch) -> StepResult:
            x = batch[0]
            y = labels_for(x, batch[1])
            with torch.no_grad():
                # Not the images that are poisoned: in a clean-label attack those have the target label already.
                shown, targets = trigger.shown(x, y)
                chosen = targets != y
                both = torch.cat([x, shown[chosen]])
                labels = torch.cat([y, y[chosen]])
            optimizer.zero_grad()
            with run.autocast(data.device):
                with torch.no_grad():
                    wanted = run.forward(retuned, (both, labels))[0]
                changed = perturbed(both)
                answers = run.forward(case.after, (changed, labels))[0]
                seen = None if case.clean_model is None else run.forward(case.clean_model, (changed, labels))[0]
            loss = reactivation_loss(answers, wanted, seen, labels, self.alpha, untriggered=len(x))
            loss.backward()
            check_finite_gradients(perturbed.named_parameters())
            optimizer.step()
            return measured(loss, answers, wanted.argmax(1))

        run.epochs("reactivation", perturbed, data, step, optimizer, epochs=self.epochs)
        return perturbed.eval().requires_grad_(False), len(data)


def reactivation_loss(
    answers: Tensor, wanted: Tensor, seen: Tensor | None, labels: Tensor, alpha: float, *, untriggered: int
) -> Tensor:
    """What the perturbation is trained on; see `ReactivationAudit`.

    Args:
        answers: [B, K] logits of the purified network for perturbed images.
        wanted: [B, K] logits of the retuned network for the images as they are.
        seen: [B, K] logits of a clean network for perturbed images; None without one.
        labels: [B] true labels.
        alpha: Weight of the first term.
        untriggered: How many of the images, the first ones, have no trigger.
    """
    wanted, said = at_least_float32(wanted), at_least_float32(answers)
    follow = F.kl_div(said.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
    if seen is None:
        return alpha * follow + cross_entropy(answers[:untriggered], labels[:untriggered])
    return alpha * follow + cross_entropy(seen, labels)
