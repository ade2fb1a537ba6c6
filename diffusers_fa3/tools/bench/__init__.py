"""`diffusers-fa3 bench`: times the attention calls of diffusers' models with every method."""
