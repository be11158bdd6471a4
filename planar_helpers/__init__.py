"""The shared code of a notebook series on the planar-flow VAE; start at notebooks/00_start_here.ipynb.

Read it in this order: planar, elbo, vae, evaluate, train. The rest (data, targets, plots, run) is support.
"""
