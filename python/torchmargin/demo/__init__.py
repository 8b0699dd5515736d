"""The demo: what margin losses learn on real handwritten digits. Run `python -m torchmargin.demo`."""
