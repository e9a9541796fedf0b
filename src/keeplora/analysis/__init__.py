"""The paper's questions as functions of tensors and numbers: spectra, likeness of features, intervals, and what follows.

Whatever needs a run, a tuner or a method is in `keeplora.study.analyze`; this room is a leaf.
"""
