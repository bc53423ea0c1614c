"""Every objective over a grid of betas and seeds on the same pairs and draws; what of the papers'
claims shows. `python -m bench.evidence`.
"""
