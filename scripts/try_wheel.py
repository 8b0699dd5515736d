"""What a fresh wheel must do where it is installed, without a GPU: load, say what it is, and compute one loss."""

import os

import torch

import torchmargin

embeddings = torch.randn(4, 8, requires_grad=True)
loss = torchmargin.ArcFaceLoss(8, 30)
loss(embeddings, torch.arange(4)).backward()
assert embeddings.grad is not None and torch.isfinite(embeddings.grad).all()
assert loss.logits(embeddings).shape == (4, 30)

kernels = torchmargin.config.cuda_architectures()
wanted = os.environ.get("TORCHMARGIN_CUDA")
assert wanted is None or bool(kernels) == (wanted == "ON"), (wanted, kernels)
prefix = torchmargin.utils.cmake_prefix_path.split(";")[0]
assert os.path.exists(f"{prefix}/TorchMargin/TorchMarginConfig.cmake"), prefix
print(f"torchmargin {torchmargin.__version__} beside torch {torch.__version__}: {kernels or 'CPU only'}")
