"""Ten lines of training with ArcFace: real 8x8 digits of scikit-learn, a two-layer network."""

import torch
from sklearn.datasets import load_digits

import torchmargin

images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
images, labels = images.float() / 16, labels.long()
network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.PReLU(), torch.nn.Linear(128, 32))
loss = torchmargin.ArcFaceLoss(32, 10, scale=16.0, margin=0.3)  # the class weights are inside
optimiser = torch.optim.Adam([*network.parameters(), *loss.parameters()], lr=1e-3)
for _ in range(20):
    for batch in torch.randperm(len(labels)).split(64):
        value = loss(network(images[batch]), labels[batch])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
correct = (loss.logits(network(images)).argmax(1) == labels).float().mean()
print(f"loss {value.item():.3f}, training accuracy {correct:.3f}")
