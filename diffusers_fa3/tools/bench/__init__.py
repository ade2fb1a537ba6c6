"""`diffusers-fa3 bench`: attention calls of diffusers' models, timed in all ways there are."""
