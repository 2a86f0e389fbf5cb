"""How long an encoder takes on a GPU, calculated from the machine code of its kernels and a device's published rates."""
