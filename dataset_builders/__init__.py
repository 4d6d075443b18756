"""Builders of the data an LSM is trained and tested on."""
