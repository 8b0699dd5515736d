"""A few small calls of every op on a GPU, for compute-sanitizer: not a test by itself."""

import torch

import torchmargin.functional as F

torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for rows, features, classes in ((5, 7, 33), (33, 70, 300)):
        x = torch.randn(rows, features, device="cuda").to(dtype).requires_grad_()
        w = torch.randn(classes, features, device="cuda").to(dtype).requires_grad_()
        y = torch.randint(0, classes, (rows,), device="cuda")
        cosine = (2 * torch.rand(rows, classes, device="cuda") - 1).to(dtype).requires_grad_()
        loss = F.linear_margin_cross_entropy(x, w, y, scale=16.0, m2=0.3, label_smoothing=0.1)
        loss = loss + F.margin_logits(x, w, y, scale=16.0, m2=0.3).mean()
        loss = loss + F.margin_cross_entropy(cosine, y, scale=16.0, m2=0.3) + F.margin_transform(cosine, m2=0.3).sum()
        loss.backward()
torch.cuda.synchronize()
print("done")
