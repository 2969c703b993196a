"""A training loop of your own with `bdfast.SAM`, which has the interface of the common SAM class.

The data is made here: noisy images of four classes.
"""
# ruff: noqa: T201

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bdfast

EPOCHS = 5

torch.manual_seed(0)


def make_images(count: int) -> TensorDataset:
    """A bright quarter of a noisy image tells the class."""
    labels = torch.randint(4, (count,))
    images = torch.rand(count, 1, 2, 8, 2, 8)
    images[torch.arange(count), :, labels // 2, :, labels % 2] += 0.05
    return TensorDataset(images.view(count, 1, 16, 16), labels)


model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 4)
)
loader, test = DataLoader(make_images(1000), batch_size=50, shuffle=True), make_images(500)

# Named parameters, so that an error about a gradient can name its parameter.
optimizer = bdfast.SAM(model.named_parameters(), torch.optim.SGD, rho=0.05, lr=0.01, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
for epoch in range(EPOCHS):
    model.train()
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.first_step(zero_grad=True)  # saves the weights, and moves them to where the loss is larger
        F.cross_entropy(model(images), labels).backward()
        optimizer.second_step(zero_grad=True)  # restores the weights and updates them, in one pass over memory
    schedule.step()
    print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}, test {bdfast.evaluate(model, test).acc:.3f}")

# What SAM looks at: how much the loss grows at a small distance along the gradient.
images, labels = test.tensors
model.eval()
loss = F.cross_entropy(model(images), labels)
loss.backward()
with bdfast.perturbed(model.parameters(), rho=0.05), torch.no_grad():
    nearby = F.cross_entropy(model(images), labels)
print(f"test loss {loss.item():.4f}, at a distance of 0.05 along the gradient {nearby.item():.4f}")
