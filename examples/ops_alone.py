"""The ops on lists of tensors, compared with plain PyTorch. Any lists will do; here those of a ResNet-18."""
# ruff: noqa: T201

import torch
from torchvision.models import resnet18

from bdfast import backends, ops

torch.manual_seed(0)
print("backends:", ", ".join(name for name, status in backends().items() if status.available))

weights = [x.detach() for x in resnet18().parameters()]
changed = [x + 0.01 * torch.randn_like(x) for x in weights]
grads = [torch.randn_like(x) for x in weights]
rows = sum(len(x) for x in weights)  # a row, dimension 0, is a neuron
print(f"{len(weights)} tensors, {sum(x.numel() for x in weights):,} numbers, {rows:,} neurons")

# How far each neuron has moved: one call for all tensors.
norms = ops.neuron_norms(changed, weights, ord=1)
changes = [(x - y).abs() for x, y in zip(changed, weights, strict=True)]
plain = torch.cat([x.reshape(len(x), -1).sum(1) for x in changes])
print("neuron_norms:", norms.shape, "largest difference from plain PyTorch:", (norms - plain).abs().max().item())

# In the tenth of the neurons that moved most, zero the half of the sub-weights that changed most.
neurons = torch.zeros(rows, dtype=torch.bool)
neurons[norms.argsort(descending=True)[: rows // 10]] = True
per_row = torch.cat([torch.full((len(x),), x[0].numel()) for x in weights])
tau = ops.kth_largest_change(changed, weights, neurons, int(per_row[neurons].sum()) // 2)
zeroed = [x.clone() for x in weights]
count = ops.zero_changed_(zeroed, changed, weights, neurons, tau)
print(f"kth_largest_change: {tau.item():.5f}; zero_changed_ selected {int(count):,} sub-weights")

# Prune the same neurons as a whole.
pruned = [x.clone() for x in weights]
ops.scale_neurons_(pruned, (~neurons).float())
print("scale_neurons_: neurons without any weight left:", int((ops.neuron_norms(pruned) == 0)[neurons].sum()))

# A step of SAM with momentum: move away, (compute gradients there,) restore and update.
params = [x.clone() for x in weights]
saved, buffers = [torch.empty_like(x) for x in params], [torch.zeros_like(x) for x in params]
norm = ops.perturb_(params, grads, saved, rho=0.05)
moved = torch.cat([(x - y).flatten() for x, y in zip(params, weights, strict=True)]).norm()
print(f"perturb_: gradient norm {norm.item():.1f}, the weights moved by {moved.item():.4f}")
ops.sharp_step_(params, saved, grads, buffers, lr=0.1, momentum=0.9)
expected = [x - 0.1 * g for x, g in zip(weights, grads, strict=True)]
difference = max((x - y).abs().max().item() for x, y in zip(params, expected, strict=True))
print("sharp_step_: largest difference from SGD in plain PyTorch:", difference)
