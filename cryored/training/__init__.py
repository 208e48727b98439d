"""Training a prior: batches, pairs made on the device, the loop, evaluation and calibration.

May import from simulation, assessment, prior, reconstruction, files and maps; knows nothing of RELION's runs.
"""
