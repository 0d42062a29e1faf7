"""Run exported files in the runtimes they are made for."""
