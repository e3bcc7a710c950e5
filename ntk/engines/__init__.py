"""Engines that compute kernels from a traced function."""
