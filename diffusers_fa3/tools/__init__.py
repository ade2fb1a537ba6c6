"""The command `diffusers-fa3`: `cli` reads the arguments, `bench` measures."""
