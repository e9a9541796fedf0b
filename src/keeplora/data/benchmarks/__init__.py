"""Loaders of the published benchmarks, each from the files that its authors distribute; one module a dataset."""
