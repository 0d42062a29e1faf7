"""Deployment formats: writers that pack bits, and independent readers that check them."""
