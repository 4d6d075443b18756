"""Builders of the data for training and testing an LSM."""
