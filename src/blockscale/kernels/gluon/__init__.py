"""Hopper kernels in Gluon."""

KERNELS: list[object] = []
