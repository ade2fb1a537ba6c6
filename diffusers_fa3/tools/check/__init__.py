"""The command `diffusers-fa3 check`: your own model, on its default attention and on this one."""
