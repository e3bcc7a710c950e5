"""Engines that compute kernels."""
