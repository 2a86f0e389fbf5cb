"""How long an encoder takes on a GPU, calculated from its kernels' machine code and a device's rates."""
