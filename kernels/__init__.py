"""Triton kernels, one file per op. Installed as `bdfast.kernels`; nothing imports them before they are needed."""

if __name__ != "bdfast.kernels":
    raise ImportError("This folder is installed as `bdfast.kernels`; import it under that name.")
