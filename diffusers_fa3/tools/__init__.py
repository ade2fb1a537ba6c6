"""The command `diffusers-fa3`, and what it runs: `cli` reads the arguments, `bench` measures."""
