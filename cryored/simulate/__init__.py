"""From atomic models to maps, particles and training pairs."""
