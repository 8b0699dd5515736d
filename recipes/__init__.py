"""What users copy, run and trust: whole experiments on top of torchmargin."""
