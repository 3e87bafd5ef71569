"""Measures of trained models on data that this project did not make."""
