"""The compiled loss region: objectives, kernels, their checks and the pure PyTorch oracle."""
